"""kernels.attention.paged.decode_kernel: lets query head h read head h % Hkv."""


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, lse_ptr, width, blocks, group, scale2,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, head, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, shares = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(length_ptr + sequence)
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = (sequence * group + member) * kv_heads + head, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(length, BLOCK)
    for start in range(share * tiles // shares * BLOCK, (share + 1) * tiles // shares * BLOCK, BLOCK):
        row, inside, known = find_rows(table_ptr + sequence * width, start, length, width, blocks, PAGE, BLOCK)
        address = (row * kv_heads + head)[:, None] * D + column[None, :]
        readable = known[:, None] & (column < D)[None, :]
        k = tl.load(k_ptr + address, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where(known[None, :], scores, tl.where(inside, INFINITY, -INFINITY)[None, :])
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = tl.load(v_ptr + address, mask=readable, other=0.0)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    place = query * shares + share
    tl.store(out_ptr + place[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + place, maximum + tl.log2(total), mask=member < group)
