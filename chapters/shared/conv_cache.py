"""A cache for models that look at a few tokens before by a convolution: keys and values, and what the next step needs.

    cache = start(model)                        # a KVCache, and a place for each layer's state
    model(prompt, cache)                        # a layer reads cache.states[layer], and puts the new one there
    generate(model, prompt, 16, cache=start(model))

The cache is the one object that belongs to a text and that every layer is given. So the state lives there, the model
holds none, and minitfm needs no seam for it.
"""

from __future__ import annotations

from torch import Tensor

from minitfm.cache import Cache, KVCache
from minitfm.model import Transformer


class ConvCache:
    """Any cache, and beside it each layer's state: all that the model remembers of a text.

    None stands for the beginning. A state holds the last rows only, so `truncate` can go nowhere but there.
    """

    def __init__(self, cache: Cache, layers: int) -> None:
        self.cache = cache
        self.states: list[Tensor | None] = [None] * layers

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As the cache within."""
        return self.cache.update(layer, k, v)

    def __len__(self) -> int:
        return len(self.cache)

    def truncate(self, length: int) -> None:
        """Forget everything, with length 0. ValueError for less: what came before the states is gone."""
        if length not in (0, len(self)):
            raise ValueError(f"cannot truncate to {length}: of {len(self)} positions only the last states are held")
        self.cache.truncate(length)
        if not length:
            self.states = [None] * len(self.states)


def start(model: Transformer, batch: int = 1, capacity: int | None = None) -> ConvCache:
    """An empty `KVCache` for `model`, with places for the states of its layers."""
    weight = model.embedding.weight
    return ConvCache(KVCache(model.config, batch, capacity, weight.dtype, weight.device), model.config.layers)
