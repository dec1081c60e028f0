"""The column solver: a block against a loop, whole layers against the reference and the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DEVICE, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.problems import layers, nearest

gptq = kernel("quantization.gptq")

pytestmark = pytest.mark.kernel
SEEDS = st.integers(0, 2**32 - 1)


def block(seed: int, rows: int, width: int, groups: int = 1, bits: int = 3) -> dict:
    """A block of columns in float64, some weights half-way between two codes: arguments of `solve_block`."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-3, 3, (rows, groups))
    group = rng.integers(0, groups, width)
    zero = rng.integers(0, 2**bits, (rows, groups)).astype(float)
    weight = rng.standard_normal((rows, width)) * 2**bits / 3 * scale[:, group]
    weight[:, 0] = (rng.integers(-9, 9, rows) + 0.5) * scale[:, group[0]]
    upper = np.diag(rng.uniform(0.5, 2, width)) + 0.3 * np.triu(rng.standard_normal((width, width)), 1)
    parts = {"weight": weight, "upper": upper, "scale": scale, "zero": zero}
    return {name: torch.from_numpy(part).to(DEVICE) for name, part in parts.items()} | {
        "group": torch.from_numpy(group.astype(np.int32)).to(DEVICE),
        "bits": bits,
    }


def by_hand(weight, upper, scale, zero, group, bits):
    """Codes and errors, one weight after another."""
    w, u, scale, zero = (part.double().cpu().numpy().copy() for part in (weight, upper, scale, zero))
    codes, errors = np.empty(w.shape, np.uint8), np.empty(w.shape)
    for j, g in enumerate(group.tolist()):
        for row in range(len(w)):
            codes[row, j] = nearest(w[row, j], scale[row, g], int(zero[row, g]), bits)
            errors[row, j] = (w[row, j] - scale[row, g] * (float(codes[row, j]) - zero[row, g])) / u[j, j]
            w[row, j:] -= errors[row, j] * u[j, j:]
    return codes, errors


@pytest.mark.exercise("kernels.quantization.gptq.solve_kernel", points=4)
class TestSolveKernel:
    @given(
        SEEDS, st.sampled_from([1, 7, 9, 17]), st.sampled_from([1, 2, 13, 16, 17]), st.sampled_from([1, 3]),
        st.sampled_from([1, 2, 4, 8]), st.booleans(),
    )  # fmt: skip
    def test_equals_the_definition(self, seed, rows, width, groups, bits, aligned):
        given_ = block(seed, rows, width, groups, bits)
        held = {name: poisoned(part, aligned) for name, part in given_.items() if name != "bits"}
        codes, errors = gptq.solve_block(**held, bits=bits)
        expected = by_hand(**given_)
        assert codes.dtype is torch.uint8 and errors.dtype is torch.float64
        np.testing.assert_array_equal(codes.cpu().numpy(), expected[0])
        close = tolerance(np.float64, width, max(1, np.abs(expected[1]).max()))
        np.testing.assert_allclose(errors.cpu().numpy(), expected[1], **close)

    @settings(max_examples=8)
    @given(SEEDS, st.sampled_from([1, 9]), st.sampled_from([1, 13, 17]))
    def test_rounds_halves_to_even_in_single_precision(self, seed, rows, width):
        given_ = block(seed, rows, width, bits=4)
        given_["upper"] = torch.eye(width, dtype=torch.float64, device=DEVICE)  # columns do not interact
        given_["weight"] = (2 * given_["weight"] / given_["scale"]).round() / 2 * given_["scale"]
        held = {
            name: poisoned(part.float())
            for name, part in given_.items()
            if name in ("weight", "upper", "scale", "zero")
        }
        codes, errors = gptq.solve_block(**held, group=given_["group"], bits=4)
        expected = by_hand(**given_)
        np.testing.assert_array_equal(codes.cpu().numpy(), expected[0])
        np.testing.assert_array_equal(errors.cpu().numpy(), expected[1])

    @pytest.mark.parametrize("size", [1e3, 1e7, 1e25])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_clips_however_far_a_weight_lies_outside(self, size, dtype):
        weight = torch.tensor([[-size, size]], dtype=dtype, device=DEVICE)
        one, zero = torch.ones((1, 1), dtype=dtype, device=DEVICE), torch.full((1, 1), 2.0, dtype=dtype, device=DEVICE)
        group, upper = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.eye(2, dtype=dtype, device=DEVICE)
        codes, _ = gptq.solve_block(weight, upper, one, zero, group, 3)
        np.testing.assert_array_equal(codes.cpu().numpy(), [[0, 7]])

    def test_takes_blocks_out_of_larger_matrices(self):
        given_ = block(5, 9, 13, 2)
        wide = {
            name: torch.full((20, 40), torch.nan, dtype=torch.float64, device=DEVICE) for name in ("weight", "upper")
        }
        for name, whole in wide.items():
            part = given_[name]
            whole[1 : 1 + len(part), 3:16] = part
            given_[name] = whole[1 : 1 + len(part), 3:16]
        before = given_["weight"].clone()
        np.testing.assert_array_equal(gptq.solve_block(**given_)[0].cpu().numpy(), by_hand(**given_)[0])
        assert torch.equal(given_["weight"], before)

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", ["weight", "upper", "scale", "zero", "group"])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        given_ = block(7, 9, 13, 3)
        given_[which] = walled(given_[which], begins)
        np.testing.assert_array_equal(gptq.solve_block(**given_)[0].cpu().numpy(), by_hand(**given_)[0])


