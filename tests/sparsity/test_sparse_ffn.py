"""Sparse feed-forward: each step against a loop over tokens and blocks, published arrays, and the kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.sparsity import sparse_ffn
from tests.conftest import DEVICE, HAS_TRITON, KERNEL_DTYPES, golden, kernel, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.drawn import SEEDS

MASK = pytest.mark.exercise("chapters.sparsity.sparse_ffn.training_mask", points=3)
ACTIVE = pytest.mark.exercise("chapters.sparsity.sparse_ffn.active", points=2)
COMBINE = pytest.mark.exercise("chapters.sparsity.sparse_ffn.combine", points=2)
CHOOSE = pytest.mark.exercise("kernels.sparsity.sparse_ffn.choose", points=3)
ROWS = pytest.mark.exercise("kernels.sparsity.sparse_ffn.combine_kernel", points=3)

fast = kernel("sparsity.sparse_ffn")
TOKENS, BLOCKS = st.sampled_from([1, 2, 5, 7]), st.sampled_from([1, 2, 3, 7, 17])
PLACES, WIDTHS = st.sampled_from([1, 2, 3, 4, 7]), st.sampled_from([1, 3, 8, 17])
DTYPES = st.sampled_from([np.float32, np.float64])
SIZES = st.tuples(TOKENS, BLOCKS, PLACES)


def layer(sizes: tuple[int, int, int], width: int, seed: int) -> dict[str, np.ndarray]:
    """A layer in float64, its input, and a choice; a matrix row of neurons that nobody chose is NaN."""
    (tokens, blocks, n), rng = sizes, np.random.default_rng(seed)
    chosen = rng.integers(0, n, (tokens, blocks))
    unread = np.ones((blocks, n), bool)
    unread[np.arange(blocks), chosen] = False
    up, down = rng.normal(size=(2, blocks * n, width))
    up[unread.ravel()] = down[unread.ravel()] = np.nan
    return {"x": rng.normal(size=(tokens, width)), "up": up, "chosen": chosen, "down": down}


def one_by_one(hidden: np.ndarray, chosen: np.ndarray, down: np.ndarray) -> np.ndarray:
    """`combine` by a loop: what a decode step has to read, and nothing else."""
    n, y = len(down) // chosen.shape[1], np.zeros((len(chosen), down.shape[1]))
    for token, block in np.ndindex(*chosen.shape):
        if hidden[token, block] != 0:
            y[token] += hidden[token, block] * down[block * n + chosen[token, block]]
    return y


# --- training: the mask -------------------------------------------------------------------------------------------


def mask_by_loop(logits: np.ndarray, uniform: np.ndarray, hard: bool, temperature: float) -> np.ndarray:
    mask = np.zeros(logits.shape)
    for token, block in np.ndindex(*logits.shape[:2]):
        row = logits[token, block].astype(np.float64)
        total = row.max() + math.log(sum(math.exp(one - row.max()) for one in row))
        noise = [-math.log(-math.log(one)) for one in uniform[token, block]]
        scores = [one - total + temperature * more for one, more in zip(row, noise, strict=True)]
        if hard:
            mask[token, block, scores.index(max(scores))] = 1
        else:
            mask[token, block] = np.exp(row - total)
    return mask


@MASK
@given(SIZES, st.booleans(), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.01, 1.0, 300.0]), DTYPES, SEEDS)
def test_a_mask_is_a_softmax_or_the_best_after_noise(sizes, hard, temperature, scale, dtype, seed):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=sizes)).astype(dtype)
    uniform = rng.uniform(1e-6, 1 - 1e-6, sizes)
    before = logits.copy(), uniform.copy()
    mask = sparse_ffn.training_mask(logits, uniform, hard, temperature)
    assert mask.shape == sizes and mask.dtype == dtype
    wanted = mask_by_loop(logits, uniform, hard, temperature)
    near = {"rtol": 0} if hard else tolerance(dtype, sizes[2], max(scale, 1))  # zeros and ones, exactly
    np.testing.assert_allclose(mask, wanted, **near)
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(uniform, before[1])


@MASK
def test_exactly_these_are_drawn():
    """Gumbel noise of 5, scaled by 0.1, does not make up for a lead of 1; of 20 it does. 0.1 is the default."""
    logits = np.array([[[1.0, 0.0, 0.0]]])
    noise = np.array([[[0.0, 5.0, -1.0]], [[0.0, 20.0, -1.0]]])
    uniform = np.exp(-np.exp(-noise))
    assert sparse_ffn.training_mask(logits, uniform[:1], True).tolist() == [[[1, 0, 0]]]
    assert sparse_ffn.training_mask(logits, uniform[1:], True).tolist() == [[[0, 1, 0]]]
    assert sparse_ffn.training_mask(logits, uniform[:1], True, 1.0).tolist() == [[[0, 1, 0]]]
    soft = [sparse_ffn.training_mask(logits, one, False) for one in (uniform[:1], uniform[1:])]
    np.testing.assert_array_equal(soft[0], soft[1])
    logits = np.array([[[0.0, -2.5, -9], [0.0, -5, -9], [0.0, -0.5, -9]]])  # noise of 27.6, twice, and of -6.5
    uniform = np.array([[[0.5, 1 - 1e-12, 0.5]] * 2 + [[1e-300, 0.5, 0.5]]])
    assert sparse_ffn.training_mask(logits, uniform, True).argmax(-1).tolist() == [[1, 0, 1]]
    assert sparse_ffn.training_mask(logits[:0], uniform[:0], True).shape == (0, 3, 3)


@MASK
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_take_the_first_and_nothing_overflows(dtype):
    equal = np.full((1, 3, 3), 0.5)
    assert sparse_ffn.training_mask(np.zeros((1, 3, 3), dtype), equal, True).tolist() == [[[1, 0, 0]] * 3]
    large = np.array([[[-3e4, 3e4, 3e4], [-1e30, 0, -1e30], [-3e38, 2e38, 3e38]]], dtype)
    expected = [[[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]]
    np.testing.assert_array_equal(sparse_ffn.training_mask(large, equal, False), expected)
    assert sparse_ffn.training_mask(large, equal, True).argmax(-1).tolist() == [[1, 1, 2]]


UNDRAWABLE = {
    "two axes": {"logits": np.zeros((2, 3)), "uniform": np.full((2, 3), 0.5)},
    "four axes": {"logits": np.zeros((1, 1, 2, 3)), "uniform": np.full((1, 1, 2, 3), 0.5)},
    "other shape": {"uniform": np.full((1, 3, 2), 0.5)},
    "noise for one token": {"logits": np.zeros((2, 2, 3))},
    "NaN": {"logits": np.array([[[0, np.nan, 0], [0, 0, 0]]])},
    "infinite": {"logits": np.array([[[0, np.inf, 0], [0, 0, 0]]])},
    "minus infinity": {"logits": np.array([[[0, -np.inf, 0], [0, 0, 0]]])},
    "uniform NaN": {"uniform": np.full((1, 2, 3), np.nan)},
    "uniform 0": {"uniform": np.zeros((1, 2, 3))},
    "uniform 1": {"uniform": np.ones((1, 2, 3))},
    "negative temperature": {"temperature": -0.1},
    "infinite temperature": {"temperature": math.inf},
    "NaN temperature": {"temperature": math.nan},
}


def undrawable(case: str) -> dict:
    return {"logits": np.zeros((1, 2, 3)), "uniform": np.full((1, 2, 3), 0.5)} | UNDRAWABLE[case]


@MASK
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("case", UNDRAWABLE)
def test_masks_that_cannot_be_drawn_are_refused(case, hard):
    with pytest.raises(ValueError):
        sparse_ffn.training_mask(**undrawable(case), hard=hard)


@MASK
def test_golden_masks_of_trax():
    a = golden("sparse/sparse_ffn")
    logits = np.log(a["train_softmax"].astype(np.float64))  # up to a constant of each block, which no mask sees
    hard = sparse_ffn.training_mask(logits, a["train_u"], True)
    np.testing.assert_array_equal(hard.argmax(-1), a["train_index"])
    soft = sparse_ffn.training_mask(logits, a["train_u"], False)
    np.testing.assert_allclose(soft, a["train_softmax"], **tolerance(np.float32))


# --- the layer ----------------------------------------------------------------------------------------------------


@ACTIVE
@given(SIZES, WIDTHS, DTYPES, st.sampled_from([np.int64, np.int32, np.uint8]), SEEDS)
def test_each_block_has_its_chosen_neuron_and_no_other_is_read(sizes, width, dtype, index, seed):
    a = {name: part.astype(index if name == "chosen" else dtype) for name, part in layer(sizes, width, seed).items()}
    before = {name: part.copy() for name, part in a.items()}
    hidden = sparse_ffn.active(a["x"], a["up"], a["chosen"])
    wanted = np.zeros(sizes[:2])
    for token, block in np.ndindex(*sizes[:2]):
        row = a["up"][block * sizes[2] + int(a["chosen"][token, block])].astype(np.float64)
        wanted[token, block] = max(0.0, row @ a["x"][token].astype(np.float64))
    np.testing.assert_allclose(hidden, wanted, **tolerance(dtype, width, 4))
    assert hidden.dtype == dtype and hidden.shape == sizes[:2]
    for name, part in before.items():
        np.testing.assert_array_equal(a[name], part)


@ACTIVE
def test_exactly_these_neurons():
    """Two blocks of three; a choice of 200 in a byte would overflow if the block's start were added in a byte."""
    up = np.arange(6.0)[:, None] * [[1.0, -1.0]]
    x, chosen = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0, 2], [1, 0]])
    assert sparse_ffn.active(x, up, chosen).tolist() == [[0.0, 5.0], [0.0, 0.0]]
    wide = np.arange(500.0)[:, None]
    assert sparse_ffn.active(np.ones((1, 1)), wide, np.array([[200, 100]], np.uint8)).tolist() == [[200.0, 350.0]]
    for one, other in ((np.float32, np.float64), (np.float64, np.float32)):
        assert sparse_ffn.active(x.astype(one), up.astype(other), chosen).dtype == np.float64
    assert sparse_ffn.active(x[:0], up, chosen[:0]).shape == (0, 2)
    x[1, 1] = up[5, 0] = np.nan  # of one token, and of a neuron that the other chose
    np.testing.assert_array_equal(sparse_ffn.active(x, up, chosen), [[0, np.nan], [np.nan, np.nan]])


