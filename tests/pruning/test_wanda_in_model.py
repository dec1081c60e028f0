"""Wanda in the model, `run` and the claim; the kernels as a whole, bit for bit what the reference leaves."""

from __future__ import annotations

import argparse
import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chapters.pruning import wanda
from chapters.shared.pruned_layers import dropped
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned
from tests.fences import walled
from tests.pruning.launched import assert_same_bits
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("pruning.wanda")
KINDS = st.sampled_from(CONTENTS)
FEW = settings(max_examples=8)
TOKENS = torch.arange(120).view(10, 12) % 50
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=16, hidden_dim=24, layers=2, heads=2, context=16)).eval()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_every_row_of_every_layer_loses_its_count(model, sparsity):
    masks = wanda.prune_model(model, TOKENS, partial(wanda.find_mask, sparsity=sparsity))
    for name, layer in surgery.linears(model).items():
        assert set((~masks[name]).sum(1).tolist()) == {dropped(layer.in_features, sparsity)}
        assert torch.equal(layer.weight != 0, masks[name])


def test_planted_channels_do_not_change_what_stays(model):
    planted = copy.deepcopy(model)
    surgery.plant_outliers(planted, 3, 16.0)
    for pattern in (None, (2, 4)):
        choose = partial(wanda.find_mask, sparsity=0.5, pattern=pattern)
        plain = wanda.prune_model(copy.deepcopy(model), TOKENS, choose)
        found = wanda.prune_model(copy.deepcopy(planted), TOKENS, choose)
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_what_cannot_be_served_is_refused_by_name(model):
    with pytest.raises(ValueError, match="no pattern such as 2:4"):
        wanda.find_mask(torch.ones(2, 4), torch.ones(4), 0.5, (2, 4), variant=True)
    with pytest.raises(ValueError, match="not divisible by m=5"):
        wanda.prune_model(model, TOKENS, partial(wanda.find_mask, sparsity=0.5, pattern=(2, 5)))
    model.blocks[1].attention.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.attention.v_proj: the weight and what reaches it"):
        wanda.prune_model(model, TOKENS, partial(wanda.find_mask, sparsity=0.5))


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    wanda.options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [["--sparsity", "0.25"], ["--pattern", "3:4"], ["--sparsity", "0.25", "--variant"]])
def test_run_prunes_and_counts(model, words):
    report = wanda.apply(model, TOKENS, asked(*words))
    kept = sum(int((layer.weight != 0).sum()) for layer in surgery.linears(model).values())
    assert report["kept weights"] == f"{kept} of {WEIGHTS}"
    assert kept == 0.75 * WEIGHTS or ("--variant" in words and abs(kept / WEIGHTS - 0.75) < 0.01)
    assert report["bits per weight"] == pytest.approx(32 * kept / WEIGHTS + 1)


@pytest.mark.parametrize("words", [["--sparsity", "1"], ["--sparsity", "nan", "--variant"]])
def test_run_refuses(model, words):
    with pytest.raises(ValueError, match="sparsity"):
        wanda.apply(model, TOKENS, asked(*words))


class Bench:
    """As much of a lab as the claim asks for; Wanda's perplexities come from `costs`, all others are 40."""

    full, seeds, base_perplexity = False, (0, 1), 10.0

    def __init__(self, model: Transformer, costs: list[float]) -> None:
        self.pattern, self.config, self.costs, self.zeros = model, model.config, iter(costs), []

    def model(self) -> Transformer:
        return copy.deepcopy(self.pattern)

    def calibration(self, seed: int, count: int) -> Tensor:
        self.asked = True
        return (TOKENS + seed) % 50

    def perplexity(self, model: Transformer) -> float:
        layers = surgery.linears(model).values()
        self.zeros.append(sum(int((layer.weight == 0).sum()) for layer in layers) / WEIGHTS)
        by_wanda, self.asked = getattr(self, "asked", False), False
        return next(self.costs) if by_wanda else 40.0


@pytest.mark.parametrize(
    ("costs", "holds"),
    [([39, 38, 39, 38], True), ([39, 41, 39, 38], False), ([39, 38, 39, 40], False), ([40, 40, 40, 40], False)],
)
def test_the_claim_holds_only_if_every_seed_shows_it(model, costs, holds):
    bench = Bench(model, [*costs, 99, 99, 99, 99])  # with planted channels it need not be better
    claim = wanda.claim(bench)
    np.testing.assert_allclose(bench.zeros, 0.5, atol=1e-3)
    assert claim.holds is holds and ("do not always" in claim.sentence) is not holds
    assert claim.numbers["seeds where Wanda is better, 50%, base model"] == sum(cost < 40 for cost in costs[:2])
    assert claim.numbers["seeds where Wanda is better, 2:4, planted outliers"] == 0


# --- the kernels as a whole -------------------------------------------------------------------------------------------


def drawn_norms(columns: int, seed: int) -> Tensor:
    """Float32 norms, some equal and some 0."""
    generator = np.random.default_rng(seed)
    norms = generator.exponential(size=columns) * 4.0 ** generator.integers(-3, 4, columns)
    return torch.from_numpy(np.where(generator.random(columns) < 0.3, generator.integers(0, 3), norms)).float()


