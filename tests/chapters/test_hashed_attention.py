"""LSH attention in torch: the model's form against the reference, its gradients, a cache, and the recall measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import lsh
from chapters.shared import hashed_attention as hashed
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer
from tests.attention.lsh_problems import CHUNKS, PROBLEMS, Problem, assert_close, make
from tests.conftest import tolerance


def tensors(problem: Problem) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in problem.arrays()]


@given(PROBLEMS, CHUNKS, st.booleans())
def test_torch_is_the_reference(problem, chunk, dedup):
    out = hashed.attend_chunks(*tensors(problem), chunk, dedup, scale=0.7)
    expected, _ = lsh.lsh_attention(*problem.arrays(), chunk, dedup=dedup, scale=0.7)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9 * np.abs(problem.v).max())


def test_torch_has_the_gradients_of_exact_attention_where_nothing_is_missed():
    qk, v, buckets = tensors(make("normal", 0, 12, 3, 3))
    qk, v, dout = qk.requires_grad_(), v.requires_grad_(), torch.randn_like(v)
    found = torch.autograd.grad(hashed.attend_chunks(qk, v, buckets, 12, dedup=True), (qk, v), dout)
    for gradient, expected in zip(
        found, torch.autograd.grad(hashed.exact_attend(qk, qk, v), (qk, v), dout), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_exact_attend_is_shared_attention():
    problem = make("normal", 0, 13, 4, 1)
    qk, v, _ = tensors(problem)
    expected, _ = lsh.shared_attention(problem.qk, problem.v, scale=1.0)
    assert_close(hashed.exact_attend(qk, qk, v), expected)
    assert_close(hashed.exact_attend(qk[:, :, :2], qk, v), expected[:, :, -2:])


def test_the_model_hashes_as_the_reference_does():
    qk = torch.from_numpy(make("normal", 0, 40, 8, 1).qk)
    attend = hashed.LshAttend(rounds=3, chunk=4, seed=5)
    rotations = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(5)).double().permute(1, 0, 2)
    np.testing.assert_array_equal(attend.buckets(qk), lsh.hash_buckets(qk.numpy(), rotations.numpy()))


@pytest.mark.parametrize("hashes", hashed.HASHES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attend_in_a_model_and_with_a_cache(hashes, kv_heads):
    config = Config(vocab_size=32, dim=32, hidden_dim=48, layers=2, heads=4, kv_heads=kv_heads, context=64)
    torch.manual_seed(0)
    exact = Transformer(config, attend=hashed.exact_attend).eval()
    model = Transformer(config, attend=hashed.LshAttend(2, 20, hashes)).eval()
    model.load_state_dict(exact.state_dict())
    tokens = torch.randint(32, (2, 20))
    with torch.no_grad():
        expected, cache = exact(tokens), KVCache(config, batch=2)
        torch.testing.assert_close(model(tokens), expected, **tolerance(torch.float32, 100))
        parts = torch.cat(
            [model(tokens[:, :13], cache), *(model(tokens[:, i : i + 1], cache) for i in range(13, 20))], 1
        )
    torch.testing.assert_close(parts, expected, **tolerance(torch.float32, 100))  # 20 tokens fit into one chunk


def test_recall_is_what_times_seen_finds():
    problem = make("normal", 0, 30, 6, 1)
    attend = hashed.LshAttend(2, 4, scale=1.0)
    k = torch.from_numpy(problem.qk)
    mass, top, share = hashed.recall([k], attend)
    seen = np.tril(lsh.times_seen(attend.buckets(k).numpy(), 4) > 0, -1)[:, :, 1:]
    everyone = np.broadcast_to(np.arange(30), k.shape[:3])
    scores = np.where(np.tri(30, k=-1, dtype=bool), lsh.shared_scores(problem.qk, everyone, everyone, 1.0), -np.inf)
    weights = np.exp(scores[:, :, 1:]) / np.exp(scores[:, :, 1:]).sum(-1, keepdims=True)
    best = np.take_along_axis(seen, weights.argmax(-1)[..., None], axis=-1)
    expected = (weights * seen).sum(-1).mean(), best.mean(), seen.sum() / (2 * 30 * 29 / 2)
    np.testing.assert_allclose((mass, top, share), expected, rtol=1e-5)
    assert hashed.recall([k], hashed.LshAttend(1, 64))[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hashes": "md5"}, "hashes must be one of lsh, random, none, got 'md5'"),
        ({"rounds": 0}, "rounds and chunk must be at least 1"),
        ({"chunk": 0}, "rounds and chunk must be at least 1"),
        ({"scale": 0.0}, "scale positive; got 4, 16 and 0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        hashed.LshAttend(**options)
