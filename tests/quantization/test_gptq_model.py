"""Around GPTQ: its baseline, its statistics, what it refuses, and what it does to a model."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import gptq as chapter
from chapters.quantization.gptq import gptq, hessian, hessians, quantize_model, round_model, round_to_nearest
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import golden, tolerance
from tests.quantization.problems import grid_of_row, layers, nearest

BITS = st.sampled_from([1, 2, 3, 4, 8])


class TestRoundToNearest:
    @given(layers(columns=(6, 12)), BITS, st.sampled_from([None, 1, 2, 6]), st.booleans())
    def test_rounds_every_group_on_its_own_grid(self, layer, bits, size, symmetric):
        found = round_to_nearest(layer.weight, bits, size, symmetric)
        for (row, column), code in np.ndenumerate(found.codes):
            start = column // (size or 99) * (size or 99)
            grid = grid_of_row(layer.weight[row, start : start + (size or 99)], bits, symmetric)
            assert code == nearest(layer.weight[row, column], *grid, bits)

    def test_no_weight_moves_further_than_half_a_step_inside_the_range(self):
        weight = np.random.default_rng(0).standard_normal((8, 96))
        found = round_to_nearest(weight, 3, 32)
        steps = found.scale[:, found.group_of_column]
        assert (np.abs(found.dequantize() - weight) <= steps * (1 + 1e-12)).all()  # the zero point may shift an end
        assert np.mean(np.abs(found.dequantize() - weight) <= steps / 2 * (1 + 1e-12)) > 0.95


class TestHessian:
    @given(layers(), st.integers(1, 4))
    def test_is_the_same_however_the_sequences_are_batched(self, layer, batch):
        sequences = layer.x[: len(layer.x) // 3 * 3].reshape(-1, 3, layer.x.shape[1])
        batches = [sequences[i : i + batch] for i in range(0, len(sequences), batch)]
        expected = sum(2 / len(sequences) * np.outer(x, x) for x in sequences.reshape(-1, layer.x.shape[1]))
        np.testing.assert_allclose(hessian(batches), expected, **tolerance(np.float64, 100, np.abs(expected).max()))

    def test_a_matrix_is_one_sequence(self):
        x = np.arange(6.0).reshape(3, 2)
        np.testing.assert_allclose(hessian([x, x]), 2 * x.T @ x)

    def test_equals_the_released_code(self):
        arrays = golden("quant/gptq")
        x = arrays["X"].astype(float).reshape(8, 32, -1)
        np.testing.assert_allclose(hessian([x[:4], x[4:]]), arrays["H"], **tolerance(np.float32, 256, 1e3))

    @pytest.mark.parametrize("batches", [[], [np.zeros((0, 4))], [np.zeros((3, 0, 4))], [np.full((2, 4), np.nan)]])
    def test_refuses_empty_and_broken_calibration(self, batches):
        with pytest.raises(ValueError, match="at least one token"):
            hessian(batches)


GOOD = {"weight": np.eye(4), "hessian": np.eye(4), "bits": 4}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, "got 9"),
        ({"bits": 2.5}, "got 2.5"),
        ({"bits": True}, "got True"),
        ({"group_size": 3}, "group_size must divide the 4 columns of weight, got 3"),
        ({"group_size": 0}, "got 0"),
        ({"group_size": -2}, "got -2"),
        ({"weight": np.full((2, 4), np.nan)}, "weight must be finite and below 1e100, got 8 others"),
        ({"weight": np.array([[np.inf, 0, 0, 1e200]])}, "got 2 others"),
        ({"weight": np.ones(4)}, r"weight must be a non-empty \[out, in\] matrix"),
        ({"weight": np.ones((0, 4))}, "non-empty"),
        ({"hessian": np.eye(3)}, r"hessian must be finite, \[in, in\] = \(4, 4\); got shape \(3, 3\)"),
        ({"hessian": np.full((4, 4), np.inf)}, "hessian must be finite"),
        ({"hessian": np.tril(np.ones((4, 4)))}, "hessian must be symmetric"),
        ({"hessian": -np.eye(4)}, "hessian is not positive definite with damping=0.01"),
        ({"damping": -0.1}, "got damping=-0.1"),
        ({"damping": np.nan}, "got damping=nan"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_bad_arguments_are_named(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        gptq(**(GOOD | wrong))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=32, hidden_dim=64, layers=2, heads=2, kv_heads=1)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(40, (10, 24), generator=torch.Generator().manual_seed(1))


class TestInTheModel:
    def test_hessians_are_those_of_the_recorded_inputs(self, model, tokens):
        names = ["blocks.1.attention.q_proj", "blocks.1.feed_forward.down_proj"]
        found = hessians(model, tokens, names)
        for name in names:
            inputs = [x.numpy() for _, x in surgery.record_inputs(model, tokens, [name], batch=3)]
            expected = hessian(inputs)
            np.testing.assert_allclose(found[name], expected, **tolerance(np.float32, 240, expected.max()))

    def test_weights_become_the_dequantized_ones_and_nothing_else_changes(self, model, tokens):
        before = copy.deepcopy(model.state_dict())
        done = quantize_model(model, tokens, 3, group_size=32)
        assert list(done) == list(surgery.linears(model))
        for name, value in model.state_dict().items():
            held = done.get(name.removesuffix(".weight"))
            expected = before[name] if held is None else torch.from_numpy(held.dequantize()).float()
            assert torch.equal(value, expected) and (held is None or held.codes.max() < 8)

    @pytest.mark.parametrize(
        ("true_sequential", "name", "seen_quantized"),
        [
            (False, "blocks.0.feed_forward.down_proj", ()),
            (False, "blocks.1.attention.o_proj", ("blocks.0",)),
            (True, "blocks.0.attention.v_proj", ()),
            (True, "blocks.1.attention.o_proj", ("blocks.0", "blocks.1.attention")),
            (True, "blocks.1.feed_forward.up_proj", ("blocks.0", "blocks.1.attention")),
            (True, "blocks.1.feed_forward.down_proj", ("blocks.0", "blocks.1")),
        ],
    )
    def test_layers_see_what_comes_through_quantized_ones(self, model, tokens, true_sequential, name, seen_quantized):
        plain = copy.deepcopy(model)
        done = quantize_model(model, tokens, 2, true_sequential)
        original = plain.get_submodule(name).weight.detach().numpy().copy()
        for other, layer in surgery.linears(plain).items():
            if other.startswith(seen_quantized):  # its own weights come after its inputs
                layer.weight.data.copy_(torch.from_numpy(done[other].dequantize()))
        expected = gptq(original, hessians(plain, tokens, [name])[name], 2)
        np.testing.assert_array_equal(done[name].codes, expected.codes)

    def test_keeps_the_precision_of_the_model(self, model, tokens):
        done = quantize_model(model.double(), tokens, 4, act_order=True)
        for name, layer in surgery.linears(model).items():
            np.testing.assert_array_equal(layer.weight.detach().numpy(), done[name].dequantize())

    def test_rounding_needs_no_text(self, model):
        weight = model.blocks[0].attention.q_proj.weight.detach().numpy().copy()
        found = round_model(model, 4, group_size=16, symmetric=True)["blocks.0.attention.q_proj"]
        np.testing.assert_array_equal(found.codes, round_to_nearest(weight, 4, 16, symmetric=True).codes)

    def test_empty_text_is_refused(self, model):
        with pytest.raises(ValueError, match="tokens must be a non-empty"):
            quantize_model(model, torch.zeros((0, 8), dtype=torch.long), 4)

    @pytest.mark.parametrize(
        ("arguments", "bits", "group_size"), [([], 4, None), (["--bits=3", "--group-size=16"], 3, 16)]
    )
    def test_the_command_reports_what_a_weight_takes(self, model, tokens, arguments, bits, group_size):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        report = chapter.apply(model, tokens, parser.parse_args(arguments))
        weights = [layer.weight for layer in surgery.linears(model).values()]
        groups = sum(weight.numel() // (group_size or weight.shape[1]) for weight in weights)
        assert report["bits per weight"] == pytest.approx(bits + (16 + bits) * groups / sum(w.numel() for w in weights))


class TestClaim:
    @pytest.mark.parametrize(("gptq_rise", "holds"), [(0.5, True), (1.5, False)])
    def test_holds_only_if_gptq_loses_less_with_every_calibration(self, monkeypatch, gptq_rise, holds):
        rise = {"RTN": [1.0], "GPTQ": [0.25, gptq_rise]}
        monkeypatch.setattr(chapter, "perplexities", lambda lab, method, grid, bits: [20 + r for r in rise[method]])
        made = chapter.claim(SimpleNamespace(base_perplexity=20.0, seeds=(0, 1), full=False))
        assert made.holds is holds and ("GPTQ loses less" in made.sentence) is holds
        assert made.numbers["rise, GPTQ 3 bits per row"] == pytest.approx((0.25 + gptq_rise) / 2)

    @pytest.mark.parametrize(("ordered", "holds"), [([1.0, 2.0], True), ([1.0, 3.5], False)])
    def test_in_full_act_order_must_help_against_outliers(self, monkeypatch, ordered, holds):
        def perplexities(lab, method, grid, bits, planted=False, act_order=False):
            rise = (ordered if act_order else [2.0, 3.0]) if planted else {"RTN": [1.0], "GPTQ": [0.5, 0.5]}[method]
            return [20 + r for r in rise]

        monkeypatch.setattr(chapter, "perplexities", perplexities)
        made = chapter.claim(SimpleNamespace(base_perplexity=20.0, seeds=(0, 1), full=True))
        assert made.holds is holds and "GPTQ loses less" in made.sentence
        assert made.numbers["rise, GPTQ 3 bits, outliers"] == pytest.approx(2.5)

    def test_measures_fresh_copies_once_per_seed(self, model, tokens):
        drawn = []
        lab = SimpleNamespace(
            full=True,
            seeds=(3, 5),
            model=lambda: copy.deepcopy(model),
            calibration=lambda seed, count: drawn.append((seed, count)) or tokens,
            perplexity=lambda changed: float(changed.blocks[0].attention.q_proj.weight.detach().abs().sum()),
        )
        assert len(chapter.perplexities(lab, "RTN", None, 3)) == 1 and not drawn
        first, second = chapter.perplexities(lab, "GPTQ", 32, 3)
        assert drawn == [(3, 128), (5, 128)] and first == second
        lab.perplexity = lambda changed: float(changed.blocks[0].attention_norm.weight.detach().max())
        assert chapter.perplexities(lab, "GPTQ", None, 3, planted=True, act_order=True) == [16, 16]
