"""The committed notebooks belong to their sources and keep to the book's style; the builder sees what is wrong.

Executing them all takes minutes: `make notebooks` does it, and so does the continuous integration.
"""

# ruff: noqa: E402  (the imports below importorskip need the `notebooks` extra)

from __future__ import annotations

import ast
import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("jupytext", "nbformat", "nbclient"):
    pytest.importorskip(needed, reason="install the `notebooks` extra to test the notebooks")

import nbformat
from nbformat.v4 import new_code_cell, new_output

from notebooks import build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = build.sources(build.FOLDER, [])
LONGEST_CELL = 10  # lines of code besides imports
LARGEST = 400_000  # bytes of an executed notebook

SOURCE = """# %% [markdown]
# # One

# %%
import warnings
from chapters.figures import figure
warnings.warn("careful")
drawn, axes = figure()
axes.plot([1, 2])
drawn

# %% [markdown]
# And a sum.

# %%
print(1 + 1)
"""


def named(source: Path) -> str:
    return f"{source.parent.name}.{source.stem}"


def cells(source: Path, kind: str) -> list[str]:
    return [cell.source for cell in build.read(source).cells if cell.cell_type == kind]


def defined_in_packages() -> set[str]:
    """The names of all public top-level functions and classes of the three packages."""
    paths = [path for package in ("minitfm", "chapters", "kernels") for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_notebook_belongs_to_its_source(source):
    assert build.check(source) == []


def test_every_notebook_has_a_source():
    assert SOURCES
    assert build.orphans(build.FOLDER) == []


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_cells_are_short_and_plain_python(source):
    for cell in cells(source, "code"):
        counted = [line for line in cell.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
        assert len(counted) <= LONGEST_CELL, cell
        assert not any(line.startswith(("%", "!")) for line in cell.splitlines()), cell
        ast.parse(cell)


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_prose_comes_before_every_cell_of_code(source):
    kinds = [cell.cell_type for cell in build.read(source).cells]
    assert kinds[0] == "markdown" and ("code", "code") not in list(itertools.pairwise(kinds))


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_notebook_imports_what_the_book_defines(source):
    tree = ast.parse("\n".join(cells(source, "code")))
    here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not here & defined_in_packages()


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_notebook_asserts_what_it_says_and_shows_figures_without_growing_large(source):
    tree = ast.parse("\n".join(cells(source, "code")))
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    target = source.with_suffix(".ipynb")
    assert target.stat().st_size <= LARGEST
    built = nbformat.read(target, as_version=4)
    outputs = [output for cell in built.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


KNOBS = [source for source in SOURCES if "\nexplore(" in source.read_text(encoding="utf-8")]
TURNED = """
import sys
from chapters import explore
from chapters.figures import save_png_bytes


def turn(draw, **knobs):
    start = {name: explore.initial(draw, name, knob) for name, knob in knobs.items()}
    for name, knob in knobs.items():
        assert not isinstance(knob, list) or start[name] in knob, f"{name} starts at none of its choices"
        for value in knob if isinstance(knob, list) else knob[:2]:
            save_png_bytes(draw(**start | {name: value}))
    print("turned")


explore.explore = turn
exec(compile(sys.stdin.read(), "notebook", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", KNOBS, ids=named)
def test_every_knob_turns_to_its_ends(source):
    """The notebook as far as its last picture with knobs, which draws each choice or both ends of a range."""
    lines = source.read_text(encoding="utf-8").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("explore("))
    run = [sys.executable, "-c", TURNED]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = "\n".join(lines[: last + 1])
    done = subprocess.run(run, cwd=source.parent, env=own, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("turned") == sum(line.startswith("explore(") for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one part and one notebook, built."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "part").mkdir()
    (folder / "part" / "one.py").write_text(SOURCE, encoding="utf-8")
    assert build.main([], folder) == 0
    return folder


def test_building_again_writes_the_same_bytes(folder):
    target = folder / "part" / "one.ipynb"
    before = target.read_bytes()
    assert build.main(["one"], folder) == 0
    assert target.read_bytes() == before
    assert b"image/png" in before and b"UserWarning" not in before


def spoil(name: str, notebook: nbformat.NotebookNode) -> None:
    """Change an executed notebook in the way that `name` says."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    match name:
        case "edited":
            code[0].source += "\n1"
        case "cell added":
            notebook.cells.append(new_code_cell("1", id="cell-04", execution_count=3))
        case "not executed":
            code[1].execution_count = None
        case "out of order":
            code[0].execution_count, code[1].execution_count = 2, 1
        case "error":
            code[1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
        case "stderr":
            code[1].outputs.append(new_output("stream", name="stderr", text="careful"))
        case "saved by an editor":
            notebook.metadata["toc"] = True
        case "address":
            code[1].outputs = [new_output("stream", name="stdout", text="<f at 0x7f00deadbeef>\n")]
        case "path":
            code[1].outputs = [new_output("stream", name="stdout", text=f"{ROOT}\n")]


SPOILED = {
    "edited": "not those of the source",
    "cell added": "not those of the source",
    "not executed": "not every code cell",
    "out of order": "not every code cell",
    "error": "cell-03 ends in ValueError: no",
    "stderr": "not as build.py writes it",
    "saved by an editor": "not as build.py writes it",
    "address": "cell-03 prints an address",
    "path": "cell-03 prints a path",
}


@pytest.mark.parametrize("name", SPOILED)
def test_check_names_the_fault(folder, name):
    source = folder / "part" / "one.py"
    good = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert build.faults(source, good) == []
    bad = copy.deepcopy(good)
    spoil(name, bad)
    assert any(SPOILED[name] in fault for fault in build.faults(source, bad))


def test_check_fails_on_a_missing_notebook_and_on_one_without_source(folder, tmp_path, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "new.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "part" / "old.ipynb").write_bytes((folder / "part" / "one.ipynb").read_bytes())
    assert build.main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "part/new: new.ipynb is missing" in said and "part/old: has no source" in said


def test_a_failing_notebook_is_not_written(tmp_path, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "bad.py").write_text("# %%\nassert 1 + 1 == 3, 'sums'\n", encoding="utf-8")
    assert build.main([], tmp_path) == 1
    assert capsys.readouterr().err == "part/bad: cell-00 ends in AssertionError: sums\n"
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["bad.py"]


def test_a_notebook_over_the_limit_fails(folder, monkeypatch):
    monkeypatch.setattr(build, "execute", lambda notebook, folder: 61.0)
    seconds, found = build.build(folder / "part" / "one.py", write=True)
    assert seconds == 61 and any("took 61 s, the limit is 60 s" in fault for fault in found)


@pytest.mark.parametrize("name", ["one", "part.one", "part/one", "part/one.py", "notebooks/part/one.ipynb"])
def test_a_notebook_is_found_by_any_of_its_names(folder, name):
    assert build.sources(folder, [name]) == [folder / "part" / "one.py"]


def test_a_notebook_outside_of_the_parts_is_built_and_a_program_is_not(tmp_path, capsys):
    (tmp_path / "own.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "program.py").write_text("print('# %%')\n", encoding="utf-8")
    assert build.sources(tmp_path, []) == build.sources(tmp_path, ["notebooks/own.ipynb"]) == [tmp_path / "own.py"]
    assert build.main(["own"], tmp_path) == 0
    assert build.main(["--check"], tmp_path) == 0
    (tmp_path / "old.ipynb").write_bytes((tmp_path / "own.ipynb").read_bytes())
    assert build.main(["--check"], tmp_path) == 1
    assert "/old: has no source" in capsys.readouterr().err


def test_an_unknown_name_suggests_the_nearest_and_exits_2(folder, capsys):
    assert build.main(["ones"], folder) == 2
    assert capsys.readouterr().err == "build.py: no notebook 'ones', did you mean 'one'?\n"


def test_plain_keeps_a_picture_and_drops_what_only_a_live_kernel_shows():
    live = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    picture = new_output("display_data", data={**live, "image/png": "AAAA", "text/plain": "<Figure>"})
    assert build.plain(picture).data == {"image/png": "AAAA"}
    assert build.plain(new_output("display_data", data=live)) is None
