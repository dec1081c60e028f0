"""What each token costs by soft and by hard targets, and its gradient, each in one pass over both models' logits.

Fused: both softmaxes at the temperature, the student's at 1, KL, cross-entropy; backward, all that and the difference.

    bytes        forward  2 s N V + 28 N       both logits; per token a target, two losses, three norms
                 backward 3 s N V + 28 N       both logits and the gradient     s bytes a logit, N tokens, V vocabulary
    operations   an exponential for each probability: 3 N V backward, as many forward, or 2 N V where T is 1, 2, 4 or 8
Replaces one torch operator after the other: two divisions, three log-softmaxes, KL and its sum move about 14 s N V
bytes forward and hold four tensors of N V at once. Here no probability is ever in memory, and on request the gradient
takes the place of the student's logits.

A row is read in blocks, with a running maximum of either model. Sums are relative to it, one in every lane, and are
rescaled when it grows; lanes are added once, at the end. With s and t relative to their maxima, the running sums are

    Q = Σ e^(s / T)     P = Σ e^(t / T)     E = Σ e^s     C = Σ e^(t / T) (t − s) / T
    KL = C / P − log P + log Q     cross-entropy = log E − s[target]

When the maxima grow by a (teacher) and b (student), over T, each term of C becomes e^−a (its (t − s) / T − a + b): so C
becomes e^−a (C − (a − b) P). A block as wide as the row would need no such care, but at 32k to 128k tokens it does not
fit the registers: a published kernel of this kind spills kilobytes a thread that way and reaches 7% of its floor.
On recent GPUs exponentials are nearly as scarce as bytes: 16-bit logits come at 4.5 pairs a clock and multiprocessor,
which computes 16. So where T is a power of two e^s is e^(s / T) squared log2 T times. Exponentials are of base 2.
Logits that are not finite spread into the losses and the gradient of their own token. A token whose gradients dsoft and
dhard are both 0, padding for instance, is not read by the backward pass, whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
SQUARINGS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}  # by temperature
FORWARD_BLOCK, BACKWARD_BLOCK = 2048, 4096  # logits of a step, of a program; powers of two


@triton.jit
def at_one(raised, exponent, temperature, SQUARINGS: tl.constexpr):
    """2^(exponent · temperature), where raised = 2^exponent and temperature = 2^SQUARINGS, or another if that is -1."""
    if SQUARINGS < 0:
        raised = tl.exp2(exponent * temperature)
    else:
        for _ in tl.static_range(SQUARINGS):
            raised = raised * raised
    return raised


@triton.jit
def losses_kernel(
    student_ptr, teacher_ptr, target_ptr, soft_ptr, hard_ptr, norm_ptr, tokens, vocabulary, ignored, temperature,
    SQUARINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """soft, hard and three norms of one token, a row of student and teacher `[tokens, vocabulary]`; target `[tokens]`.

    soft, hard `[tokens]`, norms `[3, tokens]` float32: as the reference has them. hard is 0 where the target is
    `ignored`, NaN where it is outside of the vocabulary. SQUARINGS: as in `at_one`. Nothing outside of the two rows is
    read, whatever the vocabulary's size.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr, teacher_ptr = student_ptr + row * vocabulary, teacher_ptr + row * vocabulary
    scale = LOG2_E / temperature
    s_top, t_top = tl.load(student_ptr).to(tl.float32) * scale, tl.load(teacher_ptr).to(tl.float32) * scale
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    e_sum, cross = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < vocabulary
        s = tl.load(student_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        t = tl.load(teacher_ptr + column, mask=live, other=float("-inf")).to(tl.float32) * scale
        s_new, t_new = tl.maximum(s_top, tl.max(s, axis=0)), tl.maximum(t_top, tl.max(t, axis=0))
        s_step, t_step = s_top - s_new, t_top - t_new  # at most 0
        s, t, s_top, t_top = s - s_new, t - t_new, s_new, t_new
        q, p, q_keep, p_keep = tl.exp2(s), tl.exp2(t), tl.exp2(s_step), tl.exp2(t_step)
        cross = p_keep * (cross + p_sum * (t_step - s_step)) + tl.where(live, p * (t - s), 0.0)
        q_sum, p_sum = q_sum * q_keep + q, p_sum * p_keep + p
        e_keep, e = at_one(q_keep, s_step, temperature, SQUARINGS), at_one(q, s, temperature, SQUARINGS)
        e_sum = e_sum * e_keep + e
    total = tl.sum(p_sum, axis=0)
    q_log, p_log, e_log = tl.log(tl.sum(q_sum, axis=0)), tl.log(total), tl.log(tl.sum(e_sum, axis=0))
    soft = tl.sum(cross, axis=0) / total * LN_2 - p_log + q_log
    tl.store(soft_ptr + row, soft * temperature * temperature)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < vocabulary)
    label = tl.load(student_ptr + target, mask=known, other=float("nan")).to(tl.float32) * scale
    hard = (s_top - label) * (temperature * LN_2) + e_log
    tl.store(hard_ptr + row, tl.where(target == ignored, 0.0, hard))
    tl.store(norm_ptr + row, s_top * LN_2 + q_log)
    tl.store(norm_ptr + tokens + row, t_top * LN_2 + p_log)
    tl.store(norm_ptr + 2 * tokens + row, s_top * (temperature * LN_2) + e_log)


