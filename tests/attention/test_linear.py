"""Linear attention: features against the original code and laws, three forms against each other, the kernels."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import linear
from tests.attention.linear_problems import assert_close, assert_same, make, on_device, problems, wrong_input
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, tolerance
from tests.fences import walled

FAVOR = pytest.mark.exercise("chapters.attention.linear.favor_features", points=2)
ADVANCE = pytest.mark.exercise("chapters.attention.linear.advance", points=2)
CHUNKED = pytest.mark.exercise("chapters.attention.linear.chunked_attention", points=3)
KERNEL_FORWARD = pytest.mark.exercise("kernels.attention.linear.attend_chunk", points=4)
KERNEL_BACKWARD = pytest.mark.exercise("kernels.attention.linear.chunk_key_gradients", points=4)

fast, book = kernel("attention.linear"), oracle("attention.linear")
GOLDEN = golden("attn/linear_attention_performer")
seeds = st.integers(0, 2**32 - 1)


def favor_golden(name: str) -> np.ndarray:
    return GOLDEN[f"favor/{name}"].astype(np.float64)


@FAVOR
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize(("prefix", "suffix", "eps"), [("", "", 1e-4), ("google_", "_eps1e-06", 1e-6)])
def test_features_are_the_released_codes(name, prefix, suffix, eps):
    x = favor_golden(name)
    copy = x.copy()
    projection = favor_golden("projection")
    found = linear.favor_features(x, projection, query=name == "q", eps=eps)
    assert_close(found, favor_golden(f"{prefix}{name}_features{suffix}"), terms=1)
    np.testing.assert_array_equal(x, copy)
    np.testing.assert_array_equal(linear.favor_features(x, projection, name == "q") == found, eps == 1e-4)


@FAVOR
@given(seeds, st.sampled_from((1.0, 30.0, 1e-3, 0.0)), st.sampled_from((1, 5, 8)), st.sampled_from((1, 7, 16)))
def test_features_are_positive_and_neither_overflow_nor_vanish_together(seed, size, D, count):
    generator = np.random.default_rng(seed)
    x, projection = size * generator.normal(size=(2, 6, D)), generator.normal(size=(count, D))
    y = x / D**0.25
    along = y @ projection.T
    for query, axes in ((True, -1), (False, (1, 2))):
        found = linear.favor_features(x, projection, query, eps=0.0)
        largest = along.max(axis=axes, keepdims=True)
        expected = np.exp(along - (y**2).sum(-1, keepdims=True) / 2 - largest) / np.sqrt(count)
        allowed = tolerance(np.float64, D, scale=np.abs(along).max() + 1)
        np.testing.assert_allclose(found, expected, **allowed)
        part = (1, slice(1 if query else None))  # a query, or all keys, without what stood around it
        np.testing.assert_allclose(linear.favor_features(x[part], projection, query, 0.0), expected[part], **allowed)


@FAVOR
@pytest.mark.parametrize("shape", [(4,), (8, 5)])
def test_features_refuse_shapes(shape):
    with pytest.raises(ValueError):
        linear.favor_features(np.ones((3, 4)), np.ones(shape), True)
    with pytest.raises(ValueError):
        linear.favor_features(np.ones(4), np.ones((8, 4)), True)


@FAVOR
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("query", [True, False])
def test_features_refuse_what_would_spread(bad, query):
    x = np.ones((3, 4))
    x[1, 2] = bad
    with pytest.raises(ValueError):
        linear.favor_features(x, np.ones((8, 4)), query)


def test_more_features_come_closer_to_softmax_and_the_mean_is_exact():
    q, k = (np.random.default_rng(seed).normal(size=(4, 8)) / 4 for seed in (0, 1))
    exact = np.exp(q @ k.T)
    errors = []
    for count in (32, 2048):
        drawn = [linear.orthogonal_projection(count, 8, seed) for seed in range(20)]
        maps = [[np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2) / np.sqrt(count) for x in (q, k)] for w in drawn]
        errors.append(np.mean([np.abs(a @ b.T - exact).mean() for a, b in maps]))
    assert errors[1] < errors[0] / 5  # 1/√64
    np.testing.assert_allclose(np.mean([a @ b.T for a, b in maps], axis=0), exact, rtol=0.03)


@given(st.integers(1, 20), st.integers(1, 9), seeds, st.booleans())
def test_projection_has_orthogonal_blocks(count, D, seed, chi):
    w = linear.orthogonal_projection(count, D, seed, chi)
    assert w.shape == (count, D)
    for start in range(0, count, D):
        gram = w[start : start + D] @ w[start : start + D].T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12 * gram.max())
    if not chi:
        np.testing.assert_allclose(np.linalg.norm(w, axis=1), np.sqrt(D))


@pytest.mark.parametrize("kind", ["rff", "rff_orthogonal"])
def test_trigonometric_features_are_the_original_codes(kind):
    x = GOLDEN["idiap/x"].astype(np.float64)
    found = linear.trigonometric_features(x / x.shape[-1] ** 0.25, GOLDEN[f"idiap/{kind}/omega"].T)
    assert_close(found, GOLDEN[f"idiap/{kind}/phi"], terms=1)


def test_rfa_forgets_lengths_and_is_a_gaussian_of_angles_on_average():
    x, w = np.random.default_rng(0).normal(size=(2, 6)), linear.orthogonal_projection(60_000, 6)
    phi = linear.rfa_features(x, w, sharpness=2.0)
    np.testing.assert_allclose(linear.rfa_features(3 * x, w, 2.0), phi, atol=1e-12)
    cosine = x[0] @ x[1] / np.prod(np.linalg.norm(x, axis=1))
    assert abs(phi[0] @ phi[1] - np.exp(2 * (cosine - 1))) < 0.01
    assert np.isfinite(linear.rfa_features(0 * x, w)).all()


@given(problems(), st.booleans())
def test_the_parallel_form_is_a_loop(problem, causal):
    q, k, v = problem.arrays()
    out, total = linear.linear_attention(q[:, :, -5:], k, v, causal)
    for i in range(min(5, q.shape[2])):
        last = k.shape[2] - min(5, q.shape[2]) + i + 1 if causal else k.shape[2]
        query = q[:, :, -5:][:, :, i]
        weights = np.stack([(query * k[:, :, j]).sum(-1) for j in range(last)], axis=-1)
        assert_close(total[:, :, i], weights.sum(-1) + linear.EPS)
        expected = sum(weights[..., j, None] * v[:, :, j] for j in range(last)) / total[:, :, i, None]
        assert_close(out[:, :, i], expected)


def test_attention_over_features_is_the_original_codes():
    q, k, v = (favor_golden(name) for name in ("q_features", "k_features", "v"))
    assert_close(linear.linear_attention(q, k, v, causal=False, eps=0.0)[0], favor_golden("out_noncausal"))
    for form in (linear.linear_attention, linear.chunked_attention):
        out, total = form(q, k, v, eps=0.0)
        total = total[..., None]  # theirs adds 1e-6 to each feature of the summed keys
        assert_close(out * total / (total + 1e-6 * q.sum(-1, keepdims=True)), favor_golden("out_causal"))


@ADVANCE
@given(problems())
def test_the_recurrent_form_is_the_parallel_one(problem):
    q, k, v = problem.arrays()
    out, _ = book.linear_attention(q, k, v)
    state = book.empty_state(k, v)
    for t in range(q.shape[2]):
        before = [x.copy() for x in state]
        found, after = linear.advance(state, q[:, :, t], k[:, :, t], v[:, :, t])
        for x, copy in zip(state, before, strict=True):
            np.testing.assert_array_equal(x, copy)
        assert_close(found, out[:, :, t])
        state = after
    assert_close(state[0], k.swapaxes(-1, -2) @ v)
    assert_close(state[1], k.sum(axis=-2))


@ADVANCE
@given(problems(), seeds)
def test_a_gate_forgets_by_the_product_of_the_gates_since(problem, seed):
    q, k, v = problem.arrays()
    gates = np.random.default_rng(seed).uniform(size=q.shape[:3])
    gates.flat[0], state = 0.0, book.empty_state(k, v)
    for t in range(q.shape[2]):
        before, copies = state, [x.copy() for x in state]
        out, state = linear.advance(state, q[:, :, t], k[:, :, t], v[:, :, t], 1e-3, gates[:, :, t])
        assert all(map(np.array_equal, before, copies)), "the given state was changed"
    kept = np.stack([np.prod(gates[:, :, s + 1 :], axis=2) * (1 - gates[:, :, s]) for s in range(q.shape[2])], axis=-1)
    weights = kept * (q[:, :, -1:] * k).sum(-1)
    assert_close(out, (weights[..., None] * v).sum(2) / (weights.sum(-1, keepdims=True) + 1e-3))


@ADVANCE
def test_one_sequence_needs_no_leading_axes():
    generator = np.random.default_rng(0)
    q, k, v, state = *generator.uniform(1, 2, (2, 3)), generator.normal(size=4), (np.ones((3, 4)), np.ones(3))
    for gate, keep, add in ((None, 1, 1), (np.array(0.25), 0.25, 0.75)):
        out, after = linear.advance(book.State(*state), q, k, v, gate=gate)
        assert_close(after.S, keep * state[0] + add * np.outer(k, v))
        assert_close(after.z, keep * state[1] + add * k)
        assert_close(out, q @ after.S / (q @ after.z + 1e-6))


@CHUNKED
@given(problems(), st.sampled_from((1, 4, 16, 64)) | st.integers(1, 40), st.sampled_from((0.0, 1e-6, 0.5)))
def test_the_chunked_form_is_the_parallel_one(problem, chunk, eps):
    arrays = problem.arrays()
    copies = [x.copy() for x in arrays]
    out, total = linear.chunked_attention(*arrays, chunk, eps)
    expected = book.linear_attention(*arrays, True, eps)
    assert_close(out, expected[0])
    assert_close(total, expected[1])
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


@CHUNKED
@given(problems(), st.data())
def test_what_comes_later_changes_nothing(problem, data):
    q, k, v = (x.copy() for x in problem.arrays())
    t = data.draw(st.integers(1, q.shape[2]))
    before = linear.chunked_attention(q, k, v, 4)
    q[:, :, t:], k[:, :, t:], v[:, :, t:] = 5, 7, -3
    for x, y in zip(before, linear.chunked_attention(q, k, v, 4), strict=True):
        np.testing.assert_array_equal(x[:, :, :t], y[:, :, :t])


@CHUNKED
def test_float32_stays_float32_and_leading_axes_are_free():
    problem = make("normal", 0, 9, 3, 4)
    arrays = [x[0, 0].astype(np.float32) for x in problem.arrays()]
    out, total = linear.chunked_attention(*arrays, 4)
    assert out.dtype == total.dtype == np.float32
    assert_close(out, book.linear_attention(*problem.arrays())[0][0, 0], np.float32)


@CHUNKED
def test_weights_are_made_inside_a_chunk_only():
    x = np.ones((1, 1, 512, 4))
    tracemalloc.start()
    linear.chunked_attention(x, x, x, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 * 512 * x.itemsize / 8, "of all weights, an eighth"


@CHUNKED
@pytest.mark.parametrize(("arrays", "options", "error"), wrong_input())
def test_chunked_refuses(arrays, options, error):
    with pytest.raises(error):
        linear.chunked_attention(*arrays, **options)


@CHUNKED
def test_chunked_refuses_other_lengths_and_empty_chunks():
    q, v = np.ones((5, 3)), np.ones((5, 4))
    for arrays, chunk in (((q[:4], q, v), 4), ((q, q, v), 0), ((q, q, v), -1)):
        with pytest.raises(ValueError):
            linear.chunked_attention(*arrays, chunk)


@given(problems(), st.sampled_from((1, 4, 64)))
def test_the_backward_pass_is_autograd_s(problem, chunk):
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in problem.arrays())
    weights = (q @ k.mT).tril()
    out = weights @ v / (weights.sum(-1, keepdim=True) + linear.EPS)
    expected = torch.autograd.grad(out, (q, k, v), torch.from_numpy(problem.dout))
    forward = book.chunked_attention(*problem.arrays())
    found = linear.chunked_attention_backward(problem.dout, *problem.arrays(), *forward, chunk)
    for gradient, truth in zip(found, expected, strict=True):
        size = max(np.abs(truth.numpy()).max(), np.abs(problem.v).max() / np.abs(problem.k).max() / 10)
        np.testing.assert_allclose(gradient, truth, **tolerance(np.float64, 40, scale=10 * size))


# --- the kernels --------------------------------------------------------------------------------------------------

few_examples = settings(max_examples=max(settings.default.max_examples // 4, 6))
KERNEL_PROBLEMS = problems(st.sampled_from((1, 17, 33)), st.sampled_from((1, 16, 24)), leading=((1, 2),))


@KERNEL_FORWARD
@pytest.mark.kernel
@few_examples
@given(KERNEL_PROBLEMS, st.sampled_from(KERNEL_DTYPES), st.sampled_from((16, 32)), st.booleans())
def test_kernel_is_the_reference(problem, dtype, chunk, aligned):
    out, total = fast.chunked_attention(*(on_device(x, dtype, aligned) for x in problem.arrays()), chunk, 1e-3)
    expected = book.chunked_attention(*problem.arrays(), eps=1e-3)
    assert out.dtype == dtype and total.dtype == torch.float32
    assert_same(out, expected[0])
    assert_same(total, expected[1])


@KERNEL_FORWARD
@pytest.mark.kernel
def test_kernel_sums_more_than_float16_holds():
    q, k = (torch.full((1, 1, 33, 16), x, dtype=torch.float16, device=DEVICE) for x in (20, 250))
    v = torch.full((1, 1, 33, 16), 200.0, dtype=torch.float16, device=DEVICE)
    out, total = fast.chunked_attention(q, k, v, 16)  # a weight is 80,000
    torch.testing.assert_close(out, v, **tolerance(torch.float16))
    assert total[0, 0, -1].item() == pytest.approx(33 * 80_000)


@KERNEL_BACKWARD
@pytest.mark.kernel
@few_examples
@given(KERNEL_PROBLEMS, st.sampled_from(KERNEL_DTYPES), st.sampled_from((16, 32)), st.booleans())
def test_backward_kernels_are_the_reference(problem, dtype, chunk, aligned):
    forward = book.chunked_attention(*problem.arrays())
    given_ = [on_device(x, dtype, aligned) for x in (problem.dout, *problem.arrays(), forward[0])]
    total = on_device(forward[1], torch.float32)
    rounded = (given_[-1].double().cpu().numpy(), total.double().cpu().numpy())
    expected = book.chunked_attention_backward(problem.dout, *problem.arrays(), *rounded)
    for gradient, truth in zip(fast.chunked_attention_backward(*given_, total, chunk), expected, strict=True):
        assert gradient.dtype == dtype
        assert_gradient(gradient, truth, problem)


def assert_gradient(gradient: torch.Tensor, truth: np.ndarray, problem) -> None:
    """dq and dk are differences of terms as large as dout v / k: their rounding stays when they cancel."""
    size = max(np.abs(truth).max(), np.abs(problem.dout).max() * np.abs(problem.v).max() / problem.k.min() / 16)
    length = 40 if gradient.dtype == torch.float32 else 1
    np.testing.assert_allclose(gradient.double().cpu(), truth, **tolerance(gradient.dtype, length, scale=size))


@KERNEL_BACKWARD
@pytest.mark.kernel
def test_backward_kernels_divide_by_more_than_float16_holds():
    problem = make("normal", 3, 33, 16, 16)
    arrays = (problem.q * 16, problem.k * 512, problem.v)  # weights of 1e5, q / denominator of 1e-5 and less
    forward = book.chunked_attention(*arrays)
    given_ = [on_device(x, torch.float16) for x in (problem.dout, *arrays, forward[0])]
    *_, dv = fast.chunked_attention_backward(*given_, on_device(forward[1], torch.float32), 16)
    assert_same(dv, book.chunked_attention_backward(problem.dout, *arrays, *forward)[2])


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernels_load_nothing_beyond_their_inputs(begins):
    problem = make("normal", 0, 17, 24, 16)
    expected = book.chunked_attention(*problem.arrays())
    arrays = (problem.dout, *problem.arrays(), *expected)
    tensors = [walled(torch.from_numpy(x).to(DEVICE, torch.float32), begins) for x in arrays]
    assert_same(fast.chunked_attention(*tensors[1:4], 16)[0], expected[0])
    gradients = fast.chunked_attention_backward(*tensors, 16)
    for gradient, truth in zip(gradients, book.chunked_attention_backward(*arrays), strict=True):
        assert_gradient(gradient, truth, problem)
