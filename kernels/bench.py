"""Time every case on the GPU at hand, beside its peers and under ceilings measured in the same run.

Results, those of peers too, are compared with the case's `expected` before they are timed; `timing.py` says how times
are taken. All that touches the GPU happens in a worker: a case that crashes or hangs is recorded so and costs a fresh
process, and the rest goes on. Results go to results/<gpu>.json, technique by technique, and a figure of them to
results/<gpu>.png.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.cases import Case, cases, find, techniques, unavailable
from kernels.check import prepare_compiler
from kernels.hardware import Ceilings, floor_seconds
from kernels.records import RESULTS, load_results, recorded, results_path
from kernels.tables import Table, replace_file, show
from kernels.timing import Samples, Timer, argument_sets, cuda_samples, measure_ceilings, relative_error
from kernels.worker import Worker, WorkerError, one_line

__all__ = ["bench_all", "main", "measure_case", "recorded"]

CASE_SECONDS = 60.0  # after that long a case counts as hanging


@dataclass(frozen=True)
class Bench:
    """Where and how cases are timed. machine: what `environment` says; ceilings: measured on it in this run."""

    device: torch.device
    machine: dict[str, Any]
    ceilings: Ceilings
    timer: Timer


def measure_case(case: Case, bench: Bench) -> dict[str, Any]:
    """Check and time one case. What cannot be run, or is wrong, is recorded with its `failure` and no time."""
    record = statement(case)
    try:
        sets = argument_sets(case, bench.device, bench.machine["l2_bytes"])
        expected = case.expected(*sets[0])
        record["relative_error"] = agreement(case.run(*sets[0]), expected, case.tolerance)
        record |= {"sets": len(sets), **achieved(case, bench.timer(case.run, sets), bench.ceilings)}
    except Exception as reason:
        return {**statement(case), "failure": one_line(reason)}
    return {**record, **time_peers(case, sets, expected, bench.timer)}


def statement(case: Case) -> dict[str, Any]:
    """What a record says of the case itself."""
    fields = ("kind", "rate", "bytes", "operations", "tolerance")
    return {"case": case.name, **{name: getattr(case, name) for name in fields}}


def agreement(got: Any, expected: Any, allowed: float) -> float:
    """The relative error of a result; ValueError if it is larger than allowed."""
    error = relative_error(got, expected)
    if error > allowed:
        raise ValueError(f"differs from the expected result by {error:.2g}, allowed is {allowed:.2g}")
    return error


def achieved(case: Case, samples: Samples, ceilings: Ceilings) -> dict[str, Any]:
    """What the samples amount to. fraction: of the measured ceiling that binds, memory or matrix."""
    memory, matrix = case.bytes / ceilings.bandwidth, case.operations / getattr(ceilings, case.rate)
    first, ninth = samples.spread()
    return {
        "median_us": 1e6 * samples.median,
        "first_decile_us": 1e6 * first,
        "ninth_decile_us": 1e6 * ninth,
        "calls": len(samples.seconds),
        "host_bound": samples.host_bound,
        "gb_per_s": case.bytes / samples.median / 1e9,
        "tflop_per_s": case.operations / samples.median / 1e12,
        "bound": "memory" if memory >= matrix else "matrix",
        "floor_us": 1e6 * floor_seconds(case, ceilings),
        "fraction": floor_seconds(case, ceilings) / samples.median,
    }


def time_peers(case: Case, sets: Sequence[tuple], expected: Any, timer: Timer) -> dict[str, Any]:
    """Microseconds of each peer, which are host-bound, and why those without a time have none: wrong, or not run."""
    times, host_bound, refused = {}, [], {}
    for name in case.peers:
        try:
            samples = _time_peer(case, name, sets, expected, timer)
        except Exception as reason:
            refused[name] = one_line(reason)
            continue
        times[name] = 1e6 * samples.median
        host_bound += [name] if samples.host_bound else []
    return {"peers_us": times, "peers_host_bound": host_bound, "peers_refused": refused}


def _time_peer(case: Case, name: str, sets: Sequence[tuple], expected: Any, timer: Timer) -> Samples:
    """Prepare a peer's arguments, as many sets of them as the case has, then check it and time it."""
    peer, prepare = case.peers[name], case.prepare.get(name)
    own = sets if prepare is None else [prepare(*arguments) for arguments in sets]
    agreement(peer(*own[0]), expected, case.peer_tolerance)
    return timer(peer, own)


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on: hardware, driver, versions and the date."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def run_bench(names: Sequence[str], bench: Bench, folder: Path, worker: Worker, deadline: float) -> dict[str, Any]:
    """Measure techniques one by one, each written as soon as it is done; returns the runs of `names`.

    A run keeps its own machine, versions and ceilings: runs of other techniques stay in the file as they were, and so
    does that of a technique that cannot be imported, or is not done at the deadline, a `time.monotonic()`.
    """
    gpu = bench.machine["gpu"]
    path = results_path(gpu, folder)
    runs, done = load_results(path), {}
    for name in names:
        done[name] = {"environment": bench.machine, "ceilings": asdict(bench.ceilings)}
        try:
            found = cases(name)
            done[name]["cases"] = [_ask(worker, name, number, bench, deadline) for number in range(len(found))]
        except Exception as error:
            done[name]["cases"] = [{"case": name, "failure": one_line(error)}]
            continue
        runs[name] = done[name]
        content = {"gpu": gpu, "techniques": dict(sorted(runs.items()))}
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    return done


