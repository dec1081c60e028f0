"""SR-STE in the model: torch beside the reference, training, `run` and the claim; what is refused, in words."""

from __future__ import annotations

import argparse
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.sparsity import sr_ste
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("sparsity.sr_ste")
STREAM = torch.arange(300) % 50
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)
ONES = np.ones((2, 8))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=16, hidden_dim=24, layers=2, heads=2, context=16)).eval()


def settled(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in surgery.linears(model).items()}


# --- torch and the reference -----------------------------------------------------------------------------------------


@given(st.sampled_from(CONTENTS), st.sampled_from([(1, 1), (2, 4), (1, 4), (4, 8), (3, 7), (5, 16)]), SEEDS)
def test_torch_finds_the_masks_and_gradients_of_the_reference(kind, pattern, seed):
    weight, gradient = contents(kind, (3, 2 * pattern[1]), seed), contents("normal", (3, 2 * pattern[1]), seed + 1)
    dense = torch.nn.Parameter(torch.from_numpy(weight))
    sparse = sr_ste.SparseWeight.apply(dense, *pattern, 0.3)
    sparse.backward(torch.from_numpy(gradient))
    np.testing.assert_array_equal(sparse.detach().numpy(), sr_ste.sparse_weight(weight, *pattern))
    assert not np.signbit(sparse.detach().numpy()[~sr_ste.sparse_mask(weight, *pattern)]).any()
    np.testing.assert_array_equal(dense.grad.numpy(), sr_ste.refined_gradient(weight, gradient, *pattern, 0.3))


def test_the_gradient_without_decay_is_that_of_a_layer_with_the_sparse_weight():
    torch.manual_seed(1)
    layer = sr_ste.RefinedLinear(torch.nn.Linear(8, 5), 2, 4, 0.0)
    plain = torch.nn.Linear(8, 5)
    plain.weight, plain.bias = torch.nn.Parameter(layer.weight.detach() * layer.mask()), layer.bias
    x = torch.randn(3, 8)
    for each in (layer, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert (layer.weight.grad[~layer.mask()] != 0).all()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_training_leaves_exactly_n_of_m_and_counts_its_flips(model, pattern):
    before = copy.deepcopy(model)
    watch = sr_ste.train_sparse(model, STREAM, sr_ste.training(model, STREAM, 6, 1e-2, 0), *pattern, 0.1)
    n, m = pattern
    for weight in settled(model).values():
        assert (weight.unflatten(-1, (-1, m)) != 0).sum(-1).eq(n).all() and weight.requires_grad is False
    assert len(watch.flips) == len(watch.losses) == 6 and 0 < sum(watch.flips) < 6
    assert all(type(layer) is torch.nn.Linear for layer in surgery.linears(model).values())
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in before.state_dict().items()
    }


def test_flips_are_the_divergence_of_the_masks():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 5), torch.nn.Linear(4, 3)]
    watch = sr_ste.Watch(layers, 2, 4)
    masks = [[sr_ste.sparse_mask(layer.weight.numpy(force=True)) for layer in layers]]
    for step in range(3):
        for layer in layers:
            layer.weight.data += 0.1 * torch.randn_like(layer.weight)
        watch.after_step(step, None)
        masks.append([sr_ste.sparse_mask(layer.weight.numpy(force=True)) for layer in layers])
    expected = [sr_ste.architecture_divergence(a, b) / 52 for a, b in itertools.pairwise(masks)]
    assert watch.flips == expected and sum(expected) > 0


@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_shrinks_what_is_dropped_more_than_ste_does(model, decoupled):
    """With masks that are far from flipping, kept weights go the same way, dropped ones towards 0."""
    for layer in surgery.linears(model).values():
        layer.weight.data = torch.where(sr_ste.torch_mask(layer.weight, 2, 4), 4.0, 0.05) * layer.weight.sign()
    ends = {}
    for decay in (0.0, 0.5):
        mine, seen = copy.deepcopy(model), {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sr_ste, "settle", lambda model, seen=seen: seen.update(settled(model)))
            sr_ste.train_sparse(mine, STREAM, sr_ste.training(mine, STREAM, 4, 1e-3, 0), 2, 4, decay, decoupled)
        ends[decay] = torch.cat([weight.flatten() for weight in seen.values()])
    dropped = ends[0.0].abs() < 1
    assert dropped.float().mean() == 0.5
    lost = ends[0.0][dropped].abs() - ends[0.5][dropped].abs()
    assert lost.mean() > 1e-5 and (decoupled is False or (lost > -1e-3).all())
    assert (ends[0.0] - ends[0.5])[~dropped].abs().mean() < (ends[0.0] - ends[0.5])[dropped].abs().mean()


