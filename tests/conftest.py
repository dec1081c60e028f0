"""What every test builds on: one thread, one tolerance table, poisoned buffers, oracles, and what is under test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny operator takes 8 ms on two threads, 21 µs on one

import functools
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

from tests.fences import guarded, poisoned
from tests.submission import Submission

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any kernel file is imported

__all__ = ["DEVICE", "KERNEL_DTYPES", "golden", "guarded", "kernel", "oracle", "poisoned", "tolerance"]

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16)  # the interpreter's bfloat16 arithmetic is wrong
if DEVICE == "cuda":
    KERNEL_DTYPES += (torch.bfloat16,)

settings.register_profile("default", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=200, deadline=None, print_blob=True)

settings.register_profile("verdict", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])

TOLERANCES = MappingProxyType({torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2})


def tolerance(dtype: torch.dtype | np.dtype | type, length: int = 1, scale: float = 1.0) -> dict[str, float]:
    """How far two correct results in `dtype` may lie apart: rtol and atol for numpy's and torch's `assert_allclose`.

    Rounding errors of a sum of `length` terms of size `scale` grow as its square root, also where the sum itself
    cancels to nothing: atol grows, rtol does not. Integers, quantization codes among them, are compared exactly.
    """
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(torch, np.dtype(dtype).name)
    if dtype not in TOLERANCES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype}; compare it exactly")
    return {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype] * scale * math.sqrt(max(length, 1))}


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<name>.npz, made by the method's original code (provenance: the README there)."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@functools.cache
def oracle(name: str) -> ModuleType:
    """The book's own chapter `name`, such as "attention.flash", whatever --submission holds."""
    mine = {key: module for key, module in sys.modules.items() if key.split(".")[0] == "chapters"}
    for key in mine:
        del sys.modules[key]
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"chapters.{name}")
    finally:
        sys.path.remove(str(ROOT))
        for key in [key for key in sys.modules if key.split(".")[0] == "chapters"]:
            del sys.modules[key]
        sys.modules.update(mine)


def kernel(name: str) -> ModuleType | None:
    """The kernel file under test, such as "attention.flash"; None without Triton, when no kernel test runs."""
    return importlib.import_module(f"kernels.{name}") if HAS_TRITON else None


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--submission")
    usual = "verdict" if folder else "default"  # shrinking what fails in the interpreter takes minutes
    settings.load_profile(config.getoption("--profile") or os.environ.get("HYPOTHESIS_PROFILE", usual))
    config.submission, config.kernel_tests = None, 0
    if folder is not None:
        config.submission = Submission(Path(folder).resolve(), ROOT)
        config.submission.activate()


def names_of_exercises(item: pytest.Item) -> set[str]:
    """The functions that a test grades, by their dotted and by their own names."""
    dotted = {mark.args[0] for mark in item.iter_markers("exercise")}
    return dotted | {name.rpartition(".")[2] for name in dotted}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    exercise = config.getoption("--exercise")
    if exercise:
        grading = [item for item in items if exercise in names_of_exercises(item)]
        if not grading:
            raise pytest.UsageError(f"--exercise {exercise}: none of the chosen tests grades it")
        config.hook.pytest_deselected(items=[item for item in items if item not in grading])
        items[:] = grading
    launching = [item for item in items if item.get_closest_marker("kernel")]
    config.kernel_tests = len(launching)
    if not HAS_TRITON and launching:
        config.hook.pytest_deselected(items=launching)
        items[:] = [item for item in items if item not in launching]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Two lines that also `-q` prints: which code is tested, and how its kernels run."""
    count = config.kernel_tests
    if not HAS_TRITON:
        how = f"{count} tests NOT RUN, because Triton is not installed (it exists for Linux only)"
    elif DEVICE == "cuda":
        how = f"{count} tests compiled on {torch.cuda.get_device_name()}"
    else:
        how = f"{count} tests interpreted, because there is no GPU (fp32 and fp16, no bf16)"
    return [f"under test: {config.submission or 'the book'}", f"kernels: {how}"]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """A kernel test runs inside fences; under Hypothesis each of its examples does, so that failures shrink."""
    if pyfuncitem.get_closest_marker("kernel") is None:
        return (yield)
    drawn = getattr(pyfuncitem.obj, "hypothesis", None)
    if drawn is None:
        with guarded():
            return (yield)
    unfenced = drawn.inner_test
    drawn.inner_test = guarded()(unfenced)
    try:
        return (yield)
    finally:
        drawn.inner_test = unfenced


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    submission = getattr(session.config, "submission", None)
    if submission and exitstatus == pytest.ExitCode.OK and not submission.imported():
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    submission = config.submission
    if submission and not config.option.collectonly:
        untested = [name for name in submission.files if name not in submission.imported()]
        if untested:
            terminalreporter.write_line(f"ERROR: no chosen test imports {', '.join(untested)}", red=True)
