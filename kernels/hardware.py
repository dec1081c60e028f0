"""What a GPU can do at best: datasheet ceilings, the floor under any kernel's time, and occupancy.

Ceilings are vendor datasheet values, dense, at the SXM power limit; `bench` measures its own and divides by those.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cases import Case

KIB = 1024


@dataclass(frozen=True)
class Ceilings:
    """Memory bandwidth in bytes per second and dense matrix rates in operations per second."""

    bandwidth: float
    bf16: float
    int8: float


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    shared_per_block: int  # bytes that one block may ask for
    shared_per_processor: int  # bytes that resident blocks share; each also takes 1 KiB for the system
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    tensor_memory: int = 0  # columns


GPUS = {
    "A100": Ceilings(bandwidth=2.04e12, bf16=312e12, int8=624e12),
    "H100": Ceilings(bandwidth=3.35e12, bf16=989e12, int8=1979e12),
    "H200": Ceilings(bandwidth=4.8e12, bf16=989e12, int8=1979e12),
}

ARCHITECTURES = {
    80: Architecture(shared_per_block=163 * KIB, shared_per_processor=164 * KIB),
    90: Architecture(shared_per_block=227 * KIB, shared_per_processor=228 * KIB),
    100: Architecture(shared_per_block=227 * KIB, shared_per_processor=228 * KIB, tensor_memory=512),
}


def floor_seconds(case: Case, ceilings: Ceilings) -> float:
    """No kernel for this case can be faster: its bytes at full bandwidth or its operations at full rate."""
    return max(case.bytes / ceilings.bandwidth, case.operations / getattr(ceilings, case.rate))


def occupancy(arch: int, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> float:
    """Resident warps over the most that a multiprocessor holds, as a fraction.

    registers      per thread; a warp's are rounded up to 256 and come from one of four equal register files
    warps          per block
    shared         bytes per block
    tensor_memory  columns per block (sm_100)

    0.0 means that not even one block fits.
    """
    limits = ARCHITECTURES[arch]
    registers_per_warp = -(-registers * 32 // 256) * 256
    resident_warps = 4 * (limits.registers // 4 // max(registers_per_warp, 1)) if registers else limits.warps
    blocks = min(
        limits.blocks,
        min(resident_warps, limits.warps) // warps,
        limits.shared_per_processor // (shared + KIB),
        limits.tensor_memory // tensor_memory if tensor_memory else limits.blocks,
    )
    return blocks * warps / limits.warps
