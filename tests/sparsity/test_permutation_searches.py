"""Searching for an order of channels: what every search keeps, the release's orders, and which search finds most."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.shared.stripes import all_groups, compatible, splits
from chapters.sparsity import permutation
from tests.conftest import golden, tolerance
from tests.sparsity.drawn import SEEDS, weights

GROUPS_OF_12 = permutation.SEARCHES["groups of 12"]
DETERMINISTIC = {"cs_0": permutation.channel_swap, "osg_8_0": permutation.stripe_groups}
SEARCHES = [*DETERMINISTIC.values(), GROUPS_OF_12]
EIGHT = np.arange(16.0).reshape(2, 8)
MATRICES = golden("sparse/permutation")


def kept(weight: np.ndarray) -> float:
    """What 2:4 keeps, row by row and stripe by stripe."""
    return sum(sum(sorted(np.abs(row[at : at + 4]))[2:]) for row in weight for at in range(0, len(row), 4))


# --- moves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count"), [(4, 1), (8, 35), (12, 5775)])
def test_splits_are_all_ways_to_share_columns_out_each_once(width, count):
    ways = splits(width)
    assert ways.shape == (count, width // 4, 4)
    assert ways[0].ravel().tolist() == list(range(width))
    listed = ways.reshape(count, -1).tolist()
    assert listed == sorted(listed) and len({tuple(way) for way in listed}) == count
    assert (np.sort(ways.reshape(count, -1)) == np.arange(width)).all()
    assert (np.diff(ways, axis=2) > 0).all() and (np.diff(ways[:, :, 0], axis=1) > 0).all()


@given(st.integers(0, 12), st.sampled_from([2, 3]), SEEDS)
def test_a_round_makes_the_best_moves_that_touch_different_stripes(count, size, seed):
    generator = np.random.default_rng(seed)
    stripes = all_groups(6, size)[generator.permutation(15)[:count]]
    gains = generator.integers(-2, 4, count).astype(float)
    expected, touched = [], set()
    for i in sorted(range(count), key=lambda i: (-gains[i], i)):
        if gains[i] > 0 and not touched & set(stripes[i]):
            expected.append(i)
            touched |= set(stripes[i])
    assert compatible(gains, stripes) == expected


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [*SEARCHES, lambda w: permutation.stripe_groups(w, escapes=3, seed=5)])
@settings(max_examples=15)
@given(weights(4, 5, rows=9))
def test_an_order_keeps_at_least_as_much_and_every_column_once(search, weight):
    mine = weight.copy()
    order = search(mine)
    np.testing.assert_array_equal(mine, weight)
    assert sorted(order) == list(range(weight.shape[1]))
    start = kept(weight)
    assert kept(weight[:, order]) >= start * (1 - 1e-8)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(2, 5), SEEDS)
def test_a_search_ends_where_none_of_its_moves_gains(rows, stripes, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, 4 * stripes))
    swapped = weight[:, permutation.channel_swap(weight)]
    assert permutation.swap_gains(swapped).max() < 1e-8 * kept(weight)
    grouped = weight[:, permutation.stripe_groups(weight)]
    assert permutation.group_gains(grouped)[0].max() < 1e-8 * kept(weight)


@pytest.mark.parametrize("search", [*SEARCHES, lambda w: permutation.channel_swap(w, 10)])
@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 4), SEEDS, st.sampled_from([1e-4, 3e-300, 1e4, -7e250]))
def test_a_factor_on_the_whole_matrix_changes_nothing(search, rows, stripes, seed, factor):
    weight = np.random.default_rng(seed).normal(size=(rows, 4 * stripes))
    np.testing.assert_array_equal(search(weight * factor), search(weight))


def test_the_published_thresholds_would_stop_at_a_small_scale_and_these_do_not():
    weight = MATRICES["u64x32__x"].astype(np.float64) * 1e-4
    largest = max(permutation.swap_gains(weight).max(), permutation.group_gains(weight)[0].max())
    assert largest < 5 * np.finfo(np.float16).tiny  # what the release takes for nothing
    assert permutation.efficacy(weight, permutation.stripe_groups(weight)) > 34


@pytest.mark.parametrize(("case", "name"), [
    ("readme", "cs_0"), ("readme", "osg_8_0"), ("u64x32", "cs_0"), ("u64x32", "osg_8_0"), ("chan96x64", "cs_0"),
])  # fmt: skip
def test_golden_orders(case, name):
    joint = "_" if case == "readme" else "__"
    weight = MATRICES[f"{case}{joint}x"].astype(np.float64)
    order = DETERMINISTIC[name](weight)
    np.testing.assert_array_equal(order, MATRICES[f"{case}{joint}{name}{joint}perm"])


def test_golden_order_of_groups_of_12_and_more_where_the_release_stops_early():
    weight = MATRICES["u64x32__x"].astype(np.float64)
    np.testing.assert_array_equal(permutation.stripe_groups(weight, 12), MATRICES["u64x32__osg_12_0__perm"])
    weight = MATRICES["chan96x64__x"].astype(np.float64)
    order = permutation.stripe_groups(weight)
    assert permutation.efficacy(weight, order) > MATRICES["chan96x64__osg_8_0__eff"] + 0.1


def uniform(seed: int) -> np.ndarray:
    """The 32 × 16 matrix that the release's table counts by this seed."""
    return np.random.RandomState(seed).rand(32, 16)


