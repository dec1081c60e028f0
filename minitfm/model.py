"""A decoder-only transformer of the Llama family, small enough to read in one sitting.

    x = embedding[tokens]
    for each block:   x = x + attention(norm(x));   x = x + feed_forward(norm(x))
    logits = head(norm(x))

Symbols: B batch, T new positions, S all positions (cached + new), C = dim, H query heads, Hkv key/value heads,
D = head_dim, F = hidden_dim, V = vocab_size.

Techniques enter through three seams and never edit this file:
`attend(q, k, v) -> out`, `feed_forward(config, layer) -> nn.Module`, and the `cache` given to `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitfm.cache import Cache
from minitfm.config import Config, RopeScaling

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MakeFeedForward = Callable[[Config, int], nn.Module]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, normalised in float32 and cast down before the gain, as Llama does."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angle per position of each rotated pair, float32 `[D/2]`: theta^(-2i/D), stretched as Llama 3 does if asked."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)  # full rotations within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x `[..., T, D]` by the angles in cos, sin `[T, D]` (half-split, as Llama)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D, causal) v by torch's own operator: the default `attend`.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]` with Hkv dividing H; returns `[B, H, T, D]`. Bottom-right aligned: query
    i sees keys j <= i + S - T, so that T new queries meet S cached keys.
    """
    T, S = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if T == 1:  # the newest query sees every key
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; what happens between q, k, v and out is `attend`."""

    def __init__(self, config: Config, layer: int, attend: Attend) -> None:
        super().__init__()
        self.layer, self.head_dim, self.attend = layer, config.head_dim, attend
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        q = rotate(self.split_heads(self.q_proj(x)), cos, sin)
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin)
        v = self.split_heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = self.attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """`[B, T, H*D]` -> `[B, H, T, D]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) for "swiglu", down(relu(up(x))) for "relu"."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.up_proj(x)))


def dense_feed_forward(config: Config, layer: int) -> nn.Module:
    """The default `feed_forward`: the same dense layer everywhere."""
    return FeedForward(config)


class Block(nn.Module):
    """One pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: Config, layer: int, attend: Attend, feed_forward: MakeFeedForward) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer, attend)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """tokens `[B, T]` int64 -> logits `[B, T, V]`.

    With a `cache`, the T tokens stand at the positions from `len(cache)` on: the first call is the prefill, each later
    call with T = 1 a decode step, and both give the logits of the uncached pass. `positions` `[T]` int64 says otherwise
    where they stand, for a cache and an `attend` that tell several sequences in one row apart.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: Config,
        attend: Attend = causal_attention,
        feed_forward: MakeFeedForward = dense_feed_forward,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, i, attend, feed_forward) for i in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        positions = torch.arange(config.context, dtype=torch.float32)
        angles = torch.outer(positions, frequencies).repeat(1, 2)  # [context, D]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal init of std 1/√fan_in; outputs into the residual stream shrink by √(2 * layers), as in GPT-2.

        A feed-forward layer that a technique made keeps the initialisation that it gave itself.
        """
        nn.init.normal_(self.embedding.weight, std=0.1)
        dense = [module for module in self.modules() if isinstance(module, Attention | FeedForward)]
        for name, weight in (named for module in dense for named in module.named_parameters()):
            into_residual = name.startswith(("o_proj", "down_proj"))
            variance = 1 / weight.shape[1] / (2 * self.config.layers if into_residual else 1)
            nn.init.normal_(weight, std=math.sqrt(variance))
        if not self.config.tied_embeddings:
            nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)

    def forward(self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        start = 0 if cache is None else len(cache)
        end = start + tokens.shape[1]
        if positions is not None:
            if positions.shape != tokens.shape[1:] or int(positions.min()) < 0:
                raise ValueError(f"positions must be {tokens.shape[1]}, from 0 on, got {positions.tolist()}")
            end = int(positions.max()) + 1
        if end > self.config.context:
            raise ValueError(f"{end} positions asked for, but the model's context is {self.config.context}")
        x = self.embedding(tokens)
        where = slice(start, end) if positions is None else positions
        cos, sin = self.cos[where].to(x.dtype), self.sin[where].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        return self.head(self.norm(x))

    def num_parameters(self) -> int:
        """Learned numbers, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())
