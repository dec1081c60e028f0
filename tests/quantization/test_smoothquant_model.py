"""SmoothQuant in the model: the int8 layer, smoothing what norms feed, the levels, and the claim."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chapters.quantization import smoothquant as chapter
from chapters.quantization.smoothquant import W8A8Linear, quantize_model, smooth_model
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, oracle, tolerance

SMALL = {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "layers": 2, "heads": 4, "kv_heads": 2}


def small_model(seed: int = 0, **changed) -> Transformer:
    """Two blocks, gains that are not all 1."""
    torch.manual_seed(seed)
    model = Transformer(Config(**(SMALL | changed))).eval()
    for norm in surgery.norm_readers(model):
        nn.init.uniform_(model.get_parameter(f"{norm}.weight"), 0.3, 3)
    return model


def text(seed: int = 0, count: int = 4) -> torch.Tensor:
    return torch.randint(40, (count, 16), generator=torch.Generator().manual_seed(seed))


class TestLayer:
    @given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([None, 1.5]), st.booleans())
    def test_computes_what_the_reference_does(self, seed, per_token, per_channel, x_max, with_bias):
        torch.manual_seed(seed)
        layer, x = nn.Linear(17, 5, bias=with_bias), torch.randn(2, 3, 17)
        found = W8A8Linear(layer, per_token, per_channel, x_max)(x)
        book = oracle("quantization.smoothquant")
        rows, weight = x.flatten(0, 1).numpy(), layer.weight.detach().numpy()
        static = None if x_max is None else np.array([x_max], np.float32) / np.float32(127)
        scales = (
            book.absmax_scale(rows, per_token) if static is None else static,
            book.absmax_scale(weight, per_channel),
        )
        codes = [book.quantize(part, scale) for part, scale in zip((rows, weight), scales, strict=True)]
        expected = book.w8a8_matmul(*codes, *scales) + (layer.bias.detach().numpy() if with_bias else 0)
        np.testing.assert_allclose(found.flatten(0, 1).numpy(), expected, **tolerance(np.float32, 17))

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_serves_every_precision_and_any_order_of_axes(self, dtype):
        torch.manual_seed(0)
        layer, x = (
            nn.Linear(16, 6).to(DEVICE, dtype),
            torch.randn(16, 2, 3, device=DEVICE, dtype=dtype).permute(2, 1, 0),
        )
        found = W8A8Linear(layer, per_channel=True)(x)
        assert found.dtype is dtype and found.shape == (3, 2, 6)
        torch.testing.assert_close(found, layer(x), **tolerance(torch.bfloat16))  # 8 bits have their own error

    def test_sums_are_exact_in_wide_layers(self):
        layer = nn.Linear(5000, 1, bias=False)
        nn.init.constant_(layer.weight, 1.0)
        layer.weight.data[0, 0] = -1.0
        found = W8A8Linear(layer, x_max=127.0)(torch.full((1, 5000), 127.0))
        assert found.item() == np.float32((4999 - 1) * 127**2 * np.float32(1 / 127))

    def test_a_layer_of_zeros_gives_zeros(self):
        layer = nn.Linear(4, 3, bias=False)
        nn.init.zeros_(layer.weight)
        assert (W8A8Linear(layer, per_channel=True)(torch.ones(2, 4)) == 0).all()
        assert (W8A8Linear(nn.Linear(4, 3, bias=False))(torch.zeros(2, 4)) == 0).all()

    def test_static_scales_clip_and_others_follow_their_input(self):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        x = torch.tensor([[1.0], [100.0]])
        assert W8A8Linear(layer, x_max=1.0)(x)[1].item() == pytest.approx(1)
        assert W8A8Linear(layer, per_token=True)(x)[0].item() == pytest.approx(1)
        assert W8A8Linear(layer, per_token=False)(x)[0].item() == pytest.approx(100 / 127)

    def test_its_state_dict_is_that_of_the_plain_layer(self):
        plain = nn.Linear(6, 4)
        layer = W8A8Linear(plain, per_channel=True)
        held = layer.state_dict()
        assert list(held) == ["weight", "bias"] and held["weight"].dtype is torch.float32
        assert torch.equal(held["weight"], layer.codes * layer.scale[:, None])
        plain.load_state_dict(held)

    def test_holds_no_weights_but_int8(self):
        layer = W8A8Linear(nn.Linear(64, 8, bias=False))
        assert sum(part.nbytes for part in (*layer.buffers(), *layer.parameters())) == 64 * 8 + 4


class TestSmoothing:
    @given(st.integers(0, 2**16), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["swiglu", "relu"]))
    def test_leaves_the_function_unchanged(self, seed, alpha, activation):
        model = small_model(seed, activation=activation).double()
        surgery.plant_outliers(model, 2, 100, seed)
        with torch.no_grad():
            expected = model(text(seed))
            smooth_model(model, text(seed + 1), alpha)
            found = model(text(seed))
        torch.testing.assert_close(found, expected, **tolerance(torch.float64, 32, float(expected.abs().max())))

    def test_changes_norms_and_what_reads_them_only(self):
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        done = smooth_model(model, text())
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        readers = surgery.norm_readers(model)
        assert changed == {f"{name}.weight" for norm, names in readers.items() for name in (norm, *names)}
        assert set(done) == set(readers)

    def test_evens_out_what_norms_feed(self):
        model = small_model()
        surgery.plant_outliers(model, 2, 64)
        readers = surgery.norm_readers(model)
        smooth_model(model, text(), 0.5)
        for names in readers.values():
            x_max = chapter.input_maxima(model, text(), names)
            weights = torch.cat([model.get_parameter(f"{name}.weight") for name in names]).abs().amax(dim=0)
            for name in names:
                torch.testing.assert_close(x_max[name], weights.detach(), **tolerance(torch.float32, 32))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_undoes_planted_outliers(self, alpha):
        plain, planted = small_model(), small_model()
        surgery.plant_outliers(planted, 3, 64)
        for model in (plain, planted):
            smooth_model(model, text(), alpha)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(planted.state_dict()[name], value, **tolerance(torch.float32, scale=3))

    def test_maxima_are_those_of_all_batches(self):
        model, tokens = small_model(), text(count=20)
        name = "blocks.1.attention.q_proj"
        whole = torch.cat([x for _, x in surgery.record_inputs(model, tokens, [name])])
        found = chapter.input_maxima(model, tokens, [name])
        assert torch.equal(found[name], whole.abs().amax(dim=(0, 1)))


class TestLevels:
    @pytest.mark.parametrize("level", chapter.LEVELS)
    def test_every_linear_layer_is_replaced(self, level):
        model = small_model()
        names, expected = list(surgery.linears(model)), model(text()).detach()
        done = quantize_model(model, text(), level)
        assert list(done) == names and not surgery.linears(model)
        assert all(model.get_submodule(name) is layer for name, layer in done.items())
        assert all((layer.x_scale is not None) == (level == "O3") for layer in done.values())
        assert 0 < (model(text()) - expected).norm() < 0.2 * expected.norm()

    def test_a_token_that_is_scaled_alone_sees_no_other_sequence(self):
        model = small_model()
        quantize_model(model, text(), "O1")
        assert torch.equal(model(text()[:1]), model(text())[:1])

    def test_smoothing_mends_what_outliers_break(self):
        errors = []
        for smooth in (False, True):
            model = small_model()
            expected = model(text()).detach()
            surgery.plant_outliers(model, 2, 100)
            if smooth:
                smooth_model(model, text())
            quantize_model(model, text(), "O2")
            errors.append(((model(text()) - expected).norm() / expected.norm()).item())
        assert errors[1] < 0.1 * errors[0]

    def test_refuses_another_level(self):
        with pytest.raises(ValueError, match="level must be one of O1, O2, O3, got 'O4'"):
            quantize_model(small_model(), text(), "O4")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chapter.options(parser)
    return parser.parse_args(words)


class TestRun:
    @pytest.mark.parametrize("words", [(), ("--level", "O3", "--alpha", "0.8"), ("--per-channel",)])
    def test_smooths_rounds_and_reports(self, words):
        model, plain = small_model(), small_model()
        args = parsed(*words)
        report = chapter.apply(model, text(), args)
        smooth_model(plain, text(), args.alpha)
        quantize_model(plain, text(), args.level, args.per_channel)
        assert torch.equal(model(text()), plain(text()))
        held = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
        scales, weights = (sum(getattr(layer, name).numel() for layer in held) for name in ("scale", "codes"))
        assert report["bits per weight"] == pytest.approx(8 + 32 * scales / weights)
        assert chapter.LEVELS[args.level] in report["activations"]

    def test_the_baseline_does_not_smooth(self):
        model, plain = small_model(), small_model()
        chapter.apply(model, text(), parsed("--no-smoothing"))
        quantize_model(plain, text(), "O1")
        assert torch.equal(model(text()), plain(text()))

    def test_what_is_saved_is_a_plain_model_of_rounded_weights(self):
        model, plain = small_model(), small_model()
        chapter.apply(model, text(), parsed("--level", "O1"))
        plain.load_state_dict(model.state_dict())
        expected = model(text())
        assert (plain(text()) - expected).norm() < 0.05 * expected.norm()
        codes = plain.blocks[0].attention.o_proj.weight / plain.blocks[0].attention.o_proj.weight.abs().max() * 127
        torch.testing.assert_close(codes, codes.round(), **tolerance(torch.float32, scale=127))


def bench(rises: list[float], full: bool = False) -> SimpleNamespace:
    """As much of a lab as the claim asks for; W8A8 raises the perplexity by `rises`, one after another."""
    measured = iter(rises)
    return SimpleNamespace(
        full=full,
        seeds=(0,),
        base_perplexity=20.0,
        validation=text(9),
        model=small_model,
        calibration=lambda seed, count: text(seed),
        perplexity=lambda model: 20 + next(measured),
    )


class TestClaim:
    GOOD = (10, 200, 150, 0.01, 0.1, 0.2)

    def claim(self, monkeypatch, errors, rises=GOOD, full=False):
        given_ = iter(errors)
        monkeypatch.setattr(chapter, "output_error", lambda model, tokens: next(given_))
        return chapter.claim(bench(list(rises), full))

    def test_holds_where_outliers_break_it_and_the_sweep_has_a_valley(self, monkeypatch):
        made = self.claim(monkeypatch, [2.4, 1.6, 1.4, 1.5, 2.0, 50])
        assert made.holds and "least at α = 0.5, 1.71 times that at 0 and 1.43 times at 1." in made.sentence
        assert made.numbers["rise, naive, O2"] == 200 and made.numbers["rise, smooth, O3"] == pytest.approx(0.2)
        assert made.numbers["output error, α = 0.25"] == 1.6 and made.numbers["output error, not smoothed"] == 50

    @pytest.mark.parametrize("errors", [[1, 1.6, 1.4, 1.5, 2, 50], [2, 1.6, 1.4, 1.5, 1.4, 50], [2, 2, 2, 2, 2, 50]])
    def test_does_not_hold_without_a_valley(self, monkeypatch, errors):
        made = self.claim(monkeypatch, errors)
        assert not made.holds and "no valley" in made.sentence

    @pytest.mark.parametrize("rises", [(10, 1, 150, 0.01, 0.1, 0.2), (10, 200, 150, 0.01, 0.1, 20)])
    def test_does_not_hold_unless_smoothing_repairs_what_broke(self, monkeypatch, rises):
        assert not self.claim(monkeypatch, [2.4, 1.6, 1.4, 1.5, 2.0, 50], rises).holds

    def test_errors_are_of_layers_behind_norms(self):
        model = small_model()
        error = chapter.output_error(model, text())
        nn.init.normal_(model.blocks[0].attention.o_proj.weight, std=1e-9)  # changes what later layers see, no more
        assert 0 < error < 0.1 and 0 < chapter.output_error(model, text()) < 0.1
        surgery.plant_outliers(model, 2, 100)
        assert chapter.output_error(model, text()) > 5 * error
