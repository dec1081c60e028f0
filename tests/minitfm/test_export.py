"""Exported folders: transformers computes our logits from them, and we read back what was written."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from minitfm import checkpoint, export, surgery
from minitfm.config import RopeScaling
from tests.conftest import tolerance
from tests.minitfm.models import TEXT, tiny_model, tiny_tokenizer, tokens

TOKENIZER = tiny_tokenizer()
KINDS = [
    {},
    {"tied_embeddings": False, "norm_eps": 1e-3, "rope_theta": 500.0},
    {"kv_heads": 1, "head_dim": 6, "rope_scaling": RopeScaling(factor=4.0, original_context=8)},
]


@pytest.mark.parametrize("changes", KINDS)
def test_transformers_computes_the_same_logits(tmp_path, changes):
    model = tiny_model(vocab_size=TOKENIZER.vocab_size, **changes)
    export.hugging_face(tmp_path, model, TOKENIZER, torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = theirs(tokens(2, 20)).logits
        torch.testing.assert_close(logits, model(tokens(2, 20)), **tolerance(torch.float32))


@pytest.mark.parametrize("changes", KINDS)
def test_what_was_written_is_what_is_read(tmp_path, changes):
    model = tiny_model(vocab_size=TOKENIZER.vocab_size, **changes)
    export.hugging_face(tmp_path / "deep" / "folder", model, TOKENIZER)
    loaded = checkpoint.load(tmp_path / "deep" / "folder")
    assert loaded.model.config == model.config
    for read, written in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(read, written.bfloat16().float())
    assert loaded.tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert (loaded.tokenizer.begin, loaded.tokenizer.end) == (TOKENIZER.begin, TOKENIZER.end)


def test_what_others_do_not_have_is_refused_before_anything_is_written(tmp_path):
    relu, changed = tiny_model(activation="relu"), tiny_model()
    surgery.replace(changed, "blocks.0.feed_forward.up_proj", nn.Linear(16, 24, bias=True))
    for model in (relu, changed):
        with pytest.raises(ValueError, match="plain models with activation 'swiglu'"):
            export.hugging_face(tmp_path, model, TOKENIZER)
    assert list(tmp_path.iterdir()) == []
