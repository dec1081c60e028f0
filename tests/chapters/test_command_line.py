"""`python -m chapters`: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from chapters import claims
from chapters.__main__ import main
from chapters.report import shown
from chapters.shared import student_lab
from chapters.workbook import ROOT
from minitfm import checkpoint, evaluate, surgery
from minitfm.model import causal_attention


@pytest.fixture
def options(tiny, text) -> list[str]:
    return ["--model", str(tiny), "--text", str(text)]


def halve(model, tokens, args):
    assert tokens.shape == (args.sequences, 48)
    for layer in surgery.linears(model).values():
        layer.weight.data *= args.factor
    return {"bits per weight": 8, "largest": "1.5"}


def add_factor(parser):
    parser.add_argument("--factor", type=float, default=0.5)


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr with which a command ends in exit code 2."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def test_list_names_every_chapter(book, capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in book)


def test_list_prints_the_readmes_table(book, capsys):
    assert main(["list", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| technique | paper |")


def test_a_tour_from_the_command_line(book, options, tmp_path, capsys):
    assert main(["tour", "--only", "holds", "--out", str(tmp_path / "out"), *options]) == 0
    assert "1 of 1 claim reproduced" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_claim_of_another_model_is_measured_but_not_recorded(book, options, capsys):
    assert main(["claim", "holds", "--full", *options]) == 0
    assert "It helps" in capsys.readouterr().out and not claims.RESULTS.exists()


def test_a_full_claim_of_the_base_model_is_recorded(book, tiny, text, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "base", lambda: checkpoint.load(tiny))
    monkeypatch.setattr("chapters.lab.library_streams", lambda tokenizer: (torch.arange(200), torch.arange(200)))
    assert main(["claim", "shows_not", "--full"]) == 0
    assert json.loads((claims.RESULTS / "shows_not.json").read_text())["holds"] is False
    assert "recorded in" in capsys.readouterr().out


def test_claims_end_badly_when_one_fails_but_not_when_one_does_not_hold(book, options, capsys):
    assert main(["claim", "holds", "shows_not", *options]) == 0
    assert main(["claim", "raises", "holds", *options]) == 1
    out, err = capsys.readouterr()
    assert "the weights" in err and "Traceback" in err and "reproduced" in out


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a printed table: label -> what stands in the other columns."""
    rows = [re.split(r" {2,}", line.strip()) for line in table.splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows}


def test_an_interrupted_claim_ends_as_a_shell_expects(book, options, capsys):
    def interrupt(lab):
        raise KeyboardInterrupt

    book["holds"].claim = interrupt
    assert main(["claim", "holds", *options]) == 130
    assert capsys.readouterr().err == "python -m chapters claim: interrupted\n"


def test_apply_prints_what_it_saves_and_costs(book, options, capsys, lab):
    book["holds"].apply, book["holds"].options = halve, add_factor
    assert main(["run", "holds", "--sequences", "3", *options]) == 0
    rows = cells(capsys.readouterr().out)
    assert rows["bits per weight"] == ["32", "8"] and rows["largest"] == ["1.5"]
    blocks = sum(layer.weight.numel() for layer in surgery.linears(lab.model()).values())
    before, after = (float(size) for size in rows["size, MB"])
    assert before == pytest.approx(4 * lab.parameters / 1e6, rel=1e-3)
    assert before - after == pytest.approx(3 * blocks / 1e6, rel=2e-3)
    changed = lab.model()
    halve(changed, lab.calibration(count=3), Namespace(sequences=3, factor=0.5))
    assert rows["perplexity"] == [shown(lab.base_perplexity), shown(lab.perplexity(changed))]


def test_a_saved_model_is_the_changed_one(book, options, tmp_path, capsys, lab):
    book["holds"].apply, book["holds"].options = halve, add_factor
    assert main(["run", "holds", "--save", str(tmp_path / "new"), *options]) == 0
    assert "python -m minitfm generate --model" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "new")
    expected = lab.model()
    halve(expected, lab.calibration(), Namespace(sequences=128, factor=0.5))
    assert evaluate.perplexity(saved.model, lab.validation) == lab.perplexity(expected) != lab.base_perplexity
    assert saved.info["technique"] == "sparsity.holds" and saved.info["bits per weight"] == 8


def test_a_model_with_fewer_layers_is_saved_with_its_own_config(book, options, tmp_path, capsys, lab):
    def shorten(model, tokens, args):
        student_lab.keep_layers(model, 1)
        return {"bits per weight": 16}

    book["holds"].apply = shorten
    assert main(["run", "holds", "--save", str(tmp_path / "new"), *options]) == 0
    saved = checkpoint.load(tmp_path / "new").model
    assert saved.config.layers == 1 and saved.num_parameters() < lab.parameters
    assert f"{saved.num_parameters():,} of {lab.parameters:,} parameters" in capsys.readouterr().out


