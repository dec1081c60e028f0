"""Tables in both forms, and files that are replaced whole."""

from __future__ import annotations

import sys

import pytest

from kernels.tables import Table, markdown, replace_file, show

TABLE = Table("one case", ("name", "µs"), [["fast", "1.0"], ["slow", "9.0"]], failed={1})


def test_markdown():
    text = "### one case\n\n| name | µs |\n|---|---|\n| fast | 1.0 |\n| slow | 9.0 |\n"
    assert markdown([TABLE]) == text
    assert markdown([TABLE, TABLE]) == text + "\n" + text


def test_pipes_get_markdown_and_terminals_get_drawn_tables(capsys, monkeypatch):
    show([TABLE])
    assert capsys.readouterr().out == markdown([TABLE]) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show([TABLE])
    drawn = capsys.readouterr().out
    assert "|---" not in drawn and all(word in drawn for word in ("one case", "fast", "slow", "9.0"))


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_file(path, b"first")
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"

    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"third")
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]
