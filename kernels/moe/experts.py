"""A grouped matmul in Triton: one launch multiplies each expert's run of rows by that expert's matrix.

Fused: the permutation. A row of x is loaded from where it stands, through `source`, and a row of y stored where it
belongs, through `target`, times `scale`: neither a sorted copy of x nor an unsorted one of y is ever written. Offsets
are read on the device, so that the CPU waits for nothing and shapes are the same whatever the routing.

The tiles of y are numbered expert by expert: each has as many as its rows need, none if it has no rows. `locate` finds
the expert of a number in one step, from the running sum of these counts, however many experts there are.
    prefill     as many programs as the GPU has multiprocessors stay and take every so many-th tile. Neighbouring
                numbers, which are at work at the same time, lie in bands: GROUP row tiles high, all columns wide. So
                132 tiles of 128 x 128 read 8 row tiles of x and 17 of a matrix; a row of tiles would read 1 and 132.
    decode      a program for every tile that there could be, tiles of 16 rows, loads 256 bytes deep of a row; those
                beyond the last tile end at once. Memory bounds it, and more programs wait for memory at the same time.

With R rows (choices) of T tokens, A experts that have rows, weight [E, N, K], 2 bytes a number:
    floor        2 T K + 2 A N K + 2 R N bytes (2 R K where each row is its own), offsets and indices left out
    operations   2 R N K
    moved        weights once for each band, GROUP · 128 rows, and in a decode step once; x, whose band stays in L2
                 while its columns are computed, once; the other readings of the same tiles come from L2
Replaces x[source], a matmul for each expert, and y[target] = ..: 4 R (K + N) bytes more, a launch for each expert and,
to know its sizes, a wait for the GPU. Padding runs to one length instead multiplies as often as the longest has it.

Layout: x [n, K], weight [E, N, K], both row-major, K a multiple of 16 for 128-bit loads; sums in float32.
Method: Gale et al. 2022, arXiv:2211.15841, section 5; the order of tiles is that of Triton's own tutorial.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_EXPERTS = 511
WAVE = 132  # programs that stay, where there is no GPU to count its multiprocessors


@triton.jit
def locate(begin, end, tile, columns, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Where tile number `tile` lies: (group, first row, end of the group's rows, column tile), int32 scalars.

    begin, end int32 [WIDTH]: rows of each group, possibly none. Of a group with n rows there are ceil(n / BLOCK_M)
    row tiles times `columns` column tiles, and none with n = 0; numbers run group by group, from 0. Within a group they
    run through bands of GROUP row tiles, the last of which may be lower; in a band down its rows, then to the
    next column. The first row is counted like begin, not from the group's start; `tile` is below the number of all.
    """
    tiles = tl.cdiv(end - begin, BLOCK_M) * columns
    after = tl.cumsum(tiles, axis=0)  # number of the first tile beyond each group
    group = tl.sum((after <= tile).to(tl.int32), axis=0)
    mine = tl.arange(0, WIDTH) == group
    first = tl.sum(tl.where(mine, begin, 0), axis=0)
    stop = tl.sum(tl.where(mine, end, 0), axis=0)
    within = tile - tl.sum(tl.where(mine, after - tiles, 0), axis=0)
    band = within // (GROUP * columns)
    place = within % (GROUP * columns)
    height = tl.minimum(GROUP, tl.cdiv(stop - first, BLOCK_M) - band * GROUP)
    return group, first + (band * GROUP + place % height) * BLOCK_M, stop, place // height


