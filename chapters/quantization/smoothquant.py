"""SmoothQuant: divide what activations find hard to round by a number per channel, and multiply the weights by it.

A few channels of a large model's activations are a hundred times larger than the rest. A grid of 8 bits wide enough
for them leaves the others a handful of values; weights have no such channels. Since a norm multiplies each channel by
a gain before the linear layers read it, the channel can be scaled there and scaled back in their columns, for free:

    s_j = max|X_j|^α / max|W_j|^(1−α)                    X_j: channel j over calibration tokens; W_j: column j
    gain_j ← gain_j / s_j,    W_j ← W_j · s_j            X Wᵀ stays, and both factors fit an int8 grid

W_j is the column of all layers that read the norm: q, k and v share one s, gate and up another. What o_proj and
down_proj read has no norm before it and stays as it is. Then weights and activations are rounded to int8 (W8A8):

    scale = absmax / 127,    code = round(x / scale),    y = (Σ code_x · code_w) · scale_x · scale_w

Saves    bytes and time: int8 weights take half of 16 bits, and tensor cores do twice the int8 products. Smoothing
         costs nothing at run time.
Costs    a calibration pass. Rounding activations is one more pass over them; static scales (O3) need no maximum.
Paper    Xiao, Lin, Seznec, Wu, Demouth, Han 2022, arXiv:2211.10438, section 4; the levels O1 to O3 are its table 2.
Follows  the authors' release (mit-han-lab/smoothquant): absmax, column maxima and s are at least 1e-5; s is not
         normalised; ties round to even. Activations are scaled per token (O1) or per tensor (O2), as they come, or per
         tensor by the calibration text (O3), where what is larger clips to −128 and 127. Weights: per tensor.
Symbols  X `[tokens, in]`; W `[out, in]`; s, gain `[in]`; scale `[rows]`, or `[1]` for the whole matrix.
Kernel   kernels/quantization/smoothquant.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import figure, series
from chapters.lab import Lab
from minitfm import surgery
from minitfm.model import Transformer

LEAST = 1e-5  # no absmax, no column maximum and no s is smaller: zeros have a grid, too
LEVELS = {"O1": "dynamic, per token", "O2": "dynamic, per tensor", "O3": "static, per tensor"}  # scales of activations


def smoothing_scale(act_max: np.ndarray, readers: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """s = act_max^alpha / weight_max^(1 − alpha), computed in float64, `[in]`.

    act_max `[in]` holds the largest |activation| of each channel; readers are the weights `[out, in]` of all layers
    that read them, and weight_max the largest |weight| of a column in any of them. weight_max and s are at least 1e-5.
    Raises ValueError for alpha outside 0 .. 1, for no reader, for shapes that do not fit, for values that are not
    finite and for a negative act_max. Source: smooth.py, smooth_ln_fcs.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if not len(readers) or act_max.ndim != 1 or any(w.ndim != 2 or w.shape[1] != len(act_max) for w in readers):
        raise ValueError(f"readers must be [out, {act_max.size}] each, got {[w.shape for w in readers]}")
    if not (np.isfinite(act_max).all() and (act_max >= 0).all() and all(np.isfinite(w).all() for w in readers)):
        raise ValueError("act_max and readers must be finite, and act_max not negative")
    weight_max = np.max([np.abs(w).max(axis=0) for w in readers], axis=0).astype(np.float64)  # [in]
    return np.maximum(act_max.astype(np.float64) ** alpha / np.maximum(weight_max, LEAST) ** (1 - alpha), LEAST)


