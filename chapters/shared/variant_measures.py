"""What the chapter on FlashAttention's variants measures with: rounding, windows, packing, and its figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.shared.decode_measures import Arrays, record_attention
from chapters.shared.packed_sequences import PackedCache, generate_packed
from chapters.shared.serving import draw_requests
from minitfm.generate import generate

Passes = Callable[[Arrays, np.ndarray, type, int], list[np.ndarray]]  # out, dq, dk, dv, with tiles of so many
WINDOW, LENGTHS = 256, [1024, 2048, 4096]


def rounding(lab: Lab, seed: int, tiled: Passes, whole: Passes) -> tuple[float, float]:
    """The largest float32 errors of both ways, against `whole` in float64.

    On q, k and v of each layer reading calibration text, with a drawn dout; relative to the largest of each result.
    """
    generator, errors = np.random.default_rng(seed), [0.0, 0.0]
    for layer in record_attention(lab, lab.calibration(seed, count=1)):
        dout = generator.normal(size=layer[0].shape)
        exact = whole(layer, dout, np.float64, lab.length)
        for i, found in enumerate((tiled(layer, dout, np.float32, 32), whole(layer, dout, np.float32, lab.length))):
            pairs = zip(found, exact, strict=True)
            errors[i] = max(errors[i], *(float(np.abs(x - truth).max() / np.abs(truth).max()) for x, truth in pairs))
    return errors[0], errors[1]


@torch.no_grad()
def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The least processor time that `run` took, after one call to warm up; other programs hardly change it."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def window_times(lab: Lab, attend: Callable[..., Tensor]) -> dict[str, list[float]]:
    """Seconds of one attention layer of the model's shape at each of LENGTHS, for all keys and for a window."""
    shape = (1, lab.config.heads, LENGTHS[-1], lab.config.head_dim)
    x, times = torch.randn(shape, generator=torch.Generator().manual_seed(0)), {}
    for name, sides in (("all keys", (None, None)), ("window", (WINDOW - 1, None))):
        cut = [x[:, :, :n].contiguous() for n in LENGTHS]
        times[name] = [seconds(partial(attend, part, part, part, sides)) for part in cut]
    return times


def draw_lengths(lab: Lab, seed: int, count: int = 16) -> list[int]:
    """Lengths of `count` requests, prompts with answers, as people's; see `serving.draw_requests`."""
    return [len(request.prompt) + request.count for request in draw_requests(lab, seed, count)]


@torch.no_grad()
def packing(lab: Lab, seed: int, attend: Callable[..., Tensor]) -> dict[str, float]:
    """The whole model over texts of drawn lengths, padded to the longest and packed: tokens, seconds, and how far the
    largest difference of their logits is from 0, relative to the largest logit."""
    lengths = draw_lengths(lab, seed)
    texts = lab.calibration(seed, len(lengths), max(lengths))
    cache = PackedCache(len(lengths), attend)
    plain, packed = lab.model(), lab.model(attend=cache.attend)
    row = torch.cat([text[:n] for text, n in zip(texts, lengths, strict=True)])[None]

    def run() -> Tensor:
        cache.truncate(0)
        return packed(row, cache, cache.announce(lengths))[0]

    expected = torch.cat([logits[:n] for logits, n in zip(plain(texts), lengths, strict=True)])
    return {
        "tokens, padded": float(texts.numel()),
        "tokens, packed": float(sum(lengths)),
        "time, padded": seconds(partial(plain, texts)),
        "time, packed": seconds(run),
        "difference of logits, packed": float((run() - expected).abs().max() / expected.abs().max()),
    }


def generated_alike(lab: Lab, seed: int, attend: Callable[..., Tensor], count: int = 16) -> float:
    """Share of prompts, of drawn lengths, that the base model continues alike, packed and each by itself."""
    lengths = [min(n, lab.config.context - count) for n in draw_lengths(lab, seed, 8)]
    prompts = [text[:n] for text, n in zip(lab.calibration(seed, 8, max(lengths)), lengths, strict=True)]
    together = generate_packed(lab, prompts, count, attend)
    model = lab.model()
    alone = [generate(model, prompt[None], count)[0, len(prompt) :] for prompt in prompts]
    return float(np.mean([torch.equal(*pair) for pair in zip(together, alone, strict=True)]))


def packing_of_all(lab: Lab, attend: Callable[..., Tensor]) -> dict[str, float]:
    """`packing` summed over the seeds, its differences and `generated_alike` the worst of them."""
    runs = [packing(lab, seed, attend) for seed in lab.seeds]
    found = {name: sum(run[name] for run in runs) for name in runs[0]}
    found["difference of logits, packed"] = max(run["difference of logits, packed"] for run in runs)
    found["prompts continued alike"] = min(generated_alike(lab, seed, attend) for seed in lab.seeds)
    return found


def pairs(lengths: Sequence[int], window: int | None = None) -> np.ndarray:
    """Which query of a packed row sees which key, bool: causal, within a window of so many tokens."""
    ends = [0, *accumulate(lengths)]
    whose = np.repeat(np.arange(len(lengths)), lengths)
    i, j = np.indices((ends[-1], ends[-1]))
    return (whose[i] == whose[j]) & (j <= i) & (i - j < (window or ends[-1]))


def draw(times: dict[str, list[float]], saved: dict[str, float]) -> Figure:
    """Left: milliseconds against length, with and without a window; right: what packing leaves of tokens and time."""
    fig, (left, right) = panels(2, width=7.6)
    for (name, taken), role in zip(times.items(), ("baseline", "method"), strict=True):
        left.plot(LENGTHS, [1e3 * t for t in taken], **series(role), label=name)
    left.set(xlabel="tokens", ylabel="ms, one layer", xscale="log", yscale="log")
    left.set_xticks(LENGTHS, labels=map(str, LENGTHS))
    left.minorticks_off()
    legend(left)
    for role, label, offset, heights in (
        ("baseline", "padded", -0.2, [1, 1]), ("method", "packed", 0.2, [1 - part for part in saved.values()])
    ):  # fmt: skip
        right.bar(np.arange(2) + offset, heights, 0.4, color=COLOURS[role], label=label)
    right.set_xticks([0, 1], labels=list(saved))
    right.set(ylabel="part of padded", ylim=(0, 1.4))
    legend(right, loc="upper right")
    return fig
