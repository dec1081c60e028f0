"""Adaptive span: let each head learn how far back it looks, and keep no key that no head looks at.

    m(x)  = clip((R + z − x) / R, 0, 1)                   how much a key at distance x counts for a head with span z
    a_j   = m(i − j) exp(s_ij) / Σ_j' m(i − j') exp(s_ij')
    loss += λ · mean z over the heads, for each layer

A window cut hard would give its length no gradient. The mask falls from 1 to 0 along a ramp of R keys instead, and a
longer span lets the keys on it count more. Most heads, those of lower layers first, find that near keys are enough.

Saves    a head reads min(L, R + ⌈z⌉) keys instead of all: operations, traffic and cache shrink with it, and nothing
         changes, as what is not read has weight 0. It is one mask while training and a shorter cache afterwards.
Costs    one number to learn for each head; perplexity where λ is large; heads of unequal length to balance on a GPU.
Paper    Sukhbaatar, Grave, Bojanowski, Joulin: Adaptive Attention Span in Transformers, ACL 2019, arXiv:1905.07799.
Follows  facebookresearch/adaptive-span: R = 32, z = L · (a number that is put back into [0, 1] after each step), the
         penalty in tokens, a cache trimmed in steps of 64. That code takes a softmax over all L keys, then masks and
         divides by the sum + 1e-8: `eps`. There a token sees the L keys before it and x = 0 is the newest of them; here
         it sees L − 1 and itself, as the model does, and x = 0 is itself. At a kink z has its gradient from below.
Symbols  B batch; H query heads; Hkv key heads, query head h reads key head h // (H / Hkv); T queries; S keys; D head
         size; L max_span; R ramp. q, out `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; lse `[B, H, T]`; span `[H]`: z, tokens.
Kernel   kernels/attention/adaptive_span.py
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import COLOURS, heatmap, panels
from chapters.lab import Lab
from chapters.shared.span_layers import AdaptiveSpan, TrimmedCache
from minitfm import data, evaluate, surgery, train
from minitfm.cache import Cache, KVCache
from minitfm.model import Transformer

RAMP, PENALTY = 32, 1e-4  # R and λ


def checked_spans(span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    """span as float64. ValueError for one outside 0 .. max_span or NaN, a ramp or a max_span that is not positive."""
    span = np.asarray(span, np.float64)
    if isinstance(ramp, bool) or ramp != int(ramp) or ramp < 1 or max_span < 1:
        raise ValueError(f"ramp and max_span must be positive integers, got {ramp} and {max_span}")
    if span.size == 0 or not ((span >= 0) & (span <= max_span)).all():
        raise ValueError(f"span must be from 0 to max_span={max_span}, got {span.tolist()}")
    return span


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    """How much a key counts: clip((ramp + span − distance) / ramp, 0, 1), but 0 outside of 0 <= distance < max_span.

    distance: integers, the query's position minus the key's, so 0 is the query's own and a later key is negative; span:
    tokens. The two broadcast against each other, as in NumPy; the result is float64. Raises ValueError for a span that
    is NaN or outside 0 .. max_span, and for a ramp or a max_span below 1. Source: equation 3 of the paper.
    """
    span = checked_spans(span, ramp, max_span)
    inside = (distance >= 0) & (distance < max_span)
    return np.where(inside, np.clip((ramp + span - distance) / ramp, 0, 1), 0)


def keys_read(span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    """How many keys count for a query that has that many: min(max_span, ramp + ⌈span⌉), int64 in the shape of span."""
    return np.minimum(max_span, ramp + np.ceil(checked_spans(span, ramp, max_span)).astype(np.int64))


def trimmed_length(span: np.ndarray, ramp: int, max_span: int, step: int = 64) -> int:
    """Positions that a cache shared by heads with these spans keeps: the most that one reads, trimmed in whole steps.

    From max_span down by a multiple of step, so that the length seldom changes while the spans are learnt; 1 is exact.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    return max_span - int(max_span - keys_read(span, ramp, max_span).max()) // step * step


def share_read(span: np.ndarray, ramp: int, max_span: int, length: int) -> float:
    """Of all keys that causal heads see in a text of `length` tokens, the share that they read with these spans."""
    seen = np.arange(1, length + 1)
    return float(np.minimum(seen, keys_read(span, ramp, max_span)[..., None]).mean() / seen.mean())


def span_penalty(span, weight: float):
    """What one layer adds to the loss, weight · mean span in tokens, for arrays and tensors. Source: equation 5."""
    return weight * span.mean()


