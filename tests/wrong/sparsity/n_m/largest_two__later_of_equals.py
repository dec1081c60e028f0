"""kernels.sparsity.n_m.largest_two: puts the position itself below the magnitude, so that of equal ones the later wins."""


@triton.jit
def largest_two(first, second, third, fourth):
    a, b = (first.to(tl.int32) & 0x7FFF) * 4, (second.to(tl.int32) & 0x7FFF) * 4 + 1
    c, d = (third.to(tl.int32) & 0x7FFF) * 4 + 2, (fourth.to(tl.int32) & 0x7FFF) * 4 + 3
    left, right = tl.maximum(a, b), tl.maximum(c, d)
    best = tl.maximum(left, right) & 3
    runner_up = tl.maximum(tl.minimum(left, right), tl.maximum(tl.minimum(a, b), tl.minimum(c, d))) & 3
    return tl.minimum(best, runner_up), tl.maximum(best, runner_up)
