"""FlashAttention's masks and biases: they act on single scores, so a tile applies them by itself, or is never visited.

Models change scores on their way to the softmax, in this order, with x = scale · q k for a query and a key:

    soft cap     x ← c tanh(x / c)              no score leaves (−c, c); its gradient is multiplied by 1 − tanh²(x / c)
    ALiBi        x ← x − m |j − p|              the further away a key, the less it counts; m is the head's slope
    mask         x ← −∞ unless −left <= j − p <= right; causal: right = 0

Key j is |j − p| away from p = i + S − T, the own place of query i among the keys. All that takes is the score and its
position. A mask does more: tiles that a window leaves empty are not visited, so that time follows the window and not
the text. And sequences of any lengths can lie end to end in one row, without padding: offsets say where each begins,
each has a T, S and p of its own, and tiles of one sequence with another are never visited either.

Saves    windows: about T (left + right) scores instead of T S. Packing: all that padding to the longest would compute.
         Exact: the same function of q, k and v as with all scores in memory.
Costs    a tanh for each score where there is a cap, a product and a sum where there are slopes.
Paper    Dao 2023: FlashAttention-2, arXiv:2307.08691, whose code has all of these. Windows: Child et al. 2019,
         arXiv:1904.10509. Cap: Gemma 2, arXiv:2408.00118, section 2. ALiBi: Press, Smith, Lewis: Train Short, Test
         Long, ICLR 2022, arXiv:2108.12409. Packing: Krell, Kosec, Perez, Fitzgibbon 2021, arXiv:2107.02027.
Follows  flash-attn: the order above; a window (left, right) counts the keys besides the one at p, so that a window of W
         tokens in Mistral and transformers is (W − 1, 0); alignment at the bottom right, of each sequence. A query that
         sees no key gets out 0; its lse is −inf. Under a causal mask flash-attn adds m j instead: out and gradients
         are the same, its lse is larger by m p. Here the lse is that of the scores above.
Symbols  B batch; H query heads; Hkv key heads; T queries; S keys; D head size; N sequences. q, out `[B, H, T, D]`; k, v
         `[B, Hkv, S, D]`; lse `[B, H, T]`, natural logarithm. Packed: B is 1, T and S are sums over all sequences, and
         sequence n has the queries cu_q[n] .. cu_q[n + 1] and the keys cu_k[n] .. cu_k[n + 1]; cu_q, cu_k `[N + 1]`.
Kernel   kernels/attention/flash_variants.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chapters.attention.flash import Shape, absorb_tile, checked_scale, finite, group_heads
from chapters.claims import Claim
from chapters.lab import Lab
from chapters.shared import variant_measures
from chapters.shared.visible_tiles import Offsets, Span, Window, distances, query_tiles, reach, runs, spans
from minitfm.model import Attend

TILE = 64


class Plan(NamedTuple):
    """Checked options: slopes `[Hkv, G, 1, 1]` in the dtype of q, or None; the others as `visible_tiles` has them."""

    scale: float
    left: float
    right: float
    slopes: Any
    sequences: list[Span]


def checked(
    q, k, v, causal: bool = True, scale: float | None = None, window: Window = (None, None),
    softcap: float | None = None, slopes=None, cu_q: Offsets | None = None, cu_k: Offsets | None = None, **blocks: int,
) -> Plan:  # fmt: skip
    """The plan for arrays or tensors. Raises as `flash.checked_scale`, `reach` and `spans` do, and ValueError for a cap
    that is not positive and finite, slopes that are not one finite number per query head, offsets with B above 1.
    """
    scale, (left, right) = checked_scale(q, k, v, scale, **blocks), reach(causal, window)
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be None, or positive and finite, got {softcap}")
    if slopes is not None:
        if tuple(slopes.shape) != (q.shape[1],) or not (abs(slopes) < math.inf).all():
            raise ValueError(f"slopes must be {q.shape[1]} finite numbers, one for each query head, got {slopes}")
        slopes = slopes.to(q.device, precise(q)) if isinstance(q, Tensor) else slopes.astype(q.dtype)
        slopes = slopes.reshape(k.shape[1], -1, 1, 1)
    if cu_q is not None and q.shape[0] != 1:
        raise ValueError(f"q must be a batch of 1 where sequences are packed, got {q.shape[0]}")
    return Plan(scale, left, right, slopes, spans(q.shape[2], k.shape[2], cu_q, cu_k))


def precise(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or that of x where it is finer."""
    return torch.promote_types(x.dtype, torch.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes `[heads]`, float64: for a power of two n, 2^(−8 / n) to the powers 1 .. n.

    Otherwise those of the power of two n below, then every other one of those for 2 n, from the first on. Raises
    ValueError for less than one head. Source: Press et al., section 3, and their code for other numbers.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    n = 2 ** int(math.log2(heads))
    return 2.0 ** np.concatenate([-8 / n * np.arange(1, n + 1), -4 / n * np.arange(1, 2 * n, 2)])[:heads]


def modified_scores(
    scores: np.ndarray, distance: np.ndarray, left: float, right: float, softcap: float | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """A tile of scaled products `[..., rows, columns]` as the softmax gets it: capped, then biased, then masked.

    distance int `[rows, columns]`: j − p of each pair. softcap c: c tanh(x / c). slopes m, which broadcast against the
    scores: x − m |distance|. Then −inf where distance is below −left or above right, each 0 or more, perhaps inf. None
    leaves a step out. Same dtype as scores, which stay as they are. Source: flash-attn, `attention_ref`.
    """
    modified = scores if softcap is None else softcap * np.tanh(scores / softcap)
    if slopes is not None:
        modified = modified - slopes * np.abs(distance).astype(scores.dtype)
    return np.where((-left <= distance) & (distance <= right), modified, -np.inf).astype(scores.dtype)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None,
    window: Window = (None, None), softcap: float | None = None, slopes: np.ndarray | None = None,
    cu_q: Offsets | None = None, cu_k: Offsets | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The definition, all scores of a sequence in memory: arguments, results and errors as in `flash_attention`."""
    plan = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k)
    queries, keys, values = group_heads(q, k, v)
    out, lse = np.zeros_like(queries), np.full_like(queries[..., :1], -np.inf)
    for own, seen in plan.sequences:
        products = plan.scale * (queries[..., own, :] @ keys[..., seen, :].swapaxes(-1, -2))
        distance = distances(own, seen, seen.stop - own.stop)
        scores = modified_scores(products, distance, plan.left, plan.right, softcap, plan.slopes)
        maximum = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - finite(maximum))
        total = weights.sum(axis=-1, keepdims=True)
        total = np.where(total > 0, total, 1)  # no key: maximum stays −inf, and so does lse
        out[..., own, :], lse[..., own, :] = weights / total @ values[..., seen, :], maximum + np.log(total)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def flash_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None,
    window: Window = (None, None), softcap: float | None = None, slopes: np.ndarray | None = None,
    cu_q: Offsets | None = None, cu_k: Offsets | None = None, block_q: int = 64, block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Attention with any of these, tile by tile: out `[B, H, T, D]` and lse `[B, H, T]`, dtype of q.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; float32 or float64; scale 1/√D if None. window (left, right), keys besides
    the one at p, None for all; causal sets right to 0. softcap positive; slopes `[H]`; cu_q, cu_k integers `[N + 1]`
    with B = 1, cu_k as cu_q if None; a sequence may be empty. A query that sees no key gets out 0 and lse −inf. No
    array is larger than q, k, v or a tile `[B, H, block_q, block_k]`, and fewer than ten as large as a tile are held
    at once. A tile has the keys of one sequence; where it has no visible pair, keys and values are not read. Arguments
    stay as they are. Raises as `checked` does. Source: FlashAttention, algorithm 1; flash-attn's options.
    """
    plan = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q=block_q, block_k=block_k)
    queries, keys, values = group_heads(q, k, v)
    out, lse = np.empty_like(queries), np.empty_like(queries[..., :1])
    for rows, seen, shift in query_tiles(plan.sequences, plan.left, plan.right, block_q):
        acc = np.zeros_like(queries[..., rows, :])
        total = np.zeros_like(acc[..., :1])
        maximum = np.full_like(total, -np.inf)
        for columns in runs(seen.start, seen.stop, block_k):
            products = plan.scale * (queries[..., rows, :] @ keys[..., columns, :].swapaxes(-1, -2))
            distance = distances(rows, columns, shift)
            scores = modified_scores(products, distance, plan.left, plan.right, softcap, plan.slopes)
            maximum, total, acc = absorb_tile(maximum, total, acc, scores, values[..., columns, :])
        total = np.where(total > 0, total, 1)
        out[..., rows, :], lse[..., rows, :] = acc / total, maximum + np.log(total)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def flash_attention_backward(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray,
    causal: bool = True, scale: float | None = None, window: Window = (None, None), softcap: float | None = None,
    slopes: np.ndarray | None = None, cu_q: Offsets | None = None, cu_k: Offsets | None = None, block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(dq, dk, dv), with shapes and dtype of q, k, v: the gradients that `dout` `[B, H, T, D]`, that of out, gives.

    out and lse are those of `flash_attention` on the same arguments; tiles of weights are rebuilt from them, in its
    order and within its bound on memory. Slopes get no gradient. dk and dv sum over the query heads that share a key
    head; a query that sees no key gives and gets 0. Arguments stay as they are. Raises as `flash_attention` does, and
    ValueError for a dout, out or lse that does not fit q. Source: FlashAttention, algorithm 4.
    """
    plan = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q=block_q, block_k=block_k)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    queries, keys, values = group_heads(q, k, v)
    dout, out, lse = dout.reshape(queries.shape), out.reshape(queries.shape), finite(lse).reshape(queries.shape[:-1])
    delta = (dout * out).sum(axis=-1)  # [B, Hkv, G, T]
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    for rows, seen, shift in query_tiles(plan.sequences, plan.left, plan.right, block_q):
        for columns in runs(seen.start, seen.stop, block_k):
            products = plan.scale * (queries[..., rows, :] @ keys[..., columns, :].swapaxes(-1, -2))
            distance = distances(rows, columns, shift)
            scores = modified_scores(products, distance, plan.left, plan.right, softcap, plan.slopes)
            weights = np.exp(scores - lse[..., rows, None])
            dweights = dout[..., rows, :] @ values[..., columns, :].swapaxes(-1, -2)
            slope = plan.scale if softcap is None else plan.scale * (1 - np.tanh(products / softcap) ** 2)
            dproducts = slope * weights * (dweights - delta[..., rows, None])
            dq[..., rows, :] += dproducts @ keys[..., columns, :]
            dk[..., columns, :] += (dproducts.swapaxes(-1, -2) @ queries[..., rows, :]).sum(axis=2, keepdims=True)
            dv[..., columns, :] += (weights.swapaxes(-1, -2) @ dout[..., rows, :]).sum(axis=2, keepdims=True)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def hbm_bytes(
    q_shape: Shape, k_shape: Shape, block_q: int, causal: bool = True, window: Window = (None, None),
    cu_q: Offsets | None = None, cu_k: Offsets | None = None, itemsize: int = 2,
) -> int:  # fmt: skip
    """Bytes to and from slow memory for `flash_attention`: q, out and the float32 lse once; K and V once for each head
    and tile of queries, only those keys that some query of the tile sees."""
    (B, H, T, D), S = q_shape, k_shape[2]
    found = query_tiles(spans(T, S, cu_q, cu_k), *reach(causal, window), block_q)
    keys_read = sum(max(seen.stop - seen.start, 0) for _, seen, _ in found)
    return B * H * (itemsize * (2 * T * D + 2 * keys_read * D) + 4 * T)


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, distance: Tensor, left: float, right: float, scale: float, softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of a tile of queries to all keys that they see, for grouped q, k, v; a query without one gets 0."""
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes * distance.abs()
    scores = scores.masked_fill((distance < -left) | (distance > right), -math.inf)
    maximum = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total > 0, total, 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: Window = (None, None), softcap: float | None = None,
    slopes: Tensor | None = None, cu_q: Sequence[int] | Tensor | None = None,
    cu_k: Sequence[int] | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention with any of these for `Transformer(config, attend=partial(attend, …))`, trainable.

    On CUDA the kernel; on the CPU one tile of queries at a time, whose scores the backward pass computes again: no more
    than TILE rows of them are held. Shapes and errors as in `flash_attention`; float16 and bfloat16, too, are summed in
    float32.
    """
    if q.is_cuda:
        from kernels.attention.flash_variants import flash_attention as kernel

        return kernel(q, k, v, True, None, window, softcap, slopes, cu_q, cu_k)[0]
    plan = checked(q, k, v, True, None, window, softcap, slopes, cu_q, cu_k)
    queries, keys, values = (x.to(precise(x)) for x in group_heads(q, k, v))
    parts = []
    for rows, seen, shift in query_tiles(plan.sequences, plan.left, plan.right, TILE):
        part = torch.zeros_like(queries[..., rows, :])
        if seen.stop > seen.start:
            tile = queries[..., rows, :], keys[..., seen, :], values[..., seen, :]
            distance = torch.from_numpy(distances(rows, seen, shift))
            how = (plan.left, plan.right, plan.scale, softcap, plan.slopes)
            part = checkpoint(attend_rows, *tile, distance, *how, use_reentrant=False, preserve_rng_state=False)
        parts.append(part)
    return torch.cat(parts, dim=-2).reshape(q.shape).to(q.dtype)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run flash_variants`."""
    parser.add_argument("--window", type=int, metavar="W", help="see the last W tokens, its own included (default all)")
    parser.add_argument("--softcap", type=float, metavar="C", help="cap scores at C (Gemma 2: 50; default none)")
    parser.add_argument("--alibi", action="store_true", help="add ALiBi's biases")


def seams(args: argparse.Namespace) -> dict[str, Attend]:
    """What `python -m chapters run flash_variants` puts into the model."""
    if args.window is not None and args.window < 1:
        raise ValueError(f"--window must be at least 1, got {args.window}")
    if args.softcap is not None and not 0 < args.softcap < math.inf:
        raise ValueError(f"--softcap must be positive and finite, got {args.softcap}")

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.from_numpy(alibi_slopes(q.shape[1])) if args.alibi else None
        return attend(q, k, v, (None if args.window is None else args.window - 1, None), args.softcap, slopes)

    return {"attend": chosen}


def variants(heads: int, length: int) -> dict[str, dict]:
    """Options by name for one row of `length` tokens: each alone, then all at once."""
    single = {
        "window": {"window": (length // 4, None)},
        "soft cap": {"softcap": 5.0},
        "ALiBi": {"slopes": alibi_slopes(heads)},
        "packing": {"cu_q": [0, length // 5, length // 5, length // 2, length]},
    }
    return single | {"all": {key: value for chosen in single.values() for key, value in chosen.items()}}


def both_passes(layer, dout: np.ndarray, dtype: type, block: int, forward, chosen: dict) -> list[np.ndarray]:
    """out, dq, dk and dv of a layer's q, k and v, computed in that dtype; the backward pass in tiles of `block`."""
    q, k, v, dout = (x.astype(dtype) for x in (*layer, dout))
    found = forward(q, k, v, **chosen)
    return [found[0], *flash_attention_backward(dout, q, k, v, *found, **chosen, block_q=block, block_k=block)]


def worst_rounding(lab: Lab) -> dict[str, tuple[float, float]]:
    """By variant, the largest float32 errors over the seeds: of attention in tiles, and with all scores in memory."""
    worst, tiled = {}, partial(flash_attention, block_q=32, block_k=32)
    for name, chosen in variants(lab.config.heads, lab.length).items():
        passes = [partial(both_passes, forward=forward, chosen=chosen) for forward in (tiled, attention)]
        errors = [variant_measures.rounding(lab, seed, *passes) for seed in lab.seeds]
        worst[name] = (max(error for error, _ in errors), max(error for _, error in errors))
    return worst


def window_growth(window: int, length: int = 16384) -> dict[str, float]:
    """MB that a Llama-3-8B layer moves in tiles of 128 queries, and how they grow when the text doubles."""
    numbers = {}
    for name, sides in (("window", (window - 1, None)), ("all keys", (None, None))):
        once, twice = (hbm_bytes((1, 32, n, 128), (1, 8, n, 128), 128, True, sides) for n in (length, 2 * length))
        numbers |= {f"MB, {name}": once / 1e6, f"growth of bytes, {name}": twice / once}
    return numbers


def claim(lab: Lab) -> Claim:
    """Windows make bytes and time grow as the text, packing saves what padding computes, and all of it stays exact.

    Exact by the authors' rule: at most twice the float32 error that attention with all scores in memory has.
    """
    errors, found = worst_rounding(lab), window_growth(1024)
    found["error over that of whole rows"] = max(tiled / whole for tiled, whole in errors.values())
    found |= {f"error, {name}": tiled for name, (tiled, _) in errors.items()}
    times = variant_measures.window_times(lab, attend)
    found |= {f"ms, {name}": 1e3 * taken[-1] for name, taken in times.items()}
    found |= variant_measures.packing_of_all(lab, attend)
    saved = {what: 1 - found[f"{what}, packed"] / found[f"{what}, padded"] for what in ("tokens", "time")}
    part = found["ms, window"] / found["ms, all keys"]
    sentence = (
        f"When the text doubles to 32,768 tokens, a window of 1,024 moves {found['growth of bytes, window']:.1f} times "
        f"the bytes, all keys {found['growth of bytes, all keys']:.1f} times, and at {variant_measures.LENGTHS[-1]} "
        f"tokens one of {variant_measures.WINDOW} takes {part:.0%} of the time on the CPU; packing requests as long as "
        f"people's saves {saved['tokens']:.0%} of the tokens and {saved['time']:.0%} of the time, and "
        f"{found['prompts continued alike']:.0%} of prompts go on as alone; float32 errors are at most "
        f"{found['error over that of whole rows']:.1f} times those with all scores in memory."
    )
    cheaper = found["growth of bytes, window"] < 2.1 and part < 0.5
    packed = min(saved.values()) > 0 and found["prompts continued alike"] == 1
    setting = (
        f"bytes by formula, Llama-3-8B; processor time of a layer of the model's shape; 16 requests a "
        f"seed, the whole model, 8 prompts and 16 tokens more; errors of both passes, window, soft cap 5, ALiBi, "
        f"packing and all at once, {lab.length} tokens; seeds {lab.seeds}"
    )
    holds = cheaper and packed and found["error over that of whole rows"] <= 2
    return Claim(sentence, holds, found, variant_measures.draw(times, saved), setting)
