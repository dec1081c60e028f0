"""Rewinding: counts, rates and masks against brute force, the masked step against torch's AdamW, and the kernel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.pruning import rewinding
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.pruning.steps import REFUSED, SIZES, drawn_step, packed, torchs_step
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("pruning.rewinding")

COUNTS = pytest.mark.exercise("chapters.pruning.rewinding.kept_counts", points=1)
RATES = pytest.mark.exercise("chapters.pruning.rewinding.retraining_rates", points=2)
MASKS = pytest.mark.exercise("chapters.pruning.rewinding.next_masks", points=2)
STEP = pytest.mark.exercise("chapters.pruning.rewinding.masked_adamw", points=3)
KERNEL = pytest.mark.exercise("kernels.pruning.rewinding.adamw_kernel", points=3)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in (COUNTS, RATES, MASKS, STEP)}

SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 0.999])
SETTINGS = st.fixed_dictionaries(
    {
        "step": st.sampled_from([1, 2, 10, 1000]),
        "rate": st.sampled_from([0.0, 1e-3, 0.1]),
        "betas": st.sampled_from([(0.9, 0.95), (0.8, 0.999), (0.0, 0.5), (0.5, 0.25)]),
        "eps": st.sampled_from([1e-8, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1, 2.0]),
    }
)


# --- how many stay --------------------------------------------------------------------------------------------------


@COUNTS
@given(st.sampled_from([1, 2, 7, 850, 10_007]), SHARES, st.integers(0, 12))
def test_each_level_drops_its_share_of_what_is_left(weights, share, levels):
    counts = rewinding.kept_counts(weights, share, levels)
    assert counts[0] == weights and len(counts) == levels + 1
    for left, after in itertools.pairwise(counts):
        assert after == left - min(round(share * left), left - 1)


@COUNTS
@given(st.sampled_from([1, 2, 7, 100, 850]), SHARES, st.integers(0, 8))
def test_open_lth_keeps_what_is_above_an_element_of_the_sorted_list(weights, share, levels):
    counts = rewinding.kept_counts(weights, share, levels, True)
    assert counts[0] == weights and len(counts) == levels + 1
    for left, after in itertools.pairwise(counts):
        threshold = math.ceil(share * left)  # of the list 0, 1, .. left - 1
        assert after == max(1, sum(value > threshold for value in range(left)))


@COUNTS
def test_the_trajectory_of_open_lth_and_ours():
    assert rewinding.kept_counts(850, 0.2, 5, open_lth=True) == [850, 679, 542, 432, 344, 274]
    assert rewinding.kept_counts(850, 0.2, 5) == [850, 680, 544, 435, 348, 278]
    assert rewinding.kept_counts(5, 0.5, 4) == [5, 3, 1, 1, 1]  # 2.5 and 1.5 are both 2, one always stays
    assert rewinding.kept_counts(9, 0.5, 0) == [9]


# --- from where, and how fast ---------------------------------------------------------------------------------------


@RATES
@given(st.integers(1, 30), st.data(), SEEDS)
def test_each_method_starts_and_replays_as_its_line_of_the_table_says(steps, data, seed):
    rates = np.random.default_rng(seed).uniform(1e-5, 1, steps)
    replayed = data.draw(st.integers(1, steps))
    last = rates.tolist()[steps - replayed :]
    expected = {"lottery": (0, rates.tolist()), "weight": (steps - replayed, last), "lr": (steps, last)}
    for method, (start, values) in expected.items():
        found = rewinding.retraining_rates(method, rates, replayed)
        assert found[0] == start and found[1].dtype == np.float64 and found[1].tolist() == values
    for constant, rate in ((None, rates[-1]), (0.25, 0.25)):
        start, values = rewinding.retraining_rates("fine-tuning", rates, replayed, constant)
        assert start == steps and values.dtype == np.float64 and values.tolist() == [rate] * replayed


@RATES
@pytest.mark.parametrize("method", ["lottery", "weight", "lr", "fine-tuning"])
def test_the_rates_are_new_and_those_of_the_first_run_stay(method):
    rates = np.array([1, 4, 3, 2], dtype=np.float32)
    _, values = rewinding.retraining_rates(method, rates, 4, 7.0)
    assert values.dtype == np.float64
    values[:] = 0
    assert rates.tolist() == [1, 4, 3, 2]
    double = rates.astype(np.float64)
    rewinding.retraining_rates(method, double, 3, 7.0)[1][:] = 0
    assert double.tolist() == [1, 4, 3, 2]


@RATES
def test_only_fine_tuning_looks_at_the_constant():
    for method in ("lottery", "weight", "lr"):
        assert rewinding.retraining_rates(method, np.array([3.0, 2.0]), 1, -1.0)[1][-1] == 2


# --- which stay -----------------------------------------------------------------------------------------------------


def largest_left(weights: list[np.ndarray], masks: list[np.ndarray], kept: int) -> list[list[bool]]:
    """The definition: rank what is left by magnitude, then layer, then index."""
    left = [(-abs(w), layer, i) for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True))
            for i, (w, m) in enumerate(zip(weight.ravel().tolist(), mask.ravel(), strict=True)) if m]  # fmt: skip
    chosen = {(layer, i) for _, layer, i in sorted(left)[:kept]}
    return [[(layer, i) in chosen for i in range(weight.size)] for layer, weight in enumerate(weights)]


@MASKS
@given(st.lists(st.tuples(st.sampled_from(CONTENTS), st.integers(1, 5), st.sampled_from([1, 3, 8])), min_size=1,
                max_size=3), SEEDS, st.floats(0, 1))  # fmt: skip
def test_of_what_is_left_the_largest_of_all_layers_stay(layers, seed, share):
    generator = np.random.default_rng(seed)
    weights = [contents(kind, (rows, columns), seed + i) for i, (kind, rows, columns) in enumerate(layers)]
    masks = [generator.random(weight.shape) < 0.6 for weight in weights]
    masks[-1].flat[0] = True
    kept = max(1, round(share * sum(mask.sum() for mask in masks)))
    mine = [x.copy() for x in weights], [mask.copy() for mask in masks]
    found = rewinding.next_masks(*mine, kept)
    assert [(mask.dtype, mask.shape) for mask in found] == [(bool, weight.shape) for weight in weights]
    assert [mask.ravel().tolist() for mask in found] == largest_left(weights, masks, kept)
    for before, after in zip((*weights, *masks), (*mine[0], *mine[1]), strict=True):
        np.testing.assert_array_equal(before, after)


@MASKS
def test_what_is_dropped_stays_dropped_however_large_and_zeros_that_are_kept_count():
    weights = [np.array([[9.0, 0.0, -8.0]]), np.array([-128, 0, 127], dtype=np.int8), np.zeros((2, 1))]
    masks = [np.array([[False, True, False]]), np.array([True, True, True]), np.array([[True], [False]])]
    found = rewinding.next_masks(weights, masks, 3)
    assert [mask.tolist() for mask in found] == [[[False, True, False]], [True, False, True], [[False], [False]]]
    assert found[0] is not masks[0]
    found = rewinding.next_masks(weights, masks, 5)
    assert [mask.tolist() for mask in found] == [mask.tolist() for mask in masks]


@MASKS
def test_golden_open_lth_levels():
    """850 counts a layer of 50 that is never pruned. Each level starts from the authors' own masks of the last."""
    arrays = golden("sparse/magnitude")
    names, counts = ("fc.weight", "fc2.weight"), [850, 679, 542, 432, 344]
    weights = [arrays[f"openlth_W__{name}"] for name in names]
    masks = [np.ones(weight.shape, dtype=bool) for weight in weights]
    for level in (1, 3, 4):
        found = rewinding.next_masks(weights, masks, counts[level] - 50)
        masks = [arrays[f"openlth_level{level}__{name}"].astype(bool) for name in names]
        for mine, theirs in zip(found, masks, strict=True):
            np.testing.assert_array_equal(mine, theirs)


