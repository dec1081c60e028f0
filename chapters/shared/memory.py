"""What a computation holds at once: the tensors alive, counted exactly, or all memory as the system counts it."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
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


STATUS = Path("/proc/self/status")
READER = f"""
def status(key):
    lines = open({str(STATUS)!r}).read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
"""


def resident_growth(imports: str, code: str) -> int | None:
    """Bytes by which the memory of a fresh Python grows at its peak while it runs `code`, once `imports` have run.

    Every page counts that lies in memory, those of mapped files, too. None where the system does not tell: on Linux it
    does. Raises RuntimeError with the last line of what Python says if either fails.
    """
    if not STATUS.exists():
        return None
    script = [imports, READER, "before = status('VmRSS')", code, "print(status('VmHWM') - before)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return int(done.stdout.splitlines()[-1])
