"""Attention problems with windows, soft caps, ALiBi and packed sequences, drawn in all combinations; and by torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.problems import HEAD_SIZES, HEADS, KINDS, LENGTHS, Problem, make
from tests.conftest import golden

CAUSAL = st.booleans()
SIDES = st.sampled_from((None, 0, 1)) | st.integers(0, 40)


@dataclass(frozen=True)
class Variant:
    """A problem and the options beyond those of `flash`."""

    problem: Problem
    window: tuple[int | None, int | None]
    softcap: float | None
    slopes: np.ndarray | None
    cu_q: list[int] | None
    cu_k: list[int] | None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.problem.q, self.problem.k, self.problem.v

    def options(self, device: str | None = None) -> dict:
        """Keywords of `flash_attention`, slopes as a tensor for a device."""
        slopes = self.slopes
        if device is not None and slopes is not None:
            slopes = torch.from_numpy(slopes).to(device)
        names = ("window", "softcap", "cu_q", "cu_k")
        return {**self.problem.options(), **{name: getattr(self, name) for name in names}, "slopes": slopes}


@st.composite
def variants(draw, lengths=LENGTHS, head_sizes=HEAD_SIZES, kinds=KINDS, heads=HEADS, causal=CAUSAL) -> Variant:
    """Options on and off as they come; cuts of packed sequences may fall together, which leaves some of them empty."""
    packed = draw(st.booleans())
    sizes = draw(st.sampled_from([some for some in heads if some[0] == 1] if packed else heads))
    problem = make(
        draw(st.sampled_from(kinds)), draw(st.integers(0, 2**32 - 1)), sizes, draw(lengths), draw(lengths),
        draw(head_sizes), draw(causal), draw(st.sampled_from((None, 0.3))),
    )  # fmt: skip
    (_, H, T, _), S = problem.q.shape, problem.k.shape[2]
    slopes = draw(st.none() | st.just(np.random.default_rng(H).uniform(0, 1, H)))
    softcap = draw(st.none() | st.sampled_from((0.5, 2.0, 50.0)))
    cu_q, cu_k = draw(offsets(T, S)) if packed else (None, None)
    return Variant(problem, (draw(SIDES), draw(SIDES)), softcap, slopes, cu_q, cu_k)


@st.composite
def offsets(draw, T: int, S: int) -> tuple[list[int], list[int]]:
    """cu_q and cu_k of one to four sequences."""
    count = draw(st.integers(0, 3))
    cuts = (sorted(draw(st.lists(st.integers(0, end), min_size=count, max_size=count))) for end in (T, S))
    cu_q, cu_k = ([0, *inside, end] for inside, end in zip(cuts, (T, S), strict=True))
    return cu_q, cu_k


def where(cu: list[int] | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequence of each of `length` rows, and how many rows of it come after that row."""
    cu = [0, length] if cu is None else cu
    whose = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    return whose, np.array(cu)[whose + 1] - 1 - np.arange(length)


def distance(variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    """(j - p of every pair, counted from the ends of its sequence; which pairs are visible), [T, S]."""
    (whose_q, after_q), (whose_k, after_k) = (
        where(cu, x.shape[2]) for cu, x in ((variant.cu_q, variant.problem.q), (variant.cu_k, variant.problem.k))
    )
    ahead, (left, right) = after_q[:, None] - after_k, variant.window
    seen = whose_q[:, None] == whose_k
    seen = seen & (left is None or ahead >= -left) & (right is None or ahead <= right)
    return ahead, seen & (ahead <= 0) if variant.problem.causal else seen


def torch_variant(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """The same by whole matrices in torch, for autograd; a query that sees no key gets 0."""
    ahead, seen = (torch.from_numpy(x) for x in distance(variant))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scale = q.shape[3] ** -0.5 if variant.problem.scale is None else variant.problem.scale
    scores = scale * (q @ k.mT)
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    if variant.slopes is not None:
        scores = scores - torch.from_numpy(variant.slopes)[:, None, None] * ahead.abs()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0) @ v


GOLDEN = [
    ("window_left3_causal", {"window": (3, None)}),
    ("window_right_only_2", {"causal": False, "window": (None, 2)}),
    ("alibi_causal_sq_lt_sk", {}),
    ("alibi_noncausal", {"causal": False}),
    ("causal_cross", {}),
    ("full_cross", {"causal": False}),
]


def golden_variant(case: str, options: dict) -> tuple[dict[str, np.ndarray], dict, float]:
    """Arrays of flash-attn in this book's layout and float64, all options of the case, and the tolerance."""
    arrays = {
        name.split("/")[1]: x for name, x in golden("attn/flash_attention_variants").items() if f"{case}/" in name
    }
    found = {name: x for name, x in arrays.items() if name in ("q", "k", "v", "dout", "out", "dq", "dk", "dv")}
    found = {name: x if x.ndim == 4 else x[None] for name, x in found.items()}
    found = {name: x.swapaxes(1, 2).astype(np.float64) for name, x in found.items()}
    options = dict(options)
    if "lse" in arrays:
        found["lse"] = arrays["lse"]
    if "cu_seqlens_q" in arrays:
        options |= {"cu_q": arrays["cu_seqlens_q"], "cu_k": arrays["cu_seqlens_k"]}
    if "alibi_slopes" in arrays:
        options["slopes"] = slopes = arrays["alibi_slopes"][0].astype(np.float64)
        if case.startswith("alibi_causal"):  # flash-attn adds slope * (j - S + 1)
            T = found["q"].shape[2]
            found["lse"] = found["lse"] - slopes[:, None] * (np.arange(T) - T + 1)
    return found, options, 2e-6 if "alibi_slopes" in arrays else 1e-10
