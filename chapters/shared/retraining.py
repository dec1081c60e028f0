"""Training in stages that survives a kill, and AdamW with a mask in it: what rewinding retrains with.

    stages = Stages(folder, "one seed")                            # folder None: kept in memory only
    weights = train_first(model, stream, Plan(steps=800, replayed=400), stages)
    ended = stages.once("retrained", lambda: retrain_and_copy(**stages.running("retrained")))

A stage is a dict of tensors, computed once. Within a stage `minitfm.train` keeps the state of the run, so that what a
killed run ends with is bit for bit what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chapters.lab import Lab
from chapters.shared.pruned_layers import Masks
from chapters.shared.small_models import small
from chapters.shared.student_lab import progress_bar
from minitfm import train
from minitfm.checkpoint import CheckpointError, replace_file
from minitfm.model import Transformer

Tensors = dict[str, Tensor]
PURPOSE = "experiment.txt"
SAVE_EVERY = 50  # steps between the states of a run that is kept


@dataclass(frozen=True)
class Replay(train.Settings):
    """A training run whose rates are given: rates holds, for each of `steps` steps, the share of the peak.

    warm_up and schedule decide nothing. Raises ValueError as `train.Settings`, and unless there are `steps` rates.
    """

    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rates) != self.steps:
            raise ValueError(f"there must be a rate for each of {self.steps} steps, got {len(self.rates)}")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate that step `step` (from 0) uses."""
        return self.rates[step]


class Stages:
    """What an experiment has finished, by name, in memory and, where there is a folder, in files of it.

    purpose  says what decides the experiment; a folder that was begun with another one is refused: CheckpointError
    """

    def __init__(self, folder: Path | None = None, purpose: str = "") -> None:
        self.folder, self.finished = folder, dict[str, Tensors]()
        if folder is None:
            return
        words = folder / PURPOSE
        if words.exists() and words.read_text(encoding="utf-8") != purpose:
            raise CheckpointError(f"{folder} belongs to another experiment, see {words.name} in it: choose another")
        with replace_file(words) as temporary:
            temporary.write_text(purpose, encoding="utf-8")

    def state(self, name: str) -> Path | None:
        """Where `minitfm.train` is to keep the run of this stage."""
        return None if self.folder is None else self.folder / f"{name}.state"

    def running(self, name: str) -> dict:
        """The settings of a run that is kept: its file, and how often it is written."""
        return {"state": self.state(name), "save_every": SAVE_EVERY if self.folder else 0}

    def has(self, name: str) -> bool:
        """Whether a stage is finished."""
        return name in self.finished or (self.folder is not None and (self.folder / f"{name}.pt").exists())

    def once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """What stage `name` ended with: from memory, from its file, or computed now and kept.

        Raises CheckpointError for a file that cannot be read.
        """
        if name not in self.finished:
            self.finished[name] = self.read(name) if self.has(name) else self.write(name, compute())
        return self.finished[name]

    def read(self, name: str) -> Tensors:
        """A finished stage's file."""
        path = Path(self.folder or "", f"{name}.pt")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and type errors: whatever a damaged file provokes
            raise CheckpointError(f"{path} is damaged: remove it to compute it again") from error

    def write(self, name: str, tensors: Tensors) -> Tensors:
        """Keep a stage, whole or not at all; returns it."""
        if self.folder is not None:
            with replace_file(self.folder / f"{name}.pt") as temporary:
                torch.save(tensors, temporary)
        return tensors