def assert_pruned(name: str, weight: Tensor, norms: Tensor, *count: int, aligned: bool = True, **sizes: int) -> None:
    """The kernel leaves of `weight` what the reference does, bit for bit, and both operands as they were."""
    mine = poisoned(weight.to(DEVICE), aligned), poisoned(norms.to(DEVICE), aligned)
    found = getattr(fast, name)(*mine, *count, **sizes)
    wide = weight.float().numpy()  # exact, also of bfloat16, which NumPy lacks; products stay float32
    assert_same_bits(found, getattr(oracle("pruning.wanda"), name)(wide, norms.numpy(), *count))
    assert_same_bits(mine[0], weight)
    assert_same_bits(mine[1], norms)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(KINDS, st.integers(1, 5), st.sampled_from([1, 7, 16, 33]), st.floats(0, 1), SEEDS, st.booleans())
def test_kernel_prunes_rows_like_the_reference(dtype, kind, rows, columns, share, seed, aligned):
    weight = torch.from_numpy(contents(kind, (rows, columns), seed)).to(dtype)
    norms = drawn_norms(columns, seed)
    assert_pruned("prune_rows", weight, norms, round(share * columns), aligned=aligned, rows=2)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(KINDS, st.sampled_from([2, 4, 8]), st.integers(1, 8), st.integers(1, 9), st.integers(1, 5), SEEDS, st.booleans())
def test_kernel_prunes_groups_like_the_reference(dtype, kind, m, n, rows, groups, seed, aligned):
    weight = torch.from_numpy(contents(kind, (rows, groups * m), seed)).to(dtype)
    norms = drawn_norms(groups * m, seed)
    assert_pruned("prune_groups", weight, norms, min(n, m), m, aligned=aligned, rows=2, columns=16, steps=2)


@pytest.mark.kernel
@pytest.mark.parametrize("value", [-1.5, 0.0])
def test_kernel_keeps_the_first_of_equals_and_what_is_nan(value):
    weight = torch.full((2, 40), value, dtype=torch.float16)
    weight[1, 39] = float("nan")
    norms = torch.ones(40)
    rows = fast.prune_rows(weight.to(DEVICE), norms.to(DEVICE), 20)
    assert_same_bits(rows[0], torch.tensor([value] * 20 + [0.0] * 20))
    assert rows[1, 39].isnan()
    groups = fast.prune_groups(weight.to(DEVICE), norms.to(DEVICE), 1, 4)
    assert_same_bits(groups[0], torch.tensor([value, 0.0, 0.0, 0.0] * 10))
    assert groups[1, 39].isnan() and groups[1, 36] == 0


@pytest.mark.kernel
def test_torch_peers_do_the_same():
    weight, norms = torch.from_numpy(contents("normal", (4, 16), 0)).float(), drawn_norms(16, 1) + 1
    for found in (fast.torch_rows(weight, norms, 5), fast.by_topk(weight, norms, 5)):
        assert_same_bits(found, oracle("pruning.wanda").prune_rows(weight.numpy(), norms.numpy(), 5))
    for found in (fast.torch_groups(weight, norms, 2, 4), fast.groups_by_topk(weight, norms, 2, 4)):
        assert_same_bits(found, oracle("pruning.wanda").prune_groups(weight.numpy(), norms.numpy(), 2, 4))


@pytest.mark.kernel
def test_the_kernels_refuse():
    weight, norms = torch.ones(4, 12, dtype=torch.float16, device=DEVICE), torch.ones(12, device=DEVICE)
    for prune, arguments, words in [
        (fast.prune_rows, (weight[0], norms, 1), r"\[N, K\]"),
        (fast.prune_rows, (weight, norms[1:], 1), r"norms must be \[K\] = \[12\]"),
        (fast.prune_rows, (weight, norms, 13), "0 to 12, got 13"),
        (fast.prune_rows, (weight, norms, -1), "got -1"),
        (fast.prune_rows, (weight.new_ones(1, 16385), norms.new_ones(16385), 1), "at most 16384"),
        (fast.prune_rows, (weight.T, norms[:4].contiguous(), 1), "contiguous"),
        (fast.prune_groups, (weight, norms, 2, 3), r"\(2, 4, 8\), got 3"),
        (fast.prune_groups, (weight, norms, 5, 4), "n=5, m=4"),
        (fast.prune_groups, (weight, norms, 0, 4), "n=0, m=4"),
        (fast.prune_groups, (weight, norms, 4, 8), "12 columns, not divisible by m=8"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune(*arguments)
    for wrong, words in (((weight.double(), norms), "weight.*float64"), ((weight, norms.half()), "norms.*float16")):
        with pytest.raises(TypeError, match=words):
            fast.prune_rows(*wrong, 1)
    assert fast.prune_rows(weight[:0], norms, 3).shape == (0, 12)
    assert fast.prune_groups(weight[:0], norms).shape == (0, 12)


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", ["prune_rows", "prune_groups"])
def test_kernel_reads_nothing_outside(name, begins):
    """It comes last, because a kernel that does ends the process."""
    weight = walled(torch.randn(3, 20, dtype=torch.float16, device=DEVICE), begins)
    norms = walled(torch.ones(20, device=DEVICE), begins)
    sizes = {"rows": 2} if name == "prune_rows" else {"rows": 2, "columns": 16, "steps": 1}
    getattr(fast, name)(weight, norms, 2, *([4] if name == "prune_groups" else []), **sizes)
