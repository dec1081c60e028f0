"""Serving: many requests of different lengths, generated together from one pool of blocks.

Each pass takes one token of every running request and the whole prompts of those that are let in (iteration-level
scheduling, Yu et al. 2022). When the pool runs out, the latest go back to wait and are computed again later, as in
vLLM. A request gets the tokens that it would get alone, whoever runs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chapters.lab import Lab
from chapters.shared.paged_cache import PagedCache, Pool
from minitfm.generate import sample
from minitfm.model import Transformer

if TYPE_CHECKING:
    from chapters.attention.paged import BlockManager


@dataclass
class Request:
    """A prompt, how many tokens shall follow it, and those found so far; temperature and seed as in `generate`."""

    prompt: list[int]
    count: int
    temperature: float = 0.0
    seed: int = 0
    answer: list[int] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer


class Step(NamedTuple):
    """What the pool held in one pass.

    sequences, tokens    how many ran, and how long they were together
    positions            of the pool that held something: what is shared counts once
    blocks, apart        blocks in use, and how many it would have been without sharing
    preempted            requests that went back to wait
    """

    sequences: int
    tokens: int
    positions: int
    blocks: int
    apart: int
    preempted: int


def observe(manager: BlockManager, preempted: int) -> Step:
    """A `Step` of what the manager holds."""
    size, filled = manager.block_size, {}
    for sequence, table in manager.tables.items():
        for i, block in enumerate(table):
            filled[block] = max(filled.get(block, 0), min(size, manager.lengths[sequence] - i * size))
    tokens, apart = sum(manager.lengths.values()), sum(map(len, manager.tables.values()))
    return Step(len(manager.tables), tokens, sum(filled.values()), len(filled), apart, preempted)


@torch.no_grad()
def serve(model: Transformer, pool: Pool, requests: Sequence[Request], share: bool = False) -> list[Step]:
    """Fill in all answers, stepping as many requests at once as the pool holds; first come, first served.

    A pass takes one token of each running request and the whole prompt of each that is let in. share: a prompt that
    begins as that of a running request does starts as its fork. The model attends by `paged_cache.attend`. Raises
    ValueError, before anything is done, for a pool in use, an empty prompt or count, and a request that could never
    run, because the pool or the model's context is too small for it alone.
    """
    require_serveable(model, pool, requests)
    waiting, running, steps = deque(range(len(requests))), [], []
    draws = [torch.Generator(pool.k.device).manual_seed(request.seed) for request in requests]
    while waiting or running:
        preempted = make_room(pool, running, waiting)
        new = dict.fromkeys(running, 1) | ({} if preempted else admit(pool, running, waiting, requests, share))
        steps.append(observe(pool.manager, preempted))
        for one, scores in zip(new, forward(model, pool, requests, new), strict=True):
            request = requests[one]
            request.answer.append(int(sample(scores[None], request.temperature, generator=draws[one])))
            if len(request.answer) == request.count:
                running.remove(one)
                pool.manager.free(one)
    return steps


def forward(model: Transformer, pool: Pool, requests: Sequence[Request], new: dict[int, int]) -> Tensor:
    """Logits `[N, V]` after the last token of each request in `new`, of which so many tokens are to be computed."""
    cache = PagedCache(pool, list(new), list(new.values()))
    fed = [token for one, count in new.items() for token in requests[one].tokens()[-count:]]
    row, ends = torch.tensor([fed]), torch.tensor(list(new.values())).cumsum(0) - 1
    logits = model(row.to(pool.k.device), cache, cache.positions().to(pool.k.device))
    return logits[0, ends.to(logits.device)]


def require_serveable(model: Transformer, pool: Pool, requests: Sequence[Request]) -> None:
    """Raise ValueError for what `serve` refuses."""
    if pool.manager.tables:
        raise ValueError(f"the pool must be empty, it holds sequences {sorted(pool.manager.tables)}")
    for i, request in enumerate(requests):
        total = len(request.prompt) + request.count
        if not request.prompt or request.count < 1 or request.answer or total > model.config.context:
            raise ValueError(
                f"request {i} needs a prompt, a count and no answer, within a context of {model.config.context}; got "
                f"{len(request.prompt)}, {request.count} and {len(request.answer)} tokens"
            )
        if pool.manager.can_allocate(total) == "never":
            raise ValueError(f"request {i} of {total} tokens can never run in {pool.manager.blocks} blocks")


def make_room(pool: Pool, running: list[int], waiting: deque[int]) -> int:
    """Room for one token more of each running request; without it the latest go back to wait, and how many did.

    What a request had is forgotten: it will be computed again, prompt and answer, when it is let in again.
    """
    before = len(running)
    for one in list(running):
        while one in running and not pool.manager.can_append(one):
            latest = running.pop()
            pool.manager.free(latest)
            waiting.appendleft(latest)
        if one in running:
            pool.append({one: 1})
    return before - len(running)


def admit(
    pool: Pool, running: list[int], waiting: deque[int], requests: Sequence[Request], share: bool
) -> dict[int, int]:
    """Let in requests in their order while blocks last: {request: tokens to compute}, room for them made."""
    settled, new, manager = len(running), {}, pool.manager
    while waiting:
        tokens = requests[waiting[0]].tokens()
        parent, common = longest_prefix(pool, running, settled, requests, tokens) if share else (-1, 0)
        if manager.can_allocate(len(tokens), common // manager.block_size) != "now":
            break
        one = waiting.popleft()
        if common:
            manager.fork(parent, one, common)
        pool.append({one: len(tokens) - common})
        running.append(one)
        new[one] = len(tokens) - common
    return new


def longest_prefix(
    pool: Pool, running: list[int], settled: int, requests: Sequence[Request], tokens: list[int]
) -> tuple[int, int]:
    """(running request, how many first tokens to share with it), 0 if not a block. One token is left to compute.

    The first `settled` have been computed, and may share a block in part: whoever writes in it first copies it. Blocks
    of the others are written in the coming pass, and can be shared whole only.
    """
    size, best = pool.manager.block_size, (-1, 0)
    for place, one in enumerate(running):
        pairs = zip(requests[one].tokens(), tokens[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        common = common if place < settled else common // size * size
        if common >= max(size, best[1] + 1):
            best = one, common
    return best


def draw_requests(lab: Lab, seed: int, count: int, share: bool = False) -> list[Request]:
    """Requests as long as people's: exponential, with the means of ShareGPT in the paper's figure 11.

    Those are 161 tokens and 338 of 2048; here they are scaled to the model's context, and cut at half of it. Texts are
    the lab's. share: all begin with the same tokens, a twelfth of the context, and answers are drawn by own seeds.
    """
    rng, context = np.random.default_rng(seed), lab.config.context
    texts = lab.calibration(seed, count, context).tolist()
    opening = lab.validation[0, : context // 12].tolist() if share else []
    lengths = rng.exponential(np.array([161, 338]) / 2048 * context, size=(count, 2))
    lengths = lengths.clip(1, context // 2 - len(opening)).astype(int).tolist()
    return [
        Request(opening + text[:prompt], answer, float(share), i)
        for i, (text, (prompt, answer)) in enumerate(zip(texts, lengths, strict=True))
    ]


def waste(steps: Sequence[Step], block_size: int) -> float:
    """Part of the positions of blocks in use that holds nothing, over all passes."""
    return 1 - sum(step.positions for step in steps) / sum(step.blocks * block_size for step in steps)


def reserved_waste(steps: Sequence[Step], context: int) -> float:
    """The same if each running sequence had a whole context reserved."""
    return 1 - sum(step.tokens for step in steps) / sum(step.sequences * context for step in steps)
