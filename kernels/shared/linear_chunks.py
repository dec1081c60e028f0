"""How chunked linear attention is launched: its arguments' check, chunks, states, and cases at real sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_dtype, require_launchable
from kernels.shared.tiles import has_warpgroup_products, loadable

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
EPS, CHUNK = 1e-6, 64


def launch_options(q: Tensor, v: Tensor, chunk: int) -> dict:
    """Keywords of a launch: sizes, padded sizes, chunk and warps."""
    features, D = q.shape[3], v.shape[3]
    return {
        "F": features, "BLOCK_F": max(16, triton.next_power_of_2(features)),
        "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "CHUNK": chunk, "num_warps": 4 if max(features, D) <= 64 else 8,
    }  # fmt: skip


def empty_states(q: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """For each chunk of each head: a state in q's dtype, `[B, H, chunks, BLOCK_F, BLOCK_D]`, and a float32 vector."""
    B, H, T, _ = q.shape
    shape = (B, H, triton.cdiv(T, options["CHUNK"]), options["BLOCK_F"])
    vector = torch.empty(shape, dtype=torch.float32, device=q.device)
    return torch.empty((*shape, options["BLOCK_D"]), dtype=q.dtype, device=q.device), vector


def checked(q: Tensor, k: Tensor, v: Tensor, chunk: int | None, backward: bool = False, **more: Tensor) -> int:
    """The chunk to use; None leaves the choice to dtype, pass and GPU. ValueError or TypeError for what cannot be."""
    require_dtype(FLOATS, q=q)
    require_dtype((q.dtype,), k=k, v=v, **more)
    for name, tensor in {"q": q, "k": k, "v": v, **more}.items():
        shape = tuple(tensor.shape)
        require(len(shape) == 4 and 0 not in shape, f"{name} must be 4-D and not empty, got shape {shape}")
        require(shape[3] <= 128, f"{name} must have a last axis of at most 128, got shape {shape}")
        require(
            loadable(tensor),
            f"{name} must have a contiguous last axis, and strides that are multiples of 8 if that axis is; "
            f"got shape {shape}, strides {tensor.stride()}",
        )
    require(k.shape == q.shape, f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    require(v.shape[:3] == q.shape[:3], f"v must be [*{tuple(q.shape[:3])}, D] like q, got {tuple(v.shape)}")
    require(chunk in (None, 16, 32, 64), f"chunk must be 16, 32 or 64, got {chunk}")
    require_launchable(q=q, k=k, v=v, **more)
    narrow = backward and not has_warpgroup_products()  # operands of mma.sync lie in registers: 64 rows spill
    return chunk or (16 if q.dtype == torch.float32 else 32 if narrow else CHUNK)


def inputs(device: torch.device, heads: int, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positive features q and k and normal v, `[1, heads, length, size]` in bfloat16."""
    make = torch.empty if device.type == "cpu" else torch.randn
    q, k, v = (make((1, heads, length, size), dtype=torch.bfloat16, device=device) for _ in range(3))
    return (q, k, v) if device.type == "cpu" else (F.elu(q) + 1, F.elu(k) + 1, v)


def in_torch(q: Tensor, k: Tensor, v: Tensor, chunk: int = CHUNK, precise: bool = False) -> tuple[Tensor, Tensor]:
    """The same by torch's operators, all chunks side by side: out and float32 total. `precise`: all in float32."""
    T, short, dtype = q.shape[2], -q.shape[2] % chunk, q.dtype
    if precise:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = F.pad((k.mT @ v).float().cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1].to(q.dtype)
    sums = F.pad(k.float().sum(3).cumsum(2), (0, 0, 1, 0))[:, :, :-1]
    weights = (q @ k.mT).tril()
    total = weights.float().sum(-1) + (q.float() @ sums[..., None])[..., 0] + EPS
    out = ((weights @ v + q @ states) / total[..., None]).flatten(2, 3)[:, :, :T]
    return out.to(dtype), total.flatten(2, 3)[:, :, :T].contiguous()


def only_out(q: Tensor, k: Tensor, v: Tensor, precise: bool) -> Tensor:
    """out of `in_torch`."""
    return in_torch(q, k, v, precise=precise)[0]


def backward_inputs(device: torch.device, heads: int, length: int, size: int) -> tuple[Tensor, ...]:
    """dout, q, k, v and what a forward pass leaves: out and total."""
    q, k, v = inputs(device, heads, length, size)
    if device.type == "cpu":
        return v, q, k, v, v, torch.empty(q.shape[:3], dtype=torch.float32)
    return torch.randn_like(v), q, k, v, *in_torch(q, k, v, precise=True)


def with_graph(
    precise: bool, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, ...]:
    """Arguments of `through_graph`: out of a forward pass in torch, and what it came from."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return only_out(q, k, v, precise), q, k, v, dout


def through_graph(out: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k and v; the graph stays for the next call."""
    return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def forward_case(name: str, attend: Callable, heads: int, length: int, size: int) -> Case:
    """A prefill by `attend`. Bytes: q, k, v, out and the float32 total once. Operations: as the kernel counts them."""
    rows = heads * length
    return Case(
        name,
        inputs=lambda device: inputs(device, heads, length, size),
        run=attend,
        expected=partial(only_out, precise=True),
        bytes=rows * (2 * 4 * size + 4),
        operations=rows * (4 * size * size + 4 * size * CHUNK),
        kind="matrix",
        tolerance=2e-2,
        peers={"chunked in torch": partial(only_out, precise=False)},
    )


def backward_case(name: str, backward: Callable, heads: int, length: int, size: int) -> Case:
    """The backward pass alone. Bytes: q, k, v, out, dout, dq, dk, dv and the float32 total once."""
    rows = heads * length
    return Case(
        name,
        inputs=lambda device: backward_inputs(device, heads, length, size),
        run=backward,
        expected=lambda *arguments: through_graph(*with_graph(True, *arguments)),
        bytes=rows * (2 * 8 * size + 4),
        operations=rows * (10 * size * size + 12 * size * CHUNK),
        kind="matrix",
        tolerance=2e-2,
        peers={"chunked in torch": through_graph},
        prepare={"chunked in torch": partial(with_graph, False)},
    )
