"""Channel permutation: gains against what pruning keeps, searches against the release's, kernels against both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.shared.stripes import all_groups, splits
from chapters.sparsity import permutation
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.drawn import SEEDS, SUMMABLE, contents, weights

EFFICACY = pytest.mark.exercise("chapters.sparsity.permutation.efficacy", points=1)
SWAPS = pytest.mark.exercise("chapters.sparsity.permutation.swap_gains", points=2)
SPLITS = pytest.mark.exercise("chapters.sparsity.permutation.split_magnitudes", points=3)
SWAP_KERNEL = pytest.mark.exercise("kernels.sparsity.permutation.swap_kernel", points=3)
MEETINGS = pytest.mark.exercise("kernels.sparsity.permutation.pair_meetings", points=3)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in (EFFICACY, SWAPS)}

fast = kernel("sparsity.permutation")
NAN, EIGHT = float("nan"), np.arange(16.0).reshape(2, 8)
MATRICES = golden("sparse/permutation")


def kept(weight: np.ndarray) -> float:
    """What 2:4 keeps, row by row and stripe by stripe."""
    return sum(sum(sorted(np.abs(row[at : at + 4]))[2:]) for row in weight for at in range(0, len(row), 4))


def close(scale: float, length: int = 1) -> dict[str, float]:
    return tolerance(np.float64, length, scale=scale + 1e-300)


# --- what counts ------------------------------------------------------------------------------------------------------


@EFFICACY
@given(weights(4), SEEDS)
def test_efficacy_is_the_share_of_what_any_half_of_each_row_keeps_more(weight, seed):
    order = np.random.default_rng(seed).permutation(weight.shape[1])
    mine, start = weight.copy(), kept(weight)
    limit = sum(sum(sorted(np.abs(row))[len(row) // 2 :]) for row in weight)
    found = permutation.efficacy(mine, order)
    np.testing.assert_array_equal(mine, weight)
    if limit - start <= 1e-12 * limit:
        assert found == 0
    else:
        assert found == pytest.approx(100 * (kept(weight[:, order]) - start) / (limit - start), abs=1e-6)


@EFFICACY
@pytest.mark.parametrize("case", ["readme", "u64x32", "chan96x64"])
def test_golden_efficacy(case):
    joint = "_" if case == "readme" else "__"
    found = {key[: -len("perm")]: order for key, order in MATRICES.items() if key.startswith(case) and "_perm" in key}
    weight = MATRICES[f"{case}{joint}x"].astype(np.float64)
    for start, order in found.items():
        efficacy = permutation.efficacy(weight, order.astype(int))
        np.testing.assert_allclose(efficacy, MATRICES[f"{start}eff"], **tolerance(np.float32, scale=100))
    assert len(found) >= 3


@EFFICACY
def test_efficacy_is_0_where_nothing_can_be_gained():
    for weight in (np.ones((3, 8)), np.zeros((2, 8)), np.array([[1.0, 2, 3, 4]]), 0.1 * np.ones((7, 12))):
        assert permutation.efficacy(weight, np.arange(weight.shape[1])[::-1]) == 0
    weight = np.random.default_rng(0).normal(size=(31, 12)) * ([1, 1, 0, 0] * 3)  # rounded sums differ, no more
    assert permutation.efficacy(weight, np.random.default_rng(0).permutation(12)) == 0


@EFFICACY
def test_efficacy_knows_small_gains_small_weights_and_int8():
    order = np.array([0, 1, 4, 5, 2, 3, 6, 7])
    for weight in ([4.0, 3, 2, 0, 0, 0, 0, 1], [4e-20, 3e-20, 2e-20, 0, 0, 0, 0, 1e-20], [1, 1, 1e-9, 0, 0, 0, 0, 0]):
        assert permutation.efficacy(np.array([weight]), order) == pytest.approx(100, rel=1e-6)
    assert permutation.efficacy(np.array([[-128, 127, 127, 0, 0, 0, 0, 1]], np.int8), order) == 100


# --- gains ------------------------------------------------------------------------------------------------------------


@SWAPS
@given(weights(4, 4, rows=5))
def test_a_swaps_gain_is_what_pruning_keeps_more_after_it(weight):
    mine, before, columns = weight.copy(), kept(weight), weight.shape[1]
    gains = permutation.swap_gains(mine)
    assert gains.shape == (columns, columns) and gains.dtype == np.float64
    np.testing.assert_array_equal(mine, weight)
    for a, b in itertools.combinations(range(columns), 2):
        swapped = weight.copy()
        swapped[:, [a, b]] = weight[:, [b, a]]
        expected = kept(swapped) - before if a // 4 != b // 4 else 0
        np.testing.assert_allclose([gains[a, b], gains[b, a]], expected, **close(before, weight.size))


@SWAPS
def test_a_swap_within_a_stripe_gains_exactly_nothing():
    gains = permutation.swap_gains(np.random.default_rng(0).normal(size=(7, 12)))
    for start in (0, 4, 8):
        assert not gains[start : start + 4, start : start + 4].any()
    assert permutation.swap_gains(np.array([[-128, 1, 1, 1, 127, 127, 127, 1]], np.int8))[1, 4] == 126
    assert permutation.swap_gains(np.array([[-128, 127, 127, 1, 1, 1, 1, 1]], np.int8))[1, 4] == 126


@SPLITS
@given(weights(4, 4, rows=4), st.sampled_from([2, 3]), SEEDS)
def test_a_split_keeps_what_pruning_keeps_of_it(weight, size, seed):
    weight = np.concatenate([weight] * 3, axis=1)[:, ::-1] / 3  # three stripes at least, of float64
    groups = all_groups(weight.shape[1] // 4, size)[:, :: 1 - seed % 2 * 2]  # ascending, or the other way around
    groups = np.random.default_rng(seed).permutation(groups)[:4]
    mine = np.abs(weight).T.copy(), groups.copy()
    found, ways = permutation.split_magnitudes(*mine), splits(4 * size)
    assert found.shape == (len(groups), len(ways))
    for old, new in zip((np.abs(weight).T, groups), mine, strict=True):
        np.testing.assert_array_equal(old, new)
    for group, magnitudes in zip(groups, found, strict=True):
        columns = weight.reshape(len(weight), -1, 4)[:, group].reshape(len(weight), -1)
        for i in {0, 1, seed % len(ways), len(ways) - 1}:
            expected = kept(columns[:, ways[i].ravel()])
            np.testing.assert_allclose(magnitudes[i], expected, **close(expected, weight.size))


@SPLITS
@pytest.mark.parametrize("rows", [1, 467, 937, 2003])
def test_splits_of_many_rows_lose_none(rows):
    """More rows than a search works on at once."""
    columns = np.ones((12, rows), np.float32)
    for group, ways in (([0, 2], 35), ([0, 1, 2], 5775)):
        found = permutation.split_magnitudes(columns, np.array([group]))
        assert found.dtype == np.float64 and (found == 2 * len(group) * rows).all()
        assert permutation.split_magnitudes(columns, np.zeros((0, len(group)), int)).shape == (0, ways)


@pytest.mark.parametrize("width", [8, 12])
@given(weights(4, 4, rows=3))
def test_the_best_split_of_each_group_is_found_and_of_equals_the_first(width, weight):
    weight = np.round(weight * 8) if np.abs(weight).max() < 99 else weight  # sums of these are exact
    gain, split = permutation.group_gains(weight, width)
    groups = list(itertools.combinations(range(weight.shape[1] // 4), width // 4))
    assert gain.shape == split.shape == (len(groups),)
    for i, group in enumerate(groups[:3]):
        found = permutation.split_magnitudes(np.abs(weight).T, np.array([group]))[0]
        assert gain[i] == found.max() - found[0] and split[i] == found.tolist().index(found.max())


# --- bad input: its type is graded, its words are not -----------------------------------------------------------------

REFUSED: dict[str, dict[str, tuple]] = {
    "efficacy": {
        "10 columns, not divisible by m=4": (np.ones((2, 10)), np.arange(10)),
        "must be finite": (EIGHT * NAN, np.arange(8)),
    },
    "swap_gains": {
        "10 columns, not divisible by the 4": (np.ones((2, 10)),),
        "must be finite": (EIGHT * NAN,),
        r"shape \(8,\)": (np.ones(8),),
        r"shape \(0, 8\)": (np.ones((0, 8)),),
        "no finite sum": (np.full((2, 4), 1e308),),
    },
    "group_gains": {"must be one of": (EIGHT, 16), "must be finite": (EIGHT - np.inf,)},
    "channel_swap": {"escapes must be at least 0, got -1": (EIGHT, -1), "6 columns": (np.ones((2, 6)),)},
    "stripe_groups": {
        "must be one of": (EIGHT, 10),
        "escapes must be": (EIGHT, 8, -2),
        "must be finite": (EIGHT * NAN,),
    },
}


@pytest.mark.parametrize(
    ("function", "case"),
    [pytest.param(name, case, marks=MARKS.get(name, ())) for name, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused(function, case):
    with pytest.raises(ValueError):
        getattr(permutation, function)(*REFUSED[function][case])


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("sparsity.permutation"), function)(*REFUSED[function][words])


# --- the kernels ------------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(SUMMABLE)
SIZES = {"rows": st.integers(1, 5), "stripes": st.integers(1, 5), "aligned": st.booleans(), "seed": SEEDS}


@SWAP_KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=6)
@given(kind=KINDS, tile=st.sampled_from([8, 16]), step=st.sampled_from([2, 4]), **SIZES)
def test_kernel_finds_every_swaps_gain(dtype, kind, seed, aligned, tile, step, rows, stripes):
    weight = contents(kind, (rows, 4 * stripes), seed)
    gains = fast.swap_gains(poisoned(torch.from_numpy(weight).to(DEVICE, dtype), aligned), tile, step)
    expected = oracle("sparsity.permutation").swap_gains(weight)  # its numbers are float16's
    assert gains.dtype == torch.float32
    largest = 4 * float(np.abs(weight).sum(axis=0).max())
    np.testing.assert_allclose(gains.cpu().numpy(), expected, **tolerance(np.float32, scale=largest))


@SWAP_KERNEL
@pytest.mark.kernel
def test_kernel_adds_in_float32():
    weight = torch.tensor([[2048.0, 2048, 2048, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]).half()
    assert fast.swap_gains(weight.to(DEVICE), 8, 2)[2, 4] == 2049  # float16 has no 2049


@MEETINGS
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=6)
@given(kind=KINDS, tile=st.sampled_from([2, 4]), step=st.sampled_from([2, 4]), **SIZES)
def test_kernel_finds_the_best_split_of_every_two_stripes(dtype, kind, seed, aligned, tile, step, rows, stripes):
    """Of nearly equal splits any is right: what its columns keep is compared, not its number."""
    weight = contents(kind, (rows, 4 * stripes), seed)
    gain, split = fast.group_gains(poisoned(torch.from_numpy(weight).to(DEVICE, dtype), aligned), tile, step)
    groups = all_groups(stripes, 2)
    found = oracle("sparsity.permutation").split_magnitudes(np.abs(weight).T, groups)
    gains = found - found[:, :1]
    limits = tolerance(np.float32, scale=8 * float(np.abs(weight).sum(axis=0).max()))
    np.testing.assert_allclose(gain.cpu().numpy(), gains.max(axis=1), **limits)
    np.testing.assert_allclose(gains[np.arange(len(groups)), split.cpu().numpy()], gains.max(axis=1), **limits)


@MEETINGS
@pytest.mark.kernel
def test_kernel_numbers_every_one_of_the_35_splits():
    """Each row has two ones in either half, for all pairs in each: only the split into these halves loses nothing."""
    for start in range(0, 35, 7):
        weight = torch.zeros(36, 7, 8)
        for pair, halves in enumerate(splits(8)[start : start + 7]):
            ones = itertools.product(*(itertools.combinations(half, 2) for half in halves))
            for row, (first, other) in zip(weight[:, pair], ones, strict=True):
                row[[*first, *other]] = 1
        gain, split = fast.group_gains(weight.flatten(1).to(DEVICE), 16, 16)
        neighbours = [i for i, (s, t) in enumerate(all_groups(14, 2)) if s % 2 == 0 and t == s + 1]
        assert split[neighbours].tolist() == list(range(start, start + 7))
        assert gain[neighbours].tolist() == [4 * 36 - kept(weight[:, pair].numpy()) for pair in range(7)]


@pytest.mark.kernel
@pytest.mark.parametrize("function", ["swap_gains", "group_gains"])
def test_kernels_refuse_what_they_cannot_serve(function):
    launch, weight = getattr(fast, function), torch.ones(8, 8, device=DEVICE)
    for words, bad in (
        ("10 columns", torch.ones(2, 10)),
        (r"\[N, K\]", torch.ones(8)),
        ("contiguous", weight.T[:, :4]),
    ):
        with pytest.raises(ValueError, match=words):
            launch(bad.to(DEVICE))
    with pytest.raises(TypeError, match="dtype"):
        launch(weight.double())


@pytest.mark.kernel
def test_what_the_kernels_are_timed_beside_computes_the_same():
    weight = np.random.default_rng(0).normal(size=(5, 16))
    given_ = torch.from_numpy(weight).float()
    limits = tolerance(np.float32, scale=10)
    np.testing.assert_allclose(
        fast.torch_swap_gains(given_), oracle("sparsity.permutation").swap_gains(weight), **limits
    )
    expected = oracle("sparsity.permutation").group_gains(weight)[0]
    np.testing.assert_allclose(fast.torch_group_gains(given_), expected, **limits)


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernels_read_nothing_outside_the_weight(begins):
    """It comes last, because a kernel that does ends the process."""
    weight = walled(torch.from_numpy(contents("normal", (5, 20), 0)).float(), begins)
    fast.swap_gains(weight, 16, 4)
    fast.group_gains(weight, 2, 2)
