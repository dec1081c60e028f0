"""Divergences: from which side the student is measured against its teacher, and on whose text.

    forward KL    D_0 = Σ p log(p / q)     dear: to miss what the teacher finds likely; the student covers all of it
    reverse KL    D_1 = Σ q log(q / p)     dear: to say what the teacher finds unlikely; it settles for a few modes
    between       D_β = [β KL(p ‖ m) + (1 − β) KL(q ‖ m)] / (β (1 − β)),   m = β p + (1 − β) q

p = softmax(teacher / T), q = softmax(student / T). The bracket is the generalized Jensen-Shannon divergence JSD_β. It
vanishes at both ends; over β (1 − β) it does not, but goes to the two KL, and D_β is continuous from one to the other.
On-policy (GKD): a student that writes by itself meets its own mistakes, which no fixed text shows. So with probability
`share` a batch keeps its beginning only, the student writes the rest, and the teacher says how likely it finds that.

Saves    what any student saves; reverse KL spends a small one on the texts that it will write.
Costs    the teacher's forward pass, as soft targets; a decoding step for every token that the student writes.
Paper    Agarwal et al.: On-Policy Distillation of Language Models (GKD), 2023, arXiv:2306.13649, sections 2 and 3.
         Gu et al.: MiniLLM, 2023, arXiv:2306.08543, section 2: reverse KL, whose exact single-step part is D_1 at every
         token of a text that the student wrote.
Follows  the papers' limits by default. convention "trl" is TRL's GKDTrainer: JSD_β itself for β inside, KL at β 0 and
         1. That jumps: JSD_β / β goes to forward KL, JSD_β to 0. Neither has soft targets' factor T². In GKD the
         temperature is that of sampling, and T stays 1. Of a batch only what follows the prompt enters the mean.
Symbols  N tokens; V vocabulary. student, teacher: logits `[N, V]`. A text is `[B, T]`, its first `prompt` are given.
Kernel   kernels/distillation/divergences.py
"""

from __future__ import annotations

import argparse
import copy
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.distillation.soft_targets import require_temperature, token_mean
from chapters.figures import COLOURS, MARKERS, panels
from chapters.lab import Lab
from chapters.shared import student_lab
from minitfm import train
from minitfm.generate import generate
from minitfm.model import Transformer

CONVENTIONS = ("limits", "trl")
LEAST = 1e-16  # the smallest beta but 0: what float64 can still take from 1
FAR = 40  # e^40 is so far above 1 that 1 + e^40 is e^40, and still far from an overflow


