"""Soft targets: learn from how likely the teacher finds every token, not only from the token that came.

    soft = T² · KL(p ‖ q),   p = softmax(teacher / T),   q = softmax(student / T)
    hard = −log softmax(student)[target]
    Hinton       α · mean soft + (1 − α) · mean hard
    DistilBERT   5 · mean soft + 2 · mean hard + 1 · mean (1 − cos(student's hidden state, teacher's))

Means are over tokens, sums over the vocabulary. With a high T the small probabilities count, too: which wrong tokens
would have been nearly right. That shrinks the gradient of KL by about T²; the factor T² undoes it, so that α means the
same at every T. DistilBERT's student has every other layer of its teacher, and starts as these.

Saves    bytes and operations of the layers that the student lacks, in every later use: half of the layers are half of
         the block weights. The embedding stays.
Costs    training, and in it one more forward pass, the teacher's: (3 S + P) / 3 S of the operations of learning from
         the text alone, for S weights of the student and P of the teacher. Quality: it seldom reaches its teacher.
Paper    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531, section 2. Sanh,
         Debut, Chaumond, Wolf: DistilBERT, 2019, arXiv:1910.01108, sections 2 and 3.
Follows  KL is summed over the vocabulary and averaged over tokens. A mean over both, which `nn.KLDivLoss()` takes
         unless told otherwise and the most copied repository does, is V times too small. DistilBERT's script: T = 2,
         every attended token enters soft and cosine, only those with a target hard; layers 0, 2, 4, 7, 9, 11 of 12.
Symbols  N tokens; V vocabulary; C width. student, teacher: logits `[N, V]`; targets int64 `[N]`.
Kernel   kernels/distillation/soft_targets.py
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import COLOURS, MARKERS, figure, legend, series
from chapters.lab import Lab
from chapters.shared import student_lab
from chapters.shared.student_lab import StudentLoss
from minitfm import train
from minitfm.model import Transformer

IGNORED = -100  # the target of a token that has none, as torch has it
WEIGHTS = (5.0, 2.0, 1.0)  # of soft, hard and cosine in DistilBERT


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def require_fit(student: Any, teacher: Any, targets: Any, temperature: float) -> None:
    """Raise ValueError unless logits `[N, V]`, targets `[N]` (arrays or tensors) and temperature fit together."""
    require_temperature(temperature)
    if len(student.shape) != 2 or len(teacher.shape) != 2 or 0 in student.shape:
        raise ValueError(f"student and teacher must be [N, V], got {tuple(student.shape)} and {tuple(teacher.shape)}")
    sizes = student.shape[1], teacher.shape[1]
    if sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher must share one vocabulary, they have {sizes[0]} and {sizes[1]} tokens")
    if student.shape != teacher.shape or targets.shape != student.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (student, teacher, targets))
        raise ValueError(f"student, teacher and targets must be of the same N tokens, got {shapes}")


def checked(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temperature: float, ignore_index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """student / T and teacher / T as float64 `[N, V]`, and which targets count, bool `[N]`.

    Raises ValueError as `require_fit`, for logits that are not finite, also where only division by T makes them so, and
    for targets that are neither below V nor ignore_index; TypeError for targets that are no integers.
    """
    require_fit(student, teacher, targets, temperature)
    with np.errstate(over="ignore"):
        s, t = student.astype(np.float64) / temperature, teacher.astype(np.float64) / temperature
    for name, logits in (("student", s), ("teacher", t)):
        if not np.isfinite(logits).all():
            raise ValueError(f"{name} / {temperature} must be finite, got {np.sum(~np.isfinite(logits))} others")
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    counts = targets != ignore_index
    if not ((targets >= 0) & (targets < student.shape[1]))[counts].all():
        raise ValueError(f"targets must be from 0 to {student.shape[1] - 1} or {ignore_index}, got {targets}")
    return s, t, counts


def token_losses(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temperature: float = 2.0, ignore_index: int = IGNORED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each token costs: soft `[N]`, hard `[N]`, and norms `[3, N]`, float64.

    student, teacher: logits `[N, V]`; targets: integers `[N]`. With p = softmax(teacher / T), q = softmax(student / T):
    soft   T² Σ p (log p − log q), summed over the vocabulary. Every token has it, whatever its target
    hard   −log softmax(student)[target], at temperature 1; 0 where the target is ignore_index
    norms  log Σ exp of student / T, of teacher / T and of student, in this order
    Right for any finite logits, however large. Raises ValueError for a temperature that is not positive and finite,
    shapes that do not fit (vocabularies that differ among them), logits that are not finite, and targets that are
    neither 0 .. V − 1 nor ignore_index; TypeError for targets that are no integers.
    Source: Hinton et al. 2015, section 2.
    """
    s, t, counts = checked(student, teacher, targets, temperature, ignore_index)
    norms = np.logaddexp.reduce([s, t, student.astype(np.float64)], axis=-1)  # [3, N]
    log_q, log_p = s - norms[0][:, None], t - norms[1][:, None]
    soft = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    label = np.take_along_axis(student, np.where(counts, targets, 0)[:, None], axis=1)[:, 0]
    return soft, np.where(counts, norms[2] - label, 0), norms


