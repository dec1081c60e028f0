"""Where a model's channels stand, and how to reorder them without changing what it computes.

A channel is written by rows of some weights and read by columns of others. Move both alike, and every product is the
same sum in another order. What lies between must treat channels alike: RMSNorm does, with its gain moved too; so do
the activation and the weighted sums of attention. Rotary positions do not: each dimension of a query and a key turns at
a frequency of its own, so only whole heads can be moved there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitfm.model import Transformer

INTO_STREAM = ("o_proj.weight", "down_proj.weight", "norm.weight")  # the residual stream is their first axis


@dataclass(frozen=True)
class Place:
    """Where a parameter has certain channels: along `axis`, from `start` on, each `unit` neighbours wide."""

    name: str
    axis: int
    start: int = 0
    unit: int = 1


@dataclass(frozen=True)
class Site:
    """Channels that can be reordered: how many, and every place where the model has them."""

    channels: int
    places: tuple[Place, ...]

    def readers(self) -> list[Place]:
        """The inputs of the blocks' linear layers among the places: weights of which a mask may be pruned."""
        return [place for place in self.places if place.axis == 1 and place.name.startswith("blocks.")]


def sites(model: Transformer) -> dict[str, Site]:
    """All channels of a plain model that can be reordered, by name.

    stream              the residual stream, in every parameter; a tied one counts once
    blocks.I.hidden     what the activation makes: rows of gate and up, columns of down
    blocks.I.values.G   dimensions of value head G: rows of v, and columns of o for each query head that reads it
    blocks.I.heads      key/value heads, with the query heads that read them
    blocks.I.queries.G  query heads that read key/value head G
    Raises ValueError for a model whose parameters are not those of a plain one of its config.
    """
    names = [name for name, _ in model.named_parameters()]
    with torch.device("meta"):
        if names != [name for name, _ in Transformer(model.config).named_parameters()]:
            raise ValueError("sites are known for plain models only, this one has other parameters")
    stream = tuple(Place(name, 0 if name.endswith(INTO_STREAM) else 1) for name in names)
    found = {"stream": Site(model.config.dim, stream)}
    for layer in range(model.config.layers):
        block = f"blocks.{layer}"
        makers = [name for name in names if name.startswith(block) and ("gate_proj" in name or "up_proj" in name)]
        hidden = [*(Place(name, 0) for name in makers), Place(f"{block}.feed_forward.down_proj.weight", 1)]
        found[f"{block}.hidden"] = Site(model.config.hidden_dim, tuple(hidden))
        found |= head_sites(model, block)
    return found


def head_sites(model: Transformer, block: str) -> dict[str, Site]:
    """The sites of one block's attention, as in `sites`."""
    config = model.config
    size, group = config.head_dim, config.heads // config.kv_heads
    q, k, v, o = (f"{block}.attention.{part}_proj.weight" for part in "qkvo")
    wide = size * group  # the query heads of one key/value head
    heads = (Place(q, 0, 0, wide), Place(k, 0, 0, size), Place(v, 0, 0, size), Place(o, 1, 0, wide))
    found = {f"{block}.heads": Site(config.kv_heads, heads)}
    for head in range(config.kv_heads):
        start = head * wide
        read = tuple(Place(o, 1, start + query * size) for query in range(group))
        found[f"{block}.values.{head}"] = Site(size, (Place(v, 0, head * size), *read))
        found[f"{block}.queries.{head}"] = Site(group, (Place(q, 0, start, size), Place(o, 1, start, size)))
    return found


@torch.no_grad()
def reorder(model: Transformer, site: Site, order: Tensor) -> None:
    """Let channel j of `site` be what channel order[j] was, in place; the model computes the same, but for rounding.

    order int64 `[channels]`. Raises ValueError unless it holds each channel once, before anything is changed.
    """
    if sorted(order.tolist()) != list(range(site.channels)):
        raise ValueError(f"order must hold each of {site.channels} channels once, got {order.tolist()}")
    for place in site.places:
        neighbours = (order[:, None] * place.unit + torch.arange(place.unit)).flatten()
        weight = model.get_parameter(place.name)
        part = weight.narrow(place.axis, place.start, len(neighbours))
        part.copy_(part.index_select(place.axis, neighbours.to(weight.device)))


def reorder_inputs(model: Transformer, find: Callable[[Tensor], np.ndarray]) -> dict[str, np.ndarray]:
    """Reorder what the blocks' linear layers read, in place, by what `find(weight)` says; returns the orders by site.

    weight `[out, channels]` stacks all layers that read a site's channels, which share one order `[channels]`. Sites
    whose channels are not whole groups of four neighbours in these layers keep the order that they have: those of whole
    heads, and odd sizes. Raises ValueError as `sites` and `reorder`.
    """
    orders = {}
    for name, site in sites(model).items():
        readers = site.readers()
        if site.channels % 4 or any(place.start % 4 or place.unit > 1 for place in readers):
            continue
        weights = [model.get_parameter(place.name).detach() for place in readers]
        parts = [w.narrow(1, place.start, site.channels) for w, place in zip(weights, readers, strict=True)]
        orders[name] = find(torch.cat(parts))
        reorder(model, site, torch.from_numpy(orders[name]))
    return orders
