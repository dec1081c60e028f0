"""Quantized KV cache: round what a decoder remembers to 4 or 2 bits, keys along each channel, values in each token.

    step = (max − min) / (2^bits − 1)     code = rint(clamp((x − min) / step, 0, 2^bits − 1))     x̂ = step · code + min

for each group of g numbers, which share step and min. A group is g neighbouring channels of one token (per token:
FlexGen) or g neighbouring tokens of one channel (per channel: KIVI, for keys). A key channel that is large is large in
every token: in a group with other channels it makes the step too wide for them, alone it is a constant and its noise.

Saves    bytes: with step and min in 16 bits, a number takes bits + 32 / g bits, where a plain cache takes 16; for
         g = 32 that is 5 bits, or 3. With long contexts and large batches the cache outweighs the weights, and a
         decode step reads all of it.
Costs    quality, little at 4 bits, and three or four instructions per number. Groups along tokens must wait until
         g tokens are there, so the newest positions stay in full precision.
Papers   Sheng et al. 2023 (FlexGen), arXiv:2303.06865, section 4.3; Liu et al. 2024 (KIVI), arXiv:2402.02750,
         sections 3.2 and 4.
Follows  the released code of both to the rounding, in the dtype of x. FlexGen fills the last group up with zeros, which
         count for its range, and multiplies by 1 / (max − min) · (2^bits − 1); KIVI divides by step. Where a group has
         no range both divide 0 by 0: here its codes and its step are 0. The grid holds step, where FlexGen's holds
         1 / step. Bytes are packed from the high end, as by FlexGen: in 4 bits the even channel is the high nibble.
         (KIVI packs words of 32 bits from the low end, keys along tokens.)
Symbols  x, codes `[.., T, D]`; grid `[.., rows, columns, 2]`, step and min: per token T rows and D / g columns, per
         channel T / g rows and D columns, rounded up; packed codes `[.., T, D · bits / 8]` uint8.
Cache    chapters/shared/quantized_cache.py: `Plan`, `Held`, and the same by torch behind the `cache` of minitfm
Kernel   kernels/quantization/kv_cache.py
"""

from __future__ import annotations

import argparse
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from chapters.claims import Claim
from chapters.figures import COLOURS, figure
from chapters.lab import Lab
from chapters.shared.quantized_cache import AXES, PACKED_BITS, Held, Per, Plan, QuantizedCache
from minitfm.cache import KVCache
from minitfm.evaluate import cached_perplexity
from minitfm.generate import generate

GROUP = 32  # of the claim
WAYS: list[tuple[Per, Per]] = [(keys, values) for keys in AXES for values in AXES]


