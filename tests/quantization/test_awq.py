"""AWQ against its definition and the arrays of its authors' code. In the model: test_awq_model.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chapters.quantization import awq as chapter
from chapters.quantization.awq import channel_scales, fold, quantize, search_clip, search_scales
from minitfm.model import RMSNorm
from tests.conftest import golden, oracle, tolerance
from tests.quantization.awq_by_hand import (
    clip_errors,
    frozen,
    group_by_hand,
    losses_by_hand,
    norm,
    rounded_by_hand,
    scales_by_hand,
    size_of_groups,
)
from tests.quantization.problems import layers

SEEDS = st.integers(0, 2**32 - 1)
BITS = st.sampled_from([1, 2, 3, 4, 8])


@pytest.fixture
def others_from_the_book(request, monkeypatch):
    """Each class grades one function: what it may call comes from the book, whether or not it is written yet."""
    book = oracle("quantization.awq")
    for name in {"quantize", "channel_scales", "search_scales", "search_clip", "fold"} - {request.cls.function}:
        monkeypatch.setattr(chapter, name, getattr(book, name))


@pytest.mark.exercise("chapters.quantization.awq.quantize", points=2)
@pytest.mark.usefixtures("others_from_the_book")
class TestQuantize:
    function = "quantize"

    @given(layers(), BITS, st.sampled_from([None, 1, 2, 3]))
    def test_follows_its_definition_group_by_group(self, layer, bits, parts):
        size = size_of_groups(layer.weight.shape[1], parts)
        found = quantize(*frozen(layer.weight), bits, size)
        size = size or layer.weight.shape[1]
        assert found.codes.dtype == np.uint8 and found.bits == bits
        np.testing.assert_array_equal(found.group_of_column, np.arange(layer.weight.shape[1]) // size)
        for (row, group), scale in np.ndenumerate(found.scale):
            columns = slice(group * size, (group + 1) * size)
            expected = group_by_hand(layer.weight[row, columns], bits)
            assert (list(found.codes[row, columns]), scale, found.zero[row, group]) == expected

    @pytest.mark.parametrize("variant", ["b3_g32", "b4_g-1", "b4_g64", "b8_g64", "onesided"])
    def test_equals_the_released_code(self, variant):
        arrays = golden("quant/awq")
        weight = arrays["pq_onesided/W" if variant == "onesided" else "W"].astype(np.float32)
        size = 16 if variant == "onesided" else int(variant.split("_g")[1])
        bits = 3 if variant == "onesided" else int(variant[1])
        found = quantize(weight, bits, None if size == -1 else size)
        np.testing.assert_array_equal(found.codes, arrays[f"pq_{variant}/codes"])
        np.testing.assert_array_equal(found.zero, arrays[f"pq_{variant}/zero"])
        np.testing.assert_allclose(found.scale, arrays[f"pq_{variant}/scale"], rtol=1e-6)

    def test_halves_go_to_the_even_number(self):
        found = quantize(np.array([[0, 0.5, 1.5, 2.5, 15], [-2.5, -1.5, -0.5, 0.5, 12.5]]), 4)
        np.testing.assert_array_equal(found.codes, [[0, 0, 2, 2, 15], [0, 0, 2, 2, 14]])
        np.testing.assert_array_equal(found.zero, [[0], [2]])

    def test_zero_is_not_forced_into_the_range(self):
        found = quantize(np.array([[1.0, 2.0, 4.0]]), 2)
        np.testing.assert_array_equal(found.scale, [[1.0]])
        np.testing.assert_array_equal(found.dequantize(), [[1.0, 2.0, 3.0]])

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_computes_in_single_precision_at_least(self, dtype):
        weight = np.random.default_rng(0).standard_normal((50, 64)).astype(dtype)
        weight[:25, ::2] = -weight[:25, 1::2]  # ranges from −c to c
        found, wide = quantize(weight, 3, 16), weight.astype(np.float32).reshape(50, 4, 16)
        scale = np.ptp(wide, axis=-1) / np.float32(7)
        zero = (-np.rint(wide.min(axis=-1) / scale)).clip(0, 7)
        codes = (np.rint(wide / scale[..., None]) + zero[..., None]).clip(0, 7)
        np.testing.assert_array_equal(found.scale, scale)
        np.testing.assert_array_equal(found.zero, zero)
        np.testing.assert_array_equal(found.codes, codes.reshape(50, 64))

    @pytest.mark.parametrize(
        ("weight", "bits", "size"),
        [
            (np.ones((2, 4)), 0, None), (np.ones((2, 4)), 9, None), (np.ones((2, 4)), 4, 3), (np.ones(4), 4, None),
            (np.array([[1, np.nan]]), 4, None), (np.array([[-3e38, 3e38]], np.float32), 4, None),
        ],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:overflow")
    def test_refuses_what_has_no_grid(self, weight, bits, size):
        with pytest.raises(ValueError):
            quantize(weight, bits, size)

    @pytest.mark.parametrize("value", [0.5, -0.5, 0.0])
    def test_a_group_of_equal_weights_takes_the_least_range(self, value):
        found = quantize(np.full((1, 4), value), 4)
        np.testing.assert_allclose(found.scale, 1e-5 / 15)
        np.testing.assert_allclose(found.dequantize(), np.full((1, 4), np.sign(value) * 1e-5))


@pytest.mark.exercise("chapters.quantization.awq.channel_scales", points=1)
@pytest.mark.usefixtures("others_from_the_book")
class TestChannelScales:
    function = "channel_scales"

    @given(SEEDS, st.integers(1, 9), st.sampled_from([0.0, 0.05, 0.5, 0.95]), st.sampled_from([1e-12, 1.0, 1e12]))
    def test_follows_its_definition_channel_by_channel(self, seed, channels, ratio, size):
        magnitude = size * np.random.default_rng(seed).lognormal(0, 3, channels)
        magnitude[0] *= seed % 2  # an input that is always 0
        found = channel_scales(*frozen(magnitude), ratio)
        np.testing.assert_allclose(found, scales_by_hand(magnitude, ratio), rtol=1e-12)
        assert found.max() * found.min() == pytest.approx(1, rel=1e-12)

    @pytest.mark.parametrize("magnitude", [[0.0, 1.0, 300.0], [0.0, 0.0], [7.0]])
    def test_ratio_0_leaves_every_channel_alone(self, magnitude):
        np.testing.assert_array_equal(channel_scales(np.array(magnitude), 0.0), np.ones(len(magnitude)))

    @given(SEEDS, st.sampled_from([1e-3, 0.5, 40.0]))
    def test_the_size_of_all_inputs_together_does_not_matter(self, seed, factor):
        magnitude = np.random.default_rng(seed).uniform(0.1, 10, 7)
        np.testing.assert_allclose(channel_scales(magnitude * factor, 0.6), channel_scales(magnitude, 0.6), rtol=1e-12)

    def test_equals_the_released_code(self):
        arrays = golden("quant/awq")
        found = channel_scales(arrays["get_act_scale"].astype(float), float(arrays["search_b4_g32/fc1/best_ratio"]))
        np.testing.assert_allclose(found, arrays["search_b4_g32/fc1/scales"], rtol=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_refuses_what_is_no_magnitude(self, bad):
        with pytest.raises(ValueError):
            channel_scales(np.array([1.0, bad, 2.0]), 0.5)


@pytest.mark.exercise("chapters.quantization.awq.search_scales", points=3)
@pytest.mark.usefixtures("others_from_the_book")
class TestSearchScales:
    function = "search_scales"

    def test_equals_the_released_code(self):
        arrays = golden("quant/awq")
        weight, x = arrays["W"].astype(float), arrays["X"].astype(float)
        found = search_scales([weight], x, lambda weights: x @ weights[0].T, 4, 32)
        assert found.ratio == arrays["search_b4_g32/fc1/best_ratio"]
        np.testing.assert_allclose(found.scales, arrays["search_b4_g32/fc1/scales"], rtol=1e-6)
        np.testing.assert_allclose(found.losses, arrays["search_b4_g32/fc1/history"], rtol=1e-5)

    @given(layers(columns=(1, 2, 7, 12)), st.sampled_from([2, 4]), st.sampled_from([None, 2]))
    def test_tries_the_twenty_ratios_and_keeps_the_best(self, layer, bits, parts):
        weight, x = frozen(layer.weight, layer.x)
        size = size_of_groups(weight.shape[1], parts)
        found = search_scales([weight], x, lambda weights: x @ weights[0].T, bits, size)
        expected = losses_by_hand(weight, x, bits, size or weight.shape[1])
        np.testing.assert_allclose(found.losses, expected, rtol=1e-6, atol=1e-12 * max(expected))
        assert found.ratio == np.argmin(found.losses) / 20
        magnitude = np.abs(x).mean(axis=0)
        np.testing.assert_allclose(found.scales, scales_by_hand(magnitude, found.ratio), rtol=1e-12)

    @given(layers(columns=(7, 16)), st.sampled_from([2, 3, 4]))
    def test_is_never_worse_than_rounding_to_nearest(self, layer, bits):
        weight, x = layer.weight, layer.x
        found = search_scales([weight], x, lambda weights: x @ weights[0].T, bits)
        columns = weight.shape[1]
        nearest = rounded_by_hand(weight, bits, columns)
        scaled = rounded_by_hand(weight * found.scales, bits, columns)
        awq = np.mean((x / found.scales @ scaled.T - x @ weight.T) ** 2)  # as it will be used: x is divided
        rtn = np.mean((x @ nearest.T - x @ weight.T) ** 2)
        assert awq <= rtn * (1 + 1e-6) + 1e-18 * np.mean((x @ weight.T) ** 2)

    @given(SEEDS)
    def test_judges_all_weights_together_by_what_the_module_makes_of_them(self, seed):
        rng = np.random.default_rng(seed)
        first, second = rng.standard_normal((3, 8)), rng.standard_normal((5, 8))
        x = rng.standard_normal((2, 6, 8)) * np.exp(rng.uniform(-2, 2, 8))

        def outputs(weights):
            one, two = (x @ weight.T for weight in weights)
            return np.tanh(one[..., :1] * two) + one[..., 1:2]

        found = search_scales([first, second], x, outputs, 2, 4)
        scales = np.array(scales_by_hand(np.abs(x).mean(axis=(0, 1)), found.ratio))
        rounded = [rounded_by_hand(weight * scales, 2, 4) / scales for weight in (first, second)]
        loss = np.mean((outputs(rounded) - outputs([first, second])) ** 2)
        assert found.losses.min() == pytest.approx(loss, rel=1e-9) == found.losses[round(20 * found.ratio)]

    def test_the_first_of_equals_is_kept(self):
        found = search_scales([np.ones((1, 2))], np.array([[1.0, 9.0]]), lambda weights: np.zeros(1), 4)
        assert found.ratio == 0 and len(found.losses) == 20
        np.testing.assert_array_equal(found.scales, [1, 1])

    def test_averages_half_precision_inputs_in_double(self):
        x = np.random.default_rng(0).uniform(100, 2000, (3, 40, 4)).astype(np.float16)
        weight, wide = np.random.default_rng(1).standard_normal((5, 4)), x.astype(float).reshape(-1, 4)
        found = search_scales([weight], x, lambda weights: wide @ weights[0].T, 3)
        np.testing.assert_allclose(found.losses, losses_by_hand(weight, wide, 3, 4), rtol=1e-9)

    @pytest.mark.parametrize("x", [np.full((2, 3), np.nan), np.zeros((0, 3)), np.ones((2, 4)), np.ones((2, 1))])
    def test_refuses_inputs_that_are_broken_missing_or_do_not_fit(self, x):
        for weights in ([np.ones((2, 3))], [np.ones((2, x.shape[1])), np.ones((2, 3))]):
            with pytest.raises(ValueError):
                search_scales(weights, x, lambda weights: np.zeros(1), 4)

    @pytest.mark.parametrize("broken", [0, 1, 20])
    def test_refuses_outputs_that_are_not_finite(self, broken):
        made = iter([*np.where(np.arange(21) == broken, np.nan, 1.0)])
        with pytest.raises(ValueError):
            search_scales([np.eye(3)], np.ones((2, 3)), lambda weights: np.array([next(made)]), 4)


@pytest.mark.exercise("chapters.quantization.awq.search_clip", points=3)
@pytest.mark.usefixtures("others_from_the_book")
class TestSearchClip:
    function = "search_clip"

    @pytest.mark.parametrize(("bits", "samples"), [(4, 128), (4, 256), (3, 256)])
    def test_equals_the_released_code(self, bits, samples):
        arrays = golden("quant/awq")
        weight = arrays["W"].astype(np.float32)
        found, largest = search_clip(weight, arrays["X"], bits, 32, samples), np.abs(weight).reshape(64, 4, 32).max(-1)
        expected = arrays[f"clip_b{bits}_g32_t{samples}/ratio_index"][..., 0]
        np.testing.assert_array_equal(np.rint(20 * (1 - found / largest)), expected)
        np.testing.assert_allclose(found, arrays[f"clip_b{bits}_g32_t{samples}/max_val"][..., 0], rtol=1e-6)

    @given(
        layers(columns=(1, 2, 12, 16)), st.sampled_from([2, 3, 4]), st.sampled_from([None, 2]),
        st.sampled_from([1, 2, 3, 7, 512]),
    )  # fmt: skip
    def test_takes_the_best_of_ten_limits_for_each_row_of_a_group(self, layer, bits, parts, samples):
        weight, x = frozen(layer.weight, layer.x)
        size = size_of_groups(weight.shape[1], parts)
        found = search_clip(weight, x, bits, size, samples)
        size, tokens = size or weight.shape[1], x[:: max(1, len(x) // samples)]
        assert found.shape == (len(weight), weight.shape[1] // size)
        for (row, group), limit in np.ndenumerate(found):
            columns = slice(group * size, (group + 1) * size)
            part = weight[row, columns]
            errors, largest = clip_errors(part, tokens[:, columns], bits), np.abs(part).max()
            taken = round(20 * (1 - limit / largest)) if largest else 0
            assert limit == pytest.approx(largest * (1 - taken / 20), rel=1e-12)
            lost = 1e-12 * np.mean((tokens[:, columns] @ part) ** 2)  # where an error is rounding alone
            assert errors[taken] <= min(errors) * (1 + 1e-6) + lost

    def test_the_first_of_equals_is_kept(self):
        weight = np.random.default_rng(0).standard_normal((3, 8))
        largest = np.abs(weight).reshape(3, 2, 4).max(axis=-1)
        np.testing.assert_array_equal(search_clip(weight, np.zeros((5, 8)), 3, 4), largest)

    def test_a_group_is_judged_by_its_own_part_of_the_output(self):
        rng = np.random.default_rng(1)
        weight, x = rng.standard_normal((40, 64)), rng.standard_normal((30, 64))
        other = np.concatenate([x[:, :32], 100 * rng.standard_normal((30, 32))], axis=1)
        found, again = (search_clip(weight, inputs, 3, 32) for inputs in (x, other))
        np.testing.assert_array_equal(found[:, 0], again[:, 0])
        assert len(np.unique(np.rint(100 * found[:, 0] / np.abs(weight[:, :32]).max(axis=1)))) > 3

    @pytest.mark.parametrize(("samples", "step"), [(1, 7), (2, 3), (3, 2), (4, 1), (6, 1), (7, 1), (8, 1)])
    def test_takes_every_so_many_tokens_and_all_where_they_are_few(self, samples, step):
        rng = np.random.default_rng(2)
        weight, x = rng.standard_normal((40, 64)), rng.standard_normal((7, 64))
        found, alone = search_clip(weight, x, 3, 32, samples), search_clip(weight, x[::step], 3, 32, 7)
        np.testing.assert_array_equal(found, alone)

    @pytest.mark.parametrize(("tokens", "step"), [(1023, 1), (1024, 2)])
    def test_takes_at_least_512_tokens_unless_told(self, tokens, step):
        rng = np.random.default_rng(2)
        weight, x = rng.standard_normal((20, 16)), rng.standard_normal((tokens, 16))
        x[1::2] *= np.exp(rng.uniform(-3, 3, 16))  # every other token tells another story
        np.testing.assert_array_equal(search_clip(weight, x, 3), search_clip(weight, x[::step], 3, None, tokens))

    @pytest.mark.parametrize(
        ("x", "samples"),
        [
            (np.zeros((0, 4)), 9), (np.ones((3, 5)), 9), (np.full((3, 4), np.inf), 9), (np.ones((3, 4)), 0),
            (np.ones((1, 3, 4)), 9), (np.ones(4), 9),
        ],
    )  # fmt: skip
    def test_refuses_tokens_that_are_missing_broken_or_do_not_fit(self, x, samples):
        with pytest.raises(ValueError):
            search_clip(np.eye(4), x, 4, samples=samples)


@pytest.mark.exercise("chapters.quantization.awq.fold", points=2)
class TestFold:
    @given(SEEDS, st.sampled_from(["rms", "layer", "linear", "linear with bias"]), st.sampled_from([1, 2, 7, 16]))
    def test_keeps_the_function_and_scales_the_columns(self, seed, kind, channels):
        torch.manual_seed(seed)
        previous = norm(kind, channels)
        readers = [nn.Linear(channels, out).double() for out in (5, 1)]
        scales = torch.empty(channels, dtype=torch.float64).uniform_(-3, 3).exp()
        x = torch.randn(4, 3 if "linear" in kind else channels, dtype=torch.float64)
        before, weights = previous(x), [reader.weight.detach().clone() for reader in readers]
        outputs = [reader(before) for reader in readers]
        assert fold(previous, readers, scales) is None
        close = tolerance(np.float64, channels, 100)
        torch.testing.assert_close(previous(x) * scales, before, **close)
        for reader, weight, expected in zip(readers, weights, outputs, strict=True):
            assert torch.equal(reader.weight, weight * scales)
            torch.testing.assert_close(reader(previous(x)), expected, **close)

    @pytest.mark.parametrize("activation", [torch.relu, lambda x: x[:, :4] * torch.sigmoid(x[:, 4:])])
    def test_passes_through_what_is_linear_in_the_scaled_part(self, activation):
        torch.manual_seed(0)
        up, down, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(5, 3)
        gate = torch.randn(5, 4)
        expected = down(activation(torch.cat([up(x), gate], dim=1))[:, :4])
        fold(up, [down], torch.tensor([0.5, 4.0, 1.0, 8.0]))
        found = down(activation(torch.cat([up(x), gate], dim=1))[:, :4])
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        "scales",
        [torch.ones(3), torch.ones(1), torch.ones(4, 1), torch.tensor([1.0, 0, 1, 1]), -torch.ones(4),
         torch.tensor([1.0, 2.0, float("inf"), 1.0]), torch.tensor([1.0, 2.0, 1.0, float("nan")])],
    )  # fmt: skip
    def test_refuses_before_it_changes_anything(self, scales):
        previous, reader = RMSNorm(4, 1e-5), nn.Linear(4, 2)
        before = reader.weight.detach().clone()
        with pytest.raises(ValueError):
            fold(previous, [reader], scales)
        assert torch.equal(previous.weight, torch.ones(4)) and torch.equal(reader.weight, before)

    def test_rounds_the_scales_to_the_dtype_of_each_weight(self):
        previous, reader = norm("layer", 64).float(), nn.Linear(64, 3)
        before = [part.detach().clone() for part in (*previous.parameters(), reader.weight)]
        scales = torch.linspace(0.1, 9, 64, dtype=torch.float64)
        fold(previous, [reader], scales)
        for part, old in zip(previous.parameters(), before, strict=False):
            assert torch.equal(part, old / scales.float())
        assert torch.equal(reader.weight, before[-1] * scales.float())

    def test_refuses_a_reader_of_something_else(self):
        for channels, widths in ((4, (4, 5)), (4, (5, 4)), (5, (4, 4))):
            previous, readers = RMSNorm(channels, 1e-5), [nn.Linear(width, 2) for width in widths]
            before = [reader.weight.detach().clone() for reader in readers]
            with pytest.raises(ValueError):
                fold(previous, readers, 2 * torch.ones(4))
            assert torch.equal(previous.weight, torch.ones(channels))
            assert all(torch.equal(reader.weight, weight) for reader, weight in zip(readers, before, strict=True))
