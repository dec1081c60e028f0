"""Mixed precision: give many bits to the layers where rounding hurts, and few to those where it does not.

    loss(W + ΔW)  ≈  loss(W) + ½ ΔWᵀ H ΔW        H: second derivatives of the loss by the weights of one layer
    cost[layer, bits]  =  curvature(H) · ‖Q_bits(W) − W‖²

The gradient of a trained model is about zero, so its curvature says what rounding a layer costs. H has as many rows as
the layer has weights and is never formed: a product H v costs one more backward pass. Two numbers need no more:

    λ      the eigenvalue of largest magnitude, by power iteration; over shards of the data Ω = |mean λ| + std λ
    tr H   the mean of vᵀ H v over random signs v (Hutchinson); divided by the weights, the mean of all eigenvalues

Bits then are an exact choice: the least total cost whose total size is within the budget. Activations have no size to
save in memory, but one grid per tensor breaks where a few channels are wide: those tensors are held in 16 bits.

Saves    bytes: with a mean of b bits and grids for groups of g, b + 24 / g of 16 bits a weight, as in weight_only; at
         equal size less perplexity than equal bits.
Costs    some hundred backward passes, once, and a product with layers of several widths.
Paper    Shen et al. 2019 (Q-BERT), arXiv:1909.05840; Dong et al. 2020 (HAWQ-v2), arXiv:1911.03852; for activations
         Bondarenko, Nagel, Blankevoort 2021, arXiv:2109.12948.
Follows  HAWQ-v2's cost and budget. Q-BERT sorts layers by Ω and picks bits by hand; here its Ω takes the place of the
         trace in the same cost. PyHessian, the released power iteration, stops when an estimate changes by less than a
         share of 1e-3: on a plateau, too. Here ‖H v − λ v‖ must be small, which it is at eigenvectors only. Which
         activations get 16 bits is found as Bondarenko et al. look for the cause: each alone is rounded.
Symbols  v `[weights of a layer]`; cost `[layers, choices]`; packed int32 `[words]`; table `[layers + 1, 4]`.
Kernel   kernels/quantization/mixed_precision.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.quantization.weight_only import nearest_codes
from chapters.shared.packed_layers import PackedLayers, dequantize_layers, pack_layers
from chapters.shared.static_inputs import activations, most_hurt, round_activations
from minitfm import evaluate, surgery
from minitfm.model import Transformer

Product = Callable[[np.ndarray], np.ndarray]  # v -> H v, both float64 [size]
SENSITIVITIES = ("trace", "eigenvalue", "error")


def power_iteration(
    product: Product, start: np.ndarray, known: Sequence[np.ndarray] = (), tolerance: float = 1e-3, limit: int = 10_000
) -> tuple[float, np.ndarray, float]:
    """The eigenvalue of largest magnitude of a symmetric H, which may be negative: (λ, v, residual).

    Begins with start `[size]`, of any length but 0. v becomes H v, of length 1, until ‖H v − λ v‖ <= tolerance · ‖H v‖
    with λ = vᵀ H v, or after `limit` products. Returned are the last λ, the v of length 1 that it belongs to, and
    ‖H v − λ v‖ / ‖H v‖ (0 where H v = 0). All stays orthogonal to `known` vectors, which are orthonormal: given the
    first eigenvectors, the next is found. Raises ValueError for a start that is zero beside `known` or not finite, for
    products that are not finite, and for a limit below 1. Source: PyHessian, hessian.eigenvalues, but for how it ends.
    """
    turned = without(start, known)
    if limit < 1 or not 0 < np.linalg.norm(turned) < np.inf:
        raise ValueError(f"need limit >= 1, and a start that is finite and not zero beside known; got {limit=}")
    v, value, residual = turned, 0.0, np.inf
    for _ in range(limit):
        v = turned / np.linalg.norm(turned)
        turned = without(product(v), known)
        length = float(np.linalg.norm(turned))
        if not np.isfinite(length):
            raise ValueError("product gave numbers that are not finite")
        value = float(v @ turned)
        residual = float(np.linalg.norm(turned - value * v)) / length if length else 0.0
        if residual <= tolerance:
            break
    return value, v, residual


def without(v: np.ndarray, known: Sequence[np.ndarray]) -> np.ndarray:
    """v less its parts along the known vectors, float64."""
    v = np.asarray(v, dtype=np.float64)
    for other in known:
        v = v - (v @ other) * other
    return v


def released_eigenvalue(product: Product, start: np.ndarray, tolerance: float = 1e-3, limit: int = 100) -> float:
    """PyHessian's rule, to be compared: ends when λ changes by less than this share, even if v is no eigenvector."""
    v, before = start / np.linalg.norm(start), np.inf
    for _ in range(limit):
        turned = product(v)
        value = float(v @ turned)
        if abs(value - before) < tolerance * (abs(value) + 1e-6):
            break
        v, before = turned / (np.linalg.norm(turned) + 1e-6), value
    return value


