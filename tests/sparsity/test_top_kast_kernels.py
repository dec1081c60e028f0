"""The Top-KAST kernels as a whole: the sets of the reference exactly, its update in float32, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("sparsity.top_kast")
FEW = settings(max_examples=5)
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(
    st.sampled_from(CONTENTS), st.sampled_from([1, 7, 64, 333]), SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans()
)
def test_kernel_chooses_as_the_reference(dtype, kind, size, seed, first, second, aligned):
    weight = torch.from_numpy(contents(kind, (1, size), seed)).to(dtype)
    forward, backward = sorted(1 + round(share * (size - 1)) for share in (first, second))
    mine = poisoned(weight.to(DEVICE), aligned)
    found = fast.choose_sets(mine, forward, backward, programs=2, tile=64, sample=16)
    expected = oracle("sparsity.top_kast").choose_sets(weight.double().numpy(), forward, backward)
    assert found.dtype == torch.uint8 and torch.equal(mine.cpu(), weight)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(st.sampled_from([1, 7, 64, 65, 130]), SEEDS, st.integers(1, 200), st.booleans(), st.booleans())
def test_kernel_updates_as_the_reference(dtype, size, seed, step, aligned, in_place):
    generator = np.random.default_rng(seed)
    values, gradient, mean, square = (torch.from_numpy(generator.normal(size=size)) for _ in range(4))
    tensors = [values.to(dtype), gradient.to(dtype), values.abs() > 0.5, mean.float(), square.square().float()]
    scalars = step, 0.01, 0.1, 0.25
    expected = oracle("sparsity.top_kast").sparse_update(
        *(tensor.numpy() if tensor.dtype == torch.bool else tensor.double().numpy() for tensor in tensors), *scalars
    )
    mine = [poisoned(tensor.to(DEVICE), aligned) for tensor in tensors]
    out = (mine[0], mine[3], mine[4]) if in_place else None
    found = fast.sparse_update(*mine, *scalars, out=out, tile=64)
    for one, theirs, kind in zip(found, expected, (dtype, torch.float32, torch.float32), strict=True):
        assert one.dtype == kind
        np.testing.assert_allclose(one.double().cpu().numpy(), theirs, **tolerance(kind))
    for which in (1, 2) if in_place else range(5):
        assert torch.equal(mine[which].cpu(), tensors[which])


@pytest.mark.kernel
def test_the_kernels_refuse():
    weight = torch.ones(4, 6, dtype=torch.float16, device=DEVICE)
    for wrong, forward, backward, words in [
        (weight, 0, 5, "got 0 and 5"),
        (weight, 6, 5, "got 6 and 5"),
        (weight, 6, 25, "<= 24 weights"),
        (weight.T, 1, 2, "contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            fast.choose_sets(wrong, forward, backward)
    with pytest.raises(TypeError, match="float64"):
        fast.choose_sets(weight.double(), 1, 2)
    row = torch.ones(4, device=DEVICE)
    good = [row, row, row > 0, row, row, 1, 0.1, 0.1, 0.5]
    for place, wrong, error, words in [
        (1, row[:2], ValueError, "share a shape"),
        (5, 0, ValueError, "step must be at least 1"),
        (8, 0.0, ValueError, r"\(0, 1\]"),
        (1, row.half(), TypeError, "float32"),
        (2, row, TypeError, "bool"),
        (3, row.half(), TypeError, "float32"),
    ]:
        with pytest.raises(error, match=words):
            fast.sparse_update(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(ValueError, match="out must be"):
        fast.sparse_update(*good, out=(row, row[:2], row))


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernels_read_nothing_outside(begins):
    """It comes last, because a kernel that does ends the process."""
    weight = walled(torch.randn(63, device=DEVICE), begins)
    member = fast.choose_sets(weight, 9, 20, programs=4, tile=16, sample=16)
    moment = walled(torch.rand(63, device=DEVICE), begins)
    fast.sparse_update(weight, weight, walled(member == 2, begins), moment, moment, 3, 0.1, 0.1, 0.5, tile=32)
