"""GOBO's kernels once more: the product of more tokens, any shape, what the wrapper refuses, and its own oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.shared.bit_fields import pack
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.codebooks import PARTS, arguments, expected_of, products

codebook = kernel("quantization.gobo")


@pytest.mark.kernel
class TestKernel:
    @given(
        products(st.sampled_from([2, 3, 17]), most=5), st.sampled_from([2, 4]), st.sampled_from([1, 4]),
        st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_matmul_equals_the_reference(self, product, rows, fields, dtype, aligned):
        held = [poisoned(part, aligned) for part in product.rounded(dtype)]
        found = codebook.codebook_matmul(*held, tokens=16, rows=rows, fields=fields)
        expected, largest = expected_of(product, held)
        assert found.dtype is dtype
        close = tolerance(dtype, product.x.shape[1], scale=largest)
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **close)

    @pytest.mark.parametrize("which", PARTS)
    @pytest.mark.parametrize("tokens", [2, 17])
    def test_matmul_loads_nothing_outside_of_its_inputs(self, which, tokens):
        held = {name: part.to(DEVICE) for name, part in arguments(x=torch.ones(tokens, 64)).items()}
        held[which] = walled(held[which])
        found = codebook.codebook_matmul(**held, rows=8, fields=4)
        np.testing.assert_array_equal(found.cpu().numpy(), tokens * [[0, 1, 0, 0, 0, -2]])

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    @pytest.mark.parametrize("tokens", [1, 5, 40])
    def test_its_own_configuration_serves_any_shape(self, tokens, dtype):
        rng = np.random.default_rng(0)
        packed = torch.from_numpy(pack(rng.integers(0, 8, (9, 290)), 3)).to(DEVICE)
        x = torch.from_numpy(rng.integers(-3, 4, (tokens, 290))).to(DEVICE, dtype)
        rest = [part.to(DEVICE) for part in list(arguments().values())[2:]]
        rest[1] = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2], dtype=torch.int32, device=DEVICE)
        found = codebook.codebook_matmul(x, packed, *rest)
        weight = codebook.dequantize(packed, *rest, 290, torch.float32)
        assert torch.equal(found, (x.float() @ weight.T).to(dtype)), "sums of whole numbers are exact in any order"

    @given(products())
    def test_plain_torch_dequantizes_alike(self, product):
        x, *weight = product.rounded(torch.float32)
        found = codebook.dequantize(*weight, x.shape[1], torch.float32).T.cpu().numpy()
        identity = np.eye(x.shape[1])
        expected = oracle("quantization.gobo").codebook_matmul(identity, *(part.cpu().numpy() for part in weight))
        np.testing.assert_allclose(found, expected, **tolerance(np.float32))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(64)}, ValueError, "x and packed must have 2 and 4 axes, got 1, 4"),
        ({"x": torch.ones(0, 64)}, ValueError, "must not be empty"),
        ({"x": torch.ones(1, 65)}, ValueError, r"packed must be \(2, 3, 3, 4\) for N=6, K=65, got \(2, 3, 2, 4\)"),
        ({"packed": torch.zeros(2, 5, 2, 4, dtype=torch.int32)}, ValueError, "packed must have 1 to 4 bits, got 5"),
        ({"centroids": torch.ones(7)}, ValueError, r"centroids must be 2\^3, got 7"),
        ({"extra": torch.ones(3)}, ValueError, "column and extra must be as many, got 2 and 3"),
        ({"start": torch.zeros(7)}, TypeError, "start must have dtype torch.int32"),
        ({"column": torch.zeros(2, dtype=torch.int32)}, TypeError, "column must have dtype torch.int16"),
        ({"x": torch.ones(1, 64, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(64, 2).T}, ValueError, "x must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        codebook.codebook_matmul(**arguments(**changed))
