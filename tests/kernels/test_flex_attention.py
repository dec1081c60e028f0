"""FlexAttention as a peer: it gets a case's mask and scores, and is never timed unfused."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import cases
from kernels.timing import relative_error


def test_it_takes_the_masks_and_scores_of_all_cases(monkeypatch):
    """Past a limit, 8 where nobody sets another, torch would compile no more, and run it with all scores in memory."""
    pytest.importorskip("triton")
    from kernels.shared import attention_options, attentions

    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **how: make(run, backend="eager", **how))
    monkeypatch.setattr(attentions, "compiled_flex", attentions.compiled_flex.__wrapped__)
    for lengths, window, softcap, alibi in [((50,), 20, 3.0, False), ((40, 9, 1), None, None, True)]:
        setting = attention_options.Setting(4, 2, 16, lengths, window, softcap, alibi)
        q, k, v = (torch.randn(1, heads, setting.tokens, 16) for heads in (4, 2, 2))
        found = attention_options.flex(setting, q, k, v)
        assert relative_error(found, attention_options.naive(setting, q, k, v)) < 1e-5
    served = [case for name in ("flash_variants", "patterns") for case in cases(f"attention.{name}") if len(case.peers)]
    assert 8 < 2 * len(served) < torch.compiler.config.recompile_limit
