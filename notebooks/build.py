"""Build the notebooks: notebooks/<part>/<name>.py, the source, becomes <name>.ipynb beside it, executed.

So does notebooks/<name>.py, if it has cells: what belongs to no part.

    python notebooks/build.py                  execute every notebook and write it
    python notebooks/build.py flash gptq       only these
    python notebooks/build.py --no-write       execute, and write nothing: do they still run, and in time?
    python notebooks/build.py --check          execute nothing: does each .ipynb belong to its source?

The source is in jupytext's percent format, so that diffs and linters can read it. What is written depends on the
source alone wherever its outputs do: numbered cell ids, no times, no widget state, no stderr. Exit code 1 says that
a notebook failed (which one, and why, on stderr), 2 that there is no such notebook.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
LIMIT = 60  # seconds of processor time a notebook may take; a busy machine hardly changes it
PATIENCE = 300  # seconds to wait for one cell
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ENVIRONMENT = {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "STATIC_FIGURES": "1"}
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def sources(folder: Path, names: list[str]) -> list[Path]:
    """The sources below `folder` that `names` name ("gptq", "quantization.gptq" or a path), all of them for no names.

    Raises ValueError for a name that fits none, with the nearest one that exists.
    """
    paths = [*sorted(filter(has_cells, folder.glob("*.py"))), *sorted(folder.glob("*/*.py"))]
    known = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}
    if not names:
        return list(known.values())
    return [known[find(name, list(known))] for name in names]


def has_cells(path: Path) -> bool:
    """Whether a Python file is in the percent format, and no program."""
    return any(line.startswith("# %%") for line in path.read_text(encoding="utf-8").splitlines())


def find(name: str, known: list[str]) -> str:
    """The member of `known` ("part.technique", or "name" outside of parts) that `name` means."""
    dotted = re.sub(r"^notebooks\.|\.(py|ipynb)$", "", name.replace("/", "."))
    fitting = [entry for entry in known if dotted in (entry, entry.split(".")[-1])]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{name} could be {' or '.join(fitting)}")
    near = difflib.get_close_matches(dotted, known + [entry.split(".")[-1] for entry in known], n=1, cutoff=0.5)
    raise ValueError(f"no notebook {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; there are {known}"))


def read(source: Path) -> NotebookNode:
    """The notebook that a percent-format source describes, without outputs."""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    return normalise(notebook)


def execute(notebook: NotebookNode, folder: Path) -> float:
    """Run all cells in place, in `folder` as JupyterLab does; returns its seconds of processor time.

    A cell that raises ends the run and holds the error among its outputs. Raises RuntimeError in one line when a
    cell never ends or the kernel dies.
    """
    os.environ.update(ENVIRONMENT)
    started = children_seconds()
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        extra_arguments=["--log-level=ERROR"],  # the kernel warns that others on this machine could listen
    )
    try:
        client.execute()
    except CellExecutionError:
        pass  # it is in the outputs, where `faults` finds it
    except (CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(str(error).splitlines()[0]) from error
    return children_seconds() - started


def children_seconds() -> float:
    """Processor time of all processes that this one has started and seen end (0 on Windows, which does not say)."""
    times = os.times()
    return times.children_user + times.children_system


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs from one execution to the next and says nothing; changes the notebook and returns it."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(plain, cell.outputs) if output is not None]
    return notebook


def plain(output: NotebookNode) -> NotebookNode | None:
    """An output as it is kept: None for stderr and for what only a live kernel could show."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    if output.output_type in ("display_data", "execute_result"):
        kept = {kind: data for kind, data in output.data.items() if "widget" not in kind}
        if "image/png" in kept:
            kept.pop("text/plain", None)  # the object's name, beside its picture
        output.data, output.metadata = nbformat.from_dict(kept), NotebookNode()
        return output if kept else None
    return output


def faults(source: Path, built: NotebookNode) -> list[str]:
    """What is wrong with an executed notebook, one line each."""
    found = []
    wanted = [(cell.cell_type, cell.source) for cell in read(source).cells]
    if [(cell.cell_type, cell.source) for cell in built.cells] != wanted:
        found.append("its cells are not those of the source: make notebooks")
    if nbformat.writes(normalise(copy.deepcopy(built))) != nbformat.writes(built):
        found.append("not as build.py writes it (saved by an editor?): make notebooks")
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not every code cell was executed, in order")
    return found + [fault for cell in code for output in cell.outputs for fault in output_faults(cell.id, output)]


def output_faults(cell: str, output: NotebookNode) -> list[str]:
    """What is wrong with one output of the cell with that id."""
    if output.output_type == "error":
        return [f"{cell} ends in {output.ename}: {output.evalue.partition(chr(10))[0]}"]
    text = "".join(str(data) for kind, data in output.get("data", {}).items() if kind != "image/png")
    text += output.get("text", "")
    found = [f"{cell} prints an address, which is new every time: {match[0]}" for match in ADDRESS.finditer(text)]
    if str(FOLDER.parent) in text or str(Path.home()) in text:
        found.append(f"{cell} prints a path of this machine")
    return found


def check(source: Path) -> list[str]:
    """The faults of the committed notebook of one source."""
    target = source.with_suffix(".ipynb")
    if not target.exists():
        return [f"{target.name} is missing: make notebooks"]
    return faults(source, nbformat.read(target, as_version=4))


def build(source: Path, write: bool) -> tuple[float, list[str]]:
    """Execute one notebook; write it if it may be written and has no fault. Returns the seconds and the faults."""
    notebook = read(source)
    try:
        seconds = execute(notebook, source.parent)
    except RuntimeError as error:
        return 0.0, [str(error)]
    found = faults(source, normalise(notebook))
    if seconds > LIMIT:
        found.append(f"took {seconds:.0f} s, the limit is {LIMIT} s")
    if write and not found:
        target = source.with_suffix(".ipynb")
        fresh = target.with_suffix(".tmp")
        fresh.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        fresh.replace(target)
    return seconds, found


def orphans(folder: Path) -> list[Path]:
    """The .ipynb files that no source builds."""
    found = [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("[!.]*/*.ipynb"))]
    return [path for path in found if not path.with_suffix(".py").exists()]


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the notebooks from their sources.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as gptq or quantization.gptq; default all")
    parser.add_argument("--check", action="store_true", help="execute nothing, only compare")
    parser.add_argument("--no-write", action="store_true", help="execute, write nothing")
    args = parser.parse_args(arguments)
    try:
        chosen = sources(folder, args.names)
    except ValueError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    failed = False
    for source in chosen:
        seconds, found = (0.0, check(source)) if args.check else build(source, write=not args.no_write)
        failed |= report(source, seconds, found)
    for path in orphans(folder) if args.check else []:
        failed |= report(path, 0.0, ["has no source beside it"])
    return int(failed)


def report(source: Path, seconds: float, found: list[str]) -> bool:
    """Print how one notebook fared; returns whether it failed."""
    name = f"{source.parent.name}/{source.stem}"
    for fault in found:
        print(f"{name}: {fault}", file=sys.stderr)
    if not found:
        print(f"{name}: good" + (f", {seconds:.0f} s" if seconds else ""))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
