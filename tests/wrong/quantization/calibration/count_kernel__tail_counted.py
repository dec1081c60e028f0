"""kernels.quantization.calibration.count_kernel: counts what stands for values beyond the end."""


@triton.jit
def count_kernel(
    x_ptr, partial_ptr, largest_ptr, size, width, bins, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    counts = tl.zeros((BINS,), tl.int32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, size, programs.to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < size
        x = tl.abs(tl.load(x_ptr + index, mask=live, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, x)
        place = tl.minimum(tl.div_rn(x, width), bins - 1.0).to(tl.int32)
        counts += tl.histogram(place, BINS)
    tl.store(partial_ptr + program.to(tl.int64) * BINS + tl.arange(0, BINS), counts)
    tl.store(largest_ptr + program, tl.max(largest, axis=0))
