"""Rewinding in the model: the masked optimizer, what each method starts from, kills, `run`, the claim, refusals."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chapters.pruning import rewinding
from chapters.shared import retraining
from chapters.shared.pruned_layers import dropped, nonzero_masks
from chapters.shared.retraining import MaskedAdamW, Plan, Stages, copied, train_first
from minitfm import checkpoint, train
from minitfm.checkpoint import CheckpointError
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, kernel, oracle, tolerance
from tests.pruning.steps import REFUSED, drawn_step, packed

fast = kernel("pruning.rewinding")
WEIGHTS = 2 * (4 * 12 * 12 + 3 * 12 * 20)
STREAM = torch.arange(300) * 7 % 50
PLAN = Plan(steps=5, replayed=2, batch=2, length=8)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=12, hidden_dim=20, layers=2, heads=2, context=16)).eval()


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    error, arguments, how = REFUSED[function][words]
    with pytest.raises(error, match=words):
        getattr(oracle("pruning.rewinding"), function)(*arguments, **how)


@pytest.mark.kernel
def test_the_kernel_refuses():
    ones = [torch.ones(4, 6, device=DEVICE) for _ in range(4)]
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)

    def step(place: int | None = None, wrong: object = None, **how: object) -> None:
        arguments = [ones[0], ones[1], mask, *ones[2:]]
        if place is not None:
            arguments[place] = wrong
        fast.masked_adamw(*arguments, how.pop("step", 1), 0.1, **how)

    for place, wrong, words in [
        (1, ones[0][:3], r"gradient must be shaped like weight, \(4, 6\), got \(3, 6\)"),
        (4, ones[0][0], "square must be shaped"),
        (2, mask[0], r"mask must be bool \(4, 6\) or uint8 \(3,\), got torch.bool \(6,\)"),
        (2, packed(mask)[:2], r"got torch.uint8 \(2,\)"),
        (3, torch.ones(6, 4, device=DEVICE).T, "mean must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            step(place, wrong)
    for place, wrong in ((0, ones[0].double()), (1, ones[0].half()), (2, ones[0]), (3, ones[0].half())):
        with pytest.raises(TypeError, match=r"float64|float16|float32"):
            step(place, wrong)
    for how in ({"step": 0}, {"eps": 0.0}, {"betas": (0.9, 1.0)}, {"weight_decay": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(how))}="):
            step(**how)
    with pytest.raises(ValueError, match="its mean is not"):
        step(out=(ones[0], ones[1][:2], ones[2]))


@pytest.mark.kernel
def test_bits_of_a_mask_are_numpys_and_come_back():
    for size in (1, 8, 13):
        mask = torch.arange(size, device=DEVICE) % 3 == 0
        assert fast.pack_bits(mask).tolist() == packed(mask).tolist()
        assert torch.equal(fast.unpack_bits(fast.pack_bits(mask), mask.shape), mask)
    nothing = torch.empty(0, device=DEVICE)
    assert fast.masked_adamw(nothing, nothing, nothing.bool(), nothing, nothing, 1, 0.1)[0].shape == (0,)


@pytest.mark.kernel
def test_the_cases_peers_do_what_the_kernel_does():
    weight, gradient, mask, mean, square = (torch.from_numpy(x).to(DEVICE) for x in drawn_step((3, 8), 0, "float16"))
    kept = [x.float().where(mask, 0) for x in (weight, mean, square)]
    operands = (kept[0], gradient.float(), packed(mask), *kept[1:])
    found = fast.step_of_case(*operands)
    for peer in (fast.expected(*operands), fast.by_torch(*fast.copies(*operands), foreach=True)):
        for mine, theirs in zip(found, peer, strict=True):
            np.testing.assert_allclose(mine.cpu(), theirs.cpu(), **tolerance(np.float32))


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_masked_parameters_step_masked_and_the_others_as_in_torch():
    torch.manual_seed(0)
    start, mask = torch.randn(2, 5, 7), torch.rand(5, 7) < 0.4
    mine, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    how = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
    masked = MaskedAdamW([{"params": mine, **how}], {mine[0]: mask})
    plain = torch.optim.AdamW(theirs, foreach=False, **how)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(5, 7)
            b.grad = a.grad.clone()
        theirs[0].grad[~mask] = 0
        mine[0].grad[~mask] = float("nan")
        masked.step()
        plain.step()
        assert not mine[0].detach()[~mask].any()
        assert torch.equal(mine[1], theirs[1])
        np.testing.assert_allclose(mine[0].detach()[mask], theirs[0].detach()[mask], **tolerance(np.float32))
    assert not masked.state[mine[0]]["exp_avg"][~mask].any()
    assert masked.state[mine[0]].keys() == plain.state[theirs[0]].keys()


def test_the_step_in_place_is_the_reference():
    arrays = drawn_step((5, 7), 3)
    how = (4, 0.1, (0.9, 0.95), 1e-8, 0.1)
    weight, gradient, mask, mean, square = (torch.from_numpy(x) for x in arrays)
    tensors = [x.float() for x in (weight, gradient, mean, square)]
    retraining.step_in_place(*tensors[:2], mask, *tensors[2:], *how)
    for found, expected in zip((tensors[0], *tensors[2:]), rewinding.masked_adamw(*arrays, *how), strict=True):
        np.testing.assert_allclose(found, expected, **tolerance(np.float32))


# --- methods --------------------------------------------------------------------------------------------------------


def test_the_first_run_keeps_the_weights_that_methods_need(model):
    plain = copy.deepcopy(model)
    start = copied(model)
    weights = train_first(model, STREAM, PLAN, Stages())
    seen = {}
    train.train(plain, STREAM, PLAN.first(), after_step=lambda step, model: seen.update({step + 1: copied(model)}))
    assert [*weights] == [0, 3, 5]
    for step, expected in ((0, start), (3, seen[3]), (5, seen[5])):
        assert all(torch.equal(weights[step][name], value) for name, value in expected.items())
    assert all(torch.equal(value, weights[5][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("method", "start", "steps"), [("lottery", 0, 5), ("weight", 3, 2), ("lr", 5, 2),
                                                        ("fine-tuning", 5, 2)])  # fmt: skip
def test_each_method_retrains_the_largest_weights_from_where_it_starts(model, method, start, steps, monkeypatch):
    weights = train_first(model, STREAM, PLAN, Stages())
    begun, plain = [], train.train

    def watched(model: Transformer, stream: torch.Tensor, settings: train.Settings, **others: object) -> None:
        begun.append((copied(model), [settings.rate(step) for step in range(settings.steps)]))
        plain(model, stream, settings, **others)

    monkeypatch.setattr(rewinding.train, "train", watched)
    masks = rewinding.prune_and_retrain(model, weights, method, [900, 400], STREAM, PLAN, Stages())
    final = [weights[5][f"{name}.weight"].numpy() for name in masks]
    first = dict(zip(masks, rewinding.next_masks(final, [np.ones(w.shape, bool) for w in final], 900), strict=True))
    whole = [PLAN.first().rate(step) for step in range(5)]
    for number, (at_first, rates) in enumerate(begun):
        expected = [0.01] * 2 if method == "fine-tuning" else whole[5 - steps :]
        np.testing.assert_allclose(rates, expected, rtol=1e-12)
        for name in masks if number == 0 or start < 5 else ():
            mask = torch.from_numpy(first[name]) if number == 0 else masks[name]
            expected = weights[start][f"{name}.weight"] * mask
            assert torch.equal(at_first[f"{name}.weight"], expected)
    assert sum(int(mask.sum()) for mask in masks.values()) == 400
    for name, mask in nonzero_masks(model).items():
        assert not (mask & ~masks[name]).any() and not (masks[name] & ~torch.from_numpy(first[name])).any()


def experiment(model: Transformer, folder: Path | None, method: str) -> dict[str, torch.Tensor]:
    stages = Stages(folder, "the same")
    weights = train_first(model, STREAM, PLAN, stages)
    rewinding.prune_and_retrain(model, weights, method, [900, 400], STREAM, PLAN, stages)
    return copied(model)


def killed_after(steps: int) -> Callable:
    """`random_batch` that is asked so many times, then Ctrl-C."""
    draw, left = train.random_batch, iter(range(steps))

    def drawn(*arguments: object, **how: object) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(*arguments, **how)

    return drawn


@pytest.mark.parametrize("method", ["weight", "lr"])
def test_a_killed_experiment_goes_on_bit_for_bit(model, method, tmp_path, monkeypatch):
    monkeypatch.setattr(retraining, "SAVE_EVERY", 2)
    expected = experiment(copy.deepcopy(model), None, method)
    for steps in (3, 1, 2, 1, 1, 1):  # of the first run all 5, then 2 of each round
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "random_batch", killed_after(steps))
            experiment(copy.deepcopy(model), tmp_path, method)
    found = experiment(copy.deepcopy(model), tmp_path, method)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with monkeypatch.context() as patch:
        patch.setattr(train, "random_batch", killed_after(0))  # nothing is trained twice
        again = experiment(copy.deepcopy(model), tmp_path, method)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_folder_of_another_experiment_and_a_damaged_stage_are_refused(tmp_path):
    stages = Stages(tmp_path, "one")
    assert not stages.has("a") and stages.once("a", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    assert stages.has("a") and Stages(tmp_path, "one").once("a", dict)["x"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"belongs to another experiment, see experiment\.txt"):
        Stages(tmp_path, "two")
    (tmp_path / "a.pt").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
        Stages(tmp_path, "one").once("a", dict)


def test_plans_and_replays_that_make_no_sense_are_refused():
    for replayed in (0, 6):
        with pytest.raises(ValueError, match=f"from 1 to 5 steps, got {replayed}"):
            replace(PLAN, replayed=replayed)
    with pytest.raises(ValueError, match="a rate for each of 3 steps, got 2"):
        retraining.Replay(3, rates=(1.0, 1.0))


# --- run ------------------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    rewinding.options(parser)
    args = parser.parse_args(words)
    args.seed = 0
    return args


@pytest.mark.parametrize("method", ["weight", "lr", "fine-tuning"])
def test_run_prunes_retrains_and_counts(model, method):
    before = copied(model)
    args = arguments("--sparsity", "0.75", "--method", method, "--steps", "2", "--rounds", "2")
    report = rewinding.apply(model, STREAM.view(-1, 12), args)
    kept = sum(int(mask.sum()) for mask in nonzero_masks(model).values())
    assert kept == WEIGHTS - dropped(WEIGHTS, 0.75) and report["kept weights"] == f"{kept} of {WEIGHTS}"
    assert report["steps of retraining"] == 4
    assert not torch.equal(before["embedding.weight"], model.embedding.weight)


@pytest.mark.parametrize("method", ["weight", "lottery"])
def test_run_rewinds_to_the_model_it_is_given(model, method, tmp_path, monkeypatch):
    earlier = Transformer(model.config)
    monkeypatch.setattr(checkpoint, "load", lambda folder: checkpoint.Checkpoint(earlier, None, {}))
    begun = []
    monkeypatch.setattr(rewinding.train, "train", lambda model, *others, **how: begun.append(copied(model)))
    args = arguments("--method", method, "--rewound", str(tmp_path), "--steps", "2")
    report = rewinding.apply(model, STREAM.view(-1, 12), args)
    (start,) = begun
    assert torch.equal(start["embedding.weight"], earlier.embedding.weight)
    name = "blocks.0.attention.q_proj.weight"
    mask = start[name] != 0
    assert torch.equal(start[name][mask], earlier.get_parameter(name).detach()[mask]) and 0 < mask.sum() < mask.numel()
    assert report["steps of retraining"] == (4 if method == "lottery" else 2)


def test_run_refuses_before_it_trains(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rewinding.train, "train", None)
    other = Transformer(replace(model.config, hidden_dim=24))
    monkeypatch.setattr(checkpoint, "load", lambda folder: checkpoint.Checkpoint(other, None, {}))
    for words, match in [
        (("--sparsity", "1"), "sparsity must be in"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--rounds", "0"), "rounds must be at least 1, got 0"),
        (("--rate", "0"), "learning_rate must be positive"),
        (("--method", "fine-tuning", "--constant", "0"), "constant must be positive"),
        (("--method", "lottery"), "--method lottery needs --rewound FOLDER"),
        (("--rewound", "x"), "--rewound is for --method weight and lottery, lr rewinds no weights"),
        (("--method", "weight", "--rewound", "x"), "no earlier step of this model"),
    ]:
        with pytest.raises(ValueError, match=match):
            rewinding.apply(model, STREAM.view(-1, 12), arguments(*words))


# --- the claim ------------------------------------------------------------------------------------------------------


class Bench:
    """As much of a lab as the claim asks for."""

    full, seeds = True, (0, 1)


PASSES = {"lr": [30, 32], "weight": [31, 33], "one": [50, 50], "ten": [40, 34]}


@pytest.mark.parametrize(
    ("at_80", "at_90", "holds"),
    [
        ({}, {}, True),
        ({"ten": [40, 32.5]}, {}, True),  # the rate that is not the paper's counts at the most zeros only
        ({}, {"ten": [40, 32.5]}, False),
        ({"one": [50, 32.5]}, {}, False),
        ({}, {"one": [30, 50]}, False),
        ({"lr": [31.5, 33]}, {}, True),  # within 2% of each other
        ({"lr": [33, 33]}, {}, False),
        ({"lr": [29, 34.5]}, {}, True),
    ],
)
def test_the_claim_holds_only_if_the_order_is_the_papers(at_80, at_90, holds, monkeypatch):
    levels = {0.8: PASSES | at_80, 0.9: PASSES | at_90}
    found = {words: {s: by[name] for s, by in levels.items()}
             for words, name in zip(rewinding.VARIANTS, PASSES, strict=True)}  # fmt: skip
    monkeypatch.setattr(rewinding, "measure", lambda lab, plan, grid: (found, {rewinding.DENSE: 20.0}))
    claim = rewinding.claim(Bench())
    assert claim.holds is holds
    assert claim.numbers["perplexity, lr rewinding, 80%"] == np.mean(levels[0.8]["lr"])
    worst, tuned = np.maximum(levels[0.8]["lr"], levels[0.8]["weight"]), np.array(levels[0.8]["ten"])
    assert claim.numbers["seeds where both beat fine-tuning, 10%, 80%"] == (worst < tuned).sum()
