"""FlashAttention: attend tile by tile with a running softmax, so that the score matrix is never stored.

A softmax seems to need its whole row: the largest score, and the sum of all exponentials. Both can be kept as running
values. A row that has seen some keys holds their largest score m, the total ℓ of exp(s − m), and the sum a of the
values with those weights. A new tile of scores s with values v updates them, rescaling what rested on the old maximum:

    m' = max(m, max s),      ℓ' = ℓ exp(m − m') + Σ exp(s − m'),      a' = a exp(m − m') + exp(s − m') v

and after the last tile  out = a / ℓ,  lse = m + log ℓ. That lse is all the backward pass needs to rebuild any tile of
the weights P = exp(S − lse), so it stores none of them either:

    dV = Pᵀ dO,    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)),    dQ = scale · dS K,    dK = scale · dSᵀ Q

Saves    memory: O(T) per head instead of O(T S). Traffic to slow memory: Θ(T² D² / M) bytes with M on chip instead of
         Θ(T D + T²) (theorem 2). Exact: the result differs from plain attention by rounding alone.
Costs    the backward pass computes S a second time: 10 operations per score and channel instead of 8.
Paper    Dao, Fu, Ermon, Rudra, Ré: FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, NeurIPS
         2022, arXiv:2205.14135, algorithms 1 and 4; queries in the outer loop as in FlashAttention-2 (Dao 2023,
         arXiv:2307.08691). The running softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
Follows  flash-attn since 2.1: causal is aligned at the bottom right, query i sees the keys j <= i + S − T. A query that
         sees none gets out 0; its lse is −inf here (flash-attn writes +inf or −inf, depending on the path).
Symbols  B batch; H query heads; Hkv key heads; G = H / Hkv, query head h reads key head h // G; T queries; S keys;
         D head size. q, out `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; lse `[B, H, T]`, natural logarithm.
Kernel   kernels/attention/flash.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd.function import once_differentiable

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from chapters.shared.naive_attention import exponent, naive_attend, rounding_errors, training_bytes
from minitfm.model import Attend

ARRAYS, TENSORS = ("float32", "float64"), ("float16", "bfloat16", "float32", "float64")
TILE = 64


def checked_scale(q, k, v, scale: float | None = None, **blocks: int) -> float:
    """The scale to use, 1/√D for None, for arrays or tensors q `[B, H, T, D]` and k, v `[B, Hkv, S, D]`.

    Raises TypeError for dtypes that differ or are not floating point, ValueError for shapes that do not fit, a scale
    that is not positive and finite, a block size below 1.
    """
    allowed = [f"torch.{name}" for name in TENSORS] if isinstance(q, Tensor) else ARRAYS
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype != q.dtype or str(x.dtype) not in allowed:
            raise TypeError(f"{name} must have q's dtype, one of {', '.join(allowed)}; got {x.dtype}, q has {q.dtype}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be 4-D and not empty, got shape {tuple(x.shape)}")
    (B, H, _, D), shape = q.shape, tuple(k.shape)
    if shape != tuple(v.shape) or (shape[0], shape[3]) != (B, D) or H % shape[1]:
        raise ValueError(f"k and v must be [{B}, Hkv, S, {D}], Hkv dividing {H}; got {shape} and {tuple(v.shape)}")
    for name, block in blocks.items():
        if block < 1:
            raise ValueError(f"{name} must be at least 1, got {block}")
    scale = 1 / math.sqrt(D) if scale is None else scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def group_heads(q, k, v) -> tuple:
    """Put query heads beside the key head they share: q `[B, Hkv, G, T, D]`, k and v `[B, Hkv, 1, S, D]`, no copies."""
    (B, H, T, D), kv_heads = q.shape, k.shape[1]
    return q.reshape(B, kv_heads, H // kv_heads, T, D), k[:, :, None], v[:, :, None]


def tile_scores(
    queries: np.ndarray, keys: np.ndarray, rows: slice, columns: slice, causal: bool, scale: float
) -> np.ndarray:
    """Scores of queries `rows` with keys `columns`, `[..., rows, columns]`; −inf where a key lies past the query."""
    T, S = queries.shape[-2], keys.shape[-2]
    scores = scale * (queries[..., rows, :] @ keys[..., columns, :].swapaxes(-1, -2))
    if not causal:
        return scores
    i, j = np.arange(T)[rows, None], np.arange(S)[None, columns]
    return np.where(j <= i + S - T, scores, -np.inf)


def finite(x: np.ndarray) -> np.ndarray:
    """x with 0 for −inf: subtracted from scores that are all −inf it gives −inf and weights of 0, not NaN."""
    return np.where(np.isneginf(x), 0, x)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, with all T × S scores in memory: out = softmax(scale q kᵀ) v, lse = log Σ exp(scale q kᵀ).

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; float32 or float64; scale 1/√D if None. Returns out `[B, H, T, D]` and lse
    `[B, H, T]` of the same dtype; 0 and −inf for a query that sees no key. Raises ValueError and TypeError as
    `checked_scale` does.
    """
    scale = checked_scale(q, k, v, scale)
    queries, keys, values = group_heads(q, k, v)
    scores = tile_scores(queries, keys, slice(None), slice(None), causal, scale)
    maximum = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - finite(maximum))
    total = exponentials.sum(axis=-1, keepdims=True)
    total = np.where(total > 0, total, 1)  # no key: maximum stays −inf, and so does lse
    return (exponentials / total @ values).reshape(q.shape), (maximum + np.log(total)).reshape(q.shape[:3])


