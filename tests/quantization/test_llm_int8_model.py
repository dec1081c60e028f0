"""Around LLM.int8: what is refused in words, the kernel's wrapper, the layer in the model, saving it, and the claim."""

from __future__ import annotations

import argparse
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import llm_int8 as chapter
from chapters.quantization.llm_int8 import AbsmaxLinear, Int8Linear
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, tolerance
from tests.quantization.int8_products import Product, drawn, on_device, products

llm_int8 = kernel("quantization.llm_int8")


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"x must be a non-empty \[rows, columns\] matrix, got shape \(0, 2\)"):
        chapter.quantize_rows(np.ones((0, 2)))
    with pytest.raises(ValueError, match="threshold must be 0 or more, got -1"):
        chapter.quantize_rows(np.ones((1, 2)), -1)
    with pytest.raises(
        ValueError, match=r"x \(1, 2\), codes \(1, 3\), absmax \(1,\) and exact None do not fit together"
    ):
        chapter.llm_int8_matmul(np.ones((1, 2)), np.ones((1, 3), np.int8), np.ones(1))


@pytest.mark.kernel
class TestWrapper:
    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    @pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 70, 300), (17, 33, 96), (70, 130, 64)])
    def test_its_own_configuration_serves_any_shape(self, tokens, rows, columns, dtype):
        x = drawn(0, tokens, columns, "outlier column")
        weight = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float16)
        codes, absmax, _ = oracle("quantization.llm_int8").quantize_rows(weight)
        for exact in (None, weight):
            product = Product(x, codes, absmax, 6.0, exact)
            held = [None if part is None else on_device(part) for part in (codes, absmax, exact)]
            weights = held[2] if exact is None else held[2].to(dtype)
            found = llm_int8.llm_int8_matmul(on_device(x, dtype), *held[:2], 6.0, weights)
            expected = oracle("quantization.llm_int8").llm_int8_matmul(*product.arguments())
            np.testing.assert_allclose(found.double().cpu().numpy(), expected, **product.close(dtype))

    @given(products(rows=(2, 20), columns=(32, 64), wide=(16,)))
    def test_plain_torch_computes_the_same(self, product):
        held = [
            None if part is None else torch.from_numpy(part) for part in (product.codes, product.absmax, product.exact)
        ]
        found = llm_int8.by_operators(torch.from_numpy(product.x), *held[:2], product.threshold, held[2])
        expected = oracle("quantization.llm_int8").llm_int8_matmul(*product.arguments())
        np.testing.assert_allclose(found.double().numpy(), expected, **product.close(torch.float16))


