"""What the tests launch the kernels with: drawn products, sums that float32 takes exactly, every special number."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from tests.conftest import DEVICE, oracle, poisoned, tolerance
from tests.sparsity.compressed import PAIRS
from tests.sparsity.drawn import contents, first_largest, pruned

# both zeros, the least subnormal, -1, two large ones, infinity, NaN; in bfloat16 0x7C01 is finite, in float16 NaN
SPECIAL_BITS = {
    torch.float16: (0x0000, 0x8000, 0x0001, 0xBC00, 0x7BFE, 0xFBFF, 0x7C00, 0xFE00),
    torch.bfloat16: (0x0000, 0x8000, 0x0001, 0xBF80, 0x7C01, 0xFF7F, 0x7F80, 0xFFC0),
}
# dtype, unit of the operands, the largest in units, metadata words: every sum fits float32; of the second line's,
# which pass float16's 65504, bfloat16 holds each
EXACT_SUMS = [(torch.float16, 1 / 64, 127, 64), (torch.bfloat16, 128, 3, 3)]


def products(tokens: int, rows: int, words: int, seed: int, aligned: bool, kind: str) -> tuple:
    """(x, values, metadata) for the kernel and the float64 product of the same numbers."""
    book = oracle("sparsity.n_m")
    x = torch.from_numpy(contents("normal", (tokens, 16 * words), seed)).half()
    values, metadata = book.compress(pruned(contents(kind, (rows, 16 * words), seed + 1)))
    expected = book.sparse_matmul(x.double().numpy(), values, metadata)
    operands = (x, torch.from_numpy(values).half(), torch.from_numpy(metadata))
    return [poisoned(operand.to(DEVICE), aligned) for operand in operands], expected


def assert_close(y: torch.Tensor, expected: np.ndarray) -> None:
    """Sums are taken in float32, so only the inputs' products and one rounding to float16 can differ."""
    assert y.dtype == torch.float16
    scale = float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(y.double().cpu().numpy(), expected, **tolerance(torch.float16, scale=scale / 10 + 1e-6))


def special_groups(dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Every group of four special numbers: the weight [64, 256], the bits of its values, its metadata."""
    groups = list(itertools.product(SPECIAL_BITS[dtype], repeat=4))
    index = np.array([places_of_two([bits & 0x7FFF for bits in group]) for group in groups])
    bits = np.array(groups, dtype=np.uint16).view(np.int16)
    values = np.take_along_axis(bits, index, axis=1).reshape(64, -1)
    return torch.from_numpy(bits.reshape(64, -1)).view(dtype), values, words_of(index.reshape(64, -1, 2))


def places_of_two(magnitudes: list[int]) -> list[int]:
    """Ascending: the two largest that are not zero; what is missing takes the first free of 2 and 3."""
    chosen = [place for place in first_largest(np.array(magnitudes), 2) if magnitudes[place]]
    spare = [place for place in (2, 3) if place not in chosen]
    return sorted(chosen + spare[: 2 - len(chosen)])


def words_of(index: np.ndarray) -> np.ndarray:
    """Positions [rows, groups, 2] as int16 metadata [rows, groups / 4]."""
    return ((index @ [1, 4]).reshape(len(index), -1, 4) @ [1, 16, 256, 4096]).astype(np.int16)


def exact_products(dtype: torch.dtype, unit: float, largest: int, words: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """(x, values, metadata) of 16 rows, whole numbers of `unit`, and their product, rounded once to `dtype`."""
    generator = np.random.default_rng(0)
    x, values = (generator.integers(-largest, largest + 1, size) for size in ((1, 16 * words), (16, 8 * words)))
    index = PAIRS[generator.integers(len(PAIRS), size=(16, 4 * words))]
    columns = (4 * np.arange(4 * words)[:, None] + index).reshape(values.shape)
    exact = (x[0][columns] * values).sum(axis=1)[None] * unit**2
    operands = [torch.from_numpy(number * unit).to(DEVICE, dtype) for number in (x, values)]
    metadata = torch.from_numpy(words_of(index)).to(DEVICE)
    return [*operands, metadata], torch.from_numpy(exact).to(dtype).double().numpy()
