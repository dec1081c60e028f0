"""Several sequences end to end in one row of the model: what they need of a cache, of positions and of attention.

The row's linear layers see tokens, and do not care whose; attention gets the offsets of each sequence's queries and
keys. So N prompts of any lengths are one pass without padding, and each decode step is a row of N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from chapters.lab import Lab
from minitfm.generate import sample


class PackedCache:
    """Keys and values of N sequences, as the cache and, by `attend`, the attention of one model.

    attention is `attend(q, k, v, cu_q=…, cu_k=…)` of packed q `[1, H, T, D]` and k, v `[1, Hkv, S, D]`.
    """

    def __init__(self, sequences: int, attention: Callable[..., Tensor]) -> None:
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, got {sequences}")
        self.attention, self.sequences = attention, sequences
        self.truncate(0)

    def announce(self, new: Sequence[int]) -> Tensor:
        """Say that the next pass brings new[n] >= 0 tokens of sequence n; returns their positions, int64 `[sum]`."""
        if len(new) != self.sequences or min(new) < 0 or sum(new) == 0:
            raise ValueError(f"new must be {self.sequences} counts, at least 0 and not all 0, got {list(new)}")
        before = self.lengths
        self.new, self.lengths = list(new), [held + count for held, count in zip(before, new, strict=True)]
        ends = zip(before, self.lengths, strict=True)
        return torch.cat([torch.arange(start, stop) for start, stop in ends])

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append what was announced of k, v `[1, Hkv, T, D]`; all that it holds `[1, Hkv, S, D]`, in sequences.

        Raises ValueError for another number of tokens than announced.
        """
        if k.shape[2] != sum(self.new) or k.shape != v.shape or k.shape[0] != 1:
            raise ValueError(f"k and v must be [1, Hkv, {sum(self.new)}, D], got {tuple(k.shape)} and {tuple(v.shape)}")
        both = torch.stack([k, v]).split(self.new, dim=3)
        held = self.kept.get(layer)
        self.kept[layer] = list(both) if held is None else [torch.cat(x, dim=3) for x in zip(held, both, strict=True)]
        keys, values = torch.cat(self.kept[layer], dim=3)
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The `attend` of the model."""
        cu_q, cu_k = ([0, *accumulate(counts)] for counts in (self.new, self.lengths))
        return self.attention(q, k, v, cu_q=cu_q, cu_k=cu_k)

    def __len__(self) -> int:
        return max(self.lengths)

    def truncate(self, length: int) -> None:
        """Forget everything; the sequences are as long as they are, only a length of 0 fits them all."""
        if length:
            raise ValueError(f"packed sequences can only be truncated to 0, got {length}")
        self.kept: dict[int, list[Tensor]] = {}
        self.new, self.lengths = [0] * self.sequences, [0] * self.sequences


@torch.no_grad()
def generate_packed(lab: Lab, prompts: Sequence[Tensor], count: int, attention: Callable[..., Tensor]) -> Tensor:
    """`count` greedy tokens after each of N prompts int64 `[T_n]`, all in one row: int64 `[N, count]`."""
    cache = PackedCache(len(prompts), attention)
    model, answers = lab.model(attend=cache.attend), []
    fed, new = torch.cat(list(prompts)), [len(prompt) for prompt in prompts]
    for _ in range(count):
        positions = cache.announce(new)
        logits = model(fed[None], cache, positions)[0]
        fed = sample(logits[torch.tensor(new).cumsum(0) - 1])
        answers.append(fed)
        new = [1] * len(prompts)
    return torch.stack(answers, dim=1)
