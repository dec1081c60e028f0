"""ZeroQuant: codes against a loop and the authors' arrays, the fused norm, distillation as they ran it, the kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chapters.quantization.zeroquant import distill_layers, quantize, rms_norm_quantize, rounded
from minitfm.model import RMSNorm
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.token_grids import (
    EVEN,
    LOSSY,
    SEEDS,
    SIZES,
    TIES,
    as_numpy,
    codes_by_hand,
    exact_norm,
    mean_squares,
    near,
    toy_layers,
    values,
)  # fmt: skip

kernels = kernel("quantization.zeroquant")


@pytest.mark.exercise("chapters.quantization.zeroquant.quantize", points=2)
class TestQuantize:
    @given(
        SEEDS, st.integers(1, 5), st.sampled_from([1, 2, 5, 17]), st.integers(2, 8), st.booleans(),
        st.sampled_from([np.float16, np.float32, np.float64]),
    )  # fmt: skip
    def test_codes_are_those_of_a_loop(self, seed, groups, size, bits, symmetric, given_):
        x, dtype = values(seed, groups, size, given_) + given_(seed % 3), np.promote_types(given_, np.float32)
        cut = x.astype(dtype)
        codes, scale, zero = quantize(x.reshape(size, groups), bits, groups, symmetric)
        np.testing.assert_array_equal(x, cut)
        assert codes.shape == (size, groups) and codes.dtype == (np.int8 if symmetric else np.uint8)
        assert scale.shape == zero.shape == (groups,) and scale.dtype == zero.dtype == dtype
        for at, numbers in enumerate(cut):
            expected, step, start = codes_by_hand(numbers, bits, symmetric)
            np.testing.assert_array_equal(codes.reshape(groups, size)[at], expected)
            assert (scale[at], zero[at]) == (step, start)

    @pytest.mark.parametrize("scheme", ["sym", "asym"])
    def test_codes_and_values_equal_the_authors(self, scheme):
        held, compared = golden("quant/zeroquant_lkd"), 0
        for name in {key.split("/")[0] for key in held if key.startswith(f"w_{scheme}_")}:
            bits, groups = (int(part[1:]) for part in name.split("_")[2:])
            codes, scale, zero = quantize(held["W"].astype(np.float32), bits, groups, scheme == "sym")
            np.testing.assert_array_equal(codes, held[f"{name}/codes"], name)
            np.testing.assert_array_equal(scale, held[f"{name}/scale_derived"], name)
            if f"{name}/deq" in held:
                cut = codes.reshape(groups, -1).astype(np.float32) * scale[:, None] + zero[:, None]
                np.testing.assert_array_equal(cut.reshape(codes.shape), held[f"{name}/deq"], name)
            compared += 1
        assert compared >= 4

    @pytest.mark.parametrize("scheme", ["sym", "asym"])
    def test_token_values_equal_the_authors(self, scheme):
        held = golden("quant/zeroquant_lkd")
        expected = held[f"x_{scheme}_tokenwise_b8/deq"]
        x = held["X"][: len(expected)].astype(np.float32)
        codes, scale, zero = quantize(x, 8, len(x), scheme == "sym")
        np.testing.assert_array_equal(codes.astype(np.float32) * scale[:, None] + zero[:, None], expected)

    def test_ties_go_to_even_and_both_ends_are_clipped(self):
        np.testing.assert_array_equal(quantize(TIES, 8)[0], [EVEN])
        codes, scale, zero = quantize(np.array([8.0, 4, -4]), 4)
        assert (codes.tolist(), scale.tolist(), zero.tolist()) == ([7, 4, -4], [1], [0])
        codes, scale, zero = quantize(np.array([-4.0, -3.5, -2.5, 4, 12]), 4, symmetric=False)
        assert (codes.tolist(), scale.tolist(), zero.tolist()) == ([0, 0, 2, 8, 15], [1], [-4])
        far = np.array([999999.5, 1000001.0625, 1000000.125, 999998.75], np.float32)  # rounding moves zero by 7 steps
        assert quantize(far, 8, symmetric=False)[0].tolist() == [76, 249, 145, 0]

    @pytest.mark.parametrize("number", [0.0, 3.7, -1e-3, 1e-45, 3e38])
    def test_equal_numbers_keep_their_value(self, number):
        x = np.full(6, number, np.float32)
        codes, scale, zero = quantize(x, 4, 2, symmetric=False)
        np.testing.assert_array_equal(codes.reshape(2, 3) * scale[:, None] + zero[:, None], x.reshape(2, 3))
        codes, scale, zero = quantize(x, 4, 2)
        assert np.isfinite(scale).all() and (zero == 0).all()
        assert (codes == (0 if abs(number) < 1e-37 else 7 if number > 0 else -8)).all()

    @pytest.mark.parametrize(
        ("x", "bits", "groups", "symmetric"),
        [
            (np.ones(6), 4, 4, True), (np.ones(6), 4, 0, True), (np.ones(6), 4, -2, True), (np.ones(6), 1, 1, True),
            (np.ones(6), 9, 1, False), (np.ones(0), 4, 1, True), (np.array([1, np.nan]), 4, 1, True),
            (np.array([1, np.inf]), 4, 1, False), (np.array([3e38, -3e38], np.float32), 4, 1, False),
        ],
    )  # fmt: skip
    def test_refuses_what_has_no_grid(self, x, bits, groups, symmetric):
        with pytest.raises(ValueError):
            quantize(x, bits, groups, symmetric)


@pytest.mark.exercise("chapters.quantization.zeroquant.rms_norm_quantize", points=2)
class TestNorm:
    @given(**SIZES, sums=st.booleans(), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
    def test_codes_stand_for_the_norm(self, seed, rows, columns, sums, dtype):
        x, weight = values(seed, rows, columns, dtype), values(seed + 1, 1, columns, dtype)[0]
        residual = values(seed + 2, rows, columns, dtype) if sums else None
        codes, scale, hidden = rms_norm_quantize(x, weight, 1e-5, residual)
        near(codes, scale, exact_norm(x, weight, 1e-5, residual))
        assert hidden.dtype == dtype and scale.dtype == (np.float64 if dtype is np.float64 else np.float32)
        np.testing.assert_array_equal(hidden, x + residual if sums else x)

    @given(**SIZES)
    def test_is_the_models_norm(self, seed, rows, columns):
        x, weight = values(seed, rows, columns, np.float64), values(seed + 1, 1, columns, np.float64)[0]
        norm = RMSNorm(columns, 1e-6).double()
        norm.weight.data = torch.from_numpy(weight)
        codes, scale, _ = rms_norm_quantize(x, weight, 1e-6)
        near(codes, scale, norm(torch.from_numpy(x)).numpy(force=True))

    def test_codes_do_not_depend_on_the_sum_of_squares(self):
        weight = np.ones(8, np.float32)
        for eps in (1e-6, 1e3):
            codes, scale, _ = rms_norm_quantize(TIES.astype(np.float32), weight, eps)
            np.testing.assert_array_equal(codes[0], EVEN)
            assert scale[0] == pytest.approx(1 / math.sqrt((TIES**2).mean() + eps))

    def test_the_sum_is_rounded_first(self):
        codes, _, hidden = rms_norm_quantize(*LOSSY[:2], 1e-5, LOSSY[2])
        assert (codes.tolist(), hidden.tolist()) == ([[127, 2]], [[2048, 24]])

    @pytest.mark.parametrize(("one", "other"), [(np.float16, np.float32), (np.float32, np.float16)])
    def test_the_sum_has_the_dtype_of_x(self, one, other):
        x, residual = values(1, 3, 5, one), values(2, 3, 5, other)
        hidden = rms_norm_quantize(x, np.ones(5), 1e-5, residual)[2]
        assert hidden.dtype == one
        np.testing.assert_array_equal(hidden, (x + residual).astype(one))

    def test_leaves_its_arguments_alone(self):
        x, residual = values(1, 3, 5), values(2, 3, 5)
        before = x.copy(), residual.copy()
        rms_norm_quantize(x, np.ones(5, np.float32), 1e-5, residual)
        np.testing.assert_array_equal([x, residual], before)

    @pytest.mark.parametrize(
        "changed",
        [
            {"weight": np.ones(3)}, {"weight": np.ones((1, 4))}, {"residual": np.ones((1, 4))}, {"eps": 0.0},
            {"eps": -1.0}, {"eps": math.nan}, {"x": np.ones(4)}, {"x": np.full((2, 4), np.inf)},
            {"x": np.full((2, 4), 1e30, np.float32)}, {"x": np.ones((0, 4))},
        ],
    )  # fmt: skip
    def test_refuses_what_has_no_norm(self, changed):
        with pytest.raises(ValueError):
            rms_norm_quantize(**{"x": np.ones((2, 4)), "weight": np.ones(4), "eps": 1e-5} | changed)


class ToyLayer(nn.Module):
    """The layer that the authors' code distilled in the golden arrays; with bits, rounded by the book's function."""

    def __init__(self, held: dict[str, np.ndarray], layer: int, bits: int | None = None) -> None:
        super().__init__()
        parts = {"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16), "LayerNorm": nn.LayerNorm(16)}
        self.parts, self.bits = nn.ModuleDict(parts), bits
        given_ = (f"lkd/teacher/layer.{layer}.{name}" for name, _ in self.parts.named_parameters())
        for parameter, key in zip(self.parts.parameters(), given_, strict=True):
            parameter.data = torch.from_numpy(held[key].astype(np.float32))

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.parts[name]
        if self.bits is None:
            return layer(x)
        return F.linear(rounded(x), rounded(layer.weight, self.bits, layer.out_features), layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["LayerNorm"](self.linear("fc2", F.relu(self.linear("fc1", x))) + x)


def toy_pair(held: dict[str, np.ndarray]) -> tuple[list[ToyLayer], list[ToyLayer]]:
    """The layers of the authors' student, with weights in 4 bits, and of their teacher."""
    student, teacher = ([ToyLayer(held, layer, bits) for layer in range(3)] for bits in (4, None))
    return student, teacher


