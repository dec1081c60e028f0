"""Sparse QKV: gate the inputs for each module, multiply by one small matrix that all share, and let neighbours mix.

A dense projection has a weight for each input, module and channel. The multiplicative layer has one for each input and
module, and one for each input and channel. Two-dimensional convolutions over time and modules then make q, k and v:

    z[t, s, m] = Σ_i  x[t, i] · D[s, i] · E[i, m]                              a module: (x ⊙ D[s]) @ E
    q[t, s, m] = Σ_j Σ_w Σ_c  z[t + j − F + 1, s + w − 1, c] · K[j, w, c, m]   j < F = 3, w < 3;  zeros outside

k has such a kernel of its own, v one that is 1 wide over the modules. z is shared by all three. To each input i belongs
an S × M matrix of weights, here D[:, i] E[i, :]: of rank 1. Yet some D and E give any permutation of the inputs.

Saves    weights: d (S + M) + 7 F M² instead of 3 d S M. For Llama-7B (d 4,096 = 32 × 128) 1.0 instead of 50 million,
         so a decoding step, bound by the bytes it reads, reads 2 instead of 101 MB. Operations: 2 d S M, one dense
         projection and not three, and 14 F S M² of the convolutions: 55% of the dense ones there.
Costs    rank; a state of F − 1 rows of z for each sequence and layer, without which decoding cannot go on.
Paper    Jaszczur et al.: Sparse is Enough in Scaling Transformers, 2021, arXiv:2111.12763, section 3.2.
Follows  trax's MultiplicativeConvCausalAttention: one z for all, padding by zeros, on the left only in time, F = 3, D
         from N(0, ½²), the rest Glorot. It adds biases and drops the output projection. Here there is no bias, as in
         Llama, and the output projection stays, so that only q, k and v differ from the dense model.
Symbols  B sequences; T new tokens; d inputs; S modules of M channels, by default one for each head; F time taps.
         x `[B, T, d]`; gates D `[S, d]`; shared E `[d, M]`; z `[B, T, S, M]`; kernels `[F, 3 or 1, M, M]`, in to out.
Kernel   kernels/sparsity/sparse_qkv.py
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.conv_cache import ConvCache, start
from minitfm import surgery, train
from minitfm.cache import Cache
from minitfm.config import Config
from minitfm.generate import generate
from minitfm.model import Attention, Transformer, rotate

TAPS, WIDTHS = 3, {"q": 3, "k": 3, "v": 1}  # positions in time, modules that a kernel spans


def require_weights(**weights: np.ndarray) -> None:
    """Raise ValueError, by name, for a weight that is empty or not finite."""
    for name, weight in weights.items():
        if weight.size == 0 or not np.isfinite(weight).all():
            raise ValueError(f"{name} must be finite and not empty, got shape {weight.shape}")


def multiplicative(x: np.ndarray, gates: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """z[.., s, m] = Σ_i x[.., i] gates[s, i] shared[i, m]: each module gates the inputs, and all share one matrix.

    x `[.., d]`, gates `[S, d]`, shared `[d, M]`; returns `[.., S, M]` in numpy's common dtype of the three, which stay
    as they are. A NaN in x stays with its own z. Raises ValueError for shapes that do not fit together, and for weights
    that are empty or not finite.
    Source: Jaszczur et al. 2021, section 3.2, "multiplicative dense layer".
    """
    if gates.ndim != 2 or shared.ndim != 2 or x.ndim < 1 or not x.shape[-1] == gates.shape[1] == shared.shape[0]:
        raise ValueError(f"need x [.., d], gates [S, d], shared [d, M]; got {x.shape}, {gates.shape}, {shared.shape}")
    require_weights(gates=gates, shared=shared)
    return (x[..., None, :] * gates) @ shared  # [.., S, d] @ [d, M]


def permutation_weights(order: np.ndarray, modules: int) -> tuple[np.ndarray, np.ndarray]:
    """gates `[modules, d]` and shared `[d, d / modules]` of zeros and ones by which `multiplicative` permutes exactly.

    Output p, counted through the modules one after the other, is input order[p]: z.reshape(d) = x[order]. order is int
    `[d]`. Both results are float64. Raises ValueError unless order permutes 0 .. d − 1 and modules divides d.
    Source: Jaszczur et al. 2021, section 3.2, theorem 1.
    """
    order = np.asarray(order)
    if order.ndim != 1 or order.size == 0 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise ValueError(f"order must be a permutation of 0 .. d - 1, got {order}")
    if modules < 1 or order.size % modules:
        raise ValueError(f"modules must be positive and divide the {order.size} inputs, got {modules}")
    module, channel = np.divmod(np.arange(order.size), order.size // modules)  # where each output stands
    gates, shared = np.zeros((modules, order.size)), np.zeros((order.size, order.size // modules))
    gates[module, order] = 1  # an input passes the gate of its own module only
    shared[order, channel] = 1
    return gates, shared


def causal_convolution(z: np.ndarray, kernel: np.ndarray, past: np.ndarray | None = None) -> np.ndarray:
    """y[b, t, s] = Σ_j Σ_w z[b, t + j − (F − 1), s + w − (W − 1) / 2] @ kernel[j, w]: causal, centred on modules.

    z `[B, T, S, C]`; kernel `[F, W, C, M]`, W odd, so that kernel[F − 1, (W − 1) / 2] meets z[b, t, s] itself; returns
    `[B, T, S, M]` in numpy's common dtype of both. past `[B, F − 1, S, C]` holds what came before z, the last of it
    last; None: zeros. Modules outside 0 .. S − 1 count as zeros. Nothing is changed in place.
    Raises ValueError for an even W, for shapes that do not fit together, and for a kernel that is empty or not finite.
    """
    if z.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] != z.shape[3] or kernel.shape[1] % 2 == 0:
        raise ValueError(f"need z [B, T, S, C], kernel [F, odd W, C, M]; got {z.shape} and {kernel.shape}")
    require_weights(kernel=kernel)
    (B, T, S, C), (taps, width) = z.shape, kernel.shape[:2]
    before = np.zeros((B, taps - 1, S, C), z.dtype) if past is None else past
    if before.shape != (B, taps - 1, S, C):
        raise ValueError(f"past must have shape {(B, taps - 1, S, C)}, got {before.shape}")
    around = np.pad(np.concatenate([before, z], axis=1), ((0, 0), (0, 0), (width // 2, width // 2), (0, 0)))
    y = np.zeros((B, T, S, kernel.shape[3]), np.result_type(z, kernel))
    for j, w in np.ndindex(taps, width):
        y += around[:, j : j + T, w : w + S] @ kernel[j, w]
    return y


def sparse_qkv(
    x: np.ndarray, gates: np.ndarray, shared: np.ndarray, q_kernel: np.ndarray, k_kernel: np.ndarray,
    v_kernel: np.ndarray, past: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """q, k, v `[B, T, S M]`, and the state that the next call takes as its `past`: `[B, F − 1, S M]`.

    x `[B, T, d]`, T >= 1; kernels `[F, odd, M, M]` with one F. The state holds the last F − 1 rows of z in its dtype,
    those of `past` among them where T is less than that. So a text gives the same results however it is cut into calls.
    past None: zeros, the beginning. Raises ValueError as the functions above, and unless all kernels have one F.
    """
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, T, d] with T >= 1, got shape {x.shape}")
    taps = {len(q_kernel), len(k_kernel), len(v_kernel)}
    if len(taps) > 1:
        raise ValueError(f"the kernels must span the same time, got {sorted(taps)} positions")
    z = multiplicative(x, gates, shared)
    B, T, S, M = z.shape
    before = np.zeros((B, max(taps) - 1, S * M), z.dtype) if past is None else past
    if before.shape != (B, max(taps) - 1, S * M):
        raise ValueError(f"past must have shape {(B, max(taps) - 1, S * M)}, got {before.shape}")
    made = [causal_convolution(z, w, before.reshape(B, -1, S, M)) for w in (q_kernel, k_kernel, v_kernel)]
    q, k, v = (y.reshape(B, T, -1) for y in made)
    return q, k, v, np.concatenate([before, z.reshape(B, T, -1)], axis=1)[:, T:]


def qkv_weights(inputs: int, modules: int, channels: int, taps: int = TAPS) -> int:
    """Numbers in the weights: gates, the shared matrix, and 3 + 3 + 1 matrices of the kernels for each tap."""
    return inputs * (modules + channels) + sum(WIDTHS.values()) * taps * channels**2


def qkv_operations(inputs: int, modules: int, channels: int, taps: int = TAPS) -> int:
    """Multiplications and additions for a token: gates, the product with the shared matrix, the convolutions."""
    return inputs * modules * (1 + 2 * channels) + 2 * sum(WIDTHS.values()) * taps * modules * channels**2


class SparseQKV(nn.Module):
    """`sparse_qkv` with weights to be trained. On CUDA, where nothing wants a gradient, it is the kernel."""

    def __init__(self, inputs: int, modules: int, channels: int, taps: int = TAPS) -> None:
        super().__init__()
        if min(inputs, modules, channels, taps) < 1:
            raise ValueError(f"sizes must be positive, got {inputs=}, {modules=}, {channels=}, {taps=}")
        self.gates = nn.Parameter(0.5 * torch.randn(modules, inputs))
        self.shared = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, channels)))
        for name, width in WIDTHS.items():
            reach = math.sqrt(3 / (taps * width * channels))  # Glorot, fans of taps · width · channels
            kernel = torch.empty(taps, width, channels, channels).uniform_(-reach, reach)
            self.register_parameter(f"{name}_kernel", nn.Parameter(kernel))

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, ...]:
        """q, k, v, state for x `[B, T, d]` and past `[B, F − 1, S M]`, as in `sparse_qkv`; errors as there."""
        kernels = [self.get_parameter(f"{name}_kernel") for name in WIDTHS]
        if x.is_cuda and not torch.is_grad_enabled():
            from kernels.sparsity.sparse_qkv import sparse_qkv as kernel

            return kernel(x.contiguous(), self.gates, self.shared, *kernels, past=past)
        B, T, (S, M) = *x.shape[:2], (len(self.gates), self.shared.shape[1])
        z = ((x[:, :, None] * self.gates) @ self.shared).flatten(2)
        before = z.new_zeros(B, len(kernels[0]) - 1, S * M) if past is None else past
        if before.shape != (B, len(kernels[0]) - 1, S * M):
            raise ValueError(f"past must be {(B, len(kernels[0]) - 1, S * M)}, got {tuple(before.shape)}")
        rows = torch.cat((before, z), dim=1)
        image = rows.unflatten(2, (S, M)).permute(0, 3, 1, 2)  # [B, M, F - 1 + T, S]
        made = (F.conv2d(image, w.permute(3, 2, 0, 1), padding=(0, w.shape[1] // 2)) for w in kernels)
        return *(y.permute(0, 2, 3, 1).flatten(2) for y in made), rows[:, T:].clone()  # a view would hold all rows


class SparseAttention(nn.Module):
    """Takes the place of a block's `Attention`: q, k and v come from a `SparseQKV`, all else from the one replaced."""

    def __init__(self, dense: Attention, modules: int, taps: int = TAPS) -> None:
        """ValueError for fewer key/value heads than heads, and unless modules divide the width of q."""
        super().__init__()
        width = dense.q_proj.out_features
        if dense.k_proj.out_features != width:
            raise ValueError(f"q, k and v must be of one width, got {width} and {dense.k_proj.out_features}")
        if modules < 1 or width % modules:
            raise ValueError(f"modules must be positive and divide the {width} outputs, got {modules}")
        self.layer, self.head_dim, self.attend, self.o_proj = dense.layer, dense.head_dim, dense.attend, dense.o_proj
        self.qkv = SparseQKV(dense.q_proj.in_features, modules, width // modules, taps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        """As `Attention`. TypeError for a cache that has no place for the state: the next step would be wrong."""
        if not isinstance(cache, ConvCache | None):
            raise TypeError(f"sparse QKV needs a ConvCache around its cache, got a {type(cache).__name__}")
        *made, state = self.qkv(x, None if cache is None else cache.states[self.layer])
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in made)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            cache.states[self.layer] = state
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def sparsify(model: Transformer, modules: int, taps: int = TAPS) -> Transformer:
    """Put a `SparseAttention` with new weights into every block, in place; the same model. It has to be trained."""
    for i, block in enumerate(model.blocks):
        dense: Any = block.get_submodule("attention")
        surgery.replace(model, f"blocks.{i}.attention", SparseAttention(dense, modules, taps).to(dense.o_proj.weight))
    return model


