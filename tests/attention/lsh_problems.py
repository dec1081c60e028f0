"""Problems of LSH attention: what Hypothesis draws, the definition as loops over lists, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.conftest import DEVICE, oracle, poisoned, tolerance

book = oracle("attention.lsh")
KINDS = ("normal", "all equal", "huge", "tiny", "zeros", "outlier channel", "one bucket")
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Problem:
    """qk, v `[B, H, T, D]`, float64 that float16 can hold, and buckets `[B, H, R, T]`."""

    qk: np.ndarray
    v: np.ndarray
    buckets: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.qk, self.v, self.buckets


def make(kind: str, seed: int, T: int, D: int, rounds: int, leading: tuple[int, int] = (1, 2)) -> Problem:
    generator = np.random.default_rng(seed)
    qk, v = generator.normal(size=(2, *leading, T, D))
    qk *= {"huge": 200.0, "tiny": 1e-3}.get(kind, 3.0)
    if kind == "all equal":
        qk[:] = qk.flat[0]
    if kind == "zeros":
        qk[..., ::2, :] = 0
    if kind == "outlier channel":
        qk[..., 0] *= 20
        v[..., 0] *= 20
    buckets = generator.integers(0, 1 if kind == "one bucket" else 4, size=(*leading, rounds, T))
    return Problem(*(x.astype(np.float16).astype(np.float64) for x in (qk, v)), buckets)


LENGTHS = st.sampled_from((1, 13, 17, 32)) | st.integers(1, 40)
CHUNKS = st.sampled_from((1, 4, 16, 64)) | st.integers(1, 40)
ROUNDS = st.integers(1, 3)
PROBLEMS = st.builds(make, st.sampled_from(KINDS), seeds, LENGTHS, st.sampled_from((1, 3, 8)), ROUNDS)


few_examples = settings(max_examples=max(settings.default.max_examples // 4, 6))
KERNEL_PROBLEMS = st.builds(
    make, st.sampled_from(KINDS), seeds, st.sampled_from((1, 17, 33)), st.sampled_from((1, 16, 24)), ROUNDS,
    st.just((1, 1)),
)  # fmt: skip
OPTIONS = st.fixed_dictionaries({"causal": st.booleans(), "across": st.booleans(), "dedup": st.booleans()})


def assert_close(actual, expected, dtype=np.float64, terms: int = 40) -> None:
    """Within the rounding of a sum of `terms` numbers as large as the largest expected one."""
    size = np.abs(expected).max(initial=1e-9)
    np.testing.assert_allclose(actual, expected, **tolerance(dtype, terms, scale=size))


def met(buckets: np.ndarray, chunk: int, causal: bool, across: bool) -> dict[tuple[int, int], list[int]]:
    """{(round, query): positions of its keys}, by lists, for the buckets `[R, T]` of one head."""
    chunks = []
    for r, row in enumerate(buckets.tolist()):
        order = sorted(range(len(row)), key=lambda t: (row[t], t))
        chunks += [[(r, t) for t in order[start : start + chunk]] for start in range(0, len(order), chunk)]
    seen = {}
    for g, own in enumerate(chunks):
        for r, i in own:
            keys = own + (chunks[g - 1] if len(chunks) > 1 else [])
            if not across:
                keys = [(s, j) for s, j in keys if s == r and buckets[s, j] == buckets[r, i]]
            seen[r, i] = [j for _, j in keys if j <= i or not causal]
    return seen


def by_loop(problem: Problem, h: int, chunk: int, causal: bool, across: bool, dedup: bool, scale: float) -> tuple:
    """out `[T, D]` and lse `[T]` of one head: the softmax of all that its rounds saw, query by query."""
    qk, v, seen = problem.qk[0, h], problem.v[0, h], met(problem.buckets[0, h], chunk, causal, across)
    keys = qk / np.maximum(np.sqrt((qk**2).sum(-1, keepdims=True)), 1e-12)
    outs, lses = [], []
    for i in range(len(qk)):
        times = Counter(j for r in range(problem.buckets.shape[2]) for j in seen[r, i])
        scores = np.array([-5e4 if i == j else scale * qk[i] @ keys[j] for j in times])
        weights = np.exp(scores - scores.max()) * ([1.0] * len(times) if dedup else list(times.values()))
        outs.append(weights @ v[list(times)] / weights.sum())
        lses.append(scores.max() + np.log(weights.sum()))
    return np.array(outs), np.array(lses)


def refused() -> list:
    """Changes of (qk, v, buckets), options and the error."""
    qk, buckets = np.ones((2, 5, 3)), np.zeros((2, 1, 5), int)
    nan = np.where(np.arange(3) == 1, np.nan, qk)
    return [
        ((qk, qk[:, :4], buckets), {}, ValueError),
        ((qk, qk, buckets[..., :4]), {}, ValueError),
        ((qk, qk, buckets[:1]), {}, ValueError),
        ((qk, qk, buckets - 1), {}, ValueError),
        ((qk[:, :0], qk[:, :0], buckets[..., :0]), {}, ValueError),
        ((nan, qk, buckets), {}, ValueError),
        ((qk, qk, buckets), {"chunk": 0}, ValueError),
        ((qk, qk, buckets), {"chunk": -2}, ValueError),
        ((qk, qk, buckets), {"scale": 0.0}, ValueError),
        ((qk, qk, buckets), {"scale": np.nan}, ValueError),
        ((qk, qk, buckets), {"scale": np.inf}, ValueError),
        ((qk, qk, buckets.astype(float)), {}, TypeError),
        ((qk, qk.astype(np.float32), buckets), {}, TypeError),
        ((qk.astype(int), qk.astype(int), buckets), {}, TypeError),
    ]


def on_device(problem: Problem, dtype: torch.dtype, aligned: bool = True) -> list[torch.Tensor]:
    """Poisoned qk, v and buckets."""
    vectors = [poisoned(torch.from_numpy(x).to(DEVICE, dtype), aligned) for x in (problem.qk, problem.v)]
    return [*vectors, poisoned(torch.from_numpy(problem.buckets).to(DEVICE))]


def assert_kernel(found, problem: Problem, chunk: int, **options) -> None:
    """out and lse are the reference's; lse is float32 near −5e4 where a token sees itself alone."""
    expected = book.lsh_attention(*problem.arrays(), chunk, **options)
    for tensor, truth, dtype in zip(found, expected, (found[0].dtype, torch.float32), strict=True):
        assert tensor.dtype == dtype and tensor.shape == truth.shape
        terms = 40 if dtype == torch.float32 else 1
        assert_close(tensor.double().cpu().numpy(), truth, dtype, terms)
    lse, alone = found[1].double().cpu().numpy(), expected[1] < -1e4
    np.testing.assert_allclose(lse[alone], expected[1][alone], rtol=5e-7)  # a few roundings, less than log 2
    precision = torch.float32 if found[0].dtype == torch.float32 else torch.float16
    assert_close(np.where(alone, 0, lse), np.where(alone, 0, expected[1]), precision)
