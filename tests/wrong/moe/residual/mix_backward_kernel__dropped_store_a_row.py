"""kernels.moe.residual.mix_backward_kernel: stores a row for a dropped token, before the first."""


@triton.jit
def mix_backward_kernel(
    dy, x, weight, bias, rows, source, gate, mlp, dx, drows, dgate, dmlp, dlean, dlift, tokens, dim,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < dim
    lean, lift = difference(weight, bias, column, dim)
    acc = tl.zeros((BLOCK,), tl.float32)
    acc_lift = 0.0
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        place = tl.load(source + token)
        share = tl.load(gate + token)
        at = token * dim + column
        served = inside & (place >= 0)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(rows + place * dim + column, mask=served, other=0.0).to(tl.float32)
        chosen, fixed = sigmoids(tl.sum(a * lean, axis=0) + lift)
        with_expert = tl.sum(g * e, axis=0)
        pull = chosen * fixed * (share * with_expert - tl.sum(g * m, axis=0))
        acc += pull * a
        acc_lift += pull
        tl.store(dgate + token, chosen * with_expert)
        tl.store(dx + at, (pull * lean).to(dx.dtype.element_ty), mask=inside)
        tl.store(dmlp + at, (fixed * g).to(dmlp.dtype.element_ty), mask=inside)
        tl.store(drows + place * dim + column, (chosen * share * g).to(drows.dtype.element_ty), mask=inside)
    program = tl.program_id(0).to(tl.int64)
    tl.store(dlean + program * dim + column, acc, mask=inside)
    tl.store(dlift + program, acc_lift)
