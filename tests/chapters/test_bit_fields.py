"""Bit fields: every code bit for bit where the first lines of the file say that it is, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.shared.bit_fields import nibble_words, pack, unpack

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 31, 32, 33, 70])
BITS = st.integers(1, 4)


def field_by_hand(codes: list[int], bits: int) -> list[int]:
    """32 codes -> `bits` words, written out for each number of bits."""
    words = [0] * bits
    for column, code in enumerate(codes):
        shift, four = column // 4 * 4, column % 4
        if bits == 4:
            words[four] |= code << shift
        elif bits == 3 and four < 3:
            words[four] |= code << shift
        elif bits == 3:
            for word in range(3):
                words[word] |= (code >> word & 1) << (shift + 3)
        elif bits == 2:
            words[four % 2] |= code << (shift + 2 * (four // 2))
        else:
            words[0] |= code << (shift + four)
    return words


@given(SEEDS, SIZES, SIZES, BITS, st.sampled_from([np.uint8, np.int64]))
def test_every_code_is_in_its_place(seed, rows, columns, bits, dtype):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(dtype)
    packed = pack(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (-(-rows // 4), bits, -(-columns // 32), 4)
    for quad, unit, line in np.ndindex(packed.shape[0], packed.shape[2], 4):
        field = np.zeros(32, int)
        if 4 * quad + line < rows:
            given_ = codes[4 * quad + line, 32 * unit : 32 * unit + 32]
            field[: len(given_)] = given_
        assert packed[quad, :, unit, line].view(np.uint32).tolist() == field_by_hand(field.tolist(), bits)


@given(SEEDS, SIZES, SIZES, BITS)
def test_unpacking_gives_the_codes_back(seed, rows, columns, bits):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns))
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed, rows, columns), codes)
    np.testing.assert_array_equal(unpack(torch.from_numpy(packed), rows, columns, torch.stack).numpy(), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_four_words_hold_the_codes_in_the_low_bits_of_their_nibbles(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, 32)
    words = nibble_words(np.array(field_by_hand(codes.tolist(), bits), np.uint32).view(np.int32))
    for column, code in enumerate(codes):
        assert words[column % 4] >> 4 * (column // 4) & (2**bits - 1) == code


@pytest.mark.parametrize(
    ("codes", "bits", "complaint"),
    [
        (np.zeros((1, 1), int), 0, "bits must be an integer from 1 to 4, got 0"),
        (np.zeros((1, 1), int), 5, "got 5"),
        (np.zeros((1, 1), int), True, "got True"),
        (np.zeros((1, 1)), 3, r"codes must be integers \[out, in\], got float64 \(1, 1\)"),
        (np.zeros((0, 1), int), 3, r"got int64 \(0, 1\)"),
        (np.zeros(4, int), 3, r"got int64 \(4,\)"),
        (np.full((1, 1), 8), 3, "codes must be from 0 to 7, got 8 to 8"),
        (np.full((1, 1), -1), 3, "got -1 to -1"),
    ],
)
def test_refuses_what_does_not_fit(codes, bits, complaint):
    with pytest.raises(ValueError, match=complaint):
        pack(codes, bits)
