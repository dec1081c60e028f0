"""Magnitude pruning in the model: masks by scope, schedules in training, `run` and the claim; and what is refused."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import pytest
import torch

from chapters.pruning import magnitude
from chapters.shared.pruned_layers import dropped, nonzero_masks
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, kernel, oracle
from tests.pruning.refused import REFUSED

fast = kernel("pruning.magnitude")
WEIGHTS = 2 * (4 * 12 * 12 + 3 * 12 * 20)
STREAM = torch.arange(300) % 50


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=12, hidden_dim=20, layers=2, heads=2, context=16)).eval()


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("pruning.magnitude"), function)(*REFUSED[function][words])


@pytest.mark.kernel
def test_the_kernels_refuse():
    weight = torch.ones(4, 6, dtype=torch.float16, device=DEVICE)
    for prune, wrong, kept, words in [
        (fast.prune_rows, weight[0], 1, r"\[N, K\]"),
        (fast.prune_rows, weight, 7, "0 to 6, got 7"),
        (fast.prune_rows, weight, -1, "got -1"),
        (fast.prune_rows, weight.new_ones(1, 16385), 1, "at most 16384"),
        (fast.prune_rows, weight.T, 1, "contiguous"),
        (fast.prune_layer, weight, 25, "0 to 24, got 25"),
        (fast.prune_layer, weight, -1, "got -1"),
        (fast.prune_layer, weight.T, 1, "contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune(wrong, kept)
    for prune in (fast.prune_rows, fast.prune_layer):
        with pytest.raises(TypeError, match="float64"):
            prune(weight.double(), 1)


@pytest.mark.kernel
def test_the_kernels_leave_nothing_of_nothing_and_all_of_all():
    empty = torch.empty(0, 6, dtype=torch.float16, device=DEVICE)
    assert fast.prune_rows(empty, 3).shape == (0, 6) and fast.prune_layer(empty, 0).shape == (0, 6)
    odd = torch.tensor([[float("nan"), -0.0, 1.0]], dtype=torch.float16, device=DEVICE)
    for prune in (fast.prune_rows, fast.prune_layer):
        assert torch.equal(prune(odd, 3).view(torch.int16), odd.view(torch.int16))
        assert prune(odd, 1).isnan().tolist() == [[True, False, False]]  # a NaN stays visible


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_every_scope_drops_exactly_its_count(model, sparsity):
    for scope in magnitude.SCOPES:
        pruned = copy.deepcopy(model)
        masks = magnitude.prune_model(pruned, sparsity, scope)
        lost = {name: int((~mask).sum()) for name, mask in masks.items()}
        layers = surgery.linears(pruned)
        assert lost == {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
        if scope == "global":
            assert sum(lost.values()) == dropped(WEIGHTS, sparsity)
        for name, layer in layers.items() if scope == "layer" else ():
            assert lost[name] == dropped(layer.weight.numel(), sparsity)
        for name, layer in layers.items() if scope == "row" else ():
            assert set((~masks[name]).sum(1).tolist()) == {dropped(layer.in_features, sparsity)}


@pytest.mark.parametrize("scope", magnitude.SCOPES)
@pytest.mark.kernel
def test_the_kernel_finds_the_same_masks(model, scope):
    model.to(DEVICE)
    layers = surgery.linears(model)
    chosen = {name: layers[name].weight.detach() for name in list(layers)[:2]}
    found = magnitude.kernel_masks(list(chosen.values()), 0.4, scope)
    if scope == "global":
        expected = magnitude.global_masks([weight.numpy(force=True) for weight in chosen.values()], 0.4)
    else:
        rule = magnitude.layer_mask if scope == "layer" else magnitude.row_mask
        expected = [rule(weight.numpy(force=True), 0.4) for weight in chosen.values()]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.cpu().numpy(), theirs)


def test_what_a_model_cannot_serve_is_refused_by_name(model):
    with pytest.raises(ValueError, match="scope must be one of layer, row, global, got 'block'"):
        magnitude.prune_model(model, 0.5, "block")
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        magnitude.prune_model(model, 1)
    settings = magnitude.training(model, STREAM, 4, 0)
    with pytest.raises(ValueError, match="ends at step 5, training at 4"):
        magnitude.prune_in_training(model, STREAM, settings, {5: 0.5})
    model.blocks[1].attention.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.attention.v_proj.weight must be finite"):
        magnitude.prune_model(model, 0.5)


@pytest.mark.parametrize("name", magnitude.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 300])
def test_schedules_rise_to_the_sparsity_before_training_ends(name, steps):
    schedule = magnitude.SCHEDULES[name](0.9, steps)
    assert [*schedule] == sorted(schedule) and 0 <= min(schedule) and max(schedule) <= max(1, 0.7 * steps)
    values = list(schedule.values())
    assert values == sorted(values) and values[-1] == pytest.approx(0.9, abs=1e-12)


def test_training_drops_by_schedule_and_never_takes_a_weight_back(model):
    counts, masks = [], []

    def seen(sparsity: float, steps: int) -> dict[int, float]:
        return {0: 0.2, 2: 0.5, 3: sparsity}

    found = magnitude.find_masks

    def record(model: Transformer, sparsity: float, scope: str) -> dict[str, torch.Tensor]:
        masks.append(found(model, sparsity, scope))
        counts.append(sum(int((~mask).sum()) for mask in masks[-1].values()))
        return dict(masks[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitude, "find_masks", record)
        settings = magnitude.training(model, STREAM, 5, 0)
        last = magnitude.prune_in_training(model, STREAM, settings, seen(0.8, 5), "global")
    assert counts == [dropped(WEIGHTS, share) for share in (0.2, 0.5, 0.8)]
    for name, mask in nonzero_masks(model).items():
        assert torch.equal(mask, last[name])
        assert all((masks[i][name] | ~masks[i + 1][name]).all() for i in range(2))


@pytest.mark.parametrize(
    "extra", [[], ["--scope", "row"], ["--steps", "3"], ["--steps", "3", "--schedule", "one-shot"]]
)
def test_run_prunes_and_counts(model, extra):
    parser = argparse.ArgumentParser()
    magnitude.options(parser)
    args = parser.parse_args(["--sparsity", "0.25", *extra])
    args.seed = 0
    report = magnitude.apply(model, STREAM.view(-1, 12), args)
    kept = sum(int((layer.weight != 0).sum()) for layer in surgery.linears(model).values())
    assert report["kept weights"] == f"{kept} of {WEIGHTS}" and kept == 0.75 * WEIGHTS
    bytes_of_a_row = {12: 2, 20: 3}
    bitmaps = sum(
        8 * layer.out_features * bytes_of_a_row[layer.in_features] for layer in surgery.linears(model).values()
    )
    assert report["bits per weight"] == pytest.approx(32 * 0.75 + bitmaps / WEIGHTS)


@pytest.mark.parametrize("wrong", [["--sparsity", "1"], ["--steps", "-1"]])
def test_run_refuses_before_it_trains(model, wrong):
    parser = argparse.ArgumentParser()
    magnitude.options(parser)
    with pytest.raises(ValueError, match=wrong[0].strip("-")):
        magnitude.apply(model, STREAM.view(-1, 12), parser.parse_args(wrong))


class Bench:
    """As much of a lab as the claim asks for; `costs` are the perplexities that it measures, one after another."""

    full, seeds, base_perplexity, train_stream = False, (0, 1), 10.0, STREAM

    def __init__(self, model: Transformer, costs: list[float]) -> None:
        self.pattern, self.costs, self.zeros = model, iter(costs), []

    def model(self) -> Transformer:
        return copy.deepcopy(self.pattern)

    def perplexity(self, model: Transformer) -> float:
        layers = surgery.linears(model).values()
        self.zeros.append(sum(int((layer.weight == 0).sum()) for layer in layers) / WEIGHTS)
        return next(self.costs)


@pytest.mark.parametrize(("slowly", "holds"), [([30, 39], True), ([30, 41], False), ([40, 40], False)])
def test_the_claim_holds_only_if_every_seed_shows_it(model, slowly, holds, monkeypatch):
    def untrained(model, stream, settings, schedule):
        return magnitude.prune_model(model, schedule[max(schedule)])

    monkeypatch.setattr(magnitude, "prune_in_training", untrained)
    bench = Bench(model, [12, 15, 11, 16, 40, 40, *slowly])
    claim = magnitude.claim(bench)
    np.testing.assert_allclose(bench.zeros, [0.3, 0.5] * 2 + [0.9] * 4, atol=2e-3)
    assert claim.holds is holds and "better at 30%." in claim.sentence and "at once" in claim.sentence
    assert claim.numbers["seeds where gradual is better, 90%"] == sum(value < 40 for value in slowly)