def hutchinson(product: Product, size: int, probes: int, seed: int = 0) -> np.ndarray:
    """Unbiased estimates of the trace of H, float64 `[probes]`: vᵀ H v for vectors v of random signs, each ±1.

    Their mean is the estimate; their variance is 2 Σ_{i≠j} H_ij², so that a diagonal H has none. product takes v
    `[size]`. Raises ValueError for a size or a number of probes below 1. Source: PyHessian, hessian.trace.
    """
    if size < 1 or probes < 1:
        raise ValueError(f"size and probes must be at least 1, got {size} and {probes}")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(probes, size))
    return np.array([v @ product(v) for v in signs])


def spread_sensitivity(eigenvalues: np.ndarray) -> np.ndarray:
    """Q-BERT's Ω = |mean| + standard deviation over the shards, of top eigenvalues `[shards, layers]`: `[layers]`."""
    return np.abs(eigenvalues.mean(axis=0)) + eigenvalues.std(axis=0)


def assign_bits(cost: np.ndarray, sizes: Sequence[int], bits: Sequence[int], budget: int) -> np.ndarray:
    """The bits of each layer, int64 `[layers]`, with the least total cost whose total size is within the budget.

    cost[layer, choice], of any sign, is what bits[choice] costs that layer; a layer of sizes[layer] weights then takes
    sizes[layer] · bits[choice] of the `budget`, counted in bits. Exact: after each layer only such partial choices are
    kept that no other undercuts in size without costing more. Of equal costs the smaller size is taken.
    Raises ValueError for costs that are not finite or not [layers, choices], and for a budget below the least size.
    Source: HAWQ-v2, section 3.3, where the same frontier is computed for all layers at once.
    """
    if cost.shape != (len(sizes), len(bits)) or cost.size == 0 or not np.isfinite(cost).all():
        raise ValueError(f"cost must be finite, [{len(sizes)} layers, {len(bits)} choices], got shape {cost.shape}")
    rest = min(bits) * sum(sizes)
    if budget < rest:
        raise ValueError(f"budget must be at least {rest} bits, {min(bits)} a weight, got {budget}")
    frontier: list[tuple] = [(0, 0.0, None)]  # size, cost, (bits of the last layer, those before it)
    for layer, size in enumerate(sizes):
        rest -= min(bits) * size
        grown = [
            (used + size * width, total + cost[layer, choice], (width, before))
            for used, total, before in frontier
            for choice, width in enumerate(bits)
            if used + size * width + rest <= budget
        ]
        frontier, least = [], np.inf
        for candidate in sorted(grown, key=lambda each: each[:2]):
            if candidate[1] < least:
                frontier.append(candidate)
                least = candidate[1]
    chosen, before = [], frontier[-1][2]
    while before:
        chosen.append(before[0])
        before = before[1]
    return np.array(chosen[::-1])


