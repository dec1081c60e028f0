"""A model for other people's programs: a Hugging Face folder of the Llama family, the inverse of `convert`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from minitfm.checkpoint import replace_file, stored
from minitfm.config import Config
from minitfm.convert import SIZES
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer

RENAMED = (  # by what stands at the beginning, then by what stands within
    ("embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    ("norm.", "model.norm."),
    ("head.", "lm_head."),
)
RENAMED_WITHIN = (
    (".attention_norm.", ".input_layernorm."),
    (".feed_forward_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    (".feed_forward.", ".mlp."),
)


def hugging_face(
    folder: Path | str, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config.json, model.safetensors with weights in `dtype`, and tokenizer.json, each whole or not at all.

    Raises ValueError for what the Llama family does not have: another activation, other modules than the model's own.
    """
    with torch.device("meta"):
        plain = set(stored(Transformer(model.config)))
    if model.config.activation != "swiglu" or set(stored(model)) != plain:
        raise ValueError("only plain models with activation 'swiglu' have a counterpart in the Llama family")
    tensors = {
        their_name(name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in stored(model).items()
    }
    values = their_config(model.config, tokenizer, dtype)
    with ExitStack() as stack:
        files = {name: stack.enter_context(replace_file(Path(folder) / name)) for name in reversed(FILES)}
        files["model.safetensors"].write_bytes(serialize(tensors))
        tokenizer.save(files["tokenizer.json"])
        files["config.json"].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


FILES = ("model.safetensors", "tokenizer.json", "config.json")  # in the order in which they get their names


def their_name(name: str) -> str:
    """Hugging Face's name of a tensor, by ours."""
    for ours, theirs in RENAMED:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in RENAMED_WITHIN:
        name = name.replace(ours, theirs)
    return name


def their_config(config: Config, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json that `convert.hugging_face_config` turns into ours."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.begin,
        "eos_token_id": tokenizer.end,
        "dtype": str(dtype).removeprefix("torch."),
    }
