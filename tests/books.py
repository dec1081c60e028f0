"""A book of one chapter in a folder of its own, and pytest run on it: what the tests of the exercise engine work on."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from chapters.judging import process_context

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None

CHAPTER = '''"""Means."""

import numpy as np


def mean(x: np.ndarray) -> np.ndarray:
    """Mean of the last axis."""
    # the sum comes first
    total = x.sum(-1)
    return total / x.shape[-1]


def spread(x):
    # largest minus smallest

    return x.max(-1) - x.min(-1)
    # nothing is left to do


SPREADS = {"none": 0}
'''
KERNEL = '''"""Means of rows, fused."""

import torch
import triton
import triton.language as tl


@triton.jit
def mean_kernel(x, out, columns, block: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0)
    column = tl.arange(0, block)
    values = tl.load(x + row * columns + column, column < columns, 0.0)
    tl.store(out + row, tl.sum(values) / columns)


def mean(x):
    """Mean of each row of x [rows, columns]."""
    out = torch.empty(len(x), dtype=x.dtype, device=x.device)
    mean_kernel[(len(x),)](x, out, x.shape[1], block=64)
    return out
'''
TESTS = """
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.demo.mean import mean, spread
from tests.conftest import DEVICE, kernel, oracle, poisoned, tolerance

fused = kernel("demo.mean")
sizes = st.integers(1, 9)


def rows(seed, columns):
    return np.random.default_rng(seed).normal(size=(seed, columns))


@pytest.mark.exercise("chapters.demo.mean.mean", points=3)
@given(sizes, sizes)
def test_mean(seed, columns):
    x = rows(seed, columns)
    np.testing.assert_allclose(mean(x), sum(x.T) / columns, **tolerance(np.float64))


@pytest.mark.exercise("chapters.demo.mean.spread", points=1)
class TestSpread:
    @pytest.mark.parametrize("size", [1, 3])
    def test_of_a_range(self, size):
        assert spread(np.arange(size)) == size - 1

    def test_of_negative_numbers(self):
        assert spread(-np.arange(4)) == 3


@pytest.mark.kernel
@pytest.mark.exercise("kernels.demo.mean.mean_kernel", points=2)
@given(sizes, sizes)
def test_kernel(seed, columns):
    x = poisoned(torch.tensor(rows(seed, columns), dtype=torch.float32, device=DEVICE))
    expected = oracle("demo.mean").mean(x.cpu().numpy())
    np.testing.assert_allclose(fused.mean(x).cpu(), expected, **tolerance(np.float32, columns))
"""


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def tiny_book(root: Path) -> Path:
    """A book with the chapter demo.mean, its kernel, its tests and this suite's own conftest files, at `root`."""
    for package in ("chapters", "kernels", "tests"):
        for folder in (package, f"{package}/demo"):
            write(root / folder / "__init__.py", "")
    for name in ("conftest.py", "pyproject.toml", "tests/conftest.py", "tests/fences.py", "tests/submission.py"):
        shutil.copy(ROOT / name, root / name)
    write(root / "chapters/demo/mean.py", CHAPTER)
    write(root / "kernels/demo/mean.py", KERNEL)
    write(root / "tests/demo/test_mean.py", TESTS)
    return root


def pytest_in(root: Path, *arguments: str, without: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and output of `pytest arguments`, run at `root` as a student would, where modules may be missing."""
    output = root / "output.txt"
    process = process_context().Process(target=_session, args=(root, arguments, without, output))
    process.start()
    process.join()
    return process.exitcode, output.read_text(encoding="utf-8")


def _session(root: Path, arguments: tuple[str, ...], without: tuple[str, ...], output: Path) -> None:
    gc.freeze()
    os.chdir(root)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.stdout = sys.stderr = output.open("w", encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] in ("chapters", "kernels", "tests", *without)]:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(without)  # an import of None is an ImportError
    sys.path.insert(0, str(root))
    sys.exit(pytest.main(["-p", "no:cacheprovider", *arguments]))
