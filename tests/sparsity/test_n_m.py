"""N:M sparsity: the masks against brute force, the format against torch's own code, the kernels against both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from chapters.sparsity import n_m
from tests.conftest import DEVICE, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.compressed import assert_same_words, converted_by_torch, cutlass_places, spelled, stored
from tests.sparsity.drawn import CONTENTS, SEEDS, SUMMABLE, contents, first_largest, pruned, weights
from tests.sparsity.exact import KEPT, NIBBLES, group_of, least_and_next_to_one, mixed
from tests.sparsity.general import PATTERNS as GENERAL
from tests.sparsity.general import stored_n_m, thinned
from tests.sparsity.launched import EXACT_SUMS, SPECIAL_BITS, assert_close, exact_products, products, special_groups
from tests.sparsity.refused import REFUSED

MASK = pytest.mark.exercise("chapters.sparsity.n_m.n_m_mask", points=2)
BLOCKS = pytest.mark.exercise("chapters.sparsity.n_m.block_mask", points=2)
COMPRESS = pytest.mark.exercise("chapters.sparsity.n_m.compress", points=3)
MATMUL = pytest.mark.exercise("chapters.sparsity.n_m.sparse_matmul", points=2)
COMPRESS_N_M = pytest.mark.exercise("chapters.sparsity.n_m.compress_n_m", points=2)
MATMUL_N_M = pytest.mark.exercise("chapters.sparsity.n_m.matmul_n_m", points=2)
OFFSETS = pytest.mark.exercise("chapters.sparsity.n_m.cutlass_offsets", points=1)
LARGEST_TWO = pytest.mark.exercise("kernels.sparsity.n_m.largest_two", points=2)
MATVEC = pytest.mark.exercise("kernels.sparsity.n_m.matvec_kernel", points=4)
GRADED = (MASK, BLOCKS, COMPRESS, MATMUL, COMPRESS_N_M, MATMUL_N_M, OFFSETS)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in GRADED}

fast = kernel("sparsity.n_m")
PATTERNS = [(n, m) for m in (1, 2, 4, 5, 8) for n in range(1, m + 1)]
TORCH_SIZES = {"strips": st.integers(1, 2), "words": st.integers(1, 3), "kind": st.sampled_from(CONTENTS[:4])}
EQUALS = st.sampled_from(["ties", "all equal", "mostly zero"])


def marked(table: dict[str, dict]) -> list:
    """(function, case) for each case of an exercise in the table, with the exercise's mark."""
    return [pytest.param(name, case, marks=MARKS[name]) for name in table if name in MARKS for case in table[name]]


# --- the definition: masks ----------------------------------------------------------------------------------------


@MASK
@given(st.sampled_from(PATTERNS).flatmap(lambda p: st.tuples(st.just(p), weights(p[1], 4))))
def test_each_group_keeps_the_most_magnitude_that_n_of_m_can(drawn):
    (n, m), weight = drawn
    mask = n_m.n_m_mask(weight, n, m)
    assert mask.dtype == bool and mask.shape == weight.shape
    for group, kept in zip(np.abs(weight).reshape(-1, m), mask.reshape(-1, m), strict=True):
        best = max(sum(choice) for choice in itertools.combinations(sorted(group), n))
        assert kept.sum() == n and sum(sorted(group[kept])) == best


@MASK
@given(st.sampled_from([(2, 4), (8, 32), (20, 64), (64, 128)]), EQUALS, SEEDS)
def test_of_equal_magnitudes_the_lowest_indices_are_kept(pattern, kind, seed):
    """Sorts that are not stable often look so in short groups."""
    n, m = pattern
    weight = contents(kind, (3, 2 * m), seed)
    for group, kept in zip(np.abs(weight).reshape(-1, m), n_m.n_m_mask(weight, n, m).reshape(-1, m), strict=True):
        assert kept.nonzero()[0].tolist() == first_largest(group, n)


@MASK
@given(weights(4), st.integers(-900, 900))
def test_neither_scale_nor_sign_changes_the_mask(weight, exponent):
    mask = n_m.n_m_mask(weight)
    np.testing.assert_array_equal(n_m.n_m_mask(weight * 2.0**exponent), mask)
    np.testing.assert_array_equal(n_m.n_m_mask(-weight), mask)