def arguments(**changed) -> dict:
    given_ = {"x": torch.ones(2, 64), "codes": torch.ones(3, 64, dtype=torch.int8), "absmax": torch.ones(3)}
    return given_ | changed


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(64)}, ValueError, r"x must be a non-empty \[M, K\] matrix, got \(64,\)"),
        ({"x": torch.ones(0, 64)}, ValueError, "non-empty"),
        ({"x": torch.ones(2, 32)}, ValueError, r"codes must be \[N, K\] with K=32, got \(3, 64\)"),
        ({"codes": torch.ones(0, 64, dtype=torch.int8)}, ValueError, "codes must be"),
        ({"absmax": torch.ones(2)}, ValueError, r"absmax must be \[N\] = \[3\], got \(2,\)"),
        ({"exact": torch.ones(2, 64)}, ValueError, r"exact must be \(3, 64\) as codes, got \(2, 64\)"),
        ({"threshold": -1.0}, ValueError, "threshold must be 0 or more, got -1.0"),
        ({"threshold": math.nan}, ValueError, "got nan"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"codes": torch.ones(3, 64)}, TypeError, "codes must have dtype torch.int8"),
        ({"absmax": torch.ones(3).half()}, TypeError, "absmax must have dtype torch.float32"),
        ({"exact": torch.ones(3, 64).half()}, TypeError, "exact must have dtype torch.float32"),
        ({"x": torch.ones(64, 2).T}, ValueError, "x must be contiguous"),
        ({"codes": torch.ones(64, 3, dtype=torch.int8).T}, ValueError, "codes must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        llm_int8.llm_int8_matmul(**arguments(**changed))


class TestLayer:
    @given(products(), st.booleans())
    def test_computes_what_the_reference_does(self, product, exact):
        weight = np.random.default_rng(0).standard_normal((6, product.x.shape[1]))
        plain = torch.nn.Linear(weight.shape[1], 6, dtype=torch.float64)
        plain.weight.data.copy_(torch.from_numpy(weight))
        x = torch.from_numpy(product.x.astype(float))
        found = Int8Linear(plain, product.threshold, exact)(x[None])
        codes, absmax, _ = oracle("quantization.llm_int8").quantize_rows(weight)
        how = product.threshold, weight if exact else None
        expected = oracle("quantization.llm_int8").llm_int8_matmul(product.x, codes, absmax, *how)
        close = tolerance(np.float32, product.x.shape[1], float(x.abs().max()) * 4)  # scales are float32
        np.testing.assert_allclose(found[0].numpy(), expected + plain.bias.detach().numpy(), **close)

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("exact", [False, True])
    def test_serves_every_precision_and_any_order_of_axes(self, dtype, exact):
        plain = torch.nn.Linear(64, 6, device=DEVICE)
        x = (
            torch.from_numpy(drawn(0, 64, 6, "outliers anywhere"))
            .to(DEVICE, dtype)
            .unflatten(1, (2, 3))
            .permute(2, 1, 0)
        )
        found = Int8Linear(plain, exact=exact)(x)
        expected = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
        assert found.dtype is dtype and found.shape == (3, 2, 6) and not found.requires_grad
        difference = (found.double() - expected).norm() / expected.norm()
        assert difference < (0.03 if dtype is torch.bfloat16 else 0.02)

    def test_holds_the_librarys_weights(self):
        held = golden("quant/llm_int8")
        plain = torch.nn.Linear(128, 48)
        plain.weight.data.copy_(torch.from_numpy(held["W"]))
        found = Int8Linear(plain).weight().numpy()
        np.testing.assert_allclose(found, held["W_dequant"], rtol=1e-6)

    def test_rows_of_zeros_give_the_bias(self):
        plain = torch.nn.Linear(32, 4)
        found = Int8Linear(plain)(torch.zeros(2, 32))
        np.testing.assert_array_equal(found.numpy(), plain.bias.detach().expand(2, 4).numpy())

    @pytest.mark.parametrize("threshold", [-1.0, math.nan])
    def test_refuses_a_threshold_that_makes_no_sense(self, threshold):
        with pytest.raises(ValueError, match="threshold must be 0 or more"):
            Int8Linear(torch.nn.Linear(4, 4), threshold)

    def test_refuses_weights_that_are_not_finite(self):
        plain = torch.nn.Linear(4, 4)
        plain.weight.data[1, 2] = math.nan
        with pytest.raises(ValueError, match=r"weight must be finite in float32, columns \[2\] are not"):
            Int8Linear(plain)


class TestAbsmaxLinear:
    @pytest.mark.parametrize(("x_rows", "weight_rows"), [(False, False), (True, False), (True, True)])
    def test_rounds_to_255_values(self, x_rows, weight_rows):
        plain = torch.nn.Linear(32, 4, dtype=torch.float64)
        x = torch.from_numpy(drawn(0, 5, 32, "outlier column").astype(float))
        steps = [part.abs().amax(-1, keepdim=True) if rows else part.abs().max()
                 for part, rows in ((x, x_rows), (plain.weight.detach(), weight_rows))]  # fmt: skip
        sides = [
            torch.round(part * 127 / step) * step / 127 for part, step in zip((x, plain.weight), steps, strict=True)
        ]
        expected = sides[0] @ sides[1].T + plain.bias
        torch.testing.assert_close(
            AbsmaxLinear(plain, x_rows, weight_rows)(x), expected, **tolerance(torch.float64, 32, 60)
        )


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=64, hidden_dim=192, layers=2, heads=2)).eval()


