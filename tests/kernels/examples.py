"""Throw-away kernels, one for each thing that `python -m kernels check` must accept or refuse.

Only the subprocess of test_check.py imports this: it needs Triton's compiler, not its interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cases import Case


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, out_ptr, N, K, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IEEE: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * K + (start + inner)[None, :])
        w = tl.load(w_ptr + (start + inner)[:, None] * N + column[None, :])
        acc = tl.dot(x, w, acc, input_precision="ieee" if IEEE else "tf32")
    tl.store(out_ptr + row[:, None] * N + column[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def shifted_matmul_kernel(x_ptr, w_ptr, out_ptr, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * K + (start + inner)[None, :])
        w = tl.load(w_ptr + (start + inner)[:, None] * N + column[None, :])
        acc = tl.dot(x, w, acc) + start
    tl.store(out_ptr + row[:, None] * N + column[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def double_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size) * 2, mask=at < size)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=float("-inf"))
    weights = tl.exp(x - tl.max(x))
    tl.store(out_ptr + at, weights / tl.sum(weights) + x, mask=at < size)


def matmul(x, w, stages=3, block_n=128, block_k=64, ieee=False):
    """x @ w for sizes that the blocks divide."""
    (rows, inner), columns = x.shape, w.shape[1]
    out = x.new_empty(rows, columns)
    tiles = (rows // 128, columns // block_n)
    matmul_kernel[tiles](x, w, out, columns, inner, 128, block_n, block_k, ieee, num_warps=8, num_stages=stages)
    return out


def shifted_matmul(x, w):
    """A product whose accumulators are changed between one wgmma and the next, so that each waits."""
    out = torch.empty_like(x)
    shifted_matmul_kernel[(32, 32)](x, w, out, 4096, 4096, BLOCK=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return out


def double(x, block=1024, dtype=torch.float32):
    """2 x, with a grid that Triton asks for."""
    out = torch.empty_like(x, dtype=dtype)
    double_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel(), BLOCK=block, num_warps=4)
    return out


def softmax(x):
    """Softmax plus x of one long row by a single warp, which cannot hold it."""
    out = torch.empty_like(x)
    softmax_kernel[(1,)](x, out, x.numel(), 4096, num_warps=1)
    return out


def large_then_small(x):
    """Two launches on wide data, and one on four bytes from an unaligned address."""
    return double(x), double(x), double(x[1:2], block=16)


def operands(dtype):
    """A pair of square matrices."""
    return lambda device: tuple(torch.empty(4096, 4096, dtype=dtype, device=device) for _ in range(2))


def vector(device):
    """A long vector that begins at a multiple of 16 bytes."""
    return (torch.empty(1 << 20, device=device),)


def shifted(device):
    """The same, beginning 4 bytes later."""
    return (torch.empty((1 << 20) + 1, device=device)[1:],)


def case(name, inputs, run, kind, narrow_stores=""):
    """A case of 1 GB and 1 TFLOP: the figures only scale the floor."""
    return Case(name, inputs, run, run, bytes=10**9, operations=10**12, kind=kind, narrow_stores=narrow_stores)


bf16 = operands(torch.bfloat16)
CASES = [
    case("matmul", bf16, matmul, "matrix"),
    case("double", vector, double, "stream"),
    case("two sizes", vector, large_then_small, "stream"),
    case("spills", vector, softmax, "other"),
    case("too much shared memory", bf16, lambda x, w: matmul(x, w, stages=6, block_n=256), "matrix"),
    case("scalar loads", shifted, double, "stream"),
    case("narrow stores", vector, lambda x: double(x, dtype=torch.int8), "stream"),
    case("explained stores", vector, lambda x: double(x, dtype=torch.int8), "stream", "bytes, 8 for a thread"),
    case("no tensor cores", operands(torch.float32), lambda x, w: matmul(x, w, 2, 64, 16, ieee=True), "matrix"),
    case("no dot", vector, double, "matrix"),
    case("serialized", bf16, shifted_matmul, "matrix"),
    case("does not compile", bf16, lambda x, w: matmul(x, w, block_k=8), "matrix"),
    case("launches nothing", vector, lambda x: 2 * x, "other"),
]
