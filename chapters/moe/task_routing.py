"""Task routing: the task decides, not the token, so what serves one task can be taken out as a small dense model.

    p = softmax(logits[task])                            logits [tasks, experts], learned, one table in each layer
    expert = the k largest of p,   weight = p[expert] / Σ p[expert]          the same for every token of the task
    y = Σ_j weight_j · down_j · act(up_j · x)            the layer, for x of that task
      = [weight_0 down_0 | weight_1 down_1 | ..] · act([up_0; up_1; ..] · x)            one dense layer, k times as wide

The second line of y is no approximation. act works on each hidden number alone, so k layers side by side are one whose
rows of up stand below each other and whose columns of down stand beside each other, multiplied by the weights. With
k = 1 it is the expert itself. A router that looks at tokens cannot be unfolded like this: the next token may need any
expert, so all of them stay in memory.

Saves    memory and its traffic: E experts in training, k in use; no router, no lines, no dropped token. A product of
         known shape, as in any dense model, and whatever compresses such a model goes on from there.
Costs    the task must be known beforehand; every task's model is a copy of its own of all that tasks share; a choice
         for a whole task is coarser than one for each token.
Paper    Kudugunta et al.: Beyond distillation: task-level mixture-of-experts, 2021, arXiv:2110.03742.
Follows  the gates of GShard (Lepikhin et al. 2020, arXiv:2006.16668): top k, renormalised. A task's embedding is its
         row of logits. Of equal logits the lower expert is chosen. down is multiplied in float32 and rounded once.
Symbols  x `[n, dim]`; up, gate `[experts, F, dim]` and down `[experts, dim, F]`: the matrices of all experts, stacked,
         gate for "swiglu" only: act = silu(gate · x) · (up · x), else relu; expert int64 and weight `[k]`.
Kernel   kernels/moe/task_routing.py
"""

from __future__ import annotations

import argparse
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim, require_writable
from chapters.figures import heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.moe.routing import Gate, route
from chapters.shared import moe_lab
from chapters.shared.text_kinds import KINDS, sorted_text
from minitfm import checkpoint, evaluate
from minitfm.config import Config
from minitfm.model import FeedForward, Transformer, dense_feed_forward

Shape = tuple[int, ...]


