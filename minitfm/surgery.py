"""How a technique opens a trained model: find its linear layers, watch their inputs, put another module in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitfm.model import Attend, FeedForward, Transformer


def linears(model: Transformer) -> dict[str, nn.Linear]:
    """Linear layers of the blocks by name, in the order in which a forward pass runs them.

    The embedding and the head are left out, as the compression papers leave them.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def replace(model: Transformer, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where the submodule `name` stands; return the one taken out. KeyError if there is no such name."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise KeyError(f"the model has no submodule {name!r}") from None
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return old


def set_attend(model: Transformer, layer: int, attend: Attend) -> Attend:
    """Let one layer attend by `attend`; return what it attended by. A module's parameters become the model's."""
    mixer: Any = model.blocks[layer].get_submodule("attention")
    old = mixer.attend
    del mixer.attend  # a function in a module's place, or the reverse, is refused otherwise
    mixer.attend = attend
    return old


@torch.no_grad()
def record_inputs(
    model: Transformer, tokens: Tensor, names: Sequence[str], batch: int = 8
) -> Iterator[tuple[str, Tensor]]:
    """Stream what reaches the named submodules: yields (name, input `[b, T, in]`) in execution order.

    tokens `[N, T]` run through the model `batch` sequences at a time and one batch's inputs are all that is ever
    held, so a Hessian or a maximum over any number of tokens needs memory for one batch only. What comes after the last
    of the submodules, each of which must run once in a pass, is not computed.
    Raises ValueError for empty tokens, KeyError for an unknown name.
    """
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be a non-empty [N, T] tensor, got shape {tuple(tokens.shape)}")
    modules = dict(model.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise KeyError(f"the model has no submodules {missing}")
    for sequences in tokens.split(batch):
        seen: list[tuple[str, Tensor]] = []
        note = partial(_note_input, seen, len(names))
        hooks = [modules[name].register_forward_pre_hook(partial(note, name)) for name in names]
        try:
            with suppress(_SeenAllError):
                model(sequences)
        finally:
            for hook in hooks:
                hook.remove()
        yield from seen


class _SeenAllError(Exception):
    """Leaves a forward pass whose rest nobody needs."""


def _note_input(
    seen: list[tuple[str, Tensor]], wanted: int, name: str, _module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    seen.append((name, args[0].detach()))
    if len(seen) == wanted:
        raise _SeenAllError


def norm_readers(model: Transformer) -> dict[str, list[str]]:
    """Each block norm's name, and the names of all linear layers that read its output.

    Raises ValueError where a block is no longer made of plain linear layers, since a reader would then be missed.
    """
    readers = {}
    for i, block in enumerate(model.blocks):
        feed_forward = ("gate_proj", "up_proj") if model.config.activation == "swiglu" else ("up_proj",)
        readers[f"blocks.{i}.attention_norm"] = [f"blocks.{i}.attention.{p}" for p in ("q_proj", "k_proj", "v_proj")]
        readers[f"blocks.{i}.feed_forward_norm"] = [f"blocks.{i}.feed_forward.{p}" for p in feed_forward]
        if not isinstance(block.feed_forward, FeedForward):
            raise ValueError(
                f"blocks.{i}.feed_forward is a {type(block.feed_forward).__name__}, not a dense FeedForward"
            )
    if missing := [name for names in readers.values() for name in names if name not in linears(model)]:
        raise ValueError(f"not plain linear layers: {missing}")
    return readers


@torch.no_grad()
def plant_outliers(model: Transformer, channels: int, factor: float, seed: int = 0) -> list[int]:
    """Give the inputs of q/k/v and gate/up outlier channels without changing the function of the model.

    The same `channels` channels of every block norm's gain are multiplied by `factor`, and the matching columns of
    the layers that read it divided by it. Large models grow such channels by themselves (LLM.int8, section 4),
    small ones do not. Exact in real arithmetic, and in floating point where `factor` is a power of two.
    Returns the channels. Changes the model in place. ValueError if the counts or the factor make no sense.
    """
    dim = model.config.dim
    if not 1 <= channels <= dim or not factor > 0:
        raise ValueError(f"need 1 <= channels <= {dim} and factor > 0, got channels={channels}, factor={factor}")
    chosen = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))[:channels].sort().values
    for norm, readers in norm_readers(model).items():
        model.get_parameter(f"{norm}.weight")[chosen] *= factor
        for name in readers:
            model.get_parameter(f"{name}.weight")[:, chosen] /= factor
    return chosen.tolist()