@COMBINE
@given(SIZES, WIDTHS, DTYPES, st.sampled_from([np.int64, np.int32, np.uint8]), SEEDS)
def test_a_token_gets_the_weighed_rows_of_its_choice(sizes, width, dtype, index, seed):
    a, rng = layer(sizes, width, seed), np.random.default_rng(seed)
    hidden = (rng.normal(size=sizes[:2]) * (rng.random(sizes[:2]) < 0.6)).astype(dtype)
    down, chosen = a["down"].astype(dtype), a["chosen"].astype(index)
    for row in range(len(down)):  # rows that are chosen with hidden 0 only are not looked at
        block, place = divmod(row, sizes[2])
        if not hidden[chosen[:, block] == place, block].any():
            down[row] = [np.inf, -np.inf, np.nan][row % 3]
    before = hidden.copy(), chosen.copy(), down.copy()
    y = sparse_ffn.combine(hidden, chosen, down)
    np.testing.assert_allclose(y, one_by_one(hidden, chosen.astype(int), down), **tolerance(dtype, sizes[1], 4))
    assert y.dtype == dtype and y.shape == (sizes[0], width)
    for old, part in zip(before, (hidden, chosen, down), strict=True):
        np.testing.assert_array_equal(part, old)


@COMBINE
def test_exactly_this_sum():
    down = np.array([[1.0, 0.0], [np.nan, 0.0], [5.0, 1.0], [7.0, np.nan]])
    y = sparse_ffn.combine(np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([[0, 1], [0, 0]]), down)
    assert y.tolist() == [[2.0, 0.0], [16.0, 3.0]]
    assert np.isnan(sparse_ffn.combine(np.array([[np.nan, 0.0]]), np.array([[0, 0]]), down)).all()
    hidden, chosen = np.array([[1e-30, 0.0]]), np.array([[1, 0]])
    np.testing.assert_array_equal(sparse_ffn.combine(hidden, chosen, down), [[np.nan, 0.0]])
    assert sparse_ffn.combine(hidden, chosen, np.full((4, 1), 1e30)).tolist() == [[1.0]]
    assert sparse_ffn.combine(hidden[:0], chosen[:0], down).shape == (0, 2)
    for one, other in ((np.float32, np.float64), (np.float64, np.float32)):
        assert sparse_ffn.combine(hidden.astype(one), chosen, down.astype(other)).dtype == np.float64


