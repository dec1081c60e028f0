"""The corpus by kind of paragraph: tasks for a chapter that needs to know what a text is.

    text = sorted_text(lab)
    text.marked              # all training text, prose first, the kind in every id: id + kind · vocabulary
    text.measured[kind]      # validation text of one kind, [N, T]

The kind is computed from the layout of a paragraph alone, which is what docstrings and plain text have in common.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chapters.claims import NotMeasurable
from chapters.lab import Lab
from minitfm import data
from minitfm.tokenizer import Tokenizer

LENGTH = 64  # tokens of a measured sequence: a kind has too little text for long ones

KINDS = ("prose", "definitions", "blocks", "examples")


def kind(paragraph: str) -> int:
    """What kind a paragraph is, as a place in KINDS, from its layout alone.

    examples: a line starts with >>>; blocks: all lines are indented; definitions: some are; prose: none is.
    """
    lines = [line for line in paragraph.splitlines() if line.strip()]
    if any(line.lstrip().startswith(">>>") for line in lines):
        return 3
    indented = sum(line[0].isspace() for line in lines)
    return 0 if indented == 0 else 2 if indented == len(lines) else 1


def streams_by_task(stream: Tensor, tokenizer: Tokenizer) -> list[Tensor]:
    """The text of a stream sorted by `kind`: for each kind, what its documents have of that kind, int64 `[tokens]`."""
    ends = (stream == tokenizer.end).nonzero().flatten().tolist()
    found: list[dict[str, str]] = [{} for _ in KINDS]
    for number, document in enumerate(np.split(stream.numpy(), ends)):
        kinds: list[list[str]] = [[] for _ in KINDS]
        for paragraph in tokenizer.decode(document.tolist()).split("\n\n"):
            if paragraph.strip():
                kinds[kind(paragraph)].append(paragraph)
        for texts, paragraphs in zip(found, kinds, strict=True):
            texts[str(number)] = "\n\n".join(paragraphs)
    return [data.encode({name: text for name, text in texts.items() if text}, tokenizer) for texts in found]


class Sorted(NamedTuple):
    """Text by kind. marked: all training text, int64 `[tokens]`, id + kind · vocabulary; measured: `[N, T]` by kind."""

    marked: Tensor
    measured: list[Tensor]


def sorted_text(lab: Lab) -> Sorted:
    """The lab's text by kind, measured in rows of `LENGTH` tokens. NotMeasurable if a kind has less than one row."""
    train_by, held_by = (streams_by_task(stream, lab.tokenizer) for stream in lab.streams)
    length, most = min(LENGTH, lab.length), 512 if lab.full else 64
    for name, *streams in zip(KINDS, train_by, held_by, strict=True):
        if min(map(len, streams)) < length:
            raise NotMeasurable(f"the text has too few {name} to train or to measure on: {length} tokens are needed")
    marked = torch.cat([stream + number * lab.config.vocab_size for number, stream in enumerate(train_by)])
    return Sorted(marked, [data.sequences(stream, length)[:most] for stream in held_by])