# --- what is refused, in words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words", "arguments"),
    [
        ("sparse_mask", "8 columns.*m=3", (ONES, 1, 3)),
        ("sparse_mask", "n=5, m=4", (ONES, 5, 4)),
        ("sparse_mask", r"\(8,\)", (np.ones(8),)),
        ("sparse_mask", "holds NaN", (ONES * np.nan,)),
        ("refined_gradient", r"gradient.*\(2, 8\), got \(1, 8\)", (ONES, ONES[:1])),
        ("refined_gradient", "gradient must be finite", (ONES, ONES * np.inf)),
        ("refined_gradient", "decay must be finite and not negative, got -1", (ONES, ONES, 2, 4, -1)),
        ("refined_step", "rate must be.*got nan", (ONES, ONES, 2, 4, np.nan)),
        ("refined_step", "decay must be.*got inf", (ONES, ONES, 2, 4, 0.1, np.inf)),
        ("architecture_divergence", r"same layers, got \[\], \[\]", ([], [])),
    ],
)
def test_the_reference_names_the_fault(function, words, arguments):
    with pytest.raises(ValueError, match=words):
        getattr(sr_ste, function)(*arguments)


def test_masks_must_be_bool():
    with pytest.raises(TypeError, match="must be bool, got float64"):
        sr_ste.architecture_divergence([ONES], [ONES])


@pytest.mark.parametrize(
    ("n", "m", "decay", "words"),
    [(3, 2, 0, "n=3, m=2"), (1, 3, 0, "16 columns.*m=3"), (2, 4, -1, "decay=-1"), (2, 4, float("nan"), "decay=nan")],
)
def test_a_model_that_cannot_be_trained_so_stays_as_it_was(model, n, m, decay, words):
    with pytest.raises(ValueError, match=words):
        sr_ste.train_sparse(model, STREAM, sr_ste.training(model, STREAM, 1, 1e-3, 0), n, m, decay)
    assert all(type(layer) is torch.nn.Linear for layer in surgery.linears(model).values())


def test_weights_that_are_not_finite_are_refused_by_name(model):
    model.blocks[1].attention.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.v_proj\.weight must be finite"):
        sr_ste.prepare(model, 2, 4, 0.0)


# --- run and claim ---------------------------------------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sr_ste.options(parser)
    args = parser.parse_args(words)
    args.seed = 0
    return args


def test_run_trains_and_counts(model):
    report = sr_ste.apply(model, STREAM.view(-1, 15), parsed("--pattern", "1:4", "--steps", "2", "--decoupled"))
    assert report["kept weights"] == f"{WEIGHTS // 4} of {WEIGHTS}" and report["bits per weight"] == 9


@pytest.mark.parametrize(("words", "fault"), [(("--steps", "0"), "steps"), (("--decay", "-1"), "decay")])
def test_run_refuses(model, words, fault):
    with pytest.raises(ValueError, match=fault):
        sr_ste.apply(model, STREAM.view(-1, 15), parsed(*words))
    with pytest.raises(SystemExit):
        parsed("--pattern", "4:2")


@pytest.mark.parametrize(("sparse", "late", "holds"), [(11.0, 0.001, True), (13.0, 0.001, False), (11.0, 0.003, False)])
def test_the_claim_holds_only_if_it_ends_no_worse_and_the_masks_are_calmer(sparse, late, holds, monkeypatch):
    asked = []

    def from_scratch(lab, n, m, decay, steps, seed):
        asked.append((n, m, decay, seed))
        perplexity = 10.0 if n == m else sparse if decay else 12.0
        return sr_ste.Run(
            perplexity, late if decay else 0.002, [1 / (step + 1) for step in range(steps)], [3.0] * steps
        )

    monkeypatch.setattr(sr_ste, "from_scratch", from_scratch)
    for full in (False, True):
        asked.clear()
        lab = argparse.Namespace(full=full, seeds=(0, 1, 2) if full else (0,))
        claim = sr_ste.claim(lab)
        assert claim.holds is holds and len(asked) == (21 if full else 3)
        assert claim.numbers["perplexity, 2:4 SR-STE"] == sparse and f"2:4 {sparse:.1f} with SR-STE" in claim.sentence


