"""Top-KAST in Triton: both sets from one search, and the update of the weights in B with its penalty in one pass.

`choose_sets`, n weights of b bytes. Two thresholds are wanted, of the |A| largest magnitudes and of the |B| largest.
    bytes        2 n b + n, and 8192 weights: two reads, and a byte written for each weight, 2 in A, 1 in B alone, 0 in
                 neither. The search is radix select as in kernels/pruning/magnitude.py: a sample says about where the
                 thresholds are, and the first read counts a window of keys around each. Both are counted from the same
                 loaded keys, and both are applied in the second read. As there, float32 and wrong guesses read again.
    naive        two searches, each with a mask: 4 n b and 2 n, and the sum of masks 3 n more. torch.topk of so many
                 sorts, and moves a place of 8 bytes with each number.
    operations   tl.histogram twice for each weight, so instructions, not memory, bound the first read.
    ties         of equal magnitudes the first in memory stay, in both sets, so A lies in B. See `apply_kernel` there.
`sparse_update`, b weights in B; values and gradients of v bytes, moments float32.
    bytes        (3 v + 17) b: values, gradient, membership and both moments read once; values and moments written once.
                 Gradient, moments and update exist for B only: a dense layer has (3 v + 16) for each of its weights.
    naive        torch's operators, one by one: about twelve passes, each of which reads and writes such arrays.

Method: as chapters/sparsity/top_kast.py.
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
from kernels.pruning import magnitude

FIRST, SECOND, EPSILON = 0.9, 0.95, 1e-8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def two_thresholds(key, forward, backward, BITS: tl.constexpr):
    """For forward and for backward, the greatest t of BITS bits that at least so many keys of a row reach.

    key int32 [R, C], all below 2^BITS; -1 reaches nothing. Returns (of forward, of backward), int32 [R] each; every row
    is for itself. 1 <= forward <= backward. Where a row has fewer keys than are asked for, t is 0.
    """
    high = tl.zeros((key.shape[0],), tl.int32)
    low = tl.zeros((key.shape[0],), tl.int32)
    for step in tl.static_range(BITS):
        higher, lower = high | (1 << (BITS - 1 - step)), low | (1 << (BITS - 1 - step))
        high = tl.where(tl.sum((key >= higher[:, None]).to(tl.int32), axis=1) >= forward, higher, high)
        low = tl.where(tl.sum((key >= lower[:, None]).to(tl.int32), axis=1) >= backward, lower, low)
    return high, low


@triton.jit
def guess_kernel(
    weight, state, n, step, rounds, forward, backward,
    BITS: tl.constexpr, DIGIT: tl.constexpr, SHIFT: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """The first window of either search, (low, shift, .., ..), around its threshold in a sample.

    The sample is 8 neighbours of every 8 · step, with a jitter for outliers that stand in columns.
    """
    run = tl.arange(0, SAMPLE // 8).to(tl.int64)
    place = ((run * step + run * 40503 % step) * 8)[:, None] + tl.arange(0, 8)[None, :]
    live = place < n
    key = magnitude.magnitude_keys(tl.load(weight + place, mask=live, other=0), live, BITS)
    high, low = two_thresholds(tl.reshape(key, (1, SAMPLE)), forward, backward, BITS)
    half: tl.constexpr = 1 << (DIGIT - 1 + SHIFT)
    last: tl.constexpr = (1 << BITS) - 2 * half
    tl.store(state, tl.minimum(tl.maximum(tl.max(high) - half, 0), last))
    tl.store(state + 1, SHIFT)
    tl.store(state + rounds * 4, tl.minimum(tl.maximum(tl.max(low) - half, 0), last))
    tl.store(state + rounds * 4 + 1, SHIFT)


@triton.jit
def begin(state, totals, round_, kept, first, BITS: tl.constexpr, DIGIT: tl.constexpr):
    """(low, shift) of one search's window in this round; the `first` program writes it down for the next."""
    low, shift, above, place = magnitude.current(state, totals, round_, kept, BITS, DIGIT)
    if (round_ > 0) & first:
        window = state + round_ * 4
        tl.store(window, low)
        tl.store(window + 1, shift)
        tl.store(window + 2, above)
        tl.store(window + 3, place)
    return low, shift


@triton.jit
def digits(key, live, low, shift, BINS: tl.constexpr):
    """Counters of the window's digits, and which keys lie beyond them."""
    digit = (key - low) >> tl.maximum(shift, 0)
    within = live & (key >= low) & (digit < BINS)
    return tl.histogram(tl.where(within, digit, 0), BINS, mask=within), (live & (digit >= BINS)).to(tl.int32)


