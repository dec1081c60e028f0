"""LSH attention: buckets, chunks and rounds against loops and the original code; the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import lsh
from tests.attention.checks import untouched
from tests.attention.lsh_problems import (
    CHUNKS,
    KERNEL_PROBLEMS,
    OPTIONS,
    PROBLEMS,
    ROUNDS,
    Problem,
    assert_close,
    assert_kernel,
    by_loop,
    few_examples,
    make,
    met,
    on_device,
    refused,
    seeds,
)
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled

HASH = pytest.mark.exercise("chapters.attention.lsh.hash_buckets", points=2)
PAIRS = pytest.mark.exercise("chapters.attention.lsh.chunk_pairs", points=3)
ATTEND = pytest.mark.exercise("chapters.attention.lsh.lsh_attention", points=3)
KERNEL = pytest.mark.exercise("kernels.attention.lsh.attend_chunk", points=4)
MERGE = pytest.mark.exercise("kernels.attention.lsh.merge_kernel", points=2)

fast, book = kernel("attention.lsh"), oracle("attention.lsh")
GOLDEN = golden("attn/lsh_reformer")


@HASH
@given(st.integers(1, 17), st.integers(1, 6), ROUNDS, st.integers(1, 5), seeds)
def test_a_bucket_is_the_nearest_axis_with_its_sign(T, D, rounds, half, seed):
    generator = np.random.default_rng(seed)
    qk, rotations = generator.normal(size=(2, T, D)), generator.normal(size=(D, rounds, half))
    found = untouched(lsh.hash_buckets, qk, rotations)
    assert found.shape == (2, rounds, T) and found.dtype == np.int64
    for b, r, t in np.ndindex(found.shape):
        along = [sum(qk[b, t, d] * rotations[d, r, n] for d in range(D)) for n in range(half)]
        both = along + [-x for x in along]
        assert found[b, r, t] == max(range(2 * half), key=both.__getitem__)


@HASH
@pytest.mark.parametrize("case", ["plain", "causal", "causal_dedup"])
def test_buckets_are_the_released_codes(case):
    rotations, codes = GOLDEN[f"{case}/rotations"], GOLDEN[f"{case}/buckets"]
    found = lsh.hash_buckets(GOLDEN[f"{case}/qk"].astype(np.float64), rotations)
    offsets = 2 * rotations.shape[2] * np.arange(rotations.shape[1])[:, None]
    np.testing.assert_array_equal((found + offsets).reshape(codes.shape), codes)


@HASH
def test_heads_may_have_rotations_of_their_own():
    qk, rotations = (
        np.random.default_rng(0).normal(size=(3, 4, 9, 5)),
        np.random.default_rng(1).normal(size=(4, 5, 2, 3)),
    )
    found = lsh.hash_buckets(qk, rotations)
    for h in range(4):
        np.testing.assert_array_equal(found[:, h], lsh.hash_buckets(qk[:, h], rotations[h]))


@HASH
@given(seeds, st.sampled_from((2.0**-300, 0.5, 2.0**300)))
def test_only_directions_count_and_tokens_are_hashed_alone(seed, size):
    generator = np.random.default_rng(seed)
    qk, rotations = generator.normal(size=(11, 4)), generator.normal(size=(4, 3, 4))
    shuffled = generator.permutation(11)
    found = lsh.hash_buckets(qk, rotations)
    np.testing.assert_array_equal(lsh.hash_buckets(size * qk, rotations), found)
    np.testing.assert_array_equal(lsh.hash_buckets(qk[shuffled], rotations), found[:, shuffled])
    np.testing.assert_array_equal(lsh.hash_buckets(-qk, rotations), (found + 4) % 8)


@HASH
def test_ties_go_to_the_first():
    assert lsh.hash_buckets(np.zeros((1, 3)), np.ones((3, 1, 4))).tolist() == [[0]]
    assert lsh.hash_buckets(np.ones((1, 1)), np.array([1.0, 2.0, 2.0]).reshape(1, 1, 3)).tolist() == [[1]]


@HASH
@pytest.mark.parametrize(
    ("qk", "rotations"), [((5, 4), (4, 2)), ((5, 4), (3, 1, 2)), ((5, 4), (4, 0, 2)), ((5, 4), (4, 2, 0)),
                          ((4,), (4, 1, 2)), ((0, 4), (4, 1, 2))],
)  # fmt: skip
def test_hashing_refuses_shapes(qk, rotations):
    with pytest.raises(ValueError):
        lsh.hash_buckets(np.ones(qk), np.ones(rotations))


@HASH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hashing_refuses_what_has_no_direction(bad):
    with pytest.raises(ValueError):
        lsh.hash_buckets(np.array([[1.0, bad]]), np.ones((2, 1, 2)))


# --- chunks -------------------------------------------------------------------------------------------------------


@PAIRS
@given(PROBLEMS, CHUNKS, st.booleans(), st.booleans(), st.sampled_from((1, 2**61)))
def test_a_query_meets_its_chunk_and_the_one_before(problem, chunk, causal, across, spread):
    buckets, copy = spread * problem.buckets, spread * problem.buckets
    found, rounds = [{} for _ in range(2)], []
    options = {name: False for name, given_ in (("causal", causal), ("across", across)) if not given_}  # else True
    for r, rows, columns, visible in lsh.chunk_pairs(buckets, chunk, **options):
        rounds.append(r)
        assert visible.shape == (*rows.shape, columns.shape[-1]) and visible.dtype == bool
        for h in range(2):
            for i, mask in zip(rows[0, h], visible[0, h], strict=True):
                assert (r, i) not in found[h]
                found[h][r, i] = columns[0, h][mask].tolist()
    assert rounds == sorted(rounds)
    for h in range(2):
        assert found[h] == met(buckets[0, h], chunk, causal, across)  # its own chunk's keys first
    np.testing.assert_array_equal(buckets, copy)


@PAIRS
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8])
def test_small_integers_do_not_overflow_and_rounds_stay_apart(dtype):
    buckets = np.full((3, 5), np.iinfo(dtype).max, dtype)
    pairs = list(lsh.chunk_pairs(buckets, 2, causal=False, across=False))
    expected = [[0, 1], [2, 3, 0, 1], [4, 2, 3]]
    assert [columns[mask[-1]].tolist() for *_, columns, mask in pairs] == 3 * expected
    falling = np.array([[3] * 3, [0] * 3], dtype)  # more buckets than tokens
    assert not any(mask[:, 3:].any() for *_, mask in lsh.chunk_pairs(falling, 3, causal=False, across=False))


@PAIRS
@pytest.mark.parametrize(
    ("buckets", "chunk", "error"),
    [
        (np.zeros((1, 4)), 2, TypeError),
        (np.zeros(4, int), 2, ValueError),
        (np.zeros((0, 4), int), 2, ValueError),
        (np.full((1, 4), -1), 2, ValueError),
        (np.zeros((1, 4), int), -1, ValueError),
    ],
)
def test_chunks_refuse(buckets, chunk, error):
    with pytest.raises(error):
        list(lsh.chunk_pairs(buckets, chunk))


# --- attention ----------------------------------------------------------------------------------------------------


@ATTEND
@given(PROBLEMS, CHUNKS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from((None, 1.0)))
def test_rounds_merge_to_one_softmax_of_all_they_saw(problem, chunk, causal, across, dedup, scale):
    copies = [x.copy() for x in problem.arrays()]
    out, lse = lsh.lsh_attention(*problem.arrays(), chunk, causal, across, dedup, scale)
    for h in range(2):
        value = problem.qk.shape[-1] ** -0.5 if scale is None else scale
        expected = by_loop(problem, h, chunk, causal, across, dedup, value)
        np.testing.assert_allclose(out[0, h], expected[0], rtol=1e-9, atol=1e-9)  # lse near −5e4 rounds to 1e-11
        assert_close(lse[0, h], expected[1])
    for x, copy in zip(problem.arrays(), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


@ATTEND
@given(PROBLEMS, st.booleans(), st.booleans())
def test_one_bucket_and_a_chunk_for_all_is_shared_attention(problem, causal, across):
    buckets = np.zeros_like(problem.buckets[:, :, :1])
    out, lse = lsh.lsh_attention(problem.qk, problem.v, buckets, 40, causal, across)
    expected = book.shared_attention(problem.qk, problem.v, causal)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


@ATTEND
@pytest.mark.parametrize("case", ["plain", "causal", "causal_dedup"])
def test_attention_is_the_released_codes(case):
    qk, v = (GOLDEN[f"{case}/{name}"].astype(np.float64) for name in ("qk", "v"))
    rounds, chunk, causal, dedup = (
        GOLDEN[f"{case}/{x}"].item() for x in ("n_hashes", "bucket_size", "causal", "dedup")
    )
    buckets = GOLDEN[f"{case}/buckets"].reshape(len(qk), rounds, -1) - 32 // chunk * np.arange(rounds)[:, None]
    out, _ = lsh.lsh_attention(qk, v, buckets, chunk, causal, dedup=dedup)
    rows = slice(None)
    if dedup:  # only tokens that no chunk lets look into another round: see the test after the next
        rows = (np.argsort(np.argsort(buckets, axis=-1, kind="stable"), axis=-1) >= chunk).all(axis=1)
        assert rows.sum() == 12
    np.testing.assert_allclose(out[rows], GOLDEN[f"{case}/out"][rows], atol=1e-8)


@ATTEND
def test_attention_is_that_of_transformers():
    x = GOLDEN["hf/x"].astype(np.float64)
    weights = (GOLDEN[f"hf/w/{name}.weight"].astype(np.float64) for name in ("query_key", "value"))
    qk, v = ((x @ w.T).reshape(2, 32, 2, 6).swapaxes(1, 2) for w in weights)
    rotations = GOLDEN["hf/rotations"]
    buckets = GOLDEN["hf/buckets"] - 8 * np.arange(2)[:, None]
    np.testing.assert_array_equal(book.hash_buckets(qk, rotations), buckets)
    out, _ = lsh.lsh_attention(qk, v, buckets, 4, scale=1.0)
    expected = GOLDEN["hf/out"].reshape(2, 32, 2, 6).swapaxes(1, 2)
    np.testing.assert_allclose(out, expected, atol=1e-5)  # theirs adds 1e-6 to the mean square of a key


@ATTEND
@given(PROBLEMS, CHUNKS, st.booleans(), st.data())
def test_values_of_later_tokens_reach_no_earlier_one(problem, chunk, dedup, data):
    t = data.draw(st.integers(1, problem.v.shape[2]))
    v = problem.v.copy()
    v[:, :, t:] = 7
    before, after = (lsh.lsh_attention(problem.qk, x, problem.buckets, chunk, dedup=dedup)[0] for x in (problem.v, v))
    np.testing.assert_array_equal(before[:, :, :t], after[:, :, :t])


@ATTEND
def test_float32_stays_float32_and_leading_axes_are_free():
    problem = make("normal", 0, 19, 4, 2)
    arrays = [x[0, 0].astype(np.float32) for x in (problem.qk, problem.v)]
    out, lse = lsh.lsh_attention(*arrays, problem.buckets[0, 0], 4, dedup=True)
    assert out.dtype == lse.dtype == np.float32
    expected = book.lsh_attention(problem.qk, problem.v, problem.buckets, 4, dedup=True)[0][0, 0]
    np.testing.assert_allclose(out, expected, **tolerance(np.float32, 100))


@ATTEND
@pytest.mark.parametrize(("arrays", "options", "error"), refused())
def test_attention_refuses(arrays, options, error):
    with pytest.raises(error):
        lsh.lsh_attention(*arrays, **options)


# --- the kernels --------------------------------------------------------------------------------------------------


@KERNEL
@pytest.mark.kernel
@few_examples
@given(KERNEL_PROBLEMS, st.sampled_from(KERNEL_DTYPES), st.sampled_from((7, 16, 40)), OPTIONS, st.booleans())
def test_kernel_is_the_reference(problem, dtype, chunk, options, aligned):
    assert_kernel(fast.lsh_attention(*on_device(problem, dtype, aligned), chunk, **options), problem, chunk, **options)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize(("causal", "across", "dedup"), [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 0)])
def test_kernel_with_all_options_and_tiles_in_a_chunk(causal, across, dedup):
    problem = make("normal", 1, 40, 16, 2, (1, 1))
    options = {"causal": bool(causal), "across": bool(across), "dedup": bool(dedup), "scale": 1.0}
    assert_kernel(fast.lsh_attention(*on_device(problem, torch.float32), 36, **options), problem, 36, **options)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_where_a_query_sees_nothing_of_the_first_tile(dtype):
    problem = make("normal", 2, 48, 16, 1, (1, 1))
    buckets = (np.arange(48) < 8).astype(np.int64)[None, None, None]  # the first 8 tokens are sorted behind the others
    problem = Problem(problem.qk, problem.v, buckets)
    assert_kernel(fast.lsh_attention(*on_device(problem, dtype), 48), problem, 48)


@KERNEL
@pytest.mark.kernel
def test_kernel_when_scores_rise_and_keys_are_long_or_short():
    problem = make("normal", 3, 40, 16, 1, (1, 1))
    steps = np.linspace(0.01, 300, 40)[:, None]
    qk = np.where(np.arange(40)[:, None] % 5 == 2, 0, problem.qk * steps).astype(np.float16).astype(np.float64)
    problem = Problem(qk, problem.v, problem.buckets)
    for dtype in (torch.float32, torch.float16):
        assert_kernel(fast.lsh_attention(*on_device(problem, dtype), 16), problem, 16)


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernels_load_nothing_beyond_their_inputs(begins):
    problem = make("normal", 0, 19, 24, 2, (1, 1))
    qk, v = (walled(torch.from_numpy(x).to(DEVICE, torch.float32), begins) for x in (problem.qk, problem.v))
    buckets = walled(torch.from_numpy(problem.buckets).to(DEVICE), begins)
    for options in ({"dedup": True}, {"dedup": True, "across": False}):
        assert_kernel(fast.lsh_attention(qk, v, buckets, 16, **options), problem, 16, **options)


@pytest.mark.kernel
def test_kernel_takes_strides_and_int32():
    problem = make("normal", 4, 21, 16, 2)
    qk, v = (torch.from_numpy(x).to(DEVICE, torch.float32) for x in (problem.qk, problem.v))
    qk = torch.stack((qk, v), dim=-2).flatten(-2)[..., :16]  # rows of 32 numbers
    across = v.transpose(1, 2).contiguous().transpose(1, 2)
    buckets = torch.from_numpy(problem.buckets).to(DEVICE, torch.int32)
    assert_kernel(fast.lsh_attention(qk, across, buckets, 16), problem, 16)


@MERGE
@pytest.mark.kernel
@few_examples
@given(seeds, st.sampled_from((1, 3, 8)), st.sampled_from((1, 16, 37)), st.sampled_from((1, 16, 24)), st.data())
def test_merging_is_combine(seed, rounds, rows, D, data):
    dtype, spread = data.draw(st.sampled_from(KERNEL_DTYPES)), data.draw(st.sampled_from((0.0, 3.0, 1e4)))
    generator = np.random.default_rng(seed)
    outs = generator.normal(size=(rounds, rows, D)).astype(np.float16).astype(np.float64)
    lses = (spread * generator.normal(size=(rounds, rows)) - 5 * spread).astype(np.float32).astype(np.float64)
    given_ = poisoned(torch.from_numpy(outs).to(DEVICE, dtype)), poisoned(torch.from_numpy(lses).float().to(DEVICE))
    out = torch.empty((rows, D), dtype=dtype, device=DEVICE)
    lse = torch.empty(rows, dtype=torch.float32, device=DEVICE)
    fast.merge_kernel[(-(-rows // 16),)](*given_, out, lse, rows, D=D, BLOCK_D=max(16, 1 << (D - 1).bit_length()),
                                         BLOCK=16, ROUNDS=rounds)  # fmt: skip
    weights = np.exp(lses - lses.max(0))
    assert_close(out.double().cpu().numpy(), np.einsum("rn,rnd->nd", weights / weights.sum(0), outs), dtype, terms=1)
    assert_close(lse.double().cpu().numpy(), lses.max(0) + np.log(weights.sum(0)), torch.float32, terms=1)


@MERGE
@pytest.mark.kernel
def test_merged_rounds_are_the_reference():
    problem = make("normal", 5, 20, 24, 3, (1, 1))
    for dtype in (torch.float32, torch.float16):
        assert_kernel(fast.lsh_attention(*on_device(problem, dtype), 16), problem, 16)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda qk, v, b: (qk.double(), v.double(), b), TypeError),
        (lambda qk, v, b: (qk, v.half(), b), TypeError),
        (lambda qk, v, b: (qk, v, b.short()), TypeError),
        (lambda qk, v, b: (qk, v[:, :, :4], b), ValueError),
        (lambda qk, v, b: (qk, v, b[..., :4]), ValueError),
        (lambda qk, v, b: (qk, v, b[:, :, :0]), ValueError),
        (lambda qk, v, b: (qk.mT, v.mT, b[..., [0] * 16]), ValueError),
        (lambda qk, v, b: (qk, v, b, 0), ValueError),
        (lambda qk, v, b: (qk, v, b, 4, True, True, False, -1.0), ValueError),
        (lambda qk, v, b: (qk.repeat(1, 1, 1, 9), v.repeat(1, 1, 1, 9), b), ValueError),
    ],
)
def test_kernel_refuses(change, error):
    qk, v, buckets = on_device(make("normal", 0, 5, 16, 1), torch.float32)
    with pytest.raises(error):
        fast.lsh_attention(*change(qk, v, buckets))
