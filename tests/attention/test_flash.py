"""FlashAttention: the running softmax and both passes against the definition and torch; the kernels against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import flash
from tests.attention.checks import assert_close, assert_float32_close, assert_kernel_close, assert_one_tile, untouched
from tests.attention.on_device import DTYPES, PLACES, PROBLEMS, TILES, Place, at_the_wall, few_examples, on_device
from tests.attention.originals import GOLDEN, golden_case
from tests.attention.problems import BLOCKS, FAR_BELOW, HEADS, NORMAL, make, opposite_halves, problems, torch_attention
from tests.attention.refused import wrong_input, wrong_input_going_back
from tests.conftest import DEVICE, kernel, oracle, tolerance

ABSORB = pytest.mark.exercise("chapters.attention.flash.absorb_tile", points=2)
FORWARD = pytest.mark.exercise("chapters.attention.flash.flash_attention", points=3)
BACKWARD = pytest.mark.exercise("chapters.attention.flash.flash_attention_backward", points=3)
KERNEL_FORWARD = pytest.mark.exercise("kernels.attention.flash.attend_tiles", points=4)
KERNEL_BACKWARD = pytest.mark.exercise("kernels.attention.flash.add_key_gradients", points=4)

fast = kernel("attention.flash")
book = oracle("attention.flash")


@ABSORB
@given(problems(head_sizes=st.integers(1, 8)), st.data())
def test_absorbing_tiles_one_after_the_other_is_the_softmax_of_all(problem, data):
    scores = problem.q @ problem.k[:, :1].swapaxes(-1, -2)  # [B, H, T, S]
    hidden = np.random.default_rng(1).random(scores.shape[:3]) < 0.2  # whole rows
    scores, values = np.where(hidden[..., None], -np.inf, scores), problem.v[:, :1]
    cuts = sorted(data.draw(st.sets(st.integers(1, scores.shape[-1]), max_size=3)) | {scores.shape[-1]})
    state = (np.full_like(scores[..., :1], -np.inf), np.zeros_like(scores[..., :1]), np.zeros_like(problem.q))
    for start, stop in zip([0, *cuts], cuts, strict=False):
        before = [x.copy() for x in state]
        after = flash.absorb_tile(*state, scores[..., start:stop], values[:, :, start:stop])
        for x, copy in zip(state, before, strict=True):
            np.testing.assert_array_equal(x, copy)
        state = after
    weights = np.exp(scores - book.finite(scores.max(axis=-1, keepdims=True)))
    np.testing.assert_array_equal(state[0], scores.max(axis=-1, keepdims=True))
    assert_close(state[1], weights.sum(axis=-1, keepdims=True), problem)
    assert_close(state[2], weights @ values, problem)


@ABSORB
def test_a_tile_of_very_low_scores_counts_in_full():
    state = (np.full((1, 1), -np.inf), np.zeros((1, 1)), np.zeros((1, 2)))
    maximum, total, acc = flash.absorb_tile(*state, np.array([[-1e6]]), np.array([[3.0, 4.0]]))
    assert (maximum.item(), total.item(), acc.tolist()) == (-1e6, 1, [[3, 4]])


@FORWARD
@given(problems(), BLOCKS, BLOCKS)
def test_tiles_of_any_size_give_attention(problem, block_q, block_k):
    arrays, blocks = (problem.q, problem.k, problem.v), {"block_q": block_q, "block_k": block_k}
    out, lse = untouched(flash.flash_attention, *arrays, **problem.options(), **blocks)
    expected = book.attention(*arrays, **problem.options())
    assert_close(out, expected[0], problem)
    assert_close(lse, expected[1], problem)


@FORWARD
def test_float32_stays_float32():
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 4)).astype(np.float32)
    out, lse = flash.flash_attention(x, x, x, block_q=2, block_k=2)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, book.attention(*[x.astype(np.float64)] * 3)[0], **tolerance(np.float32))


@FORWARD
@pytest.mark.parametrize(("T", "S"), [(24, 24), (16, 24), (24, 16)])
def test_tiles_past_the_diagonal_are_not_touched(T, S):
    q, k, v = (np.random.default_rng(0).normal(size=(1, 1, length, 4)) for length in (T, S, S))
    hidden = S - 8  # a multiple of block_k; the queries before hidden + T - S see nothing from here on
    v[:, :, hidden:] = np.nan
    out, _ = flash.flash_attention(q, k, v, block_q=4, block_k=8)
    rows = slice(hidden + T - S)
    expected = book.attention(q[:, :, rows], k[:, :, :hidden], v[:, :, :hidden])[0]
    np.testing.assert_allclose(out[:, :, rows], expected, atol=1e-12)


@FORWARD
def test_a_tile_has_64_queries_unless_told():
    q, v = np.ones((1, 1, 65, 4)), np.ones((1, 1, 65, 4))
    v[:, :, 64] = np.nan  # past the diagonal for the first 64, which are one tile
    np.testing.assert_array_equal(np.isnan(flash.flash_attention(q, q, v)[0][0, 0, :, 0]), np.arange(65) == 64)


@FORWARD
def test_forward_with_scores_far_below_zero():
    out, lse = flash.flash_attention(FAR_BELOW.q, FAR_BELOW.k, FAR_BELOW.v)
    assert (out.item(), lse.item()) == (FAR_BELOW.v.item(), -(2**20))


@FORWARD
@pytest.mark.parametrize(("arrays", "options", "error"), wrong_input())
def test_forward_refuses(arrays, options, error):
    with pytest.raises(error):
        flash.flash_attention(**arrays, **options)


@BACKWARD
@given(problems(), BLOCKS, BLOCKS)
def test_backward_is_autograd_s(problem, block_q, block_k):
    tensors = [torch.from_numpy(x).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = torch_attention(*tensors, problem.causal, problem.scale)
    seen = ~out.detach().isnan()  # NaN: the query sees no key
    dout = torch.from_numpy(problem.dout)
    expected = torch.autograd.grad(torch.where(seen, out, 0).mul(dout).sum(), tensors)
    arrays = (problem.q, problem.k, problem.v)
    forward = book.attention(*arrays, **problem.options())
    given_, blocks = (problem.dout, *arrays, *forward), {"block_q": block_q, "block_k": block_k}
    gradients = untouched(flash.flash_attention_backward, *given_, **problem.options(), **blocks)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert_close(gradient, truth.nan_to_num(0), problem)


@BACKWARD
def test_gradients_of_float32_are_float32():
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 4)).astype(np.float32)
    gradients = flash.flash_attention_backward(x, x, x, x, *book.attention(x, x, x), block_q=2, block_k=2)
    exact = [x.astype(np.float64)] * 3
    expected = book.flash_attention_backward(exact[0], *exact, *book.attention(*exact))
    for gradient, truth in zip(gradients, expected, strict=True):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, truth, **tolerance(np.float32))


@BACKWARD
def test_backward_with_scores_far_below_zero():
    arrays = (FAR_BELOW.q, FAR_BELOW.k, FAR_BELOW.v)
    dq, dk, dv = flash.flash_attention_backward(FAR_BELOW.dout, *arrays, *book.attention(*arrays))
    assert (dq.item(), dk.item(), dv.item()) == (0, 0, FAR_BELOW.dout.item())


@BACKWARD
@pytest.mark.parametrize(("arrays", "options", "error"), wrong_input_going_back())
def test_backward_refuses(arrays, options, error):
    with pytest.raises(error):
        flash.flash_attention_backward(**arrays, **options)


SQUARE = np.random.default_rng(0).normal(size=(1, 1, 512, 4))
BLOCK_PAIRS = pytest.mark.parametrize(("block_q", "block_k"), [(8, 512), (512, 8), (32, 32), (256, 256)])


@FORWARD
@BLOCK_PAIRS
def test_a_tile_of_that_size_is_all_that_is_made(block_q, block_k):
    assert_one_tile(flash.flash_attention, SQUARE, SQUARE, SQUARE, block_q=block_q, block_k=block_k)


@BACKWARD
@BLOCK_PAIRS
def test_a_tile_of_that_size_is_all_that_is_made_going_back(block_q, block_k):
    x = (SQUARE,) * 3
    assert_one_tile(flash.flash_attention_backward, SQUARE, *x, *book.attention(*x), block_q=block_q, block_k=block_k)


@FORWARD
@pytest.mark.parametrize(("file", "case", "options"), GOLDEN)
def test_forward_is_the_original_code_s(file, case, options):
    arrays = golden_case(file, case)
    found = flash.flash_attention(*(arrays[name] for name in ("q", "k", "v")), **options, block_q=8, block_k=8)
    for name, value in zip(("out", "lse"), found, strict=True):
        np.testing.assert_allclose(value, arrays[name], rtol=0, atol=1e-10, err_msg=name)


@BACKWARD
@pytest.mark.parametrize(("file", "case", "options"), GOLDEN)
def test_backward_is_the_original_code_s(file, case, options):
    arrays = golden_case(file, case)
    given_ = (arrays[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    found = flash.flash_attention_backward(*given_, **options, block_q=8, block_k=8)
    for name, value in zip(("dq", "dk", "dv"), found, strict=True):
        np.testing.assert_allclose(value, arrays[name], rtol=0, atol=1e-10, err_msg=name)


# --- the kernels --------------------------------------------------------------------------------------------------


@KERNEL_FORWARD
@pytest.mark.kernel
@few_examples
@given(PROBLEMS, DTYPES, TILES, TILES, PLACES)
def test_kernel_is_the_reference(problem, dtype, block_q, block_k, places):
    q, k, v = map(on_device, (problem.q, problem.k, problem.v), [dtype] * 3, places)
    out, lse = fast.flash_attention(q, k, v, **problem.options(), block_q=block_q, block_k=block_k)
    expected = book.attention(problem.q, problem.k, problem.v, **problem.options())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_kernel_close(out, expected[0], problem)
    assert_kernel_close(lse, expected[1], problem)


@KERNEL_FORWARD
@pytest.mark.kernel
@settings(max_examples=5)  # of one kind, four tiles of keys each
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_kernel_when_the_maximum_rises_with_every_tile(seed, causal):
    problem = make("rising", seed, heads=HEADS[0], T=16, S=64, D=16, causal=causal, scale=None)
    q, k, v = (on_device(x, torch.float32) for x in (problem.q, problem.k, problem.v))
    out, lse = fast.flash_attention(q, k, v, causal, block_q=16, block_k=16)
    expected = book.attention(problem.q, problem.k, problem.v, causal)
    assert_kernel_close(out, expected[0], problem)
    assert_kernel_close(lse, expected[1], problem)


@KERNEL_BACKWARD
@pytest.mark.kernel
@few_examples
@given(PROBLEMS, DTYPES, TILES, TILES, PLACES)
def test_backward_kernels_are_the_reference(problem, dtype, block_q, block_k, places):
    arrays = (problem.q, problem.k, problem.v)
    forward = book.attention(*arrays, **problem.options())
    dout, q, k, v, out = map(on_device, (problem.dout, *arrays, forward[0]), [dtype] * 5, places)
    lse = on_device(forward[1], torch.float32)
    rounded = (out.double().cpu().numpy(), lse.double().cpu().numpy())  # what the kernel is given, no more
    expected = book.flash_attention_backward(problem.dout, *arrays, *rounded, **problem.options())
    gradients = fast.flash_attention_backward(
        dout, q, k, v, out, lse, **problem.options(), block_q=block_q, block_k=block_k
    )
    for gradient, truth in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert_kernel_close(gradient, truth, problem)


EXACT = pytest.mark.parametrize("problem", [NORMAL, FAR_BELOW], ids=["normal", "far below zero"])
AT_WALLS = pytest.mark.parametrize(("D", "causal", "begins"), [(16, True, False), (24, False, False), (24, True, True)])
ACROSS, BLOCKS_OF_16 = Place(across=True), {"block_q": 16, "block_k": 16}


@KERNEL_FORWARD
@pytest.mark.kernel
@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # both hold q, k and v exactly
def test_kernel_computes_in_float32(problem, dtype):
    arrays = (problem.q, problem.k, problem.v)
    out, lse = fast.flash_attention(*map(on_device, arrays, [dtype] * 3, (ACROSS, ACROSS, Place())), **BLOCKS_OF_16)
    expected = book.attention(*arrays)
    assert_float32_close(lse, expected[1])
    if dtype == torch.float32:
        assert_float32_close(out, expected[0])


@KERNEL_FORWARD
@pytest.mark.kernel
def test_kernel_sums_what_float16_cannot_hold():
    q, v = (torch.full((1, 1, 32, 16), value, dtype=torch.float16, device=DEVICE) for value in (256, 8192))
    out, _ = fast.flash_attention(q[:, :, :16], q, v, False, 2.0**-20, **BLOCKS_OF_16)
    torch.testing.assert_close(out, v[:, :, :16])


@KERNEL_FORWARD
@pytest.mark.kernel
@AT_WALLS
def test_kernel_loads_nothing_beyond_its_inputs(D, causal, begins):
    problem = make("normal", 0, (1, 2, 1), T=17, S=19, D=D, causal=causal, scale=None)
    q, k, v = (at_the_wall(x, begins) for x in (problem.q, problem.k, problem.v))
    out, _ = fast.flash_attention(q, k, v, causal, **BLOCKS_OF_16)
    assert_float32_close(out, book.attention(problem.q, problem.k, problem.v, causal)[0])


@KERNEL_BACKWARD
@pytest.mark.kernel
@EXACT
def test_backward_kernels_compute_in_float32(problem):
    arrays = (problem.q, problem.k, problem.v)
    inputs = (problem.dout, *arrays, *book.attention(*arrays))
    places = (Place(), ACROSS, ACROSS, Place(), ACROSS, Place())
    gradients = fast.flash_attention_backward(*map(on_device, inputs, [torch.float32] * 6, places), **BLOCKS_OF_16)
    for gradient, truth in zip(gradients, book.flash_attention_backward(*inputs), strict=True):
        assert_float32_close(gradient, truth)


@KERNEL_BACKWARD
@pytest.mark.kernel
def test_backward_kernels_sum_what_float16_cannot_hold():
    problem = opposite_halves()
    arrays = (problem.q, problem.k, problem.v)
    inputs = (problem.dout, *arrays, *book.attention(*arrays, **problem.options()))
    tensors = map(on_device, inputs, [torch.float16] * 5 + [torch.float32])
    gradients = fast.flash_attention_backward(*tensors, **problem.options(), **BLOCKS_OF_16)
    expected = book.flash_attention_backward(*inputs, **problem.options())
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient.double().cpu(), truth, **tolerance(torch.float16))


@KERNEL_BACKWARD
@pytest.mark.kernel
@AT_WALLS
def test_backward_kernels_load_nothing_beyond_their_inputs(D, causal, begins):
    problem = make("normal", 0, (1, 2, 1), T=17, S=19, D=D, causal=causal, scale=None)
    arrays = (problem.q, problem.k, problem.v)
    inputs = (problem.dout, *arrays, *book.attention(*arrays, causal))
    gradients = fast.flash_attention_backward(*(at_the_wall(x, begins) for x in inputs), causal, **BLOCKS_OF_16)
    for gradient, truth in zip(gradients, book.flash_attention_backward(*inputs, causal), strict=True):
        assert_float32_close(gradient, truth)
