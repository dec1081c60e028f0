"""The options of FlashAttention's variants: their check, how kernels get them, and cases at real sizes beside torch's.

Cases are causal, in bfloat16, of batch 1. Their peers are torch's FlexAttention, compiled, which takes any change of
scores as a function, and where sequences are packed its own flash-attn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from kernels.cases import Case
from kernels.guard import require, require_dtype
from kernels.shared import attentions

LOG2E = math.log2(math.e)
Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Options:
    """Checked options, None for those that are off: window, cap, float32 slopes `[H]`, int32 offsets `[N + 1]`."""

    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    slopes: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None

    def scales(self) -> tuple[float, float | None]:
        """`scale2` and `cap2` of `kernels.shared.flash_scores.modified_scores`."""
        if self.softcap is None:
            return self.scale * LOG2E, None
        return self.scale * 2 / self.softcap * LOG2E, self.softcap * LOG2E

    def sequences(self) -> int:
        """How many are packed; 0 if none are."""
        return 0 if self.cu_q is None else len(self.cu_q) - 1

    def tiles(self, length: int, block: int) -> int:
        """Programs for each head, for `length` queries or keys in tiles of `block`."""
        return length // block + self.sequences() if self.sequences() else -(-length // block)


def checked(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: Window, softcap: float | None,
    slopes: Tensor | None, cu_q: Sequence[int] | Tensor | None, cu_k: Sequence[int] | Tensor | None,
    block_q: int | None, block_k: int | None, **more: Tensor,
) -> Options:  # fmt: skip
    """The options of a call. Raises ValueError or TypeError for input that the kernels cannot serve."""
    scale = attentions.checked_scale(q, k, v, scale, block_q, block_k, **more)
    for side in window:
        fits = side is None or (side >= 0 and side == int(side))
        require(len(window) == 2 and fits, f"window must be (left, right), None or integers from 0 on, got {window}")
    left, right = (None if side is None else min(int(side), q.shape[2] + k.shape[2]) for side in window)
    fits = softcap is None or (softcap > 0 and math.isfinite(softcap))
    require(fits, f"softcap must be None, or positive and finite, got {softcap}")
    if slopes is not None:
        shape = tuple(slopes.shape)
        require(shape == (q.shape[1],), f"slopes must be [{q.shape[1]}], one for each query head, got {shape}")
        slopes = slopes.to(q.device, torch.float32).contiguous()
    if cu_q is None:
        require(cu_k is None, "cu_q must be given with cu_k, got None")
        return Options(scale, left, 0 if causal else right, softcap, slopes, None, None)
    require(q.shape[0] == 1, f"q must be a batch of 1 where sequences are packed, got {q.shape[0]}")
    offsets = [checked_offsets("cu_q", cu_q, q), checked_offsets("cu_k", cu_q if cu_k is None else cu_k, k)]
    lengths = [len(cu) for cu in offsets]
    require(lengths[0] == lengths[1], f"cu_q and cu_k must be equally long, got {lengths[0]} and {lengths[1]} offsets")
    return Options(scale, left, 0 if causal else right, softcap, slopes, *offsets)


def checked_offsets(name: str, offsets: Sequence[int] | Tensor, packed: Tensor) -> Tensor:
    """int32 offsets on the device of what they cut. Reading them, to check them, waits for a GPU that holds them."""
    found = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    if not all(isinstance(cut, Integral) for cut in found):
        raise TypeError(f"{name} must be integers, got {found}")
    end = packed.shape[2]
    rising = len(found) > 1 and all(a <= b for a, b in pairwise(found))
    fits = rising and found[0] == 0 and found[-1] == end
    require(fits, f"{name} must be [N + 1], rise from 0 to {end} and never fall, got {found}")
    return torch.tensor(found, dtype=torch.int32).to(packed.device, non_blocking=True)


def require_statistics(q: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError or TypeError unless these are what a backward pass takes beside q."""
    for name, tensor in (("dout", dout), ("out", out)):
        require(tensor.shape == q.shape, f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    require_dtype((torch.float32,), lse=lse)
    require(lse.shape == q.shape[:3], f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    require(lse.is_contiguous(), f"lse must be contiguous, got strides {lse.stride()}")


@dataclass(frozen=True)
class Setting:
    """What a case is about: sizes, and options under the wrapper's names; lengths of packed sequences, or one."""

    heads: int
    kv_heads: int
    head_size: int
    lengths: tuple[int, ...]
    window: int | None = None  # tokens, the own one included
    softcap: float | None = None
    alibi: bool = False

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        window = self.window or self.tokens
        return sum(n * (n + 1) // 2 - max(n - window, 0) * (max(n - window, 0) + 1) // 2 for n in self.lengths)

    def options(self, device: torch.device) -> dict:
        """Keywords of the wrapper."""
        slopes = 2.0 ** (-8 / self.heads * torch.arange(1, self.heads + 1, device=device)) if self.alibi else None
        cu = [0, *accumulate(self.lengths)] if len(self.lengths) > 1 else None
        sides = (None if self.window is None else self.window - 1, None)
        return {"window": sides, "softcap": self.softcap, "slopes": slopes, "cu_q": cu}

    def visible(self, device: torch.device) -> Callable:
        """FlexAttention's mask, a function of batch, head, row and column, and the one that `naive` takes."""
        window, several, lengths = self.window or self.tokens, len(self.lengths) > 1, torch.tensor(self.lengths)
        whose = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)

        def visible(batch, head, row, column):  # FlexAttention takes no method, and compiles no making of tensors
            seen = (column <= row) & (row - column < window)
            return seen & (whose[row] == whose[column]) if several else seen

        return visible

    def modify(self, score, batch, head, row, column):
        """FlexAttention's change of a scaled score."""
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        if self.alibi:
            score = score - torch.exp2(-8 / self.heads * (head + 1)) * (row - column).abs()
        return score


@functools.cache
def options_on(setting: Setting, device: torch.device) -> dict:
    """`Setting.options`, made once."""
    return setting.options(device)


@functools.cache
def block_mask(setting: Setting, device: torch.device):
    """Which blocks FlexAttention visits, found once."""
    return create_block_mask(setting.visible(device), None, None, setting.tokens, setting.tokens, str(device))


def flex(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention with the setting's mask and change of scores."""
    changed = setting.modify if setting.softcap or setting.alibi else None
    mask, gqa = block_mask(setting, q.device), q.shape[1] != k.shape[1]
    return attentions.compiled_flex()(q, k, v, changed, mask, enable_gqa=gqa)


def varlen(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash-attn for packed sequences, which knows windows, but neither caps nor slopes."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = offsets_on(setting, q.device), max(setting.lengths)
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    sides = (-1 if setting.window is None else setting.window - 1, 0)
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(*packed, cu, cu, longest, longest, window_size=sides, **gqa).transpose(0, 1)[None]


@functools.cache
def offsets_on(setting: Setting, device: torch.device) -> Tensor:
    """The offsets, where torch wants them."""
    return torch.tensor([0, *accumulate(setting.lengths)], dtype=torch.int32, device=device)


def naive(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores of a head in memory, in float32, one head after the other."""
    place, group, parts = torch.arange(setting.tokens, device=q.device), q.shape[1] // k.shape[1], []
    row, column = place[:, None], place[None, :]
    hidden = ~setting.visible(q.device)(0, 0, row, column)
    for head in range(q.shape[1]):
        scores = q[0, head].float() @ k[0, head // group].float().T * q.shape[3] ** -0.5
        scores = setting.modify(scores, 0, torch.tensor(head, device=q.device), row, column)
        parts.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[0, head // group].float())
    return torch.stack(parts)[None].to(q.dtype)


def variant_case(name: str, flash_attention: Callable, setting: Setting, gradient: bool = False) -> Case:
    """A prefill with the setting's options, with its backward pass if `gradient`; counted as `attentions.causal_case`
    counts it, operations for the pairs that the window and the sequences leave."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, **options_on(setting, q.device))[0]

    ways = {"kernel": attend, "naive": partial(naive, setting), "FlexAttention": partial(flex, setting)}
    if setting.softcap is None and not setting.alibi:
        ways["flash-attn of torch"] = partial(varlen, setting)
    if gradient:
        ways = {way: partial(attentions.with_backward, run) for way, run in ways.items()}
    rows, sizes = setting.heads * setting.tokens, (setting.heads, setting.kv_heads, setting.tokens, setting.head_size)
    numbers = (setting.heads + setting.kv_heads) * setting.tokens * setting.head_size
    return Case(
        name,
        inputs=lambda device: attentions.inputs(device, *sizes, gradient),
        run=ways.pop("kernel"),
        expected=ways.pop("naive"),
        bytes=2 * 2 * numbers + 4 * rows + gradient * (2 * 4 * numbers + 4 * rows),
        operations=(14 if gradient else 4) * setting.head_size * setting.heads * setting.pairs(),
        kind="matrix",
        tolerance=2e-2,
        peers=ways,
    )
