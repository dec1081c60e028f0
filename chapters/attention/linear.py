"""Linear attention: replace the softmax by a product of features, and the whole past fits into one small matrix.

Softmax attention weighs key s for query t by exp(q·k). If that weight is φ(q)·φ(k) instead, the sums over the keys can
be taken before any query is known:

    out_t = Σ_{s≤t} (φ(q_t)·φ(k_s)) v_s / Σ_{s≤t} φ(q_t)·φ(k_s) = φ(q_t)ᵀ S_t / (φ(q_t)·z_t)
    S_t = S_{t−1} + φ(k_t) v_tᵀ,   z_t = z_{t−1} + φ(k_t)

Three forms, one result. Parallel: all T × T weights. Recurrent: the state (S, z), one token at a time. Chunked: weights
inside a chunk, the state between chunks, which is how a GPU wants it. Three features:

    elu      φ(x) = elu(x) + 1: learned attention with another similarity, no approximation of softmax
    Performer  φ(x) = exp(w_i·x − |x|²/2) / √m: positive, and on average over w ~ N(0, I) φ(q)·φ(k) = exp(q·k);
             w from orthogonal blocks, which lowers the variance
    RFA      φ(x) = [cos w_i·x, sin w_i·x] / √m of unit vectors: exp(−|q − k|²/2) on average, perhaps negative

Saves    operations O(T F D) instead of O(T² D); decoding keeps F (D + 1) numbers a head instead of 2 D for each token.
Costs    elu must be trained, Performer needs F ≫ D features to come near softmax where attention is sharp.
Paper    Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs, 2020, arXiv:2006.16236, section 3; Choromanski et
         al.: Rethinking Attention with Performers, 2020, arXiv:2009.14794, sections 2.3 and 2.4; Peng et al.: Random
         Feature Attention, 2021, arXiv:2103.02143, section 3.
Follows  their released code: 1e-6 on the denominator; Performer's maximum over a query's features and over all features
         and positions of the keys, then eps added to each exponential; the order cos, sin.
Symbols  B batch; H heads; T queries; S keys; D size of a value; F features; m rows of the projection. From
         `linear_attention` on q and k are features: q `[..., T, F]`, k `[..., S, F]`, v `[..., S, D]`.
Kernel   kernels/attention/linear.py
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.feature_attention import CHUNK, EPS, FEATURES, LinearAttend, crossing, layer_seconds
from minitfm.evaluate import perplexity
from minitfm.model import Attend, causal_attention
from minitfm.train import Settings, train


def elu_features(x: np.ndarray) -> np.ndarray:
    """elu(x) + 1, that is x + 1 above zero and exp(x) below: positive, like x. Source: Katharopoulos, equation 7."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def orthogonal_projection(count: int, D: int, seed: int = 0, chi: bool = True) -> np.ndarray:
    """`[count, D]` float64: each block of D rows orthogonal, the last one cut; drawn from `seed`.

    A row is as long as one of N(0, I) (`chi`), so that its distribution is that one; or √D. Raises ValueError unless
    count and D are positive. Source: Performer, section 2.4.
    """
    if min(count, D) < 1:
        raise ValueError(f"count and D must be at least 1, got {count} and {D}")
    generator = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-count // D)):
        directions, triangle = np.linalg.qr(generator.normal(size=(D, D)))
        blocks.append((directions * np.sign(np.diag(triangle))).T)  # the signs make it uniform over rotations
    lengths = np.linalg.norm(generator.normal(size=(count, D)), axis=1) if chi else np.full(count, math.sqrt(D))
    return lengths[:, None] * np.concatenate(blocks)[:count]


def favor_features(x: np.ndarray, projection: np.ndarray, query: bool, eps: float = 1e-4) -> np.ndarray:
    """Performer's positive features of queries or keys x `[..., T, D]`: `[..., T, m]`, for softmax(q·k / √D).

    With y = x / D^¼, w_i row i of projection `[m, D]`: (exp(w_i·y − |y|²/2 − c) + eps) / √m. c keeps exponentials from
    overflowing and cancels in the attention: for a query the largest of its own w_i·y, for keys the largest over
    features and positions, one for each leading index. Raises ValueError if x has fewer than two axes, is not finite,
    or if projection is not `[m, D]`. Source: Performer, lemma 1; stabilised as in the released code.
    """
    require_projection(x, projection)
    y = x * x.shape[-1] ** -0.25
    along = y @ projection.T  # [..., T, m]
    largest = along.max(axis=-1 if query else (-2, -1), keepdims=True)
    half_square = (y * y).sum(axis=-1, keepdims=True) / 2
    return (np.exp(along - half_square - largest) + eps) / math.sqrt(len(projection))