def quantize(
    x: np.ndarray, bits: int, group_size: int, per: Per = "token", rule: Literal["flexgen", "kivi"] = "flexgen"
) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[.., T, D]` uint8 and grid `[.., rows, columns, 2]` of x `[.., T, D]`, computed in the dtype of x.

    A group is `group_size` neighbouring channels of a token or neighbouring tokens of a channel (`per`).
    "flexgen": the last group is filled up with zeros, which count for its min and max; a code is
    rint(clamp((x − min) · factor, 0, 2^bits − 1)), factor = 1 / (max − min) · (2^bits − 1), and step 1 / factor.
    "kivi": groups must divide the axis; a code is rint(clamp((x − min) / step, 0, 2^bits − 1)).
    rint takes halves to the even code. A group without a range, or one so small that the factor overflows or step is
    0, gets codes 0 and step 0. Raises ValueError for bits outside 1 .. 8, group_size below 1, an unknown name, an axis
    that "kivi" cannot divide; unless x is floating point, not empty, of two axes at least, and each max − min finite.
    """
    if bits not in range(1, 9) or group_size < 1 or per not in AXES or rule not in ("flexgen", "kivi"):
        raise ValueError(f"need bits 1 .. 8, group_size >= 1 and known names, got {bits}, {group_size}, {per}, {rule}")
    if x.dtype.kind != "f" or x.ndim < 2 or x.size == 0:
        raise ValueError(f"x must be non-empty floating point [.., T, D], got {x.dtype} {x.shape}")
    along, top = np.moveaxis(x, AXES[per], -1), 2**bits - 1
    extra = -along.shape[-1] % group_size
    if extra and rule == "kivi":
        raise ValueError(f"group_size must divide the {along.shape[-1]} numbers per {per}, got {group_size}")
    filled = np.concatenate([along, np.zeros((*along.shape[:-1], extra), x.dtype)], axis=-1)
    groups = filled.reshape(*along.shape[:-1], -1, group_size)
    with np.errstate(all="ignore"):  # groups without a range divide by zero, and are put right below
        low, span = groups.min(axis=-1, keepdims=True), np.ptp(groups, axis=-1, keepdims=True)
        if not np.isfinite(span).all():
            raise ValueError(f"x must be finite and its ranges fit {x.dtype}, got {x.min()} to {x.max()}")
        factor, step = 1 / span * top, span / top
        scaled = (groups - low) * factor if rule == "flexgen" else (groups - low) / step
        step = 1 / factor if rule == "flexgen" else step
    flat = step == 0  # as 1 / factor is where factor overflows
    codes = np.where(flat, 0, np.rint(scaled.clip(0, top))).astype(np.uint8).reshape(filled.shape)
    grid = np.concatenate([np.where(flat, 0, step).astype(x.dtype), low], axis=-1)
    codes = np.moveaxis(codes[..., : along.shape[-1]], -1, AXES[per])
    return codes, grid if per == "token" else grid.swapaxes(-2, -3)


def dequantize(codes: np.ndarray, grid: np.ndarray, group_size: int, per: Per = "token") -> np.ndarray:
    """What codes `[.., T, D]` stand for, step · code + min in float64. A grid may have rows and columns to spare."""
    T, D = codes.shape[-2:]
    step, low = (np.repeat(grid[..., i], group_size, AXES[per])[..., :T, :D].astype(np.float64) for i in (0, 1))
    return step * codes + low


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[.., D]` below 2^bits, unsigned integers -> uint8 `[.., D · bits / 8]`; bits 2, 4 or 8.

    A byte holds 8 / bits neighbours, the first in its highest bits. No rows of codes are no rows of bytes. Raises
    ValueError for other bits, codes that are larger or not unsigned, and a D whose codes fill no whole number of bytes.
    """
    if bits not in PACKED_BITS or codes.dtype.kind != "u" or codes.shape[-1] * bits % 8:
        raise ValueError(
            f"need 2, 4 or 8 bits and unsigned codes that fill bytes, got {bits}, {codes.dtype} {codes.shape}"
        )
    if codes.size and codes.max() >= 2**bits:
        raise ValueError(f"codes must be below 2^{bits}, got {codes.max()}")
    neighbours = codes.astype(np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8, 8 // bits)
    return np.bitwise_or.reduce(neighbours << places(bits), axis=-1)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `pack`: uint8 `[.., D · bits / 8]` -> uint8 `[.., D]`."""
    codes = packed[..., None] >> places(bits) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def places(bits: int) -> np.ndarray:
    """How far each of the codes in a byte is shifted: the first stands highest."""
    return np.arange(8 - bits, -1, -bits, dtype=np.uint8)


