"""FlashAttention's variants: both passes against the definition and torch in all combinations; the kernels likewise."""

from __future__ import annotations

import math
import tracemalloc
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import flash_variants
from tests.attention.checks import assert_close, assert_float32_close, assert_kernel_close, untouched
from tests.attention.on_device import DTYPES, LENGTHS, PLACES, TILES, Place, at_the_wall, on_device
from tests.attention.problems import BLOCKS, FAR_BELOW, HEADS, make
from tests.attention.refused_variants import refusals
from tests.attention.variants import GOLDEN, Variant, golden_variant, torch_variant, variants
from tests.conftest import DEVICE, kernel, oracle, tolerance

MODIFY = pytest.mark.exercise("chapters.attention.flash_variants.modified_scores", points=2)
FORWARD = pytest.mark.exercise("chapters.attention.flash_variants.flash_attention", points=4)
BACKWARD = pytest.mark.exercise("chapters.attention.flash_variants.flash_attention_backward", points=4)
KERNEL_FORWARD = pytest.mark.exercise("kernels.attention.flash_variants.attend_tiles", points=4)
KERNEL_BACKWARD = pytest.mark.exercise("kernels.attention.flash_variants.add_key_gradients", points=4)

fast = kernel("attention.flash_variants")
book = oracle("attention.flash_variants")
REACH = st.just(math.inf) | st.integers(0, 6)


@MODIFY
@given(st.integers(0, 2**32 - 1), REACH, REACH, st.sampled_from((None, 0.5, 30.0)), st.booleans(), st.integers(-9, 9))
def test_scores_are_capped_then_biased_then_masked(seed, left, right, softcap, biased, shift):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(1, 2, 4, 5)) * 10.0 ** generator.integers(-3, 4)
    distance = np.arange(5) - np.arange(4)[:, None] + shift
    slopes = generator.uniform(0, 2, (2, 1, 1)) if biased else None
    kept, more = deepcopy(slopes), {"left": left, "right": right, "softcap": softcap, "slopes": slopes}
    found = untouched(flash_variants.modified_scores, scores, distance, **more)
    np.testing.assert_equal(slopes, kept)
    for place in np.ndindex(scores.shape):
        x, ahead = scores[place], int(distance[place[2:]])
        x = x if softcap is None else softcap * math.tanh(x / softcap)
        x = x - slopes[place[1], 0, 0] * abs(ahead) if biased else x
        x = x if -left <= ahead <= right else -math.inf
        np.testing.assert_allclose(found[place], x, rtol=1e-12, atol=1e-12)


@MODIFY
def test_modified_scores_keep_float32():
    scores, distance = np.array([[-1e30, 1.0, 1e30]], np.float32), np.array([[-1, 0, 1]])
    found = flash_variants.modified_scores(scores, distance, 1, 0, 5.0, np.ones((1, 1)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[-6, 5 * math.tanh(0.2), -np.inf]], rtol=1e-6)


@FORWARD
@given(variants(), BLOCKS, BLOCKS)
def test_tiles_of_any_size_give_attention(variant, block_q, block_k):
    options, kept = variant.options(), deepcopy(variant.options())
    out, lse = untouched(flash_variants.flash_attention, *variant.arrays, **options, block_q=block_q, block_k=block_k)
    np.testing.assert_equal(options, kept)
    expected = book.attention(*variant.arrays, **options)
    assert_close(out, expected[0], variant.problem)
    assert_close(lse, expected[1], variant.problem)


@FORWARD
@pytest.mark.parametrize(("case", "options"), GOLDEN)
def test_forward_is_the_original_code_s(case, options):
    arrays, options, allowed = golden_variant(case, options)
    found = flash_variants.flash_attention(*(arrays[x] for x in "qkv"), **options, block_q=4, block_k=8)
    for name, value in zip(("out", "lse"), found, strict=True):
        if name in arrays:
            np.testing.assert_allclose(value, arrays[name], rtol=0, atol=allowed, err_msg=name)


