"""Routing in Triton: softmax, the k best experts, and every token's place in the line of each, in one launch.

Fused: the gates, the choice, the count of who stands before whom, dropping and renormalising. The count is what makes
this hard: a token's place depends on all tokens before it, and its second choice on the first choices of all tokens
after it, too. So the grid has two halves. A program of the first half takes BLOCK tokens, stores their experts and
gates, and how many went to each expert; one of the second half waits until all of the first are done, adds what they
counted, and stores places and weights for its own BLOCK tokens. Who is which is decided by a ticket that each program
draws when it starts: those that are waited for have started, so the wait ends, however few fit on the GPU at a time.
No sum depends on who comes first: the same bits always, those of first come, first served.

With T tokens, E experts, k choices, e bytes a logit and B = T / BLOCK programs in each half:
    floor       e T E + 12 T k + 4 E bytes: logits in; int32 expert and slot, float32 weight and load out
    moved       12 T k more, as experts and gates are read again and weights written over them, and 4 B (B + 1) k E of
                counts, nearly all in L2: 0.07 MB for T = 4096, E = 8, k = 2, where B is 32; but 135 MB, 30 times the
                floor, for E = 256, k = 8, where it is 128
    operations  a few for each of T E logits: it waits for memory, and for its first half
Replaces softmax, topk, and for each choice one_hot, cumsum and a masked sum: about 10 k launches that write and read
int64 matrices [T, E], 8 bytes an element: over 32 T E k bytes. Before the launch, 8 bytes are set to 0.

Layout: logits [T, E] float32, float16 or bfloat16, row-major; E up to 256, k up to 16. All is computed in float32.
Method: Fedus et al. 2021, arXiv:2101.03961, section 2.2; the ticket: Merrill and Garland 2016, single-pass scans.
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
MOST_EXPERTS, MOST_CHOICES = 256, 16
RENORMALISE = ("never", "before", "after")


@triton.jit
def choose_block(
    scores, token, live, expert, weight, counts, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr
):
    """Store the K best experts of each token and their gates, and count how many tokens of the block chose each.

    scores [BLOCK, WIDTH] float32, -inf in the columns beyond EXPERTS; token [BLOCK] their numbers, live which of them
    exist. Goes to expert and weight [tokens, K], best first, of equal scores the lower expert, and to counts [K, WIDTH]
    int32. The gate is softmax over all EXPERTS. A token with a score that is not finite gets experts 0 .. K - 1 and
    gates of NaN.
    """
    column = tl.arange(0, WIDTH)[None, :]
    usable = (tl.abs(scores) < float("inf")) | (column >= EXPERTS)  # false for NaN, too
    sound = tl.min(usable.to(tl.int32), axis=1) == 1
    scores = tl.where(sound[:, None] | (column >= EXPERTS), scores, 0.0)
    largest = tl.max(scores, axis=1)
    total = tl.sum(tl.exp(scores - largest[:, None]), axis=1)
    for j in tl.static_range(K):
        best, which = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        gate = tl.where(sound, tl.exp(best - largest) / total, float("nan"))
        tl.store(expert + token * K + j, which, mask=live)
        tl.store(weight + token * K + j, gate, mask=live)
        chosen = which[:, None] == column
        tl.store(counts + j * WIDTH + tl.arange(0, WIDTH), tl.sum((chosen & live[:, None]).to(tl.int32), axis=0))
        scores = tl.where(chosen, float("-inf"), scores)


@triton.jit
def add_counts(counts, block, blocks, j, K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """From counts [blocks, K, WIDTH]: how many chose each expert as choice j before this block, and in all; [WIDTH]."""
    before = tl.zeros((CHUNK, WIDTH), tl.int32)  # added up once, at the end: in the loop, warps would have to meet
    total = tl.zeros((CHUNK, WIDTH), tl.int32)
    for start in range(0, blocks, CHUNK):
        other = start + tl.arange(0, CHUNK)
        place = (other[:, None] * K + j) * WIDTH + tl.arange(0, WIDTH)[None, :]
        found = tl.load(counts + place, mask=(other < blocks)[:, None], other=0, cache_modifier=".cg")
        before += tl.where((other < block)[:, None], found, 0)
        total += found
    return tl.sum(before, axis=0), tl.sum(total, axis=0)


@triton.jit
def place_block(
    which, live, counts, block, blocks, load, EXPERTS: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Places [BLOCK, CHOICES] int32 of a block's choices `which`, of which K columns and the rows in `live` exist.

    A place is the number of choices of the same expert that come before: by choice, all choices j' < j of all tokens
    and choice j of the tokens before; by token, all choices of the tokens before. counts [blocks, K, WIDTH] says how
    many there are in each block. Block 0 also stores load [EXPERTS], how often each was chosen.
    """
    expert, choice = tl.arange(0, WIDTH), tl.arange(0, CHOICES)[None, :]
    ahead = tl.zeros((WIDTH,), tl.int32)  # places that are taken before this block and, by choice, before choice j
    inside = tl.zeros((BLOCK, WIDTH), tl.int32)  # by token: what the block's tokens chose
    everyone = tl.zeros((WIDTH,), tl.int32)
    places = tl.zeros((BLOCK, CHOICES), tl.int32)
    for j in tl.static_range(K):
        before, total = add_counts(counts, block, blocks, j, K, WIDTH, CHUNK)
        mine = tl.sum(tl.where(choice == j, which, 0), axis=1)
        chosen = ((mine[:, None] == expert[None, :]) & live[:, None]).to(tl.int32)
        if BY_CHOICE:
            rank = tl.cumsum(chosen, axis=0) - chosen + (ahead + before)[None, :]
            places = tl.where(choice == j, tl.sum(chosen * rank, axis=1)[:, None], places)
            ahead += total
        else:
            ahead += before
            inside += chosen
        everyone += total
    if not BY_CHOICE:
        rank = tl.cumsum(inside, axis=0) - inside + ahead[None, :]
        for j in tl.static_range(K):
            mine = tl.sum(tl.where(choice == j, which, 0), axis=1)
            chosen = mine[:, None] == expert[None, :]
            places = tl.where(choice == j, tl.sum(tl.where(chosen, rank, 0), axis=1)[:, None], places)
    if block == 0:
        tl.store(load + expert, everyone, mask=expert < EXPERTS)
    return places


