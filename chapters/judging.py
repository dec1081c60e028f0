"""Judging one answer to one exercise, in a process of its own with a time limit.

The process is forked from a server that has imported torch and pytest already, so a judgement costs little more than
its tests. A crash, an endless loop or `os._exit(0)` ends that process alone and counts as a failure.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from chapters.examiner import Task, examine
from chapters.workbook import ROOT, Exercise

PRELOADED = [
    "torch.testing", "triton", "hypothesis.extra.numpy", "hypothesis.extra._patching", "pytest", "matplotlib.figure",
    "safetensors.torch",
]  # fmt: skip
WORKERS = 2


@dataclass(frozen=True)
class Verdict:
    """How an answer did.

    outcome   what `examiner.examine` reports, or "crashed", "timed out", "no report"
    message   the first failure in words, on one line
    measured  what the tests measured of it, such as {"perplexity": 40.1}
    """

    outcome: str
    message: str
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def red(self) -> bool:
        """Whether the answer was found wrong by a test of its exercise, not by an accident around it."""
        return self.outcome in ("failed", "crashed")


def judge(exercise: Exercise, answer: bytes, root: Path = ROOT, limit: float = 120) -> Verdict:
    """Run the exercise's tests on `answer`, the contents of its file, in a process of its own."""
    began = time.monotonic()
    with _scratch() as folder, _scratch() as elsewhere:
        submission = Path(folder).resolve() / "submission"
        submitted = submission / exercise.file
        submitted.parent.mkdir(parents=True)
        submitted.write_bytes(answer)
        report, nonce = Path(elsewhere, secrets.token_hex(16)), secrets.token_hex(16)
        protected = tuple(root / file for file in _solution_files(exercise))
        task = Task(root, exercise.function, exercise.tests, submission, protected, report, nonce)
        process = process_context().Process(target=examine, args=(task,), daemon=True)
        process.start()
        process.join(limit)
        outcome, message, measured = _conclude(process, report, nonce, limit)
    return Verdict(outcome, _one_line(message), time.monotonic() - began, measured)


def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _solution_files(exercise: Exercise) -> set[Path]:
    """The book's file, and for a kernel also the chapters whose reference says the same."""
    chapters = {Path("chapters", *technique.split(".")).with_suffix(".py") for technique in exercise.techniques}
    return {exercise.file} | (chapters if exercise.file.parts[0] == "kernels" else set())


def process_context() -> SpawnContext | ForkServerContext:
    """Where processes come from: on Linux forks of a server with everything imported, else new interpreters."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # the server imports triton before the tests could ask for this
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _conclude(process: BaseProcess, report: Path, nonce: str, limit: float) -> tuple[str, str, dict[str, float]]:
    """Outcome, message and measurements of a process that has ended or used up its time; ends all that it started."""
    late = process.is_alive()
    if hasattr(os, "killpg") and process.pid:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing of it is left, or it had not come to lead its group
    process.kill()
    process.join()
    if late:
        return "timed out", f"no result after {limit:g} s", {}
    code = process.exitcode or 0
    if code < 0:
        return "crashed", f"ended by {signal.Signals(-code).name}", {}
    try:
        verdict = json.loads(report.read_text(encoding="utf-8"))
        if verdict["nonce"] == nonce:
            return verdict["outcome"], verdict["message"], verdict["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return "no report", f"the process ended with {code} before its tests did", {}


def _one_line(text: str) -> str:
    """At most 200 printable characters, for a table or a spreadsheet."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())[:200]


def judge_all(jobs: Iterable[tuple[Exercise, bytes]], root: Path = ROOT, limit: float = 120) -> list[Verdict]:
    """`judge` for every (exercise, answer), two at a time, with a progress bar; results in the order of the jobs."""
    jobs = list(jobs)
    warm_up = process_context().Process(target=gc.collect)  # so that no answer's time pays for what the server imports
    warm_up.start()
    warm_up.join()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            results = pool.map(lambda job: judge(*job, root=root, limit=limit), jobs)
            console = Console(stderr=True)
            return list(track(results, "judging", len(jobs), console=console, transient=True))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
