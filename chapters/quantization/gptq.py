"""GPTQ: round the weights one column at a time, and let the columns not yet rounded repair the damage.

Rounding each weight to the nearest grid value (round to nearest, RTN) keeps W, but a layer is judged by its outputs:

    minimise ‖X (W − Q)ᵀ‖²  =  Σ_rows (w − q) (XᵀX) (w − q)ᵀ        over Q on the grid

With H = 2 XᵀX, the Hessian of that loss, and H⁻¹ = UᵀU, U upper triangular, column i is rounded and its error spread:

    q_i   = round(w_i),      e = (w_i − q_i) / U_ii,      w_j ← w_j − e U_ij   for j > i

Row i of U over U_ii is what the inverse Hessian of the columns from i on says about column i: one factorisation
replaces an inverse per column, and serves all rows. Its ancestor OBQ (`obq`) rounds whichever weight of a row costs
least next, which takes in³ operations for each row.

Saves    bytes: a weight takes `bits` instead of 16, and each group of g weights in a row one 16-bit scale and one
         zero point of `bits`: bits + (16 + bits) / g per weight. Decoding, which waits for weights, gains as much.
Costs    a calibration pass, and about out·in² + in³ operations per layer, once; no training.
Paper    Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, section 3. OBQ: arXiv:2208.11580, section 5.
Follows  the authors' releases (IST-DASLab/gptq, OBC): unsigned codes, dequantized as scale * (code − zero); ties to
         even; the range always holds 0; symmetric grids are 2 absmax / (2^bits − 1) wide with zero = 2^(bits−1), so
         that their top end clips; a group's grid is fitted at its first column, to W as finished *blocks* left it.
Symbols  W `[out, in]`; X `[tokens, in]`; H, U `[in, in]`; codes `[out, in]`; scale, zero `[out, groups]`.
Kernel   kernels/quantization/gptq.py; what multiplies by the codes: kernels/quantization/weight_only.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from chapters.quantization.weight_only import Quantized, checked, dequantize, quantize_each
from minitfm import surgery
from minitfm.model import Transformer


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes, uint8; scale and zero, which holds integers, broadcast to weight. Nothing is modified.

    weight / scale is rounded first, halves to the even number, in the arguments' precision; then zero is added, and the
    sum clipped to 0 .. 2**bits − 1, however large it is.
    """
    return np.clip(np.rint(weight / scale) + zero, 0, 2**bits - 1).astype(np.uint8)


