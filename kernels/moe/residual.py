"""PR-MoE's mix in one pass: coefficients, the way back from the experts, the gate and the sum, forward and backward.

Fused: a product of each token with two rows, softmax over two, the gather of the expert's answer (0 if dropped), its
gate, both coefficients and the sum. Softmax over two is a sigmoid of the difference, so one product will do: with
lean = weight[0] - weight[1] and z = lean · x + bias[0] - bias[1], c = (1 / (1 + e^-z), e^-z / (1 + e^-z)). A program
holds `lean` in registers and takes every so many-th token, whose three rows it asks for at once and holds until z is
known: nothing is read twice. As many programs as fit stay, so that no one's end is waited for.

    y        = c0 gate e + c1 m                                   e = rows[source], or 0; m = mlp
    dm       = c1 dy          de = c0 gate dy          dgate = c0 (dy · e)
    pull     = c0 c1 (gate (dy · e) - dy · m)          on logit 0, minus that on logit 1
    dx       = pull lean      dweight[0] = Σ_t pull x = -dweight[1]          dbias[0] = Σ_t pull = -dbias[1]

With T tokens, n of which have a row, dim D and s bytes a number, P programs:
    forward      s D (3 T + n) + 12 T bytes: x, rows and mlp in, y out, source and gate
    backward     s D (5 T + 2 n) + 16 T bytes: dy, x, rows and mlp in, dx, drows and dmlp out
    more         2 s D for each program, from L2; backward 8 P D for sums over tokens, which are first a program's own
                 and then added, always in the same order; s D for each of drows, set to 0 before the launch
    operations   about 8 T D forward, 14 T D backward: memory bounds both
Replaces a matmul of two columns, softmax, a gather, three products and a sum, a launch each: about 12 rows a token
instead of 4. A one-hot matrix [T, experts · capacity] instead of the gather, as in GShard, multiplies mostly zeros.

Layout: all row-major; source int64, gate float32, the rest of one dtype; sums in float32; dim up to 8192.
Method: Rajbhandari et al. 2022, arXiv:2201.05596, section 4.1.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_DIM = 8192  # at 8 numbers of each row in a thread's registers, 1024 threads
MULTIPROCESSORS = 132  # where there is no GPU to ask
FORWARD_THREADS, BACKWARD_THREADS = 1536, 1024  # that stay on a multiprocessor: their registers allow no more


@triton.jit
def difference(weight, bias, column, dim):
    """lean [BLOCK] = weight[0] - weight[1], 0 beyond dim, and lift = bias[0] - bias[1]; float32."""
    inside = column < dim
    first = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(weight + dim + column, mask=inside, other=0.0).to(tl.float32)
    return first - second, tl.load(bias).to(tl.float32) - tl.load(bias + 1).to(tl.float32)


@triton.jit
def sigmoids(z):
    """1 / (1 + e^-z) and 1 / (1 + e^z); the small one is not a difference, and nothing overflows."""
    small = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger)


@triton.jit
def mix_kernel(x, weight, bias, rows, source, gate, mlp, y, tokens, dim, BLOCK: tl.constexpr):
    """Rows of y [tokens, dim], one token after the other: this program's number, then every so many-th.

    Shapes as in `mix`, source int64, gate float32. BLOCK, a power of two, is at least dim. A token whose source is
    negative reads no row. Sums are float32.
    """
    column = tl.arange(0, BLOCK)
    inside = column < dim
    lean, lift = difference(weight, bias, column, dim)
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        place = tl.load(source + token)
        share = tl.load(gate + token)
        at = token * dim + column
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(rows + place * dim + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
        chosen, fixed = sigmoids(tl.sum(a * lean, axis=0) + lift)
        mixed = chosen * share * e + fixed * m
        tl.store(y + at, mixed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def mix_backward_kernel(
    dy, x, weight, bias, rows, source, gate, mlp, dx, drows, dgate, dmlp, dlean, dlift, tokens, dim,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of dx and dmlp [tokens, dim], of drows [n, dim] and dgate [tokens] float32, for every so many-th token.

    Shapes as in `mix_kernel`, dy as x. A token whose source is negative neither reads nor stores a row, and its dgate
    is 0. Program p also stores row p of dlean [programs, dim] and dlift[p], float32: what its tokens add to the
    gradients of weight[0] and bias[0]. Sums are float32.
    """
    column = tl.arange(0, BLOCK)
    inside = column < dim
    lean, lift = difference(weight, bias, column, dim)
    acc = tl.zeros((BLOCK,), tl.float32)
    acc_lift = 0.0
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        place = tl.load(source + token)
        share = tl.load(gate + token)
        at = token * dim + column
        served = inside & (place >= 0)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(rows + place * dim + column, mask=served, other=0.0).to(tl.float32)
        chosen, fixed = sigmoids(tl.sum(a * lean, axis=0) + lift)
        with_expert = tl.sum(g * e, axis=0)
        pull = chosen * fixed * (share * with_expert - tl.sum(g * m, axis=0))
        acc += pull * a
        acc_lift += pull
        tl.store(dgate + token, chosen * with_expert)
        tl.store(dx + at, (pull * lean).to(dx.dtype.element_ty), mask=inside)
        tl.store(dmlp + at, (fixed * g).to(dmlp.dtype.element_ty), mask=inside)
        tl.store(drows + place * dim + column, (chosen * share * g).to(drows.dtype.element_ty), mask=served)
    program = tl.program_id(0).to(tl.int64)
    tl.store(dlean + program * dim + column, acc, mask=inside)
    tl.store(dlift + program, acc_lift)


