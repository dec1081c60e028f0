"""PR-MoE: the mix against a loop and DeepSpeed's own layer, its gradients against autograd, kernels against both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chapters.moe import residual
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.moe.mixes import ARGUMENTS, DIMS, SEEDS, TOKENS, Arguments, deepspeed, drawn, sound

MIX = pytest.mark.exercise("chapters.moe.residual.mix", points=2)
BACKWARD = pytest.mark.exercise("chapters.moe.residual.mix_backward", points=3)
MIX_KERNEL = pytest.mark.exercise("kernels.moe.residual.mix_kernel", points=3)
BACKWARD_KERNEL = pytest.mark.exercise("kernels.moe.residual.mix_backward_kernel", points=4)

fast = kernel("moe.residual")


def by_loop(x, weight, bias, rows, source, gate, mlp) -> np.ndarray:
    """One token, one element after the other."""
    out = []
    for t, token in enumerate(x):
        one, two = (math.exp(math.fsum(w * token) + b) for w, b in zip(weight, bias, strict=True))
        expert = [0.0] * len(token) if source[t] < 0 else gate[t] * rows[source[t]]
        out.append([(one * e + two * m) / (one + two) for e, m in zip(expert, mlp[t], strict=True)])
    return np.array(out)


# --- the mix ------------------------------------------------------------------------------------------------------


@MIX
@given(ARGUMENTS)
def test_a_token_is_its_experts_answer_and_the_fixed_layers_by_their_coefficients(given_):
    before = {name: part.copy() for name, part in given_.items()}
    found = residual.mix(**given_)
    np.testing.assert_allclose(found, by_loop(**given_), **tolerance(np.float64, given_["x"].shape[1], 10))
    for name, part in before.items():
        np.testing.assert_array_equal(given_[name], part)
    assert found.dtype == np.float64 and found.shape == given_["x"].shape


def narrowed(given_: Arguments) -> list[tuple[type, Arguments]]:
    """The arguments in float32, and with each of them alone in float64: what dtype they have together."""
    narrow = {name: part if name == "source" else part.astype(np.float32) for name, part in given_.items()}
    wider = [narrow | {name: given_[name]} for name in narrow if name != "source"]
    return [(np.float32, narrow), *((np.float64, one) for one in wider)]


@MIX
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_the_widest_dtype_is_kept(kept):
    for dtype, made in narrowed(drawn(3, 2, 0, kept)):
        found = residual.mix(**made)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, by_loop(**made), **tolerance(np.float32, 2, 10))


@MIX
@given(ARGUMENTS)
def test_the_limits_are_the_fixed_layer_and_the_expert_alone(given_):
    """Also where exp overflows; and what is added to both logits changes nothing."""
    far = given_ | {"bias": np.array([-2000.0, 2000.0])}
    np.testing.assert_array_equal(residual.mix(**far), given_["mlp"])
    alone = residual.mix(**(far | {"bias": -far["bias"]}))
    taken = given_["source"] >= 0
    expert = given_["gate"][:, None] * given_["rows"][given_["source"]]
    np.testing.assert_array_equal(alone, np.where(taken[:, None], expert, 0))
    moved = residual.mix(**(given_ | {"bias": given_["bias"] + 900}))
    np.testing.assert_allclose(moved, residual.mix(**given_), rtol=1e-9, atol=1e-9)


@MIX
@given(TOKENS, DIMS, SEEDS)
def test_a_dropped_token_keeps_its_coefficients(tokens, dim, seed):
    """Only the expert is missing, whatever its gate says: the fixed layer is not scaled up. Nor need any row exist."""
    made = drawn(tokens, dim, seed, kept=0.0) | {"gate": np.ones(tokens), "rows": np.zeros((0, dim))}
    logits = made["x"] @ made["weight"].T + made["bias"]
    wanted = made["mlp"] / (1 + np.exp(logits[:, :1] - logits[:, 1:]))
    np.testing.assert_allclose(residual.mix(**made), wanted, **tolerance(np.float64, dim, 10))


BAD = [
    {"x": np.ones(3)}, {"x": np.ones((0, 3))}, {"weight": np.ones((3, 2))}, {"bias": np.ones((2, 1))},
    {"rows": np.ones((4, 2))}, {"gate": np.ones((4, 1))}, {"mlp": np.ones((1, 3))}, {"source": np.array([0, 1, 2])},
    {"source": np.array([0, 1, 2, 4])}, {"source": np.array([0, 1, 2, -2])}, {"source": np.array([0, 1, 1, -1])},
    {"mlp": np.full((4, 3), np.inf)}, {"x": np.full((4, 3), np.nan)}, {"gate": np.full(4, np.nan)},
    {"weight": np.full((2, 3), np.inf)}, {"bias": np.array([0, -np.inf])}, {"gate": np.array([1, np.inf, 1, 1])},
    {"rows": np.insert(np.ones((3, 3)), 1, np.nan, axis=0)}, {"mlp": np.ones(3)}, {"mlp": np.ones((4, 1))},
    {"weight": np.ones((1, 3))}, {"bias": np.ones(1)}, {"gate": np.ones(1)}, {"rows": np.ones(3)},
]  # fmt: skip


@MIX
@pytest.mark.parametrize("changed", BAD)
def test_what_does_not_fit_is_refused(changed):
    with pytest.raises(ValueError):
        residual.mix(**(sound() | changed))


@MIX
def test_golden_layer_of_deepspeed():
    """Rows stand in another order than tokens, as after a visit to the experts."""
    arrays, x = deepspeed()

    def layer(name: str, tokens: np.ndarray) -> np.ndarray:
        hidden = np.maximum(tokens @ arrays[f"{name}.a.weight"].T + arrays[f"{name}.a.bias"], 0)
        return hidden @ arrays[f"{name}.b.weight"].T + arrays[f"{name}.b.bias"]

    p = np.exp(x @ arrays["gate.weight"].T)
    p, expert = p / p.sum(axis=1, keepdims=True), p.argmax(axis=1)
    order = np.argsort(expert, kind="stable")
    rows = np.concatenate([layer(f"expert{expert[t]}", x[t : t + 1]) for t in order])
    weight, bias = arrays["coefficient.weight"], arrays["coefficient.bias"]
    found = residual.mix(x, weight, bias, rows, np.argsort(order), p.max(axis=1), layer("mlp", x))
    np.testing.assert_allclose(found, arrays["y"].reshape(x.shape), **tolerance(np.float32, 32))


# --- its gradients ------------------------------------------------------------------------------------------------


def by_autograd(dy: np.ndarray, **given_: np.ndarray) -> list[np.ndarray]:
    """The gradients by torch, of the formula as torch would be given it."""
    parts = {name: torch.from_numpy(part) for name, part in given_.items()}
    learned = [part.requires_grad_() for name, part in parts.items() if name != "source"]
    c = nn.functional.linear(parts["x"], parts["weight"], parts["bias"]).softmax(1)
    kept = (parts["source"] >= 0).to(c)
    expert = parts["rows"][parts["source"].clamp(min=0)] * (kept * parts["gate"])[:, None]
    y = c[:, 0, None] * expert + c[:, 1, None] * parts["mlp"]
    return [part.numpy() for part in torch.autograd.grad((y * torch.from_numpy(dy)).sum(), learned)]


@BACKWARD
@given(ARGUMENTS, SEEDS)
def test_gradients_are_those_of_autograd(given_, seed):
    dy = np.random.default_rng(seed).normal(size=given_["x"].shape)
    before = {name: part.copy() for name, part in {"dy": dy, **given_}.items()}
    found = residual.mix_backward(dy, **given_)
    for name, mine, wanted in zip(residual.Gradients._fields, found, by_autograd(dy, **given_), strict=True):
        np.testing.assert_allclose(mine, wanted, **tolerance(np.float64, dy.size, 20), err_msg=name)
        assert mine.shape == given_[name].shape
    for name, part in {"dy": dy, **given_}.items():
        np.testing.assert_array_equal(part, before[name])


@BACKWARD
def test_gradients_have_the_widest_dtype():
    for dtype, made in narrowed(drawn(3, 2, 0)):
        for dy in np.ones((3, 2), np.float32), np.ones((3, 2)):
            wide = np.result_type(dtype, dy)
            assert [part.dtype for part in residual.mix_backward(dy, **made)] == [wide] * 6


@BACKWARD
def test_only_coefficients_and_the_fixed_layer_learn_from_a_dropped_token():
    made = drawn(5, 3, 1, kept=0.0) | {"gate": np.ones(5)}
    found = residual.mix_backward(np.ones((5, 3)), **made)
    assert not found.rows.any() and not found.gate.any()
    assert found.mlp.all() and found.weight.all() and found.x.all() and found.bias.sum() == 0
    alone = residual.mix_backward(np.ones((5, 3)), **(made | {"rows": np.zeros((0, 3))}))
    assert alone.rows.shape == (0, 3) and (alone.x == found.x).all() and not alone.gate.any()


@BACKWARD
@pytest.mark.parametrize("changed", [*BAD[3:5], BAD[9], {"dy": np.ones((3, 4))}, {"dy": np.ones((1, 3))},
                                     {"dy": np.ones(3)}, {"dy": np.full((4, 3), np.nan)}])  # fmt: skip
def test_a_gradient_of_what_does_not_fit_is_refused(changed):
    with pytest.raises(ValueError):
        residual.mix_backward(**({"dy": np.ones((4, 3))} | sound() | changed))


# --- the kernels --------------------------------------------------------------------------------------------------


def tensors(made: Arguments, dtype: torch.dtype, aligned: bool = True) -> list[torch.Tensor]:
    """The arguments for a kernel, poisoned: source int64, gate float32, the rest in dtype."""
    kinds = {"source": torch.int64, "gate": torch.float32}
    return [poisoned(torch.from_numpy(part).to(kinds.get(name, dtype)).to(DEVICE), aligned)
            for name, part in made.items()]  # fmt: skip


def rounded(made: Arguments, dtype: torch.dtype) -> Arguments:
    """The values that a kernel sees, in float64."""
    kinds = {"source": torch.int64, "gate": torch.float32}
    seen = {name: torch.from_numpy(part).to(kinds.get(name, dtype)) for name, part in made.items()}
    return {name: part.numpy() if name == "source" else part.double().numpy() for name, part in seen.items()}


KERNEL_TOKENS, SPREADS = st.sampled_from([1, 3, 7]), st.sampled_from([1.0, 100.0])


@MIX_KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@given(tokens=KERNEL_TOKENS, dim=DIMS, seed=SEEDS, kept=st.sampled_from([0.0, 0.7]), spread=SPREADS,
       programs=st.sampled_from([1, 2, 5]), aligned=st.booleans())  # fmt: skip
def test_kernel_mixes_like_the_reference(dtype, tokens, dim, seed, kept, spread, programs, aligned):
    made = drawn(tokens, dim, seed, kept)
    made = made | {"bias": made["bias"] * spread}
    found = fast.mix(*tensors(made, dtype, aligned), programs=programs)
    assert found.dtype == dtype and found.shape == (tokens, dim)
    wanted = oracle("moe.residual").mix(**rounded(made, dtype))
    np.testing.assert_allclose(found.double().cpu(), wanted, **tolerance(dtype, dim))


@BACKWARD_KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@given(tokens=KERNEL_TOKENS, dim=DIMS, seed=SEEDS, kept=st.sampled_from([0.0, 0.7]), spread=SPREADS,
       programs=st.sampled_from([1, 2, 5]), aligned=st.booleans())  # fmt: skip
def test_kernel_gradients_are_those_of_the_reference(dtype, tokens, dim, seed, kept, spread, programs, aligned):
    made = drawn(tokens, dim, seed, kept)
    made = {"dy": np.random.default_rng(seed).normal(size=(tokens, dim)), **made, "bias": made["bias"] * spread}
    found = fast.mix_backward(*tensors(made, dtype, aligned), programs=programs)
    wanted = oracle("moe.residual").mix_backward(**rounded(made, dtype))
    for name, mine, right in zip(residual.Gradients._fields, found, wanted, strict=True):
        assert mine.dtype == (torch.float32 if name == "gate" else dtype), name
        np.testing.assert_allclose(mine.double().cpu(), right, **tolerance(dtype, tokens * dim, 4), err_msg=name)


@MIX_KERNEL
@BACKWARD_KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernels_read_nothing_outside_their_inputs(begins):
    made = drawn(5, 17, 0, 0.5)
    held = [walled(part, begins) for part in tensors(made, torch.float32)]
    fast.mix(*held, programs=2)
    fast.mix_backward(walled(held[0], begins), *held, programs=2)


@pytest.mark.kernel
@pytest.mark.parametrize(("changed", "error"), [
    ({"x": torch.zeros(4)}, ValueError), ({"x": torch.zeros(4, 9000)}, ValueError), ({"rows": torch.zeros(4, 2)},
    ValueError), ({"weight": torch.zeros(3, 2)}, ValueError), ({"mlp": torch.zeros(4, 6)[:, ::2]}, ValueError),
    ({"gate": torch.zeros(4, 1)}, ValueError), ({"source": torch.zeros(4)}, TypeError),
    ({"gate": torch.zeros(4).half()}, TypeError), ({"mlp": torch.zeros(4, 3).half()}, TypeError),
    ({"x": torch.zeros(4, 3).double()}, TypeError), ({"dy": torch.zeros(3, 4)}, ValueError),
])  # fmt: skip
def test_kernels_refuse_what_they_cannot_serve(changed, error):
    names = ("x", "weight", "bias", "rows", "source", "gate", "mlp")
    made = {name: torch.from_numpy(sound()[name]) for name in names}
    made = {name: part if name == "source" else part.float() for name, part in made.items()} | changed
    dy = made.pop("dy", None)
    with pytest.raises(error):
        fast.mix(**made) if dy is None else fast.mix_backward(dy, **made)
