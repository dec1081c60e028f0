"""One block at a time: the numbers of the whole model, the dtypes that were stored, and the memory of little more."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

from chapters.pruning import wanda
from chapters.quantization import gptq, smoothquant, weight_only
from chapters.shared.memory import resident_growth
from minitfm import blockwise, checkpoint, evaluate, export
from minitfm.config import Config
from minitfm.model import Transformer
from tests.minitfm.models import tiny_model, tokens

KINDS = [{}, {"tied_embeddings": False, "activation": "relu"}, {"kv_heads": 1, "head_dim": 6, "layers": 3}]
HALF = partial(wanda.find_mask, sparsity=0.5)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_perplexity_is_that_of_the_whole_model(changes, batch):
    model, text = tiny_model(**changes), tokens(5, 13)
    before = copy.deepcopy(model.state_dict())
    assert blockwise.perplexity(model, text, batch) == pytest.approx(evaluate.perplexity(model, text), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


CHANGES = {
    "gptq": lambda model, text: gptq.quantize_model(model, text, 3),
    "wanda": lambda model, text: wanda.prune_model(model, text, HALF),
    "smooth": lambda model, text: smoothquant.smooth_model(model, text),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("changes", KINDS)
def test_a_technique_does_to_each_block_what_it_does_to_the_whole_model(name, changes):
    whole, parts, text = tiny_model(**changes), tiny_model(**changes), tokens(5, 13)
    CHANGES[name](whole, text)
    blockwise.compress(parts, text, CHANGES[name], batch=2)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weights_return_to_the_models_dtype_and_what_a_technique_made_stays():
    model = tiny_model(dim=32, hidden_dim=64).bfloat16()
    held = blockwise.held_bytes(model)

    def change(block: Transformer, places: torch.Tensor) -> None:
        assert all(parameter.dtype == torch.float32 for parameter in block.blocks.parameters())
        weight_only.use_packed(block, gptq.quantize_model(block, places, 4, group_size=32), torch.float16)

    assert blockwise.bits_per_weight(model) == 16
    blockwise.compress(model, tokens(3, 8), change)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.blocks.buffers()} == {torch.int32, torch.float16, torch.uint8}
    assert blockwise.bits_per_weight(model) == 4 + (16 + 8) / 32
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert held - blockwise.held_bytes(model) == weights * (16 - 4.75) / 8
    assert blockwise.perplexity(model, tokens(3, 8)) < 1e6


def test_the_states_that_a_block_is_given_are_those_of_the_whole_model():
    model, text, seen = tiny_model(), tokens(4, 9), []
    blockwise.compress(model, text, lambda block, places: seen.append(block.embedding(places).clone()), batch=3)
    assert torch.equal(seen[0], model.embedding(text))
    wanted = model.blocks[0](seen[0], model.cos[:9], model.sin[:9], None)
    torch.testing.assert_close(seen[1], wanted)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 33)])
def test_text_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="T <= 32"):
        blockwise.compress(tiny_model(), torch.zeros(shape, dtype=torch.int64), lambda *_: None)


IMPORTS = """
import torch
from functools import partial
from chapters.pruning import wanda
from chapters.quantization import gptq, smoothquant
from minitfm import blockwise, checkpoint
"""
STEPS = {
    "gptq": "gptq.quantize_model(block, places, 4)",
    "smoothquant": "(smoothquant.smooth_model(block, places), smoothquant.quantize_model(block, places))",
    "2:4": "wanda.prune_model(block, places, partial(wanda.find_mask, sparsity=0.5, pattern=(2, 4)))",
}
SIZES = Config(49152, dim=576, hidden_dim=1536, layers=30, heads=9, kv_heads=3)  # SmolLM-135M


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder of 269 MB in bfloat16, as others write it."""
    folder = tmp_path_factory.mktemp("large")
    export.hugging_face(folder, Transformer(SIZES), checkpoint.base().tokenizer)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_loading_and_compressing_takes_less_than_two_and_a_half_times_the_checkpoint(large, name):
    code = f"""
model, tokens = checkpoint.load({str(large)!r}, dtype=None).model, torch.arange(1024).view(8, 128)
blockwise.compress(model, tokens, lambda block, places: {STEPS[name]})
assert blockwise.perplexity(model, tokens) > 1
"""
    growth = resident_growth(IMPORTS, code)
    if growth is None:
        pytest.skip("this system does not tell how much memory a program has")
    assert growth < 2.5 * (large / "model.safetensors").stat().st_size
