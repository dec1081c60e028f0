"""Linformer in torch: attention to slots with learned projections, its causal blockwise form, and what each one costs.

q `[B, H, T, D]`, k and v `[B, Hkv, S, D]` come from the model. e `[slots, L]` for all heads, or `[Hkv, slots, L]`,
makes slots of the keys, and f, or e again, of the values. One module for all layers shares its projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapters.lab import Lab
from minitfm.evaluate import nll
from minitfm.model import Attend, Transformer, causal_attention
from minitfm.surgery import set_attend
from minitfm.train import Settings, train

Layer = tuple[Tensor, Tensor, Tensor]  # q, k and v of one layer


class Projected(nn.Module):
    """What both forms hold: e, and f or None where values are projected by e, too. Copies, learned from these starts.

    Raises ValueError unless e is `[slots, L]` or `[Hkv, slots, L]` and f has its shape.
    """

    def __init__(self, e: Tensor, f: Tensor | None = None) -> None:
        super().__init__()
        if e.dim() not in (2, 3) or e.numel() == 0 or (f is not None and f.shape != e.shape):
            shapes = [tuple(x.shape) for x in (e, f) if x is not None]
            raise ValueError(f"e must be [slots, L] or [Hkv, slots, L], and f like it; got {shapes}")
        self.e = nn.Parameter(e.clone(memory_format=torch.contiguous_format))
        self.f = None if f is None else nn.Parameter(f.clone(memory_format=torch.contiguous_format))

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """e and f in that dtype."""
        return self.e.to(dtype), (self.e if self.f is None else self.f).to(dtype)


class SlotAttention(Projected):
    """Linformer as the `attend` of one or of all layers, for up to L keys. Not causal: every query sees every token."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[B, H, T, D]`. On CUDA the kernel, unless gradients are wanted. ValueError for more than L keys."""
        (e, f), S = self.pair(q.dtype), k.shape[2]
        if S > e.shape[-1]:
            raise ValueError(f"{S} keys, but the projections are for at most {e.shape[-1]}")
        if q.is_cuda and not torch.is_grad_enabled() and q.dtype != torch.float64 and q.shape[-1] <= 128:
            from kernels.attention.linformer import linformer_attention

            return linformer_attention(q, k, v, e, f)
        return F.scaled_dot_product_attention(q, e[..., :S] @ k, f[..., :S] @ v, enable_gqa=q.shape[1] != k.shape[1])


class BlockwiseAttention(Projected):
    """The causal form, e `[slots, block]`: slots of the blocks that are finished, exact keys of the query's own block.

    For texts of any length. The pairs that are hidden are computed too, and masked: this shows what it predicts, and
    saves nothing.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[B, H, T, D]`; query i stands at position i + S − T."""
        (T, S), (slots, block), gqa = (q.shape[2], k.shape[2]), self.e.shape[-2:], q.shape[1] != k.shape[1]
        e, f = self.pair(q.dtype)
        keys, values = torch.cat((block_slots(k, e), k), dim=2), torch.cat((block_slots(v, f), v), dim=2)
        position = torch.arange(S - T, S, device=q.device)[:, None]
        key = torch.arange(S, device=q.device)
        own = (key // block == position // block) & (key <= position)
        finished = torch.arange(S // block * slots, device=q.device) // slots < position // block
        return F.scaled_dot_product_attention(q, keys, values, torch.cat((finished, own), dim=1), enable_gqa=gqa)


def block_slots(x: Tensor, e: Tensor) -> Tensor:
    """Slots `[B, Hkv, blocks · slots, D]` of the whole blocks of x `[B, Hkv, S, D]`."""
    block = e.shape[-1]
    whole = x[:, :, : x.shape[2] // block * block].unflatten(2, (x.shape[2] // block, block))
    return ((e[:, None] if e.dim() == 3 else e) @ whole).flatten(2, 3)


def without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention that hides nothing, `attend` for a model that reads whole texts."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def set_everywhere(model: Transformer, make: Callable[[], Attend]) -> None:
    """Let each layer attend by a module of its own; their projections are then trained with the model."""
    for layer in range(model.config.layers):
        set_attend(model, layer, make())


def influence(attend: Attend, q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> Tensor:
    """`[T, S]`: the largest change of query i's output when key and value j are replaced by others, drawn from seed.

    A causal `attend` has exact zeros above the diagonal.
    """
    generator, before = torch.Generator().manual_seed(seed), attend(q, k, v)
    changes = []
    for j in range(k.shape[2]):
        keys, values = k.clone(), v.clone()
        for x in (keys, values):
            x[:, :, j] = torch.randn(x[:, :, j].shape, generator=generator, dtype=x.dtype)
        changes.append((attend(q, keys, values) - before).abs().amax((0, 1, 3)))
    return torch.stack(changes, dim=1)


@torch.no_grad()
def layer_inputs(lab: Lab, tokens: Tensor) -> list[Layer]:
    """q, k and v of each layer of the base model on tokens `[N, T]`; keys and values once for every query head."""
    seen: list[Layer] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        seen.append((q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)))
        return causal_attention(q, k, v)

    lab.model(attend=attend)(tokens)
    return seen


def fit(attention: Projected, layer: Layer, steps: int, seed: int, rate: float = 5e-4, batch: int = 8) -> None:
    """Train the projections alone to give full attention's output on the texts of q, k, v, by Adam on its square error.

    The target hides nothing either.
    """
    target, generator = without_mask(*layer), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(attention.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(target), (batch,), generator=generator)
        loss = F.mse_loss(attention(*(x[chosen] for x in layer)), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    return ((found - exact).norm() / exact.norm()).item()


@torch.no_grad()
def perplexities(model: Transformer, tokens: Tensor, positions: list[int]) -> tuple[float, float]:
    """Perplexity of the tokens at these positions of `[N, T]`, measured twice: in one pass, and from what lies before.

    In one pass over the text, as in training, a model that is not causal finds the token it is asked for in its input.
    The second pass over each prefix is what the model would have when writing. The same for a causal model.
    """
    at_once = nll(model, tokens)[:, [position - 1 for position in positions]].mean().item()
    losses = [F.cross_entropy(model(tokens[:, :p])[:, -1], tokens[:, p]).item() for p in positions]
    return math.exp(at_once), math.exp(sum(losses) / len(losses))


def leak(lab: Lab, make: Callable[[], Attend], blockwise: Attend, steps: int, seed: int) -> dict[str, float]:
    """Perplexities: of the base model, of it trained for next tokens with `make`'s attention, and with `blockwise`.

    The second twice: in one pass, and from what lies before. The last is not trained.
    """
    text, positions = lab.validation[: 32 if lab.full else 8], list(range(8, lab.length, 8))
    base, model = lab.model(), lab.model()
    found = {"base": perplexities(base, text, positions)[0]}
    set_everywhere(base, lambda: blockwise)
    found["blockwise"] = perplexities(base, text, positions)[0]
    set_everywhere(model, make)
    train(model, lab.train_stream, Settings(steps, batch=8, length=lab.length, optimizer="adamw", seed=seed))
    found["Linformer"], found["Linformer, later tokens absent"] = perplexities(model, text, positions)
    return found


def mean_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over runs."""
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