def select(logits: np.ndarray, task: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k experts of one task, best first, and their weights: expert int64 `[k]`, weight `[k]`, which sums to 1.

    logits `[tasks, experts]`; the weights are softmax(logits[task]) over its sum over the chosen experts, in the dtype
    of logits, at least float32. Of equal logits the lower expert comes first.
    Raises ValueError unless logits are a finite, non-empty matrix, for a task outside range(tasks), negative ones
    included, and unless 1 <= k <= experts.
    """
    if logits.ndim != 2 or logits.size == 0 or not np.isfinite(logits).all():
        raise ValueError(f"logits must be a finite, non-empty [tasks, experts] matrix, got shape {logits.shape}")
    require_task(task, len(logits))
    chosen = route(logits[task : task + 1], k, None, "before")
    return chosen.expert[0], chosen.weight[0]


def require_task(task: int, tasks: int) -> None:
    """Raise ValueError unless the task is one of range(tasks), TypeError unless it is a whole number."""
    if not 0 <= operator.index(task) < tasks:
        raise ValueError(f"task must be from 0 to {tasks - 1}, got {task}")


def dense(x: np.ndarray, up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None) -> np.ndarray:
    """A dense layer, x `[n, dim]`, up and gate `[F, dim]`, down `[dim, F]`: `[n, dim]`; "relu" where gate is None."""
    hidden = x @ up.T
    if gate is None:
        return np.maximum(hidden, 0) @ down.T
    opened = x @ gate.T
    return (opened * np.exp(-np.logaddexp(0, -opened)) * hidden) @ down.T  # sigmoid, also where exp overflows


def mixture(
    x: np.ndarray, task: np.ndarray, expert: np.ndarray, weight: np.ndarray,
    up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The layer by its definition: Σ_j weight[task, j] · dense(x) by expert[task, j]; `[n, dim]` in the dtype of x.

    x `[n, dim]` and the tasks of its rows, int `[n]`; expert int and weight `[tasks, k]`: what `select` gives for every
    task; up, gate `[experts, F, dim]` and down `[experts, dim, F]`, gate None for "relu".
    Raises ValueError unless task has one number for each row, all of them in range(tasks).
    """
    if task.shape != x.shape[:1]:
        raise ValueError(f"task must have one number for each of the {len(x)} rows of x, got shape {task.shape}")
    out = np.zeros_like(x)
    for one in np.unique(task):
        require_task(one, len(expert))
        rows = task == one
        for e, w in zip(expert[one], weight[one], strict=True):
            out[rows] += (w * dense(x[rows], up[e], down[e], None if gate is None else gate[e])).astype(x.dtype)
    return out


def gather(
    up: np.ndarray, down: np.ndarray, expert: np.ndarray, weight: np.ndarray, gate: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The chosen experts as one dense layer: up `[k F, dim]`, down `[dim, k F]`, gate `[k F, dim]` or None.

    up, gate `[experts, F, dim]`; down `[experts, dim, F]`; expert int and weight `[k]`. Rows j F to (j + 1) F of up and
    gate are those of expert[j], as they are; the same columns of down are that expert's times weight[j], multiplied in
    at least float32 and rounded once, to the dtype of down. Nothing is changed in place.
    Raises ValueError for an expert outside range(experts), negative ones included, 0 or more than `experts` of them, a
    weight that is not finite, and shapes that do not fit together.
    """
    check(up.shape, down.shape, expert.shape, weight.shape, None if gate is None else gate.shape)
    if expert.min() < 0 or expert.max() >= len(up):
        raise ValueError(f"expert must be from 0 to {len(up) - 1}, got {expert.min()} to {expert.max()}")
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite, it holds NaN or infinity")
    precise = np.result_type(down, np.float32)
    scaled = down[expert].astype(precise) * weight.astype(precise)[:, None, None]  # [k, dim, F]
    beside = scaled.transpose(1, 0, 2).reshape(down.shape[1], -1).astype(down.dtype)
    opens = None if gate is None else gate[expert].reshape(-1, gate.shape[2])
    return up[expert].reshape(-1, up.shape[2]), beside, opens


def check(up: Shape, down: Shape, expert: Shape, weight: Shape, gate: Shape | None) -> None:
    """Refuse shapes that `gather` cannot serve."""
    if len(up) != 3 or 0 in up or down != (up[0], up[2], up[1]) or gate not in (None, up):
        raise ValueError(f"up, gate must be [experts, F, dim], down [experts, dim, F], got {up=}, {gate=}, {down=}")
    if len(expert) != 1 or weight != expert or not 1 <= expert[0] <= up[0]:
        raise ValueError(f"expert and weight must both be [k] with 1 <= k <= {up[0]} experts, got {expert=}, {weight=}")


def gathered(
    up: Tensor, down: Tensor, expert: Tensor, weight: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`gather` for tensors; errors as there. On CUDA the kernel reads the chosen experts once, in one launch."""
    check(up.shape, down.shape, expert.shape, weight.shape, None if gate is None else gate.shape)
    if int(expert.min()) < 0 or int(expert.max()) >= len(up):
        raise ValueError(f"expert must be from 0 to {len(up) - 1}, got {expert.tolist()}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight must be finite, got {weight.tolist()}")
    if up.is_cuda and up.dtype != torch.float64:
        from kernels.moe.task_routing import gather as kernel

        return kernel(up, down, expert, weight.float(), gate)
    precise = torch.promote_types(down.dtype, torch.float32)
    scaled = down[expert].to(precise) * weight.to(precise)[:, None, None]
    beside = scaled.transpose(0, 1).flatten(1).to(down.dtype)
    return up[expert].flatten(0, 1), beside, None if gate is None else gate[expert].flatten(0, 1)


class TaskRouter(nn.Module):
    """Logits that depend on the task alone: `[tokens, dim] -> [tokens, experts]`, whatever the tokens are.

    scores  learned, `[tasks, experts]`; task: a number for all tokens, or an int64 tensor of one for each
    """

    def __init__(self, tasks: int, experts: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(0.02 * torch.randn(tasks, experts))
        self.task: int | Tensor = 0

    def forward(self, rows: Tensor) -> Tensor:
        task = torch.full((len(rows),), self.task) if isinstance(self.task, int) else self.task.flatten()
        if len(task) != len(rows):
            raise ValueError(f"task was set for {len(task)} tokens, got {len(rows)}")
        return self.scores[task]


def set_task(model: Transformer, task: int | Tensor) -> Transformer:
    """Say what the next tokens are: one task, or int64 of the tokens' own shape `[B, T]`. Returns the model.

    Raises ValueError for a task that a router of the model does not know. A model without one does as it did.
    """
    for router in (module for module in model.modules() if isinstance(module, TaskRouter)):
        for one in (int(task.min()), int(task.max())) if isinstance(task, Tensor) else (task,):
            require_task(one, len(router.scores))
        router.task = task if isinstance(task, Tensor) else operator.index(task)
    return model


@dataclass(frozen=True)
class TaskMixture:
    """A `feed_forward` seam: experts of 1 / k of the dense layer's width, so that a task's k cost as much as that."""

    tasks: int
    experts: int = moe_lab.EXPERTS
    k: int = 2
    balance: float = 0.01

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """An `MoE` without a capacity, its router a `TaskRouter`. ValueError unless 1 <= k <= experts, hidden width."""
        if self.tasks < 1 or not 1 <= self.k <= min(self.experts, config.hidden_dim):
            raise ValueError(f"need tasks >= 1 and 1 <= k <= experts, got {self.tasks}, {self.k} and {self.experts}")
        config = replace(config, hidden_dim=config.hidden_dim // self.k)
        experts = (FeedForward(config) for _ in range(self.experts))
        gate = Gate(self.k, None, "before", balance=self.balance)
        return moe_lab.MoE(experts, TaskRouter(self.tasks, self.experts), gate)


@torch.no_grad()
def extract(model: Transformer, task: int) -> Transformer:
    """A plain dense model that gives one task the logits of the mixture, to rounding; a copy, in eval mode.

    model: its feed-forward layers were made by a `TaskMixture`, so that each is an `MoE` with a `TaskRouter`.
    Raises ValueError for a task that it does not know and a layer of another kind.
    """
    layers = [block.get_submodule("feed_forward") for block in model.blocks]
    parts = [sub_network(layer, task) for layer in layers]
    config = replace(model.config, hidden_dim=len(parts[0]["up_proj.weight"]))
    with torch.random.fork_rng(devices=[]):
        plain = Transformer(config).to(model.embedding.weight)
    shared = {name: value for name, value in model.state_dict().items() if ".feed_forward." not in name}
    own = {f"blocks.{i}.feed_forward.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
    plain.load_state_dict(shared | own)
    return plain.eval()


def sub_network(layer: nn.Module, task: int) -> dict[str, Tensor]:
    """The weights of the `FeedForward` that one task's experts in a layer are together."""
    router = layer.router if isinstance(layer, moe_lab.MoE) else None
    if not isinstance(router, TaskRouter) or not isinstance(layer, moe_lab.MoE):
        raise ValueError(f"every feed-forward layer must be an MoE with a TaskRouter, got a {type(layer).__name__}")
    require_task(task, len(router.scores))
    chosen = layer.policy(router.scores[task : task + 1], False)
    states = [expert.state_dict() for expert in layer.experts]
    up, down, gate = (f"{part}_proj.weight" for part in ("up", "down", "gate"))
    stacks = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    made = gathered(stacks[up], stacks[down], chosen.expert[0], chosen.weight[0], stacks.get(gate))
    return {name: weight for name, weight in zip((up, down, gate), made, strict=True) if weight is not None}


def task_loss(model: Transformer, marked: Tensor) -> Tensor:
    """The loss of text whose ids are id + task · vocabulary; a model without tasks reads the same text unmarked."""
    size = model.config.vocab_size
    set_task(model, marked[:, :-1] // size)
    return moe_lab.text_and_penalties(model, marked % size)


@torch.no_grad()
def difference(model: Transformer, task: int, tokens: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """How far the extracted model's logits are from the mixture's at most, over the largest logit, both in `dtype`."""
    logits = set_task(model.to(dtype), task)(tokens)
    far = (extract(model, task)(tokens) - logits).abs().max() / logits.abs().max()
    model.float()
    return float(far)


MEASURED: tuple[str, ...] = ("its task's model", "other tasks' models", "dense model")


class Compared(NamedTuple):
    """One seed's mixture, the models of its tasks, and what was measured; others' models by their geometric mean."""

    model: Transformer
    parts: list[Transformer]
    perplexity: np.ndarray  # [MEASURED, tasks]
    exact: float  # largest `difference` in float64
    rounded: float  # and in float32


def compared(lab: Lab, seam: TaskMixture, steps: int, seed: int) -> Compared:
    """Train a mixture, and a dense model of the size of its parts, on the same text for as many steps; measure."""
    text = lab.once("text by task", lambda: sorted_text(lab))
    how = {"loss": task_loss, "stream": text.marked}
    model, plain = (moe_lab.fresh(lab, made, steps, seed, **how) for made in (seam, dense_feed_forward))
    parts = [extract(model, task) for task in range(seam.tasks)]
    nll = np.array([[evaluate.mean_nll(part, tokens) for part in parts] for tokens in text.measured])
    own, base = nll.diagonal(), np.array([evaluate.mean_nll(plain, tokens) for tokens in text.measured])
    foreign = (nll.sum(axis=1) - own) / (len(nll) - 1)
    exact, rounded = (
        max(difference(model, task, tokens[:8], dtype) for task, tokens in enumerate(text.measured))
        for dtype in (torch.float64, torch.float32)
    )
    return Compared(model, parts, np.exp(np.stack([own, foreign, base])), exact, rounded)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run task_routing`."""
    parser.add_argument("--task", choices=KINDS, default=KINDS[0], help=f"the task to take out (default {KINDS[0]})")
    parser.add_argument("--experts", type=int, default=moe_lab.EXPERTS, help="in each layer (default 8)")
    parser.add_argument("--k", type=int, default=2, help="experts for a task, each 1 / k as wide (default 2)")
    parser.add_argument("--steps", type=int, default=100, help="of training from random weights (default 100)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write the task's model there")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Train a small mixture, take one task's model out of it, compare, and write it if asked."""
    if args.steps < 1:
        raise ValueError(f"steps must be at least 1, got {args.steps}")
    if args.to:
        require_writable(args.to)
    found = compared(lab, TaskMixture(len(KINDS), args.experts, args.k), args.steps, args.seed)
    task = KINDS.index(args.task)
    part = found.parts[task]
    if args.to:
        checkpoint.save(args.to, part, lab.tokenizer, {"technique": "moe.task_routing", "task": args.task})
    perplexity = dict(zip(MEASURED, found.perplexity[:, task].tolist(), strict=True))
    return {
        "parameters, mixture": float(found.model.num_parameters()),
        "parameters, one task": float(part.num_parameters()),
        "largest difference of a logit / largest logit": found.rounded,
        **{f"perplexity on {args.task}, {name}": value for name, value in perplexity.items()},
        **({"try it": f"python -m minitfm generate --model {args.to}"} if args.to else {}),
    }


def claim(lab: Lab) -> Claim:
    """What serves one task is exactly the mixture, and smaller; how good it is beside a dense model is told too."""
    steps, seam = 300 if lab.full else 40, TaskMixture(len(KINDS))
    runs = [compared(lab, seam, steps, seed) for seed in lab.seeds]
    sizes = runs[0].model.num_parameters(), max(part.num_parameters() for part in runs[0].parts)
    exact, rounded = max(run.exact for run in runs), max(run.rounded for run in runs)
    logs = np.log([run.perplexity for run in runs])  # [seeds, MEASURED, tasks]
    own, foreign, base = np.exp(logs.mean(axis=(0, 2)))
    better = int((logs[:, 0].mean(axis=1) < logs[:, 2].mean(axis=1)).sum())
    sentence = (
        f"The model of one task has {sizes[1]:,} of the mixture's {sizes[0]:,} parameters and the same logits, to "
        f"{exact:.0e} of the largest in float64 and {rounded:.0e} in float32; perplexity on its own task is {own:.1f}, "
        f"with another task's experts {foreign:.1f}, and that of a dense model of its size, trained as long on all "
        f"tasks, {base:.1f}: better than dense in {better} of {len(runs)} runs."
    )
    means = dict(zip(MEASURED, np.exp(logs.mean(axis=0)), strict=True))
    by_task = {f"perplexity, {n}, {t}": v for n, mean in means.items() for t, v in zip(KINDS, mean, strict=True)}
    numbers = {"parameters, mixture": sizes[0], "parameters, one task": sizes[1], "largest difference, float64": exact,
               "largest difference, float32": rounded, "runs better than dense": better} | by_task  # fmt: skip
    setting = (
        f"half the base model's width, random weights, {seam.experts} experts of half a dense layer's width, k = 2, "
        f"balance {seam.balance}; tasks: paragraphs by layout ({', '.join(KINDS)}); AdamW, {steps} steps of "
        f"{moe_lab.BATCH} x {moe_lab.LENGTH} tokens; geometric means over tasks and seeds {lab.seeds}"
    )
    holds = exact < 1e-10 and rounded < 1e-4 and sizes[1] < sizes[0] and bool(own < foreign)
    return Claim(sentence, holds, numbers, draw(runs[0], means), setting)


def draw(run: Compared, means: dict[str, np.ndarray]) -> Figure:
    """Which experts each task took in the layers of one run, and the perplexities by task."""
    layers = [module for module in run.model.modules() if isinstance(module, moe_lab.MoE)]
    share = torch.zeros(len(KINDS), len(layers) * len(layers[0].experts))
    for i, layer in enumerate(layers):
        chosen = layer.policy(layer.router.get_parameter("scores").detach(), False)
        share.scatter_(1, chosen.expert + i * len(layer.experts), chosen.weight)
    fig, (left, right) = panels(2, width=8.4, height=2.6)
    heatmap(left, share.numpy(), "weight")
    left.set(xlabel="experts, layer by layer", ylabel="task", title="who serves whom")
    for (name, mean), role in zip(means.items(), ("method", "accent", "baseline"), strict=True):
        right.plot(KINDS, mean, **series(role), label=name)
    right.set(ylabel="perplexity", title="by task", ylim=(0, None))
    legend(right)
    return fig
