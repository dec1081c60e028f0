"""LSH attention: sort the tokens by a random hash, and let each attend to its neighbours in that order.

A softmax is mostly made by the keys that point where the query points. If queries and keys are the same vectors, x,
such pairs can be found without computing all scores: a random rotation R sends x to the axis that it then lies closest
to, and two vectors at a small angle rarely land on different ones. That axis, with its sign, is the bucket. Tokens
sorted by bucket are cut into chunks of equal size, each of which sees itself and the chunk before it:

    bucket(x) = argmax [xR; −xR],    score_ij = scale x_i·x_j / |x_j|,    outʳ, lseʳ = softmax attention in round r
    out = Σ_r exp(lseʳ − lse) outʳ,    lse = log Σ_r exp(lseʳ)

One round misses a neighbour that fell on the other side of an edge; several rounds, each with rotations of its own, are
merged by their log-sum-exps. A pair met in several rounds then counts several times, unless its score is lowered by the
log of how often (`dedup`): the result is exact attention over the union of what the rounds have seen.

Saves    scores: 2 chunk rounds for each query instead of T; memory likewise. Sorting is O(T log T).
Costs    queries and keys must be one projection, so the model is trained that way; hashing into T / chunk buckets is a
         product of T D T / chunk a round, still quadratic, 1 / chunk as steep. Causal attention hides what comes later,
         but later tokens shift the chunks: they help to decide which earlier keys are seen.
Paper    Kitaev, Kaiser, Levskaya: Reformer: The Efficient Transformer, 2020, arXiv:2001.04451, sections 2 and A.
Follows  Trax and its port reformer-pytorch: the stable sort; chunks over all rounds in one row, so that the first of a
         round looks back into the round before, and the first of all at the last of all (`across`; else buckets see
         only themselves); a token's score with itself is −5e4, so that it counts only where nothing else does. Their
         count of repeats forgets such looks into another round, whose score it raises by log 1e9; here they count.
Symbols  T tokens; D head size; R rounds; qk, v, out `[..., T, D]`; buckets `[..., R, T]`; rotations `[..., D, R, n/2]`
         for n buckets; lse `[..., T]`. Leading axes are batch and heads.
Kernel   kernels/attention/lsh.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from chapters.attention.flash_decoding import combine
from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.hashed_attention import CHUNK, HASHES, SELF, LshAttend, exact_attend, recall
from minitfm.evaluate import perplexity
from minitfm.model import Attend
from minitfm.train import Settings, train


def hash_buckets(qk: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """The bucket of each token in each round, int64 `[..., R, T]` from 0 to n − 1.

    qk `[..., T, D]`, of any length: only directions count. rotations `[D, R, n/2]`, or with leading axes that broadcast
    with those of qk. With y = qk rotations of one round, `[..., T, n/2]`, the bucket is the index of the largest of the
    n numbers [y; −y], the first of equals. Arguments stay as they are. Raises ValueError if the shapes do not fit, one
    of the two is empty or qk is not finite. Source: Reformer, section 2.
    """
    if qk.ndim < 2 or rotations.ndim < 3 or rotations.shape[-3] != qk.shape[-1] or 0 in (*qk.shape, *rotations.shape):
        raise ValueError(f"qk must be [..., T, D] and rotations [..., D, R, n/2], got {qk.shape} and {rotations.shape}")
    if not np.isfinite(qk).all():
        raise ValueError("qk must be finite: a NaN or infinity has no direction to hash")
    along = np.einsum("...td,...drn->...rtn", qk, rotations)
    return np.concatenate((along, -along), axis=-1).argmax(axis=-1)


def chunk_pairs(
    buckets: np.ndarray, chunk: int, causal: bool = True, across: bool = True
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(round, rows `[..., m]`, columns `[..., c]`, visible bool `[..., m, c]`) of every chunk, in order.

    buckets `[..., R, T]`, integers from 0 on. In each round the positions 0 .. T − 1 are sorted by bucket, those of one
    bucket by position, and cut into chunks of `chunk`, the last of each round perhaps shorter; rows are the positions
    in a chunk. columns are the same and then those of the chunk before it; before the first chunk of a round that is
    the last of the round before, before the very first the very last. A chunk that is the only one has no other before
    it. visible: which columns a row sees. All, but if causal none at a later position, and unless `across` none of
    another bucket or round. Raises as `require_buckets`. Source: Reformer, section 2; reformer-pytorch, LSHAttention.
    """
    require_buckets(buckets, chunk)
    (R, T), ranks = buckets.shape[-2:], np.unique(buckets, return_inverse=True)[1].reshape(buckets.shape)
    labels = ranks + (ranks.max() + 1) * np.arange(R)[:, None]  # no two rounds share one; of ranks, none overflows
    order = np.argsort(labels, axis=-1, kind="stable")  # [..., R, T]
    labels = np.take_along_axis(labels, order, axis=-1)
    parts = [(r, slice(start, start + chunk)) for r in range(R) for start in range(0, T, chunk)]
    for g, (r, part) in enumerate(parts):
        reach = [(r, part), parts[g - 1]] if len(parts) > 1 else [(r, part)]
        columns, theirs = (np.concatenate([x[..., s, p] for s, p in reach], axis=-1) for x in (order, labels))
        rows, own = order[..., r, part], labels[..., r, part]
        visible = np.ones((*rows.shape, columns.shape[-1]), dtype=bool)
        if causal:
            visible &= columns[..., None, :] <= rows[..., :, None]
        if not across:
            visible &= theirs[..., None, :] == own[..., :, None]
        yield r, rows, columns, visible


