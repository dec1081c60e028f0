"""What a chapter claims, measuring it, and the record of its full-budget runs.

A chapter ends in `claim(lab) -> Claim`. The quick budget (under 30 s on two cores) is what the tour runs live; the
full one has at least three seeds, and `python -m chapters claim NAME --full` keeps its outcome in `chapters/results`.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from chapters.contents import Entry, find
from chapters.figures import save_png_bytes
from minitfm.checkpoint import replace_file

if TYPE_CHECKING:
    from chapters.lab import Lab

RESULTS = Path(__file__).resolve().parent / "results"


class NotMeasurable(ValueError):
    """The given text or model lacks what a claim measures: nothing is wrong with the chapter."""


@dataclass(frozen=True)
class Claim:
    """A finding, measured.

    sentence  the finding in one sentence, with its numbers: "At 3 bits GPTQ loses 0.6 perplexity, rounding 1.7."
              Where the effect does not show, the sentence says so and `holds` is False
    holds     whether the numbers bear the paper's finding out; computed from them, never written down
    numbers   what was measured, under names that a reader understands: {"perplexity, GPTQ 3-bit": 23.9}
    figure    made by `chapters.figures.figure`, or None
    setting   model, data, seeds and knobs in one line
    infinite  names of numbers that may be infinite, such as the perplexity of a model that broke on purpose

    Raises ValueError for a number that is NaN, or infinite without being named so: a measurement that failed is
    an error, not a claim that does not hold.
    """

    sentence: str
    holds: bool
    numbers: dict[str, float]
    figure: Figure | None
    setting: str
    infinite: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.holds, bool | np.bool_):
            raise TypeError(f"holds must be a bool computed from the numbers, got {self.holds!r}")
        if not self.sentence.strip() or not self.numbers:
            raise ValueError("a claim needs a sentence and at least one number")
        for name, value in self.numbers.items():
            if math.isnan(value) or (math.isinf(value) and name not in self.infinite):
                raise ValueError(f"the number {name!r} is {float(value)}")
        object.__setattr__(self, "holds", bool(self.holds))
        object.__setattr__(self, "numbers", {name: float(value) for name, value in self.numbers.items()})


@dataclass(frozen=True)
class Result:
    """One chapter's claim as it was run: either `claim` or `error` (one line) is None; `picture` is PNG.

    traceback is empty unless the chapter failed.
    """

    entry: Entry
    claim: Claim | None
    seconds: float
    error: str | None = None
    traceback: str = ""
    picture: bytes | None = None

    @property
    def verdict(self) -> str:
        """One of "reproduced", "not reproduced", "not measured" on this text and, where it raised, "failed"."""
        if self.claim is None:
            return "failed" if self.traceback else "not measured"
        return "reproduced" if self.claim.holds else "not reproduced"


def run_claim(entry: Entry, lab: Lab) -> Result:
    """Run one chapter's claim; whatever it raises becomes the result's `error`, so that others can go on.

    Torch's random state is seeded for the chapter and restored after it: the order of chapters changes nothing.
    """
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lab.seeds[0])
            claim = entry.module().claim(lab)
        if not isinstance(claim, Claim):
            raise TypeError(f"chapters.{entry.dotted}.claim must return a Claim, got {type(claim).__name__}")
        picture = save_png_bytes(claim.figure) if claim.figure else None
    except NotMeasurable as error:
        return Result(entry, None, time.perf_counter() - start, str(error))
    except Exception as error:
        return Result(entry, None, time.perf_counter() - start, reason(error), traceback.format_exc())
    return Result(entry, claim, time.perf_counter() - start, picture=picture)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def record(result: Result, lab: Lab) -> Path:
    """Write the outcome of a full-budget run to `RESULTS`, whole or not at all; return the file.

    Raises ValueError for a chapter that failed or a quick run, OSError if it cannot be written.
    """
    if result.claim is None or not lab.full:
        raise ValueError(f"only a full-budget claim is recorded, got {'a quick' if result.claim else 'a failed'} run")
    outcome = {
        "technique": result.entry.dotted,
        "sentence": result.claim.sentence,
        "holds": result.claim.holds,
        "numbers": {name: plain(value) for name, value in result.claim.numbers.items()},
        "setting": result.claim.setting,
        "seeds": list(lab.seeds),
        "lab": lab.describe(),
        "versions": versions(),
        "seconds": round(result.seconds, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = RESULTS / f"{result.entry.name}.json"
    text = json.dumps(outcome, indent=2, ensure_ascii=False, allow_nan=False)
    with replace_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def recorded(name: str) -> dict | None:
    """The last full-budget outcome of a chapter as `record` wrote it, or None if there is none yet.

    Raises ValueError for an unknown chapter or a damaged file.
    """
    path = RESULTS / f"{find(name).name}.json"
    if not path.is_file():
        return None
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        outcome["numbers"] = {key: float(value) for key, value in outcome["numbers"].items()}
        return outcome
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}); run the claim again with --full") from None


def require_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` can be written, or made where it will be. Leaves nothing behind.

    Long work asks this first: nobody should learn after ten minutes that the result cannot be kept.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def plain(value: float) -> float | str:
    """JSON has no infinity: it is written as text, which `float` reads back."""
    return value if math.isfinite(value) else str(value)


def versions() -> dict[str, str]:
    """What a measurement may depend on."""
    packages = ("numpy", "torch", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
