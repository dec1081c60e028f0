"""Around the weight-only product: the layer that holds packed weights, its plain quantizer, and its claim."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from chapters.quantization import weight_only as chapter
from chapters.quantization.gptq import gptq, quantize_model, round_to_nearest
from chapters.quantization.weight_only import (
    Quantized,
    WeightOnlyLinear,
    load_packed,
    nearest_codes,
    stored_bits,
    use_packed,
)
from minitfm import checkpoint, surgery
from minitfm.checkpoint import CheckpointError
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, tolerance
from tests.minitfm.models import tiny_tokenizer
from tests.quantization.problems import layers


def held(columns: int = 32, bits: int = 4, **changed) -> Quantized:
    """A one-row weight of ones in one group."""
    parts = {"codes": np.ones((1, columns), np.uint8), "scale": np.ones((1, 1)), "zero": np.zeros((1, 1))}
    return Quantized(**(parts | changed), group_of_column=np.zeros(columns, int), bits=bits)


class TestLayer:
    @given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]), st.sampled_from([None, 32]), st.booleans())
    def test_computes_what_the_dequantized_weights_do(self, seed, bits, group_size, act_order):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((40, 128))
        quantized = gptq(rng.standard_normal((5, 128)), x.T @ x, bits, group_size, act_order=act_order)
        bias = torch.from_numpy(rng.standard_normal(5))
        found = WeightOnlyLinear(quantized, bias, torch.float64)(torch.from_numpy(x).unflatten(0, (2, 20)))
        expected = (x @ quantized.dequantize().T + bias.numpy()).reshape(2, 20, 5)
        np.testing.assert_allclose(found.numpy(), expected, **tolerance(np.float64, 128, 10))

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_serves_every_precision_and_any_order_of_axes(self, dtype, bits):
        rng = np.random.default_rng(0)
        quantized, bias = nearest_codes(rng.standard_normal((6, 128)), 32, bits), torch.ones(6, dtype=torch.float32)
        x = torch.from_numpy(rng.standard_normal((128, 2, 3))).to(DEVICE, dtype).permute(2, 1, 0)
        found = WeightOnlyLinear(quantized, bias).to(DEVICE)(x)
        expected = x.double().cpu().numpy() @ quantized.dequantize().T + 1
        assert found.dtype is dtype
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **tolerance(dtype, 128))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_passes_gradients_to_its_input(self, dtype):
        quantized = nearest_codes(np.random.default_rng(0).standard_normal((6, 64)), 32)
        x = torch.randn(2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(WeightOnlyLinear(quantized).to(DEVICE)(x).sum(), x)
        expected = np.tile(quantized.dequantize().sum(0), (2, 1))
        np.testing.assert_allclose(gradient.double().cpu().numpy(), expected, **tolerance(dtype, 6))

    @pytest.mark.parametrize(
        ("quantized", "complaint"),
        [
            (held(bits=5), "got 5, 32"),
            (held(16), "got 4, 16"),
            (held(zero=np.full((1, 1), 7.5)), "zero must hold integers from 0 to 255, got 7.5 to 7.5"),
            (held(zero=np.full((1, 1), -1.0)), "got -1.0"),
            (held(zero=np.full((1, 1), 256.0)), "got 256.0"),
            (held(zero=np.full((1, 1), np.nan)), "got nan"),
            (held(scale=np.full((1, 1), 1e6)), r"scale must be finite in torch.float16, got up to 1e\+06"),
            (held(codes=np.full((1, 32), 16, np.uint8)), "codes must be from 0 to 15, got 16"),
            (held(64, bits=3), r"codes must be integers \[out, 128 k\], got uint8 \(1, 64\)"),
            (held(32, bits=2), r"codes must be integers \[out, 64 k\], got uint8 \(1, 32\)"),
        ],
    )
    def test_refuses_what_it_cannot_hold(self, quantized, complaint):
        with pytest.raises(ValueError, match=complaint):
            WeightOnlyLinear(quantized)


class TestNearestCodes:
    @given(layers(columns=(2, 16, 24)), st.sampled_from([None, 1, 2]), st.sampled_from([2, 3, 4]))
    def test_takes_the_nearest_value_of_its_grid(self, layer, size, bits):
        weight = np.clip(layer.weight, -1e5 / 16 * 2**bits, 1e5 / 16 * 2**bits)
        found = nearest_codes(weight, size, bits)
        scale, zero = found.scale[:, found.group_of_column], found.zero[:, found.group_of_column]
        values = scale[..., None] * (np.arange(2**bits) - zero[..., None])  # [out, in, 2**bits]
        best = np.abs(values - weight[..., None]).min(axis=-1)
        errors = np.abs(found.dequantize() - weight)
        np.testing.assert_allclose(errors, best, rtol=1e-9, atol=1e-12 * np.abs(weight).max())
        assert (found.scale == found.scale.astype(np.float16)).all()

    def test_is_rounding_to_nearest_but_for_the_precision_of_the_scale(self):
        weight = np.random.default_rng(0).standard_normal((8, 96))
        found, expected = nearest_codes(weight, 32), round_to_nearest(weight, 4, 32)
        np.testing.assert_allclose(found.scale, expected.scale, rtol=2.0**-11)
        assert (found.codes == expected.codes).mean() > 0.99

    def test_small_weights_are_held_and_huge_ones_refused(self):
        tiny = np.array([[1e-9, -1e-9, 0.0], [0.0, 0.0, 0.0]])
        np.testing.assert_array_equal(nearest_codes(tiny).dequantize(), 0)
        with pytest.raises(ValueError, match="too large for float16, it goes from -1000000"):
            nearest_codes(np.array([[-1e6, 1e6]]))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=64, hidden_dim=192, layers=2, heads=2)).eval()


def asked(*words: str) -> argparse.Namespace:
    """What `apply` gets for these words on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    chapter.options(parser)
    return parser.parse_args(words)


