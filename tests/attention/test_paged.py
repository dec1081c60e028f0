"""PagedAttention: the manager's operations against their laws, attention against loops, the kernel against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import paged
from chapters.attention.paged import append_tokens, fork_sequence, free_sequence, paged_attention
from tests.attention.checks import untouched
from tests.attention.pages import Batch, assert_sound, batch, batches, manager_with, managers, state
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled

fast = kernel("attention.paged")


@pytest.mark.exercise("chapters.attention.paged.append_tokens", points=3)
class TestAppend:
    @given(managers(), st.data())
    def test_takes_what_is_missing_and_copies_a_shared_end(self, manager, data):
        sequence = data.draw(st.sampled_from(sorted(manager.tables)))
        count, size = data.draw(st.integers(1, 3 * manager.block_size)), manager.block_size
        tables, lengths, owners, free = state(manager)
        table, end = tables[sequence], lengths[sequence]
        shared = end % size > 0 and owners[table[-1]] > 1
        expected = [*table[:-1], free.pop()] if shared and free else table
        while free and len(expected) * size < end + count:
            expected = [*expected, free.pop()]
        before = state(manager)
        if len(expected) * size < end + count or (shared and expected[-1] == table[-1]):
            with pytest.raises(ValueError):
                append_tokens(manager, sequence, count)
            assert state(manager) == before
            return
        copies = append_tokens(manager, sequence, count)
        assert copies == ([(table[-1], expected[len(table) - 1])] if shared else [])
        assert manager.tables == tables | {sequence: expected}
        assert manager.lengths == lengths | {sequence: end + count}
        assert_sound(manager)

    def test_the_last_owner_writes_in_place(self):
        manager = manager_with({0: [3, 5], 1: [3, 5]}, {0: 6, 1: 6})
        assert append_tokens(manager, 0) == [(5, 11)] and append_tokens(manager, 1) == []
        assert manager.tables == {0: [3, 11], 1: [3, 5]} and manager.lengths == {0: 7, 1: 7}
        assert_sound(manager)

    def test_a_full_block_is_never_copied(self):
        manager = manager_with({0: [3, 5], 1: [3, 5]}, {0: 8, 1: 8})
        assert append_tokens(manager, 0, 1) == [] and manager.tables == {0: [3, 5, 11], 1: [3, 5]}

    def test_takes_the_last_free_blocks_and_the_last_slots(self):
        manager = manager_with({0: [3, 0], 1: [3, 1]}, {0: 6, 1: 8}, blocks=5)
        assert append_tokens(manager, 0, 9) == [] and manager.tables == {0: [3, 0, 4, 2], 1: [3, 1]}
        assert append_tokens(manager, 0) == [] and manager.lengths == {0: 16, 1: 8} and manager.free_blocks == []

    def test_refuses_whole(self):
        manager = manager_with({0: [3, 0], 1: [3, 1]}, {0: 6, 1: 8}, blocks=5)
        before = state(manager)
        for sequence, count in ((0, 11), (1, 9), (0, 0), (0, -1), (2, 1)):
            with pytest.raises(ValueError):
                append_tokens(manager, sequence, count)
            assert state(manager) == before
        shared = manager_with({0: [0], 1: [0]}, {0: 3, 1: 3}, blocks=2)
        before = state(shared)
        with pytest.raises(ValueError):
            append_tokens(shared, 0, 2)
        assert state(shared) == before, "the copy and one more are needed, one is free"


@pytest.mark.exercise("chapters.attention.paged.fork_sequence", points=1)
class TestFork:
    @given(managers(), st.data())
    def test_shares_the_blocks_of_a_beginning(self, manager, data):
        parent = data.draw(st.sampled_from(sorted(manager.tables)))
        length = data.draw(st.none() | st.integers(1, manager.lengths[parent]))
        tables, lengths, _, free = state(manager)
        fork_sequence(manager, parent, 9, length)
        length = lengths[parent] if length is None else length
        assert manager.tables == tables | {9: tables[parent][: -(-length // manager.block_size)]}
        assert manager.lengths == lengths | {9: length} and manager.free_blocks == free
        assert_sound(manager)

    def test_gives_the_child_a_table_of_its_own(self):
        manager = manager_with({0: [3, 5]}, {0: 8})
        fork_sequence(manager, 0, 1)
        manager.tables[1].append(7)
        assert manager.tables[0] == [3, 5]

    @pytest.mark.parametrize(
        ("parent", "child", "length"),
        [(2, 3, None), (2, 3, 1), (0, 1, 2), (0, 1, None), (0, 0, 2), (0, 3, 7), (0, 3, 0), (0, 3, -1)],
    )
    def test_refuses(self, parent, child, length):
        manager = manager_with({0: [3, 5], 1: [4]}, {0: 6, 1: 2})
        before = state(manager)
        with pytest.raises(ValueError):
            fork_sequence(manager, parent, child, length)
        assert state(manager) == before


@pytest.mark.exercise("chapters.attention.paged.free_sequence", points=1)
class TestFree:
    @given(managers(), st.data())
    def test_releases_what_nobody_else_owns(self, manager, data):
        sequence = data.draw(st.sampled_from(sorted(manager.tables)))
        tables, _, owners, free = state(manager)
        free_sequence(manager, sequence)
        assert manager.tables == {one: table for one, table in tables.items() if one != sequence}
        assert manager.free_blocks == free + [block for block in tables[sequence] if owners[block] == 1]
        assert_sound(manager)
        before = state(manager)
        with pytest.raises(ValueError):
            free_sequence(manager, sequence)
        assert state(manager) == before


def bad_batches() -> list[tuple]:
    """Arguments of `paged_attention`, scale and new included, that fit but for one thing."""
    good = batch(np.random.default_rng(0), [5, 9], [1, 3], 4, 2, 8, 4)
    q, keys, values, tables, lengths, new = *good.arguments(), good.new
    tables = np.where(tables < len(keys), np.maximum(tables, 0), 0)
    wrong_id = [tables.copy() for _ in "ab"]
    wrong_id[0][1, 2], wrong_id[1][0, 0] = len(keys), -1
    return [
        (q[0], keys, values, tables, lengths, None, new),
        (q, keys[:, :3], values, tables, lengths, None, new),
        (q, keys[..., :4], values[..., :4], tables, lengths, None, new),
        (q[:, :3], keys, values, tables, lengths, None, new),
        (q, keys, values, tables[:1], lengths, None, new),
        (q, keys, values, tables, lengths[:1], None, new),
        (q, keys, values, tables, lengths, None, new[:1]),
        (q, keys, values, tables, np.array([0, 9]), None, new),
        (q, keys, values, tables, np.array([5, 17]), None, new),
        (q, keys, values, tables, lengths, None, np.array([0, 4])),
        (q, keys, values, tables, np.array([5, 2]), None, new),
        (q, keys, values, tables, lengths, None, np.array([1, 2])),
        (q, keys, values, tables, lengths, None, None),
        (q, keys, values, wrong_id[0], lengths, None, new),
        (q, keys, values, wrong_id[1], lengths, None, new),
        (q[:0], keys, values, tables, lengths, None, new),
    ]


@pytest.mark.exercise("chapters.attention.paged.paged_attention", points=3)
class TestPagedAttention:
    @given(batches(), st.sampled_from([None, 0.3]))
    def test_is_attention_over_each_sequence_laid_out_plainly(self, problem, scale):
        found = untouched(paged_attention, *problem.arguments(), scale=scale, new=problem.new)
        assert found.dtype == np.float64 and found.shape == problem.q.shape
        np.testing.assert_allclose(found, problem.expected(scale), **tolerance(np.float64, 100, 10))

    @given(batches(decode=True))
    def test_decodes_without_counts(self, problem):
        found = paged_attention(*problem.arguments())
        np.testing.assert_allclose(found, problem.expected(), **tolerance(np.float64, 100, 10))

    @pytest.mark.parametrize("sign", [1, -1])
    def test_scores_of_thousands_neither_overflow_nor_vanish(self, sign):
        problem = batch(np.random.default_rng(0), [5, 9], [1, 3], 2, 1, 8, 4)
        for table in problem.tables:
            problem.keys[table[0]] = sign * np.abs(problem.keys[table[0]])
        for k, _ in problem.plain:
            k[:4] = sign * np.abs(k[:4])
        problem.q[:] = 1e4 * np.abs(problem.q)
        found = paged_attention(*problem.arguments(), None, problem.new)
        np.testing.assert_allclose(found, problem.expected(), **tolerance(np.float64, 9, 10))

    def test_equals_vllm(self):
        arrays = golden("attn/paged_attention")
        names = ("query", "key_cache", "value_cache", "block_tables", "kv_lens", "query_lens")
        q, keys, values, tables, lengths, new = (arrays[f"varlen/mixed/{name}"] for name in names)
        found = paged_attention(q, keys, values, tables, lengths, None, new)
        np.testing.assert_allclose(found, arrays["varlen/mixed/out"], **tolerance(np.float32, 18))

    @pytest.mark.parametrize("arguments", bad_batches())
    def test_refuses_what_does_not_fit(self, arguments):
        with pytest.raises(ValueError):
            paged_attention(*arguments)


def test_refusals_of_attention_say_what_is_wrong():
    complaints = [
        r"q must be \[tokens, H, D\], keys and values alike; got \(4, 8\)",
        r"got \(4, 4, 8\), \(7, 3, 2, 8\), \(7, 4, 2, 8\)",
        "must share D",
        "Hkv dividing H",
        r"got \(1, 4\), 2, 2",
        r"got \(2, 4\), 1, 2",
        r"got \(2, 4\), 2, 1",
        r"lengths must be from 1 to 16, got \[0, 9\]",
        r"got \[5, 17\]",
        r"new must be from 1 to lengths and sum to the 4 rows of q, got \[0, 4\]",
        r"got \[1, 3\]",
        r"got \[1, 2\]",
        r"got \[1, 1\]",
        "block ids must be from 0 to 6, got . to 7",
        "got -1 to",
        r"got \(0, 4, 8\)",
    ]
    for arguments, complaint in zip(bad_batches(), complaints, strict=True):
        with pytest.raises(ValueError, match=complaint):
            paged_attention(*arguments)


def run_kernel(problem: Batch, dtype: torch.dtype, scale: float | None = None, hold=poisoned, **blocks) -> np.ndarray:
    """What the kernel makes of one query per sequence, float64."""
    floats = (hold(torch.from_numpy(x).to(DEVICE, dtype)) for x in problem.arguments()[:3])
    integers = (hold(torch.from_numpy(x).to(DEVICE)) for x in problem.arguments()[3:])
    found = fast.paged_attention(*floats, *integers, scale, **blocks)
    assert found.dtype is dtype and found.shape == problem.q.shape
    return found.double().cpu().numpy()


QUIET = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # a share without a position is NaN


@QUIET
@pytest.mark.kernel
@pytest.mark.exercise("kernels.attention.paged.decode_kernel", points=4)
class TestKernel:
    @settings(max_examples=20)
    @given(
        batches(decode=True, sizes=(1, 3, 16, 32), head_sizes=(8, 24, 16)), st.sampled_from([16, 32]),
        st.sampled_from([1, 2, 3]), st.sampled_from(KERNEL_DTYPES), st.sampled_from([None, 0.1]),
    )  # fmt: skip
    def test_equals_the_reference(self, problem, block, shares, dtype, scale):
        dtype = torch.float32 if np.abs(problem.q).max() > 10 else dtype  # fp16 sums of products of thousands
        found = run_kernel(problem, dtype, scale, block=block, shares=shares)
        expected = oracle("attention.paged").paged_attention(*problem.arguments(), scale)
        np.testing.assert_allclose(found, expected, **tolerance(dtype, 40))

    @pytest.mark.parametrize("size", [16, 64, 128])
    def test_block_sizes_in_use(self, size):
        problem = batch(np.random.default_rng(size), [65, 1], [1, 1], 4, 2, 32, size)
        for dtype in KERNEL_DTYPES:
            found = run_kernel(problem, dtype, block=32, shares=2)
            np.testing.assert_allclose(found, problem.expected(), **tolerance(dtype, 65))

    def test_a_late_large_score_outweighs_all_before(self):
        problem = batch(np.random.default_rng(0), [50], [1], 2, 1, 16, 16)
        for largest in (49, 3, 20):
            problem.q[:] = 40 * problem.plain[0][0][largest]
            found = run_kernel(problem, torch.float32, block=16, shares=1)
            np.testing.assert_allclose(found, problem.expected(), **tolerance(np.float32, 50, 10))

    def test_what_cannot_be_refused_is_nan_for_its_sequence_alone(self):
        problem = batch(np.random.default_rng(0), [40, 20, 33, 9], [1] * 4, 2, 1, 16, 16)
        expected = problem.expected()
        problem.tables[0, 1], problem.tables[2, 2] = 2**28, -1  # blocks that are none
        problem.lengths[3] = 0
        for shares in (1, 2):
            found = run_kernel(problem, torch.float32, block=16, shares=shares)
            assert np.isnan(found[[0, 2, 3]]).all()
            np.testing.assert_allclose(found[1], expected[1], **tolerance(np.float32, 20))
        problem.lengths[3] = 16 * problem.tables.shape[1] + 1
        assert np.isnan(run_kernel(problem, torch.float32, block=16, shares=1)[3]).all()

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, begins):
        problem = batch(np.random.default_rng(1), [33, 17], [1, 1], 3, 1, 24, 16, spare=0)
        found = run_kernel(problem, torch.float32, hold=lambda x: walled(x, begins), block=32, shares=2)
        np.testing.assert_allclose(found, problem.expected(), **tolerance(np.float32, 33))


@QUIET
@pytest.mark.kernel
class TestWrapper:
    def test_its_own_configuration_serves_any_shape(self):
        for lengths, size, dtype in (([1], 16, torch.float16), ([300, 7], 128, torch.float32)):
            problem = batch(np.random.default_rng(0), lengths, [1] * len(lengths), 2, 1, 16, size)
            found = run_kernel(problem, dtype)
            np.testing.assert_allclose(found, problem.expected(), **tolerance(dtype, 300))

    def test_the_same_twice(self):
        problem = batch(np.random.default_rng(0), [80, 50], [1, 1], 4, 2, 16, 16)
        twice = [run_kernel(problem, torch.float32, block=16, shares=3) for _ in "ab"]
        np.testing.assert_array_equal(*twice)

    def test_more_shares_where_there_are_few_sequences(self):
        assert fast.configuration(8, 8192) == {"block": 64, "shares": 64}
        assert fast.configuration(128, 8192)["shares"] == 4 and fast.configuration(512, 8192)["shares"] == 1
        assert fast.configuration(8, 256)["shares"] == 2, "two tiles each at the least"

    @pytest.mark.parametrize(
        ("changed", "error", "complaint"),
        [
            ({"q": torch.zeros(2, 4)}, ValueError, "q must be"),
            ({"q": torch.zeros(2, 3, 16)}, ValueError, "Hkv dividing 3"),
            ({"q": torch.zeros(2, 4, 8)}, ValueError, r"keys must be \[blocks, B, Hkv, 8\]"),
            ({"q": torch.zeros(2, 16, 4).mT}, ValueError, "q must be contiguous"),
            ({"values": torch.zeros(3, 16, 2, 8)}, ValueError, "values must be"),
            ({"values": torch.zeros(3, 16, 2, 16).half()}, TypeError, "values must have dtype"),
            ({"tables": torch.zeros(1, 2).int()}, ValueError, r"tables must be \[2, width\]"),
            ({"tables": torch.zeros(2, 2).long()}, TypeError, "tables must have dtype"),
            ({"lengths": torch.ones(3).int()}, ValueError, r"lengths must be \[2\]"),
            ({"block": 24}, ValueError, "block must be a power of two of at least 16, got 24"),
            ({"shares": 0}, ValueError, "shares must be at least 1, got 0"),
        ],
    )
    def test_refuses_in_words(self, changed, error, complaint):
        good = {"q": torch.zeros(2, 4, 16), "keys": torch.zeros(3, 16, 2, 16), "values": torch.zeros(3, 16, 2, 16),
                "tables": torch.zeros(2, 2).int(), "lengths": torch.ones(2).int()}  # fmt: skip
        with pytest.raises(error, match=complaint):
            fast.paged_attention(**good | changed)


def test_cases_count_what_must_move():
    for case in fast.CASES if fast else []:
        q, keys, values, tables, lengths = case.inputs(torch.device("cpu"))
        assert case.bytes == 2 * q.nbytes + keys.nbytes + values.nbytes + tables.nbytes
        assert case.operations == 4 * q.shape[1] * q.shape[2] * int(lengths.sum())


def test_chapter_and_kernel_agree_on_names():
    assert fast is None or fast.paged_attention.__name__ == paged.paged_attention.__name__
