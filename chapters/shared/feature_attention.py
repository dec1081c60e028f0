"""Linear attention in torch: feature maps, the chunked form with its gradients, a cache of constant size, its time.

q, k, v come from the model, `[B, H, T, D]` and `[B, Hkv, S, D]`; a feature map makes F numbers of each D. The state
`[B, H, F, D + 1]` of some keys is the sum of φ(k) [v, 1]ᵀ: its last column, the sum of φ(k), is the denominator's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chapters.lab import Lab
from minitfm.model import Attend

FEATURES = ("elu", "favor", "rfa")
EPS, CHUNK = 1e-6, 64


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return F.elu(x) + 1


def favor(x: Tensor, projection: Tensor, query: bool, eps: float) -> Tensor:
    """Performer's positive features `[..., T, m]` of x `[..., T, D]`, stabilised as in the released code."""
    y = x * x.shape[-1] ** -0.25
    along = y @ projection.mT
    largest = along.amax(-1 if query else (-2, -1), keepdim=True).detach()
    return ((along - y.square().sum(-1, keepdim=True) / 2 - largest).exp() + eps) / math.sqrt(len(projection))


def rfa(x: Tensor, projection: Tensor) -> Tensor:
    """Random Fourier features `[..., T, 2 m]` of x / |x|."""
    along = F.normalize(x, dim=-1) @ projection.mT
    return torch.cat((along.cos(), along.sin()), dim=-1) / math.sqrt(len(projection))


