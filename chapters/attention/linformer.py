"""Linformer: mix all keys, and all values, into a few slots, so that a query attends to slots instead of to tokens.

If the matrix of attention weights is close to low rank, T × S weights are more than it takes. Linformer projects keys
and values along the sequence, by learned matrices E and F that are the same for every text, and attends to the result:

    keys = E K,  values = F V      [slots, S] times [S, D]
    out = softmax(q keysᵀ / √D) values

Why it is not causal: a slot is a sum over all positions, the last one included, and every query reads every slot. A
mask over the slots cannot help, since the first slot holds the last token already. In training, a next-token loss is
then low because the next token is in the input; when writing, it is not there. What does work is to project only what
lies wholly in the past: cut the text into blocks, make slots of each block that is finished, and attend to those and,
exactly, to the keys of the own block so far (`blockwise_attention`).

Saves    4 D slots (S + T) operations a head instead of 4 D T S, linear in the length, and T × slots weights instead of
         T × S: less from S = 2 slots on, with T = S. Blockwise: slots / block of the pairs, still quadratic.
Costs    E and F must be trained, for one largest length; positions that matter for one text only share slots with all
         others; no causal form and no cache: each new token changes every slot.
Paper    Wang, Li, Khabsa, Fang, Ma: Linformer: Self-Attention with Linear Complexity, 2020, arXiv:2006.04768, section
         4; figure 1 is the spectrum. Slots of the past with exact near keys: Zhu et al.: Long-Short Transformer, 2021,
         arXiv:2107.02192, section 3, where the projection depends on the keys; here it is the E and F of a block.
Follows  the authors' code: E and F have no bias, and a text shorter than they are wide takes their first S columns. It
         projects the layer's input before the key and value layers; without biases in these, as in Llama, that is the
         same. Padding counts as zero, before it is projected; once in the slots it cannot be masked.
Symbols  B batch; H query heads; Hkv key heads, query head h reads key head h // (H / Hkv); T queries; S keys; D size of
         a head. q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; e, f `[slots, L]` for all heads or `[Hkv, slots, L]`, one for
         each, L >= S; f None: values are projected by e, too. One e for all layers or one a layer is the caller's
         choice. slots is the paper's k.
Kernel   kernels/attention/linformer.py
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.attention.flash import attention, checked_scale, group_heads
from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.projected_attention import (
    BlockwiseAttention,
    SlotAttention,
    error,
    fit,
    layer_inputs,
    leak,
    mean_of,
    without_mask,
)
from minitfm.model import Attend


def require_projection(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> None:
    """TypeError for an e without x's dtype or a mask that is not bool; ValueError for shapes that do not fit x.

    Also ValueError for keys or values that are not finite where no mask hides them: one would spread to all slots.
    """
    if e.dtype != x.dtype or x.dtype not in (np.float32, np.float64):
        raise TypeError(f"e and f must have the dtype of k and v, float32 or float64; got {e.dtype} and {x.dtype}")
    if x.ndim != 4 or 0 in x.shape or e.ndim not in (2, 3) or 0 in e.shape:
        raise ValueError(f"need [B, Hkv, S, D] and e [slots, L] or [Hkv, slots, L], got {x.shape} and {e.shape}")
    if e.shape[-1] < x.shape[2] or (e.ndim == 3 and len(e) != x.shape[1]):
        raise ValueError(f"e must have {x.shape[2]} columns or more, and one matrix or {x.shape[1]}; got {e.shape}")
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"mask must be bool, True for a token and False for padding, got {mask.dtype}")
    if mask is not None and mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"mask must be [B, S] = {(x.shape[0], x.shape[2])}, got {mask.shape}")
    if not np.isfinite(x if mask is None else np.where(mask[:, None, :, None], x, 0)).all():
        raise ValueError("keys and values must be finite: every slot holds every position, so that one NaN spoils all")


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The slots of keys or values x `[B, Hkv, S, D]`: slot i of a head is Σ_s e[i, s] x_s, `[B, Hkv, slots, D]`.

    e `[slots, L]` for all heads or `[Hkv, slots, L]`, one for each; of its L >= S columns the first S are used. Where
    mask `[B, S]` is False lies padding: it counts as zero, whatever it holds, NaN included. x, e and the result have
    one dtype, float32 or float64; arguments stay as they are. Raises as `require_projection`. Source: Linformer,
    equation 7; the first columns and the zeros as in the released code.
    """
    require_projection(x, e, mask)
    if mask is not None:
        x = np.where(mask[:, None, :, None], x, 0)
    return e[..., : x.shape[2]] @ x


def attend_slots(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float | None = None) -> np.ndarray:
    """softmax(scale q keysᵀ) values: plain attention without a mask, to slots `[B, Hkv, slots, D]`."""
    return attention(q, keys, values, causal=False, scale=scale)[0]