@FORWARD
def test_float32_stays_float32_beside_float64_slopes():
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 4)).astype(np.float32)
    options = {"slopes": np.array([0.5, 0.1]), "softcap": 2.0, "window": (3, None)}
    out, lse = flash_variants.flash_attention(x, x, x, **options, block_q=2, block_k=2)
    assert out.dtype == lse.dtype == np.float32
    exact = book.attention(*[x.astype(np.float64)] * 3, **options)
    np.testing.assert_allclose(out, exact[0], **tolerance(np.float32))


@FORWARD
@pytest.mark.parametrize(
    ("window", "causal", "seen"), [((8, None), True, (16, 32)), ((8, 8), False, (16, 40)), ((None, 8), False, (0, 40))]
)
def test_tiles_outside_the_window_are_not_touched(window, causal, seen):
    q, k, v = (np.random.default_rng(0).normal(size=(1, 1, 64, 4)) for _ in range(3))
    rows = slice(24, 32)  # one tile; keys outside of `seen` fill tiles that none of its queries sees
    v[:, :, : seen[0]] = v[:, :, seen[1] :] = np.nan
    out, _ = flash_variants.flash_attention(q, k, v, causal, window=window, block_q=8, block_k=8)
    expected = book.attention(q, k, np.nan_to_num(v), causal, window=window)[0]
    np.testing.assert_allclose(out[:, :, rows], expected[:, :, rows], atol=1e-12)


@FORWARD
def test_a_tile_has_64_queries_unless_told():
    q, v = np.ones((1, 1, 65, 4)), np.ones((1, 1, 65, 4))
    v[:, :, 64] = np.nan  # past the diagonal for the first 64, which are one tile
    out, _ = flash_variants.flash_attention(q, q, v)
    np.testing.assert_array_equal(np.isnan(out[0, 0, :, 0]), np.arange(65) == 64)


@FORWARD
def test_sequences_do_not_meet_even_in_nan():
    q, k, v = (np.random.default_rng(i).normal(size=(1, 2, 12, 4)) for i in range(3))
    expected = book.attention(q, k, v, cu_q=[0, 5, 12])[0]
    for x in (q, k, v):
        x[:, :, :5] = np.nan
    with np.errstate(invalid="ignore"):
        out, _ = flash_variants.flash_attention(q, k, v, cu_q=[0, 5, 12], block_q=8, block_k=8)
    np.testing.assert_allclose(out[:, :, 5:], expected[:, :, 5:], atol=1e-12)


@FORWARD
def test_forward_with_scores_far_below_zero():
    arrays = (FAR_BELOW.q, FAR_BELOW.k, FAR_BELOW.v)
    out, lse = flash_variants.flash_attention(*arrays, window=(0, 0))
    assert (out.item(), lse.item()) == (FAR_BELOW.v.item(), -(2**20))
    out, lse = flash_variants.flash_attention(*arrays, softcap=50.0)
    assert (out.item(), lse.item()) == (FAR_BELOW.v.item(), -50)


@FORWARD
@pytest.mark.parametrize(("arrays", "options", "error", "words"), refusals())
def test_forward_refuses(arrays, options, error, words):
    with pytest.raises(error):
        flash_variants.flash_attention(**arrays, **options)


