"""LSH attention in torch: all chunks side by side, for the model; and how much of the exact attention it finds.

qk are queries and keys in one, `[B, H, T, D]`; buckets `[B, H, R, T]` those of R rounds. What is computed, and why, is
told in chapters/attention/lsh.py; here it is causal, looks across buckets, and has gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SELF = -5e4  # a token's score with itself
CHUNK = 16
HASHES = ("lsh", "random", "none")


def bucket_count(T: int, chunk: int) -> int:
    """As many buckets as chunks, made even, at least 2: a chunk then holds about one bucket."""
    return max(2, T // chunk // 2 * 2)


def times_met(order: Tensor, i: Tensor, j: Tensor, chunk: int) -> Tensor:
    """How often queries i `[B, H, N, m, 1]` meet keys j `[B, H, N, 1, c]`, counted from their places in each round.

    A pair meets in round r if both are in one chunk of it, and once more if the query is in the chunk after the key's,
    in the same round or the next. order `[B, H, R, T]` lists the positions of each round.
    """
    R, parts = order.shape[2], -(-order.shape[3] // chunk)
    place = F.pad(order.argsort(-1) // chunk, (0, 1)) + parts * torch.arange(R, device=order.device)[:, None]
    count = torch.zeros_like(i + j)
    for r in range(R):
        mine, next_round, theirs = places_of(place, r, i), places_of(place, r + 1, i), places_of(place, r, j)
        after = (theirs + 1) % (R * parts)
        count += mine == theirs
        if R * parts > 1:
            count += (mine == after) | (next_round == after)
    return count


def places_of(place: Tensor, r: int, at: Tensor) -> Tensor:
    """The chunks, counted through all rounds, in which positions `at` lie in round r; the round after the last is 0."""
    return place[:, :, r % place.shape[2]].gather(2, at.flatten(2)).view(at.shape)


def attend_chunks(
    qk: Tensor, v: Tensor, buckets: Tensor, chunk: int = CHUNK, dedup: bool = False, scale: float = 1.0
) -> Tensor:
    """out of `lsh_attention`, causal and across buckets, `[B, H, T, D]`: all chunks side by side, differentiable."""
    (T, D), R = qk.shape[2:], buckets.shape[2]
    order = buckets.argsort(dim=-1, stable=True)  # [B, H, R, T]
    rows = F.pad(order, (0, -T % chunk), value=T)  # a token of zeros, later than all: nobody sees it
    rows = rows.unflatten(-1, (-1, chunk)).flatten(2, 3)  # [B, H, chunks of all rounds, chunk]
    columns = torch.cat((rows, rows.roll(1, 2)), dim=-1) if rows.shape[2] > 1 else rows
    queries, keys, values = (
        F.pad(x, (0, 0, 0, 1)).gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, D)).unflatten(2, at.shape[2:])
        for x, at in ((qk, rows), (F.normalize(qk, dim=-1), columns), (v, columns))
    )
    i, j = rows[..., None], columns[..., None, :]
    scores = (scale * queries @ keys.mT).masked_fill(i == j, SELF)
    if dedup:
        scores = scores - times_met(order, i, j, chunk).clamp(min=1).to(scores.dtype).log()
    scores = scores.masked_fill(j > i, -math.inf)
    lses, outs = scores.logsumexp(-1), scores.softmax(-1) @ values  # exp(scores − lses) is rough near −5e4
    outs, lses = (x.flatten(2, 3).unflatten(2, (R, -1)) for x in (outs, lses))  # [B, H, R, sorted, ...]
    back = order.argsort(dim=-1)
    outs, lses = outs.gather(3, back[..., None].expand(-1, -1, -1, -1, D)), lses.gather(3, back)
    return (lses.softmax(2)[..., None] * outs).sum(2)


class LshAttend:
    """LSH attention for `Transformer(config, attend=LshAttend(rounds=4))`: causal, trainable; on CUDA the kernel.

    Keys, for grouped heads repeated, serve as queries, too: what q_proj computes is not used. With a cache all keys
    held are sorted anew, which gives the newest tokens other neighbours than one pass over the whole text would.
    `hashes`: "lsh"; "random" buckets; "none", one bucket, which makes a chunk a window of neighbours in the text.
    Scores are not divided by √D unless `scale` says so, as in transformers: keys have length 1 already. Rotations
    come from `seed`, one set for all layers and heads. Raises ValueError for options that cannot be.
    """

    def __init__(
        self, rounds: int = 4, chunk: int = CHUNK, hashes: str = "lsh", dedup: bool = True, scale: float = 1.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if hashes not in HASHES:
            raise ValueError(f"hashes must be one of {', '.join(HASHES)}, got {hashes!r}")
        if min(rounds, chunk) < 1 or not 0 < scale < math.inf:
            raise ValueError(f"rounds and chunk must be at least 1, scale positive; got {rounds}, {chunk} and {scale}")
        self.rounds, self.chunk, self.hashes = rounds, chunk, hashes
        self.dedup, self.scale, self.seed = dedup, scale, seed

    def buckets(self, qk: Tensor) -> Tensor:
        """`[B, H, R, T]` for qk `[B, H, T, D]`."""
        (B, H, T, D), n = qk.shape, bucket_count(qk.shape[2], self.chunk)
        generator = torch.Generator().manual_seed(self.seed)
        if self.hashes == "none":
            return torch.zeros(B, H, self.rounds, T, dtype=torch.int64, device=qk.device)
        if self.hashes == "random":
            return torch.randint(n, (B, H, self.rounds, T), generator=generator).to(qk.device)
        rotations = torch.randn(self.rounds, D, n // 2, generator=generator).to(qk)
        along = qk.detach()[:, :, None] @ rotations
        return torch.cat((along, -along), dim=-1).argmax(-1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[B, H, T, D]` of the last T of the S tokens whose keys and values `[B, Hkv, S, D]` are given."""
        group, precise = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        qk, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        buckets = self.buckets(qk)
        served = qk.shape[-1] <= 128 and q.dtype != torch.float64  # by the kernel
        if q.is_cuda and served and not (torch.is_grad_enabled() and (qk.requires_grad or v.requires_grad)):
            from kernels.attention.lsh import lsh_attention as kernel

            out, _ = kernel(qk, v, buckets, self.chunk, dedup=self.dedup, scale=self.scale)
        else:
            out = attend_chunks(qk.to(precise), v.to(precise), buckets, self.chunk, self.dedup, self.scale)
        return out[:, :, -q.shape[2] :].to(q.dtype)


