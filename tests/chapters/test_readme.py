"""The README's table says what the contents, the tests and the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from chapters import contents, readme


def test_the_table_links_every_place_and_keeps_its_columns(book):
    lines = readme.table().splitlines()
    assert len(lines) == 3 + len(book)
    for line, entry in zip(lines[3:], contents.CONTENTS, strict=True):
        assert line.count("|") == lines[0].count("|") and "not recorded yet" in line
        assert all(entry.places()[place] in line for place in ("reference", "kernel", "notebook"))


def test_a_row_tells_a_claim_that_does_not_hold(book):
    entry = contents.CONTENTS[0]
    tests = entry.places()["tests"]
    assert readme.row(entry, 4, None, {"sentence": "a | b.", "holds": True}).endswith(f"| [4]({tests}) | a \\| b. |")
    assert readme.row(entry, 4, None, {"sentence": "a.", "holds": False}).endswith("| *Not reproduced:* a. |")


def test_the_table_is_put_between_the_markers(tmp_path: Path, book):
    page = tmp_path / "README.md"
    page.write_text(f"# before\n{readme.START}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    readme.insert_table(page)
    once = page.read_text(encoding="utf-8")
    assert once == f"# before\n{readme.START}\n{readme.table()}\n{readme.END}\nafter\n"
    readme.insert_table(page)
    assert page.read_text(encoding="utf-8") == once


def test_a_file_without_markers_is_refused_and_left_alone(tmp_path: Path, book):
    page = tmp_path / "README.md"
    page.write_text(f"{readme.END} {readme.START}", encoding="utf-8")
    with pytest.raises(ValueError, match="needs a line <!-- contents -->"):
        readme.insert_table(page)
    assert page.read_text(encoding="utf-8") == f"{readme.END} {readme.START}"