def tiles(length: int, block: int) -> list[slice]:
    """0 .. length in runs of `block`, the last perhaps shorter."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def key_tiles(rows: slice, T: int, S: int, block_k: int, causal: bool) -> list[slice]:
    """The tiles of keys that some query in `rows` sees; those past the diagonal are never visited."""
    return tiles(max(rows.stop + S - T, 0) if causal else S, block_k)


def absorb_tile(
    maximum: np.ndarray, total: np.ndarray, acc: np.ndarray, scores: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of the running softmax: (maximum, total, acc) of the keys seen so far, with one more tile of them.

    maximum `[..., rows, 1]` largest score so far, −inf before any; total `[..., rows, 1]` sum of exp(score − maximum);
    acc `[..., rows, D]` sum of the values with those weights; scores `[..., rows, columns]` of the new tile, −inf where
    a key is hidden, perhaps in a whole row; values `[..., columns, D]`. Arguments stay as they are; nothing returned is
    NaN, overflows or vanishes, however large the scores, of either sign. Source: FlashAttention, algorithm 1, lines 10
    to 12.
    """
    new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
    weights = np.exp(scores - finite(new_maximum))
    rescale = np.exp(maximum - finite(new_maximum))
    return new_maximum, rescale * total + weights.sum(axis=-1, keepdims=True), rescale * acc + weights @ values


