"""Places in lines that are served by priority, without a sort: whoever counts those before him has his place.

The order of a sort is wanted only to count along it, so the kernel counts at once. Token t's rank is the number of
tokens with a larger score, or an equal one that stand before it; the slot of its choice j is the number of those among
them whose choice j is the same expert, and of all tokens that chose this expert earlier than j. No program waits for
another, and sums of integers come out the same in any order. A program takes BLOCK tokens and passes all the others in
chunks of CHUNK. In chunks before its own block a tie goes to the other token, in chunks behind it to its own: there one
comparison decides, >= or >. Only inside the block are positions compared.

With T tokens, E experts and k choices:
    floor       8 T + 8 T k + 4 E bytes: score and expert in; int32 rank, slot and load out
    moved       the inputs again for every block, T / BLOCK times 4 T (1 + k) bytes, from L1 and L2: for T = 4096,
                k = 2, 12.6 MB of 48 kB that stay there
    operations  T² (1 + 3 k + k (k - 1)) in integer units: comparison, equal expert and sum; earlier choices cost two
                each. 0.15 G for T = 4096, k = 2, at least 10 µs at 15 T a second of an H100; four times that for 8192
Replaces a sort (5 to 8 launches for 32-bit keys), its inverse, and one_hot, cumsum and a masked sum for each choice. A
sort's cost grows as T and is launches at first, of about 3 µs; counting grows as T². By this count they meet between
4096 and 8192 tokens for k = 2, earlier for more choices: six of T = 2048 are 0.2 G. Of more than MOST_TOKENS the
wrapper will not count. Before the launch 4 E bytes are set to 0.

Layout: score [T] float32, float16 or bfloat16; expert [T, k] int32 or int64, row-major.
Method: Riquelme et al. 2021, arXiv:2106.05974, algorithm 2; counting ranks: Knuth, volume 3, section 5.2.
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
from kernels.moe import routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS, MOST_CHOICES = 16384, 16


@triton.jit
def read_scores(score, token, there):
    """Scores as float32; -inf for those that are NaN, and NaN, which is before nothing, where `there` is false."""
    value = tl.load(score + token, mask=there, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    return tl.where(there, value, float("nan"))


@triton.jit
def tally(
    score, expert, token, mine, which, start, stop, SIDE: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count, among the tokens start .. stop - 1, those that are served before each token of a block.

    token [BLOCK] are the block's numbers, mine [BLOCK] float32 their scores, which [BLOCK] their choice J. SIDE says
    where start .. stop - 1 stand: -1 all before the block, 1 all behind it, 0 they are the block. A token comes first
    whose score is larger or, if both are equal, that stands first. Reads scores by `read_scores`, and expert
    [tokens, K]. Returns two int32 [BLOCK]: how many come first; and how many of these have `which` as their choice J,
    plus how many of all have it as an earlier choice.
    """
    ahead = tl.zeros((BLOCK, CHUNK), tl.int32)
    same = tl.zeros((BLOCK, CHUNK), tl.int32)
    for first in range(start, stop, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = other < stop
        value = read_scores(score, other, there)[None, :]
        if SIDE < 0:
            before = value >= mine[:, None]
        elif SIDE > 0:
            before = value > mine[:, None]
        else:
            before = (value > mine[:, None]) | ((value == mine[:, None]) & (other[None, :] < token[:, None]))
        wanted = tl.load(expert + other * K + J, mask=there, other=-1)
        ahead += before.to(tl.int32)
        same += (before & (wanted[None, :] == which[:, None])).to(tl.int32)
        for earlier in tl.static_range(J):
            wanted = tl.load(expert + other * K + earlier, mask=there, other=-1)
            same += (wanted[None, :] == which[:, None]).to(tl.int32)
    return tl.sum(ahead, axis=1), tl.sum(same, axis=1)


@triton.jit
def queue_kernel(
    expert, score, rank, slot, load, tokens, experts, K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """One program for BLOCK tokens: their rank [tokens], slot [tokens, K], and what they add to load [experts]."""
    start = tl.program_id(0) * BLOCK
    stop = tl.minimum(start + BLOCK, tokens)
    token = start + tl.arange(0, BLOCK)
    live = token < tokens
    mine = read_scores(score, token, live)
    for j in tl.static_range(K):
        which = tl.load(expert + token * K + j, mask=live, other=-2)  # -1 is nobody's choice in `tally`
        ahead, same = tally(score, expert, token, mine, which, start, stop, 0, j, K, BLOCK, BLOCK)
        more, alike = tally(score, expert, token, mine, which, 0, start, -1, j, K, BLOCK, CHUNK)
        rest, equal = tally(score, expert, token, mine, which, stop, tokens, 1, j, K, BLOCK, CHUNK)
        if j == 0:
            tl.store(rank + token, ahead + more + rest, mask=live)
        tl.store(slot + token * K + j, same + alike + equal, mask=live)
        tl.atomic_add(load + which, 1, mask=live & (which >= 0) & (which < experts))


def queue(
    expert: Tensor, score: Tensor, experts: int, block: int = 16, chunk: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """(rank, slot, load) of the chapter's `queue`: int32 [T], [T, k] and [experts].

    expert [T, k], int32 or int64, from 0 to experts - 1, which is not checked; score [T]. A score of NaN counts as
    -inf. `block` sets the tokens of a program, `chunk` those that it passes at a time. Raises ValueError for the
    shapes, no experts, more than MOST_TOKENS tokens or MOST_CHOICES choices, TypeError for the dtypes.
    """
    require(expert.dim() == 2 and expert.numel() > 0, f"expert must be [T, k], not empty, got {tuple(expert.shape)}")
    tokens, k = expert.shape
    require(score.shape == (tokens,), f"score must be [{tokens}], got {tuple(score.shape)}")
    require(tokens <= MOST_TOKENS, f"expert must be of {MOST_TOKENS} tokens at most, got {tokens}: sort them")
    require(k <= MOST_CHOICES, f"expert must hold {MOST_CHOICES} choices at most, got {k}")
    require(experts >= 1, f"experts must be at least 1, got {experts}")
    require_dtype((torch.int32, torch.int64), expert=expert)
    require_dtype(DTYPES, score=score)
    require_contiguous(expert=expert, score=score)
    require_launchable(expert=expert, score=score)
    made = {"dtype": torch.int32, "device": expert.device}
    rank, slot, load = torch.empty(tokens, **made), torch.empty(tokens, k, **made), torch.zeros(experts, **made)
    grid = (triton.cdiv(tokens, block),)
    queue_kernel[grid](expert, score, rank, slot, load, tokens, experts, K=k, BLOCK=block, CHUNK=chunk, num_warps=4)
    return rank, slot, load


def ranks(order: Tensor) -> Tensor:
    """The inverse of a permutation, int32."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).int()


def torch_queue(expert: Tensor, score: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`queue` in plain torch operators: a stable sort, then one-hot matrices and sums along them in that order."""
    order = score.argsort(descending=True, stable=True)
    taken, slots = torch.zeros(1, experts, dtype=torch.int64, device=expert.device), []
    for chosen in expert[order].long().unbind(1):
        hot = F.one_hot(chosen, experts)
        slots.append(((hot.cumsum(0) - 1 + taken) * hot).sum(1))
        taken = taken + hot.sum(0, keepdim=True)
    rank = ranks(order)
    return rank, torch.stack(slots, 1)[rank.long()].int(), taken[0].int()


def logits_for(expert: Tensor, score: Tensor, experts: int) -> tuple[Tensor, Tensor, int]:
    """Arguments of `sort_and_route`: logits by which the routing kernel chooses those experts."""
    k = expert.shape[1]
    falling = torch.arange(k, 0, -1, device=expert.device).float().expand(expert.shape)
    return torch.zeros(len(expert), experts, device=expert.device).scatter(1, expert.long(), falling), score, k


def sort_and_route(logits: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort, and the routing kernel in that order of arrival, which chooses and weighs as well."""
    order = score.argsort(descending=True, stable=True)
    _, _, slot, load = routing.route(logits, k, arrival=order)
    return ranks(order), slot, load


def case(name: str, tokens: int, experts: int, k: int) -> Case:
    """Lines of `tokens` tokens by their largest gate."""

    def inputs(device: torch.device) -> tuple:
        if device.type != "cuda":
            return torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens), experts
        gate, expert = torch.randn(tokens, experts, device=device).softmax(1).topk(k)
        return expert.int(), gate[:, 0].contiguous(), experts

    peers = {"torch.argsort, one-hot": torch_queue}
    if experts <= routing.MOST_EXPERTS:
        peers["torch.argsort, routing kernel"] = sort_and_route
    return Case(
        name=f"{name}: T={tokens} E={experts} k={k}",
        inputs=inputs,
        run=queue,
        expected=torch_queue,
        bytes=8 * tokens + 8 * tokens * k + 4 * experts,
        operations=0,  # none for the matrix units, whose ceiling this would count against
        kind="other",  # it waits for integer units: what it reads is in L1
        peers=peers,
        prepare={name: logits_for for name in peers if "kernel" in name},
    )


CASES = [
    case("V-MoE, images", 2304, 32, 2),
    case("Mixtral", 4096, 8, 2),
    case("Mixtral, where a sort should win", 16384, 8, 2),
    case("Switch", 8192, 64, 1),
    case("DeepSeek", 2048, 64, 6),
    case("DeepSeek-V3", 512, 256, 8),
]