def fold(
    norm: Sequence[np.ndarray], readers: Sequence[np.ndarray], scale: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divide the norm's vectors by the scale and multiply the readers' columns by it: (norm, readers), both new.

    norm: the vectors `[in]` that a norm ends with, its gain and, if it has one, its bias. readers `[out, in]`.
    The function that they compute together stays the same. Raises ValueError unless scale `[in]` is positive and
    finite and fits all of them.
    """
    if any(part.shape[-1:] != scale.shape for part in (*norm, *readers)):
        raise ValueError(f"norm and readers must have {scale.size} channels, as scale has")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.min()} to {scale.max()}")
    return [vector / scale for vector in norm], [weight * scale for weight in readers]


def absmax_scale(x: np.ndarray, per_row: bool) -> np.ndarray:
    """The step of an int8 grid that just holds x `[rows, columns]`: absmax / 127, `[rows]`, or `[1]` for all of x.

    An absmax below 1e-5 counts as 1e-5. In the precision of x, float16 as float32. Raises ValueError for an x that is
    no matrix, is empty or not finite. Source: fake_quant.py.
    """
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must be a non-empty [rows, columns] matrix, got shape {x.shape}")
    x = x.astype(np.promote_types(x.dtype, np.float32))
    absmax = np.abs(x).max(axis=1) if per_row else np.abs(x).max(keepdims=True)[0]
    if not np.isfinite(absmax).all():
        raise ValueError("x must be finite")
    return np.maximum(absmax, x.dtype.type(LEAST)) / x.dtype.type(127)


def quantize(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale, rounded to the nearest integer, halves to the even one, and clipped to −128 .. 127: int8.

    x `[rows, columns]`; scale `[rows]` or `[1]` (static scales may clip, those of x itself do not). In the precision
    of x, float16 as float32, into which scale is rounded first. Raises ValueError unless x is finite, scale so rounded
    positive and finite, and the shapes fit.
    """
    if x.ndim != 2 or scale.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"scale must be [rows] or [1] for x {x.shape}, got {scale.shape}")
    x = x.astype(np.promote_types(x.dtype, np.float32))
    with np.errstate(over="ignore"):  # infinity clips, too
        scale = scale.astype(x.dtype)
        if not (np.isfinite(x).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"x must be finite, and scale positive and finite in {x.dtype}")
        steps = x / scale[:, None]
    return np.rint(steps).clip(-128, 127).astype(np.int8)