def mix(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor,
    programs: int | None = None,
) -> Tensor:  # fmt: skip
    """y `[T, dim]` of the chapter's `mix`, in the dtype of x.

    x, mlp `[T, dim]`, weight `[2, dim]`, bias `[2]`, rows `[n, dim]`, all of one of DTYPES; source int64 `[T]`, -1 to
    n - 1, which is not checked; gate float32 `[T]`. `programs` share the tokens; None: as many as fit on the GPU.
    What is not finite spreads into its own token. ValueError for shapes, strides and devices, TypeError for dtypes.
    """
    meta = check(x, weight, bias, rows, source, gate, mlp)
    y = torch.empty_like(x)
    grid = (programs or staying(x, FORWARD_THREADS, meta["num_warps"]),)
    mix_kernel[grid](x, weight, bias, rows, source, gate, mlp, y, *x.shape, **meta)
    return y


def mix_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients in x, weight, bias, rows, gate and mlp, as the chapter's `mix_backward`, each in its dtype.

    dy as x; no row may be the source of two tokens, which is not checked. Everything else as `mix`, errors too.
    """
    meta = check(x, weight, bias, rows, source, gate, mlp, dy)
    count = programs or staying(x, BACKWARD_THREADS, meta["num_warps"])
    dx, drows, dgate, dmlp = torch.empty_like(x), torch.zeros_like(rows), torch.empty_like(gate), torch.empty_like(x)
    dlean = torch.empty(count, x.shape[1], dtype=torch.float32, device=x.device)
    dlift = torch.empty(count, dtype=torch.float32, device=x.device)
    given, made = (dy, x, weight, bias, rows, source, gate, mlp), (dx, drows, dgate, dmlp, dlean, dlift)
    mix_backward_kernel[(count,)](*given, *made, *x.shape, **meta)
    first, lift = dlean.sum(0), dlift.sum()
    dweight, dbias = torch.stack((first, -first)), torch.stack((lift, -lift))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), drows, dgate, dmlp


def check(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor,
    dy: Tensor | None = None,
) -> dict[str, int]:  # fmt: skip
    """How to launch, or the error that `mix` promises."""
    require(x.dim() == 2 and x.numel() > 0, f"x must be [T, dim], not empty, got {tuple(x.shape)}")
    tokens, dim = x.shape
    require(dim <= MOST_DIM, f"dim must be at most {MOST_DIM}, got {dim}")
    same = {"x": x, "weight": weight, "bias": bias, "rows": rows, "mlp": mlp} | ({} if dy is None else {"dy": dy})
    given = {**same, "source": source, "gate": gate}
    wanted = {"weight": (2, dim), "bias": (2,), "rows": (len(rows), dim), "mlp": (tokens, dim), "dy": (tokens, dim)}
    for name, shape in {**wanted, "source": (tokens,), "gate": (tokens,)}.items():
        if name in given:
            require(given[name].shape == shape, f"{name} must be {list(shape)}, got {tuple(given[name].shape)}")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), **same)
    require_dtype((torch.int64,), source=source)
    require_dtype((torch.float32,), gate=gate)
    require_contiguous(**given)
    require_launchable(**given)
    block = max(16, 1 << (dim - 1).bit_length())
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def staying(x: Tensor, threads: int, warps: int) -> int:
    """Programs that share the tokens of x: as many as stay on the GPU with so many threads a multiprocessor."""
    number = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    return min(len(x), number * min(16, threads // (32 * warps)))


def torch_mix(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor
) -> Tensor:  # fmt: skip
    """`mix` in plain torch operators."""
    c = torch.nn.functional.linear(x, weight, bias).float().softmax(1).to(x.dtype)
    kept = (gate * (source >= 0))[:, None].to(x.dtype)
    return rows[source.clamp(min=0)] * kept * c[:, :1] + mlp * c[:, 1:]


def torch_mix_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """`mix_backward` in plain torch operators, in float32."""
    g, a, m, w = dy.float(), x.float(), mlp.float(), weight.float()
    c, kept = torch.nn.functional.linear(a, w, bias.float()).softmax(1), source >= 0
    e = rows.float()[source.clamp(min=0)] * kept[:, None]
    with_expert = (g * e).sum(1)
    pull = c[:, 0] * c[:, 1] * (gate * with_expert - (g * m).sum(1))
    logits = torch.stack((pull, -pull), 1)
    drows = rows.new_zeros(len(rows) + 1, rows.shape[1])  # the last is for dropped tokens: which, the CPU need not know
    drows[source] = (c[:, :1] * gate[:, None] * g).to(rows.dtype)
    found = (logits @ w, logits.T @ a, logits.sum(0))
    dx, dweight, dbias = (part.to(x.dtype) for part in found)
    return dx, dweight, dbias, drows[:-1], c[:, 0] * with_expert, (c[:, 1:] * g).to(x.dtype)


def arguments(backward: bool, tokens: int, kept: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of either, with contents on a GPU only: rows in any order, tokens - kept of them dropped."""
    shapes = [(tokens, dim)] * backward + [(tokens, dim), (2, dim), (2,), (kept, dim), (tokens, dim)]
    *made, mlp = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    source = torch.zeros(tokens, dtype=torch.int64, device=device)
    gate = torch.ones(tokens, device=device)
    if device.type == "cuda":
        for part in (*made, mlp):
            part.normal_(0, dim**-0.5 if part.shape == (2, dim) else 1)
        source = torch.randperm(tokens, device=device)
        source = torch.where(source < kept, source, -1)
        gate.uniform_()
    return *made, source, gate, mlp