def flash_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """`attention`, tile by tile: same arguments, results, dtypes and errors, whatever the block sizes.

    A tile is `[B, H, block_q, block_k]` scores, shorter only at the ends. No array is larger than q, k, v or a tile,
    and fewer than eight as large as a tile are held at once; tiles past the diagonal are skipped, their values not
    read. Arguments stay as they are. Raises as `checked_scale` does, a scale of 0 and blocks below 1 included. Source:
    FlashAttention, algorithm 1; FlashAttention-2, algorithm 1.
    """
    scale = checked_scale(q, k, v, scale, block_q=block_q, block_k=block_k)
    queries, keys, values = group_heads(q, k, v)
    T, S = queries.shape[-2], keys.shape[-2]
    out, lse = np.empty_like(queries), np.empty_like(queries[..., :1])
    for rows in tiles(T, block_q):
        acc = np.zeros_like(queries[..., rows, :])
        total = np.zeros_like(acc[..., :1])
        maximum = np.full_like(total, -np.inf)
        for columns in key_tiles(rows, T, S, block_k, causal):
            scores = tile_scores(queries, keys, rows, columns, causal, scale)
            maximum, total, acc = absorb_tile(maximum, total, acc, scores, values[..., columns, :])
        total = np.where(total > 0, total, 1)
        out[..., rows, :], lse[..., rows, :] = acc / total, maximum + np.log(total)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def flash_attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dq, dk, dv), with shapes and dtype of q, k, v: the gradients that `dout` `[B, H, T, D]`, that of out, gives.

    out and lse are those of `flash_attention` on the same arguments; every tile of weights is rebuilt from them, with
    its bound on memory. dk and dv sum over the query heads that share a key head; a query that sees no key gives and
    gets 0. Arguments stay as they are. Raises as `flash_attention` does, and ValueError for a dout, out or lse that
    does not fit q. Source: FlashAttention, algorithm 4.
    """
    scale = checked_scale(q, k, v, scale, block_q=block_q, block_k=block_k)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    queries, keys, values = group_heads(q, k, v)
    dout, out, lse = dout.reshape(queries.shape), out.reshape(queries.shape), finite(lse).reshape(queries.shape[:-1])
    delta = (dout * out).sum(axis=-1)  # [B, Hkv, G, T]
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    for rows in tiles(q.shape[2], block_q):
        for columns in key_tiles(rows, q.shape[2], k.shape[2], block_k, causal):
            scores = tile_scores(queries, keys, rows, columns, causal, scale)
            weights = np.exp(scores - lse[..., rows, None])
            dweights = dout[..., rows, :] @ values[..., columns, :].swapaxes(-1, -2)
            dscores = scale * weights * (dweights - delta[..., rows, None])
            dq[..., rows, :] += dscores @ keys[..., columns, :]
            dk[..., columns, :] += (dscores.swapaxes(-1, -2) @ queries[..., rows, :]).sum(axis=2, keepdims=True)
            dv[..., columns, :] += (weights.swapaxes(-1, -2) @ dout[..., rows, :]).sum(axis=2, keepdims=True)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


Shape = tuple[int, int, int, int]


def hbm_bytes_naive(q_shape: Shape, k_shape: Shape, itemsize: int = 2) -> int:
    """Bytes to and from slow memory for scores = q kᵀ, weights = softmax(scores), out = weights v, one after the other.

    q, k, v and out once; the T × S matrix four times: scores written and read, weights written and read.
    """
    (B, H, T, D), (_, kv_heads, S, _) = q_shape, k_shape
    return itemsize * B * (2 * H * T * D + 2 * kv_heads * S * D + 4 * H * T * S)


def hbm_bytes_flash(q_shape: Shape, k_shape: Shape, block_q: int, causal: bool = True, itemsize: int = 2) -> int:
    """The same for `flash_attention`: q, out and the float32 lse once; K and V once for each head and tile of queries.

    Only keys that the tile sees count. What is on chip is a tile, so a `block_q` twice as large, which needs twice as
    much of it, halves the traffic of K and V.
    """
    (B, H, T, D), S = q_shape, k_shape[2]
    keys_read = sum(max(rows.stop + S - T, 0) if causal else S for rows in tiles(T, block_q))
    return B * H * (itemsize * (2 * T * D + 2 * keys_read * D) + 4 * T)


def scored_tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, scores `[..., rows, columns]`) of every tile that a causal query sees, for grouped q and k."""
    T, S = q.shape[-2], k.shape[-2]
    for rows in tiles(T, TILE):
        for columns in key_tiles(rows, T, S, TILE, causal=True):
            scores = q.shape[-1] ** -0.5 * (q[..., rows, :] @ k[..., columns, :].mT)
            hidden = torch.arange(S)[None, columns] > torch.arange(T)[rows, None] + S - T
            yield rows, columns, scores.masked_fill_(hidden, -math.inf)


