"""Gains of all column swaps, and of all ways to share two stripes' columns out anew, without a list of candidates.

Both are products of columns with columns in which max takes the place of times: for each pair of columns, or of pairs
of columns, a sum over the rows. So they are tiled like a matrix product, weight [N, K] of b bytes a number:

    swap_gains    M[a, b] = Σ_r max(q_ra, |w_rb|); the gain is M[a, b] + M[b, a] − M[a, a] − M[b, b]
    group_gains   D[p, s] = Σ_r max(sum_p, sum_s, max_p + max_s) for the six pairs p of one stripe's columns and the six
                  s of another's: what 2:4 keeps of the four columns. Two stripes are shared out in 35 ways: as they
                  are, by one of 16 swaps, or by one of 18 exchanges of pairs, D[p, s] + D[p', s'], with p' the two
                  columns that p leaves and s' likewise

    floor         N K b bytes in; out 4 K² (swaps), 8 pairs of stripes = K² / 4 (groups)
    moved         N K b · K / T, tiles of T columns: a program reads each row's T + T numbers once and makes all pairs
                  of them on chip, for both directions. The mirrored half is not computed. Caches serve most of it
    naive         a try for each swap reads its two stripes: 4 N K² b; one for each group still N K² b / 4
    operations    2 N K² (swaps: 4 for each two columns that meet, which serves both directions); 6.5 N K² (groups: 4
                  for each of 36 meetings of pairs, besides the 16 of columns; tiles of powers of two make 64 of the
                  36). No tensor core has a max, so the arithmetic of float32 bounds both, not memory. In swaps a thread
                  spends 5 more instructions and a barrier on each meeting (triton 3.7.1, sm_90; counted, not timed)
What joins the four columns of a stripe (their second largest, their pairs) is done in registers, once for a tile of
rows; the best of 35 ways is chosen on chip, and only it and its number are written.

Method: as chapters/sparsity/permutation.py.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.pruning.wanda import join_four
from kernels.sparsity.n_m import members

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 512  # columns: large tiles of so few would leave most multiprocessors without one, each row by row


@triton.jit
def load_magnitudes(weight, row, column, N, K):
    """|W| of some rows and columns as float32 [rows, columns], 0 outside."""
    live = (row < N)[:, None] & (column < K)[None, :]
    return tl.abs(
        tl.load(weight + row.to(tl.int64)[:, None] * K + column[None, :], mask=live, other=0.0).to(tl.float32)
    )


@triton.jit
def second_of_three(a, b, c):
    """The second largest of three, elementwise."""
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def runners_up(x):
    """For each column the second largest of the other three in its stripe, row by row: [R, C] like x.

    x [R, C] is float32, not negative; C, a power of two and at least 4, holds whole stripes of four neighbours.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    a, b, c, d = members(tl.reshape(x, (R, C // 4, 2, 2)))
    others = join_four(second_of_three(b, c, d), second_of_three(a, c, d), second_of_three(a, b, d),
                       second_of_three(a, b, c))  # fmt: skip
    return tl.reshape(others, (R, C))


@triton.jit
def tile_gains(x, y):
    """What each swap of a column of x [R, C] with one of y [R, D] gains over the R rows: [C, D]. Stripes differ."""
    q, p = runners_up(x), runners_up(y)
    met = tl.maximum(q[:, :, None], y[:, None, :]) + tl.maximum(x[:, :, None], p[:, None, :])
    own_x, own_y = tl.sum(tl.maximum(q, x), axis=0), tl.sum(tl.maximum(p, y), axis=0)
    return tl.sum(met, axis=0) - (own_x[:, None] + own_y[None, :])  # of x with x symmetric, to the last bit


@triton.jit
def swap_kernel(weight, gains, N, K, ROWS: tl.constexpr, TILE: tl.constexpr):
    """TILE × TILE pairs of columns; ROWS rows at a time. Tiles below the diagonal are their mirror's to write."""
    if tl.program_id(0) > tl.program_id(1):
        return
    left = tl.program_id(0) * TILE + tl.arange(0, TILE)
    right = tl.program_id(1) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        acc += tile_gains(load_magnitudes(weight, row, left, N, K), load_magnitudes(weight, row, right, N, K))
    acc = tl.where(left[:, None] // 4 == right[None, :] // 4, 0.0, acc)
    live = (left < K)[:, None] & (right < K)[None, :]
    tl.store(gains + left.to(tl.int64)[:, None] * K + right[None, :], acc, mask=live)
    tl.store(gains + right.to(tl.int64)[None, :] * K + left[:, None], acc, mask=live)


@triton.jit
def both_halves(a, b, c, d):
    """Pairs of four [R, S]: of each stripe ab ac ad ad, then what they leave, cd bd bc bc; sums and maxima [R, 8 S]."""
    R: tl.constexpr = a.shape[0]
    S: tl.constexpr = a.shape[1]
    sums = tl.join(join_four(a + b, a + c, a + d, a + d), join_four(c + d, b + d, b + c, b + c))
    ad, bc = tl.maximum(a, d), tl.maximum(b, c)
    first = join_four(tl.maximum(a, b), tl.maximum(a, c), ad, ad)
    other = join_four(tl.maximum(c, d), tl.maximum(b, d), bc, bc)
    sums = tl.permute(sums, (0, 1, 4, 2, 3))  # [R, S, 2 halves, 2, 2]
    maxima = tl.permute(tl.join(first, other), (0, 1, 4, 2, 3))
    return tl.reshape(sums, (R, 8 * S)), tl.reshape(maxima, (R, 8 * S))


@triton.jit
def pair_meetings(x, y):
    """What 2:4 keeps of each pair of x's with each of y's columns, [R, 4 S] and [R, 4 T], over R rows: [8 S, 8 T]."""
    R: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1] // 4
    T: tl.constexpr = y.shape[1] // 4
    a, b, c, d = members(tl.reshape(x, (R, S, 2, 2)))
    e, f, g, h = members(tl.reshape(y, (R, T, 2, 2)))
    sums, maxima = both_halves(a, b, c, d)
    other_sums, other_maxima = both_halves(e, f, g, h)
    kept = tl.maximum(sums[:, :, None], other_sums[:, None, :])
    return tl.sum(tl.maximum(kept, maxima[:, :, None] + other_maxima[:, None, :]), axis=0)


@triton.jit
def kept_by_stripe(x):
    """What 2:4 keeps of each stripe of x [R, 4 S] over R rows: [S]."""
    a, b, c, d = members(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    both = tl.maximum(tl.maximum(a + b, c + d), tl.maximum(a, b) + tl.maximum(c, d))
    return tl.sum(both, axis=0)


@triton.jit
def best_of(gains, numbers, best, split):
    """Fold gains [S, 4, T, 4] with their numbers [4, 4] into best and split [S, T]; of equal gains the least number."""
    most = tl.max(tl.max(gains, axis=3), axis=1)
    here = tl.where(gains == most[:, None, :, None], numbers[None, :, None, :], 35)
    number = tl.min(tl.min(here, axis=3), axis=1)
    better = (most > best) | ((most == best) & (number < split))
    return tl.where(better, most, best), tl.where(better, number, split)


@triton.jit
def groups_kernel(weight, numbers, gain, split, N, K, ROWS: tl.constexpr, TILE: tl.constexpr):
    """TILE × TILE pairs of stripes; ROWS rows at a time. numbers int32 [3, 4, 4]: see `split_numbers`."""
    if tl.program_id(0) > tl.program_id(1):
        return
    left = tl.program_id(0) * TILE * 4 + tl.arange(0, 4 * TILE)
    right = tl.program_id(1) * TILE * 4 + tl.arange(0, 4 * TILE)
    swaps = tl.zeros((4 * TILE, 4 * TILE), tl.float32)
    pairs = tl.zeros((8 * TILE, 8 * TILE), tl.float32)
    kept = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        x, y = load_magnitudes(weight, row, left, N, K), load_magnitudes(weight, row, right, N, K)
        swaps += tile_gains(x, y)
        pairs += pair_meetings(x, y)
        kept += kept_by_stripe(x)[:, None] + kept_by_stripe(y)[None, :]
    halves = tl.permute(tl.reshape(pairs, (TILE, 2, 4, TILE, 2, 4)), (0, 2, 3, 5, 1, 4))
    straight, crossed, crossed_too, straight_too = members(halves)
    place = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    best = tl.zeros((TILE, TILE), tl.float32)
    number = tl.zeros((TILE, TILE), tl.int32)
    four = tl.reshape(swaps, (TILE, 4, TILE, 4))
    best, number = best_of(four, tl.load(numbers + place), best, number)
    base = kept[:, None, :, None]
    best, number = best_of(straight + straight_too - base, tl.load(numbers + 16 + place), best, number)
    best, number = best_of(crossed + crossed_too - base, tl.load(numbers + 32 + place), best, number)
    s = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    t = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    stripes = K // 4
    at = s * (2 * stripes - s - 1) // 2 + t - s - 1  # in the order (0, 1), (0, 2), ...
    live = (s < t) & (t < stripes)
    tl.store(gain + at, best, mask=live)
    tl.store(split + at, number, mask=live)


@cache
def split_numbers() -> Tensor:
    """Which of the 35 splits a move makes, int32 [3, 4, 4] on the CPU, numbered as in chapters/shared/stripes.py.

    Columns of the two stripes are 0 to 3 and 4 to 7. A split is known by the stripe that holds column 0, and the
    stripes 0 i j k are numbered as in a dictionary. [0, a, b]: swap of columns a and 4 + b. [1, k, l]: pair k of the
    first stripe stays with pair l of the second, of 01 02 03 03 and 45 46 47 47; [2, k, l]: with what l leaves.
    """
    number = {frozenset((0, *rest)): i for i, rest in enumerate(combinations(range(1, 8), 3))}
    stripes = frozenset(range(4)), frozenset(range(4, 8))

    def of(stripe: frozenset) -> int:
        return number[stripe if 0 in stripe else frozenset(range(8)) - stripe]

    made = torch.empty(3, 4, 4, dtype=torch.int32)
    for a, b in product(range(4), repeat=2):
        first, other = {0, min(a + 1, 3)}, {4, 4 + min(b + 1, 3)}
        made[0, a, b] = of(stripes[0] - {a} | {4 + b})
        made[1, a, b] = of(frozenset(first | other))
        made[2, a, b] = of(frozenset(first | (stripes[1] - other)))
    return made


def check_weight(weight: Tensor) -> None:
    """Refuse what is not a contiguous float [N, K] with whole stripes."""
    require(weight.dim() == 2, f"weight must be [N, K], got shape {tuple(weight.shape)}")
    require(weight.shape[1] % 4 == 0, f"weight has {weight.shape[1]} columns, not divisible by the 4 of a stripe")
    require_dtype(DTYPES, weight=weight)
    require_contiguous(weight=weight)
    require_launchable(weight=weight)


def swap_gains(weight: Tensor, tile: int | None = None, rows: int | None = None) -> Tensor:
    """What 2:4 keeps more of weight [N, K] once two columns are swapped: float32 [K, K], symmetric, 0 in a stripe.

    weight float16, bfloat16 or float32, contiguous, 4 divides K; summed in float32. `tile` columns make the side of a
    program's tile, which `rows` rows at a time pass; if not given, they follow from K. What is not finite makes gains
    that are not.
    Raises ValueError for the shape, TypeError for the dtype.
    """
    check_weight(weight)
    count, columns = weight.shape
    tile, rows = tile or (8 if columns <= FEW else 32), rows or (64 if columns <= FEW else 4)
    gains = torch.empty(columns, columns, dtype=torch.float32, device=weight.device)
    blocks = triton.cdiv(columns, tile)
    if blocks:
        swap_kernel[(blocks, blocks)](weight, gains, count, columns, ROWS=rows, TILE=tile, num_warps=4)
    return gains


def group_gains(weight: Tensor, tile: int | None = None, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """The best of 35 ways to share the columns of each two stripes out: gain float32, number int32, both [pairs].

    weight as for `swap_gains`; pairs of stripes in the order (0, 1), (0, 2), …; a gain is what 2:4 keeps more, and
    where no way is better than the stripes as they are, gain and number are 0. `tile` stripes and `rows` as there.
    """
    check_weight(weight)
    (count, columns), device = weight.shape, weight.device
    stripes = columns // 4
    tile, rows = tile or (2 if columns <= FEW else 8), rows or (32 if columns <= FEW else 2)
    gain = torch.empty(stripes * (stripes - 1) // 2, dtype=torch.float32, device=device)
    split = torch.empty(gain.shape, dtype=torch.int32, device=device)
    blocks = triton.cdiv(stripes, tile)
    if len(gain):
        numbers = split_numbers().to(device)
        groups_kernel[(blocks, blocks)](weight, numbers, gain, split, count, columns, ROWS=rows, TILE=tile, num_warps=8)
    return gain, split


def torch_swap_gains(weight: Tensor) -> Tensor:
    """`swap_gains` by plain torch operators, a column at a time."""
    x = weight.float().abs()
    others = x.unflatten(1, (-1, 4))[..., [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]]
    q = others.median(dim=-1).values.flatten(1)
    met = torch.stack([torch.maximum(q[:, column, None], x).sum(0) for column in range(x.shape[1])])
    own, stripe = met.diagonal(), torch.arange(len(met), device=met.device) // 4
    return (met + met.T - own - own[:, None]).masked_fill(stripe == stripe[:, None], 0)


def torch_group_gains(weight: Tensor) -> Tensor:
    """The gains of `group_gains` by plain torch operators, as many pairs of stripes at a time as memory holds."""
    x = weight.float().abs().unflatten(1, (-1, 4)).movedim(2, 0).contiguous()  # [4, N, stripes]
    pairs = torch.triu_indices(x.shape[2], x.shape[2], 1, device=x.device)
    gains = [x.new_zeros(0)]
    for first, other in (part.unbind() for part in pairs.split(2**24 // max(1, len(weight)) + 1, dim=1)):
        column = torch.cat((x[:, :, first], x[:, :, other]))
        kept = torch.stack([two_largest(*(column[i] for i in four)).sum(0) for four in combinations(range(8), 4)])
        ways = kept[:35] + kept.flip(0)[:35]  # the n-th four from the end is what the n-th leaves
        gains.append(ways.amax(0) - ways[0])
    return torch.cat(gains)


def two_largest(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The sum of the two largest of four, elementwise."""
    return torch.maximum(torch.maximum(a + b, c + d), torch.maximum(a, b) + torch.maximum(c, d))


def normal(rows: int, columns: int, device: torch.device) -> tuple[Tensor]:
    """A bfloat16 matrix; `check` only compiles and needs no contents."""
    made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    return (made.normal_() if device.type == "cuda" else made,)


def swap_case(rows: int, columns: int) -> Case:
    """All swaps of one layer's inputs; the operations are not multiply-adds, and no tensor core does them."""
    return Case(
        name=f"swaps N={rows} K={columns}",
        inputs=lambda device: normal(rows, columns, device),
        run=swap_gains,
        expected=torch_swap_gains,
        bytes=2 * rows * columns + 4 * columns**2,
        operations=2 * rows * columns**2,
        kind="other",
        peers={"torch": torch_swap_gains},
    )


def group_case(rows: int, columns: int) -> Case:
    """All pairs of stripes of one layer's inputs; of the result the gains are compared."""
    return Case(
        name=f"groups N={rows} K={columns}",
        inputs=lambda device: normal(rows, columns, device),
        run=lambda weight: group_gains(weight)[0],
        expected=torch_group_gains,
        bytes=2 * rows * columns + columns**2 // 4,
        operations=13 * rows * columns**2 // 2,
        kind="other",
        peers={"torch": torch_group_gains} if columns <= 128 else {},  # half a million pairs take it seconds
    )


# what q, k and v read, stacked; the values of one head, as o reads them
CASES = [swap_case(12288, 4096), swap_case(4096, 128), group_case(4096, 128), group_case(12288, 4096)]
