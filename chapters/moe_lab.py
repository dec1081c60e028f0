"""Small mixtures of experts to measure on, trained once for all chapters.

    policy = Gate(k=2, factor=1.0, renormalise="before")           # chapters/moe/routing.py; any `Policy` will do
    model = moe_lab.fresh(lab, Mixture(policy, share=2), 500)      # half the base model's width, from random weights
    model = moe_lab.upcycled(lab, Mixture(policy), 100)            # the base model, each feed-forward layer copied
    found = moe_lab.measure(model, lab.validation)                 # loads, dropped share, by layer

Nothing here decides where a token goes: a chapter brings that as a policy, or a `feed_forward` seam of its own.
A model is trained once for one setting: its weights are kept in the lab, and in the user's cache folder under a name
that says all they depend on. A run that was killed goes on where it was. Upcycling: Komatsuzaki et al. 2022.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.figures import legend, panels, series
from chapters.lab import Lab, cache_folder
from minitfm import train
from minitfm.checkpoint import replace_file
from minitfm.config import Config
from minitfm.model import FeedForward, MakeFeedForward, Transformer

EXPERTS, BATCH, LENGTH = 8, 8, 64


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


def text_and_penalties(model: Transformer, tokens: Tensor) -> Tensor:
    """The loss of `upcycled`: that of the next token, and the penalty of every layer that has one."""
    charged = (getattr(module, "penalty", None) for module in model.modules())
    return train.next_token_loss(model, tokens) + sum(penalty for penalty in charged if isinstance(penalty, Tensor))


def upcycled(lab: Lab, feed_forward: MakeFeedForward, steps: int = 100, seed: int = 0, **how: Any) -> Transformer:
    """`upcycle`, then `steps` steps of `trained` with the words of `how`; 0: none. In eval mode."""
    return trained(lab, upcycle(lab, feed_forward, seed), feed_forward, steps, seed, **how)


def fresh(lab: Lab, feed_forward: MakeFeedForward, steps: int = 100, seed: int = 0, **how: Any) -> Transformer:
    """A model of `small` size from random weights, with those feed-forward layers, `trained` for `steps` steps.

    It has read little and knows little, so that what a mixture gains or a bad gate loses shows within a minute. The
    base model has read its text several times over, and upcycled learns it by heart instead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(small(lab.config), feed_forward=feed_forward)
    return trained(lab, model, feed_forward, steps, seed, **{"rate": 5e-3, **how})


def small(config: Config) -> Config:
    """Half the width and a third of the hidden width: 4 layers of 64 and 128 for the base model."""
    head = config.head_dim // 2 if config.head_dim % 4 == 0 else config.head_dim
    return replace(config, dim=max(1, config.dim // 2), hidden_dim=max(1, config.hidden_dim // 3), head_dim=head)


def trained(
    lab: Lab, model: Transformer, feed_forward: MakeFeedForward, steps: int, seed: int = 0,
    loss: train.Loss = text_and_penalties, stream: Tensor | None = None, rate: float = 1e-3,
    progress: Callable[[train.Progress], None] | None = None,
) -> Transformer:  # fmt: skip
    """Train all weights of `model` in place, once for a setting: the same setting takes the weights of that time.

    feed_forward  what made its layers; its repr must say everything that it does, as `Mixture`'s does.
                  `minitfm.model.dense_feed_forward` makes the dense model to compare with
    loss          a function; its name is part of the setting
    stream        int64 `[T]`; None: the lab's training text. The seed draws its batches
    rate          peak of AdamW's learning rate
    Raises as `minitfm.train.train`. Returns the model in eval mode.
    """
    if steps:
        text = lab.train_stream if stream is None else stream
        length = min(LENGTH, lab.config.context)
        settings = train.Settings(steps, BATCH, length, "adamw", learning_rate=rate, weight_decay=0.0, seed=seed)
        key = setting_key(model, feed_forward, loss, settings, text)
        fit = partial(weights_after, model, text, settings, loss, progress, cache_folder() / f"moe-{key}")
        model.load_state_dict(lab.once(("moe", key), fit))
    return model.eval()


def weights_after(
    model: Transformer, stream: Tensor, settings: train.Settings, loss: train.Loss, progress: Any, path: Path
) -> dict[str, Tensor]:
    """The weights after training, from the file at `path`.pt if there is one; a run under way is kept in .state."""
    with suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # what cannot be read is made again
        return torch.load(path.with_suffix(".pt"), weights_only=True)
    settings = replace(settings, state=path.with_suffix(".state"), save_every=100)
    train.train(model, stream, settings, loss, progress=progress)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with suppress(OSError), replace_file(path.with_suffix(".pt")) as temporary:
        torch.save(weights, temporary)
    return weights


def setting_key(
    model: Transformer, feed_forward: MakeFeedForward, loss: train.Loss, settings: train.Settings, stream: Tensor
) -> str:
    """Names a training run: the weights that it starts from, the text, the settings, the code of the mixture."""
    makers = [feed_forward, loss, *vars(feed_forward).values()]
    names = {getattr(maker, "__module__", type(maker).__module__) for maker in makers}
    words = getattr(feed_forward, "__qualname__", repr(feed_forward)), getattr(loss, "__qualname__", repr(loss))
    weights = [zlib.crc32(weight.numpy(force=True).tobytes()) for weight in model.state_dict().values()]
    parts = (sorted(sources(names | {__name__})), words, settings, weights, train.fingerprint(stream))
    return hashlib.sha256(repr((torch.__version__, *parts)).encode()).hexdigest()[:16]


def sources(names: Iterable[str]) -> set[str]:
    """The text of those modules that deal with experts, and of all such that they import from."""
    found: dict[str, str] = {}
    waiting = [name for name in names if name.startswith("chapters.moe")]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = inspect.getsource(sys.modules[name])
            reached = {getattr(value, "__module__", None) or "" for value in vars(sys.modules[name]).values()}
            waiting += [other for other in reached if other.startswith("chapters.moe")]
    return set(found.values())


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