BAD = {
    "blocks do not divide": {"chosen": np.zeros((3, 4), int), "hidden": np.zeros((3, 4))},
    "one axis": {"chosen": np.zeros(3, int), "hidden": np.zeros(3)},
    "no such neuron": {"chosen": np.full((3, 2), 3)},
    "negative": {"chosen": np.full((3, 2), -1)},
    "other tokens": {"chosen": np.zeros((2, 2), int)},
    "one token": {"x": np.zeros((1, 5)), "hidden": np.zeros((1, 2))},
    "one channel": {"x": np.zeros((3, 1)), "hidden": np.zeros((3, 1))},
}


def bad(case: str) -> dict:
    good = {"x": np.zeros((3, 5)), "hidden": np.zeros((3, 2)), "chosen": np.zeros((3, 2), int)}
    return good | BAD[case]


@ACTIVE
@pytest.mark.parametrize("case", BAD)
def test_choices_that_do_not_fit_are_refused(case):
    given_ = bad(case)
    with pytest.raises(ValueError):
        sparse_ffn.active(given_["x"], np.zeros((6, 5)), given_["chosen"])
    for x in (np.zeros((3, 4)), np.zeros(3)):
        with pytest.raises(ValueError):
            sparse_ffn.active(x, np.zeros((6, 5)), np.zeros((3, 2), int))


