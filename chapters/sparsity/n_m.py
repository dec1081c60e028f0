"""N:M sparsity: of every M neighbouring weights in a row the N largest stay, so a few bits say where each one stood.

Zeros pay only where hardware can skip them. Zeros anywhere cost an address each; zeros in blocks are easily skipped,
but seldom stand where one wants them. N:M lies between. In the group g of row o, with N = 2 and M = 4:

    mask[o, 4g + j] = 1  if |W[o, 4g + j]| is among the 2 largest of |W[o, 4g]| … |W[o, 4g + 3]|,  else 0
    values[o, 2g + s] = W[o, 4g + index[o, g, s]],       index = the two kept positions, ascending
    y[t, o] = Σ_g Σ_s  values[o, 2g + s] · x[t, 4g + index[o, g, s]]

Saves    half the multiplications and, in 16 bits, 7/16 of the bytes: two values and two 2-bit positions are 36 bits
         where four weights were 64. In general N/M of the weights, with ⌈log2 M⌉ bits of position for each, so that
         b-bit weights cost N/M (b + ⌈log2 M⌉): in 16 bits 4.5 for 1:4, 4.75 for 2:8, 9 for 2:4, 9.5 for 4:8.
Costs    quality: a group with three large weights loses one, a group with none keeps two. No calibration.
Paper    Mishra et al.: Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378, sections 3 and 4.
Follows  N is what is KEPT of M (some code bases count the zeros: the same for 2:4, not for 1:4), in groups along the
         input axis. The compressed form of 2:4 is that of torch's semi-structured tensors, bit for bit; for others
         there is none to follow. Of equal magnitudes the earlier is kept: there published codes differ, and each keeps
         the same magnitude.
Symbols  W, mask `[out, in]`; values `[out, in/2]`; metadata `[out, in/16]`; x `[tokens, in]`; y `[tokens, out]`. In
         general values `[out, in · N/M]` and packed positions, see chapters/shared/group_formats.py.
Kernel   kernels/sparsity/n_m.py
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels
from chapters.lab import Lab
from chapters.shared import pruned_layers
from chapters.shared.bit_fields import pack
from chapters.shared.group_formats import columns_n_m, index_bits, positions, word_layout
from chapters.shared.pruned_layers import Rule, pattern, prune_each
from minitfm import surgery
from minitfm.model import Transformer


def magnitudes(weight: np.ndarray) -> np.ndarray:
    """|weight| as float64, exact also for int8, which has no +128. ValueError unless a finite, non-empty matrix."""
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight must be a non-empty [out, in] matrix, got shape {weight.shape}")
    return pruned_layers.magnitudes(weight)


def n_m_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """Keep the n largest magnitudes of every m neighbours along the input axis.

    weight `[out, in]`, finite; returns a bool mask `[out, in]`, True where a weight is kept. Of equal magnitudes the
    lowest index is kept, however many there are. Magnitudes are compared in float64, none is too small to count, and
    |-128| of an int8 is 128. weight stays as it was. Raises ValueError unless 1 <= n <= m and m divides in, and as
    `magnitudes` does.
    """
    magnitude = magnitudes(weight)
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")
    if weight.shape[1] % m:
        raise ValueError(f"weight has {weight.shape[1]} columns, not divisible by m={m}")
    groups = magnitude.reshape(-1, m)  # [out · in / m, m]
    order = np.argsort(-groups, axis=-1, kind="stable")  # stable: equals stay in the order of their index
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :n], True, axis=-1)
    return mask.reshape(weight.shape)


def block_mask(weight: np.ndarray, sparsity: float, rows: int = 4) -> np.ndarray:
    """Drop exactly round(sparsity · blocks) blocks of `rows` neighbouring rows × 1 column, those of least Σ|w|.

    The rows of a block share one column index, as vector units like. Shapes, ties and magnitudes, added in float64, as
    in `n_m_mask`, with the blocks, row by row, as one group; `round` is Python's, halves to even: 4.5 to 4, 3.5 to 4.
    weight stays as it was. Raises ValueError unless `rows` divides out, 0 <= sparsity < 1 and something is kept, and
    as `magnitudes` does.
    """
    magnitude = magnitudes(weight)
    if rows < 1 or len(weight) % rows:
        raise ValueError(f"weight has {len(weight)} rows, not divisible by rows={rows}")
    blocks = magnitude.reshape(-1, rows, weight.shape[1]).sum(axis=1)  # [out / rows, in]
    kept = blocks.size - round(sparsity * blocks.size) if 0 <= sparsity < 1 else 0
    if kept == 0:
        raise ValueError(f"sparsity must be in [0, 1) and keep one of {blocks.size} blocks, got {sparsity}")
    mask = n_m_mask(blocks.reshape(1, -1), kept, blocks.size).reshape(blocks.shape)
    return np.repeat(mask, rows, axis=0)


def unstructured_mask(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """Drop exactly round(sparsity · size) weights, the smallest, wherever they stand: blocks of one weight."""
    return block_mask(weight, sparsity, rows=1)


def compress(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store a 2:4 matrix as values and 2-bit positions, row-major, in the format of torch's semi-structured tensors.

    weight `[out, in]`, float or int8, at most 2 non-zeros in each group of 4; it stays as it was. Returns values
    `[out, in/2]` in its very dtype, every non-zero as it is, however small, and metadata `[out, in/16]` int16, four
    groups a word (int8: `[out, in/32]` int32, eight groups). A group is the nibble lower | higher << 2 of its ascending
    positions; group g of a word is in bits 4g … 4g+3. With fewer than two non-zeros, a slot that has nothing to hold
    points at the first free of positions 2 and 3. float32 and float64 are stored alike.
    Raises ValueError for more non-zeros, for columns that do not fill whole words, and for non-finite weights.
    """
    rows, columns = magnitudes(weight).shape
    word, groups_per_word = word_layout(weight.dtype)
    if columns % (4 * groups_per_word):
        raise ValueError(f"weight has {columns} columns, not divisible by the {4 * groups_per_word} of a metadata word")
    groups = weight.reshape(rows, -1, 4)
    nonzero = groups != 0
    if (crowded := nonzero.sum(axis=-1) > 2).any():
        row, group = np.argwhere(crowded)[0]
        raise ValueError(f"weight is not 2:4: row {row}, columns {4 * group} to {4 * group + 3}: {groups[row, group]}")
    at0, at1, _, at3 = np.moveaxis(nonzero, -1, 0)
    lower = np.select([at0, at1], [0, 1], 2)
    higher = np.select([at0 & at1, at3 | (lower == 2)], [1, 3], 2)
    values = np.take_along_axis(groups, np.stack((lower, higher), axis=-1), axis=-1)
    nibbles = (lower | higher << 2).reshape(rows, -1, groups_per_word)
    metadata = (nibbles << 4 * np.arange(groups_per_word)).sum(axis=-1)
    return values.reshape(rows, -1), metadata.astype(word)