@triton.jit
def add_up(totals, counts, acc, beyond, round_, DIGIT: tl.constexpr):
    """This program's counters into its own row, and, added up, into those of all."""
    bins = tl.arange(0, 1 << DIGIT)
    mine = totals + round_ * ((1 << DIGIT) + 1)
    tl.store(counts + bins, acc)
    tl.atomic_add(mine + bins, acc, sem="relaxed")
    tl.atomic_add(mine + (1 << DIGIT), tl.sum(beyond), sem="relaxed")


@triton.jit
def count_kernel(
    weight, state, totals, counts, n, part, round_, rounds, forward, backward,
    BITS: tl.constexpr, DIGIT: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One read of `part` weights: counters of both windows. A search that is done keeps the counters it has."""
    BINS: tl.constexpr = 1 << DIGIT
    program = tl.program_id(0)
    state_b, totals_b, counts_b = state + rounds * 4, totals + rounds * (BINS + 1), counts + PROGRAMS * BINS
    low_a, shift_a = begin(state, totals, round_, forward, program == 0, BITS, DIGIT)
    low_b, shift_b = begin(state_b, totals_b, round_, backward, program == 0, BITS, DIGIT)
    if (shift_a != magnitude.FOUND) | (shift_b != magnitude.FOUND):
        acc_a = tl.zeros((BINS,), tl.int32)
        acc_b = tl.zeros((BINS,), tl.int32)
        beyond_a = tl.zeros((TILE,), tl.int32)
        beyond_b = tl.zeros((TILE,), tl.int32)
        first = program.to(tl.int64) * part
        for start in range(0, part, TILE):
            offsets = first + start + tl.arange(0, TILE)
            live = offsets < n
            key = magnitude.magnitude_keys(tl.load(weight + offsets, mask=live, other=0), live, BITS)
            found_a, past_a = digits(key, live, low_a, shift_a, BINS)
            found_b, past_b = digits(key, live, low_b, shift_b, BINS)
            acc_a, acc_b = acc_a + found_a, acc_b + found_b
            beyond_a, beyond_b = beyond_a + past_a, beyond_b + past_b
        if shift_a != magnitude.FOUND:
            add_up(totals, counts + program * BINS, acc_a, beyond_a, round_, DIGIT)
        if shift_b != magnitude.FOUND:
            add_up(totals_b, counts_b + program * BINS, acc_b, beyond_b, round_, DIGIT)


@triton.jit
def due_here(state, totals, counts, rounds, kept, BITS: tl.constexpr, DIGIT: tl.constexpr, PROGRAMS: tl.constexpr):
    """(threshold, equals that may stay from this program on, equals that it has) of one search."""
    found, _, above, place = magnitude.current(state, totals, rounds, kept, BITS, DIGIT)
    program = tl.program_id(0)
    others = tl.arange(0, PROGRAMS)
    before = tl.sum(tl.load(counts + (others << DIGIT) + place, mask=others < program, other=0))
    return found, kept - above - before, tl.load(counts + (program << DIGIT) + place)


@triton.jit
def inside(key, found, ties, mine, TILE: tl.constexpr):
    """Which keys [TILE] are in the set: those above `found`; of the equal ones all, none, or the first `ties`."""
    keep = (key > found) | ((key == found) & (ties >= mine))
    if (ties > 0) & (ties < mine):
        due = tl.zeros((1,), tl.int32) + ties
        keep = tl.reshape(magnitude.stays(key[None, :], tl.zeros((1,), tl.int32) + found, due), (TILE,))
    return keep


@triton.jit
def apply_kernel(
    weight, member, state, totals, counts, n, part, rounds, forward, backward,
    BITS: tl.constexpr, DIGIT: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The second read and the write: in how many of the sets each of `part` weights is."""
    BINS: tl.constexpr = 1 << DIGIT
    state_b, totals_b, counts_b = state + rounds * 4, totals + rounds * (BINS + 1), counts + PROGRAMS * BINS
    found_a, ties_a, mine_a = due_here(state, totals, counts, rounds, forward, BITS, DIGIT, PROGRAMS)
    found_b, ties_b, mine_b = due_here(state_b, totals_b, counts_b, rounds, backward, BITS, DIGIT, PROGRAMS)
    first = tl.program_id(0).to(tl.int64) * part
    for start in range(0, part, TILE):
        offsets = first + start + tl.arange(0, TILE)
        live = offsets < n
        key = magnitude.magnitude_keys(tl.load(weight + offsets, mask=live, other=0), live, BITS)
        sets = inside(key, found_a, ties_a, mine_a, TILE).to(tl.int8)
        sets += inside(key, found_b, ties_b, mine_b, TILE).to(tl.int8)
        tl.store(member + offsets, sets.to(tl.uint8), mask=live)
        if (ties_a > 0) & (ties_a < mine_a):  # in one program of all: in the others all equals stay, or none
            ties_a -= tl.sum((key == found_a).to(tl.int32))
        if (ties_b > 0) & (ties_b < mine_b):
            ties_b -= tl.sum((key == found_b).to(tl.int32))


def choose_sets(
    weight: Tensor, forward: int, backward: int, programs: int = 512, tile: int = 4096, sample: int = magnitude.SAMPLE
) -> Tensor:
    """2 where a weight is among the `forward` largest magnitudes, else 1 among the `backward` largest, else 0; uint8.

    weight: float16, bfloat16 or float32, contiguous, any shape, fewer than 2^31 numbers; a NaN counts as larger than
    infinity. Of equal magnitudes the first in memory come first. `programs`, a power of two, read a part each, `tile`
    numbers at a time; `sample` numbers, a power of two as well, are looked at first.
    Raises ValueError unless 1 <= forward <= backward <= the number of weights, TypeError for the dtype.
    """
    n = weight.numel()
    require(n < 2**31, f"weight must have fewer than 2^31 numbers, got {n}")
    asked = f"need 1 <= forward <= backward <= {n} weights, got {forward} and {backward}"
    require(1 <= forward <= backward <= n, asked)
    bits, width = magnitude.as_integers(weight)
    digit = magnitude.DIGITS[weight.dtype]
    bins, part, rounds = 1 << digit, triton.cdiv(triton.cdiv(n, programs), tile) * tile, 1 + triton.cdiv(width, digit)
    grid = (triton.cdiv(n, part),)
    memory = torch.zeros(2 * rounds * (4 + bins + 1), dtype=torch.int32, device=weight.device)
    state, totals = memory[: 8 * rounds], memory[8 * rounds :]
    counts = torch.empty(2 * programs * bins, dtype=torch.int32, device=weight.device)
    due = [max(1, round(kept * min(sample, n) / n)) for kept in (forward, backward)]
    guessed = {"BITS": width, "DIGIT": digit, "SHIFT": magnitude.GUESSED[weight.dtype], "SAMPLE": sample}
    guess_kernel[(1,)](bits, state, n, max(1, n // sample), rounds, *due, **guessed, num_warps=8)
    sizes = {"BITS": width, "DIGIT": digit, "TILE": tile, "PROGRAMS": programs}
    memory, wanted = (state, totals, counts, n, part), (rounds, forward, backward)
    for round_ in range(rounds):
        count_kernel[grid](bits, *memory, round_, *wanted, **sizes, num_warps=8)
    member = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    sizes["TILE"] = max(1, tile // 2)  # few registers: all programs run at once
    apply_kernel[grid](bits, member, *memory, *wanted, **sizes, num_warps=8)
    return member


@triton.jit
def adam_with_penalty(value, gradient, active, mean, square, rate, rate_mean, size_square, decay, explored, EPSILON):
    """One step on float32 tiles; `explored` is the decay outside A, size_square = 1 / (1 - beta2^step)."""
    mean += (1 - 0.9) * (gradient - mean)
    square += (1 - 0.95) * (gradient * gradient - square)
    size = tl.sqrt(square * size_square) + EPSILON
    shrink = tl.where(active != 0, decay, explored)
    return value - rate * shrink * value - rate_mean * (mean / size), mean, square


@triton.jit
def update_tile(tensors, offsets, live, scalars, EPSILON: tl.constexpr):
    """The weights of B at `offsets`, those that are `live`; None: all, which leaves loads of 128 bits."""
    value, gradient, active, mean, square, value_out, mean_out, square_out = tensors
    old = tl.load(value + offsets, mask=live).to(tl.float32)
    slope = tl.load(gradient + offsets, mask=live).to(tl.float32)
    member = tl.load(active + offsets, mask=live)
    m = tl.load(mean + offsets, mask=live)
    s = tl.load(square + offsets, mask=live)
    new, m, s = adam_with_penalty(old, slope, member, m, s, *scalars, EPSILON)
    tl.store(value_out + offsets, new.to(value_out.dtype.element_ty), mask=live)
    tl.store(mean_out + offsets, m, mask=live)
    tl.store(square_out + offsets, s, mask=live)


@triton.jit
def update_kernel(
    value, gradient, active, mean, square, value_out, mean_out, square_out, n,
    rate, rate_mean, size_square, decay, explored, EPSILON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE weights of B: everything is read once and written once. Only the last program masks: |B| may be odd."""
    first = tl.program_id(0).to(tl.int64) * TILE
    offsets = first + tl.arange(0, TILE)
    tensors = value, gradient, active, mean, square, value_out, mean_out, square_out
    scalars = rate, rate_mean, size_square, decay, explored
    if first + TILE <= n:
        update_tile(tensors, offsets, None, scalars, EPSILON)
    else:
        update_tile(tensors, offsets, offsets < n, scalars, EPSILON)


def sparse_update(
    values: Tensor, gradient: Tensor, active: Tensor, mean: Tensor, square: Tensor,
    step: int, rate: float, decay: float, density: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None, tile: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One step of Adam with the exploration penalty on the weights of B: new (values, mean, square).

    values, gradient `[b]` float16, bfloat16 or float32, active `[b]` bool, moments `[b]` float32, all contiguous; it
    computes in float32. With `out`, such as the arguments themselves, results are written there, `tile` a program.
    Raises ValueError for shapes, step < 1 and unless 0 < density <= 1, TypeError for dtypes.
    """
    given = {"values": values, "gradient": gradient, "active": active, "mean": mean, "square": square}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    require(len(set(shapes.values())) == 1, f"all tensors must share a shape, got {shapes}")
    require(step >= 1, f"step must be at least 1, got {step}")
    require(0 < density <= 1, f"density must be in (0, 1], got {density}")
    require_dtype(DTYPES, values=values)
    require_dtype((values.dtype,), gradient=gradient)
    require_dtype((torch.bool,), active=active)
    require_dtype((torch.float32,), mean=mean, square=square)
    require_contiguous(**given)
    require_launchable(**given)
    out = out or (torch.empty_like(values), torch.empty_like(mean), torch.empty_like(square))
    for result, like in zip(out, (values, mean, square), strict=True):
        require_dtype((like.dtype,), out=result)
        require(result.shape == like.shape and result.is_contiguous(), f"out must be contiguous {tuple(like.shape)}")
    scalars = rate, rate / (1 - FIRST**step), 1 / (1 - SECOND**step), decay, decay / density
    if values.numel():
        tensors = values, gradient, active.view(torch.uint8), mean, square, *out, values.numel()
        grid = (triton.cdiv(values.numel(), tile),)
        update_kernel[grid](*tensors, *scalars, EPSILON=EPSILON, TILE=tile, num_warps=4)
    return out


def in_order(order: Tensor, weight: Tensor, forward: int) -> Tensor:
    """The sets whose weights, the first of them A, stand at the places `order`."""
    member = torch.zeros(weight.numel(), dtype=torch.uint8, device=weight.device)
    member[order] = 1
    member[order[:forward]] = 2
    return member.view(weight.shape)


def torch_sets(weight: Tensor, forward: int, backward: int) -> Tensor:
    """`choose_sets` by torch's stable sort."""
    return in_order(weight.abs().flatten().sort(descending=True, stable=True).indices[:backward], weight, forward)


def by_topk(weight: Tensor, forward: int, backward: int) -> Tensor:
    """The same by one torch.topk, which takes any of equals."""
    return in_order(weight.abs().flatten().topk(backward).indices, weight, forward)


def torch_update(
    values: Tensor, gradient: Tensor, active: Tensor, mean: Tensor, square: Tensor,
    step: int, rate: float, decay: float, density: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sparse_update` by torch's operators."""
    slope = gradient.float()
    mean, square = mean.lerp(slope, 1 - FIRST), square.lerp(slope * slope, 1 - SECOND)
    size = (square / (1 - SECOND**step)).sqrt() + EPSILON
    shrunk = values.float() * (1 - rate * decay * torch.where(active, 1.0, 1 / density))
    return (shrunk - rate / (1 - FIRST**step) * mean / size).to(values.dtype), mean, square


def select_case(rows: int, columns: int) -> Case:
    """Of a Llama weight a tenth is in A, three tenths are in B."""
    n = rows * columns
    return Case(
        name=f"sets N={rows} K={columns}", narrow_stores="bytes, 8 for a thread; with 16, Triton 3.6 spills on sm_80",
        inputs=lambda device: (magnitude.normal(n, device=device), n // 10, 3 * n // 10),
        run=choose_sets, expected=torch_sets, bytes=5 * n, operations=0, kind="stream", peers={"torch.topk": by_topk},
    )  # fmt: skip


def update_case(rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Three tenths of a Llama weight."""
    b = 3 * rows * columns // 10

    def inputs(device: torch.device) -> tuple:
        values, gradient = magnitude.normal(b, device=device).to(dtype), magnitude.normal(b, device=device).to(dtype)
        mean, square = magnitude.normal(b, device=device).float(), magnitude.normal(b, device=device).float().square_()
        return values, gradient, values.abs() > 0.03, mean, square, 100, 1e-3, 0.1, 0.1

    return Case(
        name=f"update b={b} {str(dtype).removeprefix('torch.')}",
        inputs=inputs,
        run=sparse_update, expected=torch_update, bytes=(3 * dtype.itemsize + 17) * b, operations=16 * b, kind="stream",
        peers={"torch operators": torch_update},
    )  # fmt: skip


CASES = [
    *(select_case(4096, columns) for columns in (4096, 11008)),
    *(update_case(4096, 11008, dtype) for dtype in (torch.bfloat16, torch.float32)),
]
