"""Cases for block-sparse attention at real sizes: causal windows with and without sinks, beside flex_attention.

Blocks of 128, as flex_attention has by default; bfloat16, batch 1, as many queries as keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from kernels.cases import Case
from kernels.shared.attentions import compiled_flex, inputs
from kernels.shared.block_lists import DeviceMask, both_ways

SIZE = 128


def band(i: Tensor, j: Tensor, window: int, sinks: int) -> Tensor:
    """Whether queries i see keys j: the last `window` keys, their own included, and of the first `sinks` those past."""
    return (j <= i) & ((i - j < window) | (j < sinks))


def band_mask(length: int, window: int, sinks: int, size: int, device: torch.device) -> DeviceMask:
    """`band` over `length` tokens in blocks of `size`, made from block numbers: at no time is there a dense mask.

    A block that is full only by the window and the sinks together counts as partial, which is slower, not wrong.
    """
    blocks = torch.arange(triton.cdiv(length, size))
    first = size * (blocks[:, None] - blocks)  # i - j of the blocks' first pairs; pairs differ by less than size
    nearest, farthest, column = first - size + 1, first + size - 1, size * blocks
    inside = torch.maximum(blocks[:, None], blocks) * size + size <= length
    full = (nearest >= 0) & ((farthest < window) | (column + size <= sinks)) & inside
    partial = (farthest >= 0) & ((nearest < window) | (column < sinks)) & ~full
    row, column = partial.nonzero(as_tuple=True)
    i, j = (size * x[:, None] + torch.arange(size) for x in (row, column))
    tokens = band(i[:, :, None], j[:, None], window, sinks) & (i < length)[:, :, None] & (j < length)[:, None]
    return both_ways((length, length), partial[None], full[None], tokens, device)


def attend_band(window: int, sinks: int, q: Tensor, k: Tensor, v: Tensor, mask: DeviceMask) -> tuple[Tensor, Tensor]:
    """out and lse by a dense mask, in float32, the query heads of one key head at a time."""
    T, D, group = q.shape[2], q.shape[3], q.shape[1] // k.shape[1]
    position = torch.arange(T, device=q.device)
    hidden = ~band(position[:, None], position, window, sinks)
    parts = []
    for head in range(k.shape[1]):
        queries, keys, values = (x.float() for x in (q[:, head * group : (head + 1) * group], k[:, head], v[:, head]))
        scores = (queries @ keys.mT * D**-0.5).masked_fill_(hidden, -torch.inf)
        parts.append(((scores.softmax(-1) @ values).to(q.dtype), scores.logsumexp(-1)))
    out, lse = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return out, lse


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """torch's block-sparse attention: out and lse."""
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], return_lse=True)


def with_flex_mask(window: int, sinks: int, q: Tensor, k: Tensor, v: Tensor, mask: DeviceMask) -> tuple:
    """Arguments of `flex` for the same pattern."""
    return q, k, v, create_block_mask(lambda b, h, i, j: band(i, j, window, sinks), None, None, *mask.shape, q.device)


def seen_pairs(length: int, window: int, sinks: int) -> int:
    """Pairs in which a query sees a key."""
    return sum(min(i + 1, window + sinks, max(i + 1, window)) for i in range(length))


def band_inputs(device: torch.device, heads: int, kv_heads: int, length: int, D: int, window: int, sinks: int) -> tuple:
    """q, k, v and the mask of a prefill."""
    mask = band_mask(length, window, sinks, SIZE, device)
    return *inputs(device, heads, kv_heads, length, D, gradient=False), mask


def band_case(
    name: str, attend: Callable, heads: int, kv_heads: int, length: int, D: int, window: int, sinks: int = 0
) -> Case:
    """A prefill by `attend(q, k, v, mask)`; bytes: q, k, v, out and lse once; the mask's lists are below a hundredth.

    Operations: 4 for each channel of each pair that is seen, not of all pairs in live blocks.
    """
    return Case(
        name,
        inputs=lambda device: band_inputs(device, heads, kv_heads, length, D, window, sinks),
        run=attend,
        expected=partial(attend_band, window, sinks),
        bytes=2 * 2 * (heads + kv_heads) * length * D + 4 * heads * length,
        operations=4 * D * heads * seen_pairs(length, window, sinks),
        kind="matrix",
        tolerance=2e-2,
        peers={"flex_attention": flex},
        prepare={"flex_attention": partial(with_flex_mask, window, sinks)},
    )


def backward_inputs(
    device: torch.device, heads: int, kv_heads: int, length: int, D: int, window: int, sinks: int
) -> tuple:
    """dout, q, k, v, out and lse as a forward pass would leave them, and the mask."""
    q, k, v, mask = band_inputs(device, heads, kv_heads, length, D, window, sinks)
    dout = torch.empty_like(q).normal_() if q.is_cuda else torch.empty_like(q)
    if not q.is_cuda:
        return dout, q, k, v, torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), mask
    return dout, q, k, v, *attend_band(window, sinks, q, k, v, mask), mask


def with_graph(attend: Callable, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, ...]:
    """Arguments of `through_graph`: out of a forward pass by `attend` and what it came from."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return attend(q, k, v, mask)[0], q, k, v, dout


def through_graph(out: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k and v alone; the graph stays for the next call."""
    return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def backward_case(
    name: str, backward: Callable, heads: int, kv_heads: int, length: int, D: int, window: int, sinks: int = 0
) -> Case:
    """The backward pass alone, by `backward(dout, q, k, v, out, lse, mask)`, counted as `band_case` counts."""

    def naively(dout, q, k, v, out, lse, mask):
        return through_graph(*with_graph(partial(attend_band, window, sinks), dout, q, k, v, mask))

    def prepared(dout, q, k, v, out, lse, mask):
        return with_graph(flex, dout, *with_flex_mask(window, sinks, q, k, v, mask))

    return Case(
        name,
        inputs=lambda device: backward_inputs(device, heads, kv_heads, length, D, window, sinks),
        run=backward,
        expected=naively,
        bytes=2 * 4 * (heads + kv_heads) * length * D + 4 * heads * length,
        operations=10 * D * heads * seen_pairs(length, window, sinks),
        kind="matrix",
        tolerance=2e-2,
        peers={"flex_attention": through_graph},
        prepare={"flex_attention": prepared},
    )
