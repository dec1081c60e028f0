"""Compressed forms by the tests' own means: put together from drawn positions, ordered by torch, compared as digits."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets as offsets
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert

from tests.sparsity.drawn import contents, pruned

PAIRS = np.array(list(itertools.combinations(range(4), 2)))


def stored(kind: str, rows: int, words: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A 2:4 weight `[rows, 16 · words]` with positions drawn at random: values, metadata, dense weight, kept."""
    values = contents(kind, (rows, 8 * words), seed)
    index = PAIRS[np.random.default_rng(seed).integers(len(PAIRS), size=(rows, 4 * words))]  # [rows, groups, 2]
    columns = (4 * np.arange(4 * words)[:, None] + index).reshape(values.shape)
    dense = np.zeros((rows, 16 * words))
    kept = np.zeros(dense.shape, dtype=bool)
    np.put_along_axis(dense, columns, values, axis=1)
    np.put_along_axis(kept, columns, True, axis=1)
    nibbles = (index @ [1, 4]).reshape(rows, words, 4)
    return values, (nibbles @ [1, 16, 256, 4096]).astype(np.int16), dense, kept


def cutlass_places(metadata: np.ndarray) -> np.ndarray:
    """Torch's own answer to where each row-major word goes in CUTLASS's order: `[out, words]`."""
    dtype = torch.from_numpy(metadata).dtype
    return offsets(*metadata.shape, dtype, "cpu").view(metadata.shape).numpy()


def converted_by_torch(dtype: type, strips: int, words: int, kind: str, seed: int) -> tuple:
    """(2:4 weight, its values, its metadata in CUTLASS's order), the last two by torch."""
    size = np.dtype(dtype).itemsize
    shape = (strips * 16 * size, words * 64 // size)
    weight = pruned(contents(kind, shape, seed) * (1 if size == 2 else 50)).astype(dtype)
    values, metadata = convert(torch.from_numpy(weight))
    return weight, values.numpy(), metadata.numpy()


def spelled(metadata: np.ndarray) -> list[str]:
    """Each row as hexadecimal digits, one for each group, the first group first; a space between words."""
    digits = 2 * metadata.itemsize
    unsigned = metadata.view(f"uint{4 * digits}")
    return [" ".join(f"{word:0{digits}x}"[::-1] for word in row) for row in unsigned.tolist()]


def assert_same_words(metadata: np.ndarray, expected: np.ndarray) -> None:
    """Equal metadata; a difference is shown group by group, which signed numbers would hide."""
    assert metadata.dtype == expected.dtype and metadata.shape == expected.shape
    assert spelled(metadata) == spelled(expected)
