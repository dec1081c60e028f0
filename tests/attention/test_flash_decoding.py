"""Flash-Decoding: cuts, splits and the unified maximum against plain attention and flash-attn; then the kernel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import flash_decoding as decoding
from tests.attention.checks import assert_close, assert_kernel_close, untouched
from tests.attention.on_device import DTYPES, PLACES, Place, few_examples, on_device
from tests.attention.problems import HEAD_SIZES, KINDS, LENGTHS, Problem, make, problems
from tests.attention.refused import wrong_input
from tests.conftest import DEVICE, golden, kernel, oracle, tolerance
from tests.fences import walled

fast = kernel("attention.flash_decoding")
book = oracle("attention.flash_decoding")
plain = oracle("attention.flash").attention

COMBINE = pytest.mark.exercise("chapters.attention.flash_decoding.combine", points=2)
SPLITS = pytest.mark.exercise("chapters.attention.flash_decoding.number_of_splits", points=2)
UNIFIED = pytest.mark.exercise("chapters.attention.flash_decoding.unified_max_attention", points=3)
KERNEL = pytest.mark.exercise("kernels.attention.flash_decoding.decode_kernel", points=4)

causal = problems(lengths=LENGTHS, head_sizes=HEAD_SIZES).filter(lambda problem: problem.causal)
CUTS = st.lists(st.integers(0, 40), max_size=6)


def scores_of(problem: Problem) -> np.ndarray:
    """Scores `[B, H, T, S]`, -inf where hidden, written out."""
    T, S, D = problem.q.shape[2], problem.k.shape[2], problem.q.shape[3]
    keys = np.repeat(problem.k, problem.q.shape[1] // problem.k.shape[1], axis=1)
    scores = problem.q @ keys.swapaxes(-1, -2) * (D**-0.5 if problem.scale is None else problem.scale)
    return np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)


def pieces(problem: Problem, bounds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(outs, lses) of the runs between bounds, by torch; what is empty holds NaN."""
    scores = torch.from_numpy(scores_of(problem))
    values = torch.from_numpy(np.repeat(problem.v, problem.q.shape[1] // problem.v.shape[1], axis=1))
    runs = [slice(*run) for run in itertools.pairwise(bounds)]
    outs = [scores[..., run].softmax(-1) @ values[:, :, run] for run in runs]
    lses = torch.stack([scores[..., run].logsumexp(-1) for run in runs])
    return torch.where(lses[..., None].isneginf(), math.nan, torch.stack(outs)).numpy(), lses.numpy()


def bounds_of(cuts: list[int], length: int) -> list[int]:
    return [0, *sorted(min(cut, length) for cut in cuts), length]


@COMBINE
@given(causal, CUTS)
def test_any_cuts_combine_to_attention(problem, cuts):
    out, lse = untouched(decoding.combine, *pieces(problem, bounds_of(cuts, problem.k.shape[2])))
    expected = plain(problem.q, problem.k, problem.v, True, problem.scale)
    assert_close(out, expected[0], problem)
    assert_close(lse, expected[1], problem)


@COMBINE
@pytest.mark.parametrize("case", ["combine", "e2e"])
def test_combine_is_the_original_code_s(case):
    arrays = golden("attn/split_kv_combine")
    outs, lses = (arrays[f"{case}/{name}_partial"].astype(np.float64) for name in ("out", "lse"))
    for found, name in zip(decoding.combine(outs, lses), ("out", "lse"), strict=True):
        np.testing.assert_allclose(found, arrays[f"{case}/{name}"], rtol=0, atol=1e-10)


@COMBINE
@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_lses_of_any_size(level):
    outs, lses = np.array([[3.0], [9.0]], np.float32), np.array([level, level + math.log(2)], np.float32)
    out, lse = decoding.combine(outs, lses)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, [7], rtol=1e-3)
    np.testing.assert_allclose(lse, level + math.log(3), rtol=1e-6)


@COMBINE
def test_no_keys_at_all():
    out, lse = decoding.combine(np.full((3, 2, 4), np.nan), np.full((3, 2), -np.inf))
    assert (out == 0).all() and np.isneginf(lse).all()


@COMBINE
@pytest.mark.parametrize(
    ("outs", "lses", "error"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 4)), ValueError),
        (np.zeros((2, 3, 4)), np.zeros((2, 1)), ValueError),
        (np.zeros(2), np.zeros(()), ValueError),
        (np.zeros((0, 3, 4)), np.zeros((0, 3)), ValueError),
        (np.zeros((2, 3)), np.array([0, np.inf]), ValueError),
        (np.zeros((2, 3)), np.array([0, np.nan]), ValueError),
        (np.zeros((2, 3), np.float16), np.zeros(2, np.float16), TypeError),
        (np.zeros((2, 3)), np.zeros(2, np.float32), TypeError),
        (np.zeros((2, 3), int), np.zeros(2, int), TypeError),
    ],
)
def test_combine_refuses(outs, lses, error):
    with pytest.raises(error):
        decoding.combine(outs, lses)


