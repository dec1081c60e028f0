"""Stand-ins for a GPU when `bench` is tested: a clock, a worker in this process, and cases that double a vector."""

from __future__ import annotations

import torch

from kernels import bench
from kernels.cases import Case
from kernels.hardware import Ceilings
from kernels.timing import Samples
from kernels.worker import WorkerError

MACHINE = {"gpu": "NVIDIA H200", "l2_bytes": 100, "date": "2026-01-31", "torch": "2.13.0", "triton": "3.7.1"}
CEILINGS = Ceilings(bandwidth=4e12, bf16=800e12, int8=1600e12)
CPU = torch.device("cpu")


class Clock:
    """A timer that says 10 µs for a case, 20 for a peer named so, and remembers what it timed and on what."""

    def __init__(self):
        self.timed: list = []
        self.sets: list = []

    def __call__(self, run, sets) -> Samples:
        run(*sets[0])
        self.timed.append(run)
        self.sets.append(sets)
        return Samples([2e-5 if run is peer else 1e-5] * 3, host_bound=run is late_peer)


class Here:
    """A worker in this process; cases with a name in `loses` crash it."""

    def __init__(self, *loses: str):
        self.loses, self.stops, self.limits = loses, 0, []

    def call(self, function, *arguments, seconds):
        self.limits.append(seconds)
        answer = function(*arguments)
        if function is bench.measure and answer[0]["case"] in self.loses:
            raise WorkerError("took its process down, exit status -11")
        return answer

    def stop(self):
        self.stops += 1


def peer(x):
    """Another way to double."""
    return x + x


def late_peer(x):
    """One that is slow to launch."""
    return x + x


def rough(x):
    """Three percent too much: allowed to a peer, not to a kernel."""
    return 2.06 * x


def refused(x):
    """A peer that this torch does not have."""
    raise NotImplementedError("not built\nfor this GPU")


def case(name="double", run=lambda x: 2 * x, **fields) -> Case:
    """A correct case of 20 MB and 4 GFLOP, unless told otherwise."""
    fields = {"expected": lambda x: 2 * x, "bytes": 20_000_000, "operations": 4 * 10**9, "kind": "stream", **fields}
    return Case(name, lambda device: (torch.ones(8, device=device),), run, **fields)


def crash(x):
    """A kernel that fails to launch."""
    raise RuntimeError("out of resources")


GOOD = case(peers={"sum": peer, "none": refused})
WRONG = case("wrong", lambda x: 2.1 * x)
CRASHES = case("crashes", crash)
