"""N:M sparsity says what it refuses and why: the book's own words, which no exercise has to repeat."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import DEVICE, kernel, oracle
from tests.sparsity.refused import METADATA, REFUSED

fast = kernel("sparsity.n_m")


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("sparsity.n_m"), function)(*REFUSED[function][words])


def test_the_other_order_is_refused_alike():
    with pytest.raises(ValueError, match="divisible by 32"):
        oracle("sparsity.n_m").to_cutlass(METADATA)
    with pytest.raises(ValueError, match="divisible by 32"):
        oracle("sparsity.n_m").from_cutlass(METADATA)


@pytest.mark.kernel
def test_the_kernels_refuse():
    half = {"dtype": torch.float16, "device": DEVICE}
    x, values = torch.ones(1, 32, **half), torch.ones(4, 16, **half)
    metadata = torch.zeros(4, 2, dtype=torch.int16, device=DEVICE)
    for arguments, words in [
        ((x[:, :16], values, metadata), "x has 16 columns"),
        ((x, values[:, :8], metadata), "do not fit"),
        ((x[0], values, metadata), "two axes"),
        ((x, values.T.contiguous().T, metadata), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            fast.sparse_matmul(*arguments)
    for arguments in [(x.float(), values, metadata), (x, values.bfloat16(), metadata), (x, values, metadata.int())]:
        with pytest.raises(TypeError, match="dtype"):
            fast.sparse_matmul(*arguments)
    with pytest.raises(ValueError, match=r"24 columns.*16"):
        fast.prune_and_compress(torch.ones(1, 24, **half))
    with pytest.raises(ValueError, match="shape"):
        fast.prune_and_compress(torch.ones(16, **half))
    with pytest.raises(TypeError, match="float32"):
        fast.prune_and_compress(torch.ones(1, 16, device=DEVICE))
