"""Exact magnitude pruning in Triton: the kept-th largest magnitude by selection, not by a sort, and the masked write.

A float's bits without the sign order as its magnitude does, so a key is such an integer, 15 or 31 bits. The threshold t
is the greatest key that at least `kept` keys reach. Keys above it stay; of those equal to it, which may be millions,
the first in memory stay until the count is full.

`prune_rows`, W [N, K] of b bytes a number: a row fits the registers of one program.
    bytes        2 N K b: one read, one write, the floor. t is found bit by bit, from the highest: set the bit if
                 `kept` keys still reach it. 15 or 31 times N K comparisons and additions, all on chip.
`prune_layer`, n numbers: no program can hold a layer, so t has to be known before anything is written.
    bytes        3 n b, and 8192 numbers: two reads, one write, the floor of what decides first and writes then.
                 Radix select would take a read for each digit of t, and one to write: with 8-bit digits three reads
                 of 16-bit numbers. Here the first read is guided by a guess: 8192 numbers, picked all over, tell about
                 where t is, and a window of keys around it is counted, a counter for each key. Keys of 16 bits are so
                 coarse that 32 of bfloat16 or 256 of float16 are a quarter of the way from one power of two to the
                 next: wide enough to hold t, which is then known. A guess that is wrong costs two or three reads
                 more, which count digits; the result is the same. Keys of 32 bits take three reads to count after a
                 right guess, five after a wrong one. Launches that are not needed return at once, no host waits.
    operations   tl.histogram asks all lanes of a warp for each bit of a digit, and adds up each lane's share of the
                 counters. So the first read waits for instructions, not for memory: 38 for a number of bfloat16, 70 of
                 float16 (triton 3.7.1, sm_90; counted, not timed).
    ties         each program has counted its own part of the layer, so the parts before it tell how many equals are
                 still to stay: all or none in every program but one, which alone has to rank its own.
A sort (torch.topk of so many sorts) moves each number several times, and its place with it. torch.kthvalue selects, but
gives one thread block to the whole layer; |W| >= t then keeps all equals, not `kept` numbers.

Method: as chapters/pruning/magnitude.py; radix select after Alabi et al., Fast k-selection algorithms for GPUs, 2012.
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

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
DIGITS = {torch.float16: 8, torch.bfloat16: 5, torch.float32: 8}  # bits that are counted in one read
GUESSED = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 15}  # bits below those that the first read counts
FOUND = tl.constexpr(-1)  # instead of a shift: the window is the threshold
COLUMNS = 16384  # of the longest row that one program can hold
SAMPLE = 8192


@triton.jit
def magnitude_keys(bits, live, BITS: tl.constexpr):
    """Integers that order as the magnitudes of floats given as int16 or int32 `bits`; -1 where not `live`."""
    key = bits.to(tl.int32) & ((1 << BITS) - 1)
    return tl.where(live, key, -1)


@triton.jit
def threshold(key, kept, BITS: tl.constexpr):
    """The greatest t of BITS bits that at least `kept` keys of a row reach: key int32 [R, C] -> int32 [R].

    Keys are below 2^BITS; those that are -1 reach nothing. Each row is for itself. Where a row has fewer than `kept`
    keys, t is 0; where kept is 0, t is 2^BITS - 1.
    """
    found = tl.zeros((key.shape[0],), tl.int32)
    for step in tl.static_range(BITS):
        trial = found | (1 << (BITS - 1 - step))
        count = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        found = tl.where(count >= kept, trial, found)
    return found


@triton.jit
def stays(key, found, ties):
    """Which keys [R, C] stay: those above found [R], and of those equal to it the first `ties` [R] of each row.

    ties may be 0 or negative (none stays) or larger than the number of equals (all stay).
    """
    equal = key == found[:, None]
    rank = tl.cumsum(equal.to(tl.int32), axis=1)
    return (key > found[:, None]) | (equal & (rank <= ties[:, None]))


@triton.jit
def rows_kernel(weight, out, N, K, kept, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS rows of weight [N, K], given as integers of the same size; each keeps its `kept` largest."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    live = (row < N)[:, None] & (column < K)[None, :]
    offsets = row[:, None] * K + column[None, :]
    bits = tl.load(weight + offsets, mask=live, other=0)
    key = magnitude_keys(bits, live, BITS)
    found = threshold(key, kept, BITS)
    above = tl.sum((key > found[:, None]).to(tl.int32), axis=1)
    tl.store(out + offsets, tl.where(stays(key, found, kept - above), bits, 0), mask=live)


@triton.jit
def guess_kernel(
    weight, state, n, step, kept,
    BITS: tl.constexpr, DIGIT: tl.constexpr, SHIFT: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """The first window, state [0] = (low, shift, .., ..), around the kept-th largest of a sample.

    The sample is 8 neighbours, 16 bytes or more, of every 8 · step, with a jitter for outliers that stand in columns:
    without it, all that is looked at may stand in one of them.
    """
    run = tl.arange(0, SAMPLE // 8).to(tl.int64)
    place = ((run * step + run * 40503 % step) * 8)[:, None] + tl.arange(0, 8)[None, :]
    live = place < n
    key = magnitude_keys(tl.load(weight + place, mask=live, other=0), live, BITS)
    found = tl.max(threshold(tl.reshape(key, (1, SAMPLE)), kept, BITS))
    half: tl.constexpr = 1 << (DIGIT - 1 + SHIFT)
    tl.store(state, tl.minimum(tl.maximum(found - half, 0), (1 << BITS) - 1 - (2 * half - 1)))
    tl.store(state + 1, SHIFT)


@triton.jit
def narrow(low, shift, totals, kept, BITS: tl.constexpr, DIGIT: tl.constexpr):
    """The next window, (low, shift, keys above t, counter of t), from what was counted in one.

    totals: a counter for each digit (key - low) >> shift below 2^DIGIT, and one for keys beyond them. A window that
    does not hold t gives way to the widest there is. shift is FOUND, and low is t, if a digit was a key.
    """
    digit = tl.arange(0, 1 << DIGIT)
    count = tl.load(totals + digit)
    beyond = tl.load(totals + (1 << DIGIT))
    reached = beyond + tl.sum(count) - tl.cumsum(count) + count  # keys of this digit, and all above
    place = tl.sum((reached >= kept).to(tl.int32)) - 1
    missed = (beyond >= kept) | (place < 0)
    above = tl.sum(tl.where(digit == place, reached - count, 0))
    finer = tl.where(shift == 0, FOUND, tl.maximum(shift - DIGIT, 0))
    return (tl.where(missed, 0, low + (place << shift)), tl.where(missed, BITS - DIGIT, finer), above, place)


@triton.jit
def current(state, totals, round_, kept, BITS: tl.constexpr, DIGIT: tl.constexpr):
    """The window of this round, from that of the last and from what was counted in it."""
    low = tl.load(state)
    shift = tl.load(state + 1)
    above = low
    place = low
    if round_ > 0:
        last = state + (round_ - 1) * 4
        low, shift = tl.load(last), tl.load(last + 1)
        above, place = tl.load(last + 2), tl.load(last + 3)
        counted = totals + (round_ - 1) * ((1 << DIGIT) + 1)
        if shift != FOUND:
            low, shift, above, place = narrow(low, shift, counted, kept, BITS, DIGIT)
    return low, shift, above, place


@triton.jit
def count_kernel(
    weight, state, totals, counts, n, part, round_, kept,
    BITS: tl.constexpr, DIGIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One read: counters of the window's digits over `part` numbers, for this program and, added up, for all."""
    BINS: tl.constexpr = 1 << DIGIT
    low, shift, above, place = current(state, totals, round_, kept, BITS, DIGIT)
    program = tl.program_id(0)
    if (round_ > 0) & (program == 0):  # for the next round; the others of this one have found the same
        window = state + round_ * 4
        tl.store(window, low)
        tl.store(window + 1, shift)
        tl.store(window + 2, above)
        tl.store(window + 3, place)
    if shift != FOUND:
        acc = tl.zeros((BINS,), tl.int32)
        beyond = tl.zeros((TILE,), tl.int32)
        first = program.to(tl.int64) * part
        for start in range(0, part, TILE):
            offsets = first + start + tl.arange(0, TILE)
            live = offsets < n
            key = magnitude_keys(tl.load(weight + offsets, mask=live, other=0), live, BITS)
            digit = (key - low) >> shift
            inside = live & (key >= low) & (digit < BINS)
            acc += tl.histogram(tl.where(inside, digit, 0), BINS, mask=inside)
            beyond += (live & (digit >= BINS)).to(tl.int32)
        bins = tl.arange(0, BINS)
        tl.store(counts + program * BINS + bins, acc)
        tl.atomic_add(totals + round_ * (BINS + 1) + bins, acc, sem="relaxed")
        tl.atomic_add(totals + round_ * (BINS + 1) + BINS, tl.sum(beyond), sem="relaxed")