RUNS: dict[str, tuple[Callable, Callable, int, int, int]] = {  # rows of T, rows of n, other bytes of a token
    "forward": (mix, torch_mix, 3, 1, 12),
    "backward": (mix_backward, torch_mix_backward, 5, 2, 16),
}


def case(what: str, name: str, tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A layer of this width, where one token in ten is dropped; `what` is one of RUNS."""
    run, expected, full, part, more = RUNS[what]
    kept = tokens - tokens // 10
    return Case(
        name=f"{what}, {name}: T={tokens} D={dim}, {str(dtype).removeprefix('torch.')}",
        inputs=lambda device: arguments(what == "backward", tokens, kept, dim, dtype, device),
        run=run,
        expected=expected,
        bytes=dtype.itemsize * dim * (full * tokens + part * kept + 2) + more * tokens,
        operations=(8 if what == "forward" else 14) * tokens * dim,
        kind="stream",
        peers={"torch": expected},
    )


CASES = [
    case("forward", "Llama-7B", 4096, 4096),
    case("forward", "Llama-13B", 4096, 5120),
    case("forward", "Llama-7B, decode", 64, 4096),
    case("forward", "Llama-70B", 2048, 8192, torch.float32),
    case("backward", "Llama-7B", 4096, 4096),
    case("backward", "Llama-70B", 2048, 8192, torch.float32),
]
