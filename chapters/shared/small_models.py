"""Small models trained from random weights, once for a setting: what chapters on another feed-forward layer share.

    model = small_models.fresh(lab, Mixture(policy, share=2), 500)      # half the base model's width
    model = small_models.fresh(lab, dense_feed_forward, 500)            # the dense model to compare with

A model is trained once for one setting: its weights are kept in the lab, and in the user's cache folder under a name
that says all they depend on. A run that was killed goes on where it was. The seed decides the weights at the start, the
text of each step, and what a layer draws in training.
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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chapters.lab import Lab, cache_folder
from minitfm import train
from minitfm.checkpoint import replace_file
from minitfm.config import Config
from minitfm.model import FeedForward, MakeFeedForward, Transformer

BATCH, LENGTH = 8, 64  # sequences and tokens of a step
SAVE_EVERY = 100  # steps between states
MEASURING = {f"chapters.{name}" for name in ("lab", "claims", "figures", "runner")}  # change no training


@dataclass(frozen=True)
class Dense:
    """A `feed_forward` seam: dense ReLU layers of `hidden` neurons."""

    hidden: int

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """The layer."""
        return FeedForward(replace(config, hidden_dim=self.hidden, activation="relu"))


def text_and_penalties(model: Transformer, tokens: Tensor) -> Tensor:
    """The loss of `trained`: that of the next token, and the `penalty` of every layer that has one."""
    charged = (getattr(module, "penalty", None) for module in model.modules())
    return train.next_token_loss(model, tokens) + sum(penalty for penalty in charged if isinstance(penalty, Tensor))


def fresh(lab: Lab, feed_forward: MakeFeedForward, steps: int = 100, seed: int = 0, **how: Any) -> Transformer:
    """A model of `small` size from random weights, with those feed-forward layers, `trained` for `steps` steps.

    It has read little and knows little, so that what a layer gains or loses shows within a minute. The base model has
    read its text several times over, and what starts from it learns the text by heart instead.
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

    feed_forward  what made its layers; its repr must say everything that it does, as that of a frozen dataclass.
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
        fit = partial(weights_after, model, text, settings, loss, progress, cache_folder() / f"trained-{key}")
        model.load_state_dict(lab.once(("trained", key), fit))
    return model.eval()


def weights_after(
    model: Transformer, stream: Tensor, settings: train.Settings, loss: train.Loss, progress: Any, path: Path
) -> dict[str, Tensor]:
    """The weights after training, from the file at `path`.pt if there is one; a run under way is kept in .state."""
    with suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # what cannot be read is made again
        return torch.load(path.with_suffix(".pt"), weights_only=True)
    settings = replace(settings, state=path.with_suffix(".state"), save_every=SAVE_EVERY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # for layers that draw in training; a state keeps where that stands
        train.train(model, stream, settings, loss, progress=progress)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with suppress(OSError), replace_file(path.with_suffix(".pt")) as temporary:
        torch.save(weights, temporary)
    return weights


def setting_key(
    model: Transformer, feed_forward: MakeFeedForward, loss: train.Loss, settings: train.Settings, stream: Tensor
) -> str:
    """Names a training run: the weights that it starts from, the text, the settings, the code of its layers."""
    makers = [feed_forward, loss, *getattr(feed_forward, "__dict__", {}).values()]
    names = {getattr(maker, "__module__", type(maker).__module__) for maker in makers}
    words = getattr(feed_forward, "__qualname__", repr(feed_forward)), getattr(loss, "__qualname__", repr(loss))
    weights = [zlib.crc32(weight.numpy(force=True).tobytes()) for weight in model.state_dict().values()]
    parts = (sorted(sources(names | {__name__})), words, settings, weights, train.fingerprint(stream))
    return hashlib.sha256(repr((torch.__version__, *parts)).encode()).hexdigest()[:16]


def sources(names: Iterable[str]) -> set[str]:
    """The text of those modules that are chapters or shared by chapters, and of all such that they import from.

    Without what measures and draws, which changes no weights.
    """
    found: dict[str, str] = {}
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        if name.startswith("chapters.") and name not in MEASURING and name not in found:
            found[name] = inspect.getsource(sys.modules[name])
            values = vars(sys.modules[name]).values()
            modules = [value.__name__ for value in values if isinstance(value, ModuleType)]
            waiting += modules + [getattr(value, "__module__", None) or "" for value in values]
    return set(found.values())
