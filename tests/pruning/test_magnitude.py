"""Magnitude pruning: exact counts and ties against brute force, schedules against published code, device functions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.pruning import magnitude
from chapters.shared.pruned_layers import dropped
from tests.conftest import golden, tolerance
from tests.pruning.launched import keys, staying, thresholds
from tests.pruning.refused import REFUSED
from tests.sparsity.drawn import CONTENTS, SEEDS, contents, first_largest

KEEP = pytest.mark.exercise("chapters.pruning.magnitude.keep_largest", points=2)
GLOBAL = pytest.mark.exercise("chapters.pruning.magnitude.global_masks", points=2)
CUBIC = pytest.mark.exercise("chapters.pruning.magnitude.cubic_sparsity", points=1)
ITERATIVE = pytest.mark.exercise("chapters.pruning.magnitude.iterative_sparsities", points=1)
THRESHOLD = pytest.mark.exercise("kernels.pruning.magnitude.threshold", points=3)
STAYS = pytest.mark.exercise("kernels.pruning.magnitude.stays", points=2)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in (KEEP, GLOBAL, CUBIC, ITERATIVE)}

SIZES = st.sampled_from([1, 2, 7, 16, 17])
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
KINDS = st.sampled_from(CONTENTS)
KEY_KINDS = ("any", "few", "neighbours", "equal", "each row on its own")
FEW = settings(max_examples=12)


def drawn(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    return contents(kind, (rows, columns), seed)


# --- the definition: which stay -------------------------------------------------------------------------------------


@KEEP
@given(KINDS, SIZES, SIZES, SEEDS, st.floats(0, 1))
def test_exactly_the_largest_stay_and_of_equal_ones_the_first(kind, rows, columns, seed, share):
    weight, kept = drawn(kind, rows, columns, seed), round(share * rows * columns)
    mask = magnitude.keep_largest(weight, kept)
    assert mask.dtype == bool and mask.shape == weight.shape
    assert mask.ravel().nonzero()[0].tolist() == first_largest(np.abs(weight).ravel(), kept)


@KEEP
@given(SEEDS, st.integers(1, 4))
def test_the_magnitude_that_stays_is_the_most_that_so_many_can_have(seed, kept):
    weight = np.random.default_rng(seed).normal(size=7)
    best = max(np.abs(weight[list(choice)]).sum() for choice in itertools.combinations(range(7), kept))
    assert np.abs(weight[magnitude.keep_largest(weight, kept)]).sum() == pytest.approx(best)


@KEEP
@pytest.mark.parametrize("values", [(0.5,), (1.0, -1.0), (0.0, -0.0), (2.0, 1.0, -1.0)])
def test_of_thousands_of_equals_the_first_stay_in_any_shape(values):
    weight = np.resize(np.array(values), (5, 20, 60))
    mask = magnitude.keep_largest(weight, 3001)
    assert mask.ravel().nonzero()[0].tolist() == first_largest(np.abs(weight).ravel(), 3001)


@KEEP
@pytest.mark.parametrize(
    ("weight", "kept", "expected"),
    [
        (np.array([127, -128, 3], dtype=np.int8), 1, [False, True, False]),
        (np.array([200, 0, 255], dtype=np.uint8), 2, [True, False, True]),
        (np.array([0.0, 5e-324, -0.0]), 1, [False, True, False]),
        (np.array([0.0, -1e-45, 1e-44], dtype=np.float32), 2, [False, True, True]),
        (np.array([6e4, -6.5e4, 6e4], dtype=np.float16), 1, [False, True, False]),
        (np.array([1.0, -1.0 - 2**-52, 1.0]), 1, [False, True, False]),
        (np.array([-0.0, 0.0, 0.0]), 2, [True, True, False]),
        (np.array([3, -2, 1], dtype=np.int64), 0, [False, False, False]),
        (np.array(-2.0), 1, True),
        (np.ones((2, 3)).T, 2, [[True, True], [False, False], [False, False]]),
    ],
)
def test_exactly_these_stay_and_the_weight_is_left_as_it_was(weight, kept, expected):
    mine = weight.copy(order="K")
    np.testing.assert_array_equal(magnitude.keep_largest(mine, kept), expected)
    assert mine.tobytes() == weight.tobytes()


@KEEP
@given(SEEDS, st.integers(-900, 900))
def test_neither_scale_nor_sign_changes_what_stays(seed, exponent):
    weight = drawn("ties", 4, 9, seed)
    mask = magnitude.keep_largest(weight, 17)
    np.testing.assert_array_equal(magnitude.keep_largest(weight * 2.0**exponent, 17), mask)
    np.testing.assert_array_equal(magnitude.keep_largest(-weight, 17), mask)


@given(KINDS, SIZES, SIZES, SEEDS, SHARES)
def test_layers_and_rows_lose_exactly_their_share(kind, rows, columns, seed, sparsity):
    weight = drawn(kind, rows, columns, seed)
    weight[0] = 0  # a row of zeros is pruned like any other
    layer, row = magnitude.layer_mask(weight, sparsity), magnitude.row_mask(weight, sparsity)
    assert (~layer).sum() == dropped(weight.size, sparsity)
    assert (~row).sum(axis=1).tolist() == [dropped(columns, sparsity)] * rows
    kept = columns - dropped(columns, sparsity)
    np.testing.assert_array_equal(magnitude.prune_rows(weight, kept), np.where(row, weight, 0))
    for numbers, mask in zip(weight, row, strict=True):
        assert mask.nonzero()[0].tolist() == first_largest(np.abs(numbers), kept)


def test_what_goes_becomes_positive_zero_and_the_dtype_stays():
    weight = np.array([[-0.0, -3, 2, -1]], dtype=np.float16)
    for found in (magnitude.prune_layer(weight, 1), magnitude.prune_rows(weight, 1)):
        assert (
            found.dtype == np.float16 and found.tolist() == [[0, -3, 0, 0]] and not np.signbit(found[0, [0, 2]]).any()
        )


@GLOBAL
@given(st.lists(st.tuples(KINDS, SIZES, SIZES), min_size=1, max_size=4), SEEDS, SHARES)
def test_all_layers_share_one_threshold_and_one_count(layers, seed, sparsity):
    weights = [drawn(kind, rows, columns, seed + i) for i, (kind, rows, columns) in enumerate(layers)]
    masks = magnitude.global_masks(weights, sparsity)
    assert [(mask.dtype, mask.shape) for mask in masks] == [(bool, weight.shape) for weight in weights]
    together = np.concatenate([np.abs(weight).ravel() for weight in weights])
    kept = np.concatenate([mask.ravel() for mask in masks]).nonzero()[0].tolist()
    assert kept == first_largest(together, together.size - min(round(sparsity * together.size), together.size - 1))


@GLOBAL
def test_layers_of_other_dtypes_and_shapes_are_compared_by_value_and_left_as_they_were():
    weights = [np.array([[-128, 5]], np.int8), np.array([5.25, -127.5, 0.25], np.float16), np.array([[[5.75]]])]
    mine = [weight.copy() for weight in weights]
    masks = magnitude.global_masks(mine, 0.5)
    assert [mask.tolist() for mask in masks] == [[[True, False]], [False, True, False], [[[True]]]]
    assert all(weight.tobytes() == copy.tobytes() for weight, copy in zip(weights, mine, strict=True))
    nearly = [np.ones(1), np.array([-1 - 2**-52])]
    assert [mask.tolist() for mask in magnitude.global_masks(nearly, 0.5)] == [[False], [True]]


@GLOBAL
@pytest.mark.parametrize(
    ("size", "sparsity", "kept"), [(5, 0.5, 3), (7, 0.5, 3), (3, 0.999, 1), (1, 0.9, 1), (9, 0, 9)]
)
def test_halves_go_to_even_one_weight_stays_and_earlier_layers_win_ties(size, sparsity, kept):
    masks = magnitude.global_masks([np.ones(1)] * size, sparsity)
    assert [bool(mask[0]) for mask in masks] == [True] * kept + [False] * (size - kept)


# --- the definition: when -------------------------------------------------------------------------------------------


@CUBIC
@given(
    st.integers(-5, 50),
    st.integers(1, 60),
    st.floats(0, 0.5),
    st.floats(0.5, 0.99),
    st.sampled_from([0.5, 1, 2, 3, 4.5]),
)
def test_the_cubic_schedule_rises_from_first_to_last_and_stays(begin, length, initial, final, power):
    steps = [begin + i for i in range(-3, length + 4)]
    found = [magnitude.cubic_sparsity(step, begin, begin + length, initial, final, power) for step in steps]
    assert found[:4] == [pytest.approx(initial)] * 4 and found[-4:] == [pytest.approx(final)] * 4
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    middle = magnitude.cubic_sparsity(begin + length / 2, begin, begin + length, initial, final, power)
    assert final - middle == pytest.approx((final - initial) / 2**power)


@CUBIC
def test_the_cubic_schedule_is_cubic_unless_told():
    assert magnitude.cubic_sparsity(5, 0, 10, 0, 0.8) == pytest.approx(0.7)


@CUBIC
@pytest.mark.parametrize("case", ["a", "c"])
def test_golden_tensorflow_schedule(case):
    arrays = golden("sparse/magnitude")
    initial, final, begin, end, power, _ = arrays[f"tfmot_poly_{case}__args_init_final_begin_end_power_freq"]
    found = [
        magnitude.cubic_sparsity(t, begin, end, initial, final, power) for t in arrays[f"tfmot_poly_{case}__steps"]
    ]
    np.testing.assert_allclose(found, arrays[f"tfmot_poly_{case}__sparsity"], **tolerance(np.float32))


@CUBIC
@pytest.mark.parametrize(("curve", "power"), [("linear", 1), ("cubic", 3)])
def test_golden_sparseml_schedule(curve, power):
    arrays = golden("sparse/magnitude")
    found = [magnitude.cubic_sparsity(t, 2, 22, 0.05, 0.85, power) for t in arrays["sparseml_interp_epochs"]]
    expected = arrays[f"sparseml_interp_{curve}_start2_end22_0.05_to_0.85"]
    np.testing.assert_allclose(found, expected, **tolerance(np.float64))


@ITERATIVE
@given(st.floats(0, 0.999), st.integers(1, 12))
def test_each_round_drops_the_same_share_of_what_is_left(final, rounds):
    found = magnitude.iterative_sparsities(final, rounds)
    assert len(found) == rounds and found[-1] == final
    left = 1 - np.array([0.0, *found])
    np.testing.assert_allclose(left[1:] / left[:-1], np.full(rounds, (1 - final) ** (1 / rounds)), rtol=1e-9)


@ITERATIVE
def test_the_lottery_tickets_fifth():
    np.testing.assert_allclose(magnitude.iterative_sparsities(1 - 0.8**3, 3), [0.2, 0.36, 0.488])


# --- published masks ------------------------------------------------------------------------------------------------


@KEEP
@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "0.77", "0.995"])
def test_golden_tensorflow_masks(sparsity):
    arrays = golden("sparse/magnitude")
    weight = arrays["tfmot_mask_W"]
    mask = magnitude.keep_largest(weight, max(round(weight.size * (1 - float(sparsity))), 1))
    np.testing.assert_array_equal(mask, arrays[f"tfmot_mask_s{sparsity}"])
    assert np.abs(weight[mask]).min() == arrays[f"tfmot_threshold_s{sparsity}"]


@KEEP
@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "0.9"])
def test_golden_sparseml_masks(sparsity):
    arrays = golden("sparse/magnitude")
    mask = magnitude.layer_mask(arrays["topkast_W"], float(sparsity))
    np.testing.assert_array_equal(mask, arrays[f"sparseml_unstructured_mask_s{sparsity}"])


def test_golden_sparseml_ties_keep_the_same_magnitudes():
    """Which of equals stay differs: there it is drawn."""
    arrays = golden("sparse/magnitude")
    scores, theirs = arrays["sparseml_ties_scores"], arrays["sparseml_ties_s0.5_mask"].astype(bool)
    assert sorted(scores[magnitude.layer_mask(scores, 0.5)]) == sorted(scores[theirs])


@GLOBAL
def test_golden_sparseml_global_masks():
    arrays = golden("sparse/magnitude")
    masks = magnitude.global_masks([arrays["topkast_W"], arrays["sparseml_global_W2"]], 0.7)
    for mask, name in zip(masks, ("W", "W2"), strict=True):
        np.testing.assert_array_equal(mask, arrays[f"sparseml_global_s0.7_mask_{name}"])


@GLOBAL
def test_golden_open_lth_levels():
    """Each level drops ⌈0.2 · left⌉ + 1 of all that is left, a layer that is not pruned counted in."""
    arrays = golden("sparse/magnitude")
    names, spared, left = ("fc.weight", "fc2.weight"), 50, 850
    for level in range(1, 5):
        left -= -(-left // 5) + 1
        kept = left - spared
        masks = magnitude.global_masks([arrays[f"openlth_W__{name}"] for name in names], 1 - kept / 800)
        if level != 2:
            for mask, name in zip(masks, names, strict=True):
                np.testing.assert_array_equal(mask, arrays[f"openlth_level{level}__{name}"])


# --- bad input: here the type of the error is graded, in test_magnitude_in_model.py its words ------------------------


@pytest.mark.parametrize(
    ("function", "case"),
    [pytest.param(name, case, marks=MARKS[name]) for name, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused(function, case):
    with pytest.raises(ValueError):
        getattr(magnitude, function)(*REFUSED[function][case])


# --- the device functions of the kernels -----------------------------------------------------------------------------


@THRESHOLD
@pytest.mark.kernel
@pytest.mark.parametrize("bits", [15, 31])
@FEW
@given(st.sampled_from(KEY_KINDS), st.sampled_from([1, 2, 8]), st.sampled_from([2, 16, 64]), st.floats(0, 1), SEEDS)
def test_kernel_finds_the_greatest_key_that_enough_reach(bits, kind, rows, columns, share, seed):
    key = keys(kind, rows, columns, bits, seed)
    present = (key >= 0).sum(axis=1).min()
    kept = max(1, round(share * present))
    assert thresholds(key, kept, bits) == [sorted(row)[-kept] for row in key.tolist()]


@THRESHOLD
@pytest.mark.kernel
@pytest.mark.parametrize("bits", [15, 31])
def test_kernel_finds_a_threshold_where_too_few_keys_or_none_are_asked_for(bits):
    key = np.array([[5, 7, -1, -1], [9, 9, 9, -1]], dtype=np.int32)
    assert thresholds(key, 0, bits) == [2**bits - 1] * 2
    assert thresholds(key, 3, bits) == [0, 9]


@STAYS
@pytest.mark.kernel
@FEW
@given(st.sampled_from(KEY_KINDS), st.sampled_from([1, 2, 8]), st.sampled_from([2, 16, 64]), SEEDS)
def test_kernel_keeps_what_is_above_and_the_first_of_equals(kind, rows, columns, seed):
    key = keys(kind, rows, columns, 15, seed)
    found = key[:, seed % columns // 2].tolist()
    equals = [key[row].tolist().count(found[row]) for row in range(rows)]
    due = np.random.default_rng(seed).integers(-1, np.array(equals) + 2).tolist()
    expected = np.zeros(key.shape, dtype=bool)
    for row, column in np.ndindex(key.shape):
        earlier = (key[row, : column + 1] == found[row]).sum()
        tied = key[row, column] == found[row] and earlier <= due[row]
        expected[row, column] = key[row, column] > found[row] or tied
    np.testing.assert_array_equal(staying(key, found, due), expected)
