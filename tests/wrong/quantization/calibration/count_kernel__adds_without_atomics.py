"""kernels.quantization.calibration.count_kernel: loads, adds and stores: equal bins of a block count once."""


@triton.jit
def count_kernel(x_ptr, partial_ptr, largest_ptr, size, width, bins, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_ptr = partial_ptr + program.to(tl.int64) * bins
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, size, programs.to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < size
        x = tl.abs(tl.load(x_ptr + index, mask=live, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, x)
        place = tl.minimum(tl.div_rn(x, width), bins - 1.0).to(tl.int32)
        tl.store(row_ptr + place, tl.load(row_ptr + place) + 1, mask=live)
    tl.store(largest_ptr + program, tl.max(largest, axis=0))
