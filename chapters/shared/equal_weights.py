"""Models of half the base model's size that are trained from random weights with equally many weights in their blocks.

Sparse training is compared with two things that hold as many weights and cost no method: the same model with a mask
that never changes, and a smaller dense model. Embedding, text, steps and seeds are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd

import numpy as np
import torch

from chapters.lab import Lab
from chapters.shared.pruned_layers import Masks, dropped, train_masked
from minitfm import surgery, train
from minitfm.config import Config
from minitfm.model import Transformer

BATCH, LENGTH, RATE = 8, 64, 5e-3  # sequences and tokens of a step; peak of AdamW's learning rate
STATIC = ("random mask", "magnitude at start")
DENSE = ("narrow dense", "shallow dense")


def half(config: Config) -> Config:
    """Half the width, heads and hidden neurons included; as many layers and heads."""
    head = config.head_dim // 2 if config.head_dim % 4 == 0 else config.head_dim
    return replace(config, dim=max(1, config.dim // 2), hidden_dim=max(1, config.hidden_dim // 2), head_dim=head)


def shallow(config: Config, share: int = 4) -> Config:
    """1 / share of the layers, and so of the block weights where share divides the layers."""
    return replace(config, layers=max(1, config.layers // share))


def narrow(config: Config, share: int = 4) -> Config:
    """1 / share of the heads and of the hidden neurons, and so of the block weights where share divides both.

    The width of the residual stream, and with it the embedding, stays.
    """
    heads = max(1, config.heads // share)
    hidden = max(1, config.hidden_dim // share)
    return replace(config, heads=heads, kv_heads=gcd(heads, config.kv_heads), hidden_dim=hidden)


def fresh(config: Config, seed: int) -> Transformer:
    """A model with random weights, none of them zero at the start: a mask has something to choose from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


def block_weights(config: Config) -> int:
    """Numbers in the linear layers of the blocks."""
    with torch.device("meta"):
        return sum(layer.weight.numel() for layer in surgery.linears(Transformer(config)).values())


def recipe(lab: Lab, steps: int, seed: int, decay: float, schedule: str = "cosine") -> train.Settings:
    """How all of them are trained."""
    length = min(LENGTH, lab.config.context, len(lab.train_stream))
    return train.Settings(
        steps, BATCH, length, "adamw", learning_rate=RATE, weight_decay=decay, seed=seed, schedule=schedule
    )


def trained_dense(lab: Lab, config: Config, steps: int, seed: int, decay: float) -> Transformer:
    """A dense model of that size, after training."""
    model = fresh(config, seed)
    train.train(model, lab.train_stream, recipe(lab, steps, seed, decay))
    return model.eval()


def trained_static(
    lab: Lab, config: Config, kind: str, sparsity: float, steps: int, seed: int, decay: float
) -> Transformer:
    """The same model under one of the `STATIC` masks: drawn, or the largest weights at the start, and never changed.

    Drawn weights are scaled by 1 / √density, so that sums start as large as those of the dense model. Each layer loses
    `dropped` of its weights. ValueError for another kind and a sparsity outside [0, 1).
    """
    if kind not in STATIC:
        raise ValueError(f"kind must be one of {', '.join(STATIC)}, got {kind!r}")
    model, masks, generator = fresh(config, seed), Masks(), np.random.default_rng(seed)
    for name, layer in surgery.linears(model).items():
        size = layer.weight.numel()
        scores = layer.weight.detach().abs().flatten().numpy() if kind == STATIC[1] else generator.random(size)
        mask = np.zeros(size, dtype=bool)
        mask[np.argsort(scores, kind="stable")[dropped(size, sparsity) :]] = True
        masks[name] = torch.from_numpy(mask).view_as(layer.weight)
        if kind == STATIC[0]:
            layer.weight.data /= mask.mean() ** 0.5
    train_masked(model, masks, lab.train_stream, recipe(lab, steps, seed, decay))
    return model.eval()


def race(
    lab: Lab, method: Callable[[int], Transformer], rivals: Sequence[str], sparsity: float, steps: int, decay: float
) -> dict[str, list[float]]:
    """Perplexities, one for each seed, of `rivals` out of `STATIC` and `DENSE`, and first of method(seed), as "method".

    Dense rivals have a quarter of the block weights, whatever the sparsity.
    """
    config = half(lab.config)
    smaller = dict(zip(DENSE, (narrow(config), shallow(config)), strict=True))
    found: dict[str, list[float]] = {"method": [], **{name: [] for name in rivals}}
    for seed in lab.seeds:
        found["method"].append(lab.perplexity(method(seed)))
        for name in rivals:
            if name in smaller:
                model = trained_dense(lab, smaller[name], steps, seed, decay)
            else:
                model = trained_static(lab, config, name, sparsity, steps, seed, decay)
            found[name].append(lab.perplexity(model))
    return found
