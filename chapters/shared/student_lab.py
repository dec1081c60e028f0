"""Students: a smaller model made from a teacher, and its training; what the chapters on distillation share.

    student = from_teacher(teacher, layers=2)                    # its embedding, head, and every other layer
    loss = taught(teacher, hinton(temperature=2))                # a `StudentLoss` of a chapter
    train_student(student, lab.train_stream, loss, steps=500, seed=0, purpose="Hinton, T 2")

A student that learns from the text alone is trained by the same function with `train.next_token_loss`: same steps,
same tokens, same order. The same seed gives the same weights, bit for bit, also where a run was killed and resumed from
`state`; the state of a run with other arguments, another loss or teacher (`purpose`), or another start is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from chapters.lab import Lab
from minitfm import surgery, train
from minitfm.config import Config
from minitfm.model import Transformer

# loss(student_logits [N, V], teacher_logits [N, V], targets [N], (student_hidden [N, C], teacher_hidden [N, C']))
StudentLoss = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]

BATCH, LENGTH, RATE = 4, 128, 1e-3  # sequences and tokens of a step; peak of AdamW's learning rate
SAVE_EVERY = 50  # steps between states


def kept_layers(layers: int, kept: int) -> list[int]:
    """The layers of a teacher that a student of `kept` layers starts from: spread evenly, the first and the last too.

    12 and 6 give 0, 2, 4, 7, 9, 11, as DistilBERT's own script has it. ValueError unless 1 <= kept <= layers.
    """
    if not 1 <= kept <= layers:
        raise ValueError(f"a student of a teacher with {layers} layers has 1 to {layers}, got {kept}")
    return [round(i * (layers - 1) / max(1, kept - 1)) for i in range(kept)]


def keep_layers(model: Transformer, layers: int) -> None:
    """Leave only the `kept_layers` of `model`, in place; the rest of it stays. Errors as there."""
    blocks = [model.blocks[i] for i in kept_layers(model.config.layers, layers)]
    for place, block in enumerate(blocks):
        mixer: Any = block.get_submodule("attention")
        mixer.layer = place  # where its keys and values stand in a cache
    model.blocks = torch.nn.ModuleList(blocks)
    model.config = replace(model.config, layers=layers)


def from_teacher(teacher: Transformer, layers: int) -> Transformer:
    """A student that starts as every other layer of the teacher, a plain model, with its embedding and its head."""
    student = fresh(teacher.config).to(teacher.embedding.weight)
    student.load_state_dict(teacher.state_dict())
    keep_layers(student, layers)
    return student


def fresh(config: Config, seed: int = 0) -> Transformer:
    """A student of any size that has learned nothing; its blocks start as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Transformer(config)
    train.zero_residual_outputs(student)
    return student.eval()


def logits_and_hidden(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[B T, V]`, and the normed hidden states `[B T, C]` that its head reads, for tokens `[B, T]`."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _head, args: seen.append(args[0]))
    try:
        logits = model(tokens)
    finally:
        hook.remove()
    return logits.flatten(0, 1), seen[0].flatten(0, 1)


def taught(teacher: Transformer, loss: StudentLoss) -> train.Loss:
    """A loss for `train_student`: teacher and student read the same tokens `[B, T]`, and `loss` compares them.

    The targets are the next tokens, N = B (T − 1) of them. The teacher, in the mode that it is in, gets no gradient.
    """

    def compare(student: Transformer, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted, wanted_hidden = logits_and_hidden(teacher, tokens[:, :-1])
        found, hidden = logits_and_hidden(student, tokens[:, :-1])
        return loss(found, wanted, tokens[:, 1:].flatten(), (hidden, wanted_hidden))

    return compare


def train_student(
    student: Transformer, stream: Tensor, loss: train.Loss, steps: int, seed: int = 0, purpose: str = "",
    state: Path | None = None, show: bool = False,
) -> None:  # fmt: skip
    """Train all weights of `student`, in place, on `steps` batches that `seed` draws from the token stream `[T]`.

    purpose  names the loss and the teacher, and so guards `state`
    state    a file in which the run is kept meanwhile: call again with the same arguments to go on after a kill
    show     draw a progress bar on stderr
    Raises ValueError for steps < 1 or a text too short, CheckpointError for a state of another run, and
    FloatingPointError if the loss stops being finite.
    """
    length = sequence_length(student, stream)
    kept = {"state": state, "save_every": SAVE_EVERY if state else 0}
    purpose = f"{purpose}; starts from {checksum(student):08x}" if state else purpose
    settings = train.Settings(
        steps, BATCH, length, "adamw", learning_rate=RATE, weight_decay=0.01, seed=seed, purpose=purpose, **kept
    )
    with progress_bar(steps, show) as progress:
        train.train(student, stream, settings, loss, progress=progress)
    student.eval()


def sequence_length(student: Transformer, text: Tensor) -> int:
    """Tokens of a training sequence: 128, or what the model or the text has where that is less."""
    return min(LENGTH, student.config.context, text.numel())


def step_tokens(student: Transformer, text: Tensor) -> int:
    """Tokens that a step reads."""
    return BATCH * sequence_length(student, text)


def checksum(model: Transformer) -> int:
    """A number that tells one set of weights from another."""
    found = 0
    for value in model.state_dict().values():
        found = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


@contextmanager
def progress_bar(steps: int, show: bool) -> Iterator[Callable[[train.Progress], None] | None]:
    """What `train.train` is to tell its progress; a bar on stderr, or None where nothing is to be shown."""
    if not show:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps)
        yield lambda now: bar.update(task, completed=now.step, description=f"loss {now.loss:.3f}")


def block_weights(model: Transformer) -> int:
    """Numbers in the linear layers of the blocks."""
    return sum(layer.weight.numel() for layer in surgery.linears(model).values())


@torch.no_grad()
def accuracy(model: Transformer, tokens: Tensor) -> float:
    """Share of the next tokens, in tokens `[N, T]`, that the model ranks first."""
    hits = sum((model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).sum().item() for rows in tokens.split(16))
    return hits / tokens[:, 1:].numel()


def student(
    lab: Lab, name: str, start: Callable[[], Transformer], loss: StudentLoss | None, steps: int, seed: int
) -> Transformer:
    """A trained student of the lab's model; every call with the same name, steps and seed gives the same object.

    start() makes the student that is trained. loss None: it learns from the text alone. `name` tells students and
    losses apart, such as "2 layers, Hinton, T 2". Do not change the result: other claims share it.
    """

    def make() -> Transformer:
        trained = start()
        wanted = train.next_token_loss if loss is None else taught(lab.model(), loss)
        train_student(trained, lab.train_stream, wanted, steps, seed)
        return trained

    return lab.once(("student", name, steps, seed), make)