def checked_attention(q, k, v, span, max_span: int | None, scale: float | None) -> tuple[int, float]:
    """(max_span, scale), S and 1/√D for None. Raises as `span_attention` does, but for spans and ramp."""
    if any(x.dtype != q.dtype for x in (k, v)) or q.dtype not in (np.float32, np.float64):
        raise TypeError(f"q, k and v must all be float32 or all float64, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.ndim != 4 or k.ndim != 4 or 0 in (*q.shape, *k.shape) or k.shape != v.shape:
        raise ValueError(f"need q [B, H, T, D], k and v [B, Hkv, S, D]; got {q.shape}, {k.shape} and {v.shape}")
    (B, H, T, D), (batch, kv_heads, S, depth) = q.shape, k.shape
    if (batch, depth) != (B, D) or H % kv_heads or S < T:
        raise ValueError(f"k must be [{B}, Hkv, S >= {T}, {D}] with Hkv dividing {H}, got {tuple(k.shape)}")
    max_span, scale = S if max_span is None else max_span, 1 / math.sqrt(D) if scale is None else scale
    if tuple(span.shape) != (H,) or not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"span must be [{H}], scale positive and finite; got {tuple(span.shape)} and {scale}")
    return max_span, scale


def distances(T: int, S: int) -> np.ndarray:
    """From each query back to each key, `[T, S]`: the last query stands where the last key does."""
    return np.arange(T)[:, None] + S - T - np.arange(S)


def grouped_mask(T: int, k: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    """`soft_mask` for all heads, `[Hkv, G, T, S]`."""
    soft = soft_mask(distances(T, k.shape[2]), span[:, None, None], ramp, max_span)  # [H, T, S]
    return soft.reshape(k.shape[1], -1, T, k.shape[2])


def span_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, span: np.ndarray, ramp: int = RAMP, max_span: int | None = None,
    scale: float | None = None, eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """out = Σ m exp(s) v / Σ m exp(s) with s = scale q kᵀ and m the soft mask; lse = log Σ m exp(s).

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`, S >= T; query i stands at position i + S − T of the keys and key j at j, so
    that their distance is i + S − T − j. span `[H]` in tokens, one for each query head; max_span S if None; scale 1/√D
    if None. Returns out `[B, H, T, D]`, lse `[B, H, T]`. Finite however large the scores, those of keys that do not
    count included. eps: out is divided by Σ m exp(s) + eps · Σ exp(s), the second sum over all 0 <= distance < max_span
    (1e-8 in the released code); lse is without. Arguments stay as they are. Raises ValueError as `soft_mask` does, for
    shapes that do not fit, S < T, a scale that is not positive and finite, and TypeError unless q, k and v are all
    float32 or all float64. Source: equation 4.
    """
    max_span, scale = checked_attention(q, k, v, span, max_span, scale)
    (_, _, T, D), (B, kv_heads, S, _) = q.shape, k.shape
    soft = grouped_mask(T, k, span, ramp, max_span)
    scores = scale * (q.reshape(B, kv_heads, -1, T, D) @ k[:, :, None].swapaxes(-1, -2))  # [B, Hkv, G, T, S]
    maximum = np.where(soft > 0, scores, -np.inf).max(axis=-1, keepdims=True)  # finite: each query counts itself
    weights = soft * np.exp(np.where(soft > 0, scores - maximum, -np.inf))
    total = weights.sum(axis=-1, keepdims=True)
    lse = maximum + np.log(total)
    if eps:
        inside = (distances(T, S) >= 0) & (distances(T, S) < max_span)
        with np.errstate(over="ignore"):  # where a hidden key outweighs all others the released code gives 0
            total = total + eps * np.exp(scores - maximum).sum(axis=-1, keepdims=True, where=inside)
    return (weights / total @ v[:, :, None]).reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3]).astype(q.dtype)


