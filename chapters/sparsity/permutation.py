"""Channel permutation: reorder a layer's inputs so that its large weights do not compete within the same four.

2:4 keeps two of every four neighbours, and who is whose neighbour is an accident: a network computes the same with its
channels in any order. So look for the order in which 2:4 keeps the most. Four neighbouring columns are a stripe; only
which columns share one counts, and within it a row r keeps its two largest magnitudes:

    kept(W)    = Σ_r Σ_stripes  the two largest of |w_ra|, |w_rb|, |w_rc|, |w_rd|
    gain(a, b) = M[a, b] + M[b, a] − M[a, a] − M[b, b],    M[a, b] = Σ_r max(q_ra, |w_rb|)      swap of columns a and b
    efficacy   = 100 · (kept(W reordered) − kept(W)) / (kept(half of each row, anywhere) − kept(W))

q_ra is the second largest of the other three columns in a's stripe: their largest stays whatever joins them, then q or
the newcomer. Greedy search knows two moves. `channel_swap` swaps two columns of different stripes. `stripe_groups`
takes two stripes (or three) and tries all 35 (5,775) ways to share their columns out. A round makes the moves that gain
most and touch different stripes; then only what touches changed stripes is computed anew. Where nothing gains, bounded
regression swaps two columns at random and goes on: undoing it would win back all it cost, so no search ends worse.

Saves    kept magnitude for nothing: 2:4 with the same bytes and speed, since orders are folded into the weights.
Costs    a search before pruning: Σ over pairs of stripes, 70 sums over the rows for each. All layers that read the same
         channels share one order, so the residual stream, which most layers read, has little freedom.
Folding  an order moves the channels' columns in every layer that reads them and their rows in every one that writes
         them: chapters/shared/channel_sites.py lists both. What q, k, v, gate and up read can be reordered together,
         with the embedding, the norms, the head and what writes the stream; what down reads, with the rows of gate and
         up; what o reads within a head, with the rows of v, alike for all query heads that share a value head. Not the
         dimensions of q and k: rotary positions give each its own frequency, so that only whole heads can be moved.
Paper    Pool, Yu: Channel Permutations for N:M Sparsity, NeurIPS 2021.
Follows  NVIDIA's release (apex, permutation_search_kernels), but for its thresholds. Those are absolute: a matrix times
         1e-4 is not improved there at all. Here gains are in units of a stripe's mean magnitude, rounded to nine digits
         so that rounding errors never decide, and count if above 0. The release also takes a whole stripe that moved
         for an unchanged one and goes on with old gains; here it is computed anew.
Symbols  W `[out, in]`, magnitudes |W|ᵀ `[in, out]`; S = in / 4 stripes; order `[in]`: column j becomes order[j] of W.
Kernel   kernels/sparsity/permutation.py: `swap_gains` and `group_gains`.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chapters.claims import Claim, require_writable
from chapters.lab import Lab
from chapters.shared.channel_sites import reorder_inputs
from chapters.shared.permutation_measures import picture
from chapters.shared.pruned_layers import prune_each, report
from chapters.shared.stripes import Moves, all_groups, climb, split_moves, stripe_choices, swap_moves
from chapters.sparsity.n_m import magnitudes, n_m_mask
from minitfm import surgery
from minitfm.model import Transformer

DIGITS, KERNEL_DIGITS = 9, 5  # of a gain, in units of a stripe's mean magnitude
WIDTHS = (8, 12)  # columns of a group of stripes
METHODS = ("groups", "swap")
BLOCK = 1 << 15  # numbers that a search works on at once, so that they stay in the cache


def by_column(weight: np.ndarray) -> np.ndarray:
    """|weight|ᵀ as float64 `[in, out]`. Raises ValueError as `magnitudes`, and unless 4 divides in and sums fit."""
    found = np.ascontiguousarray(magnitudes(weight).T)
    if len(found) % 4:
        raise ValueError(f"weight has {len(found)} columns, not divisible by the 4 of a stripe")
    with np.errstate(over="ignore"):
        if not np.isfinite(found.sum()):
            raise ValueError("weight is too large: its magnitudes have no finite sum in float64")
    return found


def kept_magnitude(weight: np.ndarray) -> float:
    """Σ|w| of what 2:4 keeps of weight `[out, in]`. Raises as `n_m_mask`."""
    return float(magnitudes(weight)[n_m_mask(weight)].sum())


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    """The formula of the first lines, in percent: 0 for the order as it is, 100 if 2:4 costs no more than rows do.

    weight `[out, in]`, order `[in]` a permutation of its columns. The limit keeps the larger half of each row, wherever
    it stands. Where that is what 2:4 keeps already, to 12 digits, there is nothing to gain, and efficacy is 0.
    Raises ValueError as `n_m_mask`.
    """
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=1)[:, half:].sum())
    if limit - before <= 1e-12 * limit:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)


def runners_up(columns: np.ndarray) -> np.ndarray:
    """q: for each column the second largest of the other three in its stripe, row by row; `[in, out]` like columns."""
    stripes = columns.reshape(len(columns) // 4, 4, -1)
    others = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    return np.sort(stripes[:, others], axis=2)[:, :, 1].reshape(columns.shape)


def meetings(seconds: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """M[a, b] = Σ_r max(seconds[a, r], columns[b, r]): `[a, b]`."""
    return np.stack([np.maximum(second, columns).sum(axis=1) for second in seconds])


def swap_gains(weight: np.ndarray) -> np.ndarray:
    """What 2:4 keeps more of weight `[out, in]` once two columns are swapped, for all pairs: float64 `[in, in]`.

    Symmetric; negative where a swap loses. 0 within a stripe, where a swap changes nothing. weight stays as it was.
    Raises ValueError as `by_column`: non-finite sums too. Source: try_swap of channel_swap.py.
    """
    columns = by_column(weight)
    return gains_of(meetings(runners_up(columns), columns))


def gains_of(met: np.ndarray) -> np.ndarray:
    """The gains of all swaps from M, `[in, in]`; 0 within a stripe."""
    gains, stripe = met + met.T - np.diag(met) - np.diag(met)[:, None], np.arange(len(met)) // 4
    return np.where(stripe == stripe[:, None], 0, gains)


def two_largest(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The sum of the two largest of four, elementwise: both of one pair, or the larger of each."""
    return np.maximum(np.maximum(a + b, c + d), np.maximum(a, b) + np.maximum(c, d))