def _grid_between(low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of the grid with 2**bits values from low to high."""
    scale = (high - low) / (2**bits - 1)
    if not np.all((scale > 0) & np.isfinite(scale)):
        raise ValueError(f"weight has a range that {scale.dtype} cannot divide into {2**bits - 1} steps")
    return scale, np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.rint(-low / scale)


def find_grid(weight: np.ndarray, bits: int, symmetric=False, mse=False) -> tuple[np.ndarray, np.ndarray]:
    """Fit a grid to each row of weight `[out, n]` or `[out, groups, n]`: (scale, zero) in its dtype, without n.

    The range runs from min(row, 0) to max(row, 0). `symmetric` widens it to ±absmax where the row has a negative
    value (a row without one keeps [0, max], as released) and sets zero = 2**(bits−1). A row of zeros takes the range
    [−1, 1]. scale = range / (2**bits − 1); zero = −low / scale, rounded to an integer, ties to even.
    `mse` then tries the range shrunk at both ends by i%, i = 0 .. 79, keeping each row's first least Σ|error|^2.4.
    Weight is not modified. ValueError where a range overflows or vanishes. Source: quant.py, find_params.
    """
    low, high = np.minimum(weight.min(axis=-1), 0), np.maximum(weight.max(axis=-1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = np.where(low < 0, -high, low)
    empty = high == low
    low, high = np.where(empty, -1, low), np.where(empty, 1, high)
    scale, zero = _grid_between(low, high, bits, symmetric)
    if not mse:
        return scale, zero
    least = np.full(scale.shape, np.inf)
    for shrink in 1 - np.arange(80) / 100:
        steps, offsets = _grid_between(shrink * low, shrink * high, bits, symmetric)
        grid = steps[..., None], offsets[..., None]
        error = (np.abs(dequantize(quantize(weight, *grid, bits), *grid) - weight) ** 2.4).sum(axis=-1)
        better = error < least
        least[better], scale[better], zero[better] = error[better], steps[better], offsets[better]
    return scale, zero


def round_to_nearest(
    weight: np.ndarray, bits: int, group_size: int | None = None, symmetric: bool = False, mse: bool = False
) -> Quantized:
    """The baseline: every weight `[out, in]` to its nearest grid value; arguments and errors as in `gptq`."""
    weight, size = checked(weight, bits, group_size)
    scale, zero = find_grid(weight.reshape(len(weight), -1, size), bits, symmetric, mse)  # [out, groups]
    group = np.arange(weight.shape[1]) // size
    return Quantized(quantize(weight, scale[:, group], zero[:, group], bits), scale, zero, group, bits)


def hessian(batches: Iterable[np.ndarray]) -> np.ndarray:
    """H = 2/n Σ x xᵀ, float64 `[in, in]`, over all tokens x of batches `[sequences, tokens, in]` or `[tokens, in]`.

    n counts sequences, not tokens (a 2-D batch is one); GPTQ itself does not depend on that factor.
    Raises ValueError for no tokens and for inputs that are not finite. Source: gptq.py, add_batch.
    """
    total, sequences, tokens = np.zeros(()), 0, 0
    for batch in batches:
        x = np.asarray(batch, dtype=np.float64).reshape(-1, batch.shape[-1])  # [tokens, in]
        tokens, sequences = tokens + len(x), sequences + (len(batch) if batch.ndim == 3 else 1)
        total = total + x.T @ x
    if tokens == 0 or not np.isfinite(total).all():
        raise ValueError(f"batches must hold finite numbers and at least one token, got {tokens} tokens")
    return 2 / sequences * total


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Upper triangular U `[in, in]` with UᵀU = (H + damping · mean(diag H) · I)⁻¹: the Cholesky factor of the inverse.

    hessian, symmetric float64, is not modified. ValueError if the damped one is not positive definite, or just by
    rounding: if a squared diagonal element of its Cholesky factor is below 1e-12 of its own. Source: fasterquant.
    """
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))  # damped; the one given is let go
    try:
        if (np.diag(np.linalg.cholesky(hessian)) ** 2 < 1e-12 * np.diag(hessian)).any():  # its last digits only
            raise np.linalg.LinAlgError
        return np.linalg.cholesky(np.linalg.inv(hessian)).T
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}; raise it, use more text") from None


def checked_hessian(hessian: np.ndarray, columns: int, damping: float, block_size: int) -> np.ndarray:
    """hessian in float64, no copy; ValueError unless it is finite, symmetric, [columns, columns], the rest in range."""
    hessian = np.asarray(hessian, dtype=np.float64)
    if not 0 <= damping < np.inf or block_size < 1:
        raise ValueError(f"need 0 <= damping < inf and block_size >= 1, got damping={damping}, block_size={block_size}")
    if hessian.shape != (columns, columns) or not np.isfinite(hessian).all():
        raise ValueError(f"hessian must be finite, [in, in] = {(columns, columns)}; got shape {hessian.shape}")
    if np.abs(hessian - hessian.T).max() > 1e-4 * np.abs(hessian).max():
        raise ValueError("hessian must be symmetric")
    return hessian