class TestInTheModel:
    @pytest.mark.parametrize("act_order", [False, True])
    def test_a_packed_model_says_the_same_in_an_eighth_of_the_bytes(self, model, act_order):
        tokens = torch.randint(40, (4, 16))
        full = sum(layer.weight.nbytes for layer in surgery.linears(model).values())
        done = quantize_model(model, tokens, 4, group_size=32, act_order=act_order)
        with torch.no_grad():
            expected = model(tokens)
            use_packed(model, done)
            torch.testing.assert_close(model(tokens), expected, **tolerance(torch.float32, 64))
        packed = [module for module in model.modules() if isinstance(module, WeightOnlyLinear)]
        assert len(packed) == len(done) and sum(layer.packed.nbytes for layer in packed) == full // 8
        assert all((layer.order is None) != act_order or layer.group_size == 64 for layer in packed)

    @pytest.mark.parametrize(("group_size", "bits"), [(32, 4.75), (64, 4.375)])
    def test_run_rounds_the_model_and_reports_what_is_held(self, model, group_size, bits):
        before = copy.deepcopy(model)
        report = chapter.apply(model, torch.zeros(0, 16), asked("--group-size", str(group_size)))
        assert report == {"bits per weight": bits}
        for layer, old in zip(surgery.linears(model).values(), surgery.linears(before).values(), strict=True):
            expected = nearest_codes(old.weight.detach().numpy(), group_size).dequantize()
            np.testing.assert_array_equal(layer.weight.detach().numpy(), expected.astype(np.float32))

    def test_run_takes_other_widths(self, model):
        report = chapter.apply(model, torch.zeros(0, 16), asked("--bits", "2"))
        assert report == {"bits per weight": 2.75}
        assert all(len(layer.weight[0].unique()) <= layer.in_features / 8 for layer in surgery.linears(model).values())
        for bits in ("1", "5", "8"):
            with pytest.raises(ValueError, match=f"bits must be 2, 3 or 4, got {bits}"):
                chapter.apply(model, torch.zeros(0, 16), asked("--bits", bits))
        with pytest.raises(ValueError, match=r"codes must be integers \[out, 128 k\]"):  # its rows have 64 columns
            chapter.apply(model, torch.zeros(0, 16), asked("--bits", "3"))

    def test_bits_are_counted_in_the_buffers(self, model):
        layer = WeightOnlyLinear(nearest_codes(np.ones((3, 96)), 32), torch.ones(3))
        assert stored_bits([layer, torch.nn.Linear(4, 4)]) == 4 + 24 / 32
        assert stored_bits([WeightOnlyLinear(nearest_codes(np.ones((3, 128)), 64, 3))]) == 3 + 24 / 64


