"""Sparse QKV in Triton: multiplicative layer and three convolutions in one launch, with nothing stored between them.

With e bytes a number, N = B T tokens, d inputs, S modules of M channels, F taps, P = d (S + M) + 7 F M² weights:
    operations   N (d S (1 + 2 M) + 14 F S M²)       of a dense projection to q, k and v: 6 N d S M
    floor        e (N d + 3 N S M + P)               x in, q, k, v out, weights; and 2 e B (F − 1) S M of states
Replaces one operator after the other: the gated inputs, S times as large as x, are written and read where each module
makes them, z is written once and read by three convolutions: 2 e N S d + 4 e N S M more. Here z never leaves the chip,
but for the last F − 1 rows of a sequence: the next call needs them. Dense weights are 3 e d S M bytes, and a decoding
step is bound by reading them: for Llama-7B 101 MB where P takes 2.

`prefill_kernel`  one program: ROWS rows of a sequence, of which the first F − 1 are the halo and belong to the tile
                  before, and GROUP modules. It walks along these, and at module s holds z of s − 1, s and s + 1. Each z
                  is made once, but for the two modules beside the group ((GROUP + 2) / GROUP times) and the halo (ROWS
                  / (ROWS − F + 1) times). A tap moves z down by up to F − 1 rows: `tl.gather`, in shared memory. A
                  product with a matrix of ones would do it, too, but carry a NaN to earlier tokens.
`step_kernel`     one program: one module, for ROWS sequences with one new token each. z of s − 1, s and s + 1 come from
                  one walk over x and the shared matrix, since only the gates differ. Earlier taps are read from the
                  states. z is made three times: three products for each tile of E that is loaded.
Both gate on x's side, (x ⊙ D[s]) @ E, in the dtype of x: E serves all modules as it lies. z is rounded to that dtype
once, as if it had been stored. Sums are float32.
Not yet good  A prefill's program reads its rows of x and all of E for every module, from the L2 cache: 2 d (ROWS + M) S
              bytes for ROWS tokens, 1.3 MB a module for Llama-7B. That bounds it, not memory and not arithmetic. Two
              modules for each walk, or 64 rows, would halve it, but spill registers. A decoding step has S programs,
              each of which reads all of E, 1 MB: 32 of 132 multiprocessors wait for their share of the L2 cache, not
              for memory. Modules as rows of one product, cut along d, would read E once, but take a second launch.

Layout: x [B, T, d]; gates [S, d]; shared [d, M]; kernels [F, 3, M, M] for q and k, [F, 1, M, M] for v, taps in the
order of time, in to out; past, state [B, F − 1, S M]; q, k, v [B, T, S M]. Offsets are int64.
Method: Jaszczur et al. 2021, arXiv:2111.12763, section 3.2. Peers: torch, a product for each module and conv2d; one
product with the weight that gates and E stand for, d S M numbers, and conv2d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
STAGES = tl.constexpr(3)  # matrices of a convolution that are on their way while one is multiplied
WIDTHS = (3, 3, 1)  # modules that the kernels of q, k and v span


@triton.jit
def gate_of(gates, module, column, d, modules):
    """A module's gates for the inputs `column` [1, BLOCK]; zeros past d, and for modules outside 0 .. modules − 1."""
    inside = (column < d) & (module >= 0) & (module < modules)
    return tl.load(gates + module * d + column, mask=inside, other=0.0)