def gptq(
    weight: np.ndarray, hessian: np.ndarray, bits: int, group_size: int | None = None, symmetric: bool = False,
    mse: bool = False, act_order: bool = False, static_groups: bool = False, damping: float = 0.01,
    block_size: int = 128,
) -> Quantized:  # fmt: skip
    """Quantize weight `[out, in]` so that its outputs under `hessian` `[in, in]` change little; neither is modified.

    bits            1 .. 8
    group_size      columns that share a row's grid; None: one grid per row, fitted to W before anything else
    symmetric, mse  as in `find_grid`
    act_order       round columns by falling diagonal of H, ties in their order; groups are runs of that order
    static_groups   fit the grids of groups beforehand, and then groups are neighbouring columns as they stand in W
    damping         this share of mean(diag H) is added to diag H
    block_size      columns whose errors reach later blocks in one matrix product

    Columns that no input reaches (H_jj = 0 exactly) are dead: H_jj = 1 first of all, which also decides their place in
    act_order, and their weights 0 (the grids of whole rows still see them). The grid of a group is fitted at its first
    column to W without the errors of the current block. Codes and `group_of_column` are in the order of W's columns.
    Raises ValueError for what is out of range, not finite, ill shaped, not symmetric or not positive definite when
    damped. Source: gptq.py, fasterquant.
    """
    weight, size = checked(weight, bits, group_size)
    hessian = checked_hessian(hessian, weight.shape[1], damping, block_size)
    dead = np.diag(hessian) == 0
    rest, columns = np.where(dead, 0, weight), np.arange(weight.shape[1])
    fit = partial(find_grid, bits=bits, symmetric=symmetric, mse=mse)
    scale, zero = fit((weight if group_size is None else rest).reshape(len(rest), -1, size))  # [out, groups]
    order = np.argsort(-np.diag(hessian) - dead, kind="stable") if act_order else columns
    group = (order if static_groups else columns) // size
    upper = inverse_factor((hessian + np.diag(dead))[np.ix_(order, order)], damping)
    rest, codes = rest[:, order], np.empty(weight.shape, np.uint8)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        block, errors = rest[:, start:stop].copy(), np.empty((len(rest), stop - start))
        for i in range(start, stop):
            j, g = i - start, group[i]
            if i % size == 0 and group_size is not None and not static_groups:
                scale[:, g], zero[:, g] = fit(rest[:, i : i + size])  # `rest`, not `block`: see above
            codes[:, order[i]] = code = quantize(block[:, j], scale[:, g], zero[:, g], bits)
            errors[:, j] = (block[:, j] - dequantize(code, scale[:, g], zero[:, g])) / upper[i, i]
            block[:, j:] -= np.outer(errors[:, j], upper[i, i:stop])
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantized(codes, scale, zero, group[np.argsort(order)], bits)


def obq(
    weight: np.ndarray, hessian: np.ndarray, bits: int, symmetric: bool = False, mse: bool = False, damping: float = 0
) -> Quantized:
    """Quantize weight `[out, in]` one grid per row, in each row the cheapest weight first; arguments as in `gptq`.

    With P = (damped H)⁻¹ of its own, each row, until all of it is rounded, picks j: a weight that is 0 and left;
    else, by the outlier rule, the largest (w − q)² of those left if that is above scale² / 4; else the least
    (w − q)² / P_jj of those left. q is w rounded to the grid. Then code j is fixed, the row becomes
    w − P_:j (w_j − q_j) / P_jj, and P becomes P − P_:j P_j: / P_jj. Ties: the first column. Zeros of W thus stay 0 and
    take no part. Dead columns: H_jj = 1 and weights 0 first of all, before grids are fitted. Errors as in `gptq`: a
    singular H, to whose diagonal the release adds 1, is refused. Source: trueobs.py, quantize.
    """
    w, _ = checked(weight, bits, None)
    hessian = checked_hessian(hessian, w.shape[1], damping, 1)
    dead, row, left = np.diag(hessian) == 0, np.arange(len(w)), np.ones(w.shape, bool)
    w[:, dead] = 0
    upper, codes = inverse_factor(hessian + np.diag(dead), damping), np.empty(w.shape, np.uint8)
    inverse = np.repeat((upper.T @ upper)[None], len(w), axis=0)  # [out, in, in]
    scale, zero = find_grid(w[:, None], bits, symmetric, mse)  # [out, 1]
    for _ in range(w.shape[1]):
        nearest = quantize(w, scale, zero, bits)
        error = w - dequantize(nearest, scale, zero)
        squares = np.where(left, error**2, 0)
        cost = np.divide(squares, np.einsum("rjj->rj", inverse), out=np.full(w.shape, np.inf), where=left)
        cost[left & (w == 0)] = -1
        j = cost.argmin(axis=1)
        outlier = (squares > scale**2 / 4).any(axis=1) & (w[row, j] != 0)
        j = np.where(outlier, squares.argmax(axis=1), j)
        codes[row, j], left[row, j] = nearest[row, j], False
        spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
        w -= spread * error[row, j][:, None]
        inverse -= spread[:, :, None] * inverse[row, j][:, None, :]
    return Quantized(codes, scale, zero, np.zeros(w.shape[1], int), bits)