def span_attention_backward(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray, span: np.ndarray,
    ramp: int = RAMP, max_span: int | None = None, scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(dq, dk, dv, dspan), shaped like q, k, v and span: gradients for dout `[B, H, T, D]`, that of out.

    dq, dk and dv have the dtype of q; dspan is float64. out and lse are those of `span_attention` without eps on the
    same arguments. With p = exp(s − lse), the weight of a key is m p, and δ = dout · out its row's sum of weight
    · (dout · v):
        ds = m p (dout · v − δ),    dq = scale ds k,    dk = scale dsᵀ q,    dv = (m p)ᵀ dout,
        dspan = 1/R Σ p (dout · v − δ) over a head's pairs on the ramp: those with m > 0 and distance >= span.
    dk and dv sum over the query heads that share a key head. Arguments stay as they are. Raises as `span_attention`
    does, and ValueError for a dout, out or lse that does not fit q.
    """
    max_span, scale = checked_attention(q, k, v, span, max_span, scale)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    (B, H, T, D), kv_heads = q.shape, k.shape[1]
    queries, dout, out = (x.reshape(B, kv_heads, -1, T, D) for x in (q, dout, out))
    keys, values, soft = k[:, :, None], v[:, :, None], grouped_mask(T, k, span, ramp, max_span)
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    p = np.exp(np.where(soft > 0, scores - lse.reshape(*queries.shape[:-1], 1), -np.inf))
    inner = dout @ values.swapaxes(-1, -2) - (dout * out).sum(axis=-1, keepdims=True)
    dscores = scale * soft * p * inner
    beyond = distances(T, k.shape[2]) >= span.reshape(kv_heads, -1, 1, 1)
    dspan = np.sum(p * inner, axis=(0, 3, 4), where=beyond, dtype=np.float64).reshape(H) / ramp
    dk = (dscores.swapaxes(-1, -2) @ queries).sum(axis=2)
    dv = ((soft * p).swapaxes(-1, -2) @ dout).sum(axis=2)
    dq = (dscores @ keys).reshape(q.shape)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), dspan


RATE, BATCH = 3e-4, 2  # of AdamW; sequences of a step


def learn_spans(
    model: Transformer, stream: Tensor, steps: int, penalty: float, length: int, ramp: int = RAMP, seed: int = 0
) -> list[AdaptiveSpan]:
    """Train all weights of `model`, in place, and a span for each head, from `length` down; returns the layers' spans.

    stream `[tokens]` is cut into sequences of `length`; `penalty` is λ, for each token of a layer's mean span. A span
    can cross its range in a fifth of the steps. ValueError for a negative penalty and as `train.Settings`.
    """
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be finite and not negative, got {penalty}")
    recipe = train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, seed=seed)
    layers = [AdaptiveSpan(model.config.heads, length, ramp, speed=5 / (steps * RATE)) for _ in model.blocks]
    for i, layer in enumerate(layers):
        surgery.set_attend(model, i, layer)

    def loss(model: Transformer, tokens: Tensor) -> Tensor:
        return train.next_token_loss(model, tokens) + sum(span_penalty(layer.span(), penalty) for layer in layers)

    def settle(step: int, model: Transformer) -> None:
        for layer in layers:
            layer.settle()

    train.train(model, stream, recipe, loss, settle)
    return layers


def learnt(layers: list[AdaptiveSpan]) -> np.ndarray:
    """The spans in tokens, float64 `[layers, heads]`."""
    spans = [layer.span().detach().double().numpy(force=True) for layer in layers]
    return np.stack([span.clip(0, layer.max_span) for span, layer in zip(spans, layers, strict=True)])


def trimmed_cache(model: Transformer, layers: list[AdaptiveSpan], batch: int = 1) -> TrimmedCache:
    """A cache in which each key head keeps as many positions as the query heads that read it look back."""
    rows = [keys_read(span, layer.ramp, layer.max_span) for span, layer in zip(learnt(layers), layers, strict=True)]
    kept = [row.reshape(model.config.kv_heads, -1).max(axis=1).tolist() for row in rows]
    return TrimmedCache(model.config, kept, batch, model.embedding.weight.dtype)


@torch.no_grad()
def decoded(model: Transformer, tokens: Tensor, prompt: int, cache: Cache) -> Tensor:
    """Logits `[T − prompt, V]` of tokens `[T]`, one token at a time after a prefill of `prompt` tokens."""
    model(tokens[None, :prompt], cache)
    return torch.cat([model(token.view(1, 1), cache)[0] for token in tokens[prompt:]])


def trimming(model: Transformer, layers: list[AdaptiveSpan], tokens: Tensor) -> tuple[float, float]:
    """(largest difference of a logit, bytes of the trimmed cache over those of the whole one), reading tokens `[T]`."""
    whole, trimmed = KVCache(model.config), trimmed_cache(model, layers)
    logits = [decoded(model, tokens, len(tokens) // 2, cache) for cache in (whole, trimmed)]
    return float((logits[0] - logits[1]).abs().max()), trimmed.nbytes() / whole.nbytes()


def texts(lab: Lab, length: int) -> Tensor:
    """Measuring text in sequences of `length` tokens: all there is in full, 16 sequences else."""
    everything = data.sequences(lab.streams[1], length)
    return everything if lab.full else everything[:: max(1, len(everything) // 16)][:16]


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run adaptive_span`."""
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--penalty", type=float, default=PENALTY, help=f"for a token of span (default {PENALTY:g})")
    parser.add_argument("--ramp", type=int, default=RAMP, help=f"keys on the ramp of the mask (default {RAMP})")
    parser.add_argument("--length", type=int, default=256, help="of a text, and of a span at most (default 256)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Learn the spans; what they are, what they cost and what trimming the cache to them saves."""
    model, text = lab.model(), texts(lab, args.length)
    before = evaluate.perplexity(model, text, batch=4)
    layers = learn_spans(model, lab.train_stream, args.steps, args.penalty, args.length, args.ramp, args.seed)
    spans, (difference, held) = learnt(layers), trimming(model, layers, text[0])
    report = {f"spans of layer {i}": " ".join(f"{z:.0f}" for z in row) for i, row in enumerate(spans)}
    return report | {
        "perplexity before": before,
        "perplexity": evaluate.perplexity(model, text, batch=4),
        "share of keys read": share_read(spans, args.ramp, args.length, args.length),
        "trimmed cache, share of bytes": held,
        "largest difference of a logit, trimmed": difference,
    }


def measure(lab: Lab, steps: int, length: int, seed: int) -> tuple[np.ndarray, dict[str, float]]:
    """The spans `[layers, heads]` that one seed learns, and its numbers, with those of training without spans."""
    text, plain, model = texts(lab, length), lab.model(), lab.model()
    recipe = train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, seed=seed)
    train.train(plain, lab.train_stream, recipe)
    layers = learn_spans(model, lab.train_stream, steps, PENALTY, length, seed=seed)
    spans, (difference, held) = learnt(layers), trimming(model, layers, text[0])
    return spans, {
        "perplexity, trained without spans": evaluate.perplexity(plain, text, batch=4),
        "perplexity, with spans": evaluate.perplexity(model, text, batch=4),
        "share of keys read": share_read(spans, RAMP, length, length),
        "trimmed cache, share of bytes": held,
        "largest difference of a logit, trimmed": difference,
    }


def draw(spans: np.ndarray, length: int) -> Figure:
    """Spans by layer and head, means of the seeds, and the keys read by layer."""
    fig, (left, right) = panels(2, width=7.6)
    heatmap(left, spans, "span, tokens", digits=0)
    left.set(xlabel="head", ylabel="layer", title="learnt spans")
    shares = [share_read(row, RAMP, length, length) for row in spans]
    right.bar([str(i) for i in range(len(spans))], shares, color=COLOURS["method"])
    right.set(xlabel="layer", ylabel="share of keys read", ylim=(0, 1), title="what is left to read")
    return fig


def claim(lab: Lab) -> Claim:
    """Under a penalty heads of lower layers learn short spans, a few others keep long ones, and quality hardly suffers.

    Holds if for every seed the lower half of the layers has the shorter mean span, if less than half of the keys are
    read, perplexity is within 5% of that after the same training without spans, and trimming changes no logit.
    """
    steps, length = (200, min(512, lab.config.context)) if lab.full else (50, min(256, lab.config.context))
    runs = [measure(lab, steps, length, seed) for seed in lab.seeds]
    spans = np.stack([run[0] for run in runs])  # [seeds, layers, heads]
    numbers = {name: float(np.mean([run[1][name] for run in runs])) for name in runs[0][1]}
    plain, after, share, held, changed = numbers.values()
    before, half = evaluate.perplexity(lab.model(), texts(lab, length), batch=4), spans.shape[1] // 2
    lower, upper = spans[:, :half].mean(axis=(1, 2)), spans[:, half:].mean(axis=(1, 2))
    shorter = int((lower < upper).sum())
    numbers |= {"perplexity, base model": before, "seeds whose lower layers are shorter": shorter}
    numbers |= {f"span, layer {i}, head {h}": z for (i, h), z in np.ndenumerate(spans.mean(axis=0))}
    sentence = (
        f"{steps} steps of training with a penalty leave spans of {lower.mean():.0f} tokens on average in the lower "
        f"half of the layers and of {upper.mean():.0f} in the upper, out of {length} (the lower ones are shorter for "
        f"{shorter} of {len(runs)} seeds); {share:.0%} of the keys are read, perplexity is {after:.1f} (before "
        f"{before:.1f}, trained without spans {plain:.1f}), and a cache trimmed to {held:.0%} of its bytes changes "
        f"logits by {changed:.0e}."
    )
    holds = shorter == len(runs) and share < 0.5 and after < 1.05 * plain and changed < 1e-4
    setting = (
        f"λ {PENALTY:g} a token and layer, ramp {RAMP}, spans start at {length}; all weights, AdamW, rate {RATE}, "
        f"{steps} steps of {BATCH} × {length} tokens of the training text; seeds {lab.seeds} draw it"
    )
    return Claim(sentence, holds, numbers, draw(spans.mean(axis=0), length), setting)
