"""Training: one loop for the base model, for students, and for retraining what was pruned or quantized.

Everything that decides the next step is the settings, the step's number and what the state file holds, so a run that
was killed and resumed ends bit for bit as one that was not.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitfm import evaluate
from minitfm.checkpoint import CheckpointError, replace_file
from minitfm.data import random_batch
from minitfm.model import Transformer

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("cosine", "linear", "constant")

Loss = Callable[[Transformer, Tensor], Tensor]
History = list[tuple[int, float]]
MakeOptimizers = Callable[[Transformer, "Settings"], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Settings:
    """What decides a training run besides the model and the data.

    learning_rate: peak for AdamW. muon_learning_rate: peak for the blocks' matrices where optimizer is "muon"
    (Jordan et al. 2024: the momentum is orthogonalised, so a step has the same size in every direction).
    warm_up: share of the steps over which both rise from zero; then the schedule takes them to zero ("constant": keeps
    them). weight_decay is decoupled and spares norms and embeddings (0.3 with Muon left two in three
    feed-forward neurons of the base model dead). validate_every, save_every: steps, 0 for never (the last step always
    validates). state: the file that `train` saves to and resumes from. purpose: what else decides the run, such as the
    loss, in words: a state that was saved for another purpose is refused.
    Raises ValueError for settings that make no sense.
    """

    steps: int = 1000
    batch: int = 8
    length: int = 128
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.03
    warm_up: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    validate_every: int = 0
    save_every: int = 0
    state: Path | None = None
    purpose: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.validate_every < 0 or self.save_every < 0:
            raise ValueError(f"steps cannot be negative: {self.validate_every=}, {self.save_every=}")
        for name in ("learning_rate", "muon_learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.warm_up <= 1 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"need 0 <= warm_up <= 1 and weight_decay >= 0, got {self.warm_up} and {self.weight_decay}"
            )

    def rate(self, step: int) -> float:
        """Share of the peak learning rate that step `step` (from 0) uses, in (0, 1]."""
        rising = round(self.warm_up * self.steps)
        if step < rising:
            return (step + 1) / rising
        left = (self.steps - step) / (self.steps - rising)  # 1 at the peak, above 0 at the last step
        if self.schedule == "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        return left if self.schedule == "linear" else 1.0


@dataclass(frozen=True)
class Progress:
    """What `progress` is told after each step: steps done, that step's loss, validation so far, seconds of training.

    `history` holds (step, mean validation loss in nats); its last entry is new where `validated`.
    """

    step: int
    loss: float
    history: History
    validated: bool
    seconds: float


def next_token_loss(model: Transformer, tokens: Tensor) -> Tensor:
    """The default loss: mean negative log-likelihood of the next token, tokens `[B, T]`."""
    return evaluate.nll(model, tokens).mean()


@torch.no_grad()
def zero_residual_outputs(model: Transformer) -> None:
    """Start every block as the identity: o_proj and down_proj to zero. Worth a lot in short runs from scratch."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