@COMBINE
@pytest.mark.parametrize("case", BAD)
def test_sums_that_do_not_fit_are_refused(case):
    given_ = bad(case)
    with pytest.raises(ValueError):
        sparse_ffn.combine(given_["hidden"], given_["chosen"], np.zeros((6, 5)))
    with pytest.raises(ValueError):
        sparse_ffn.combine(np.zeros((3, 2)), np.zeros((3, 2), int), np.zeros(6))


# --- the kernel ---------------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl

    choose = fast.choose

    @triton.jit
    def choose_kernel(
        low, second, bias, out, blocks, N, R, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        live = block < blocks
        tl.store(out + block, choose(low, second, bias, block, live, N, R, WIDTH, RANK), mask=live)


def power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def chosen_by_kernel(low: torch.Tensor, second: torch.Tensor, bias: torch.Tensor, wrap=poisoned) -> list[int]:
    """The kernel's choice for one token, two blocks a program."""
    blocks, n = bias.shape
    out = torch.full((blocks,), -1, dtype=torch.int32, device=DEVICE)
    given_ = [wrap(part.to(DEVICE)) for part in (low, second, bias)]
    sizes = {"BLOCKS": 2, "WIDTH": power(n), "RANK": power(len(low))}
    choose_kernel[((blocks + 1) // 2,)](*given_, out, blocks, n, len(low), **sizes)
    return out.tolist()


@CHOOSE
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=15)
@given(BLOCKS, PLACES, st.sampled_from([1, 3, 8]), st.sampled_from([-40.0, 0.0]), SEEDS)
def test_kernel_chooses_the_first_of_the_largest(dtype, blocks, n, rank, lift, seed):
    """Small whole numbers: sums are exact, ties common; all logits may be negative."""
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.integers(-2, 3, rank)).float()
    second = torch.from_numpy(rng.integers(-2, 3, (blocks * n, rank))).to(dtype)
    bias = torch.from_numpy(rng.integers(-2, 3, (blocks, n)) + lift).to(dtype)
    logits = (second.float() @ low).view(blocks, n) + bias.float()
    wanted = [row.index(max(row)) for row in logits.tolist()]
    assert chosen_by_kernel(low, second, bias) == wanted


@CHOOSE
@pytest.mark.kernel
def test_kernel_chooses_in_float32_and_reads_nothing_outside():
    """The second logit leads by 2^-12, which float16 would round away; the last has no bias to speak of."""
    low, second = torch.tensor([1 + 2.0**-12]), torch.tensor([[0.0], [1.0], [0.0]]).half()
    bias = torch.tensor([[1.0, 0.0, -math.inf]]).half()
    assert chosen_by_kernel(low, second, torch.full((1, 3), -math.inf)) == [0]
    for begins in (False, True):
        assert chosen_by_kernel(low, second, bias, lambda part, first=begins: walled(part, first)) == [1]


@ROWS
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=12)
@given(SIZES, WIDTHS, st.booleans(), SEEDS)
def test_kernel_combines_like_the_reference(dtype, sizes, width, aligned, seed):
    a, rng = layer(sizes, width, seed), np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=sizes[:2]) * (rng.random(sizes[:2]) < 0.6)).float()
    down, chosen = torch.from_numpy(a["down"]).to(dtype), torch.from_numpy(a["chosen"])
    idle = torch.ones(sizes[1], sizes[2], dtype=torch.bool)
    for token, block in np.ndindex(*sizes[:2]):
        idle[block, chosen[token, block]] &= bool(hidden[token, block] == 0)
    down[idle.flatten()] = math.nan
    there = [poisoned(part.to(DEVICE), aligned) for part in (hidden, chosen, down)]
    found = fast.combine(*there, rows=16, columns=16)
    wanted = one_by_one(hidden.double().numpy(), a["chosen"], down.double().numpy())
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().cpu(), wanted, **tolerance(dtype, sizes[1], 4))


@ROWS
@pytest.mark.kernel
def test_kernel_rounds_once():
    """2049 + ½ + ½ is 2048 in float16 if each number or sum is rounded, else 2050; 33 is one past a tile."""
    hidden, chosen = torch.zeros(1, 33), torch.zeros(1, 33, dtype=torch.int64)
    hidden[0, 0], hidden[0, 17], hidden[0, 32] = 2049, 0.5, 0.5
    there = [part.to(DEVICE) for part in (hidden, chosen, torch.ones(66, 3).half())]
    assert fast.combine(*there, rows=16, columns=16).tolist() == [[2050.0] * 3]
    there = torch.full((1, 1), 2.0**-70), chosen[:, :1].contiguous(), torch.full((2, 1), 2.0**70)
    assert fast.combine(*(part.to(DEVICE) for part in there)).tolist() == [[1.0]]


@ROWS
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_combines_only_what_it_is_given(begins):
    a = layer((3, 5, 3), 21, 1)
    parts = torch.rand(3, 5), torch.from_numpy(a["chosen"]), torch.from_numpy(np.nan_to_num(a["down"])).float()
    fast.combine(*(walled(part.to(DEVICE), begins) for part in parts), rows=16, columns=16)
