"""Quantization-aware training: codes and gradients against a loop, autograd and the authors' arrays; the kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization.qat import first_scale, lsq, lsq_codes, lsq_gradient, straight_through, ternary
from tests.conftest import DEVICE, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.learned_steps import CODES, DRAWN, SEEDS, SIZES, close, drawn, limits, numbers, on_device

kernels = kernel("quantization.qat")


def by_hand(x, scale, dy, bits, signed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, dx and dscale, one number at a time."""
    low, high = limits(bits, signed)
    codes, dx, dscale = np.empty(x.shape, int), np.zeros_like(dy), np.zeros(len(x))
    wide = np.result_type(x, scale, np.float32).type
    for i, j in np.ndindex(*x.shape):
        q = wide(x[i, j]) / wide(scale[i])
        codes[i, j] = low if q < low else high if q > high else round(float(q))
        if low <= q <= high:
            dx[i, j] = dy[i, j]
        dscale[i] += dy[i, j] * (codes[i, j] - float(q) if low <= q <= high else codes[i, j])
    return codes, dx, dscale / math.sqrt(x.shape[1] * high)


def bad_arguments() -> list[tuple]:
    """x, scale, bits, signed that neither codes nor gradients can be made of."""
    x, scale = np.ones((2, 6)), np.ones(2)
    return [
        (x, scale, 1, True), (x, scale, 9, True), (x, scale, 0, False), (x, scale, 9, False), (x, np.ones(5), 4, True),
        (x, np.ones((2, 1)), 4, True), (x, np.array([1.0, 0]), 4, True), (x, np.array([1.0, -1]), 4, True),
        (x, np.array([1.0, np.nan]), 4, True), (x, np.array([1.0, np.inf]), 4, True), (x * np.nan, scale, 4, True),
        (x * np.inf, scale, 4, True), (np.ones((2, 0)), scale, 4, True), (x, np.ones(0), 4, True),
    ]  # fmt: skip


@pytest.mark.exercise("chapters.quantization.qat.lsq_codes", points=2)
class TestCodes:
    @given(
        **SIZES, codes=CODES,
        dtypes=st.sampled_from([(np.float32,) * 2, (np.float64,) * 2, (np.float16,) * 2, (np.float32, np.float64)]),
    )  # fmt: skip
    def test_are_those_of_a_loop(self, seed, groups, n, codes, dtypes):
        x, scale, dy = drawn(seed, groups, n, *codes)
        x, scale = x.astype(dtypes[0]), scale.astype(dtypes[1])
        before = x.copy(), scale.copy()
        found = lsq_codes(x, scale, *codes)
        assert found.dtype == (np.int8 if codes[1] else np.uint8)
        np.testing.assert_array_equal(found, by_hand(x, scale, dy, *codes)[0])
        np.testing.assert_array_equal(x, before[0])
        np.testing.assert_array_equal(scale, before[1])

    @given(**SIZES)
    def test_cut_any_shape_as_it_lies_in_memory(self, seed, groups, n):
        x, scale, _ = drawn(seed, groups, 2 * n, 4, True)
        found = lsq_codes(x.reshape(2, groups, n), scale, 4)
        assert found.shape == (2, groups, n)
        np.testing.assert_array_equal(found.reshape(x.shape), by_hand(x, scale, x, 4, True)[0])

    def test_go_to_the_even_one_at_a_tie_and_to_the_ends_from_afar(self):
        x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5, -8.5, 1e30, -1e30, 3e38], np.float32)
        expected = [0, 2, 2, 0, -2, -2, 6, 7, -8, 7, -8, 7]
        np.testing.assert_array_equal(lsq_codes(x, np.ones(1, np.float32), 4), expected)
        np.testing.assert_array_equal(lsq_codes(x, np.full(1, 1e-3, np.float32), 8)[-3:], [127, -128, 127])

    @pytest.mark.parametrize("bits", [4, 8])
    def test_equal_the_authors(self, bits):
        held = golden("quant/qat_ternary_lsq")
        scale = held[f"lsq_b{bits}/alpha_init"]
        codes = lsq_codes(held["W"].astype(np.float32), scale, bits)
        np.testing.assert_array_equal(codes, np.rint(held[f"lsq_b{bits}/wq"] / scale))

    @pytest.mark.parametrize("arguments", bad_arguments())
    def test_refuse_what_has_none(self, arguments):
        with pytest.raises(ValueError):
            lsq_codes(*arguments)


