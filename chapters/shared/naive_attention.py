"""The baseline of the attention chapters, plain attention in torch, and how another one compares on the model.

Exactness by the rule that FlashAttention's authors test with: float32 results are held against plain attention in
float64, and may be off by at most twice what plain attention in float32 is off by. Memory is counted as in memory.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chapters.lab import Lab
from chapters.shared.memory import peak_bytes
from minitfm.model import Attend


def naive_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by three operators, each with its T × S matrix in memory: `attend` for `Transformer`.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`, Hkv dividing H; aligned at the bottom right. A query without a key: NaN.
    """
    queries = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, T, D]
    scores = q.shape[-1] ** -0.5 * (queries @ k[:, :, None].mT)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def logits_and_gradient(lab: Lab, attend: Attend, tokens: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model gives with this attention, as float64: its logits, and its loss's gradient as one vector."""
    model = lab.model(attend=attend).to(dtype)
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return {"logit": logits.detach().double(), "gradient": torch.cat([g.flatten() for g in gradients]).double()}


def rounding_errors(lab: Lab, ways: dict[str, Attend], seed: int) -> dict[str, float]:
    """How far float32 logits and gradients are from float64 naive attention's, relative to the largest of them.

    {"logit error, NAME": …, "gradient error, NAME": …} for each of `ways`, on four calibration sequences.
    """
    tokens = lab.calibration(seed, count=4)
    exact = logits_and_gradient(lab, naive_attend, tokens, torch.float64)
    errors = {}
    for name, attend in ways.items():
        for what, value in logits_and_gradient(lab, attend, tokens, torch.float32).items():
            errors[f"{what} error, {name}"] = float((value - exact[what]).abs().max() / exact[what].abs().max())
    return errors


def training_bytes(lab: Lab, attend: Attend, length: int) -> int:
    """Peak bytes that one attention layer of the model needs for a forward and a backward pass over `length` tokens."""
    heads, kv_heads, D = lab.config.heads, lab.config.kv_heads, lab.config.head_dim
    q, k, v = (torch.zeros(1, count, length, D, requires_grad=True) for count in (heads, kv_heads, kv_heads))
    return peak_bytes(lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))


def exponent(lengths: list[int], measured: list[int]) -> float:
    """p of measured = a + b · length^p, fitted to the increments, in which the constant a (a tile) drops out."""
    return float(np.polyfit(np.log(lengths[1:]), np.log(np.diff(measured)), 1)[0])
