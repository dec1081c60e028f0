"""FlashAttention's variants say what they refuse and why, the reference, the torch code and the kernels alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chapters.attention import flash_variants
from tests.attention.refused_variants import BAD_OPTIONS, SHAPES, refusals
from tests.conftest import DEVICE, kernel

fast = kernel("attention.flash_variants")


@pytest.mark.parametrize(("arrays", "options", "error", "words"), refusals())
def test_definition_refuses(arrays, options, error, words):
    if not {"block_q", "block_k"} & set(options):
        with pytest.raises(error, match=words):
            flash_variants.attention(**arrays, **options)


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_attend_refuses(options, error, words):
    q, k, v = (torch.zeros(shape) for shape in SHAPES.values())
    options = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(error, match=words):
        flash_variants.attend(q, k, v, **options)


@pytest.mark.kernel
@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_kernel_refuses(options, error, words):
    q, k, v = (torch.zeros(shape, device=DEVICE) for shape in SHAPES.values())
    options = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(error, match=words):
        fast.flash_attention(q, k, v, **options)


@pytest.mark.kernel
def test_kernel_refuses_batches_of_packed_sequences_and_gradients_that_do_not_fit():
    q, k, v = (torch.zeros(2, *shape[1:], device=DEVICE) for shape in SHAPES.values())
    with pytest.raises(ValueError, match="batch of 1"):
        fast.flash_attention(q, k, v, cu_q=[0, 3], cu_k=[0, 5])
    with pytest.raises(ValueError, match="Hkv dividing 4"):
        fast.flash_attention(q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3])
    lse = torch.zeros(q.shape[:3], device=DEVICE)
    for arguments, words in [((q[:, :2], q, lse), "dout"), ((q, q[:, :2], lse), "out"), ((q, q, lse[:, :2]), "lse")]:
        with pytest.raises(ValueError, match=f"{words} must"):
            fast.flash_attention_backward(arguments[0], q, k, v, *arguments[1:])
    with pytest.raises(TypeError, match="lse must have dtype"):
        fast.flash_attention_backward(q, q, k, v, q, lse.double())


@pytest.mark.parametrize("options", [{"window": 0}, {"window": -3}, {"softcap": 0.0}, {"softcap": float("nan")}])
def test_run_refuses(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} must be"):
        flash_variants.seams(SimpleNamespace(**{"window": None, "softcap": None, "alibi": False} | options))
