"""SparseGPT: drop weights one column at a time, and let the columns still to come make up for what is lost.

Inputs are correlated, so a weight that stays can do some of the work of one that goes. A layer is judged by its
outputs: ‖X (W − Ŵ)ᵀ‖² is quadratic, and every row w of W has the same Hessian H = 2/n XᵀX. The ancestors of SparseGPT
ask what that loss rises by when one weight of a row goes:

    OBD   ½ H_jj w_j²            nothing else moves, and H is taken to be diagonal
    OBS   w_j² / (2 [H⁻¹]_jj)    all others move, to repair the most they can:  w ← w − H⁻¹[:, j] w_j / [H⁻¹]_jj

After a step of OBS each row needs an inverse of its own, of what it has left: in³ operations a row. SparseGPT goes
through the columns from left to right, and what it has passed stays as it is. Then all rows share the inverses, those
of the columns from i on, and one Cholesky factor U holds them all, H⁻¹ = UᵀU:

    score_j = w_j² / U_jj²,      e = (w_i − ŵ_i) / U_ii,      w_j ← w_j − e U_ij   for j > i

ŵ_i is 0 if dropped and w_i if kept. The score is that of OBS, twice, with the columns before j gone. Where H is
diagonal it is Wanda's, squared, and nothing is repaired. Where what is kept is also rounded, ŵ_i = round(w_i), one
error repairs both; GPTQ drops none. In the end W − Ŵ = E U, so ½ Σ e² is what the loss rose by.

Saves    what zeros save, see chapters/pruning/magnitude.py; with `bits` a weight takes 1 + bits · kept / all, and
         each row has a grid.
Costs    a pass over calibration text for each block, about out·in² + in³ operations a layer, once; no training.
Papers   Frantar, Alistarh 2023, arXiv:2301.00774, section 3. OBD: LeCun, Denker, Solla 1989. OBS: Hassibi, Stork 1992;
         for the rows of a layer: Frantar, Singh, Alistarh 2022, arXiv:2208.11580, section 4.
Follows  the authors' release (IST-DASLab/sparsegpt), count included: in each block of 128 columns, all rows together,
         ⌊s n⌋ + 1 of n weights go, and what equals the last of them. `exact` counts as this book's other chapters do.
         N:M says what is KEPT, there what goes; of equal scores in a group the first stay, there any.
Symbols  W, Ŵ, E, mask `[out, in]`, mask True where a weight is kept; X `[tokens, in]`; H, U `[in, in]`.
Kernel   kernels/pruning/sparsegpt.py: `solve_block`, and around it `sparsegpt`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.pruning.magnitude import keep_largest
from chapters.pruning.magnitude import prune_model as prune_by_magnitude
from chapters.pruning.wanda import find_mask
from chapters.pruning.wanda import prune_model as prune_by_wanda
from chapters.quantization.gptq import checked_hessian, find_grid, hessians, inverse_factor, quantize, stages
from chapters.quantization.weight_only import checked, dequantize
from chapters.shared.pruned_layers import add_options, checked_sparsity, dropped, nonzero_masks, prune_each, report
from chapters.sparsity.n_m import n_m_mask
from minitfm import surgery
from minitfm.model import Transformer


@dataclass(frozen=True)
class Pruned:
    """A layer after `sparsegpt`.

    weight   Ŵ `[out, in]` float64
    mask     bool `[out, in]`, True where a weight is kept; with `bits` a kept one may round to 0
    error    ½ Σ e² = ½ Σ_rows (w − ŵ) H (w − ŵ)ᵀ, H damped: the rise of the loss
    """

    weight: np.ndarray
    mask: np.ndarray
    error: float


def obd_scores(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """OBD's saliency of every weight `[out, in]`: ½ H_jj w_j²; hessian `[in, in]`."""
    return weight**2 * np.diag(hessian) / 2


