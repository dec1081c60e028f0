"""Wanda: norms, scores and the variant against loops, the order of pruning, the choice in a group."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chapters.pruning import wanda
from chapters.shared.pruned_layers import dropped
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, HAS_TRITON, kernel, oracle, tolerance
from tests.pruning.launched import keys
from tests.sparsity.drawn import CONTENTS, SEEDS, contents, first_largest

NORMS = pytest.mark.exercise("chapters.pruning.wanda.input_norms", points=2)
SCORES = pytest.mark.exercise("chapters.pruning.wanda.scores", points=1)
VARIANT = pytest.mark.exercise("chapters.pruning.wanda.variant_mask", points=3)
MODEL = pytest.mark.exercise("chapters.pruning.wanda.prune_model", points=2)
STAYS = pytest.mark.exercise("kernels.pruning.wanda.group_stays", points=3)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in (NORMS, SCORES, VARIANT)}

fast = kernel("pruning.wanda")
SIZES = st.sampled_from([1, 2, 7, 16, 17])
KINDS = st.sampled_from(CONTENTS)
ONES, NAN = np.ones((2, 3)), float("nan")

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def choose_in_groups(key, out, n, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out + offsets, fast.group_stays(tl.load(key + offsets), n, M).to(tl.int8))


# --- norms and scores -----------------------------------------------------------------------------------------------


def norms_by_loop(samples: list[np.ndarray]) -> list[float]:
    squares = [[sum(float(value) ** 2 for value in channel) for channel in sample.T] for sample in samples]
    return [(sum(channel) / len(samples)) ** 0.5 for channel in zip(*squares, strict=True)]


@NORMS
@given(KINDS, st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=4), SEEDS, st.booleans())
def test_norms_are_sums_over_tokens_and_means_over_samples(kind, channels, lengths, seed, half):
    samples = [contents(kind, (length, channels), seed + i) for i, length in enumerate(lengths)]
    given_ = [sample.astype(np.float16) if half else sample for sample in samples]
    before = [sample.copy() for sample in given_]
    np.testing.assert_allclose(wanda.input_norms(given_), norms_by_loop(samples), **tolerance(np.float64))
    assert [sample.tobytes() for sample in given_] == [sample.tobytes() for sample in before]


@NORMS
@given(SEEDS, st.permutations([1, 2, 3]))
def test_how_samples_are_put_into_batches_changes_nothing(seed, sizes):
    x = np.random.default_rng(seed).normal(size=(6, 4, 3)).astype(np.float32)
    split = np.split(x, np.cumsum(sizes)[:-1])
    batches = (batch if len(batch) > 1 else batch[0] for batch in split)  # a generator: read once
    np.testing.assert_allclose(wanda.input_norms(batches), norms_by_loop(list(x)), **tolerance(np.float64))


@NORMS
def test_norms_are_float64_and_large_halves_do_not_overflow():
    found = wanda.input_norms([np.full((2, 5, 1), 60000, np.float16)])
    assert found.dtype == np.float64 and found.tolist() == [pytest.approx(60000 * 5**0.5, rel=1e-3)]


@SCORES
@given(KINDS, SIZES, SIZES, SEEDS, *[st.sampled_from([np.float16, np.float32, np.float64])] * 2)
def test_a_score_is_a_weights_size_times_its_inputs_norm(kind, rows, columns, seed, dtype, other):
    weight = contents(kind, (rows, columns), seed).astype(dtype)
    norms = np.random.default_rng(seed).exponential(size=columns).astype(other)
    mine = weight.copy(), norms.copy()
    found = wanda.scores(*mine)
    wide = np.float64 if np.float64 in (dtype, other) else np.float32
    expected = [[wide(abs(wide(w))) * wide(norm) for w, norm in zip(row, norms, strict=True)] for row in weight]
    assert found.dtype == wide
    np.testing.assert_array_equal(found, np.array(expected, wide))
    assert mine[0].tobytes() == weight.tobytes() and mine[1].tobytes() == norms.tobytes()


@SCORES
def test_the_least_int8_counts_and_an_input_that_is_never_there_does_not():
    weight = np.array([[-128, 127, 9]], np.int8)
    for dtype in (np.float32, np.float64):
        found = wanda.scores(weight, np.array([1.0, 1.0, 0.0], dtype))
        assert found.dtype == dtype and found.tolist() == [[128, 127, 0]]


@given(KINDS, SIZES, SIZES, SEEDS, st.floats(0, 0.999))
def test_exactly_its_share_of_each_row_goes_and_of_equals_the_last(kind, rows, columns, seed, sparsity):
    """By the formula of the release, torch's stable sort, with this book's count and its order of equals."""
    weight = contents(kind, (rows, columns), seed)
    norms = contents("ties", (1, columns), seed + 1)[0].clip(0)
    kept = columns - dropped(columns, sparsity)
    score = torch.from_numpy(weight).abs() * torch.from_numpy(norms)
    order = score.sort(dim=1, stable=True, descending=True).indices[:, :kept]
    expected = torch.zeros(score.shape, dtype=torch.bool).scatter(1, order, True).numpy()
    found = wanda.prune_rows(weight, norms, kept)
    np.testing.assert_array_equal(found, np.where(expected, weight, 0))
    mask = wanda.find_mask(torch.from_numpy(weight), torch.from_numpy(norms), sparsity)
    np.testing.assert_array_equal(mask.numpy(), expected)


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 4), (3, 8)]), KINDS, st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_the_highest_scores_of_a_group_stay(pattern, kind, rows, groups, seed):
    n, m = pattern
    weight = contents(kind, (rows, groups * m), seed)
    norms = np.random.default_rng(seed).integers(0, 3, groups * m).astype(float)
    found = wanda.prune_groups(weight, norms, n, m)
    mask = wanda.find_mask(torch.from_numpy(weight), torch.from_numpy(norms), 0.9, pattern).numpy()
    np.testing.assert_array_equal(found, np.where(mask, weight, 0))
    score = (np.abs(weight) * norms).reshape(-1, m)
    assert [group.nonzero()[0].tolist() for group in mask.reshape(-1, m)] == [first_largest(s, n) for s in score]


@given(SEEDS, st.integers(-20, 20))
def test_what_a_gain_and_the_weights_after_it_trade_changes_no_mask(seed, exponent):
    """Nor does a factor on a row or on all inputs. Powers of two: exact."""
    generator = np.random.default_rng(seed)
    weight, norms = generator.normal(size=(5, 16)), generator.exponential(size=16)
    traded, row = 2.0 ** generator.integers(-9, 9, 16), 2.0 ** generator.integers(-9, 9, (5, 1))
    for shape in (None, (2, 4)):
        masks = [
            wanda.find_mask(torch.from_numpy(w), torch.from_numpy(x), 0.5, shape)
            for w, x in [(weight, norms), (weight / traded, norms * traded), (weight * row, norms * 2.0**exponent)]
        ]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


# --- the variant ------------------------------------------------------------------------------------------------------


def variant_by_loop(score: np.ndarray, sparsity: float) -> np.ndarray:
    """As the release does it, a row and a weight at a time."""

    def kept(alpha: float) -> np.ndarray:
        mask = np.ones(score.shape, bool)
        for row, numbers in enumerate(score.tolist()):
            total, limit, cut = 0.0, alpha * sum(numbers), -1.0
            for number in sorted(numbers):
                total += number
                if total > limit:
                    break
                cut = number
            mask[row] = [number > cut for number in numbers]
        return mask

    ends, alpha = [0.0, 0.8], 0.4
    while True:
        zeros = 1 - kept(alpha).mean()
        if abs(zeros - sparsity) <= 0.001 or ends[1] - ends[0] < 0.001:
            return kept(alpha)
        ends[int(zeros > sparsity)] = alpha
        alpha = sum(ends) / 2


@VARIANT
@given(KINDS, st.integers(1, 9), st.integers(1, 40), SEEDS, st.floats(0, 0.95))
def test_rows_give_up_the_same_share_of_their_score(kind, rows, columns, seed, sparsity):
    score = np.abs(contents(kind, (rows, columns), seed))
    mine = score.copy()
    mask = wanda.variant_mask(mine, sparsity)
    assert mask.dtype == bool and mine.tobytes() == score.tobytes()
    np.testing.assert_array_equal(mask, variant_by_loop(score, sparsity))


@VARIANT
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_rows_of_another_shape_lose_another_count_and_all_together_nearly_the_share(sparsity):
    generator = np.random.default_rng(0)
    score = np.abs(generator.normal(size=(40, 200))) ** generator.choice([0.5, 3.0], size=(40, 1))
    mask = wanda.variant_mask(score, sparsity)
    assert abs((~mask).mean() - sparsity) <= 0.001
    assert np.ptp((~mask).sum(axis=1)) > 20
    np.testing.assert_array_equal(mask, variant_by_loop(score, sparsity))
    for row in range(0, 40, 7):  # a row's scale does not matter
        score[row] *= 1024
    np.testing.assert_array_equal(wanda.variant_mask(score, sparsity), mask)


@VARIANT
def test_rows_of_zeros_lose_all_and_a_row_of_one_weight_loses_none():
    found = wanda.variant_mask(np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]), 0.5)
    assert found.tolist() == [[False] * 4, [False, False, False, True]]
    assert wanda.variant_mask(np.array([[3.0]]), 0.5).tolist() == [[True]]


@VARIANT
def test_a_share_that_is_0_001_away_is_near_enough():
    """At 0.4 none goes; a search that went on would end where one does."""
    assert wanda.variant_mask(np.array([[0.43, 0.57]]), 0.001).all()


# --- the order of pruning ---------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    config = Config(vocab_size=50, dim=16, hidden_dim=24, layers=3, heads=2, context=16)
    return Transformer(config).eval()


TOKENS = torch.randint(50, (11, 12), generator=torch.Generator().manual_seed(1))


def reaching(model: Transformer, block: int) -> dict[str, Tensor]:
    """Norms of what reaches each layer of a block, by hooks, all text at once."""
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = (args[0].detach().double() ** 2).sum((0, 1)).div(len(TOKENS)).sqrt()

        return hook

    layers = {name: layer for name, layer in surgery.linears(model).items() if name.startswith(f"blocks.{block}.")}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return found


@MODEL
def test_a_block_sees_pruned_blocks_before_it_and_itself_dense(model):
    dense, seen = copy.deepcopy(model), []

    def every_other(weight: Tensor, norms: Tensor) -> Tensor:
        seen.append((weight.clone(), norms.clone()))
        return (torch.arange(weight.numel()) % (2 + len(seen) % 2) > 0).view(weight.shape)

    masks = wanda.prune_model(model, TOKENS, every_other)
    names = list(surgery.linears(model))
    assert list(masks) == names and len(seen) == len(names)
    for block in range(3):
        norms = reaching(dense, block)  # `dense` is pruned so far, this block not yet
        for name in norms:
            weight, found = seen[names.index(name)]
            assert found.dtype == torch.float64 and torch.equal(weight, dense.get_submodule(name).weight)
            torch.testing.assert_close(found, norms[name], **tolerance(torch.float32))
        for name in norms:
            place = names.index(name) + 1
            weight = dense.get_submodule(name).weight
            mask = (torch.arange(weight.numel()) % (2 + place % 2) > 0).view(weight.shape)
            assert torch.equal(masks[name], mask)
            weight.data[~mask] = 0
            assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)


@MODEL
def test_what_is_not_finite_is_refused_before_its_block_is_changed(model):
    last = model.blocks[1].feed_forward.down_proj.weight
    last.data[0, 0] = NAN
    before = {name: layer.weight.clone() for name, layer in surgery.linears(model).items()}
    with pytest.raises(ValueError):
        wanda.prune_model(model, TOKENS, lambda weight, norms: torch.zeros(weight.shape, dtype=torch.bool))
    for name, weight in before.items():
        if name.startswith("blocks.1.") and name != "blocks.1.feed_forward.down_proj":
            assert torch.equal(model.get_submodule(name).weight, weight)


@MODEL
def test_text_that_reaches_a_layer_as_nan_or_infinity_is_refused(model):
    for value in (NAN, float("inf")):
        model.embedding.weight.data[TOKENS[3, 2]] = value
        with pytest.raises(ValueError):
            wanda.prune_model(model, TOKENS, lambda weight, norms: torch.ones(weight.shape, dtype=torch.bool))


# --- bad input: its type is graded, its words are not ----------------------------------------------------------------

REFUSED: dict[str, dict[str, tuple]] = {
    "input_norms": {
        "at least one token, got 0": ([],),
        "got 0 tokens": ([np.ones((2, 0, 3))],),
        "finite": ([ONES, np.array([[1.0, NAN, 2.0]])],),
        "batches must hold finite": ([np.array([[1.0, -np.inf, 2.0]]), ONES],),
    },
    "scores": {
        r"got \(2, 3\) and \(2,\)": (ONES, np.ones(2)),
        r"and \(1,\)": (ONES, np.ones(1)),
        r"and \(1, 3\)": (ONES, np.ones((1, 3))),
        r"got \(3,\)": (ONES[0], np.ones(3)),
        r"got \(2, 2, 3\)": (np.ones((2, 2, 3)), np.ones((2, 3))),
        "not empty": (np.ones((0, 3)), np.ones(3)),
        "weight must be finite": (ONES * NAN, np.ones(3)),
        "norms must be finite": (ONES, np.array([1.0, NAN, 1.0])),
        "norms must be": (ONES, np.array([1.0, np.inf, 1.0])),
        "not negative": (ONES, np.array([1.0, -1.0, 1.0])),
        "exceeds what float32": (np.full((1, 1), 1e38, np.float32), np.full(1, 100, np.float32)),
    },
    "variant_mask": {r"\[0, 1\), got 1.0": (ONES, 1.0), "got nan": (ONES, NAN), "got -0.5": (ONES, -0.5)},
}


@pytest.mark.parametrize(
    ("function", "case"),
    [pytest.param(name, case, marks=MARKS[name]) for name, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused(function, case):
    with pytest.raises(ValueError):
        getattr(wanda, function)(*REFUSED[function][case])


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("pruning.wanda"), function)(*REFUSED[function][words])


# --- the device function of the kernel --------------------------------------------------------------------------------


@STAYS
@pytest.mark.kernel
@pytest.mark.parametrize("m", [2, 4, 8])
@settings(max_examples=8)
@given(st.sampled_from(("any", "few", "neighbours", "equal")), st.sampled_from([1, 2]), st.integers(1, 8), SEEDS)
def test_kernel_keeps_the_largest_of_a_group_and_of_equals_the_first(m, kind, rows, n, seed):
    key = keys(kind, rows, 16, 31, seed)
    n = min(n, m)
    out = torch.empty(key.shape, dtype=torch.int8, device=DEVICE)
    choose_in_groups[(1,)](torch.from_numpy(key).to(DEVICE), out, n, M=m, ROWS=rows, COLUMNS=16)
    kept = [group.nonzero()[0].tolist() for group in out.cpu().numpy().reshape(-1, m)]
    assert kept == [first_largest(group, n) for group in key.reshape(-1, m).astype(float)]
