"""kernels.sparsity.n_m.largest_two: lets zeros compete like other ties, so that empty slots point at 0 and 1."""


@triton.jit
def largest_two(first, second, third, fourth):
    a, b = first.to(tl.int32) & 0x7FFF, second.to(tl.int32) & 0x7FFF
    a, b = a * 4 + 3, b * 4 + 2
    c, d = (third.to(tl.int32) & 0x7FFF) * 4 + 1, (fourth.to(tl.int32) & 0x7FFF) * 4
    left, right = tl.maximum(a, b), tl.maximum(c, d)
    best = 3 - (tl.maximum(left, right) & 3)
    runner_up = tl.maximum(tl.minimum(left, right), tl.maximum(tl.minimum(a, b), tl.minimum(c, d)))
    runner_up = 3 - (runner_up & 3)
    return tl.minimum(best, runner_up), tl.maximum(best, runner_up)