def token_gradient(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, norms: np.ndarray, dsoft: np.ndarray,
    dhard: np.ndarray, temperature: float = 2.0, ignore_index: int = IGNORED,
) -> np.ndarray:  # fmt: skip
    """Gradient `[N, V]`, float64, of Σ (dsoft · soft + dhard · hard) in the student's logits; the teacher's are fixed.

    norms `[3, N]` as `token_losses` returns them; dsoft, dhard `[N]` say how much each token's losses weigh:
    dsoft · T (softmax(student / T) − softmax(teacher / T)) + dhard · (softmax(student) − one at the target, else 0),
    the second term being 0 where the target is ignore_index. What does not weigh, 0, adds nothing. No argument is
    changed. Raises ValueError and TypeError as `token_losses`, and ValueError where norms, dsoft and dhard do not fit.
    """
    s, t, counts = checked(student, teacher, targets, temperature, ignore_index)
    if norms.shape != (3, len(s)) or dsoft.shape != (len(s),) or dhard.shape != (len(s),):
        raise ValueError(f"need norms [3, N], dsoft and dhard [N]; got {norms.shape}, {dsoft.shape} and {dhard.shape}")
    soft = np.exp(s - norms[0][:, None]) - np.exp(t - norms[1][:, None])
    hard = np.exp(student.astype(np.float64) - norms[2][:, None])
    hard[np.flatnonzero(counts), targets[counts]] -= 1
    return (temperature * dsoft)[:, None] * soft + np.where(counts, dhard, 0)[:, None] * hard


def cosine_losses(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """1 − cos of the angle between two hidden states of each token, `[N, C]` and `[N, C]` -> float64 `[N]`.

    cos = Σ a b / √((Σ a² + 1e-12) (Σ b² + 1e-12)), sums over C, as torch's CosineEmbeddingLoss has it: a state of zeros
    costs 1. Raises ValueError for shapes that differ or are no `[N, C]`, and for states that are not finite.
    Source: DistilBERT, section 2.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"hidden states must be [N, C] of one shape, got {student.shape} and {teacher.shape}")
    a, b = student.astype(np.float64), teacher.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("hidden states must be finite")
    lengths = np.sqrt((a**2).sum(axis=1) + 1e-12) * np.sqrt((b**2).sum(axis=1) + 1e-12)
    return 1 - (a * b).sum(axis=1) / lengths


def token_mean(losses: np.ndarray, counts: np.ndarray) -> float:
    """Mean of losses `[N]` over the tokens that count, bool `[N]`. ValueError if none does."""
    if not counts.any():
        raise ValueError("no token counts: every target is ignored, or nothing is attended")
    return float(losses[counts].mean())


def hinton_loss(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temperature: float = 2.0, alpha: float = 0.5,
    ignore_index: int = IGNORED,
) -> float:  # fmt: skip
    """α · mean soft + (1 − α) · mean hard, over the tokens that have a target. Errors as `token_losses`, and for α."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    soft, hard, _ = token_losses(student, teacher, targets, temperature, ignore_index)
    counts = targets != ignore_index
    return alpha * token_mean(soft, counts) + (1 - alpha) * token_mean(hard, counts)


def triple_loss(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, hidden: tuple[np.ndarray, np.ndarray],
    attended: np.ndarray | None = None, temperature: float = 2.0, weights: tuple[float, float, float] = WEIGHTS,
    ignore_index: int = IGNORED,
) -> float:  # fmt: skip
    """DistilBERT's loss; hidden: the last states of student and teacher, each `[N, C]`. Errors as the parts of it.

    attended, bool `[N]`, says which tokens enter soft and cosine (None: all); hard takes those that have a target.
    """
    soft, hard, _ = token_losses(student, teacher, targets, temperature, ignore_index)
    attended = np.ones(len(soft), bool) if attended is None else attended
    means = token_mean(soft, attended), token_mean(hard, targets != ignore_index)
    return float(np.dot(weights, [*means, token_mean(cosine_losses(*hidden), attended)]))


class FusedLosses(torch.autograd.Function):
    """The kernel's `token_losses` with its `token_gradient`: CUDA tensors only."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        """soft and hard, float32 `[N]`. in_place: the gradient takes the memory of `student`, unusable from then on."""
        from kernels.distillation.soft_targets import token_losses as kernel

        soft, hard, norms = kernel(student, teacher, targets, temperature, IGNORED)
        ctx.save_for_backward(student, teacher, targets, norms)
        ctx.temperature, ctx.in_place = temperature, in_place
        return soft, hard

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The student's gradient."""
        from kernels.distillation.soft_targets import token_gradient as kernel

        dsoft, dhard = (gradient.contiguous() for gradient in gradients)
        student, teacher, targets, norms = ctx.saved_tensors
        found = kernel(student, teacher, targets, norms, dsoft, dhard, ctx.temperature, IGNORED, ctx.in_place)
        return found, None, None, None, None


def soft_and_hard(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 2.0, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """`token_losses` of tensors, soft and hard `[N]`, with a gradient for the student; on CUDA the kernel's.

    in_place (CUDA): the gradient overwrites the student's logits, for training loops that need these no more.
    Raises ValueError as `require_fit`, for targets outside, and, naming them, for logits that are not finite.
    """
    require_fit(student, teacher, targets, temperature)
    if ((targets != IGNORED) & ((targets < 0) | (targets >= student.shape[1]))).any():
        raise ValueError(f"targets must be from 0 to {student.shape[1] - 1} or {IGNORED}, got {targets.tolist()}")
    if student.is_cuda:
        losses = FusedLosses.apply(student.contiguous(), teacher.contiguous(), targets, temperature, in_place)
    else:
        s, t = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student, teacher))
        log_q, log_p = F.log_softmax(s / temperature, dim=-1), F.log_softmax(t / temperature, dim=-1)
        soft = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        losses = soft, F.cross_entropy(s, targets, reduction="none", ignore_index=IGNORED)
    if not torch.isfinite(losses[0] + losses[1]).all():
        for name, logits in (("student", student), ("teacher", teacher)):
            if not torch.isfinite(logits).all():
                raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(logits)).sum())} other logits")
    return losses


