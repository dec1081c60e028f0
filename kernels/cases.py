"""Real-size inputs for each kernel: `check` compiles them for three GPUs, `bench` times them on one.

A kernel file ends in `CASES = [Case(...), ...]`. Sizes are those of Llama-7B and 8B layers.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch  # `check` itself needs no torch; its two compiling processes do


@dataclass(frozen=True)
class Case:
    """One call of a kernel's wrapper at one size.

    inputs(device)   the arguments of `run` and nothing else, made on that device; contents are needed on "cuda" only
                     (elsewhere `torch.empty` will do), because `check` only compiles
    run              the kernel's wrapper, or its backward
    expected         the same result by plain torch operators; `bench` compares before it times
    bytes            moved to and from memory at the least, and `operations` done (2 per multiply-add)
    kind             "matrix": must use tensor cores; "stream": must load and store 128 bits at a time; "other": neither
                     (`check` says to which kernels of a case with several launches this applies)
    narrow_stores    why a kernel of a "stream" case stores less than 128 bits at a time; static.md quotes it
    rate             which matrix ceiling the operations count against
    tolerance        largest norm of the difference from `expected` over the norm of `expected`; integers are exact
    peers            what torch offers for the same job, timed in the same run
    prepare          for a peer that wants its arguments in another form: makes them, a tuple, from those of `run`;
                     called once for each set of inputs, before the peer is timed
    peer_tolerance   the same as `tolerance` for peers, which may round elsewhere; one that differs more is not timed

    Raises ValueError for bytes that are not positive and for a `prepare` that belongs to no peer.
    """

    name: str
    inputs: Callable[[torch.device], tuple]
    run: Callable
    expected: Callable
    bytes: int
    operations: int
    kind: Literal["matrix", "stream", "other"]
    rate: Literal["bf16", "int8"] = "bf16"
    narrow_stores: str = ""
    tolerance: float = 1e-2
    peers: dict[str, Callable] = field(default_factory=dict)
    prepare: dict[str, Callable[..., tuple]] = field(default_factory=dict)
    peer_tolerance: float = 5e-2

    def __post_init__(self):
        if self.bytes <= 0:
            raise ValueError(f"bytes of the case {self.name!r} must be positive, got {self.bytes}")
        strangers = sorted(self.prepare.keys() - self.peers.keys())
        if strangers:
            raise ValueError(f"prepare of the case {self.name!r} has {strangers}, but its peers are {[*self.peers]}")


def unavailable() -> str:
    """Why kernels can neither be compiled nor run here, in one line; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles the kernels, is not installed; it exists for Linux"
    return ""


def techniques() -> list[str]:
    """Dotted names of all kernel files, such as "attention.flash", found in the folders; needs no Triton."""
    import kernels

    names = []
    for part in pkgutil.iter_modules(kernels.__path__):
        if part.ispkg and part.name != "shared":
            package = importlib.import_module(f"kernels.{part.name}")
            names += [f"{part.name}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return sorted(names)


def cases(technique: str) -> list[Case]:
    """The CASES of one kernel file; [] where Triton is not installed, and `unavailable` then says so in words."""
    return [] if unavailable() else importlib.import_module(f"kernels.{technique}").CASES


def find(name: str) -> str:
    """The technique with this dotted name, or with this last part; ValueError suggests the nearest."""
    known = techniques()
    matches = [technique for technique in known if name in (technique, technique.split(".")[1])]
    if len(matches) != 1:
        near = difflib.get_close_matches(name, [*known, *(technique.split(".")[1] for technique in known)], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"there is no kernel named {name!r}; {hint}")
    return matches[0]