# --- the wrappers of the kernels -------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=8)
@given(st.sampled_from(CONTENTS), st.sampled_from([(2, 4), (1, 4), (4, 8)]), SEEDS, st.booleans())
def test_the_wrappers_are_the_reference(dtype, kind, pattern, seed, aligned):
    book, rows = oracle("sparsity.sr_ste"), seed % 5 + 1
    weight = torch.from_numpy(contents(kind, (rows, 40), seed)).to(dtype)
    gradient = torch.from_numpy(contents("normal", (rows, 40), seed + 1)).to(dtype)
    mine = [poisoned(each.to(DEVICE), aligned) for each in (weight, gradient)]
    exact = weight.numpy(), gradient.numpy()
    sparse = fast.sparse_weight(mine[0], *pattern, block=64)
    np.testing.assert_array_equal(sparse.cpu().numpy(), book.sparse_weight(exact[0], *pattern))
    refined = fast.refined_gradient(*mine, *pattern, 0.3, block=64)
    expected = book.refined_gradient(*exact, *pattern, 0.3)
    close = tolerance(dtype, scale=max(1, np.abs(expected).max()))
    np.testing.assert_allclose(refined.cpu().numpy(), expected, **close)
    moved, kept = fast.refined_step(*mine, *pattern, 0.1, 0.3, block=64)
    np.testing.assert_allclose(moved.cpu().numpy(), book.refined_step(*exact, *pattern, 0.1, 0.3)[0], **close)
    np.testing.assert_array_equal(kept.cpu().numpy(), book.sparse_weight(moved.cpu().numpy(), *pattern))
    assert all(torch.equal(each.cpu(), was) for each, was in zip(mine, (weight, gradient), strict=True))


@pytest.mark.kernel
def test_a_step_in_place_is_the_same_step():
    weight, gradient = torch.randn(3, 24, device=DEVICE), torch.randn(3, 24, dtype=torch.float16, device=DEVICE)
    expected = fast.refined_step(weight, gradient, 2, 4, 0.1, 0.2)
    found = fast.refined_step(weight, gradient, 2, 4, 0.1, 0.2, in_place=True)
    assert found[0] is weight and found[1] is gradient
    assert torch.equal(weight, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.kernel
def test_a_nan_stays_visible_and_nothing_is_made_of_nothing():
    weight = torch.tensor([[1.0, float("nan"), 2.0, 0.0]], dtype=torch.float16, device=DEVICE)
    assert fast.sparse_weight(weight, 1, 4).isnan().tolist() == [[False, True, False, False]]
    empty = torch.empty(0, 8, device=DEVICE)
    assert fast.sparse_weight(empty).shape == fast.refined_step(empty, empty)[1].shape == (0, 8)


@pytest.mark.kernel
def test_the_kernels_refuse():
    weight = torch.ones(4, 24, dtype=torch.float16, device=DEVICE)
    for words, arguments in {
        "24 columns.*m=16": (weight, weight, 2, 16),
        "m must be one of": (weight, weight, 1, 3),
        "n=5, m=4": (weight, weight, 5, 4),
        r"\[out, in\]": (weight[0], weight[0]),
        "gradient must be": (weight, weight[:2]),
        "contiguous": (weight.T[:, :4], weight.T[:, :4]),
        "rate must be.*nan": (weight, weight, 2, 4, float("nan")),
        "decay must be.*-1": (weight, weight, 2, 4, 0.1, -1),
    }.items():
        with pytest.raises(ValueError, match=words):
            fast.refined_step(*arguments)
    with pytest.raises(TypeError, match="float64"):
        fast.refined_step(weight.double(), weight)


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_the_kernels_read_nothing_outside(begins):
    """It comes last, because a kernel that does ends the process."""
    weight, gradient = (walled(torch.randn(3, 20, dtype=torch.float16, device=DEVICE), begins) for _ in range(2))
    fast.sparse_weight(weight, block=16)
    fast.refined_gradient(weight, gradient, block=16)
    fast.refined_step(weight, gradient, block=16)
