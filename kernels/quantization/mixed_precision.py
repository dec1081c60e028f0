"""All layers of a model, each in its own number of bits, expanded by one launch from one packed buffer.

Fused: the look-up of the layer, unpacking, scale * (code - zero), rounding to 16 bits. A prompt of hundreds of tokens
waits for arithmetic, not for weights: it wants plain 16-bit weights for a library's product, once for the whole prompt.

    bytes        sum over layers of N K (bits / 8 + 3 / g + 2)      codes, 16-bit scales and 8-bit zeros, weights out
    operations   a shift, a mask, a subtraction and a product for each weight: memory is the floor
Replaces a launch for each of hundreds of layers, or unpacking by torch operators, which write each weight as a byte,
read it again and make a float32 of it: 10 bytes a weight more than the floor at the least.

Bits differ between programs, not within: a program has one span of 16384 weights, finds its layer in the table by
counting those that begin no later, and takes the branch of its width. A span is 128 lanes; lane t has the 16 octets
128 r + t of 8 neighbouring weights. So each load of a quad, and each store of an octet in 16 bits, moves 16 bytes per
thread and is contiguous over a warp, whatever the width; no code leaves its thread. A lane's 16 octets are 128 codes,
bit after bit: a word holds two octets of 2 bits, one of 4, half of one of 8, and with 3 bits three words hold four.

table is int64 [layers + 1, 4]: spans, quads and octets before a layer, its bits; the last row has the totals. Counting
in quads and octets tells the compiler that every address is a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

BITS = (2, 3, 4, 8)
OCTETS = tl.constexpr(16)  # of a lane
LANES = tl.constexpr(128)  # of a span
SPAN = 16 * 128 * 8  # weights


@triton.jit
def load_quad(packed_ptr, quad: tl.constexpr):
    """Quad number `quad` of each lane: four int32 [LANES]."""
    at = (tl.arange(0, LANES) + quad * LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    even, odd = tl.split(tl.load(packed_ptr + at).reshape(LANES, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def store_octet(out_ptr, scale_ptr, zero_ptr, code, octet, end, GROUP: tl.constexpr):
    """Store scale * (code - zero) of the codes [LANES, 8] of octets `octet`, unless these are `end` or beyond."""
    live = octet < end
    group = octet // (GROUP // 8)
    scale = tl.load(scale_ptr + group, mask=live, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=live, other=0).to(tl.int32)
    weight = (code - zero[:, None]).to(tl.float32) * scale[:, None]
    at = octet[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def codes_of(word, BITS: tl.constexpr):
    """The 8 codes from the lowest bit of each word up, [LANES] -> [LANES, 8]; BITS is at most 4."""
    return word[:, None] >> (BITS * tl.arange(0, 8))[None, :] & ((1 << BITS) - 1)


@triton.jit
def expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, BITS: tl.constexpr, GROUP: tl.constexpr):
    """One span in 2, 4 or 8 bits: packed_ptr points at its quads, octet [LANES] is each lane's first."""
    PARTS: tl.constexpr = 4 // BITS  # octets of a word, with 8 bits none
    for quad in tl.static_range(BITS):
        words = load_quad(packed_ptr, quad)
        if BITS == 8:
            low_half = (tl.arange(0, 8) < 4)[None, :]
            for pair in tl.static_range(2):
                word = tl.where(low_half, words[2 * pair][:, None], words[2 * pair + 1][:, None])
                code = word >> (tl.arange(0, 8) % 4 * 8)[None, :] & 255
                mine = octet + (2 * quad + pair) * LANES
                store_octet(out_ptr, scale_ptr, zero_ptr, code, mine, end, GROUP)
        else:
            for part in tl.static_range(4 * PARTS):
                code = codes_of(words[part // PARTS] >> (part % PARTS * 16), BITS)
                mine = octet + (4 * PARTS * quad + part) * LANES
                store_octet(out_ptr, scale_ptr, zero_ptr, code, mine, end, GROUP)


@triton.jit
def store_four(out_ptr, scale_ptr, zero_ptr, first, second, third, octet, end, GROUP: tl.constexpr):
    """The four octets of 3 bits, 24 together, in three words: `octet` and those 128, 256 and 384 after it."""
    store_octet(out_ptr, scale_ptr, zero_ptr, codes_of(first, 3), octet, end, GROUP)
    code = codes_of((first >> 24 & 255) | second << 8, 3)
    store_octet(out_ptr, scale_ptr, zero_ptr, code, octet + LANES, end, GROUP)
    code = codes_of((second >> 16 & 65535) | third << 16, 3)
    store_octet(out_ptr, scale_ptr, zero_ptr, code, octet + 2 * LANES, end, GROUP)
    store_octet(out_ptr, scale_ptr, zero_ptr, codes_of(third >> 8, 3), octet + 3 * LANES, end, GROUP)


@triton.jit
def expand_three(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, GROUP: tl.constexpr):
    """One span in 3 bits."""
    a, b, c = load_quad(packed_ptr, 0), load_quad(packed_ptr, 1), load_quad(packed_ptr, 2)
    store_four(out_ptr, scale_ptr, zero_ptr, a[0], a[1], a[2], octet, end, GROUP)
    store_four(out_ptr, scale_ptr, zero_ptr, a[3], b[0], b[1], octet + 4 * LANES, end, GROUP)
    store_four(out_ptr, scale_ptr, zero_ptr, b[2], b[3], c[0], octet + 8 * LANES, end, GROUP)
    store_four(out_ptr, scale_ptr, zero_ptr, c[1], c[2], c[3], octet + 12 * LANES, end, GROUP)


@triton.jit
def dequantize_kernel(
    packed_ptr, table_ptr, scale_ptr, zero_ptr, out_ptr, layers, GROUP: tl.constexpr, LAYERS: tl.constexpr
):
    """One program: one span of one layer. LAYERS: a power of two, at least `layers`."""
    program = tl.program_id(0)
    candidate = tl.arange(0, LAYERS)
    first = tl.load(table_ptr + candidate * 4, mask=candidate < layers, other=2**31 - 1)
    row = table_ptr + (tl.sum((first <= program).to(tl.int32)) - 1) * 4
    span = program - tl.load(row)
    bits, end = tl.load(row + 3), tl.load(row + 4 + 2)
    octet = tl.load(row + 2) + span * (OCTETS * LANES) + tl.arange(0, LANES)
    packed_ptr += (tl.load(row + 1) + span * bits * LANES) * 4
    if bits == 2:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 2, GROUP)
    elif bits == 3:
        expand_three(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, GROUP)
    elif bits == 4:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 4, GROUP)
    else:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 8, GROUP)