class TiledAttention(torch.autograd.Function):
    """Causal attention by the same loops in torch, for the CPU: grouped q, k, v -> out like q.

    What autograd keeps is q, k, v, out and lse, nothing T × S. Tiles are merged by their lse, which is the running
    softmax once more, with every partial sum normalised.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.zeros_like(q), torch.full_like(q[..., :1], -math.inf)
        for rows, columns, scores in scored_tiles(q, k):
            merged = torch.logaddexp(lse[..., rows, :], scores.logsumexp(-1, keepdim=True))
            finite = merged.clamp(min=torch.finfo(q.dtype).min)
            out[..., rows, :] *= torch.exp(lse[..., rows, :] - finite)
            out[..., rows, :] += torch.exp(scores - finite) @ v[..., columns, :]
            lse[..., rows, :] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        lse, delta = lse.clamp(min=torch.finfo(q.dtype).min), (dout * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns, scores in scored_tiles(q, k):
            weights = torch.exp(scores - lse[..., rows, :])
            dweights = dout[..., rows, :] @ v[..., columns, :].mT
            dscores = q.shape[-1] ** -0.5 * weights * (dweights - delta[..., rows, :])
            dq[..., rows, :] += dscores @ k[..., columns, :]
            dk[..., columns, :] += (dscores.mT @ q[..., rows, :]).sum(2, keepdim=True)
            dv[..., columns, :] += (weights.mT @ dout[..., rows, :]).sum(2, keepdim=True)
        return dq, dk, dv


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention for `Transformer(config, attend=attend)`: causal and trainable; on CUDA the kernel.

    Shapes and errors as in `attention`; float16 and bfloat16, too, are summed in float32.
    """
    if q.is_cuda:
        from kernels.attention.flash import attend as kernel

        return kernel(q, k, v)
    checked_scale(q, k, v)
    precise = torch.promote_types(q.dtype, torch.float32)
    out = TiledAttention.apply(*(x.to(precise) for x in group_heads(q, k, v)))
    return out.reshape(q.shape).to(q.dtype)


def seams(args) -> dict[str, Attend]:
    """What `python -m chapters run flash` puts into the model."""
    return {"attend": attend}


def draw(lengths: list[int], memory: dict[str, list[int]]) -> Figure:
    """Memory against length, both logarithmic."""
    fig, axes = figure()
    for name, role in (("naive", "baseline"), ("flash", "method")):
        label = f"{name}: constant + N^{exponent(lengths, memory[name]):.2f}"
        axes.plot(lengths, np.divide(memory[name], 1e6), **series(role), label=label)
    axes.set(xlabel="sequence length N", ylabel="peak memory, MB", xscale="log", yscale="log")
    axes.set_xticks(lengths, labels=map(str, lengths))
    axes.minorticks_off()
    legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """FlashAttention rounds no worse than naive attention, and its memory grows like N, not like N².

    "No worse" is the authors' own rule: at most twice the float32 error that naive attention has.
    """
    lengths = [2**n for n in range(7, 13 if lab.full else 12)]
    ways = {"flash": attend, "naive": naive_attend}
    memory = {name: [training_bytes(lab, way, n) for n in lengths] for name, way in ways.items()}
    power = {name: exponent(lengths, measured) for name, measured in memory.items()}
    runs = [rounding_errors(lab, ways, seed) for seed in lab.seeds]
    numbers = {name: max(run[name] for run in runs) for name in runs[0]}
    exact = all(
        numbers[f"{what} error, flash"] <= 2 * numbers[f"{what} error, naive"] for what in ("logit", "gradient")
    )
    for name in ways:
        numbers |= {f"exponent of memory, {name}": power[name], f"MB at {lengths[-1]}, {name}": memory[name][-1] / 1e6}
    sentence = (
        "FlashAttention's logits and gradients on the base model are "
        f"{'as exact as' if exact else 'less exact than'} naive attention's (float32 error of a logit "
        f"{numbers['logit error, flash']:.0e} and {numbers['logit error, naive']:.0e}), and its memory grows as "
        f"N^{power['flash']:.2f} instead of N^{power['naive']:.2f}: at {lengths[-1]} tokens "
        f"{memory['flash'][-1] / 1e6:.0f} MB instead of {memory['naive'][-1] / 1e6:.0f} MB."
    )
    holds = exact and 0.9 < power["flash"] < 1.1 and power["naive"] > 1.8
    setting = f"errors against float64, 4 × {lab.length} tokens, seeds {lab.seeds}; memory of one layer, both passes"
    return Claim(sentence, holds, numbers, draw(lengths, memory), setting)