def test_golden_table_of_random_matrices_and_the_order_of_the_searches():
    table = dict(zip(MATRICES["seeds25_32x16__columns"].tolist(), MATRICES["seeds25_32x16__table"].T, strict=True))
    means = []
    for search in (partial(permutation.random_order, tries=200), *DETERMINISTIC.values(), GROUPS_OF_12):
        orders = [search(uniform(seed)) for seed in range(25)]
        magnitudes = np.array([kept(uniform(seed)[:, order]) for seed, order in enumerate(orders)])
        assert (magnitudes <= table["optimum"] + 1e-9).all()
        if search in DETERMINISTIC.values():
            name = {v: k for k, v in DETERMINISTIC.items()}[search]
            np.testing.assert_allclose(magnitudes, table[name], **tolerance(np.float64, scale=100))
        means.append(np.mean(100 * (magnitudes - table["base24"]) / (table["rows50"] - table["base24"])))
    assert means == sorted(means) and means[-1] > 56 and 51.9 < means[1] < 52.1 and 53.3 < means[2] < 53.5


def test_escapes_find_more_and_groups_with_escapes_the_most():
    names = ("swaps", "groups of 8", "swaps, 100 escapes", "groups of 8, 100 escapes")
    searches = [permutation.SEARCHES[name] for name in names]
    means = [np.mean([permutation.efficacy(uniform(s), search(uniform(s))) for s in range(8)]) for search in searches]
    assert means[0] < means[2] < means[3] and means[1] < means[3]
    first, again = (permutation.channel_swap(uniform(3), 20, seed) for seed in (7, 7))
    np.testing.assert_array_equal(first, again)


def test_the_anchor_of_64_columns_and_128_rows_takes_less_than_a_third_of_a_second():
    weight, seconds = MATRICES["readme_x"], []
    for _ in range(3):
        start = time.process_time()
        order = permutation.stripe_groups(weight)
        seconds.append(time.process_time() - start)
    assert permutation.efficacy(weight, order) >= MATRICES["readme_osg_8_0_eff"] - 1e-6
    assert min(seconds) < 0.3


def test_what_leaves_nothing_to_choose_keeps_its_order():
    for search in SEARCHES:
        assert search(np.array([[3.0, 1, 2, 4]])).tolist() == [0, 1, 2, 3]
        assert search(np.zeros((3, 12))).tolist() == list(range(12))
        assert search(np.ones((3, 12))).tolist() == list(range(12))
    np.testing.assert_array_equal(permutation.stripe_groups(EIGHT, 12), permutation.stripe_groups(EIGHT, 8))


@pytest.mark.parametrize("case", ["readme", "u64x32", "chan96x64"])
def test_golden_magnitudes(case):
    joint = "_" if case == "readme" else "__"
    weight = MATRICES[f"{case}{joint}x"].astype(np.float64)
    expected = MATRICES[f"{case}{joint}base24"]
    np.testing.assert_allclose(permutation.kept_magnitude(weight), expected, **tolerance(np.float32))
