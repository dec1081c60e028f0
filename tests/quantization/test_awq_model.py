"""AWQ in the model: whole blocks against the authors' code, what is folded where, its claim, and its refusals."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from chapters.quantization import awq as chapter
from chapters.quantization.awq import (
    Step,
    fold,
    quantize,
    quantize_model,
    round_model,
    search_clip,
    search_scales,
    search_step,
    steps,
)
from chapters.quantization.weight_only import stored_bits, use_packed
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import RMSNorm, Transformer
from tests.conftest import golden, tolerance

THEIRS = {"attention": "self_attn", "feed_forward": "mlp"}
NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


def their_name(name: str) -> str:
    """The release's name of a layer of block 0."""
    part, _, layer = name.removeprefix("blocks.0.").partition(".")
    return f"{THEIRS[part]}.{layer}" if layer else NORMS[part]


def released(case: str) -> tuple[Transformer, torch.Tensor, dict[str, np.ndarray]]:
    """The golden block as a model whose embedding holds its inputs, the tokens that read them, and its arrays."""
    arrays = {key.removeprefix(f"{case}/"): value for key, value in golden("quant/awq").items() if case in key}
    sizes = {"kv_heads": 2, "head_dim": 32} if case.startswith("gqa") else {}
    model = Transformer(Config(vocab_size=552, dim=64, hidden_dim=64, layers=1, heads=4, **sizes)).double().eval()
    model.embedding.weight.data.copy_(torch.from_numpy(arrays["x"]))
    for name in [*surgery.linears(model), *surgery.norm_readers(model)]:
        model.get_parameter(f"{name}.weight").data.copy_(torch.from_numpy(arrays[f"{their_name(name)}.weight"]))
    return model, torch.arange(552).view(23, 24), arrays


@pytest.mark.parametrize(("case", "bits", "size"), [("mha_b3_g32", 3, 32), ("gqa_b4_g16", 4, 16)])
class TestAgainstTheRelease:
    """A Llama block, run through their whole pipeline in float64."""

    def test_every_step_finds_the_same_ratio(self, case, bits, size):
        model, tokens, arrays = released(case)
        for step in steps(model):
            x = torch.cat([x for _, x in surgery.record_inputs(model, tokens, [step.readers[0]])])
            found = search_step(model, step, x, bits, size)
            theirs = their_name(step.readers[0])
            assert found.ratio == arrays[f"{theirs}/ratio"]
            np.testing.assert_allclose(found.losses, arrays[f"{theirs}/history"], rtol=1e-5)
            np.testing.assert_allclose(found.scales, arrays[f"{theirs}/scales"], rtol=1e-5)

    def test_every_layer_gets_the_same_codes(self, case, bits, size, monkeypatch):
        """From their very scales: clipped weights can lie halfway between two codes, and the last digit decides."""
        model, tokens, arrays = released(case)
        monkeypatch.setattr(
            chapter,
            "search_step",
            lambda _, step, *rest: SimpleNamespace(scales=arrays[f"{their_name(step.readers[0])}/scales"]),
        )
        limits = chapter.search_block(copy.deepcopy(model), tokens, steps(model), bits, size, True)
        for name, limit in limits.items():
            np.testing.assert_allclose(limit, arrays[f"{their_name(name)}/max_val"], rtol=1e-6)
        for name, held in quantize_model(model, tokens, bits, size).items():
            theirs = their_name(name)
            np.testing.assert_array_equal(held.codes, arrays[f"{theirs}/codes"])
            np.testing.assert_array_equal(held.zero, arrays[f"{theirs}/zero"])
            np.testing.assert_allclose(held.scale, arrays[f"{theirs}/scale"], rtol=1e-6)


