"""Print the chapters that the last piece of work touched, one dotted name a line, for .ci/run.

A piece of work is a few commits within a few hours: what is compared is the newest commit at least that much older
than HEAD. Work on what all chapters stand on adds one chapter of each part. Of more than MOST chapters so many are
drawn by the name of the commit: continuous integration ends in time, and another commit tries others. Without such
a commit, or without git, they are drawn from all chapters.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from chapters.contents import CONTENTS, Entry

ROOT = Path(__file__).resolve().parents[1]
HOURS = 3
MOST = 7  # chapters: about a minute each
SHARED = ("minitfm/", "chapters/shared/", "kernels/shared/", "pyproject.toml", "constraints.txt", "Makefile", ".ci/")


def git(*arguments: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def changed_files() -> list[str] | None:
    """Paths that differ from before the last piece of work; None if that is not known."""
    try:
        last = int(git("show", "--no-patch", "--format=%ct", "HEAD"))
        base = git("rev-list", "--max-count=1", f"--before={last - HOURS * 3600}", "HEAD")
        return git("diff", "--name-only", base).splitlines() if base else None
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def touches(path: str, entry: Entry) -> bool:
    """Whether the file at `path` is one of the chapter's own."""
    places = {**entry.places(), "source": f"notebooks/{entry.part}/{entry.name}.py"}
    return any(path == place or path.startswith(f"{place}/") for place in places.values())


def shared(path: str) -> bool:
    """Whether all chapters stand on the file at `path`: the model, or the binding of a package."""
    binding = path.split("/")[0] in ("chapters", "kernels", "tests") and path.count("/") == 1 and path.endswith(".py")
    return binding or path.startswith(SHARED)


def chosen(paths: list[str] | None) -> list[str]:
    """The chapters to try for a change of those files, in the book's order."""
    if paths is None:
        return [entry.dotted for entry in CONTENTS]
    firsts = {entry.part: entry for entry in reversed(CONTENTS)}.values() if any(map(shared, paths)) else ()
    return [entry.dotted for entry in CONTENTS if entry in firsts or any(touches(path, entry) for path in paths)]


def drawn(names: list[str], commit: str) -> list[str]:
    """At most MOST of the names, in their order; the same ones for the same commit."""
    places = random.Random(commit).sample(range(len(names)), min(MOST, len(names)))
    return [names[place] for place in sorted(places)]


def head() -> str:
    """The name of the commit; "" without git."""
    try:
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    print("\n".join(drawn(chosen(changed_files()), head())))