class TestValues:
    @given(**SIZES, codes=CODES)
    def test_are_steps_times_codes(self, seed, groups, n, codes):
        x, scale, dy = drawn(seed, groups, n, *codes)
        found = lsq(x, scale, *codes)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, scale[:, None] * by_hand(x, scale, dy, *codes)[0].astype(np.float32))

    @pytest.mark.parametrize("name", ["lsq_b4/wq", "lsq_b8/wq", "binarybert_lsq_sym_b4/y"])
    def test_and_first_steps_equal_the_authors(self, name):
        held, peer = golden("quant/qat_ternary_lsq"), name.split("/")[0]
        bits, w = int(peer[-1]), held["W"].astype(np.float32)
        alpha = held[f"{peer}/alpha{'_init' * peer.startswith('lsq')}"].reshape(1)
        np.testing.assert_allclose(lsq(w, alpha, bits), held[name], **tolerance(np.float32))
        np.testing.assert_allclose(first_scale(w, bits), alpha, **tolerance(np.float32))

    def test_first_steps_are_by_group_and_1_for_zeros(self):
        x = np.array([[1.0, -3], [0, 0]], np.float32)
        np.testing.assert_allclose(first_scale(x, 3, 2), [4 / math.sqrt(3), 1], rtol=1e-6)
        np.testing.assert_allclose(first_scale(x, 2, 1, signed=False), [2 / math.sqrt(3)], rtol=1e-6)
        np.testing.assert_array_equal(lsq(x, first_scale(x, 2, 2), 2)[1], [0, 0])

    def test_refusals_name_what_is_wrong(self):
        x, one = np.ones(6), np.ones(1)
        for call, words in (
            (lambda: lsq(x, one, 1), "bits must be an integer from 2 to 8, got 1"),
            (lambda: lsq(x, np.ones(4), 4), "groups must divide the 6 numbers of x, got 4"),
            (lambda: lsq(x, 0 * one, 4), r"scale must be \[groups\], positive and finite"),
            (lambda: lsq(x * np.nan, one, 4), "x must be finite and not empty"),
            (lambda: lsq_gradient(x, one, x[:3], 4), r"dy must be shaped like x, \(6,\), got \(3,\)"),
            (lambda: straight_through(x, x, 0), "limit > 0"),
            (lambda: first_scale(x, True), "bits must be"),
        ):
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.exercise("chapters.quantization.qat.lsq_gradient", points=3)
class TestGradient:
    @given(**SIZES, codes=CODES, dtype=st.sampled_from([np.float32, np.float64]))
    def test_is_that_of_a_loop(self, seed, groups, n, codes, dtype):
        x, scale, dy = (part.astype(dtype) for part in drawn(seed, groups, n, *codes))
        before = x.copy(), scale.copy(), dy.copy()
        dx, dscale = lsq_gradient(x, scale, dy, *codes)
        _, expected, total = by_hand(x, scale, dy, *codes)
        assert dx.dtype == dscale.dtype == dtype
        np.testing.assert_array_equal(dx, expected)
        np.testing.assert_allclose(dscale, total, **close(dtype, dy, *codes, n))
        for part, then in zip((x, scale, dy), before, strict=True):
            np.testing.assert_array_equal(part, then)

    @given(**SIZES, codes=CODES)
    def test_is_what_autograd_finds_if_rounding_is_the_identity(self, seed, groups, n, codes):
        x, scale, dy = (part.astype(np.float64) for part in drawn(seed, groups, n, *codes))
        w, s = torch.from_numpy(x).requires_grad_(), torch.from_numpy(scale).requires_grad_()
        low, high = limits(*codes)
        clipped = (w / s[:, None]).clamp(low, high)
        (s[:, None] * (clipped + (clipped.round() - clipped).detach())).backward(torch.from_numpy(dy))
        dx, dscale = lsq_gradient(x, scale, dy, *codes)
        np.testing.assert_allclose(dx, w.grad, **tolerance(np.float64))
        exact = close(np.float64, dy, *codes, n)
        np.testing.assert_allclose(dscale, s.grad / math.sqrt(n * high), **exact)

    def test_the_ends_are_inside_and_what_rounds_to_them_is_not(self):
        x, scale, dy = np.array([-8.0, 7, -8.2, 7.2, 6.8]), np.ones(1), np.arange(1.0, 6)
        dx, dscale = lsq_gradient(x, scale, dy, 4)
        np.testing.assert_array_equal(dx, [1, 2, 0, 0, 5])
        np.testing.assert_allclose(dscale, (3 * -8 + 4 * 7 + 5 * 0.2) / math.sqrt(5 * 7))

    def test_any_shape_is_cut_as_it_lies_in_memory(self):
        x, scale, dy = drawn(1, 3, 8, 4, True)
        dx, dscale = lsq_gradient(x.reshape(4, 6), scale, dy.reshape(4, 6), 4)
        _, expected, total = by_hand(x, scale, dy, 4, True)
        assert dx.shape == (4, 6) and dscale.shape == (3,)
        np.testing.assert_array_equal(dx.reshape(x.shape), expected)
        np.testing.assert_allclose(dscale, total, **close(np.float32, dy, 4, True, 8))

    @pytest.mark.parametrize("peer", ["lsq_b4", "lsq_b8", "binarybert_lsq_sym_b4"])
    def test_equals_the_authors(self, peer):
        held = golden("quant/qat_ternary_lsq")
        w, dy = held["W"].astype(np.float32), held["grad_out"].astype(np.float32)
        alpha = held[f"{peer}/alpha{'_init' * peer.startswith('lsq')}"].reshape(1)
        dx, dscale = lsq_gradient(w, alpha, dy, int(peer[-1]))
        expected = np.unpackbits(held[f"{peer.replace('binarybert_lsq_sym', 'lsq')}/w_grad_mask"]).reshape(w.shape)
        np.testing.assert_array_equal(dx, dy * expected)
        np.testing.assert_allclose(dscale, held[f"{peer}/alpha_grad"].reshape(1), **tolerance(np.float32))

    @pytest.mark.parametrize("arguments", bad_arguments())
    def test_refuses_what_has_none(self, arguments):
        x, scale, *codes = arguments
        with pytest.raises(ValueError):
            lsq_gradient(x, scale, np.ones_like(x), *codes)

    @pytest.mark.parametrize("dy", [np.ones(6), np.ones((1, 3)), np.full((2, 3), np.nan), np.full((2, 3), np.inf)])
    def test_refuses_a_dy_that_does_not_fit(self, dy):
        with pytest.raises(ValueError):
            lsq_gradient(np.ones((2, 3)), np.ones(2), dy, 4)


