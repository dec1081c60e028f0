"""Pruned layers: counts, masks that training keeps, bitmaps bit for bit, and checkpoints there and back."""

from __future__ import annotations

import argparse
import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from chapters.shared import pruned_layers as pruned
from minitfm import checkpoint, surgery, train
from minitfm.checkpoint import CheckpointError
from minitfm.config import Config
from minitfm.model import Transformer

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 7, 8, 9, 17])


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.base().tokenizer


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=2048, dim=12, hidden_dim=20, layers=2, heads=2, context=16)).eval()


def half(weight: np.ndarray) -> np.ndarray:
    return np.abs(weight) >= np.median(np.abs(weight))


def sparse_linear(rows: int, columns: int, seed: int, dtype: torch.dtype, share: float = 0.5) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, dtype=dtype)
    drop = torch.rand(rows, columns, generator=generator) < share
    linear.weight.data = torch.randn(rows, columns, generator=generator).to(dtype).masked_fill(drop, 0)
    return linear


@given(st.integers(1, 10**9), st.integers(0, 999))
def test_the_nearest_count_is_dropped_and_one_stays(size, permille):
    exact, count = Fraction(permille, 1000) * size, pruned.dropped(size, permille / 1000)
    assert 0 <= count < size
    assert abs(count - exact) <= Fraction(1, 2) or count == size - 1


@pytest.mark.parametrize("sparsity", [1, 1.0, -1e-9, float("nan"), float("inf")])
def test_a_sparsity_that_is_none_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        pruned.dropped(10, sparsity)


def test_nothing_cannot_be_pruned():
    with pytest.raises(ValueError, match="size=0"):
        pruned.dropped(0, 0.5)


@given(SIZES, SIZES, SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_bitmap_and_values_are_what_the_docstring_says(rows, columns, seed, share):
    linear = sparse_linear(rows, columns, seed, torch.float32, share)
    layer, weight = pruned.SparseLinear(linear), linear.weight.detach().numpy()
    np.testing.assert_array_equal(layer.bitmap.numpy(), np.packbits(weight != 0, axis=1, bitorder="little"))
    np.testing.assert_array_equal(layer.values.numpy(), weight[weight != 0])
    assert pruned.stored_bits([layer]) == (8 * rows * -(-columns // 8) + 32 * np.count_nonzero(weight)) / weight.size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sparse_layer_computes_what_the_dense_one_does(dtype):
    linear, x = sparse_linear(5, 19, 0, dtype), torch.randn(3, 2, 19, dtype=dtype, requires_grad=True)
    layer = pruned.SparseLinear(linear)
    assert torch.equal(layer.weight(), linear.weight)
    assert torch.equal(layer(x), linear(x))
    assert torch.autograd.grad(layer(x).sum(), x)[0].isfinite().all()


def test_negative_zero_becomes_zero_and_the_least_number_stays():
    linear = nn.Linear(3, 1)
    linear.weight.data = torch.tensor([[-0.0, 1e-45, -1.0]])
    layer = pruned.SparseLinear(linear)
    assert layer.values.tolist() == linear.weight.data[0, 1:].tolist() and not layer.weight()[0, 0].signbit()


def test_nan_is_refused():
    linear = nn.Linear(2, 1)
    linear.weight.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pruned.SparseLinear(linear)


def test_pruning_counts_and_sparse_layers_in_the_model(model):
    masks = pruned.prune_each(model, half)
    kept, weights = pruned.count_kept(masks)
    assert weights == 2 * (4 * 12 * 12 + 3 * 12 * 20) and 2 * kept == weights
    assert all(torch.equal(mask, masks[name]) for name, mask in pruned.nonzero_masks(model).items())
    expected = model(torch.arange(16)[None])
    assert torch.equal(pruned.use_sparse(model)(torch.arange(16)[None]), expected)
    assert not surgery.linears(model)


def saved(model: Transformer, tokenizer, folder) -> Transformer:
    """A sparse model whose checkpoint is in `folder`; layer 0 of it all zero."""
    pruned.prune_each(model, half)
    model.blocks[0].attention.q_proj.weight.data.zero_()
    checkpoint.save(folder, pruned.use_sparse(model), tokenizer)
    return model


def test_a_sparse_checkpoint_is_loaded_as_it_was_and_smaller(model, tokenizer, tmp_path):
    checkpoint.save(tmp_path / "dense", model, tokenizer)
    expected = saved(model, tokenizer, tmp_path / "sparse").state_dict()
    found = pruned.load_sparse(tmp_path / "sparse").model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "sparse")}
    assert size["sparse"] < size["dense"]
    pruned.load_sparse(tmp_path / "dense")  # nothing to put in place
    with pytest.raises(CheckpointError, match="load it by the chapter"):
        checkpoint.load(tmp_path / "sparse")


NAME = "blocks.1.attention.k_proj"


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("bitmap", lambda t: t[:-1]),
        ("bitmap", lambda t: t.int()),
        ("bitmap", lambda t: t ^ 1),
        ("bitmap", lambda t: t | 0x80),  # 12 columns: the highest bits of the second byte are past the last
        ("values", lambda t: t[:-1]),
        ("values", lambda t: t[None]),
        ("values", lambda t: t.int()),
    ],
)
def test_a_damaged_sparse_checkpoint_is_refused(model, tokenizer, tmp_path, part, damage):
    saved(model, tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"{NAME}.{part}": damage(tensors[f"{NAME}.{part}"]).contiguous()}, path)
    with pytest.raises(CheckpointError, match=NAME):
        pruned.load_sparse(tmp_path)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_training_keeps_dropped_weights_at_zero_and_trains_the_others(model, optimizer):
    masks, stream = pruned.prune_each(model, half), torch.arange(200) % 50
    before = copy.deepcopy(model)
    pruned.train_masked(model, masks, stream, train.Settings(steps=3, batch=2, length=8, optimizer=optimizer))
    for name, mask in masks.items():
        weight, old = (each.get_parameter(f"{name}.weight") for each in (model, before))
        assert (weight[~mask] == 0).all() and (weight[mask] != old[mask]).float().mean() > 0.9
        assert not weight._backward_hooks


