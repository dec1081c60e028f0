"""Histogram and largest value of magnitudes in one pass: what calibration collects from every batch of activations.

Fused: the magnitude, its bin, the counts and the maximum.

    bytes        size · b  +  8 P bins        b bytes a value; rows of P programs, written as zeros and read again
    operations   one atomic addition a value  floor: bytes / bandwidth, which it does not reach
Replaces |x|, its maximum, x / width, and a histogram: four passes, of which two also write what the next one reads.

Counting is the hard part: thousands of threads want to add to few numbers. Each program adds to a row of its own, so
that those who want the same bin at the same time are the threads of one program only. The rows fit the L2 cache, which
is where a GPU adds for atomics whose result nobody waits for (REDG). The last step adds the P rows, a small matrix, by
a torch operator. Counts are integers: whatever the order, they are the same in every run.

What binds is the L2. At one addition a clock in each of its some 90 slices, as is assumed here and was not measured, an
H200 counts about 1.5e11 values a second, 0.3 TB/s in 16 bits: 110 us for 4096 x 4096, of which reading takes 8. All
else is 1.4 instructions a warp for each value, 0.4 clocks of a multiprocessor, where those additions take 1.6 (triton
3.7.1, bfloat16, sm_90; counted in the code, without the slow path of the division).
`tl.histogram` counts on chip: votes of a warp tell its threads who has which bin, and each thread counts its 1/32 of
the bins by `popc`, which does 16 a clock. With 2048 bins that is 9 instructions a warp for each value, two of them
`popc`: 4 clocks, 280 us. Work and registers grow with the bins, and from 4096 on registers spill. Histograms that are
extended to a larger batch do come there; here the number of bins costs nothing.

A value beyond the last bin is counted in it. The caller sees from the maximum that it happened, and counts again with
more bins: that is rare, because later batches seldom exceed the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

PROGRAMS = 528  # four for each multiprocessor of an H200
BLOCK = 2048
HELD = 2**23  # counts of all programs: 32 MB, so that the L2 cache holds them; with more bins fewer programs count


@triton.jit
def count_kernel(x_ptr, partial_ptr, largest_ptr, size, width, bins, BLOCK: tl.constexpr):
    """One program: every PROGRAMS-th block of x. partial [programs, bins] int32, all 0 before; largest [programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_ptr = partial_ptr + program.to(tl.int64) * bins
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, size, programs.to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < size
        x = tl.abs(tl.load(x_ptr + index, mask=live, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, x)
        place = tl.minimum(tl.div_rn(x, width), bins - 1.0).to(tl.int32)
        tl.atomic_add(row_ptr + place, 1, mask=live, sem="relaxed")
    tl.store(largest_ptr + program, tl.max(largest, axis=0))


def count_magnitudes(
    x: Tensor, width: float, bins: int, block: int = BLOCK, programs: int = PROGRAMS
) -> tuple[Tensor, Tensor]:
    """(counts int64 [bins], largest float32 []): how many |x| lie in [k width, (k + 1) width), and the largest of them.

    x       float16, bfloat16 or float32 of any shape, contiguous, finite, of fewer than 2**31 values
    width   of a bin, a positive float32; |x| / width is an IEEE division of float32 numbers
    bins    1 to 2**20; a value beyond the last bin counts in it

    `block`, a power of two, and `programs` set the launch. Raises ValueError or TypeError for anything else.
    """
    require(1 <= bins <= 2**20, f"bins must be from 1 to {2**20}, got {bins}")
    require(2.0**-149 <= width < 2.0**128, f"width must be positive and finite as a float32, got {width}")
    require(0 < x.numel() < 2**31, f"x must have 1 to 2**31 - 1 values, got {x.numel()}")
    require_dtype((torch.float16, torch.bfloat16, torch.float32), x=x)
    require_contiguous(x=x)
    require_launchable(x=x)
    programs = min(programs, -(-x.numel() // block), HELD // bins)
    partial = torch.zeros(programs, bins, dtype=torch.int32, device=x.device)
    largest = torch.empty(programs, dtype=torch.float32, device=x.device)
    count_kernel[(programs,)](x, partial, largest, x.numel(), width, bins, BLOCK=block, num_warps=8)
    return partial.sum(0), largest.amax()


def by_torch(x: Tensor, width: float, bins: int) -> tuple[Tensor, Tensor]:
    """`count_magnitudes` by plain torch operators. The width is a tensor: by a number CUDA does not divide exactly."""
    magnitudes = x.float().abs().flatten()
    place = (magnitudes / magnitudes.new_full((1,), width)).clamp(max=bins - 1).int()
    return torch.bincount(place, minlength=bins), magnitudes.amax()


def activations(tokens: int, channels: int, bins: int, device: torch.device) -> tuple[Tensor, float, int]:
    """bfloat16 activations, contents on a GPU only, and bins up to six standard deviations."""
    x = torch.empty(tokens, channels, dtype=torch.bfloat16, device=device)
    return (x.normal_() if device.type == "cuda" else x), 6 / bins, bins


def llama_case(tokens: int, channels: int, bins: int = 2048) -> Case:
    """What reaches a linear layer of Llama-7B."""
    return Case(
        name=f"{tokens} x {channels}, {bins} bins",
        inputs=lambda device: activations(tokens, channels, bins, device),
        run=count_magnitudes,
        expected=by_torch,
        bytes=2 * tokens * channels + 8 * min(PROGRAMS, HELD // bins) * bins,
        operations=0,
        kind="stream",
        narrow_stores="counts are not stored but added, one by one; what is stored is one number of each program",
        peers={"torch": by_torch},
    )


CASES = [llama_case(4096, 4096), llama_case(4096, 11008), llama_case(4096, 4096, 16384)]
