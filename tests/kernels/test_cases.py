"""Kernel files and their cases, as `check`, `bench` and the notebooks look them up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import cases as book
from kernels.cases import Case, find, techniques, unavailable
from kernels.timing import argument_sets, tensors

PARTLY_READ = {"sparsity.sparse_ffn"}  # a call reads the rows that it chooses, its inputs hold all
CACHES = {"A100": 40 << 20, "H100": 50 << 20, "H200": 60 << 20}  # bytes of L2


def test_techniques_are_the_files():
    root = Path(kernels.__file__).parent
    files = {f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py") if path.stem != "__init__"}
    files = {name for name in files if not name.startswith("shared.")}
    assert techniques() == sorted(files) and "attention.flash" in files


def test_find_takes_whole_names_and_last_parts():
    assert find("attention.flash") == find("flash") == "attention.flash"


@pytest.mark.parametrize("name", ["", "flas", "attention.flasj", "flashh", "quantum.entanglement"])
def test_find_refuses_other_names_in_one_line(name):
    with pytest.raises(ValueError, match="flash") as refused:
        find(name)
    assert repr(name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", techniques())
def test_real_cases_come_from_memory_in_every_call(name):
    """Inputs hold what the call itself moves, on a GPU too: "meta" has no contents, but is not the CPU."""
    pytest.importorskip("triton")
    assert book.cases(name)
    for case in book.cases(name):
        for cache in CACHES.values():
            sets = argument_sets(case, torch.device("meta"), cache)
            read = [sum(tensor.numel() * tensor.element_size() for tensor in tensors(inputs)) for inputs in sets]
            assert name in PARTLY_READ or max(read) <= case.bytes, case.name
            assert sum(min(held, case.bytes) for held in read) > 2 * cache, case.name


def test_without_triton_names_are_known_and_cases_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert "attention.flash" in techniques() and find("flash") == "attention.flash"
    assert [book.cases(name) for name in techniques()] == [[] for _ in techniques()]
    assert "not installed" in unavailable() and "\n" not in unavailable()


def test_with_triton_nothing_is_said():
    pytest.importorskip("triton")
    assert unavailable() == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"bytes": 0}, "bytes of the case 'c'"), ({"peers": {"a": min}, "prepare": {"b": max}}, r"\['b'\].*\['a'\]")],
)
def test_cases_that_cannot_be_timed_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Case("c", tuple, min, max, **{"bytes": 1, "operations": 1, "kind": "other", **fields})