def options(*given_: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chapter.options(parser)
    return parser.parse_args([*given_])


class TestInTheModel:
    def test_what_is_saved_is_a_plain_model_of_the_rounded_weights(self, model):
        before, tokens = copy.deepcopy(model), torch.randint(40, (3, 16))
        report = chapter.apply(model, tokens, options())
        assert set(model.state_dict()) == set(before.state_dict())
        loaded = copy.deepcopy(before)
        loaded.load_state_dict(model.state_dict())
        for name, layer in surgery.linears(loaded).items():
            codes, absmax, _ = chapter.quantize_rows(before.get_parameter(f"{name}.weight").detach().numpy())
            np.testing.assert_allclose(layer.weight.detach().numpy(), codes * (absmax / 127)[:, None], rtol=1e-6)
        assert report["a saved model has"] == "weights rounded to int8, activations not rounded"

    def test_bits_are_counted_in_the_buffers(self, model):
        layers = surgery.linears(model).values()
        scales = 32 * sum(layer.out_features for layer in layers) / sum(layer.weight.numel() for layer in layers)
        tokens = torch.randint(40, (3, 16))
        assert chapter.apply(copy.deepcopy(model), tokens, options())["bits per weight"] == pytest.approx(8 + scales)
        assert chapter.apply(model, tokens, options("--exact"))["bits per weight"] == pytest.approx(24 + scales)

    def test_outlier_columns_are_counted_per_batch(self, model):
        tokens = torch.randint(40, (chapter.BATCH + 1, 8))
        seen = [x for _, x in surgery.record_inputs(model, tokens, list(surgery.linears(model)), chapter.BATCH)]
        marked = [(x.abs() >= 1.5).flatten(0, 1).any(0) for x in seen]
        expected = sum(int(each.sum()) for each in marked) / sum(len(each) for each in marked)
        assert 0 < expected < 1 and chapter.outlier_share(model, tokens, 1.5) == pytest.approx(expected)

    def test_a_token_is_computed_differently_in_other_company(self, model):
        surgery.plant_outliers(model, 2, 8.0)
        chapter.replace_each(model, Int8Linear)
        tokens = torch.randint(40, (8, 16))
        assert not torch.equal(model(tokens)[:1], model(tokens[:1]))
        assert torch.equal(model(tokens), model(tokens))


def bench(model: Transformer) -> SimpleNamespace:
    """As much of a lab as the claim asks for."""
    kept: dict = {}
    return SimpleNamespace(
        full=False,
        seeds=(0, 1),
        model=lambda: copy.deepcopy(model),
        validation=torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0)),
        once=lambda key, compute: kept[key] if key in kept else kept.setdefault(key, compute()),
    )


class TestClaim:
    @pytest.mark.parametrize(
        ("rises", "share", "holds"),
        [
            ((9.0, 4.0, 4.0, 1.0, 0.1), 0.05, True),
            ((9.0, 4.0, 4.0, 1.0, 0.5), 0.05, False),
            ((9.0, 4.0, 4.0, 3.0, 0.1), 0.05, False),
            ((9.0, 4.0, 4.0, 1.0, 0.1), 0.2, False),
            ((9.0, 4.0, -0.1, -0.1, 0.0), 0.05, False),
        ],
    )
    def test_holds_if_the_outliers_are_few_and_all_that_matters(self, model, monkeypatch, rises, share, holds):
        makers = dict(zip(chapter.METHODS.values(), rises, strict=True))
        monkeypatch.setattr(chapter, "rise", lambda lab, seed, text, make: makers.get(make, 0.0))
        monkeypatch.setattr(chapter, "outlier_share", lambda *_: share)
        made = chapter.claim(bench(model))
        assert made.holds is holds and ("not as in the paper" in made.sentence) is not holds
        assert made.numbers["rise, LLM.int8, paper"] == rises[4] and made.figure is not None

    def test_measures_the_planted_model(self, model):
        lab = bench(model)
        assert abs(chapter.rise(lab, 0, lab.validation, lambda layer: layer)) < 1e-3
        vector, paper = (chapter.METHODS[words] for words in ("vector-wise", "LLM.int8, paper"))
        rises = [chapter.rise(lab, 0, lab.validation, make) for make in (vector, paper)]
        assert abs(rises[1]) < abs(rises[0])
