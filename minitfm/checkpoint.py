"""Checkpoints: saved whole or not at all, and checked completely before anybody gets a model.

A checkpoint is a folder: config.json (the model's sizes, the ids that begin and end a document), model.safetensors
(float32 or as trained), tokenizer.json, and training.json (how it came about).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from minitfm import convert
from minitfm.config import Config
from minitfm.convert import Source
from minitfm.model import Attend, MakeFeedForward, Transformer, causal_attention, dense_feed_forward
from minitfm.tokenizer import Tokenizer

FORMAT = "minitfm"
BASE = Path(__file__).parent / "base"
Prepare = Callable[[Transformer, dict[str, Tensor]], None]
LAYOUT = (
    "give a folder with config.json, model.safetensors and tokenizer.json (ours or Hugging Face's), "
    "or a llama2.c .bin file with its tok*.bin beside it"
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that says why and what to do."""


class Checkpoint(NamedTuple):
    """A model ready for evaluation, its tokenizer, and what training.json says about it."""

    model: Transformer
    tokenizer: Tokenizer
    info: dict[str, Any]


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the name `path` only after all is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two programs may write the same file
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(folder: Path | str, model: Transformer, tokenizer: Tokenizer, extra: dict[str, Any] | None = None) -> None:
    """Write a checkpoint folder; `extra` becomes training.json.

    Every file is written completely under a temporary name before the first one is renamed, so a failure while writing
    leaves what was there; config.json, without which there is no checkpoint, is renamed last.
    Raises CheckpointError if the folder cannot be written.
    """
    folder = Path(folder)
    config = {"format": FORMAT, **model.config.to_dict(), "begin": tokenizer.begin, "end": tokenizer.end}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored(model).items()}
    try:
        with ExitStack() as stack:

            def open_file(name: str) -> Path:  # the stack renames in reverse order
                return stack.enter_context(replace_file(folder / name))

            open_file("config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            tokenizer.save(open_file("tokenizer.json"))
            open_file("training.json").write_text(json.dumps(extra or {}, indent=1) + "\n", encoding="utf-8")
            open_file("model.safetensors").write_bytes(serialize(tensors))
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error.strerror or error}") from error


def stored(model: Transformer) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; a tied head is the embedding and is not stored twice."""
    tensors = dict(model.state_dict())
    if model.config.tied_embeddings:
        tensors.pop("head.weight", None)
    return tensors


def base(attend: Attend = causal_attention, feed_forward: MakeFeedForward = dense_feed_forward) -> Checkpoint:
    """The checkpoint that the book ships: trained by `python -m minitfm train`, as its training.json records."""
    return load(BASE, attend, feed_forward)


def load(
    path: Path | str,
    attend: Attend = causal_attention,
    feed_forward: MakeFeedForward = dense_feed_forward,
    prepare: Prepare | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Checkpoint:
    """Read our folder, a Hugging Face Llama-family folder, or a llama2.c .bin file; evaluation mode.

    The model's numbers are of `dtype`, None: of the embedding's as stored. Tensors are read one at a time, so that no
    more than the model and one of them is in memory.

    A model that was saved with other modules in it, such as layers that hold packed weights, needs them again:
    `prepare(model, tensors)` puts them in place before the tensors are checked and filled in, and raises ValueError
    where these make no such modules.
    Raises CheckpointError, one line, for anything missing, truncated, foreign, of a wrong shape or not finite.
    """
    try:
        source = read(Path(path))
        if source.tokenizer.vocab_size > source.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {source.tokenizer.vocab_size} tokens, the model only {source.config.vocab_size}"
            )
        with default_dtype(dtype or stored_dtype(source.tensors)):
            model = Transformer(source.config, attend, feed_forward)
        if prepare is not None:
            prepare(model, dict(source.tensors))
        fill(model, source.tensors)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:  # TypeError: config.json holds text where a number belongs
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
    return Checkpoint(model.eval(), source.tokenizer, source.info)


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type of the embedding; `fill` says what is wrong where there is none."""
    kind = tensors["embedding.weight"].dtype if "embedding.weight" in tensors else torch.float32
    return kind if kind.is_floating_point else torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, modules are made with parameters of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read(path: Path) -> Source:
    """What `path` holds, by the format that it is in."""
    if path.is_file() and path.suffix == ".bin":
        return convert.read_llama2c(path)
    if not path.is_dir():
        raise ValueError(f"no such checkpoint: {LAYOUT}")
    if not (path / "config.json").exists():
        raise ValueError(f"there is no config.json in this folder: {LAYOUT}")
    values = convert.read_json(path / "config.json")
    return read_ours(path, values) if values.get("format") == FORMAT else convert.read_hugging_face(path, values)


def read_ours(folder: Path, values: dict[str, Any]) -> Source:
    """A folder that `save` wrote."""
    sizes = {key: value for key, value in values.items() if key not in ("format", "begin", "end")}
    info = folder / "training.json"
    return Source(
        Config.from_dict(sizes),
        convert.read_safetensors(folder / "model.safetensors"),
        convert.read_tokenizer(folder / "tokenizer.json", values.get("begin"), values.get("end")),
        convert.read_json(info) if info.exists() else {},
    )


@torch.no_grad()
def fill(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model, each after it was checked.

    ValueError for names, shapes, dtypes or values that cannot be right; then the model may be filled in part.
    """
    wanted = stored(model)
    check_names(set(wanted), set(tensors))
    for name, tensor in tensors.items():
        place, kind = wanted[name], wanted[name].dtype
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, config.json asks for {list(place.shape)}")
        if kind.is_floating_point != tensor.is_floating_point() or not (kind.is_floating_point or tensor.dtype == kind):
            allowed = "floating-point numbers" if kind.is_floating_point else kind
            raise ValueError(f"{name} holds {tensor.dtype}, not {allowed}")
        if not finite(tensor):
            raise ValueError(f"{name} holds values that are not finite")
        place.copy_(tensor)


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; a mask of them would take as much memory as the tensor."""
    ends = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
    return all(bool(end.isfinite()) for end in ends)  # NaN is both


def check_names(wanted: set[str], given: set[str]) -> None:
    """ValueError unless a checkpoint gives the tensors that the model wants, and no others."""
    missing, foreign = sorted(wanted - given), sorted(given - wanted)
    lack = f"{len(missing)} tensors are missing, {missing[0]} first" if missing else ""
    surplus = f"{len(foreign)} tensors are unknown to the model, {foreign[0]} first" if foreign else ""
    if lack and surplus:
        raise ValueError(
            f"{lack}; {surplus}: if other modules were in the model when it was saved, load it by the chapter that put "
            "them there, which training.json names"
        )
    if lack or surplus:
        raise ValueError(lack or surplus)