def require_buckets(buckets: np.ndarray, chunk: int) -> None:
    """TypeError unless buckets are integers; ValueError unless `[..., R, T]`, not empty, from 0 on, and chunk >= 1."""
    if not np.issubdtype(buckets.dtype, np.integer):
        raise TypeError(f"buckets must be integers, got {buckets.dtype}")
    if buckets.ndim < 2 or buckets.size == 0 or buckets.min() < 0:
        raise ValueError(f"buckets must be [..., R, T], not empty and not negative, got shape {buckets.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def times_seen(buckets: np.ndarray, chunk: int, causal: bool = True, across: bool = True) -> np.ndarray:
    """How often each query meets each key in all rounds, int64 `[..., T, T]`: 0 for a pair that is missed.

    Arguments and errors as in `chunk_pairs`. Source: N_ij of Reformer, section A.
    """
    require_buckets(buckets, chunk)
    T, flat = buckets.shape[-1], buckets.reshape(-1, *buckets.shape[-2:])
    seen, head = np.zeros((len(flat), T, T), dtype=np.int64), np.arange(len(flat))[:, None, None]
    for _, rows, columns, visible in chunk_pairs(flat, chunk, causal, across):
        np.add.at(seen, (head, rows[:, :, None], columns[:, None, :]), visible)  # a column may come twice
    return seen.reshape(*buckets.shape[:-2], T, T)


def checked_scale(qk: np.ndarray, v: np.ndarray, scale: float | None) -> float:
    """The scale, 1/√D for None. TypeError for dtypes, ValueError for shapes, numbers or a scale that cannot be."""
    if qk.dtype not in (np.float32, np.float64) or v.dtype != qk.dtype:
        raise TypeError(f"qk and v must both be float32 or float64, got {qk.dtype} and {v.dtype}")
    if qk.ndim < 2 or qk.size == 0 or v.shape != qk.shape:
        raise ValueError(f"qk and v must both be [..., T, D] and not empty, got {qk.shape} and {v.shape}")
    if not np.isfinite(qk).all():
        raise ValueError("qk must be finite: a NaN or infinity would spread to every token of its chunk")
    scale = 1 / math.sqrt(qk.shape[-1]) if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def shared_scores(qk: np.ndarray, rows: np.ndarray, columns: np.ndarray, scale: float) -> np.ndarray:
    """Scores `[..., m, c]` of the tokens `rows` `[..., m]` with `columns` `[..., c]`: keys of length 1, self −5e4.

    A key shorter than 1e-12 is divided by that: one of zeros scores 0.
    """
    queries, keys = (np.take_along_axis(qk, at[..., None], axis=-2) for at in (rows, columns))
    keys = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    return np.where(rows[..., :, None] == columns[..., None, :], SELF, scores)


def attend_visible(scores: np.ndarray, visible: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention `[..., m, D]` and its lse `[..., m]` for scores and visible `[..., m, c]`; no row is empty."""
    scores = np.where(visible, scores, -np.inf)
    maximum = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total @ values, (maximum + np.log(total))[..., 0]


def shared_attention(
    qk: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What is approximated, with all T × T scores: queries and keys are one. Arguments as in `lsh_attention`."""
    scale, T = checked_scale(qk, v, scale), qk.shape[-2]
    everyone = np.broadcast_to(np.arange(T), qk.shape[:-1])
    visible = np.tri(T, dtype=bool) if causal else np.ones((T, T), dtype=bool)
    return attend_visible(shared_scores(qk, everyone, everyone, scale), visible, v)


def lsh_attention(
    qk: np.ndarray,
    v: np.ndarray,
    buckets: np.ndarray,
    chunk: int = CHUNK,
    causal: bool = True,
    across: bool = True,
    dedup: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """out `[..., T, D]` and lse `[..., T]` of all rounds: attention in the chunks of `chunk_pairs`, merged.

    qk, v `[..., T, D]`, float32 or float64, as are out and lse; buckets `[..., R, T]` with the leading axes of qk. The
    score of query i with key j is scale qk_i·qk_j / |qk_j|, scale 1/√D for None, and SELF if i = j. In each round a
    query attends to what is visible to it in its chunk; rounds are merged by their log-sum-exps, and lse is that of all
    scores that the rounds saw, those met in N rounds N times. `dedup`: these are each lowered by log N first, N the
    `times_seen` of the pair. Arguments stay as they are. Raises TypeError and ValueError as `checked_scale` and
    `require_buckets`, and ValueError for buckets that do not fit qk. Source: Reformer, section A.
    """
    scale = checked_scale(qk, v, scale)
    require_buckets(buckets, chunk)
    if (*buckets.shape[:-2], buckets.shape[-1]) != qk.shape[:-1]:
        raise ValueError(f"buckets must be [..., R, T] to fit qk {qk.shape}, got {buckets.shape}")
    counts = times_seen(buckets, chunk, causal, across) if dedup else None
    outs = np.empty_like(qk, shape=(buckets.shape[-2], *qk.shape))  # [R, ..., T, D]
    lses = np.empty_like(outs[..., 0])
    for r, rows, columns, visible in chunk_pairs(buckets, chunk, causal, across):
        scores = shared_scores(qk, rows, columns, scale)
        if counts is not None:
            repeats = np.take_along_axis(counts, rows[..., None], axis=-2)  # [..., m, T]
            repeats = np.take_along_axis(repeats, columns[..., None, :], axis=-1)
            scores = scores - np.log(np.maximum(repeats, 1)).astype(qk.dtype)
        out, lse = attend_visible(scores, visible, np.take_along_axis(v, columns[..., None], axis=-2))
        np.put_along_axis(outs[r], rows[..., None], out, axis=-2)
        np.put_along_axis(lses[r], rows, lse, axis=-1)
    return combine(outs, lses)


def exact_operations(T: int, D: int) -> int:
    """Of causal attention, one head: a score and a weighted value, 2 each per channel of a visible pair."""
    return 2 * D * T * (T + 1)


def lsh_operations(T: int, D: int, chunk: int, rounds: int, buckets: int) -> int:
    """Of LSH attention, one head: rotations into `buckets`, and all pairs of two chunks, visible or not."""
    return rounds * T * (D * buckets + 4 * D * min(2 * chunk, rounds * T))


def options(parser) -> None:
    """Options of `python -m chapters run lsh`."""
    parser.add_argument("--rounds", type=int, default=8, help="hash rounds (default 8)")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens of a chunk (default {CHUNK})")
    parser.add_argument("--hashes", choices=HASHES, default="lsh", help="none: every chunk a window of the text")
    parser.add_argument("--repeats", action="store_true", help="let pairs met in several rounds count several times")


def seams(args: argparse.Namespace) -> dict[str, Attend]:
    """What `python -m chapters run lsh` puts into the model, whose queries it ignores; --seed draws the rotations."""
    return {"attend": LshAttend(args.rounds, args.chunk, args.hashes, not args.repeats, seed=args.seed)}


def measure(lab: Lab, rounds: list[int], chunk: int, steps: int, seed: int) -> dict[str, float]:
    """The base model, trained on for `steps` with its keys as queries; then LSH in place of its full attention."""
    text = lab.validation[: 64 if lab.full else 16]
    trained = lab.model(attend=exact_attend)
    recipe = Settings(steps, batch=8, length=lab.length, optimizer="adamw", learning_rate=1e-3, seed=seed)
    train(trained, lab.train_stream, recipe)

    def loss(attend: Attend) -> float:
        model = lab.model(attend=attend)
        model.load_state_dict(trained.state_dict())
        return perplexity(model, text)

    keys = []
    loss(lambda q, k, v: (keys.append(k), exact_attend(q, k, v))[1])
    exact = loss(exact_attend)
    numbers = {"perplexity ratio, keys as queries": exact / perplexity(lab.model(), text)}
    ways = {f"{kind}, rounds {n}": (kind, n) for kind in ("lsh", "random") for n in rounds} | {"window": ("none", 1)}
    for name, (kind, n) in ways.items():
        attend = LshAttend(n, chunk, kind, seed=seed)
        mass, top, keys_seen = recall(keys, attend)
        numbers |= {f"mass, {name}": mass, f"share of keys, {name}": keys_seen}
        if kind != "random":
            numbers |= {f"top key, {name}": top, f"perplexity ratio, {name}": loss(attend) / exact}
    return numbers


def draw(rounds: list[int], numbers: dict[str, float]) -> Figure:
    """Left: share of the softmax found, by rounds. Right: perplexity."""
    fig, (left, right) = panels(2)
    for kind, role, label in (("lsh", "method", "LSH"), ("random", "muted", "random buckets")):
        left.plot(rounds, [numbers[f"mass, {kind}, rounds {n}"] for n in rounds], **series(role), label=label)
    right.plot(rounds, [numbers[f"perplexity ratio, lsh, rounds {n}"] for n in rounds], **series("method"), label="LSH")
    for axes, what in ((left, "mass"), (right, "perplexity ratio")):
        flat = [numbers[f"{what}, window"]] * len(rounds)
        axes.plot(rounds, flat, **series("baseline"), label="window, no hash")
        axes.plot(rounds, [1.0] * len(rounds), **series("reference"), label="exact")
        axes.set_xscale("log", base=2)
        axes.set_xticks(rounds, labels=map(str, rounds))
        axes.set(xlabel="hash rounds")
    left.set(ylabel="share of softmax found")
    right.set(ylabel="perplexity, exact = 1")
    legend(right, handles=left.get_lines(), loc="upper right", fontsize=9)
    return fig


def claim(lab: Lab) -> Claim:
    """More rounds find more of the exact attention, and 8 almost match it.

    Holds if the share of the softmax found rises with every doubling of the rounds and lies above that of random
    buckets, which see as many keys, and if 8 rounds stay within 5% of the perplexity of exact attention. A window of
    the same chunks, without any hash, is measured beside it and decides nothing.
    """
    rounds, chunk, steps = [1, 2, 4, 8], 8, 120 if lab.full else 20
    runs = [measure(lab, rounds, chunk, steps, seed) for seed in lab.seeds]
    numbers = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    mass = {kind: [numbers[f"mass, {kind}, rounds {n}"] for n in rounds] for kind in ("lsh", "random")}
    ratio = {n: numbers[f"perplexity ratio, lsh, rounds {n}"] for n in rounds}
    window = numbers["mass, window"], numbers["perplexity ratio, window"]
    beats = [n for n in rounds if ratio[n] < window[1]]
    holds = all(np.diff(mass["lsh"]) > 0) and all(np.greater(mass["lsh"], mass["random"])) and ratio[rounds[-1]] <= 1.05
    found = ", ".join(f"{100 * share:.0f}" for share in mass["lsh"])
    sentence = (
        f"In the base model, trained on with keys as queries (which alone multiplies perplexity by "
        f"{numbers['perplexity ratio, keys as queries']:.1f}), 1, 2, 4 and 8 rounds of LSH find {found}% of the "
        f"softmax (random buckets {100 * mass['random'][0]:.0f} to {100 * mass['random'][-1]:.0f}%) and multiply the "
        f"perplexity of exact attention by {ratio[1]:.2f}, {ratio[2]:.2f}, {ratio[4]:.2f} and {ratio[8]:.2f}; but a "
        f"window of two such chunks of the text finds {100 * window[0]:.0f}% at {window[1]:.2f}, which LSH beats "
        f"{f'from {beats[0]} rounds on' if beats else 'at no number of rounds'}."
    )
    setting = f"{lab.length} tokens, chunks of {chunk}, {steps} steps of AdamW 1e-3, batch 8; seeds {lab.seeds}"
    return Claim(sentence, bool(holds), numbers, draw(rounds, numbers), setting)
