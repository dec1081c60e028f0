"""The forward kernel of quantization-aware training, to the bit, and what the wrappers refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.conftest import DEVICE, kernel, oracle, poisoned
from tests.fences import walled
from tests.quantization.learned_steps import DRAWN, numbers, on_device

kernels = kernel("quantization.qat")


@pytest.mark.kernel
class TestForward:
    @given(**DRAWN)
    def test_gives_the_values_and_codes_of_the_reference(self, seed, groups, n, codes, tile, dtype, aligned):
        x, scale = (poisoned(part, aligned) for part in on_device(seed, groups, n, codes, dtype)[:2])
        chapter = oracle("quantization.qat")
        found = kernels.lsq(x, scale, *codes, tile=tile)
        expected = torch.from_numpy(chapter.lsq(*numbers(x, scale), *codes)).to(dtype)
        assert found.dtype is dtype
        assert torch.equal(found.cpu(), expected)
        found = kernels.lsq_codes(x, scale, *codes, tile=tile).cpu().numpy()
        np.testing.assert_array_equal(found, chapter.lsq_codes(*numbers(x, scale), *codes), strict=True)

    def test_what_is_not_a_number_stays_none(self):
        x = torch.tensor([1.0, math.nan, math.inf], device=DEVICE)
        found = kernels.lsq(x, torch.ones(1, device=DEVICE), 4).cpu()
        assert found[0] == 1 and found[1].isnan() and found[2] == 7


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_the_forward_pass_loads_nothing_outside_of_its_inputs(which, begins):
    held = on_device(1, 3, 17, (4, True))[:2]
    expected = oracle("quantization.qat").lsq(*numbers(*held), 4)
    held[which] = walled(held[which], begins)
    np.testing.assert_array_equal(kernels.lsq(*held, 4, tile=(2, 16)).cpu(), expected)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(0)}, ValueError, "x must hold numbers"),
        ({"scale": torch.ones(5)}, ValueError, "the 5 steps of scale divide, got 12"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale must be \[groups\]"),
        ({"scale": torch.ones(3).half()}, TypeError, "scale must have dtype"),
        ({"dy": torch.ones(12)}, ValueError, "dy must be shaped like x"),
        ({"dy": torch.ones(2, 6).half()}, TypeError, "dy must have dtype"),
        ({"x": torch.ones(2, 6).double(), "dy": torch.ones(2, 6).double()}, TypeError, "x must have dtype"),
        ({"x": torch.ones(6, 2).T}, ValueError, "x must be contiguous"),
        ({"bits": 1}, ValueError, "bits must be an integer from 2 to 8, got 1"),
        ({"bits": 9, "signed": False}, ValueError, "bits must be an integer from 1 to 8, got 9"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    usual = {"x": torch.ones(2, 6), "scale": torch.ones(3), "dy": torch.ones(2, 6), "bits": 4, "signed": True}
    with pytest.raises(error, match=complaint):
        kernels.lsq_gradient(**(usual | changed))
