"""Hugging Face folders: the logits of transformers, and refusals by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from minitfm import checkpoint
from minitfm.checkpoint import CheckpointError
from tests.conftest import tolerance
from tests.minitfm.models import TEXT, tiny_tokenizer, tokens

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 7,
    "eos_token_id": [9, 11],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TINY_TOKENIZER = tiny_tokenizer()


def hugging_face(folder, kind="Llama", shard="1GB", **changes):
    """Save a random model of transformers', gains and biases drawn too, with a tokenizer."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + noise / 4 if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    TINY_TOKENIZER.save(folder / "tokenizer.json")
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
        ("Llama", {"num_key_value_heads": 4, "head_dim": 6, "rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "shard": "20KB"}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 64, "tie_word_embeddings": True}),
    ],
)
def test_logits_equal_transformers(tmp_path, kind, changes):
    theirs = hugging_face(tmp_path, kind, **changes)
    loaded = checkpoint.load(tmp_path)
    sequences = tokens(2, 40, vocabulary=300)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(sequences), theirs(sequences).logits, **tolerance(torch.float32))
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)
    assert (loaded.tokenizer.begin, loaded.tokenizer.end) == (7, 9)
    assert loaded.tokenizer.encode(TEXT) == TINY_TOKENIZER.encode(TEXT)


def test_a_foreign_model_keeps_its_function_and_its_ids_in_our_format(tmp_path):
    hugging_face(tmp_path / "theirs", rope_parameters=LLAMA3)
    foreign = checkpoint.load(tmp_path / "theirs")
    checkpoint.save(tmp_path / "ours", foreign.model, foreign.tokenizer)
    ours = checkpoint.load(tmp_path / "ours")
    sequences = tokens(1, 30, vocabulary=300)
    assert torch.equal(ours.model(sequences), foreign.model(sequences))
    assert (ours.tokenizer.begin, ours.tokenizer.end) == (7, 9)


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_configs_from_before_transformers_5_are_read(tmp_path, name):
    hugging_face(tmp_path, rope_parameters=LLAMA3)
    expected = checkpoint.load(tmp_path).model.config
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    edit_config(tmp_path, rope_parameters="absent", rope_theta=1000.0, rope_scaling={name: "llama3", **scaling})
    assert checkpoint.load(tmp_path).model.config == expected
    edit_config(tmp_path, rope_scaling=None, rope_theta="absent")
    plain = checkpoint.load(tmp_path).model.config
    assert plain.rope_scaling is None and plain.rope_theta == 10000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported, only llama and mistral"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"sliding_window": 32}, "sliding_window 32 is shorter than the context of 64"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor, high_freq_factor, original_max"),
        ({"hidden_size": "absent"}, "config.json lacks hidden_size"),
        ({"num_hidden_layers": 3}, "9 tensors are missing, blocks.2."),
        ({"vocab_size": 200}, "the tokenizer has 280 tokens, the model only 200"),
        ({"bos_token_id": 280}, "begin=280 is not an id of a vocabulary of 280"),
    ],
)
def test_what_the_model_cannot_represent_is_refused_by_name(tmp_path, changes, words):
    hugging_face(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_biases_in_the_file_are_refused_even_if_the_config_hides_them(tmp_path):
    hugging_face(tmp_path, attention_bias=True)
    edit_config(tmp_path, attention_bias=False)
    with pytest.raises(
        CheckpointError, match=r"8 tensors are unknown to the model, blocks\.0\.attention\.k_proj\.bias"
    ):
        checkpoint.load(tmp_path)


def test_damaged_shards_are_named(tmp_path):
    hugging_face(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(shards.items()))
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{shard} is missing: put the weights there"):
        checkpoint.load(tmp_path)
    other = next(path for path in shards.values() if path != shard)
    (tmp_path / shard).write_bytes((tmp_path / other).read_bytes())
    with pytest.raises(CheckpointError, match=f"names {name}, which {shard} does not hold"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: f"../{tmp_path.name}/elsewhere"}}))
    with pytest.raises(CheckpointError, match="has no weight_map of file names in this folder"):
        checkpoint.load(tmp_path)
