"""A model that is held as it was stored, in 16 bits say, and computed in float32, one block at a time.

So a model can be compressed and measured of which two copies in float32 would not fit into memory. At any moment there
are the stored weights, one block in float32, what a technique needs for that block, and the states of the text.

    model = checkpoint.load(folder, dtype=None).model
    blockwise.compress(model, tokens, lambda block, places: gptq.quantize_model(block, places, bits=4))
    print(blockwise.perplexity(model, text))

A technique sees each block as a model of its own, whose tokens are places in the states that reach the block. What
works through `surgery` and takes blocks in order, each after those before it were changed, does there what it does to
the whole model.
"""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitfm.model import Transformer

Change = Callable[[Transformer, Tensor], object]  # (one block, places [N, T]); changes the block in place


def compress(model: Transformer, tokens: Tensor, change: Change, batch: int = 8) -> None:
    """Let `change` compress one block after another, in place; tokens `[N, T]` are its calibration text.

    Each block is given in float32 and sees what comes through the changed ones before it. Parameters, such as weights
    that stay plain, go back to the model's dtype; buffers, such as codes and scales, stay as the technique made them.
    """
    states, last = embed(model, tokens), model.config.layers - 1
    places = torch.arange(tokens.numel(), device=states.device).view(tokens.shape)
    for layer in range(model.config.layers):
        block = alone(model, layer, states)
        change(block, places)
        model.blocks[layer] = narrowed(block.blocks[0], model.embedding.weight.dtype)
        del block
        give_back()
        if layer < last:
            advance(model, layer, states, batch)


def perplexity(model: Transformer, tokens: Tensor, batch: int = 8) -> float:
    """As `evaluate.perplexity`, with one block at a time in float32."""
    states = embed(model, tokens[:, :-1])
    for layer in range(model.config.layers):
        advance(model, layer, states, batch)
    return math.exp(states_nll(model, states, tokens[:, 1:]))


@torch.no_grad()
def states_nll(model: Transformer, states: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of targets `[N, T]` by the states `[N, T, dim]` that leave the last block.

    One row at a time: with a large vocabulary, its logits take more memory than all else.
    """
    norm, head, total = copy.deepcopy(model.norm).float(), copy.deepcopy(model.head).float(), 0.0
    for row, wanted in zip(states, targets.to(states.device), strict=True):
        total += F.cross_entropy(head(norm(row)), wanted, reduction="none").double().sum().item()
    return total / targets.numel()


@torch.no_grad()
def embed(model: Transformer, tokens: Tensor) -> Tensor:
    """What reaches the first block, float32 `[N, T, dim]`. Raises ValueError unless tokens fit the model's context."""
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.shape[1] > model.config.context:
        raise ValueError(f"tokens must be [N, T], not empty, T <= {model.config.context}, got {tuple(tokens.shape)}")
    return model.embedding(tokens.to(model.embedding.weight.device)).float()


@torch.no_grad()
def advance(model: Transformer, layer: int, states: Tensor, batch: int = 8) -> None:
    """Put in the place of what reaches block `layer`, float32 `[N, T, dim]`, what leaves it."""
    block = alone(model, layer, states)
    places = torch.arange(states[..., 0].numel(), device=states.device).view(states.shape[:2])
    for rows in places.split(batch):
        states.flatten(0, 1)[rows] = block(rows)  # a row of text depends on no other
    del block
    give_back()


def give_back() -> None:
    """Return freed memory to the system where that must be asked for: glibc keeps it, in pieces that seldom fit."""
    with suppress(OSError, TypeError, AttributeError):  # no such library, no such function
        ctypes.CDLL(None).malloc_trim(0)


def alone(model: Transformer, layer: int, states: Tensor) -> Transformer:
    """Block `layer`, copied in float32, as a model of one block.

    Its embedding is states `[N, T, dim]`, which reach the block, row by row: token i of this model stands for the i-th.
    It gives what leaves the block, `[.., dim]`, for it has neither a last norm nor a head.
    """
    states = states.flatten(0, 1)
    block = copy.deepcopy(model.blocks[layer]).float()
    parts: list[tuple[object, object]] = [
        (model.embedding, nn.Embedding.from_pretrained(states)),
        (model.blocks, nn.ModuleList([block])),
        (model.config, replace(model.config, layers=1, vocab_size=len(states), tied_embeddings=False)),
    ]
    parts += [(part, nn.Identity()) for part in (model.norm, model.head)]
    parts += [(table, table) for table in (model.cos, model.sin)]
    return copy.deepcopy(model, {id(old): new for old, new in parts}).eval()


def narrowed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its parameters in `dtype`, in place; buffers stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def bits_per_weight(model: Transformer) -> float:
    """Bits that the blocks hold for a weight of their linear layers: of everything in them but the norms' gains."""
    config, held = model.config, [*model.blocks.named_parameters(), *model.blocks.named_buffers()]
    size = sum(tensor.nbytes for name, tensor in held if "_norm." not in name)
    attention = config.dim * config.head_dim * 2 * (config.heads + config.kv_heads)
    feed_forward = config.dim * config.hidden_dim * (3 if config.activation == "swiglu" else 2)
    return 8 * size / (config.layers * (attention + feed_forward))


def held_bytes(model: Transformer) -> int:
    """Bytes of all that is learned or packed: parameters, tied ones once, and what stands in their place."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.blocks.buffers()])