def make_optimizers(model: Transformer, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest. ValueError if all is frozen."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.dim() == 2 and name.startswith("blocks.") else rest).append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [{"params": rest, "weight_decay": 0.0}] if rest else []
    optimizers: list[torch.optim.Optimizer] = []
    if matrices and settings.optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=decay))
    elif matrices:
        groups.append({"params": matrices, "weight_decay": decay})
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)))
    if not optimizers:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(
    model: Transformer,
    stream: Tensor,
    settings: Settings,
    loss: Loss | None = None,
    after_step: Callable[[int, Transformer], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    validation: Tensor | None = None,
    optimizers: MakeOptimizers = make_optimizers,
) -> History:
    """Train `model` in place on the token stream `[T]`; return [(step, mean validation loss in nats), ...].

    loss(model, tokens `[batch, length]`) defaults to the next token's; after_step(step, model) runs after each
    update (to put a mask back, say), progress after each step; validation is tokens `[N, T]`, without which the
    history stays empty; optimizers(model, settings) makes what updates the weights, with a "peak" rate in each group.
    With `settings.state` set, an existing state file is continued, and it is removed at the end.
    Raises CheckpointError for a state file of another run, FloatingPointError if the loss stops being finite.
    """
    require_fit(model, stream, settings)
    loss = loss or next_token_loss
    was_training = model.training
    device = next(model.parameters()).device
    run = Run(model, optimizers(model, settings), settings, fingerprint(stream))
    first = run.resume()
    if settings.state is not None and settings.save_every and first == 0:
        run.save(settings.state, 0)  # a run that is killed before its first interval can be resumed, too
    started = time.monotonic() - run.seconds
    for step in range(first, settings.steps):
        tokens = random_batch(stream, settings.batch, settings.length, seed=(settings.seed, step)).to(device)
        value = run.update(step, loss, tokens)
        if after_step is not None:
            after_step(step, model)
        done = step + 1
        validated = run.validate(done, validation)
        run.seconds = time.monotonic() - started
        if progress is not None:
            progress(Progress(done, value, list(run.history), validated, run.seconds))
        if settings.state is not None and due(done, settings.save_every) and done < settings.steps:
            run.save(settings.state, done)
    model.train(was_training)
    if settings.state is not None:
        settings.state.unlink(missing_ok=True)
    return run.history


def require_fit(model: Transformer, stream: Tensor, settings: Settings) -> None:
    """Raise ValueError if sequences of `settings.length` tokens are too long for the stream or for the model."""
    longest = min(len(stream), model.config.context + 1)
    if settings.length > longest:
        raise ValueError(
            f"length {settings.length} is too long: {len(stream)} tokens of text, a context of {model.config.context}"
        )


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done after `step` steps."""
    return every > 0 and step % every == 0


def fingerprint(stream: Tensor) -> int:
    """A checksum of the training data, so that a run is not continued on another text."""
    return zlib.crc32(stream.cpu().numpy().tobytes())


class Run:
    """A training run between two steps: all that has to survive a kill."""

    def __init__(
        self, model: Transformer, optimizers: list[torch.optim.Optimizer], settings: Settings, data: int
    ) -> None:
        self.model, self.optimizers, self.settings = model, optimizers, settings
        self.identity = {**asdict(settings), "state": None, "config": model.config.to_dict(), "data": data}
        self.history: History = []
        self.seconds = 0.0
        model.train()

    def update(self, step: int, loss: Loss, tokens: Tensor) -> float:
        """One optimizer step; returns the loss before it. FloatingPointError if that is not finite."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.settings.rate(step)
        value = loss(self.model, tokens)
        if not torch.isfinite(value):
            raise FloatingPointError(f"training diverged: the loss is {value.item()} at step {step}")
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return value.item()

    def validate(self, step: int, tokens: Tensor | None) -> bool:
        """Add the loss on held-out tokens to the history if that is due after `step` steps; say whether it was."""
        if tokens is None or not (step == self.settings.steps or due(step, self.settings.validate_every)):
            return False
        self.model.eval()
        self.history.append((step, evaluate.mean_nll(self.model, tokens.to(self.model.embedding.weight.device))))
        self.model.train()
        return True

    def save(self, path: Path, step: int) -> None:
        """Write the state file, whole or not at all."""
        state = {
            "identity": self.identity,
            "step": step,
            "history": self.history,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),  # nothing here draws from it, but a loss may
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with replace_file(path) as temporary:
            torch.save(state, temporary)

    def resume(self) -> int:
        """Continue from the state file if there is one; return the number of steps done."""
        path = self.settings.state
        if path is None or not path.exists():
            return 0
        state = read_state(path)
        ours, theirs = self.identity, state["identity"]
        if different := sorted(key for key in ours if ours[key] != theirs.get(key)):
            raise CheckpointError(f"{path} belongs to a run with other {', '.join(different)}: remove it to start anew")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.history, self.seconds = state["history"], state["seconds"]
        return state["step"]


def read_state(path: Path) -> dict[str, Any]:
    """A state file's content. Raises CheckpointError if it is damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("identity", "step", "history", "seconds", "random", "model", "optimizers")}
    except Exception as error:  # zip, pickle, key and type errors: whatever a foreign file provokes
        raise CheckpointError(f"{path} is not a training state or is damaged: remove it to start anew") from error
