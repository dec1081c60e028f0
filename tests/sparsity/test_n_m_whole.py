"""N:M sparsity put together: conversion there and back, products of several tokens. No exercise needs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as convert_back

from chapters.sparsity import n_m
from tests.conftest import DEVICE, HAS_TRITON, kernel
from tests.fences import walled
from tests.sparsity.compressed import assert_same_words, converted_by_torch
from tests.sparsity.drawn import CONTENTS, SEEDS, SUMMABLE
from tests.sparsity.general import FAST, PATTERNS, products_n_m, stored_n_m
from tests.sparsity.launched import assert_close, products

fast = kernel("sparsity.n_m")
if HAS_TRITON:
    from kernels.shared import n_m_tiles


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@given(seed=SEEDS, strips=st.integers(1, 2), words=st.integers(1, 3), kind=st.sampled_from(CONTENTS[:4]))
def test_the_whole_conversion_and_back_equals_that_of_torch(dtype, strips, words, kind, seed):
    weight, values, reordered = converted_by_torch(dtype, strips, words, kind, seed)
    assert_same_words(n_m.to_cutlass(n_m.compress(weight)[1]), reordered)
    restored = convert_back(torch.from_numpy(values), torch.from_numpy(reordered))
    np.testing.assert_array_equal(n_m.decompress(values, n_m.from_cutlass(reordered)), restored.numpy())


@pytest.mark.kernel
@given(tokens=st.integers(2, 35), rows=st.integers(1, 33), words=st.integers(1, 20), kind=st.sampled_from(SUMMABLE),
       seed=SEEDS, aligned=st.booleans())  # fmt: skip
def test_kernel_multiplies_several_tokens(tokens, rows, words, kind, seed, aligned):
    operands, expected = products(tokens, rows, words, seed, aligned, kind)
    assert_close(fast.sparse_matmul(*operands, rows=16, words=1), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [1, 3])
def test_kernel_with_the_configuration_that_it_picks_itself(tokens):
    operands, expected = products(tokens, 5, 7, 0, True, "normal")
    assert_close(fast.sparse_matmul(*operands), expected)


@pytest.mark.kernel
def test_kernel_multiplies_a_prompt():
    operands, expected = products(33, 17, 5, 1, False, "normal")
    assert_close(fast.sparse_matmul(*operands), expected)
    assert_close(fast.sparse_matmul(*operands, rows=16, words=1), expected)


# --- any N:M ------------------------------------------------------------------------------------------------------


@given(pattern=st.sampled_from(PATTERNS), kind=st.sampled_from(CONTENTS), rows=st.integers(1, 9),
       groups=st.integers(1, 20), seed=SEEDS)  # fmt: skip
def test_any_pattern_is_stored_and_restored(pattern, kind, rows, groups, seed):
    dense = stored_n_m(kind, *pattern, rows, groups, seed)[2] * (np.random.default_rng(seed).random() < 0.7)
    np.testing.assert_array_equal(n_m.decompress_n_m(*n_m.compress_n_m(dense, *pattern), *pattern), dense)


@pytest.mark.parametrize(("n", "m", "bits"), [(1, 4, 4.5), (2, 8, 4.75), (2, 4, 9), (4, 8, 9.5), (1, 16, 1.25)])
def test_bits_are_those_that_the_formula_says(n, m, bits):
    """Where fields of 32 values and quads of rows are full."""
    weight = np.eye(4, 32 * m, dtype=np.float16)
    values, packed = n_m.compress_n_m(weight, n, m)
    assert 8 * (values.nbytes + packed.nbytes) == bits * weight.size


def test_2_of_4_costs_the_same_bits_in_either_form():
    weight = np.tile(np.eye(4, dtype=np.float16), (8, 16))
    general, words = n_m.compress_n_m(weight, 2, 4), n_m.compress(weight)
    assert sum(part.nbytes for part in general) == sum(part.nbytes for part in words)


@pytest.mark.kernel
@given(tokens=st.sampled_from([1, 1, 2, 17]), pattern=st.sampled_from(FAST), rows=st.integers(1, 17),
       groups=st.integers(1, 40), seed=SEEDS, aligned=st.booleans())  # fmt: skip
def test_kernel_multiplies_by_any_pattern(tokens, pattern, rows, groups, seed, aligned):
    operands, expected = products_n_m(tokens, *pattern, rows, groups, seed, aligned)
    assert_close(fast.matmul_n_m(*operands, *pattern, quads=2, fields=1), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [1, 3])
def test_kernel_with_any_pattern_and_the_tile_that_it_picks_itself(tokens):
    operands, expected = products_n_m(tokens, 4, 8, 9, 17, 0, True)
    assert_close(fast.matmul_n_m(*operands, 4, 8), expected)
    dense = n_m_tiles.dense_weight(*operands[1:], 4, 8)
    torch.testing.assert_close(operands[0].double() @ dense.double().T, torch.from_numpy(expected).to(DEVICE))


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_kernel_with_any_pattern_reads_nothing_outside_its_operands(operand, begins, tokens):
    """It comes last, because a kernel that does ends the process."""
    operands, _ = products_n_m(tokens, 2, 8, 5, 19, 0, True)
    operands[operand] = walled(operands[operand], begins)
    fast.matmul_n_m(*operands, 2, 8, quads=2, fields=1)
