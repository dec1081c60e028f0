"""The kernel of uniform quantization as it is called: its own tiles, plain torch beside it, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chapters.quantization.uniform import SCHEMES, SYMMETRIC, RoundedInput, rounded
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, tolerance
from tests.quantization.grids import TEMPERS, assert_equal, drawn, expected_of

uniform = kernel("quantization.uniform")


@pytest.mark.kernel
class TestKernel:
    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    @pytest.mark.parametrize(("rows", "columns", "size"), [(2, 4128, None), (3, 192, 64), (70, 32, 32)])
    def test_its_own_configuration_serves_any_shape(self, rows, columns, size, dtype):
        x = torch.from_numpy(drawn(1, "outlier", rows, columns, np.float32)).to(DEVICE, dtype)
        assert_equal(uniform.quantize_and_pack(x, 4, size, "no_clipping"), expected_of(x, 4, size, "no_clipping"))

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_plain_torch_makes_the_same(self, bits, scheme):
        x = torch.cat([torch.from_numpy(drawn(2, temper, 2, 64, np.float32)) for temper in TEMPERS]).to(DEVICE)
        assert_equal(uniform.torch_quantize_and_pack(x, bits, 32, scheme), expected_of(x, bits, 32, scheme))

    def test_knows_the_schemes_of_the_chapter(self):
        assert {scheme: pair[:2] for scheme, pair in uniform.SYMMETRIC.items()} == SYMMETRIC

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_a_layer_rounds_its_input_by_it(self, dtype):  # on a GPU it is called
        x = torch.from_numpy(drawn(3, "outlier", 64, 6, np.float32)).to(DEVICE, dtype).T.unflatten(0, (2, 3))
        found = RoundedInput(torch.nn.Identity(), 8, None, "asymmetric")(x)
        expected = rounded(x.float().cpu().numpy(), 8, "token")
        assert found.dtype is dtype
        np.testing.assert_allclose(found.float().cpu().numpy(), expected, **tolerance(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("x", "choice", "error", "complaint"),
    [
        (torch.ones(64), (4,), ValueError, r"x must be a non-empty matrix, got shape \(64,\)"),
        (torch.ones(0, 64), (4,), ValueError, "non-empty"),
        (torch.ones(2, 64), (5,), ValueError, r"bits must be one of \(2, 3, 4, 8\), got 5"),
        (torch.ones(2, 64), (4, 48), ValueError, "group_size must divide 64 columns, fill 32-bit words, .*; got 48"),
        (torch.ones(2, 64), (3, 16), ValueError, "got 16, 3 bits"),
        (torch.ones(2, 64), (4, 0), ValueError, "got 0, 4 bits"),
        (torch.ones(1, 32800), (4,), ValueError, "at most 32768; got 32800"),
        (torch.ones(2, 64), (4, 32, "affine"), ValueError, "scheme must be one of asymmetric, gptq, .*, got 'affine'"),
        (torch.ones(2, 64, dtype=torch.float64), (4,), TypeError, "x must have dtype"),
        (torch.ones(64, 2).T, (4,), ValueError, "x must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(x, choice, error, complaint):
    with pytest.raises(error, match=complaint):
        uniform.quantize_and_pack(x, *choice)
