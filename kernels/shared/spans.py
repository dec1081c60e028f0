"""Around the kernels with a learnt span: the check of their arguments, and cases at real sizes beside torch's operator.

Cases are causal, in bfloat16, of batch 1, with as many queries as keys. Spans are spread as training leaves them, most
heads short and a few long: head h of H has length * (h / H)^4 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared.attentions import checked_scale, inputs
from kernels.shared.flash_tiles import TILE_FLOAT32
from kernels.shared.tiles import has_warpgroup_products

RAMP = 32

# (BLOCK_Q, BLOCK_K, warps, stages) by the largest head size that they serve, as in `flash_tiles`; no register spilled
# at the sizes of CASES. The mask takes registers: tiles are narrower than FlashAttention's.
TILES = {
    "forward": {64: (64, 64, 4, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 3)},
    "key gradient": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
}
WIDE_TILES = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    "key gradient": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
}


def span_options(kernel: str, q: Tensor, block_q: int | None, block_k: int | None) -> dict:
    """Keywords of a launch, a function of head size, dtype and GPU; block_q and block_k replace the tile if given."""
    D, table = q.shape[-1], (WIDE_TILES if has_warpgroup_products() else TILES)[kernel]
    tile = TILE_FLOAT32 if q.dtype == torch.float32 else table[min(size for size in table if size >= D)]
    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    chosen = dict(zip(names, (block_q or tile[0], block_k or tile[1], *tile[2:]), strict=True))
    return {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), **chosen}


def checked_spans(
    q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: int, max_span: int | None, scale: float | None,
    block_q: int | None, block_k: int | None, **more: Tensor,
) -> tuple[int, float]:  # fmt: skip
    """(max_span, scale), S and 1/√D for None. Raises ValueError or TypeError for what the kernels cannot serve."""
    scale = checked_scale(q, k, v, scale, block_q, block_k, **more)
    max_span = k.shape[2] if max_span is None else max_span
    require(q.shape[2] <= k.shape[2], f"k must have at least q's {q.shape[2]} positions, got {k.shape[2]}")
    require(ramp == int(ramp) and ramp >= 1, f"ramp must be a positive integer, got {ramp}")
    require(max_span >= 1, f"max_span must be at least 1, got {max_span}")
    require_dtype((torch.float32,), span=span)
    require(span.shape == q.shape[1:2], f"span must be [{q.shape[1]}], one for each head, got {tuple(span.shape)}")
    require_contiguous(span=span)
    require_launchable(q=q, span=span)
    return max_span, scale


def require_from_forward(q: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError or TypeError unless dout and out are like q, and lse `[B, H, T]` float32, contiguous."""
    for name, tensor in (("dout", dout), ("out", out)):
        require(tensor.shape == q.shape, f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    require_dtype((torch.float32,), lse=lse)
    require(lse.shape == q.shape[:3], f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    require_contiguous(lse=lse)


def spread(heads: int, length: int) -> list[float]:
    """The spans of a case's heads."""
    return [length * (head / heads) ** 4 for head in range(heads)]


def pairs_read(heads: int, length: int) -> int:
    """Pairs of a query and a key that count, over all heads of a case."""
    reaches = [min(length, RAMP + int(-(-span // 1))) for span in spread(heads, length)]
    return sum(reach * length - reach * (reach - 1) // 2 for reach in reaches)


def span_inputs(device: torch.device, heads: int, kv_heads: int, length: int, head_size: int) -> tuple[Tensor, ...]:
    """q, k, v and span of a prefill."""
    span = torch.tensor(spread(heads, length), dtype=torch.float32, device=device)
    return *inputs(device, heads, kv_heads, length, head_size, gradient=False), span


def span_backward_inputs(
    device: torch.device, heads: int, kv_heads: int, length: int, head_size: int
) -> tuple[Tensor, ...]:
    """dout, q, k, v of a prefill, its out and lse as a forward pass would leave them, and span."""
    q, k, v, span = span_inputs(device, heads, kv_heads, length, head_size)
    if device.type == "cpu":
        return torch.empty_like(q), q, k, v, torch.empty_like(q), torch.empty(q.shape[:3]), span
    repeated = k.repeat_interleave(heads // kv_heads, dim=1)
    scores = q.float() @ repeated.float().mT * head_size**-0.5 + bias(span, length)
    return torch.randn_like(q), q, k, v, masked(q, k, v, span), scores.logsumexp(-1), span


def bias(span: Tensor, length: int) -> Tensor:
    """log m for all pairs, `[H, T, T]` float32, -inf for those that do not count; differentiable where it is finite."""
    position = torch.arange(length, device=span.device)
    distance = position[:, None] - position
    soft = ((RAMP + span[:, None, None] - distance) / RAMP).clamp(max=1)
    live = (soft > 0) & (distance >= 0)
    return torch.where(live, soft, 1.0).log().masked_fill(~live, -torch.inf)


def masked(q: Tensor, k: Tensor, v: Tensor, span: Tensor) -> Tensor:
    """The same attention with all scores and the mask in memory, in float32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
    scores = q.float() @ k.mT * q.shape[-1] ** -0.5
    return ((scores + bias(span, q.shape[2])).softmax(-1) @ v).to(q.dtype)


def with_mask(q: Tensor, k: Tensor, v: Tensor, span: Tensor) -> tuple[Tensor, ...]:
    """Arguments of `sdpa_with_mask`, the mask made once."""
    return q, k, v, bias(span, q.shape[2]).to(q.dtype)


def sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's operator, which reads the mask of all pairs."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=q.shape[1] != k.shape[1])


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Tensor
) -> tuple[Tensor, ...]:
    """What autograd gives for `masked`."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, span)]
    return torch.autograd.grad(masked(*leaves), leaves, dout)


def out_alone(attend: Callable, q: Tensor, k: Tensor, v: Tensor, span: Tensor) -> Tensor:
    """What `attend` gives, without its lse."""
    return attend(q, k, v, span)[0]


def span_case(name: str, attend: Callable, heads: int, kv_heads: int, length: int, head_size: int) -> Case:
    """A prefill by `attend(q, k, v, span)`, its lse dropped; two products of 2 D operations with each pair read."""
    numbers = (heads + kv_heads) * length * head_size
    return Case(
        name,
        inputs=lambda device: span_inputs(device, heads, kv_heads, length, head_size),
        run=partial(out_alone, attend),
        expected=masked,
        bytes=2 * 2 * numbers + 4 * heads * (length + 1),
        operations=4 * head_size * pairs_read(heads, length),
        kind="matrix",
        tolerance=2e-2,
        peers={"SDPA with a mask": sdpa_with_mask},
        prepare={"SDPA with a mask": with_mask},
    )


def span_backward_case(name: str, backward: Callable, heads: int, kv_heads: int, length: int, head_size: int) -> Case:
    """The backward pass alone, by `backward(dout, q, k, v, out, lse, span)`: 5 products of 2 D with each pair."""
    numbers = (heads + kv_heads) * length * head_size
    return Case(
        name,
        inputs=lambda device: span_backward_inputs(device, heads, kv_heads, length, head_size),
        run=backward,
        expected=gradients,
        bytes=2 * 4 * numbers + 4 * heads * (length + 2),
        operations=10 * head_size * pairs_read(heads, length),
        kind="matrix",
        tolerance=2e-2,
    )
