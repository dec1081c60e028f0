"""Sparse feed-forward as a whole: published arrays, its PyTorch twin, the layer in the model, and the decode step."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.lab import Lab
from chapters.shared import small_models
from chapters.sparsity import sparse_ffn
from chapters.sparsity.sparse_ffn import SPARSE, Sparse, SparseFeedForward
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import FeedForward, Transformer
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.drawn import SEEDS
from tests.sparsity.test_sparse_ffn import BAD, DTYPES, SIZES, UNDRAWABLE, WIDTHS, bad, layer, undrawable

fast = kernel("sparsity.sparse_ffn")
CONFIG = Config(vocab_size=30, dim=16, layers=2, heads=2, context=16)


# --- the reference as a whole -------------------------------------------------------------------------------------


@given(SIZES, WIDTHS, DTYPES, SEEDS)
def test_the_chosen_rows_give_what_all_neurons_give_under_a_one_hot_mask(sizes, width, dtype, seed):
    a = {name: np.nan_to_num(part) for name, part in layer(sizes, width, seed).items()}
    x, up, down = (a[name].astype(dtype) for name in ("x", "up", "down"))
    first, second = np.ones((2, width), dtype), np.zeros((sizes[1] * sizes[2], 2), dtype)
    bias = np.eye(sizes[2], dtype=dtype)[a["chosen"][0]]  # the controller wants what the first token chose
    y, chosen = sparse_ffn.decode_step(x, first, second, bias, up, down)
    np.testing.assert_array_equal(chosen, np.repeat(a["chosen"][:1], len(x), axis=0))
    wanted = sparse_ffn.every_unit(x, up, down, np.repeat(bias[None], len(x), axis=0))
    np.testing.assert_allclose(y, wanted, **tolerance(dtype, width * sizes[1], 4))
    assert y.dtype == dtype


def of_trax() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The published arrays in float64, and the layer in our layout: unit j of block b is row b n + j."""
    a = {name: part.astype(np.float64) for name, part in golden("sparse/sparse_ffn").items()}
    ours = {"first": a["m1"].T, "second": a["m2"].reshape(5, -1).T, "bias": a["mb"]}
    return a, ours | {"up": a["w1"].reshape(16, -1).T, "down": a["w2"].transpose(1, 0, 2).reshape(-1, 16)}


def test_golden_inference_of_trax():
    a, ours = of_trax()
    y, chosen = sparse_ffn.decode_step(a["x"], *ours.values())
    np.testing.assert_array_equal(chosen, a["eval_index"])
    np.testing.assert_allclose(y + a["b2"], a["eval_y"], **tolerance(np.float32, 16))
    logits = sparse_ffn.controller_logits(a["x"], *(ours[name] for name in ("first", "second", "bias")))
    soft = sparse_ffn.training_mask(logits, a["train_u"], False)
    np.testing.assert_allclose(soft, a["controller_softmax"], **tolerance(np.float32))


@pytest.mark.parametrize(("kind", "hard"), [("hard", True), ("soft", False)])
def test_golden_training_of_trax(kind, hard):
    """Forward, and the gradients of every matrix, straight through the one-hot."""
    a, ours = of_trax()
    made = SparseFeedForward(16, 32, 4, 5).double()
    made.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in ours.items()})
    x = torch.from_numpy(a["x"]).requires_grad_()
    mask = sparse_ffn.drawn_mask(made.logits(x), torch.from_numpy(a["train_u"]), hard)
    y = made.masked(x, mask)
    np.testing.assert_allclose(y.detach().numpy() + a["b2"], a[f"train_{kind}_y"], **tolerance(np.float32, 16))
    (y * torch.from_numpy(a["grad_seed"])).sum().backward()
    grad = {name: value.grad.numpy() for name, value in made.named_parameters() if value.grad is not None}
    found = {
        "x": x.grad.numpy() if x.grad is not None else None, "m1": grad["first"].T, "mb": grad["bias"],
        "m2": grad["second"].T.reshape(5, 8, 4), "w1": grad["up"].T.reshape(16, 8, 4),
        "w2": grad["down"].reshape(8, 4, 16).transpose(1, 0, 2),
    }  # fmt: skip
    for name, mine in found.items():
        np.testing.assert_allclose(mine, a[f"train_{kind}_grad_{name}"], err_msg=name, **tolerance(np.float32, 32, 4))


