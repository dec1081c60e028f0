"""Embedding groups: grids against a loop and the authors' arrays, codes exactly, the integer product, the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import embedding_groups
from chapters.quantization.embedding_groups import (
    channel_ranges,
    find_grids,
    group_order,
    grouped_product,
    quantize_groups,
)
from minitfm import surgery
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.minitfm.models import tiny_model, tokens

kernels = kernel("quantization.embedding_groups")
SEEDS = st.integers(0, 2**32 - 1)
SIZES = {"seed": SEEDS, "groups": st.sampled_from([1, 2, 3, 7]), "width": st.sampled_from([1, 2, 5, 17])}


def activations(seed: int, tokens: int, channels: int) -> np.ndarray:
    """Float32 `[tokens, channels]` with an outlier channel, a dead one, and values that are ties on a grid of 1 / 2."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, channels)).astype(np.float32)
    x[:, rng.integers(channels)] *= 50
    x[:, rng.integers(channels)] = 0
    x[0] = rng.integers(-9, 9, channels) / 4
    return x


def drawn_grids(seed: int, channels: int, groups: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A permutation of the channels, float32 scales of 1/2 and others, zeros on the grid."""
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.5, 0.03, 1.7, 1e-8, 1e4], groups).astype(np.float32)
    return rng.permutation(channels), scale, rng.integers(0, 2**bits, groups).astype(np.float32)


def codes_by_hand(x, order, scale, zero, bits) -> np.ndarray:
    """One code at a time."""
    size = x.shape[1] // len(scale)
    codes = np.empty(x.shape, np.uint8)
    for token, place in np.ndindex(*x.shape):
        group = place // size
        code = np.rint(x[token, order[place]] / scale[group]) + zero[group]
        codes[token, place] = min(max(code, 0), 2**bits - 1)
    return codes


class TestRanges:
    @given(SEEDS, st.integers(1, 4), st.integers(1, 9))
    def test_are_those_of_all_batches_together(self, seed, batches, channels):
        x = activations(seed, 6 * batches, channels)
        low, high = channel_ranges(x.reshape(batches, 2, 3, channels))
        np.testing.assert_array_equal([low, high], [x.min(axis=0), x.max(axis=0)])
        assert low.dtype == x.dtype

    @pytest.mark.parametrize("batches", [[], [np.zeros((0, 3))], [np.ones((2, 3)), np.full((1, 3), np.nan)]])
    def test_refuse_what_has_none(self, batches):
        with pytest.raises(ValueError, match="batches must hold"):
            channel_ranges(batches)

    def test_order_rises_with_the_range_and_keeps_ties(self):
        low, high = np.array([0.0, -5, -1, 0, -2]), np.array([3.0, 5, 2, 1, 1])
        np.testing.assert_array_equal(group_order(low, high), [3, 0, 2, 4, 1])
        np.testing.assert_array_equal(group_order(low, high, permute=False), np.arange(5))


@pytest.mark.exercise("chapters.quantization.embedding_groups.find_grids", points=2)
class TestGrids:
    @given(**SIZES, bits=st.integers(1, 8))
    def test_span_each_group_and_zero(self, seed, groups, width, bits):
        x = activations(seed, 5, groups * width)
        low, high = x.min(axis=0) + np.float32(seed % 3 - 1), x.max(axis=0) + np.float32(seed % 3 - 1)
        order = np.random.default_rng(seed).permutation(groups * width)
        scale, zero = find_grids(low, high, order, groups, bits)
        assert scale.shape == zero.shape == (groups,) and scale.dtype == zero.dtype == np.float32
        for group in range(groups):
            members = order[group * width : (group + 1) * width]
            least, largest = min(low[members].min(), 0), max(high[members].max(), 0)
            step = max((largest - least) / np.float32(2**bits - 1), np.float32(1e-8))
            assert scale[group] == pytest.approx(step, rel=1e-6)
            assert zero[group] == np.clip(np.rint(np.float32(-least) / scale[group]), 0, 2**bits - 1)

    @given(SEEDS, st.sampled_from([1, 2, 3, 6]))
    def test_leave_their_arguments_alone(self, seed, groups):
        x = activations(seed, 4, 6)
        low, high, order = x.min(axis=0), x.max(axis=0), np.arange(6)[::-1].copy()
        before = low.copy(), high.copy(), order.copy()
        find_grids(low, high, order, groups)
        for now, then in zip((low, high, order), before, strict=True):
            np.testing.assert_array_equal(now, then)

    def test_a_dead_group_has_the_least_scale(self):
        scale, zero = find_grids(np.zeros(4), np.zeros(4), np.arange(4), 2)
        np.testing.assert_array_equal([scale, zero], [[1e-8, 1e-8], [0, 0]])

    def test_a_group_that_is_all_but_dead_has_the_least_scale_too(self):
        scale, zero = find_grids(np.array([-2e-8]), np.array([1e-8]), np.arange(1), 1)
        np.testing.assert_array_equal([scale, zero], [[1e-8], [2]])

    @pytest.mark.parametrize(("end", "bits", "expected"), [(1.0, 1, 0), (1.5, 2, 2)])
    def test_zero_between_two_codes_goes_to_the_even_one(self, end, bits, expected):
        assert find_grids(np.array([-end]), np.array([end]), np.arange(1), 1, bits)[1] == expected

    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize("groups", [8, 16])
    def test_equal_the_authors(self, groups, permuted):
        held, name = golden("quant/peg"), f"asym_peg{groups}" + "_perm" * permuted
        x = held["x"].astype(np.float32).reshape(-1, 128)
        low, high = x.min(axis=0), x.max(axis=0)
        order = held[f"{name}/order"] if permuted else np.arange(128)
        scale, zero = (each.repeat(128 // groups) for each in find_grids(low, high, order, groups))
        np.testing.assert_array_equal(scale, held[f"{name}/scale"][order])
        np.testing.assert_array_equal(zero, held[f"{name}/zero_point"][order])

    @pytest.mark.parametrize(("groups", "bits"), [(0, 8), (3, 8), (-1, 8), (2, 0), (2, 9)])
    def test_refuse_what_makes_no_grid(self, groups, bits):
        with pytest.raises(ValueError):
            find_grids(-np.ones(4), np.ones(4), np.arange(4), groups, bits)

    @pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), (-3e38, 3e38)])
    def test_refuse_a_range_upside_down_or_without_end(self, low, high):
        with pytest.raises(ValueError):
            find_grids(np.array([0, low], np.float32), np.array([1, high], np.float32), np.arange(2), 1)


@pytest.mark.exercise("chapters.quantization.embedding_groups.quantize_groups", points=2)
class TestCodes:
    @given(**SIZES, tokens=st.integers(1, 4), bits=st.integers(1, 8))
    def test_are_those_of_a_loop(self, seed, groups, width, tokens, bits):
        x = activations(seed, tokens, groups * width)
        grids = drawn_grids(seed, groups * width, groups, bits)
        found = quantize_groups(x, *grids, bits)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, codes_by_hand(x, *grids, bits))

    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize("groups", [8, 16])
    def test_equal_the_authors(self, groups, permuted):
        held, name = golden("quant/peg"), f"asym_peg{groups}" + "_perm" * permuted
        order = held[f"{name}/order"] if permuted else np.arange(128)
        grids = (held[f"{name}/{key}"][order][:: 128 // groups] for key in ("scale", "zero_point"))
        found = quantize_groups(held["x"][1].astype(np.float32), order, *grids)
        np.testing.assert_array_equal(found, held[f"{name}/codes_test"][0][:, order])

    def test_ties_go_to_the_even_quotient_whatever_the_zero(self):
        x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5]])
        for zero in (7.0, 8.0):
            codes = quantize_groups(x, np.arange(5), np.ones(1), np.array([zero]), 4)
            np.testing.assert_array_equal(codes[0] - zero, [0, 2, 2, 0, -2])

    def test_are_computed_in_the_precision_of_the_arguments(self):
        x, grid = np.array([[0.7]], np.float32), (np.array([0.2], np.float32), np.zeros(1, np.float32))
        assert quantize_groups(x, np.arange(1), *grid) == 4, "float32 finds 3.5, float64 a little less"
        assert quantize_groups(x, np.arange(1), np.array([0.2]), np.zeros(1)) == 3, "the wider precision of the two"
        assert quantize_groups(np.array([[0.5 + 1e-12]]), np.arange(1), np.ones(1), np.zeros(1)) == 1

    def test_clip_what_is_far_outside_and_leave_x_alone(self):
        x = np.array([[1e30, -1e30]], np.float32)
        found = quantize_groups(x, np.arange(2), np.full(1, 1e-8, np.float32), np.ones(1, np.float32))
        assert found.tolist() == [[255, 0]] and x.tolist() == np.array([[1e30, -1e30]], np.float32).tolist()

    @pytest.mark.parametrize(
        ("x", "order", "grids"),
        [
            (np.ones((1, 4)), [-1, 0, 1, 2], 2),
            (np.full((1, 4), np.nan), [0, 1, 2, 3], 1),
            (np.ones((1, 4)), [0, 1, 2, 2], 2),
            (np.ones((1, 4)), [0, 1, 2], 1),
            (np.ones((1, 4)), [0, 1, 2, 3], 3),
            (np.ones((1, 4)), [0, 1, 2, 3], 0),
            (np.full((1, 4), np.inf), [0, 1, 2, 3], 1),
        ],
    )
    def test_refuse_what_has_none(self, x, order, grids):
        with pytest.raises(ValueError):
            quantize_groups(x, np.array(order), np.ones(grids), np.zeros(grids))

    @pytest.mark.parametrize(
        ("scale", "zero", "bits"),
        [
            ([1.0, 1], [0.0, 0], 9),
            ([1.0, 1], [0.0, 0], 0),
            ([1.0, 1], [0.0], 8),
            ([1.0, 0], [0.0, 0], 8),
            ([1.0, -1], [0.0, 0], 8),
            ([1.0, np.inf], [0.0, 0], 8),
            ([1.0, np.nan], [0.0, 0], 8),
        ],
    )
    def test_refuse_what_is_no_grid(self, scale, zero, bits):
        with pytest.raises(ValueError):
            quantize_groups(np.zeros((1, 4)), np.arange(4), np.array(scale), np.array(zero), bits)


@pytest.mark.exercise("chapters.quantization.embedding_groups.grouped_product", points=3)
class TestProduct:
    @given(**SIZES, tokens=st.integers(1, 3), rows=st.integers(1, 4))
    def test_is_that_of_the_values(self, seed, groups, width, tokens, rows):
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 256, (tokens, groups * width)).astype(np.uint8)
        weight_codes = rng.integers(-127, 128, (rows, groups * width)).astype(np.int8)
        scale, zero = rng.uniform(0.01, 1, groups), rng.integers(0, 256, groups).astype(float)
        found = grouped_product(codes, scale, zero, weight_codes, 0.25)
        values = (codes - zero.repeat(width)) * scale.repeat(width)
        expected = values @ (0.25 * weight_codes.astype(float)).T
        close = tolerance(np.float64, groups * width, scale=255 * 127)
        np.testing.assert_allclose(found, expected, **close)
        assert found.dtype == np.float64 and found.shape == (tokens, rows)

    def test_sums_integers_beyond_a_byte(self):
        codes, weights = np.full((1, 1001), 255, np.uint8), np.full((1, 1001), 127, np.int8)
        assert grouped_product(codes, np.ones(1), np.zeros(1), weights, 1.0)[0, 0] == 255 * 127 * 1001  # no float32

    @pytest.mark.parametrize(
        ("channels", "grids", "columns"), [(4, (3, 3), 4), (4, (2, 1), 4), (4, (0, 0), 4), (4, (2, 2), 5)]
    )
    def test_refuses_shapes_that_do_not_fit(self, channels, grids, columns):
        codes, weights = np.zeros((1, channels), np.uint8), np.zeros((2, columns), np.int8)
        with pytest.raises(ValueError):
            grouped_product(codes, np.ones(grids[0]), np.zeros(grids[1]), weights, 1.0)


class TestModel:
    def test_a_layer_multiplies_the_values_of_its_codes(self):
        x = activations(0, 6, 12)
        low, high = channel_ranges([x])
        order = group_order(low, high)
        scale, zero = find_grids(low, high, order, 3)
        linear = torch.nn.Linear(12, 5)
        layer = embedding_groups.GroupedLinear(linear, order, scale, zero, 8)
        values = (quantize_groups(x, order, scale, zero) - zero.repeat(4)) * scale.repeat(4)
        expected = values @ linear.weight.double().numpy(force=True)[:, order].T + linear.bias.double().numpy(
            force=True
        )
        found = layer(torch.from_numpy(x).reshape(2, 3, 12)).reshape(6, 5).double().numpy(force=True)
        np.testing.assert_allclose(found, expected, **tolerance(np.float32, 12, scale=50))

    def test_a_grid_for_each_channel_loses_next_to_nothing_and_one_for_all_much(self):
        text, errors = tokens(4, 16), {}
        plain = tiny_model()
        surgery.plant_outliers(plain, 1, 256.0)
        ranges = embedding_groups.input_ranges(plain, text)
        for groups in (0, 4, 1):
            model = tiny_model()
            model.load_state_dict(plain.state_dict())
            embedding_groups.quantize_model(model, ranges, groups)
            assert model.state_dict().keys() == plain.state_dict().keys(), "it can be saved as a plain model"
            errors[groups] = (model(text) - plain(text)).abs().mean().item()
        assert errors[0] < errors[4] < errors[1]

    def test_refusals_name_what_is_wrong(self):
        with pytest.raises(ValueError, match="groups must divide the 4 channels, got 3"):
            find_grids(-np.ones(4), np.ones(4), np.arange(4), 3)
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got 9"):
            find_grids(-np.ones(4), np.ones(4), np.arange(4), 2, 9)
        with pytest.raises(ValueError, match="order must be a permutation of the 4 channels"):
            quantize_groups(np.ones((1, 4)), np.zeros(4, int), np.ones(1), np.zeros(1))


def on_device(x, order, scale, zero, dtype=torch.float32) -> list[torch.Tensor]:
    """The kernel's arguments, x in `dtype`."""
    held = [torch.from_numpy(part).to(DEVICE) for part in (x, order, scale, zero)]
    held[0] = held[0].to(dtype)
    return held


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.embedding_groups.quantize_kernel", points=3)
class TestKernel:
    @given(
        **SIZES, tokens=st.sampled_from([1, 2, 5]), bits=st.sampled_from([2, 8]), rows=st.sampled_from([1, 2]),
        dtype=st.sampled_from(KERNEL_DTYPES), aligned=st.booleans(),
    )  # fmt: skip
    def test_gives_the_codes_of_the_reference(self, seed, groups, width, tokens, bits, rows, dtype, aligned):
        x = activations(seed, tokens, groups * width)
        grids = drawn_grids(seed, groups * width, groups, bits)
        held = [poisoned(part, aligned) for part in on_device(x, *grids, dtype)]
        found = kernels.quantize_groups(*held, bits, rows=rows)
        expected = oracle("quantization.embedding_groups").quantize_groups(held[0].float().cpu().numpy(), *grids, bits)
        assert found.dtype is torch.uint8
        np.testing.assert_array_equal(found.cpu().numpy(), expected)

    def test_ties_go_to_the_even_quotient_whatever_the_zero(self):
        x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]], device=DEVICE)
        order, scale = torch.arange(5, device=DEVICE), torch.ones(1, device=DEVICE)
        for zero in (7.0, 8.0):
            codes = kernels.quantize_groups(x, order, scale, torch.full((1,), zero, device=DEVICE), 4)
            assert (codes[0].cpu() - zero).tolist() == [0, 2, 2, 0, -2]
        codes = kernels.quantize_groups(x * 75, order, scale * 15, scale * 8)  # x * (1 / 15) is no tie in float32
        assert (codes[0].cpu() - 8.0).tolist() == [2, 8, 12, -2, -8]

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", [0, 2, 3])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        x = activations(1, 3, 6)
        grids = drawn_grids(1, 6, 3, 8)
        held = on_device(x, *grids)
        held[which] = walled(held[which], begins)
        found = kernels.quantize_groups(*held, rows=2)
        np.testing.assert_array_equal(found.cpu().numpy(), codes_by_hand(x, *grids, 8))


def changed_arguments(**changed) -> dict:
    given_ = {
        "x": torch.ones(2, 6),
        "order": torch.arange(6),
        "scale": torch.ones(3),
        "zero": torch.zeros(3),
    }
    return given_ | changed


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(6)}, ValueError, "x must be"),
        ({"x": torch.ones(2, 0), "order": torch.arange(0)}, ValueError, "1 to 16384 channels, got 0"),
        ({"order": torch.arange(5)}, ValueError, "order must have the 6 channels"),
        ({"zero": torch.zeros(2)}, ValueError, r"scale and zero must be \[groups\]"),
        ({"scale": torch.ones(4), "zero": torch.zeros(4)}, ValueError, "groups must divide the 6 channels, got 4"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"x": torch.ones(2, 6, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"order": torch.arange(6).int()}, TypeError, "order must have dtype"),
        ({"x": torch.ones(6, 2).T}, ValueError, "x must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        kernels.quantize_groups(**changed_arguments(**changed))


@pytest.mark.kernel
def test_no_token_is_no_work():
    given_ = {name: part.to(DEVICE) for name, part in changed_arguments(x=torch.ones(0, 6)).items()}
    assert kernels.quantize_groups(**given_).shape == (0, 6)
