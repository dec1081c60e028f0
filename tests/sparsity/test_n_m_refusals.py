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


@pytest.mark.kernel
def test_the_kernel_for_any_pattern_refuses():
    half = {"dtype": torch.float16, "device": DEVICE}
    x, values = torch.ones(1, 128, **half), torch.ones(4, 64, **half)
    packed = torch.zeros(1, 3, 2, 4, dtype=torch.int32, device=DEVICE)
    for arguments, words in [
        ((x, values, packed, 3, 8), "got 3:8"),
        ((x, values, packed, 8, 4), "got 8:4"),
        ((x[:, :64], values, packed, 4, 8), "x has 64 columns.*128"),
        ((x, values[:, :33].contiguous(), packed, 4, 8), "33 columns.*n=4"),
        ((x, values, packed[:, :2].contiguous(), 4, 8), r"packed must be \[1, 3, 2, 4\]"),
        ((x[0], values, packed, 4, 8), "two axes"),
        ((x, values.T.contiguous().T, packed, 4, 8), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            fast.matmul_n_m(*arguments)
    for arguments in [(x.float(), values, packed), (x, values.bfloat16(), packed), (x, values, packed.long())]:
        with pytest.raises(TypeError, match="dtype"):
            fast.matmul_n_m(*arguments, 4, 8)