def most_held(compute, *arrays: np.ndarray, **options) -> int:
    tracemalloc.start()
    compute(*arrays, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


EVERYTHING = {"window": (300, None), "softcap": 3.0, "slopes": np.array([0.1]), "cu_q": [0, 100, 512]}


@FORWARD
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_a_tile_of_that_size_is_all_that_is_made(options, dtype):
    x = np.random.default_rng(0).normal(size=(1, 1, 512, 4)).astype(dtype)
    peak, tile = most_held(flash_variants.flash_attention, x, x, x, **options, block_q=128, block_k=128), 128 * 128
    assert tile * x.itemsize <= peak < 10 * tile * x.itemsize + 8 * x.nbytes


@BACKWARD
@given(variants(), BLOCKS, BLOCKS)
def test_backward_is_autograd_s(variant, block_q, block_k):
    problem, options = variant.problem, variant.options()
    tensors = [torch.from_numpy(x).requires_grad_() for x in variant.arrays]
    expected = torch.autograd.grad(torch_variant(*tensors, variant), tensors, torch.from_numpy(problem.dout))
    given_ = (problem.dout, *variant.arrays, *book.attention(*variant.arrays, **options))
    blocks = {"block_q": block_q, "block_k": block_k}
    kept = deepcopy(options)
    gradients = untouched(flash_variants.flash_attention_backward, *given_, **options, **blocks)
    np.testing.assert_equal(options, kept)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert_close(gradient, truth.nan_to_num(0), problem)


@BACKWARD
@pytest.mark.parametrize(("case", "options"), GOLDEN)
def test_backward_is_the_original_code_s(case, options):
    arrays, options, allowed = golden_variant(case, options)
    forward = book.attention(*(arrays[x] for x in "qkv"), **options)
    given_ = (arrays[x] for x in ("dout", "q", "k", "v"))
    found = flash_variants.flash_attention_backward(*given_, *forward, **options, block_q=4, block_k=8)
    for name, value in zip(("dq", "dk", "dv"), found, strict=True):
        np.testing.assert_allclose(value, arrays[name], rtol=0, atol=allowed, err_msg=name)


@BACKWARD
def test_gradients_of_float32_are_float32_and_held_in_tiles():
    x = np.random.default_rng(0).normal(size=(1, 1, 512, 4)).astype(np.float32)
    given_ = (x, x, x, x, *book.attention(x, x, x, **EVERYTHING))
    blocks = {"block_q": 128, "block_k": 128}
    peak = most_held(flash_variants.flash_attention_backward, *given_, **EVERYTHING, **blocks)
    assert peak < 16 * 128 * 128 * 4 + 12 * x.nbytes
    exact = book.flash_attention_backward(*(array.astype(np.float64) for array in given_), **EVERYTHING)
    for gradient, truth in zip(
        flash_variants.flash_attention_backward(*given_, **EVERYTHING, **blocks), exact, strict=True
    ):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, truth, **tolerance(np.float32, 512))


@BACKWARD
@pytest.mark.parametrize(("arrays", "options", "error", "words"), refusals())
def test_backward_refuses(arrays, options, error, words):
    q = arrays["q"]
    with pytest.raises(error):
        flash_variants.flash_attention_backward(q, **arrays, out=q, lse=q[..., 0], **options)


@BACKWARD
@pytest.mark.parametrize("wrong", ["dout", "out", "lse"])
def test_backward_refuses_what_does_not_fit(wrong):
    x = np.zeros((1, 2, 3, 4))
    given_ = {"dout": x, "q": x, "k": x, "v": x, "out": x, "lse": x[..., 0]}
    with pytest.raises(ValueError):
        flash_variants.flash_attention_backward(**given_ | {wrong: given_[wrong][:, :1]})


# --- the kernels --------------------------------------------------------------------------------------------------

