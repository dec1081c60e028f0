"""One exercise, examined in a process of its own: pytest on one submitted file, the verdict in a report.

This module runs beside code that nobody has read. What it does about cheating, and what it cannot do, is in
tests/wrong/README.md: a process cannot be wholly protected from the code that it runs.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("chapters", "kernels", "minitfm", "tests")


@dataclass(frozen=True)
class Task:
    """What to examine: `function`, as it stands in the folder `submission`, by `tests` of the book at `root`.

    protected   files of the book that hold the solution: the submission may not read them
    report      where the verdict goes, with `nonce` in it
    """

    root: Path
    function: str
    tests: tuple[Path, ...]
    submission: Path
    protected: tuple[Path, ...]
    report: Path
    nonce: str


def examine(task: Task) -> None:
    """Run in a fresh process: examine, and write {"nonce", "outcome", "message", "measured"} to the report.

    outcome   "passed": every test of the exercise was run and passed; "failed": a test of it failed while it ran;
              "refused": the submission read the book's own solution; "error": anything else
    measured  numbers that the tests kept with pytest's `record_property`, by name
    """
    gc.freeze()  # what the server imported never becomes garbage: collections stay short
    output = task.submission.with_name("output")
    _isolate(task, output)
    examiner = Examiner(task)
    code = pytest.main(_arguments(task), plugins=[examiner])
    if not examiner.chosen and not examiner.problems:  # pytest did not come far enough to tell a plugin why
        examiner.problems += output.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")[-1:]
    report = {"nonce": task.nonce, **examiner.verdict(int(code))}
    partial = task.report.with_suffix(".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(task.report)


def _isolate(task: Task, output: Path) -> None:
    """Nothing of the caller's surroundings may reach the tests: streams, environment, folder, modules."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that whatever it starts can be ended with it
    here = Path.cwd()
    sys.path[:] = [str(task.root), *(entry for entry in sys.path if entry and Path(entry).resolve() != here)]
    os.chdir(output.parent)
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, written), (2, written)):
        os.dup2(target, stream)
    for name in [name for name in os.environ if name.startswith(("PYTHON", "PYTEST", "HYPOTHESIS"))]:
        del os.environ[name]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed here takes no part
    for name in [name for name in sys.modules if name.split(".")[0] in (*PACKAGES, "conftest")]:
        del sys.modules[name]


def _arguments(task: Task) -> list[str]:
    """The command line of pytest: no conftest.py but the book's two, no settings but the book's, no cache."""
    book = [f"--confcutdir={task.root}", "-c", str(task.root / "pyproject.toml"), "--noconftest"]
    plugins = ["-p", "_hypothesis_pytestplugin", "-p", "conftest", "-p", "tests.conftest"]
    plugins += ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
    how = ["--import-mode=importlib", "--profile=verdict", "--tb=short", "-x"]
    return [*book, f"--rootdir={task.root}", *plugins, *how, f"--submission={task.submission}", *map(str, task.tests)]


@dataclass
class Examiner:
    """A pytest plugin that runs the tests of one exercise and keeps the solution out of the submission's reach."""

    task: Task
    chosen: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    measured: dict[str, float] = field(default_factory=dict)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        protected = {os.path.realpath(path) for path in self.task.protected}
        self.hidden = protected | {importlib.util.cache_from_source(path) for path in protected}
        sys.addaudithook(self._watch)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marks = {item: [mark.args[0] for mark in item.iter_markers("exercise")] for item in items}
        items[:] = [item for item in items if self.task.function in marks[item]]
        self.chosen += [item.nodeid for item in items]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problems.append(_message(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.measured |= {name: float(str(value)) for name, value in report.user_properties}
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
        elif report.failed:
            (self.failed if report.when == "call" else self.problems).append(_message(report))
        elif report.skipped:
            self.problems.append(f"{report.nodeid} was skipped")

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo) -> None:
        self.problems.append(excinfo.exconly())

    def verdict(self, code: int) -> dict[str, Any]:
        """What the session showed; "passed" needs pytest's word and every chosen test's own report."""
        outcome, messages = "error", self.problems or [f"pytest ended with {code}, {len(self.chosen)} tests chosen"]
        if self.refusals:
            outcome, messages = "refused", self.refusals
        elif self.failed:
            outcome, messages = "failed", self.failed
        elif code == 0 and self.chosen and set(self.passed) == set(self.chosen) and not self.problems:
            outcome, messages = "passed", [""]
        return {"outcome": outcome, "message": messages[0], "measured": self.measured}

    def _watch(self, event: str, args: tuple) -> None:
        """Audit hook: the submission may not open the solution, nor have it opened."""
        if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if os.path.realpath(os.fsdecode(args[0])) in self.hidden and self._called_by_submission():
            self.refusals.append("reads the book's own solution")
            raise PermissionError("a submission may not read the book's own solution")

    def _called_by_submission(self) -> bool:
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(self.task.submission)):
                return True
            frame = frame.f_back
        return False


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Which test, and what it says."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return f"{report.nodeid.rpartition('::')[2]}: {' '.join(said) or text}"
