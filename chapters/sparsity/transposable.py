"""Transposable N:M: at most N of M neighbours along rows and along columns, so that W and Wᵀ are both N:M.

Training multiplies by a weight twice: forwards by W, and backwards, for the gradient of the input, by Wᵀ. An N:M mask
groups the neighbours of a row, and the columns of what it leaves obey nothing: the second product is dense again. So
choose a mask for a whole block of M × M weights at once:

    y = x Wᵀ,   ∂L/∂x = (∂L/∂y) W                        the second reads the columns of W as the first reads its rows
    mask = argmax Σ_rc mask[r, c] |W[r, c]|              over masks with Σ_c mask[r, c] = N for every row r of the block
                                                         and Σ_r mask[r, c] = N for every column c
Best     a flow: every row sends N units, every column takes N, an entry carries at most one. In a 4 × 4 block only 90
         masks are allowed for 2:4, so all are tried: |blocks| [blocks, 16] times the masks [16, 90], and the largest.
Greedy   any M: take the heaviest weight that is left, if its row and its column have room. It may end with a row and a
         column that lack one each and meet where the weight is taken already: a few zeros more, and N:M all the same.
         (In about 3% of random 4 × 4 blocks it thereby keeps more than any full mask can, in nearly half less.)
Saves    the backward product's weight traffic, too: forwards and backwards read N/M of the values, in two stored forms.
Costs    magnitude, hence quality: the count of allowed masks, `mask_diversity`, falls from 6⁴ = 1296 to 90 in a block.
Paper    Hubara et al.: Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable
         Masks, 2021, arXiv:2102.08124, sections 3 and 4.
Follows  the paper's problem; the order of greedy is that of torch's `_sparse_semi_structured_tile`, of |W|. What the
         authors released under the name update_mask_approx2 means the same but looks up the columns' counts by the row
         and the rows' by the column: in 94% of 1000 random 4 × 4 blocks it took more than 2 of a row or column.
Symbols  W, mask `[out, in]`, M divides both; patterns `[P, M, M]`; blocks `[out · in / M², M²]`, row by row.
Kernel   kernels/sparsity/transposable.py
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.shared.pruned_layers import Rule, count_kept, pattern, prune_each, train_masked
from chapters.sparsity.n_m import SparseLinear, compress, magnitudes, n_m_mask, perplexities, sparse_matmul
from minitfm import surgery, train
from minitfm.model import Transformer

ENUMERATED = 4  # the longest block of which all masks are tried: 90; for 8 × 8 there are more than 10¹¹


def checked_pattern(n: int, m: int) -> None:
    """ValueError unless 1 <= n <= m."""
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")


def to_blocks(weight: np.ndarray, m: int) -> np.ndarray:
    """|weight| `[out, in]` in blocks of m × m, row by row of blocks, each row by row: float64 `[blocks, m²]`.

    Raises ValueError, naming them, unless m divides both sides, and as `magnitudes`: not finite, no matrix, empty.
    """
    magnitude = magnitudes(weight)
    rows, columns = weight.shape
    if rows % m or columns % m:
        raise ValueError(f"weight has {rows} rows and {columns} columns, both must be divisible by m={m}")
    return magnitude.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m * m)


def from_blocks(blocks: np.ndarray, shape: tuple[int, ...], m: int) -> np.ndarray:
    """Inverse of `to_blocks`: `[blocks, m²]` of any dtype -> `[out, in]` = shape."""
    rows, columns = shape
    return blocks.reshape(rows // m, columns // m, m, m).swapaxes(1, 2).reshape(shape)


def transposable_patterns(n: int, m: int) -> np.ndarray:
    """All m × m masks with exactly n in every row and in every column: bool `[P, m, m]`, P = 90 for 2:4.

    Each mask once, in falling order of its entries read row by row as the digits of a binary number: first come those
    that keep early positions, 1100 1100 0011 0011 for 2:4. Raises ValueError unless 1 <= n <= m <= 4.
    """
    checked_pattern(n, m)
    if m > ENUMERATED:
        raise ValueError(f"m must be at most {ENUMERATED} for all masks to be listed, got {m}")
    rows = [np.isin(np.arange(m), kept) for kept in combinations(range(m), n)]  # in falling order
    found = np.zeros((1, 0, m), dtype=bool)
    for _ in range(m):
        longer = np.stack([np.concatenate((mask, [row])) for mask in found for row in rows])
        found = longer[(longer.sum(axis=1) <= n).all(axis=1)]
    return found


def best_mask(weight: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Of every block keep what the pattern of the largest sum of magnitudes keeps, by trying all.

    weight `[out, in]`, finite, stays as it was; patterns bool `[P, m, m]`; returns a bool mask `[out, in]`, True where
    a weight is kept. Of equal sums the first pattern is taken. Sums are float64: exact, so that equal is equal, for
    weights of 32 bits or fewer, unless some in a block are 2²⁶ times others.
    Raises ValueError for patterns of another shape, or none, and unless m divides both sides; as `magnitudes`, too.
    """
    if patterns.ndim != 3 or patterns.shape[1] != patterns.shape[2] or patterns.size == 0:
        raise ValueError(f"patterns must be [P, m, m] and at least one, got shape {patterns.shape}")
    m = patterns.shape[1]
    flat = patterns.reshape(len(patterns), -1)
    chosen = (to_blocks(weight, m) @ flat.T).argmax(axis=1)  # argmax: the first of equals
    return from_blocks(flat[chosen], weight.shape, m)