def prune_and_compress(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`compress` of what `n_m_mask` keeps, 2 of 4; what the kernel of this name does in one pass."""
    return compress(np.where(n_m_mask(weight), weight, 0))


def decompress(values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    """Inverse of `compress`: the dense weight `[out, in]`, +0 where no value stood. Raises as `positions`."""
    index = positions(values, metadata)
    groups = np.zeros((*index.shape[:2], 4), dtype=values.dtype)  # [out, groups, 4]
    np.put_along_axis(groups, index, values.reshape(index.shape), axis=-1)
    return groups.reshape(len(values), -1)


def sparse_matmul(x: np.ndarray, values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    """y = x Wᵀ from the compressed W, by in/2 products for each output: those with dropped weights are never made.

    x `[tokens, in]`, values `[out, in/2]`, metadata row-major as `compress` makes it; returns `[tokens, out]`. So an
    activation reaches only the rows that store a value for it, even if it is NaN, which times 0 would still be NaN.
    Products and sums are in numpy's common dtype of x and values: float64 x stays float64 beside int8 or float16
    values. int8 values come with int32 words. No operand is changed.
    Raises ValueError if they do not fit together.
    """
    index = positions(values, metadata)
    if x.ndim != 2 or x.shape[1] != 2 * values.shape[1]:
        raise ValueError(f"x must be [tokens, {2 * values.shape[1]}] for this weight, got shape {x.shape}")
    columns = (4 * np.arange(index.shape[1])[:, None] + index).reshape(values.shape)  # [out, in/2]
    return np.stack([x[:, column] @ kept for column, kept in zip(columns, values, strict=True)], axis=-1)


def compress_n_m(weight: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Store an n:m matrix of any n and m as values and positions, for which ⌈log2 m⌉ bits each are enough.

    weight `[out, in]`, at most n non-zeros in each group of m; it stays as it was. Returns values `[out, in · n/m]` in
    its dtype, and their positions 0 .. m-1 in their groups, packed by `bit_fields.pack` in ⌈log2 m⌉ bits. In a group
    values stand by ascending position; those of which there are fewer than n make room for the first of its zeros.
    Raises ValueError for a group with more non-zeros, m outside 2 .. 16, and as `n_m_mask`.
    """
    bits, kept = index_bits(m), n_m_mask(weight, n, m)  # zeros are the smallest, the first of them stay
    if (lost := (weight != 0) & ~kept).any():
        row, column = np.argwhere(lost)[0]
        start = column // m * m
        raise ValueError(f"weight is not {n}:{m}: row {row}, columns {start} to {start + m - 1} hold more non-zeros")
    index = np.broadcast_to(np.arange(weight.shape[1]) % m, weight.shape)[kept]
    return weight[kept].reshape(len(weight), -1), pack(index.reshape(len(weight), -1), bits)


def decompress_n_m(values: np.ndarray, packed: np.ndarray, n: int, m: int) -> np.ndarray:
    """Inverse of `compress_n_m`: the dense weight `[out, in]`, +0 where no value stood. Raises as `columns_n_m`."""
    dense = np.zeros((len(values), values.shape[1] // n * m), dtype=values.dtype)
    np.put_along_axis(dense, columns_n_m(values, packed, n, m), values, axis=1)
    return dense


def matmul_n_m(x: np.ndarray, values: np.ndarray, packed: np.ndarray, n: int, m: int) -> np.ndarray:
    """y = x Wᵀ from an n:m weight as `compress_n_m` stores it: in · n/m products for each output.

    x `[tokens, in]`; returns `[tokens, out]` in numpy's common dtype of x and values, in which it is summed. As in
    `sparse_matmul` an activation reaches only the rows that store a value for it, and no operand is changed.
    Raises ValueError if they do not fit together.
    """
    columns = columns_n_m(values, packed, n, m)
    if x.ndim != 2 or x.shape[1] != values.shape[1] // n * m:
        raise ValueError(f"x must be [tokens, {values.shape[1] // n * m}] for this weight, got shape {x.shape}")
    return np.stack([x[:, column] @ kept for column, kept in zip(columns, values, strict=True)], axis=-1)


def cutlass_offsets(metadata: np.ndarray) -> np.ndarray:
    """Where each row-major metadata word goes in CUTLASS's flat order, which suits tensor cores: `[out, words]`.

    In strips of 32 rows the rows r, r + 8, r + 16, r + 24 become neighbours (int32 words: strips of 16, rows r and
    r + 8); then in each 2 × 2 block the two words off the diagonal trade places; then two columns at a time are stored
    row by row. Source: reorder_meta in CUTLASS's host_reorder.h; torch has it in sparse/_semi_structured_conversions.py
    as _calculate_meta_reordering_scatter_offsets.
    Raises ValueError for rows that do not fill strips (32 rows of int16, 16 of int32), or an odd number of words.
    """
    rows, words = metadata.shape
    strip = 64 // metadata.itemsize
    if rows % strip or words % 2:
        raise ValueError(f"CUTLASS's order needs rows divisible by {strip} and even words, got {rows} and {words}")
    row, column = np.indices((rows, words))
    row = row // strip * strip + row % 8 * (strip // 8) + row % strip // 8
    off_diagonal = (row ^ column) & 1
    row, column = row ^ off_diagonal, column ^ off_diagonal
    return column // 2 * 2 * rows + row * 2 + column % 2


def to_cutlass(metadata: np.ndarray) -> np.ndarray:
    """Row-major metadata `[out, words]` in CUTLASS's order, same shape and dtype. Raises as `cutlass_offsets`."""
    return metadata.reshape(-1)[np.argsort(cutlass_offsets(metadata), axis=None)].reshape(metadata.shape)


def from_cutlass(metadata: np.ndarray) -> np.ndarray:
    """Inverse of `to_cutlass`."""
    return metadata.reshape(-1)[cutlass_offsets(metadata)]


class SparseLinear(nn.Module):
    """A linear layer that holds its 2:4 weight compressed, for inference: 9/16 of the bytes in 16 bits.

    On CUDA the kernel multiplies by the compressed weight. Elsewhere, in 32 bits, and where x wants a gradient, the
    weight is expanded for each call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Raises ValueError if the weight is not 2:4 (`prune_each` makes it so) or its inputs not divisible by 16."""
        super().__init__()
        values, metadata = compress(linear.weight.detach().double().cpu().numpy())
        self.values = nn.Buffer(torch.from_numpy(values).to(linear.weight))
        self.metadata = nn.Buffer(torch.from_numpy(metadata).to(linear.weight.device))
        self.bias = linear.bias

    def weight(self) -> Tensor:
        """The expanded weight `[out, in]`."""
        nibbles = self.metadata.long()[..., None] >> torch.arange(0, 16, 4, device=self.metadata.device)
        index = torch.stack((nibbles & 3, nibbles >> 2 & 3), dim=-1)  # [out, words, 4 groups, 2]
        groups = self.values.new_zeros(*nibbles.shape, 4)
        return groups.scatter(-1, index, self.values.view(index.shape)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if not x.is_cuda or x.element_size() != 2 or wants_gradient:
            return F.linear(x, self.weight(), self.bias)
        from kernels.sparsity.n_m import sparse_matmul as kernel

        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        out = kernel(tokens, self.values, self.metadata).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def compress_model(model: Transformer) -> None:
    """Replace every linear layer of the blocks, 2:4 already, by its `SparseLinear`. ValueError if one is not."""
    for name, layer in surgery.linears(model).items():
        surgery.replace(model, name, SparseLinear(layer))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run n_m`."""
    parser.add_argument("--n", type=int, default=2, help="weights kept (default 2)")
    parser.add_argument("--m", type=int, default=4, help="of so many neighbours (default 4)")
    parser.add_argument("--pattern", type=pattern, metavar="N:M", help="both at once, such as 1:4")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune by magnitude in one shot, which needs no calibration tokens."""
    n, m = args.pattern or (args.n, args.m)
    prune_each(model, partial(n_m_mask, n=n, m=m))
    return {"bits per weight": n / m * (32 + (m - 1).bit_length()), "kept": f"{n} of {m}"}


def perplexities(lab: Lab, rule: Rule) -> list[float]:
    """Perplexity after one-shot pruning by `rule`, for each seed.

    Pruning draws nothing at random, but which weights share a group is an accident of the order in which a network
    stores its channels. So a seed reorders rows and columns, and the mask is put back in place; 0 leaves them.
    """

    def mask(weight: np.ndarray, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        place = np.ix_(*(generator.permutation(size) if seed else np.arange(size) for size in weight.shape))
        kept = np.empty(weight.shape, dtype=bool)
        kept[place] = rule(weight[place])
        return kept

    models = [lab.model() for _ in lab.seeds]
    for model, seed in zip(models, lab.seeds, strict=True):
        prune_each(model, partial(mask, seed=seed))
    return [lab.perplexity(model) for model in models]


def rules(sparsity: float, *patterns: tuple[int, int]) -> dict[str, Rule]:
    """Rules that drop the same share of the weights, by name, the freest first."""
    free, blocks = (partial(rule, sparsity=sparsity) for rule in (unstructured_mask, block_mask))
    n_m = {f"{n}:{m}": partial(n_m_mask, n=n, m=m) for n, m in patterns}
    return {"unstructured": free, **n_m, "4-row blocks": blocks}


def picture(weight: np.ndarray, dense: float, perplexity: dict[str, float]) -> Figure:
    """The masks of one layer's corner, and what each way of dropping half costs in the model."""
    drawn, axes = panels(4, width=9.6, height=2.6)
    for place, (name, rule) in zip(axes, rules(0.5, (2, 4)).items(), strict=False):
        place.imshow(rule(weight)[:24, :24], cmap="Greys", interpolation="nearest")
        place.set(title=name, xlabel="input", ylabel="output", xticks=[], yticks=[])
    axes[3].barh(list(perplexity)[::-1], list(perplexity.values())[::-1], color=COLOURS["method"])
    axes[3].axvline(dense, color=COLOURS["reference"], linestyle="--", label="dense")
    axes[3].set(title="50% zeros", xlabel="perplexity", xscale="log")
    legend(axes[3])
    return drawn


def claim(lab: Lab) -> Claim:
    """2:4 costs more than zeros anywhere and less than zeros in 4-row blocks; full: other N:M, also 25% zeros."""
    half = rules(0.5, (4, 8), (2, 4)) if lab.full else rules(0.5, (2, 4))
    quarter = rules(0.25, (6, 8), (3, 4)) if lab.full else {}
    found = {name: perplexities(lab, rule) for name, rule in half.items()}
    denser = {name: perplexities(lab, rule) for name, rule in quarter.items()}
    means = {name: float(np.mean(seeds)) for name, seeds in found.items()}
    compared = ("unstructured", "2:4", "4-row blocks")
    free, pairs, blocks = (means[name] - lab.base_perplexity for name in compared)
    return Claim(
        sentence=f"Dropping half of the weights by magnitude costs {free:.1f} perplexity where any may go, {pairs:.1f} "
        f"in the 2:4 pattern and {blocks:.1f} in blocks of 4 rows (dense: {lab.base_perplexity:.1f}).",
        holds=all(a < b < c for a, b, c in zip(*(found[name] for name in compared), strict=True)),
        numbers={"perplexity, dense": lab.base_perplexity}
        | {f"perplexity, {name}, 50% zeros": mean for name, mean in means.items()}
        | {f"perplexity, {name}, 25% zeros": float(np.mean(seeds)) for name, seeds in denser.items()},
        figure=picture(lab.weights["blocks.0.attention.q_proj.weight"].numpy(), lab.base_perplexity, means),
        setting=f"all block linears, one shot, no retraining; {lab.validation.numel()} validation tokens; seeds "
        f"{lab.seeds} reorder rows and columns first (0: as stored), because pruning draws nothing at random",
    )
