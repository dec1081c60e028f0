"""The memory counter against sizes that can be counted by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from chapters.shared.memory import peak_bytes, resident_growth


def test_what_lives_at_once_counts_and_what_is_freed_does_not():
    def compute() -> torch.Tensor:
        x = torch.ones(1000)  # 4,000 bytes
        y = x + 1  # 8,000
        del x
        z = y * 2  # 8,000 again
        return z.view(10, 100)[:5].T  # views hold nothing of their own

    assert peak_bytes(compute) == 8000


def test_inputs_and_what_happens_in_place_cost_nothing():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.add_(1).view(10, 100)) == 0


def test_what_autograd_keeps_counts():
    x = torch.ones(1000, requires_grad=True)

    def compute() -> None:
        y = x
        for _ in range(5):
            y = y.exp()  # each result is kept for the backward pass
        y.sum().backward()

    assert peak_bytes(compute) >= 5 * 4000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_fresh_python_grows_by_what_it_fills_at_once_and_not_by_what_it_imports():
    code = "big = bytearray(b'x') * 50_000_000\ndel big\nsmall = bytearray(b'x') * 20_000_000"
    growth = resident_growth("early = bytearray(b'x') * 30_000_000", code)
    assert growth is not None and 49e6 < growth < 55e6  # the system counts in steps


def test_a_fresh_python_that_fails_says_why(monkeypatch, tmp_path):
    if resident_growth("", "") is not None:
        with pytest.raises(RuntimeError, match=r"^ValueError: no$"):
            resident_growth("", "raise ValueError('no')")
    monkeypatch.setattr("chapters.shared.memory.STATUS", tmp_path / "missing")
    assert resident_growth("", "") is None