def test_a_model_that_is_no_longer_plain_is_not_saved(book, options, tmp_path, capsys):
    def widen(model, tokens, args):
        model.extra = torch.nn.Linear(2, 2)
        return {"bits per weight": 32}

    book["holds"].apply = widen
    assert main(["run", "holds", "--save", str(tmp_path / "new"), *options]) == 2
    assert "cannot be saved" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_seams_are_compared_with_the_plain_model(book, options, capsys):
    book["holds"].seams = lambda args: {"attend": lambda q, k, v: causal_attention(q, k, v) * (1 + args.error)}
    book["holds"].options = lambda parser: parser.add_argument("--error", type=float, default=0.0)
    assert main(["run", "holds", *options]) == 0
    exact = cells(capsys.readouterr().out)
    assert main(["run", "holds", "--error", "0.5", *options]) == 0
    wrong = cells(capsys.readouterr().out)
    label = "largest difference of a logit"
    assert float(exact[label][0]) == 0 < float(wrong[label][0])
    assert exact["perplexity"][0] == exact["perplexity"][1] == wrong["perplexity"][0] != wrong["perplexity"][1]


def test_a_demonstration_prints_its_figures(book, options, capsys):
    book["holds"].demonstrate = lambda lab, args: {"pages": 12, "layout": "ring"}
    assert main(["run", "holds", *options]) == 0
    out = capsys.readouterr().out
    assert "12" in out and "ring" in out


def test_each_chapter_documents_its_own_options(book, capsys):
    book["holds"].apply, book["holds"].options = halve, add_factor
    with pytest.raises(SystemExit, match="0"):
        main(["run", "holds", "--help"])
    out = capsys.readouterr().out
    assert "--factor" in out and "--save" in out


def test_mistakes_of_the_reader_are_one_line(book, tiny, tmp_path, capsys):
    book["holds"].apply = halve
    (tmp_path / "file").write_text("kept")
    below = str(tmp_path / "file" / "below")
    assert "did you mean 'holds'" in refused(capsys, "run", "hold")
    assert "did you mean 'holds'" in refused(capsys, "claim", "hodls")
    assert "did you mean 'sparsity'" in refused(capsys, "tour", "--part", "sparseness")
    assert "nothing to run" in refused(capsys, "run", "shows_not")
    assert "invalid choice" in refused(capsys, "trip")
    assert "--bits" in refused(capsys, "run", "holds", "--bits", "3")
    assert "nothing" in refused(capsys, "tour", "--model", str(tmp_path / "nothing"))
    assert "cannot write" in refused(capsys, "tour", "--model", str(tiny), "--out", below)
    assert "cannot write" in refused(capsys, "run", "holds", "--model", str(tiny), "--save", below)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_weights_of_an_exact_technique_cannot_be_saved(book, options, tmp_path, capsys):
    book["holds"].seams = lambda args: {"attend": causal_attention}
    assert "nothing to save" in refused(capsys, "run", "holds", "--save", str(tmp_path / "new"), *options)


WITHOUT_PYTEST = """
import sys
sys.modules |= dict.fromkeys(["pytest", "_pytest", "hypothesis"])  # an import of None is an ImportError
from chapters.__main__ import main
lab = sys.argv[1:]
codes = [main(["list"]), main(["run", "n_m", *lab]), main(["claim", "n_m", *lab])]
codes += [main(["tour", "--only", "n_m", "--out", "out", *lab]), main(["exercise", "n_m", "--to", "my"])]
print(codes, main(["grade", "my"]), main(["mistakes", "n_m"]))
"""


def test_only_judging_needs_pytest(options, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WITHOUT_PYTEST}", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("[0, 0, 0, 0, 0] 2 2\n"), done.stdout + done.stderr
    judged = "answers are judged by pytest, which is not installed: python -m pip install -e .[dev]"
    assert done.stderr == f"python -m chapters grade: {judged}\npython -m chapters mistakes: {judged}\n"


def test_one_thread_is_for_the_book_s_small_model_only(book, options, tiny, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main(["claim", "shows_not", *options]) == 0 and threads == []
    monkeypatch.setattr(checkpoint, "base", lambda: checkpoint.load(tiny))
    assert main(["claim", "shows_not", *options[2:]]) == 0 and threads == [1]