@pytest.mark.exercise("chapters.quantization.qat.straight_through", points=1)
class TestStraightThrough:
    @pytest.mark.parametrize(("peer", "limit"), [("ternarybert_sym8_layerwise", 2.5), ("llmqat_sym4_rowwise", 2)])
    def test_equals_the_authors(self, peer, limit):
        held = golden("quant/qat_ternary_lsq")
        w, dy = held["W"].astype(np.float32), held["grad_out"].astype(np.float32)
        expected = np.unpackbits(held[f"{peer}/grad_in"]).reshape(w.shape)
        np.testing.assert_array_equal(straight_through(w, dy, limit), dy * expected)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_stops_at_the_limits_themselves_and_keeps_the_dtype(self, dtype):
        x, dy = np.array([-3, -2, -1.9, 0, 1.9, 2, 3]), np.arange(1, 8).astype(dtype)
        found = straight_through(x, dy, 2)
        np.testing.assert_array_equal(found, [0, 0, 3, 4, 5, 0, 0])
        assert found.dtype == dtype
        np.testing.assert_array_equal(straight_through(x / 10, dy, 0.2), found, err_msg="a limit below 1")
        np.testing.assert_array_equal(dy, np.arange(1, 8))

    @given(SEEDS)
    def test_passes_everything_without_a_limit(self, seed):
        x, dy = 1e6 * np.random.default_rng(seed).normal(size=(2, 3, 5))
        np.testing.assert_array_equal(straight_through(x, dy), dy)

    @pytest.mark.parametrize(("shape", "limit"), [((3,), 1), ((2, 3), 0), ((2, 3), -1), ((2, 3), math.nan)])
    def test_refuses_what_has_none(self, shape, limit):
        with pytest.raises(ValueError):
            straight_through(np.ones((2, 3)), np.ones(shape), limit)


