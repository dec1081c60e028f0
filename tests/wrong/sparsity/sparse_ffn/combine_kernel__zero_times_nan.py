"""kernels.sparsity.sparse_ffn.combine_kernel: reads rows of hidden 0, too."""


@triton.jit
def combine_kernel(hidden, chosen, down, y, blocks, N, C, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCKS, BLOCK_C), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        live = block < blocks
        share = tl.load(hidden + token * blocks + block, mask=live, other=0.0)
        row = (block * N + tl.load(chosen + token * blocks + block, mask=live, other=0)) * C
        read = live[:, None] & (column < C)[None, :]
        acc += share[:, None] * tl.load(down + row[:, None] + column[None, :], mask=read, other=0.0).to(tl.float32)
    tl.store(y + token * C + column, tl.sum(acc, axis=0).to(y.dtype.element_ty), mask=column < C)