class TestCheckpoint:
    """A model with packed layers is saved as it stands and loaded by `load_packed`."""

    NAME = "blocks.1.feed_forward.up_proj"

    @pytest.fixture
    def folder(self, tmp_path, packed) -> Path:
        checkpoint.save(tmp_path, packed, tiny_tokenizer())
        return tmp_path

    @pytest.fixture
    def packed(self) -> Transformer:
        torch.manual_seed(0)
        vocabulary = tiny_tokenizer().vocab_size
        model = Transformer(Config(vocab_size=vocabulary, dim=128, hidden_dim=256, layers=2, heads=2)).eval()
        layers = surgery.linears(model)
        done = {}
        for i, (name, layer) in enumerate(layers.items()):
            weight, diagonal = layer.weight.detach().numpy(), np.arange(1.0, 1 + layer.in_features)
            done[name] = gptq(weight, np.diag(diagonal), 1 + i % 4, 64, act_order=i % 3 == 0)
        done.pop("blocks.0.attention.v_proj")  # one layer stays plain
        use_packed(model, done, torch.float16)
        return model

    def test_gives_back_what_was_saved(self, packed, folder):
        loaded = load_packed(folder).model
        assert torch.equal(loaded(torch.arange(12)[None]), packed(torch.arange(12)[None]))
        for name, layer in packed.named_modules():
            if isinstance(layer, WeightOnlyLinear):
                found = loaded.get_submodule(name)
                assert (found.bits, found.group_size, found.scale.dtype) == (layer.bits, 64, torch.float16)
        assert isinstance(loaded.blocks[0].attention.v_proj, torch.nn.Linear)

    def test_takes_plain_checkpoints_too(self):
        plain, loaded = checkpoint.base().model, load_packed(checkpoint.BASE).model
        assert torch.equal(loaded(torch.arange(12)[None]), plain(torch.arange(12)[None]))

    def test_other_loaders_say_what_it_is(self, folder):
        with pytest.raises(CheckpointError, match=r"unknown to the model, .*packed first: if other modules were in"):
            checkpoint.load(folder)

    @pytest.mark.parametrize(
        ("part", "change", "complaint"),
        [
            ("packed", lambda t: t[:, :-4].clone(), "do not make 128 columns"),
            ("packed", lambda t: t[:-1].clone(), "has shape"),
            ("packed", lambda t: t[0, 0].clone(), "do not make"),
            ("packed", lambda t: t.float(), "holds torch.float32, not torch.int32"),
            ("scale", lambda t: t[:, :0].clone(), "do not make"),
            ("scale", lambda t: t[0, 0].clone(), "do not make"),
            ("scale", lambda t: t.int(), "do not make"),
            ("scale", lambda t: t * torch.inf, "not finite"),
            ("scale", lambda t: torch.cat(8 * [t], dim=1), "need bits <= 4 and groups of 32 k columns"),
            ("scale", lambda t: None, "up_proj.weight first; .* unknown"),
            ("zero", lambda t: t[:, :1].clone(), "has shape"),
            ("zero", lambda t: t.int(), "holds torch.int32, not torch.uint8"),
            ("zero", lambda t: None, "1 tensors are missing"),
            ("order", lambda t: t.roll(1)[:-1].clone(), "order must hold each of 128 columns once"),
            ("order", lambda t: t.clamp(min=1), "order must hold each of 128 columns once"),
        ],
    )
    def test_damage_is_one_clear_error(self, folder, part, change, complaint):
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(f"{self.NAME}.{part}"))
        save_file(tensors | ({} if changed is None else {f"{self.NAME}.{part}": changed}), folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=complaint) as caught:
            load_packed(folder)
        assert "\n" not in str(caught.value)

    def test_run_writes_one(self, folder, tmp_path):
        plain = Transformer(Config(vocab_size=tiny_tokenizer().vocab_size, dim=64, hidden_dim=64, layers=1, heads=2))
        checkpoint.save(folder / "plain", plain, tiny_tokenizer())
        model = checkpoint.load(folder / "plain").model
        report = chapter.apply(model, torch.zeros(0, 16), asked(f"--packed={tmp_path}/p", f"--model={folder}/plain"))
        loaded = load_packed(tmp_path / "p")
        assert loaded.info == {"technique": "quantization.weight_only"}
        torch.testing.assert_close(loaded.model(torch.arange(9)[None]), model(torch.arange(9)[None]))
        assert report["packed checkpoint, MB"] == (tmp_path / "p" / "model.safetensors").stat().st_size / 1e6


def bench(model: Transformer, perplexities: list[float]) -> SimpleNamespace:
    """As much of a lab as the claim asks for; it measures the perplexities one after another."""
    measured = iter(perplexities)
    return SimpleNamespace(
        seeds=(0, 1),
        base_perplexity=20.0,
        model=lambda: copy.deepcopy(model),
        calibration=lambda seed, count: torch.randint(40, (count, 8), generator=torch.Generator().manual_seed(seed)),
        perplexity=lambda changed: next(measured),
    )


class TestClaim:
    def test_counts_the_bytes_of_the_formula(self, model):
        made = chapter.claim(bench(model, [21, 22, 23, 30]))
        assert made.holds and "compute the same logits" in made.sentence
        assert made.numbers["bits, groups of 32"] == 4.75 and made.numbers["bits, groups of 64"] == 4.375
        assert made.numbers["bits, 2 bits, groups of 32"] == 2.75  # 3 bits: not with 64 columns
        widths = [layer.weight.shape for layer in surgery.linears(model).values()]
        whole = 4 + 24 * sum(rows for rows, _ in widths) / sum(rows * columns for rows, columns in widths)
        assert made.numbers["bits, whole rows"] == pytest.approx(whole)

    def test_does_not_hold_if_small_groups_do_not_pay(self, model):
        assert not chapter.claim(bench(model, [23, 22, 21, 30])).holds

    def test_does_not_hold_if_the_packed_layers_compute_something_else(self, model, monkeypatch):
        monkeypatch.setattr(
            WeightOnlyLinear,
            "weight",
            lambda self: torch.ones(len(self.packed), 32 * self.packed.shape[1] // self.bits),
        )
        made = chapter.claim(bench(model, [21, 22, 23, 30]))
        assert not made.holds and "compute other logits" in made.sentence

    def test_does_not_hold_if_more_is_held(self, model, monkeypatch):
        monkeypatch.setattr(chapter, "stored_bits", lambda layers: 5.0)
        assert not chapter.claim(bench(model, [21, 22, 23, 30])).holds
