"""The README can be followed: its commands exist, its links lead somewhere, its table is the book's.

Every line of its command blocks is read by the parser that would read it. `make verify` also runs those that finish
within minutes, in the order in which the README gives them.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters import readme, workbook

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (language, [line.strip() for line in block.splitlines()])
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
]
LINES = [line for language, block in BLOCKS if language == "sh" for line in block]
COMMANDS = [line for line in LINES if not line.startswith("#")]
INLINE = re.findall(r"`((?:python -m|make) [^`]+)`", README)
PACKAGES = ("minitfm", "chapters", "kernels")


def arguments(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def wrong_with(command: str) -> str | None:
    """Why a command of the README cannot work, or None."""
    match arguments(command):
        case ["make", *words]:
            rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return None if all("=" in word or word in rules for word in words) else "no such target"
        case ["python", "-m", "pytest", *words]:
            return None if all(exists(word) for word in words if word.startswith("tests/")) else "no such test file"
        case ["python", "-m", package, *words] if package in PACKAGES:
            return wrong_arguments(package, words)
        case ["python", "-m", module]:
            return None if exists(module.replace(".", "/") + ".py") else "no such module"
    return "no program that this test knows"


def exists(place: str) -> bool:
    return (ROOT / place).exists()


def wrong_arguments(package: str, words: list[str]) -> str | None:
    """What the package's own command line says to those words, by way of its --help."""
    if "NAME" in words or "FUNCTION" in words:
        return None
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), contextlib.suppress(SystemExit):
        importlib.import_module(f"{package}.__main__").main([*words, "--help"])
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    missing = [option for option in options if option not in said.getvalue()]
    return complained.getvalue().strip() or (f"no option {missing}" if missing else None)


def test_blocks_are_commands_that_are_tested_here():
    assert {language for language, _ in BLOCKS} == {"sh", "bat"}
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + INLINE))
def test_command_exists_with_its_options(command):
    assert wrong_with(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "make tuor",
        "python -m chapters tuor",
        "python -m chapters run gptq --bots 3",
        "python -m pytest tests/none",
        "ls",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    assert wrong_with(command)


def test_the_lines_without_make_install_what_make_installs():
    (block,) = (block for language, block in BLOCKS if language == "bat")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (extras,) = re.findall(r'-e "(\.\[.*?notebooks\])"', makefile)
    assert f".venv\\Scripts\\python -m pip install -c constraints.txt -e {extras}" in block
    assert ".venv\\Scripts\\python -m chapters tour" in block


def test_links_and_pictures_lead_to_files():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    missing = [target for target in targets if not target.startswith("https://") and not exists(target)]
    assert targets and not missing


def test_the_contents_are_the_books():
    assert readme.parts_around_table(README)[1] == readme.table()


def test_the_base_model_has_the_size_that_is_said():
    training = json.loads((ROOT / "minitfm" / "base" / "training.json").read_text(encoding="utf-8"))
    assert f"transformer of {training['parameters'] / 1e6:.1f} million parameters" in README


def test_the_picture_is_small():
    assert 5_000 < (ROOT / "notebooks" / "cover.png").stat().st_size <= 100_000


def test_a_marked_test_that_the_readme_shows_is_a_mark():
    (shown,) = re.findall(r"`@(pytest\.mark\.exercise\(.*?\))`", README)
    call = ast.parse(shown, mode="eval").body
    assert isinstance(call, ast.Call)
    function, points = ast.literal_eval(call.args[0]), ast.literal_eval(call.keywords[0].value)
    assert {exercise.function: exercise.points for exercise in workbook.exercises()}[function] == points


LEFT_OUT = ("python -m kernels bench", "python -m pytest -m kernel")  # for a GPU


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path):
    """In a copy of the book, with a text folder and a submission as the README supposes, and with shorter training."""
    book = tmp_path / "book"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "my", "runs", "report")
    shutil.copytree(ROOT, book, ignore=ignored)
    (book / "docs").mkdir()
    for path in ROOT.glob("*/*.py"):
        shutil.copy(path, book / "docs" / f"{path.parent.name}-{path.stem}.txt")
    (book / "submissions" / "ann").mkdir(parents=True)
    for command in COMMANDS:
        words = arguments(command.replace("--steps 2000", "--steps 20"))
        if words[0] == "make" or command in LEFT_OUT:
            continue
        own = {**os.environ, "PYTHONPATH": str(book)}
        done = subprocess.run([sys.executable, *words[1:]], cwd=book, env=own, capture_output=True, text=True)
        to_do = "--submission" in words  # the exercise is not done yet: its tests must say so
        assert done.returncode == int(to_do), f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        if "exercise" in words:
            shutil.copytree(book / "my", book / "submissions" / "ann", dirs_exist_ok=True)
