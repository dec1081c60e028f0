"""Sparse feed-forward: a small controller picks one neuron of each block, and a decode step reads only those weights.

Many neurons of a ReLU layer say 0 for a token, but that is known only after their weights were read. So another layer,
of low rank, learns to say beforehand which one of each block of n neurons is needed. With units u = b n + j, j < n:

    logits[t, b, j] = second[u] · (first x[t]) + bias[b, j]                            the controller
    training     mask[t, b] = softmax(logits[t, b]), or, in a share of the steps, one-hot at
                 argmax_j(log softmax(logits[t, b]) + 0.1 · gumbel), with the gradient of the softmax
    inference    mask[t, b] one-hot at chosen[t, b] = argmax_j logits[t, b, j]
    y[t] = Σ_u relu(mask[t, u] · up[u] · x[t]) · down[u]

Saves    of the 2 C F weights of a layer, a token reads 2 C F / n, and r (C + F) + F of the controller. With r = C / n,
         as in the paper, and F = 4 C the controller adds 5/8: about 1.6 / n in all. Operations fall alike.
Costs    training computes all neurons, and the controller; a token has F / n neurons, not F; and T tokens of a batch
         choose each for itself: with even choices they read F (1 - (1 - 1 / n)^T) neurons, 63% of all for T = n.
Paper    Jaszczur et al.: Sparse is Enough in Scaling Transformers, 2021, arXiv:2111.12763, section 3.1.
Follows  the authors' code (trax, SparseFF): no ReLU between first and second; the temperature 0.1 scales the noise
         alone, not its sum with the logits; one draw for a whole call says hard (0.3 of the calls) or soft. The mask
         stands before the ReLU, so in a hard step the controller learns from the chosen neurons only. There, unit j
         of block b is b n + j in the first matrix, j F / n + b in the second; here one index. No bias after down.
Symbols  x `[tokens, C]`; first `[r, C]`, second `[F, r]`, bias `[blocks, n]` with blocks = F / n; up, down `[F, C]`:
         a neuron is a row of both (down is the transpose of a dense layer's); chosen int `[tokens, blocks]`.
Kernel   kernels/sparsity/sparse_ffn.py
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared import small_models
from minitfm.config import Config
from minitfm.model import MakeFeedForward, Transformer


def controller_logits(x: np.ndarray, first: np.ndarray, second: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """How much the controller wants each unit: `[tokens, blocks, n]`, from x `[tokens, C]`.

    first `[r, C]`, second `[blocks · n, r]`, bias `[blocks, n]`. Raises ValueError for shapes that do not fit, and
    unless all numbers are finite.
    """
    shapes = f"got shapes {x.shape}, {first.shape}, {second.shape} and {bias.shape}"
    if any(part.ndim != 2 for part in (x, first, second, bias)) or bias.size == 0:
        raise ValueError(f"x, first, second and bias must be matrices, bias not empty, {shapes}")
    if x.shape[1:] != first.shape[1:] or second.shape != (bias.size, len(first)):
        raise ValueError(f"x must be [tokens, C], first [r, C], second [F, r] and bias [blocks, n], {shapes}")
    for name, part in (("x", x), ("first", first), ("second", second), ("bias", bias)):
        if not np.isfinite(part).all():
            raise ValueError(f"{name} must be finite: an argmax would hide the NaN")
    return (x @ first.T @ second.T).reshape(len(x), *bias.shape) + bias


def choose(logits: np.ndarray) -> np.ndarray:
    """Inference: the place of each block's largest logit, int64 `[tokens, blocks]`; of equals the lowest."""
    return logits.argmax(axis=-1)


