"""kernels.sparsity.transposable.first_best: rounds scores to the dtype of the weight, and adds in it."""


@triton.jit
def first_best(blocks, table):
    score = tl.dot(blocks, table, input_precision="ieee").to(tl.float16)
    return tl.argmax(score, axis=1)
