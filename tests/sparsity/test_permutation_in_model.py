"""Channel permutation in the model: what can be reordered, that nothing else changes, and what 2:4 then keeps."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chapters.shared import channel_sites
from chapters.shared.channel_sites import Site, reorder, reorder_inputs, sites
from chapters.shared.pruned_layers import nonzero_masks
from chapters.shared.stripes import climb
from chapters.sparsity import permutation
from minitfm import surgery
from minitfm.model import Transformer
from tests.conftest import DEVICE, kernel, tolerance
from tests.minitfm.models import HEADS, tiny_model, tokens
from tests.sparsity.drawn import SEEDS

CONFIGS = {
    "heads": HEADS,
    "head_dim": st.sampled_from([2, 4, 6, 8]),
    "hidden": st.sampled_from([4, 7, 24]),
    "dim": st.sampled_from([4, 10, 16]),
    "tied": st.booleans(),
    "activation": st.sampled_from(["swiglu", "relu"]),
}


def drawn_model(heads, head_dim, hidden, dim, tied, activation, seed) -> Transformer:
    """In float64, so that a wrong place cannot pass for rounding."""
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim, "hidden_dim": hidden, "dim": dim}
    return tiny_model(seed % 1000, tied_embeddings=tied, activation=activation, **sizes).double()


def random_order(channels: int, seed: int) -> Tensor:
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed % 2**31))


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, **tolerance(torch.float64, 100, scale=10))


@settings(max_examples=20)
@given(seed=SEEDS, **CONFIGS)
def test_reordering_every_site_leaves_the_function_as_it_was(seed, **config):
    model = drawn_model(seed=seed, **config)
    text = tokens(2, 9, seed=seed % 1000)
    expected = model(text)
    for place, site in enumerate(sites(model).values()):
        reorder(model, site, random_order(site.channels, seed + place))
    assert_same(model(text), expected)


def test_an_order_moves_each_place_of_a_site_and_nothing_else():
    model = tiny_model(head_dim=6)
    before = {name: value.clone() for name, value in model.named_parameters()}
    order = random_order(6, 1)
    reorder(model, sites(model)["blocks.1.values.1"], order)
    v, o = "blocks.1.attention.v_proj.weight", "blocks.1.attention.o_proj.weight"
    assert torch.equal(model.get_parameter(v)[6:], before[v][6 + order])
    for query in (2, 3):  # the two query heads that read value head 1
        columns = slice(6 * query, 6 * query + 6)
        assert torch.equal(model.get_parameter(o)[:, columns], before[o][:, 6 * query + order])
    before[v][6:], before[o][:, 12:] = model.get_parameter(v)[6:].detach(), model.get_parameter(o)[:, 12:].detach()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_rotary_positions_tell_the_dimensions_of_a_head_apart():
    """Why neither q nor k has a site smaller than a head: here the same order for both changes the function."""
    model = tiny_model(heads=1, kv_heads=1, head_dim=8).double()
    text = tokens(1, 9)
    expected = model(text)
    places = tuple(channel_sites.Place(f"blocks.0.attention.{part}_proj.weight", 0) for part in "qk")
    reorder(model, Site(8, places), torch.tensor([1, 0, 2, 3, 5, 4, 6, 7]))
    assert (model(text) - expected).abs().max() > 1e-3


def test_every_block_linears_inputs_have_one_site():
    model = tiny_model(kv_heads=2)
    read: dict[str, list[int]] = {name: [] for name in surgery.linears(model)}
    for site in sites(model).values():
        for place in site.readers():
            if place.unit == 1:
                read[place.name.removesuffix(".weight")] += range(place.start, place.start + site.channels)
    for name, layer in surgery.linears(model).items():
        assert sorted(read[name]) == list(range(layer.in_features)), name


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4]])
def test_an_order_that_is_none_is_refused_before_anything_moves(order):
    model = tiny_model(head_dim=4)
    before = model.state_dict()["blocks.0.attention.v_proj.weight"].clone()
    with pytest.raises(ValueError, match="each of 4 channels once"):
        reorder(model, sites(model)["blocks.0.values.0"], torch.tensor(order))
    assert torch.equal(model.blocks[0].attention.v_proj.weight, before)


def test_a_model_with_other_parameters_is_refused():
    model = tiny_model()
    surgery.replace(model, "blocks.0.attention.q_proj", nn.Linear(16, 16, bias=True))
    with pytest.raises(ValueError, match="plain models"):
        sites(model)


@settings(max_examples=8)
@given(seed=SEEDS, **CONFIGS)
def test_inputs_are_reordered_where_channels_are_whole_stripes(seed, **config):
    model, shapes = drawn_model(seed=seed, **config), []
    text, share = tokens(2, 9), None
    if config["dim"] % 4 == config["hidden"] % 4 == config["heads"][0] * config["head_dim"] % 4 == 0:
        share = permutation.kept_share(model)
    expected = model(text)

    def find(weight: Tensor) -> np.ndarray:
        shapes.append(weight.shape[1])
        return permutation.find_order(weight)

    orders = reorder_inputs(model, find)
    assert_same(model(text), expected)
    assert all(channels % 4 == 0 for channels in shapes)
    assert ("stream" in orders) == (config["dim"] % 4 == 0) and shapes == [len(order) for order in orders.values()]
    assert ("blocks.0.values.0" in orders) == (config["head_dim"] % 4 == 0)
    assert not any("queries" in name or "heads" in name for name in orders)
    assert share is None or permutation.kept_share(model) >= share * (1 - 1e-8)


def test_layers_that_read_the_same_channels_are_searched_together():
    model, seen = tiny_model(kv_heads=2), []

    def stay(weight: Tensor) -> np.ndarray:
        seen.append(weight)
        return np.arange(weight.shape[1])

    reorder_inputs(model, stay)
    layers = surgery.linears(model).items()
    readers = [
        row for name, layer in layers if "o_proj" not in name and "down" not in name for row in layer.weight.tolist()
    ]
    assert sorted(seen[0].tolist()) == sorted(readers)


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"method": "groups", "escapes": 0, "seed": 0, "packed": None, "model": None, **changes})


@pytest.mark.parametrize("method", permutation.METHODS)
def test_run_prunes_half_of_every_four_and_reports_what_is_kept(method):
    model = tiny_model(dim=16, hidden_dim=32)
    report = permutation.apply(model, tokens(1, 4), arguments(method=method, escapes=2))
    for mask in nonzero_masks(model).values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    after, before = (float(part.rstrip("%")) for part in report["kept magnitude"].split(", as stored "))
    assert report["zeros"] == "50.0000%" and after > before


def test_find_order_knows_its_methods():
    with pytest.raises(ValueError, match="method must be one of"):
        permutation.find_order(torch.ones(2, 8), "sort")


@pytest.mark.kernel
@pytest.mark.parametrize("swaps", [False, True])
def test_the_kernels_lead_a_search_to_as_good_an_order(swaps):
    assert kernel("sparsity.permutation") is not None
    weight = np.random.default_rng(3).normal(size=(6, 16))
    proposed = permutation.KernelMap(torch.from_numpy(weight).float().to(DEVICE), swaps)
    order = climb(16, proposed, 0, 0)
    expected = permutation.channel_swap(weight) if swaps else permutation.stripe_groups(weight)
    assert permutation.efficacy(weight, order) == pytest.approx(permutation.efficacy(weight, expected), abs=0.5)


def test_a_weight_that_is_not_finite_is_refused_before_a_kernel_sees_it():
    with pytest.raises(ValueError, match="finite"):
        permutation.KernelMap(torch.full((2, 8), float("nan")), True)
