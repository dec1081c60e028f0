"""FlashAttention says what it refuses and why, the reference and the kernels alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chapters.attention import flash
from tests.attention.refused import GOOD, going_back, refusals, wrong_input
from tests.conftest import DEVICE, kernel, oracle

fast, book = kernel("attention.flash"), oracle("attention.flash")


@pytest.mark.parametrize(("shapes", "options", "words"), refusals())
def test_reference_refuses(shapes, options, words):
    arrays = [np.zeros(shape) for shape in shapes.values()]
    ways = [book.flash_attention] + ([] if {"block_q", "block_k"} & set(options) else [flash.attention])
    for way in ways:
        with pytest.raises(ValueError, match=words):
            way(*arrays, **options)


@pytest.mark.parametrize("arrays", [arrays for arrays, _, error in wrong_input() if error is TypeError])
def test_reference_refuses_dtypes(arrays):
    with pytest.raises(TypeError, match="dtype"):
        flash.attention(**arrays)


@pytest.mark.parametrize("wrong", ["dout", "out", "lse"])
def test_backward_refuses(wrong):
    arguments = going_back(*(np.zeros(shape) for shape in GOOD.values()))
    with pytest.raises(ValueError, match="do not fit q"):
        book.flash_attention_backward(**arguments | {wrong: arguments[wrong][:, :1]})


@pytest.mark.kernel
@pytest.mark.parametrize(("shapes", "options", "words"), [*refusals(), (GOOD, {"block_q": 24}, "power of two")])
def test_kernel_refuses(shapes, options, words):
    with pytest.raises(ValueError, match=words):
        fast.flash_attention(*(torch.zeros(shape, device=DEVICE) for shape in shapes.values()), **options)


@pytest.mark.kernel
def test_kernel_refuses_strides_sizes_dtypes_and_gradients_that_do_not_fit():
    q, k, v = (torch.zeros(shape, device=DEVICE) for shape in GOOD.values())
    with pytest.raises(ValueError, match="k must have a contiguous last axis"):
        fast.flash_attention(q, k.mT.contiguous().mT, v)
    with pytest.raises(ValueError, match=r"v must have .* multiples of 8"):
        fast.flash_attention(q, k, torch.zeros(1, 2, 5, 9, device=DEVICE)[..., :8])
    with pytest.raises(ValueError, match="at most 256, got 257"):
        fast.flash_attention(*[torch.zeros(1, 1, 1, 257, device=DEVICE)] * 3)
    with pytest.raises(TypeError, match="q must have dtype"):
        fast.flash_attention(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match="v must have dtype"):
        fast.flash_attention(q, k, v.half())
    lse = torch.zeros(q.shape[:3], device=DEVICE)
    for arguments, words in [((q[:, :2], q, lse), "dout"), ((q, q[:, :2], lse), "out"), ((q, q, lse[:, :2]), "lse")]:
        with pytest.raises(ValueError, match=f"{words} must"):
            fast.flash_attention_backward(arguments[0], q, k, v, *arguments[1:])
    with pytest.raises(TypeError, match="lse must have dtype"):
        fast.flash_attention_backward(q, q, k, v, q, lse.double())