def stages(model: Transformer, true_sequential: bool) -> list[list[str]]:
    """Linear layers that are quantized together, from the same inputs: blocks, or the steps within blocks."""

    def stage(name: str) -> tuple:
        block, _, layer = name.rpartition(".")
        return (block, layer in ("o_proj", "down_proj")) if true_sequential else tuple(name.split(".")[:2])

    return [list(names) for _, names in groupby(surgery.linears(model), stage)]


def hessians(model: Transformer, tokens: Tensor, names: list[str]) -> dict[str, np.ndarray]:
    """`hessian` of the inputs of each named layer, streamed: no more than a batch of activations is ever held."""
    totals: dict[str, Tensor] = {}
    for name, x in surgery.record_inputs(model, tokens, names):
        x = x.flatten(0, 1).double()  # [tokens, in]
        totals.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x, alpha=2 / len(tokens))
    return {name: total.cpu().numpy() for name, total in totals.items()}


def solve(weight: Tensor, statistics: np.ndarray, bits: int, **options) -> Quantized:
    """`gptq` of a layer's weight, options as there: by the reference, or on CUDA in float64 by the kernel."""
    if not weight.is_cuda:
        return gptq(weight.numpy(force=True), statistics, bits, **options)
    from kernels.quantization.gptq import gptq as kernel

    found = kernel(weight.double(), torch.from_numpy(statistics).to(weight.device), bits, **options)
    codes, scale, zero, group = (part.numpy(force=True) for part in found)
    return Quantized(codes, scale, zero, group, bits)


@torch.no_grad()
def quantize_model(
    model: Transformer, tokens: Tensor, bits: int, true_sequential: bool = False, **options
) -> dict[str, Quantized]:
    """Give the linear layers of the blocks, in place, the values that `gptq` with `options` leaves them; returns all.

    tokens `[N, T]` are calibration text. Each block sees what comes through the quantized blocks before it; with
    `true_sequential` a layer also sees those before it in its block. ValueError for no tokens and as in `gptq`.
    """
    layers, done = surgery.linears(model), {}
    for names in stages(model, true_sequential):
        found = hessians(model, tokens, names)
        for name in names:
            done[name] = solve(layers[name].weight, found.pop(name), bits, **options)  # a Hessian is large: let it go
            layers[name].weight.copy_(torch.from_numpy(done[name].dequantize()))
    return done


def round_model(model: Transformer, bits: int, **options) -> dict[str, Quantized]:
    """The baseline: as `quantize_model`, by `round_to_nearest` with its options, without calibration."""
    return quantize_each(model, partial(round_to_nearest, bits=bits, **options))


FLAGS = {
    "symmetric": "zero point in the middle of the grid", "mse": "shrink ranges to the least error",
    "act_order": "columns with large inputs first", "static_groups": "with act-order, groups of neighbouring columns",
    "true_sequential": "calibrate each layer after the ones before it in its block",
}  # fmt: skip


def options(parser) -> None:
    """Options of `python -m chapters run gptq`."""
    parser.add_argument("--bits", type=int, default=4, help="1 to 8 (default 4)")
    parser.add_argument("--group-size", type=int, metavar="G", help="columns that share a grid (default: whole rows)")
    parser.add_argument("--damping", type=float, default=0.01, help="share of the mean diagonal (default 0.01)")
    for name, purpose in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=purpose)


