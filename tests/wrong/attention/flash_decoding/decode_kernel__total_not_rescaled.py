"""kernels.attention.flash_decoding.decode_kernel: keeps the total of the old maximum."""


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_stride, v_stride, kv_heads, group, S, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    k_ptr += head_start(head // kv_heads, head % kv_heads, k_stride, D)
    v_ptr += head_start(head // kv_heads, head % kv_heads, v_stride, D)
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = head.to(tl.int64) * group + member, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(S, BLOCK)
    for start in range(split * tiles // splits * BLOCK, (split + 1) * tiles // splits * BLOCK, BLOCK):
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where((start + tl.arange(0, BLOCK) < S)[None, :], scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK, BLOCK_D)
        total = total + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    row = (split.to(tl.int64) * tl.num_programs(0)) * group + query
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) * LN2, mask=member < group)
