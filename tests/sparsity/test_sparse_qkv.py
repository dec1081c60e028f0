"""Sparse QKV: both layers against loops, the theorem, trax's own results, pieces against the whole, and the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.sparsity import sparse_qkv as chapter
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled

book, fast = oracle("sparsity.sparse_qkv"), kernel("sparsity.sparse_qkv")
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 3, 5, 7])
DTYPES = st.sampled_from([np.float32, np.float64])


def drawn(seed: int, B: int, T: int, d: int, S: int, M: int, taps: int, past: bool = True) -> list:
    """x, gates, shared, three kernels and past (or None), such that everything computed from them is about 1."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, d), (S, d), (d, M), *((taps, width, M, M) for width in (3, 3, 1)), (B, taps - 1, S * M)]
    scales = [1, 1, d**-0.5, *((taps * width * M) ** -0.5 for width in (3, 3, 1)), 1]
    made = [rng.normal(size=shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return made if past else [*made[:-1], None]


def by_hand(z: np.ndarray, kernel: np.ndarray, past: np.ndarray) -> np.ndarray:
    """The convolution, one output and one tap at a time."""
    (B, T, S, _), (taps, width, _, M) = z.shape, kernel.shape
    out = np.zeros((B, T, S, M))
    for b, t, s, j, w in np.ndindex(B, T, S, taps, width):
        time, module = t + j - (taps - 1), s + w - width // 2
        if 0 <= module < S:
            heard = z[b, time, module] if time >= 0 else past[b, time + taps - 1, module]
            out[b, t, s] += heard @ kernel[j, w]
    return out


@pytest.mark.exercise("chapters.sparsity.sparse_qkv.multiplicative", points=1)
class TestMultiplicative:
    @given(SEEDS, st.sampled_from([(), (0,), (3,), (2, 5)]), SIZES, SIZES, SIZES, st.tuples(DTYPES, DTYPES, DTYPES))
    def test_each_output_is_the_sum_of_its_definition(self, seed, lead, d, S, M, dtypes):
        rng = np.random.default_rng(seed)
        shapes = (*lead, d), (S, d), (d, M)
        x, gates, shared = (rng.normal(size=size).astype(dtype) for size, dtype in zip(shapes, dtypes, strict=True))
        given_arrays = [array.copy() for array in (x, gates, shared)]
        z = chapter.multiplicative(x, gates, shared)
        assert z.shape == (*lead, S, M) and z.dtype == np.result_type(*dtypes)
        for at in np.ndindex(*lead, S, M):
            *where, s, m = at
            exact = sum(x[(*where, i)] * gates[s, i] * shared[i, m] for i in range(d))
            loosest = min(dtypes, key=lambda dtype: np.finfo(dtype).bits)  # x · gates may be rounded to it
            np.testing.assert_allclose(z[at], exact, **tolerance(loosest, d, 4))
        np.testing.assert_equal([x, gates, shared], given_arrays)

    def test_a_nan_stays_with_its_input(self):
        z = chapter.multiplicative(np.array([[1.0, np.nan], [1.0, 2.0]]), np.ones((3, 2)), np.ones((2, 1)))
        np.testing.assert_array_equal(z[..., 0], [[np.nan] * 3, [3.0] * 3])

    def test_golden(self):
        arrays = golden("sparse/sparse_qkv")
        gates, shared, bias = (arrays[f"factored_dense_m4__weight{i}"].astype(np.float64) for i in range(3))
        z = chapter.multiplicative(arrays["factored_dense_m4__x"].astype(np.float64), gates, shared)
        y = z.reshape(*z.shape[:2], -1) + bias
        np.testing.assert_allclose(y, arrays["factored_dense_m4__y"], **tolerance(np.float32, 16))

    @pytest.mark.parametrize("case", ["inputs", "flat gates", "nan", "infinite", "empty", "one input", "one gate",
                                      "flat shared", "scalar", "nan shared", "infinite gates"])  # fmt: skip
    def test_bad_input_is_refused(self, case):
        x, gates, shared = np.ones((2, 4)), np.ones((3, 4)), np.ones((4, 5))
        bad = {
            "inputs": (x, gates, np.ones((5, 4))), "flat gates": (x, np.ones(4), shared),
            "nan": (x, np.where(np.eye(3, 4) > 0, np.nan, gates), shared),
            "infinite": (x, gates, np.full((4, 5), np.inf)), "empty": (x, np.ones((0, 4)), shared),
            "one input": (x[:, :1], gates, shared), "one gate": (x, gates[:, :1], shared),
            "flat shared": (x, gates, np.ones(4)), "scalar": (np.array(1.0), gates, shared),
            "nan shared": (x, gates, shared * np.nan), "infinite gates": (x, gates * np.inf, shared),
        }  # fmt: skip
        with pytest.raises(ValueError):
            chapter.multiplicative(*bad[case])


@pytest.mark.exercise("chapters.sparsity.sparse_qkv.permutation_weights", points=2)
class TestPermutationWeights:
    @given(SEEDS, st.integers(1, 7), st.integers(1, 7))
    def test_theorem_any_permutation_can_be_had_exactly(self, seed, S, M):
        rng = np.random.default_rng(seed)
        order, x = rng.permutation(S * M), rng.normal(size=(3, S * M))
        mine = order.copy()
        gates, shared = chapter.permutation_weights(mine, S)
        np.testing.assert_array_equal(mine, order)
        assert gates.shape == (S, S * M) and shared.shape == (S * M, M) and gates.dtype == shared.dtype == np.float64
        assert set(np.unique([*gates.flat, *shared.flat])) <= {0.0, 1.0}
        np.testing.assert_array_equal(book.multiplicative(x, gates, shared).reshape(3, -1), x[:, order])

    @pytest.mark.parametrize(
        ("order", "modules"),
        [([0, 1, 1], 1), ([1, 2, 3], 1), ([0, 1, 2], 2), ([0, 1], 0), ([], 1), ([0, 1], -1), ([0, -1], 1),
         ([0, 0, 3, 3], 2)],
    )  # fmt: skip
    def test_what_is_no_permutation_or_does_not_divide_is_refused(self, order, modules):
        with pytest.raises(ValueError):
            chapter.permutation_weights(np.array(order, dtype=np.int64), modules)


@pytest.mark.exercise("chapters.sparsity.sparse_qkv.causal_convolution", points=3)
class TestCausalConvolution:
    @given(SEEDS, SIZES, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.booleans(), DTYPES,
           DTYPES)  # fmt: skip
    def test_each_output_is_the_sum_of_its_definition(self, seed, T, S, taps, width, begins, dtype, other):
        rng = np.random.default_rng(seed)
        z, weight, past = (rng.normal(size=s) for s in ((2, T, S, 2), (taps, width, 2, 3), (2, taps - 1, S, 2)))
        z, past, weight = z.astype(dtype), past.astype(dtype), weight.astype(other)
        mine = [array.copy() for array in (z, weight, past)]
        y = chapter.causal_convolution(*mine[:2], None if begins else mine[2])
        assert y.shape == (2, T, S, 3) and y.dtype == np.result_type(dtype, other)
        expected = by_hand(z, weight, 0 * past if begins else past)
        np.testing.assert_allclose(y, expected, **tolerance(y.dtype, 2 * taps * width, 4))
        np.testing.assert_equal(mine, [z, weight, past])

    @given(SEEDS, st.integers(2, 9), st.integers(1, 4))
    def test_nothing_is_heard_of_the_future_not_even_a_nan(self, seed, T, taps):
        rng = np.random.default_rng(seed)
        z, weight = rng.normal(size=(2, T, 3, 2)), rng.normal(size=(taps, 3, 2, 2))
        at = int(rng.integers(T))
        z[1, at] = np.nan
        nan = np.isnan(chapter.causal_convolution(z, weight))
        assert nan[1].all(axis=(1, 2)).tolist() == [at <= t < at + taps for t in range(T)] and not nan[0].any()

    @pytest.mark.parametrize("case", ["even", "channels", "past", "nan", "flat", "infinite", "empty", "flat kernel"])
    def test_bad_input_is_refused(self, case):
        z, weight, past = np.ones((2, 4, 3, 5)), np.ones((3, 3, 5, 5)), np.ones((2, 2, 3, 5))
        bad = {
            "even": (z, np.ones((3, 2, 5, 5)), past), "channels": (z, np.ones((3, 3, 4, 5)), past),
            "past": (z, weight, np.ones((2, 3, 3, 5))), "nan": (z, weight * np.nan, past),
            "flat": (z.reshape(2, 4, 15), weight, past), "infinite": (z, weight * np.inf, past),
            "empty": (z, weight[..., :0], past), "flat kernel": (z, weight[0], past),
        }  # fmt: skip
        with pytest.raises(ValueError):
            chapter.causal_convolution(*bad[case])


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int = 4) -> np.ndarray:
    """Causal attention of `[B, T, C]`, heads side by side."""
    parts = (torch.from_numpy(y.reshape(*y.shape[:2], heads, -1)).transpose(1, 2) for y in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2).numpy()


@pytest.mark.parametrize("case", ["shareqk0_vnone", "shareqk1_vnone", "shareqk0_vfixed", "shareqk0_voriginal",
                                  "outmultconv"])  # fmt: skip
def test_golden_attention_of_every_published_kind(case):
    arrays = golden("sparse/sparse_qkv")
    x, y = (arrays[f"multconv_attn_{case}__{name}"].astype(np.float64) for name in "xy")
    count = sum(name.startswith(f"multconv_attn_{case}__weight") for name in arrays)
    left = [arrays[f"multconv_attn_{case}__weight{i}"].astype(np.float64) for i in range(count)]

    def layer(x: np.ndarray) -> np.ndarray:
        z = chapter.multiplicative(x, left.pop(0), left.pop(0))
        return z + left.pop(0).reshape(z.shape[2:])

    def mixed(z: np.ndarray) -> np.ndarray:
        return (chapter.causal_convolution(z, left.pop(0)) + left.pop(0)).reshape(x.shape)

    z = layer(x)
    q = mixed(z)
    k = q if "shareqk1" in case else mixed(z)
    flat = np.concatenate([z.reshape(x.shape), x], axis=-1).reshape(*z.shape[:3], -1)
    heard = {"vfixed": np.concatenate([z, x.reshape(z.shape)], axis=-1), "voriginal": flat}
    out = attended(q, k, mixed(heard.get(case.rpartition("_")[2], z)))
    out = mixed(layer(out)) if case == "outmultconv" else out
    assert not left
    np.testing.assert_allclose(out, y, **tolerance(np.float32, 16))


@pytest.mark.exercise("chapters.sparsity.sparse_qkv.sparse_qkv", points=2)
class TestSparseQKV:
    @given(SEEDS, st.integers(1, 9), SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
    def test_pieces_give_what_the_whole_gives_wherever_it_is_cut(self, seed, T, d, S, M, taps, data):
        x, *weights, past = drawn(seed, 2, T, d, S, M, taps)
        begin = past if data.draw(st.booleans()) else None
        cuts = sorted(data.draw(st.sets(st.integers(1, T - 1))) if T > 1 else [])
        whole, state, pieces = chapter.sparse_qkv(x, *weights, begin), begin, []
        for part in np.split(x, cuts, axis=1):
            *made, state = chapter.sparse_qkv(part, *weights, state)
            pieces.append(made)
        for one, parts in zip((*whole[:3], whole[3]), (*zip(*pieces, strict=True), [state]), strict=True):
            np.testing.assert_allclose(np.concatenate(parts, axis=1), one, **tolerance(np.float64, 9 * M * taps))

    @given(SEEDS, st.integers(1, 6), SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
           st.permutations([1, 3, 5]))  # fmt: skip
    def test_it_is_the_two_layers_one_after_the_other(self, seed, T, d, S, M, taps, widths):
        x, gates, shared, *_, past = drawn(seed, 2, T, d, S, M, taps)
        kernels = [np.random.default_rng((seed, width)).normal(size=(taps, width, M, M)) for width in widths]
        before = past.copy()
        *made, state = chapter.sparse_qkv(x, gates, shared, *kernels, past)
        z = np.einsum("bti,si,im->btsm", x, gates, shared)
        for y, weight in zip(made, kernels, strict=True):
            expected = by_hand(z, weight, past.reshape(2, taps - 1, S, M)).reshape(2, T, S * M)
            np.testing.assert_allclose(y, expected, **tolerance(np.float64, d + 15 * M * taps, 4))
        rows = np.concatenate([past, z.reshape(2, T, -1)], axis=1)
        np.testing.assert_allclose(state, rows[:, T:], **tolerance(np.float64, d))
        np.testing.assert_array_equal(past, before)

    def test_float32_stays_float32(self):
        operands = [array.astype(np.float32) for array in drawn(0, 1, 2, 3, 2, 2, 3)[:-1]]
        assert [array.dtype.name for array in chapter.sparse_qkv(*operands)] == ["float32"] * 4

    @pytest.mark.parametrize("case", ["taps", "past", "no token", "flat"])
    def test_bad_input_is_refused(self, case):
        x, gates, shared, q, k, v, past = drawn(0, 2, 3, 4, 2, 2, 3)
        bad = {
            "taps": (x, gates, shared, q, k, v[1:], past), "past": (x, gates, shared, q, k, v, past[:, 1:]),
            "no token": (x[:, :0], gates, shared, q, k, v, past), "flat": (x[0], gates, shared, q, k, v, past),
        }  # fmt: skip
        with pytest.raises(ValueError):
            chapter.sparse_qkv(*bad[case])


def launched(operands: list, dtype: torch.dtype, aligned: bool = True, **tile) -> tuple[tuple, tuple]:
    """What the kernel gives, and what the reference gives for the same rounded numbers."""
    tensors = [x if x is None else torch.from_numpy(x).to(DEVICE, dtype) for x in operands]
    expected = book.sparse_qkv(*(x if x is None else x.double().cpu().numpy() for x in tensors))
    return fast.sparse_qkv(*(x if x is None else poisoned(x, aligned) for x in tensors), **tile), expected


def assert_close(found: tuple, expected: tuple, dtype: torch.dtype) -> None:
    for one, exact in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == exact.shape
        np.testing.assert_allclose(one.double().cpu().numpy(), exact, **tolerance(dtype, 4))


@pytest.mark.exercise("kernels.sparsity.sparse_qkv.step_kernel", points=4)
@pytest.mark.kernel
class TestStepKernel:
    @settings(max_examples=6)
    @given(seed=SEEDS, B=st.sampled_from([1, 3, 17]), d=st.sampled_from([1, 17, 37]), S=st.integers(1, 3),
           M=st.sampled_from([1, 5, 16, 17]), taps=st.integers(1, 4), aligned=st.booleans(),
           dtype=st.sampled_from(KERNEL_DTYPES))  # fmt: skip
    def test_a_step_is_that_of_the_reference(self, seed, B, d, S, M, taps, aligned, dtype):
        found, expected = launched(drawn(seed, B, 1, d, S, M, taps), dtype, aligned, block=16)
        assert_close(found, expected, dtype)

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    def test_several_modules_rows_and_blocks_at_once(self, dtype):
        assert_close(*launched(drawn(1, 18, 1, 20, 3, 6, 3), dtype, block=16), dtype)

    def test_nothing_is_read_outside_the_operands(self):
        """It comes last, because a kernel that does ends the process."""
        operands = [torch.from_numpy(x).float().to(DEVICE) for x in drawn(0, 3, 1, 9, 2, 5, 3)]
        for begins in (False, True):
            fast.sparse_qkv(*(walled(x, begins) for x in operands), block=16)


@pytest.mark.kernel
class TestPrefillKernel:
    @settings(max_examples=5)
    @given(seed=SEEDS, B=st.integers(1, 2), T=st.sampled_from([2, 3, 15, 17, 30]), d=st.sampled_from([5, 17]),
           S=st.integers(1, 4), M=st.sampled_from([3, 16]), taps=st.integers(1, 4), past=st.booleans(),
           aligned=st.booleans(), dtype=st.sampled_from(KERNEL_DTYPES), group=st.integers(1, 3))  # fmt: skip
    def test_a_text_is_that_of_the_reference(self, seed, B, T, d, S, M, taps, past, aligned, dtype, group):
        found, expected = launched(drawn(seed, B, T, d, S, M, taps, past), dtype, aligned,
                                   rows=16, group=group, block=16)  # fmt: skip
        assert_close(found, expected, dtype)

    def test_a_nan_stays_with_the_tokens_that_may_hear_it(self):
        x, *weights, past = drawn(3, 1, 9, 5, 2, 3, 3)
        x[:, 4] = np.nan
        (q, *_), expected = launched([x, *weights, past], torch.float32, rows=16, block=16)
        np.testing.assert_array_equal(np.isnan(q.cpu().numpy()), np.isnan(expected[0]))

    def test_prefill_then_steps_is_the_whole_text(self):
        x, *weights, _ = (torch.from_numpy(a).float().to(DEVICE) for a in drawn(4, 2, 5, 6, 2, 3, 3))
        whole = fast.sparse_qkv(x, *weights, rows=16, block=16)
        *parts, state = fast.sparse_qkv(x[:, :3].contiguous(), *weights, rows=16, block=16)
        for t in (3, 4):
            *step, state = fast.sparse_qkv(x[:, t : t + 1].contiguous(), *weights, state, block=16)
            parts = [torch.cat(pair, dim=1) for pair in zip(parts, step, strict=True)]
        for found, expected in zip((*parts, state), whole, strict=True):
            torch.testing.assert_close(found, expected, **tolerance(torch.float32, 8))

    def test_nothing_is_read_outside_the_operands(self):
        operands = [torch.from_numpy(x).float().to(DEVICE) for x in drawn(0, 2, 4, 9, 2, 5, 3)]
        for begins in (False, True):
            fast.sparse_qkv(*(walled(x, begins) for x in operands), rows=16, block=16)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"past": lambda x: x[:, 1:]}, ValueError, "past must be"),
            ({"shared": lambda x: x[1:]}, ValueError, r"need x \[B, T, d\]"),
            ({"v_kernel": lambda x: x.repeat(1, 3, 1, 1)}, ValueError, "v_kernel must be"),
            ({"gates": lambda x: x.double()}, TypeError, "gates must have dtype"),
            ({"x": lambda x: x.mT.contiguous().mT}, ValueError, "x must be contiguous"),
            ({"rows": lambda _: 24}, ValueError, "no tile"),
        ],
    )
    def test_bad_input_is_refused_in_words(self, change, error, words):
        names = ("x", "gates", "shared", "q_kernel", "k_kernel", "v_kernel", "past")
        operands = dict(zip(names, map(torch.from_numpy, drawn(0, 2, 3, 4, 2, 2, 3)), strict=True))
        operands = {name: x.float().to(DEVICE) for name, x in operands.items()} | {"rows": 16}
        with pytest.raises(error, match=words):
            fast.sparse_qkv(**operands | {name: f(operands[name]) for name, f in change.items()})