@triton.jit
def gradient_kernel(
    student_ptr, teacher_ptr, target_ptr, norm_ptr, dsoft_ptr, dhard_ptr, out_ptr, tokens, vocabulary, blocks, ignored,
    temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK of the student's logits of one token; out may be student. Shapes as in `losses_kernel`.

    dsoft · T (q − p) + dhard · (e − one at the target), the latter 0 where the target is `ignored`. Where both weights
    are 0 so is the gradient, and the logits are not read.
    """
    program = tl.program_id(0)  # dividing 64 bits would take longer than many a logit
    row, column = (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
    target, scale = tl.load(target_ptr + row), LOG2_E / temperature
    dsoft = tl.load(dsoft_ptr + row) * temperature
    dhard = tl.where(target == ignored, 0.0, tl.load(dhard_ptr + row))
    live, offset = column < vocabulary, row * vocabulary + column
    gradient = tl.zeros((BLOCK,), tl.float32)
    if (dsoft != 0) | (dhard != 0):
        s = tl.load(student_ptr + offset, mask=live, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + offset, mask=live, other=0.0).to(tl.float32)
        q = tl.exp2(s * scale - tl.load(norm_ptr + row) * LOG2_E)
        p = tl.exp2(t * scale - tl.load(norm_ptr + tokens + row) * LOG2_E)
        e = tl.exp2((s - tl.load(norm_ptr + 2 * tokens + row)) * LOG2_E)
        gradient = dsoft * (q - p) + dhard * (e - tl.where(column == target, 1.0, 0.0))
    tl.store(out_ptr + offset, gradient.to(out_ptr.dtype.element_ty), mask=live)


def token_losses(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 2.0, ignore_index: int = -100,
    block: int = FORWARD_BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """soft `[N]`, hard `[N]` and norms `[3, N]`, float32, as the reference defines them.

    student, teacher  logits `[N, V]`, float16, bfloat16 or float32, each its own; contiguous, finite
    targets           int64 `[N]`, contiguous: 0 .. V − 1 or ignore_index (another one gives a loss of NaN)
    block             logits that are taken at a time, a power of two

    Raises ValueError or TypeError for shapes (vocabularies that differ), dtypes and a temperature that do not fit.
    """
    tokens, vocabulary = _checked(student, teacher, targets, temperature)
    soft, hard = (torch.empty(tokens, dtype=torch.float32, device=student.device) for _ in range(2))
    norms = torch.empty(3, tokens, dtype=torch.float32, device=student.device)
    sizes = tokens, vocabulary, ignore_index, float(temperature)
    meta = {"SQUARINGS": SQUARINGS.get(float(temperature), -1), "BLOCK": block, "num_warps": 8}
    losses_kernel[(tokens,)](student, teacher, targets, soft, hard, norms, *sizes, **meta)
    return soft, hard, norms


def token_gradient(
    student: Tensor, teacher: Tensor, targets: Tensor, norms: Tensor, dsoft: Tensor, dhard: Tensor,
    temperature: float = 2.0, ignore_index: int = -100, in_place: bool = False, block: int = BACKWARD_BLOCK,
) -> Tensor:  # fmt: skip
    """Gradient `[N, V]` of Σ (dsoft · soft + dhard · hard) in the student's logits, like these in dtype.

    norms         float32 `[3, N]`, from `token_losses` at the same temperature; contiguous
    dsoft, dhard  float32 `[N]`, contiguous; a token with 0 in both is not read
    in_place      write it over `student`, which is then what is returned

    Everything else as `token_losses`, errors too.
    """
    tokens, vocabulary = _checked(student, teacher, targets, temperature, norms=norms, dsoft=dsoft, dhard=dhard)
    out, blocks = student if in_place else torch.empty_like(student), triton.cdiv(vocabulary, block)
    sizes = tokens, vocabulary, blocks, ignore_index, float(temperature)
    held = student, teacher, targets, norms, dsoft, dhard, out
    gradient_kernel[(tokens * blocks,)](*held, *sizes, BLOCK=block, num_warps=8)
    return out


def _checked(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, **by_token: Tensor
) -> tuple[int, int]:
    """(N, V), or the error that `token_losses` promises; by_token: float32, `[N]` along the last axis."""
    require(0 < temperature < math.inf, f"temperature must be positive and finite, got {temperature}")
    require(student.dim() == 2 and student.numel() > 0, f"student must be [N, V], got {tuple(student.shape)}")
    tokens, vocabulary = student.shape
    shape = tuple(teacher.shape)
    require(shape[1:] == (vocabulary,), f"teacher must share the student's vocabulary of {vocabulary}, got {shape}")
    require(shape[0] == tokens, f"teacher must have the student's {tokens} rows, got {shape}")
    require(targets.shape == (tokens,), f"targets must be [{tokens}], got {tuple(targets.shape)}")
    for name, values in by_token.items():
        wanted = (3, tokens) if name == "norms" else (tokens,)
        require(tuple(values.shape) == wanted, f"{name} must be {list(wanted)}, got {tuple(values.shape)}")
    require_dtype(DTYPES, student=student, teacher=teacher)
    require_dtype((torch.int64,), targets=targets)
    require_dtype((torch.float32,), **by_token)
    require_contiguous(student=student, teacher=teacher, targets=targets, **by_token)
    require_launchable(student=student, teacher=teacher, targets=targets, **by_token)
    return tokens, vocabulary


def losses_by_torch(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """`token_losses` by plain torch operators."""
    s, t = student.float() / temperature, teacher.float() / temperature
    log_q, log_p = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
    soft = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    hard = F.cross_entropy(student.float(), targets, reduction="none")
    return soft, hard, torch.stack([x.logsumexp(-1) for x in (s, t, student.float())])


def gradient_by_torch(
    student: Tensor, teacher: Tensor, targets: Tensor, norms: Tensor, dsoft: Tensor, dhard: Tensor, temperature: float
) -> Tensor:
    """`token_gradient` by plain torch operators."""
    q, p = ((logits.float() / temperature).softmax(-1) for logits in (student, teacher))
    hard = dhard[:, None] * student.float().softmax(-1)
    hard.scatter_add_(1, targets[:, None], -dhard[:, None])
    return (hard + temperature * dsoft[:, None] * (q - p)).to(student.dtype)


def arguments(tokens: int, vocabulary: int, dtype: torch.dtype, temperature: float, device: torch.device) -> tuple:
    """Those of `token_losses`, with contents on a GPU only."""
    student, teacher = (torch.empty(tokens, vocabulary, dtype=dtype, device=device) for _ in range(2))
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    if device.type == "cuda":
        student.normal_(0, 3)
        teacher.normal_(0, 3)
        targets.random_(vocabulary)
    return student, teacher, targets, temperature


def gradient_arguments(*sizes) -> tuple:
    """Those of `token_gradient`, with contents on a GPU only: weights of a mean."""
    student, teacher, targets, temperature = arguments(*sizes)
    tokens = len(targets)
    norms = torch.empty(3, tokens, device=student.device)
    if student.is_cuda:
        norms = token_losses(student, teacher, targets, temperature)[2]
    weigh = (torch.full((tokens,), share / tokens, device=student.device) for share in (0.5, 0.5))
    return student, teacher, targets, norms, *weigh, temperature


RUNS: dict[str, tuple[Callable, Callable, Callable, int]] = {  # wrapper, the same by torch, inputs, passes over logits
    "forward": (token_losses, losses_by_torch, arguments, 2),
    "backward": (token_gradient, gradient_by_torch, gradient_arguments, 3),
}


def llama_case(
    what: str, tokens: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, temperature: float = 2.0
) -> Case:
    """The logits of a batch in a vocabulary of Llama 2 (32,000) or Llama 3 (128,256); `what` is one of RUNS."""
    run, expected, inputs, passes = RUNS[what]
    return Case(
        name=f"{what}, {tokens} x {vocabulary}, {str(dtype).removeprefix('torch.')}, T {temperature:g}",
        inputs=lambda device: inputs(tokens, vocabulary, dtype, temperature, device),
        run=run,
        expected=expected,
        bytes=passes * tokens * vocabulary * dtype.itemsize + 28 * tokens,
        operations=0,
        kind="stream",
        peers={"torch": expected},
    )


CASES = [llama_case(what, 4096, vocabulary) for what in RUNS for vocabulary in (32000, 128256)]
CASES += [llama_case(what, 2048, 128256, torch.float32, 3.0) for what in RUNS]
