"""FlashAttention, plain and with options, at head sizes from 16 to 256, powers of two or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import flash, flash_variants
from tests.attention.checks import assert_close, assert_float32_close
from tests.attention.on_device import on_device
from tests.attention.problems import make, problems
from tests.conftest import DEVICE, kernel, oracle

BLOCKS = {"block_q": 16, "block_k": 16}
SLOPES = np.array([0.5, 0.1])
OPTIONS = {"flash": {}, "flash_variants": {"window": (9, None), "softcap": 2.0, "slopes": SLOPES, "cu_q": [0, 5, 19]}}


@settings(max_examples=10)
@given(problems(head_sizes=st.integers(16, 256)))
def test_reference_at_any_size(problem):
    arrays = (problem.q, problem.k, problem.v)
    expected = flash.attention(*arrays, **problem.options())
    for module in (flash, flash_variants):
        out, lse = module.flash_attention(*arrays, **problem.options(), block_q=16, block_k=16)
        assert_close(out, expected[0], problem)
        assert_close(lse, expected[1], problem)


@pytest.mark.kernel
@pytest.mark.parametrize("name", [*OPTIONS])
@pytest.mark.parametrize("D", [32, 96, 128, 160, 192, 256])
def test_kernels_at_any_size(name, D):
    book, fast, options = oracle(f"attention.{name}"), kernel(f"attention.{name}"), OPTIONS[name]
    problem = make("normal", D, (1, 1, 2), T=19, S=19, D=D, causal=True, scale=None)
    arrays = (problem.q, problem.k, problem.v)
    inputs = (problem.dout, *arrays, *book.attention(*arrays, **options))
    tensors = [on_device(x, torch.float32) for x in inputs]
    more = options | ({"slopes": torch.from_numpy(SLOPES).to(DEVICE)} if options else {})
    found = [*fast.flash_attention(*tensors[1:4], **more, **BLOCKS)]
    found += fast.flash_attention_backward(*tensors, **more, **BLOCKS)
    expected = [*inputs[4:], *book.flash_attention_backward(*inputs, **options)]
    for value, truth in zip(found, expected, strict=True):
        assert_float32_close(value, truth)
