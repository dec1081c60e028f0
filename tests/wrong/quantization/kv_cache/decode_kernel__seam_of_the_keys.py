"""kernels.quantization.kv_cache.decode_kernel: takes the positions of the values that are codes to be those of the keys."""


@triton.jit
def decode_kernel(
    q_ptr, k_codes_ptr, k_grid_ptr, k_window_ptr, v_codes_ptr, v_grid_ptr, v_window_ptr, out_ptr, lse_ptr,
    group, capacity, k_packed, v_packed, length, scale2,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr,
    K_PER_CHANNEL: tl.constexpr, V_PER_CHANNEL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, share, shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    k_codes_ptr += head * capacity * (D * K_BITS // 8)
    v_codes_ptr += head * capacity * (D * V_BITS // 8)
    k_grid_ptr += head * grid_numbers(capacity, D, K_GROUP, K_PER_CHANNEL)
    v_grid_ptr += head * grid_numbers(capacity, D, V_GROUP, V_PER_CHANNEL)
    k_window_ptr += head * (length - k_packed) * D
    v_window_ptr += head * (length - v_packed) * D
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = head * group + member, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(length, BLOCK)
    for start in range(share * tiles // shares * BLOCK, (share + 1) * tiles // shares * BLOCK, BLOCK):
        k = load_positions(
            k_codes_ptr, k_grid_ptr, k_window_ptr, start, k_packed, length, q.dtype, D, K_BITS, K_GROUP, K_PER_CHANNEL,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where((start + tl.arange(0, BLOCK) < length)[None, :], scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = load_positions(
            v_codes_ptr, v_grid_ptr, v_window_ptr, start, k_packed, length, q.dtype, D, V_BITS, V_GROUP, V_PER_CHANNEL,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    row = query * shares + share
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + row, maximum + tl.log2(total), mask=member < group)
