"""Where the values of an N:M weight stood: the two ways of writing it down, read and checked.

Words of torch's semi-structured tensors, 2:4 only. In 16 bits a word is int16 and describes four groups, in int8 it is
int32 and describes eight. Each group is a nibble, lower | higher << 2, of the two positions that hold its values; group
g of a word is in bits 4g … 4g+3.

Packed positions, any N:M up to M = 16: of every value its position in ⌈log2 M⌉ bits, in the fields of `bit_fields`.
"""

from __future__ import annotations

import numpy as np

from chapters.shared.bit_fields import unpack


def word_layout(dtype: np.dtype) -> tuple[type[np.signedinteger], int]:
    """Metadata for values of `dtype`: the dtype of a word, and how many groups it describes, a nibble each."""
    return (np.int32, 8) if dtype == np.int8 else (np.int16, 4)


def positions(values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    """Where in its group of four each value stood, ascending: `[out, groups, 2]`, numbers 0 to 3.

    Raises ValueError if metadata does not fit values `[out, 2 · groups]`, or holds what `compress` never writes.
    """
    word, groups_per_word = word_layout(values.dtype)
    if metadata.dtype != word or values.shape != (len(metadata), 2 * groups_per_word * metadata.shape[-1]):
        found = f"{metadata.dtype} {metadata.shape} for {values.dtype} {values.shape}"
        raise ValueError(f"metadata must be {np.dtype(word)} [out, in/{4 * groups_per_word}], got {found}")
    nibbles = (metadata[..., None] >> 4 * np.arange(groups_per_word) & 15).reshape(len(metadata), -1)
    index = np.stack((nibbles & 3, nibbles >> 2), axis=-1)
    if (index[..., 0] >= index[..., 1]).any():
        raise ValueError("metadata holds positions that do not ascend: it is damaged, or not in row-major order")
    return index


def index_bits(m: int) -> int:
    """⌈log2 m⌉: bits that tell m positions apart. ValueError unless 2 <= m <= 16, for which fields are packed."""
    if not 2 <= m <= 16:
        raise ValueError(f"m must be from 2 to 16 for its positions to be packed, got {m}")
    return (m - 1).bit_length()


def columns_n_m(values: np.ndarray, packed: np.ndarray, n: int, m: int) -> np.ndarray:
    """The column of each value of an n:m weight, from its packed positions: int `[out, in · n/m]`, as values.

    packed int32 `[⌈out/4⌉, ⌈log2 m⌉, ⌈in · n/m / 32⌉, 4]`, as `compress_n_m` makes it. Raises ValueError if the two do
    not fit together, and if positions reach m or do not ascend in a group.
    """
    bits = index_bits(m)
    if values.ndim != 2 or not 1 <= n <= m or values.shape[1] % n:
        raise ValueError(f"values of {n}:{m} must be [out, groups · {n}], got shape {values.shape}")
    rows, kept = values.shape
    shape = (-(-rows // 4), bits, -(-kept // 32), 4)
    if packed.dtype != np.int32 or packed.shape != shape:
        raise ValueError(f"packed must be int32 {shape} for values {values.shape}, got {packed.dtype} {packed.shape}")
    index = unpack(packed, rows, kept).reshape(rows, -1, n)
    if (index >= m).any() or (np.diff(index, axis=-1) <= 0).any():
        raise ValueError(f"packed holds positions that do not ascend below m={m}: it is damaged")
    return (m * np.arange(index.shape[1])[:, None] + index).reshape(values.shape)