def linformer_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, e: np.ndarray, f: np.ndarray | None = None,
    mask: np.ndarray | None = None, scale: float | None = None,
) -> np.ndarray:  # fmt: skip
    """out `[B, H, T, D]`: every query attends to all slots, and through them to every token, later ones included.

    Arguments as in the file's symbols; mask `[B, S]` as in `project`; scale 1/√D if None. A text that is all padding
    gets out 0. Raises as `require_projection` and `attention`, and ValueError where e and f make not as many slots.
    """
    keys, values = project(k, e, mask), project(v, e if f is None else f, mask)
    if keys.shape[2] != values.shape[2]:
        raise ValueError(f"e and f must make as many slots, got {keys.shape[2]} and {values.shape[2]}")
    return attend_slots(q, keys, values, scale)


def block_slots(x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Slots of the whole blocks of x `[B, Hkv, S, D]`; e `[slots, block]`, or `[Hkv, slots, block]`.

    `[B, Hkv, blocks · slots, D]`, those of one block side by side; what is left over at the end of x is in none.
    """
    (B, Hkv, S, D), (slots, block) = x.shape, e.shape[-2:]
    whole = x[:, :, : S // block * block].reshape(B, Hkv, S // block, block, D)
    made = (e[:, None] if e.ndim == 3 else e) @ whole  # [B, Hkv, blocks, slots, D]
    return made.reshape(B, Hkv, S // block * slots, D)


def require_blocks(q: np.ndarray, k: np.ndarray, e: np.ndarray, f: np.ndarray) -> None:
    """TypeError for an e or f without q's dtype; ValueError unless both are `[slots, block]` or that for each head.

    Also ValueError for more queries than keys.
    """
    for name, x in {"e": e, "f": f}.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, {q.dtype}, got {x.dtype}")
        if x.ndim not in (2, 3) or 0 in x.shape or (x.ndim == 3 and len(x) != k.shape[1]):
            raise ValueError(f"{name} must be [slots, block] or [{k.shape[1]}, slots, block], got {x.shape}")
    if e.shape[-2:] != f.shape[-2:]:
        raise ValueError(f"e and f must have one block and as many slots, got {e.shape} and {f.shape}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"there are more queries than keys, {q.shape[2]} and {k.shape[2]}: the first would see none")


def blockwise_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, e: np.ndarray, f: np.ndarray | None = None, scale: float | None = None
) -> np.ndarray:
    """The causal form, out `[B, H, T, D]`: one softmax over the slots of all finished blocks and the own block so far.

    e, f `[slots, block]` or `[Hkv, slots, block]`, f None: e. The keys are cut into blocks from position 0 on. Query i
    stands at position p = i + S − T in block ⌊p / block⌋, and sees the slots e makes of the keys (f of the values) of
    each block before that one, and the keys of its own block up to p. Arguments stay as they are. Raises as
    `checked_scale` and `require_blocks`. Source: after Long-Short Transformer, section 3.
    """
    scale, f = checked_scale(q, k, v, scale), e if f is None else f
    require_blocks(q, k, e, f)
    (T, S), (slots, block) = (q.shape[2], k.shape[2]), e.shape[-2:]
    position, key = np.arange(S - T, S)[:, None], np.arange(S)
    own = (key // block == position // block) & (key <= position)
    finished = np.arange(S // block * slots) < position // block * slots
    queries, keys, values = group_heads(
        q, np.concatenate((block_slots(k, e), k), axis=2), np.concatenate((block_slots(v, f), v), axis=2)
    )
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    scores = np.where(np.concatenate((finished, own), axis=1), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))  # a query sees itself: the maximum is finite
    return (weights @ values / weights.sum(axis=-1, keepdims=True)).reshape(q.shape)


def rank_share(weights: np.ndarray, rank: int) -> np.ndarray:
    """`[...]`: the sum of the `rank` largest singular values of each matrix `[..., T, S]` over the sum of all of them.

    1 for a matrix of that rank; for zeros, too, without a warning. Raises ValueError for a rank below 1 or above
    min(T, S), fewer than two axes, and numbers that are not finite. Source: Linformer, figure 1.
    """
    if weights.ndim < 2 or not 1 <= rank <= min(weights.shape[-2:]):
        raise ValueError(f"rank must be from 1 to the smaller side of [..., T, S], got {rank} for {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite")
    values = np.linalg.svd(weights, compute_uv=False)  # falling
    total = values.sum(axis=-1)
    return np.where(total > 0, values[..., :rank].sum(axis=-1) / np.where(total > 0, total, 1), 1)


def nearest_of_rank(weights: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrices of that rank to weights `[..., T, S]`.

    Attention to as many slots gives weights softmax(q keysᵀ) F of no larger rank: they cannot be nearer.
    """
    left, values, right = np.linalg.svd(weights, full_matrices=False)
    return left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]


