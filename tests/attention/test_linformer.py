"""Linformer: slots and attention to them against loops and the original code, its leak, its causal form, kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import linformer
from tests.attention.checks import untouched
from tests.attention.linformer_problems import (
    LENGTHS,
    SIZES,
    assert_close,
    attended,
    drawn_mask,
    make,
    on_device,
    problems,
    slots_of,
    wrong_projections,
)
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, tolerance
from tests.fences import walled

PROJECT = pytest.mark.exercise("chapters.attention.linformer.project", points=2)
BLOCKWISE = pytest.mark.exercise("chapters.attention.linformer.blockwise_attention", points=4)
RANK = pytest.mark.exercise("chapters.attention.linformer.rank_share", points=1)
KERNEL_PROJECT = pytest.mark.exercise("kernels.attention.linformer.project_tiles", points=3)
KERNEL_ATTEND = pytest.mark.exercise("kernels.attention.linformer.attend_kernel", points=3)

fast = kernel("attention.linformer")
GOLDEN = golden("attn/linformer")
seeds = st.integers(0, 2**32 - 1)


def original(case: str) -> dict[str, np.ndarray]:
    return {name.split("/")[1]: x for name, x in GOLDEN.items() if name.startswith(f"{case}/")}


# --- the reference ------------------------------------------------------------------------------------------------


@PROJECT
@given(problems(), st.booleans(), seeds)
def test_a_slot_is_a_sum_over_all_positions_that_are_no_padding(problem, masked, seed):
    mask, x = drawn_mask(problem.k, seed) if masked else None, problem.k.copy()
    expected = slots_of(x, problem.e, mask)
    if masked:
        x.swapaxes(1, 2)[~mask] = np.nan
    assert_close(untouched(linformer.project, x, problem.e, *[mask] * masked), expected)


@PROJECT
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slots_have_the_dtype_of_what_they_are_made_of(dtype):
    problem = make("normal", 0, 1, 9, 4, 3)
    found = linformer.project(problem.k.astype(dtype), problem.e.astype(dtype), np.ones((1, 9), dtype=bool))
    assert found.dtype == dtype and found.shape == (1, 2, 3, 4)


@PROJECT
@pytest.mark.parametrize(("x", "e", "mask", "error"), wrong_projections())
def test_project_refuses(x, e, mask, error):
    with pytest.raises(error):
        linformer.project(x, e, mask)


@pytest.mark.parametrize("case", ["authors", "authors_shared", "one_head", "one_head_same", "plain", "masked"])
def test_attention_is_the_original_codes(case):
    arrays = original(case)
    expected = arrays.pop("out")
    dtype = np.float32 if case.startswith("authors") else np.float64  # the authors' softmax is float32
    assert_close(linformer.linformer_attention(**arrays), expected, dtype, terms=11)


@given(problems(), st.booleans(), st.sampled_from((None, 0.3)))
def test_attention_is_a_softmax_over_slots(problem, share, scale):
    q, k, v, e, f = problem.arrays()
    found = untouched(linformer.linformer_attention, *problem.arrays()[:4], f=None if share else f, scale=scale)
    expected = attended(q, slots_of(k, e), slots_of(v, e if share else f), scale)
    assert_close(found, expected, scores=problem.largest_score)


def test_as_many_slots_as_tokens_can_be_full_attention():
    q, k, v, _, _ = make("normal", 1, 7, 9, 6, 9).arrays()
    assert_close(linformer.linformer_attention(q, k, v, np.eye(9)), attended(q, k, v))


def test_a_text_of_padding_alone_gives_zero():
    q, k, v, e, f = make("normal", 2, 4, 5, 3, 2).arrays()
    out = linformer.linformer_attention(q, k * np.nan, v * np.nan, e, f, np.zeros((1, 5), dtype=bool))
    np.testing.assert_array_equal(out, 0)


def test_attention_refuses_in_words():
    q, k, v, e, f = make("normal", 2, 4, 5, 3, 2).arrays()
    for x, changed, mask, error in wrong_projections():
        with pytest.raises(error, match=r"need \[|dtype of k|columns|mask must|finite"):
            linformer.linformer_attention(np.ones((2, 3, 4, 4)), x, x, changed, mask=mask)
    with pytest.raises(ValueError, match="as many slots"):
        linformer.linformer_attention(q, k, v, e, f[:1])


@pytest.mark.parametrize("triangular", [False, True])
def test_the_last_token_changes_the_first_output(triangular):
    q, k, v, e, f = make("normal", 3, 8, 8, 4, 8).arrays()

    def first(k, v):
        if not triangular:
            return linformer.linformer_attention(q, k, v, e, f)[:, :, 0]
        return (f @ v)[:, :, 0]  # slots masked as a triangle: the first query reads the first slot alone

    later = (x.copy() for x in (k, v))
    k_changed, v_changed = later
    k_changed[:, :, -1], v_changed[:, :, -1] = 1, -1
    assert np.abs(first(k_changed, v_changed) - first(k, v)).min() > 0


def blockwise_by_loops(q, k, v, e, f, scale=None) -> np.ndarray:
    """Query by query: the slots of each block before its own, then the keys of its own up to itself."""
    (T, S), block, out = (q.shape[2], k.shape[2]), e.shape[-1], np.empty_like(q)
    for i in range(T):
        position = i + S - T
        start = position // block * block
        parts = [(slice(s, s + block), True) for s in range(0, start, block)] + [(slice(start, position + 1), False)]
        keys, values = (
            np.concatenate([slots_of(x[:, :, rows], p) if whole else x[:, :, rows] for rows, whole in parts], axis=2)
            for x, p in ((k, e), (v, f))
        )
        out[:, :, i] = attended(q[:, :, i : i + 1], keys, values, scale)[:, :, 0]
    return out


@BLOCKWISE
@given(st.data(), LENGTHS, SIZES, st.sampled_from((1, 2, 5)), st.sampled_from((1, 4, 16)), st.booleans(), seeds)
def test_blockwise_is_a_loop_over_queries(data, S, D, slots, block, own, seed):
    T = data.draw(st.sampled_from((1, S)) | st.integers(1, S))
    heads = data.draw(st.sampled_from(((1, 1, 1), (2, 2, 2))))
    q, k, v, _, _ = make("normal", seed, T, S, D, 1, heads=heads).arrays()
    e, f = np.random.default_rng(seed).normal(size=(2, *(heads[1],) * own, slots, block))
    scale, share = data.draw(st.sampled_from((None, 0.3))), data.draw(st.booleans())
    found = untouched(linformer.blockwise_attention, q, k, v, e, *[f] * (not share), scale=scale)
    problem = make("normal", seed, T, S, D, 1, heads=heads)
    assert_close(found, blockwise_by_loops(q, k, v, e, e if share else f, scale), scores=problem.largest_score * 16)


@BLOCKWISE
@given(st.integers(1, 30), st.sampled_from((1, 4, 7)), seeds)
def test_blockwise_sees_nothing_that_comes_later(S, block, seed):
    q, k, v, _, _ = make("normal", seed, S, S, 3, 1).arrays()
    e, t = np.random.default_rng(seed).normal(size=(2, block)), seed % S + 1
    before = linformer.blockwise_attention(q, k, v, e)
    q, k, v = q.copy(), k.copy(), v.copy()
    q[:, :, t:], k[:, :, t:], v[:, :, t:] = 5, 7, -3
    after = linformer.blockwise_attention(q, k, v, e)
    np.testing.assert_allclose(after[:, :, :t], before[:, :, :t], **tolerance(np.float64, 30))


@BLOCKWISE
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_blockwise_survives_huge_scores_and_keeps_the_dtype(size):
    q, k, v = (np.full((1, 1, 9, 4), x, dtype=np.float32) for x in (100, size, 2))
    q[:, :, ::2] *= -1  # no row's scores make another's vanish
    out = linformer.blockwise_attention(q, k, v, np.full((1, 4), 0.25, dtype=np.float32))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, 2, **tolerance(np.float32))


WRONG_BLOCKS = [
    ({"q": (1, 2, 6, 4)}, ValueError),
    ({"q": (1, 3, 5, 4)}, ValueError),
    ({"k": (1, 2, 5, 3)}, ValueError),
    ({"e": (3, 2, 4)}, ValueError),
    ({"e": (4,)}, ValueError),
    ({"e": (0, 4)}, ValueError),
    ({"f": (3, 4)}, ValueError),
    ({"f": (2, 5)}, ValueError),
]


@BLOCKWISE
@pytest.mark.parametrize(("changed", "error"), WRONG_BLOCKS)
def test_blockwise_refuses(changed, error):
    shapes = {"q": (1, 2, 5, 4), "k": (1, 2, 5, 4), "v": (1, 2, 5, 4), "e": (2, 4), "f": (2, 4)} | changed
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(error):
        linformer.blockwise_attention(**arrays)


@BLOCKWISE
def test_blockwise_refuses_other_dtypes_and_scales():
    x, e = np.ones((1, 2, 5, 4)), np.ones((2, 4))
    for f in (e.astype(np.float32), e.astype(int)):
        with pytest.raises(TypeError):
            linformer.blockwise_attention(x, x, x, e, f)
        with pytest.raises(TypeError):
            linformer.blockwise_attention(x, x, x, f)
    for other in (x.astype(np.float32), x.astype(int)):
        for arrays in ((other, x, x), (x, other, x), (x, x, other)):
            with pytest.raises(TypeError):
                linformer.blockwise_attention(*arrays, e)
    for scale in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError):
            linformer.blockwise_attention(x, x, x, e, scale=scale)


@RANK
@given(st.integers(1, 7), st.integers(1, 7), seeds, st.sampled_from((1.0, 1e-3, 1e3)))
def test_the_share_is_that_of_known_singular_values(T, S, seed, size):
    generator, small = np.random.default_rng(seed), min(T, S)
    left, right = (np.linalg.qr(generator.normal(size=(2, n, n)))[0] for n in (T, S))
    values = size * generator.uniform(0.1, 1, size=(2, small))
    weights = left[..., :small] * values[:, None] @ right[:, :small]
    largest = -np.sort(-values, axis=-1)
    for rank in range(1, small + 1):
        expected = largest[:, :rank].sum(-1) / values.sum(-1)
        np.testing.assert_allclose(linformer.rank_share(weights, rank), expected, **tolerance(np.float64, 49))


@RANK
def test_the_share_of_nothing_and_of_one_row():
    with np.errstate(all="raise"):
        assert linformer.rank_share(np.zeros((3, 4)), 1) == 1
    np.testing.assert_array_equal(linformer.rank_share(np.zeros((2, 5, 3, 4)), 2), np.ones((2, 5)))
    np.testing.assert_allclose(linformer.rank_share(np.full((6, 4), 0.25), 1), 1)
    for size in (1e-6, 1.0, -3.0):
        np.testing.assert_allclose(linformer.rank_share(size * np.eye(8), 2), 1 / 4)


@RANK
def test_rank_share_refuses():
    two = np.stack([np.eye(3), np.where(np.eye(3) == 1, np.inf, 0)])
    refused = [(np.eye(3), 0), (np.eye(3), -1), (np.eye(3)[:2], 3), (np.eye(3)[:, :2], 3), (np.ones((4, 2, 3)), 3)]
    for weights, rank in (*refused, (np.ones(3), 1), (np.eye(3) * np.nan, 1), (two, 1)):
        with pytest.raises(ValueError):
            linformer.rank_share(weights, rank)


# --- the kernels --------------------------------------------------------------------------------------------------

few_examples = settings(max_examples=max(settings.default.max_examples // 3, 8))
FEW_HEADS = ((1, 1, 1), (1, 2, 1), (1, 1, 3))
SMALL = problems(st.sampled_from((1, 17, 33)), st.sampled_from((1, 16, 24)), heads=FEW_HEADS)
LONGER = problems(st.sampled_from((1, 33, 70)), st.sampled_from((1, 16, 24)), heads=FEW_HEADS)


@KERNEL_PROJECT
@pytest.mark.kernel
@few_examples
@given(LONGER, st.sampled_from(KERNEL_DTYPES), st.sampled_from((1, 2, None)), st.booleans(), st.booleans(), seeds)
def test_kernel_projects_like_the_sum(problem, dtype, runs, aligned, masked, seed):
    x, e, S = problem.k.copy(), problem.e.copy(), problem.k.shape[2]
    mask = drawn_mask(x, seed) if masked else None
    expected = slots_of(x, e, mask)
    e[..., S:] = np.nan
    if masked:
        x.swapaxes(1, 2)[~mask] = np.nan
    hides = None if mask is None else on_device(mask, torch.bool)
    found = fast.project(on_device(x, dtype, aligned), on_device(e, dtype, aligned), hides, runs)
    assert found.dtype == dtype
    assert_close(found.double().cpu().numpy(), expected, dtype, terms=40)


@KERNEL_PROJECT
@pytest.mark.kernel
def test_kernel_sums_in_float32():
    x = torch.full((1, 1, 140, 16), 200.0, dtype=torch.float16, device=DEVICE)
    e = torch.full((1, 140), 200.0, dtype=torch.float16, device=DEVICE)
    e[:, 70:] *= -1
    e[:, 0] += 1
    torch.testing.assert_close(fast.project(x, e, None, 1), x[:, :, :1])  # a product is 40,000; two of them overflow


@KERNEL_PROJECT
@pytest.mark.kernel
def test_kernel_reads_the_mask_of_every_tile():
    problem, mask = make("normal", 0, 1, 150, 16, 2), np.ones((1, 150), dtype=bool)
    mask[:, 3], mask[:, 130:] = False, False
    x, e, hides = on_device(problem.k, torch.float32), on_device(problem.e, torch.float32), on_device(mask, torch.bool)
    found = fast.project(x, e, hides, 1).double().cpu().numpy()
    assert_close(found, slots_of(problem.k, problem.e, mask), np.float32)


@KERNEL_PROJECT
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_only_what_it_projects(begins):
    problem = make("normal", 0, 1, 45, 24, 17)
    x, e = (walled(torch.from_numpy(a).to(DEVICE, torch.float32), begins) for a in (problem.k, problem.e))
    assert_close(fast.project(x, e, None, 2).double().cpu().numpy(), slots_of(problem.k, problem.e), np.float32)


@KERNEL_ATTEND
@pytest.mark.kernel
@few_examples
@given(SMALL, st.sampled_from(KERNEL_DTYPES), st.sampled_from((16, 32)), st.sampled_from((None, 0.3)), st.booleans())
def test_kernel_attends_to_slots(problem, dtype, block_q, scale, aligned):
    arrays = (problem.q, problem.k, problem.v)  # any keys will do for slots
    found = fast.attend_slots(*(on_device(x, dtype, aligned) for x in arrays), scale, block_q)
    assert found.dtype == dtype
    scores = np.linalg.norm(problem.q, axis=-1).max() * np.linalg.norm(problem.k, axis=-1).max()
    assert_close(found.double().cpu().numpy(), attended(*arrays, scale), dtype, terms=40, scores=scores)


@KERNEL_ATTEND
@pytest.mark.kernel
def test_kernel_comes_by_all_queries_of_many_heads():
    generator = np.random.default_rng(0)  # more heads than programs: each does all tiles of one
    q, k, v = (generator.normal(size=shape) for shape in ((1, 4, 40, 16), (1, 2, 3, 16), (1, 2, 3, 16)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "PROGRAMS", 1)
        found = fast.attend_slots(*(on_device(x, torch.float32) for x in (q, k, v)), None, 16)
    assert_close(found.double().cpu().numpy(), attended(q, k, v), np.float32)


@KERNEL_ATTEND
@pytest.mark.kernel
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_kernel_survives_huge_scores(size):
    q, k, v = (torch.full((1, 1, 3, 16), x, dtype=torch.float16, device=DEVICE) for x in (100.0, size, 2.0))
    torch.testing.assert_close(fast.attend_slots(q, k, v), v, **tolerance(torch.float16))


@KERNEL_ATTEND
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_only_its_slots(begins):
    q, k, v, _, _ = make("normal", 0, 19, 5, 24, 1).arrays()
    tensors = (walled(torch.from_numpy(x).to(DEVICE, torch.float32), begins) for x in (q, k, v))
    assert_close(fast.attend_slots(*tensors).double().cpu().numpy(), attended(q, k, v), np.float32)