def hinton(temperature: float = 2.0, alpha: float = 0.5) -> StudentLoss:
    """`hinton_loss` for `student_lab.taught`, where every token has a target. ValueError for α outside 0 .. 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    require_temperature(temperature)

    def loss(student: Tensor, teacher: Tensor, targets: Tensor, hidden: tuple[Tensor, Tensor]) -> Tensor:
        soft, hard = soft_and_hard(student, teacher, targets, temperature)
        return alpha * soft.mean() + (1 - alpha) * hard.mean()

    return loss


def triple(temperature: float = 2.0, weights: tuple[float, float, float] = WEIGHTS) -> StudentLoss:
    """`triple_loss` for `student_lab.taught`. Raises ValueError, when used, for hidden states of other widths."""
    require_temperature(temperature)

    def loss(student: Tensor, teacher: Tensor, targets: Tensor, hidden: tuple[Tensor, Tensor]) -> Tensor:
        if hidden[0].shape != hidden[1].shape:
            raise ValueError(f"hidden states must have one shape, got {[tuple(states.shape) for states in hidden]}")
        soft, hard = soft_and_hard(student, teacher, targets, temperature)
        cosine = F.cosine_embedding_loss(*hidden, torch.ones_like(soft))
        return weights[0] * soft.mean() + weights[1] * hard.mean() + weights[2] * cosine

    return loss


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run soft_targets`."""
    parser.add_argument("--layers", type=int, help="of the student (default: half of the model's)")
    parser.add_argument("--loss", choices=("triple", "hinton", "text"), default="triple", help="text: no teacher")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the soft targets (default 2)")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the soft targets in hinton (default 0.5)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default 300)")
    parser.add_argument("--fresh", action="store_true", help="start from random weights, not from the model's layers")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keeps the run: the same command goes on from it")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Make a student of `model` and train it on the calibration tokens end to end; bits count the layers left out."""
    teacher, before = copy.deepcopy(model), student_lab.block_weights(model)
    losses = {"triple": triple(args.temperature), "hinton": hinton(args.temperature, args.alpha)}
    layers = max(1, model.config.layers // 2) if args.layers is None else args.layers
    student_lab.keep_layers(model, layers)
    if args.fresh:
        model.load_state_dict(student_lab.fresh(model.config, args.seed).state_dict())
    loss = train.next_token_loss if args.loss == "text" else student_lab.taught(teacher, losses[args.loss])
    purpose = f"{args.loss}, T {args.temperature}, alpha {args.alpha}, teacher {student_lab.checksum(teacher):08x}"
    student_lab.train_student(model, tokens.flatten(), loss, args.steps, args.seed, purpose, args.state, show=True)
    return {
        "bits per weight": 32 * student_lab.block_weights(model) / before,
        "parameters": f"{teacher.num_parameters():,} -> {model.num_parameters():,}",
        "passes over the text": args.steps * student_lab.step_tokens(model, tokens) / tokens.numel(),
    }


TEXT, LONGER, HINTON, TRIPLE = "text alone", "text alone, as many operations", "Hinton's loss", "triple loss"


def measure(lab: Lab, layers: int, steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Perplexity by loss and seed, and mean accuracy by loss, of students of `layers` layers."""
    start = partial(student_lab.from_teacher, lab.model(), layers)
    longer = round(steps * (1 + lab.parameters / (3 * start().num_parameters())))  # the teacher's pass in steps
    runs = {TEXT: (None, steps), LONGER: (None, longer), HINTON: (hinton(), steps), TRIPLE: (triple(), steps)}
    runs = runs if lab.full else {name: runs[name] for name in (TEXT, TRIPLE)}
    found, hits = {}, {}
    for name, (loss, count) in runs.items():
        title = f"{layers} layers of the teacher, {TEXT if loss is None else name}"
        students = [student_lab.student(lab, title, start, loss, count, seed) for seed in lab.seeds]
        found[name] = [lab.perplexity(student) for student in students]
        hits[name] = float(np.mean([student_lab.accuracy(student, lab.validation) for student in students]))
    return found, hits


def picture(found: dict[str, list[float]], base: float) -> Figure:
    """Perplexity by loss: a bar for the mean, a mark for each seed."""
    fig, axes = figure()
    for place, (name, values) in enumerate(found.items()):
        role = "baseline" if name in (TEXT, LONGER) else "method"
        axes.bar(place, np.mean(values), 0.6, color=COLOURS[role], alpha=0.6)
        axes.plot([place] * len(values), values, color=COLOURS[role], marker=MARKERS[role], linestyle="")
    axes.axhline(base, **series("reference"), label="teacher")
    axes.set_xticks(range(len(found)), [name.replace(", ", ",\n") for name in found])
    axes.set(ylabel="perplexity of the student")
    legend(axes, loc="lower right")
    return fig


def claim(lab: Lab) -> Claim:
    """A student that a teacher taught beats the same student that learned from the text alone, in as many steps."""
    layers, steps = lab.config.layers // 2, (300 if lab.full else 50)
    found, hits = measure(lab, layers, steps)
    small, right = student_lab.from_teacher(lab.model(), layers), student_lab.accuracy(lab.model(), lab.validation)
    mean = {name: math.exp(np.mean(np.log(values))) for name, values in found.items()}
    share, kept = small.num_parameters() / lab.parameters, hits[TRIPLE] / right
    taught = [values for name, values in found.items() if name in (HINTON, TRIPLE)]
    holds = all(each < alone for values in taught for each, alone in zip(values, found[TEXT], strict=True))
    more = f", {mean[HINTON]:.1f} by Hinton's, {mean[LONGER]:.1f} by {LONGER}" if lab.full else ""
    sentence = (
        f"After {steps} steps a student with {layers} of {lab.config.layers} layers has perplexity {mean[TEXT]:.1f} by "
        f"the text alone and {mean[TRIPLE]:.1f} by DistilBERT's triple loss{more}; its teacher has "
        f"{lab.base_perplexity:.1f}. It is {1 - share:.0%} smaller and gets {kept:.0%} as many next tokens right as "
        "the teacher (DistilBERT, trained far longer: 40% smaller, 97% of the score)."
    )
    mean |= {"untrained student": lab.perplexity(small), "teacher": lab.base_perplexity}
    numbers = {f"perplexity, {name}": value for name, value in mean.items()}
    numbers |= {f"accuracy, {name}": value for name, value in (hits | {"teacher": right}).items()}
    numbers |= {"share of the parameters": share, "share of the accuracy": kept}
    start = student_lab.kept_layers(lab.config.layers, layers)
    setting = (
        f"starts as layers {start} of the teacher; {student_lab.BATCH} x {student_lab.LENGTH} tokens a step, AdamW, "
        f"rate {student_lab.RATE}; T 2, weights {WEIGHTS}, alpha 0.5; seeds {lab.seeds} draw the text"
    )
    return Claim(sentence, holds, numbers, picture(found, lab.base_perplexity), setting)
