"""Experts: sort the tokens by their expert, multiply each run by its own matrix, and bring the rows back.

    order, offsets = permute(expert, kept)                        which choice stands in which row; where experts begin
    hidden[i] = act(up[e] · x[order[i] // k])                     for rows i from offsets[e] to offsets[e + 1]
    y[i] = down[e] · hidden[i]                                    a grouped matmul: one matrix for each run of rows
    out[t] = Σ_j weight[t, j] · y[row of choice t·k + j]          back in the tokens' order, weighed, added over j

The definition asks every expert about every token and multiplies most answers by 0: E / k times the work. A loop over
experts that looks for its tokens does the work once, but one small step after the other. Sorted by expert, the rows of
all experts are one matrix, and one launch multiplies it. Nothing is padded and no shape depends on the routing: rows
of dropped choices stand at the end, so a GPU need not tell the CPU how many there are.

Saves    operations: 2 · k · (|up[e]| + |down[e]|) for a token, whatever E. Of E experts' weights only those are read
         that some token chose: of T tokens with even and independent gates, about E (1 - (1 - k / E)^T) experts.
Costs    E experts in memory, each of which learns from its own k / E of the text only; a sort of tokens · k numbers;
         runs too short to fill a tile; and a decode step of a few times E / k tokens reads nearly all weights.
Paper    Shazeer et al., 2017, arXiv:1701.06538, section 2; Gale et al.: MegaBlocks, 2022, arXiv:2211.15841, sections 4
         and 5, from where the grouped product without padding; Fedus et al.: Switch, 2021, arXiv:2101.03961.
Follows  within an expert rows keep the order of choices (a stable sort); a token adds its experts' answers best first.
         A dropped choice counts 0 and is not computed. An expert without a token has an empty run and is not read.
Symbols  x `[tokens, in]`; expert int, kept bool, weight `[tokens, k]`; order int64 `[tokens · k]`, offsets int64
         `[experts + 1]`; up `[experts, 2 F or F, in]`, with "swiglu" the gate's F rows first; down `[experts, out, F]`.
Kernel   kernels/moe/experts.py
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.moe.routing import Gate, Routing
from chapters.runner import timed
from chapters.shared import moe_lab
from minitfm.config import Config
from minitfm.model import FeedForward, MakeFeedForward, Transformer, dense_feed_forward


def permute(expert: np.ndarray, kept: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices sorted by expert: order int64 `[tokens · k]` and offsets int64 `[experts + 1]`.

    expert int and kept bool, both `[tokens, k]`. Choice j of token t is number t · k + j. `order` lists these numbers:
    the kept choices of expert 0, those of expert 1, and so on, then all that were not kept; ascending within each.
    Rows offsets[e] to offsets[e + 1] are expert e's, none if nobody chose it; offsets[experts] choices were kept.
    Raises ValueError unless both have one shape `[tokens, k]`, experts >= 1 and all of expert is in range(experts).
    """
    if expert.ndim != 2 or kept.shape != expert.shape:
        raise ValueError(f"expert and kept must both be [tokens, k], got shapes {expert.shape} and {kept.shape}")
    if experts < 1 or (expert.size and not 0 <= expert.min() <= expert.max() < experts):
        raise ValueError(f"expert must be in range(experts), at least 1, got experts={experts} and {np.unique(expert)}")
    group = np.where(kept, expert.astype(np.int64), experts).ravel()  # int8 has no 128
    runs = np.bincount(group, minlength=experts)[:experts]
    offsets = np.concatenate(([0], np.cumsum(runs)))
    return np.argsort(group, kind="stable"), offsets.astype(np.int64)


