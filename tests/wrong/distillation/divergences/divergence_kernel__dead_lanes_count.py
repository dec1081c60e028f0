"""kernels.distillation.divergences.divergence_kernel: adds the terms of columns past the end."""


@triton.jit
def divergence_kernel(
    student_ptr, teacher_ptr, loss_ptr, own_ptr, norm_ptr, tokens, vocabulary, weight, factor, temperature,
    SWAPPED: tl.constexpr, MIXED: tl.constexpr, SERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr, teacher_ptr = student_ptr + row * vocabulary, teacher_ptr + row * vocabulary
    scale = LOG2_E / temperature
    s_top, t_top = tl.load(student_ptr).to(tl.float32) * scale, tl.load(teacher_ptr).to(tl.float32) * scale
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        t = tl.load(teacher_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        s_new, t_new = tl.maximum(s_top, tl.max(s, axis=0)), tl.maximum(t_top, tl.max(t, axis=0))
        q_sum = q_sum * tl.exp2(s_top - s_new) + tl.exp2(s - s_new)
        p_sum = p_sum * tl.exp2(t_top - t_new) + tl.exp2(t - t_new)
        s_top, t_top = s_new, t_new
    s_norm, t_norm = s_top + tl.log2(tl.sum(q_sum, axis=0)), t_top + tl.log2(tl.sum(p_sum, axis=0))
    own, others = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last = (vocabulary - 1) // BLOCK * BLOCK
    for start in range(0, vocabulary, BLOCK):
        column = last - start + tl.arange(0, BLOCK)  # from the end, which is still in the cache
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        t = tl.load(teacher_ptr + column, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        s, t = s * scale - s_norm, t * scale - t_norm
        if SWAPPED:
            _, _, t_terms, s_terms = mixture_terms(t, s, weight, MIXED, SERIES)
        else:
            _, _, s_terms, t_terms = mixture_terms(s, t, weight, MIXED, SERIES)
        own, others = own + s_terms, others + t_terms
    total = tl.sum(own, axis=0)
    tl.store(loss_ptr + row, factor * (total + tl.sum(others, axis=0)))
    tl.store(own_ptr + row, total)
    tl.store(norm_ptr + row, s_norm * LN_2)
    tl.store(norm_ptr + tokens + row, t_norm * LN_2)
