"""The table of contents and the folders say the same."""

from __future__ import annotations

import tomllib

import pytest

from chapters import contents, workbook
from chapters.contents import CONTENTS, PARTS, Entry, read
from chapters.workbook import ROOT


def files(package: str) -> set[str]:
    """Dotted names of the files in the parts of a package."""
    paths = (ROOT / package).glob("*/[!_]*.py")
    return {f"{path.parent.name}.{path.stem}" for path in paths if path.parent.name != "shared"}


def test_every_chapter_file_is_listed_once():
    project = {"course.project"}  # the course's last assignment is no technique
    assert files("chapters") - project == {entry.dotted for entry in CONTENTS}
    assert len({entry.name for entry in CONTENTS}) == len(CONTENTS), "records and the command line go by plain names"


def test_every_kernel_file_is_some_chapters_kernel():
    assert files("kernels") == {entry.kernel for entry in CONTENTS}


def test_parts_follow_the_order_of_the_book():
    order = [list(PARTS).index(entry.part) for entry in CONTENTS]
    assert order == sorted(order)


@pytest.mark.parametrize("entry", CONTENTS, ids=lambda entry: entry.name)
def test_every_listed_place_exists(entry):
    missing = [path for path in entry.places().values() if not (ROOT / path).exists()]
    assert not missing
    assert (ROOT / entry.places()["notebook"]).with_suffix(".py").exists()


@pytest.mark.parametrize("entry", CONTENTS, ids=lambda entry: entry.name)
def test_every_chapter_has_three_exercises_in_its_own_files(entry):
    own = (f"chapters.{entry.dotted}.", f"kernels.{entry.kernel}.")
    found = [exercise for exercise in workbook.exercises() if entry.dotted in exercise.techniques]
    assert len(found) >= 3 and all(exercise.function.startswith(own) for exercise in found)


def test_an_entry_is_found_by_name_and_by_dotted_name():
    for entry in CONTENTS:
        assert contents.find(entry.name) is contents.find(entry.dotted) is entry


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [("gtpq", "gptq"), ("GPTQ", "gptq"), ("n-m", "n_m"), ("quantisation.gptq", "quantization.gptq")],
)
def test_an_unknown_name_suggests_the_nearest(asked, suggested):
    with pytest.raises(ValueError, match=f"'{asked}'; did you mean '{suggested}'"):
        contents.find(asked)


def test_a_name_like_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"known are .*gptq"):
        contents.find("zzzzz")


def test_a_part_gives_its_entries_or_names_the_parts():
    listed = tomllib.loads((ROOT / "chapters" / "contents.toml").read_text(encoding="utf-8"))["quantization"]
    assert [entry.name for entry in contents.part("quantization")] == [table["name"] for table in listed]
    with pytest.raises(ValueError, match="did you mean 'quantization'"):
        contents.part("quantisation")
    with pytest.raises(ValueError, match=r"known are .*quantization, .*sparsity, .*attention"):
        contents.part("zzzzz")


TABLE = """
[[{part}]]
name = "{name}"
title = "A title"
line = "An idea."
paper = "Author 2020"
url = "https://example.org"
kernel = "sparsity.x"
"""


@pytest.fixture
def file(tmp_path):
    """Writes a contents file."""
    path = tmp_path / "contents.toml"

    def write(text: str):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_entries_come_by_part_and_within_one_in_the_order_of_the_file(file):
    listed = (("sparsity", "z"), ("distillation", "b"), ("sparsity", "a"))
    entries = read(file("".join(TABLE.format(part=part, name=name) for part, name in listed)))
    assert [entry.dotted for entry in entries] == ["distillation.b", "sparsity.z", "sparsity.a"]
    assert entries[0] == Entry(
        "distillation", "b", "A title", "An idea.", "Author 2020", "https://example.org", "sparsity.x"
    )


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ('title = "A title"\n', "", r'sparsity\.z needs title = "…"'),
        ('title = "A title"', 'title = " "', r'sparsity\.z needs title = "…"'),
        ('title = "A title"', "title = 3", r'sparsity\.z needs title = "…"'),
        ('name = "z"\n', "", r'sparsity\.\? needs name = "…"'),
        ("title =", "titel =", r"sparsity\.z: no key is called 'titel'; did you mean 'title'\?"),
        ("[[sparsity]]", "[[sparcity]]", r"no part is called 'sparcity'; did you mean 'sparsity'\?"),
        ("[[sparsity]]", "[sparsity]", r"each technique begins with \[\[sparsity\]\]"),
        ('title = "A title"', "title = A title", r"Invalid value \(at line 4"),
        ("title =", 'settings = "--bits 3"\ntitle =', r"sparsity\.z: settings must be a list like .*, got '--bits 3'"),
        ("title =", "settings = [3]\ntitle =", r"sparsity\.z: settings must be a list like .*, got \[3\]"),
    ],
)
def test_a_table_that_is_not_complete_is_refused_with_its_place(file, right, wrong, complaint):
    text = TABLE.format(part="sparsity", name="z")
    assert right in text
    with pytest.raises(ValueError, match=rf"contents\.toml: {complaint}"):
        read(file(text.replace(right, wrong)))
