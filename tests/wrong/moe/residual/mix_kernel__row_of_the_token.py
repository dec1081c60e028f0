"""kernels.moe.residual.mix_kernel: takes rows for being in the order of tokens."""


@triton.jit
def mix_kernel(x, weight, bias, rows, source, gate, mlp, y, tokens, dim, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < dim
    lean, lift = difference(weight, bias, column, dim)
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        place = tl.load(source + token)
        share = tl.load(gate + token)
        at = token * dim + column
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(rows + token * dim + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
        chosen, fixed = sigmoids(tl.sum(a * lean, axis=0) + lift)
        mixed = chosen * share * e + fixed * m
        tl.store(y + at, mixed.to(y.dtype.element_ty), mask=inside)
