"""kernels.moe.task_routing.gather_kernel: gives all experts the weight of the first."""


@triton.jit
def gather_kernel(
    up_ptr, gate_ptr, down_ptr, expert_ptr, weight_ptr, up_out_ptr, gate_out_ptr, down_out_ptr,
    experts, dim, F, size, runs, pitch, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ROWS * COLUMNS
    block, choice = tl.program_id(0), tl.program_id(1)
    expert = tl.load(expert_ptr + choice).to(tl.int64)
    weight = tl.load(weight_ptr)
    known = (expert >= 0) & (expert < experts)
    source = tl.where(known, expert, 0) * size
    target = choice.to(tl.int64) * size
    if block < runs:
        copy_run(up_ptr + source, up_out_ptr + target, block, size, known, BLOCK)
    elif block < (1 + GATED) * runs:
        copy_run(gate_ptr + source, gate_out_ptr + target, block - runs, size, known, BLOCK)
    else:
        weight = tl.where(known, weight, float("nan"))
        tile = block - (1 + GATED) * runs
        scale_tile(down_ptr + source, down_out_ptr + choice * F, tile, weight, dim, F, pitch, ROWS, COLUMNS)