def dequantize_layers(
    packed: Tensor, table: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The weights of all layers, one after the other, `[weights]`, in `dtype` or that of scale.

    packed      int32 `[words]` in the layout above, contiguous
    table       int64 `[layers + 1, 4]`, as above; bits 2, 3, 4 or 8. On the CPU, where it is checked
    scale       float16, bfloat16 or float32 `[weights / group_size]`, contiguous
    zero        uint8 of the same shape, contiguous
    group_size  a multiple of 8 that divides every layer

    Arithmetic is float32, rounded once. Raises ValueError or TypeError for anything else.
    """
    spans, octets = _checked(packed, table, scale, zero, group_size)
    dtype, layers = dtype or scale.dtype, len(table) - 1
    require(dtype in (torch.float16, torch.bfloat16, torch.float32), f"dtype must be a float of 16 or 32 bits: {dtype}")
    out = torch.empty(8 * octets, dtype=dtype, device=packed.device)
    meta = {"GROUP": group_size, "LAYERS": triton.next_power_of_2(layers), "num_warps": 4}
    dequantize_kernel[(spans,)](packed, table.to(packed.device), scale, zero, out, layers, **meta)
    return out


def _checked(packed: Tensor, table: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> tuple[int, int]:
    """Spans and octets of all layers, or the error that `dequantize_layers` promises."""
    require_dtype((torch.int64,), table=table)
    require(group_size > 0 and group_size % 8 == 0, f"group_size must be a multiple of 8, got {group_size}")
    _check_table(table, group_size)
    spans, quads, octets, _ = table[-1].tolist()
    require(packed.numel() == 4 * quads, f"packed must have the {4 * quads} words of table, got {packed.numel()}")
    groups = 8 * octets // group_size
    require(
        scale.numel() == zero.numel() == groups,
        f"scale and zero must have {groups} groups, got {scale.numel()} and {zero.numel()}",
    )
    require_dtype((torch.int32,), packed=packed)
    require_dtype((torch.float16, torch.bfloat16, torch.float32), scale=scale)
    require_dtype((torch.uint8,), zero=zero)
    require_contiguous(packed=packed, table=table, scale=scale, zero=zero)
    require_launchable(packed=packed, scale=scale, zero=zero)
    return spans, octets


def _check_table(table: Tensor, group_size: int) -> None:
    """Raise ValueError unless each row follows from the one before: nothing else keeps programs inside the buffers."""
    require(
        table.dim() == 2 and len(table) > 1 and table.shape[1] == 4,
        f"table must be [layers + 1, 4] with a layer at least, got {tuple(table.shape)}",
    )
    require(table.device.type == "cpu", f"table must be on the CPU, got {table.device}")
    rows = table.tolist()
    require(rows[0][:3] == [0, 0, 0], f"table must begin with zeros, got {rows[0]}")
    for at, ((spans, quads, octets, bits), after) in enumerate(pairwise(rows)):
        count, whole = after[2] - octets, -(-(after[2] - octets) * 8 // SPAN)
        require(bits in BITS, f"table: bits of layer {at} must be one of {BITS}, got {bits}")
        require(
            count > 0 and 8 * count % group_size == 0 and after[:2] == [spans + whole, quads + whole * bits * 128],
            f"table: layer {at} does not have whole groups of {group_size}, and a span of 128 bits quads per 16384",
        )


def by_torch(packed: Tensor, table: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """`dequantize_layers` by plain torch operators, a layer at a time."""
    out = torch.empty(int(table[-1, 2]) * 8, dtype=scale.dtype, device=packed.device)
    rows = table.tolist()
    for (_, first, begin, bits), (_, last, end, _) in pairwise(rows):
        lanes = packed[4 * first : 4 * last].view(torch.uint8).view(-1, bits, 128, 16).transpose(1, 2)
        streams = lanes.reshape(-1, 128, 16 * bits, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
        codes = (streams.view(-1, 128, 16, 8, bits) << places).sum(-1, dtype=torch.uint8)
        codes = codes.transpose(1, 2).flatten()[: 8 * (end - begin)].view(-1, group_size)
        group = slice(8 * begin // group_size, 8 * end // group_size)
        values = (codes.float() - zero[group, None]) * scale[group, None].float()
        out[8 * begin : 8 * end] = values.flatten().to(scale.dtype)
    return out


def make_table(sizes: Sequence[int], bits: Sequence[int]) -> Tensor:
    """The table of layers of these numbers of weights, multiples of 8."""
    rows = [[0, 0, 0, 0]]
    for size, width in zip(sizes, bits, strict=True):
        spans, quads, octets, _ = rows[-1]
        whole = triton.cdiv(size, SPAN)
        rows[-1][3] = width
        rows.append([spans + whole, quads + whole * width * 128, octets + size // 8, 0])
    return torch.tensor(rows)


def arguments(sizes: Sequence[int], bits: Sequence[int], group_size: int, device: torch.device) -> tuple:
    """Random contents on a GPU, none elsewhere."""
    table = make_table(sizes, bits)
    packed = torch.empty(4 * int(table[-1, 1]), dtype=torch.int32, device=device)
    scale = torch.empty(sum(sizes) // group_size, dtype=torch.bfloat16, device=device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        packed.random_(-(2**31), 2**31)
        scale.uniform_(0.001, 0.01)
        zero.random_(0, 4)
    return packed, table, scale, zero, group_size


def llama_case(bits: Sequence[int], group_size: int = 128) -> Case:
    """The seven layers of a block of Llama-8B: query, key, value, output, gate, up, down."""
    sizes = [4096 * rows for rows in (4096, 1024, 1024, 4096, 14336, 14336, 14336)]
    grids = 3 * sum(sizes) // group_size
    return Case(
        name=f"Llama-8B block, bits {' '.join(map(str, bits))}",
        inputs=lambda device: arguments(sizes, bits, group_size, device),
        run=dequantize_layers,
        expected=by_torch,
        bytes=sum(size * width // 8 + 2 * size for size, width in zip(sizes, bits, strict=True)) + grids,
        operations=0,
        kind="stream",
        peers={"torch": by_torch},
    )


CASES = [llama_case([3, 2, 8, 4, 2, 2, 4]), llama_case([4] * 7), llama_case([3] * 7)]
