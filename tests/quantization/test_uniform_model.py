"""Uniform quantization, whole: granularities and schemes, bad input, the model's weights and inputs, the claim."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import uniform as chapter
from chapters.quantization.uniform import (
    GRANULARITIES,
    SCHEMES,
    RoundedInput,
    dequantize,
    grid,
    pack,
    quantize,
    round_inputs,
    round_weights,
    rounded,
    running_range,
    sharing,
    unpack,
)
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import tolerance
from tests.quantization.grids import SEEDS, TEMPERS, drawn

LAYOUTS = st.sampled_from([("tensor", None), ("channel", None), ("token", None), ("group", 1), ("group", 4)])


class TestRounded:
    @given(SEEDS, st.sampled_from(sorted(TEMPERS)), LAYOUTS, st.integers(2, 8), st.sampled_from(SCHEMES))
    def test_every_group_has_the_grid_of_its_own_numbers(self, seed, temper, layout, bits, scheme):
        x = drawn(seed, temper, 3, 12)
        found = rounded(x, bits, *layout, scheme)
        size = {"tensor": 36, "group": layout[1]}.get(layout[0], 12)
        for values, group in zip(found.reshape(-1, size), x.reshape(-1, size), strict=True):
            scale, zero = grid(*(np.array([end]) for end in (min(group.min(), 0), max(group.max(), 0))), bits, scheme)
            np.testing.assert_array_equal(values, dequantize(quantize(group, scale, zero, bits), scale, zero))

    @given(SEEDS, st.sampled_from(sorted(TEMPERS)), st.integers(2, 8), st.sampled_from(SCHEMES))
    def test_errors_stay_below_the_bound_of_the_scheme(self, seed, temper, bits, scheme):
        x = drawn(seed, temper, 4, 13)
        found, reach = rounded(x, bits, "channel", None, scheme), np.abs(x).max(axis=1, keepdims=True)
        step = (2 if scheme == "asymmetric" else 1) * reach / max(2 ** (bits - 1) - 1, 1)
        clipped = {"asymmetric": 0.5, "smoothquant": 0.5, "no_clipping": 0.5, "deepspeed": 1}.get(scheme, 0.5)
        if scheme == "gptq":  # a row without negative numbers loses half its range
            clipped = 2 ** (bits - 1)
        assert (np.abs(found - x) <= (clipped + 1e-9) * step).all()

    @pytest.mark.parametrize("scheme", ["asymmetric", "smoothquant"])
    @pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30, 1e30])
    def test_a_constant_group_comes_back(self, scheme, value):
        found = rounded(np.full((2, 8), value), 4, "group", 4, scheme)
        np.testing.assert_allclose(found, value, rtol=1e-14, atol=0)

    @given(st.integers(-5, 40), st.integers(1, 30))
    def test_a_group_divides_the_row_or_is_refused(self, size, columns):
        x = np.ones((2, columns))
        if size >= 1 and columns % size == 0:
            np.testing.assert_allclose(rounded(x, 4, "group", size), x)
        else:
            with pytest.raises(ValueError, match=f"group_size must divide the {columns} columns, got {size}"):
                rounded(x, 4, "group", size)

    @given(SEEDS, st.sampled_from([np.nan, np.inf, -np.inf]), st.sampled_from(GRANULARITIES[:3]))
    def test_one_number_that_is_not_finite_is_refused(self, seed, value, granularity):
        x = drawn(seed, "plain", 3, 5)
        x.flat[seed % x.size] = value
        with pytest.raises(ValueError, match=r"x must be finite and not empty, got shape \(3, 5\), 1 not finite"):
            rounded(x, 4, granularity)


def test_refusals_say_what_is_wrong():
    one = np.ones(1)
    for call, complaint in (
        (lambda: grid(-one, one, 9), "bits must be an integer from 1 to 8, got 9"),
        (lambda: grid(-one, one, 4, "affine"), "scheme must be one of asymmetric, gptq, .*, got 'affine'"),
        (lambda: grid(-one, one, 1, "smoothquant"), "'smoothquant' needs at least 2 bits"),
        (lambda: grid(one, one, 4), "need low <= 0 <= high, got low up to 1.0"),
        (lambda: grid(-1.7e308 * one, 1.7e308 * one, 4), "too wide for float64"),
        (lambda: sharing((2, 8), "row"), "granularity must be one of tensor, channel, token, group, got 'row'"),
        (lambda: sharing((2, 8), "channel", 4), "group_size belongs to the granularity 'group', got 4 with 'channel'"),
        (lambda: running_range([]), "batches must hold at least one: static parameters need calibration data"),
        (lambda: running_range([one], 2), "momentum must be None, or above 0 and at most 1, got 2"),
        (lambda: pack(np.array([16, 1]), 4), r"codes must be integers below 2\*\*4, got int64, 1 to 16"),
        (lambda: pack(np.array([1, 1, 1]), 3), "3 codes of 3 bits do not fill whole bytes"),
        (lambda: unpack(np.zeros(2, np.uint8), 3), "packed must be uint8 with whole codes of 3 bits"),
        (lambda: unpack(np.zeros(3, np.int8), 3), r"got int8 \(3,\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call()


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=32, hidden_dim=96, layers=2, heads=2)).eval()


class TestWeights:
    @pytest.mark.parametrize("choice", [("tensor", None), ("channel", None), ("group", 16)])
    def test_become_the_values_of_their_grids(self, model, choice):
        before = copy.deepcopy(model)
        round_weights(model, bits=3, granularity=choice[0], group_size=choice[1])
        for layer, old in zip(surgery.linears(model).values(), surgery.linears(before).values(), strict=True):
            np.testing.assert_array_equal(layer.weight.detach(), rounded(old.weight.detach().numpy(), 3, *choice))

    def test_a_seed_only_changes_which_weights_share_a_group(self, model):
        def made(seed: int, **choice) -> np.ndarray:
            other = copy.deepcopy(model)
            round_weights(other, seed, bits=3, **choice)
            return next(iter(surgery.linears(other).values())).weight.detach().numpy()

        np.testing.assert_array_equal(made(0, granularity="channel"), made(1, granularity="channel"))
        assert (made(0, granularity="group", group_size=16) != made(1, granularity="group", group_size=16)).any()


class TestInputs:
    @given(SEEDS, st.sampled_from([2, 4, 8]), st.sampled_from(SCHEMES))
    def test_dynamic_grids_belong_to_tokens(self, seed, bits, scheme):
        x = torch.from_numpy(drawn(seed, "outlier", 6, 8, np.float32)).view(2, 3, 8)
        found = RoundedInput(torch.nn.Identity(), bits, None, scheme)(x)
        np.testing.assert_allclose(found, rounded(x.numpy(), bits, "token", None, scheme), **tolerance(np.float32))

    def test_a_static_grid_clips_what_calibration_did_not_see(self):
        layer = RoundedInput(torch.nn.Identity(), 8, (-1.0, 1.55), "asymmetric")
        found = layer(torch.tensor([-9.0, -1.0, 0.0, 0.014, 9.0]))
        np.testing.assert_allclose(found, [-1.0, -1.0, 0.0, 0.01, 1.55], **tolerance(np.float32))

    @pytest.mark.parametrize("span", [None, (-3.0, 3.0)])
    def test_gradients_pass(self, span):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(RoundedInput(torch.nn.Linear(8, 3), 8, span, "asymmetric")(x).sum(), x)
        assert gradient.abs().min() > 0

    @pytest.mark.parametrize("static", [False, True])
    def test_every_linear_layer_rounds_what_it_reads(self, model, static):
        tokens = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(0))
        seen = {name: [] for name in surgery.linears(model)}
        for name, x in surgery.record_inputs(model, tokens, list(seen)):
            seen[name].append(x.numpy())
        with torch.no_grad():
            expected = model(tokens)
            round_inputs(model, 8, tokens if static else None)
            assert 0 < (model(tokens) - expected).abs().max() < 0.1 * expected.abs().max()
        for name, batches in seen.items():
            assert model.get_submodule(name).span == (running_range(batches) if static else None)

    def test_empty_calibration_is_refused(self, model):
        with pytest.raises(ValueError, match="tokens must be a non-empty"):
            round_inputs(model, 8, torch.zeros(0, 16, dtype=torch.long))


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chapter.options(parser)
    return parser.parse_args(words)


class TestRun:
    @pytest.mark.parametrize(
        ("words", "bits"),
        [
            ((), 4 + 20 / 32),
            (("--bits", "3", "--group-size", "16"), 3 + 19 / 16),
            (("--scheme", "deepspeed"), 4 + 16 / 32),
            (("--granularity", "channel"), 4 + 20 * 2 * 352 / (2 * (4 * 32 * 32 + 3 * 32 * 96))),
            (("--bits", "8", "--granularity", "tensor"), 8 + 24 * 14 / (2 * (4 * 32 * 32 + 3 * 32 * 96))),
        ],
    )
    def test_counts_the_bits(self, model, words, bits):
        report = chapter.apply(model, torch.zeros(0, 16), parsed(*words))
        assert report == {"bits per weight": pytest.approx(bits)}

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("--bits", "9"), "bits must be an integer from 1 to 8, got 9"),
            (("--group-size", "5"), "group_size must divide the 32 columns, got 5"),
            (("--granularity", "channel", "--group-size", "16"), "group_size belongs to the granularity 'group'"),
            (("--bits", "1", "--scheme", "smoothquant"), "needs at least 2 bits"),
        ],
    )
    def test_refuses_what_makes_no_grid_and_leaves_the_model_alone(self, model, words, complaint):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=complaint):
            chapter.apply(model, torch.zeros(0, 16), parsed(*words))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def bench(model: Transformer, perplexities: list[float]) -> SimpleNamespace:
    """As much of a lab as the claim asks for; it measures these perplexities one after another."""
    measured = iter(perplexities)
    return SimpleNamespace(
        full=False,
        seeds=(0,),
        base_perplexity=20.0,
        model=lambda: copy.deepcopy(model),
        perplexity=lambda changed: next(measured),
    )


class TestClaim:
    def test_holds_if_smaller_groups_cost_less_and_matter_more_than_the_scheme(self, model):
        made = chapter.claim(bench(model, [23, 22, 21, 40, 25, 22, 26, 26, 28, 24, 27]))
        assert made.holds and "less difference, per channel from 4.0 (deepspeed) to 8.0 (smoothquant)" in made.sentence
        assert made.numbers["perplexity, 3 bits, per tensor"] == 40
        assert made.numbers["perplexity, 4 bits, in groups of 32"] == 21

    @pytest.mark.parametrize("four", [[22, 23, 21], [23, 22, 22]])
    def test_does_not_hold_if_a_larger_group_costs_no_more(self, model, four):
        made = chapter.claim(bench(model, [*four, 40, 25, 22, 26, 26, 28, 24, 27]))
        assert not made.holds and "do not always cost less" in made.sentence

    def test_does_not_hold_if_the_scheme_matters_more(self, model):
        made = chapter.claim(bench(model, [23, 22, 21, 40, 25, 22, 26, 26, 99, 24, 27]))
        assert not made.holds and "makes more difference" in made.sentence
