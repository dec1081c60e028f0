"""Small codebook products: random ones of any shape, and one that a reader follows by eye."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from chapters.shared.bit_fields import pack
from tests.conftest import DEVICE, oracle

TOKENS = st.integers(1, 4)


@dataclass(frozen=True)
class Product:
    """A weight in the form that the product takes, every array in float64 or whole numbers, and its plain values."""

    x: np.ndarray
    packed: np.ndarray
    centroids: np.ndarray
    start: np.ndarray
    column: np.ndarray
    extra: np.ndarray
    codes: np.ndarray

    def rounded(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The arguments as tensors, floating ones in dtype."""
        parts = [torch.from_numpy(getattr(self, name)).to(DEVICE) for name in PARTS]
        return [part.to(dtype) if part.is_floating_point() else part for part in parts]


PARTS = ("x", "packed", "centroids", "start", "column", "extra")


@st.composite
def products(draw, tokens: st.SearchStrategy[int] = TOKENS, most: int = 20) -> Product:
    """Small products of any shape; rows have none, a few or more outliers than a block of the kernel takes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.sampled_from([1, 2, 4, 7, 9, 17])), draw(st.sampled_from([1, 3, 32, 33, 64, 97]))
    bits = draw(st.integers(1, 4))
    codes = rng.integers(0, 2**bits, (rows, columns))
    counts = np.minimum(rng.choice([0, 0, 1, 3, most], rows), columns)
    columns_of = [np.sort(rng.choice(columns, count, replace=False)) for count in counts]
    return Product(
        x=rng.normal(size=(draw(tokens), columns)),
        packed=pack(codes, bits),
        centroids=np.sort(rng.normal(size=2**bits)),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        column=np.concatenate(columns_of).astype(np.int16),
        extra=rng.normal(0, 4, counts.sum()),
        codes=codes,
    )


def arguments(**changed) -> dict[str, torch.Tensor]:
    """Six rows of 64 columns, 3 bits, two outliers."""
    given_ = {
        "x": torch.ones(1, 64),
        "packed": torch.zeros(2, 3, 2, 4, dtype=torch.int32),
        "centroids": torch.arange(8.0),
        "start": torch.tensor([0, 0, 1, 1, 1, 1, 2], dtype=torch.int32),
        "column": torch.tensor([3, 63], dtype=torch.int16),
        "extra": torch.tensor([1.0, -2.0]),
    }
    return given_ | changed


def expected_of(product: Product, held: list[torch.Tensor]) -> tuple[np.ndarray, float]:
    """What the book's reference makes of the arguments that the kernel was given, and the largest term summed."""
    parts = [part.double().cpu().numpy() if part.is_floating_point() else part.cpu().numpy() for part in held]
    largest = np.abs(parts[0]).max() * max(np.abs(parts[2]).max(), np.abs(parts[5]).max(initial=0))
    return oracle("quantization.gobo").codebook_matmul(*parts), largest
