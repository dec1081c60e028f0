"""Wanda pruning in Triton: score, selection and masked write in one pass, and no score ever leaves the chip.

score = |W| · norms in float32. Its bits, read as an integer, order as it does, so they are the key that is selected by.
W [N, K] of b bytes a number, norms [K] float32:

    floor        2 N K b + 4 K bytes: W read once, written once, the norms read once
    naive        torch.topk or argsort, then scatter: scores written and read (8 N K), a sort that moves each with its
                 place several times, places of 8 bytes written and read (16 N · kept), and only then the weights
Every row needs all norms, and at 4 bytes each they are twice a 16-bit row. They come from the caches, but they come.

`prune_groups`, n of every m: the m keys of a group come apart into m registers, and a key stays if fewer than n others
beat it: m (m − 1) comparisons a group, no sort, nothing between threads. A program keeps the norms of its columns and
takes STEPS tiles of rows one after another, so 1/STEPS of their traffic is left. Memory bounds this kernel.

`prune_rows`: a row fits the registers of one program. The threshold is found bit by bit, from the highest: set the bit
if `kept` keys still reach it. Which of equals stay is told by one running count at the end. That is 31 comparisons and
additions for each number, all on chip, where magnitudes of 16 bits take 15: a product has all the bits of a float32.
They, not memory, bound this kernel on large GPUs (counted, not timed). Norms kept over several rows would be no gain
beside them, and need registers that a long row does not leave: the compiler spilled.

Method: as chapters/pruning/wanda.py; selection by kernels/pruning/magnitude.py, members by kernels/sparsity/n_m.py.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.pruning.magnitude import COLUMNS, stays, threshold
from kernels.sparsity.n_m import members

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (2, 4, 8)


@triton.jit
def score_keys(w, norm, live):
    """Integers that order as |w| · norm in float32, w [R, C], norm float32 [C]; -1 where not `live` [R, C].

    A NaN is above infinity: it is kept, and stays visible.
    """
    score = tl.abs(w.to(tl.float32)) * norm[None, :]
    key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(live, key, -1)


@triton.jit
def beaten(keys, place: tl.constexpr, M: tl.constexpr):
    """By how many of a group's M keys, tiles of int32, the one at `place` is beaten: larger ones, and equal earlier."""
    count = tl.zeros(keys[0].shape, tl.int32)
    for other in tl.static_range(M):
        if other < place:
            count += (keys[other] >= keys[place]).to(tl.int32)
        elif other > place:
            count += (keys[other] > keys[place]).to(tl.int32)
    return count


