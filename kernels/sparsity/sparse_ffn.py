"""A sparse feed-forward layer's decode step in Triton: the controller chooses on chip, and only chosen rows are loaded.

Three launches. `low_rank_kernel` makes the r numbers of each token. `hidden_kernel` makes the logits of a few blocks
from them, takes each block's argmax, and multiplies the rows of `up` that it names: logits never go to memory. Then
`combine_kernel` adds the rows of `down`. Fewer launches would need sums over all programs: of r numbers before the
choice, of C after it.

With M tokens, C = dim, F neurons in blocks of n, rank r, s bytes a number:
    controller   s (r C + F r + F) bytes, the same for any M
    rows         s C (U + D): U rows of up, D of down; 2 F / n for one token; for M tokens with even choices
                 U = F (1 - (1 - 1 / n)^M). Where ReLU makes 0, a row of down adds nothing and is not read: with half of
                 the neurons at 0, D = F (1 - (1 - 1 / (2 n))^M)
    tokens       2 s M C, and 8 M F / n of choices; hidden and low, 4 M (F / n + r) bytes, stay in L2
    operations   2 M (r C + F r + 2 C F / n): about one a byte at 16 bits, so memory bounds it
Replaces the dense layer, 2 s C F bytes, and the copies up[rows], down[rows], which write 2 s M C F / n bytes more and
read them again.
A neuron is a contiguous row of both matrices, s C bytes: loads are as wide as those of a dense product. A column of a
matrix stored as [C, F] would cost a sector of 32 bytes for each 2 that are used.

Tokens choose each for themselves, so a program serves one token; rows that several chose come from L2 after the first.
From about n tokens on nearly all rows are read, and the dense product with a mask is the better way.

Layout: x [M, C], first [r, C], second [F, r], bias [blocks, n], up and down [F, C], all row-major and of one dtype;
sums in float32. C and r multiples of 16 give 128-bit loads; others work.
Method: Jaszczur et al. 2021, arXiv:2111.12763, section 3.1.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECOND_TILE = 8192  # numbers of `second` that a program holds in registers, 64 a thread


@triton.jit
def low_rank_kernel(x, first, low, R, C, BLOCK_C: tl.constexpr):
    """low [M, R] float32 = x firstᵀ; a program makes one number."""
    rank, token = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = column < C - start
        left = tl.load(x + token * C + start + column, mask=inside, other=0.0).to(tl.float32)
        acc += left * tl.load(first + rank * C + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(low + token * R + rank, tl.sum(acc, axis=0))


@triton.jit
def choose(low, second, bias, block, live, N, R, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """The place, int32 [B] in range(N), of the largest logit of each of the blocks `block` int64 [B], where live.

    logits[j] = second[block · N + j] · low + bias[block, j] for j < N, in float32; of equals the lowest place is taken.
    low [R] float32, second [blocks · N, R], bias [blocks, N]. WIDTH >= N and RANK >= R are powers of two, and nothing
    beyond N places and R columns is loaded, nor anything of a block that is not live, whose result does not matter. A
    logit may be negative, or -inf; NaN gives some place below N.
    """
    place, rank = tl.arange(0, WIDTH), tl.arange(0, RANK)
    unit = block[:, None] * N + place[None, :]  # [B, WIDTH]
    there = live[:, None] & (place < N)[None, :]
    inside = there[:, :, None] & (rank < R)[None, None, :]
    tile = tl.load(second + unit[:, :, None] * R + rank[None, None, :], mask=inside, other=0.0).to(tl.float32)
    vector = tl.load(low + rank, mask=rank < R, other=0.0)
    logits = tl.sum(tile * vector[None, None, :], axis=2)
    logits += tl.load(bias + unit, mask=there, other=0.0).to(tl.float32)
    best = tl.argmax(tl.where((place < N)[None, :], logits, float("-inf")), axis=1)
    return tl.minimum(best, N - 1).to(tl.int32)


@triton.jit
def hidden_kernel(
    x, low, second, bias, up, hidden, chosen, blocks, N, R, C, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """hidden [M, blocks] float32 and chosen [M, blocks] int64: a program makes BLOCKS of them for one token."""
    token = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    place = choose(low + token * R, second, bias, block, live, N, R, WIDTH, RANK)
    row = (block * N + place) * C
    column = tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCKS, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = column < C - start
        left = tl.load(x + token * C + start + column, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(up + row[:, None] + (start + column)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        acc += tile.to(tl.float32) * left[None, :]
    done = tl.sum(acc, axis=1)
    at = token * blocks + block
    tl.store(hidden + at, tl.where(done < 0, 0.0, done), mask=live)  # ReLU; NaN stays, where a maximum would drop it
    tl.store(chosen + at, place.to(tl.int64), mask=live)


@triton.jit
def combine_kernel(hidden, chosen, down, y, blocks, N, C, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """y [M, C]: row t is the sum over b of hidden[t, b] · down[b · N + chosen[t, b]], in float32, rounded once.

    hidden float32 and chosen int64, both [M, blocks]; down [blocks · N, C]; y in its own dtype. Program (i, t) makes
    the columns from i · BLOCK_C on of row t, and takes BLOCKS blocks at a time. A row whose hidden is 0 is not read: it
    may hold NaN. Neither blocks nor C need fill a tile. Offsets into down may pass 2^31.
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCKS, BLOCK_C), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        live = block < blocks
        share = tl.load(hidden + token * blocks + block, mask=live, other=0.0)
        row = (block * N + tl.load(chosen + token * blocks + block, mask=live, other=0)) * C
        read = (share != 0)[:, None] & (column < C)[None, :]
        acc += share[:, None] * tl.load(down + row[:, None] + column[None, :], mask=read, other=0.0).to(tl.float32)
    tl.store(y + token * C + column, tl.sum(acc, axis=0).to(y.dtype.element_ty), mask=column < C)


