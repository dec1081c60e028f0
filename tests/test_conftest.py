"""The suite's own tools: with a fence that does not see, or a tolerance too wide, no other test is worth anything."""

import ctypes
import math
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.judging import process_context
from tests import conftest
from tests.books import HAS_TRITON, pytest_in, tiny_book, write
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, guarded, kernel, oracle, poisoned, tolerance
from tests.fences import walled

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [torch.float32, np.float32, np.dtype("float32")])
def test_the_absolute_tolerance_grows_with_the_root_of_the_length(dtype):
    assert tolerance(dtype) == {"rtol": 1e-5, "atol": 1e-5}
    longer = tolerance(dtype, length=400, scale=3.0)
    assert longer["rtol"] == 1e-5 and math.isclose(longer["atol"], 60e-5)


def test_integers_have_no_tolerance():
    with pytest.raises(TypeError, match=r"float32.*int8.*exactly"):
        tolerance(torch.int8)


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans())
def test_poisoned_keeps_the_values_and_poisons_both_sides(dtype, shape, aligned):
    x = torch.randint(0, 2, shape, device=DEVICE).to(dtype)
    y = poisoned(x.mT if x.ndim >= 2 else x, aligned)
    assert torch.equal(y, x.mT if x.ndim >= 2 else x) and y.is_contiguous() and y.dtype == dtype
    assert not x.numel() or (y.data_ptr() % 16 == 0) == aligned
    around = y.as_strided((y.numel() + 2,), (1,), y.storage_offset() - 1)
    for edge in (around[0], around[-1]):
        if dtype.is_floating_point:
            assert edge.isnan()
        elif dtype is not torch.bool:
            assert edge in (torch.iinfo(dtype).min, torch.iinfo(dtype).max) and edge != 0


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3), st.booleans())
def test_walled_keeps_the_values(dtype, shape, begins):
    x = torch.randint(0, 2, shape).to(dtype)
    y = walled(x.mT if x.ndim >= 2 else x, begins)
    assert torch.equal(y, x.mT if x.ndim >= 2 else x) and y.is_contiguous() and y.dtype == dtype


def read_beside(begins: bool, index: int) -> None:
    """Read the float16 number at an index of a walled tensor of 5, whether it is in there or not."""
    x = walled(torch.ones(5, dtype=torch.float16), begins)
    ctypes.string_at(x.data_ptr() + 2 * index, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a wall is poison, and kernels do not run")
@pytest.mark.parametrize(
    ("begins", "index", "code"),
    [(False, 4, 0), (False, 5, -signal.SIGSEGV), (True, 0, 0), (True, -1, -signal.SIGSEGV), (True, 5, 0)],
)
def test_a_read_through_a_wall_ends_the_process(begins, index, code):
    process = process_context().Process(target=read_beside, args=(begins, index))
    process.start()
    process.join()
    assert process.exitcode == code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.uint8])
@pytest.mark.parametrize("index", [-1, 6, 5000])
def test_a_store_outside_of_a_new_tensor_is_seen(dtype, index):
    with pytest.raises(AssertionError, match=r"past the end of a tensor made by new_zeros"), guarded():
        out = torch.ones(1, device=DEVICE).new_zeros(2, 3, dtype=dtype)
        out.as_strided((1,), (1,), out.storage_offset() + index).fill_(1)


def test_what_was_read_beyond_an_input_is_not_hidden_by_the_fence():
    with pytest.raises(AssertionError, match="past the end of a tensor made by empty_like"), guarded():
        x = poisoned(torch.zeros(4, device=DEVICE))
        out = torch.empty_like(x)
        beyond = x.as_strided((8,), (1,), x.storage_offset())
        out.as_strided((8,), (1,), out.storage_offset()).copy_(beyond)


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans())
def test_guarded_factories_make_what_was_asked_for(dtype, shape, grad):
    grad = grad and dtype.is_floating_point
    with guarded():
        empty = torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=grad)
        zeros, ones = torch.zeros_like(empty), torch.ones(shape, dtype=dtype, device=DEVICE)
        turned = torch.empty_strided((2, 3), (1, 2), dtype=dtype, device=DEVICE)
        out = torch.zeros(3, out=torch.empty(3))
    assert empty.shape == zeros.shape == ones.shape == torch.Size(shape) and empty.requires_grad == grad
    assert empty.dtype == zeros.dtype == ones.dtype == dtype and turned.stride() == (1, 2)
    assert not zeros.any() and ones.all() and not out.any()
    assert not dtype.is_floating_point or (empty.isnan().all() and turned.isnan().all())
    assert torch.empty(2).storage_offset() == 0, "the factories are themselves again"


def test_golden_arrays_come_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    (tmp_path / "tests/golden/quant").mkdir(parents=True)
    np.savez(tmp_path / "tests/golden/quant/some.npz", codes=np.arange(3))
    assert golden("quant/some")["codes"].tolist() == [0, 1, 2]


def test_oracle_gives_the_book_s_own_module_and_leaves_the_imported_ones_alone():
    import chapters.contents

    assert oracle("contents").__file__ == chapters.contents.__file__
    assert oracle("contents") is not chapters.contents and oracle("contents") is oracle("contents")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton exists for Linux only; the session's second line says so")
def test_kernel_modules_come_by_name():
    assert kernel("guard").__name__ == "kernels.guard"
    assert (torch.bfloat16 in KERNEL_DTYPES) == (DEVICE == "cuda")


STRAY = """
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

def stray(size):
    out = torch.empty(size)
    out.as_strided((size + 1,), (1,)).fill_(size) if size > 2 else out.fill_(0)

@pytest.mark.kernel
@given(st.integers(1, 40))
def test_drawn(size):
    stray(size)

@pytest.mark.kernel
def test_once():
    stray(3)

@given(st.integers(1, 40))
def test_not_a_kernel(size):
    torch.empty(size)
"""
PROFILE = """
from hypothesis import settings

def test_examples():
    assert settings().max_examples == {} and settings().deadline is None
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return tiny_book(tmp_path_factory.mktemp("book"))


def test_kernel_tests_are_fenced_in_every_example(book):
    write(book / "tests/demo/test_stray.py", STRAY.replace("(1,)).fill_", "(1,), out.storage_offset()).fill_"))
    code, output = pytest_in(book, "tests/demo/test_stray.py", "--tb=short")
    (book / "tests/demo/test_stray.py").unlink()
    assert code == 1 and "2 failed, 1 passed" in output
    assert "went past the end of a tensor made by empty" in output
    assert "size=3," in output, "Hypothesis shrinks to the smallest size that goes astray"


def test_without_triton_kernel_tests_are_counted_and_left_out(book):
    code, output = pytest_in(book, without=("triton",))
    assert code == 0 and "4 passed, 1 deselected" in output
    assert "kernels: 1 tests NOT RUN, because Triton is not installed" in output


@pytest.mark.parametrize(("options", "examples"), [((), 30), (("--profile=thorough",), 200)])
def test_the_profile_says_how_many_examples_are_drawn(book, options, examples):
    write(book / "tests/demo/test_profile.py", PROFILE.format(examples))
    code, output = pytest_in(book, "tests/demo/test_profile.py", *options)
    (book / "tests/demo/test_profile.py").unlink()
    assert code == 0, output
