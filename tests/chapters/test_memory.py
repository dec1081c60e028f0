"""The memory counter against sizes that can be counted by hand."""

from __future__ import annotations

import torch

from chapters.memory import peak_bytes


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
