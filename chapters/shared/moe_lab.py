"""Small mixtures of experts to measure on, trained once for all chapters.

    policy = Gate(k=2, factor=1.0, renormalise="before")           # chapters/moe/routing.py; any `Policy` will do
    model = moe_lab.fresh(lab, Mixture(policy, share=2), 500)      # half the base model's width, from random weights
    model = moe_lab.upcycled(lab, Mixture(policy), 100)            # the base model, each feed-forward layer copied
    found = moe_lab.measure(model, lab.validation)                 # loads, dropped share, by layer

Nothing here decides where a token goes: a chapter brings that as a policy, or a `feed_forward` seam of its own.
Models are trained as `small_models` says, once for a setting. Upcycling: Komatsuzaki et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.small_models import BATCH, LENGTH, fresh, small, text_and_penalties, trained
from minitfm.config import Config
from minitfm.model import FeedForward, MakeFeedForward, Transformer

__all__ = ["BATCH", "LENGTH", "fresh", "small", "text_and_penalties", "trained"]  # mixtures are trained as all others
EXPERTS = 8


class Decision(Protocol):
    """What a layer reads of a routing; `chapters.moe.routing.Routing` is one."""

    expert: Tensor  # int64 [tokens, k]
    weight: Tensor  # [tokens, k], 0 where dropped
    load: Tensor  # int64 [experts]

    @property
    def kept(self) -> Tensor:
        """Bool `[tokens, k]`."""
        ...


class Policy(Protocol):
    """Decides where tokens go. Its repr must say everything that it does, as that of a frozen dataclass."""

    def __call__(self, logits: Tensor, training: bool) -> Any:
        """A `Decision` for logits `[tokens, experts]` float32; weights are differentiable."""
        ...

    def penalty(self, logits: Tensor, routing: Any) -> Tensor:
        """A scalar that training adds to the loss."""
        ...


class MoE(nn.Module):
    """A feed-forward layer of several experts, one after the other: y[t] = Σ_j weight[t, j] · expert[t, j](x[t]).

    experts  modules `[n, dim] -> [n, dim]`; router: a module `[tokens, dim] -> [tokens, experts]`, run in float32
    After each pass, `routing` is what the policy decided and `penalty` what it charges.
    """

    def __init__(self, experts: Iterable[nn.Module], router: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.experts, self.router, self.policy = nn.ModuleList(experts), router, policy
        self.routing: Any = None
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., dim]`, in the same shape; a token that all experts dropped gets 0."""
        rows = x.flatten(0, -2)
        logits = self.router(rows.float())
        self.routing = self.policy(logits, self.training)
        self.penalty = self.policy.penalty(logits, self.routing)
        return mix(rows, self.experts, self.routing).view_as(x)


def mix(rows: Tensor, experts: Iterable[nn.Module], routing: Decision) -> Tensor:
    """Each row `[tokens, dim]` through the experts that kept it, by the definition: a loop over experts."""
    out = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        token, choice = ((routing.expert == number) & routing.kept).nonzero(as_tuple=True)
        if len(token):
            done = routing.weight[token, choice, None].to(rows.dtype) * expert(rows[token])
            out = out.index_add(0, token, done)
    return out