def attend_features(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, chunk: int = CHUNK, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The chunked form for features q, k `[B, H, T, F]` and v `[B, H, T, D]`: out like v, and the state after them.

    `state` is that of earlier keys, none if None. All chunks are computed side by side: their states take
    T (D + 1) F / chunk numbers a head.
    """
    T, short = q.shape[2], -q.shape[2] % chunk
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k, v))  # [B, H, n, chunk, ·]
    v = F.pad(v, (0, 1), value=1.0)
    before = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    states = torch.cat((before[:, :, None], k.mT @ v), dim=2).cumsum(2)  # [B, H, n + 1, F, D + 1]
    out = (q @ k.mT).tril() @ v + q @ states[:, :, :-1]
    out = out[..., :-1] / (out[..., -1:] + eps)
    return out.flatten(2, 3)[:, :, :T], states[:, :, -1]


class LinearAttend:
    """Linear attention for `Transformer(config, attend=LinearAttend("elu"))`: causal and trainable; on CUDA the kernel.

    features    "elu", "favor" (Performer) or "rfa"
    count       F for the random ones, even for "rfa"; "elu" has as many as channels
    projection  (rows, D) -> `[rows, D]`, the random directions; all layers and heads share them
    eps         what "favor" adds to each exponential. Released code adds 1e-6 or 1e-4; but its maximum is that of w·x
                alone, the factor exp(−|x|²/2) stays, and where queries or keys are long, eps is most of the feature

    Keys of grouped heads are repeated. Performer's keys share one maximum over the positions; it cancels, but for eps.
    Raises ValueError for an unknown kind of features and a count that cannot be.
    """

    def __init__(self, features: str, count: int, projection: Callable[[int, int], Tensor], eps: float = 0.0) -> None:
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
        if count < 1 or (features == "rfa" and count % 2):
            raise ValueError(f"count must be at least 1, and even for rfa (a cosine and a sine each), got {count}")
        self.features, self.count, self.projection, self.eps = features, count, projection, eps
        self.least = torch.finfo(torch.float32).tiny if features == "favor" else EPS  # added to the denominator
        self.drawn: dict[int, Tensor] = {}

    def map(self, x: Tensor, query: bool) -> Tensor:
        """φ(x), `[..., T, F]`, in float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.features == "elu":
            return elu(x)
        rows, D = self.count // (2 if self.features == "rfa" else 1), x.shape[-1]
        if D not in self.drawn:
            self.drawn[D] = self.projection(rows, D)
        projection = self.drawn[D].to(x)
        return favor(x, projection, query, self.eps) if self.features == "favor" else rfa(x, projection)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[B, H, T, D]` in q's dtype. The S − T keys before the first query become a state."""
        before = k.shape[2] - q.shape[2]
        queries, (keys, values) = self.map(q, query=True), self.heads(k, v, q.shape[1])
        served = max(queries.shape[-1], v.shape[-1]) <= 128 and q.dtype != torch.float64  # by the kernel
        if q.is_cuda and before == 0 and served:
            from kernels.attention.linear import chunked_attention

            tiny = self.features == "favor" and q.dtype == torch.float16  # favor's numbers may vanish in float16
            dtype = torch.bfloat16 if tiny else q.dtype
            queries, keys, values = (x.to(dtype).contiguous() for x in (queries, keys, values))
            return chunked_attention(queries, keys, values, eps=self.least)[0].to(q.dtype)
        past = F.pad(values[:, :, :before], (0, 1), value=1.0)
        state = keys[:, :, :before].mT @ past
        new = (keys[:, :, before:], values[:, :, before:])
        return attend_features(queries, *new, state, eps=self.least)[0].to(q.dtype)

    def heads(self, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """φ(k) and v, each once for every query head."""
        keys, group = self.map(k, query=False), heads // k.shape[1]
        return keys.repeat_interleave(group, dim=1), v.to(keys.dtype).repeat_interleave(group, dim=1)


class StateCache:
    """A cache that holds one state per layer, however long the text: `Transformer(config, attend=cache.attend)`.

    Pass it to `forward` as the cache, too. For features that look at each token alone; "favor" shares a maximum between
    keys, and is refused with ValueError. What has been summed cannot be taken out: `truncate` only to nothing.
    """

    def __init__(self, linear: LinearAttend) -> None:
        if linear.features == "favor":
            raise ValueError("favor's keys share a maximum that a later key may change: use elu or rfa")
        self.linear = linear
        self.states: dict[int, Tensor] = {}
        self.seen: dict[int, int] = {}
        self.current: int | None = None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Count the new keys and hand them on as they are; `attend`, which comes next, adds them to the state."""
        self.current, self.seen[layer] = layer, self.seen.get(layer, 0) + k.shape[2]
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out `[B, H, T, D]`: the new queries see the layer's state and the new keys. Without `update`: no past."""
        if self.current is None:
            return self.linear(q, k, v)
        layer, self.current = self.current, None
        keys, values = self.linear.heads(k, v, q.shape[1])
        state = self.states.get(layer)
        out, self.states[layer] = attend_features(self.linear.map(q, query=True), keys, values, state)
        return out.to(q.dtype)

    def __len__(self) -> int:
        return self.seen[max(self.seen)] if self.seen else 0

    def truncate(self, length: int) -> None:
        """Forget everything for 0, nothing for the present length; ValueError for what lies between."""
        if length not in (0, len(self)):
            raise ValueError(f"cannot truncate to {length}: a state of {len(self)} tokens only goes back to 0")
        if length == 0:
            self.states.clear()
            self.seen.clear()

    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(state.numel() * state.element_size() for state in self.states.values())


def layer_seconds(lab: Lab, attend: Attend, length: int) -> float:
    """Processor seconds, so that other programs count little: the least of four runs of `attend` over one layer."""
    shape = (3, 1, lab.config.heads, length, lab.config.head_dim)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind()
    best = math.inf
    with torch.no_grad():
        for _ in range(4):
            start = time.process_time()
            attend(q, k, v)
            best = min(best, time.process_time() - start)
    return best


def crossing(lengths: list[int], ours: list[float], theirs: list[float]) -> float | None:
    """The length from which on `ours` stays below `theirs`, between points on logarithmic axes; None: never."""
    gap = np.log(ours) - np.log(theirs)
    above = np.flatnonzero(gap >= 0)
    if gap[-1] >= 0 or len(above) == 0:
        return None if gap[-1] >= 0 else float(lengths[0])
    i = above[-1]
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** (gap[i] / (gap[i] - gap[i + 1])))
