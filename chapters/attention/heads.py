"""MHA, GQA and MQA: let several query heads read one head of keys and values, so that the cache shrinks.

    out[h] = softmax(q[h] k[g]ᵀ / √D) v[g],    g = h // (H / Hkv)

Hkv = H is multi-head attention (MHA), Hkv = 1 multi-query (MQA), what lies between grouped-query (GQA): one function.
A decoding step reads all weights once for the whole batch, but each sequence has a cache of its own, and it grows:

    cache = 2 · layers · Hkv · D · S numbers for each sequence,    per token  weights / batch + cache

A trained MHA model is converted: each new key or value projection is the mean of those that it replaces. A short
training, 5% of the first one in the paper, then teaches the query heads what they read: uptraining.

Saves    bytes: cache and its traffic shrink to Hkv / H exactly; the key and value projections, too. Operations of the
         attention itself stay: each query head still meets each key.
Costs    some quality, the more the smaller Hkv; the uptraining.
Paper    Shazeer: Fast Transformer Decoding: One Write-Head is All You Need, 2019, arXiv:1911.02150, sections 2.4 and 3.
         Ainslie et al.: GQA, 2023, arXiv:2305.13245, sections 2.1 and 2.2. Positions: Su et al. 2021, arXiv:2104.09864.
Follows  Llama: neighbouring query heads share (repeat_interleave, not tile), and keys are cached after their rotation.
         Rotated pairs are (i, i + D/2), "half", as in Llama's Hugging Face code and GPT-NeoX, or (2i, 2i + 1),
         "interleaved", as in the original Llama, llama2.c and GPT-J. A permutation of channels makes one the other.
Symbols  B sequences; H query heads; Hkv key/value heads; D head size; T new positions; S all positions. q, out
         `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; qkv `[B T, (H + 2 Hkv) D]`, the fused projection of all new tokens.
Kernel   kernels/attention/heads.py
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from minitfm import model as plain
from minitfm import surgery, train
from minitfm.cache import KVCache
from minitfm.model import Transformer

LAYOUTS = ("half", "interleaved")


def heads_per_group(heads: int, kv_heads: int) -> int:
    """How many of `heads` share one of `kv_heads`. ValueError unless both are positive and the second divides."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must be positive and divide the {heads} heads, got {kv_heads}")
    return heads // kv_heads


def grouped_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None
) -> np.ndarray:
    """softmax(scale q kᵀ) v `[B, H, T, D]`, where query head h reads key/value head h // (H / Hkv).

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; Hkv = H is MHA, 1 is MQA. causal: query i sees the keys j <= i + S − T, as
    T new tokens after S − T cached ones do. scale: 1 / √D if None. Finite however large the scores of each row; float32
    stays float32, arguments stay as they are. Raises ValueError for an Hkv that does not divide H, for shapes that do
    not fit, no key, and S < T where causal. Source: Shazeer 2019, section 2.4; Ainslie et al. 2023, section 2.2.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"need q [B, H, T, D], k and v [B, Hkv, S, D]; got {q.shape}, {k.shape} and {v.shape}")
    (B, H, T, D), (_, kv_heads, S, _) = q.shape, k.shape
    if S < (T if causal else 1):
        raise ValueError(f"k must have at least {T if causal else 1} positions, got {S}")
    queries = q.reshape(B, kv_heads, heads_per_group(H, kv_heads), T, D)
    scores = (1 / math.sqrt(D) if scale is None else scale) * (queries @ k[:, :, None].swapaxes(-1, -2))
    if causal:
        scores = np.where(np.arange(S) <= np.arange(T)[:, None] + S - T, scores, -np.inf)  # [B, Hkv, G, T, S]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v[:, :, None]).reshape(q.shape)


def cache_bytes(layers: int, kv_heads: int, head_dim: int, length: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of the keys and values of `batch` sequences of `length` tokens; `itemsize` bytes a number."""
    return 2 * layers * batch * kv_heads * head_dim * length * itemsize


def decode_bytes(
    parameters: int, layers: int, kv_heads: int, head_dim: int, length: int, batch: int = 1, itemsize: int = 2
) -> float:
    """Bytes that pass through memory for each token, where `batch` sequences are decoded together.

    Weights are read once for all, the `length` positions of a cache once for their own sequence (the newest is
    written). Activations are left out, they are small. Source: Shazeer 2019, sections 2.4 and 3.
    """
    return parameters * itemsize / batch + cache_bytes(layers, kv_heads, head_dim, length, 1, itemsize)


