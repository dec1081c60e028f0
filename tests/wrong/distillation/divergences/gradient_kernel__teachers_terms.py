"""kernels.distillation.divergences.gradient_kernel: takes the teacher's terms where the sides are swapped."""


@triton.jit
def gradient_kernel(
    student_ptr, teacher_ptr, norm_ptr, own_ptr, dloss_ptr, out_ptr, tokens, vocabulary, blocks, weight, factor,
    temperature, SWAPPED: tl.constexpr, MIXED: tl.constexpr, SERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    live, offset, scale = column < vocabulary, row * vocabulary + column, LOG2_E / temperature
    dloss = tl.load(dloss_ptr + row)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if dloss != 0:
        s = tl.load(student_ptr + offset, mask=live, other=0.0).to(tl.float32) * scale
        t = tl.load(teacher_ptr + offset, mask=live, other=0.0).to(tl.float32) * scale
        s, t = s - tl.load(norm_ptr + row) * LOG2_E, t - tl.load(norm_ptr + tokens + row) * LOG2_E
        if SWAPPED:
            _, q, terms, _ = mixture_terms(t, s, weight, MIXED, SERIES)
        else:
            q, _, terms, _ = mixture_terms(s, t, weight, MIXED, SERIES)
        gradient = (dloss * factor / temperature) * (terms - q * tl.load(own_ptr + row))
    tl.store(out_ptr + offset, gradient.to(out_ptr.dtype.element_ty), mask=live)
