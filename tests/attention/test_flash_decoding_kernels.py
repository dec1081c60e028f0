"""Flash-Decoding's other kernels, combination and flat products, and what the wrappers choose and refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.on_device import DTYPES, on_device
from tests.conftest import DEVICE, kernel, oracle, poisoned, tolerance
from tests.fences import walled

fast = kernel("attention.flash_decoding")
book = oracle("attention.flash_decoding")


@pytest.mark.kernel
def test_kernel_twice_gives_the_same_bits_with_its_own_configuration():
    q, k, v = (
        poisoned(torch.randn(1, heads, length, 16, device=DEVICE)) for heads, length in ((4, 1), (2, 300), (2, 300))
    )
    assert fast.configuration(2, 300, torch.float32)["splits"] > 1
    once, twice = (fast.flash_decoding(q, k, v) for _ in "ab")
    assert all(torch.equal(*pair) for pair in zip(once, twice, strict=True))
    expected = book.flash_decoding(*(x.double().cpu().numpy() for x in (q, k, v)))
    np.testing.assert_allclose(once[0].cpu(), expected[0], **tolerance(torch.float32, 300))


@pytest.mark.kernel
@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from((1, 16, 24)), st.integers(0, 2**32 - 1))
def test_combine_kernel_is_the_reference(splits, rows, D, seed):
    generator = np.random.default_rng(seed)
    outs, lses = generator.normal(size=(splits, rows, D)), 50 * generator.normal(size=(splits, rows))
    empty = generator.random((splits, rows)) < 0.3
    outs[empty], lses[empty] = np.nan, -np.inf
    outs, lses = outs.astype(np.float32), lses.astype(np.float32)
    found = fast.combine(*(poisoned(torch.from_numpy(x).to(DEVICE)) for x in (outs, lses)))
    for value, expected in zip(found, book.combine(outs, lses), strict=True):
        np.testing.assert_allclose(value.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_combine_kernel_spreads_what_is_no_lse_within_its_row(bad):
    outs, lses = torch.ones(2, 2, 3, device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    lses[1, 0] = bad
    out, lse = fast.combine(outs, lses)
    assert out[0].isnan().all() and lse[0].isnan() and (out[1] == 1).all()


@pytest.mark.kernel
@settings(max_examples=12)
@given(
    st.sampled_from((1, 13, 16)), st.sampled_from((1, 17, 65)), st.sampled_from((1, 31, 64, 300)), DTYPES,
    st.sampled_from((None, 16, 32)),
)  # fmt: skip
def test_flat_kernel_is_the_reference(M, N, K, dtype, block_n):
    generator = np.random.default_rng(M * N * K)
    x, weight = (generator.normal(size=(rows, K)).astype(np.float16).astype(np.float64) for rows in (M, N))
    found = fast.flat_matmul(on_device(x, dtype), on_device(weight, dtype), block_n)
    assert found.dtype == dtype and found.shape == (M, N)
    expected = book.flat_matmul(x, weight)
    np.testing.assert_allclose(found.double().cpu(), expected, **tolerance(dtype, K))


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_flat_kernel_loads_nothing_beyond_its_inputs(begins):
    x, weight = (walled(torch.ones(rows, 33, device=DEVICE), begins) for rows in (3, 17))
    assert (fast.flat_matmul(x, weight) == 33).all()


@pytest.mark.kernel
def test_wrappers_refuse_in_words():
    q, k = torch.zeros(1, 4, 1, 16, device=DEVICE), torch.zeros(1, 2, 5, 16, device=DEVICE)
    wrong = [
        ((k, k, k), "one new token"),
        ((torch.zeros(1, 3, 1, 16, device=DEVICE), k, k), "Hkv dividing 3"),
        (
            (torch.zeros(1, 16, 1, 4, device=DEVICE).mT.reshape(1, 16, 4, 1)[:, :, :1].expand(1, 16, 1, 16), k, k),
            "q must",
        ),
        ((q, k, k, 0), "splits must be from 1 to 64, got 0"),
        ((q, k, k, 65), "got 65"),
        ((q, k, k, 1, None, 24), "block_k must be a power of two"),
    ]
    for arguments, complaint in wrong:
        with pytest.raises(ValueError, match=complaint):
            fast.flash_decoding(*arguments)
    with pytest.raises(TypeError, match="k must have dtype"):
        fast.flash_decoding(q, k.half(), k)
    with pytest.raises(ValueError, match="at most 16 rows, got 17"):
        fast.flat_matmul(torch.zeros(17, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE))
    with pytest.raises(ValueError, match="lses must be"):
        fast.combine(torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE))
