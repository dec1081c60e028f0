"""Attention problems with a span for each head, and the definition, one pair at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from tests.attention.problems import HEADS, KINDS, Problem, make

EIGHTHS = 8  # spans are multiples of 1/8, so that float32 knows exactly where a ramp ends


@dataclass(frozen=True)
class Spanned:
    """A causal problem with S >= T, spans `[H]`, and the options that belong to them."""

    problem: Problem
    span: np.ndarray
    ramp: int
    max_span: int | None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.problem.q, self.problem.k, self.problem.v

    def options(self) -> dict:
        return {"ramp": self.ramp, "max_span": self.max_span, "scale": self.problem.scale}

    @property
    def limit(self) -> int:
        return self.problem.k.shape[2] if self.max_span is None else self.max_span


def spanned(
    kind: str, seed: int, heads: tuple[int, int, int], T: int, past: int, D: int, ramp: int, max_span: int | None,
    scale: float | None = None, whole: bool = False,
) -> Spanned:  # fmt: skip
    """`whole`: spans are integers, at the kinks of the mask."""
    problem = make(kind, seed, heads, T, T + past, D, True, scale)
    parts, longest = 1 if whole else EIGHTHS, T + past if max_span is None else max_span
    span = np.random.default_rng(seed + 1).integers(0, longest * parts + 1, problem.q.shape[1]) / parts
    return Spanned(problem, span, ramp, max_span)


def span_problems(lengths, pasts, head_sizes, heads=HEADS, kinds=KINDS) -> st.SearchStrategy[Spanned]:
    """Problems of all kinds; max_span None, or shorter or longer than the text."""
    return st.builds(
        spanned,
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 2**32 - 2),
        heads=st.sampled_from(heads),
        T=lengths,
        past=pasts,
        D=head_sizes,
        ramp=st.sampled_from((1, 2, 3, 8, 32)),
        max_span=st.sampled_from((None, 1, 7, 20, 64)),
        scale=st.sampled_from((None, None, 0.3)),
        whole=st.booleans(),
    )


def counts(distance: int, span: float, ramp: int, max_span: int) -> float:
    """The mask of one pair."""
    if distance < 0 or distance >= max_span:
        return 0.0
    return min(1.0, max(0.0, (ramp + span - distance) / ramp))


def attended_by_hand(case: Spanned) -> tuple[np.ndarray, np.ndarray]:
    """out and lse, one query at a time."""
    q, k, v = case.arrays
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    out, lse, scale = np.empty(q.shape), np.empty(q.shape[:3]), case.problem.scale or D**-0.5
    for b, h, i in np.ndindex(B, H, T):
        g = h // (H // Hkv)
        mask = [counts(i + S - T - j, case.span[h], case.ramp, case.limit) for j in range(S)]
        scores = [scale * float(q[b, h, i] @ k[b, g, j]) if mask[j] else -math.inf for j in range(S)]
        weights = [m * math.exp(score - max(scores)) for m, score in zip(mask, scores, strict=True)]
        out[b, h, i] = sum(w * v[b, g, j] for j, w in enumerate(weights)) / sum(weights)
        lse[b, h, i] = max(scores) + math.log(sum(weights))
    return out, lse


def gradients_by_autograd(case: Spanned) -> list[np.ndarray]:
    """Of q, k, v and span, through plain torch; a span exactly at a kink has the gradient from below."""
    q, k, v, span = leaves = [torch.from_numpy(x).requires_grad_() for x in (*case.arrays, case.span)]
    (_, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    keys, values = (x.repeat_interleave(H // Hkv, dim=1) for x in (k, v))
    scale = case.problem.scale or D**-0.5
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    soft = ((case.ramp + span[:, None, None] - distance) / case.ramp).clamp(0, 1)  # clamp passes gradients at its ends
    visible = (distance >= 0) & (distance < case.limit)
    scores = (scale * q @ keys.mT).masked_fill(~visible | (soft == 0), -math.inf)
    weights = soft * (scores - scores.amax(-1, keepdim=True).detach()).exp()
    out = weights @ values / weights.sum(-1, keepdim=True)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(case.problem.dout))
    return [gradient.numpy() for gradient in gradients]


GOOD = {"q": (1, 4, 3, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8), "span": (4,)}
BAD_SHAPES = [
    {"k": (1, 3, 5, 8), "v": (1, 3, 5, 8)},
    {"k": (2, 2, 5, 8), "v": (2, 2, 5, 8)},
    {"k": (1, 2, 5, 6), "v": (1, 2, 5, 6)},
    {"k": (1, 2, 2, 8), "v": (1, 2, 2, 8)},
    {"v": (1, 2, 6, 8)},
    {"q": (4, 3, 8)},
    {"q": (1, 4, 0, 8)},
    {"span": (2,)},
    {"span": (4, 1)},
]
BAD_OPTIONS = [{"ramp": 0}, {"max_span": 0}, {"scale": 0.0}, {"scale": math.inf}, {"scale": math.nan}, {"scale": -1.0}]
BAD_SPANS = [-0.5, 5.5, math.nan, math.inf]  # the text has 5 tokens


def refusals() -> list[tuple[dict[str, np.ndarray], dict, type[Exception]]]:
    """(arrays, options, error) that the reference refuses."""
    good = {name: np.ones(shape) for name, shape in GOOD.items()}
    cases = [({name: np.ones(shape) for name, shape in (GOOD | bad).items()}, {}, ValueError) for bad in BAD_SHAPES]
    cases += [(good, option, ValueError) for option in BAD_OPTIONS]
    cases += [(good | {"span": np.array([1, 1, 1, bad])}, {}, ValueError) for bad in BAD_SPANS]
    cases += [(good | {"k": good["k"].astype(np.float32)}, {}, TypeError)]
    return [*cases, ({name: x.astype(int) for name, x in good.items()}, {}, TypeError)]
