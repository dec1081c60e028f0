"""The commands around the book: what make offers, what it says to a wrong Python, and what the CI chooses to run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters.contents import CONTENTS

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("tour", "test", "lab", "check", "check-old", "bench", "notebooks", "mutants", "verify")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=quiet, capture_output=True, text=True)


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_builds_the_environment_first_unless_told_not_to(target, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    built = make("-n", target, folder=tmp_path).stdout
    assert "-m venv .venv" in built and "-c constraints.txt" in built
    assert built.index("-m venv .venv") < built.index(".venv/bin/python -m pip") < len(built)
    plain = make("-n", target, "VENV=no", "PYTHON=mine", folder=tmp_path).stdout
    assert "venv" not in plain and plain.count("mine ") >= 1


@needs_make
def test_make_alone_lists_every_target():
    listed = re.findall(r"^make ([\w-]+)", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS)


@needs_make
def test_an_environment_is_built_once_and_again_when_the_pins_change(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    pins = [tmp_path / "pyproject.toml", tmp_path / "constraints.txt"]
    for age, path in [(20, pins[0]), (20, pins[1]), (10, tmp_path / ".venv" / "ready")]:
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert "venv .venv" not in make("-n", "tour", folder=tmp_path).stdout
    os.utime(pins[1], (1e9, 1e9))
    assert "venv .venv" in make("-n", "tour", folder=tmp_path).stdout


@needs_make
def test_a_wrong_python_is_refused_in_one_line_and_nothing_is_built(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python3.9"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18)\n$1"\n')
    old.chmod(0o755)
    done = make("tour", f"PYTHON={old}", folder=tmp_path)
    assert done.returncode == 2
    assert f"minitfm needs Python 3.11 to 3.13, and {old} is 3.9" in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def changed():
    """.ci/changed.py as a module."""
    spec = importlib.util.spec_from_file_location("changed", ROOT / ".ci" / "changed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["reference", "kernel", "tests", "notebook", "wrong"])
@pytest.mark.parametrize("entry", CONTENTS, ids=lambda entry: entry.name)
def test_ci_tries_a_chapter_when_any_of_its_files_was_touched(entry, place):
    path = entry.places()[place]
    assert entry.dotted in changed().chosen([path + ("/function__mistake.py" if place == "wrong" else "")])


def test_ci_tries_every_chapter_when_it_cannot_know_and_one_of_each_part_for_shared_work():
    every = [entry.dotted for entry in CONTENTS]
    assert changed().chosen(None) == every
    for path in ("minitfm/model.py", "chapters/lab.py", "kernels/guard.py", "tests/conftest.py", "constraints.txt"):
        chosen = changed().chosen([path])
        assert {name.split(".")[0] for name in chosen} == {entry.part for entry in CONTENTS}
    assert changed().chosen(["README.md", "notebooks/build.py", "chapters/contents.toml"]) == []


def test_ci_is_a_program_that_bash_can_read():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_of_many_chapters_ci_draws_some_by_the_name_of_the_commit():
    script, names = changed(), [entry.dotted for entry in CONTENTS]
    few, some = names[:3], script.drawn(names, "a1")
    assert script.drawn(few, "a1") == few and script.drawn([], "a1") == []
    assert len(some) == script.MOST == len(set(some)) < len(names)
    assert some == sorted(some, key=names.index) == script.drawn(names, "a1") != script.drawn(names, "b2")
