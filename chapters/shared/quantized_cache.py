"""A key-value cache that holds codes: torch buffers, and the seam by which they enter the model.

How numbers become codes is told in `chapters.quantization.kv_cache`, whose `quantize` and `pack` are `encode` here. A
`Store` holds the keys or the values of one layer: old positions as packed codes and grids, the newest, its window, in
full precision. A step sees what it brings exactly, then packs what is due, as the released code of FlexGen and KIVI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minitfm.config import Config
from minitfm.model import causal_attention

Per = Literal["token", "channel"]
AXES: dict[Per, int] = {"token": -1, "channel": -2}  # of [.., T, D]: along which a group runs
PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """How keys, or values, are held; the defaults are FlexGen's. Raises ValueError for what cannot be held so.

    per         "token": a group is neighbouring channels of one token; "channel": neighbouring tokens of one channel
    bits        2, 4 or 8, which fill bytes
    residual    newest positions in full precision. Per token, at most so many; per channel, codes are written in blocks
                of `residual` positions, a multiple of group_size (0: one group), and what fills no block waits
    rule        "flexgen" or "kivi": whose arithmetic
    """

    per: Per = "token"
    bits: int = 4
    group_size: int = 64
    residual: int = 0
    rule: Literal["flexgen", "kivi"] = "flexgen"

    def __post_init__(self) -> None:
        if self.per not in AXES or self.rule not in ("flexgen", "kivi"):
            raise ValueError(f"need per token or channel, rule flexgen or kivi, got {self.per!r} and {self.rule!r}")
        if isinstance(self.bits, bool) or self.bits not in PACKED_BITS:
            raise ValueError(f"bits must be 2, 4 or 8, got {self.bits!r}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.residual < 0 or (self.per == "channel" and self.residual % self.group_size):
            need = f" and, per channel, a multiple of group_size={self.group_size}" if self.per == "channel" else ""
            raise ValueError(f"residual must be at least 0{need}, got {self.residual}")

    def window(self, length: int) -> int:
        """How many of `length` positions stay in full precision between two steps."""
        return length % (self.residual or self.group_size) if self.per == "channel" else min(length, self.residual)

    def grid_shape(self, T: int, D: int) -> tuple[int, int]:
        """Rows and columns of the groups of `[T, D]` numbers, the last group perhaps not full."""
        g = self.group_size
        return (T, -(-D // g)) if self.per == "token" else (-(-T // g), D)


KIVI_KEYS, KIVI_VALUES = Plan("channel", 2, 32, 128, "kivi"), Plan("token", 2, 32, 128, "kivi")


class Held(NamedTuple):
    """What a layer remembers of its keys, or values: `packed` old positions as codes, then W exact ones.

    codes   `[B, Hkv, capacity, D · bits / 8]` uint8, of which the first `packed` rows are filled
    grid    `[B, Hkv, rows, columns, 2]`, step and min of each group, with room for `capacity` positions
    window  `[B, Hkv, W, D]`, the newest positions
    NumPy arrays or tensors; group_size and per as in `Plan`.
    """

    codes: Any
    grid: Any
    window: Any
    packed: int
    group_size: int
    per: Per


def encode(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """`quantize` and `pack` by torch operators, to the last bit: (packed codes, grid). NaN spreads in its group."""
    axis, g, top = AXES[plan.per], plan.group_size, 2**plan.bits - 1
    groups = F.pad(x.movedim(axis, -1), (0, -x.shape[axis] % g)).unflatten(-1, (-1, g))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    factor, step = (high - low).reciprocal() * top, (high - low) / top
    flexgen = plan.rule == "flexgen"
    scaled = (groups - low) * factor if flexgen else (groups - low) / step
    step = 1 / factor if flexgen else step
    flat = (step == 0) | (factor.isinf() & flexgen)
    codes = scaled.clamp(0, top).round().masked_fill(flat, 0).to(torch.uint8).flatten(-2)[..., : x.shape[axis]]
    codes = codes.movedim(-1, axis).unflatten(-1, (-1, 8 // plan.bits)) << places(plan.bits, x.device)
    grid = torch.cat([step.masked_fill(flat, 0), low], dim=-1)
    return codes.sum(-1, dtype=torch.uint8), grid if plan.per == "token" else grid.transpose(-2, -3)


def places(bits: int, device: torch.device) -> Tensor:
    """How far each of the codes in a byte is shifted: the first stands highest."""
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=device)


def expand(held: Held, dtype: torch.dtype) -> Tensor:
    """All positions of `held` as numbers, `[B, Hkv, S, D]`: what the kernel never writes."""
    D = held.window.shape[-1]
    bits = 8 * held.codes.shape[-1] // D
    codes = held.codes[:, :, : held.packed, :, None] >> places(bits, held.codes.device) & (2**bits - 1)
    grid = held.grid.to(torch.promote_types(held.grid.dtype, torch.float32))
    grid = grid.repeat_interleave(held.group_size, AXES[held.per] - 1)[:, :, : held.packed, :D]
    return torch.cat([(grid[..., 0] * codes.flatten(-2) + grid[..., 1]).to(dtype), held.window.to(dtype)], dim=2)


class Store:
    """The keys, or the values, of one layer."""

    def __init__(
        self, plan: Plan, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """shape [B, Hkv, capacity, D]; grids and window in `dtype`. ValueError if a row cannot be cut so."""
        B, Hkv, capacity, D = shape
        if D * plan.bits % 8:
            raise ValueError(f"head_dim={D} codes of {plan.bits} bits do not fill bytes")
        if plan.rule == "kivi" and plan.per == "token" and D % plan.group_size:
            raise ValueError(f"group_size must divide head_dim={D} by the rule of KIVI, got {plan.group_size}")
        self.plan, self.packed = plan, 0
        self.codes = torch.empty(B, Hkv, capacity, D * plan.bits // 8, dtype=torch.uint8, device=device)
        self.grid = torch.empty(B, Hkv, *plan.grid_shape(capacity, D), 2, dtype=dtype, device=device)
        self.window = torch.empty(B, Hkv, 0, D, dtype=dtype, device=device)

    def __len__(self) -> int:
        return self.packed + self.window.shape[2]

    def held(self) -> Held:
        """What is remembered now; what later updates do does not show in it."""
        return Held(self.codes, self.grid, self.window, self.packed, self.plan.group_size, self.plan.per)

    def update(self, new: Tensor) -> Held:
        """Append `[B, Hkv, T, D]`. In what is returned the new positions are exact; then what is due is packed."""
        self.window = torch.cat([self.window, new.to(self.window.dtype)], dim=2)
        seen = self.held()
        due = self.window.shape[2] - self.plan.window(len(self))
        if due:
            self.pack(due)
        return seen

    def pack(self, count: int) -> None:
        """Turn the oldest `count` positions of the window into codes; per channel, whole groups."""
        end = self.packed + count
        rows = slice(self.plan.grid_shape(self.packed, 1)[0], self.plan.grid_shape(end, 1)[0])
        self.codes[:, :, self.packed : end], self.grid[:, :, rows] = encode(self.window[:, :, :count], self.plan)
        self.window = self.window[:, :, count:].clone()  # a view would keep the whole prompt in memory
        self.packed = end

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; codes that a cache of that length would not have become numbers."""
        packed = length - self.plan.window(length)
        self.window = expand(self.held(), self.window.dtype)[:, :, packed:length].clone()
        self.packed = packed

    def nbytes(self) -> int:
        """Bytes of the positions held, with their grids."""
        rows = self.plan.grid_shape(self.packed, 1)[0]
        return self.codes[:, :, : self.packed].nbytes + self.grid[:, :, :rows].nbytes + self.window.nbytes


