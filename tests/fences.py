"""Buffers that show a kernel's stray loads and stores: NaN around inputs, untouched bytes around outputs, and walls.

Which one for an input? `poisoned` in most tests of a kernel: a stray load becomes NaN in the result, and an assertion
says where. `walled` in one test more, because a kernel may load past the end and mask what it computed from that: right
here, an illegal access on a GPU. The wall ends the process, so this test says nothing about the values.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

MARGIN = 1 << 14  # elements on each side: a whole 64 × 256 tile may go astray and still be seen
UNTOUCHED = 0xFF  # NaN in every float format, but not the NaN of `poison`: an input's margin copied here shows
FACTORIES = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like"),
    Tensor: ("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}
_empty = torch.empty


def poison(dtype: torch.dtype) -> float | int | bool:
    """What spoils a result the most: NaN, for integers an extreme."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype is torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return limits.min if limits.min < 0 else limits.max


def poisoned(x: Tensor, aligned: bool = True) -> Tensor:
    """The same values, contiguous, inside a larger buffer of NaN (integers: extremes).

    With `aligned=False` they start one element past a 16-byte boundary, where a kernel may not load vectors.
    """
    x = x.detach().contiguous()
    buffer = _empty(2 * MARGIN + x.numel() + 1, dtype=x.dtype, device=x.device).fill_(poison(x.dtype))
    start = MARGIN + (not aligned)
    return buffer[start : start + x.numel()].view(x.shape).copy_(x)


def walled(x: Tensor, begins: bool = False) -> Tensor:
    """The same values, contiguous, ending (`begins`: beginning) where a page lies that no one may read or write.

    One element further, and the process ends with SIGSEGV, which is what `python -m chapters grade` reports; a kernel
    that masks its loads never gets there. The other side is poisoned up to its own such page. Not 16-byte aligned
    unless the size is. On a GPU, and on other systems than Linux, where kernels do not run, this is `poisoned`.
    """
    x = x.detach().contiguous()
    if x.is_cuda or not sys.platform.startswith("linux"):
        return poisoned(x)
    inside = max(-(-x.numel() * x.element_size() // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for wall in (start, start + mmap.PAGESIZE + inside):
        _forbid(wall)
    length = inside // x.element_size()
    room = torch.frombuffer(pages, dtype=x.dtype, count=length, offset=mmap.PAGESIZE).fill_(poison(x.dtype))
    first = 0 if begins else length - x.numel()
    return room[first : first + x.numel()].view(x.shape).copy_(x)  # a tensor keeps `pages` alive


def _forbid(page: int) -> None:
    """Make the memory page at this address unreadable and unwritable."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):  # 0: PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect failed")


@contextmanager
def guarded() -> Iterator[None]:
    """Every tensor that torch's factories make meanwhile is fenced: AssertionError if a byte of a fence changed.

    What `empty` makes starts as NaN (integers: extremes), so that elements nobody writes show in the result.
    """
    fences: list[tuple[str, Tensor]] = []
    with ExitStack() as patches:
        for owner, names in FACTORIES.items():
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, _fenced(name, getattr(owner, name), fences)))
        yield
    for name, fence in fences:
        assert bool((fence == UNTOUCHED).all()), f"a store went past the end of a tensor made by {name}"


def _fenced(name: str, make: Callable[..., Tensor], fences: list) -> Callable[..., Tensor]:
    """`make`, with its result moved between two margins that `fences` remembers."""

    def made(*args, **kwargs) -> Tensor:
        tensor = make(*args, **kwargs)
        if kwargs.get("out") is not None or tensor.layout is not torch.strided or tensor.is_meta:
            return tensor
        return _between_margins(name, tensor, fences)

    return made


def _between_margins(name: str, tensor: Tensor, fences: list) -> Tensor:
    """A copy of `tensor`, its strides kept, whose two margins are recorded in `fences` as (name, bytes)."""
    values = tensor.detach()
    if "empty" in name:
        values.fill_(poison(tensor.dtype))
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = span if tensor.numel() else 0
    edge = MARGIN * tensor.element_size()
    size = 2 * edge + span * tensor.element_size()
    raw = _empty(size, dtype=torch.uint8, device=tensor.device).fill_(UNTOUCHED)
    fences += [(name, raw[:edge]), (name, raw[size - edge :])]
    fenced = raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), MARGIN)
    return fenced.copy_(values).requires_grad_(tensor.requires_grad)
