"""Task routing: each step against a loop, one dense layer against the mixture, the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.moe import task_routing
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled

SELECT = pytest.mark.exercise("chapters.moe.task_routing.select", points=2)
MIXTURE = pytest.mark.exercise("chapters.moe.task_routing.mixture", points=2)
GATHER = pytest.mark.exercise("chapters.moe.task_routing.gather", points=3)
KERNEL = pytest.mark.exercise("kernels.moe.task_routing.gather_kernel", points=4)

fast = kernel("moe.task_routing")
SEEDS = st.integers(0, 2**32 - 1)
EDGES = st.sampled_from([1, 2, 5, 16, 17])


@st.composite
def stacks(draw, dtypes=(np.float32, np.float64, np.float16)):
    """up, down, expert, weight, gate or None: weights of several sizes, so that no two experts are alike."""
    experts, F, dim, dtype = draw(st.integers(1, 5)), draw(EDGES), draw(EDGES), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(SEEDS))
    spread = 10.0 ** rng.integers(-2, 3)
    up, gate = (spread * rng.normal(size=(experts, F, dim)) for _ in range(2))
    expert = rng.permutation(experts)[: draw(st.integers(1, min(experts, 3)))]
    weight = rng.dirichlet(np.ones(len(expert))).astype(np.float64 if dtype is np.float64 else np.float32)
    down = (spread * rng.normal(size=(experts, dim, F))).astype(dtype)
    return up.astype(dtype), down, expert, weight, gate.astype(dtype) if draw(st.booleans()) else None


# --- choosing -----------------------------------------------------------------------------------------------------


@SELECT
@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 9, 40]), st.sampled_from([0.0, 1.0, 100.0]), SEEDS,
       st.sampled_from([np.float32, np.float64, np.float16]))  # fmt: skip
def test_a_task_gets_the_experts_of_its_largest_logits(tasks, experts, spread, seed, dtype):
    rng = np.random.default_rng(seed)
    logits = (np.rint(4 * spread * rng.normal(size=(tasks, experts))) / 4).astype(dtype)  # many are equal
    task, k, before = int(rng.integers(tasks)), int(rng.integers(1, experts + 1)), logits.copy()
    expert, weight = task_routing.select(logits, task, k)
    row = [float(value) for value in logits[task]]
    wanted = sorted(range(experts), key=lambda e: (-row[e], e))[:k]
    shares = [math.exp(row[e] - row[wanted[0]]) for e in wanted]
    assert expert.tolist() == wanted and expert.dtype == np.int64
    assert weight.dtype == np.result_type(dtype, np.float32) and weight.shape == (k,)
    np.testing.assert_allclose(weight, np.array(shares) / math.fsum(shares), **tolerance(weight.dtype, experts))
    np.testing.assert_array_equal(logits, before)


@SELECT
def test_exactly_these_experts():
    """Of equal logits the lower expert; huge logits do not overflow."""
    logits = np.array([[9.0, 9.0, 0.0], [0.0, math.log(3), 0.0], [-5e4, 5e4, 5e4]])
    for task, k, wanted, shares in ((1, 2, [1, 0], [0.75, 0.25]), (0, 1, [0], [1.0]), (2, 2, [1, 2], [0.5, 0.5])):
        expert, weight = task_routing.select(logits, task, k)
        assert expert.tolist() == wanted
        np.testing.assert_allclose(weight, shares, **tolerance(np.float64))


@SELECT
@given(st.integers(1, 5), st.integers(1, 5), st.integers(-9, 9), st.integers(-9, 9))
def test_an_unknown_task_and_too_many_experts_are_refused(tasks, experts, task, k):
    logits = np.zeros((tasks, experts))
    if 0 <= task < tasks and 1 <= k <= experts:
        assert len(task_routing.select(logits, task, k)[0]) == k
    else:
        with pytest.raises(ValueError):
            task_routing.select(logits, task, k)


@SELECT
@pytest.mark.parametrize("logits", [
    np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0)), np.zeros((2, 3, 4)), np.full((2, 3), np.nan),
    np.array([[np.inf, 0.0]]), np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([[0.0, 1.0], [0.0, -np.inf]]),
])  # fmt: skip
def test_logits_that_say_nothing_are_refused(logits):
    with pytest.raises(ValueError):
        task_routing.select(logits, 0, 1)


# --- the layer ----------------------------------------------------------------------------------------------------


def silu(value: float) -> float:
    """The definition, where exp cannot overflow."""
    return value / (1 + math.exp(-value)) if value > -500 else 0.0


def by_loop(row, up, down, gate) -> list[float]:
    """A dense layer, number by number."""
    sums = [math.fsum(a * b for a, b in zip(row, line, strict=True)) for line in up]
    if gate is None:
        hidden = [max(value, 0.0) for value in sums]
    else:
        opened = [math.fsum(a * b for a, b in zip(row, line, strict=True)) for line in gate]
        hidden = [silu(a) * b for a, b in zip(opened, sums, strict=True)]
    return [math.fsum(a * b for a, b in zip(hidden, line, strict=True)) for line in down]


@MIXTURE
@settings(max_examples=15)
@given(stacks([np.float64]), st.integers(1, 3), st.sampled_from([1, 2, 7]), SEEDS)
def test_every_row_goes_through_the_experts_of_its_task(stack, tasks, rows, seed):
    up, down, expert, _, gate = stack
    rng = np.random.default_rng(seed)
    table = np.array([rng.permutation(len(up))[: len(expert)] for _ in range(tasks)])
    weights = rng.dirichlet(np.ones(len(expert)), tasks)
    x, task = rng.normal(size=(rows, up.shape[2])), rng.integers(tasks, size=rows)
    given_ = [None if part is None else part.copy() for part in (x, task, table, weights, up, down, gate)]
    found = task_routing.mixture(x, task, table, weights, up, down, gate)
    for part, old in zip((x, task, table, weights, up, down, gate), given_, strict=True):
        np.testing.assert_array_equal(part, old)
    assert found.shape == x.shape and found.dtype == x.dtype
    for row, one, out in zip(x, task, found, strict=True):
        parts = [by_loop(row, up[e], down[e], None if gate is None else gate[e]) for e in table[one]]
        wanted = [math.fsum(w * p for w, p in zip(weights[one], of, strict=True)) for of in zip(*parts, strict=True)]
        scale = np.abs(up).max() ** (1 if gate is None else 2) * np.abs(down).max() * up.shape[2] ** 2
        np.testing.assert_allclose(out, wanted, **tolerance(np.float64, down.shape[2], scale))


@MIXTURE
def test_exactly_this_mixture():
    """Two tasks, the second without its second expert; the numbers of relu layers of width 1."""
    up, down = np.array([[[1.0]], [[-1.0]], [[2.0]]]), np.array([[[1.0]], [[10.0]], [[100.0]]])
    expert, weight = np.array([[2, 0], [1, 0]]), np.array([[0.25, 0.75], [1.0, 0.0]])
    x, task = np.array([[2.0], [2.0], [-2.0]]), np.array([0, 1, 1])
    found = task_routing.mixture(x, task, expert, weight, up, down)
    np.testing.assert_array_equal(found, [[0.25 * 400 + 0.75 * 2], [0.0], [20.0]])
    for dtype in (np.float16, np.float32):
        narrow = task_routing.mixture(x.astype(dtype), task, expert, weight, up, down)
        assert narrow.dtype == dtype and narrow.tolist() == found.tolist()
    assert task_routing.mixture(x, task, expert, weight.astype(np.float32), up, down).dtype == np.float64
    assert task_routing.mixture(x[:0], task[:0], expert, weight, up, down).shape == (0, 1)


@MIXTURE
@pytest.mark.parametrize("task", [[0, 2], [-1, 0], [0], [0, 0, 0], [[0], [0]], 0])
def test_tasks_that_rows_do_not_have_are_refused(task):
    up, table = np.ones((2, 1, 3)), np.zeros((2, 1), int)
    with pytest.raises(ValueError):
        task_routing.mixture(np.ones((2, 3)), np.array(task), table, np.ones((2, 1)), up, up.transpose(0, 2, 1))


# --- side by side -------------------------------------------------------------------------------------------------


@GATHER
@given(stacks())
def test_chosen_experts_stand_side_by_side(stack):
    up, down, expert, weight, gate = stack
    before = [None if part is None else part.copy() for part in stack]
    rows, beside, opens = task_routing.gather(up, down, expert, weight, gate)
    (_, F, dim), k, dtype = up.shape, len(expert), up.dtype
    assert rows.shape == (k * F, dim) and beside.shape == (dim, k * F)
    assert rows.dtype == beside.dtype == dtype and (opens is None) == (gate is None)
    for j, e in enumerate(expert):
        own = slice(j * F, (j + 1) * F)
        np.testing.assert_array_equal(rows[own], up[e])
        if gate is not None and opens is not None:
            np.testing.assert_array_equal(opens[own], gate[e])
        factor = weight[j] if dtype == np.float64 else np.float32(weight[j])
        np.testing.assert_array_equal(beside[:, own], (down[e].astype(weight.dtype) * factor).astype(dtype))
    for part, old in zip(stack, before, strict=True):
        np.testing.assert_array_equal(part, old)


@GATHER
def test_the_product_is_rounded_once():
    """In float16, 1000 / 3 is 333.25; a third rounded first makes it 333.0."""
    down = np.full((2, 1, 1), 1000, np.float16)
    up = np.ones((2, 1, 1), np.float16)
    found = task_routing.gather(up, down, np.array([1]), np.array([1 / 3], np.float32))[1]
    assert found.dtype == np.float16 and found.item() == 333.25
    wide = task_routing.gather(up, down.astype(np.float32), np.array([1]), np.array([1 / 3]))[1]
    assert wide.dtype == np.float32 and abs(wide.item() - 1000 / 3) < 1e-3


@GATHER
@pytest.mark.parametrize("case", [
    ([3], [1.0]), ([-1], [1.0]), ([], []), ([0, 1, 2, 0], [0.25] * 4), ([0, 1], [1.0]), ([[0]], [[1.0]]),
    ([0], [math.nan]), ([0], [math.inf]),
])  # fmt: skip
def test_experts_that_are_not_there_are_refused(case):
    expert, weight = np.array(case[0], int), np.array(case[1])
    with pytest.raises(ValueError):
        task_routing.gather(np.ones((3, 2, 4)), np.ones((3, 4, 2)), expert, weight)


@GATHER
@pytest.mark.parametrize("shapes", [((3, 2, 4), (3, 2, 4), None), ((3, 2, 4), (2, 4, 2), None), ((2, 4), (4, 2), None),
                                    ((3, 2, 4), (3, 4, 2), (3, 4, 2)), ((3, 0, 4), (3, 4, 0), None)])  # fmt: skip
def test_stacks_that_do_not_fit_are_refused(shapes):
    up, down, gate = (None if shape is None else np.ones(shape) for shape in shapes)
    with pytest.raises(ValueError):
        task_routing.gather(up, down, np.array([0]), np.array([1.0]), gate)


@given(stacks([np.float64]), SEEDS)
def test_one_dense_layer_does_what_the_mixture_does(stack, seed):
    up, down, expert, weight, gate = stack
    x = np.random.default_rng(seed).normal(size=(5, up.shape[2]))
    wanted = task_routing.mixture(x, np.zeros(5, int), expert[None], weight[None], up, down, gate)
    rows, beside, opens = task_routing.gather(*stack)
    scale = np.abs(up).max() ** (1 if gate is None else 2) * np.abs(down).max() * up.shape[2] ** 2
    found = task_routing.dense(x, rows, beside, opens)
    np.testing.assert_allclose(found, wanted, **tolerance(np.float64, down.shape[2], scale))


@given(stacks())
def test_one_expert_alone_is_that_expert(stack):
    up, down, expert, _, gate = stack
    found = task_routing.gather(up, down, expert[:1], np.ones(1, np.float32), gate)
    wanted = (up[expert[0]], down[expert[0]], None if gate is None else gate[expert[0]])
    for part, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(part, other)


@given(stacks())
def test_the_twin_gathers_like_the_reference(stack):
    found = task_routing.gathered(*(None if part is None else torch.from_numpy(part).to(DEVICE) for part in stack))
    for part, other in zip(found, task_routing.gather(*stack), strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            np.testing.assert_array_equal(part.cpu().numpy(), other)


def test_bad_input_is_refused_in_words():
    ones, expert = (np.ones((3, 2, 4)), np.ones((3, 4, 2))), np.array([3])
    for words, function in (
        ("task must be from 0 to 1, got 2", lambda: task_routing.select(np.zeros((2, 3)), 2, 1)),
        ("k must be from 1 to the 3 experts, got 4", lambda: task_routing.select(np.zeros((2, 3)), 0, 4)),
        ("expert must be from 0 to 2, got 3", lambda: task_routing.gather(*ones, expert, np.ones(1))),
        ("1 <= k <= 3 experts", lambda: task_routing.gather(*ones, np.zeros(4, int), np.ones(4))),
        ("weight must be finite", lambda: task_routing.gather(*ones, np.zeros(1, int), np.full(1, np.nan))),
    ):
        with pytest.raises(ValueError, match=words):
            function()
    tensors = [torch.from_numpy(part) for part in (*ones, expert)]
    with pytest.raises(ValueError, match=r"expert must be from 0 to 2, got \[3\]"):
        task_routing.gathered(*tensors, torch.ones(1))
    with pytest.raises(ValueError, match="weight must be finite"):
        task_routing.gathered(*tensors[:2], torch.zeros(1, dtype=torch.int64), torch.full((1,), math.inf))
    with pytest.raises(TypeError):
        task_routing.select(np.zeros((2, 3)), 0.5, 1)  # type: ignore[arg-type]


# --- the kernel ---------------------------------------------------------------------------------------------------


def assert_gathers(stack, dtype: torch.dtype) -> None:
    """The kernel, in small tiles, gives the bits of the reference in float32, rounded to `dtype`."""
    up, down, expert, weight, gate = (None if part is None else torch.from_numpy(part) for part in stack)
    up, down, gate = (None if part is None else part.to(dtype) for part in (up, down, gate))
    parts = up, down, expert, weight, gate
    found = fast.gather(*(None if p is None else poisoned(p.to(DEVICE)) for p in parts), rows=16, columns=16)
    arrays = (None if p is None else (p.float() if p.is_floating_point() else p).numpy() for p in parts)
    for part, other in zip(found, oracle("moe.task_routing").gather(*arrays), strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            assert part.dtype == dtype and torch.equal(part.cpu(), torch.from_numpy(other).to(dtype))


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=8)
@given(stack=stacks([np.float32]))
def test_kernel_gathers_like_the_reference(dtype, stack):
    assert_gathers(stack, dtype)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("gated", [True, False])
def test_kernel_puts_three_experts_of_several_tiles_side_by_side(gated):
    rng = np.random.default_rng(0)
    up, gate = (rng.normal(size=(4, 19, 18)).astype(np.float32) for _ in range(2))
    down = rng.normal(size=(4, 18, 19)).astype(np.float32)
    weight = np.array([0.5, 0.3, 0.2], np.float32)
    assert_gathers((up, down, np.array([3, 0, 2]), weight, gate if gated else None), torch.float16)


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("alien", [-1, 3, 2**40])
def test_kernel_makes_nan_of_an_expert_that_is_not_there(alien):
    """The launch itself, which looks at no number before; behind the three experts lies a fourth."""
    up, down = torch.ones(5, 2, 4, device=DEVICE), torch.ones(5, 4, 2, device=DEVICE)
    outs = [torch.zeros(size, device=DEVICE) for size in ((4, 4), (4, 4), (4, 4))]
    expert, weight = torch.tensor([1, alien], device=DEVICE), torch.ones(2, device=DEVICE)
    fast.gather_kernel[(3, 2)](
        up[1:], up[1:], down[1:], expert, weight, *outs, 3, 4, 2, 8, 1, 4, GATED=1, ROWS=16, COLUMNS=16
    )
    rows, opens, beside = (out.cpu() for out in outs)
    assert (rows[:2] == 1).all() and (opens[:2] == 1).all() and (beside[:, :2] == 1).all()
    assert rows[2:].isnan().all() and opens[2:].isnan().all() and beside[:, 2:].isnan().all()


@pytest.mark.kernel
def test_kernel_reads_nothing_beyond_what_it_is_given():
    rng = np.random.default_rng(1)
    up, gate = (torch.from_numpy(rng.normal(size=(2, 5, 7)).astype(np.float32)) for _ in range(2))
    expert, weight = torch.tensor([1, 0]), torch.tensor([0.75, 0.25])
    down = torch.from_numpy(rng.normal(size=(2, 7, 5)).astype(np.float32))
    found = fast.gather(*(walled(part.to(DEVICE)) for part in (up, down, expert, weight, gate)), rows=16, columns=16)
    for part, other in zip(found, fast.torch_gather(up, down, expert, weight, gate), strict=True):
        assert torch.equal(part.cpu(), other)


@pytest.mark.kernel
@pytest.mark.parametrize(("changed", "error"), [
    ({"expert": torch.tensor([0, 1, 2, 0])}, ValueError), ({"expert": torch.tensor([0])}, ValueError),
    ({"expert": torch.zeros(0, dtype=torch.int64), "weight": torch.zeros(0)}, ValueError),
    ({"expert": torch.zeros(2)}, TypeError), ({"weight": torch.zeros(2, dtype=torch.float64)}, TypeError),
    ({"up": torch.ones(3, 2, 4, dtype=torch.float64)}, TypeError), ({"down": torch.ones(3, 4, 2).half()}, TypeError),
    ({"down": torch.ones(3, 2, 4)}, ValueError), ({"down": torch.ones(3, 2, 4).mT}, ValueError),
    ({"gate": torch.ones(3, 4, 2)}, ValueError), ({"up": torch.ones(2, 4)}, ValueError),
])  # fmt: skip
def test_kernel_refuses_what_it_cannot_serve(changed, error):
    sound = {"up": torch.ones(3, 2, 4), "down": torch.ones(3, 4, 2), "expert": torch.tensor([0, 1])}
    with pytest.raises(error):
        fast.gather(**(sound | {"weight": torch.ones(2)} | changed))


@pytest.mark.kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA nobody waits for the numbers")
def test_kernel_refuses_an_expert_that_is_not_there():
    with pytest.raises(ValueError, match=r"expert must be from 0 to 2, got \[0, 3\]"):
        fast.gather(torch.ones(3, 2, 4), torch.ones(3, 4, 2), torch.tensor([0, 3]), torch.ones(2))