def obs_scores(weight: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """OBS's saliency of every weight `[out, in]`: w_j² / (2 [H⁻¹]_jj); inverse `[in, in]`. OBD's if H is diagonal."""
    return weight**2 / (2 * np.diag(inverse))


def obs_step(weight: np.ndarray, inverse: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop weight j[r] of each row r as OBS does: the new (weight, inverse); the arguments stay as they are.

    weight   float64 `[out, in]`; w_j becomes exactly 0, what is left of its row moves so that (w − w') H (w − w')ᵀ is
             least
    inverse  float64 `[out, in, in]`, symmetric: for each row the inverse of H without the rows and columns of weights
             already gone, which are 0. It becomes the inverse without j, too, with zeros in row and column j
    j        int `[out]`, each a weight that is left
    Source: arXiv:2208.11580, section 4, lemma 1.
    """
    row = np.arange(len(weight))
    spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
    weight = weight - spread * weight[row, j][:, None]
    inverse = inverse - spread[:, :, None] * inverse[row, j][:, None, :]
    weight[row, j] = inverse[row, j] = inverse[row, :, j] = 0
    return weight, inverse


def obs(weight: np.ndarray, hessian: np.ndarray, sparsity: float, damping: float = 0.01) -> Pruned:
    """OBS again and again: each row drops what costs least next, until `dropped(in, sparsity)` are gone.

    Arguments, dead columns and errors as in `sparsegpt`; of equal scores the first goes. It holds out · in² numbers,
    for small layers, to see how near SparseGPT comes. Source: as `obs_step`.
    """
    w, upper = prepared(weight, hessian, damping)
    row, mask = np.arange(len(w)), np.ones(w.shape, bool)
    inverse, error = np.repeat((upper.T @ upper)[None], len(w), axis=0), 0.0
    for _ in range(dropped(w.shape[1], sparsity)):
        diagonal = np.einsum("rjj->rj", inverse)
        score = np.divide(w**2, 2 * diagonal, out=np.full(w.shape, np.inf), where=mask)
        j = score.argmin(axis=1)
        error, mask[row, j] = error + score[row, j].sum(), False
        w, inverse = obs_step(w, inverse, j)
    return Pruned(w, mask, float(error))


def prepared(weight: np.ndarray, hessian: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Float64 weight, dead columns 0, and U of the damped Hessian; errors as in `sparsegpt`. Arguments stay."""
    weight = checked(weight, 8, None)[0]
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be at least 0 and finite, got {damping}")
    hessian = checked_hessian(hessian, weight.shape[1], damping, 1)
    dead = np.diag(hessian) == 0
    return np.where(dead, 0, weight), inverse_factor(hessian + np.diag(dead), damping)


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    """Which weights of a block stay, by their scores: bool, of the same shape, True where a weight is kept.

    As released, those above sorted[int(sparsity · n)], sorted from 0 on, of all n scores: int(sparsity · n) + 1 go,
    at least one even if sparsity is 0, and with them what equals the largest that goes.
    exact: `dropped(n, sparsity)` go, of equal ones those of the highest flat index.
    score `[out, columns]`, finite, at least 0, is not modified. Raises ValueError unless 0 <= sparsity < 1.
    Source: sparsegpt.py, fasterprune.
    """
    checked_sparsity(sparsity)
    if exact:
        return keep_largest(score, score.size - dropped(score.size, sparsity))
    return score > np.sort(score, axis=None)[int(sparsity * score.size)]


def solve_block(
    weight: np.ndarray, upper: np.ndarray, mask: np.ndarray | None = None, pattern: tuple[int, int] | None = None,
    grid: tuple[np.ndarray, np.ndarray, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Solve a block of B columns, left to right: (ŵ, e, mask), each `[out, B]`; nothing is modified.

    weight   float64 `[out, B]`, as the blocks before it left it
    upper    `[B, B]`, this block of U
    mask     bool `[out, B]`, True where a weight is kept, or
    pattern  (n, m): at the first column of each m neighbours, the n highest w² / U_jj² among them, weights as they are
             by then, stay; of equal ones the first. m divides B
    grid     (scale, zero, bits), the first two `[out]`: what stays is rounded to its row's grid, by `quantize`

    For each column in turn ŵ and e = (w − ŵ) / U_jj are found, and e U_jk is taken from every column k to its right.
    Raises ValueError unless exactly one of mask and pattern is given. Source: fasterprune.
    """
    if (mask is None) == (pattern is None):
        raise ValueError("give either mask or pattern")
    rest, solved, errors = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    mask = np.zeros(weight.shape, bool) if mask is None else mask.copy()
    for j in range(weight.shape[1]):
        if pattern and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            mask[:, group] = n_m_mask(rest[:, group] ** 2 / np.diag(upper)[group] ** 2, *pattern)
        value = np.where(mask[:, j], rest[:, j], 0)
        if grid is not None:
            value = dequantize(quantize(value, *grid), *grid[:2])
        solved[:, j], errors[:, j] = value, (rest[:, j] - value) / upper[j, j]
        rest[:, j:] -= np.outer(errors[:, j], upper[j, j:])
    return solved, errors, mask


def sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    bits: int | None = None, exact: bool = False, damping: float = 0.01, block_size: int = 128,
) -> Pruned:  # fmt: skip
    """Prune weight `[out, in]` so that its outputs under `hessian` `[in, in]` change little; neither is modified.

    sparsity    share of zeros in each block, by `threshold_mask` of the scores w² / U_jj² when it is reached, or
    pattern     (n, m): n of every m neighbours stay, as in `solve_block`
    bits        1 .. 8: what stays is rounded, too, each row to the grid that `find_grid` fits to the whole dense row
    exact       count as this book does, see `threshold_mask`
    damping     this share of mean(diag H) is added to diag H
    block_size  columns solved together (the last block may be narrower); then W[:, later] −= E U[block, later]

    Columns that no input reaches (H_jj = 0 exactly) are dead: H_jj = 1 and their weights 0 first of all (grids still
    see them). Raises ValueError for what is out of range, not finite, ill shaped, not symmetric or, damped, not
    positive definite; with a pattern, unless 1 <= n <= m and m divides the columns and block_size. Source: fasterprune.
    """
    weight, columns = checked(weight, 8 if bits is None else bits, None)
    checked_sizes(columns, sparsity, pattern, block_size)
    grid = None if bits is None else (*find_grid(weight, bits), bits)
    rest, upper = prepared(weight, hessian, damping)
    solved, mask, total = np.zeros_like(rest), np.zeros(rest.shape, bool), 0.0
    for start in range(0, columns, block_size):
        block = slice(start, start + block_size)
        part, factor = rest[:, block], upper[block, block]
        keep = None if pattern else threshold_mask(part**2 / np.diag(factor) ** 2, sparsity, exact)
        solved[:, block], errors, mask[:, block] = solve_block(part, factor, keep, pattern, grid)
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
        total += (errors**2).sum() / 2
    return Pruned(solved, mask, float(total))


def checked_sizes(columns: int, sparsity: float, pattern: tuple[int, int] | None, block_size: int) -> None:
    """Raise ValueError, naming it, for what `sparsegpt` cannot serve."""
    checked_sparsity(sparsity)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    n, m = pattern or (1, 1)
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")
    if columns % m or block_size % m:
        raise ValueError(f"weight has {columns} columns, a block {block_size}: not both divisible by m={m}")


def solve(weight: Tensor, statistics: np.ndarray, **options) -> Pruned:
    """`sparsegpt` of a layer's weight, options as there: by the reference, or on CUDA in float64 by the kernel."""
    if not weight.is_cuda:
        return sparsegpt(weight.numpy(force=True), statistics, **options)
    from kernels.pruning.sparsegpt import sparsegpt as kernel

    solved, mask, error = kernel(weight.double(), torch.from_numpy(statistics).to(weight.device), **options)
    return Pruned(solved.numpy(force=True), mask.numpy(force=True), float(error))


@torch.no_grad()
def prune_model(model: Transformer, tokens: Tensor, **options) -> dict[str, Pruned]:
    """Give the linear layers of the blocks, in place, the weights that `sparsegpt` with `options` leaves; returns all.

    tokens `[N, T]` are calibration text. Blocks in order: all layers of a block are given the Hessians of what reaches
    them while it is dense and those before it are pruned. Errors as in `sparsegpt`, naming the layer, its block intact.
    """
    layers, done = surgery.linears(model), {}
    for names in stages(model, true_sequential=False):
        found = {}
        for name, statistics in hessians(model, tokens, names).items():
            try:
                found[name] = solve(layers[name].weight, statistics, **options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name, pruned in found.items():
            layers[name].weight.copy_(torch.from_numpy(pruned.weight))
        done |= found
    return done


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run sparsegpt`."""
    add_options(parser, patterns=True)
    parser.add_argument("--bits", type=int, metavar="B", help="also round what stays, 1 to 8 (default: do not)")
    parser.add_argument("--exact", action="store_true", help="count zeros exactly, not one more for each block")
    parser.add_argument("--damping", type=float, default=0.01, help="share of the mean diagonal (default 0.01)")
    parser.add_argument("--block-size", type=int, default=128, metavar="B", help="columns of a block (default 128)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune by the calibration tokens as `options` asked; with --bits, codes count as bits, not as floats."""
    if args.bits is not None and args.packed:
        raise ValueError("--packed stores values in 32 bits, it has no place for the codes of --bits; use --save")
    chosen = {name: getattr(args, name) for name in ("sparsity", "pattern", "bits", "exact", "damping", "block_size")}
    prune_model(model, tokens, **chosen)
    found = report(model, args, "pruning.sparsegpt")
    return found if args.bits is None else found | {"bits per weight": coded_bits(model, args.bits)}


def coded_bits(model: Transformer, bits: int) -> float:
    """Bits per weight: a bitmap, a code for each weight that is not 0, and a 16-bit scale and a zero for each row."""
    masks = nonzero_masks(model).values()
    held = sum(mask.numel() + bits * int(mask.sum()) + (16 + bits) * len(mask) for mask in masks)
    return held / sum(mask.numel() for mask in masks)


RULES: dict[str, tuple[float, tuple[int, int] | None]] = {
    "30%": (0.3, None), "50%": (0.5, None), "70%": (0.7, None), "4:8": (0.5, (4, 8)), "2:4": (0.5, (2, 4)),
}  # fmt: skip
HALVES = ("50%", "2:4")  # what the claim is about
ROLES = {"magnitude": "baseline", "Wanda": "second", "SparseGPT": "method"}


def perplexities(lab: Lab, method: str, rule: str) -> np.ndarray:
    """One for each seed, which draws the calibration text; all the same for magnitude, which needs none."""
    (sparsity, pattern), found = RULES[rule], []
    for seed in lab.seeds if method != "magnitude" else [0]:
        model = lab.model()
        tokens = partial(lab.calibration, seed, 128 if lab.full else 32)
        if method == "SparseGPT":
            prune_model(model, tokens(), sparsity=sparsity, pattern=pattern, exact=True)
        elif method == "Wanda":
            prune_by_wanda(model, tokens(), partial(find_mask, sparsity=sparsity, pattern=pattern))
        elif pattern:
            prune_each(model, partial(n_m_mask, n=pattern[0], m=pattern[1]))
        else:
            prune_by_magnitude(model, sparsity)
        found.append(lab.perplexity(model))
    return np.resize(found, len(lab.seeds))


def picture(means: dict[tuple[str, str], float], base: float) -> Figure:
    """Perplexity over sparsity, and of the patterns that are half zeros."""
    drawn, (left, right) = panels(2, width=8.6, height=3.2, sharey=True)
    rules = list(dict.fromkeys(rule for _, rule in means))
    free = [rule for rule in rules if RULES[rule][1] is None]
    halves = [rule for rule in rules if RULES[rule][0] == 0.5]
    for method, role in ROLES.items():
        left.plot([100 * RULES[rule][0] for rule in free], [means[method, r] for r in free], **series(role))
        right.plot(halves, [means[method, r] for r in halves], **series(role), label=method)[0].set(linestyle="")
    for axes in (left, right):
        axes.axhline(base, **series("reference"), label="dense")
    left.set(xlabel="zeros (%)", ylabel="perplexity", yscale="log", title="any weight may go")
    right.set(xlabel="half are zeros: anywhere, or n:m kept", title="in patterns")
    legend(right)
    return drawn


def claim(lab: Lab) -> Claim:
    """Half of the weights dropped, free or 2:4: SparseGPT costs less than Wanda, and Wanda less than magnitude."""
    rules = [*RULES] if lab.full else [*HALVES]
    found = {(method, rule): perplexities(lab, method, rule) for rule in rules for method in ROLES}
    means = {key: float(values.mean()) for key, values in found.items()}
    ordered = {
        rule: (found["SparseGPT", rule] < found["Wanda", rule]) & (found["Wanda", rule] < found["magnitude", rule])
        for rule in rules
    }
    holds = all(ordered[rule].all() for rule in HALVES)
    always = [rule for rule in rules if ordered[rule].all()]
    costs = {rule: ", ".join(f"{means[method, rule]:.1f} ({method})" for method in reversed(ROLES)) for rule in HALVES}
    sentence = (
        f"With half of the weights gone SparseGPT {'costs' if holds else 'does not always cost'} less than Wanda, and "
        f"Wanda less than magnitude: perplexity {costs['50%']} where any may go, {costs['2:4']} in the 2:4 pattern, "
        f"{lab.base_perplexity:.1f} dense; for every seed in {len(always)} of {len(rules)} settings "
        f"({', '.join(always) or 'none'})."
    )
    numbers = {"perplexity, dense": lab.base_perplexity}
    numbers |= {f"{method}, {rule}": mean for (method, rule), mean in means.items()}
    numbers |= {f"seeds in that order, {rule}": float(won.sum()) for rule, won in ordered.items()}
    setting = (
        f"all block linears, one shot, no training, counts exact; calibration {128 if lab.full else 32} sequences; "
        f"SparseGPT: blocks of 128 columns, damping 0.01; magnitude compares within a layer; seeds {lab.seeds} draw "
        "calibration text"
    )
    return Claim(sentence, holds, numbers, picture(means, lab.base_perplexity), setting)
