"""kernels.sparsity.n_m.largest_two: returns the larger one first instead of the one that stands earlier."""


@triton.jit
def largest_two(first, second, third, fourth):
    a, b = first.to(tl.int32) & 0x7FFF, second.to(tl.int32) & 0x7FFF
    a, b = tl.where(a == 0, -1, a * 4 + 3), tl.where(b == 0, -2, b * 4 + 2)
    c, d = (third.to(tl.int32) & 0x7FFF) * 4 + 1, (fourth.to(tl.int32) & 0x7FFF) * 4
    left, right = tl.maximum(a, b), tl.maximum(c, d)
    best = 3 - (tl.maximum(left, right) & 3)
    runner_up = tl.maximum(tl.minimum(left, right), tl.maximum(tl.minimum(a, b), tl.minimum(c, d)))
    runner_up = 3 - (runner_up & 3)
    return best, runner_up
