"""Wanda's published masks: the weights that they were made from are not kept, what they have in common is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from chapters.pruning import wanda
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import golden

PUBLISHED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def zeros(case: str, layer: int, name: str) -> np.ndarray:
    return np.unpackbits(golden("sparse/wanda")[f"{case}__zero__{layer}.{name}"], axis=1).astype(bool)


def within(fewer: np.ndarray, more: np.ndarray) -> bool:
    return bool((~fewer | more).all())


@pytest.mark.parametrize(("case", "sparsity"), [("wanda_u50", 0.5), ("wanda_u60", 0.6)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_counts(case, sparsity, name):
    for layer in range(2):
        lost = zeros(case, layer, name)
        weight, norms = np.random.default_rng(layer).normal(size=lost.shape), np.ones(lost.shape[1])
        mine = ~wanda.find_mask(torch.from_numpy(weight), torch.from_numpy(norms), sparsity).numpy()
        np.testing.assert_array_equal(mine.sum(axis=1), lost.sum(axis=1))


@pytest.mark.parametrize(("case", "m"), [("wanda_2of4", 4), ("wanda_4of8", 8)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_groups(case, m, name):
    for layer in range(2):
        lost = zeros(case, layer, name)
        weight, norms = np.random.default_rng(layer).normal(size=lost.shape), np.ones(lost.shape[1])
        mine = ~wanda.find_mask(torch.from_numpy(weight), torch.from_numpy(norms), 0, (m // 2, m)).numpy()
        np.testing.assert_array_equal(mine.reshape(-1, m).sum(axis=1), lost.reshape(-1, m).sum(axis=1))


def test_golden_order_of_pruning():
    """Of equal inputs 60% holds all that 50% drops. So it is in the first block, in all of its layers; then no more."""
    nested = [within(zeros("wanda_u50", b, name), zeros("wanda_u60", b, name)) for b in (0, 1) for name in PUBLISHED]
    assert all(nested[:4]) and not all(nested[4:])
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=50, dim=16, hidden_dim=24, layers=3, heads=2, context=16)).eval()
    tokens, lost = torch.randint(50, (11, 12)), []
    for sparsity in (0.5, 0.6):
        masks = wanda.prune_model(
            copy.deepcopy(model), tokens, lambda *given, s=sparsity: wanda.find_mask(*given, sparsity=s)
        )
        lost.append({name: ~mask.numpy() for name, mask in masks.items()})
    mine = {name: within(lost[0][name], lost[1][name]) for name in lost[0]}
    first = [value for name, value in mine.items() if name.startswith("blocks.0.")]
    assert all(first) and len(first) == 7 and not all(mine.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_variant(name):
    """It too takes the lowest scores of a row, so in the first block each row holds the other or lies in it."""
    plain, variant = zeros("wanda_u50", 0, name), zeros("wanda_variant_u50", 0, name)
    assert abs(variant.mean() - 0.5) <= wanda.NEAR and np.ptp(variant.sum(axis=1)) > 0
    assert all(within(a, b) or within(b, a) for a, b in zip(plain, variant, strict=True))
    score = np.random.default_rng(0).exponential(size=variant.shape)
    mine = ~wanda.variant_mask(score, 0.5)
    assert abs(mine.mean() - 0.5) <= wanda.NEAR and np.ptp(mine.sum(axis=1)) > 0