def hessian_products(model: Transformer, tokens: Tensor) -> dict[str, Product]:
    """For each block linear by name the product with its own Hessian of the mean loss on tokens `[N, T]`.

    All share one graph: it is held until the last of them is dropped.
    """
    weights = {name: layer.weight for name, layer in surgery.linears(model).items()}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = evaluate.nll(model, tokens).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    each = zip(weights.items(), gradients, strict=True)
    return {name: partial(hessian_product, gradient, weight) for (name, weight), gradient in each}


def hessian_product(gradient: Tensor, weight: Tensor, v: np.ndarray) -> np.ndarray:
    """The derivative of gradient · v by the weight: H v, float64 `[size]`."""
    direction = torch.from_numpy(v).to(weight).view_as(weight)
    (product,) = torch.autograd.grad(gradient, weight, direction, retain_graph=True)
    return product.flatten().double().numpy(force=True)


def layer_sensitivity(model: Transformer, tokens: Tensor, how: str = "trace", seed: int = 0) -> np.ndarray:
    """What multiplies the squared error of each block linear, float64 `[layers]`, at least 0.

    "trace": the mean eigenvalue, by 4 probes; "eigenvalue": Ω over 2 shards, each λ by at most 16 products; "error":
    1, which knows no data. Of tokens `[N, T]` at most 4 x 64 are used. ValueError for another name.
    """
    if how not in SENSITIVITIES:
        raise ValueError(f"sensitivity must be one of {', '.join(SENSITIVITIES)}, got {how!r}")
    sizes = [layer.weight.numel() for layer in surgery.linears(model).values()]
    few, rng = tokens[:4, :64], np.random.default_rng(seed)
    if how == "error":
        return np.ones(len(sizes))
    if how == "trace":
        each = zip(hessian_products(model, few).values(), sizes, strict=True)
        return np.array([max(hutchinson(product, size, 4, seed).mean(), 0) / size for product, size in each])
    found = [
        [power_iteration(product, rng.standard_normal(size), (), 0.03, 16)[0] for product, size in each]
        for each in (zip(hessian_products(model, shard).values(), sizes, strict=True) for shard in few.chunk(2))
    ]
    return spread_sensitivity(np.array(found))


def rounding_errors(model: Transformer, bits: Sequence[int], group_size: int) -> np.ndarray:
    """‖Q(W) − W‖² of each block linear in each of `bits`, float64 `[layers, choices]`."""
    weights = [layer.weight.numpy(force=True).astype(np.float64) for layer in surgery.linears(model).values()]
    return np.array([[((nearest_codes(w, group_size, b).dequantize() - w) ** 2).sum() for b in bits] for w in weights])


def pack_model(model: Transformer, bits: Sequence[int] | np.ndarray, group_size: int) -> PackedLayers:
    """All block linears in one buffer, in the order of `surgery.linears`."""
    each = zip(surgery.linears(model).values(), bits, strict=True)
    return pack_layers([nearest_codes(layer.weight.numpy(force=True), group_size, int(b)) for layer, b in each])