# --- the masked step ------------------------------------------------------------------------------------------------


@STEP
@given(SEEDS, st.sampled_from([1, 3, 17]), SETTINGS)
def test_kept_weights_step_as_torchs_adamw_steps_them_alone(seed, size, how):
    weight, gradient, mask, mean, square = drawn_step((size,), seed)
    alone = [torch.from_numpy(x[mask]) for x in (weight, gradient, mean, square)]
    torchs_step(*alone, **how)
    found = rewinding.masked_adamw(weight, gradient, mask, mean, square, **how)
    for mine, theirs in zip(found, (alone[0], *alone[2:]), strict=True):
        np.testing.assert_allclose(mine[mask], theirs.numpy(), **tolerance(np.float64, 100))


@STEP
@given(SEEDS, st.sampled_from([(1,), (3, 5), (2, 1, 4)]))
def test_of_what_is_dropped_nothing_is_left_and_arguments_stay(seed, shape):
    arguments = drawn_step(shape, seed)
    mine = [x.copy() for x in arguments]
    found = rewinding.masked_adamw(*mine, 3, 0.1, weight_decay=0.1)
    for after in found:
        dropped = after[~arguments[2]]
        assert after.dtype == np.float64 and after.shape == shape
        assert (dropped == 0).all() and not np.signbit(dropped).any()
    assert all(x.tobytes() == before.tobytes() for x, before in zip(mine, arguments, strict=True))


@STEP
def test_the_first_step_goes_as_far_as_the_rate_and_is_computed_in_double_precision():
    gradient = np.array([300, -3e-4, 0], dtype=np.float16)  # 300² is infinite in float16
    zeros, mask = np.zeros(3, dtype=np.float16), np.ones(3, dtype=bool)
    weight, mean, square = rewinding.masked_adamw(np.ones(3, np.float16), gradient, mask, zeros, zeros, 1, 0.25)
    np.testing.assert_allclose(weight, [0.75, 1.25, 1.0], rtol=1e-4)
    np.testing.assert_allclose(mean, 0.1 * gradient.astype(float), rtol=1e-12)
    np.testing.assert_allclose(square, 0.05 * gradient.astype(float) ** 2, rtol=1e-12)


