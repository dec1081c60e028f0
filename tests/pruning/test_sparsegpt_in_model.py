"""SparseGPT in the model, `run` and the claim; the kernel around whole layers; what is refused, in words."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chapters.pruning import sparsegpt as chapter
from chapters.shared.pruned_layers import dropped
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, golden, kernel, oracle, tolerance
from tests.quantization.problems import layers
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("pruning.sparsegpt")
TOKENS = torch.arange(120).view(10, 12) % 50
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)
ONES, EYE = torch.ones(2, 4, device=DEVICE), torch.eye(4, device=DEVICE)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=16, hidden_dim=24, layers=2, heads=2, context=16)).eval()


def reaching(model: Transformer, block: int) -> dict[str, np.ndarray]:
    """Hessians of what reaches each layer of a block, all text at once."""
    names = [name for name in surgery.linears(model) if name.startswith(f"blocks.{block}.")]
    found = dict.fromkeys(names, 0.0)
    for name, x in surgery.record_inputs(model, TOKENS, names):
        flat = x.flatten(0, 1).double()
        found[name] += (2 / len(TOKENS) * flat.T @ flat).numpy()
    return found


def test_a_block_sees_pruned_blocks_before_it_and_itself_dense(model):
    pruned, chosen = copy.deepcopy(model), {"pattern": (2, 4), "bits": 4, "damping": 0.1, "block_size": 8}
    done = chapter.prune_model(pruned, TOKENS, **chosen)
    assert list(done) == list(surgery.linears(model))
    for block in range(2):
        for name, hessian in reaching(model, block).items():  # `model` is pruned up to this block
            weight = model.get_submodule(name).weight
            expected = oracle("pruning.sparsegpt").sparsegpt(weight.detach().numpy(), hessian, **chosen)
            np.testing.assert_array_equal(done[name].mask, expected.mask)
            np.testing.assert_allclose(done[name].weight, expected.weight, **tolerance(np.float32))
            kept = torch.from_numpy(done[name].weight).float()
            assert torch.equal(pruned.get_submodule(name).weight, kept) and not kept[~done[name].mask].any()
        for name in reaching(model, block):
            model.get_submodule(name).weight.data = pruned.get_submodule(name).weight.data.clone()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_exact_counts_of_every_layer(model, sparsity):
    chapter.prune_model(model, TOKENS, sparsity=sparsity, exact=True)
    for layer in surgery.linears(model).values():
        assert int((layer.weight == 0).sum()) == dropped(layer.weight.numel(), sparsity)


def test_what_cannot_be_served_is_refused_by_name_before_its_block_is_changed(model):
    with pytest.raises(ValueError, match=r"blocks.0.attention.q_proj: weight has 16 columns, .* m=5"):
        chapter.prune_model(model, TOKENS, pattern=(2, 5))
    model.blocks[1].feed_forward.down_proj.weight.data[0, 0] = float("nan")
    before = model.blocks[1].attention.q_proj.weight.clone()
    with pytest.raises(ValueError, match=r"blocks.1.feed_forward.down_proj: weight must be finite"):
        chapter.prune_model(model, TOKENS)
    assert torch.equal(model.blocks[1].attention.q_proj.weight, before)


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chapter.options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [["--sparsity", "0.25", "--exact"], ["--pattern", "3:4", "--block-size", "8"]])
def test_run_prunes_and_counts(model, words):
    report = chapter.apply(model, TOKENS, asked(*words))
    assert report["kept weights"] == f"{3 * WEIGHTS // 4} of {WEIGHTS}"
    assert report["bits per weight"] == pytest.approx(32 * 0.75 + 1)


def test_run_counts_codes_as_bits(model):
    report = chapter.apply(model, TOKENS, asked("--pattern", "2:4", "--bits", "4"))
    weights = [layer.weight for layer in surgery.linears(model).values()]
    kept, rows = sum(int((weight != 0).sum()) for weight in weights), sum(len(weight) for weight in weights)
    assert kept <= WEIGHTS / 2 and report["kept weights"] == f"{kept} of {WEIGHTS}"
    assert report["bits per weight"] == pytest.approx(1 + (4 * kept + 20 * rows) / WEIGHTS)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--sparsity", "1"], "sparsity"), (["--bits", "0"], "bits"), (["--damping", "-1"], "damping"),
     (["--block-size", "0"], "block_size"), (["--pattern", "2:4", "--block-size", "6"], "a block 6: .* m=4")],
)  # fmt: skip
def test_run_refuses(model, words, complaint):
    with pytest.raises(ValueError, match=complaint):
        chapter.apply(model, TOKENS, asked(*words))


def test_run_does_not_pack_codes_as_floats(model, tmp_path: Path):
    with pytest.raises(ValueError, match="--packed stores values in 32 bits"):
        chapter.apply(model, TOKENS, asked("--bits", "4", "--packed", str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


class Bench:
    """As much of a lab as the claim asks for; perplexities come from `costs`: Wanda's, then SparseGPT's, by rule."""

    full, seeds, base_perplexity = False, (0, 1), 10.0

    def __init__(self, model: Transformer, costs: list[float]) -> None:
        self.pattern, self.costs, self.zeros, self.drawn = model, iter(costs), [], False

    def model(self) -> Transformer:
        return copy.deepcopy(self.pattern)

    def calibration(self, seed: int, count: int) -> Tensor:
        self.drawn = True
        return (TOKENS + seed) % 50

    def perplexity(self, model: Transformer) -> float:
        self.zeros.append(sum(int((layer.weight == 0).sum()) for layer in surgery.linears(model).values()) / WEIGHTS)
        calibrated, self.drawn = self.drawn, False
        return next(self.costs) if calibrated else 40.0


@pytest.mark.parametrize(
    ("costs", "holds"),
    [
        ([38, 38, 36, 36] * 2, True), ([38, 38, 36, 39] * 2, False), ([38, 41, 36, 36] * 2, False),
        ([38, 38, 36, 36, 38, 38, 38, 36], False), ([36, 36, 38, 38] * 2, False),
        ([38, 38, 36, 36, 40, 38, 36, 36], False),
    ],
)  # fmt: skip
def test_the_claim_holds_only_if_every_seed_shows_it(model, costs, holds):
    bench = Bench(model, costs)
    claim = chapter.claim(bench)
    np.testing.assert_allclose(bench.zeros, 0.5, atol=1e-9)
    assert claim.holds is holds and ("does not always" in claim.sentence) is not holds
    assert claim.numbers["SparseGPT, 50%"] == np.mean(costs[2:4]) and claim.numbers["magnitude, 2:4"] == 40


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"sparsity": 1}, r"sparsity must be in \[0, 1\), got 1"),
        ({"pattern": (5, 4)}, "need 1 <= n <= m, got n=5, m=4"),
        ({"pattern": (2, 3)}, "weight has 4 columns, a block 128: not both divisible by m=3"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"damping": -1}, "damping must be at least 0 and finite, got -1"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"hessian": np.eye(3)}, r"hessian must be finite, \[in, in\] = \(4, 4\); got shape \(3, 3\)"),
        ({"hessian": np.tri(4)}, "hessian must be symmetric"),
        ({"hessian": -np.eye(4)}, "not positive definite with damping=0.01"),
        ({"weight": np.full((2, 4), np.nan)}, "weight must be finite"),
    ],
)
def test_the_reference_names_the_fault(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        chapter.sparsegpt(**({"weight": np.ones((2, 4)), "hessian": np.eye(4)} | changed))


def test_solve_block_and_obs_name_the_fault():
    with pytest.raises(ValueError, match="give either mask or pattern"):
        chapter.solve_block(np.ones((2, 4)), np.eye(4))
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got nan"):
        chapter.obs(np.ones((2, 4)), np.eye(4), float("nan"))


# --- the kernel around whole layers -----------------------------------------------------------------------------------


@pytest.mark.kernel
@settings(max_examples=6)  # the interpreter is slow
@given(
    layers(columns=(1, 7, 12, 24)), st.sampled_from([None, (2, 4), (2, 3)]), st.sampled_from([None, 3]), st.booleans(),
    st.sampled_from([0.01, 1.0]), st.sampled_from([12, 128]),
)  # fmt: skip
def test_kernel_equals_the_reference(layer, pattern, bits, exact, damping, size):
    pattern = pattern if pattern and layer.weight.shape[1] % pattern[1] == 0 else None
    options = (0.6, pattern, bits, exact, damping, size)
    expected = oracle("pruning.sparsegpt").sparsegpt(layer.weight, layer.hessian, *options)
    mine = [torch.from_numpy(part).to(DEVICE) for part in (layer.weight, layer.hessian)]
    copies = [part.clone() for part in mine]
    solved, mask, error = fast.sparsegpt(*mine, *options)
    assert all(map(torch.equal, mine, copies)) and solved.dtype is torch.float64 and mask.dtype is torch.bool
    np.testing.assert_array_equal(mask.cpu().numpy(), expected.mask)
    near = tolerance(np.float64, 24, 1e4 * np.abs([*layer.weight, *expected.weight]).max())
    np.testing.assert_allclose(solved.cpu().numpy(), expected.weight, **near)
    assert float(error) == pytest.approx(expected.error, rel=1e-8)


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "options"), [("u50_bs16", {"block_size": 16}), ("s4of8_bs32", {"pattern": (4, 8)})])
def test_kernel_equals_the_released_code(case, options):
    arrays, rows = golden("sparse/sparsegpt"), 24 if case[0] == "u" else 8
    weight, hessian = (torch.from_numpy(arrays[name]).to(DEVICE) for name in ("W", "H_fp64"))
    found = fast.sparsegpt(weight[:rows], hessian, **options)[0].cpu().numpy()
    np.testing.assert_array_equal(found == 0, arrays[f"{case}__W_fp64"][:rows] == 0)
    np.testing.assert_allclose(found, arrays[f"{case}__W_fp64"][:rows], **tolerance(np.float32, 64))


@pytest.mark.kernel
def test_half_precision_is_solved_in_single():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    found, same = (fast.sparsegpt(w, torch.eye(8, device=DEVICE), pattern=(2, 4)) for w in (weight, weight.float()))
    assert found[0].dtype is torch.float32 and all(map(torch.equal, found, same))


@pytest.mark.kernel
@given(st.sampled_from(CONTENTS), st.integers(1, 5), st.integers(1, 9), SEEDS, st.floats(0, 0.999), st.booleans())
def test_thresholds_are_the_references(kind, rows, columns, seed, sparsity, exact):
    score = contents(kind, (rows, columns), seed) ** 2
    found = fast.threshold_mask(torch.from_numpy(score).to(DEVICE), sparsity, exact).cpu().numpy()
    np.testing.assert_array_equal(found, oracle("pruning.sparsegpt").threshold_mask(score, sparsity, exact))


@pytest.mark.kernel
@pytest.mark.parametrize(("pattern", "bits"), [(None, None), ((2, 4), 4)])
def test_the_plain_torch_peer_does_the_same(pattern, bits):
    case = fast.llama_case(5, 16, pattern, bits, width=8)
    inputs = case.inputs(torch.device(DEVICE))
    torch.testing.assert_close(case.run(*inputs), case.expected(*inputs))
    assert (case.run(*inputs) == 0).any()


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"weight": ONES[0]}, ValueError, "weight must be a matrix, not empty, got"),
        ({"weight": torch.ones(2, 257, device=DEVICE)}, ValueError, "at most 256 columns, got 257"),
        ({}, ValueError, "give either mask or pattern"),
        ({"mask": ONES > 0, "pattern": (2, 4)}, ValueError, "give either mask or pattern"),
        ({"mask": ONES}, TypeError, "mask must have dtype torch.bool"),
        ({"mask": ONES.T > 0}, ValueError, r"mask must have shape \(2, 4\), got \(4, 2\)"),
        ({"mask": (ONES.T > 0).contiguous().T}, ValueError, "mask must be contiguous"),
        ({"pattern": (5, 4)}, ValueError, "need 1 <= n <= m, got n=5, m=4"),
        ({"pattern": (2, 3)}, ValueError, "weight has 4 columns, not divisible by m=3"),
        ({"upper": EYE[:3]}, ValueError, r"upper must have shape \(4, 4\), got \(3, 4\)"),
        ({"upper": EYE.double()}, TypeError, "upper must have dtype torch.float32"),
        ({"weight": ONES.half()}, TypeError, "weight must have dtype"),
        ({"weight": torch.ones(4, 2, device=DEVICE).T}, ValueError, "weight must have neighbouring columns side by"),
        ({"grid": (ONES[:, 0], ONES[:, 0].contiguous(), 4)}, ValueError, "scale must be contiguous"),
        ({"grid": (ONES[0], ONES[0], 4)}, ValueError, r"scale must have shape \(2,\), got \(4,\)"),
        ({"grid": (ONES[0], ONES[0], 9)}, ValueError, "bits must be an integer from 1 to 8, got 9"),
    ],
)
def test_solve_block_names_what_it_refuses(changed, error, complaint):
    pattern = {} if "mask" in changed or not changed else {"pattern": (2, 4)}
    with pytest.raises(error, match=complaint):
        fast.solve_block(**({"weight": ONES, "upper": EYE} | pattern | changed))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"pattern": (2, 4), "block_size": 6}, "a block has 6 columns, not divisible by m=4"),
        ({"pattern": (2, 3)}, "weight has 4 columns, not divisible by m=3"),
        ({"bits": True}, "bits must be 1 to 8, got True"),
        ({"block_size": 257}, "block_size 1 .. 256, got damping=0.01, block_size=257"),
        ({"damping": -1}, "got damping=-1"),
        ({"weight": ONES * torch.nan}, "weight must be finite and below"),
        ({"weight": ONES[0]}, "weight must be a matrix"),
        ({"hessian": EYE[:3]}, r"hessian must be finite, .* got shape \(3, 4\)"),
        ({"hessian": EYE * torch.inf}, "hessian must be finite"),
        ({"hessian": torch.ones(4, 4, device=DEVICE).tril()}, "hessian must be symmetric"),
        ({"hessian": -EYE}, "hessian is not positive definite with damping=0.01"),
    ],
)
def test_the_kernel_names_what_it_refuses(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        fast.sparsegpt(**({"weight": ONES, "hessian": EYE} | changed))