class TestGptq:
    @settings(max_examples=12)  # the interpreter is slow
    @given(
        layers(columns=(1, 7, 12, 24)), st.sampled_from([1, 2, 4, 8]), st.sampled_from([None, 2, 3]), st.booleans(),
        st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.01, 1.0]), st.sampled_from([1, 5, 8, 128]),
    )  # fmt: skip
    def test_equals_the_reference(self, layer, bits, parts, symmetric, mse, act_order, static, damping, width):
        columns = layer.weight.shape[1]
        size = columns // parts if parts and columns % parts == 0 else None
        options = (bits, size, symmetric, mse, act_order, static and size is not None, damping, width)
        expected = oracle("quantization.gptq").gptq(layer.weight, layer.hessian, *options)
        given_ = (torch.from_numpy(part).to(DEVICE) for part in (layer.weight, layer.hessian))
        codes, scale, zero, group = (part.cpu().numpy() for part in gptq.gptq(*given_, *options))
        np.testing.assert_array_equal(group, expected.group_of_column)
        np.testing.assert_array_equal(codes, expected.codes)
        np.testing.assert_array_equal(zero, expected.zero)
        np.testing.assert_allclose(scale, expected.scale, rtol=1e-9)

    def test_leaves_its_arguments_alone(self):
        weight, hessian = (
            torch.tensor([[3.0, 1.0, -1.0]], device=DEVICE),
            torch.diag(torch.tensor([0.0, 1.0, 2.0])).to(DEVICE),
        )
        copies = weight.clone(), hessian.clone()
        gptq.gptq(weight, hessian, 4, act_order=True)
        assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])

    def test_half_precision_is_solved_in_single(self):
        layer = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
        found, same = (gptq.gptq(weight, torch.eye(16, device=DEVICE), 4) for weight in (layer, layer.float()))
        assert found[1].dtype is torch.float32 and all(map(torch.equal, found, same))


def test_the_plain_torch_peer_does_the_same():
    given_ = block(3, 9, 13, 3)
    for found, expected in zip(gptq.column_by_column(**given_), by_hand(**given_), strict=True):
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-9, atol=1e-9)
    case = gptq.llama_case(9, 32, 16)
    inputs = case.inputs(torch.device(DEVICE))
    torch.testing.assert_close(case.run(*inputs), case.expected(*inputs))


@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"weight": torch.ones(4)}, ValueError, "weight must be a matrix, not empty, got"),
        ({"weight": torch.ones(0, 4)}, ValueError, "not empty"),
        ({"weight": torch.ones(2, 257)}, ValueError, "weight must have at most 256 columns, got 257"),
        ({"upper": torch.eye(3)}, ValueError, r"upper must have shape \(4, 4\), got \(3, 3\)"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale must have shape \(2, 1\)"),
        ({"zero": torch.ones(2, 2)}, ValueError, r"zero must have shape \(2, 1\)"),
        ({"group": torch.zeros(3, dtype=torch.int32)}, ValueError, r"group must have shape \(4,\)"),
        ({"weight": torch.ones(4, 2).T}, ValueError, "weight must have neighbouring columns side by side"),
        ({"weight": torch.ones(2, 4).half()}, TypeError, "weight must have dtype"),
        ({"upper": torch.eye(4).double()}, TypeError, "upper must have dtype torch.float32"),
        ({"group": torch.zeros(4, dtype=torch.int64)}, TypeError, "group must have dtype torch.int32"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
    ],
)
def test_solve_block_names_what_it_refuses(changed, error, complaint):
    ones, group = torch.ones(2, 1), torch.zeros(4, dtype=torch.int32)
    good = {"weight": torch.ones(2, 4), "upper": torch.eye(4), "scale": ones, "zero": ones, "group": group, "bits": 4}
    with pytest.raises(error, match=complaint):
        gptq.solve_block(**(good | changed))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": True}, "got True"),
        ({"group_size": 3}, "group_size must divide the 4 columns of weight, got 3"),
        ({"group_size": 0}, "got 0"),
        ({"weight": torch.full((2, 4), torch.nan)}, "weight must be finite and below"),
        ({"weight": torch.ones(4)}, "weight must be a matrix"),
        ({"hessian": torch.eye(3)}, r"hessian must be finite, .* got shape \(3, 3\)"),
        ({"hessian": torch.eye(4) * torch.inf}, "hessian must be finite"),
        ({"hessian": torch.ones(4, 4).tril()}, "hessian must be symmetric"),
        ({"hessian": -torch.eye(4)}, "hessian is not positive definite with damping=0.01"),
        ({"damping": float("nan")}, "got damping=nan"),
        ({"block_size": 257}, r"block_size 1 .. 256, got damping=0.01, block_size=257"),
        ({"weight": torch.tensor([[1e-45, 0.0, 0.0, 0.0]])}, "range that torch.float32 cannot divide"),
    ],
)
def test_gptq_names_what_it_refuses(changed, complaint):
    good = {"weight": torch.eye(4), "hessian": torch.eye(4), "bits": 4}
    with pytest.raises(ValueError, match=complaint):
        gptq.gptq(**(good | changed))
