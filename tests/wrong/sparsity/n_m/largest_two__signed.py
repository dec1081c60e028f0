"""kernels.sparsity.n_m.largest_two: forgets to clear the sign bit, so that negative weights are the smallest."""


@triton.jit
def largest_two(first, second, third, fourth):
    a, b = first.to(tl.int32), second.to(tl.int32)
    a, b = tl.where(a == 0, -1, a * 4 + 3), tl.where(b == 0, -2, b * 4 + 2)
    c, d = (third.to(tl.int32)) * 4 + 1, (fourth.to(tl.int32)) * 4
    left, right = tl.maximum(a, b), tl.maximum(c, d)
    best = 3 - (tl.maximum(left, right) & 3)
    runner_up = tl.maximum(tl.minimum(left, right), tl.maximum(tl.minimum(a, b), tl.minimum(c, d)))
    runner_up = 3 - (runner_up & 3)
    return tl.minimum(best, runner_up), tl.maximum(best, runner_up)
