"""Histogram and largest value of magnitudes in one pass: what calibration collects from every batch of activations.

Fused: the magnitude, its bin, the counts and the maximum.

    bytes        size · b  +  8 P BINS        b bytes a value; P programs write partial counts once, and they are read
    operations   11 votes and 64 counts a warp for each 32 values: with 2048 bins instructions, not bytes, are the floor
                 (counted in the algorithm of `tl.histogram`, not timed)
Replaces |x|, its maximum, x / width, and a histogram: four passes, of which two also write what the next one reads.

Counting is the hard part: thousands of threads want to add to few numbers. Each program counts on chip, BLOCK values at
a time (`tl.histogram`: votes within a warp, then atomics in shared memory), keeps its counts in registers, and writes
them once. The last step adds the P partial counts, a small matrix, by a torch operator. No atomics reach memory, so the
counts, being integers, are the same in every run.

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


@triton.jit
def count_kernel(
    x_ptr, partial_ptr, largest_ptr, size, width, bins, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: every PROGRAMS-th block of x. partial [programs, BINS] int32, largest [programs] float32."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    counts = tl.zeros((BINS,), tl.int32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, size, programs.to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < size
        x = tl.abs(tl.load(x_ptr + index, mask=live, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, x)
        place = tl.minimum(tl.div_rn(x, width), bins - 1.0).to(tl.int32)
        counts += tl.histogram(place, BINS, mask=live)
    tl.store(partial_ptr + program.to(tl.int64) * BINS + tl.arange(0, BINS), counts)
    tl.store(largest_ptr + program, tl.max(largest, axis=0))


def count_magnitudes(
    x: Tensor, width: float, bins: int, block: int = BLOCK, programs: int = PROGRAMS
) -> tuple[Tensor, Tensor]:
    """(counts int64 [bins], largest float32 []): how many |x| lie in [k width, (k + 1) width), and the largest of them.

    x       float16, bfloat16 or float32 of any shape, contiguous, finite, of fewer than 2**31 values
    width   of a bin, above 0; |x| / width is an IEEE division of float32 numbers
    bins    1 to 16384; a value beyond the last bin counts in it

    `block`, a power of two, and `programs` set the launch. Raises ValueError or TypeError for anything else.
    """
    require(1 <= bins <= 16384, f"bins must be from 1 to 16384, got {bins}")
    require(0 < width < float("inf"), f"width must be positive and finite, got {width}")
    require(0 < x.numel() < 2**31, f"x must have 1 to 2**31 - 1 values, got {x.numel()}")
    require_dtype((torch.float16, torch.bfloat16, torch.float32), x=x)
    require_contiguous(x=x)
    require_launchable(x=x)
    programs = min(programs, triton.cdiv(x.numel(), block))
    held = max(16, triton.next_power_of_2(bins))
    partial = torch.empty(programs, held, dtype=torch.int32, device=x.device)
    largest = torch.empty(programs, dtype=torch.float32, device=x.device)
    count_kernel[(programs,)](x, partial, largest, x.numel(), width, bins, BINS=held, BLOCK=block, num_warps=8)
    return partial.sum(0)[:bins], largest.amax()


def by_torch(x: Tensor, width: float, bins: int) -> tuple[Tensor, Tensor]:
    """`count_magnitudes` by plain torch operators."""
    magnitudes = x.float().abs().flatten()
    place = (magnitudes / width).clamp(max=bins - 1).int()
    return torch.bincount(place, minlength=bins), magnitudes.amax()


def activations(tokens: int, channels: int, device: torch.device) -> tuple[Tensor, float, int]:
    """bfloat16 activations, contents on a GPU only, and bins up to six standard deviations."""
    x = torch.empty(tokens, channels, dtype=torch.bfloat16, device=device)
    return (x.normal_() if device.type == "cuda" else x), 6 / 2048, 2048


def llama_case(tokens: int, channels: int) -> Case:
    """What reaches a linear layer of Llama-7B, into 2048 bins."""
    return Case(
        name=f"{tokens} x {channels}, 2048 bins",
        inputs=lambda device: activations(tokens, channels, device),
        run=count_magnitudes,
        expected=by_torch,
        bytes=2 * tokens * channels + 8 * PROGRAMS * 2048,
        operations=0,
        kind="stream",
        peers={"torch": by_torch},
    )


CASES = [llama_case(4096, channels) for channels in (4096, 11008)]