class QuantizedCache:
    """A `minitfm.cache.Cache` of codes, for `capacity` positions.

    `fused`: update returns `Held` instead of tensors, for a model whose `attend` is the one below.
    """

    def __init__(
        self,
        config: Config,
        keys: Plan,
        values: Plan,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        fused: bool = False,
    ) -> None:
        self.capacity, self.fused = config.context if capacity is None else capacity, fused
        if batch < 1 or self.capacity < 1:
            raise ValueError(f"batch and capacity must be positive, got batch={batch}, capacity={self.capacity}")
        self.shape = (batch, config.kv_heads, self.capacity, config.head_dim)
        both = (keys, values)
        self.layers = [[Store(plan, self.shape, dtype, device) for plan in both] for _ in range(config.layers)]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v `[B, Hkv, T, D]` to `layer` and return all that it holds, `[B, Hkv, S, D]` in their dtype.

        Raises ValueError if the shape does not fit or the cache would overflow; then nothing is stored.
        """
        (B, Hkv, _, D), stores = self.shape, self.layers[layer]
        if (k.shape[0], k.shape[1], k.shape[3]) != (B, Hkv, D) or v.shape != k.shape:
            raise ValueError(
                f"cache holds [batch={B}, kv_heads={Hkv}, T, head_dim={D}], got k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        if len(stores[0]) + k.shape[2] > self.capacity:
            raise ValueError(
                f"cache is full: {len(stores[0])} positions held, {k.shape[2]} new, capacity {self.capacity}"
            )
        held = [store.update(new) for store, new in zip(stores, (k, v), strict=True)]
        return cast(tuple[Tensor, Tensor], tuple(held if self.fused else (expand(half, k.dtype) for half in held)))

    def __len__(self) -> int:
        return len(self.layers[-1][0])

    def truncate(self, length: int) -> None:
        """Forget everything past the first `length` positions. Raises ValueError if fewer are held."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate to {length}: cache holds {len(self)} positions")
        for store in (store for stores in self.layers for store in stores):
            store.truncate(length)

    def nbytes(self) -> int:
        """Bytes of the positions held (not of the reserved capacity)."""
        return sum(store.nbytes() for stores in self.layers for store in stores)


def attend(q: Tensor, k: Tensor | Held, v: Tensor | Held) -> Tensor:
    """The `attend` of a model with a `fused` cache: on CUDA one new token reads the codes, all else expands them."""
    if isinstance(k, Tensor) or isinstance(v, Tensor):
        return causal_attention(q, cast(Tensor, k), cast(Tensor, v))
    if q.is_cuda and q.shape[2] == 1 and q.dtype is not torch.float64:
        from kernels.quantization import kv_cache as kernel

        return kernel.decode_attention(q, kernel.Held(*k), kernel.Held(*v))
    return causal_attention(q, expand(k, q.dtype), expand(v, q.dtype))
