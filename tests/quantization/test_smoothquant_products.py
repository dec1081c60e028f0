"""Around SmoothQuant's exercises: the reference of the W8A8 product, the kernel's wrapper, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization.smoothquant import absmax_scale, fold, quantize, smoothing_scale, w8a8_matmul
from tests.conftest import KERNEL_DTYPES, golden, kernel, tolerance
from tests.quantization.smoothing import COLUMNS, SEEDS, TILE, drawn, reference

smoothquant = kernel("quantization.smoothquant")


def normed(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The inputs of the golden layers: LayerNorm of h."""
    h, gain, bias = (torch.from_numpy(arrays[name].astype(np.float32)) for name in ("h", "ln_weight", "ln_bias"))
    return torch.nn.functional.layer_norm(h, h.shape[1:], gain, bias, float(arrays["ln_eps"])).numpy()


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        smoothing_scale(np.ones(1), [np.ones((1, 1))], 2)
    with pytest.raises(ValueError, match=r"readers must be \[out, 2\] each, got \[\(1, 3\)\]"):
        smoothing_scale(np.ones(2), [np.ones((1, 3))], 0.5)
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got 0.0 to 1.0"):
        fold([np.ones(2)], [], np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"x must be a non-empty \[rows, columns\] matrix, got shape \(0, 3\)"):
        absmax_scale(np.ones((0, 3)), True)
    with pytest.raises(ValueError, match=r"scale must be \[rows\] or \[1\] for x \(3, 2\), got \(2,\)"):
        quantize(np.ones((3, 2)), np.ones(2))
    codes, one = np.ones((2, 3), np.int8), np.ones(1)
    with pytest.raises(TypeError, match="must be int8, got int8 and int64"):
        w8a8_matmul(codes, codes.astype(np.int64), one, one)
    with pytest.raises(ValueError, match=r"do not fit: \(2, 3\), \(2, 3\), \(3,\), \(1,\)"):
        w8a8_matmul(codes, codes, np.ones(3), one)


def drawn_codes(seed: int, rows: int, columns: int) -> np.ndarray:
    """All 256 codes, −128 among them, which static scales give."""
    return np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)


class TestProduct:
    @given(SEEDS, st.integers(1, 4), st.integers(1, 4), COLUMNS, st.booleans(), st.booleans())
    def test_scales_exact_sums(self, seed, tokens, rows, columns, per_token, per_channel):
        x, weight = drawn_codes(seed, tokens, columns), drawn_codes(seed + 1, rows, columns)
        rng = np.random.default_rng(seed)
        x_scale, weight_scale = rng.uniform(0.01, 0.1, tokens), rng.uniform(0.01, 0.1, rows)
        found = w8a8_matmul(x, weight, x_scale[: None if per_token else 1], weight_scale[: None if per_channel else 1])
        for m, n in np.ndindex(tokens, rows):
            total = sum(int(a) * int(b) for a, b in zip(x[m], weight[n], strict=True))
            expected = total * x_scale[m * per_token] * weight_scale[n * per_channel]
            np.testing.assert_allclose(found[m, n], expected, **tolerance(np.float64, scale=abs(expected)))

    @pytest.mark.parametrize("alpha", [0.25, 0.75, 1.0])
    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("per_token", [False, True])
    def test_errs_as_much_as_the_authors(self, alpha, per_channel, per_token):
        arrays = golden("quant/smoothquant")
        readers = [arrays[f"W{i}"].astype(np.float32) for i in range(3)]
        scale = smoothing_scale(arrays["act_scales"], readers, alpha)
        x, weight = (part.astype(np.float32) for part in (normed(arrays) / scale, readers[0] * scale))
        scales = absmax_scale(x, per_token), absmax_scale(weight, per_channel)
        codes = [quantize(part, each) for part, each in zip((x, weight), scales, strict=True)]
        found = np.mean((w8a8_matmul(*codes, *scales) + arrays["b0"] - arrays["y_fp0"]) ** 2)
        words = "per_channel" if per_channel else "per_tensor", "per_token" if per_token else "per_tensor"
        np.testing.assert_allclose(
            found, arrays[f"a{alpha}/w8a8/{words[0]}/{words[1]}/mse"], **tolerance(np.float32, scale=0.0)
        )