@given(causal, st.integers(0, 40), st.integers(0, 40))
def test_partial_attention_is_attention_to_those_keys(problem, start, stop):
    start, stop = sorted(min(x, problem.k.shape[2]) for x in (start, stop))
    arrays = (problem.q, problem.k, problem.v)
    out, lse = untouched(lambda *x: decoding.partial_attention(*x, start, stop, problem.scale), *arrays)
    outs, lses = pieces(problem, [start, stop])
    assert_close(out, np.where(np.isneginf(lses[0])[..., None], 0, outs[0]), problem)
    assert_close(lse, lses[0], problem)


@given(causal, st.integers(1, 50))
def test_any_number_of_splits_gives_attention(problem, splits):
    found = decoding.flash_decoding(problem.q, problem.k, problem.v, splits, problem.scale)
    for value, expected in zip(found, plain(problem.q, problem.k, problem.v, True, problem.scale), strict=True):
        assert_close(value, expected, problem)


@SPLITS
def test_splits_are_the_original_code_s():
    arrays = golden("attn/num_splits_heuristic")
    found = [decoding.number_of_splits(*map(int, row)) for row in arrays["inputs"]]
    np.testing.assert_array_equal(found, arrays["splits"])


@SPLITS
@given(st.integers(1, 200), st.integers(1, 264), st.integers(1, 300), st.integers(1, 128))
def test_splits_leave_none_empty_and_the_gpu_busy(programs, multiprocessors, tiles, most):
    splits = decoding.number_of_splits(programs, multiprocessors, tiles, most)
    assert 1 <= splits <= min(most, multiprocessors, tiles)
    assert splits == 1 or math.ceil(tiles / splits) < math.ceil(tiles / (splits - 1))
    if programs < 0.8 * multiprocessors:
        best = max(
            book.busy(programs * s, multiprocessors)
            for s in range(1, min(most, multiprocessors, tiles) + 1)
            if s == 1 or math.ceil(tiles / s) < math.ceil(tiles / (s - 1))
        )
        assert book.busy(programs * splits, multiprocessors) >= 0.85 * best - 1e-9


@SPLITS
def test_a_quarter_million_tiles_are_cut_into_128_runs_at_most():
    assert decoding.number_of_splits(1, 10**4, 2**18) == 109  # the first with 85% of what 128 runs keep busy
    assert decoding.number_of_splits(1, 10**4, 2**18, 64) == 55


@SPLITS
def test_80_and_85_percent_are_enough():
    assert decoding.number_of_splits(4, 5, 100) == 1
    assert decoding.number_of_splits(1, 20, 400) == 17


@SPLITS
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [0, -1])
def test_splits_refuse_nothing_to_do(position, value):
    arguments = [8, 132, 64, 128]
    arguments[position] = value
    with pytest.raises(ValueError):
        decoding.number_of_splits(*arguments)


def strays_of(problem: Problem, phi: float, low: float, high: float) -> np.ndarray:
    scores = scores_of(problem)
    x = np.where(np.isneginf(scores), phi + (low + high) / 2, scores) - phi
    return ((x <= low) | (x >= high)).any(axis=-1)