@triton.jit
def gated_products(x_row, live, gates, shared, module, d, modules, M: tl.constexpr, CHANNELS: tl.constexpr,
                   BLOCK: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """z of `module` and, with COUNT 3, of the two after it: (x ⊙ gates[s]) @ shared, [ROWS, CHANNELS] float32 each.

    x_row [ROWS, 1] points at rows of d inputs. Rows that are not `live` [ROWS, 1], channels from M on and modules
    outside 0 .. modules − 1 give zeros. The gated inputs are in the dtype of x. CHANNELS is M padded to a power of two;
    d need not fill blocks of BLOCK. One walk over x and shared serves them all.
    """
    channel = tl.arange(0, CHANNELS)[None, :]
    first = tl.zeros((x_row.shape[0], CHANNELS), tl.float32)
    second, third = first, first
    for start in range(0, d, BLOCK):
        column, line = start + tl.arange(0, BLOCK)[None, :], start + tl.arange(0, BLOCK)[:, None]
        x = tl.load(x_row + column, mask=live & (column < d), other=0.0)
        tile = tl.load(shared + line * M + channel, mask=(line < d) & (channel < M), other=0.0)
        first = tl.dot(x * gate_of(gates, module, column, d, modules), tile, first, input_precision="ieee")
        if COUNT == 3:
            second = tl.dot(x * gate_of(gates, module + 1, column, d, modules), tile, second, input_precision="ieee")
            third = tl.dot(x * gate_of(gates, module + 2, column, d, modules), tile, third, input_precision="ieee")
    return first, second, third


@triton.jit
def tap_matrix(kernel, at, M: tl.constexpr, CHANNELS: tl.constexpr):
    """Matrix number `at` of a convolution's kernel, [CHANNELS, CHANNELS], in to out, padded with zeros."""
    line, channel = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (line < M) & (channel < M)
    return tl.load(kernel + at * M * M + line * M + channel, mask=inside, other=0.0)


@triton.jit
def moved(z, by):
    """Row t is row t − by of z [ROWS, CHANNELS], by >= 0; the first rows, of the halo, are row 0."""
    source = tl.maximum(tl.arange(0, z.shape[0])[:, None] - by, 0)
    return tl.gather(z, tl.broadcast_to(source, z.shape), 0)


@triton.jit
def convolved(left, here, right, kernel, taps, WIDTH: tl.constexpr, M: tl.constexpr):
    """One of q, k and v, [ROWS, CHANNELS], of the module `here`, in its dtype; with WIDTH 1 it hears no other."""
    CHANNELS: tl.constexpr = here.shape[1]
    acc = tl.zeros(here.shape, tl.float32)
    for at in tl.range(0, taps * WIDTH, num_stages=STAGES):
        side = at % WIDTH - WIDTH // 2
        z = tl.where(side == 0, here, tl.where(side < 0, left, right))
        matrix = tap_matrix(kernel, at, M, CHANNELS)
        acc = tl.dot(moved(z, taps - 1 - at // WIDTH), matrix, acc, input_precision="ieee")
    return acc.to(here.dtype)


@triton.jit
def tile_of(module, x_row, live, gates, shared, past_row, early, d, modules, M: tl.constexpr, CHANNELS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """A module's z in the dtype of x: computed in rows that are `live`, read from the past in `early` ones, else 0."""
    z, _, _ = gated_products(x_row, live, gates, shared, module, d, modules, M, CHANNELS, BLOCK, 1)
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = early & (channel < M) & (module >= 0) & (module < modules)
    before = tl.load(past_row + module * M + channel, mask=inside, other=0.0)
    return z.to(before.dtype) + before  # one of the two is 0


@triton.jit
def prefill_kernel(
    x, gates, shared, q_kernel, k_kernel, v_kernel, past, q, k, v, state, T, taps, d, modules, groups,
    M: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: rows of one tile of a sequence, the halo first, and GROUP modules; see the top of the file.

    taps is TAPS; as a number that the compiler does not know it keeps loops from being unrolled.
    """
    HALO: tl.constexpr = TAPS - 1
    sequence, tile = tl.program_id(1).to(tl.int64), tl.program_id(0) // groups
    first, channel = tl.program_id(0) % groups * GROUP, tl.arange(0, CHANNELS)[None, :]
    time = (tile * (ROWS - HALO) - HALO + tl.arange(0, ROWS))[:, None]
    early, live = time < 0, (time >= 0) & (time < T)
    x_row = x + (sequence * T + time) * d
    past_row = past + (sequence * HALO + time + HALO) * (modules * M)
    ours = live & (time >= tile * (ROWS - HALO)) & (channel < M)  # without the halo
    last = (time >= T - HALO) & (time < T) & (channel < M) & ((tile + 1) * (ROWS - HALO) >= T)
    left = tl.zeros((ROWS, CHANNELS), x.dtype.element_ty)
    here = left
    for module in range(first - 2, tl.minimum(first + GROUP, modules)):  # the first two rounds only fill left and here
        right = tile_of(module + 1, x_row, live, gates, shared, past_row, early, d, modules, M, CHANNELS, BLOCK)
        if module >= first:
            out = ((sequence * T + time) * modules + module) * M + channel
            tl.store(q + out, convolved(left, here, right, q_kernel, taps, 3, M), mask=ours)
            tl.store(k + out, convolved(left, here, right, k_kernel, taps, 3, M), mask=ours)
            tl.store(v + out, convolved(left, here, right, v_kernel, taps, 1, M), mask=ours)
            kept = ((sequence * HALO + time - (T - HALO)) * modules + module) * M + channel
            tl.store(state + kept, here, mask=last)
        left, here = here, right


@triton.jit
def add_tap(z, tap, SIDE: tl.constexpr, q_kernel, k_kernel, v_kernel, q, k, v, M: tl.constexpr):
    """Add what z [ROWS, CHANNELS], of tap `tap` and side 0 (left), 1 or 2 (right), gives to the sums q, k and v.

    v spans one module: it hears side 1 only.
    """
    CHANNELS: tl.constexpr = z.shape[1]
    q = tl.dot(z, tap_matrix(q_kernel, 3 * tap + SIDE, M, CHANNELS), q, input_precision="ieee")
    k = tl.dot(z, tap_matrix(k_kernel, 3 * tap + SIDE, M, CHANNELS), k, input_precision="ieee")
    if SIDE == 1:
        v = tl.dot(z, tap_matrix(v_kernel, tap, M, CHANNELS), v, input_precision="ieee")
    return q, k, v


@triton.jit
def step_kernel(
    x, gates, shared, q_kernel, k_kernel, v_kernel, past, q, k, v, state, B, d, modules,
    M: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One new token of ROWS sequences, in one module: q, k, v [B, S M] from x [B, d] and past [B, TAPS − 1, S M].

    state is past moved up by one row, with the new z as its last. Modules outside 0 .. S − 1 count as zeros, at every
    tap. z is rounded to the dtype of x before it is multiplied; neither B, d nor M need fill a tile.
    """
    HALO: tl.constexpr = TAPS - 1
    dtype: tl.constexpr = x.dtype.element_ty
    module = tl.program_id(0)
    row, channel = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, CHANNELS)[None, :]
    live = row < B
    z = gated_products(x + row * d, live, gates, shared, module - 1, d, modules, M, CHANNELS, BLOCK, 3)
    q_acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    k_acc, v_acc = q_acc, q_acc
    at, inside = (row * HALO * modules + module) * M + channel, live & (channel < M)
    for side in tl.static_range(3):
        known = inside & (module + side >= 1) & (module + side <= modules)
        for tap in tl.static_range(HALO):
            before = tl.load(past + at + (tap * modules + side - 1) * M, mask=known, other=0.0)
            q_acc, k_acc, v_acc = add_tap(before, tap, side, q_kernel, k_kernel, v_kernel, q_acc, k_acc, v_acc, M)
            if side == 1 and tap > 0:
                tl.store(state + at + (tap - 1) * modules * M, before, mask=inside)
        new = z[side].to(dtype)
        q_acc, k_acc, v_acc = add_tap(new, HALO, side, q_kernel, k_kernel, v_kernel, q_acc, k_acc, v_acc, M)
        if side == 1 and HALO > 0:
            tl.store(state + at + (HALO - 1) * modules * M, new, mask=inside)
    out = (row * modules + module) * M + channel
    tl.store(q + out, q_acc.to(dtype), mask=inside)
    tl.store(k + out, k_acc.to(dtype), mask=inside)
    tl.store(v + out, v_acc.to(dtype), mask=inside)


def sparse_qkv(
    x: Tensor, gates: Tensor, shared: Tensor, q_kernel: Tensor, k_kernel: Tensor, v_kernel: Tensor,
    past: Tensor | None = None, rows: int | None = None, group: int = 16, block: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v `[B, T, S M]`, and the state `[B, F − 1, S M]` that the next call takes as its `past` (None: zeros).

    x `[B, T, d]`, gates `[S, d]`, shared `[d, M]`, q_kernel and k_kernel `[F, 3, M, M]`, v_kernel `[F, 1, M, M]`, all
    contiguous and of one dtype of float16, bfloat16 and float32. T = 1 is a decoding step, its rows are sequences. rows
    (at least F), group and block set the tile; rows and block are powers of two from 16.
    Raises ValueError for shapes that do not fit together and for tiles that cannot be, TypeError for the dtypes.
    """
    B, T, d, S, M, taps = check_operands(x, gates, shared, (q_kernel, k_kernel, v_kernel), past)
    rows = (16 if T == 1 else 32) if rows is None else rows
    powers = all(size >= 16 and size & (size - 1) == 0 for size in (rows, block))
    require(powers and rows >= taps and group >= 1, f"no tile: {rows=}, {group=}, {block=} with {taps} taps")
    past = x.new_zeros(B, taps - 1, S * M) if past is None else past
    q, k, v = (torch.empty(B, T, S * M, dtype=x.dtype, device=x.device) for _ in range(3))
    state = torch.empty(B, taps - 1, S * M, dtype=x.dtype, device=x.device)
    operands = (x, gates, shared, q_kernel, k_kernel, v_kernel, past, q, k, v, state)
    tile = {"M": M, "CHANNELS": max(16, triton.next_power_of_2(M)), "TAPS": taps, "ROWS": rows, "BLOCK": block}
    if T == 1:
        step_kernel[(S, triton.cdiv(B, rows))](*operands, B, d, S, **tile, num_warps=8 if M > 64 else 4)
    else:
        groups = triton.cdiv(S, group)
        grid = (triton.cdiv(T, rows - taps + 1) * groups, B)
        prefill_kernel[grid](*operands, T, taps, d, S, groups, GROUP=group, **tile, num_warps=8)
    return q, k, v, state


def check_operands(
    x: Tensor, gates: Tensor, shared: Tensor, kernels: tuple[Tensor, ...], past: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """(B, T, d, S, M, F), or the error that `sparse_qkv` promises."""
    fit = x.dim() == 3 and gates.dim() == shared.dim() == 2 and x.shape[2] == gates.shape[1] == shared.shape[0]
    shapes = f"{tuple(x.shape)}, {tuple(gates.shape)}, {tuple(shared.shape)}"
    require(fit and 0 not in (*x.shape, *gates.shape, *shared.shape), f"need x [B, T, d], gates, shared; got {shapes}")
    (B, T, d), S, M, taps = x.shape, len(gates), shared.shape[1], len(kernels[0])
    tensors = {"x": x, "gates": gates, "shared": shared}
    for name, kernel, width in zip("qkv", kernels, WIDTHS, strict=True):
        wanted = (taps, width, M, M)
        require(kernel.shape == wanted and taps > 0, f"{name}_kernel must be {wanted}, got {tuple(kernel.shape)}")
        tensors[f"{name}_kernel"] = kernel
    if past is not None:
        wanted = (B, taps - 1, S * M)
        require(past.shape == wanted, f"past must be {wanted}, got {tuple(past.shape)}")
        tensors["past"] = past
    require_dtype(FLOATS, x=x)
    require_dtype((x.dtype,), **tensors)
    require_contiguous(**tensors)
    require_launchable(**tensors)
    return B, T, d, S, M, taps


def weight_count(d: int, modules: int, channels: int, taps: int = 3) -> int:
    """P of the file's docstring."""
    return d * (modules + channels) + sum(WIDTHS) * taps * channels**2


def floor_bytes(sequences: int, length: int, d: int, modules: int, channels: int, taps: int = 3) -> int:
    """x, weights and past read once, q, k, v and state written once, in 16 bits."""
    rows = sequences * (length * (d + 3 * modules * channels) + 2 * (taps - 1) * modules * channels)
    return 2 * (rows + weight_count(d, modules, channels, taps))


def by_torch(x: Tensor, gates: Tensor, shared: Tensor, q_kernel: Tensor, k_kernel: Tensor, v_kernel: Tensor,
             past: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """`sparse_qkv` by plain torch operators; the gated inputs of one module at a time are held."""
    z = torch.cat([(x * gate) @ shared for gate in gates], dim=2)
    return convolved_by_torch(z, q_kernel, k_kernel, v_kernel, past)


def convolved_by_torch(
    z: Tensor, q_kernel: Tensor, k_kernel: Tensor, v_kernel: Tensor, past: Tensor | None
) -> tuple[Tensor, ...]:
    """q, k, v and state from z `[B, T, S M]`, by conv2d on modules as columns of an image."""
    M, taps = q_kernel.shape[-1], len(q_kernel)
    rows = torch.cat((z.new_zeros(len(z), taps - 1, z.shape[2]) if past is None else past, z), dim=1)
    image = rows.unflatten(2, (-1, M)).permute(0, 3, 1, 2)
    made = (
        F.conv2d(image, w.permute(3, 2, 0, 1), padding=(0, w.shape[1] // 2)) for w in (q_kernel, k_kernel, v_kernel)
    )
    return *(y.permute(0, 2, 3, 1).flatten(2) for y in made), rows[:, z.shape[1] :]


def by_dense_weight(x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """`by_torch` with one product for all modules."""
    return convolved_by_torch(x @ weight, *rest)


def with_dense_weight(x: Tensor, gates: Tensor, shared: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Arguments of `by_dense_weight`: the weight `[d, S M]` made once, rounded like its factors."""
    return x, (gates.T[:, :, None] * shared[:, None]).flatten(1), *rest


def llama_case(name: str, sequences: int, length: int, d: int, modules: int, channels: int, taps: int = 3) -> Case:
    """Projections of a Llama layer in bfloat16, a module for each head of 128 channels; one token: a decoding step."""

    def inputs(device: torch.device) -> tuple:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return made.normal_(std=scale) if device.type == "cuda" else made

        kernels = [normal(taps, w, channels, channels, scale=(taps * w * channels) ** -0.5) for w in WIDTHS]
        weights = normal(modules, d), normal(d, channels, scale=d**-0.5), *kernels
        return normal(sequences, length, d), *weights, normal(sequences, taps - 1, modules * channels)

    return Case(
        name=name,
        inputs=inputs,
        run=sparse_qkv,
        expected=lambda *operands: by_torch(*(x.float() for x in operands)),
        bytes=floor_bytes(sequences, length, d, modules, channels, taps),
        operations=sequences * length * modules * (d * (1 + 2 * channels) + 2 * sum(WIDTHS) * taps * channels**2),
        kind="matrix",
        peers={"products and conv2d": by_torch, "dense weight and conv2d": by_dense_weight},
        prepare={"dense weight and conv2d": with_dense_weight},
    )


CASES = [
    llama_case("7B, prefill 4 x 2048", 4, 2048, 4096, 32, 128),
    llama_case("7B, prefill 1 x 512", 1, 512, 4096, 32, 128),
    llama_case("7B, decode 1 sequence", 1, 1, 4096, 32, 128),
    llama_case("7B, decode 64 sequences", 64, 1, 4096, 32, 128),
    llama_case("7B, 64 modules, decode 64 sequences", 64, 1, 4096, 64, 64),
]
