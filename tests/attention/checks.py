"""When results of attention are right: close enough, from arguments left alone, in the memory of one tile."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import torch

from tests.attention.problems import Problem
from tests.conftest import tolerance


def assert_close(actual, expected, problem: Problem, dtype=np.float64) -> None:
    """Within rounding: of sums over the keys, and of scores, whose errors the exponential turns into relative ones."""
    expected = np.asarray(expected)
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
    allowed = tolerance(dtype, problem.k.shape[2] * problem.q.shape[1], scale=size * max(1.0, problem.largest_score))
    np.testing.assert_allclose(actual, expected, **allowed)


def untouched(compute: Callable, *arrays: np.ndarray, **options):
    """compute(*arrays, **options), which may not write into its arguments."""
    before = [x.copy() for x in arrays]
    result = compute(*arrays, **options)
    for x, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, copy, err_msg="an argument was changed")
    return result


def assert_kernel_close(actual: torch.Tensor, expected: np.ndarray, problem: Problem) -> None:
    """Rounding to the kernel's dtype, and of scores, which are float32 whatever the dtype."""
    size, terms = np.abs(expected[np.isfinite(expected)]).max(initial=1.0), problem.k.shape[2] * problem.q.shape[1]
    allowed = tolerance(actual.dtype, terms, scale=size)
    allowed["atol"] += tolerance(torch.float32, terms, scale=size * problem.largest_score)["atol"]
    np.testing.assert_allclose(actual.double().cpu().numpy(), expected, **allowed)


def assert_float32_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Within 1e-5: what float32 products and sums of normal data keep, and TF32 or float16 ones do not."""
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.cpu().numpy(), expected, **tolerance(torch.float32))


def assert_one_tile(compute, *args: np.ndarray, block_q: int, block_k: int) -> None:
    """What NumPy held at once while compute ran: a tile of scores, a few arrays of its size, a few as large as q."""
    tracemalloc.start()
    compute(*args, block_q=block_q, block_k=block_k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tile = block_q * block_k * args[0].itemsize
    assert tile <= peak < 8 * tile + 8 * args[0].nbytes
