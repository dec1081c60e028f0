"""What a claim gets to work with: a model, text to calibrate on and text to measure on.

    def claim(lab: Lab) -> Claim:
        for seed in lab.seeds:                       # (0,) quick, (0, 1, 2) full
            model = lab.model()                      # a fresh copy, to be changed at will
            gptq_model(model, lab.calibration(seed), bits=3)
            worse = lab.perplexity(model) / lab.base_perplexity

The same lab gives the same numbers: all draws come from seeds, and measuring text is never calibration text (the
corpus is split by module). What several chapters need is computed once: `lab.once(key, compute)`.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from minitfm import checkpoint, data, evaluate
from minitfm.model import Attend, MakeFeedForward, Transformer, causal_attention, dense_feed_forward
from minitfm.tokenizer import Tokenizer

T = TypeVar("T")

LENGTH = 128  # tokens of a measured sequence
QUICK_SEQUENCES, FULL_SEQUENCES = 64, 1024
QUICK_SECONDS, FULL_SECONDS = 30.0, 600.0  # what a claim may take on two cores


class Lab:
    """The bench of one tour: everything that claims share.

    full           False: the quick budget, one seed. True: three seeds and more measuring text
    seeds          what to repeat over; for post-training methods a seed draws the calibration text
    seconds        time that one claim may take
    config, tokenizer, info, parameters    the model's own; `info` says how it was trained
    path           a checkpoint of the reader's, as `minitfm.checkpoint.load` takes it; None: the book's base model
    text           a text file or folder of the reader's; None: the documentation of Python's standard library

    Raises CheckpointError (a ValueError) if the checkpoint cannot be read.
    """

    def __init__(self, full: bool = False, path: Path | None = None, text: Path | None = None) -> None:
        self.full = full
        self.seeds: tuple[int, ...] = (0, 1, 2) if full else (0,)
        self.seconds = FULL_SECONDS if full else QUICK_SECONDS
        self.path, self.text = path, text
        loaded = checkpoint.base() if path is None else checkpoint.load(path)
        self.config, self.tokenizer, self.info = loaded.model.config, loaded.tokenizer, loaded.info
        self.parameters = loaded.model.num_parameters()
        self.weights = {name: value.detach() for name, value in loaded.model.state_dict().items()}
        self.kept: dict[Hashable, Any] = {}

    def model(
        self, attend: Attend = causal_attention, feed_forward: MakeFeedForward = dense_feed_forward
    ) -> Transformer:
        """A fresh copy of the base model in eval mode. `feed_forward` must keep the dense layer's parameter names."""
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: they cost no random numbers
            model = Transformer(self.config, attend, feed_forward)
        model.load_state_dict(self.weights)
        return model.eval()

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """compute() the first time, the same object after. Start `key` with what it is: ("inputs", name, seed)."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]

    @cached_property
    def streams(self) -> tuple[Tensor, Tensor]:
        """The corpus as tokens: training stream and validation stream, int64 `[tokens]`."""
        return library_streams(self.tokenizer) if self.text is None else encode_halves(self.tokenizer, self.text)

    @property
    def train_stream(self) -> Tensor:
        """All training text as one int64 stream `[tokens]`, for chapters that train."""
        return self.streams[0]

    @cached_property
    def validation(self) -> Tensor:
        """Measuring text `[N, 128]`, spread evenly over the validation stream; N is larger when `full`."""
        everything = data.sequences(self.streams[1], self.length)
        count = min(FULL_SEQUENCES if self.full else QUICK_SEQUENCES, len(everything))
        return everything[torch.linspace(0, len(everything) - 1, count).long()]

    def calibration(self, seed: int = 0, count: int = 128, length: int = LENGTH) -> Tensor:
        """`[count, length]` tokens drawn from the training text; the same seed draws the same."""
        return data.random_batch(self.train_stream, count, min(length, self.config.context), seed)

    def perplexity(self, model: Transformer) -> float:
        """Perplexity of a model on `validation`: exp of the mean loss per predicted token."""
        return evaluate.perplexity(model, self.validation)

    @property
    def base_perplexity(self) -> float:
        """Perplexity of the unchanged base model."""
        return self.once("base perplexity", lambda: self.perplexity(self.model()))

    @property
    def length(self) -> int:
        """Tokens per measured sequence: 128, or the model's context where that is shorter."""
        return min(LENGTH, self.config.context)

    def describe(self) -> dict[str, str | int]:
        """Model and text in words, for reports and records."""
        return {
            "model": "the book's base model" if self.path is None else self.path.name,
            "parameters": self.parameters,
            "layers": self.config.layers,
            "dim": self.config.dim,
            "vocabulary": self.config.vocab_size,
            "corpus": f"standard library documentation of Python {platform.python_version()}"
            if self.text is None
            else self.text.name,
            "training tokens": len(self.train_stream),
            "measured tokens": self.validation.numel(),
        }


def encode_halves(tokenizer: Tokenizer, text: Path | None = None) -> tuple[Tensor, Tensor]:
    """Documents -> (training, validation) tokens, int64."""
    train, validation = data.split(data.documents(text))
    return data.encode(train, tokenizer), data.encode(validation, tokenizer)


def library_streams(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The standard library's documentation as (training, validation) tokens, int64.

    Reading and tokenizing takes seconds, so the tokens are kept in the user's cache folder under a name that says
    what they depend on; a cache that cannot be read or written only costs those seconds again.
    """
    path = cache_folder() / f"corpus-{corpus_key(tokenizer)}.npz"
    try:
        with np.load(path, allow_pickle=False) as held:
            return torch.from_numpy(held["train"]).long(), torch.from_numpy(held["validation"]).long()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        train, validation = encode_halves(tokenizer)
    with suppress(OSError), checkpoint.replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, train=train.int().numpy(), validation=validation.int().numpy())
    return train, validation


def corpus_key(tokenizer: Tokenizer) -> str:
    """Names one tokenization: the interpreter, the code that reads and splits its documentation, the tokenizer."""
    parts = (sys.version, inspect.getsource(data), tokenizer.to_json(), tokenizer.begin, tokenizer.end)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where this platform keeps what a program can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minitfm"
