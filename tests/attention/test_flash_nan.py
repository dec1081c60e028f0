"""A NaN that a query meets must show in its out and its lse: neither may turn into a number."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import DEVICE, kernel

fast = kernel("attention.flash")


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_nan_shows_wherever_a_query_meets_it(name, causal):
    generator = torch.Generator().manual_seed(0)
    tensors = {x: torch.randn(1, 1, 40, 16, generator=generator).to(DEVICE) for x in "qkv"}
    tensors[name][0, 0, 20, 3] = torch.nan
    out, lse = fast.flash_attention(**tensors, causal=causal, block_q=16, block_k=16)
    query = torch.arange(40, device=DEVICE)
    met = query == 20 if name == "q" else query >= (20 if causal else 0)
    assert torch.equal(lse[0, 0].isnan(), met)
    assert out[0, 0, met].isnan().all()
    assert out[0, 0, ~met].isfinite().all()