def rotary_tables(length: int, head_dim: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of position · theta^(−2i / D), float64 `[length, D / 2]`. ValueError for an odd head_dim."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, head_dim, 2) / head_dim))
    return np.cos(angles), np.sin(angles)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str = "half") -> np.ndarray:
    """Turn each pair (a, b) of channels of x by its angle: (a cos − b sin, b cos + a sin), put back where it was.

    x `[..., D]`; cos, sin `[..., D / 2]`, whose pair i belongs to the channels (i, i + D/2) for the layout "half" and
    (2i, 2i + 1) for "interleaved"; their leading axes broadcast against those of x. A new array, of the products'
    dtype; x stays as it is. Raises ValueError for another layout, an odd D, and tables whose last axis is not D / 2.
    Source: RoFormer, 3.4.2.
    """
    half = x.shape[-1] // 2
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if x.shape[-1] % 2 or cos.shape[-1] != half or sin.shape[-1] != half:
        raise ValueError(f"need x [..., D], cos and sin [..., D/2]; got {x.shape}, {cos.shape} and {sin.shape}")
    first, second = (slice(half), slice(half, None)) if layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out = np.empty(x.shape, np.result_type(x, cos, sin))
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def half_split_order(head_dim: int) -> np.ndarray:
    """The channels [0, 2, 4, .., 1, 3, 5, ..]: rotate(x[..., order], "half") is rotate(x, "interleaved")[..., order].

    Scores do not change where q and k are both reordered, so ordering the rows of both projections, head by head,
    converts an interleaved checkpoint to half-split code. That is what Llama's converter does.
    """
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def pool_heads(weight: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Merge the heads of a key or value projection: weight `[heads D, C]` -> `[kv_heads D, C]`, same dtype.

    New head g is the mean of the heads g n .. (g + 1) n − 1, n = heads / kv_heads: those that its query heads read.
    Channel d of a head is averaged with channel d of the others only, in float64. Raises ValueError for a kv_heads that
    does not divide heads, heads that do not divide the rows, and weights that are not a finite matrix.
    Source: Ainslie et al. 2023, section 2.1.
    """
    group = heads_per_group(heads, kv_heads)
    kind = "finite" if np.isfinite(weight).all() else "not finite"
    if weight.ndim != 2 or weight.shape[0] % heads or kind != "finite":
        raise ValueError(f"weight must be finite, [{heads} · D, C]; got {weight.shape}, {kind}")
    parts = weight.reshape(kv_heads, group, -1)  # [kv_heads, group, D C]
    return parts.mean(axis=1, dtype=np.float64).reshape(-1, weight.shape[1]).astype(weight.dtype)


def append_shape(qkv, k_cache, v_cache, positions, cos, sin) -> tuple[int, int, int, int, int]:
    """(B, H, Hkv, T, D) of what `rope_append` is given, arrays or tensors. Raises ValueError as it says."""
    fit = qkv.ndim == cos.ndim == 2 and k_cache.ndim == 4 and k_cache.shape == v_cache.shape and 0 not in k_cache.shape
    if not fit or positions.shape != k_cache.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (qkv, k_cache, v_cache, positions))
        raise ValueError(f"need qkv [B T, (H + 2 Hkv) D], caches [B, Hkv, capacity, D], positions [B]; got {shapes}")
    B, kv_heads, capacity, D = k_cache.shape
    heads = qkv.shape[1] // D - 2 * kv_heads
    if qkv.shape[0] == 0 or qkv.shape[0] % B or qkv.shape[1] % D:
        raise ValueError(f"qkv must have a multiple of {B} rows and of {D} columns, got {tuple(qkv.shape)}")
    heads_per_group(heads, kv_heads)
    if cos.shape != sin.shape or len(cos) < capacity or 2 * cos.shape[1] != D:
        raise ValueError(f"cos and sin must be [>= {capacity}, {D / 2:g}], got {tuple(cos.shape)}, {tuple(sin.shape)}")
    T = qkv.shape[0] // B
    if str(positions.dtype).split(".")[-1] != "int64" or positions.min() < 0 or positions.max() + T > capacity:
        raise ValueError(f"positions must be int64, from 0 to {capacity - T}, got {positions}")
    return B, heads, kv_heads, T, D


def rope_append(
    qkv: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray,
    layout: str = "half",
) -> np.ndarray:  # fmt: skip
    """Split the fused projection, rotate q and k, append k and v to the caches in place; returns q `[B, H, T, D]`.

    qkv `[B T, (H + 2 Hkv) D]`: row b T + t is new token t of sequence b; its columns are H heads of q, Hkv of k, Hkv of
    v. That token stands at position positions[b] + t: its k and v go there in the caches `[B, Hkv, capacity, D]`, and
    row positions[b] + t of the tables cos, sin `[>= capacity, D / 2]` turns its q and k, not its v (see `rotate`).
    positions int64 `[B]`, one for each sequence. Nothing else changes, and q is no view of qkv.
    Raises ValueError, before anything is stored, for shapes that do not fit, an Hkv that does not divide H, another
    layout, and positions that are not int64 or lie outside the cache.
    """
    B, heads, kv_heads, T, D = append_shape(qkv, k_cache, v_cache, positions, cos, sin)
    rows = qkv.reshape(B, T, heads + 2 * kv_heads, D)
    at = positions[:, None] + np.arange(T)  # [B, T]
    turned = rotate(rows[:, :, : heads + kv_heads], cos[at][:, :, None], sin[at][:, :, None], layout)
    sequence = np.arange(B)[:, None]
    k_cache[sequence, :, at] = turned[:, :, heads:]  # [B, T, Hkv, D]
    v_cache[sequence, :, at] = rows[:, :, heads + kv_heads :]
    return np.ascontiguousarray(turned[:, :, :heads].swapaxes(1, 2))


@torch.no_grad()
def pool_projections(model: Transformer, kv_heads: int) -> None:
    """Give `model` `kv_heads` key/value heads in place, by `pool_heads`. ValueError, and no change, where it raises."""
    config, pooled = replace(model.config, kv_heads=kv_heads), {}
    for name, layer in surgery.linears(model).items():
        if name.endswith((".k_proj", ".v_proj")):
            weight = pool_heads(layer.weight.double().numpy(force=True), model.config.kv_heads, kv_heads)
            pooled[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            pooled[name].weight = nn.Parameter(torch.from_numpy(weight).to(layer.weight))
    for name, layer in pooled.items():
        surgery.replace(model, name, layer)
    model.config = config


def group_heads(model: Transformer, kv_heads: int) -> Transformer:
    """A copy with `kv_heads` key/value heads, mean-pooled. ValueError unless they divide those that `model` has."""
    pooled = copy.deepcopy(model)
    pool_projections(pooled, kv_heads)
    return pooled


BATCH, LENGTH, RATE = 4, 128, 1e-3  # sequences and tokens of a step; peak of AdamW's learning rate


def uptrain(model: Transformer, stream: Tensor, steps: int, seed: int = 0) -> Transformer:
    """Go on training all weights, in place, on a token stream `[T]`; the same model. ValueError as `train.Settings`."""
    length = min(LENGTH, model.config.context, len(stream))
    train.train(model, stream, train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, seed=seed))
    return model


def split_and_append(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """`rope_append` for tensors, half-split; on CUDA it is the kernel."""
    if qkv.is_cuda:
        from kernels.attention.heads import rope_append as kernel

        return kernel(qkv, k_cache, v_cache, positions, cos, sin)
    B, heads, kv_heads, T, D = append_shape(qkv, k_cache, v_cache, positions, cos, sin)
    q, k, v = qkv.view(B, T, -1, D).split([heads, kv_heads, kv_heads], dim=2)
    at, sequence = positions[:, None] + torch.arange(T), torch.arange(B)[:, None]
    turn = (cos[at].repeat(1, 1, 2)[:, :, None].to(qkv.dtype), sin[at].repeat(1, 1, 2)[:, :, None].to(qkv.dtype))
    k_cache[sequence, :, at], v_cache[sequence, :, at] = plain.rotate(k, *turn), v
    return plain.rotate(q, *turn).transpose(1, 2).contiguous()


@torch.no_grad()
def decode_step(model: Transformer, tokens: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Logits `[B, V]` after one new token for each of B sequences, tokens int64 `[B]`, each at a position of its own.

    positions int64 `[B]` says how many tokens each has in the caches `[layers, B, Hkv, capacity, D]`, which were made
    as zeros and are written in place; the caller counts on. ValueError as `rope_append`; on CUDA a position outside the
    cache gives logits of NaN instead.
    """
    x = model.embedding(tokens)
    cos, sin = (table.chunk(2, dim=1)[0].contiguous() for table in (model.cos, model.sin))
    seen = torch.arange(k_cache.shape[3], device=x.device) <= positions[:, None, None, None]  # [B, 1, 1, S]
    for block, k, v in zip(model.blocks, k_cache, v_cache, strict=True):
        mixer = block.get_submodule("attention")
        fused = torch.cat([mixer.get_parameter(f"{name}_proj.weight") for name in "qkv"])
        q = split_and_append(F.linear(block.get_submodule("attention_norm")(x), fused), k, v, positions, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + mixer.get_submodule("o_proj")(out.flatten(1))
        x = x + block.get_submodule("feed_forward")(block.get_submodule("feed_forward_norm")(x))
    return model.head(model.norm(x))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run heads`."""
    parser.add_argument("--kv-heads", type=int, default=1, help="key/value heads to keep (default 1: MQA)")
    parser.add_argument("--steps", type=int, default=200, help="of uptraining; 0 only pools (default 200)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Pool, then train on the calibration tokens end to end. Bits are of those weights that there were before."""
    if args.steps < 0:
        raise ValueError(f"--steps must not be negative, got {args.steps}")
    before, held = sum(layer.weight.numel() for layer in surgery.linears(model).values()), token_bytes(model)
    pool_projections(model, args.kv_heads)
    if args.steps:
        uptrain(model, tokens.flatten(), args.steps, args.seed)
    after = sum(layer.weight.numel() for layer in surgery.linears(model).values())
    passes = args.steps * BATCH * min(LENGTH, model.config.context) / tokens.numel()
    cache = f"{held:.0f} -> {token_bytes(model):.0f}"
    return {"bits per weight": 32 * after / before, "cache bytes per token": cache, "passes over the text": passes}


@torch.no_grad()
def token_bytes(model: Transformer) -> float:
    """Bytes that a token holds in the model's float32 cache, measured on one that was filled."""
    cache = KVCache(model.config)
    model(torch.zeros((1, 4), dtype=torch.int64, device=model.embedding.weight.device), cache)
    return cache.nbytes() / len(cache)


Numbers = dict[int, float]  # by number of key/value heads


def measure(lab: Lab, counts: list[int], steps: int) -> tuple[Numbers, Numbers, Numbers]:
    """Perplexity right after pooling; after uptraining, from the mean loss over the seeds; cache bytes per token."""
    pooled, trained, held = {}, {}, {}
    for count in counts:
        model = group_heads(lab.model(), count)
        pooled[count], held[count] = lab.perplexity(model), token_bytes(model)
        copies = (uptrain(copy.deepcopy(model), lab.train_stream, steps, seed) for seed in lab.seeds)
        trained[count] = math.exp(np.mean([math.log(lab.perplexity(copied)) for copied in copies]))
    return pooled, trained, held


def draw(pooled: Numbers, trained: Numbers, held: Numbers) -> Figure:
    """Perplexity, and cache bytes per token, by number of key/value heads."""
    fig, (left, right) = panels(2, width=7.2)
    left.plot(list(pooled), list(pooled.values()), **series("baseline"), label="right after pooling")
    left.plot(list(trained), list(trained.values()), **series("method"), label="after uptraining")
    left.set(xlabel="key/value heads", ylabel="perplexity", yscale="log", title="quality")
    right.bar([str(count) for count in sorted(held)], [held[count] for count in sorted(held)], color=COLOURS["method"])
    right.set(xlabel="key/value heads", ylabel="bytes per token", title="cache")
    left.set_xticks(list(pooled))
    legend(left)
    return fig


def sweep(kv_heads: int) -> list[int]:
    """As many key/value heads as there are, the largest share of them, and 1. ValueError if there is only one."""
    if kv_heads == 1:
        raise ValueError("the model has one key/value head already: there is nothing to pool")
    return sorted({kv_heads, max(n for n in range(1, kv_heads) if kv_heads % n == 0), 1}, reverse=True)


def claim(lab: Lab) -> Claim:
    """Fewer key/value heads cut the cache in exact proportion; uptraining wins back most of what pooling broke.

    What is won back is measured against the unpooled model as it came or after the same steps, whichever is better.
    """
    counts = sweep(lab.config.kv_heads)
    steps = max(1, round(0.05 * lab.info.get("steps", 6000))) if lab.full else 80
    pooled, trained, held = measure(lab, counts, steps)
    most, fewer, numbers = counts[0], counts[1:], {}
    best = min(pooled[most], trained[most])
    won = {n: math.log(pooled[n] / trained[n]) / math.log(pooled[n] / best) for n in fewer}
    exact = all(held[n] * most == held[most] * n for n in counts)
    ordered = sorted(pooled, key=pooled.__getitem__) == counts == sorted(trained, key=trained.__getitem__)
    sentence = (
        f"Pooling {most} key/value heads to 1 takes the cache from {held[most]:.0f} to {held[1]:.0f} bytes a token, "
        f"and perplexity from {pooled[most]:.1f} to {pooled[1]:.1f}; {steps} steps of uptraining bring it to "
        f"{trained[1]:.1f} (the unpooled model: to {trained[most]:.1f}). Of the loss, in nats, "
        f"{' and '.join(f'{won[n]:.0%} (kv heads: {n})' for n in fewer)} is won back."
    )
    for n in counts:
        numbers |= {f"perplexity, {n} kv heads": pooled[n], f"perplexity, {n} kv heads, trained": trained[n]}
        numbers |= {f"cache bytes per token, {n} kv heads": held[n]}
    numbers |= {f"share of the loss won back, {n} kv heads": share for n, share in won.items()}
    setting = (
        f"all weights, AdamW, rate {RATE}, {steps} steps of {BATCH} × {LENGTH} tokens of the training text (the model "
        f"had {lab.info.get('steps', '?')} steps); seeds {lab.seeds} draw the text; float32 cache"
    )
    holds = exact and ordered and min(won.values()) > 0.5
    return Claim(sentence, holds, numbers, draw(pooled, trained, held), setting)
