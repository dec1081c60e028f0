"""MHA, GQA and MQA: one attention, both rotations, pooled heads and the fused append, each against a loop by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention.heads import grouped_attention, pool_heads, rope_append, rotary_tables, rotate
from tests.attention.checks import untouched
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled

book, fast = oracle("attention.heads"), kernel("attention.heads")
SEEDS = st.integers(0, 2**32 - 1)
LAYOUTS = st.sampled_from(["half", "interleaved"])
HEADS = st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 3), (6, 2), (5, 1)])  # query heads on key/value heads


def attended_by_hand(q, k, v, causal, scale):
    """One query at a time, the key head found by its definition."""
    (B, H, T, _), (_, Hkv, S, _) = q.shape, k.shape
    out = np.empty(q.shape)
    for b, h, i in np.ndindex(B, H, T):
        g, seen = h // (H // Hkv), i + S - T + 1 if causal else S
        scores = [scale * float(q[b, h, i] @ k[b, g, j]) for j in range(seen)]
        weights = [math.exp(score - max(scores)) for score in scores]
        out[b, h, i] = sum(w * v[b, g, j] for j, w in enumerate(weights)) / sum(weights)
    return out


@pytest.mark.exercise("chapters.attention.heads.grouped_attention", points=2)
class TestGroupedAttention:
    @given(SEEDS, HEADS, st.integers(1, 3), st.integers(1, 7), st.sampled_from([1, 2, 5]), st.booleans())
    def test_each_query_head_reads_its_key_head(self, seed, heads, T, S, D, causal):
        (H, Hkv), rng, causal = heads, np.random.default_rng(seed), causal and S >= T
        q, k, v = (rng.normal(size=(2, n, length, D)) for n, length in ((H, T), (Hkv, S), (Hkv, S)))
        for scale in (None, 0.3):
            expected = attended_by_hand(q, k, v, causal, D**-0.5 if scale is None else scale)
            found = untouched(grouped_attention, q, k, v, causal=causal, scale=scale)
            np.testing.assert_allclose(found, expected, **tolerance(float, 7, 4))

    @pytest.mark.parametrize("case", ["mha_causal", "gqa_causal", "mqa_causal", "gqa_cross"])
    def test_equals_torch(self, case):
        arrays = golden("attn/gqa_kv_cache_llama")
        q, k, v = (arrays[f"sdpa/{case}/{name}"].astype(np.float64) for name in "qkv")
        out = grouped_attention(q, k, v, causal=case.endswith("causal"))
        np.testing.assert_allclose(out, arrays[f"sdpa/{case}/out"], **tolerance(float, 10))

    def test_equals_the_code_of_transformers(self):
        arrays = golden("attn/gqa_kv_cache_llama")
        q, k, v = (arrays[f"eager/{name}"][:1].astype(np.float64) for name in "qkv")  # the second row is padded
        expected = arrays["eager/out"][:1].swapaxes(1, 2)
        np.testing.assert_allclose(grouped_attention(q, k, v), expected, **tolerance(np.float32, 9))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_scores_of_any_size_stay_finite_and_in_their_dtype(self, dtype):
        q, k = np.full((1, 2, 2, 4), 100, dtype), np.full((1, 1, 3, 4), 100, dtype)
        q[:, :, 0] = -100  # no row's scores make another's vanish
        for sign in (1, -1):
            out = grouped_attention(q, sign * k, np.arange(12, dtype=dtype).reshape(1, 1, 3, 4))
            assert out.dtype == dtype
            np.testing.assert_allclose(out[0, 1], [[2, 3, 4, 5], [4, 5, 6, 7]], **tolerance(dtype))

    @pytest.mark.parametrize(
        ("q", "k", "v", "causal"),
        [
            ((1, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8), True),
            ((1, 2, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), True),
            ((1, 4, 3, 8), (1, 2, 2, 8), (1, 2, 2, 8), True),
            ((1, 4, 3, 8), (1, 2, 0, 8), (1, 2, 0, 8), False),
            ((1, 4, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8), True),
            ((1, 4, 2, 8), (2, 2, 2, 8), (2, 2, 2, 8), True),
            ((2, 4, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8), True),  # would broadcast, and so would the next
            ((1, 4, 2, 8), (1, 2, 2, 8), (1, 1, 2, 8), True),
            ((1, 4, 2, 8), (1, 2, 2, 6), (1, 2, 2, 6), True),
            ((4, 2, 8), (2, 2, 8), (2, 2, 8), True),
            ((4, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8), True),
            ((1, 4, 2, 8), (2, 2, 8), (2, 2, 8), True),
        ],
    )
    def test_refuses_what_does_not_fit(self, q, k, v, causal):
        with pytest.raises(ValueError):
            grouped_attention(np.ones(q), np.ones(k), np.ones(v), causal)


def turned_by_hand(x, cos, sin, layout):
    """x [D], cos and sin [D/2]: each pair as a complex number times cos + i sin."""
    D, out = len(x), np.empty(len(x))
    for i in range(D // 2):
        a, b = (i, i + D // 2) if layout == "half" else (2 * i, 2 * i + 1)
        turned = complex(x[a], x[b]) * complex(cos[i], sin[i])
        out[a], out[b] = turned.real, turned.imag
    return out


@pytest.mark.exercise("chapters.attention.heads.rotate", points=1)
class TestRotate:
    @given(SEEDS, st.sampled_from([2, 4, 6, 10]), LAYOUTS)
    def test_turns_each_pair_as_a_complex_number(self, seed, D, layout):
        rng = np.random.default_rng(seed)
        x, angles = rng.normal(size=(2, 3, D)), rng.uniform(-7, 7, (3, D // 2))
        kept = x.copy()
        out = rotate(x, np.cos(angles), np.sin(angles), layout)
        assert np.array_equal(x, kept)
        for b, t in np.ndindex(2, 3):
            expected = turned_by_hand(x[b, t], np.cos(angles[t]), np.sin(angles[t]), layout)
            np.testing.assert_allclose(out[b, t], expected, **tolerance(float, 2, 4))

    @pytest.mark.parametrize("name", ["xq", "xk"])
    def test_equals_llama2c_and_through_the_permutation_in_halves(self, name):
        arrays = golden("attn/rope_rmsnorm")
        x, out = arrays[f"interleaved_llama2c/{name}"], arrays[f"interleaved_llama2c/{name}_out"]
        tables = [arrays[f"interleaved_llama2c/freqs_{table}"][:, None] for table in ("cos", "sin")]
        np.testing.assert_allclose(rotate(x, *tables, "interleaved"), out, **tolerance(np.float32))
        order = arrays["equiv/perm"]
        np.testing.assert_allclose(rotate(x[..., order], *tables), out[..., order], **tolerance(np.float32))

    def test_equals_gptj(self):
        arrays = golden("attn/rope_rmsnorm")
        sin, cos = np.split(arrays["interleaved_gptj/sin_cos"][:, None], 2, axis=-1)
        out = rotate(arrays["interleaved_gptj/x"], cos, sin, "interleaved")
        np.testing.assert_allclose(out, arrays["interleaved_gptj/out"], **tolerance(np.float32))

    def test_dtypes_are_those_of_products(self):
        x, angles = np.arange(8).reshape(2, 4), np.array([0.3, 2.0])
        arrays = [x, np.cos(angles), np.sin(angles)]
        expected = [turned_by_hand(row, *arrays[1:], "half") for row in x]  # integers turn into floats
        np.testing.assert_allclose(rotate(*arrays), expected, **tolerance(float, 2, 8))
        for wide in (None, 0, 1, 2):
            mixed = [y.astype(np.float64 if i == wide else np.float32) for i, y in enumerate(arrays)]
            assert rotate(*mixed).dtype == (np.float32 if wide is None else np.float64)

    @pytest.mark.parametrize(
        ("D", "cos", "sin", "layout"),
        [(5, 2, 2, "half"), (4, 4, 4, "half"), (4, 1, 2, "half"), (4, 2, 1, "half"), (4, 2, 2, "neox")],
    )
    def test_refuses_what_it_cannot_turn(self, D, cos, sin, layout):
        with pytest.raises(ValueError):
            rotate(np.ones((3, D)), np.ones((3, cos)), np.ones((3, sin)), layout)


@pytest.mark.exercise("chapters.attention.heads.pool_heads", points=1)
class TestPoolHeads:
    @given(SEEDS, HEADS, st.sampled_from([1, 2, 5]), st.sampled_from([np.float32, np.float64]))
    def test_new_heads_are_means_of_neighbours(self, seed, heads, D, dtype):
        (old, new), rng = heads, np.random.default_rng(seed)
        weight = rng.normal(size=(old * D, 3)).astype(dtype)
        kept, pooled = weight.copy(), pool_heads(weight, old, new)
        assert pooled.shape == (new * D, 3) and pooled.dtype == dtype and np.array_equal(weight, kept)
        group = old // new
        for g, d in np.ndindex(new, D):
            expected = sum(weight[(g * group + i) * D + d].astype(float) for i in range(group)) / group
            np.testing.assert_allclose(pooled[g * D + d], expected, **tolerance(dtype))

    def test_equal_heads_lose_nothing(self):
        head = np.random.default_rng(0).normal(size=(4, 3))
        np.testing.assert_array_equal(pool_heads(np.tile(head, (4, 1)), 4, 1), head)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_what_only_float64_can_sum_is_pooled_all_the_same(self, dtype):
        large = np.finfo(dtype).max
        weight = np.array([[large, 1], [large, 2], [large, 4], [-large, 8]], dtype)
        np.testing.assert_array_equal(pool_heads(weight, 4, 2), np.array([[large, 1.5], [0, 6]], dtype))

    @pytest.mark.parametrize(
        ("weight", "heads", "kv_heads"),
        [
            (np.ones((8, 3)), 4, 3),
            (np.ones((8, 3)), 4, 0),
            (np.ones((8, 3)), 2, 4),
            (np.ones((9, 3)), 4, 2),
            (np.ones(8), 4, 2),
            (np.array([[1.0], [np.nan]]), 2, 1),
            (np.array([[1.0], [np.inf]]), 2, 1),
        ],
    )
    def test_refuses_what_does_not_divide(self, weight, heads, kv_heads):
        with pytest.raises(ValueError):
            pool_heads(weight, heads, kv_heads)


def problem(seed=0, B=2, T=3, heads=(4, 2), D=6, capacity=9, positions=None) -> SimpleNamespace:
    """Arguments of `rope_append`, caches full of old numbers, tables longer than the cache."""
    (H, Hkv), rng = heads, np.random.default_rng(seed)
    at = rng.integers(0, capacity - T + 1, B) if positions is None else positions
    qkv = rng.normal(size=(B * T, (H + 2 * Hkv) * D))
    k, v = rng.normal(size=(2, B, Hkv, capacity, D))
    angles = rng.uniform(-4, 4, (capacity + 2, D // 2))
    tables = (np.cos(angles), np.sin(angles))
    return SimpleNamespace(qkv=qkv, k=k, v=v, positions=np.asarray(at, np.int64), tables=tables, T=T, H=H, D=D)


def appended_by_hand(p, layout):
    """(q, k, v): every head of every token, one at a time."""
    (B, Hkv, _, D), H, k, v = p.k.shape, p.H, p.k.copy(), p.v.copy()
    q = np.empty((B, H, p.T, D))
    for b, t in np.ndindex(B, p.T):
        row, at = p.qkv[b * p.T + t], p.positions[b] + t
        each = [row[h * D : (h + 1) * D] for h in range(H + 2 * Hkv)]
        tables = [table[at] for table in p.tables]
        q[b, :, t] = [turned_by_hand(x, *tables, layout) for x in each[:H]]
        k[b, :, at] = [turned_by_hand(x, *tables, layout) for x in each[H : H + Hkv]]
        v[b, :, at] = each[H + Hkv :]
    return q, k, v


PROBLEMS = st.builds(
    problem, SEEDS, st.integers(1, 3), st.integers(1, 3), HEADS, st.sampled_from([2, 6, 16]), st.integers(3, 9)
)
REFUSED = [
    ("qkv", np.ones((6, 47))),
    ("qkv", np.ones((5, 48))),
    ("qkv", np.ones((6, 24))),  # no query heads
    ("qkv", np.ones((6, 42))),  # three query heads on two
    ("qkv", np.ones((2, 3, 48))),
    ("v", np.ones((2, 2, 8, 6))),
    ("positions", np.array([1, 7])),  # nine positions, three new tokens
    ("positions", np.array([-1, 2])),
    ("positions", np.array([1])),
    ("positions", np.array([1.0, 2.0])),
    ("positions", np.array([1, 2], np.int32)),
    ("k", np.ones((2, 2, 9))),
    ("tables", (np.ones((8, 3)), np.ones((8, 3)))),
    ("tables", (np.ones(9), np.ones(9))),
    ("tables", (np.ones((9, 6)), np.ones((9, 6)))),
]


@pytest.mark.exercise("chapters.attention.heads.rope_append", points=2)
class TestRopeAppend:
    @given(PROBLEMS, LAYOUTS)
    def test_puts_every_head_of_every_token_in_its_place(self, p, layout):
        expected, given_ = appended_by_hand(p, layout), (p.qkv, p.positions, *p.tables)
        kept = [x.copy() for x in given_]
        q = rope_append(p.qkv, p.k, p.v, p.positions, *p.tables, layout)
        for found, truth in zip((q, p.k, p.v), expected, strict=True):
            np.testing.assert_allclose(found, truth, **tolerance(float, 2, 4))
        assert all(map(np.array_equal, given_, kept)) and not np.shares_memory(q, p.qkv)

    @pytest.mark.parametrize(("name", "value"), REFUSED)
    def test_refuses_and_stores_nothing(self, name, value):
        p = problem(positions=[1, 2])
        setattr(p, name, value)
        kept = p.k.copy(), p.v.copy()
        with pytest.raises(ValueError):
            rope_append(p.qkv, p.k, p.v, p.positions, *p.tables)
        assert np.array_equal(p.k, kept[0]) and np.array_equal(p.v, kept[1])

    def test_refuses_another_layout_and_stores_nothing(self):
        p = problem()
        kept = p.k.copy(), p.v.copy()
        with pytest.raises(ValueError):
            rope_append(p.qkv, p.k, p.v, p.positions, *p.tables, layout="neox")
        assert np.array_equal(p.k, kept[0]) and np.array_equal(p.v, kept[1])


@given(SEEDS, HEADS, st.lists(st.integers(1, 3), min_size=1, max_size=4), LAYOUTS)
def test_cached_decoding_is_the_full_pass(seed, heads, parts, layout):
    (H, Hkv), length, D, rng = heads, sum(parts), 4, np.random.default_rng(seed)
    tables, qkv = rotary_tables(length, D), rng.normal(size=(2, length, (H + 2 * Hkv) * D))

    def empty():
        return np.full((2, Hkv, length, D), np.nan)  # what is not yet written must not be read

    k, v = empty(), empty()
    q = rope_append(qkv.reshape(2 * length, -1), k, v, np.zeros(2, np.int64), *tables, layout)
    whole, held, outs, start = grouped_attention(q, k, v), (empty(), empty()), [], 0
    for T in parts:
        new = qkv[:, start : start + T].reshape(2 * T, -1)
        q = rope_append(new, *held, np.full(2, start), *tables, layout)
        start += T
        outs.append(grouped_attention(q, *(x[:, :, :start] for x in held)))
    np.testing.assert_allclose(np.concatenate(outs, axis=2), whole, **tolerance(float, length, 4))


# --- the kernel ---------------------------------------------------------------------------------------------------

KERNEL = pytest.mark.exercise("kernels.attention.heads.rope_append_kernel", points=3)
few_examples = settings(max_examples=12)


def on_device(p, dtype, put=poisoned) -> list:
    """The arguments as the kernel takes them, each where a stray load or store shows."""
    exact = [torch.from_numpy(np.asarray(x)).to(dtype) for x in (p.qkv, p.k, p.v)]
    tables = [torch.from_numpy(table).float() for table in p.tables]
    return [put(x.to(DEVICE)) for x in (*exact, torch.from_numpy(p.positions), *tables)]


def rounded(p, dtype) -> SimpleNamespace:
    """The problem with the numbers that `dtype` holds."""
    tables = tuple(table.astype(np.float32).astype(float) for table in p.tables)
    parts = {name: torch.from_numpy(getattr(p, name)).to(dtype).double().numpy() for name in ("qkv", "k", "v")}
    return SimpleNamespace(**vars(p) | parts | {"tables": tables})


@KERNEL
@pytest.mark.kernel
@few_examples
@given(PROBLEMS, LAYOUTS, st.sampled_from(KERNEL_DTYPES), st.sampled_from([4, 16]))
def test_kernel_is_the_reference(p, layout, dtype, block):
    qkv, k, v, *rest = on_device(p, dtype)
    q = fast.rope_append(qkv, k, v, *rest, layout, block=block)
    p = rounded(p, dtype)
    expected = book.rope_append(p.qkv, p.k, p.v, p.positions, *p.tables, layout)
    assert q.dtype == dtype and q.is_contiguous()
    for found, truth in ((q, expected), (k, p.k), (v, p.v)):
        np.testing.assert_allclose(found.double().cpu(), truth, **tolerance(dtype, 2))
    assert np.array_equal(v.double().cpu(), p.v), "values are copied, not computed"


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("begins", [True, False])
def test_kernel_loads_nothing_beyond_its_inputs(layout, begins):
    p = problem(T=1, heads=(3, 1), D=10, capacity=5)
    qkv, k, v, *rest = on_device(p, torch.float32, lambda x: walled(x, begins))
    q = fast.rope_append(qkv, k, v, *rest, layout, block=4)
    expected = book.rope_append(p.qkv, p.k, p.v, p.positions, *p.tables, layout)
    np.testing.assert_allclose(q.cpu(), expected, **tolerance(torch.float32, 2))


@KERNEL
@pytest.mark.kernel
def test_kernel_stores_nothing_for_a_position_outside_the_cache():
    p = problem(B=4, T=2, capacity=5, positions=[-1, 2, 4, 2**40])
    qkv, k, v, *rest = on_device(p, torch.float32)
    q = fast.rope_append(qkv, k, v, *rest, block=8)
    inside = np.array([[False, True], [True, True], [True, False], [False, False]])
    assert torch.equal(q.isnan().cpu(), torch.from_numpy(~inside)[:, None, :, None].expand(q.shape))
    changed = (k.cpu().numpy() != p.k.astype(np.float32)).any(axis=(1, 3))
    np.testing.assert_array_equal(changed, [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0] * 5])
    np.testing.assert_array_equal((v.cpu().numpy() != p.v.astype(np.float32)).any(axis=(1, 3)), changed)


@KERNEL
@pytest.mark.kernel
def test_kernel_rotates_in_float32():
    p = rounded(problem(T=2, positions=[3, 5]), torch.float16)
    qkv, k, v, *rest = on_device(p, torch.float16)
    q = fast.rope_append(qkv, k, v, *rest)
    expected = book.rope_append(p.qkv, p.k, p.v, p.positions, *p.tables)
    once = torch.finfo(torch.float16).eps  # rounded at the end only
    np.testing.assert_allclose(q.double().cpu(), expected, rtol=once, atol=1e-6)