def copied(model: Transformer) -> Tensors:
    """The weights as they are now, by name, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Plan:
    """A first run of `steps` steps, a cosine after a warm-up, and the retraining that replays its last `replayed`.

    rate      peak of AdamW's learning rate
    constant  fine-tuning's rate as a share of the peak
    seed      draws the text of the first run, and another text for each retraining, the same for all methods
    Raises ValueError unless 1 <= replayed <= steps and as `train.Settings`.
    """

    steps: int
    replayed: int
    rate: float = 5e-3
    constant: float = 0.01
    seed: int = 0
    batch: int = 4
    length: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.replayed <= self.steps:
            raise ValueError(f"replayed must be from 1 to {self.steps} steps, got {self.replayed}")

    def first(self) -> train.Settings:
        """The first run."""
        how = {"learning_rate": self.rate, "weight_decay": 0.0, "seed": self.seed}
        return train.Settings(self.steps, self.batch, self.length, "adamw", **how)

    @property
    def rates(self) -> np.ndarray:
        """The learning rates of the first run, `[steps]`."""
        first = self.first()
        return np.array([first.rate(step) for step in range(self.steps)]) * self.rate

    def again(self, rates: np.ndarray, level: int) -> Replay:
        """The retraining of one level at these learning rates."""
        shares = tuple((rates / self.rate).tolist())
        how = {"learning_rate": self.rate, "weight_decay": 0.0, "seed": 1000 * (self.seed + 1) + level}
        return Replay(len(rates), self.batch, self.length, "adamw", rates=shares, **how)


def train_first(
    model: Transformer, stream: Tensor, plan: Plan, stages: Stages, show: bool = False
) -> dict[int, Tensors]:  # fmt: skip
    """The first run, in place, on a token stream `[T]`: the weights before the steps 0, T − t and at the end, by step.

    Kept as stages of these names; a run that was killed goes on. show draws a progress bar.
    """
    wanted = (0, plan.steps - plan.replayed, plan.steps)

    def keep(step: int, model: Transformer) -> None:
        if step + 1 in wanted:
            stages.once(f"first-{step + 1}", lambda: copied(model))

    stages.once("first-0", lambda: copied(model))
    if not all(stages.has(f"first-{step}") for step in wanted):
        settings = replace(plan.first(), **stages.running("first"))
        with progress_bar(plan.steps, show) as progress:
            train.train(model, stream, settings, after_step=keep, progress=progress)
    weights = {step: stages.once(f"first-{step}", dict) for step in wanted}
    model.load_state_dict(weights[plan.steps])
    return weights


def trained_small(lab: Lab, plan: Plan) -> tuple[Transformer, dict[int, Tensors]]:
    """A small model from random weights after the first run, with its weights by step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = Transformer(small(lab.config))
    train.zero_residual_outputs(model)
    return model, train_first(model, lab.train_stream, plan, Stages())


class MaskedAdamW(torch.optim.AdamW):
    """AdamW whose masked parameters step as `masked_adamw`; on CUDA that is the kernel. Others step as in torch.

    masks: parameter -> bool mask of its shape. State and its names are AdamW's. The gradient of a masked parameter is
    freed by the step. What clips gradients before it sees those of dropped weights, too.
    """

    def __init__(self, groups: list[dict[str, Any]], masks: dict[nn.Parameter, Tensor]) -> None:
        super().__init__(groups)
        self.masks = {parameter: mask_of(parameter, mask) for parameter, mask in masks.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.masks and parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
                    parameter.grad = None  # torch's own step passes it by
        return super().step(closure)

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """The masked step of one parameter."""
        state = self.state[parameter]
        if not state:
            zeros = [torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2)]
            state |= {"step": torch.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
        state["step"] += 1
        how = (int(state["step"]), group["lr"], group["betas"], group["eps"], group["weight_decay"])
        step_in_place(parameter, gradient, self.masks[parameter], state["exp_avg"], state["exp_avg_sq"], *how)


def mask_of(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """The mask as a step of this parameter reads it: bool where the parameter lies, or on CUDA its bits."""
    if not parameter.is_cuda:
        return mask.to(parameter.device)
    from kernels.pruning.rewinding import pack_bits

    return pack_bits(mask.to(parameter.device))


def step_in_place(
    weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor, step: int, rate: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`masked_adamw`, which writes weight, mean and square where they are; mask as `mask_of` gives it."""
    if weight.is_cuda:
        from kernels.pruning.rewinding import masked_adamw as kernel

        how = (step, rate, betas, eps, weight_decay)
        kernel(weight, gradient.contiguous(), mask, mean, square, *how, out=(weight, mean, square))
        return
    gradient = gradient.float().masked_fill(~mask, 0)
    mean.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    scale = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
    weight.mul_(1 - rate * weight_decay).addcdiv_(mean, scale, value=-rate / (1 - betas[0] ** step))
    for numbers in (weight, mean, square):
        numbers.masked_fill_(~mask, 0)


def masked_optimizers(masks: Masks, model: Transformer, settings: train.Settings) -> list[torch.optim.Optimizer]:
    """`train.make_optimizers` for a run with masks; settings.optimizer is "adamw"."""
    (plain,) = train.make_optimizers(model, settings)
    kept = {model.get_parameter(f"{name}.weight"): mask for name, mask in masks.items()}
    return [MaskedAdamW(plain.param_groups, kept)]
