"""How times are taken, on a simulated GPU whose clock is known, and how results are compared."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kernels import timing
from kernels.cases import Case

CLOCK = 2e9  # cycles per second of the simulated GPU


class SimulatedGPU:
    """A processor that takes `launch` seconds for a call and a GPU that takes `work` for it, each with its clock."""

    def __init__(self, launch: float, work: float):
        self.launch, self.work = launch, work
        self.host = self.free = 0.0  # the processor's time, and when the GPU has done all it was given
        self.calls: list[int] = []
        self.untimed: list[int] = []  # of the calls, those before the first pause
        self.hiccups: tuple[int, ...] = ()  # calls for which the processor takes a second

    def run(self, number: int) -> None:
        self.host += 1.0 if len(self.calls) in self.hiccups else self.launch
        self.free = max(self.free, self.host) + self.work
        self.calls.append(number)

    def _sleep(self, cycles: int) -> None:
        self.untimed = self.untimed or list(self.calls)
        self.free = max(self.free, self.host) + cycles / CLOCK

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=math.nan)

        def record():
            self.host += 1e-6
            event.at = max(self.free, self.host)

        event.record = record
        event.query = lambda: self.host >= event.at
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event


def simulate(monkeypatch, gpu: SimulatedGPU, sets: int = 3) -> timing.Samples:
    """Time a call on the simulated GPU."""
    monkeypatch.setattr(torch, "cuda", gpu)
    return timing.cuda_samples(gpu.run, [(number,) for number in range(sets)])


@pytest.mark.parametrize("launch", [1e-6, 1e-4, 2e-3])
def test_slow_launches_stay_out_of_the_time(monkeypatch, launch):
    """At 2 ms a launch takes longer than the first pause, which must then grow."""
    samples = simulate(monkeypatch, SimulatedGPU(launch, work=1e-5))
    assert samples.median == pytest.approx(1e-5, rel=1e-6) and not samples.host_bound


def test_launches_slower_than_any_pause_are_said(monkeypatch):
    assert simulate(monkeypatch, SimulatedGPU(launch=0.2, work=1e-5)).host_bound


@pytest.mark.parametrize(("late", "host_bound"), [(10, False), (11, True)])
def test_a_processor_that_is_seldom_late_does_not_spoil_the_median(monkeypatch, late, host_bound):
    gpu = SimulatedGPU(launch=1e-6, work=1e-5)
    gpu.hiccups = tuple(range(50, 50 + late))
    samples = simulate(monkeypatch, gpu)
    assert len(samples.seconds) == 100 and samples.median == pytest.approx(1e-5, rel=1e-6)
    assert samples.host_bound == host_bound


@pytest.mark.parametrize(("work", "calls"), [(1e-6, 100), (0.01, 20), (10.0, 10)])
def test_calls_fit_the_budget(monkeypatch, work, calls):
    samples = simulate(monkeypatch, SimulatedGPU(launch=1e-6, work=work))
    assert abs(len(samples.seconds) - calls) <= 1


@pytest.mark.parametrize("sets", [1, 3, 7, 150])
def test_every_set_is_used_before_any_is_timed_and_then_all_in_turn(monkeypatch, sets):
    """In turn without a break: a set that came again early would come from the cache."""
    gpu = SimulatedGPU(launch=1e-6, work=1e-5)
    simulate(monkeypatch, gpu, sets)
    assert gpu.untimed == list(range(sets))
    assert gpu.calls == [turn % sets for turn in range(len(gpu.calls))] and len(gpu.calls) > sets


def test_what_the_first_call_on_a_set_costs_stays_out_of_the_time(monkeypatch):
    class Lazy(SimulatedGPU):
        def run(self, number):
            self.work = 1e-5 if number in self.calls else 1.0
            super().run(number)

    samples = simulate(monkeypatch, Lazy(launch=1e-6, work=0.0), sets=7)
    assert samples.seconds == pytest.approx([1e-5] * len(samples.seconds), rel=1e-6)


def test_median_and_spread():
    samples = timing.Samples([float(number) for number in range(11)])
    assert (samples.median, *samples.spread()) == (5.0, 1.0, 9.0)
    assert timing.Samples([2.0]).spread() == (2.0, 2.0)


def vectors(size: int, moved: int) -> Case:
    """A case whose inputs hold 4 `size` bytes and whose call moves `moved`."""
    return Case("c", lambda device: (torch.empty(size, device=device), 3), min, max, moved, 1, "other")


@given(size=st.integers(1, 5000), moved=st.integers(1, 20_000), cache=st.integers(0, 5_000))
def test_sets_exceed_twice_the_cache_by_the_bytes_that_a_call_reads(size, moved, cache):
    """Neither inputs that a call leaves alone nor results that it writes keep a set out of the cache."""
    sets = timing.argument_sets(vectors(size, moved), torch.device("cpu"), cache)
    read = min(4 * size, moved)
    assert (len(sets) - 1) * read <= 2 * cache < len(sets) * read
    assert len({arguments[0].data_ptr() for arguments in sets}) == len(sets)


def test_a_case_too_small_for_any_number_of_sets_is_refused():
    cache = timing.MOST_SETS // 2 * 4
    with pytest.raises(ValueError, match="a call reads 4 bytes"):
        timing.argument_sets(vectors(1, 100), torch.device("cpu"), cache)
    assert len(timing.argument_sets(vectors(1, 100), torch.device("cpu"), cache - 2)) == timing.MOST_SETS


def test_ceilings_are_bytes_and_operations_over_time():
    products = []

    def timer(run, sets):
        result = run(*sets[0])
        products.append((result.dtype, tuple(result.shape), float(result.float().std()) > 0))
        return timing.Samples([1e-3])

    found = timing.measure_ceilings(torch.device("cpu"), timer, copied=1000, size=64)
    assert (found.bandwidth, found.bf16, found.int8) == pytest.approx((2e6, 2 * 64**3 * 1e3, 2 * 64**3 * 1e3))
    shape = (64, 64)
    assert products == [(torch.uint8, (1000,), True), (torch.bfloat16, shape, True), (torch.int32, shape, True)]


@given(seed=st.integers(0, 1000), size=st.integers(1, 50), noise=st.floats(0, 2))
def test_relative_error_is_a_ratio_of_norms(seed, size, noise):
    draw = np.random.default_rng(seed)
    expected = draw.standard_normal(size).astype(np.float32)
    got = expected + np.float32(noise) * draw.standard_normal(size).astype(np.float32)
    assume(np.linalg.norm(expected) > 1e-3)
    ratio = np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(np.float64(expected))
    assert timing.relative_error(torch.tensor(got), torch.tensor(expected)) == pytest.approx(ratio, rel=1e-4, abs=1e-6)


X = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (X, X),
        ((X, [X]), [X, {"a": X}]),  # the same tensors, however they are wrapped
        (torch.zeros(3), torch.zeros(3)),
        (torch.tensor([1.0, -math.inf, math.nan]), torch.tensor([1.0, -math.inf, math.nan])),
        (torch.tensor([-math.inf]), torch.tensor([-math.inf])),
        (torch.tensor([3], dtype=torch.int8), torch.tensor([3])),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_equal_results_have_no_error(got, expected):
    assert timing.relative_error(got, expected) == 0


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (X, X[:1]),
        ((X, X), X),
        (X, (X, X)),
        (None, X),
        (X, None),
        (torch.tensor([1.0, math.nan]), X),
        (torch.tensor([1.0, math.inf]), X),
        (X, torch.tensor([1.0, math.nan])),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
        (torch.tensor([44], dtype=torch.uint8), torch.tensor([300])),  # equal only after wrapping round
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor([1e-3]), torch.tensor([0.0])),
    ],
)
def test_results_that_cannot_be_compared_or_differ_at_all_are_far_off(got, expected):
    assert timing.relative_error(got, expected) > 1e6


def test_the_worst_tensor_counts():
    assert timing.relative_error((X, 2 * X), (X, X)) == pytest.approx(1.0)
