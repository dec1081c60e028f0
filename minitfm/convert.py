"""Other people's checkpoints: Hugging Face folders of the Llama family, and llama2.c's .bin files.

Both become a `Source`: our config, tensors under our names, a tokenizer. What our model cannot represent is refused
by name: a model loaded without its biases or its window would still talk, only wrongly.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import decoders, models, normalizers
from torch import Tensor

from minitfm.config import Config, RopeScaling
from minitfm.tokenizer import Tokenizer

MODEL_TYPES = ("llama", "mistral")
SIZES = {  # ours: Hugging Face's
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
RENAMED = (
    (r"^model\.embed_tokens\.", "embedding."),
    (r"^model\.layers\.", "blocks."),
    (r"^model\.norm\.", "norm."),
    (r"^lm_head\.", "head."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".feed_forward_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.mlp\.", ".feed_forward."),
)
LLAMA2C_HEADER = struct.Struct("<7i")
LLAMA2C_MAGIC = 0x616B3432  # "ak42" opens llama2.c's newer formats


class Source(NamedTuple):
    """A checkpoint that was read, not yet checked against a model."""

    config: Config
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    info: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError if the file holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return values


class Tensors(Mapping[str, Tensor]):
    """Tensors that lie in files and are read one at a time, each time anew: none is held here."""

    def __init__(self, places: dict[str, tuple[Path, str]]) -> None:
        """places: for each name the file, and the tensor's name in it."""
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        path, theirs = self.places[name]
        with safe_open(path, framework="pt") as file:  # the file's pages stay in memory for as long as it is open
            return file.get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a file, read when they are asked for. ValueError if it is missing, truncated or something else."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing: put the weights there")
    try:
        with safe_open(path, framework="pt") as file:
            return Tensors({name: (path, name) for name in file.keys()})
    except SafetensorError as error:
        raise ValueError(f"{path.name} is truncated or not a safetensors file: {error}") from None


def read_tokenizer(path: Path, begin: int | None, end: int | None) -> Tokenizer:
    """A tokenizer.json with the ids that open and close a document. ValueError if it is missing or something else."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing: put the model's tokenizer there")
    return Tokenizer.load(path, begin, end)


def read_hugging_face(folder: Path, values: dict[str, Any]) -> Source:
    """A folder with config.json (given as `values`), model.safetensors or its shards, and tokenizer.json."""
    config = hugging_face_config(values)
    places = {}
    for name, place in hugging_face_tensors(folder).places.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        if not name.endswith("rotary_emb.inv_freq"):  # a table that old exports stored and every model recomputes
            places[name] = place
    if config.tied_embeddings:
        places.pop("head.weight", None)
    end = first(values.get("eos_token_id"))
    begin = first(values.get("bos_token_id"))
    tokenizer = read_tokenizer(folder / "tokenizer.json", begin, end)
    return Source(config, Tensors(places), tokenizer, {"source": f"Hugging Face, {values['model_type']}"})


def first(ids: int | list[int] | None) -> int | None:
    """Of several token ids the first, which is the one that ends a document."""
    return (ids[0] if ids else None) if isinstance(ids, list) else ids


def hugging_face_tensors(folder: Path) -> Tensors:
    """Tensors under their own names, from one file or from all shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
        raise ValueError(f"{index.name} has no weight_map of file names in this folder")
    places = {}
    for shard in sorted(set(shards.values())):
        places |= read_safetensors(folder / shard).places
    if missing := sorted(set(shards) - set(places)):
        raise ValueError(f"{index.name} names {missing[0]}, which {shards[missing[0]]} does not hold")
    return Tensors(places)


def hugging_face_config(values: dict[str, Any]) -> Config:
    """Our config from Hugging Face's. ValueError names what the file lacks or our model cannot represent."""
    refuse_unsupported(values)
    if lacking := [theirs for theirs in SIZES.values() if theirs not in values]:
        raise ValueError(f"config.json lacks {', '.join(lacking)}")
    rope = rope_values(values)
    return Config(
        **{ours: values[theirs] for ours, theirs in SIZES.items()},
        kv_heads=values.get("num_key_value_heads") or 0,
        head_dim=values.get("head_dim") or 0,
        context=values.get("max_position_embeddings", 2048),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
        rope_scaling=rope_scaling(rope),
    )


def refuse_unsupported(values: dict[str, Any]) -> None:
    """ValueError for whatever would change the function and has no counterpart here."""
    if values.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"model_type {values.get('model_type')!r} is not supported, only {' and '.join(MODEL_TYPES)}")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if values.get(name):
            raise ValueError(f"{name} is set: this model has no place for it")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported, only 'silu'")
    window, context = values.get("sliding_window"), values.get("max_position_embeddings", 2048)
    if window is not None and window < context:
        raise ValueError(f"sliding_window {window} is shorter than the context of {context}: not supported")
    if (values.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"partial_rotary_factor {values['partial_rotary_factor']} is not supported, only 1")


def rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json says on rotary positions: `rope_parameters`, called `rope_scaling` before transformers 5."""
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    """None for plain rotary positions, Llama 3's stretching, ValueError for any other kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if lacking := [name for name in names if name not in rope]:
        raise ValueError(f"config.json lacks {', '.join(lacking)} for rope_type 'llama3'")
    return RopeScaling(*(rope[name] for name in names))