def test_refusals_say_what_is_wrong():
    for case in UNDRAWABLE:
        about = next((word for word in ("uniform", "temperature") if word in case), "logits")
        with pytest.raises(ValueError, match=f"{about} must"):
            sparse_ffn.training_mask(**undrawable(case), hard=True)
    words = {"no such neuron": r"range\(3\), got 3 to 3", "negative": "got -1 to -1"}
    words |= dict.fromkeys(("other tokens", "one token", "one channel"), "x must be")
    for case in BAD:
        with pytest.raises(ValueError, match=words.get(case, "blocks that divide 6 units")):
            sparse_ffn.active(bad(case)["x"], np.zeros((6, 5)), bad(case)["chosen"])
    with pytest.raises(ValueError, match="hidden must be like chosen"):
        sparse_ffn.combine(np.zeros((3, 2)), np.zeros((2, 2), int), np.zeros((6, 5)))
    good = {"x": np.zeros((3, 5)), "first": np.zeros((2, 5)), "second": np.zeros((6, 2)), "bias": np.zeros((2, 3))}
    for name, part, wanted in (
        ("x", np.zeros((3, 4)), "x must be"), ("second", np.zeros((5, 2)), "second"), ("bias", np.zeros(6), "matrices"),
        ("bias", np.zeros((0, 3)), "not empty"), ("first", np.full((2, 5), np.nan), "first must be finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=wanted):
            sparse_ffn.controller_logits(**{**good, name: part})


# --- in the model -------------------------------------------------------------------------------------------------


@given(SIZES, st.booleans(), st.sampled_from([0.0, 0.1, 1.0]), SEEDS)
def test_the_twin_draws_like_the_reference_and_learns_like_a_softmax(sizes, hard, temperature, seed):
    rng = np.random.default_rng(seed)
    logits, uniform = rng.normal(size=sizes), rng.uniform(1e-6, 1 - 1e-6, sizes)
    told = torch.from_numpy(logits).requires_grad_()
    mask = sparse_ffn.drawn_mask(told, torch.from_numpy(uniform), hard, temperature)
    wanted = sparse_ffn.training_mask(logits, uniform, hard, temperature)
    np.testing.assert_allclose(mask.detach(), wanted, **tolerance(np.float64, sizes[2]))
    weight = torch.from_numpy(rng.normal(size=sizes))
    (slope,) = torch.autograd.grad((mask * weight).sum(), told)
    (softly,) = torch.autograd.grad((told.softmax(-1) * weight).sum(), told)
    np.testing.assert_allclose(slope, softly, **tolerance(np.float64, sizes[2]))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_a_few_tokens_read_only_their_rows_and_many_give_the_same(tokens):
    torch.manual_seed(0)
    made = SparseFeedForward(8, 20, 4, 3).double().eval()
    x = torch.randn(tokens, 8, dtype=torch.float64)
    arrays = [part.numpy() for part in (x, made.first, made.second, made.bias, made.up, made.down)]
    wanted, choice = sparse_ffn.decode_step(*arrays)
    if tokens < 4:  # fewer than n: the rest may hold anything
        unread = torch.ones(5, 4, dtype=torch.bool)
        unread[torch.arange(5), torch.from_numpy(choice)] = False
        made.up[unread.flatten()] = made.down[unread.flatten()] = math.nan
    y = made(x.view(1, tokens, 8))
    assert made.chosen is not None and y.shape == (1, tokens, 8)
    np.testing.assert_array_equal(made.chosen, choice)
    np.testing.assert_allclose(y[0], wanted, **tolerance(np.float64, 40, 4))


@pytest.mark.parametrize(("hard", "kinds"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_one_draw_decides_for_a_whole_step_whether_it_is_hard(hard, kinds):
    torch.manual_seed(0)
    made, seen = SparseFeedForward(8, 12, 3, 2, hard=hard), set()
    made.masked = lambda rows, mask: seen.add(bool(((mask == 0) | (mask == 1)).all())) or rows
    for _ in range(12):
        made(torch.randn(2, 5, 8))
    assert seen == kinds and made.chosen is None


def test_a_model_with_such_layers_trains_and_decodes_like_it_reads():
    torch.manual_seed(0)
    model = Transformer(CONFIG, feed_forward=Sparse(4, 3))
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    assert [tuple(one.up.shape) for one in layers] == [(64, 16)] * 2
    assert abs(layers[0].down.std().item() * 8 - 1) < 0.1  # 16 active neurons, 2 layers
    tokens = torch.randint(0, 30, (2, 9))
    model(tokens).logsumexp(-1).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        whole, cache = model(tokens[:1]), KVCache(CONFIG)
        steps = [model(tokens[:1, at : at + 1], cache) for at in range(9)]
    np.testing.assert_allclose(torch.cat(steps, 1), whole, **tolerance(np.float32, 64, 4))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((8, 10, 4, 2), "n=4, hidden=10"), ((8, 8, 0, 2), "n=0"), ((8, 8, 2, 0), "rank=0"),
        ((8, 8, 2, 2, -1.0), "temperature >= 0, got 0.3 and -1.0"), ((8, 8, 2, 2, 0.1, 1.5), r"\[0, 1\]"),
    ],
)  # fmt: skip
def test_layers_that_make_no_sense_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        SparseFeedForward(*sizes)


def test_what_is_read_is_what_the_layer_holds():
    """A dense layer reads its parameters; a sparse one its controller, and one of n of the rest."""
    made = SparseFeedForward(16, 64, 4, 3)
    held = {name: value.numel() for name, value in made.named_parameters()}
    wanted = held["first"] + held["second"] + held["bias"] + (held["up"] + held["down"]) // 4
    assert sparse_ffn.numbers_read(16, 64, 4, 3) == wanted
    for dim, n in ((64, 8), (64, 4), (16, 16)):
        named = sparse_ffn.contenders(dim, n)
        (dense, all_), (sparse, read), (small, few) = named.values()
        assert abs(few - read) <= dim and all_ == 8 * dim * dim and sparse == Sparse(n, dim // n)
        config = Config(30, dim=dim, heads=2)
        for seam, number in ((dense, all_), (small, few)):
            found = seam(config, 0)
            assert isinstance(found, FeedForward) and not found.gated
            assert sum(value.numel() for value in found.parameters()) == number


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    """The base model, and random text, so that none is read; what is trained is kept in a folder of the test."""
    monkeypatch.setattr(small_models, "cache_folder", lambda: tmp_path)
    made = Lab()
    made.streams = torch.randint(2048, (2, 3000), generator=torch.Generator().manual_seed(0)).unbind()
    return made


def test_a_demonstration_trains_three_models(lab):
    asked = {"n": 8, "rank": 0, "steps": 1, "seed": 0}
    found = sparse_ffn.demonstrate(lab, argparse.Namespace(**asked))
    assert found["weights of a layer read, sparse"] == 6912 and len(found) == 7
    assert all(np.isfinite(value) for value in found.values())
    for option in ({"n": 0}, {"n": 7}, {"rank": -1}, {"steps": -1}):
        with pytest.raises(ValueError, match=f"got --n .*{next(iter(option))}"):
            sparse_ffn.demonstrate(lab, argparse.Namespace(**asked | option))


def test_usage_counts_each_token_once_in_each_block(lab):
    layers = sparse_ffn.contenders(64)
    model = small_models.fresh(lab, layers[SPARSE][0], 0)
    shares = sparse_ffn.usage(model, lab.validation[:2, :10], 3)
    assert shares.shape == (32, 8)
    np.testing.assert_allclose(shares.sum(1), 1, **tolerance(np.float64))
    assert np.allclose(20 * shares, np.round(20 * shares))
    with pytest.raises(ValueError, match="layer 0 of the model is a FeedForward"):
        sparse_ffn.usage(lab.model(), lab.validation[:1, :4], 0)


# --- the decode step's kernel -------------------------------------------------------------------------------------


def step(sizes: tuple[int, int, int], width: int, rank: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Operands of `decode_step`; logits are small whole numbers, so that both sides choose alike."""
    (tokens, blocks, n), rng = sizes, np.random.default_rng(seed)
    whole = [rng.integers(-2, 3, shape) for shape in ((tokens, width), (rank, width), (blocks * n, rank), (blocks, n))]
    rest = [rng.normal(size=(blocks * n, width)) / np.sqrt(width) for _ in range(2)]
    return [torch.from_numpy(part).to(dtype) for part in (*whole, *rest)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=8)
@given(SIZES, WIDTHS, st.sampled_from([1, 3, 8]), st.booleans(), SEEDS)
def test_kernel_takes_the_step_of_the_reference(dtype, sizes, width, rank, aligned, seed):
    operands = step(sizes, width, rank, dtype, seed)
    y, chosen = fast.decode_step(*(poisoned(part.to(DEVICE), aligned) for part in operands))
    wanted, choice = oracle("sparsity.sparse_ffn").decode_step(*(part.double().numpy() for part in operands))
    assert y.dtype == dtype and chosen.dtype == torch.int64
    np.testing.assert_array_equal(chosen.cpu(), choice)
    np.testing.assert_allclose(y.double().cpu(), wanted, **tolerance(dtype, width * sizes[1], 4))


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_nothing_outside_its_inputs_and_only_the_rows_it_chose(begins):
    operands = step((3, 5, 3), 21, 5, torch.float16, 2)
    y, chosen = fast.decode_step(*(walled(part.to(DEVICE), begins) for part in operands))
    unread = torch.ones(5, 3, dtype=torch.bool)
    unread[torch.arange(5), chosen.cpu()] = False
    operands[4][unread.flatten()] = operands[5][unread.flatten()] = math.nan
    again, _ = fast.decode_step(*(part.to(DEVICE) for part in operands))
    assert unread.any() and torch.equal(y, again)


@pytest.mark.kernel
def test_kernel_shows_nan_and_refuses_what_does_not_fit():
    good = [part.to(DEVICE) for part in step((2, 3, 2), 8, 4, torch.float16, 0)]
    spoiled = [good[0].clone().fill_(math.nan), *good[1:]]
    y, chosen = fast.decode_step(*spoiled)
    assert y.isnan().all() and ((chosen >= 0) & (chosen < 2)).all()
    none, _ = fast.decode_step(good[0][:0].contiguous(), *good[1:])
    assert none.shape == (0, 8)
    for place, part, error, words in (
        (1, good[1][:, :7].contiguous(), ValueError, "need x"), (3, good[3][0], ValueError, "must be matrices"),
        (5, good[5].float(), TypeError, "down must have dtype"),
        (4, good[4].T.contiguous().T, ValueError, "contiguous"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            fast.decode_step(*(part if at == place else one for at, one in enumerate(good)))
    deep = [torch.empty(shape, device=DEVICE) for shape in ((1, 8), (512, 8), (64, 512), (1, 64), (64, 8), (64, 8))]
    with pytest.raises(ValueError, match="n · r must be at most 16384, got n=64 and r=512"):
        fast.decode_step(*deep)
    hidden, choice = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="blocks that divide F"):
        fast.combine(hidden, choice, good[5][:5].contiguous())
    with pytest.raises(TypeError, match="chosen must have dtype"):
        fast.combine(hidden, choice.int(), good[5])
