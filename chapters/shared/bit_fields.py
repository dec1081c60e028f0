"""Codes of 1 to 4 bits packed without a gap, in an order that a GPU unpacks with few instructions.

32 neighbouring codes of a row become `bits` int32 words. Their nibble i, counted from the lowest, holds columns 4 i to
4 i + 3. Of these four codes the first `bits` fill the low bits of word 0, word 1, ..; what is left of the nibble takes
the bits of the others:

    4 bits   word w: code w                    2 bits   word 0: codes 0 and 2; word 1: codes 1 and 3
    3 bits   word w: code w, and above it      1 bit    word 0: codes 0, 1, 2, 3
             bit w of code 3

A shift and an AND by a constant thus give eight codes of one word at once, one in each nibble.
The same word of four neighbouring rows is 16 bytes, which one GPU thread loads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROWS, COLUMNS = 4, 32  # of the block that lies together


def place_of(code: int, bit: int, bits: int) -> tuple[int, int]:
    """(word, place in each of its nibbles) of bit `bit` of code `code`, which is one of four neighbours, 0 .. 3."""
    if code < bits:
        return code, bit
    word, spare = divmod((code - bits) * bits + bit, 4 - bits)
    return word, bits + spare


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, integers `[out, in]` below 2^bits -> int32 `[⌈out/4⌉, bits, ⌈in/32⌉, 4]`.

    Word w of columns 32 u .. 32 u + 31 of row 4 q + r is packed[q, w, u, r]. Rows and columns that are missing are
    codes 0. Raises ValueError for bits outside 1 .. 4 and for other codes.
    """
    if isinstance(bits, bool) or bits not in range(1, 5):
        raise ValueError(f"bits must be an integer from 1 to 4, got {bits!r}")
    if codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [out, in], got {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be from 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    rows, columns = codes.shape
    padded = np.pad(codes, ((0, -rows % ROWS), (0, -columns % COLUMNS))).astype(np.uint32)
    fields = padded.reshape(-1, ROWS, padded.shape[1] // COLUMNS, 8, 4).swapaxes(1, 2)  # [q, u, r, nibble, code]
    packed = np.zeros((len(fields), bits, *fields.shape[1:3]), np.uint32)
    for code, bit in np.ndindex(4, bits):
        word, place = place_of(code, bit, bits)
        nibbles = (fields[..., code] >> bit & 1) << np.arange(place, 32, 4, dtype=np.uint32)
        packed[:, word] |= np.bitwise_or.reduce(nibbles, axis=-1)
    return packed.view(np.int32)


def nibble_words(words: Sequence[Any]) -> list[Any]:
    """The 1 to 4 words of a field -> four: the low `bits` bits of nibble i of word w are code 4 i + w.

    Bits above these are of no account. Words are int32 arrays or tensors of any shape.
    """
    if len(words) == 1:
        return [words[0] >> code for code in range(4)]
    if len(words) == 2:
        return [*words, words[0] >> 2, words[1] >> 2]
    if len(words) == 3:
        low, middle, high = (words[bit] >> (3 - bit) & (0x11111111 << bit) for bit in range(3))
        return [*words, low | middle | high]
    return list(words)


def unpack(packed: Any, rows: int, columns: int, stack: Callable[[list, int], Any] = np.stack) -> Any:
    """Inverse of `pack`: int32 `[rows, columns]`. For a torch tensor `stack` is `torch.stack`."""
    bits = packed.shape[1]
    words = nibble_words([packed[:, word] for word in range(bits)])
    codes = stack([word >> 4 * i & (2**bits - 1) for i in range(8) for word in words], -1)  # [q, u, r, 32]
    return codes.swapaxes(1, 2).reshape(ROWS * len(packed), -1)[:rows, :columns]