def decode_step(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """The chapter's `decode_step`: y [M, C] in x's dtype, and chosen int64 [M, blocks].

    x [M, C], first [r, C], second [F, r], bias [blocks, n], up and down [F, C] with F = blocks · n: contiguous, all
    float32, float16 or bfloat16. Made for fewer than n tokens. Of two logits that differ by less than float32 tells,
    either may win. Raises ValueError for shapes and for n · r too large for a program, TypeError for dtypes.
    """
    check_layer(x, first, second, bias, up, down)
    (tokens, columns), (blocks, n), rank = x.shape, bias.shape, len(first)
    low = torch.empty(tokens, rank, dtype=torch.float32, device=x.device)
    hidden = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    chosen = torch.empty(tokens, blocks, dtype=torch.int64, device=x.device)
    if tokens:
        wide, deep = triton.next_power_of_2(n), triton.next_power_of_2(rank)
        block_c = min(4096, triton.next_power_of_2(columns))  # a row at once, if it can be: no load waits for a sum
        low_rank_kernel[(rank, tokens)](x, first, low, rank, columns, BLOCK_C=block_c, num_warps=4)
        some = max(1, min(4, SECOND_TILE // (wide * deep)))
        hidden_kernel[(triton.cdiv(blocks, some), tokens)](
            x, low, second, bias, up, hidden, chosen, blocks, n, rank, columns, BLOCKS=some, WIDTH=wide, RANK=deep,
            BLOCK_C=block_c, num_warps=4 if wide * deep <= SECOND_TILE else 8,
        )  # fmt: skip
    return combine(hidden, chosen, down), chosen


def combine(
    hidden: Tensor, chosen: Tensor, down: Tensor, rows: int | None = None, columns: int | None = None
) -> Tensor:
    """The chapter's `combine`: y [M, C] in down's dtype.

    hidden float32 and chosen int64 [M, blocks], down [blocks · n, C] of any of the three dtypes, all contiguous; what
    chosen holds is not checked, which would make the CPU wait. A program takes `rows` rows of down at a time, and
    `columns` of them: fewer for one token, so that it has programs enough. Raises ValueError for shapes, TypeError for
    dtypes.
    """
    fits = hidden.dim() == 2 and hidden.shape == chosen.shape and down.dim() == 2 and down.numel() > 0
    shapes = f"got {tuple(hidden.shape)}, {tuple(chosen.shape)} and {tuple(down.shape)}"
    fits = fits and hidden.shape[1] > 0 and len(down) % hidden.shape[1] == 0
    require(fits, f"hidden and chosen must be [M, blocks], down [F, C] with blocks that divide F, {shapes}")
    require_dtype((torch.float32,), hidden=hidden)
    require_dtype((torch.int64,), chosen=chosen)
    require_dtype(DTYPES, down=down)
    require_contiguous(hidden=hidden, chosen=chosen, down=down)
    require_launchable(hidden=hidden, chosen=chosen, down=down)
    tokens, blocks = hidden.shape
    y = torch.empty(tokens, down.shape[1], dtype=down.dtype, device=down.device)
    if tokens:
        columns = columns or (32 if y.numel() <= 8192 else 64)
        grid = (triton.cdiv(down.shape[1], columns), tokens)
        combine_kernel[grid](
            hidden, chosen, down, y, blocks, len(down) // blocks, down.shape[1],
            BLOCKS=rows or 8192 // columns, BLOCK_C=columns, num_warps=8,
        )  # fmt: skip
    return y


def check_layer(x: Tensor, first: Tensor, second: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> None:
    """Refuse operands of `decode_step` that do not fit together."""
    given = {"x": x, "first": first, "second": second, "bias": bias, "up": up, "down": down}
    shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in given.items())
    require(all(part.dim() == 2 for part in given.values()), f"all must be matrices, got {shapes}")
    units, rank, columns = bias.numel(), len(first), x.shape[1]
    fits = first.shape[1] == columns and second.shape == (units, rank) and up.shape == down.shape == (units, columns)
    wanted = "x [M, C], first [r, C], second [F, r], bias [blocks, n], up and down [F, C]"
    require(fits and min(units, rank, columns) > 0, f"need {wanted}, none of C, r and F being 0, got {shapes}")
    require(len(x) < 2**16, f"x must have fewer than 65,536 tokens, got {len(x)}")
    tile = triton.next_power_of_2(bias.shape[1]) * triton.next_power_of_2(rank)
    require(tile <= 2 * SECOND_TILE, f"n · r must be at most {2 * SECOND_TILE}, got n={bias.shape[1]} and r={rank}")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), **given)
    require_contiguous(**given)
    require_launchable(**given)


def torch_choice(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """The controller by torch operators in float32."""
    logits = F.linear(F.linear(x.float(), first.float()), second.float())
    return (logits.unflatten(1, bias.shape) + bias.float()).argmax(-1)


def float_controller(x: Tensor, first: Tensor, second: Tensor, bias: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """The arguments with the controller's weights in float32 once and for all, which torch's product wants."""
    return x, first.float(), second.float(), bias.float(), *rows


def gathered(x: Tensor, first: Tensor, second: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`decode_step` by torch operators that copy the chosen rows."""
    chosen = torch_choice(x, first, second, bias)
    row = chosen + torch.arange(0, bias.numel(), bias.shape[1], device=x.device)
    hidden = F.relu(up[row] @ x[..., None])
    return (hidden.mT @ down[row]).squeeze(1), chosen


def masked(x: Tensor, first: Tensor, second: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`decode_step` by torch operators that compute all neurons: what a dense ReLU layer reads, and the controller."""
    chosen = torch_choice(x, first, second, bias)
    mask = F.one_hot(chosen, bias.shape[1]).flatten(1).to(x.dtype)
    return (F.relu(F.linear(x, up)) * mask) @ down, chosen


def arguments(tokens: int, dim: int, hidden: int, n: int, rank: int, device: torch.device) -> tuple:
    """A layer in bfloat16 whose logits are whole numbers plus another fraction for each place: no ties, no rounding."""

    def signs(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, device=device).to(torch.bfloat16)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(std=dim**-0.5)

    bias = (torch.arange(n, device=device) / n).expand(hidden // n, n).to(torch.bfloat16).contiguous()
    return signs(tokens, dim), signs(rank, dim), signs(hidden, rank), bias, normal(hidden, dim), normal(hidden, dim)


def case(name: str, tokens: int, dim: int, hidden: int, n: int, rank: int) -> Case:
    """A decode step in bfloat16; choices even and independent, half of the neurons 0: rows as counted above."""
    rows = hidden * (2 - (1 - 1 / n) ** tokens - (1 - 1 / (2 * n)) ** tokens)
    controller = rank * dim + hidden * rank + hidden
    return Case(
        name=f"{name}: M={tokens} C={dim} F={hidden} n={n} r={rank}",
        inputs=lambda device: arguments(tokens, dim, hidden, n, rank, device),
        run=decode_step,
        expected=gathered,
        bytes=2 * (controller + round(rows * dim) + 2 * tokens * dim) + 8 * tokens * hidden // n,
        operations=2 * tokens * (rank * dim + hidden * rank + 2 * dim * hidden // n),
        kind="stream",
        peers={"torch, all neurons": masked, "torch, gathered": gathered},
        prepare={"torch, all neurons": float_controller, "torch, gathered": float_controller},
    )


CASES = [
    case("7B", 1, 4096, 16384, 64, 64),
    case("7B", 16, 4096, 16384, 64, 64),
    case("7B, blocks of 16", 1, 4096, 14336, 16, 256),
    case("7B, blocks of 16", 8, 4096, 14336, 16, 256),
    case("blocks of 256", 1, 9216, 65536, 256, 64),
]
