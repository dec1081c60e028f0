"""The device functions of the magnitude kernel on their own, and weights that are hard for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.conftest import DEVICE, HAS_TRITON, kernel, oracle, poisoned

fast = kernel("pruning.magnitude")

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def threshold_of_rows(key, out, kept, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.arange(0, ROWS)
        tile = tl.load(key + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        tl.store(out + row, fast.threshold(tile, kept, BITS))

    @triton.jit
    def stays_of_rows(key, found, ties, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.arange(0, ROWS)
        offsets = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        keep = fast.stays(tl.load(key + offsets), tl.load(found + row), tl.load(ties + row))
        tl.store(out + offsets, keep.to(tl.int8))


def thresholds(key: np.ndarray, kept: int, bits: int) -> list[int]:
    """What the kernel's `threshold` makes of keys int32 [R, C], powers of two."""
    out = torch.empty(len(key), dtype=torch.int32, device=DEVICE)
    threshold_of_rows[(1,)](torch.from_numpy(key).to(DEVICE), out, kept, BITS=bits, ROWS=len(key), COLUMNS=key.shape[1])
    return out.tolist()


def staying(key: np.ndarray, found: list[int], ties: list[int]) -> np.ndarray:
    """What the kernel's `stays` makes of keys int32 [R, C], powers of two: bool [R, C]."""
    tensors = [torch.tensor(np.array(each), dtype=torch.int32, device=DEVICE) for each in (key, found, ties)]
    out = torch.empty(key.shape, dtype=torch.int8, device=DEVICE)
    stays_of_rows[(1,)](*tensors, out, ROWS=len(key), COLUMNS=key.shape[1])
    return out.cpu().numpy().astype(bool)


def keys(kind: str, rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    """Keys int32 [rows, columns] of one kind, the last columns of each row missing (-1)."""
    generator = np.random.default_rng(seed)
    drawn = {
        "any": lambda: generator.integers(0, 1 << bits, (rows, columns)),
        "few": lambda: generator.integers(0, 3, (rows, columns)) * ((1 << bits) - 1) // 2,
        "neighbours": lambda: (1 << bits - 1) + generator.integers(-2, 3, (rows, columns)),
        "equal": lambda: np.full((rows, columns), generator.integers(0, 1 << bits)),
        "each row on its own": lambda: (
            generator.integers(0, 64, (rows, columns)) << (np.arange(rows) % (bits - 6))[:, None]
        ),
    }[kind]().astype(np.int32)
    drawn[:, columns - seed % (columns // 2) :] = -1 if seed % (columns // 2) else drawn[:, columns:]
    return drawn


def special(dtype: torch.dtype) -> Tensor:
    """A row of zeros of both signs, the least numbers, infinities and ties of each, and nothing that is NaN."""
    least = torch.tensor([1], dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype).item()
    numbers = [0.0, -0.0, least, -least, -1.0, 1.0, torch.finfo(dtype).max, -float("inf"), float("inf"), 2 * least]
    return torch.tensor(numbers * 3 + [0.0, -0.0], dtype=dtype)


def assert_same_bits(found: Tensor, expected: np.ndarray | Tensor) -> None:
    """Equal as bits: the sign of a zero and a NaN count, too."""
    integer = torch.int16 if found.element_size() == 2 else torch.int32
    expected = torch.as_tensor(expected).to(found.dtype)
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.cpu().view(integer).numpy(), expected.cpu().view(integer).numpy())


def assert_pruned(weight: Tensor, kept: int, per_row: bool, aligned: bool = True, **sizes: int) -> None:
    """The kernel leaves of `weight` what the reference does, bit for bit, and the weight as it was."""
    name = "prune_rows" if per_row else "prune_layer"
    mine = poisoned(weight.to(DEVICE), aligned)
    found = getattr(fast, name)(mine, kept, **sizes)
    wide = weight.double().numpy()  # exact, also of bfloat16, which NumPy lacks
    assert_same_bits(found, getattr(oracle("pruning.magnitude"), name)(wide, kept))
    assert_same_bits(mine, weight)
