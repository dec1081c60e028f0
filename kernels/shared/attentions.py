"""What attention kernels share: the check of their arguments, and cases at real sizes beside what torch offers.

Arguments are q [B, H, T, D] and k, v [B, Hkv, S, D]; Hkv divides H, and query head h reads key head h // (H / Hkv).
Cases are causal, in bfloat16, of batch 1, with as many queries as keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.cases import Case
from kernels.guard import require, require_dtype, require_launchable
from kernels.shared.tiles import loadable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def checked_scale(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, block_q: int | None, block_k: int | None, **more: Tensor
) -> float:
    """The scale, 1/√D for None. Raises ValueError or TypeError for input that the kernels cannot serve."""
    require_dtype(DTYPES, q=q)
    require_dtype((q.dtype,), k=k, v=v, **more)
    for name, tensor in {"q": q, "k": k, "v": v, **more}.items():
        shape, stride = tuple(tensor.shape), tensor.stride()
        require(len(shape) == 4 and 0 not in shape, f"{name} must be 4-D and not empty, got shape {shape}")
        require(
            loadable(tensor),
            f"{name} must have a contiguous last axis, and strides that are multiples of 8 if its head size is; "
            f"got shape {shape}, strides {stride}",
        )
    B, H, _, D = q.shape
    require(k.shape == v.shape, f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    require(
        k.shape[0] == B and k.shape[3] == D and H % k.shape[1] == 0,
        f"k must be [{B}, Hkv, S, {D}] with Hkv dividing {H} to fit q {tuple(q.shape)}, got {tuple(k.shape)}",
    )
    require(D <= 256, f"the head size D must be at most 256, got {D}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        require(block in (None, 16, 32, 64, 128, 256), f"{name} must be a power of two from 16 to 256, got {block}")
    scale = 1 / math.sqrt(D) if scale is None else scale
    require(math.isfinite(scale) and scale > 0, f"scale must be positive and finite, got {scale}")
    require_launchable(q=q, k=k, v=v, **more)
    return scale


def inputs(
    device: torch.device, heads: int, kv_heads: int, length: int, head_size: int, gradient: bool
) -> tuple[Tensor, ...]:
    """q, k, v of a prefill, and dout for a case with a backward pass."""
    make = torch.empty if device.type == "cpu" else torch.randn
    shapes = [(1, h, length, head_size) for h in (heads, kv_heads, kv_heads, heads)]
    tensors = [make(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    return (*(x.requires_grad_() for x in tensors[:3]), tensors[3]) if gradient else tuple(tensors[:3])


def backward_inputs(device: torch.device, heads: int, kv_heads: int, length: int, head_size: int) -> tuple[Tensor, ...]:
    """dout, q, k, v of a prefill, and its out and lse as a forward pass would leave them."""
    q, k, v, dout = (x.detach() for x in inputs(device, heads, kv_heads, length, head_size, gradient=True))
    if device.type == "cpu":
        return dout, q, k, v, torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
    lse = causal_scores(q, k.repeat_interleave(heads // kv_heads, dim=1)).logsumexp(-1)
    return dout, q, k, v, naive(q, k, v), lse


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores in float32 with -inf above the diagonal, T = S and as many heads in k as in q."""
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -math.inf)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with all scores in memory, in float32, T = S."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
    return (causal_scores(q, k).softmax(-1) @ v).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """torch's operator, by one of its backends or not at all."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@cache
def compiled_flex() -> Callable:
    """torch's FlexAttention, fused or an error: left alone, all shapes after the eighth would run unfused."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def with_backward(attend: Callable, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out and the gradients of q, k and v, one after the other."""
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def causal_case(
    name: str, attend: Callable, heads: int, kv_heads: int, length: int, head_size: int, gradient: bool = False
) -> Case:
    """A prefill by `attend`, with its backward pass if `gradient`; peers are torch's FlashAttention and cuDNN's.

    Bytes: q, k, v, out and a float32 lse once; backward q, out, dout, dq, k, v, dk, dv and lse. Operations: 4 for each
    channel of each visible pair of query and key, backward 10, as papers count them.
    """
    ways = {"kernel": attend, "naive": naive}
    ways |= {"SDPA flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)}
    ways |= {"SDPA cuDNN": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)}
    if gradient:
        ways = {name: partial(with_backward, way) for name, way in ways.items()}
    rows, numbers = heads * length, (heads + kv_heads) * length * head_size  # numbers: of q and k together
    moved = 2 * 2 * numbers + 4 * rows + gradient * (2 * 4 * numbers + 4 * rows)
    return Case(
        name,
        inputs=lambda device: inputs(device, heads, kv_heads, length, head_size, gradient),
        run=ways.pop("kernel"),
        expected=ways.pop("naive"),
        bytes=moved,
        operations=(14 if gradient else 4) * head_size * rows * (length + 1) // 2,
        kind="matrix",
        tolerance=2e-2,
        peers=ways,
    )


def with_graph(
    attend: Callable, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Arguments of `through_graph`: out of a forward pass by `attend` and what it came from."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return attend(q, k, v), q, k, v, dout


def through_graph(out: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k and v alone; the graph stays for the next call."""
    return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def backward_case(name: str, backward: Callable, heads: int, kv_heads: int, length: int, head_size: int) -> Case:
    """The backward pass alone of a prefill, by `backward(dout, q, k, v, out, lse)`, as `causal_case` counts it."""
    peers = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    rows, numbers = heads * length, (heads + kv_heads) * length * head_size
    return Case(
        name,
        inputs=lambda device: backward_inputs(device, heads, kv_heads, length, head_size),
        run=backward,
        expected=lambda *arguments: through_graph(*with_graph(naive, *arguments)),
        bytes=2 * 4 * numbers + 4 * rows,
        operations=10 * head_size * rows * (length + 1) // 2,
        kind="matrix",
        tolerance=2e-2,
        peers=dict.fromkeys(peers, through_graph),
        prepare={peer: partial(with_graph, partial(sdpa, backend=backend)) for peer, backend in peers.items()},
    )