def exact_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention in which keys serve as queries, `shared_attention` with scale 1: what LSH approximates."""
    T, S = q.shape[2], k.shape[2]
    qk, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    hidden = torch.zeros(S, S, dtype=q.dtype, device=q.device).masked_fill_(~torch.ones(S, S).bool().tril(), -math.inf)
    hidden.fill_diagonal_(SELF)
    return F.scaled_dot_product_attention(qk[:, :, -T:], F.normalize(qk, dim=-1), v, attn_mask=hidden[-T:], scale=1.0)


@torch.no_grad()
def recall(layers: list[Tensor], attend: LshAttend) -> tuple[float, float, float]:
    """Shares that `attend` sees, over all queries but the first of each text, of keys k `[B, H, T, D]` of some layers.

    Of the softmax's mass, of its largest weights, and of the keys that lie before a query.
    """
    shares = []
    for k in layers:
        scores = attend.scale * k @ F.normalize(k, dim=-1).mT
        hidden = torch.ones(scores.shape[-2:], device=k.device).triu().bool()  # self, too
        weights = scores.masked_fill(hidden, -math.inf)[:, :, 1:].softmax(-1)
        order = attend.buckets(k).argsort(dim=-1, stable=True)
        everyone = torch.arange(k.shape[2], device=k.device).expand(*k.shape[:2], 1, -1)
        seen = times_met(order, everyone[..., None], everyone[..., None, :], attend.chunk)[:, :, 0, 1:] > 0
        top = seen.gather(-1, weights.argmax(-1, keepdim=True))
        shares.append([(weights * seen).sum(-1).mean(), top.float().mean(), seen[..., ~hidden[1:]].float().mean()])
    return tuple(torch.tensor(shares).mean(0).tolist())
