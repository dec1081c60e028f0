"""N:M sparsity put together: conversion there and back, products of several tokens. No exercise needs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as convert_back

from chapters.sparsity import n_m
from tests.conftest import kernel
from tests.sparsity.compressed import assert_same_words, converted_by_torch
from tests.sparsity.drawn import CONTENTS, SEEDS, SUMMABLE
from tests.sparsity.launched import assert_close, products

fast = kernel("sparsity.n_m")


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
