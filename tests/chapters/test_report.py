"""The report as a page: its outline, what stands in for its pictures, its tables, its two charts of the leaderboard."""

from __future__ import annotations

import base64
import io
import re
import struct
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from chapters import contents, leaderboard, long_context, report, tour
from chapters.leaderboard import Board, Point

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), and whether each one that was opened is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture
def html(book, lab, tmp_path, monkeypatch) -> str:
    """A tour of the made-up chapters, with the book's leaderboard and long contexts beside it."""
    book_of_three = contents.CONTENTS
    monkeypatch.setattr(contents, "CONTENTS", contents.read(leaderboard.KEPT.with_name("contents.toml")))
    board, contexts = leaderboard.section(), long_context.section()
    monkeypatch.setattr(contents, "CONTENTS", book_of_three)
    monkeypatch.setattr(leaderboard, "section", lambda: board)
    monkeypatch.setattr(long_context, "section", lambda: contexts)
    tour.tour(contents.CONTENTS, lab, tmp_path, Console(file=io.StringIO()))
    return (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def page(html) -> Page:
    return Page(html)


def test_its_outline_is_in_order(page, html):
    assert html.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(later <= before + 1 for before, later in pairwise(levels))


def test_every_link_within_it_arrives(page):
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [(attributes["href"] or "")[1:] for attributes in page.all("a") if (attributes["href"] or "")[0] == "#"]
    assert len(names) == len(set(names)) and set(links) <= set(names)
    assert {"claims", "leaderboard", "bytes-read", "long-context", "part-sparsity", "environment"} <= set(links)


def test_every_picture_is_described_and_has_its_size(page):
    pictures = page.all("img")
    assert len(pictures) == 4  # two charts of the leaderboard, long contexts, one claim
    for picture in pictures:
        kind, _, encoded = (picture["src"] or "").partition(",")
        pixels = struct.unpack(">II", base64.b64decode(encoded)[16:24])
        assert kind == "data:image/png;base64" and len(picture["alt"] or "") > 20
        sizes = [int(picture[name] or 0) for name in ("width", "height")]
        assert sizes == [round(pixel * report.INCH / report.RESOLUTION) for pixel in pixels]


def test_heads_of_tables_say_what_they_head(page):
    heads = page.all("th")
    assert len(heads) > 100 and {head.get("scope") for head in heads} == {"col", "row", "rowgroup"}


def test_it_is_made_for_phones_and_paper_too(page, html):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "@media (max-width" in html and "@media print" in html


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_the_page(html):
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", html))
    for name in ("ink", "soft", "link", "good", "not", "bad"):
        for ground in ("#ffffff", colours["tint"]):
            assert (luminance(ground) + 0.05) / (luminance(colours[name]) + 0.05) > 4.5, f"{name} on {ground}"


def test_it_says_where_and_how_long_it_ran(html):
    for fact in ("date", "duration", "seeds", "system", "python", "torch"):
        assert f"<dt>{fact}</dt>" in html
    assert "after the tour began" in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (252, "4 min 12 s"), (3599.7, "1 h 0 min"), (3750, "1 h 2 min")],
)
def test_durations_are_for_people(seconds, text):
    assert report.duration(seconds) == text


def test_parts_have_outcomes_of_their_own():
    chapters = [report.waiting(contents.find(name)) for name in ("gptq", "awq", "flash")]
    chapters[0]["verdict"] = "reproduced"
    parts = report.by_part(chapters)
    assert [(part["title"], part["headline"], part["ran"]) for part in parts] == [
        ("Quantization", "1 of 2 claims reproduced, 1 not run", True),
        ("Attention", "0 of 1 claim reproduced, 1 not run", False),
    ]


def test_a_book_without_a_leaderboard_has_no_chart_of_it(book, lab, tmp_path):
    tour.tour(contents.CONTENTS, lab, tmp_path, Console(file=io.StringIO()))
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    Page(html)
    assert "bytes-read" not in html and "leaderboard" not in html


def test_the_chart_of_bytes_has_its_formula_beside_it(lab):
    points = (Point("quantization.gptq", "--bits 3", 3.0, 25.0), Point("distillation.soft_targets", "", 8.0, 70.0, 1))
    shown = leaderboard.reads_section(Board(20.0, points, "2026-01-01", {}), lab.config)
    # 2 blocks of 4·16·16 + 3·16·24 weights; head 270·16, a row of 16, norms 5·16; keys and values of 48 tokens
    assert shown["sizes"] == {"weights": "4,352", "rest": f"{2 * (270 * 16 + 16 + 80):,}", "cache": "6,144"}
    assert "MB read per decoded token, 48 tokens in context" in shown["image"]["alt"]
    student, gptq = shown["rows"]
    assert (gptq["weights"], gptq["rest"], gptq["cache"], gptq["total"]) == ("2", "9", "6", "17")
    assert (student["weights"], student["cache"]) == ("4", "3")  # half of the plain cache