def _ask(worker: Worker, name: str, number: int, bench: Bench, deadline: float) -> dict[str, Any]:
    """The record of one case, made by the worker; that of a failure if it crashes or hangs there."""
    case, left = cases(name)[number], deadline - time.monotonic()
    late = TimeoutError("not measured, time was up; run bench again with this name")
    if left <= 0:
        raise late
    print(f"{name}: {case.name}", file=sys.stderr)
    try:
        record, usable = worker.call(measure, name, number, bench, seconds=min(CASE_SECONDS, left))
    except WorkerError as error:
        if time.monotonic() >= deadline:
            raise late from error
        return {**statement(case), "failure": str(error)}
    if not usable:
        worker.stop()
    for peer, reason in record.get("peers_refused", {}).items():
        print(f"    not timed: {peer}: {reason}", file=sys.stderr)
    return record


def measure(name: str, number: int, bench: Bench) -> tuple[dict[str, Any], bool]:
    """What the worker does: the record of a technique's case, and whether the process can go on after it."""
    torch.manual_seed(0)
    return measure_case(cases(name)[number], bench), settle(bench.device)


def settle(device: torch.device) -> bool:
    """Give memory back. False if a kernel crashed: every later call in the process would fail through it."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


COLUMNS = ("case", "µs", "floor, µs", "GB/s", "TFLOP/s", "of ceiling", "bound by", "peers, µs (kernel is faster by)")


def tables(runs: dict[str, Any]) -> list[Table]:
    """A table per technique."""
    found = []
    for name, run in runs.items():
        lines = [_line(case) for case in run["cases"]]
        failed = {number for number, case in enumerate(run["cases"]) if "failure" in case}
        found.append(Table(name, COLUMNS, lines, failed))
    return found


def _line(case: dict[str, Any]) -> list[str]:
    """One line of the table, a cell for each of COLUMNS."""
    if "failure" in case:
        return [case["case"], *["-"] * (len(COLUMNS) - 2), f"FAILED: {case['failure']}"]
    median, late = case["median_us"], case["peers_host_bound"]
    peers = [f"{name} {_time(peer, name in late)} ({peer / median:.2f}x)" for name, peer in case["peers_us"].items()]
    peers += [f"{name} not timed" for name in case["peers_refused"]]
    figures = (
        f"{case['floor_us']:.1f}",
        f"{case['gb_per_s']:.0f}",
        f"{case['tflop_per_s']:.1f}",
        f"{case['fraction']:.0%}",
    )
    return [case["case"], _time(median, case["host_bound"]), *figures, case["bound"], ", ".join(peers) or "-"]


def _time(microseconds: float, host_bound: bool) -> str:
    """A time for the table."""
    return f"{microseconds:.1f}{' host-bound' if host_bound else ''}"


def main(arguments: Namespace) -> int:
    """Exit status: 0, or 1 if a case is wrong or does not run. ValueError where nothing can be measured."""
    deadline = time.monotonic() + arguments.seconds
    names = [find(name) for name in arguments.names]
    if not torch.cuda.is_available():
        raise ValueError("bench needs a CUDA GPU and torch sees none; nothing was measured")
    if unavailable():
        raise ValueError(unavailable())
    os.environ.pop("TRITON_INTERPRET", None)
    prepare_compiler()
    worker = Worker()
    try:
        return bench_all(names, torch.device("cuda", 0), RESULTS, worker, deadline)
    finally:
        worker.stop()


def oldest_first(path: Path) -> list[str]:
    """All techniques, those that a results file does not hold first, then by date: a run that ends early is resumed."""
    runs = load_results(path)
    return sorted(techniques(), key=lambda name: runs[name]["environment"]["date"] if name in runs else "")


def bench_all(
    names: Sequence[str],
    device: torch.device,
    folder: Path,
    worker: Worker,
    deadline: float,
    timer: Timer = cuda_samples,
) -> int:
    """Ceilings, every case, the table and the figure; exit status as `main`. What cannot end well is refused first.

    No names: all techniques, in the order of `oldest_first`.
    """
    from kernels import roofline

    if not os.access(folder, os.W_OK):
        raise OSError(f"cannot write results into {folder}")
    machine = worker.call(environment, device, seconds=CASE_SECONDS)
    path = results_path(machine["gpu"], folder)
    load_results(path)
    names = names or oldest_first(path)
    ceilings = worker.call(measure_ceilings, device, timer, seconds=CASE_SECONDS)
    runs = run_bench(names, Bench(device, machine, ceilings, timer), folder, worker, deadline)
    show(tables(runs))
    roofline.draw(load_results(path), machine["gpu"], path.with_suffix(".png"))
    return int(any("failure" in case for run in runs.values() for case in run["cases"]))