def training_mask(logits: np.ndarray, uniform: np.ndarray, hard: bool, temperature: float = 0.1) -> np.ndarray:
    """What multiplies the neurons in a training step, `[tokens, blocks, n]` in the dtype of logits.

    logits   `[tokens, blocks, n]`, finite; uniform: of the same shape, drawn from (0, 1)
    hard     False: the softmax over each block, without noise. True: 1 at the largest of log softmax + temperature ·
             gumbel, 0 elsewhere, where gumbel = -log(-log(uniform)); of equals the lowest place
    No logit is so large that the mask is wrong. No argument is changed. Hard or not, raises ValueError for shapes that
    differ or are not of three axes, for logits that are not finite, for uniform outside (0, 1) or NaN, and for a
    temperature that is negative or not finite.
    """
    if logits.ndim != 3 or logits.shape != uniform.shape or not np.isfinite(logits).all():
        raise ValueError(f"logits must be finite and shaped like uniform, got {logits.shape} and {uniform.shape}")
    if not ((uniform > 0) & (uniform < 1)).all():
        raise ValueError(f"uniform must lie in (0, 1), got {uniform.min()} to {uniform.max()}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be from 0 and finite, got {temperature}")
    with np.errstate(over="ignore"):  # what lies too far below the largest is -inf, and its exp 0
        shifted = logits - logits.max(axis=-1, keepdims=True)
    log_mask = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    if not hard:
        return np.exp(log_mask)
    gumbel = -np.log(-np.log(uniform.astype(np.float64)))
    best = (log_mask + temperature * gumbel).argmax(axis=-1)
    return np.eye(logits.shape[-1], dtype=logits.dtype)[best]


def chosen_rows(chosen: np.ndarray, units: int) -> np.ndarray:
    """The rows b · n + chosen[t, b] of up and of down, int64 `[tokens, blocks]`, where n = units / blocks.

    Raises ValueError unless chosen is `[tokens, blocks]`, blocks divide units, and each choice is in range(n).
    """
    if chosen.ndim != 2 or chosen.shape[1] < 1 or units % chosen.shape[1]:
        raise ValueError(f"chosen must be [tokens, blocks] with blocks that divide {units} units, got {chosen.shape}")
    n = units // chosen.shape[1]
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < n:
        raise ValueError(f"chosen must be in range({n}), got {chosen.min()} to {chosen.max()}")
    return np.arange(0, units, n) + chosen.astype(np.int64)