def trigonometric_features(x: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """[cos w_i·x, sin w_i·x] / √m of x `[..., D]` with projection `[m, D]`: `[..., 2 m]`. Source: RFA, equation 4."""
    require_projection(x, projection)
    along = x @ projection.T
    return np.concatenate((np.cos(along), np.sin(along)), axis=-1) / math.sqrt(len(projection))


def rfa_features(x: np.ndarray, projection: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    """RFA's features: trigonometric ones of √sharpness x / |x|; on average φ(q)·φ(k) ∝ exp(sharpness cos(q, k)).

    Zero stays zero. Raises ValueError as `trigonometric_features`. Source: RFA, section 3.1.
    """
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return trigonometric_features(math.sqrt(sharpness) * x / np.where(length > 0, length, 1), projection)


def require_projection(x: np.ndarray, projection: np.ndarray) -> None:
    """Raise ValueError unless x `[..., T, D]` is finite and projection is `[m, D]`."""
    if x.ndim < 2 or projection.ndim != 2 or projection.shape[1] != x.shape[-1]:
        raise ValueError(f"x must be [..., T, D] and projection [m, D], got {x.shape} and {projection.shape}")
    if not np.isfinite(x).all():
        raise ValueError("x must be finite: keys share one maximum, so a NaN or infinity would spread to all of them")


def require_features(q: np.ndarray, k: np.ndarray, v: np.ndarray, eps: float, chunk: int = 1) -> None:
    """TypeError for dtypes that differ or are no floats; ValueError for shapes that do not fit, T > S and options."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype != q.dtype or x.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name} must have q's dtype, float32 or float64; got {x.dtype}, q has {q.dtype}")
        if x.ndim < 2 or 0 in x.shape:
            raise ValueError(f"{name} must have at least two axes and not be empty, got shape {x.shape}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"need q [..., T, F], k [..., S, F], v [..., S, D]; got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(f"there are more queries than keys, {q.shape[-2]} and {k.shape[-2]}: the first would see none")
    if not 0 <= eps < math.inf or chunk < 1:
        raise ValueError(f"eps must be 0 or more and finite, chunk at least 1; got {eps} and {chunk}")


def linear_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, eps: float = EPS
) -> tuple[np.ndarray, np.ndarray]:
    """The parallel form, with all weights in memory: out `[..., T, D]` and total `[..., T]`, the denominators.

    weights = q kᵀ, 0 where causal hides a key (query i sees the keys j <= i + S − T); total = their sum + eps; out =
    weights v / total. Dtype of q. Raises as `require_features`. Source: Katharopoulos, equations 4 and 8.
    """
    require_features(q, k, v, eps)
    weights = q @ k.swapaxes(-1, -2)
    if causal:
        weights = np.tril(weights, k.shape[-2] - q.shape[-2])
    total = weights.sum(axis=-1) + eps
    return weights @ v / total[..., None], total


class State(NamedTuple):
    """All that linear attention keeps of the past: S `[..., F, D]`, the sum of k vᵀ, and z `[..., F]`, that of k."""

    S: np.ndarray
    z: np.ndarray


def empty_state(k: np.ndarray, v: np.ndarray) -> State:
    """The state before the first token of k `[..., S, F]` and v `[..., S, D]`: zeros."""
    return State(np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1], v.shape[-1])), np.zeros_like(k[..., 0, :]))


def advance(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, eps: float = EPS, gate: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """One token of the recurrent form, q and k `[..., F]`, v `[..., D]`: out `[..., D]` and the state after it.

    The token sees itself. S' = S + k vᵀ and z' = z + k; with a gate g `[...]` between 0 and 1, S' = g S + (1 − g) k vᵀ,
    z' = g z + (1 − g) k, which forgets (RFA-Gate). out = qᵀ S' / (q·z' + eps). The given state stays as it is.
    Source: Katharopoulos, equations 18 to 20; RFA, equation 6.
    """
    keep, add = (np.ones_like(q[..., :1]),) * 2 if gate is None else (gate[..., None], 1 - gate[..., None])
    z = keep * state.z + add * k
    S = keep[..., None] * state.S + add[..., None] * (k[..., :, None] * v[..., None, :])
    total = (q * z).sum(axis=-1, keepdims=True) + eps
    return (q[..., None, :] @ S)[..., 0, :] / total, State(S, z)


def chunked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chunk: int = CHUNK, eps: float = EPS
) -> tuple[np.ndarray, np.ndarray]:
    """`linear_attention`, causal and with T = S, chunk by chunk: out `[..., T, D]`, total `[..., T]`, dtype of q.

    Weights are made only inside a chunk of `chunk` tokens, the last perhaps shorter; what lies before comes from the
    state. Arguments stay as they are. Raises as `require_features`, and ValueError for T ≠ S or chunk below 1.
    """
    require_square(q, k, v, eps, chunk)
    out, total = np.empty_like(q, shape=v.shape), np.empty_like(q[..., 0])
    S, z = empty_state(k, v)
    for start in range(0, q.shape[-2], chunk):
        rows = slice(start, start + chunk)
        queries, keys, values = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        weights = np.tril(queries @ keys.swapaxes(-1, -2))
        total[..., rows] = weights.sum(axis=-1) + (queries @ z[..., None])[..., 0] + eps
        out[..., rows, :] = (weights @ values + queries @ S) / total[..., rows, None]
        S, z = S + keys.swapaxes(-1, -2) @ values, z + keys.sum(axis=-2)
    return out, total


def require_square(q: np.ndarray, k: np.ndarray, v: np.ndarray, eps: float, chunk: int) -> None:
    """`require_features`, and ValueError for T ≠ S."""
    require_features(q, k, v, eps, chunk)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"chunks need as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}")


def chunked_attention_backward(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, total: np.ndarray,
    chunk: int = CHUNK,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(dq, dk, dv) for dout `[..., T, D]`, the gradient of out; out and total as `chunked_attention` gave them.

    With g = dout / total and δ = g·out the weight of key s for query t has the gradient g_t·v_s − δ_t. Queries meet the
    state of the keys before them, keys the state R = Σ q gᵀ, r = Σ δ q of the queries after them. Raises as
    `chunked_attention`, and ValueError for a dout, out or total that does not fit.
    """
    require_square(q, k, v, 0.0, chunk)
    if not dout.shape == out.shape == v.shape or total.shape != q.shape[:-1]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and total {total.shape} do not fit v {v.shape}")
    g = dout / total[..., None]
    delta = (g * out).sum(axis=-1, keepdims=True)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    parts = [slice(start, start + chunk) for start in range(0, q.shape[-2], chunk)]
    S, z = empty_state(k, v)
    for i in parts:
        dweights = np.tril(g[..., i, :] @ v[..., i, :].swapaxes(-1, -2) - delta[..., i, :])
        dq[..., i, :] = dweights @ k[..., i, :] + g[..., i, :] @ S.swapaxes(-1, -2) - delta[..., i, :] * z[..., None, :]
        S, z = S + k[..., i, :].swapaxes(-1, -2) @ v[..., i, :], z + k[..., i, :].sum(axis=-2)
    R, r = empty_state(q, g)
    for i in reversed(parts):
        dweights = np.tril(g[..., i, :] @ v[..., i, :].swapaxes(-1, -2) - delta[..., i, :])
        weights = np.tril(q[..., i, :] @ k[..., i, :].swapaxes(-1, -2))
        dk[..., i, :] = dweights.swapaxes(-1, -2) @ q[..., i, :] + v[..., i, :] @ R.swapaxes(-1, -2) - r[..., None, :]
        dv[..., i, :] = weights.swapaxes(-1, -2) @ g[..., i, :] + k[..., i, :] @ R
        R, r = R + q[..., i, :].swapaxes(-1, -2) @ g[..., i, :], r + (delta[..., i, :] * q[..., i, :]).sum(axis=-2)
    return dq, dk, dv


def softmax_operations(T: int, D: int) -> int:
    """Of causal softmax attention, one head: q·k and weight times v, 2 each per channel of a visible pair; no exp."""
    return 2 * D * T * (T + 1)


def linear_operations(T: int, features: int, D: int, chunk: int = 1) -> int:
    """Of chunked linear attention, one head: the state updated and read by each token, and the pairs inside chunks.

    chunk 1 is the recurrent form. A ragged last chunk counts as a share of a full one.
    """
    return T * (4 * features * (D + 1) + (features + D) * (chunk + 1) * (chunk > 1))


def crossover(features: int, D: int, chunk: int = 1) -> int:
    """The shortest text for which linear attention needs fewer operations than softmax attention."""
    return linear_operations(1, features, D, chunk) // (2 * D)


def state_bytes(features: int, D: int, itemsize: int = 4) -> int:
    """Of the decode state (S, z) of one head, whatever the length."""
    return itemsize * features * (D + 1)


def cache_bytes(length: int, D: int, itemsize: int = 4) -> int:
    """Of one head's keys and values, which softmax attention keeps of all `length` tokens."""
    return itemsize * 2 * length * D


def make_attend(features: str = "elu", count: int = 128, seed: int = 0, eps: float = 0.0) -> LinearAttend:
    """Linear attention for the model, `Transformer(config, attend=make_attend())`; see `LinearAttend`."""
    return LinearAttend(features, count, lambda m, D: torch.from_numpy(orthogonal_projection(m, D, seed)), eps)


def options(parser) -> None:
    """Options of `python -m chapters run linear`."""
    parser.add_argument("--features", choices=FEATURES, default="favor", help="default favor, the Performer's")
    parser.add_argument("--count", type=int, default=128, help="random features of favor and rfa (default 128)")
    parser.add_argument("--eps", type=float, default=0.0, help="added to favor's exponentials; 1e-6 in released code")


def seams(args: argparse.Namespace) -> dict[str, Attend]:
    """What `python -m chapters run linear` puts into the model; --seed draws the random features."""
    return {"attend": make_attend(args.features, args.count, args.seed, args.eps)}


def perplexities(lab: Lab, counts: list[int], steps: int, seed: int) -> dict[str, float]:
    """Of the base model with each attention in place of softmax, over its own."""
    text = lab.validation[: 64 if lab.full else 32]
    base = lab.once("linear: base perplexity", lambda: perplexity(lab.model(), text))
    models = {f"Performer, {m} features": lab.model(make_attend("favor", m, seed)) for m in counts}
    models |= {"Performer, eps 1e-6": lab.model(make_attend("favor", counts[-1], seed, 1e-6))}
    models |= {"RFA": lab.model(make_attend("rfa", counts[-1], seed)), "elu": lab.model(make_attend())}
    models |= {"elu, trained": lab.model(make_attend())}
    recipe = Settings(steps, batch=8, length=lab.length, optimizer="adamw", learning_rate=1e-3, seed=seed)
    train(models["elu, trained"], lab.train_stream, recipe)
    return {f"perplexity ratio, {name}": perplexity(model, text) / base for name, model in models.items()}


def draw(lengths: list[int], times: dict[str, list[float]], counts: list[int], numbers: dict[str, float]) -> Figure:
    """Left: time by length. Right: perplexity by features."""
    fig, (left, right) = panels(2, height=3.4)
    for (name, measured), role in zip(times.items(), ("baseline", "second", "method"), strict=True):
        left.plot(lengths, np.multiply(measured, 1e3), **series(role), label=name)
    left.set(xlabel="tokens", ylabel="ms for one layer")
    ratios = [numbers[f"perplexity ratio, Performer, {m} features"] for m in counts]
    right.plot(counts, ratios, **series("method"), label="Performer")
    for name, role in (("elu", "muted"), ("elu, trained", "second")):
        right.plot(counts, [numbers[f"perplexity ratio, {name}"]] * len(counts), **series(role), label=name)
    right.plot(counts, np.ones(len(counts)), **series("reference"), label="softmax")
    right.set(xlabel="random features", ylabel="perplexity, softmax = 1")
    for axes in (left, right):
        axes.loglog()
        legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """Linear attention overtakes softmax at a length that grows with F; what that costs in the base model.

    Holds if elu's features overtake within the lengths measured, more of Performer's features lose less perplexity than
    few, and training wins back some of what elu loses.
    """
    D, counts = lab.config.head_dim, [16, 64, 256] if lab.full else [16, 256]
    lengths, steps = [2**n for n in range(6, 13 if lab.full else 12)], 150 if lab.full else 40
    ways = {"softmax": causal_attention, "elu": make_attend(), "Performer, 256": make_attend("favor", 256)}
    times = {name: [layer_seconds(lab, way, n) for n in lengths] for name, way in ways.items()}
    met = {name: crossing(lengths, times[name], times["softmax"]) for name in ("elu", "Performer, 256")}
    runs = [perplexities(lab, counts, steps, seed) for seed in lab.seeds]
    numbers = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    ratio = {name.removeprefix("perplexity ratio, "): value for name, value in numbers.items()}
    few, many = (ratio[f"Performer, {m} features"] for m in (counts[0], counts[-1]))
    numbers |= {f"crossover in operations, {f} features": crossover(f, D, CHUNK) for f in (D, 256)}
    numbers |= {f"crossover in time, {name}": value for name, value in met.items() if value is not None}
    numbers |= {"crossover in decode bytes, elu": state_bytes(D, D) / cache_bytes(1, D)}
    first, second = ("no length measured" if x is None else f"{x:.0f} tokens" for x in met.values())
    sentence = (
        f"On this CPU linear attention overtakes softmax at {first} with elu's {D} features and at {second} with 256 "
        f"of Performer's (counted: {crossover(D, D, CHUNK)} and {crossover(256, D, CHUNK)}); in the base model "
        f"{counts[0]} and {counts[-1]} Performer features multiply perplexity by {few:.1f} and {many:.1f} (by "
        f"{ratio['Performer, eps 1e-6']:.0f} with the released eps), elu by {ratio['elu']:.1f}, after {steps} steps "
        f"of training by {ratio['elu, trained']:.1f}."
    )
    holds = met["elu"] is not None and many < few and ratio["elu, trained"] < ratio["elu"]
    setting = f"{lab.config.heads} heads of {D}; AdamW 1e-3, batch 8 × {lab.length}; seeds {lab.seeds}"
    return Claim(sentence, holds, numbers, draw(lengths, times, counts, numbers), setting)