def segment_means(slots: int, length: int) -> np.ndarray:
    """`[slots, length]`: slot i is the mean of the i-th of `slots` runs of positions; where training starts here.

    Raises ValueError unless 1 <= slots <= length.
    """
    if not 1 <= slots <= length:
        raise ValueError(f"slots must be from 1 to the length {length}, got {slots}")
    runs = (np.arange(length) * slots // length == np.arange(slots)[:, None]).astype(float)
    return runs / runs.sum(axis=1, keepdims=True)


def gaussian(slots: int, length: int, seed: int = 0) -> np.ndarray:
    """`[slots, length]` of N(0, 1 / slots): the projection in the proofs. Source: Linformer, theorem 1."""
    return np.random.default_rng(seed).normal(size=(slots, length)) / math.sqrt(slots)


def softmax_operations(T: int, S: int, D: int) -> int:
    """Of full attention, one head: q·k and weight times value, 2 each for a channel of a pair; no exp."""
    return 4 * T * S * D


def linformer_operations(T: int, S: int, D: int, slots: int) -> int:
    """Of Linformer, one head: projecting keys and values, then attention to the slots."""
    return 4 * S * slots * D + 4 * T * slots * D


def crossover(slots: int) -> int:
    """The shortest text, T = S, for which Linformer needs fewer operations than full attention."""
    return 2 * slots + 1


def as_tensors(slots: int, length: int, heads: int | None = None, share_kv: bool = False) -> tuple[Tensor, ...]:
    """(e, f), or (e,) to share it with the values: segment means, float32, `[slots, length]` or one for each head."""
    e = torch.from_numpy(segment_means(slots, length)).float()
    e = e if heads is None else e.expand(heads, -1, -1)
    return (e,) if share_kv else (e, e)


def options(parser) -> None:
    """Options of `python -m chapters run linformer`."""
    parser.add_argument("--block", type=int, default=32, help="tokens of a block (default 32); 0: all, which peeks")
    parser.add_argument("--slots", type=int, default=8, help="slots of a block, or of the text (default 8)")


def seams(args: argparse.Namespace) -> dict[str, Attend]:
    """What `python -m chapters run linformer` puts into the model: untrained, slots are means of runs of tokens."""
    if args.block < 0:
        raise ValueError(f"--block must be 0 or more, got {args.block}")
    if args.block:
        return {"attend": BlockwiseAttention(*as_tensors(args.slots, args.block)).forward}
    return {"attend": lambda q, k, v: SlotAttention(*as_tensors(min(args.slots, k.shape[2]), k.shape[2]))(q, k, v)}


def spectra(lab: Lab, ranks: list[int]) -> dict[str, list[float]]:
    """For each rank the share of the singular values, mean over texts, heads and layers, of three kinds of matrices.

    "nothing hidden": the model's softmax without its mask, as Linformer attends. "causal": with it. "shuffled": the
    first with each row in an order of its own, the same weights without structure.
    """
    generator = np.random.default_rng(0)
    found: dict[str, list] = {"nothing hidden": [], "causal": [], "shuffled": []}
    for q, k, _ in layer_inputs(lab, lab.validation[: 8 if lab.full else 2]):
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).double()
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen = scores.softmax(-1).numpy()
        past = scores.masked_fill(hidden, -math.inf).softmax(-1).numpy()
        for name, weights in zip(found, (seen, past, generator.permuted(seen, axis=-1)), strict=True):
            found[name].append([rank_share(weights, rank).mean() for rank in ranks])
    return {name: np.mean(layers, axis=0).tolist() for name, layers in found.items()}