@triton.jit
def weigh_block(gate, places, real, capacity, RENORMALISE: tl.constexpr):
    """Weights [BLOCK, CHOICES] from gates: 0 where not `real` or where places >= capacity; NaN stays, even if dropped.

    RENORMALISE 0: the gates as they are; 1: over the sum of all real ones of the token; 2: over that of the kept ones.
    A sum of 0 divides nothing.
    """
    kept = real & (places < capacity)
    if RENORMALISE > 0:
        counted = kept if RENORMALISE == 2 else real
        total = tl.sum(tl.where(counted, gate, 0.0), axis=1)
        gate = gate / tl.where(total > 0, total, 1.0)[:, None]
    return tl.where(kept | (gate != gate), gate, 0.0)


@triton.jit
def route_kernel(
    logits, noise, arrival, expert, weight, slot, load, counts, state, tokens, capacity, blocks,
    EXPERTS: tl.constexpr, K: tl.constexpr, BY_CHOICE: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Two programs for each block of tokens, told apart by the ticket that they draw from state[0].

    noise and arrival may be None. state[1] counts the blocks of the first half that are done. A token that arrival
    names outside 0 .. tokens - 1 is left out.
    """
    ticket = tl.atomic_add(state, 1)
    block = tl.where(ticket < blocks, ticket, ticket - blocks)
    token = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    live = token < tokens
    if arrival is not None:
        token = tl.load(arrival + token, mask=live, other=0).to(tl.int64)
        live = live & (token >= 0) & (token < tokens)
    if ticket < blocks:
        column = tl.arange(0, WIDTH)[None, :]
        inside = live[:, None] & (column < EXPERTS)
        scores = tl.load(logits + token[:, None] * EXPERTS + column, mask=inside, other=0.0).to(tl.float32)
        if noise is not None:
            scores += tl.load(noise + token[:, None] * EXPERTS + column, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(column < EXPERTS, scores, float("-inf"))
        choose_block(scores, token, live, expert, weight, counts + block * (K * WIDTH), EXPERTS, K, WIDTH)
        tl.debug_barrier()  # all that the block's threads stored comes before the count that tells of it
        tl.atomic_add(state + 1, 1, sem="release")
    else:
        done = tl.atomic_add(state + 1, 0, sem="acquire")
        while done < blocks:
            done = tl.atomic_add(state + 1, 0, sem="acquire")
        choice = tl.arange(0, CHOICES)[None, :]
        real = live[:, None] & (choice < K)
        at = token[:, None] * K + choice
        which = tl.load(expert + at, mask=real, other=0, cache_modifier=".cg")
        gate = tl.load(weight + at, mask=real, other=0.0, cache_modifier=".cg")
        places = place_block(
            which, live, counts, block, blocks, load, EXPERTS, K, BY_CHOICE, BLOCK, WIDTH, CHOICES, CHUNK
        )
        tl.store(slot + at, places, mask=real)
        tl.store(weight + at, weigh_block(gate, places, real, capacity, RENORMALISE), mask=real)


def route(
    logits: Tensor, k: int, capacity: int | None = None, renormalise: str = "never", noise: Tensor | None = None,
    by: str = "choice", arrival: Tensor | None = None, block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(expert, weight, slot, load) of the chapter's `route`: [T, k] int32, float32 and int32, and [E] int32.

    logits [T, E] and noise, if any, of the same shape and one of the same dtypes; arrival int64 [T], a permutation,
    which is not checked. capacity None: T. A choice is dropped, and its weight 0, where slot >= capacity. A token whose
    logits are not finite gets the experts 0 .. k - 1 and weights of NaN, also where it is dropped, so that it is seen.
    `block` sets the tokens of a program. Raises ValueError for the shapes, k, capacity and the two words, TypeError for
    the dtypes.
    """
    require(logits.dim() == 2 and logits.numel() > 0, f"logits must be [T, E], not empty, got {tuple(logits.shape)}")
    tokens, experts = logits.shape
    places = tokens if capacity is None else capacity
    check_arguments(experts, k, places, renormalise, by)
    check_tensors(logits, noise, arrival)
    width, choices = max(2, triton.next_power_of_2(experts)), triton.next_power_of_2(k)
    rows = block or max(32, min(128, 4096 // width))
    blocks = triton.cdiv(tokens, rows)
    made = {"dtype": torch.int32, "device": logits.device}
    expert, slot, load = torch.empty(tokens, k, **made), torch.empty(tokens, k, **made), torch.empty(experts, **made)
    weight = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    counts, state = torch.empty(blocks, k, width, **made), torch.zeros(2, **made)
    route_kernel[(2 * blocks,)](
        logits, noise, arrival, expert, weight, slot, load, counts, state, tokens, places, blocks,
        EXPERTS=experts, K=k, BY_CHOICE=by == "choice", RENORMALISE=RENORMALISE.index(renormalise),
        BLOCK=rows, WIDTH=width, CHOICES=choices, CHUNK=(512 if width <= 64 else 2048) // width,
        num_warps=8 if width > 32 else 4,
    )  # fmt: skip
    return expert, weight, slot, load


def check_arguments(experts: int, k: int, places: int, renormalise: str, by: str) -> None:
    """Refuse numbers and words that `route` cannot serve."""
    require(experts <= MOST_EXPERTS, f"logits must be of {MOST_EXPERTS} experts at most, got {experts}")
    most = min(experts, MOST_CHOICES)
    require(1 <= k <= most, f"k must be from 1 to {most} for {experts} experts, got {k}")
    require(places >= 1, f"capacity must be at least 1 or None, got {places}")
    require(renormalise in RENORMALISE, f"renormalise must be one of {', '.join(RENORMALISE)}, got {renormalise!r}")
    require(by in ("choice", "token"), f'by must be "choice" or "token", got {by!r}')


def check_tensors(logits: Tensor, noise: Tensor | None, arrival: Tensor | None) -> None:
    """Refuse tensors that `route` cannot read."""
    given = {"logits": logits}
    if noise is not None:
        require(noise.shape == logits.shape, f"noise must be {tuple(logits.shape)}, got {tuple(noise.shape)}")
        given["noise"] = noise
    require_dtype(DTYPES, **given)
    if arrival is not None:
        require(arrival.shape == logits.shape[:1], f"arrival must be [{len(logits)}], got {tuple(arrival.shape)}")
        require_dtype((torch.int64,), arrival=arrival)
        given["arrival"] = arrival
    require_contiguous(**given)
    require_launchable(**given)


def torch_route(logits: Tensor, k: int, capacity: int, renormalise: str = "never") -> tuple[Tensor, ...]:
    """`route` by choice in plain torch operators, as MoE code has it: one-hot matrices and sums along them."""
    gates = logits.float().softmax(1)
    expert = logits.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    taken, slots = torch.zeros(1, logits.shape[1], dtype=torch.int64, device=logits.device), []
    for chosen in expert.unbind(1):
        hot = F.one_hot(chosen, logits.shape[1])
        slots.append(((hot.cumsum(0) - 1 + taken) * hot).sum(1))
        taken = taken + hot.sum(0, keepdim=True)
    slot, weight = torch.stack(slots, 1), gates.gather(1, expert)
    if renormalise == "before":
        weight = weight / weight.sum(1, keepdim=True)
    return expert.int(), weight * (slot < capacity), slot.int(), taken[0].int()


def case(name: str, tokens: int, experts: int, k: int, dtype: torch.dtype, renormalise: str = "never") -> Case:
    """Routing of `tokens` tokens at capacity factor 1.25."""

    def inputs(device: torch.device) -> tuple:
        made = torch.empty(tokens, experts, dtype=dtype, device=device)
        logits = made.normal_() if device.type == "cuda" else made
        return logits, k, round(1.25 * k * tokens / experts), renormalise

    return Case(
        name=f"{name}: T={tokens} E={experts} k={k}",
        inputs=inputs,
        run=route,
        expected=torch_route,
        bytes=tokens * experts * dtype.itemsize + 12 * tokens * k + 4 * experts,
        operations=0,
        kind="stream",
        narrow_stores="k numbers for each of 32 to 128 tokens: one or two for a thread",
        peers={"torch, one-hot": torch_route},
    )


CASES = [
    case("Mixtral", 4096, 8, 2, torch.bfloat16, "before"),
    case("Mixtral, float32", 16384, 8, 2, torch.float32, "before"),
    case("Switch", 8192, 64, 1, torch.float32),
    case("DeepSeek", 4096, 64, 6, torch.float32),
    case("DeepSeek-V3", 4096, 256, 8, torch.float32),
]