@torch.no_grad()
def fill_model(model: Transformer, held: PackedLayers) -> None:
    """Write what `held` stands for into the block linears, in place: on CUDA by one launch for all of them."""
    layers = list(surgery.linears(model).values())
    device = layers[0].weight.device
    if device.type == "cuda":
        from kernels.quantization.mixed_precision import dequantize_layers as kernel

        packed, table, scale, zero = map(torch.from_numpy, held[:4])
        flat = kernel(packed.to(device), table, scale.to(device), zero.to(device), held.group_size)
    else:
        flat = torch.from_numpy(dequantize_layers(*held))
    for layer, values in zip(layers, flat.split([layer.weight.numel() for layer in layers]), strict=True):
        layer.weight.copy_(values.view_as(layer.weight))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run mixed_precision`."""
    parser.add_argument("--budget", type=float, default=3.0, metavar="BITS", help="mean bits per weight (default 3)")
    parser.add_argument("--sensitivity", choices=SENSITIVITIES, default="trace", help="default: trace")
    parser.add_argument(
        "--group-size", type=int, default=32, metavar="G", help="columns that share a grid (default 32)"
    )
    parser.add_argument("--activations", type=int, choices=(8, 16), help="round what block linears read, too")
    parser.add_argument("--wide", type=int, default=0, metavar="N", help="activations left in 16 of 8 bits (default 0)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Give each layer its bits; "bits per weight" counts codes, 16-bit scales and 8-bit zeros."""
    if not 2 <= args.budget <= 8:
        raise ValueError(f"--budget must be from 2 to 8 bits, got {args.budget}")
    if args.wide < 0 or (args.wide and args.activations != 8):
        raise ValueError(f"--wide needs --activations 8 and a number from 0 on, got {args.wide}")
    sizes = [layer.weight.numel() for layer in surgery.linears(model).values()]
    errors = rounding_errors(model, CHOICES, args.group_size)
    cost = layer_sensitivity(model, tokens, args.sensitivity, args.seed)[:, None] * errors
    bits = assign_bits(cost, sizes, CHOICES, int(args.budget * sum(sizes) + 1e-6))
    found = activations(model, tokens[:32]) if args.activations else []
    fill_model(model, pack_model(model, bits, args.group_size))
    report: dict[str, float | str] = {"bits per weight": float(bits @ sizes) / sum(sizes) + 24 / args.group_size}
    report |= {f"layers in {width} bits": float((bits == width).sum()) for width in CHOICES}
    if args.activations:
        widths = np.full(len(found), args.activations)
        widths[most_hurt(model, found, tokens[:8])[: args.wide]] = 16
        round_activations(model, found, widths)
        report["activations in 16 bits"] = float((widths == 16).mean())
    return report


CHOICES, GROUP = (2, 3, 4, 8), 32
CHANNELS, FACTOR = 2, 64.0  # outlier channels planted, as large models grow them
BUDGETS, WIDE = (2.5, 3.0, 3.5), (0, 2, 4, 6, 8)


def with_bits(lab: Lab, bits: Sequence[int] | np.ndarray) -> float:
    """Perplexity with the block linears in these bits."""
    model = lab.model()
    fill_model(model, pack_model(model, bits, GROUP))
    return lab.perplexity(model)


def weight_study(lab: Lab, seed: int) -> dict[str, list[float]]:
    """Perplexity at each of BUDGETS, by what the assignment believes about the layers."""
    model, text = lab.model(), lab.calibration(seed, 4, 64)
    sizes, errors = [w.weight.numel() for w in surgery.linears(model).values()], rounding_errors(model, CHOICES, GROUP)
    trace = layer_sensitivity(model, text, "trace", seed)
    believed = {"trace": trace, "dealt at random": np.random.default_rng(seed).permutation(trace)}
    believed["reversed"] = np.sort(trace)[::-1][trace.argsort().argsort()]
    if lab.full:
        believed |= {how: layer_sensitivity(model, text, how, seed) for how in ("eigenvalue", "error")}
    budgets = [int(mean * sum(sizes)) for mean in BUDGETS]
    assigned = {k: [assign_bits(s[:, None] * errors, sizes, CHOICES, b) for b in budgets] for k, s in believed.items()}
    return {words: [with_bits(lab, bits) for bits in each] for words, each in assigned.items()}


def activation_study(lab: Lab, seed: int) -> tuple[list[float], list[float]]:
    """With planted outliers and weights in 8 bits: (share of values in 16 bits, perplexity), by WIDE and all."""
    model, text = lab.model(), lab.calibration(seed, 32)
    surgery.plant_outliers(model, CHANNELS, FACTOR, seed)
    found = activations(model, text)
    fill_model(model, pack_model(model, [8] * len(surgery.linears(model)), GROUP))
    order = most_hurt(model, found, text[:8])
    wide = np.array([surgery.linears(model)[names[0]].in_features for names, *_ in found])[order]
    perplexities = []
    for count in (*WIDE, len(found)):
        widths = np.full(len(found), 8)
        widths[order[:count]] = 16
        perplexities.append(lab.perplexity(round_activations(model, found, widths)))
    return [float(wide[:count].sum() / wide.sum()) for count in (*WIDE, len(found))], perplexities


def picture(weights: dict[str, list[float]], equal: dict[int, float], share, rounded, base: float) -> Figure:
    """Perplexity by mean bits of the weights, and by the share of activations in 16 bits."""
    fig, (left, right) = panels(2, width=8, height=3.1)
    for role, (words, found) in zip(("method", "muted", "accent", "second", "third"), weights.items(), strict=False):
        left.plot(BUDGETS, found, **series(role), label=words)
    left.plot(list(equal), list(equal.values()), **series("baseline"), label="equal bits")
    right.plot(share, rounded, **series("method"), label="8 bits, worst in 16")
    for axes in (left, right):
        axes.axhline(base, **series("reference"), label="full precision")
        axes.set(ylabel="perplexity", yscale="log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        legend(axes, fontsize=8)
    left.set(xlabel="mean bits per weight", title="weights")
    right.set(xlabel="share of activations in 16 bits", title="activations, planted outliers")
    return fig


def claim(lab: Lab) -> Claim:
    """At equal size bits by Hessian traces beat equal, random and reversed bits; 16 bits for some tensors save W8A8."""
    studies, base = [weight_study(lab, seed) for seed in lab.seeds], lab.base_perplexity
    weights = {words: np.mean([each[words] for each in studies], axis=0).tolist() for words in studies[0]}
    equal = {width: with_bits(lab, [width] * len(surgery.linears(lab.model()))) for width in (2, 3, 4)}
    share, rounded = np.mean([activation_study(lab, seed) for seed in lab.seeds], axis=0).tolist()
    won = [(rounded[0] - value) / max(rounded[0] - rounded[-1], 1e-9) for value in rounded]
    enough = next((at for at, part in enumerate(won) if part > 0.9), len(won) - 1)
    three = {words: found[BUDGETS.index(3.0)] for words, found in weights.items()}
    ahead = three["trace"] < min(equal[3], three["dealt at random"], three["reversed"])
    sentence = (
        f"At a mean of 3 bits, bits by Hessian traces {'beat' if ahead else 'do not beat'} equal bits: perplexity "
        f"{base:.1f} becomes {three['trace']:.1f} against {equal[3]:.1f}, {three['dealt at random']:.1f} with traces "
        f"dealt at random and {three['reversed']:.1f} reversed; with planted outliers 8-bit activations give "
        f"{rounded[0]:.1f}, and {share[enough]:.0%} of them in 16 bits win back {won[enough]:.0%} of the loss."
    )
    numbers = {"perplexity, full precision": base} | {f"perplexity, {b} bits everywhere": v for b, v in equal.items()}
    numbers |= {f"perplexity, {m} bits, {k}": v for k in weights for m, v in zip(BUDGETS, weights[k], strict=True)}
    numbers |= {f"perplexity, {s:.0%} of activations in 16 bits": v for s, v in zip(share, rounded, strict=True)}
    setting = (
        f"all block linears, {CHOICES} bits in groups of {GROUP}, seeds {lab.seeds} draw 4 sequences for traces; then "
        f"weights in 8 bits, static grids per activation, {CHANNELS} channels of each norm's gain times {FACTOR:g}"
    )
    drawn, holds = picture(weights, equal, share, rounded, base), ahead and share[enough] < 0.5
    return Claim(sentence, holds, numbers, drawn, setting)
