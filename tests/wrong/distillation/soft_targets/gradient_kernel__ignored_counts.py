"""kernels.distillation.soft_targets.gradient_kernel: gives ignored tokens a hard gradient."""


@triton.jit
def gradient_kernel(
    student_ptr, teacher_ptr, target_ptr, norm_ptr, dsoft_ptr, dhard_ptr, out_ptr, tokens, vocabulary, blocks, ignored,
    temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    target, scale = tl.load(target_ptr + row), LOG2_E / temperature
    dsoft = tl.load(dsoft_ptr + row) * temperature
    dhard = tl.load(dhard_ptr + row)
    live, offset = column < vocabulary, row * vocabulary + column
    gradient = tl.zeros((BLOCK,), tl.float32)
    if (dsoft != 0) | (dhard != 0):
        s = tl.load(student_ptr + offset, mask=live, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + offset, mask=live, other=0.0).to(tl.float32)
        q = tl.exp2(s * scale - tl.load(norm_ptr + row) * LOG2_E)
        p = tl.exp2(t * scale - tl.load(norm_ptr + tokens + row) * LOG2_E)
        e = tl.exp2((s - tl.load(norm_ptr + 2 * tokens + row)) * LOG2_E)
        gradient = dsoft * (q - p) + dhard * (e - tl.where(column == target, 1.0, 0.0))
    tl.store(out_ptr + offset, gradient.to(out_ptr.dtype.element_ty), mask=live)