@triton.jit
def apply_kernel(
    weight, out, state, totals, counts, n, part, rounds, kept,
    BITS: tl.constexpr, DIGIT: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The second read and the write: `part` numbers, of which those above t stay and as many equals as are due here."""
    found, _, above, place = current(state, totals, rounds, kept, BITS, DIGIT)
    program = tl.program_id(0)
    others = tl.arange(0, PROGRAMS)
    before = tl.sum(tl.load(counts + (others << DIGIT) + place, mask=others < program, other=0))
    mine = tl.load(counts + (program << DIGIT) + place)
    ties = kept - above - before  # equals that may stay, from this program on: all that it has, or none, or some
    all_stay = ties >= mine
    some_stay = (ties > 0) & (ties < mine)
    first = program.to(tl.int64) * part
    for start in range(0, part, TILE):
        offsets = first + start + tl.arange(0, TILE)
        live = offsets < n
        bits = tl.load(weight + offsets, mask=live, other=0)
        key = magnitude_keys(bits, live, BITS)
        keep = (key > found) | ((key == found) & all_stay)
        if some_stay:
            due = tl.zeros((1,), tl.int32) + ties
            keep = tl.reshape(stays(key[None, :], tl.zeros((1,), tl.int32) + found, due), (TILE,))
            ties -= tl.sum((key == found).to(tl.int32))
        tl.store(out + offsets, tl.where(keep, bits, 0), mask=live)


def prune_rows(weight: Tensor, kept: int, rows: int | None = None) -> Tensor:
    """The `kept` largest magnitudes of each row of weight [N, K]; the rest becomes +0. Of equal ones the first stay.

    float16, bfloat16 or float32, contiguous, K up to 16384; a NaN counts as larger than infinity, so it stays visible.
    `rows` rows make one program's tile. Raises ValueError for the shape and unless 0 <= kept <= K, TypeError for the
    dtype.
    """
    require(weight.dim() == 2, f"weight must be [N, K], got shape {tuple(weight.shape)}")
    count, columns = weight.shape
    require(columns <= COLUMNS, f"rows must have at most {COLUMNS} numbers, got {columns}")
    require(0 <= kept <= columns, f"kept must be from 0 to {columns}, got {kept}")
    bits, width = as_integers(weight)
    out = torch.empty_like(bits)
    if out.numel():
        block = triton.next_power_of_2(columns)
        tile = {"BITS": width, "ROWS": rows or max(1, 2048 // block), "BLOCK_K": block}
        warps = min(16, max(4, tile["ROWS"] * block * weight.element_size() // 2048))
        grid = (triton.cdiv(count, tile["ROWS"]),)
        rows_kernel[grid](bits, out, count, columns, kept, **tile, num_warps=warps)
    return out.view(weight.dtype)


def prune_layer(weight: Tensor, kept: int, programs: int = 512, tile: int = 4096, sample: int = SAMPLE) -> Tensor:
    """The `kept` largest magnitudes of a tensor of any shape; the rest becomes +0. Of equal ones the first stay.

    float16, bfloat16 or float32, contiguous, fewer than 2^31 numbers; a NaN counts as larger than infinity, so it
    stays visible. `programs`, a power of two, read a part each, `tile` numbers at a time, and `sample` numbers, a power
    of two as well, are looked at first. Raises ValueError unless 0 <= kept <= the number of weights, TypeError for the
    dtype.
    """
    n = weight.numel()
    require(n < 2**31, f"weight must have fewer than 2^31 numbers, got {n}")
    require(0 <= kept <= n, f"kept must be from 0 to {n}, got {kept}")
    bits, width = as_integers(weight)
    if kept in (0, n):
        return torch.zeros_like(weight) if kept == 0 else weight.clone()
    part = triton.cdiv(triton.cdiv(n, programs), tile) * tile
    sizes = {"BITS": width, "DIGIT": DIGITS[weight.dtype], "TILE": tile}
    state, totals, counts = select(bits, kept, part, sizes, GUESSED[weight.dtype], sample)
    out = torch.empty_like(bits)
    asked = bits, out, state, totals, counts, n, part, len(state), kept
    apply_kernel[(triton.cdiv(n, part),)](*asked, **sizes, PROGRAMS=programs, num_warps=4)
    return out.view(weight.dtype)


def select(
    bits: Tensor, kept: int, part: int, sizes: dict[str, int], shift: int, sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Count until the threshold is known: (state, totals, counts), which `apply_kernel` wants.

    state int32 [rounds, 4] is the window of each round; the rounds whose shift is not negative have read the weight.
    """
    n, bins = bits.numel(), 1 << sizes["DIGIT"]
    grid, rounds = (triton.cdiv(n, part),), 1 + triton.cdiv(sizes["BITS"], sizes["DIGIT"])
    memory = torch.zeros(rounds * (4 + bins + 1), dtype=torch.int32, device=bits.device)
    state, totals = memory[: 4 * rounds].view(rounds, 4), memory[4 * rounds :]
    counts = torch.empty(grid[0] * bins, dtype=torch.int32, device=bits.device)
    due = max(1, round(kept * min(sample, n) / n))
    guessed = {"BITS": sizes["BITS"], "DIGIT": sizes["DIGIT"], "SHIFT": shift, "SAMPLE": sample}
    guess_kernel[(1,)](bits, state, n, max(1, n // sample), due, **guessed, num_warps=8)
    for round_ in range(rounds):
        count_kernel[grid](bits, state, totals, counts, n, part, round_, kept, **sizes, num_warps=4)
    return state, totals, counts


def as_integers(weight: Tensor) -> tuple[Tensor, int]:
    """The weight's bits as integers of its size, and how many of them are not the sign."""
    require_dtype(tuple(INTEGERS), weight=weight)
    require_contiguous(weight=weight)
    require_launchable(weight=weight)
    return weight.view(INTEGERS[weight.dtype]), 8 * weight.element_size() - 1


def torch_prune(weight: Tensor, kept: int) -> Tensor:
    """`prune_rows`, and of a tensor without rows `prune_layer`, by torch's stable sort."""
    order = weight.abs().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(weight).scatter_(-1, order, weight.gather(-1, order))


def by_topk(weight: Tensor, kept: int) -> Tensor:
    """The same by torch.topk, which keeps any of equals."""
    order = weight.abs().topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(weight).scatter_(-1, order, weight.gather(-1, order))


def by_kthvalue(weight: Tensor, kept: int) -> Tensor:
    """The same by torch.kthvalue, which keeps all of equals."""
    magnitude = weight.abs()
    least = magnitude.kthvalue(weight.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    return torch.where(magnitude >= least, weight, 0)


def normal(*shape: int, device: torch.device) -> Tensor:
    """A bfloat16 tensor; `check` only compiles and needs no contents."""
    made = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return made.normal_(std=0.02) if device.type == "cuda" else made


def case(rows: int, columns: int, per_row: bool) -> Case:
    """Half of a Llama weight goes, compared within rows or within the layer."""
    shape = (rows, columns) if per_row else (rows * columns,)
    return Case(
        name=f"{'rows' if per_row else 'layer'} N={rows} K={columns}",
        inputs=lambda device: (normal(*shape, device=device), (columns if per_row else rows * columns) // 2),
        run=prune_rows if per_row else prune_layer,
        expected=torch_prune,
        bytes=(4 if per_row else 6) * rows * columns,
        operations=0,
        kind="stream",
        peers={"torch.topk": by_topk, "torch.kthvalue": by_kthvalue},
    )


CASES = [case(rows, columns, per_row) for per_row in (True, False) for rows, columns in ((4096, 4096), (4096, 11008))]
