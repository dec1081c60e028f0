"""Occupancy against values worked out by hand, and the floor under a case's time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.cases import Case
from kernels.hardware import ARCHITECTURES, GPUS, floor_seconds, occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared_kib", "tensor_memory", "expected"),
    [
        (80, 255, 4, 48, 0, 0.125),  # 8192 registers a warp: 2 of each 16384, so 2 blocks of 4 warps
        (90, 228, 4, 64, 0, 0.125),
        (90, 32, 4, 224, 0, 0.0625),  # shared memory leaves room for one block
        (90, 234, 8, 224, 0, 0.125),
        (80, 194, 8, 64, 0, 0.125),
        (90, 114, 8, 96, 0, 0.25),
        (100, 94, 8, 96, 128, 0.25),
        (90, 39, 8, 0, 0, 0.75),  # 1280 registers a warp: 12 of each 16384
        (90, 94, 4, 62, 0, 0.1875),  # 228 KiB hold 3 blocks of 62 + 1
        (90, 16, 1, 0, 0, 0.5),  # 32 blocks at most
        (100, 32, 4, 0, 512, 0.0625),  # tensor memory holds one block
        (80, 32, 4, 164, 0, 0.0),  # does not fit
    ],
)
def test_occupancy(arch, registers, warps, shared_kib, tensor_memory, expected):
    assert occupancy(arch, registers, warps, shared_kib * 1024, tensor_memory) == expected


@given(
    arch=st.sampled_from(sorted(ARCHITECTURES)),
    registers=st.integers(1, 254),
    warps=st.sampled_from([1, 2, 4, 8, 16]),
    shared=st.integers(0, 240 * 1024),
)
def test_occupancy_is_a_fraction_and_more_of_anything_never_raises_it(arch, registers, warps, shared):
    now = occupancy(arch, registers, warps, shared)
    assert 0 <= now <= 1
    assert occupancy(arch, registers + 1, warps, shared) <= now
    assert occupancy(arch, registers, warps, shared + 1024) <= now
    if shared <= ARCHITECTURES[arch].shared_per_block and registers <= 128 and warps <= 8:
        assert now > 0  # within the limits of one block, one block is resident


def test_floor_is_the_longer_of_bytes_and_operations():
    def case(size, operations, rate="bf16"):
        return Case("c", tuple, min, max, bytes=size, operations=operations, kind="other", rate=rate)

    assert floor_seconds(case(4_800_000, 10), GPUS["H200"]) == pytest.approx(1e-6)
    assert floor_seconds(case(10, 989 * 10**9), GPUS["H200"]) == pytest.approx(1e-3)
    assert floor_seconds(case(10, 624 * 10**9, "int8"), GPUS["A100"]) == pytest.approx(1e-3)