@pytest.mark.exercise("chapters.quantization.qat.ternary", points=2)
class TestTernary:
    @given(**SIZES, dtype=st.sampled_from([np.float32, np.float64]))
    def test_is_that_of_a_loop(self, seed, groups, n, dtype):
        x = np.random.default_rng(seed).standard_t(2, (groups, n)).astype(dtype)
        before = x.copy()
        found = ternary(x.reshape(n, groups), groups).reshape(groups, n)
        assert found.dtype == dtype
        for row, values in zip(x, found, strict=True):
            bound = 0.7 * np.abs(row).mean(dtype=np.float64)
            a = np.mean([abs(w) for w in row if abs(w) > bound], dtype=np.float64)
            expected = [0 if abs(w) <= bound else math.copysign(a, w) for w in row]
            np.testing.assert_allclose(values, expected, **tolerance(dtype, scale=0))
        np.testing.assert_array_equal(x, before)

    def test_what_equals_the_bound_is_dropped_and_zeros_stay(self):
        x = np.array([[7.0, 7, -7, 19], [0, 0, 0, 0]])  # 0.7 mean|x| is 7.0 exactly
        np.testing.assert_array_equal(ternary(x, 2), [[0, 0, 0, 19], [0, 0, 0, 0]])

    def test_is_at_least_single_precision(self):
        found = ternary(np.array([[3, -1], [0, 0.25]], np.float16))
        assert found.dtype == np.float32 and found.tolist() == [[2, -2], [0, 0]]

    def test_means_do_not_overflow(self):
        x = np.array([3e38, -3e38, 1], np.float32)
        np.testing.assert_allclose(ternary(x), [3e38, -3e38, 0], rtol=1e-6)

    @pytest.mark.parametrize(
        ("x", "groups"), [(np.ones(6), 4), (np.ones(6), 0), (np.ones(0), 1), (np.full(2, np.inf), 1)]
    )
    def test_refuses_what_has_none(self, x, groups):
        with pytest.raises(ValueError):
            ternary(x, groups)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.qat.gradient_kernel", points=4)
class TestBackward:
    @given(**DRAWN)
    def test_gives_the_gradients_of_the_reference(self, seed, groups, n, codes, tile, dtype, aligned):
        held = [poisoned(part, aligned) for part in on_device(seed, groups, n, codes, dtype)]
        dx, dscale = kernels.lsq_gradient(*held, *codes, tile=tile)
        x, scale, dy = numbers(*held)
        expected, total = oracle("quantization.qat").lsq_gradient(x, scale, dy, *codes)
        assert dx.dtype is dtype and dscale.dtype is torch.float32
        np.testing.assert_array_equal(dx.float().cpu(), expected)
        np.testing.assert_allclose(dscale.cpu(), total, **close(np.float32, dy, *codes, n))

    def test_the_ends_are_inside_and_what_rounds_to_them_is_not(self):
        x = torch.tensor([-8, 7, -8.25, 7.25, 6.75], device=DEVICE)
        dy = torch.arange(1.0, 6, device=DEVICE)
        dx, dscale = kernels.lsq_gradient(x, torch.ones(1, device=DEVICE), dy, 4)
        assert dx.tolist() == [1, 2, 0, 0, 5]
        assert dscale.item() == pytest.approx((3 * -8 + 4 * 7 + 5 * 0.25) / math.sqrt(5 * 7), rel=1e-5)

    def test_adds_the_shares_of_many_blocks_in_one_order(self):
        held = on_device(3, 2, 150, (4, True))
        first, again = (kernels.lsq_gradient(*held, 4, tile=(2, 16))[1] for _ in range(2))
        x, scale, dy = numbers(*held)
        _, total = oracle("quantization.qat").lsq_gradient(x, scale, dy, 4)
        np.testing.assert_allclose(first.cpu(), total, **close(np.float32, dy, 4, True, 150))
        assert torch.equal(first, again)

    def test_what_is_not_a_number_spoils_its_own_group_only(self):
        x, dy = torch.ones(2, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)
        x[0, 1] = math.nan
        _, dscale = kernels.lsq_gradient(x, torch.full((2,), 0.75, device=DEVICE), dy, 4)
        assert dscale.isnan().tolist() == [True, False]

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = on_device(1, 3, 17, (4, True))
        expected = oracle("quantization.qat").lsq_gradient(*numbers(*held), 4)[0]
        held[which] = walled(held[which], begins)
        dx, _ = kernels.lsq_gradient(*held, 4, tile=(2, 16))
        np.testing.assert_array_equal(dx.cpu(), expected)