@UNIFIED
@given(causal, st.floats(-3, 3), st.floats(-30, -0.1), st.floats(0.1, 30))
def test_unified_maximum_gives_attention_and_says_which_rows_strayed(problem, phi, low, high):
    arrays = (problem.q, problem.k, problem.v)
    out, lse, again = untouched(lambda *x: decoding.unified_max_attention(*x, phi, low, high, problem.scale), *arrays)
    expected = plain(*arrays, True, problem.scale)
    assert_close(out, expected[0], problem)
    assert_close(lse, expected[1], problem)
    edge = np.abs(np.subtract.outer(scores_of(problem) - phi, [low, high])).min(initial=1) < 1e-9
    assert edge or np.array_equal(again, strays_of(problem, phi, low, high))


def one_query(scores: list[float], dtype: type = np.float32) -> tuple[np.ndarray, ...]:
    """q, k, v of one query with these scores, scale 1, and values 1, 2, ...; float32."""
    k = np.array(scores, dtype)[None, None, :, None]
    return np.ones((1, 1, 1, 1), dtype), k, np.arange(1, len(scores) + 1, dtype=dtype).reshape(k.shape)


@UNIFIED
@pytest.mark.parametrize(
    ("scores", "again"),
    [
        ([0, 1, -1], False),
        ([500, 0], True),  # overflows
        ([500, 499.5], True),
        ([-500, -499.5], True),  # everything underflows
        ([0, -500], True),  # one element far below
        ([5, 0], True),  # on the edge: the range is open
        ([-7, 0], True),
        ([4.9, -6.9], False),
    ],
)
def test_leaving_the_range_above_below_and_at_its_edges(scores, again):
    arrays = one_query(scores)
    with np.errstate(all="raise", under="ignore"):
        out, lse, recomputed = decoding.unified_max_attention(*arrays, 0.0, -7.0, 5.0, 1.0)
    expected = plain(*(x.astype(np.float64) for x in arrays), True, 1.0)
    for value, truth in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(value, truth, **tolerance(np.float32))
    assert recomputed.item() is again and recomputed.dtype == bool and out.dtype == lse.dtype == np.float32


@UNIFIED
def test_hidden_keys_and_other_rows_make_none_recompute():
    q, k, v = np.ones((1, 1, 3, 1)), np.array([1, 2, 500.0]).reshape(1, 1, 3, 1), np.ones((1, 1, 3, 1))
    assert decoding.unified_max_attention(q, k, v, 0.0, -9.0, 9.0, 1.0)[2].ravel().tolist() == [False, False, True]
    out, lse, again = decoding.unified_max_attention(q, k[:, :, :1], v[:, :, :1], 0.0, -9.0, 9.0, 1.0)
    assert not again.any() and np.isneginf(lse[0, 0, :2]).all() and out.ravel().tolist() == [0, 0, 1]


@UNIFIED
def test_sums_that_overflow_are_recomputed():
    q, k, _ = one_query([3, 3])
    for signs, expected in (([1, 1], np.float32(1e38)), ([1, -1], 0)):  # infinite, then no number
        v = np.float32(1e38) * np.array(signs, np.float32).reshape(k.shape)
        with np.errstate(all="raise", under="ignore"):
            out, _, again = decoding.unified_max_attention(q, k, v, 0.0, -7.0, 5.0, 1.0)
        assert again.all() and out.item() == expected


@UNIFIED
@pytest.mark.parametrize(
    "bounds", [(0, 1, 1), (0, 2, 1), (0, -math.inf, 1), (0, -1, 88.5), (0, -90, 1), (math.nan, -1, 1), (1e39, -1, 1)]
)
def test_unified_maximum_refuses_what_float32_cannot_carry(bounds):
    with pytest.raises(ValueError):
        decoding.unified_max_attention(*one_query([0, 0]), *bounds)


@UNIFIED
def test_unified_maximum_takes_all_that_float32_can_carry():
    arrays, (low, high) = one_query([0, 0]), book.carried_range(np.float32, 2)
    for phi, again in ((0.0, False), (float(np.finfo(np.float32).max), True)):
        out, lse, recomputed = decoding.unified_max_attention(*arrays, phi, low, high)
        assert recomputed.item() is again
        np.testing.assert_allclose([out.item(), lse.item()], [1.5, math.log(2)], **tolerance(np.float32))