def split_magnitudes(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What each split of each group of stripes keeps: float64 `[groups, splits]`, in the order of `splits`.

    columns `[in, out]` are magnitudes; groups `[groups, stripes]` numbers of two or three stripes each. What a stripe
    keeps does not depend on the others, so it is summed over the rows once for each of the C(8, 4) = 70 (C(12, 4) =
    495) stripes that can be made of a group's columns, and a split adds two (three) of these sums.
    """
    fours, ways = stripe_choices(4 * groups.shape[1])
    rows = max(BLOCK // len(fours), 1)
    sums = np.zeros((len(groups), len(fours)))
    for group, found in zip(groups, sums, strict=True):
        members = columns.reshape(-1, 4, columns.shape[1])[group].reshape(-1, columns.shape[1])
        for start in range(0, columns.shape[1], rows):
            found += two_largest(*members[fours.T, start : start + rows]).sum(axis=1)
    return np.sum([sums[:, stripe] for stripe in ways.T], axis=0)


def group_gains(weight: np.ndarray, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The best split of each group of width / 4 stripes of weight `[out, in]`: (gain, number in `splits`), `[groups]`.

    Groups are ordered as in a dictionary: (0, 1), (0, 2), …. A gain is what 2:4 keeps more of weight; of equal ones
    the first split is taken, so that where nothing gains, both are 0. A matrix of fewer stripes has no group.
    Raises ValueError as `swap_gains`, and unless width is 8 or 12. Source: build_stripe_map of exhaustive_search.py.
    """
    columns = by_column(weight)
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {WIDTHS}, got {width}")
    kept = split_magnitudes(columns, all_groups(len(columns) // 4, width // 4))
    gains = kept - kept[:, :1]
    return gains.max(axis=1), gains.argmax(axis=1)


class SwapMap:
    """Proposes swaps from M, of which only rows and columns of changed stripes are computed anew."""

    def __init__(self, columns: np.ndarray) -> None:
        self.columns, self.met = columns, np.zeros((len(columns), len(columns)))

    def __call__(self, order: np.ndarray, changed: np.ndarray) -> Moves:
        """Moves for columns in this `order`; `changed`: stripes that are not what they were in the last call."""
        columns, stale = self.columns[order], (4 * changed[:, None] + np.arange(4)).ravel()
        seconds = runners_up(columns)
        self.met[stale] = meetings(seconds[stale], columns)
        self.met[:, stale] = meetings(columns[stale], seconds).T
        return swap_moves(gains_of(self.met).round(DIGITS))


class SplitMap:
    """Proposes splits, those of groups with a changed stripe computed anew."""

    def __init__(self, columns: np.ndarray, width: int) -> None:
        self.columns, self.groups = columns, all_groups(len(columns) // 4, width // 4)
        self.gain, self.split = np.zeros(len(self.groups)), np.zeros(len(self.groups), dtype=int)

    def __call__(self, order: np.ndarray, changed: np.ndarray) -> Moves:
        """As in `SwapMap`."""
        columns, stale = self.columns[order], np.flatnonzero(np.isin(self.groups, changed).any(axis=1))
        for some in np.array_split(stale, len(stale) // 1024 + 1):
            kept = split_magnitudes(columns, self.groups[some])
            gains = (kept - kept[:, :1]).round(DIGITS)
            self.gain[some], self.split[some] = gains.max(axis=1), gains.argmax(axis=1)
        return split_moves(self.gain, self.split, self.groups)


class KernelMap:
    """Proposes swaps or splits of two stripes from the kernels' gains for weight `[out, in]`, all anew, in float32."""

    def __init__(self, weight: Tensor, swaps: bool) -> None:
        self.weight, self.swaps, self.groups = weight, swaps, all_groups(weight.shape[1] // 4, 2)
        self.unit = 4 * weight.abs().double().sum().item() / weight.shape[1] or 1.0
        if not math.isfinite(self.unit):
            raise ValueError("weight must be finite, it holds NaN or infinity")

    def __call__(self, order: np.ndarray, changed: np.ndarray) -> Moves:
        """As in `SwapMap`, with gains rounded to what float32 knows."""
        from kernels.sparsity import permutation as kernel

        weight = self.weight[:, torch.from_numpy(order).to(self.weight.device)].contiguous()
        if self.swaps:
            return swap_moves((kernel.swap_gains(weight).numpy(force=True) / self.unit).round(KERNEL_DIGITS))
        gain, split = (found.numpy(force=True) for found in kernel.group_gains(weight))
        return split_moves((gain / self.unit).round(KERNEL_DIGITS), split, self.groups)


def in_units(weight: np.ndarray) -> np.ndarray:
    """`by_column`, scaled so that a stripe's mean magnitude is 1: nothing after this depends on the weight's scale."""
    columns = by_column(weight)
    return columns / (columns.sum() / (len(columns) / 4) or 1)


def channel_swap(weight: np.ndarray, escapes: int = 0, seed: int = 0) -> np.ndarray:
    """An order `[in]` of the columns of weight `[out, in]`, found by swapping two of them at a time.

    2:4 keeps at least as much of weight[:, order] as of weight, which stays as it was. A matrix times a number has the
    same order. A random swap, the same for the same seed, gets the search going again `escapes` times.
    Raises ValueError as `swap_gains`, and for negative escapes. Source: channel_swap.py.
    """
    columns = in_units(weight)
    return climb(len(columns), SwapMap(columns), escapes, seed)


def stripe_groups(weight: np.ndarray, width: int = 8, escapes: int = 0, seed: int = 0) -> np.ndarray:
    """As `channel_swap`, by sharing the columns of groups of width / 4 stripes out anew: the release's OSG(width).

    Where the matrix is narrower, width is 8, and with fewer than 8 columns nothing is to be done. Groups of 12 work
    for narrow matrices, `in` to 64 or so. Raises ValueError as `group_gains`, and for negative escapes. Source:
    exhaustive_search.py; its random swap in a group of 12 may stay within a stripe, the one here never does.
    """
    columns = in_units(weight)
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {WIDTHS}, got {width}")
    return climb(len(columns), SplitMap(columns, min(width, max(len(columns), 8))), escapes, seed)


def random_order(weight: np.ndarray, tries: int = 1000, seed: int = 0) -> np.ndarray:
    """The best of `tries` random orders `[in]` of the columns of weight: what a search must beat. Raises as those."""
    columns, random = in_units(weight), np.random.default_rng(seed)

    def kept(order: np.ndarray) -> float:
        return float(two_largest(*columns[order.reshape(-1, 4).T]).sum())

    return max((random.permutation(len(columns)) for _ in range(tries)), key=kept)


def find_order(weight: Tensor, method: str = "groups", escapes: int = 0, seed: int = 0) -> np.ndarray:
    """The order `[in]` of the columns of weight `[out, in]` by "groups" of 8 or "swap"; on CUDA by the kernels."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weight.is_cuda and weight.shape[1] > 4:
        return climb(weight.shape[1], KernelMap(weight, method == "swap"), escapes, seed)
    search = channel_swap if method == "swap" else stripe_groups
    return search(weight.double().numpy(force=True), escapes=escapes, seed=seed)


def kept_share(model: Transformer) -> float:
    """Which share of the magnitude of the blocks' linear layers 2:4 would keep; 1 without any magnitude."""
    weights = [layer.weight.double().numpy(force=True) for layer in surgery.linears(model).values()]
    return sum(map(kept_magnitude, weights)) / (sum(np.abs(weight).sum() for weight in weights) or 1)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run permutation`."""
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="split groups of 8 (default), or swap two"
    )
    parser.add_argument(
        "--escapes", type=int, default=0, metavar="N", help="random swaps where nothing gains (default 0)"
    )
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="save bitmaps and values, for `load_sparse`")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Fold the orders that are found into the model, then prune it to 2:4; no calibration tokens are needed."""
    if args.packed:
        require_writable(args.packed)
    before = kept_share(model)
    reorder_inputs(model, partial(find_order, method=args.method, escapes=args.escapes, seed=args.seed))
    after = kept_share(model)
    prune_each(model, n_m_mask)
    return report(model, args, "sparsity.permutation") | {"kept magnitude": f"{after:.2%}, as stored {before:.2%}"}


SEARCHES: dict[str, Callable[..., np.ndarray]] = {
    "best of 1,000": random_order,
    "swaps": channel_swap,
    "groups of 8": stripe_groups,
    "swaps, 100 escapes": partial(channel_swap, escapes=100),
    "groups of 8, 100 escapes": partial(stripe_groups, escapes=100),
    "groups of 12": partial(stripe_groups, width=12),
}


def measured(lab: Lab, seed: int) -> tuple[list[float], list[float]]:
    """Kept shares and perplexities of 2:4, before and after. A seed draws the order of the start, 0 leaves it."""
    model, random = lab.model(), np.random.default_rng(seed)
    if seed:
        reorder_inputs(model, lambda weight: random.permutation(weight.shape[1]))
    shares, perplexities = [], []
    for find in (None, find_order):
        if find is not None:
            reorder_inputs(model, find)
        shares.append(kept_share(model))
        pruned = copy.deepcopy(model)
        prune_each(pruned, n_m_mask)
        perplexities.append(lab.perplexity(pruned))
    return shares, perplexities


def claim(lab: Lab) -> Claim:
    """Reordered channels keep more magnitude and more quality at 2:4, from every start."""
    shares, perplexities = np.array([measured(lab, seed) for seed in lab.seeds]).swapaxes(0, 1)  # [seeds, 2] each
    matrices = [np.random.default_rng(seed).random((32, 16)) for seed in range(25 if lab.full else 8)]
    ranking = {name: float(np.mean([efficacy(w, search(w)) for w in matrices])) for name, search in SEARCHES.items()}
    weight = lab.weights[f"blocks.{lab.config.layers // 2}.feed_forward.down_proj.weight"].double().numpy()
    (share, better_share), (plain, better) = shares.mean(axis=0), perplexities.mean(axis=0)
    return Claim(
        sentence=f"With channels reordered first, 2:4 keeps {better_share:.2%} of the magnitude, not {share:.2%}, "
        f"and perplexity is {better:.1f} instead of {plain:.1f} (dense: {lab.base_perplexity:.1f}).",
        holds=bool((shares[:, 0] < shares[:, 1]).all() and (perplexities[:, 0] > perplexities[:, 1]).all()),
        numbers={
            "perplexity, dense": lab.base_perplexity,
            "perplexity, 2:4": plain,
            "perplexity, reordered, 2:4": better,
        }
        | {"kept magnitude, 2:4": share, "kept magnitude, reordered, 2:4": better_share}
        | {"seeds where reordered is better": float((perplexities[:, 0] > perplexities[:, 1]).sum())}
        | {f"efficacy on random 32 × 16 matrices, {name}": mean for name, mean in ranking.items()},
        figure=picture(weight, stripe_groups, n_m_mask, ranking),
        setting=f"all block linears, one shot, no retraining; groups of 8 without escapes; {lab.validation.numel()} "
        f"validation tokens; seeds {lab.seeds} reorder channels at random first (0: as stored); efficacies: means of "
        f"{len(matrices)} random matrices",
    )