@BLOCKS
@given(weights(1, 40), st.integers(1, 5), st.floats(0, 0.9), st.booleans())
def test_blocks_are_dropped_whole_in_the_exact_number_and_the_smallest_first(weight, rows, sparsity, single):
    rows = 1 if single else rows
    weight = np.repeat(weight, rows, axis=0) * np.tile(np.arange(1, rows + 1), len(weight))[:, None]
    size = weight.size // rows
    assume(round(sparsity * size) < size)
    mask = n_m.unstructured_mask(weight, sparsity) if single else n_m.block_mask(weight, sparsity, rows)
    blocks = mask.reshape(-1, rows, weight.shape[1])
    sums = np.abs(weight).reshape(blocks.shape).sum(axis=1)
    assert (blocks == blocks[:, :1]).all()
    kept = blocks[:, 0]
    assert size - kept.sum() == round(sparsity * size)
    assert sums[kept].min() >= sums[~kept].max(initial=0)


@pytest.mark.parametrize(("function", "case"), marked(KEPT))
def test_exactly_these_are_kept_and_the_weight_is_left_as_it_was(function, case):
    weight, options, expected = KEPT[function][case]
    mine = weight.copy()
    mask = getattr(n_m, function)(mine, *options)
    np.testing.assert_array_equal(mask, np.array(expected, dtype=bool))
    np.testing.assert_array_equal(mine, weight)


@BLOCKS
@given(EQUALS, st.sampled_from([0.25, 0.5, 0.9]), SEEDS)
def test_of_many_equal_blocks_the_first_are_kept_row_by_row(kind, sparsity, seed):
    weight = contents(kind, (4, 60), seed)
    sums = np.abs(weight.reshape(2, 2, 60)).sum(axis=1)
    kept = n_m.block_mask(weight, sparsity, rows=2)[::2].ravel().nonzero()[0]
    assert kept.tolist() == first_largest(sums.ravel(), sums.size - round(sparsity * sums.size))


# --- the definition: the compressed form --------------------------------------------------------------------------


@COMPRESS
@given(weights(16, 3))
def test_compression_loses_nothing(weight):
    weight = pruned(weight).astype(np.float16)
    values, metadata = n_m.compress(weight)
    assert values.shape == (len(weight), weight.shape[1] // 2) and values.dtype == weight.dtype
    assert metadata.shape == (len(weight), weight.shape[1] // 16) and metadata.dtype == np.int16
    restored = n_m.decompress(values, metadata)
    nonzero = weight != 0
    np.testing.assert_array_equal(restored.view(np.int16)[nonzero], weight.view(np.int16)[nonzero])
    np.testing.assert_array_equal(restored[~nonzero], 0)


@COMPRESS
@pytest.mark.parametrize(("bits", "nibble"), NIBBLES.items())
def test_all_sixteen_patterns_of_a_group(bits, nibble):
    group, by_torch = group_of(bits)
    weight = np.concatenate([group, np.zeros(12)])[None]
    if nibble is None:
        with pytest.raises(ValueError):
            n_m.compress(weight)
        return
    values, metadata = n_m.compress(weight)
    assert spelled(metadata)[0][0] == f"{nibble:x}" == by_torch
    np.testing.assert_array_equal(values[0, :2], group[[nibble & 3, nibble >> 2]])
    np.testing.assert_array_equal(n_m.decompress(values, metadata), weight)


@COMPRESS
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8])
def test_every_value_that_is_not_zero_is_kept_as_it_is(dtype):
    weight, before = least_and_next_to_one(dtype), least_and_next_to_one(dtype)
    values, metadata = n_m.compress(weight)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, before[before != 0].reshape(2, -1))
    assert set("".join(spelled(metadata))) <= {"d", " "}  # positions 1 and 3
    np.testing.assert_array_equal(weight, before)


@MATMUL
@given(rows=st.integers(1, 9), words=st.integers(1, 3), tokens=st.integers(1, 5), kind=st.sampled_from(CONTENTS),
       seed=SEEDS)  # fmt: skip
def test_the_product_from_the_compressed_form_is_the_dense_product(rows, words, tokens, kind, seed):
    values, metadata, dense, _ = stored(kind, rows, words, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, dense.shape[1]))
    y = n_m.sparse_matmul(x, values, metadata)
    expected = np.array([[sum(a * b for a, b in zip(token, row, strict=True)) for row in dense] for token in x])
    largest = float((np.abs(x) @ np.abs(dense).T).max())
    np.testing.assert_allclose(y, expected, **tolerance(np.float64, scale=largest + 1e-300))


