"""kernels.distillation.soft_targets.losses_kernel: takes the hard loss at the temperature."""


@triton.jit
def losses_kernel(
    student_ptr, teacher_ptr, target_ptr, soft_ptr, hard_ptr, norm_ptr, tokens, vocabulary, ignored, temperature,
    SQUARINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr, teacher_ptr = student_ptr + row * vocabulary, teacher_ptr + row * vocabulary
    scale = LOG2_E / temperature
    s_top, t_top = tl.load(student_ptr).to(tl.float32) * scale, tl.load(teacher_ptr).to(tl.float32) * scale
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    e_sum, cross = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        t = tl.load(teacher_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        s_new, t_new = tl.maximum(s_top, tl.max(s, axis=0)), tl.maximum(t_top, tl.max(t, axis=0))
        s_step, t_step = s_top - s_new, t_top - t_new  # at most 0
        s, t, s_top, t_top = s - s_new, t - t_new, s_new, t_new
        q, p, q_keep, p_keep = tl.exp2(s), tl.exp2(t), tl.exp2(s_step), tl.exp2(t_step)
        cross = p_keep * (cross + p_sum * (t_step - s_step)) + tl.where(live, p * (t - s), 0.0)
        q_sum, p_sum = q_sum * q_keep + q, p_sum * p_keep + p
        e_keep, e = at_one(q_keep, s_step, temperature, SQUARINGS), at_one(q, s, temperature, SQUARINGS)
        e_sum = e_sum * e_keep + e
    total = tl.sum(p_sum, axis=0)
    q_log, p_log, e_log = tl.log(tl.sum(q_sum, axis=0)), tl.log(total), tl.log(tl.sum(e_sum, axis=0))
    soft = tl.sum(cross, axis=0) / total * LN_2 - p_log + q_log
    tl.store(soft_ptr + row, soft * temperature * temperature)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < vocabulary)
    label = tl.load(student_ptr + target, mask=known, other=float("nan")).to(tl.float32) * scale
    hard = (s_top - label) * LN_2 + q_log
    tl.store(hard_ptr + row, tl.where(target == ignored, 0.0, hard))
    tl.store(norm_ptr + row, s_top * LN_2 + q_log)
    tl.store(norm_ptr + tokens + row, t_top * LN_2 + p_log)
    tl.store(norm_ptr + 2 * tokens + row, s_top * (temperature * LN_2) + e_log)