def factorise(model: Transformer, rank: int) -> Transformer:
    """Replace each of q, k and v by two matrices with `rank` channels between them, in place; the same model."""
    for name, layer in surgery.linears(model).items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            narrow, wide = (
                nn.Linear(layer.in_features, rank, bias=False),
                nn.Linear(rank, layer.out_features, bias=False),
            )
            for factor in (narrow, wide):
                nn.init.normal_(factor.weight, std=factor.in_features**-0.5)
            surgery.replace(model, name, nn.Sequential(narrow, wide))
    return model


BATCH, LENGTH, RATE = 8, 64, 5e-3  # sequences and tokens of a step; peak of AdamW's learning rate


def sized(config: Config) -> Config:
    """A model to train within seconds, 2 layers as wide as the base model's, a head for each module.

    They are the most, at most √dim, that leave heads an even size: there gates and shared matrix are smallest.
    """
    dim = config.dim
    heads = max(n for n in range(1, math.isqrt(dim) + 1) if dim % (2 * n) == 0 or n == 1)
    return replace(config, layers=2, heads=heads, kv_heads=heads, head_dim=dim // heads, hidden_dim=dim)


DENSE, SPARSE, STILL, LOW_RANK = "dense", "sparse", "sparse, 1 tap", "low rank"


def variant(name: str, config: Config, modules: int, seed: int) -> Transformer:
    """An untrained model of that kind. Low rank: at least as many weights in q, k and v as the sparse one has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        if name in (SPARSE, STILL):
            return sparsify(model, modules, TAPS if name == SPARSE else 1)
        weights = qkv_weights(config.dim, modules, config.dim // modules)
        return factorise(model, math.ceil(weights / (6 * config.dim))) if name == LOW_RANK else model


def projection_weights(model: Transformer) -> int:
    """Numbers in what makes q, k and v of one layer."""
    mixer = model.blocks[0].get_submodule("attention")
    return sum(w.numel() for name, w in mixer.named_parameters() if not name.startswith("o_proj"))


def fit(model: Transformer, stream: Tensor, steps: int, seed: int) -> Transformer:
    """Train all weights, in place, on a token stream `[T]`; in eval mode. ValueError as `train.Settings`."""
    length = min(LENGTH, model.config.context, len(stream))
    settings = train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, weight_decay=0.0, seed=seed)
    train.train(model, stream, settings)
    return model.eval()


@torch.no_grad()
def decoding_error(model: Transformer, tokens: Tensor) -> float:
    """Largest difference of a logit between a text `[B, T]` at once, and a prefill of T / 2 followed by steps."""
    whole, cache, half = model(tokens), start(model, len(tokens)), tokens.shape[1] // 2
    pieces = [model(part, cache) for part in (tokens[:, :half], *tokens[:, half:].split(1, dim=1))]
    return (torch.cat(pieces, dim=1) - whole).abs().max().item()


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run sparse_qkv`."""
    parser.add_argument("--modules", type=int, help="modules of the projections (default: the most up to √dim)")
    parser.add_argument("--steps", type=int, default=100, help="of training, each of two models (default 100)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Train a dense and a sparse model from scratch, for dense weights have no sparse form; let the latter decode."""
    config = sized(lab.config)
    modules = config.heads if args.modules is None else args.modules
    models = {name: variant(name, config, modules, args.seed) for name in (DENSE, SPARSE)}
    for model in models.values():
        fit(model, lab.train_stream, args.steps, args.seed)
    sparse, prompt = models[SPARSE], lab.validation[:1, :32]
    cache = start(sparse)
    written = generate(sparse, prompt, 16, cache=cache)[0, 32:]
    return {
        **{f"q, k, v weights of a layer, {name}": projection_weights(model) for name, model in models.items()},
        **{f"perplexity, {name}": lab.perplexity(model) for name, model in models.items()},
        "largest difference of a logit in decoding": decoding_error(sparse, lab.validation[:4]),
        "bytes of its states": sum(state.nbytes for state in cache.states if state is not None),
        "goes on with": repr(lab.tokenizer.decode(written.tolist())),
    }


def draw(found: dict[str, list[float]], weights: dict[str, int]) -> Figure:
    """Perplexity against the weights of q, k and v, and these weights against the width of the model."""
    fig, (left, right) = panels(2, width=7.2)
    for (name, values), role in zip(found.items(), ("reference", "method", "second", "baseline"), strict=True):
        marker = {**series(role), "marker": series(role)["marker"] or "*", "linestyle": "none"}
        left.plot([weights[name]] * len(values), values, **marker, label=name)
    left.set(xlabel="q, k, v weights of a layer", ylabel="perplexity", title="trained from scratch", xlim=(0, None))
    widths = [128 * 2**n for n in range(1, 7)]
    right.loglog(widths, [3 * d * d for d in widths], **series("reference"), label="dense")
    right.loglog(widths, [qkv_weights(d, d // 128, 128) for d in widths], **series("method"), label="sparse, M = 128")
    right.set(xlabel="width d", ylabel="q, k, v weights", title="by width")
    legend(left)
    legend(right)
    return fig


def claim(lab: Lab) -> Claim:
    """Sparse QKV is as good as dense with far fewer weights, and better than a low rank with as many.

    As good: the mean loss is at most 1% above dense, in nats. Better: in every seed. One tap alone shows how much of it
    comes from looking at the tokens before, which dense projections cannot.
    """
    config, steps, found = sized(lab.config), 500 if lab.full else 40, dict[str, list[float]]()
    for name in (DENSE, SPARSE, STILL, LOW_RANK):
        models = [fit(variant(name, config, config.heads, n), lab.train_stream, steps, n) for n in lab.seeds]
        found[name] = [lab.perplexity(model) for model in models]
        if name == SPARSE:
            apart = decoding_error(models[0], lab.validation[:4])
    weights = {name: projection_weights(variant(name, config, config.heads, 0)) for name in found}
    loss = {name: float(np.mean(np.log(values))) for name, values in found.items()}
    mean = {name: math.exp(value) for name, value in loss.items()}
    near, better = loss[SPARSE] <= 1.01 * loss[DENSE], all(map(float.__lt__, found[SPARSE], found[LOW_RANK]))
    sentence = (
        f"With {weights[SPARSE] / weights[DENSE]:.0%} of the q, k, v weights, sparse QKV "
        f"{'keeps' if near else 'does not keep'} the quality of dense: perplexity {mean[SPARSE]:.0f} against "
        f"{mean[DENSE]:.0f} after {steps} steps, {mean[STILL]:.0f} without its time taps; a low rank with as "
        f"many weights comes to {mean[LOW_RANK]:.0f}{'' if better else ', which is no worse in some seed'}."
    )
    numbers = {"largest difference of a logit in decoding": apart}
    numbers |= {f"perplexity, {name}": value for name, value in mean.items()}
    numbers |= {f"q, k, v weights of a layer, {name}": count for name, count in weights.items()}
    setting = (
        f"{config.layers} layers of {config.dim}, {config.heads} heads and modules, hidden width {config.hidden_dim}, "
        f"from scratch; AdamW, rate {RATE} (best for dense of 2, 5 and 10e-3), {steps} steps of {BATCH} × {LENGTH} "
        f"tokens; mean loss over seeds {lab.seeds}; output projections dense. So short a training tells who learns fast"
    )
    return Claim(sentence, near and better, numbers, draw(found, weights), setting)