@MATMUL
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
@given(rows=st.integers(1, 9), words=st.integers(1, 2), seed=SEEDS)
def test_the_product_is_taken_in_the_finer_dtype_of_the_two(dtype, rows, words, seed):
    """int8 has eight groups in a word of 32 bits; activations are never rounded to the dtype of the values."""
    operands, dense = mixed(dtype, rows, words, seed)
    mine = tuple(operand.copy() for operand in operands)
    y = n_m.sparse_matmul(*mine)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, operands[0] @ dense.T, **tolerance(np.float64, dense.shape[1], scale=100))
    np.testing.assert_equal(mine, operands)


@MATMUL
@given(rows=st.integers(1, 9), words=st.integers(1, 3), seed=SEEDS)
def test_an_activation_reaches_only_the_rows_that_store_a_value_for_it(rows, words, seed):
    """A product with a dropped weight, which is 0, would show: 0 · NaN is NaN."""
    values, metadata, dense, kept = stored("normal", rows, words, seed)
    x = np.ones((dense.shape[1], dense.shape[1]))
    np.fill_diagonal(x, np.nan)  # token t lacks activation t
    np.testing.assert_array_equal(np.isnan(n_m.sparse_matmul(x, values, metadata)), kept.T)


# --- the definition: any N:M --------------------------------------------------------------------------------------

SIZES = {"pattern": st.sampled_from(GENERAL), "rows": st.integers(1, 9), "groups": st.integers(1, 20), "seed": SEEDS}


@COMPRESS_N_M
@pytest.mark.parametrize("dtype", [None, np.float32, np.float16, np.int8])
@given(**SIZES)
def test_any_n_m_weight_is_its_values_and_their_positions(dtype, pattern, rows, groups, seed):
    """dtype None: full groups. In the others some have fewer than n, and the first of their zeros are stored."""
    drawn = (*pattern, rows, groups, seed)
    weight, *parts = thinned(dtype, *drawn) if dtype else (stored_n_m("tiny", *drawn)[place] for place in (2, 0, 1))
    mine = weight.copy()
    for found, expected in zip(n_m.compress_n_m(mine, *pattern), parts, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(mine, weight)


@MATMUL_N_M
@given(tokens=st.integers(1, 5), kind=st.sampled_from(CONTENTS), **SIZES)
def test_the_product_from_values_and_positions_is_the_dense_product(tokens, kind, pattern, rows, groups, seed):
    values, packed, dense, mask = stored_n_m(kind, *pattern, rows, groups, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, dense.shape[1]))
    operands = (x.copy(), values.copy(), packed.copy())
    y = n_m.matmul_n_m(*operands, *pattern)
    largest = float((np.abs(x) @ np.abs(dense).T).max())
    np.testing.assert_allclose(y, x @ dense.T, **tolerance(np.float64, dense.shape[1], scale=largest))
    assert n_m.matmul_n_m(x, values.astype(np.float32), packed, *pattern).dtype == np.float64
    np.testing.assert_equal(operands, (x, values, packed))
    x = np.where(np.eye(dense.shape[1], dtype=bool), np.nan, 1)  # token t lacks activation t, and spoils who stores it
    np.testing.assert_array_equal(np.isnan(n_m.matmul_n_m(x, values, packed, *pattern)), mask.T)


# --- the reference: torch's own code ------------------------------------------------------------------------------


@COMPRESS
@pytest.mark.parametrize("case", ["f16", "bf16", "i8"])
def test_golden_values_and_metadata(case):
    arrays = golden("sparse/semi_structured_24")
    dense = arrays[f"{case}__dense"].astype(np.float16 if case == "f16" else arrays[f"{case}__dense"].dtype)
    values, metadata = n_m.compress(dense)
    np.testing.assert_array_equal(values, arrays[f"{case}__values"])
    assert_same_words(metadata, arrays[f"{case}__meta_rowmajor"])
    np.testing.assert_array_equal(n_m.decompress(values, metadata), dense)


@OFFSETS
@pytest.mark.parametrize("case", ["f16", "bf16", "i8"])
def test_golden_cutlass_order(case):
    arrays = golden("sparse/semi_structured_24")
    metadata, reordered = arrays[f"{case}__meta_rowmajor"], arrays[f"{case}__meta_cutlass_reordered"]
    np.testing.assert_array_equal(n_m.cutlass_offsets(metadata), arrays[f"{case}__reorder_offsets"])
    assert_same_words(n_m.to_cutlass(metadata), reordered)
    assert_same_words(n_m.from_cutlass(reordered), metadata)