def active(x: np.ndarray, up: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """hidden[t, b] = relu(up[row] · x[t]) of the chosen neuron of each block, row = b · n + chosen[t, b].

    x `[tokens, C]`, up `[blocks · n, C]`, chosen int `[tokens, blocks]`, in range(n); returns `[tokens, blocks]` in the
    dtype that x and up share by promotion. A row that no token chose is not looked at: it may hold NaN. In what is
    looked at a NaN stays one. No argument is changed. Raises ValueError for shapes that do not fit, and as
    `chosen_rows`.
    """
    if x.ndim != 2 or up.ndim != 2 or x.shape[1] != up.shape[1] or len(x) != len(chosen):
        raise ValueError(f"x must be [tokens, C] and up [F, C], got {x.shape} and {up.shape} for chosen {chosen.shape}")
    rows = chosen_rows(chosen, len(up))
    return np.maximum(np.einsum("tbc,tc->tb", up[rows], x), 0)


def combine(hidden: np.ndarray, chosen: np.ndarray, down: np.ndarray) -> np.ndarray:
    """y[t] = Σ_b hidden[t, b] · down[b · n + chosen[t, b]], `[tokens, C]`, in the dtype that hidden and down share.

    hidden `[tokens, blocks]`, chosen int like it, in range(n), down `[blocks · n, C]`. A row that no token chose, or
    only with hidden 0, is not looked at: it may hold NaN. Else a NaN stays one. No argument is changed. Raises
    ValueError for shapes that do not fit, and as `chosen_rows`.
    """
    if down.ndim != 2 or hidden.shape != chosen.shape:
        raise ValueError(f"hidden must be like chosen, down [F, C], got {hidden.shape}, {chosen.shape}, {down.shape}")
    rows = down[chosen_rows(chosen, len(down))]  # [tokens, blocks, C]
    return np.einsum("tb,tbc->tc", hidden, np.where(hidden[..., None] == 0, 0, rows))


def decode_step(
    x: np.ndarray, first: np.ndarray, second: np.ndarray, bias: np.ndarray, up: np.ndarray, down: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The layer at inference: y `[tokens, C]` and what the controller chose, int64 `[tokens, blocks]`."""
    chosen = choose(controller_logits(x, first, second, bias))
    return combine(active(x, up, chosen), chosen, down), chosen


def every_unit(x: np.ndarray, up: np.ndarray, down: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The definition, as training computes it: all neurons, times a mask `[tokens, blocks, n]`."""
    return np.maximum(x @ up.T * mask.reshape(len(x), -1), 0) @ down


def numbers_read(dim: int, hidden: int, n: int = 1, rank: int = 0) -> int:
    """Weights that a layer reads for one token: of two rows for each of hidden / n neurons, and of the controller.

    n = 1, rank = 0: a dense ReLU layer.
    """
    return 2 * dim * hidden // n + (rank * (dim + hidden) + hidden if rank else 0)


def drawn_mask(logits: Tensor, uniform: Tensor, hard: bool, temperature: float = 0.1) -> Tensor:
    """`training_mask` for tensors; hard or not, its gradient is that of the softmax (straight through)."""
    soft = logits.softmax(-1)
    if not hard:
        return soft
    noisy = logits.log_softmax(-1) - temperature * (-uniform.log()).log()
    return F.one_hot(noisy.argmax(-1), logits.shape[-1]).to(soft) + (soft - soft.detach())


class SparseFeedForward(nn.Module):
    """A feed-forward layer with a controller. It trains as above; in eval mode each token gets one neuron of a block.

    first, second, bias, up, down: parameters, laid out as above. After a pass in eval mode, `chosen` int64 `[tokens,
    blocks]` is what was picked. Fewer tokens than n are served by their own rows alone: on CUDA tensors by the kernel,
    elsewhere gathered. More of them would read most rows several times: then all neurons are computed, and masked.
    """

    def __init__(self, dim: int, hidden: int, n: int, rank: int, temperature: float = 0.1, hard: float = 0.3) -> None:
        """ValueError unless n divides hidden, all sizes are at least 1, and hard is a share."""
        super().__init__()
        if min(dim, hidden, n, rank) < 1 or hidden % n:
            raise ValueError(f"need n that divides hidden, rank >= 1, got n={n}, hidden={hidden}, rank={rank}")
        if not 0 <= hard <= 1 or not 0 <= temperature < math.inf:
            raise ValueError(f"need hard in [0, 1] and temperature >= 0, got {hard} and {temperature}")
        self.temperature, self.hard, blocks = temperature, hard, hidden // n
        self.first = nn.Parameter(torch.randn(rank, dim) / math.sqrt(dim))
        self.second = nn.Parameter(torch.randn(hidden, rank) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(blocks, n))
        self.up = nn.Parameter(torch.randn(hidden, dim) / math.sqrt(dim))
        self.down = nn.Parameter(torch.randn(hidden, dim) / math.sqrt(blocks))  # as many neurons are added
        self.chosen: Tensor | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """`controller_logits` of rows `[tokens, dim]`."""
        return F.linear(F.linear(rows, self.first), self.second).unflatten(1, self.bias.shape) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., dim]`, in the same shape."""
        rows = x.flatten(0, -2)
        done = self.draw(rows) if self.training else self.decide(rows)
        return done.view_as(x)

    def draw(self, rows: Tensor) -> Tensor:
        """A training step: one draw decides for all tokens whether the mask is hard, and each unit gets its noise."""
        logits = self.logits(rows)
        uniform = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        hard = bool(torch.rand(()) < self.hard)
        return self.masked(rows, drawn_mask(logits, uniform, hard, self.temperature))

    def decide(self, rows: Tensor) -> Tensor:
        """Inference, by the rows of the chosen neurons alone where there are few tokens."""
        few = len(rows) < self.bias.shape[1]
        if few and rows.is_cuda and not torch.is_grad_enabled():
            from kernels.sparsity.sparse_ffn import decode_step as kernel

            y, self.chosen = kernel(rows.contiguous(), self.first, self.second, self.bias, self.up, self.down)
            return y
        self.chosen = self.logits(rows).argmax(-1)
        if not few:
            return self.masked(rows, F.one_hot(self.chosen, self.bias.shape[1]).to(rows.dtype))
        unit = self.chosen + torch.arange(0, len(self.up), self.bias.shape[1], device=rows.device)
        hidden = F.relu(self.up[unit] @ rows[..., None])  # [tokens, blocks, 1]
        return (hidden.mT @ self.down[unit]).squeeze(1)

    def masked(self, rows: Tensor, mask: Tensor) -> Tensor:
        """`every_unit` for tensors."""
        return F.relu(F.linear(rows, self.up) * mask.flatten(1)) @ self.down


WIDTH = 4  # neurons of a layer over dim, usual for ReLU
DENSE, SPARSE, SMALL = "dense", "sparse", "small dense"


@dataclass(frozen=True)
class Sparse:
    """A `feed_forward` seam: WIDTH · dim neurons in every layer, one of n active, and a controller of rank `rank`.

    Outputs into the residual stream start smaller, as `Transformer.reset_parameters` has them.
    """

    n: int
    rank: int

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """The layer. ValueError unless n divides WIDTH · dim."""
        made = SparseFeedForward(config.dim, WIDTH * config.dim, self.n, self.rank)
        made.down.data /= math.sqrt(2 * config.layers)
        return made


def contenders(dim: int, n: int = 8, rank: int = 0) -> dict[str, tuple[MakeFeedForward, int]]:
    """Seams, and the weights of a layer that each reads for a token, by name: what the claim compares.

    All neurons are read; one of n; or, as a dense layer, as many numbers as that, controller included.
    rank: of the controller; 0: dim // n, as in the paper.
    """
    hidden, rank = WIDTH * dim, rank or max(1, dim // n)
    read = numbers_read(dim, hidden, n, rank)
    few = round(read / numbers_read(dim, 1))
    made = {DENSE: (small_models.Dense(hidden), numbers_read(dim, hidden)), SPARSE: (Sparse(n, rank), read)}
    return {**made, SMALL: (small_models.Dense(few), numbers_read(dim, few))}


@torch.no_grad()
def usage(model: Transformer, tokens: Tensor, layer: int) -> np.ndarray:
    """How often each neuron of a layer is chosen, as a share of the tokens `[N, T]`: `[blocks, n]`, each row sums to 1.

    ValueError for another kind of layer.
    """
    model(tokens)
    found = model.blocks[layer].get_submodule("feed_forward")
    if not isinstance(found, SparseFeedForward) or found.chosen is None:
        raise ValueError(f"layer {layer} of the model is a {type(found).__name__}, not a SparseFeedForward")
    return F.one_hot(found.chosen, found.bias.shape[1]).double().mean(0).numpy()


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run sparse_ffn`."""
    parser.add_argument("--n", type=int, default=8, help="neurons of a block, of which one is active (default 8)")
    parser.add_argument("--rank", type=int, default=0, help="of the controller (default: the model's width / n)")
    parser.add_argument("--steps", type=int, default=100, help="of training from random weights (default 100)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float]:
    """Train a small model with such layers, and two with dense ones: as many neurons, and as much read."""
    dim, found = small_models.small(lab.config).dim, {}
    if args.n < 1 or WIDTH * dim % args.n or args.rank < 0 or args.steps < 0:
        given = f"--n {args.n} --rank {args.rank} --steps {args.steps}"
        raise ValueError(f"--n must divide {WIDTH * dim} neurons, --rank and --steps be 0 or more, got {given}")
    for name, (layer, read) in contenders(dim, args.n, args.rank).items():
        model = small_models.fresh(lab, layer, args.steps, args.seed)
        found |= {f"perplexity, {name}": lab.perplexity(model), f"weights of a layer read, {name}": float(read)}
        if name == SPARSE:
            found["neurons of the first layer never chosen"] = float((usage(model, lab.validation, 0) == 0).mean())
    return found


def claim(lab: Lab) -> Claim:
    """One neuron of each block does nearly as well as all, and better than a dense layer as small as what is read.

    Holds if it beats the small layer in every run, and costs at most half of what the small one costs. The number of
    steps is what the budget allows, and few for a controller to learn in.
    """
    steps, dim, n = 500 if lab.full else 60, small_models.small(lab.config).dim, 8
    layers = contenders(dim, n)
    models = [[small_models.fresh(lab, layer, steps, seed) for layer, _ in layers.values()] for seed in lab.seeds]
    runs = np.array([[lab.perplexity(model) for model in trio] for trio in models])  # [seeds, 3]
    (dense, sparse, small), wins = runs.mean(0), int((runs[:, 1] < runs[:, 2]).sum())
    read = [number for _, number in layers.values()]
    sentence = (
        f"Reading one of {n} ReLU neurons of each block, with the controller {read[1] / read[0]:.0%} of the bytes, "
        f"costs {sparse - dense:.1f} perplexity after {steps} steps (dense: {dense:.1f}); a dense layer as small as "
        f"what is read costs {small - dense:.1f}, and was beaten in {wins} of {len(runs)} runs."
    )
    others = {read[1]: sparse} | (swept(lab, steps, 4, 16) if lab.full else {})
    shares = usage(models[0][1], lab.validation, lab.config.layers // 2)
    numbers = {f"perplexity, {name}": mean for name, mean in zip(layers, runs.mean(0), strict=True)}
    numbers |= {f"weights of a layer read, {name}": number for name, number in zip(layers, read, strict=True)}
    numbers["neurons of a middle layer never chosen"] = (shares == 0).mean()
    setting = (
        f"half the base model's width, random weights, {WIDTH * dim} ReLU neurons; AdamW, {steps} steps of "
        f"{small_models.BATCH} x {small_models.LENGTH} tokens for all; seeds {lab.seeds} draw weights, text and noise; "
        f"other n of the figure: seed {lab.seeds[0]}"
    )
    holds = wins == len(runs) and sparse - dense <= (small - dense) / 2
    return Claim(sentence, holds, numbers, draw({read[0]: dense, read[2]: small}, others, shares), setting)


def swept(lab: Lab, steps: int, *sizes: int) -> dict[int, float]:
    """{weights of a layer read: perplexity} for blocks of other sizes, after one run each."""
    layers = [contenders(small_models.small(lab.config).dim, n)[SPARSE] for n in sizes]
    return {read: lab.perplexity(small_models.fresh(lab, layer, steps, lab.seeds[0])) for layer, read in layers}


def draw(dense: dict[int, float], sparse: dict[int, float], shares: np.ndarray) -> Figure:
    """{weights read: perplexity} of each kind, and which neurons of each block a layer uses."""
    fig, (left, right) = panels(2, width=9.0, height=2.8)
    for found, role, name in ((dense, "baseline", "dense"), (sparse, "method", "one of n")):
        left.plot(sorted(found), [found[read] for read in sorted(found)], **series(role), label=name)
    left.set(xlabel="weights of a layer read for a token", ylabel="perplexity", xscale="log", title="quality")
    legend(left)
    heatmap(right, shares.T, "share of the tokens")
    right.set(xlabel="block", ylabel="neuron of the block", title="who is chosen")
    return fig