def w8a8_matmul(x: np.ndarray, weight: np.ndarray, x_scale: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """Codes x `[tokens, in]` times the transpose of codes weight `[out, in]`, both int8, scaled: float64.

    x_scale `[tokens]` or `[1]`, weight_scale `[out]` or `[1]`. The sums of products are exact integers; they are
    scaled at the end, in which each has one scale of its token and one of its channel. The kernel's reference.
    Raises ValueError if the shapes do not fit together, TypeError for codes that are not int8.
    """
    if x.dtype != np.int8 or weight.dtype != np.int8:
        raise TypeError(f"x and weight must be int8, got {x.dtype} and {weight.dtype}")
    fitting = x_scale.shape in ((1,), x.shape[:1]) and weight_scale.shape in ((1,), weight.shape[:1])
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not fitting:
        shapes = ", ".join(str(part.shape) for part in (x, weight, x_scale, weight_scale))
        raise ValueError(f"x, weight, x_scale, weight_scale do not fit: {shapes}")
    sums = x.astype(np.float64) @ weight.astype(np.float64).T  # whole numbers far below 2^53
    return sums * x_scale.astype(np.float64)[:, None] * weight_scale.astype(np.float64)


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor for NumPy, which has no bfloat16: in float32, float64 stays."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


class W8A8Linear(nn.Module):
    """A linear layer in int8: rounds its input x `[..., in]`, multiplies codes, scales: `[..., out]`. Not trained.

    It holds codes `[out, in]` and scales only, but its `state_dict` is that of the plain layer with the rounded
    weights, so that a model of such layers is saved under plain names. How activations are rounded is not saved.
    """

    def __init__(
        self, layer: nn.Linear, per_token: bool = True, per_channel: bool = False, x_max: float | None = None
    ) -> None:
        """Round the weights of `layer`, per tensor or per output channel.

        Activations are scaled per token or all of a call together; with x_max by x_max / 127 whatever comes (static).
        """
        super().__init__()
        weight = as_array(layer.weight)
        scale = absmax_scale(weight, per_channel).astype(np.float32)
        self.codes = nn.Buffer(torch.from_numpy(quantize(weight, scale)).to(layer.weight.device))
        self.scale = nn.Buffer(torch.from_numpy(scale).to(layer.weight.device))
        static = None if x_max is None else torch.tensor([max(x_max, LEAST) / 127], device=layer.weight.device)
        self.x_scale = None if static is None else nn.Buffer(static)
        self.bias, self.per_token, self.dtype = layer.bias, per_token, layer.weight.dtype

    def weight(self) -> Tensor:
        """The rounded weights `[out, in]`, in the dtype of the layer that this one replaced."""
        return (self.codes * self.scale[:, None]).to(self.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, still in floating point, and scale of x `[tokens, in]`."""
        scale = self.x_scale
        if scale is None:
            absmax = x.abs().amax(dim=1) if self.per_token else x.abs().amax().reshape(1)
            scale = absmax.clamp(min=LEAST) / 127
        return (x / scale[:, None]).round().clamp(-128, 127), scale

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x, finite, in any floating dtype; the result has the same."""
        codes, x_scale = self.rounded(x.reshape(-1, x.shape[-1]).float())
        if x.is_cuda and x.dtype is not torch.float64:
            from kernels.quantization.smoothquant import w8a8_matmul as kernel

            out = kernel(codes.to(torch.int8), self.codes, x_scale, self.scale, x.dtype)
        else:  # the sum of 1024 products of int8 is exact in float32
            exact = torch.float32 if x.shape[-1] <= 1024 else torch.float64
            sums = F.linear(codes.to(exact), self.codes.to(exact))
            out = (sums * x_scale[:, None] * self.scale).to(x.dtype)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(x.dtype)


def input_maxima(model: Transformer, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Largest |input| of each channel, `[in]`, of the named layers over all tokens `[N, T]`, streamed."""
    found: dict[str, Tensor] = {}
    for name, x in surgery.record_inputs(model, tokens, names):
        largest = x.abs().amax(dim=(0, 1))
        found[name] = torch.maximum(found.get(name, largest), largest)
    return found


@torch.no_grad()
def smooth_model(model: Transformer, tokens: Tensor, alpha: float = 0.5) -> dict[str, np.ndarray]:
    """Smooth what every block norm's readers read, in place; the function stays the same. Returns each norm's s."""
    readers = surgery.norm_readers(model)
    maxima = input_maxima(model, tokens, [names[0] for names in readers.values()])
    done = {}
    for norm, names in readers.items():
        parameters = [model.get_parameter(f"{name}.weight") for name in (norm, *names)]
        gain, *weights = map(as_array, parameters)
        done[norm] = smoothing_scale(as_array(maxima[names[0]]), weights, alpha)
        folded, columns = fold([gain], weights, done[norm])
        for parameter, value in zip(parameters, folded + columns, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return done


def quantize_model(
    model: Transformer, tokens: Tensor, level: str = "O1", per_channel: bool = False
) -> dict[str, W8A8Linear]:
    """Put a `W8A8Linear` in the place of every linear layer of the blocks; returns them by name.

    level is one of LEVELS; only O3 reads the calibration tokens `[N, T]`, whose maxima become its scales.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    layers = surgery.linears(model)
    maxima = input_maxima(model, tokens, list(layers)) if level == "O3" else {}
    done = {}
    for name, layer in layers.items():
        x_max = maxima[name].max().item() if name in maxima else None
        done[name] = W8A8Linear(layer, level == "O1", per_channel, x_max)
        surgery.replace(model, name, done[name])
    return done


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run smoothquant`."""
    parser.add_argument("--alpha", type=float, default=0.5, help="how much moves to the weights, 0 to 1 (default 0.5)")
    parser.add_argument("--level", choices=LEVELS, default="O1", help="scales of activations (default O1: per token)")
    parser.add_argument("--per-channel", action="store_true", help="a weight scale per output channel, not per tensor")
    parser.add_argument("--no-smoothing", action="store_true", help="round only: the baseline")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Smooth and round `model` in place; it then rounds its activations, too, which a saved file cannot say."""
    if not args.no_smoothing:
        smooth_model(model, tokens, args.alpha)
    done = quantize_model(model, tokens, args.level, args.per_channel).values()
    held = sum(layer.codes.nbytes + layer.scale.nbytes for layer in done)
    return {
        "bits per weight": 8 * held / sum(layer.codes.numel() for layer in done),
        "activations": f"int8, scales {LEVELS[args.level]}; a saved model does not round them",
    }


@torch.no_grad()
def output_error(model: Transformer, tokens: Tensor) -> float:
    """Relative error that O2 makes in the output of a layer behind a norm: root mean square over those layers."""
    layers, names = surgery.linears(model), [name for each in surgery.norm_readers(model).values() for name in each]
    rounded = {name: W8A8Linear(layers[name], per_token=False) for name in names}
    wrong, total = ({name: 0.0 for name in names} for _ in range(2))
    for name, x in surgery.record_inputs(model, tokens, names):
        exact = layers[name](x)
        wrong[name] += (rounded[name](x) - exact).pow(2).sum().item()
        total[name] += exact.pow(2).sum().item()
    return float(np.sqrt(np.mean([wrong[name] / total[name] for name in names])))


def prepared(lab: Lab, seed: int, alpha: float | None) -> tuple[Transformer, Tensor]:
    """The model with two planted outlier channels, smoothed unless alpha is None, and its calibration text."""
    model, tokens = lab.model(), lab.calibration(seed, 32)
    surgery.plant_outliers(model, channels=2, factor=100, seed=seed)
    if alpha is not None:
        smooth_model(model, tokens, alpha)
    return model, tokens


def measure(lab: Lab, level: str, alpha: float | None) -> list[float]:
    """Rise of perplexity by W8A8 at a level, for each seed of channels and calibration text."""
    found = []
    for seed in lab.seeds:
        model, tokens = prepared(lab, seed, alpha)
        quantize_model(model, tokens, level)
        found.append(lab.perplexity(model) - lab.base_perplexity)
    return found


def picture(errors: dict[float, float], naive: float) -> Figure:
    """The sweep over alpha, and in words where it would stand without smoothing."""
    fig, axes = figure()
    percent = [100 * error for error in errors.values()]
    axes.plot(list(errors), percent, **series("method"))
    axes.set(xlabel="α", ylabel="error of a layer's output, %", ylim=(0, 1.15 * max(percent)))
    axes.text(0.5, 0.06, f"not smoothed: {100 * naive:.0f}%", transform=axes.transAxes, ha="center")
    return fig


def claim(lab: Lab) -> Claim:
    """Outlier channels break W8A8 per tensor; smoothed at α = 0.5 it holds, in the valley of the sweep over α."""
    naive, smooth = ({level: measure(lab, level, alpha) for level in LEVELS} for alpha in (None, 0.5))
    alphas = np.linspace(0, 1, 9 if lab.full else 5).tolist()
    errors = {a: [output_error(prepared(lab, s, a)[0], lab.validation[:16]) for s in lab.seeds] for a in alphas}
    unsmoothed = float(np.mean([output_error(prepared(lab, s, None)[0], lab.validation[:16]) for s in lab.seeds]))
    mean = {alpha: float(np.mean(values)) for alpha, values in errors.items()}
    best = min(mean, key=mean.__getitem__)
    valley = all(1.1 * min(each[1:-1]) < min(each[0], each[-1]) for each in zip(*errors.values(), strict=True))
    repaired = all(min(naive[level]) > 10 * max(map(abs, smooth[level])) for level in ("O2", "O3"))
    rise = {way: {level: np.mean(of[level]) for level in LEVELS} for way, of in (("naive", naive), ("smooth", smooth))}
    sentence = (
        f"With two planted outlier channels, W8A8 per tensor raises perplexity {lab.base_perplexity:.2f} by "
        f"{rise['naive']['O2']:.3g}, smoothed at α = 0.5 by {rise['smooth']['O2']:.2g}; the error of the smoothed "
        f"layers is least at α = {best:g}, {mean[0] / mean[best]:.2f} times that at 0 and "
        f"{mean[1] / mean[best]:.2f} times at 1{'' if valley else ': no valley'}."
    )
    numbers = {"perplexity, full precision": lab.base_perplexity, "output error, not smoothed": unsmoothed}
    numbers |= {f"rise, {way}, {level}": float(value) for way, of in rise.items() for level, value in of.items()}
    numbers |= {f"output error, α = {alpha:g}": value for alpha, value in mean.items()}
    setting = (  # s is proportional to what was planted, whatever alpha: only the model's own unevenness is left
        "2 channels × 100 planted behind every norm, which smoothing undoes at any α; all block linears in W8A8; "
        f"sweep at O2; seeds {lab.seeds}"
    )
    return Claim(sentence, valley and repaired, numbers, picture(mean, unsmoothed), setting)