def output_errors(lab: Lab, slots: int, steps: int, seed: int) -> dict[str, float]:
    """How far outputs with so many slots are from full attention's, relative, mean over layers, on texts not fitted."""
    T, found = lab.length, []
    known = lab.once(("linformer", seed), lambda: layer_inputs(lab, lab.calibration(seed, 256 if lab.full else 64)))
    new = lab.once("linformer: new texts", lambda: layer_inputs(lab, lab.validation[:8]))
    for layer, (q, k, v) in zip(known, new, strict=True):
        trained = SlotAttention(*as_tensors(slots, T, lab.config.heads))
        fit(trained, layer, steps, seed)
        ways = (SlotAttention(torch.from_numpy(gaussian(slots, T, seed)).float()), SlotAttention(*as_tensors(slots, T)))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).double().numpy()
        best, exact = torch.from_numpy(nearest_of_rank(weights, slots)).float() @ v, without_mask(q, k, v)
        with torch.no_grad():
            found.append([error(way(q, k, v), exact) for way in (*ways, trained)] + [error(best, exact)])
    names = ("drawn at random", "means of runs", "trained", "best of that rank")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def draw(ranks: list[int], shares: dict[str, list[float]], errors: dict[int, dict[str, float]]) -> Figure:
    """Left: how much of the matrices lies in their first singular values. Right: error of the outputs by slots."""
    fig, (left, right) = panels(2, height=3.2)
    for (name, share), role in zip(shares.items(), ("method", "second", "muted"), strict=True):
        left.plot(ranks, share, **series(role), label=name)
    left.set(xlabel="rank", ylabel="share of the singular values", ylim=(0, 1.02))
    for name, role in zip(errors[max(errors)], ("baseline", "second", "method", "reference"), strict=True):
        right.plot(list(errors), [error[name] for error in errors.values()], **series(role), label=name)
    right.set(xlabel="slots", ylabel="relative error of the output", xscale="log", yscale="log")
    right.set_xticks(list(errors), labels=map(str, errors))
    right.set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8], labels=["⅛", "¼", "½", "1", "2", "4", "8"])
    right.minorticks_off()
    legend(left, fontsize=9)
    legend(right, fontsize=9, loc="center left")
    return fig


def sentence(share: dict[str, float], wrong: dict[str, float], ppl: dict[str, float], sizes: str) -> str:
    """The finding with its numbers."""
    return (
        f"A quarter of the singular values carries {share['nothing hidden']:.0%} of the base model's attention "
        f"matrices, and {share['shuffled']:.0%} of the same weights shuffled: they are close to low rank; but one "
        f"projection for all texts does not find that rank in a model trained without: {sizes} leave outputs off by "
        f"{wrong['trained']:.0%} trained, {wrong['means of runs']:.0%} as means of runs and "
        f"{wrong['drawn at random']:.0%} at random, the best of that rank {wrong['best of that rank']:.0%}; and it "
        f"peeks: trained for the next token it has a perplexity of {ppl['Linformer']:.1f} instead of "
        f"{ppl['base']:.1f}, but {ppl['Linformer, later tokens absent']:.0f} where later tokens are absent, while "
        f"slots of finished blocks, untrained, give an honest {ppl['blockwise']:.1f}."
    )


def claim(lab: Lab) -> Claim:
    """Attention matrices are close to low rank; one projection for all texts misses much of it; as a decoder it peeks.

    Holds if a quarter of the singular values carries more of them than of the same weights shuffled, if trained
    projections err less than random ones and less the more slots there are, and if Linformer trained for next tokens
    is better than the base model in one pass and worse where later tokens are absent. That a projection should come
    near the best rank is not demanded: the sentence says how far it is. Peeking has to be learnt: at a rate of 1e-3, a
    third of ours, 30 steps were too few to get below the base model. Training from scratch, the paper's way, is not
    tried.
    """
    T, steps, fitting = lab.length, 100 if lab.full else 30, 300 if lab.full else 60
    counts = [T // n for n in ((16, 8, 4, 2) if lab.full else (16, 4))]
    ranks, quarter = [T // n for n in (16, 8, 4, 2, 1)], T // 4
    shares = spectra(lab, ranks)
    errors = {n: mean_of([output_errors(lab, n, fitting, seed) for seed in lab.seeds]) for n in counts}
    heads = lab.config.kv_heads
    peeking, block = lambda: SlotAttention(*as_tensors(quarter, T, heads)), BlockwiseAttention(*as_tensors(8, 32))
    ppl = mean_of([leak(lab, peeking, block, steps, seed) for seed in lab.seeds])
    share, wrong = {name: values[2] for name, values in shares.items()}, errors[quarter]
    numbers = {f"share of a quarter of the singular values, {name}": value for name, value in share.items()}
    numbers |= {f"output error, {n} slots, {name}": x for n, found in errors.items() for name, x in found.items()}
    numbers |= {f"perplexity, {name}": value for name, value in ppl.items()}
    falling = [errors[n]["trained"] for n in counts]
    low_rank = share["nothing hidden"] > share["shuffled"]
    learnt = wrong["trained"] < wrong["drawn at random"] and all(a > b for a, b in pairwise(falling))
    peeks = ppl["Linformer"] < ppl["base"] < ppl["Linformer, later tokens absent"]
    setting = f"{T} tokens; E, F per head, Adam 5e-4, {fitting} steps; AdamW 3e-3, {steps} steps; seeds {lab.seeds}"
    said = sentence(share, wrong, ppl, f"{quarter} slots for {T} tokens")
    return Claim(said, low_rank and learnt and peeks, numbers, draw(ranks, shares, errors), setting)
