"""One case of `python -m kernels bench`: what is checked before it is timed, and what its record says."""

from __future__ import annotations

import pytest
import torch

from kernels import bench
from kernels.cases import Case
from tests.kernels.stand_ins import (
    CEILINGS,
    CPU,
    CRASHES,
    GOOD,
    MACHINE,
    WRONG,
    Clock,
    case,
    crash,
    late_peer,
    peer,
    rough,
)


def measured(found: Case) -> tuple[dict, Clock]:
    """The record of one case."""
    clock = Clock()
    return bench.measure_case(found, bench.Bench(CPU, MACHINE, CEILINGS, clock)), clock


def test_figures_of_a_memory_bound_case():
    record, clock = measured(GOOD)
    assert clock.timed == [GOOD.run, peer]
    assert record["sets"] == len(clock.sets[0]) == len(clock.sets[1]) == 2 * 100 // 32 + 1
    assert record["case"] == "double" and record["calls"] == 3 and not record["host_bound"]
    assert record["median_us"] == pytest.approx(10) == record["first_decile_us"] == record["ninth_decile_us"]
    assert (record["gb_per_s"], record["tflop_per_s"]) == pytest.approx((2000, 400))
    assert record["bound"] == "memory"
    assert (record["floor_us"], record["fraction"]) == pytest.approx((5, 0.5))  # 20 MB at 4 TB/s; 4 GFLOP take as long
    assert record["peers_us"] == pytest.approx({"sum": 20})
    assert record["peers_refused"] == {"none": "NotImplementedError: not built for this GPU"}
    assert record["relative_error"] == 0


def test_the_ceiling_that_binds_follows_the_rate():
    record, _ = measured(case(operations=8 * 10**9, rate="bf16"))
    assert record["bound"] == "matrix" and record["fraction"] == pytest.approx(1.0)
    record, _ = measured(case(operations=8 * 10**9, bytes=1, rate="int8"))
    assert record["bound"] == "matrix" and record["fraction"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (WRONG, "differs from the expected result by 0.05, allowed is 0.01"),
        (CRASHES, "out of resources"),
        (case(run=rough), "differs from the expected result by 0.03"),
        (case(expected=crash), "out of resources"),
    ],
)
def test_what_is_wrong_is_never_timed(found, words):
    record, clock = measured(found)
    assert words in record["failure"] and clock.timed == [] and "median_us" not in record


def test_a_peer_that_disagrees_is_never_timed_and_the_case_stands():
    record, clock = measured(case(peers={"wrong": lambda x: 2.2 * x, "none": crash, "other": lambda x: (x, x)}))
    assert len(clock.timed) == 1 and record["peers_us"] == {} and "failure" not in record
    assert record["median_us"] == pytest.approx(10)
    assert record["peers_refused"] == {
        "wrong": "ValueError: differs from the expected result by 0.1, allowed is 0.05",
        "none": "RuntimeError: out of resources",
        "other": "ValueError: differs from the expected result by inf, allowed is 0.05",
    }


@pytest.mark.parametrize(("allowed", "timed"), [(0.05, True), (0.02, False)])
def test_a_peer_may_round_elsewhere(allowed, timed):
    record, clock = measured(case(peers={"rough": rough}, peer_tolerance=allowed))
    assert (rough in clock.timed) == ("rough" in record["peers_us"]) == timed


def test_a_peer_is_timed_on_arguments_prepared_once_for_each_set():
    prepared = []

    def prepare(x):
        prepared.append(x)
        return x, torch.tensor(2.0)

    def times(x, factor):
        return x * factor

    record, clock = measured(case(peers={"times": times, "sum": peer}, prepare={"times": prepare}))
    own, others, plain = clock.sets
    assert [id(x) for x in prepared] == [id(x) for (x,) in own]  # each once, and none while the clock ran
    assert [x is mine and factor == 2 for (x, factor), (mine,) in zip(others, own, strict=True)] == [True] * len(own)
    assert plain is own and record["peers_us"].keys() == {"times", "sum"}


def test_a_peer_that_cannot_be_prepared_leaves_the_case_alone():
    record, clock = measured(case(peers={"sum": peer, "other": peer}, prepare={"sum": crash}))
    assert record["peers_refused"] == {"sum": "RuntimeError: out of resources"} and "failure" not in record
    assert record["peers_us"].keys() == {"other"} and len(clock.timed) == 2


def test_peers_that_are_slow_to_launch_are_named():
    record, _ = measured(case(peers={"late": late_peer, "sum": peer}))
    assert record["peers_host_bound"] == ["late"] and record["peers_us"].keys() == {"late", "sum"}
    (table,) = bench.tables({"a.b": {"cases": [{**record, "host_bound": True}]}})
    assert table.lines[0][1] == "10.0 host-bound"
    assert table.lines[0][-1] == "late 10.0 host-bound (1.00x), sum 20.0 (2.00x)"


def test_a_crashed_gpu_is_noticed(monkeypatch):
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    assert bench.settle(CPU) and not bench.settle(torch.device("cuda"))
