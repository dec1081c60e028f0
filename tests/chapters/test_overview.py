"""The book on one page: nothing is left out, and what it says of claims is what was recorded."""

from __future__ import annotations

from chapters import claims, overview
from chapters.contents import CONTENTS, PARTS


def test_outcomes_are_those_of_the_records():
    found = overview.outcomes()
    assert list(found) == [entry.dotted for entry in CONTENTS]
    for entry in CONTENTS:
        record = claims.recorded(entry.name)
        assert (found[entry.dotted] == "reproduced") == bool(record and record["holds"])
        assert (found[entry.dotted] == "not recorded") == (record is None)


def test_rows_hold_every_chapter_once_in_the_books_order_under_its_part():
    found = overview.rows(CONTENTS)
    assert [entry for _, mine in found for entry in mine] == list(CONTENTS)
    assert [title for title, _ in found if title] == [PARTS[part] for part in dict.fromkeys(e.part for e in CONTENTS)]
    assert all(1 <= len(mine) <= overview.COLUMNS and len({entry.part for entry in mine}) == 1 for _, mine in found)


def test_the_map_names_every_chapter_and_tells_outcomes_apart_without_colour():
    wanted = dict.fromkeys((entry.dotted for entry in CONTENTS), "reproduced")
    wanted[CONTENTS[3].dotted] = "not reproduced"
    axes = overview.book_map(CONTENTS, wanted).axes[0]
    said = [" ".join(text.get_text().split()) for text in axes.texts]
    assert all(entry.title in said for entry in CONTENTS if "-" not in entry.title)
    assert sum(patch.get_hatch() == "///" for patch in axes.patches) == 1
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"reproduced", "not reproduced"}


def test_the_table_links_every_notebook():
    lines = overview.table_of_contents(CONTENTS, overview.outcomes()).splitlines()
    assert len(lines) == len(CONTENTS) + 2
    for line, entry in zip(lines[2:], CONTENTS, strict=True):
        assert f"({entry.part}/{entry.name}.ipynb)" in line and line.endswith("reproduced |")