@dataclass(frozen=True)
class Mixture:
    """A `feed_forward` seam: in every layer an `MoE` of dense experts behind a linear router."""

    policy: Policy
    experts: int = EXPERTS
    share: int = 1  # experts have 1 / share of the dense layer's hidden width: k = share costs as much as it does

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """The layer; its router starts small, so that all experts are about equally likely."""
        config = replace(config, hidden_dim=config.hidden_dim // self.share)
        router = nn.Linear(config.dim, self.experts, bias=False)
        nn.init.normal_(router.weight, std=0.02)
        return MoE((FeedForward(config) for _ in range(self.experts)), router, self.policy)


def upcycle(lab: Lab, feed_forward: MakeFeedForward, seed: int = 0) -> Transformer:
    """The base model with those feed-forward layers: every `FeedForward` in one holds a copy of the dense layer there.

    What else they hold, such as a router, starts as it was made, with torch's random state seeded by `seed`.
    ValueError for an expert of another width than the dense layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(lab.config, feed_forward=feed_forward)
    dense = lab.model()
    for name, weight in dense.state_dict().items():
        if ".feed_forward." not in name:
            model.state_dict()[name].copy_(weight)
    for block, source in zip(model.blocks, dense.blocks, strict=True):
        for module in block.get_submodule("feed_forward").modules():
            if isinstance(module, FeedForward):
                module.load_state_dict(source.get_submodule("feed_forward").state_dict())
    return model.eval()


def upcycled(lab: Lab, feed_forward: MakeFeedForward, steps: int = 100, seed: int = 0, **how: Any) -> Transformer:
    """`upcycle`, then `steps` steps of `trained` with the words of `how`; 0: none. In eval mode."""
    return trained(lab, upcycle(lab, feed_forward, seed), feed_forward, steps, seed, **how)


def set_policy(model: Transformer, policy: Policy) -> Transformer:
    """Let every `MoE` of the model route by another policy, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.policy = policy
    return model


class Measured(NamedTuple):
    """What routers did on some text, by layer.

    load       int64 `[layers, experts]`, choices of each expert before any was dropped
    kept       int64 `[layers, experts]`, those that it took
    unserved   `[layers]`, share of the tokens that all their experts dropped
    """

    load: Tensor
    kept: Tensor
    unserved: Tensor

    @property
    def dropped(self) -> Tensor:
        """Share of the choices that were dropped, `[layers]`."""
        return 1 - self.kept.sum(1) / self.load.sum(1)

    @property
    def imbalance(self) -> Tensor:
        """The longest line over the mean one, `[layers]`: from 1, all equal, to the number of experts, one gets all."""
        return self.load.amax(1) / self.load.double().mean(1)


@torch.no_grad()
def measure(model: Transformer, tokens: Tensor, batch: int = 16) -> Measured:
    """Run tokens `[N, T]` through the model, `batch` rows at a time as `evaluate.perplexity` does, and count.

    ValueError for a model without an `MoE`.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("the model has no MoE layer")
    passes = []
    for rows in tokens.split(batch):
        model(rows[:, :-1])
        passes.append(torch.stack([count(layer.routing) for layer in layers]))
    total = torch.stack(passes).sum(0)  # [layers, 2 experts + 1]
    experts = (total.shape[1] - 1) // 2
    return Measured(total[:, :experts], total[:, experts:-1], total[:, -1] / tokens[:, :-1].numel())


FULLEST, DROPPED, UNSERVED = "fullest expert / mean load", "dropped choices", "tokens without an expert"


def summary(lab: Lab, model: Transformer) -> dict[str, float]:
    """Perplexity, and what the gates do on the same text, each a mean over the layers."""
    found = measure(model, lab.validation)
    means = (found.imbalance.mean(), found.dropped.mean(), found.unserved.mean())
    numbers = zip((FULLEST, DROPPED, UNSERVED), map(float, means), strict=True)
    return {"perplexity": lab.perplexity(model), **dict(numbers)}


def count(routing: Decision) -> Tensor:
    """load, kept choices by expert, and the number of tokens without a place: one int64 vector."""
    kept = torch.bincount(routing.expert[routing.kept], minlength=len(routing.load))
    return torch.cat((routing.load, kept, (~routing.kept.any(1)).sum()[None]))


FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def draw(models: dict[str, Transformer], tokens: Tensor) -> Figure:
    """What each expert is sent, and what is dropped by capacity factor, for two models under their names.

    Their policies are dataclasses that have a `factor`; they are put back.
    """
    fig, (left, right) = panels(2, width=7.2, height=2.6)
    for (words, model), role in zip(models.items(), ("baseline", "method"), strict=True):
        policy: Any = next(module.policy for module in model.modules() if isinstance(module, MoE))
        found = [measure(set_policy(model, replace(policy, factor=factor)), tokens) for factor in FACTORS]
        set_policy(model, policy)
        load = (found[0].load / found[0].load.sum(1, keepdim=True)).sort(1, descending=True).values.mean(0)
        left.plot(range(1, len(load) + 1), load, **series(role), label=words)
        right.plot(FACTORS, [float(one.dropped.mean()) for one in found], **series(role), label=words)
    left.set(xlabel="expert, fullest first", ylabel="share of choices", title="load, mean over layers", ylim=(0, None))
    right.set(xlabel="capacity factor", ylabel="dropped choices", title="dropped", ylim=(0, None))
    legend(right)
    return fig