def decode_attention(q: np.ndarray, keys: Held, values: Held, scale: float | None = None) -> np.ndarray:
    """softmax(q k̂ᵀ scale) v̂ for one new token, which sees all positions: q `[B, H, 1, D]` -> float64 `[B, H, 1, D]`.

    keys and values are `Held`: the first `packed` rows of codes, D · bits / 8 bytes each, are the oldest positions, and
    the rows of window the others. Both are as many positions, but `packed` may differ. Query head h reads key/value
    head h // (H / Hkv); scale is 1 / √D if None. All is computed in float64. Raises ValueError if shapes do not fit,
    keys and values are not equally many, or there are none.
    """
    k, v = (read(held, q.shape[-1]) for held in (keys, values))
    if q.shape[2:3] != (1,) or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1] or k.size == 0:
        raise ValueError(f"q {q.shape}, keys {k.shape} and values {v.shape} do not fit")
    k, v = (half.repeat(q.shape[1] // half.shape[1], axis=1) for half in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def read(held: Held, D: int) -> np.ndarray:
    """All positions that `held` remembers, float64 `[B, Hkv, S, D]`. Raises ValueError if it is not of heads of D."""
    bits = 8 * held.codes.shape[-1] / D
    if bits not in PACKED_BITS or held.window.shape[-1] != D or not 0 <= held.packed <= held.codes.shape[2]:
        raise ValueError(
            f"codes {held.codes.shape}, of which {held.packed} packed, and window {held.window.shape} do not fit heads "
            f"of {D}"
        )
    codes = unpack(held.codes[:, :, : held.packed], int(bits))
    return np.concatenate([dequantize(codes, held.grid, held.group_size, held.per), held.window], axis=2)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run kv_cache`; the defaults are KIVI's at 2 bits, with a short window."""
    parser.add_argument("--bits", type=int, default=2, help="2, 4 or 8 (default 2)")
    parser.add_argument("--group-size", type=int, default=32, metavar="G", help="numbers with one step (default 32)")
    parser.add_argument("--residual", type=int, default=32, metavar="R", help="newest positions kept (default 32)")
    parser.add_argument("--keys", choices=AXES, default="channel", help="groups of keys (default channel)")
    parser.add_argument("--values", choices=AXES, default="token", help="groups of values (default token)")
    parser.add_argument("--rule", choices=("flexgen", "kivi"), default="kivi", help="whose rounding (default kivi)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Decode one token at a time through the cache: perplexity, bytes per token, and how a text goes on."""
    keys, values = (Plan(per, args.bits, args.group_size, args.residual, args.rule) for per in (args.keys, args.values))
    model, tokens = lab.model(), lab.validation[:16]
    plain = KVCache(lab.config, len(tokens), lab.length)
    coded = QuantizedCache(lab.config, keys, values, len(tokens), lab.length)
    prompt = tokens[:1, : lab.length // 4]
    going_on = generate(model, prompt, lab.length // 4, cache=QuantizedCache(lab.config, keys, values))
    return {
        "perplexity, plain cache": cached_perplexity(model, tokens, plain, 1),
        "perplexity, quantized cache": cached_perplexity(model, tokens, coded, 1),
        "bytes per token, plain cache in 16 bits": plain.nbytes() / 2 / len(plain) / len(tokens),
        "bytes per token, quantized cache": coded.nbytes() / len(coded) / len(tokens),
        "a text": lab.tokenizer.decode(prompt[0].tolist()),
        "goes on": lab.tokenizer.decode(going_on[0, prompt.shape[1] :].tolist()),
    }


def measure(lab: Lab, plans: tuple[Plan, Plan] | None, part: int) -> tuple[float, float]:
    """(perplexity, bytes per token) of the last quarter of each text, fed at once; the rest is read from a cache.

    Of that, all is codes, so that all `plans` of keys and values are compared alike. None: full precision, whose bytes
    are counted in 16 bits. The texts are shared out: each seed measures its own `part`.
    """
    tokens, prompt = lab.validation[part :: len(lab.seeds)][:128], max(1, 3 * lab.length // 4 // GROUP * GROUP)
    plain = KVCache(lab.config, len(tokens), lab.length)
    cache = plain if plans is None else QuantizedCache(lab.config, *plans, len(tokens), lab.length)
    perplexity = cached_perplexity(lab.model(), tokens, cache, prompt, lab.length)
    cache.truncate(prompt)
    return perplexity, cache.nbytes() / len(tokens) / prompt / (2 if cache is plain else 1)


def picture(rises: dict[str, float]) -> Figure:
    """What each way to hold the past costs."""
    fig, axes = figure(height=2.4)
    ways = list(rises)[::-1]  # bars are drawn from below
    axes.barh(
        ways, [rises[way] for way in ways], color=[COLOURS["method" if "4" in way else "baseline"] for way in ways]
    )
    axes.set(xlabel="rise of perplexity")
    return fig


def claim(lab: Lab) -> Claim:
    """4 bits cost little; at 2 bits keys want groups along a channel (and, says the paper, values along a token)."""
    four = "4 bits, all per token"
    plans = {"16 bits": None, four: (Plan(group_size=GROUP), Plan(group_size=GROUP))}
    plans |= {name(keys, values): (Plan(keys, 2, GROUP), Plan(values, 2, GROUP)) for keys, values in WAYS}
    found = {words: [measure(lab, each, part) for part in range(len(lab.seeds))] for words, each in plans.items()}
    perplexity, nbytes = ({words: float(np.mean(each, 0)[i]) for words, each in found.items()} for i in (0, 1))
    base = perplexity["16 bits"]
    rises = {words: after - base for words, after in perplexity.items() if words != "16 bits"}
    rise = {way: rises[name(*way)] for way in WAYS}
    values_too = all(rise[keys, "token"] < 0.9 * rise[keys, "channel"] for keys in AXES)
    sentence = (
        f"A past held in 4 bits, 1/{nbytes['16 bits'] / nbytes[four]:.1f} of the bytes, raises perplexity {base:.2f} "
        f"by {rises[four]:.2f}; in 2 bits by {rise['token', 'token']:.2f} with keys per token, by "
        f"{rise['channel', 'token']:.2f} with keys per channel. That values want groups per token "
        f"{'shows, too' if values_too else 'does not show'}: per channel it rises by {rise['channel', 'channel']:.2f}."
    )
    holds = rises[four] < 0.02 * base and all(2 * rise["channel", values] < rise["token", values] for values in AXES)
    numbers = {f"perplexity, {words}": value for words, value in perplexity.items()}
    numbers |= {f"bytes per token, {words}": nbytes[words] for words in ("16 bits", four, name("channel", "token"))}
    setting = (
        f"last quarter of texts of {lab.length} tokens, the rest read from codes; groups of {GROUP}, grids in float16, "
        f"no window, natural keys; texts shared out among seeds {lab.seeds}; the claim is on keys and on 4 bits"
    )
    return Claim(sentence, holds, numbers, picture(rises), setting)


def name(keys: Per, values: Per) -> str:
    """One of the four ways to lay groups, in words."""
    return f"2 bits, keys per {keys}, values per {values}"
