"""Top-KAST: exact sets, penalty, update and refresh against loops, torch and published code; the kernel's search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.sparsity import top_kast
from tests.conftest import DEVICE, HAS_TRITON, golden, kernel, tolerance
from tests.sparsity.drawn import CONTENTS, SEEDS, contents, first_largest

SETS = pytest.mark.exercise("chapters.sparsity.top_kast.choose_sets", points=2)
PENALTY = pytest.mark.exercise("chapters.sparsity.top_kast.exploration_penalty", points=1)
UPDATE = pytest.mark.exercise("chapters.sparsity.top_kast.sparse_update", points=2)
REFRESH = pytest.mark.exercise("chapters.sparsity.top_kast.refresh", points=3)
SEARCH = pytest.mark.exercise("kernels.sparsity.top_kast.two_thresholds", points=3)

fast = kernel("sparsity.top_kast")
KINDS = st.sampled_from(CONTENTS)
SIZES = st.sampled_from([1, 2, 7, 16, 17])
DTYPES = st.sampled_from([np.float32, np.float64])
FEW = settings(max_examples=12)


def by_rank(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    """The two sets by their definition."""
    member = np.zeros(weight.size, dtype=np.uint8)
    for count in (forward, backward):
        member[first_largest(np.abs(weight.astype(np.float64)).ravel(), count)] += 1
    return member.reshape(weight.shape)


# --- which weights --------------------------------------------------------------------------------------------------


@SETS
@given(KINDS, SIZES, SIZES, SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_each_set_has_exactly_its_count_of_the_largest(kind, rows, columns, seed, first, second):
    weight = contents(kind, (rows, columns), seed)
    forward, backward = sorted(1 + round(share * (weight.size - 1)) for share in (first, second))
    mine = weight.copy()
    member = top_kast.choose_sets(mine, forward, backward)
    assert member.dtype == np.uint8 and member.shape == weight.shape and mine.tobytes() == weight.tobytes()
    assert ((member == 2).sum(), (member > 0).sum()) == (forward, backward)
    np.testing.assert_array_equal(member, by_rank(weight, forward, backward))


@SETS
@pytest.mark.parametrize(
    ("weight", "forward", "backward", "expected"),
    [
        (np.array([1.0, -1, 1, -1]), 1, 3, [2, 1, 1, 0]),
        (np.array([0.0, -0.0, 0.0]), 2, 2, [2, 2, 0]),
        (np.array([127, -128, 3], np.int8), 1, 2, [1, 2, 0]),
        (np.array([1.0, -1 - 2**-52, 1.0]), 1, 2, [1, 2, 0]),
        (np.array([0.0, 5e-324]), 1, 1, [0, 2]),
        (np.array([[1.0, 2, 3], [3, 1, 2]]).T, 1, 3, [[0, 2], [1, 0], [1, 0]]),
        (np.array([3.0]), 1, 1, [2]),
    ],
)
def test_of_equals_the_first_in_both_sets(weight, forward, backward, expected):
    np.testing.assert_array_equal(top_kast.choose_sets(weight, forward, backward), expected)


@SETS
def test_of_thousands_of_equals_the_first():
    member = top_kast.choose_sets(np.resize([0.5, -0.5], (60, 70)), 1001, 3002)
    np.testing.assert_array_equal(member.ravel(), np.repeat([2, 1, 0], [1001, 2001, 1198]))


@SETS
def test_golden_published_sets():
    """A threshold at the quantile leaves these counts, where no magnitudes are equal."""
    arrays = golden("sparse/top_kast")
    member = top_kast.choose_sets(arrays["topkast_W"], 40, 100)
    np.testing.assert_array_equal(member == 2, arrays["topkast_A_mask_sparsity0.8"])
    np.testing.assert_array_equal(member > 0, arrays["topkast_B_mask_sparsity0.5"])


@SETS
@pytest.mark.parametrize(
    ("weight", "forward", "backward"),
    [
        (np.ones(4), 0, 2),
        (np.ones(4), 3, 2),
        (np.ones(4), 2, 5),
        (np.ones(0), 1, 1),
        (np.array([1.0, np.nan]), 1, 2),
        (np.array([1.0, np.inf]), 1, 2),
    ],
)
def test_sets_that_cannot_be_are_refused(weight, forward, backward):
    with pytest.raises(ValueError):
        top_kast.choose_sets(weight, forward, backward)


# --- penalty and update ---------------------------------------------------------------------------------------------


def drawn(size: int, seed: int, dtype: type = np.float64) -> list[np.ndarray]:
    """values, gradient, active, mean, square, each `[size]`."""
    generator = np.random.default_rng(seed)
    values, gradient, mean, square = generator.normal(size=(4, size)).astype(dtype)
    return [values, gradient, generator.random(size) < 0.5, mean, square**2]


@PENALTY
@given(st.just(0) | SIZES, SEEDS, st.sampled_from([1.0, 0.5, 0.1, 1e-3]))
def test_penalty_and_its_gradient_are_those_of_the_formula(size, seed, density):
    values, _, active, *_ = drawn(size, seed)
    expected = sum(0.5 * v * v if a else 0.5 * v * v / density for v, a in zip(values, active, strict=True))
    found, gradient = top_kast.exploration_penalty(values, active, density)
    np.testing.assert_allclose(found, expected, **tolerance(np.float64, size, 1 / density))
    weights = torch.from_numpy(values).requires_grad_()
    inside = torch.from_numpy(active)
    (0.5 * weights[inside].square().sum() + 0.5 * weights[~inside].square().sum() / density).backward()
    np.testing.assert_allclose(gradient, weights.grad.numpy(), **tolerance(np.float64))
    assert gradient.dtype == np.float64


@PENALTY
def test_the_penalty_is_computed_in_float64():
    values = np.full(100, 60000, np.float16)
    found, gradient = top_kast.exploration_penalty(values, np.arange(100) < 50, 0.25)
    scaled = float(values[0])
    assert found == 0.5 * scaled**2 * (50 + 50 * 4) and gradient[-1] == 4 * scaled
    assert values.dtype == np.float16 and (values == values[0]).all()


@PENALTY
def test_golden_port_penalty():
    """The port takes roots, ‖A‖ + ‖B∖A‖ / D: the same sums, each from a half of ours."""
    arrays = golden("sparse/top_kast")
    inside, within = (arrays[f"topkast_{key}"].astype(bool) for key in ("A_mask_sparsity0.8", "B_mask_sparsity0.5"))
    values = arrays["topkast_W"][within].astype(np.float64)
    active = inside[within]
    first, _ = top_kast.exploration_penalty(values[active], active[active], 0.2)
    second, _ = top_kast.exploration_penalty(values[~active], active[~active], 0.2)
    port = np.sqrt(2 * first) + np.sqrt(2 * second * 0.2) / 0.2
    np.testing.assert_allclose(port, arrays["topkast_port_penalty_unsquared_l2_1_over_density"], rtol=1e-6)


@PENALTY
@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, np.nan])
def test_penalty_refuses_densities(density):
    with pytest.raises(ValueError):
        top_kast.exploration_penalty(np.ones(3), np.ones(3, bool), density)


@PENALTY
@pytest.mark.parametrize("values", [np.ones(2), np.ones((3, 1)), np.array([1, np.nan, 1]), np.array([1, np.inf, 1])])
def test_penalty_refuses_values(values):
    with pytest.raises(ValueError):
        top_kast.exploration_penalty(values, np.ones(3, bool), 0.5)


@UPDATE
@settings(max_examples=8)
@given(SIZES, SEEDS, st.integers(1, 5))
def test_where_all_weights_are_in_a_it_is_adamw(size, seed, steps):
    values = drawn(size, seed)[0]
    mine, mean, square = values, np.zeros(size), np.zeros(size)
    theirs = torch.from_numpy(values.copy()).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    for step in range(1, steps + 1):
        gradient = np.random.default_rng((seed, step)).normal(size=size)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        mine, mean, square = top_kast.sparse_update(
            mine, gradient, np.ones(size, bool), mean, square, step, 0.01, 0.3, 0.1
        )
    np.testing.assert_allclose(mine, theirs.detach().numpy(), **tolerance(np.float64, steps))


@UPDATE
@given(st.just(0) | SIZES, SEEDS, st.integers(1, 1000), st.sampled_from([1.0, 0.25, 0.01]))
def test_outside_a_only_the_decay_differs_by_the_density(size, seed, step, density):
    values, gradient, active, mean, square = arrays = drawn(size, seed)
    mean[::2] = square[::2] = 0  # new in B, long after the run's first step
    copies = [array.copy() for array in arrays]
    scalars = step, 0.02, 0.1, density
    found = top_kast.sparse_update(*arrays, *scalars)
    plain = top_kast.sparse_update(values, gradient, np.ones(size, bool), mean, square, *scalars)
    size = np.sqrt(found[2] / (1 - 0.95**step)) + 1e-8
    expected = values - 0.02 * (found[1] / (1 - 0.9**step) / size + 0.1 * values)
    np.testing.assert_allclose(plain[0], expected, **tolerance(np.float64))
    extra = np.where(active, 0, 0.02 * 0.1 * (1 / density - 1) * values)
    np.testing.assert_allclose(found[0], plain[0] - extra, **tolerance(np.float64))
    for mine, theirs in zip(found[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(found[1], 0.9 * mean + 0.1 * gradient, **tolerance(np.float64))
    np.testing.assert_allclose(found[2], 0.95 * square + 0.05 * gradient**2, **tolerance(np.float64))
    assert all(mine.tobytes() == copy.tobytes() for mine, copy in zip(arrays, copies, strict=True))


@UPDATE
def test_the_update_is_computed_in_float64():
    arrays = drawn(50, 3, np.float32)
    wide = [array if array.dtype == bool else array.astype(np.float64) for array in arrays]
    for mine, theirs in zip(
        top_kast.sparse_update(*arrays, 7, 0.1, 0.1, 0.5), top_kast.sparse_update(*wide, 7, 0.1, 0.1, 0.5), strict=True
    ):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@UPDATE
def test_golden_sparseml_decay():
    """Without a gradient all that is left of the update is the decay."""
    arrays = golden("sparse/top_kast")
    inside, within = (arrays[f"topkast_{key}"].astype(bool) for key in ("A_mask_sparsity0.8", "B_mask_sparsity0.5"))
    zeros = np.zeros(within.sum())
    values, mean, square = top_kast.sparse_update(
        arrays["topkast_W"][within], zeros, inside[within], zeros, zeros, 1, 0.3, 0.01, 0.2
    )
    expected = arrays["sparseml_topkast_decayed_W_wd1e-2_lr0.3"]
    np.testing.assert_allclose(values, expected[within], **tolerance(np.float32))
    np.testing.assert_array_equal(arrays["topkast_W"][~within], expected[~within])
    assert not mean.any() and not square.any()


@UPDATE
@pytest.mark.parametrize(("step", "density"), [(0, 0.5), (-1, 0.5), (1, 0.0), (1, 1.5), (1, np.nan)])
def test_update_refuses_scalars(step, density):
    with pytest.raises(ValueError):
        top_kast.sparse_update(*drawn(3, 0), step, 0.1, 0.1, density)


@UPDATE
@pytest.mark.parametrize("which", range(5))
def test_update_refuses_shapes(which):
    arrays = drawn(3, 0)
    arrays[which] = arrays[which][:1]
    with pytest.raises(ValueError):
        top_kast.sparse_update(*arrays, 1, 0.1, 0.1, 0.5)


# --- refresh --------------------------------------------------------------------------------------------------------


@REFRESH
@given(KINDS, SIZES, SIZES, SEEDS, st.floats(0, 1), st.integers(0, 3), DTYPES, DTYPES, st.sampled_from("CF"))
def test_refresh_writes_back_chooses_and_carries_what_stays(
    kind, rows, columns, seed, share, kept, dtype, other, order
):
    generator = np.random.default_rng(seed)
    theta = contents(kind, (rows, columns), seed).astype(dtype, order=order)
    index = np.sort(generator.permutation(theta.size)[: round(share * theta.size)])
    values = (generator.normal(size=index.size) * (generator.random(index.size) < 0.7)).astype(dtype)
    moments = generator.normal(size=(kept, index.size)).astype(other)
    member = generator.integers(0, 3, theta.shape).astype(np.uint8)
    given_arrays = theta, index, values, moments
    copies, seen = [array.copy() for array in given_arrays], []

    def choose(weights: np.ndarray) -> np.ndarray:
        seen.append(weights.copy())
        return member

    found, chosen, taken, active, carried = top_kast.refresh(*given_arrays, choose)
    expected = dict(enumerate(theta.ravel().tolist())) | dict(zip(index.tolist(), values.tolist(), strict=True))
    assert found.ravel().tolist() == list(expected.values()) == seen[0].ravel().tolist()
    assert seen[0].shape == found.shape == theta.shape and len(seen) == 1
    assert chosen.tolist() == [place for place in range(theta.size) if member.flat[place]]
    assert taken.tolist() == [expected[place] for place in chosen.tolist()]
    assert active.dtype == bool and active.tolist() == [member.flat[place] == 2 for place in chosen.tolist()]
    held = {place: moments[:, column].tolist() for column, place in enumerate(index.tolist())}
    assert carried.shape == (kept, chosen.size) and carried.dtype == other
    assert taken.dtype == found.dtype == dtype and chosen.dtype == np.int64
    assert carried.T.tolist() == [held.get(place, [0.0] * kept) for place in chosen.tolist()]
    assert all(array.tobytes() == copy.tobytes() for array, copy in zip(given_arrays, copies, strict=True))


@REFRESH
@pytest.mark.parametrize(
    ("index", "values", "moments"),
    [
        ([0, 1], [1.0], [[1.0, 2.0]]),
        ([0, 1], [1.0, 2.0], [[1.0]]),
        ([1, 0], [1.0, 2.0], [[1.0, 2.0]]),
        ([1, 1], [1.0, 2.0], [[1.0, 2.0]]),
        ([-1, 0], [1.0, 2.0], [[1.0, 2.0]]),
        ([0, 6], [1.0, 2.0], [[1.0, 2.0]]),
    ],
)
def test_refresh_refuses_what_does_not_fit(index, values, moments):
    with pytest.raises(ValueError):
        top_kast.refresh(np.ones((2, 3)), np.array(index), np.array(values), np.array(moments), np.ones_like)


# --- the kernel's search --------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def thresholds_of_rows(key, out, forward, backward, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.arange(0, ROWS)
        tile = tl.load(key + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        high, low = fast.two_thresholds(tile, forward, backward, BITS)
        tl.store(out + row, high)
        tl.store(out + ROWS + row, low)


def thresholds(key: np.ndarray, forward: int, backward: int, bits: int) -> list[list[int]]:
    """What `two_thresholds` makes of keys int32 [R, C], powers of two."""
    out = torch.empty(2, len(key), dtype=torch.int32, device=DEVICE)
    sizes = {"BITS": bits, "ROWS": len(key), "COLUMNS": key.shape[1]}
    thresholds_of_rows[(1,)](torch.from_numpy(key).to(DEVICE), out, forward, backward, **sizes)
    return out.tolist()


def keys(kind: str, rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    """Keys int32 [rows, columns] of one kind, some columns at the end missing (-1)."""
    generator = np.random.default_rng(seed)
    high = {"any": 1 << bits, "few": 3, "equal": 1}[kind]
    drawn = generator.integers(0, high, (rows, columns)) + (0 if kind == "any" else (1 << (bits - 1)) - 1)
    drawn[:, columns - seed % max(1, columns // 2) :] = -1 if seed % max(1, columns // 2) else drawn[:, columns:]
    return drawn.astype(np.int32)


@SEARCH
@pytest.mark.kernel
@pytest.mark.parametrize("bits", [15, 31])
@FEW
@given(st.sampled_from(["any", "few", "equal"]), st.sampled_from([1, 2, 8]), st.sampled_from([2, 16, 64]), SEEDS)
def test_kernel_finds_both_thresholds_of_each_row(bits, kind, rows, columns, seed):
    key = keys(kind, rows, columns, bits, seed)
    present = int((key[0] >= 0).sum())
    forward, backward = sorted(np.random.default_rng(seed).integers(1, present + 1, 2).tolist())
    expected = [[sorted(row)[-count] for row in key.tolist()] for count in (forward, backward)]
    assert thresholds(key, forward, backward, bits) == expected


@SEARCH
@pytest.mark.kernel
@pytest.mark.parametrize("bits", [15, 31])
def test_kernel_finds_zero_where_too_few_keys_are_asked(bits):
    top = 2**bits - 1
    key = np.array([[5, top, -1, -1], [9, 9, 4, -1]], dtype=np.int32)
    assert thresholds(key, 2, 3, bits) == [[5, 9], [0, 4]]
    assert thresholds(key, 1, 4, bits) == [[top, 9], [0, 0]]
    many = np.arange(4096, dtype=np.int32)[None]  # float16 cannot count 2049
    assert thresholds(many, 2049, 4095, bits) == [[2047], [1]]
