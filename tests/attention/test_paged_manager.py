"""The block manager against vLLM's traces, and in long runs of random operations beside a memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chapters.attention.paged import BlockManager
from tests.attention.pages import assert_sound, manager_with, state
from tests.conftest import golden

SEQUENCES = st.integers(0, 7)


class TestManager:
    @pytest.mark.parametrize("case", ["cow_beam", "full_block_fork", "prefix_partial_shared_then_cow"])
    def test_reproduces_the_traces_of_vllm(self, case):
        arrays = golden("attn/paged_block_manager")
        config = json.loads(str(arrays[f"{case}/config"]))
        manager, cached = BlockManager(config["ngpu"], config["block_size"]), config.get("caching", False)
        if cached:  # its prefix cache takes the lowest block first
            manager.free_blocks.reverse()
        for entry in json.loads(str(arrays[f"{case}/log"])):
            (name, sequence, *rest), theirs = entry["op"], entry["state"]
            if name == "new" and cached and sequence == 1:  # an equal prompt: the cache finds what a fork shares
                manager.fork(0, 1)
            elif name == "new":
                assert manager.can_allocate(len(rest[0])) == "now" and entry["ret"] == "OK"
                manager.allocate(sequence, len(rest[0]))
            elif name == "append":
                copies = [(int(source), target) for source, targets in entry["ret"].items() for target in targets]
                assert manager.append(sequence) == copies
            elif name == "fork":
                manager.fork(sequence, rest[0])
            else:
                manager.free(sequence)
            assert {str(one): [f"G{block}" for block in table] for one, table in manager.tables.items()} == theirs[
                "tables"
            ]
            assert {f"GPU{block}": n for block, n in enumerate(manager.owners) if n} == theirs["refs"]
            assert len(manager.free_blocks) == theirs["free_gpu"]
            assert_sound(manager)

    def test_lets_in_below_the_watermark_only(self):
        manager = BlockManager(20, 4, watermark=0.1)
        assert manager.can_allocate(72) == "now" and manager.can_allocate(73) == "never"
        manager.allocate(0, 40)
        assert manager.can_allocate(32) == "now" and manager.can_allocate(33) == "later"
        assert manager.can_allocate(36, shared=1) == "now" and manager.can_allocate(37, shared=1) == "later"
        assert manager.can_append(0, 40) and not manager.can_append(0, 41)

    def test_truncates_and_writes_on(self):
        manager = manager_with({0: [3, 5, 6], 1: [3, 5]}, {0: 10, 1: 8})
        manager.truncate(0, 6)
        assert manager.tables[0] == [3, 5] and manager.free_blocks[-1] == 6
        assert manager.append(0) == [(5, 6)], "the other owner needs what was cut off"
        manager.truncate(0, 0)
        assert manager.tables[0] == [] and manager.append(0, 5) == [] and manager.lengths[0] == 5
        assert_sound(manager)

    def test_refusals_say_what_is_wrong(self):
        manager = manager_with({0: [3, 5]}, {0: 6}, blocks=6)
        for refused, complaint in (
            (lambda: BlockManager(0, 4), "got 0, 4, 0.0"),
            (lambda: BlockManager(1, 0), "block_size >= 1"),
            (lambda: BlockManager(1, 1, 1.0), "watermark < 1; got 1, 1, 1.0"),
            (lambda: manager.allocate(0, 1), "need a new sequence .* got 0, 1"),
            (lambda: manager.allocate(1, 0), "at least 1 position, .* got 1, 0"),
            (lambda: manager.allocate(1, 17), "4 free blocks of 4 suffice; got 1, 17"),
            (lambda: manager.append(0, 19), "need a known sequence and 5 blocks for 19 more positions; got 0, 4 free"),
            (lambda: manager.append(7), "got 7, 4 free"),
            (lambda: manager.append(0, 0), "count must be at least 1, got 0"),
            (lambda: manager.fork(0, 1, 7), "1 .. 6 positions of parent 0, got 1, 7"),
            (lambda: manager.fork(4, 1), "1 .. 0 positions of parent 4, got 1, 0"),
            (lambda: manager.free(1), "sequence 1 is not there, or was freed already"),
            (lambda: manager.release(0), "block 0 is free already"),
            (lambda: manager.truncate(0, 7), "cannot truncate sequence 0 to 7: 6 held"),
            (lambda: manager.truncate(5, 0), "sequence 5 to 0: None held"),
        ):
            before = state(manager)
            with pytest.raises(ValueError, match=complaint):
                refused()
            assert state(manager) == before


class Soak(RuleBasedStateMachine):
    """Every written position holds a number of its own: two owners that overwrite each other would show."""

    @initialize(blocks=st.integers(1, 12), size=st.sampled_from([1, 2, 4, 5]), watermark=st.sampled_from([0, 0.2]))
    def begin(self, blocks, size, watermark):
        self.manager = BlockManager(blocks, size, watermark)
        self.memory = np.full((blocks, size), -1)
        self.contents: dict[int, list[int]] = {}
        self.written = 0

    def write(self, sequence, count):
        """Fill the last `count` positions."""
        for j in range(len(self.contents[sequence]), len(self.contents[sequence]) + count):
            block = self.manager.tables[sequence][j // self.manager.block_size]
            self.memory[block, j % self.manager.block_size] = self.written
            self.contents[sequence].append(self.written)
            self.written += 1

    def refused(self, operation, *arguments):
        """It raises, and nothing has changed."""
        before = state(self.manager)
        with pytest.raises(ValueError):
            operation(*arguments)
        assert state(self.manager) == before

    @rule(sequence=SEQUENCES, length=st.integers(0, 20))
    def allocate(self, sequence, length):
        fits = -(-length // self.manager.block_size) <= len(self.manager.free_blocks)
        if sequence in self.contents or length < 1 or not fits:
            self.refused(self.manager.allocate, sequence, length)
        else:
            assert self.manager.reserve or self.manager.can_allocate(length) == "now"
            self.manager.allocate(sequence, length)
            self.contents[sequence] = []
            self.write(sequence, length)

    @rule(sequence=SEQUENCES, count=st.sampled_from([0, 1, 1, 1, 2, 7]))
    def append(self, sequence, count):
        known = sequence in self.contents and count > 0
        if not known or not self.manager.can_append(sequence, count):
            self.refused(self.manager.append, sequence, count)
            return
        needed, free = self.manager.needed(sequence, count), len(self.manager.free_blocks)
        for source, target in self.manager.append(sequence, count):
            self.memory[target] = self.memory[source]
        assert free - len(self.manager.free_blocks) == needed
        self.write(sequence, count)

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), child=SEQUENCES)
    def fork(self, data, child):
        parent = data.draw(st.sampled_from(sorted(self.contents)))
        length = data.draw(st.none() | st.integers(0, len(self.contents[parent]) + 1))
        if child in self.contents or length == 0 or (length or 1) > len(self.contents[parent]):
            self.refused(self.manager.fork, parent, child, length)
        else:
            self.manager.fork(parent, child, length)
            self.contents[child] = self.contents[parent][:length]

    @rule(sequence=SEQUENCES)
    def free(self, sequence):
        if sequence in self.contents:
            self.manager.free(sequence)
            del self.contents[sequence]
        self.refused(self.manager.free, sequence)

    @rule(sequence=SEQUENCES, length=st.integers(-1, 20))
    def truncate(self, sequence, length):
        if not 0 <= length <= len(self.contents.get(sequence, [])) or sequence not in self.contents:
            self.refused(self.manager.truncate, sequence, length)
        else:
            self.manager.truncate(sequence, length)
            del self.contents[sequence][length:]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def preempt_and_compute_again(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.contents)))
        length = len(self.contents.pop(sequence))
        self.manager.free(sequence)
        if length and self.manager.can_allocate(length) == "now":
            self.manager.allocate(sequence, length)
            self.contents[sequence] = []
            self.write(sequence, length)

    @invariant()
    def every_sequence_finds_its_own(self):
        if not hasattr(self, "manager"):
            return
        assert_sound(self.manager)
        size = self.manager.block_size
        assert self.manager.lengths == {sequence: len(held) for sequence, held in self.contents.items()}
        for sequence, held in self.contents.items():
            assert self.memory[self.manager.tables[sequence]].ravel()[: len(held)].tolist() == held
            assert len(self.manager.tables[sequence]) * size - len(held) < size, "less than a block is empty"


TestSoak = Soak.TestCase
TestSoak.settings = settings(max_examples=60, stateful_step_count=60)
