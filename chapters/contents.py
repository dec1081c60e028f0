"""The table of contents: every technique of the book, in the order in which it is read.

The README's table, the tour and the command line all read `CONTENTS`; `tests/chapters/test_contents.py` holds it
against the folders. Adding a chapter is adding a table to contents.toml and the files under the places that it names.
"""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from chapters.suggest import unknown

PARTS = {  # key, which is also the folder's name, and title, in the order of the book
    "distillation": "Distillation",
    "quantization": "Quantization",
    "pruning": "Pruning",
    "sparsity": "Sparsity",
    "moe": "Mixture of experts",
    "attention": "Attention",
    "decoding": "Decoding",
    "parallel": "Parallelism",
}


@dataclass(frozen=True)
class Entry:
    """One technique.

    part    key of `PARTS`, and the folder's name in chapters, kernels, tests and notebooks
    name    the file's name in all of them
    title   what the technique is called
    line    the idea in one line
    paper   authors and year of the paper that it follows, `url` where that paper is
    kernel  dotted name of its kernel file under `kernels`, such as "attention.flash"
    settings  options of `python -m chapters run NAME` that each make a point of the leaderboard: ["--bits 3"]; may be
              left out
    """

    part: str
    name: str
    title: str
    line: str
    paper: str
    url: str
    kernel: str
    settings: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """Part and name, such as "quantization.gptq"."""
        return f"{self.part}.{self.name}"

    def places(self) -> dict[str, str]:
        """Where its files are, relative to the root of the repository."""
        return {
            "reference": f"chapters/{self.part}/{self.name}.py",
            "kernel": f"kernels/{self.kernel.replace('.', '/')}.py",
            "tests": f"tests/{self.part}/test_{self.name}.py",
            "wrong": f"tests/wrong/{self.part}/{self.name}",
            "notebook": f"notebooks/{self.part}/{self.name}.ipynb",
        }

    def module(self) -> ModuleType:
        """The chapter, imported."""
        return importlib.import_module(f"chapters.{self.dotted}")


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a contents file: parts in the order of `PARTS`, techniques in that of the file.

    Raises ValueError for what is no TOML, an unknown part, and a table with a missing, unknown or empty key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for key in tables:
        if key not in PARTS:
            raise ValueError(f"{path}: {unknown('part', key, PARTS)}")
        if not isinstance(tables[key], list) or not all(isinstance(table, dict) for table in tables[key]):
            raise ValueError(f"{path}: each technique begins with [[{key}]], in double brackets")
    return tuple(_entry(path, key, table) for key in PARTS for table in tables.get(key, []))


def _entry(path: Path, part: str, table: dict[str, Any]) -> Entry:
    """One table of a contents file as an entry; errors as `read` says."""
    place = f"{path}: {part}.{table.get('name', '?')}"
    keys = [field.name for field in fields(Entry) if field.name != "part"]
    for key in table:
        if key not in keys:
            raise ValueError(f"{place}: {unknown('key', key, keys)}")
    for key in keys:
        if key != "settings" and not (isinstance(table.get(key), str) and table[key].strip()):
            raise ValueError(f'{place} needs {key} = "…"')
    settings = table.pop("settings", [])
    if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
        raise ValueError(f'{place}: settings must be a list like ["--bits 3"], got {settings!r}')
    return Entry(part, settings=tuple(settings), **table)


CONTENTS = read(Path(__file__).with_name("contents.toml"))


def find(name: str) -> Entry:
    """The entry called `name`, either plain ("gptq") or with its part ("quantization.gptq").

    Raises ValueError that suggests the nearest name.
    """
    for entry in CONTENTS:
        if name in (entry.name, entry.dotted):
            return entry
    raise unknown("chapter", name, [entry.dotted if "." in name else entry.name for entry in CONTENTS])


def part(name: str) -> tuple[Entry, ...]:
    """The entries of one part. Raises ValueError for a part that has none, naming those that do."""
    chosen = tuple(entry for entry in CONTENTS if entry.part == name)
    if not chosen:
        raise unknown("part", name, dict.fromkeys(entry.part for entry in CONTENTS))
    return chosen
