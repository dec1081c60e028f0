"""The magnitude kernels as a whole: bit for bit what the reference leaves, ties and all, in as many reads as said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DEVICE, KERNEL_DTYPES, kernel
from tests.fences import walled
from tests.pruning.launched import assert_pruned, assert_same_bits, special
from tests.sparsity.drawn import CONTENTS, SEEDS, contents, first_largest

fast = kernel("pruning.magnitude")
SIZES = st.sampled_from([1, 2, 7, 16, 17])
KINDS = st.sampled_from(CONTENTS)
FEW = settings(max_examples=12)


def drawn(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    return contents(kind, (rows, columns), seed)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(KINDS, st.integers(1, 5), st.sampled_from([1, 7, 16, 33]), st.floats(0, 1), SEEDS, st.booleans())
def test_kernel_prunes_rows_like_the_reference(dtype, kind, rows, columns, share, seed, aligned):
    weight = torch.from_numpy(drawn(kind, rows, columns, seed)).to(dtype)
    assert_pruned(weight, round(share * columns), True, aligned, rows=2)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(KINDS, SIZES, SIZES, st.floats(0, 1), SEEDS, st.booleans())
def test_kernel_prunes_a_layer_like_the_reference(dtype, kind, rows, columns, share, seed, aligned):
    weight = torch.from_numpy(drawn(kind, rows, columns, seed)).to(dtype)
    assert_pruned(weight, round(share * weight.numel()), False, aligned, programs=4, tile=64, sample=16)


@pytest.mark.kernel
@pytest.mark.parametrize("kept", [0, 1, 500, 999, 1000])
@pytest.mark.parametrize("value", [-1.5, 0.0])
def test_kernel_keeps_the_first_of_a_layer_of_equals(value, kept):
    """The last to stay is in any program: before it all equals stay, after it none."""
    found = fast.prune_layer(torch.full((1000,), value, dtype=torch.float16, device=DEVICE), kept, 8, 64, 16)
    assert_same_bits(found, torch.tensor([value] * kept + [0.0] * (1000 - kept)))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])  # bits are moved, never added
def test_kernel_orders_zeros_the_least_numbers_and_infinities(dtype):
    row = special(dtype)
    first = [first_largest(row.double().abs().numpy(), kept) for kept in range(len(row) + 1)]
    for kept in (1, 3, 7, 15, 20, 26, 27, len(row)):
        expected = torch.zeros_like(row)
        expected[first[kept]] = row[first[kept]]
        assert_same_bits(fast.prune_rows(row[None].to(DEVICE), kept), expected[None])
        if kept in (3, 15, 26):
            assert_same_bits(fast.prune_layer(row.to(DEVICE), kept, 2, 16, 16), expected)


@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "right", "wrong"), [(torch.float16, 1, 3), (torch.float32, 3, 5)])
def test_kernel_reads_once_to_count_when_the_guess_is_right_and_is_right_when_it_is_wrong(dtype, right, wrong):
    weight = torch.from_numpy(drawn("normal", 1, 512, 0)).to(dtype).flatten()
    misled = torch.where(torch.arange(512) < 8, 1e-3, weight.abs() + 1).to(dtype)  # all that it looks at
    for numbers, sample, reads in ((weight, 512, right), (misled, 8, wrong)):
        bits, width = fast.as_integers(numbers.to(DEVICE))
        sizes = {"BITS": width, "DIGIT": fast.DIGITS[dtype], "TILE": 128}
        state, *_ = fast.select(bits, 250, 256, sizes, fast.GUESSED[dtype], sample)
        shifts = state[:, 1].tolist()
        assert sum(shift >= 0 for shift in shifts) == reads, shifts
        assert_pruned(numbers, 250, False, programs=2, tile=128, sample=sample)


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", ["prune_rows", "prune_layer"])
def test_kernel_reads_nothing_outside_the_weight(name, begins):
    """It comes last, because a kernel that does ends the process."""
    weight = walled(torch.randn(3, 21, dtype=torch.float16, device=DEVICE), begins)
    sizes = {"rows": 2} if name == "prune_rows" else {"programs": 4, "tile": 16, "sample": 16}
    getattr(fast, name)(weight, 9, **sizes)
