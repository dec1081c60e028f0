"""A student's folder, put in front of the book: what it holds, and which of it was really tested."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

import pytest

PACKAGES = ("chapters", "kernels")


class Submission:
    """The files of `folder` that stand for files of the book at `root`, such as chapters/quantization/gptq.py."""

    def __init__(self, folder: Path, root: Path):
        """Raise pytest.UsageError unless the folder holds at least one such file and none under a wrong name."""
        self.folder = folder
        paths = [path for package in PACKAGES for path in root.glob(f"{package}/*/[!_]*.py")]
        known = {str(path.relative_to(root)) for path in paths if path.parent.name != "shared"}
        if not folder.is_dir():
            raise pytest.UsageError(f"--submission {folder}: no such folder")
        found = [path for package in PACKAGES for path in folder.glob(f"{package}/**/*.py") if path.name[0] != "_"]
        self.files = sorted(str(path.relative_to(folder)) for path in found)
        misplaced = [path.name for path in folder.glob("*.py") if any(path.name == Path(name).name for name in known)]
        for name in self.files + misplaced:
            if name not in known:
                raise pytest.UsageError(f"--submission {folder}: the book has no {name}{_nearest(name, known)}")
        for path in found:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise pytest.UsageError(f"--submission {folder}: {path.relative_to(folder)} links out of the folder")
        if not self.files:
            expected = "chapters/<part>/<technique>.py or kernels/<part>/<technique>.py"
            raise pytest.UsageError(f"--submission {folder}: it holds no {expected}")

    def __str__(self) -> str:
        return f"{self.folder} ({', '.join(self.files)})"

    def activate(self) -> None:
        """From here on an import finds the submission's files first; what they leave out comes from the book."""
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES and name.count(".") > 1]:
            del sys.modules[name]
        for part in sorted({Path(name).parent for name in self.files}):
            importlib.import_module(".".join(part.parts)).__path__.insert(0, str(self.folder / part))

    def imported(self) -> list[str]:
        """The files that were imported so far."""
        origins = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
        return [name for name in self.files if str(self.folder / name) in origins]


def _nearest(name: str, known: set[str]) -> str:
    """The words that point to the known file whose name or end is the most like `name`."""
    close = [path for path in sorted(known) if path.endswith("/" + name)] or difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
