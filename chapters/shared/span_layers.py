"""Adaptive spans in torch: the attention of a layer whose heads look back as far as each has learnt, and their cache.

Distances count back from the query, 0 is its own position. The last query stands where the last key does, so that
leaving out the oldest keys changes no distance: trimming needs no positions, it cuts off rows at the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from minitfm.config import Config

Rows = Tensor | Sequence[Tensor]  # [B, Hkv, S, D], or for each key head a [B, 1, S, D] of its own length


class AdaptiveSpan(nn.Module):
    """The `attend` of one layer, with a learnt span for each of its query heads; they start at max_span.

    held    `[heads]`, the parameter: span / (max_span · speed). AdamW moves every number by about its rate, whatever
            its gradient is, so a span can cross its range in about 1 / (rate · speed) steps
    Raises ValueError for a max_span, a ramp or a number of heads below 1, and a speed that is not positive.
    """

    def __init__(self, heads: int, max_span: int, ramp: int, speed: float = 1.0) -> None:
        super().__init__()
        if min(heads, max_span, ramp) < 1 or not speed > 0:
            raise ValueError(
                f"heads, max_span and ramp must be at least 1 and speed positive, "
                f"got {heads}, {max_span}, {ramp} and {speed:g}"
            )
        self.max_span, self.ramp, self.speed = max_span, ramp, speed
        self.held = nn.Parameter(torch.full((heads,), 1 / speed))

    def span(self) -> Tensor:
        """`[heads]`, in tokens; gradients reach `held`."""
        return self.max_span * self.speed * self.held

    @torch.no_grad()
    def settle(self) -> None:
        """Put the spans back into 0 .. max_span, as is due after every step of an optimizer."""
        self.held.clamp_(0, 1 / self.speed)

    def forward(self, q: Tensor, k: Rows, v: Rows) -> Tensor:
        """out `[B, H, T, D]` of q and of k, v with S >= T; each key head is read as far as its query heads look."""
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            if q.is_cuda and q.dtype != torch.float64:
                from kernels.attention.adaptive_span import span_attention as kernel

                return kernel(q, k, v, self.span().float(), self.ramp, self.max_span)[0]
            k, v = k.split(1, dim=1), v.split(1, dim=1)
        group = q.shape[1] // len(k)
        parts = zip(q.split(group, dim=1), k, v, self.span().split(group), strict=True)
        return torch.cat([attend(*part, self.ramp, self.max_span) for part in parts], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: int, max_span: int) -> Tensor:
    """One key head: q `[B, G, T, D]`, k and v `[B, 1, S, D]`, span `[G]` in tokens; what no query reads is cut off."""
    precise, T = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    near = slice(-(min(max_span, ramp + math.ceil(float(span.detach().max()))) + T - 1), None)
    queries, keys, values = q.to(precise), k[:, :, near].to(precise), v[:, :, near].to(precise)
    S = keys.shape[2]
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)  # [T, S]
    soft = ((ramp + span.to(precise)[:, None, None] - distance) / ramp).clamp(0, 1)  # [G, T, S]
    soft = soft * ((distance >= 0) & (distance < max_span))
    scores = (q.shape[-1] ** -0.5 * (queries @ keys.mT)).masked_fill(soft == 0, -math.inf)
    weights = soft * (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return (weights @ values / weights.sum(-1, keepdim=True)).to(q.dtype)


class TrimmedCache:
    """A `minitfm.cache.Cache` whose key heads each keep their newest positions only, for a model of `AdaptiveSpan`s.

    rows    `[layers][Hkv]`: positions that a head reads, the newest included. ValueError unless positive and so many
    """

    def __init__(
        self,
        config: Config,
        rows: Sequence[Sequence[int]],
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if [len(row) for row in rows] != [config.kv_heads] * config.layers or min(map(min, rows)) < 1:
            raise ValueError(f"rows must be positive, {config.layers} × {config.kv_heads}, got {rows}")
        self.rows, self.shape = rows, (batch, config.kv_heads, config.head_dim)
        empty = torch.empty(2, batch, 1, 0, config.head_dim, dtype=dtype, device=device)
        self.held = [[empty for _ in row] for row in rows]  # for each head [2, B, 1, S, D]: keys and values
        self.lengths = [0] * config.layers

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v `[B, Hkv, T, D]`; return what the T queries read, as lists of `[B, 1, S, D]`, one for each head.

        Raises ValueError if the shape does not fit; then nothing is stored.
        """
        if (k.shape[0], k.shape[1], k.shape[3]) != self.shape or v.shape != k.shape:
            raise ValueError(f"k and v must be [B, Hkv, T, D] of {self.shape}, got {tuple(k.shape)}, {tuple(v.shape)}")
        new, held = torch.stack((k, v)).split(1, dim=2), self.held[layer]
        read = [torch.cat(pair, dim=3) for pair in zip(held, new, strict=True)]
        self.held[layer] = [x[..., -row:, :].clone() for x, row in zip(read, self.rows[layer], strict=True)]
        self.lengths[layer] += k.shape[2]
        return cast(tuple[Tensor, Tensor], tuple([x[half] for x in read] for half in (0, 1)))

    def __len__(self) -> int:
        return self.lengths[-1]

    def truncate(self, length: int) -> None:
        """Forget everything past the first `length` positions. ValueError where older ones are gone that they need."""
        lost = len(self) - length
        whole = all(
            x.shape[3] == len(self) or x.shape[3] - lost >= row - 1
            for heads, rows in zip(self.held, self.rows, strict=True)
            for x, row in zip(heads, rows, strict=True)
        )
        if not 0 <= length <= len(self) or not whole:
            raise ValueError(f"cannot truncate to {length}: {len(self)} positions were seen, and older ones are gone")
        self.held = [[x[..., : x.shape[3] - lost, :] for x in heads] for heads in self.held]
        self.lengths = [length] * len(self.lengths)

    def nbytes(self) -> int:
        """Bytes of the positions held."""
        return sum(x.nbytes for heads in self.held for x in heads)