def grouped_matmul(
    x: np.ndarray, weight: np.ndarray, offsets: np.ndarray, source: np.ndarray | None = None,
    target: np.ndarray | None = None, scale: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """y[target[i]] = scale[target[i]] · weight[e] x[source[i]] for rows i from offsets[e] to offsets[e + 1].

    x `[n, in]`; weight `[experts, out, in]`; offsets int `[experts + 1]`, from 0, never falling, at most R
    source  int `[R]`, rows of x, each any number of times; None: R = n and row i is row i of x
    target  int `[R]`, a permutation of range(R); None: row i goes to row i
    scale   `[R]`; None: 1
    Returns y `[R, out]` in the dtype that x and weight share by promotion. Rows from offsets[experts] on are nobody's:
    they are 0, whatever x and scale hold. A run may be empty. Raises ValueError for shapes, offsets, source or target
    that are not so. No argument is changed.
    """
    rows = len(x) if source is None else len(source)
    check_runs(x, weight, offsets, rows)
    source, target = (np.arange(rows) if index is None else index for index in (source, target))
    if source.size and not 0 <= source.min() <= source.max() < len(x):
        raise ValueError(f"source must be rows of x, 0 to {len(x) - 1}, got {source.min()} to {source.max()}")
    if target.shape != (rows,) or (np.sort(target) != np.arange(rows)).any():
        raise ValueError(f"target must list each of the {rows} rows once, got shape {target.shape}")
    if scale is not None and scale.shape != (rows,):
        raise ValueError(f"scale must have one number for each of the {rows} rows, got shape {scale.shape}")
    y = np.zeros((rows, weight.shape[1]), np.result_type(x, weight))
    for e, matrix in enumerate(weight):
        run = slice(offsets[e], offsets[e + 1])
        done = x[source[run]] @ matrix.T
        y[target[run]] = done if scale is None else scale[target[run], None] * done
    return y


def check_runs(x: np.ndarray, weight: np.ndarray, offsets: np.ndarray, rows: int) -> None:
    """Refuse operands of `grouped_matmul` that do not fit together."""
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [n, in] and weight [experts, out, in], got shapes {x.shape} and {weight.shape}")
    if offsets.shape != (len(weight) + 1,):
        raise ValueError(f"offsets must be [experts + 1] = {(len(weight) + 1,)}, got shape {offsets.shape}")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > rows:
        raise ValueError(f"offsets must rise from 0 to at most {rows} rows, got {offsets.tolist()}")


def combine(y: np.ndarray, order: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """out[t] = Σ_j weight[t, j] · y[the row i with order[i] = t · k + j], `[tokens, out]`.

    y `[tokens · k, out]`, sorted as `order` int `[tokens · k]` says; weight `[tokens, k]`. Each token's terms are
    added in the order j = 0, 1, .., so that the same rows give the same bits. Where a weight is 0 the row is not
    looked at: it may hold NaN. The result has the dtype of y. Raises ValueError for shapes that do not fit. No argument
    is changed.
    """
    tokens, k = weight.shape
    if y.ndim != 2 or len(y) != tokens * k or order.shape != (tokens * k,):
        raise ValueError(f"y and order must have {tokens} · {k} rows, got shapes {y.shape} and {order.shape}")
    chosen = np.empty_like(y)
    chosen[order] = y
    chosen = chosen.reshape(tokens, k, y.shape[1])
    out = np.zeros((tokens, y.shape[1]), y.dtype)
    for j in range(k):
        counts = weight[:, j] != 0
        out[counts] += weight[counts, j, None].astype(y.dtype) * chosen[counts, j]
    return out


def activate(hidden: np.ndarray, activation: str = "swiglu") -> np.ndarray:
    """silu(gate) · up of hidden `[n, 2 F]` = (gate, up) for "swiglu", relu of hidden `[n, F]` for "relu".

    Raises ValueError for another activation, and for an odd number of columns with "swiglu".
    """
    if activation == "relu":
        return np.maximum(hidden, 0)
    if activation != "swiglu" or hidden.shape[1] % 2:
        raise ValueError(f'need "relu" or "swiglu" with 2 F columns, got {activation!r} with {hidden.shape[1]}')
    gate, up = np.split(hidden, 2, axis=1)
    return gate * 0.5 * (1 + np.tanh(gate / 2)) * up  # x · sigmoid(x), without overflow


def feed_forward(
    x: np.ndarray, up: np.ndarray, down: np.ndarray, routing: Routing[np.ndarray], activation: str = "swiglu"
) -> np.ndarray:
    """A layer of experts, x `[tokens, in]` to `[tokens, out]`, in the three steps above. Errors as in them."""
    order, offsets = permute(routing.expert, routing.kept, len(up))
    hidden = activate(grouped_matmul(x, up, offsets, order // routing.expert.shape[1]), activation)
    return combine(grouped_matmul(hidden, down, offsets), order, routing.weight)


def every_expert(
    x: np.ndarray, up: np.ndarray, down: np.ndarray, routing: Routing[np.ndarray], activation: str = "swiglu"
) -> np.ndarray:
    """The definition of `feed_forward`: each expert answers to each token, and most answers are multiplied by 0."""
    out = np.zeros((len(x), down.shape[1]), np.result_type(x, up, down))
    for e in range(len(up)):
        share = (routing.weight * (routing.kept & (routing.expert == e))).sum(axis=1, keepdims=True)
        out += share * (activate(x @ up[e].T, activation) @ down[e].T)
    return out


def permuted(expert: Tensor, kept: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`permute` for tensors, without its checks and without waiting for a GPU."""
    group, order = torch.where(kept, expert, experts).flatten().sort(stable=True)
    return order, torch.searchsorted(group, torch.arange(experts + 1, device=group.device))


def activated(hidden: Tensor, gated: bool) -> Tensor:
    """`activate` for tensors."""
    if not gated:
        return F.relu(hidden)
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate) * up


def fed_forward(x: Tensor, up: Tensor, down: Tensor, routing: moe_lab.Decision, gated: bool = True) -> Tensor:
    """`feed_forward` for tensors, differentiable. On CUDA, where no gradient is wanted, by two launches of the kernel.

    Otherwise one product for each expert that has rows, between two copies that move all rows.
    """
    (tokens, k), (order, offsets) = routing.weight.shape, permuted(routing.expert, routing.kept, len(up))
    weight = routing.weight.to(x.dtype).flatten()
    if x.is_cuda and not torch.is_grad_enabled():
        from kernels.moe.experts import grouped_matmul as kernel

        hidden = activated(kernel(x.contiguous(), up, offsets, order // k), gated)
        return kernel(hidden, down, offsets, None, order, weight).view(tokens, k, -1).sum(1)
    sizes = offsets.diff().tolist()
    order = order[: sum(sizes)]
    runs = x[order // k].split(sizes)
    # unbind: its gradient is one stack, where indexing makes a matrix of zeros for each expert, as large as all
    done = [
        F.linear(activated(F.linear(run, one), gated), two)
        for run, one, two in zip(runs, up.unbind(), down.unbind(), strict=True)
    ]
    chosen = x.new_zeros(tokens * k, down.shape[1])
    return chosen.index_copy(0, order, torch.cat(done) * weight[order, None]).view(tokens, k, -1).sum(1)


class GroupedMoE(moe_lab.MoE):
    """A `moe_lab.MoE` whose experts are two stacked tensors, and whose tokens are sorted instead of looked for.

    up `[experts, 2 F or F, dim]`, down `[experts, dim, F]`: parameters, laid out as above; gated: "swiglu", or "relu"
    """

    def __init__(self, up: Tensor, down: Tensor, gated: bool, router: nn.Module, policy: moe_lab.Policy) -> None:
        super().__init__((), router, policy)
        self.up, self.down, self.gated = nn.Parameter(up), nn.Parameter(down), gated

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., dim]`, in the same shape; a token that all experts dropped gets 0."""
        rows = x.flatten(0, -2)
        logits = self.router(rows.float())
        self.routing = self.policy(logits, self.training)
        self.penalty = self.policy.penalty(logits, self.routing)
        return fed_forward(rows, self.up, self.down, self.routing, self.gated).view_as(x)


class Grouped(moe_lab.Mixture):
    """A `feed_forward` seam: the same layers as `moe_lab.Mixture`, stacked, started as a dense model's are."""

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """The layer; outputs into the residual stream start smaller, as `Transformer.reset_parameters` has them."""
        hidden, gated = config.hidden_dim // self.share, config.activation == "swiglu"
        up = torch.randn(self.experts, hidden * (2 if gated else 1), config.dim) / math.sqrt(config.dim)
        down = torch.randn(self.experts, config.dim, hidden) / math.sqrt(2 * config.layers * hidden)
        router = nn.Linear(config.dim, self.experts, bias=False)
        nn.init.normal_(router.weight, std=0.02)
        return GroupedMoE(up, down, gated, router, self.policy)


def stacked(moe: moe_lab.MoE) -> GroupedMoE:
    """The same layer with its experts, each a `FeedForward`, stacked; it shares the router, the weights are copies.

    Raises ValueError for a layer without experts, for experts of another kind and for experts of different sizes.
    """
    experts = [expert for expert in moe.experts if isinstance(expert, FeedForward)]
    if not experts or len(experts) < len(moe.experts):
        raise ValueError(f"experts must be FeedForward modules, got {[type(one).__name__ for one in moe.experts]}")
    if len({(expert.gated, expert.up_proj.weight.shape) for expert in experts}) > 1:
        raise ValueError("experts must all be of one size to be stacked")
    gated = experts[0].gated
    halves = [[one.gate_proj.weight, one.up_proj.weight] if gated else [one.up_proj.weight] for one in experts]
    up = torch.stack([torch.cat(weights).detach() for weights in halves])
    down = torch.stack([one.down_proj.weight.detach() for one in experts])
    return GroupedMoE(up, down, gated, moe.router, moe.policy).train(moe.training)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run experts`."""
    parser.add_argument("--experts", type=int, default=8, help="copies of each dense layer (default 8)")
    parser.add_argument("--k", type=int, default=2, help="experts for a token (default 2)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float]:
    """Upcycle the base model, untrained: copies of one layer, weighed to 1, compute what the layer does. Then group."""
    if not 1 <= args.k <= args.experts:
        raise ValueError(f"need 1 <= k <= experts, got k={args.k} and experts={args.experts}")
    model = moe_lab.upcycle(lab, moe_lab.Mixture(Gate(args.k, None, "before"), args.experts), args.seed)
    looped, slow = timed(model, lab.validation[:8])
    for block in model.blocks:
        block.feed_forward = stacked(block.get_submodule("feed_forward"))  # pyright: ignore[reportArgumentType]
    grouped, quick = timed(model, lab.validation[:8])
    return {
        "perplexity of the dense model": lab.base_perplexity,
        "perplexity with experts": lab.perplexity(model),
        "seconds, loop over experts": slow,
        "seconds, grouped": quick,
        "largest difference of a logit": (looped - grouped).abs().max().item(),
        **{f"experts of a layer read for {n} tokens": touched(model, lab.validation, n) for n in (1, 4, 16)},
    }


@torch.no_grad()
def touched(model: Transformer, tokens: Tensor, count: int) -> float:
    """How many experts of a layer a decode step of `count` sequences reads, the mean over layers and steps.

    tokens `[N, T]`, of which the first N - N % count rows are taken, `count` at a time.
    """
    layers = [module for module in model.modules() if isinstance(module, moe_lab.MoE)]
    found = []
    for rows in tokens[: len(tokens) - len(tokens) % count].split(count):
        model(rows)
        for layer in layers:
            chosen, kept = layer.routing.expert, layer.routing.kept
            hit = F.one_hot(chosen, len(layer.routing.load)) * kept[..., None]  # [count · T, k, experts]
            found.append(hit.unflatten(0, (count, -1)).sum((0, 2)).bool().sum(1).double().mean())
    return torch.stack(found).mean().item()


GATE = Gate(2, None, "before")  # Mixtral's: two of eight, renormalised, with a place for every token
DENSE, MIXTURE = "dense", "8 experts"


def fresh(lab: Lab, steps: int, seed: int) -> dict[str, Transformer]:
    """The two models of the claim: the small dense one, and one with 8 experts of half its width, of which two run."""
    made: dict[str, MakeFeedForward] = {DENSE: dense_feed_forward, MIXTURE: Grouped(GATE, share=GATE.k)}
    return {name: moe_lab.fresh(lab, layer, steps, seed) for name, layer in made.items()}


def claim(lab: Lab) -> Claim:
    """A mixture of experts beats a dense model that does as many operations for a token, once it has read enough.

    Tried first, with another outcome: one expert of full width weighed by its raw gate, k = 1 as in Switch, stayed
    behind the dense model in 3 of 3 runs of 1000 steps.
    """
    steps = 2500 if lab.full else 100
    models = [fresh(lab, steps, seed) for seed in lab.seeds]
    runs = [{name: lab.perplexity(model) for name, model in pair.items()} for pair in models]
    dense, mixture = (float(np.mean([run[name] for run in runs])) for name in (DENSE, MIXTURE))
    wins, size = sum(run[MIXTURE] < run[DENSE] for run in runs), moe_lab.small(lab.config)
    more = models[0][MIXTURE].num_parameters() / models[0][DENSE].num_parameters()
    router = moe_lab.EXPERTS / (3 * size.hidden_dim)  # operations, as a share of the dense feed-forward layer's
    sentence = (
        f"With 8 experts of half the width, of which a token uses two, {more:.1f} times the weights and {router:.1%} "
        f"more operations in a feed-forward layer, perplexity after {steps} steps is {mixture:.1f}, against "
        f"{dense:.1f} of the dense model; lower in {wins} of {len(runs)} runs."
    )
    numbers = {
        "perplexity, dense": dense,
        "perplexity, 8 experts": mixture,
        "weights, 8 experts / dense": more,
        "operations of a feed-forward layer, 8 experts / dense": 1 + router,
        "fullest expert / mean load": float(moe_lab.measure(models[0][MIXTURE], lab.validation).imbalance.mean()),
    }
    setting = (
        f"half the base model's width, random weights; experts of half the dense layer's width, k = 2, renormalised, "
        f"no capacity limit; balance 0.01, z 0.001; AdamW, {steps} steps of {moe_lab.BATCH} x {moe_lab.LENGTH} tokens, "
        f"for both; seeds {lab.seeds} draw weights and text"
    )
    return Claim(sentence, wins == len(runs), numbers, draw(lab, runs, models[0][MIXTURE]), setting)


def draw(lab: Lab, runs: list[dict[str, float]], model: Transformer) -> Figure:
    """Perplexities by seed, and how many experts a decode step reads, beside what even gates would."""
    fig, (left, right) = panels(2, width=7.2, height=2.6)
    for name, role in ((DENSE, "baseline"), (MIXTURE, "method")):
        left.plot(lab.seeds, [run[name] for run in runs], **series(role), label=name)
    left.set(xlabel="seed", ylabel="perplexity", title="as many operations", xticks=lab.seeds)
    legend(left)
    counts = [1, 2, 4, 8, 16, 32]
    right.plot(counts, [touched(model, lab.validation[:32], n) for n in counts], **series("method"), label="measured")
    even = [moe_lab.EXPERTS * (1 - (1 - GATE.k / moe_lab.EXPERTS) ** n) for n in counts]
    right.plot(counts, even, **series("reference"), label="even gates")
    right.set(xlabel="tokens of a decode step", ylabel="experts read", title="weights read", xscale="log", ylim=(0, 8))
    legend(right)
    return fig
