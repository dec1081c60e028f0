"""What `bench` compares kernels with, and what it hands to peers, at sizes that the interpreter can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.timing import relative_error
from tests.conftest import DEVICE, kernel

weight_only = kernel("quantization.weight_only")
n_m = kernel("sparsity.n_m")

pytestmark = pytest.mark.kernel


def four_bits(tokens: int) -> tuple:
    """Arguments of `weight_only_matmul` with contents, in float16."""
    draw = torch.Generator().manual_seed(tokens)
    packed = torch.randint(-(2**31), 2**31, (24, 32), generator=draw).to(torch.int32)
    scale = torch.rand(24, 2, generator=draw).add(0.5).half() / 100
    zero = torch.randint(0, 16, (24, 2), generator=draw).to(torch.uint8)
    x = torch.randn(tokens, 256, generator=draw).half()
    return *(tensor.to(DEVICE) for tensor in (x, packed, scale, zero)), 128


@pytest.mark.parametrize("tokens", [1, 5])
def test_four_bits_expected_and_cublas_peer(tokens):
    case, inputs = weight_only.llama_case(tokens, 24, 256), four_bits(tokens)
    got = case.run(*inputs)
    assert relative_error(got, case.expected(*inputs)) < 2e-3
    assert relative_error(case.peers["cuBLAS bf16"](*case.prepare["cuBLAS bf16"](*inputs)), got) < 2e-3


def test_four_bits_as_torch_packs_them(monkeypatch):
    """torch's kernel takes the even of two columns in the high nibble, and (code - 8) * scale + zero."""
    x, packed, scale, zero, group_size = four_bits(3)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)  # exists on GPUs only
    prepare = weight_only.llama_case(3, 24, 256).prepare["torch int4pack"]
    same, pairs, size, grids = prepare(x, packed, scale, zero, group_size)
    assert same is x and size == 128 and grids.shape == (2, 24, 2) and grids.is_contiguous()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1)
    scales, zeros = grids.double().transpose(0, 1).repeat_interleave(128, dim=1).unbind(-1)
    weight = (codes.double() - 8) * scales + zeros
    dense = weight_only.dequantize(packed, scale, zero, group_size, torch.float64)
    assert relative_error(weight, dense) < 2e-3


@pytest.mark.parametrize("tokens", [1, 3])
def test_two_of_four_expected_and_cublas_peer(tokens):
    draw = torch.Generator().manual_seed(tokens)
    weight, x = (torch.randn(rows, 64, generator=draw).half().to(DEVICE) for rows in (24, tokens))
    compress, case = n_m.compress_case(24, 64), n_m.matmul_case(tokens, 24, 64)
    compressed = compress.run(weight)
    assert relative_error(compressed, compress.expected(weight)) == 0
    got = case.run(x, *compressed)
    assert relative_error(got, case.expected(x, *compressed)) < 2e-3
    x_again, dense = case.prepare["cuBLAS, dense"](x, *compressed)
    assert relative_error(F.linear(x_again, dense), got) < 2e-3
    groups = dense.unflatten(1, (-1, 4))
    assert torch.equal((groups != 0).sum(-1), torch.full(groups.shape[:2], 2, device=DEVICE))
