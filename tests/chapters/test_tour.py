"""The tour goes on after a failure, keeps what is done, and reports it in one file."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from chapters import claims, contents, report, tour


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def page_of(folder) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_a_failure_is_reported_and_the_rest_goes_on(book, lab, tmp_path, console):
    assert tour.tour(contents.CONTENTS, lab, tmp_path, console) == 1
    printed, page = console.file.getvalue(), page_of(tmp_path)
    for text in (printed, page):
        assert "1 of 3 claims reproduced, 1 not reproduced, 1 failed" in text
        assert "RuntimeError: the weights" in text and "It does not show here." in text
    assert "difference: 0.25" in printed and "0.25</td>" in page
    assert "infinite</td>" in page and "in raises" in page


def test_a_tour_where_all_ran_ends_well_reproduced_or_not(book, lab, tmp_path, console):
    assert tour.tour([contents.find("holds"), contents.find("shows_not")], lab, tmp_path, console) == 0


def test_a_text_that_lacks_what_a_claim_measures_is_no_failure(book, lab, tmp_path, console):
    def claim(lab):
        raise claims.NotMeasurable("the text has too few examples")

    book["holds"].claim = claim
    assert tour.tour([contents.find("holds"), contents.find("shows_not")], lab, tmp_path, console) == 0
    for text in (console.file.getvalue(), page_of(tmp_path)):
        assert "0 of 2 claims reproduced, 1 not reproduced, 1 not measured" in text
        assert "the text has too few examples" in text and "Where it happened" not in text


def test_the_report_stands_alone(book, lab, tmp_path, console):
    tour.tour(contents.CONTENTS, lab, tmp_path, console)
    page = page_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert re.findall(r'src="(.{21})', page) == ["data:image/png;base64"]
    assert 'alt="Loss falls; loss against bits; series: ours"' in page
    assert re.findall(r'href="([^"]+)"', page).count("https://example.org") == 3
    for name, value in report.model_card(lab).items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_what_a_chapter_says_is_text_not_markup(book, lab, tmp_path, console):
    tour.tour([contents.find("holds")], lab, tmp_path, console)
    assert "It helps &amp; &lt;b&gt;holds&lt;/b&gt;." in page_of(tmp_path)
    assert "It helps & <b>holds</b>." in console.file.getvalue()


def test_recorded_numbers_stand_beside_the_live_ones(book, lab, full_lab, tmp_path, console):
    entry = contents.find("shows_not")
    recorded = claims.Claim("With three seeds it shows.", True, {"difference": 0.5, "seeds": 3}, None, "three seeds")
    claims.record(claims.Result(entry, recorded, 61.0), full_lab)
    tour.tour([entry], lab, tmp_path, console)
    page = page_of(tmp_path)
    assert re.search(r'>difference</th><td class="number">0.25</td><td class="number">0.5</td>', page)
    assert re.search(r'>seeds</th><td class="number">–</td><td class="number">3</td>', page)
    assert "With three seeds it shows." in page and "reproduced, 3 seeds, 61 s" in page


def interrupt(lab):
    raise KeyboardInterrupt


def test_an_interrupt_keeps_what_is_done(book, lab, tmp_path, console):
    book["raises"].claim = interrupt
    assert tour.tour(contents.CONTENTS, lab, tmp_path, console) == 130
    page = page_of(tmp_path)
    assert "It helps" in page and "The tour was interrupted" in page
    assert "1 of 3 claims reproduced, 2 not run" in page and "It does not show" not in page


def test_an_interrupt_before_anything_is_done_leaves_the_last_report(book, lab, tmp_path, console):
    (tmp_path / "index.html").write_text("the last report")
    book["holds"].claim = interrupt
    assert tour.tour(contents.CONTENTS, lab, tmp_path, console) == 130
    assert page_of(tmp_path) == "the last report"


def test_the_report_is_there_before_the_tour_ends(book, lab, tmp_path, console):
    def look(lab):
        seen.append("It helps" in page_of(tmp_path))
        return claims.Claim("Seen.", True, {"x": 1}, None, "here")

    seen = []
    book["shows_not"].claim = look
    tour.tour(contents.CONTENTS, lab, tmp_path, console)
    assert seen == [True]


@pytest.mark.parametrize("obstacle", ["folder", "record"])
def test_what_would_spoil_the_end_is_refused_before_the_work(book, lab, tmp_path, console, obstacle):
    calls = []
    book["holds"].claim = calls.append
    folder = tmp_path / "out"
    if obstacle == "folder":
        folder.write_text("a file")
    else:
        claims.RESULTS.mkdir()
        (claims.RESULTS / "shows_not.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot write to|is damaged"):
        tour.tour(contents.CONTENTS, lab, folder, console)
    assert not calls and not folder.is_dir()


def test_a_claim_over_its_budget_says_so(book, lab, console):
    slow = claims.Result(contents.find("holds"), None, 31.0, "error")
    assert tour.took(slow, lab) == "31.0 s (over the budget of 30 s)"
    assert tour.took(claims.Result(slow.entry, None, 29.0, "error"), lab) == "29.0 s"


def test_chapters_are_chosen_by_part_and_name(book):
    assert tour.choose() == tour.choose("sparsity") == contents.CONTENTS
    assert [entry.name for entry in tour.choose(only=["shows_not", "holds"])] == ["holds", "shows_not"]
    with pytest.raises(ValueError, match="did you mean 'holds'"):
        tour.choose(only=["hold"])


def test_a_part_without_the_named_chapters_is_refused():
    with pytest.raises(ValueError, match="part 'sparsity' has none of the chapters gptq"):
        tour.choose("sparsity", ["gptq"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(23.9123, "23.91"), (786432.0, "786,432"), (1e-6, "1e-06"), (0.0, "0"), (-1.5, "-1.5"), (12345.6, "12,346")],
)
def test_numbers_are_shown_short(value, text):
    assert report.shown(value) == text
