"""Ways to decode: how the base model is made with each of the attention chapters, and with which cache.

`METHODS` is the one table of them; `chapters.long_context` measures it. A chapter enters by its own `seams` and options
where it has some, and by its cache where that is what it is about. Texts of up to LONGEST tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chapters import contents, runner
from chapters.lab import Lab
from chapters.shared.feature_attention import StateCache
from chapters.shared.paged_cache import PagedCache, Pool
from chapters.shared.quantized_cache import Plan, QuantizedCache
from chapters.shared.span_layers import TrimmedCache
from minitfm.cache import Cache, KVCache
from minitfm.config import Config
from minitfm.model import Attend, Transformer, causal_attention

LONGEST = 4096  # tokens
WINDOW, BIGBIRD, LSH = "--window 128", "--pattern bigbird --block 32", "--rounds 4"  # two of them read 128 keys
SPAN_STEPS, BLOCK = 40, 16  # training steps of the spans; positions of a page

Made = tuple[Transformer, Cache]


@dataclass(frozen=True)
class Method:
    """A way to decode.

    make     (lab, batch, capacity) -> the model with it, for so many positions, and an empty cache of that batch
    trained  "exact": the same numbers as before; "rounded"; "untrained": put into a model that was trained without it,
             whose perplexity says what that breaks, not what the method can do; "trained": for a few steps
    read     (config, length) -> bytes that a step reads; None: what the cache holds, once
    cannot   why it cannot decode step by step; such a method only has a perplexity
    """

    name: str
    chapter: str
    make: Callable[[Lab, int, int], Made]
    trained: str
    read: Callable[[Config, int], int] | None = None
    cannot: str = ""


def chosen(name: str, setting: str) -> tuple[Any, argparse.Namespace]:
    """A chapter's module, and its options of `python -m chapters run`, read from `setting`."""
    entry = contents.find(name)
    return entry.module(), runner.chapter_parser(argparse.ArgumentParser, entry).parse_args(setting.split())


def stretched(lab: Lab, capacity: int, attend: Attend = causal_attention) -> Transformer:
    """The base model with rotary positions for `capacity` tokens."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(Config.from_dict(lab.config.to_dict() | {"context": capacity}), attend)
    model.load_state_dict(lab.weights)
    return model.eval()


def seamed(name: str, setting: str, lab: Lab, batch: int, capacity: int) -> Made:
    """What `run NAME` puts into the model, with the plain cache; no name: nothing."""
    attend = causal_attention
    if name:
        module, args = chosen(name, setting)
        attend = module.seams(args)["attend"]
    model = stretched(lab, capacity, attend)
    return model, KVCache(model.config, batch)


def pooled(share: float, lab: Lab, batch: int, capacity: int) -> Made:
    """One of `share` key heads is left, at least one."""
    heads = contents.find("heads").module()
    model = heads.group_heads(stretched(lab, capacity), max(1, int(lab.config.kv_heads / share)))
    return model, KVCache(model.config, batch)


def rolling(lab: Lab, batch: int, capacity: int) -> Made:
    """A sliding window, whose cache forgets what no later token sees."""
    module, args = chosen("flash_variants", WINDOW)
    inner = module.seams(args)["attend"]

    def attend(q: Tensor, k: Tensor | list[Tensor], v: Tensor | list[Tensor]) -> Tensor:
        return inner(q, *(x if isinstance(x, Tensor) else torch.cat(x, dim=1) for x in (k, v)))

    model = stretched(lab, capacity, attend)
    return model, TrimmedCache(model.config, [[args.window] * model.config.kv_heads] * model.config.layers, batch)


def paged(lab: Lab, batch: int, capacity: int) -> Made:
    """Pages of BLOCK positions, as many as are needed."""
    model = stretched(lab, capacity)
    manager = contents.find("paged").module().BlockManager(batch * -(-capacity // BLOCK), BLOCK)
    return model, PagedCache(Pool(model.config, manager), range(batch))


def quantized(keys: Plan, values: Plan, lab: Lab, batch: int, capacity: int) -> Made:
    """Codes in the place of keys and values."""
    model = stretched(lab, capacity)
    return model, QuantizedCache(model.config, keys, values, batch)


def state(lab: Lab, batch: int, capacity: int) -> Made:
    """Linear attention with elu's features, and its one state."""
    module, args = chosen("linear", "--features elu")
    cache = StateCache(module.seams(args)["attend"])
    return stretched(lab, capacity, cache.attend), cache