SMALL = variants(LENGTHS, st.sampled_from((1, 16, 24, 40)), heads=HEADS[:4])
few_examples = settings(max_examples=max(settings.default.max_examples // 3, 10))
overflows = pytest.mark.filterwarnings(
    "ignore:overflow encountered"
)  # of exp2 in tanh: 1 - 2 / inf is what it should be


@KERNEL_FORWARD
@pytest.mark.kernel
@overflows
@few_examples
@given(SMALL, DTYPES, TILES, TILES, PLACES)
def test_kernel_is_the_reference(variant, dtype, block_q, block_k, places):
    q, k, v = map(on_device, variant.arrays, [dtype] * 3, places)
    out, lse = fast.flash_attention(q, k, v, **variant.options(DEVICE), block_q=block_q, block_k=block_k)
    expected = book.attention(*variant.arrays, **variant.options())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_kernel_close(out, expected[0], variant.problem)
    assert_kernel_close(lse, expected[1], variant.problem)


@KERNEL_BACKWARD
@pytest.mark.kernel
@overflows
@few_examples
@given(SMALL, DTYPES, TILES, TILES, PLACES)
def test_backward_kernels_are_the_reference(variant, dtype, block_q, block_k, places):
    problem, options = variant.problem, variant.options()
    forward = book.attention(*variant.arrays, **options)
    dout, q, k, v, out = map(on_device, (problem.dout, *variant.arrays, forward[0]), [dtype] * 5, places)
    lse = on_device(forward[1], torch.float32)
    rounded = (out.double().cpu().numpy(), lse.double().cpu().numpy())  # what the kernel is given, no more
    expected = book.flash_attention_backward(problem.dout, *variant.arrays, *rounded, **options)
    blocks = {"block_q": block_q, "block_k": block_k}
    gradients = fast.flash_attention_backward(dout, q, k, v, out, lse, **variant.options(DEVICE), **blocks)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert_kernel_close(gradient, truth, problem)


FIXED = make("normal", 7, (1, 1, 2), T=37, S=42, D=24, causal=True, scale=None)
SLOPES, CUTS = np.array([0.5, 0.25]), ([0, 2, 2, 35, 37], [0, 3, 5, 40, 42])
OPTIONS = [
    Variant(FIXED, (9, None), None, None, None, None),
    Variant(FIXED, (None, None), 1.5, None, None, None),
    Variant(FIXED, (None, None), None, SLOPES, None, None),
    Variant(FIXED, (None, None), None, None, *CUTS),
    Variant(FIXED, (9, None), 1.5, SLOPES, *CUTS),
]
WIDE = make("normal", 3, (1, 1, 1), T=64, S=80, D=16, causal=False, scale=None)  # tiles between both edges, seen by all
WINDOWED = Variant(WIDE, (36, 20), None, None, None, None)
EACH = pytest.mark.parametrize(
    "variant", [*OPTIONS, WINDOWED], ids=["window", "soft cap", "ALiBi", "packed", "all", "two edges"]
)
ACROSS, BLOCKS_OF_16 = Place(across=True), {"block_q": 16, "block_k": 16}


@KERNEL_FORWARD
@pytest.mark.kernel
@EACH
def test_kernel_computes_in_float32(variant):
    q, k, v = map(on_device, variant.arrays, [torch.float32] * 3, (ACROSS, ACROSS, Place()))
    out, lse = fast.flash_attention(q, k, v, **variant.options(DEVICE), **BLOCKS_OF_16)
    for value, truth in zip((out, lse), book.attention(*variant.arrays, **variant.options()), strict=True):
        assert_float32_close(value, truth)


@KERNEL_BACKWARD
@pytest.mark.kernel
@pytest.mark.parametrize("variant", [OPTIONS[1], OPTIONS[-1], WINDOWED], ids=["soft cap", "all", "two edges"])
def test_backward_kernels_compute_in_float32(variant):
    inputs = (variant.problem.dout, *variant.arrays, *book.attention(*variant.arrays, **variant.options()))
    places = (Place(), ACROSS, ACROSS, Place(), ACROSS, Place())
    tensors = map(on_device, inputs, [torch.float32] * 6, places)
    gradients = fast.flash_attention_backward(*tensors, **variant.options(DEVICE), **BLOCKS_OF_16)
    for gradient, truth in zip(gradients, book.flash_attention_backward(*inputs, **variant.options()), strict=True):
        assert_float32_close(gradient, truth)


WALLED = pytest.mark.parametrize("begins", [False, True])
AT_WALLS = Variant(
    make("normal", 0, (1, 1, 2), T=18, S=19, D=24, causal=True, scale=None),
    (9, None),
    1.5,
    SLOPES,
    [0, 17, 18],
    [0, 2, 19],
)


@KERNEL_FORWARD
@pytest.mark.kernel
@WALLED
def test_kernel_loads_nothing_beyond_its_inputs(begins):
    q, k, v = (at_the_wall(x, begins) for x in AT_WALLS.arrays)
    out, _ = fast.flash_attention(q, k, v, **AT_WALLS.options(DEVICE), **BLOCKS_OF_16)
    assert_float32_close(out, book.attention(*AT_WALLS.arrays, **AT_WALLS.options())[0])


@KERNEL_BACKWARD
@pytest.mark.kernel
@WALLED
def test_backward_kernels_load_nothing_beyond_their_inputs(begins):
    options = AT_WALLS.options()
    inputs = (AT_WALLS.problem.dout, *AT_WALLS.arrays, *book.attention(*AT_WALLS.arrays, **options))
    tensors = (at_the_wall(x, begins) for x in inputs)
    gradients = fast.flash_attention_backward(*tensors, **AT_WALLS.options(DEVICE), **BLOCKS_OF_16)
    for gradient, truth in zip(gradients, book.flash_attention_backward(*inputs, **options), strict=True):
        assert_float32_close(gradient, truth)