def test_distillation_ends_with_the_authors_weights():
    held = golden("quant/zeroquant_lkd")
    student, teacher = toy_pair(held)
    losses = distill_layers(student, teacher, list(torch.from_numpy(held["lkd/batches"])), 40, 2e-3)
    np.testing.assert_allclose(losses, held["lkd/losses"], rtol=0.1)  # a code that flips changes what follows
    for index, layer in enumerate(student):
        for name, parameter in layer.parts.named_parameters():
            expected = held[f"lkd/student_after/layer.{index}.{name}"]
            np.testing.assert_allclose(parameter.numpy(force=True), expected, atol=1e-3)


@pytest.mark.exercise("chapters.quantization.zeroquant.distill_layers", points=3)
class TestDistillation:
    def test_repeats_the_authors_first_losses(self):
        held = golden("quant/zeroquant_lkd")
        losses = distill_layers(*toy_pair(held), list(torch.from_numpy(held["lkd/batches"])), 10, 2e-3)
        np.testing.assert_allclose(losses, held["lkd/losses"][:, :10], rtol=1e-5)

    @given(SEEDS, st.integers(1, 3), st.integers(1, 3))
    def test_the_first_losses_are_those_of_layers_fed_by_the_teacher(self, seed, count, batches):
        teacher, student = toy_layers(count, seed=seed % 1000), toy_layers(count, seed=seed % 1000 + 1)
        given_ = [torch.randn(2, 3, generator=torch.Generator().manual_seed(at)) for at in range(batches)]
        x, expected = given_[0], []
        with torch.no_grad():
            for learner, master in zip(student, teacher, strict=True):
                expected.append(mean_squares(learner(x), master(x)))
                x = master(x)
        losses = distill_layers(student, teacher, given_, 2, 1e-3)
        assert losses.shape == (count, 2)
        np.testing.assert_allclose(losses[:, 0], expected, **tolerance(np.float32, 6, scale=10))

    def test_no_step_changes_nothing(self):
        student = toy_layers(2)
        assert distill_layers(student, toy_layers(2, seed=5), [torch.ones(1, 3)], 0, 1e-3).shape == (2, 0)
        assert all(torch.equal(one.weight, other.weight) for one, other in zip(student, toy_layers(2), strict=True))

    def test_layers_are_trained_apart_and_only_the_students(self):
        teacher, batches = toy_layers(3), [torch.randn(4, 3, generator=torch.Generator().manual_seed(1))]
        before = [parameter.clone() for layer in teacher for parameter in layer.parameters()]
        together, alone = toy_layers(3, seed=9), toy_layers(3, seed=9)
        losses = distill_layers(together, teacher, batches, 20, 1e-2)
        x = batches[0]
        for index, (learner, master) in enumerate(zip(alone, teacher, strict=True)):
            np.testing.assert_array_equal(distill_layers([learner], [master], [x], 20, 1e-2)[0], losses[index])
            torch.testing.assert_close(learner.state_dict(), together[index].state_dict(), rtol=0, atol=0)
            x = master(x).detach()
        assert (losses[:, -1] < losses[:, 0]).all()
        after = [parameter for layer in teacher for parameter in layer.parameters()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert all(parameter.grad is None for parameter in after)

    def test_batches_come_in_turn_and_arguments_reach_all_layers(self):
        class Shifted(nn.Linear):
            def forward(self, x, shift):
                return super().forward(x) + shift

        given_ = [torch.full((1, 2), float(at)) for at in range(3)]
        teacher, student = Shifted(2, 2), Shifted(2, 2)
        with torch.no_grad():
            student.load_state_dict(teacher.state_dict())
            student.bias += 1
        shift = torch.full((2,), 5.0)
        losses = distill_layers([student], [teacher], given_, 7, 0.0, shift)
        np.testing.assert_allclose(losses, np.ones((1, 7)), **tolerance(np.float32, 2, scale=10))
        with torch.no_grad():
            student.bias -= 1
            student.weight += 1  # batch at has the error (2 at)²
        losses = distill_layers([student], [teacher], given_, 7, 0.0, shift)
        expected = [(2.0 * (step % 3)) ** 2 for step in range(7)]
        np.testing.assert_allclose(losses[0], expected, **tolerance(np.float32, 2, scale=50))
        assert [float(x[0, 0]) for x in given_] == [0, 1, 2]

    @pytest.mark.parametrize(("count", "batches", "steps"), [(1, 1, 1), (2, 0, 1), (2, 1, -1)])
    def test_refuses_what_does_not_fit(self, count, batches, steps):
        with pytest.raises(ValueError):
            distill_layers(toy_layers(count), toy_layers(2), [torch.ones(1, 3)] * batches, steps, 1e-3)


def on_device(x: np.ndarray, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    return poisoned(torch.from_numpy(x).to(DEVICE, dtype), aligned)


KERNEL_SIZES = SIZES | {"dtype": st.sampled_from(KERNEL_DTYPES), "aligned": st.booleans()}


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.zeroquant.rms_norm_kernel", points=3)
class TestNormKernel:
    @given(**KERNEL_SIZES, sums=st.booleans())
    def test_gives_the_codes_of_the_reference(self, seed, rows, columns, dtype, aligned, sums):
        x, residual = (on_device(values(seed + at, rows, columns), dtype, aligned) for at in (0, 1))
        weight = on_device(values(seed + 2, 1, columns)[0], dtype, aligned)
        given_ = [x, weight, 1e-5, *([residual] if sums else [])]
        codes, scale, hidden = kernels.rms_norm_quantize(*given_)
        assert hidden.dtype is dtype and codes.dtype is torch.int8 and scale.dtype is torch.float32
        np.testing.assert_array_equal(as_numpy(hidden), as_numpy(x + residual if sums else x))
        expected = oracle("quantization.zeroquant").rms_norm_quantize(as_numpy(hidden), as_numpy(weight), 1e-5)
        np.testing.assert_array_equal(codes.cpu().numpy(), expected[0])
        np.testing.assert_allclose(scale.cpu().numpy(), expected[1], **tolerance(np.float32, columns))

    def test_ties_go_to_even(self):
        x = torch.from_numpy(TIES).float().to(DEVICE)
        codes, scale, _ = kernels.rms_norm_quantize(x, torch.ones(8, device=DEVICE), 1.0)
        assert codes[0].tolist() == EVEN
        assert scale.item() == pytest.approx(1 / math.sqrt((TIES**2).mean() + 1))

    def test_the_sum_is_rounded_first(self):
        x, weight, residual = (torch.from_numpy(part).to(DEVICE) for part in LOSSY)
        codes, _, hidden = kernels.rms_norm_quantize(x, weight, 1e-5, residual)
        assert (codes.tolist(), hidden.tolist()) == ([[127, 2]], [[2048, 24]])

    @pytest.mark.filterwarnings("ignore:.* encountered in")
    @pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
    def test_the_scale_of_a_broken_token_is_nan(self, number):
        x = torch.ones(3, 4)
        x[1, 2] = number
        _, scale, _ = kernels.rms_norm_quantize(x.to(DEVICE), torch.ones(4, device=DEVICE), 1e-5)
        assert scale.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, begins):
        x, residual, weight = (torch.from_numpy(values(at, 3, 5)).to(DEVICE) for at in range(3))
        given_ = walled(x, begins), walled(weight[0], begins), 1e-5, walled(residual, begins)
        assert torch.equal(kernels.rms_norm_quantize(*given_)[2], x + residual)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.zeroquant.activation_kernel", points=2)
class TestActivationKernel:
    @given(**KERNEL_SIZES)
    def test_codes_stand_for_the_activation(self, seed, rows, columns, dtype, aligned):
        gate, up = (on_device(values(seed + at, rows, columns), dtype, aligned) for at in (0, 1))
        reference, found = oracle("quantization.zeroquant"), kernels.swiglu_quantize(gate, up)
        precise = gate.double().cpu(), up.double().cpu()
        near(*(part.cpu().numpy() for part in found), (F.silu(precise[0]) * precise[1]).numpy())
        expected = reference.swiglu_quantize(as_numpy(gate), as_numpy(up))
        assert np.abs(found[0].cpu().numpy().astype(int) - expected[0]).max() <= (DEVICE == "cuda")
        found = kernels.gelu_quantize(gate)
        near(*(part.cpu().numpy() for part in found), F.gelu(precise[0]).numpy())

    def test_ties_go_to_even(self):
        x = torch.from_numpy(TIES).float().to(DEVICE)
        codes, _ = kernels.swiglu_quantize(torch.full_like(x, 64.0), x)  # silu(64) is 64
        assert codes[0].tolist() == EVEN

    @pytest.mark.filterwarnings("ignore:.* encountered in")
    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_the_scale_of_a_broken_token_is_nan(self, number):
        x, up = torch.ones(3, 4), torch.ones(3, 4, device=DEVICE)
        x[1, 2] = number
        x = x.to(DEVICE)
        assert kernels.swiglu_quantize(x, up)[1].isnan().tolist() == [False, True, False]
        assert kernels.swiglu_quantize(up, x)[1].isnan().tolist() == [False, True, False]
        assert kernels.gelu_quantize(x)[1].isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, begins):
        gate, up = (walled(torch.from_numpy(values(at, 3, 5)).to(DEVICE), begins) for at in range(2))
        assert kernels.swiglu_quantize(gate, up)[0].shape == kernels.gelu_quantize(gate)[0].shape == (3, 5)