@UNIFIED
@pytest.mark.parametrize(("arrays", "options", "error"), [x for x in wrong_input() if "block" not in str(x[1])])
def test_unified_maximum_refuses_arrays(arrays, options, error):
    with pytest.raises(error):
        decoding.unified_max_attention(**arrays, **options, phi=0.0, low=-1.0, high=1.0)


@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_flat_matmul_is_the_product(M, N, K, block_n):
    generator = np.random.default_rng(M * N * K)
    x, weight = generator.normal(size=(M, K)), generator.normal(size=(N, K))
    np.testing.assert_allclose(decoding.flat_matmul(x, weight, block_n), x @ weight.T, **tolerance(np.float64, K))


def test_errors_say_what_is_allowed():
    x = np.zeros((1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"start and stop must be 0 <= start <= stop <= 3, got 2 and 4"):
        decoding.partial_attention(x, x, x, 2, 4)
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        decoding.flash_decoding(x, x, x, 0)
    with pytest.raises(ValueError, match="M from 1 to 16"):
        decoding.flat_matmul(np.zeros((17, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="phi must be finite"):
        decoding.unified_max_attention(x, x, x, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="tiles must be at least 1, got 0"):
        decoding.number_of_splits(1, 1, 0)


# --- the kernel ---------------------------------------------------------------------------------------------------

DECODING = st.builds(
    make,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    heads=st.sampled_from(((1, 1, 1), (1, 1, 3), (2, 2, 2), (1, 1, 17))),
    T=st.just(1),
    S=st.sampled_from((1, 17, 31, 65)) | st.integers(1, 80),
    D=st.sampled_from((1, 16, 24, 40)),
    causal=st.just(True),
    scale=st.sampled_from((None, 0.3)),
)
SPLIT = st.sampled_from((1, 2, 3, 64))


def assert_decodes(problem: Problem, dtype: torch.dtype, places: list[Place], **options) -> None:
    """The kernel's out and lse are the reference's."""
    q = on_device(problem.q, dtype)
    k, v = map(on_device, (problem.k, problem.v), [dtype] * 2, places)
    out, lse = fast.flash_decoding(q, k, v, scale=problem.scale, **options)
    expected = book.flash_decoding(problem.q, problem.k, problem.v, 1, problem.scale)
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    assert_kernel_close(out, expected[0], problem)
    assert_kernel_close(lse, expected[1], problem)


@KERNEL
@pytest.mark.kernel
@few_examples
@given(DECODING, DTYPES, SPLIT, PLACES)
def test_kernel_is_the_reference(problem, dtype, splits, places):
    assert_decodes(problem, dtype, places, splits=splits, block=16)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 2])
def test_kernel_when_the_maximum_rises_with_every_tile(splits):
    problem = make("rising", 3, (1, 2, 2), T=1, S=50, D=16, causal=True, scale=None)
    assert_decodes(problem, torch.float32, [Place(across=True), Place()], splits=splits, block=16)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_loads_nothing_beyond_its_inputs(begins):
    problem = make("normal", 0, (1, 2, 3), T=1, S=19, D=24, causal=True, scale=None)
    arrays = (problem.q, problem.k, problem.v)
    q, k, v = (walled(torch.from_numpy(x).to(DEVICE, torch.float32), begins) for x in arrays)
    out, lse = fast.flash_decoding(q, k, v, 2, block=16)
    expected = book.flash_decoding(*arrays)
    for found, truth in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(found.cpu().numpy(), truth, **tolerance(torch.float32, 19))


@KERNEL
@pytest.mark.kernel
def test_kernel_with_scores_far_below_zero():
    q, k = (torch.full((1, 2, 1, 16), value, device=DEVICE) for value in (256.0, -256.0))
    out, lse = fast.flash_decoding(q, k, k)
    np.testing.assert_array_equal(out.cpu(), k.cpu())
    np.testing.assert_allclose(lse.cpu(), -(2.0**18), rtol=1e-6)
