"""Adaptive span: mask, attention and its gradients against the definition and autograd; the kernels against them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import adaptive_span as chapter
from tests.attention.checks import assert_close, assert_float32_close, assert_kernel_close, untouched
from tests.attention.on_device import DTYPES, PLACES, TILES, Place, at_the_wall, few_examples, on_device
from tests.attention.problems import HEADS, torch_attention
from tests.attention.spans import (
    BAD_SPANS,
    Spanned,
    attended_by_hand,
    counts,
    gradients_by_autograd,
    refusals,
    span_problems,
    spanned,
)
from tests.conftest import DEVICE, HAS_TRITON, golden, kernel, oracle, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # logarithms of what is then masked out
book, fast = oracle("attention.adaptive_span"), kernel("attention.adaptive_span")
PROBLEMS = span_problems(st.integers(1, 6), st.sampled_from((0, 1, 5, 11)), st.sampled_from((1, 3, 8)))
PARTS = st.integers(0, 64 * 8).map(lambda eighths: eighths / 8)


@pytest.mark.exercise("chapters.attention.adaptive_span.soft_mask", points=1)
class TestSoftMask:
    @given(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from((1, 2, 3, 32)), st.integers(64, 70))
    def test_each_pair_counts_as_defined(self, span, ramp, max_span):
        distance = np.arange(-3, 75)
        mask = untouched(chapter.soft_mask, distance, np.array(span)[:, None], ramp=ramp, max_span=max_span)
        assert mask.dtype == np.float64 and mask.shape == (len(span), 78)
        expected = [[counts(int(x), z, ramp, max_span) for x in distance] for z in span]
        np.testing.assert_allclose(mask, expected, **tolerance(float))

    def test_equals_the_released_code(self):
        arrays = golden("attn/adaptive_span")
        L = int(arrays["mask/max_size"])
        span = L * arrays["mask/current_val"]
        mask = chapter.soft_mask(np.arange(L - 1, -1, -1), span[:, None], int(arrays["mask/ramp"]), L)
        np.testing.assert_allclose(mask, arrays["mask/mask"][:, 0], **tolerance(float))

    def test_a_pair_with_one_span_is_a_number(self):
        assert [float(chapter.soft_mask(np.array(x), np.array(2), 4, 100)) for x in (2, 3, 5, 6)] == [1, 0.75, 0.25, 0]
        assert chapter.soft_mask(np.arange(6), np.array(5), 1, 5).tolist() == [1, 1, 1, 1, 1, 0]

    @pytest.mark.parametrize("span", BAD_SPANS)
    def test_refuses_spans(self, span):
        with pytest.raises(ValueError):
            chapter.soft_mask(np.arange(5), np.array([1.0, span])[:, None], 4, 5)

    @pytest.mark.parametrize(("ramp", "max_span"), [(0, 5), (-1, 5), (4, 0)])
    def test_refuses_lengths(self, ramp, max_span):
        with pytest.raises(ValueError):
            chapter.soft_mask(np.arange(5), np.array(0.0), ramp, max_span)


@pytest.mark.exercise("chapters.attention.adaptive_span.span_attention", points=2)
class TestSpanAttention:
    @given(PROBLEMS)
    def test_each_query_counts_its_keys_by_its_head_s_mask(self, case):
        out, lse = untouched(chapter.span_attention, *case.arrays, case.span, **case.options())
        expected = attended_by_hand(case)
        assert_close(out, expected[0], case.problem)
        assert_close(lse, expected[1], case.problem)

    @given(st.integers(0, 99), st.sampled_from(HEADS))
    def test_spans_as_long_as_the_text_are_full_attention(self, seed, heads):
        case = spanned("normal", seed, heads, 5, 6, 8, 4, None)
        span = np.full(case.span.shape, 11.0)
        expected = torch_attention(*map(torch.from_numpy, case.arrays), True, None)
        np.testing.assert_allclose(chapter.span_attention(*case.arrays, span, 4)[0], expected, **tolerance(float, 11))

    @pytest.mark.parametrize("size", [1e4, -1e4])
    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_scores_of_any_size_stay_finite_also_those_of_hidden_keys(self, size, eps):
        case = spanned("normal", 3, HEADS[0], 1, 9, 4, 2, None)
        k = case.problem.k.copy()
        k[:, :, :3] = size * case.problem.q  # distances 7 to 9: out of reach
        out, lse = chapter.span_attention(case.problem.q, k, case.problem.v, np.array([4.0]), 2, eps=eps)
        near = (case.problem.q, k[:, :, 3:], case.problem.v[:, :, 3:])
        expected, sums = book.span_attention(*near, np.array([4.0]), 2)
        outweighed = eps > 0 and size > 0  # then the released code gives 0
        np.testing.assert_allclose(out, 0 * expected if outweighed else expected, atol=1e-6)
        np.testing.assert_allclose(lse, sums, **tolerance(float))

    @pytest.mark.parametrize("max_span", [None, 6])
    def test_eps_is_added_to_the_shares_that_the_mask_leaves(self, max_span):
        case = spanned("normal", 5, HEADS[4], 4, 7, 8, 3, max_span)
        q, k, v = case.arrays
        distance = np.arange(4)[:, None] + 7 - np.arange(11)
        inside = (distance >= 0) & (distance < (max_span or 11))
        scores = q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2) / math.sqrt(8)
        shares = np.where(inside, np.exp(scores), 0)
        shares /= shares.sum(axis=-1, keepdims=True)
        kept = shares * book.soft_mask(distance, case.span[:, None, None], 3, case.limit)
        expected = kept / (kept.sum(axis=-1, keepdims=True) + 0.05) @ np.repeat(v, 2, axis=1)
        found = chapter.span_attention(q, k, v, case.span, 3, max_span, eps=0.05)[0]
        np.testing.assert_allclose(found, expected, **tolerance(float, 11))

    def test_float32_stays_float32(self):
        case = spanned("normal", 1, HEADS[4], 5, 4, 8, 3, None)
        found = chapter.span_attention(*(x.astype(np.float32) for x in case.arrays), case.span, 3)
        for value, expected in zip(found, book.span_attention(*case.arrays, case.span, 3), strict=True):
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected, **tolerance(np.float32, 9))

    @pytest.mark.parametrize(("arrays", "options", "error"), refusals())
    def test_refuses(self, arrays, options, error):
        with pytest.raises(error):
            chapter.span_attention(**arrays, **options)


@pytest.mark.exercise("chapters.attention.adaptive_span.span_attention_backward", points=3)
class TestBackward:
    @given(PROBLEMS)
    def test_is_autograd_s(self, case):
        forward = book.span_attention(*case.arrays, case.span, **case.options())
        given_ = (case.problem.dout, *case.arrays, *forward, case.span)
        gradients = untouched(chapter.span_attention_backward, *given_, **case.options())
        for gradient, expected in zip(gradients, gradients_by_autograd(case), strict=True):
            assert gradient.shape == expected.shape
            assert_close(gradient, expected, case.problem)

    @pytest.mark.parametrize("span", [0.25, 3.0, 4.5, 8.0])
    def test_a_span_s_gradient_is_what_shrinking_it_changes(self, span):
        case = spanned("normal", 2, HEADS[0], 6, 5, 8, 3, None)

        def loss(z):
            return (book.span_attention(*case.arrays, np.array([z]), 3)[0] * case.problem.dout).sum()

        forward = book.span_attention(*case.arrays, np.array([span]), 3)
        found = chapter.span_attention_backward(case.problem.dout, *case.arrays, *forward, np.array([span]), 3)[3]
        np.testing.assert_allclose(found, [(loss(span) - loss(span - 1e-6)) / 1e-6], rtol=1e-4, atol=1e-6)

    def test_gradients_of_float32_are_close(self):
        case = spanned("normal", 1, HEADS[4], 5, 4, 8, 3, None)
        forward = book.span_attention(*case.arrays, case.span, 3)
        given_ = [x.astype(np.float32) for x in (case.problem.dout, *case.arrays, *forward)]
        gradients = chapter.span_attention_backward(*given_, case.span, 3)
        assert [gradient.dtype for gradient in gradients] == [np.float32, np.float32, np.float32, np.float64]
        for gradient, expected in zip(gradients, gradients_by_autograd(case), strict=True):
            np.testing.assert_allclose(gradient, expected, **tolerance(np.float32, 18, 4))

    @pytest.mark.parametrize(("arrays", "options", "error"), refusals())
    def test_refuses(self, arrays, options, error):
        with pytest.raises(error):
            chapter.span_attention_backward(
                arrays["q"], *list(arrays.values())[:3], arrays["q"], arrays["q"][..., 0], arrays["span"], **options
            )

    @pytest.mark.parametrize("name", ["dout", "out", "lse"])
    def test_refuses_what_does_not_fit_q(self, name):
        x = np.ones((1, 2, 3, 4))
        given_ = {"dout": x, "q": x, "k": x, "v": x, "out": x, "lse": x[..., 0], "span": np.ones(2)}
        with pytest.raises(ValueError):
            chapter.span_attention_backward(**given_ | {name: given_[name].swapaxes(-1, -2)})


# --- what is counted ----------------------------------------------------------------------------------------------


@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from((1, 3, 32)), st.integers(64, 90))
def test_so_many_keys_are_read_as_count(span, ramp, max_span):
    mask = book.soft_mask(np.arange(200), np.array(span)[:, None], ramp, max_span)
    np.testing.assert_array_equal(chapter.keys_read(np.array(span), ramp, max_span), (mask > 0).sum(axis=1))


@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(1, 150))
def test_the_share_is_of_all_pairs_that_a_causal_head_sees(span, length):
    x = np.arange(length)[:, None] - np.arange(length)
    mask = book.soft_mask(x, np.array(span)[:, None, None], 4, 100)
    share = (mask > 0).sum() / ((x >= 0).sum() * len(span))
    assert math.isclose(chapter.share_read(np.array(span), 4, 100, length), share)


def test_counts_and_penalty_are_those_of_the_released_code():
    arrays = golden("attn/adaptive_span")
    span, ramp, L = 16 * arrays["mask/current_val"], int(arrays["mask/ramp"]), int(arrays["mask/max_size"])
    assert chapter.keys_read(span, ramp, L).max() == arrays["mask/max_span"] == chapter.trimmed_length(span, ramp, L)
    assert chapter.keys_read(span.mean(), ramp, L) == arrays["mask/avg_span"]
    penalty = chapter.span_penalty(span, arrays["mask/loss_coeff"])
    np.testing.assert_allclose(penalty, arrays["mask/loss"], **tolerance(float))


def test_a_slot_of_the_released_code_is_a_distance_here():
    arrays = golden("attn/adaptive_span")
    queries, slots = arrays["skew/unskew_out"].shape[1:]
    distance = chapter.distances(queries, queries + slots - 1)  # there a token does not see itself: one key less
    for t, slot in np.ndindex(queries, slots):
        assert arrays["skew/unskew_out"][0, t, slot] == arrays["skew/unskew_in"][0, t, t + slot]
        assert distance[t, t + slot] == slots - 1 - slot


# --- the kernels --------------------------------------------------------------------------------------------------

REACH = pytest.mark.exercise("kernels.attention.adaptive_span.keys_in_reach", points=2)
ATTEND = pytest.mark.exercise("kernels.attention.adaptive_span.attend_span_tiles", points=4)
LENGTHS = st.sampled_from((1, 17, 33)) | st.integers(1, 33)
SMALL = span_problems(LENGTHS, st.sampled_from((0, 1, 16, 30)), st.sampled_from((1, 16, 24)), heads=HEADS[:5])

if HAS_TRITON:
    import triton
    import triton.language as tl

    keys_in_reach = fast.keys_in_reach

    @triton.jit
    def reach_kernel(out_ptr, start, span, ramp, max_span, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
        tile = start + tl.program_id(0) * 0
        first, whole, diagonal, last = keys_in_reach(tile, span, ramp, max_span, T, S, BLOCK_Q, BLOCK_K)
        tl.store(out_ptr, first)
        tl.store(out_ptr + 1, whole)
        tl.store(out_ptr + 2, diagonal)
        tl.store(out_ptr + 3, last)


def tiles_by_hand(start, span, ramp, max_span, T, S, block_q, block_k):
    """(first, last, the starts of tiles that all queries count in full)."""
    x = np.arange(start, start + block_q)[:, None] + S - T - np.arange(S)
    mask = book.soft_mask(x, np.array(span), ramp, max_span)
    starts = range(0, S, block_k)
    full = [j for j in starts if j + block_k <= S and (mask[:, j : j + block_k] == 1).all()]
    return int(np.flatnonzero(mask[0])[0]) // block_k * block_k, min(start + block_q + S - T, S), full


@REACH
@pytest.mark.kernel
@settings(max_examples=60)
@given(
    st.integers(1, 70), st.integers(0, 90), PARTS, st.sampled_from((1, 3, 32)), st.integers(0, 40), TILES, TILES,
    st.data(),
)  # fmt: skip
def test_tiles_are_those_that_hold_a_key_in_reach(T, past, span, ramp, more, block_q, block_k, data):
    max_span = max(math.ceil(span) + more, 1)
    start = block_q * data.draw(st.integers(0, (T - 1) // block_q))
    found = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    reach_kernel[(1,)](found, start, span, float(ramp), max_span, T, T + past, block_q, block_k)
    first, whole, diagonal, last = found.tolist()
    oldest, newest, full = tiles_by_hand(start, span, ramp, max_span, T, T + past, block_q, block_k)
    assert (first, last) == (oldest, newest)
    assert whole % block_k == diagonal % block_k == 0 and whole <= diagonal
    assert list(range(whole, diagonal, block_k)) == full


@REACH
@pytest.mark.kernel
def test_a_span_of_max_span_counts_no_key_beyond_it():
    found = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    reach_kernel[(1,)](found, 0, 31.0, 4.0, 31, 16, 64, 16, 16)  # queries 48 to 63: key 32 is 31 before the last
    assert found.tolist() == [16, 48, 48, 64]


@REACH
@pytest.mark.kernel
@pytest.mark.parametrize(("span", "hidden"), [(0.0, 32), (7.0, 32), (12.0, 32), (13.0, 16), (60.0, 0)])
def test_keys_out_of_reach_are_never_loaded(span, hidden):
    case = spanned("normal", 4, HEADS[0], 16, 48, 16, 4, None)
    k, v = case.problem.k.copy(), case.problem.v.copy()
    expected = book.span_attention(case.problem.q, k, v, np.array([span]), 4)
    k[:, :, :hidden] = v[:, :, :hidden] = np.nan  # the first query stands at key 48 and reads span + 4 keys
    tensors = (on_device(x, torch.float32) for x in (case.problem.q, k, v, np.array([span])))
    out, lse = fast.span_attention(*tensors, 4, block_q=16, block_k=16)
    assert_float32_close(out, expected[0])
    assert_float32_close(lse, expected[1])


def run_kernel(case: Spanned, dtype, places, **blocks):
    """out and lse by the kernel."""
    q, k, v = map(on_device, case.arrays, [dtype] * 3, places)
    span = on_device(case.span, torch.float32)
    return fast.span_attention(q, k, v, span, **case.options(), **blocks)


@ATTEND
@pytest.mark.kernel
@few_examples
@given(SMALL, DTYPES, TILES, TILES, PLACES)
def test_kernel_is_the_reference(case, dtype, block_q, block_k, places):
    out, lse = run_kernel(case, dtype, places, block_q=block_q, block_k=block_k)
    expected = book.span_attention(*case.arrays, case.span, **case.options())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_kernel_close(out, expected[0], case.problem)
    assert_kernel_close(lse, expected[1], case.problem)


@ATTEND
@pytest.mark.kernel
@pytest.mark.parametrize(("span", "ramp"), [(70.0, 4), (40.0, 32), (0.0, 1)])
def test_kernel_over_masked_and_plain_tiles_in_turn(span, ramp):
    case = spanned("rising", 6, (1, 1, 2), 20, 77, 16, ramp, None)
    spans = np.array([span, span / 2])
    out, lse = run_kernel(
        Spanned(case.problem, spans, ramp, None), torch.float32, [Place()] * 3, block_q=16, block_k=16
    )
    expected = book.span_attention(*case.arrays, spans, ramp)
    assert_kernel_close(out, expected[0], case.problem)
    assert_kernel_close(lse, expected[1], case.problem)


@ATTEND
@pytest.mark.kernel
def test_kernel_does_not_let_a_hidden_key_set_the_maximum():
    case = spanned("normal", 3, HEADS[0], 1, 15, 16, 2, None)
    k = case.problem.k.copy()
    k[:, :, :8] = 30 * case.problem.q  # its tile is loaded, but it is out of reach
    hidden = Spanned(type(case.problem)(**vars(case.problem) | {"k": k}), np.array([3.0]), 2, None)
    out, lse = run_kernel(hidden, torch.float32, [Place()] * 3, block_q=16, block_k=16)
    expected = book.span_attention(*hidden.arrays, hidden.span, 2)
    np.testing.assert_allclose(out.cpu(), expected[0], **tolerance(torch.float32, 16))
    np.testing.assert_allclose(lse.cpu(), expected[1], **tolerance(torch.float32, 16))


@pytest.mark.kernel
@pytest.mark.parametrize("span", [1e9, np.inf])
def test_kernel_takes_spans_that_float32_cannot_count_for_max_span(span):
    case = spanned("normal", 8, HEADS[0], 20, 57, 16, 4, 37)
    expected = book.span_attention(*case.arrays, np.full_like(case.span, 37), 4, 37)
    endless = Spanned(case.problem, np.full_like(case.span, span), 4, 37)
    out, _ = run_kernel(endless, torch.float32, [Place()] * 3, block_q=16, block_k=16)
    assert_kernel_close(out, expected[0], case.problem)


@ATTEND
@pytest.mark.kernel
def test_kernel_sums_what_float16_cannot_hold():
    q, v = (torch.full((1, 1, 32, 16), value, dtype=torch.float16, device=DEVICE) for value in (256, 8192))
    span = torch.full((1,), 32.0, device=DEVICE)
    out, _ = fast.span_attention(q, q, v, span, 4, None, 2.0**-20, block_q=16, block_k=16)
    torch.testing.assert_close(out, v)


@ATTEND
@pytest.mark.kernel
@pytest.mark.parametrize(("D", "begins"), [(16, False), (24, False), (24, True)])
def test_kernel_loads_nothing_beyond_its_inputs(D, begins):
    case = spanned("normal", 0, (1, 2, 1), 17, 20, D, 4, None)
    tensors = (at_the_wall(x, begins) for x in (*case.arrays, case.span))
    out, _ = fast.span_attention(*tensors, 4, block_q=16, block_k=16)
    assert_float32_close(out, book.span_attention(*case.arrays, case.span, 4)[0])
