"""What a computation holds at once: the peak of the tensors alive, counted exactly and the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Within it, `peak` is the most bytes that tensors made since it was entered held at any moment.

    Every operator's new storages count from when it returns until nothing refers to them, in the backward pass too.
    What an operator allocates and frees inside itself is not seen, nor are tensors that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self.known:
                self.add(storage)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        self.known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, nbytes: int) -> None:
        """A storage is gone."""
        self.held -= nbytes


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def peak_bytes(compute: Callable[[], Any]) -> int:
    """Most bytes of new tensors alive at once while `compute()` runs; what it returns counts, its inputs do not."""
    with TensorMemory() as memory:
        compute()
    return memory.peak