@pytest.mark.kernel
class TestWrapper:
    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    @pytest.mark.parametrize(("M", "N"), [(1, 40), (20, 3), (70, 5)])
    def test_its_own_configuration_serves_any_shape(self, M, N, dtype):
        parts = drawn(2, M, N, 80)
        found = smoothquant.w8a8_matmul(*parts, dtype)
        close = tolerance(dtype, 80, scale=128**2 * 0.02**2)
        np.testing.assert_allclose(found.double().cpu().numpy(), reference(*parts), **close)

    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 512, 5000])
    def test_configurations_fill_a_gpu_and_fit_its_memory(self, M, wide, monkeypatch):
        monkeypatch.setattr(smoothquant, "has_warpgroup_products", lambda: wide)
        for N in (1, 4096, 11008):
            chosen = smoothquant.configuration(M, N, 4096)
            assert all(value & (value - 1) == 0 for name, value in chosen.items() if name != "stages")
            stage = (chosen["block_m"] + chosen["block_n"]) * chosen["block_k"]
            assert chosen["stages"] * stage <= (227 if wide else 163) * 1024
            programs = -(-M // chosen["block_m"]) * -(-N // chosen["block_n"])
            assert N < 4096 or programs >= 120

    def test_plain_torch_computes_the_same(self):
        parts = drawn(3, 20, 8, 64)
        args = *parts, torch.float32
        expected = smoothquant.w8a8_matmul(*args, **TILE)
        torch.testing.assert_close(smoothquant.dense(*args), expected, **tolerance(torch.float32, 64))
        torch.testing.assert_close(smoothquant.scaled_int_mm(*args), expected, **tolerance(torch.float32, 64))
        x, weight = (part.float() for part in smoothquant.dense_arguments(*args))
        torch.testing.assert_close(x @ weight.T, expected, **tolerance(torch.bfloat16, 64))


def arguments(**changed) -> dict:
    codes = {name: torch.zeros(rows, 32, dtype=torch.int8) for name, rows in (("x", 2), ("weight", 3))}
    return codes | {"x_scale": torch.ones(2), "weight_scale": torch.ones(1)} | changed


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.zeros(32, dtype=torch.int8)}, ValueError, "must be matrices, got 1 and 2 axes"),
        ({"x": torch.zeros(0, 32, dtype=torch.int8)}, ValueError, "must not be empty"),
        ({"x": torch.zeros(2, 31, dtype=torch.int8)}, ValueError, r"weight must be \[N, K\] with K=31, got \(3, 32\)"),
        ({"x_scale": torch.ones(3)}, ValueError, r"x_scale must be \[2\] or \[1\], got \(3,\)"),
        ({"weight_scale": torch.ones(3, 1)}, ValueError, r"weight_scale must be \[3\] or \[1\], got \(3, 1\)"),
        ({"x": torch.zeros(2, 32)}, TypeError, "x must have dtype torch.int8, got torch.float32"),
        ({"x_scale": torch.ones(2).double()}, TypeError, "x_scale must have dtype torch.float32"),
        ({"dtype": torch.int32}, TypeError, "dtype must be torch.float16 or .*, got torch.int32"),
        ({"weight": torch.zeros(32, 3, dtype=torch.int8).T}, ValueError, "weight must be contiguous"),
        (
            {name: torch.zeros(1, 131072, dtype=torch.int8) for name in ("x", "weight")} | {"x_scale": torch.ones(1)},
            ValueError,
            "K must be below 131072, for sums to fit int32, got 131072",
        ),
        (
            {name: torch.zeros(1, 24, dtype=torch.int8) for name in ("x", "weight")} | {"x_scale": torch.ones(1)}
            | {"bulk": True},
            ValueError,
            "bulk loads need 16-byte alignment and K=24 divisible by 16",
        ),
    ],
)  # fmt: skip
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        smoothquant.w8a8_matmul(**arguments(**changed))