@MATMUL
def test_golden_product():
    arrays = golden("sparse/semi_structured_24")
    values, metadata = arrays["f16__values"].astype(np.float64), arrays["f16__meta_rowmajor"]
    y = n_m.sparse_matmul(arrays["f16__rhs"].T.astype(np.float64), values, metadata)
    np.testing.assert_allclose(y.T, arrays["f16__dense_at_rhs_f64"], **tolerance(np.float64, values.shape[1]))


@COMPRESS
@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@given(seed=SEEDS, **TORCH_SIZES)
def test_values_and_metadata_are_those_of_torch_bit_for_bit(dtype, strips, words, kind, seed):
    weight, expected, reordered = converted_by_torch(dtype, strips, words, kind, seed)
    values, metadata = n_m.compress(weight)
    bits = f"int{8 * values.itemsize}"
    np.testing.assert_array_equal(values.view(bits), expected.view(bits))
    assert_same_words(metadata, reordered.ravel()[cutlass_places(reordered)])


@OFFSETS
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@given(strips=st.integers(1, 4), pairs=st.integers(1, 5))
def test_every_word_goes_where_torch_puts_it(dtype, strips, pairs):
    metadata = np.arange(strips * 64 // np.dtype(dtype).itemsize * 2 * pairs, dtype=dtype).reshape(-1, 2 * pairs)
    np.testing.assert_array_equal(n_m.cutlass_offsets(metadata), cutlass_places(metadata))
    np.testing.assert_array_equal(n_m.from_cutlass(n_m.to_cutlass(metadata)), metadata)


# --- bad input: here the type of the error is graded, in test_n_m_refusals.py its words -----------------------------


@pytest.mark.parametrize(("function", "case"), marked(REFUSED))
def test_bad_input_is_refused(function, case):
    with pytest.raises(ValueError):
        getattr(n_m, function)(*REFUSED[function][case])


# --- the kernels --------------------------------------------------------------------------------------------------


@LARGEST_TWO
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # bits are moved, never added: right everywhere
@given(weight=weights(16, 5), words=st.sampled_from([4, 16]), aligned=st.booleans())
def test_kernel_prunes_and_compresses_like_the_reference(dtype, weight, words, aligned):
    dense = torch.from_numpy(weight).to(dtype)
    values, metadata = fast.prune_and_compress(poisoned(dense.to(DEVICE), aligned), words)
    expected = oracle("sparsity.n_m").prune_and_compress(dense.double().numpy())
    assert_same_words(metadata.cpu().numpy(), expected[1])
    np.testing.assert_array_equal(values.double().cpu().numpy(), expected[0])


@LARGEST_TWO
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", SPECIAL_BITS)
def test_kernel_ranks_every_kind_of_number_in_every_place(dtype):
    """Both zeros, a subnormal, neighbours among the largest, infinity and NaN, which is kept and stays visible."""
    weight, values, metadata = special_groups(dtype)
    found = fast.prune_and_compress(weight.to(DEVICE))
    assert_same_words(found[1].cpu().numpy(), metadata)
    np.testing.assert_array_equal(found[0].cpu().view(torch.int16).numpy(), values)


@MATVEC
@pytest.mark.kernel
@given(rows=st.integers(1, 17), words=st.integers(1, 13), tile=st.sampled_from([2, 4]),
       kind=st.sampled_from(SUMMABLE), seed=SEEDS, aligned=st.booleans())  # fmt: skip
def test_kernel_multiplies_one_token(rows, words, tile, kind, seed, aligned):
    operands, expected = products(1, rows, words, seed, aligned, kind)
    assert_close(fast.sparse_matmul(*operands, rows=tile, words=2 * tile), expected)


@MATVEC
@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "unit", "largest", "words"), EXACT_SUMS)
def test_kernel_takes_products_and_sums_in_float32(dtype, unit, largest, words):
    """Any order of float32 sums is exact here, so a result is right to the last bit, or something was rounded early."""
    operands, exact = exact_products(dtype, unit, largest, words)
    y = fast.sparse_matmul(*operands, rows=4, words=8)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.double().cpu().numpy(), exact)


@MATVEC
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_kernel_reads_nothing_outside_x_values_and_metadata(operand, begins):
    """It comes last, because a kernel that does ends the process."""
    operands, _ = products(1, 5, 5, 0, True, "normal")
    operands[operand] = walled(operands[operand], begins)
    fast.sparse_matmul(*operands, rows=4, words=4)
