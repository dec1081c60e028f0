"""From logits to text: sampling, and the prefill-then-decode loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minitfm.cache import Cache, KVCache
from minitfm.model import Transformer


def filtered_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that sampling draws from, `[..., V]`, sums to one.

    softmax(logits / temperature), then only the `top_k` likeliest tokens, then the smallest set of likeliest tokens
    whose mass reaches `top_p` (nucleus sampling, Holtzman et al. 2020; at least one token), renormalised.
    Raises ValueError for temperature <= 0, top_k < 1 or top_p outside (0, 1].
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; greedy decoding is temperature=0 in sample()"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / temperature  # at most 0: no overflow
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -torch.inf
    probabilities = ordered.softmax(dim=-1)
    if top_p is not None:
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, tokens, probabilities)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row: logits `[B, V]` -> `[B]`. temperature 0 is greedy, the first of equal maxima."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` tokens `[B]` one by one, continuing the prompt `[B, T]`.

    The prompt is prefilled in one pass, then each step feeds back one token. `cache` must be empty; None makes a
    `KVCache` of just the size needed. Raises ValueError if prompt and answer exceed the model's context.
    """
    total = prompt.shape[1] + max_new_tokens
    if prompt.shape[1] < 1 or max_new_tokens < 0 or total > model.config.context:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} and {max_new_tokens} new tokens do not fit "
            f"a context of {model.config.context}"
        )
    if cache is None:
        weight = model.embedding.weight
        cache = KVCache(model.config, prompt.shape[0], total, weight.dtype, weight.device)
    if len(cache):
        raise ValueError(f"the cache must be empty, it holds {len(cache)} positions")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens = prompt
    for _ in range(max_new_tokens):
        logits = model(tokens, cache)[:, -1]
        token = sample(logits, temperature, top_k, top_p, generator)
        yield token
        tokens = token[:, None]


def generate(model: Transformer, prompt: Tensor, max_new_tokens: int, **sampling) -> Tensor:
    """The prompt `[B, T]` with its continuation, `[B, T + max_new_tokens]`; keywords as in `stream`."""
    return torch.cat([prompt, *(token[:, None] for token in stream(model, prompt, max_new_tokens, **sampling))], dim=1)