@STEP
def test_many_steps_with_masks_that_only_lose_are_torchs_steps_of_what_stays_to_the_end():
    generator = np.random.default_rng(0)
    weight, gradients = generator.normal(size=20), generator.normal(size=(6, 20))
    last = np.arange(20) % 3 == 0
    alone = [torch.from_numpy(x[last]) for x in (weight, weight, np.zeros(20), np.zeros(20))]
    mean, square = np.zeros(20), np.zeros(20)
    for step, gradient in enumerate(gradients):
        alone[1] = torch.from_numpy(gradient[last])
        torchs_step(*alone, step + 1, 0.05, weight_decay=0.1)
        mask = last | (np.arange(20) > 3 * step)
        how = {"weight_decay": 0.1}
        weight, mean, square = rewinding.masked_adamw(weight, gradient, mask, mean, square, step + 1, 0.05, **how)
    np.testing.assert_allclose(weight[last], alone[0].numpy(), **tolerance(np.float64, 100))
    assert not weight[~mask].any() and not mean[~mask].any()


# --- bad input: here the type of the error is graded, in test_rewinding_in_model.py its words ------------------------


@pytest.mark.parametrize(
    ("function", "case"),
    [pytest.param(name, case, marks=MARKS[name]) for name, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused(function, case):
    error, arguments, how = REFUSED[function][case]
    with pytest.raises(error):
        getattr(rewinding, function)(*arguments, **how)


# --- the kernel -----------------------------------------------------------------------------------------------------


def assert_steps(shape: tuple[int, ...], seed: int, dtype: torch.dtype, bits: bool, how: dict, aligned: bool) -> None:
    """The kernel, on poisoned inputs, steps as the reference does; its arguments stay as they were."""
    arrays = drawn_step(shape, seed, "float16")
    weight, gradient, mask, mean, square = (torch.from_numpy(x).to(DEVICE) for x in arrays)
    operands = (weight.to(dtype), gradient.to(dtype), packed(mask) if bits else mask, mean.float(), square.float())
    mine = [poisoned(x, aligned) for x in operands]
    found = fast.masked_adamw(*mine, **how, block=32)
    expected = oracle("pruning.rewinding").masked_adamw(*arrays, **how)
    for result, wanted, kind in zip(found, expected, (dtype, torch.float32, torch.float32), strict=True):
        assert result.dtype == kind and result.shape == torch.Size(shape)
        np.testing.assert_allclose(result.double().cpu().numpy(), wanted, **tolerance(kind))
        gone = result.cpu()[~torch.from_numpy(arrays[2])]
        assert not gone.any() and not gone.signbit().any()
    for before, after in zip(operands, mine, strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=15)
@given(SIZES, SEEDS, st.booleans(), SETTINGS, st.booleans())
def test_kernel_steps_like_the_reference(dtype, shape, seed, bits, how, aligned):
    assert_steps(shape, seed, dtype, bits, how, aligned)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("bits", [False, True])
def test_kernel_writes_in_place_and_a_nan_of_what_is_kept_stays_visible(bits):
    arrays = drawn_step((7, 9), 5, "float16")
    arrays[2].flat[[3, 40]] = True
    arrays[1].flat[40] = np.nan
    weight, gradient, mask, mean, square = (torch.from_numpy(x).to(DEVICE) for x in arrays)
    weight, gradient, mean, square = (poisoned(x.float()) for x in (weight, gradient, mean, square))
    mine = poisoned(packed(mask) if bits else mask)
    found = fast.masked_adamw(weight, gradient, mine, mean, square, 4, 0.1, out=(weight, mean, square), block=16)
    assert all(a is b for a, b in zip(found, (weight, mean, square), strict=True))
    arrays[1].flat[40] = 0.0
    expected = oracle("pruning.rewinding").masked_adamw(*arrays, 4, 0.1)
    for result, wanted in zip(found, expected, strict=True):
        values = result.double().cpu().numpy()
        assert np.isnan(values).ravel().nonzero()[0].tolist() == [40]
        np.testing.assert_allclose(np.delete(values, 40), np.delete(wanted, 40), **tolerance(np.float32))


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("bits", [False, True])
def test_kernel_reads_nothing_outside_its_arguments(bits, begins):
    """It comes last, because a kernel that does ends the process."""
    weight, gradient, mask, mean, square = (torch.from_numpy(x).to(DEVICE) for x in drawn_step((41,), 0, "float16"))
    mask = packed(mask) if bits else mask
    operands = [walled(x, begins) for x in (weight.half(), gradient.half(), mask, mean.float(), square.float())]
    fast.masked_adamw(*operands, 2, 0.1, block=32)