def greedy_mask(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """Of every m × m block take the heaviest weight left whose row and column have fewer than n, until none is left.

    weight `[out, in]`, finite, stays as it was; returns a bool mask `[out, in]`, True where a weight is kept: at most n
    in every row and column of a block, and none could be added. Of equal magnitudes the one that comes first in the
    block, row by row, is taken first. It keeps at least half of the magnitude that the best mask keeps.
    Raises ValueError unless 1 <= n <= m and m divides both sides, and as `magnitudes`.
    """
    checked_pattern(n, m)
    blocks = to_blocks(weight, m)
    each, mask = np.arange(len(blocks)), np.zeros(blocks.shape, dtype=bool)
    rows, columns = np.zeros((2, len(blocks), m), dtype=int)  # taken so far
    for place in np.argsort(-blocks, axis=1, kind="stable").T:  # of all blocks at once, the heaviest first
        row, column = place // m, place % m
        fits = (rows[each, row] < n) & (columns[each, column] < n)
        mask[each, place] = fits
        rows[each, row] += fits
        columns[each, column] += fits
    return from_blocks(mask, weight.shape, m)


def mask_diversity(n: int, m: int) -> int:
    """How many m × m masks have exactly n in every row and column, counted exactly: 90 for 2:4.

    Row by row, remembering only how much room the columns have, in sorted order: what is left to fill does not depend
    on which column is which. Raises ValueError unless 1 <= n <= m. A second for m = 8; far more for 16.
    """
    checked_pattern(n, m)
    states = Counter({(n,) * m: 1})  # room of the columns -> ways to get there
    for _ in range(m):
        following: Counter[tuple[int, ...]] = Counter()
        for room, ways in states.items():
            for kept in combinations(range(m), n):
                left = tuple(sorted(room[column] - (column in kept) for column in range(m)))
                if left[0] >= 0:
                    following[left] += ways
        states = following
    return states[(0,) * m]


def transposable_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """The best mask for blocks of up to 4 × 4, by `greedy_mask` for larger ones. Errors as theirs."""
    if m <= ENUMERATED:
        return best_mask(weight, transposable_patterns(n, m))
    return greedy_mask(weight, n, m)


def obeys(mask: np.ndarray, n: int, m: int) -> bool:
    """Whether at most n of every m neighbours along the input axis are True: the columns' turn is obeys(mask.T, ..)."""
    return mask.shape[1] % m == 0 and bool((mask.reshape(len(mask), -1, m).sum(axis=-1) <= n).all())


def input_gradient(gradient: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """∂L/∂x = (∂L/∂y) W, `[tokens, out]` -> `[tokens, in]`, from Wᵀ in compressed form.

    So out / 2 products for each number, not out. Raises ValueError if Wᵀ is not 2:4, as under a mask that cares for
    rows only, and as `compress` and `sparse_matmul`.
    """
    return sparse_matmul(gradient, *compress(weight.T))


class BothWays(torch.autograd.Function):
    """x -> `forth(x)`; its gradient -> `back(gradient)`. The weight takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: nn.Module, back: nn.Module) -> Tensor:
        ctx.back = back
        return forth(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


class TransposableLinear(nn.Module):
    """A linear layer with a fixed 2:4 transposable weight: x `[.., in]` -> `[.., out]`; both products are sparse.

    It holds W and Wᵀ compressed, 9/8 of the dense bytes in 16 bits, of which each pass reads half. On CUDA both passes
    are by the kernel of n_m. For training through a frozen layer (adapters, distillation of what lies below it).
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Raises ValueError if W or Wᵀ is not 2:4, or a side not divisible by 16."""
        super().__init__()
        turned = nn.Linear(linear.out_features, linear.in_features, bias=False).to(linear.weight)
        turned.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.forth, self.back = SparseLinear(linear), SparseLinear(turned)

    def forward(self, x: Tensor) -> Tensor:
        return BothWays.apply(x, self.forth, self.back)


BATCH, LENGTH, RATE = 8, 64, 1e-3  # sequences and tokens of a step; peak of AdamW's learning rate


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run transposable`."""
    parser.add_argument("--pattern", type=pattern, default=(2, 4), metavar="N:M", help="N kept of M (default 2:4)")
    parser.add_argument("--rows-only", action="store_true", help="the plain N:M mask, to compare with")
    parser.add_argument("--steps", type=int, default=0, help="of training, on --sequences sequences (default 0: none)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune by magnitude in one shot, and train under the mask if asked."""
    if args.steps < 0:
        raise ValueError(f"--steps must not be negative, got {args.steps}")
    n, m = args.pattern
    masks = prune_each(model, partial(n_m_mask if args.rows_only else transposable_mask, n=n, m=m))
    if args.steps:
        stream = tokens.flatten()
        length = min(LENGTH, model.config.context, len(stream))
        rate = {"learning_rate": RATE, "weight_decay": 0.0, "seed": args.seed}
        train_masked(model, masks, stream, train.Settings(args.steps, BATCH, length, "adamw", **rate))
    turned = [obeys(mask.numpy().T, n, m) for mask in masks.values()]
    kept, weights = count_kept(masks)
    return {
        "bits per weight": n / m * (32 + (m - 1).bit_length()),
        "kept weights": f"{kept} of {weights}",
        f"layers whose transpose is {n}:{m}": f"{sum(turned)} of {len(turned)}",
    }


COMPARED = ((1, 2), (2, 4), (4, 8))  # half of the weights each


def rules() -> dict[str, Rule]:
    """The plain and the transposable rule of each pattern, by name: "2:4", "2:4 both ways"."""
    plain = {f"{n}:{m}": partial(n_m_mask, n=n, m=m) for n, m in COMPARED}
    return plain | {f"{n}:{m} both ways": partial(transposable_mask, n=n, m=m) for n, m in COMPARED}


def kept_magnitude(lab: Lab, rule: Rule) -> tuple[float, bool]:
    """(share of Σ|W| that stays, whether every layer's transpose is 2:4), of the model as it is stored."""
    kept = total = 0.0
    both = True
    for layer in surgery.linears(lab.model()).values():
        weight = layer.weight.detach().double().numpy()
        mask = rule(weight)
        kept, total = kept + np.abs(weight[mask]).sum(), total + np.abs(weight).sum()
        both &= obeys(mask.T, 2, 4)
    return kept / total, both


def picture(shares: dict[str, float], means: dict[str, float], base: float) -> Figure:
    """What stays and what it costs, plain and both ways, against the length of a group."""
    drawn, (left, right) = panels(2, width=8.0, height=3.0)
    names = [f"{n}:{m}" for n, m in COMPARED]
    for end, role, label in (("", "baseline", "rows only"), (" both ways", "method", "rows and columns")):
        left.plot(names, [100 * shares[name + end] for name in names], **series(role), label=label)
        right.plot(names, [means[name + end] for name in names], **series(role), label=label)
    left.set(xlabel="pattern", ylabel="magnitude kept (%)", title="what stays")
    right.axhline(base, color=COLOURS["reference"], linestyle="--", label="dense")
    right.set(xlabel="pattern", ylabel="perplexity", yscale="log", title="what it costs")
    legend(left)
    legend(right)
    return drawn


def claim(lab: Lab) -> Claim:
    """A mask for both ways costs more than one for rows, and longer blocks win that back."""
    found = {name: perplexities(lab, rule) for name, rule in rules().items()}
    means = {name: float(np.mean(seeds)) for name, seeds in found.items()}
    stays = {name: kept_magnitude(lab, rule) for name, rule in rules().items()}
    shares = {name: share for name, (share, _) in stays.items()}
    both, rows = stays["2:4 both ways"][1], stays["2:4"][1]
    order = [found[name] for name in ("2:4", "2:4 both ways", "4:8", "4:8 both ways")]
    dearer = all(a < b and c < d and d < b for a, b, c, d in zip(*order, strict=True))
    longer = means["4:8 both ways"]
    return Claim(
        sentence=f"With half of the weights dropped in one shot, a 2:4 mask that also holds for the transpose keeps "
        f"{shares['2:4 both ways']:.1%} of the magnitude where plain 2:4 keeps {shares['2:4']:.1%}, and perplexity "
        f"is {means['2:4 both ways']:.1f} instead of {means['2:4']:.1f} (dense: {lab.base_perplexity:.1f}); in blocks "
        f"of 8, 4:8 both ways, it is {longer:.1f}, {longer / means['2:4']:.2f} of that of plain 2:4.",
        holds=dearer and both and not rows,
        numbers={"perplexity, dense": lab.base_perplexity}
        | {f"perplexity, {name}": mean for name, mean in means.items()}
        | {f"magnitude kept, {name}": share for name, share in shares.items()}
        | {f"bits of choice a weight, {n}:{m} both ways": np.log2(mask_diversity(n, m)) / m**2 for n, m in COMPARED},
        figure=picture(shares, means, lab.base_perplexity),
        setting=f"all block linears by magnitude, no retraining; 1:2 and 2:4 best masks, 4:8 greedy; "
        f"{lab.validation.numel()} validation tokens; seeds {lab.seeds} reorder rows and columns first (0: as stored)",
    )
