"""The key-value cache: what a decoder remembers so that each new token costs one position, not the whole sequence.

Per token it holds 2 * layers * kv_heads * head_dim numbers. Anything with the three methods below can stand in its
place (`Transformer.forward(tokens, cache)`): paged, quantized and compressed caches do.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from minitfm.config import Config


class Cache(Protocol):
    """What the model asks of a cache. Keys arrive with their rotary positions already applied."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v `[B, Hkv, T, D]` to `layer`; return all that it holds, `[B, Hkv, S, D]`."""
        ...

    def __len__(self) -> int:
        """Positions seen by every layer: where the next token stands. A cache that forgets some still counts them."""
        ...

    def truncate(self, length: int) -> None:
        """Forget everything past the first `length` positions."""
        ...


class KVCache:
    """Contiguous cache for `capacity` positions, allocated once so that appending copies only the new position."""

    def __init__(
        self,
        config: Config,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = config.context if capacity is None else capacity
        if batch < 1 or self.capacity < 1:
            raise ValueError(f"batch and capacity must be positive, got batch={batch}, capacity={self.capacity}")
        shape = (config.layers, batch, config.kv_heads, self.capacity, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * config.layers

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v `[B, Hkv, T, D]` to `layer` and return its `[B, Hkv, S, D]` views.

        Raises ValueError if the shape does not fit or the cache would overflow; then nothing is stored.
        """
        batch, kv_heads, head_dim = self.k.shape[1], self.k.shape[2], self.k.shape[4]
        if (k.shape[0], k.shape[1], k.shape[3]) != (batch, kv_heads, head_dim) or v.shape != k.shape:
            raise ValueError(
                f"cache holds [batch={batch}, kv_heads={kv_heads}, T, head_dim={head_dim}], "
                f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        start = self.lengths[layer]
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache is full: {start} positions held, {k.shape[2]} new, capacity {self.capacity}")
        self.k[layer, :, :, start:end] = k
        self.v[layer, :, :, start:end] = v
        self.lengths[layer] = end
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def __len__(self) -> int:
        return self.lengths[-1]  # the last layer is the last to be written: a position counts once all layers hold it

    def truncate(self, length: int) -> None:
        """Forget everything past the first `length` positions. Raises ValueError if fewer are held."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate to {length}: cache holds {len(self)} positions")
        self.lengths = [length] * len(self.lengths)

    def nbytes(self) -> int:
        """Bytes of the positions held (not of the reserved capacity)."""
        per_position = (self.k[:, :, :, 0].numel() + self.v[:, :, :, 0].numel()) * self.k.element_size()
        return per_position * len(self)