def small(**changed) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "dim": 32, "hidden_dim": 64, "layers": 2, "heads": 2} | changed
    return Transformer(Config(**sizes)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(40, (5, 12), generator=torch.Generator().manual_seed(1))


class TestSteps:
    def test_are_four_per_block_in_the_order_of_the_release(self):
        block, attention, forward = "blocks.1", "blocks.1.attention", "blocks.1.feed_forward"
        readers = tuple(f"{attention}.{name}_proj" for name in "qkv")
        assert [step for step in steps(small()) if step.block == block] == [
            Step(block, f"{block}.attention_norm", readers, attention),
            Step(block, f"{attention}.v_proj", (f"{attention}.o_proj",), f"{attention}.o_proj"),
            Step(block, f"{block}.feed_forward_norm", (f"{forward}.gate_proj", f"{forward}.up_proj"), forward),
            Step(block, f"{forward}.up_proj", (f"{forward}.down_proj",), f"{forward}.down_proj"),
        ]

    def test_o_is_left_out_where_v_has_another_shape(self):
        assert len(steps(small(kv_heads=1))) == 6 and len(steps(small())) == 8

    def test_a_layer_that_reads_alone_is_inspected_alone(self):
        norm = steps(small(activation="relu", layers=1))[2]
        assert norm.readers == ("blocks.0.feed_forward.up_proj",) and norm.inspected == norm.readers[0]


class TestInTheModel:
    @pytest.mark.parametrize("changed", [{}, {"kv_heads": 1}, {"activation": "relu"}])
    def test_folding_keeps_the_function(self, tokens, changed, monkeypatch):
        model = small(**changed).double()
        for norm in surgery.norm_readers(model):
            model.get_parameter(f"{norm}.weight").data[3] *= 64
        before, expected = copy.deepcopy(model.state_dict()), model(tokens)
        monkeypatch.setattr(chapter, "quantize_each", lambda *_: {})  # all but the rounding at the end
        quantize_model(model, tokens, 3, 16, clipping=False)
        torch.testing.assert_close(model(tokens), expected, **tolerance(np.float64, 64, 1e3))
        scaled = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert scaled >= {f"{norm}.weight" for norm in surgery.norm_readers(model)}

    @pytest.mark.parametrize("bits", [2, 4])
    def test_no_step_does_worse_than_rounding_on_the_calibration_text(self, tokens, bits):
        model = small()
        for step in steps(model):
            before = copy.deepcopy(model.state_dict())
            x = torch.cat([x for _, x in surgery.record_inputs(model, tokens, [step.readers[0]])])
            losses = search_step(model, step, x, bits, 16).losses
            assert losses.min() <= losses[0] and len(losses) == 20
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_first_loss_is_that_of_rounding_to_nearest(self, tokens):
        model = small()
        step = steps(model)[0]
        x = torch.cat([x for _, x in surgery.record_inputs(model, tokens, [step.readers[0]])])
        found = search_step(model, step, x, 3, 16).losses[0]
        attention, places = model.get_submodule(step.inspected), (model.cos[:12], model.sin[:12], None)
        with torch.no_grad():
            expected = attention(x, *places)
            for name in step.readers:
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(torch.from_numpy(quantize(weight.numpy(), 3, 16).dequantize()))
            assert found == pytest.approx((attention(x, *places) - expected).double().square().mean().item(), rel=1e-4)

    @pytest.mark.parametrize("clipping", [True, False])
    def test_weights_become_the_dequantized_ones(self, tokens, clipping):
        model = small()
        done = quantize_model(model, tokens, 3, 16, clipping)  # 60 tokens, fewer than the clip search samples
        assert list(done) == list(surgery.linears(model))
        for name, layer in surgery.linears(model).items():
            assert torch.equal(layer.weight, torch.from_numpy(done[name].dequantize()).float())
            assert done[name].codes.max() < 8 and done[name].bits == 3

    def test_q_and_k_are_not_clipped_the_others_are(self, tokens):
        limits = chapter.search_block(small(), tokens, steps(small())[:4], 2, None, True)
        names = {"attention": ("v_proj", "o_proj"), "feed_forward": ("gate_proj", "up_proj", "down_proj")}
        assert set(limits) == {f"blocks.0.{part}.{layer}" for part, layers in names.items() for layer in layers}

    def test_later_blocks_are_calibrated_on_full_precision(self, tokens):
        model = small().double()
        plain = copy.deepcopy(model)
        done = quantize_model(model, tokens, 2, 16)
        limits = chapter.search_block(plain, tokens, steps(plain)[4:], 2, 16, True)
        for name, limit in limits.items():
            weight = chapter.clip(plain.get_parameter(f"{name}.weight").detach().numpy(), limit)
            np.testing.assert_array_equal(done[name].codes, quantize(weight, 2, 16).codes)

    def test_packed_layers_compute_the_same(self, tokens):
        model = small()
        done = quantize_model(model, tokens, 4, 32)
        with torch.no_grad():
            expected = model(tokens)
            use_packed(model, done)
            torch.testing.assert_close(model(tokens), expected, **tolerance(torch.float32, 64, 10))
        assert stored_bits(model.modules()) > 4

    def test_rounding_needs_no_text(self):
        model = small()
        weight = model.blocks[0].attention.q_proj.weight.detach().numpy().copy()
        found = round_model(model, 4, 16)["blocks.0.attention.q_proj"]
        np.testing.assert_array_equal(found.codes, quantize(weight, 4, 16).codes)

    @pytest.mark.parametrize(
        ("tokens", "changed", "complaint"),
        [
            (torch.zeros((0, 8), dtype=torch.long), {}, "tokens must be a non-empty"),
            (torch.zeros((1, 8), dtype=torch.long), {"group_size": 5}, "group_size must divide the 32 columns"),
            (torch.zeros((1, 8), dtype=torch.long), {"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ],
    )
    def test_refusals_leave_the_model_as_it_was(self, tokens, changed, complaint):
        model = small()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=complaint):
            quantize_model(model, tokens, **({"bits": 4} | changed))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(("arguments", "bits"), [([], 4), (["--bits=3", "--group-size=16", "--no-clip"], 3)])
    def test_the_command_reports_what_a_weight_takes(self, tokens, arguments, bits):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        model = small(layers=1)
        report = chapter.apply(model, tokens, parser.parse_args(arguments))
        weights = [layer.weight for layer in surgery.linears(model).values()]
        groups = sum(weight.numel() // (16 if bits == 3 else weight.shape[1]) for weight in weights)
        assert report["bits per weight"] == pytest.approx(bits + (16 + bits) * groups / sum(w.numel() for w in weights))


class TestClaim:
    @pytest.mark.parametrize(
        ("planted", "plain", "holds"),
        [([9, 8], [7, 6], True), ([9, 8], [9, 7], True), ([9, 13], [8, 6], False), ([9, 8], [3, 2], False)],
    )
    def test_holds_if_awq_loses_less_with_every_seed_and_less_so_without_outliers(
        self, monkeypatch, planted, plain, holds
    ):
        rises = {("RTN", True): [12, 12], ("AWQ", True): planted, ("RTN", False): [8, 6], ("AWQ", False): plain}
        monkeypatch.setattr(chapter, "rises", lambda lab, method, p, bits: np.array(rises[method, p], dtype=float))
        monkeypatch.setattr(chapter, "ratio_losses", lambda lab, p: np.ones(20))
        made = chapter.claim(SimpleNamespace(base_perplexity=20.0, seeds=(0, 1)))
        assert made.holds is holds
        assert made.numbers["rise, AWQ 3 bits, outliers planted"] == pytest.approx(np.mean(planted))

    def test_measures_a_fresh_model_for_each_seed(self, tokens):
        drawn = []
        lab = SimpleNamespace(
            full=False, seeds=(3, 5), config=small().config, base_perplexity=1.0, model=small,
            calibration=lambda seed, count: drawn.append((seed, count)) or tokens,
            perplexity=lambda model: float(model.blocks[0].attention.q_proj.weight.detach().abs().sum()),
        )  # fmt: skip
        first, second = chapter.rises(lab, "RTN", False, 3)
        assert first == second and not drawn
        first, second = chapter.rises(lab, "AWQ", True, 3)
        assert first != second and drawn == [(3, 4), (5, 4)]
        assert chapter.ratio_losses(lab, False)[0] == 1


GOOD = {"weights": [np.eye(4)], "x": np.ones((2, 4)), "outputs": lambda weights: weights[0], "bits": 4}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"group_size": 3}, "group_size must divide the 4 columns of weight, got 3"),
        ({"weights": [np.full((2, 4), np.nan)], "outputs": lambda weights: np.zeros(1)}, "weight must be finite"),
        ({"x": np.ones((2, 5))}, r"x \(2, 5\) must hold tokens of the weights' inputs, got \[\(4, 4\)\]"),
        ({"x": np.full((2, 4), np.nan)}, "magnitude must be finite and not negative"),
        ({"outputs": lambda weights: np.array([np.inf])}, "outputs must be finite"),
    ],
)
def test_refusals_of_the_search_say_what_is_wrong(wrong, complaint):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=complaint):
        search_scales(**(GOOD | wrong))


def test_other_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"need finite x \[tokens, 4\] and samples >= 1, got x \(3, 5\), 512"):
        search_clip(np.eye(4), np.ones((3, 5)), 4)
    with pytest.raises(ValueError, match=r"scales must be \[in\], got \(3,\) for layers of \[4\] channels"):
        fold(RMSNorm(4, 1e-5), [nn.Linear(4, 2)], torch.ones(3))
    with pytest.raises(ValueError, match="scales must be positive and finite"):
        fold(RMSNorm(4, 1e-5), [nn.Linear(4, 2)], torch.zeros(4))
