"""kernels.sparsity.transposable.first_best: takes the pattern that keeps the least."""


@triton.jit
def first_best(blocks, table):
    score = tl.dot(blocks, table, input_precision="ieee")
    return tl.argmin(score, axis=1)
