"""The leaderboard: what is measured, kept, merged and drawn."""

import json
from types import SimpleNamespace

import pytest

from chapters import contents, leaderboard, token_bytes
from chapters.lab import Lab
from chapters.leaderboard import Board, Point


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "KEPT", tmp_path / "leaderboard.json")
    return tmp_path / "leaderboard.json"


def board(*points: Point, base: float = 20.0) -> Board:
    return Board(base, points, "2026-01-01", {"python": "3", "torch": "2"})


GPTQ = Point("quantization.gptq", "--bits 3", 3.1, 25.0)
N_M = Point("sparsity.n_m", "--n 2 --m 4", 9.0, 500.0)


def test_what_is_written_is_read_again(kept):
    assert leaderboard.read() is None and leaderboard.section() is None
    leaderboard.write(board(GPTQ, N_M))
    assert leaderboard.read() == board(GPTQ, N_M)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": [{"bits": 3}]}', '{"points": 3}'])
def test_a_damaged_file_is_named(kept, text):
    kept.write_text(text)
    with pytest.raises(ValueError, match=r"leaderboard\.json is damaged"):
        leaderboard.read()


def test_new_points_replace_those_of_their_technique():
    better = Point(GPTQ.technique, "--bits 4", 4.1, 21.0)
    found = leaderboard.merged(board(N_M, GPTQ), 20.0, [better])
    assert found.points == (better, N_M) and found.base == 20.0


def test_points_of_another_model_and_of_chapters_that_are_gone_are_left_out(kept):
    assert leaderboard.merged(board(N_M), 19.0, [GPTQ]).points == (GPTQ,)
    gone = Point("quantization.gone", "", 3, 3)
    leaderboard.write(board(gone, GPTQ))
    assert leaderboard.read().points == (GPTQ,)
    leaderboard.write(board(gone))
    assert leaderboard.read() is None


def test_the_picture_shows_every_technique_and_names_what_is_above_it():
    drawn = leaderboard.picture(board(GPTQ, N_M)).axes[0]
    assert drawn.get_legend_handles_labels()[1] == ["GPTQ", "N:M sparsity", "plain model"]
    assert [text.get_text() for text in drawn.texts] == ["500"]
    assert max(max(line.get_ydata()) for line in drawn.lines) == leaderboard.CEILING * 20


def test_marks_at_the_upper_edge_that_are_close_share_a_text():
    far = [Point(N_M.technique, "", bits, perplexity) for bits, perplexity in ((9.5, 300.0), (12.0, 200.0))]
    drawn = leaderboard.picture(board(N_M, *far)).axes[0]
    assert [text.get_text() for text in drawn.texts] == ["300 to 500", "200"]


def test_the_chart_of_bytes_places_points_by_what_a_token_reads(lab):
    student = Point("distillation.soft_targets", "--layers 1", 8.0, 30.0, layers=1)
    axes = leaderboard.picture_of_reads(board(student, GPTQ), lab.config).axes[0]
    across = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    expected = token_bytes.reads(lab.config, 3.1, lab.config.context).total / 1e6
    assert across["GPTQ"] == pytest.approx(expected)
    rest, cache = 2 * (2048 + 1 + 3) * 128, 2 * 2 * 4 * 32 * 512  # of one layer instead of four
    assert across["Soft targets"] == pytest.approx((851_968 + rest + cache) / 1e6)
    plain = [across[f"plain weights, {bits} bits"] for bits in (16, 32)]
    assert across["no bits for the weights"] < across["GPTQ"] < plain[0] < plain[1]
    assert axes.get_xlim()[0] < across["no bits for the weights"] and plain[1] < axes.get_xlim()[1]
    assert axes.get_xlabel() == "MB read per decoded token, 512 tokens in context (counted)"


def test_a_student_is_kept_with_its_layers(lab):
    entry = contents.find("soft_targets")
    assert leaderboard.measure(entry, "--layers 1 --steps 1 --sequences 4", lab).layers == 1
    kept = leaderboard.read()
    assert kept and all(point.layers for point in kept.points if point.technique.startswith("distillation."))


def test_no_two_techniques_look_alike():
    points = [Point(entry.dotted, "", 3, 25) for entry in contents.CONTENTS]
    lines = leaderboard.picture(board(*points)).axes[0].lines
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == len(points) + 1


def test_the_table_begins_with_few_bits():
    assert [row["bits"] for row in leaderboard.rows(board(N_M, GPTQ))] == ["3.1", "9"]


@pytest.mark.parametrize("entry", leaderboard.chosen([]), ids=lambda entry: entry.name)
def test_every_setting_of_the_contents_is_one_that_run_takes(entry):
    for setting in entry.settings:
        leaderboard.runner.chapter_parser(leaderboard.argparse.ArgumentParser, entry).parse_args(setting.split())


def test_what_has_no_settings_has_no_place():
    with pytest.raises(ValueError, match=r"flash has no settings in contents\.toml"):
        leaderboard.chosen(["flash"])
    assert all(entry.settings for entry in leaderboard.chosen([]))


def test_a_point_is_what_run_would_print(lab):
    point = leaderboard.measure(contents.find("weight_only"), "--group-size 32", lab)
    assert point.technique == "quantization.weight_only" and point.bits == pytest.approx(4.75)
    assert lab.base_perplexity < point.perplexity < 2 * lab.base_perplexity


def test_the_command_keeps_and_prints_its_points(kept, lab, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard.runner, "make_lab", lambda args: lab)
    assert leaderboard.run(SimpleNamespace(names=["weight_only"])) == 0
    assert len(json.loads(kept.read_text())["points"]) == len(contents.find("weight_only").settings)
    assert "plain model: perplexity" in capsys.readouterr().out
    assert leaderboard.section()["rows"][0]["title"] == "Weight-only product"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()
