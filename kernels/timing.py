"""Measure on a GPU: calls between CUDA events, the two ceilings, and how far a result is from the expected one.

A time is the median of many calls. Calls go round so many sets of inputs that what they touch exceeds twice the L2
cache, so each set comes from memory again; none is timed before each set was used once. And each call waits behind a
pause on the GPU, so that the processor is done launching before the first event fires: what is timed is the GPU's
work, not Python's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cases import Case
from kernels.hardware import Ceilings

BUDGET_SECONDS = 0.2  # of GPU time for one measurement, within LEAST and MOST calls
LEAST, MOST = 10, 100
PAUSES = (1 << 20, 1 << 22, 1 << 24)  # GPU clock cycles: from half a millisecond to eight
MOST_SETS = 1 << 14


@dataclass(frozen=True)
class Samples:
    """Seconds of each timed call. host_bound: the processor was often late: its own time is partly in them."""

    seconds: list[float]
    host_bound: bool = False

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def spread(self) -> tuple[float, float]:
        """The first and the ninth decile."""
        deciles = statistics.quantiles(self.seconds, n=10, method="inclusive") if len(self.seconds) > 1 else None
        return (deciles[0], deciles[-1]) if deciles else (self.median, self.median)


Timer = Callable[[Callable, Sequence[tuple]], Samples]  # times run(*arguments) over several sets of arguments


def cuda_samples(run: Callable, argument_sets: Sequence[tuple]) -> Samples:
    """Time `run` on the current CUDA device. First every set is used once, which compiles and fills what is lazy; then
    a few calls find how long to pause, and how often to call."""
    rotation = itertools.cycle(argument_sets)
    for arguments in itertools.islice(rotation, len(argument_sets)):
        run(*arguments)
    torch.cuda.synchronize()
    for pause in PAUSES:
        estimate, late = _timed_calls(run, rotation, LEAST, pause)
        if not late:
            break
    count = min(MOST, max(LEAST, int(BUDGET_SECONDS / max(statistics.median(estimate), 1e-6))))
    seconds, late = _timed_calls(run, rotation, count, pause)
    return Samples(seconds, host_bound=late > count / 10)


def _timed_calls(run: Callable, rotation: Iterator[tuple], count: int, pause: int) -> tuple[list[float], int]:
    """Seconds of `count` calls, and in how many of them the GPU waited for the processor."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    late = 0
    for start, end in events:
        arguments = next(rotation)
        torch.cuda._sleep(pause)
        start.record()
        run(*arguments)
        end.record()
        late += start.query()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events], late


def measure_ceilings(device: torch.device, timer: Timer, copied: int = 1 << 31, size: int = 8192) -> Ceilings:
    """Copy bandwidth over `copied` bytes, read and written, and the rates of square products on random data."""
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    bandwidth = 2 * copied / timer(lambda: target.copy_(source), [()]).median
    pair = [torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2)]
    bf16 = 2 * size**3 / timer(torch.matmul, [tuple(pair)]).median
    left, right = (torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    int8_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    int8 = 2 * size**3 / timer(int8_product, [(left, right.t())]).median  # the library is fastest on K-major weights
    return Ceilings(bandwidth=bandwidth, bf16=bf16, int8=int8)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a tensor, or in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def argument_sets(case: Case, device: torch.device, cache_bytes: int) -> list[tuple]:
    """So many sets of the case's inputs that what calls read of them exceeds twice the cache before one comes again.

    A call moves no more than the case's bytes, however large its inputs are: of 64 experts it may read two. And it
    reads no more than its inputs, however much it writes. ValueError if that makes too many sets to be worth while.
    """
    first = case.inputs(device)
    size = min(case.bytes, sum(tensor.numel() * tensor.element_size() for tensor in tensors(first)))
    count = 2 * cache_bytes // max(size, 1) + 1
    if count > MOST_SETS:
        raise ValueError(f"a call reads {size} bytes: more than {MOST_SETS} sets of inputs would be needed, {count}")
    return [first, *(case.inputs(device) for _ in range(count - 1))]


def relative_error(got: Any, expected: Any) -> float:
    """Largest norm(got - expected) / norm(expected) of the tensors in a result; inf where they cannot be compared.

    Integers must be equal, and infinities and NaNs stand in the same places.
    """
    pairs = list(zip(tensors(got), tensors(expected), strict=False))
    if not pairs or len(tensors(got)) != len(tensors(expected)):
        return math.inf
    return max(_tensor_error(*pair) for pair in pairs)


def _tensor_error(got: Tensor, expected: Tensor) -> float:
    """The error of one tensor."""
    if got.shape != expected.shape:
        return math.inf
    if not (got.is_floating_point() and expected.is_floating_point()):
        return 0.0 if torch.equal(got.double(), expected.double()) else math.inf
    got, expected = got.detach().float(), expected.detach().float()
    finite = expected.isfinite()
    if not torch.allclose(got[~finite], expected[~finite], equal_nan=True):
        return math.inf
    norm = expected[finite].norm().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((got[finite] - expected[finite]).norm() / norm)
    return math.inf if math.isnan(error) else error