def test_dropped_weights_have_no_gradient_and_masks_may_change_on_the_way(model):
    masks, stream, seen = pruned.prune_each(model, half), torch.arange(200) % 50, []
    name = next(iter(masks))

    def after_step(step: int, model: Transformer) -> None:
        weight = model.get_parameter(f"{name}.weight")
        seen.append((weight.grad[~masks[name]] == 0).all() and (weight.grad != 0).any())
        seen.append((weight[~masks[name]] == 0).all())  # though the moments from before the mask moved them
        masks[name] = masks[name] & (torch.arange(12) > step)

    pruned.train_masked(
        model, masks, stream, train.Settings(steps=3, batch=2, length=8, optimizer="adamw"), after_step=after_step
    )
    assert all(seen) and (model.get_parameter(f"{name}.weight")[:, :3] == 0).all()


def test_options_and_report(model, tmp_path):
    parser = argparse.ArgumentParser(exit_on_error=False)
    pruned.add_options(parser, patterns=True)
    parser.add_argument("--model")
    assert parser.parse_args(["--pattern", "1:4"]).pattern == (1, 4)
    for wrong in ("4:2", "2-4", "0:4", "2:2", ":4", "-1:4"):
        with pytest.raises(argparse.ArgumentError, match="N kept of M"):
            parser.parse_args([f"--pattern={wrong}"])
    model.blocks[1].feed_forward.down_proj.weight.data[:6] = 0
    found = pruned.report(model, parser.parse_args(["--packed", str(tmp_path)]), "pruning.magnitude")
    weights = 2 * (4 * 12 * 12 + 3 * 12 * 20)
    assert found["kept weights"] == f"{weights - 120} of {weights}" and found["zeros"] == f"{120 / weights:.4%}"
    assert found["packed checkpoint, MB"] > 0 and len(surgery.linears(model)) == 14
    assert pruned.load_sparse(tmp_path).info == {"technique": "pruning.magnitude"}
