"""How well a model predicts text: negative log-likelihood, perplexity, and bits per byte.

Perplexity compares models that share a tokenizer; bits per byte compares any two, because it divides the same total
by the length of the text instead of by the number of tokens that a tokenizer happened to need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from minitfm.cache import Cache
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer


def nll(model: Transformer, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each next token in nats, `[B, T]` -> `[B, T-1]`; differentiable.

    The first token of a row is context only. Raises ValueError for rows of fewer than two tokens.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [B, T] with B >= 1 and T >= 2, got shape {tuple(tokens.shape)}")
    logits = model(tokens[:, :-1])
    flat = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


@torch.no_grad()
def mean_nll(model: Transformer, tokens: Tensor, batch: int = 16) -> float:
    """Mean of `nll` over tokens `[N, T]`, `batch` rows at a time."""
    device = model.embedding.weight.device
    total = sum(nll(model, rows.to(device)).double().sum().item() for rows in tokens.split(batch))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def perplexity(model: Transformer, tokens: Tensor, batch: int = 16) -> float:
    """exp(mean next-token negative log-likelihood) over tokens `[N, T]`: fixed, non-overlapping windows of T."""
    return math.exp(mean_nll(model, tokens, batch))


@torch.no_grad()
def cached_perplexity(model: Transformer, tokens: Tensor, cache: Cache, prompt: int, step: int = 1) -> float:
    """Perplexity of what stands in tokens `[N, T]` after position `prompt`, read through an empty cache of batch N.

    The first `prompt` tokens are prefilled, the others fed `step` at a time: 1 is decoding. Raises ValueError unless
    1 <= prompt < T - 1 and step >= 1.
    """
    last = tokens.shape[1] - 1
    if not 1 <= prompt < last or step < 1:
        raise ValueError(f"need 1 <= prompt < {last} and step >= 1, got prompt={prompt}, step={step}")
    model(tokens[:, :prompt], cache)
    total = 0.0
    for start in range(prompt, last, step):
        end = min(start + step, last)
        logits = model(tokens[:, start:end], cache).flatten(0, 1).double()
        total += F.cross_entropy(logits, tokens[:, start + 1 : end + 1].flatten(), reduction="sum").item()
    return math.exp(total / tokens[:, prompt + 1 :].numel())


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, scored from, end) of windows that score every position 1 .. length-1 exactly once.

    Each window is at most `window` long and predicts at most `stride` new tokens; all but the first see at least
    window - stride tokens of context before them.
    """
    spans = []
    scored = 1  # position 0 is context only
    while scored < length:
        end = min(length, window if scored == 1 else scored + stride)
        spans.append((max(0, end - window), scored, end))
        scored = end
    return spans


@torch.no_grad()
def text_nll(model: Transformer, tokens: Tensor, window: int, stride: int) -> float:
    """Total negative log-likelihood in nats of tokens `[T]` after the first, by windows that move on by `stride`."""
    if not 2 <= window <= model.config.context + 1 or not 1 <= stride < window:
        raise ValueError(
            f"need 1 <= stride < window <= context + 1 = {model.config.context + 1}, got {window=}, {stride=}"
        )
    total = 0.0
    for start, scored, end in windows(len(tokens), window, stride):
        total += nll(model, tokens[None, start:end])[0, scored - start - 1 :].double().sum().item()
    return total


def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], window: int = 128, stride: int | None = None
) -> float:
    """Bits that the model needs per UTF-8 byte of `texts`, each scored from `begin` to `end` by itself.

    Windows slide by `stride`, half a window by default; stride = window - 1 gives fixed windows that share one token.
    """
    stride = window // 2 if stride is None else stride
    device = model.embedding.weight.device
    nats, size = 0.0, 0
    for text in texts:
        tokens = torch.tensor([tokenizer.begin, *tokenizer.encode(text), tokenizer.end], device=device)
        nats += text_nll(model, tokens, window, stride)
        size += len(text.encode())
    if size == 0:
        raise ValueError("there is no text to score")
    return nats / math.log(2) / size
