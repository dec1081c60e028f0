"""The divergence of each token between two models' logits, anywhere from forward to reverse KL, and its gradient.

Fused: both softmaxes, their mixture, both of its divergences; backward, all that and the centring.

    bytes        forward  2 s N V + 16 N, the floor; the logits are asked for twice, see below
                 backward 3 s N V + 16 N: both logits and the gradient    s bytes a logit, N tokens, V vocabulary
    operations   special functions: forward 5 N V, backward 3 N V
Replaces one torch operator after the other: softmaxes, mixture, two KL, their weighting and sums move about 26 s N V
bytes forward and hold six tensors of N V at once. Here no probability is ever in memory, and on request the gradient
takes the place of the student's logits.

The mixture needs normed probabilities, and KL against it does not come apart into sums that could be rescaled, as plain
KL does in soft_targets. So a row is read twice: first for its two norms, with running maxima, then for the divergence.
The second time goes from the end to the start: what was read last is still in the cache, and of a row of 32,000 logits
in 16 bits most is. A block as wide as the row would read once, but at 32k to 128k tokens it does not fit the registers:
a published kernel of this kind spills kilobytes a thread that way and reaches 7% of its floor.

Let a be the model that has more than half of the mixture, w <= 1/2 the weight of the other, b, and x = w (b / a − 1):

    m = (1 − w) a + w b = a (1 + x)      Σ −a log(1 + x) / w + Σ b log(b / m) / (1 − w)

Where w is small, so is log(1 + x), and dividing by w would divide its rounding error: there a series takes its place.
At w = 0 the first sum is its limit, Σ (a − b), and the second is KL(b ‖ a): each KL has its own, shorter code. In one
exponential, b / a or a / b, whichever is below 1, nothing overflows however far the logits are apart.
Logits that are not finite spoil their own token. A token whose dloss is 0, padding for instance, is not read by the
backward pass, whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CONVENTIONS = ("limits", "trl")
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
LEAST = 1e-16  # the smallest weight but 0: what float64 can still take from 1
SMALL = 1 / 64  # a weight below needs the series
FORWARD_BLOCK, BACKWARD_BLOCK = 2048, 4096  # logits of a step, of a program; powers of two


@triton.jit
def mixture_terms(log_a, log_b, weight, MIXED: tl.constexpr, SERIES: tl.constexpr):
    """(a, b, a log(a / m) / weight, b log(b / m) / (1 − weight)), entry by entry, for m = (1 − weight) a + weight b.

    log_a, log_b are of base 2. weight is at most 1/2; without MIXED it is 0, and the third is its limit, a − b. SERIES
    is for small weights.
    """
    away = log_b - log_a
    less, more = tl.exp2(-tl.abs(away)), tl.exp2(tl.maximum(log_a, log_b))
    a, b = tl.where(away > 0, more * less, more), tl.where(away > 0, more, more * less)
    if MIXED:
        level = tl.log2(tl.where(away > 0, weight + (1 - weight) * less, 1 - weight + weight * less))  # of m / more
        a_terms = -a * (level + tl.maximum(away, 0.0)) * (LN_2 / weight)
        b_terms = -b * (level + tl.maximum(-away, 0.0)) * (LN_2 / (1 - weight))
        if SERIES:
            x = weight * tl.where(away > 0, (1 - less) / less, less - 1)
            series = 1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6))))  # log(1 + x) / x
            a_terms = tl.where(tl.abs(x) < 1 / 16, (a - b) * series, a_terms)
    else:
        a_terms, b_terms = a - b, b * away * LN_2
    return a, b, a_terms, b_terms


@triton.jit
def divergence_kernel(
    student_ptr, teacher_ptr, loss_ptr, own_ptr, norm_ptr, tokens, vocabulary, weight, factor, temperature,
    SWAPPED: tl.constexpr, MIXED: tl.constexpr, SERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence, the student's part of it and two norms of one token, a row of both `[tokens, vocabulary]`.

    loss, own `[tokens]`, norms `[2, tokens]` float32: as the reference has them; factor multiplies the loss alone.
    weight, MIXED and SERIES as in `mixture_terms`, where a is the student, or, if SWAPPED, the teacher. Nothing outside
    of the two rows is read, whatever the vocabulary's size.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr, teacher_ptr = student_ptr + row * vocabulary, teacher_ptr + row * vocabulary
    scale = LOG2_E / temperature
    s_top, t_top = tl.load(student_ptr).to(tl.float32) * scale, tl.load(teacher_ptr).to(tl.float32) * scale
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        t = tl.load(teacher_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        s_new, t_new = tl.maximum(s_top, tl.max(s, axis=0)), tl.maximum(t_top, tl.max(t, axis=0))
        q_sum = q_sum * tl.exp2(s_top - s_new) + tl.exp2(s - s_new)
        p_sum = p_sum * tl.exp2(t_top - t_new) + tl.exp2(t - t_new)
        s_top, t_top = s_new, t_new
    s_norm, t_norm = s_top + tl.log2(tl.sum(q_sum, axis=0)), t_top + tl.log2(tl.sum(p_sum, axis=0))
    own, others = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last = (vocabulary - 1) // BLOCK * BLOCK
    for start in range(0, vocabulary, BLOCK):
        column = last - start + tl.arange(0, BLOCK)  # from the end, which is still in the cache
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        t = tl.load(teacher_ptr + column, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        s, t = s * scale - s_norm, t * scale - t_norm
        if SWAPPED:
            _, _, t_terms, s_terms = mixture_terms(t, s, weight, MIXED, SERIES)
        else:
            _, _, s_terms, t_terms = mixture_terms(s, t, weight, MIXED, SERIES)
        own, others = own + tl.where(live, s_terms, 0.0), others + tl.where(live, t_terms, 0.0)
    total = tl.sum(own, axis=0)
    tl.store(loss_ptr + row, factor * (total + tl.sum(others, axis=0)))
    tl.store(own_ptr + row, total)
    tl.store(norm_ptr + row, s_norm * LN_2)
    tl.store(norm_ptr + tokens + row, t_norm * LN_2)


@triton.jit
def gradient_kernel(
    student_ptr, teacher_ptr, norm_ptr, own_ptr, dloss_ptr, out_ptr, tokens, vocabulary, blocks, weight, factor,
    temperature, SWAPPED: tl.constexpr, MIXED: tl.constexpr, SERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK of the student's logits of one token; out may be student. As in `divergence_kernel`.

    dloss · factor / T · (the student's terms − q · own). Where dloss is 0 so is the gradient, and nothing is read.
    """
    program = tl.program_id(0)  # dividing 64 bits would take longer than many a logit
    row, column = (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
    live, offset, scale = column < vocabulary, row * vocabulary + column, LOG2_E / temperature
    dloss = tl.load(dloss_ptr + row)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if dloss != 0:
        s = tl.load(student_ptr + offset, mask=live, other=0.0).to(tl.float32) * scale
        t = tl.load(teacher_ptr + offset, mask=live, other=0.0).to(tl.float32) * scale
        s, t = s - tl.load(norm_ptr + row) * LOG2_E, t - tl.load(norm_ptr + tokens + row) * LOG2_E
        if SWAPPED:
            _, q, _, terms = mixture_terms(t, s, weight, MIXED, SERIES)
        else:
            q, _, terms, _ = mixture_terms(s, t, weight, MIXED, SERIES)
        gradient = (dloss * factor / temperature) * (terms - q * tl.load(own_ptr + row))
    tl.store(out_ptr + offset, gradient.to(out_ptr.dtype.element_ty), mask=live)


def token_divergences(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, convention: str = "limits",
    block: int = FORWARD_BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses `[N]`, the student's part `[N]` and norms `[2, N]`, float32, as the reference defines them.

    student, teacher  logits `[N, V]`, float16, bfloat16 or float32, each its own; contiguous, finite
    beta              from 0 to 1, but none between 0 and 1e-16
    block             logits that are taken at a time, a power of two

    Raises ValueError or TypeError for shapes (vocabularies that differ), dtypes, a beta, temperature or convention that
    do not fit.
    """
    tokens, vocabulary = _checked(student, teacher, beta, temperature, convention)
    losses, own = (torch.empty(tokens, dtype=torch.float32, device=student.device) for _ in range(2))
    norms = torch.empty(2, tokens, dtype=torch.float32, device=student.device)
    scalars, meta = _mixture(beta, temperature, convention)
    held = student, teacher, losses, own, norms
    divergence_kernel[(tokens,)](*held, tokens, vocabulary, *scalars, **meta, BLOCK=block, num_warps=8)
    return losses, own, norms


def token_gradient(
    student: Tensor, teacher: Tensor, norms: Tensor, own: Tensor, dloss: Tensor, beta: float = 0.5,
    temperature: float = 1.0, convention: str = "limits", in_place: bool = False, block: int = BACKWARD_BLOCK,
) -> Tensor:  # fmt: skip
    """Gradient `[N, V]` of Σ dloss · loss in the student's logits, like these in dtype.

    norms, own  float32 `[2, N]` and `[N]`, from `token_divergences` with the same settings; contiguous
    dloss       float32 `[N]`, contiguous; a token with 0 is not read
    in_place    write it over `student`, which is then what is returned

    Everything else as `token_divergences`, errors too.
    """
    tokens, vocabulary = _checked(
        student, teacher, beta, temperature, convention, norms=norms, own=own, dloss=dloss
    )  # fmt: skip
    out, blocks = student if in_place else torch.empty_like(student), triton.cdiv(vocabulary, block)
    scalars, meta = _mixture(beta, temperature, convention)
    held = student, teacher, norms, own, dloss, out
    gradient_kernel[(tokens * blocks,)](*held, tokens, vocabulary, blocks, *scalars, **meta, BLOCK=block, num_warps=8)
    return out


def _mixture(beta: float, temperature: float, convention: str) -> tuple[tuple[float, float, float], dict[str, bool]]:
    """weight, factor and temperature, and the constants of both kernels: a is whose part of the mixture is larger."""
    weight = min(beta, 1 - beta)
    factor = beta * (1 - beta) if convention == "trl" and 0 < beta < 1 else 1.0
    meta = {"SWAPPED": beta > 0.5, "MIXED": weight > 0, "SERIES": 0 < weight < SMALL}
    return (float(weight), factor, float(temperature)), meta


def _checked(
    student: Tensor, teacher: Tensor, beta: float, temperature: float, convention: str, **by_token: Tensor
) -> tuple[int, int]:
    """(N, V), or the error that `token_divergences` promises; by_token: float32, `[N]` along the last axis."""
    require(0 < temperature < math.inf, f"temperature must be positive and finite, got {temperature}")
    require(0 <= beta <= 1 and not 0 < beta < LEAST, f"beta must be 0 or from {LEAST} to 1, got {beta}")
    require(convention in CONVENTIONS, f"convention must be one of {CONVENTIONS}, got {convention!r}")
    require(student.dim() == 2 and student.numel() > 0, f"student must be [N, V], got {tuple(student.shape)}")
    tokens, vocabulary = student.shape
    shape = tuple(teacher.shape)
    require(shape[1:] == (vocabulary,), f"teacher must share the student's vocabulary of {vocabulary}, got {shape}")
    require(shape[0] == tokens, f"teacher must have the student's {tokens} rows, got {shape}")
    for name, values in by_token.items():
        wanted = (2, tokens) if name == "norms" else (tokens,)
        require(tuple(values.shape) == wanted, f"{name} must be {list(wanted)}, got {tuple(values.shape)}")
    require_dtype(DTYPES, student=student, teacher=teacher)
    require_dtype((torch.float32,), **by_token)
    require_contiguous(student=student, teacher=teacher, **by_token)
    require_launchable(student=student, teacher=teacher, **by_token)
    return tokens, vocabulary


def terms_by_torch(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> tuple[Tensor, ...]:
    """log q, the student's terms and the teacher's `[N, V]`, and norms, by torch operators; not for a tiny beta."""
    s, t = student.float() / temperature, teacher.float() / temperature
    log_q, log_p, norms = s.log_softmax(-1), t.log_softmax(-1), torch.stack([s.logsumexp(-1), t.logsumexp(-1)])
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.log(beta * p + (1 - beta) * q)
    own = q * (log_q - log_m) / beta if beta > 0 else q - p
    return log_q, own, p * (log_p - log_m) / (1 - beta) if beta < 1 else p - q, norms


def divergences_by_torch(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> tuple[Tensor, ...]:
    """`token_divergences` by plain torch operators."""
    _, own, others, norms = terms_by_torch(student, teacher, beta, temperature)
    return own.sum(-1) + others.sum(-1), own.sum(-1), norms


def gradient_by_torch(
    student: Tensor, teacher: Tensor, norms: Tensor, own: Tensor, dloss: Tensor, beta: float, temperature: float
) -> Tensor:
    """`token_gradient` by plain torch operators."""
    log_q, terms, _, _ = terms_by_torch(student, teacher, beta, temperature)
    return ((dloss / temperature)[:, None] * (terms - log_q.exp() * own[:, None])).to(student.dtype)


def arguments(tokens: int, vocabulary: int, dtype: torch.dtype, beta: float, device: torch.device) -> tuple:
    """Those of `token_divergences`, with contents on a GPU only."""
    student, teacher = (torch.empty(tokens, vocabulary, dtype=dtype, device=device) for _ in range(2))
    if device.type == "cuda":
        student.normal_(0, 2)
        teacher.normal_(0, 2)
    return student, teacher, beta, 1.0


def gradient_arguments(*sizes) -> tuple:
    """Those of `token_gradient`, with contents on a GPU only: weights of a mean."""
    student, teacher, beta, temperature = arguments(*sizes)
    tokens, device = len(student), student.device
    own, norms = torch.empty(tokens, device=device), torch.empty(2, tokens, device=device)
    if student.is_cuda:
        _, own, norms = token_divergences(student, teacher, beta, temperature)
    return student, teacher, norms, own, torch.full((tokens,), 1 / tokens, device=device), beta, temperature


RUNS: dict[str, tuple[Callable, Callable, Callable, int]] = {  # wrapper, the same by torch, inputs, passes over logits
    "forward": (token_divergences, divergences_by_torch, arguments, 2),
    "backward": (token_gradient, gradient_by_torch, gradient_arguments, 3),
}


def llama_case(what: str, tokens: int, vocabulary: int, beta: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The logits of a batch in a vocabulary of Llama 2 (32,000) or Llama 3 (128,256); `what` is one of RUNS."""
    run, expected, inputs, passes = RUNS[what]
    return Case(
        name=f"{what}, {tokens} x {vocabulary}, {str(dtype).removeprefix('torch.')}, beta {beta:g}",
        inputs=lambda device: inputs(tokens, vocabulary, dtype, beta, device),
        run=run,
        expected=expected,
        bytes=passes * tokens * vocabulary * dtype.itemsize + 16 * tokens,
        operations=0,
        kind="stream",
        peers={"torch": expected},
    )


CASES = [llama_case(what, 4096, vocabulary) for what in RUNS for vocabulary in (32000, 128256)]
CASES += [llama_case("forward", 4096, 32000, 0.0), llama_case("backward", 2048, 128256, 0.01, torch.float32)]