@triton.jit
def multiply(
    x, matrix, line, live, column, inside, depth, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The tile [BLOCK_M, BLOCK_N] of x matrixᵀ, float32: rows `line` int64 of x, where live; rows `column` of matrix.

    x and matrix have K columns, of which the first `depth` are multiplied: all, or none, and then the tile is 0.
    """
    k = tl.arange(0, BLOCK_K)
    x_at = x + line[:, None] * K + k[None, :]
    matrix_at = matrix + column.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        rest = (k < K - start)[None, :]
        left = tl.load(x_at + start, mask=live[:, None] & rest, other=0.0)
        right = tl.load(matrix_at + start, mask=inside[:, None] & rest, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_kernel(
    x, weight, offsets, source, target, scale, y, R, N, K, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y [R, N]: each program takes every num_programs(0)-th tile, from its own number on.

    source, target [R] and scale [R] may be None. After the last expert comes a group of the rows that nobody has: their
    tiles are stored, too, as 0, and read neither x nor weight.
    """
    group = tl.arange(0, WIDTH)
    begin = tl.load(offsets + group, mask=group <= EXPERTS, other=R).to(tl.int32)
    end = tl.load(offsets + group + 1, mask=group < EXPERTS, other=R).to(tl.int32)
    columns = tl.cdiv(N, BLOCK_N)
    total = tl.sum(tl.cdiv(end - begin, BLOCK_M), axis=0) * columns
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, stop, across = locate(begin, end, tile, columns, BLOCK_M, GROUP, WIDTH)
        row = first + tl.arange(0, BLOCK_M)
        column = across * BLOCK_N + tl.arange(0, BLOCK_N)
        live, inside, owned = row < stop, column < N, expert < EXPERTS
        line = row if source is None else tl.load(source + row, mask=live & owned, other=0)
        depth = tl.where(owned, K, 0)
        matrix = weight + expert.to(tl.int64) * N * K
        acc = multiply(x, matrix, line.to(tl.int64), live, column, inside, depth, K, BLOCK_M, BLOCK_N, BLOCK_K)
        to = (row if target is None else tl.load(target + row, mask=live, other=0)).to(tl.int64)
        if scale is not None:
            acc *= tl.load(scale + to, mask=live & owned, other=0.0).to(tl.float32)[:, None]
        mask = live[:, None] & inside[None, :]
        tl.store(y + to[:, None] * N + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


def grouped_matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None = None, target: Tensor | None = None,
    scale: Tensor | None = None, **blocks: int,
) -> Tensor:  # fmt: skip
    """y [R, N] of the chapter's `grouped_matmul`, in x's dtype.

    x        [n, K] float32 (IEEE products, slow: for tests), float16 or bfloat16; weight [E, N, K] alike, E <= 511
    offsets  int64 or int32 [E + 1]; source and target, if any, int64 or int32 [R]; without a source R is n
    scale    [R] of any of these dtypes
    blocks   parts of `configuration` to replace, powers of two; `programs`: how many to launch

    All contiguous. What offsets, source and target hold is not checked, which would make the CPU wait: they must be as
    the chapter says. Raises ValueError for shapes and K, N or E that are 0, TypeError for dtypes.
    """
    rows = check_operands(x, weight, offsets, source, target, scale)
    experts, outputs, inputs = weight.shape
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    chosen = configuration(rows, experts, outputs, inputs, x.dtype) | blocks
    tiles = (min(experts + 1, rows) + rows // chosen["BLOCK_M"]) * triton.cdiv(outputs, chosen["BLOCK_N"])
    staying = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else WAVE
    programs = chosen.pop("programs", staying if chosen["BLOCK_M"] > 16 else tiles)
    grouped_kernel[(min(programs, tiles),)](
        x, weight, offsets, source, target, scale, y, rows, outputs, inputs,
        EXPERTS=experts, WIDTH=triton.next_power_of_2(experts + 1), **chosen,
    )  # fmt: skip
    return y


def configuration(rows: int, experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch constants by the rows that an expert has on average: 16 to 128 rows a tile, and what fits beside them."""
    if dtype is torch.float32:  # no tensor cores: tiles that fit the registers
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    if rows <= 16 * experts:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    if rows <= 64 * experts:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    # maxnreg: sm_80's assembler takes all registers that there are, where it needs two thirds
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4, "maxnreg": 224}


def check_operands(
    x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None, target: Tensor | None, scale: Tensor | None
) -> int:
    """R, or the error that `grouped_matmul` promises."""
    fits = x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[2]
    require(fits, f"x must be [n, K] and weight [E, N, K], got {tuple(x.shape)} and {tuple(weight.shape)}")
    require(weight.numel() > 0, f"weight must not be empty, got {tuple(weight.shape)}")
    experts = len(weight)
    require(experts <= MOST_EXPERTS, f"weight must be of {MOST_EXPERTS} experts at most, got {experts}")
    require(offsets.shape == (experts + 1,), f"offsets must be [{experts + 1}], got {tuple(offsets.shape)}")
    rows, given = len(x) if source is None else source.numel(), {"x": x, "weight": weight, "offsets": offsets}
    require(rows < 2**31, f"there must be fewer than 2^31 rows, got {rows}")
    more = {"source": source, "target": target, "scale": scale}
    for name, vector in more.items():
        if vector is not None:
            require(vector.shape == (rows,), f"{name} must be [{rows}], got {tuple(vector.shape)}")
            require_dtype(DTYPES if name == "scale" else (torch.int64, torch.int32), **{name: vector})
            given[name] = vector
    require(len(x) > 0 or rows == 0, f"source has {rows} rows, but x has none")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), weight=weight)
    require_dtype((torch.int64, torch.int32), offsets=offsets)
    require_contiguous(**given)
    require_launchable(**given)
    return rows


def placed(done: Tensor, target: Tensor | None, scale: Tensor | None) -> Tensor:
    """y from its rows in sorted order, by plain torch operators."""
    if target is None:
        return done
    done = done if scale is None else done * scale[target, None]
    return torch.empty_like(done).index_copy_(0, target, done)


def loop(
    x: Tensor, weight: Tensor, bounds: list[int], source: Tensor | None = None, target: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`grouped_matmul` without dropped rows: cuBLAS, expert by expert; bounds: the offsets, known to the CPU."""
    x = x if source is None else x[source]
    done = x.new_empty(len(x), weight.shape[1])
    for e, matrix in enumerate(weight):
        torch.mm(x[bounds[e] : bounds[e + 1]], matrix.T, out=done[bounds[e] : bounds[e + 1]])
    return placed(done, target, scale)


def torch_grouped(
    x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None = None, target: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`grouped_matmul` without dropped rows by torch's own grouped product, which wants sorted rows."""
    done = torch._grouped_mm(x if source is None else x[source], weight.transpose(1, 2), offs=offsets[1:].int())
    return placed(done, target, scale)


def with_bounds(x: Tensor, weight: Tensor, offsets: Tensor, *rest: Tensor | None) -> tuple:
    """The arguments of `loop`."""
    return x, weight, offsets.tolist(), *rest


def by_torch(*arguments: Tensor | None) -> Tensor:
    """What `bench` compares with."""
    return loop(*with_bounds(*arguments))


def arguments(tokens: int, experts: int, k: int, outputs: int, inputs: int, down: bool, device: torch.device) -> tuple:
    """Those of a layer's first product or, `down`, its second; choice j of token t is expert (t k + j) % experts."""
    rows = tokens * k
    choice = torch.arange(rows, device=device)
    order = (choice % experts).argsort(stable=True)
    bounds = torch.arange(experts + 1, device=device)
    offsets = bounds * (rows // experts) + bounds.clamp(max=rows % experts)
    x = torch.randn(rows if down else tokens, inputs, dtype=torch.bfloat16, device=device)
    weight = torch.empty(experts, outputs, inputs, dtype=torch.bfloat16, device=device).normal_(std=inputs**-0.5)
    return (x, weight, offsets, None, order, torch.rand(rows, device=device).to(x.dtype)) if down else (
        x, weight, offsets, order // k)  # fmt: skip


def case(name: str, tokens: int, experts: int, k: int, outputs: int, inputs: int, down: bool = False) -> Case:
    """A product of a layer of experts in bfloat16; `down`: the second, whose rows go back to their places, weighed."""
    rows, indices = tokens * k, 10 if down else 8
    read = min(experts, rows) * outputs * inputs + (rows if down else tokens) * inputs
    return Case(
        name=f"{name}: T={tokens} E={experts} k={k}, {inputs} to {outputs}",
        inputs=partial(arguments, tokens, experts, k, outputs, inputs, down),
        run=grouped_matmul,
        expected=by_torch,
        bytes=2 * read + 2 * rows * outputs + indices * rows + 8 * (experts + 1),
        operations=2 * rows * outputs * inputs,
        kind="matrix" if rows > 16 * experts else "stream",
        peers={"torch._grouped_mm": torch_grouped, "loop of cuBLAS": loop},
        prepare={"loop of cuBLAS": with_bounds},
    )


CASES = [
    case("Mixtral up", 4096, 8, 2, 28672, 4096),
    case("Mixtral down", 4096, 8, 2, 4096, 14336, down=True),
    case("DeepSeek up", 4096, 64, 6, 2816, 2048),
    case("Mixtral up", 4, 8, 2, 28672, 4096),
    case("Mixtral down", 4, 8, 2, 4096, 14336, down=True),
    case("DeepSeek up", 16, 64, 6, 2816, 2048),
]