@triton.jit
def join_four(first, second, third, fourth):
    """Inverse of `members`: four tiles [...] -> [..., 2, 2]."""
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def group_stays(key, n, M: tl.constexpr):
    """Which keys stay: the n largest of every M neighbours in a row, of equal ones the first. int32 [R, C] -> int1.

    M is 2, 4 or 8, n from 1 to M; R and C are powers of two, C at least M. Groups do not cross rows.
    """
    R: tl.constexpr = key.shape[0]
    C: tl.constexpr = key.shape[1]
    if M == 2:
        a, b = tl.split(tl.reshape(key, (R, C // 2, 2)))
        keep = tl.join(beaten((a, b), 0, 2), beaten((a, b), 1, 2)) < n
    elif M == 4:
        four = members(tl.reshape(key, (R, C // 4, 2, 2)))
        keep = join_four(beaten(four, 0, 4), beaten(four, 1, 4), beaten(four, 2, 4), beaten(four, 3, 4)) < n
    else:
        even, odd = tl.split(tl.reshape(key, (R, C // 8, 2, 2, 2)))
        a, c, e, g = members(even)
        b, d, f, h = members(odd)
        keys = (a, b, c, d, e, f, g, h)
        even = join_four(beaten(keys, 0, 8), beaten(keys, 2, 8), beaten(keys, 4, 8), beaten(keys, 6, 8))
        odd = join_four(beaten(keys, 1, 8), beaten(keys, 3, 8), beaten(keys, 5, 8), beaten(keys, 7, 8))
        keep = tl.join(even, odd) < n
    return tl.reshape(keep, (R, C))


@triton.jit
def rows_kernel(weight, norms, out, N, K, kept, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS rows of weight [N, K]; each keeps its `kept` highest scores, of equal ones the first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    live = (row < N)[:, None] & (column < K)[None, :]
    offsets = row[:, None] * K + column[None, :]
    w = tl.load(weight + offsets, mask=live, other=0.0)
    norm = tl.load(norms + column, mask=column < K, other=0.0)
    key = score_keys(w, norm, live)
    found = threshold(key, kept, 31)
    above = tl.sum((key > found[:, None]).to(tl.int32), axis=1)
    tl.store(out + offsets, tl.where(stays(key, found, kept - above), w, 0.0), mask=live)


@triton.jit
def groups_kernel(
    weight, norms, out, N, K, n,
    M: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """STEPS times ROWS rows and BLOCK_K columns of weight [N, K]; of every M neighbours the n highest scores stay."""
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    norm = tl.load(norms + column, mask=column < K, other=0.0)
    first = tl.program_id(1).to(tl.int64) * (ROWS * STEPS)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        live = (row < N)[:, None] & (column < K)[None, :]
        offsets = row[:, None] * K + column[None, :]
        w = tl.load(weight + offsets, mask=live, other=0.0)
        keep = group_stays(score_keys(w, norm, live), n, M)
        tl.store(out + offsets, tl.where(keep, w, 0.0), mask=live)


def prune_rows(weight: Tensor, norms: Tensor, kept: int, rows: int | None = None) -> Tensor:
    """The `kept` highest scores of each row of weight [N, K]; the rest becomes +0. Of equal ones the first stay.

    weight float16, bfloat16 or float32, norms float32 [K], not negative, both contiguous, K up to 16384. A NaN counts
    as larger than infinity, so it stays visible; products beyond float32 are infinite, and equal. `rows` rows make
    one program's tile. Raises ValueError for the shapes and unless 0 <= kept <= K, TypeError for the dtypes.
    """
    check_operands(weight, norms)
    count, columns = weight.shape
    require(columns <= COLUMNS, f"rows must have at most {COLUMNS} numbers, got {columns}")
    require(0 <= kept <= columns, f"kept must be from 0 to {columns}, got {kept}")
    out = torch.empty_like(weight)
    if out.numel():
        block = triton.next_power_of_2(columns)
        tile = {"ROWS": rows or max(1, 2048 // block), "BLOCK_K": block}
        warps = min(16, max(4, tile["ROWS"] * block // 512))
        grid = (triton.cdiv(count, tile["ROWS"]),)
        rows_kernel[grid](weight, norms, out, count, columns, kept, **tile, num_warps=warps)
    return out


def prune_groups(
    weight: Tensor, norms: Tensor, n: int = 2, m: int = 4, rows: int = 8, columns: int = 256, steps: int = 4
) -> Tensor:
    """The n highest scores of every m neighbours in a row of weight [N, K]; the rest becomes +0. Of equal the first.

    Operands as in `prune_rows`, any K that m divides; m is 2, 4 or 8. `rows` by `columns` numbers make a tile, powers
    of two, columns at least m; `steps` tiles one program. Raises ValueError for the shapes, another m, and unless
    1 <= n <= m; TypeError for the dtypes.
    """
    check_operands(weight, norms)
    count, width = weight.shape
    require(m in GROUPS, f"m must be one of {GROUPS}, got {m}")
    require(1 <= n <= m, f"need 1 <= n <= m, got n={n}, m={m}")
    require(width % m == 0, f"weight has {width} columns, not divisible by m={m}")
    out = torch.empty_like(weight)
    if out.numel():
        tile = {"M": m, "ROWS": rows, "STEPS": steps, "BLOCK_K": columns}
        grid = (triton.cdiv(width, columns), triton.cdiv(count, rows * steps))
        groups_kernel[grid](weight, norms, out, count, width, n, **tile, num_warps=4)
    return out


def check_operands(weight: Tensor, norms: Tensor) -> None:
    """Refuse operands that do not fit together, naming the one at fault."""
    require(weight.dim() == 2, f"weight must be [N, K], got shape {tuple(weight.shape)}")
    fits = norms.shape == weight.shape[1:]
    require(fits, f"norms must be [K] = [{weight.shape[1]}], got shape {tuple(norms.shape)}")
    require_dtype(DTYPES, weight=weight)
    require_dtype((torch.float32,), norms=norms)
    require_contiguous(weight=weight, norms=norms)
    require_launchable(weight=weight, norms=norms)


def torch_rows(weight: Tensor, norms: Tensor, kept: int) -> Tensor:
    """`prune_rows` by torch's stable sort, in which the first of equals come first."""
    order = (weight.abs().float() * norms).sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(weight).scatter_(-1, order, weight.gather(-1, order))


def torch_groups(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    """`prune_groups` by the same sort, of every group."""
    return torch_rows(weight.unflatten(1, (-1, m)), norms.unflatten(0, (-1, m)), n).flatten(1)


def by_topk(weight: Tensor, norms: Tensor, kept: int) -> Tensor:
    """`prune_rows` by torch.topk, which keeps any of equals."""
    order = (weight.abs().float() * norms).topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(weight).scatter_(-1, order, weight.gather(-1, order))


def groups_by_topk(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    """`prune_groups` by torch.topk."""
    return by_topk(weight.unflatten(1, (-1, m)), norms.unflatten(0, (-1, m)), n).flatten(1)


def operands(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A bfloat16 weight and float32 norms; `check` only compiles and needs no contents."""
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    norms = torch.empty(columns, dtype=torch.float32, device=device)
    return (weight.normal_(std=0.02), norms.exponential_()) if device.type == "cuda" else (weight, norms)


def case(rows: int, columns: int, m: int | None) -> Case:
    """Half of a Llama weight goes, of each row or of every m neighbours."""
    asked = (columns // 2,) if m is None else (m // 2, m)
    return Case(
        name=f"{'rows' if m is None else f'{m // 2}:{m}'} N={rows} K={columns}",
        inputs=lambda device: (*operands(rows, columns, device), *asked),
        run=prune_rows if m is None else prune_groups,
        expected=torch_rows if m is None else torch_groups,
        bytes=4 * rows * columns + 4 * columns,
        operations=rows * columns,
        kind="stream",
        peers={"torch.topk": by_topk, "torch.sort": torch_rows} if m is None else {"torch.topk": groups_by_topk},
    )


CASES = [case(4096, columns, m) for m in (None, 4) for columns in (4096, 11008)] + [case(4096, 4096, 8)]