def require_fit(student: Any, teacher: Any, beta: float, temperature: float, convention: str) -> None:
    """Raise ValueError unless logits `[N, V]` (arrays or tensors), beta, temperature and convention make sense."""
    require_temperature(temperature)
    if not (beta == 0 or LEAST <= beta <= 1):
        raise ValueError(f"beta must be 0 or from {LEAST} to 1, got {beta}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    shapes = tuple(student.shape), tuple(teacher.shape)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or 0 in shapes[0]:
        raise ValueError(f"student and teacher must be [N, V], got {shapes[0]} and {shapes[1]}")
    if shapes[0] != shapes[1]:
        raise ValueError(f"student and teacher must share tokens and vocabulary, got {shapes[0]} and {shapes[1]}")


def checked(student: np.ndarray, teacher: np.ndarray, beta: float, temperature: float, convention: str) -> list[Any]:
    """student / T and teacher / T as float64. Raises ValueError as `require_fit` and where they are not finite."""
    require_fit(student, teacher, beta, temperature, convention)
    with np.errstate(over="ignore"):
        both = [logits.astype(np.float64) / temperature for logits in (student, teacher)]
    for name, logits in zip(("student", "teacher"), both, strict=True):
        if others := int((~np.isfinite(logits)).sum()):
            raise ValueError(f"{name} / {temperature} must be finite, got {others} others")
    return both


def factor(beta: float, convention: str) -> float:
    """What D_β is multiplied with in a convention: 1, or, in TRL's and for β inside 0 .. 1, β (1 − β)."""
    return beta * (1 - beta) if convention == "trl" and 0 < beta < 1 else 1.0


def mixture_terms(log_a: np.ndarray, log_b: np.ndarray, weight: float, rest: float) -> np.ndarray:
    """a log(a / m) / w for m = r a + w b, entry by entry; at w = 0 the limit of that, a − b.

    log_a, log_b: float64 logarithms, at most 0, of arrays a and b of one shape. The weight w is 0, or from 1e-16 to 1;
    the rest r is 1 − w, given because 1 less a tiny r is a rounded w. At w = 1 this is a log(a / b). It is exact for a
    tiny w, too: log(a / m) is then about w, and must not be the difference of two logarithms. Any log_b − log_a will
    do, as ±1e5, where a or b is 0 as a number. Nothing is NaN or infinite, no warning is raised, no argument changed.
    With q the student, p the teacher: D_β = Σ mixture_terms(log q, log p, β, 1 − β) + Σ mixture_terms(log p, log q,
    1 − β, β).
    Source: Agarwal et al. 2023, section 2, with both limits taken.
    """
    a, away = np.exp(log_a), log_b - log_a
    if weight == 0:
        return a - np.exp(log_b)
    reach = math.log(weight) + away  # log of w b / a
    if weight < 0.5:  # log(m / a) = log(1 + w (b / a − 1)), near 0 where w is
        near = np.log1p(weight * np.expm1(np.minimum(away, FAR)))
        return -a * np.where(away > FAR, np.logaddexp(0, reach), near) / weight
    return -a * np.logaddexp(math.log(rest) if rest > 0 else -math.inf, reach) / weight


def token_divergences(
    student: np.ndarray, teacher: np.ndarray, beta: float = 0.5, temperature: float = 1.0, convention: str = "limits"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far each token's student is from its teacher: D_β `[N]`, its own part `[N]` and norms `[2, N]`, float64.

    student, teacher: logits `[N, V]`. D_β as above, or that of another convention. The own part is that of D_β, not
    multiplied by the convention's factor: Σ q log(q / m) / β, of which `token_gradient` makes the gradient. norms: log
    Σ exp of student / T and of teacher / T. Right for any finite logits. Raises ValueError for a beta that is neither 0
    nor from 1e-16 to 1, a temperature that is not positive and finite, another convention, shapes (vocabularies, too)
    that differ, and logits that are not finite.
    """
    s, t = checked(student, teacher, beta, temperature, convention)
    norms = np.logaddexp.reduce([s, t], axis=-1)  # [2, N]
    log_q, log_p = s - norms[0][:, None], t - norms[1][:, None]
    own = mixture_terms(log_q, log_p, beta, 1 - beta).sum(axis=-1)
    others = mixture_terms(log_p, log_q, 1 - beta, beta).sum(axis=-1)
    return factor(beta, convention) * (own + others), own, norms


def token_gradient(
    student: np.ndarray, teacher: np.ndarray, norms: np.ndarray, own: np.ndarray, dloss: np.ndarray,
    beta: float = 0.5, temperature: float = 1.0, convention: str = "limits",
) -> np.ndarray:  # fmt: skip
    """Gradient `[N, V]`, float64, of Σ dloss · D_β in the student's logits; the teacher's are fixed.

    norms `[2, N]` and own `[N]` as `token_divergences` returns them; dloss `[N]`. The terms of m cancel. There remains
    dloss · (b − q Σ b) / T, with b = q log(q / m) / β, the own part before its sum; at β = 0 b is q − p. Errors as
    there, and ValueError where norms, own and dloss do not fit.
    """
    s, t = checked(student, teacher, beta, temperature, convention)
    if norms.shape != (2, len(s)) or own.shape != (len(s),) or dloss.shape != (len(s),):
        raise ValueError(f"need norms [2, N], own and dloss [N]; got {norms.shape}, {own.shape} and {dloss.shape}")
    log_q, log_p = s - norms[0][:, None], t - norms[1][:, None]
    centred = mixture_terms(log_q, log_p, beta, 1 - beta) - np.exp(log_q) * own[:, None]
    return (factor(beta, convention) * dloss / temperature)[:, None] * centred


def gkd_loss(
    student: np.ndarray, teacher: np.ndarray, counts: np.ndarray | None = None, beta: float = 0.5,
    temperature: float = 1.0, convention: str = "limits",
) -> float:  # fmt: skip
    """Mean of the divergence over the tokens that count, bool `[N]` (None: all). Errors as `token_divergences`."""
    losses = token_divergences(student, teacher, beta, temperature, convention)[0]
    return token_mean(losses, np.ones(len(losses), bool) if counts is None else counts)


def single_step(student: np.ndarray, teacher: np.ndarray, counts: np.ndarray | None = None) -> float:
    """MiniLLM's single-step term, E_q[log q − log p] by the whole vocabulary: `gkd_loss` by reverse KL."""
    return gkd_loss(student, teacher, counts, beta=1.0)


def plain_terms(log_a: Tensor, log_b: Tensor, weight: float, rest: float) -> Tensor:
    """`mixture_terms` of tensors."""
    a, away = log_a.exp(), log_b - log_a
    if weight == 0:
        return a - log_b.exp()
    zero, reach = torch.zeros_like(away), math.log(weight) + away
    if weight < 0.5:
        near = torch.log1p(weight * torch.expm1(away.clamp(max=FAR)))
        return -a * torch.where(away > FAR, torch.logaddexp(zero, reach), near) / weight
    return -a * torch.logaddexp(zero + (math.log(rest) if rest > 0 else -math.inf), reach) / weight


class Divergence(torch.autograd.Function):
    """D_β of each token, with `token_gradient`: by the kernel on CUDA, else by plain torch in float32 or more."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, beta: float, temperature: float, convention: str, in_place: bool
    ) -> Tensor:
        """Losses `[N]`. in_place (CUDA): the gradient takes the memory of `student`, unusable from then on."""
        ctx.setting, ctx.in_place, ctx.dtype = (beta, temperature, convention), in_place, student.dtype
        if student.is_cuda:
            from kernels.distillation.divergences import token_divergences as kernel

            student, teacher = student.contiguous(), teacher.contiguous()
            losses, own, norms = kernel(student, teacher, *ctx.setting)
            ctx.save_for_backward(student, teacher, norms, own)
            return losses
        wide = torch.promote_types(student.dtype, torch.float32)
        log_q, log_p = (torch.log_softmax(x.to(wide) / temperature, dim=-1) for x in (student, teacher))
        part = plain_terms(log_q, log_p, beta, 1 - beta)
        own = part.sum(-1)
        ctx.save_for_backward((part - log_q.exp() * own[:, None]) * (factor(beta, convention) / temperature))
        return factor(beta, convention) * (own + plain_terms(log_p, log_q, 1 - beta, beta).sum(-1))

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The student's gradient."""
        if not dloss.is_cuda:
            return (dloss[:, None] * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None, None
        from kernels.distillation.divergences import token_gradient as kernel

        student, teacher, norms, own = ctx.saved_tensors
        found = kernel(student, teacher, norms, own, dloss.contiguous(), *ctx.setting, in_place=ctx.in_place)
        return found, None, None, None, None, None


def token_loss(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, convention: str = "limits",
    in_place: bool = False,
) -> Tensor:  # fmt: skip
    """`token_divergences` of tensors, the losses `[N]` alone, with a gradient for the student; on CUDA the kernel's.

    in_place (CUDA): the gradient overwrites the student's logits, for training loops that need these no more.
    Raises ValueError as `require_fit`, and, naming them, for logits that are not finite.
    """
    require_fit(student, teacher, beta, temperature, convention)
    losses: Any = Divergence.apply(student, teacher, beta, temperature, convention, in_place)
    for name, logits in (("student", student), ("teacher", teacher)) if not losses.isfinite().all() else ():
        if others := int((~torch.isfinite(logits)).sum()):
            raise ValueError(f"{name} must be finite, got {others} other logits")
    return losses


def gkd_batch(
    student: Transformer, tokens: Tensor, prompt: int, share: float, seed: int, temperature: float = 1.0
) -> Tensor:
    """What a step of GKD learns from, int64 `[B, T]`: the text, or, with probability `share`, the student's own.

    tokens: the text, int64 `[B, T]`, not changed. One draw decides on the whole batch: it is the student's if
    `torch.rand((), generator=torch.Generator().manual_seed(seed))` is less than `share`, so never at 0, always at 1.
    Then the first `prompt` tokens of every row stay, and the student's T − prompt others are those of `generate`, all
    rows at once, at this temperature of sampling and with this seed. Otherwise `tokens` as they are. Raises ValueError
    for a share outside 0 .. 1 and for a prompt that is not from 1 to T − 1. Source: Agarwal et al. 2023, algorithm 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(f"prompt must be from 1 to {tokens.shape[1] - 1}, less than the text has, got {prompt}")
    if torch.rand((), generator=torch.Generator().manual_seed(seed)) >= share:
        return tokens
    return generate(student, tokens[:, :prompt], tokens.shape[1] - prompt, temperature=temperature, seed=seed)


def answers(model: Transformer, tokens: Tensor, prompt: int) -> Tensor:
    """Logits `[B (T − prompt), V]` for the tokens after the prompt."""
    return model(tokens[:, :-1])[:, prompt - 1 :].flatten(0, 1)


def gkd(
    teacher: Transformer, beta: float, share: float, prompt: int, seed: int, convention: str = "limits"
) -> train.Loss:
    """`gkd_loss` for `student_lab.train_student`, over the tokens after the prompt of a `gkd_batch`.

    The batch's own tokens and `seed` seed what is drawn: a run that is resumed draws as one that was never killed.
    """
    require_fit(torch.zeros(1, 1), torch.zeros(1, 1), beta, 1.0, convention)

    def loss(student: Transformer, tokens: Tensor) -> Tensor:
        batch = gkd_batch(student, tokens, prompt, share, zlib.crc32(tokens.cpu().numpy().tobytes(), seed))
        with torch.no_grad():
            wanted = answers(teacher, batch, prompt)
        return token_loss(answers(student, batch, prompt), wanted, beta, 1.0, convention).mean()

    return loss


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run divergences`."""
    parser.add_argument("--layers", type=int, help="of the student (default: half of the model's)")
    parser.add_argument("--beta", type=float, default=0.5, help="0 forward KL, 1 reverse KL (default 0.5)")
    parser.add_argument("--convention", choices=CONVENTIONS, default="limits", help="trl: JSD itself inside of 0 .. 1")
    parser.add_argument("--share", type=float, default=0.0, help="of the batches that the student writes (default 0)")
    parser.add_argument("--prompt", type=int, help="tokens of a text that are given (default: half of it)")
    parser.add_argument("--steps", type=int, default=150, help="of training (default 150)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keeps the run: the same command goes on from it")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Make a student of `model` and train it on the calibration tokens end to end; bits count the layers left out."""
    teacher, before, text = copy.deepcopy(model), student_lab.block_weights(model), tokens.flatten()
    student_lab.keep_layers(model, max(1, model.config.layers // 2) if args.layers is None else args.layers)
    sample = text[None, : student_lab.sequence_length(model, text)]
    prompt = sample.shape[1] // 2 if args.prompt is None else args.prompt
    gkd_batch(model, sample, prompt, args.share, args.seed)  # refuses bad options before the run begins
    loss = gkd(teacher, args.beta, args.share, prompt, args.seed, convention=args.convention)
    purpose = f"GKD, {args.beta}, {args.convention}, {args.share}, {prompt}; {student_lab.checksum(teacher):08x}"
    student_lab.train_student(model, text, loss, args.steps, args.seed, purpose, args.state, show=True)
    return {
        "bits per weight": 32 * student_lab.block_weights(model) / before,
        "parameters": f"{teacher.num_parameters():,} -> {model.num_parameters():,}",
        "passes over the text": args.steps * student_lab.step_tokens(model, text) / text.numel(),
    }


FORWARD, REVERSE, OWN = "forward KL", "reverse KL", "reverse KL, own text"  # what the quick budget measures
RUNS = {FORWARD: (0.0, 0.0), REVERSE: (1.0, 0.0), OWN: (1.0, 1.0)}  # beta, share of batches that the student writes
RUNS |= {"β 0.5": (0.5, 0.0), "β 0.5, half own text": (0.5, 0.5)}
MEASURES = ("entropy", "from its teacher on its own text", "perplexity")


@torch.no_grad()
def measured(lab: Lab, student: Transformer, seed: int) -> tuple[float, float, float]:
    """MEASURES: entropy of the student after prompts, reverse KL on what it writes after them, nats; perplexity."""
    text, prompt = lab.validation[:: -(-len(lab.validation) // 64)], lab.length // 2  # at most 64, spread evenly
    entropy = torch.distributions.Categorical(logits=answers(student, text, prompt)).entropy().mean().item()
    own = gkd_batch(student, text, prompt, 1.0, seed)
    away = token_loss(answers(student, own, prompt), answers(lab.model(), own, prompt), beta=1.0).mean().item()
    return entropy, away, lab.perplexity(student)


def trained(lab: Lab, name: str, steps: int, seed: int) -> Transformer:
    """The student of one of RUNS; the same object in every call."""

    def make() -> Transformer:
        student, (beta, share) = student_lab.from_teacher(lab.model(), lab.config.layers // 2), RUNS[name]
        loss = gkd(lab.model(), beta, share, lab.length // 2, seed)
        student_lab.train_student(student, lab.train_stream, loss, steps, seed)
        return student

    return lab.once(("GKD student", name, steps, seed), make)


def picture(found: dict[str, np.ndarray]) -> Figure:
    """The first two MEASURES by run: a bar for the mean, a mark for each seed."""
    fig, both = panels(2, height=3.2, sharey=True)
    for axes, what, values in zip(both, MEASURES, np.moveaxis(np.array([*found.values()]), -1, 0), strict=False):
        for place, (name, seeds) in enumerate(zip(found, values, strict=True)):
            role = "method" if RUNS[name][1] else "baseline"
            axes.barh(place, seeds.mean(), 0.6, color=COLOURS[role], alpha=0.6)
            axes.plot(seeds, [place] * len(seeds), color=COLOURS[role], marker=MARKERS[role], linestyle="")
        axes.set_yticks(range(len(found)), [name.replace(", ", ",\n") for name in found])
        axes.set(xlabel=what.replace(" on", "\non") + ", nats a token")
    return fig


def claim(lab: Lab) -> Claim:
    """Reverse KL leaves a student surer than forward KL, and nearer to its teacher if it learned on its own text."""
    steps, runs = (150, [*RUNS]) if lab.full else (30, [*RUNS][:3])
    found = {name: np.array([measured(lab, trained(lab, name, steps, s), s) for s in lab.seeds]) for name in runs}
    surer = found[REVERSE][:, 0] < found[FORWARD][:, 0]  # by seed
    nearer = found[OWN][:, 1] < found[REVERSE][:, 1]
    mean = {name: values.mean(axis=0) for name, values in found.items()}
    first, second = ("" if shown.all() else "NOT reproduced in every seed: " for shown in (surer, nearer))
    sentence = (
        f"{first}After {steps} steps a student's entropy is {mean[REVERSE][0]:.2f} nats a token by reverse KL and "
        f"{mean[FORWARD][0]:.2f} by forward KL, its perplexity {mean[REVERSE][2]:.1f} and {mean[FORWARD][2]:.1f}; "
        f"{second}what it writes is {mean[OWN][1]:.2f} nats a token from its teacher if it learned by reverse KL on "
        f"its own text (perplexity {mean[OWN][2]:.1f}), {mean[REVERSE][1]:.2f} if on as much of the fixed text."
    )
    numbers = {f"{what}, {name}": mean[name][i] for i, what in enumerate(MEASURES) for name in found}
    numbers |= {"entropy, teacher": measured(lab, lab.model(), 0)[0], "perplexity, teacher": lab.base_perplexity}
    setting = (
        f"{lab.config.layers // 2} of {lab.config.layers} layers; {student_lab.BATCH} x {lab.length} tokens a step, "
        f"the second half learned from, sampled at temperature 1; T 1; seeds {lab.seeds} draw text and samples"
    )
    return Claim(sentence, bool(surer.all() and nearer.all()), numbers, picture(found), setting)
