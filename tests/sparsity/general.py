"""N:M weights of any N and M by the tests' own means: positions drawn, packed by the format's own code."""

from __future__ import annotations

import numpy as np
import torch

from chapters.shared.bit_fields import pack
from tests.conftest import DEVICE, poisoned
from tests.sparsity.drawn import contents

PATTERNS = [(1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (3, 4), (5, 7), (4, 4), (2, 16)]
FAST = [(n, m) for n, m in PATTERNS if n in (1, 2, 4, 8) and m in (2, 4, 8, 16)]  # what the kernels take


def stored_n_m(kind: str, n: int, m: int, rows: int, groups: int, seed: int) -> tuple[np.ndarray, ...]:
    """(values, packed, dense weight, mask) of a weight `[rows, groups · m]`, positions ascending, none of it zero."""
    values = contents(kind, (rows, groups * n), seed)
    values[values == 0] = 1
    generator = np.random.default_rng(seed)
    index = np.sort(generator.random((rows, groups, m)).argsort(axis=-1)[..., :n], axis=-1)
    columns = (m * np.arange(groups)[:, None] + index).reshape(values.shape)
    dense, mask = np.zeros((rows, groups * m)), np.zeros((rows, groups * m), dtype=bool)
    np.put_along_axis(dense, columns, values, axis=1)
    np.put_along_axis(mask, columns, True, axis=1)
    return values, pack(index.reshape(values.shape), (m - 1).bit_length()), dense, mask


def products_n_m(tokens: int, n: int, m: int, rows: int, groups: int, seed: int, aligned: bool) -> tuple:
    """(x, values, packed) for the kernel and the float64 product of the same numbers."""
    values, packed, dense, _ = stored_n_m("normal", n, m, rows, groups, seed)
    x = contents("normal", (tokens, groups * m), seed + 1)
    operands = (torch.from_numpy(x).half(), torch.from_numpy(values).half(), torch.from_numpy(packed))
    return [poisoned(operand.to(DEVICE), aligned) for operand in operands], x @ dense.T


def thinned(dtype: type, n: int, m: int, rows: int, groups: int, seed: int) -> tuple[np.ndarray, ...]:
    """(weight of `dtype` with n of m or fewer non-zeros, its values, its packed positions), group by group."""
    _, _, dense, mask = stored_n_m("normal", n, m, rows, groups, seed)
    stays = mask & (np.random.default_rng(seed).random(mask.shape) < 0.5)
    weight = np.where(stays, 3 * np.sign(dense), 0).astype(dtype)
    order = [sorted(range(m), key=lambda place: (group[place] == 0, place))[:n] for group in weight.reshape(-1, m)]
    index = np.sort(order, axis=1)
    values = np.take_along_axis(weight.reshape(-1, m), index, axis=1).reshape(rows, -1)
    return weight, values, pack(index.reshape(values.shape), (m - 1).bit_length())