def apply(model: Transformer, tokens: Tensor, args) -> dict[str, float | str]:
    """Quantize `model` in place as `options` asked; the figures that `python -m chapters run gptq` prints."""
    chosen = {name: getattr(args, name) for name in ("bits", "group_size", "damping", *FLAGS)}
    done = quantize_model(model, tokens, **chosen).values()
    sizes = [held.codes.size for held in done]
    return {"bits per weight": float(np.average([held.bits_per_weight() for held in done], weights=sizes))}


GRIDS = {None: "per row", 32: "in groups of 32"}
ROLES = {("RTN", None): "baseline", ("GPTQ", None): "method", ("RTN", 32): "third", ("GPTQ", 32): "second"}


def perplexities(lab: Lab, method: str, group_size: int | None, bits: int, planted=False, **options) -> list[float]:
    """Perplexity: one for RTN, for GPTQ one per calibration text; `planted`: four input channels 16 times as large."""
    found = []
    for seed in lab.seeds if method == "GPTQ" else [0]:
        model = lab.model()
        if planted:
            surgery.plant_outliers(model, channels=4, factor=16)
        if method == "RTN":
            round_model(model, bits, group_size=group_size)
        else:
            tokens = lab.calibration(seed, 128 if lab.full else 32)
            quantize_model(model, tokens, bits, group_size=group_size, **options)
        found.append(lab.perplexity(model))
    return found


def picture(means: dict[tuple, float], base: float, widths: tuple[int, ...]) -> Figure:
    """Perplexity over bits, for each method and grid."""
    fig, axes = figure()
    for key, role in ROLES.items():
        axes.plot(widths, [means[*key, bits] for bits in widths], **series(role), label=f"{key[0]} {GRIDS[key[1]]}")
    axes.axhline(base, **series("reference"), label="full precision")
    axes.set(xlabel="bits per code", ylabel="perplexity", yscale="log", xticks=widths)
    axes.yaxis.set(major_formatter="{x:.0f}", minor_formatter="{x:.0f}")
    legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """At 3 bits GPTQ loses less than RTN, whatever grid and text; in full also: act-order helps against outliers."""
    base, widths = lab.base_perplexity, (2, 3, 4)
    found = {(*key, bits): perplexities(lab, *key, bits=bits) for key in ROLES for bits in widths}
    holds = all(max(found["GPTQ", grid, 3]) < found["RTN", grid, 3][0] for grid in GRIDS)
    rise = {key: float(np.mean(values)) - base for key, values in found.items()}
    pairs = [f"{rise['GPTQ', grid, 3]:.2f} against {rise['RTN', grid, 3]:.2f} {words}" for grid, words in GRIDS.items()]
    sentence = f"At 3 bits GPTQ {'loses' if holds else 'does not lose'} less than rounding to nearest: "
    sentence += f"perplexity {base:.2f} rises by {' and '.join(pairs)}"
    numbers = {"perplexity, full precision": base}
    numbers |= {f"rise, {method} {bits} bits {GRIDS[grid]}": value for (method, grid, bits), value in rise.items()}
    if lab.full:
        plain, ordered = (perplexities(lab, "GPTQ", None, 3, planted=True, act_order=order) for order in (False, True))
        holds = holds and all(better < worse for better, worse in zip(ordered, plain, strict=True))
        after, before = (float(np.mean(values)) - base for values in (ordered, plain))
        sentence += f"; with outlier channels planted by {after:.2f} in act-order against {before:.2f} without it"
        numbers |= {"rise, GPTQ 3 bits, outliers": before, "rise, GPTQ 3 bits, outliers, act-order": after}
    fig = picture({key: base + value for key, value in rise.items()}, base, widths)
    return Claim(sentence + ".", holds, numbers, fig, f"all blocks, asymmetric grids, calibration seeds {lab.seeds}")