def spans(lab: Lab, batch: int, capacity: int) -> Made:
    """Spans, and the weights with them, trained for SPAN_STEPS at the model's own length; the model is kept."""
    module = contents.find("adaptive_span").module()

    def train() -> tuple[Transformer, list]:
        model = stretched(lab, max(capacity, LONGEST))
        return model, module.learn_spans(model, lab.train_stream, SPAN_STEPS, module.PENALTY, lab.config.context)

    model, layers = lab.once(("long context: spans", SPAN_STEPS), train)
    return model.eval(), module.trimmed_cache(model, layers, batch)


def bigbird_read(config: Config, length: int) -> int:
    """Keys and values of the blocks in which the newest token sees something; the cache keeps all blocks."""
    module, args = chosen("patterns", BIGBIRD)
    pattern = module.methods(LONGEST, args.window, args.block, args.seed)[args.pattern]
    mask = module.block_mask(pattern, 1, length, args.block, args.block)
    live = (mask.partial | mask.full)[0, 0].nonzero()[0]
    keys = sum(min(args.block, length - args.block * int(block)) for block in live)  # the last one may not be full
    return contents.find("heads").module().cache_bytes(config.layers, config.kv_heads, config.head_dim, keys)


def lsh_read(config: Config, length: int) -> int:
    """All keys to hash them, then in each round all as queries and every key and value with two chunks.

    A decode that kept buckets would read 2 · chunk keys a round. The chapter's hashes and sorts anew for each token.
    """
    rounds = chosen("lsh", LSH)[1].rounds
    once = contents.find("heads").module().cache_bytes(config.layers, config.heads, config.head_dim, length) // 2
    return once * (1 + 5 * rounds)


KIVI = [Plan(per, 2, 32, 32, "kivi") for per in ("channel", "token")]
FLEXGEN = [Plan(group_size=32)] * 2
SLOTS = "each new token changes every slot; perplexity is that of its blockwise causal form, which reads all keys anew"
METHODS = (
    Method("plain model", "", partial(seamed, "", ""), "exact"),
    Method("FlashAttention", "flash", partial(seamed, "flash", ""), "exact"),
    Method("Flash-Decoding in 4 runs", "flash_decoding", partial(seamed, "flash_decoding", "--splits 4"), "exact"),
    Method("PagedAttention", "paged", paged, "exact"),
    Method("4-bit cache (FlexGen)", "kv_cache", partial(quantized, *FLEXGEN), "rounded"),
    Method("2-bit cache (KIVI)", "kv_cache", partial(quantized, *KIVI), "rounded"),
    Method("GQA with half the key heads", "heads", partial(pooled, 2), "untrained"),
    Method("MQA with one key head", "heads", partial(pooled, math.inf), "untrained"),
    Method("sliding window of 128", "flash_variants", rolling, "untrained"),
    Method("BigBird in blocks of 32", "patterns", partial(seamed, "patterns", BIGBIRD), "untrained", bigbird_read),
    Method("adaptive spans", "adaptive_span", spans, "trained"),
    Method("linear attention with elu", "linear", state, "untrained"),
    Method("LSH in 4 rounds", "lsh", partial(seamed, "lsh", LSH), "untrained", lsh_read),
    Method("Linformer", "linformer", partial(seamed, "linformer", ""), "untrained", None, SLOTS),
)