def read_llama2c(path: Path) -> Source:
    """A llama2.c .bin (legacy format: 7 int32, then float32 tensors) with its tokenizer's tok*.bin beside it."""
    content = path.read_bytes()
    config = llama2c_config(content)
    shapes = llama2c_shapes(config)
    numbers = sum(int(np.prod(shape)) for _, shape in shapes)
    if len(content) != LLAMA2C_HEADER.size + 4 * numbers:
        needed = LLAMA2C_HEADER.size + 4 * numbers
        raise ValueError(f"truncated or not a llama2.c file: {len(content)} bytes, its header asks for {needed}")
    weights = torch.from_numpy(np.frombuffer(content, "<f4", offset=LLAMA2C_HEADER.size).copy())
    tensors: dict[str, Tensor] = {}
    for (name, shape), block in zip(shapes, weights.split([int(np.prod(shape)) for _, shape in shapes]), strict=True):
        if "{}" in name:
            tensors |= {name.format(i): tensor for i, tensor in enumerate(block.view(shape))}
        elif name:
            tensors[name] = block.view(shape)
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = half_split(tensors[name], config.head_dim)
    return Source(config, tensors, read_llama2c_tokenizer(path, config.vocab_size), {"source": "llama2.c"})


def llama2c_config(content: bytes) -> Config:
    """Sizes from the header; a negative vocabulary says that the head is not the embedding."""
    if len(content) < LLAMA2C_HEADER.size:
        raise ValueError(f"truncated or not a llama2.c file: {len(content)} bytes")
    dim, hidden_dim, layers, heads, kv_heads, vocabulary, context = LLAMA2C_HEADER.unpack_from(content)
    if dim == LLAMA2C_MAGIC:
        raise ValueError("a newer llama2.c format: export it again as version 0")
    if min(dim, hidden_dim, layers, heads, kv_heads, abs(vocabulary), context) < 1 or dim % heads:
        raise ValueError("not a llama2.c file: its first seven integers are no model's sizes")
    return Config(
        vocab_size=abs(vocabulary),
        dim=dim,
        hidden_dim=hidden_dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        context=context,
        tied_embeddings=vocabulary > 0,
    )


def llama2c_shapes(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(our name, shape) of the tensors in the file's order; "{}" stands for a layer, "" is not needed."""
    layers, dim, hidden = config.layers, config.dim, config.hidden_dim
    kv_dim = config.kv_heads * config.head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embedding.weight", (config.vocab_size, dim)),
        ("blocks.{}.attention_norm.weight", (layers, dim)),
        ("blocks.{}.attention.q_proj.weight", (layers, dim, dim)),
        ("blocks.{}.attention.k_proj.weight", (layers, kv_dim, dim)),
        ("blocks.{}.attention.v_proj.weight", (layers, kv_dim, dim)),
        ("blocks.{}.attention.o_proj.weight", (layers, dim, dim)),
        ("blocks.{}.feed_forward_norm.weight", (layers, dim)),
        ("blocks.{}.feed_forward.gate_proj.weight", (layers, hidden, dim)),
        ("blocks.{}.feed_forward.down_proj.weight", (layers, dim, hidden)),
        ("blocks.{}.feed_forward.up_proj.weight", (layers, hidden, dim)),
        ("norm.weight", (dim,)),
        ("", (2, config.context, config.head_dim // 2)),  # tables of cosines and sines
    ]
    return shapes if config.tied_embeddings else [*shapes, ("head.weight", (config.vocab_size, dim))]


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's output rows `[H*D, C]` from rotary pairs (2i, 2i+1) to pairs (i, i + D/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_llama2c_tokenizer(model: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a .bin: tok<vocabulary>.bin, or else tokenizer.bin."""
    names = (f"tok{vocab_size}.bin", "tokenizer.bin")
    found = [model.with_name(name) for name in names if model.with_name(name).exists()]
    if not found:
        raise ValueError(f"its tokenizer is missing: put {' or '.join(names)} beside it")
    pieces = llama2c_pieces(found[0], vocab_size)
    names_of = {1: "<s>", 2: "</s>"}  # llama2.c writes them between newlines
    ids = {names_of.get(i, piece): i for i, (piece, _) in enumerate(pieces)}
    if len(ids) != vocab_size:
        raise ValueError(f"{found[0].name} holds the same piece twice")
    inner = tokenizers.Tokenizer(models.BPE(ids, merges(pieces), unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Prepend(" ")  # SentencePiece's space before the first word
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner, begin=1, end=1)  # its training data has <s> between documents and no </s>


def llama2c_pieces(path: Path, count: int) -> list[tuple[str, float]]:
    """(piece, score) in the order of their ids: int32 longest piece, then per piece a float32 score, its length, it."""
    content = path.read_bytes()
    pieces, at = [], 4
    try:
        for _ in range(count):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            pieces.append((content[at - length : at].decode(), score))
    except (struct.error, UnicodeDecodeError):
        at = -1
    if at != len(content):
        raise ValueError(f"{path.name} is not a llama2.c tokenizer of {count} pieces, or is truncated")
    return pieces


def merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges that lead to each piece, best score first: SentencePiece keeps scores where BPE keeps this list."""
    known = {piece for piece, _ in pieces}
    ranked = sorted(pieces[3:], key=lambda entry: -entry[1])  # the first three are <unk>, <s> and </s>
    splits = ((piece[:i], piece[i:]) for piece, _ in ranked for i in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in known and right in known]
