"""The command line: what it prints, what it leaves on the disk, and one line on stderr for every mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitfm import __main__ as cli
from minitfm import checkpoint, train
from minitfm.generate import generate
from tests.minitfm.models import TEXT, tiny_model, tiny_tokenizer

SMALL = ["--vocabulary", "270", "--dim", "16", "--hidden-dim", "24", "--layers", "2", "--context", "32"]
SHORT = ["--steps", "9", "--batch", "2", "--length", "16", "--validate-every", "4", "--save-every", "3"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"Document {i}. " + TEXT.replace("dog", f"dog number {i}"))
    return folder


@pytest.fixture
def model(tmp_path):
    tokenizer = tiny_tokenizer()
    checkpoint.save(tmp_path / "model", tiny_model(seed=1, vocab_size=tokenizer.vocab_size), tokenizer)
    return tmp_path / "model"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def train_command(corpus, out, *more):
    return ["train", "--text", str(corpus), "--out", str(out), *SMALL, *SHORT, *more]


def test_train_writes_a_checkpoint_with_its_history(tmp_path, corpus, capsys, monkeypatch):
    arguments = train_command(corpus, tmp_path / "out", "--activation", "relu", "--kv-heads", "1")
    monkeypatch.setattr(sys, "argv", ["minitfm", *arguments])
    assert cli.main(arguments) == 0
    assert set(content(tmp_path / "out")) == {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    model, tokenizer, info = checkpoint.load(tmp_path / "out")
    assert (model.config.activation, model.config.kv_heads, model.config.dim) == ("relu", 1, 16)
    assert model.config.vocab_size == tokenizer.vocab_size == 270
    assert info["command"].startswith("python -m minitfm train --text") and info["parameters"] == model.num_parameters()
    losses = [loss for _, loss in info["validation"]]
    assert losses[-1] == min(losses) and [step for step, _ in info["validation"]] == [4, 8, 9][: len(losses)]
    shown = capsys.readouterr().out
    assert re.search(r"perplexity +\d+\.\d+ per token", shown) and re.search(r"bits per byte +\d\.\d{4}", shown)


def test_an_interrupted_training_run_resumes_to_the_same_checkpoint(tmp_path, corpus, monkeypatch, capsys):
    assert cli.main(train_command(corpus, tmp_path / "whole")) == 0
    run_step = train.Run.update

    def interrupted(self, step, loss, tokens):
        if step == 7:
            raise KeyboardInterrupt
        return run_step(self, step, loss, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "update", interrupted)
        assert cli.main(train_command(corpus, tmp_path / "cut")) == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert cli.STATE in content(tmp_path / "cut")
    assert cli.main(train_command(corpus, tmp_path / "cut", "--resume")) == 0
    whole, cut = content(tmp_path / "whole"), content(tmp_path / "cut")
    assert set(whole) == set(cut)
    assert all(whole[name] == cut[name] for name in whole if name != "training.json")


def test_the_best_model_is_kept_not_the_last(tmp_path, corpus, monkeypatch):
    losses = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(train.evaluate, "mean_nll", lambda *_: next(losses))
    monkeypatch.setattr(cli, "print_scores", lambda *_: None)
    assert cli.main(train_command(corpus, tmp_path / "out")) == 0
    assert checkpoint.load(tmp_path / "out").info["validation"] == [[4, 3.0], [8, 2.0]]


def test_generate_continues_the_prompt(model, capsys):
    arguments = ["generate", "The quick", "--model", str(model), "--tokens", "12"]
    assert cli.main([*arguments, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("The quick") and greedy.endswith("\n") and len(greedy) > len("The quick\n")
    assert cli.main([*arguments, "--temperature", "0", "--seed", "5"]) == 0
    assert capsys.readouterr().out == greedy
    texts = set()
    for seed in ("1", "2", "1"):
        assert cli.main([*arguments, "--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--seed", seed]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


def test_generate_streams_the_text_that_its_tokens_decode_to(model, capsys):
    loaded = checkpoint.load(model)
    prompt = [loaded.tokenizer.begin, *loaded.tokenizer.encode("Ünï 雪")]
    sampling = {"temperature": 1.3, "top_k": 40, "seed": 3}
    ids = generate(loaded.model, torch.tensor([prompt]), 32 - len(prompt), **sampling)[0].tolist()
    end = ids.index(loaded.tokenizer.end, 1) if loaded.tokenizer.end in ids[1:] else len(ids)
    options = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["generate", "Ünï 雪", "--model", str(model), "--tokens", "500", *options]) == 0
    assert capsys.readouterr().out == loaded.tokenizer.decode(ids[:end]) + "\n"
    assert end > len(prompt) + 5


def test_evaluate_prints_both_measures_and_their_windows(model, corpus, capsys):
    arguments = ["evaluate", "--model", str(model), "--text", str(corpus), "--window", "16"]
    assert cli.main([*arguments, "--all"]) == 0
    everything = capsys.readouterr().out
    assert "fixed windows of 16 tokens" in everything and "sliding by 8" in everything
    size = sum(len(path.read_bytes()) for path in corpus.iterdir())
    shown = int(re.search(r"text +([\d,]+) bytes", everything)[1].replace(",", ""))
    assert 0 < shown <= size
    assert cli.main([*arguments, "--stride", "15"]) == 0
    held_out = capsys.readouterr().out
    assert "sliding by 15" in held_out
    assert int(re.search(r"text +([\d,]+) bytes", held_out)[1].replace(",", "")) < shown


def truncated(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    return model


MISTAKES = {
    "generate, no checkpoint": (
        lambda m, c: ["generate", "--model", str(m / "no")],
        "no such checkpoint: give a folder",
    ),
    "generate, truncated": (lambda m, c: ["generate", "--model", str(truncated(m))], "model.safetensors is truncated"),
    "generate, foreign": (lambda m, c: ["generate", "--model", str(c / "0.txt")], "no such checkpoint: give a folder"),
    "generate, empty folder": (lambda m, c: ["generate", "--model", str(c)], "there is no config.json"),
    "generate, long prompt": (lambda m, c: ["generate", TEXT, "--model", str(m)], "the model's context is 32"),
    "generate, negative": (lambda m, c: ["generate", "--model", str(m), "--tokens", "-3"], "do not fit a context"),
    "generate, cold": (
        lambda m, c: ["generate", "--model", str(m), "--temperature", "-1"],
        "temperature must be positive",
    ),
    "generate, top-p": (
        lambda m, c: ["generate", "--model", str(m), "--top-p", "2"],
        "top_p must be in (0, 1], got 2.0",
    ),
    "evaluate, no text": (lambda m, c: ["evaluate", "--model", str(m), "--text", str(c / "no")], "No such file"),
    "evaluate, window": (
        lambda m, c: ["evaluate", "--model", str(m), "--text", str(c), "--window", "99"],
        "window <= context",
    ),
    "evaluate, bytes": (
        lambda m, c: ["evaluate", "--model", str(m), "--text", str(m / "model.safetensors")],
        "is not UTF-8 text",
    ),
    "train, unwritable": (lambda m, c: train_command(c, c / "0.txt" / "out"), "cannot write a checkpoint to"),
    "train, there already": (lambda m, c: train_command(c, m), "already holds a checkpoint: give another --out"),
    "train, nothing to resume": (lambda m, c: train_command(c, c.parent / "new", "--resume"), "nothing to resume"),
    "train, no text": (lambda m, c: train_command(c / "no", c.parent / "new"), "No such file"),
    "train, one document": (lambda m, c: train_command(c / "0.txt", c.parent / "new"), "one group"),
    "train, long": (lambda m, c: train_command(c, c.parent / "new", "--length", "40"), "length 40 is too long"),
    "train, heads": (
        lambda m, c: train_command(c, c.parent / "new", "--heads", "3"),
        "dim=16 is not divisible by heads=3",
    ),
    "train, optimizer": (
        lambda m, c: train_command(c, c.parent / "new", "--optimizer", "sgd"),
        "optimizer must be one of",
    ),
    "train, vocabulary": (
        lambda m, c: train_command(c, c.parent / "new", "--vocabulary", "9"),
        "vocab_size must be at least 257",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, model, corpus, capsys, name):
    make, words = MISTAKES[name]
    arguments = make(model, corpus)
    before = sorted(tmp_path.rglob("*")), content(model), content(corpus)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("minitfm: ") and error.count("\n") == 1 and words in error
    assert (sorted(tmp_path.rglob("*")), content(model), content(corpus)) == before


@pytest.mark.parametrize("arguments", [[], ["dance"], ["generate", "--tokens", "many"], ["train", "--colour", "3"]])
def test_an_unknown_word_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and "usage: python -m minitfm" in capsys.readouterr().err


def test_the_module_is_a_program(tmp_path):
    command = [sys.executable, "-m", "minitfm", "generate", "--model", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("minitfm: ") and done.stderr.count("\n") == 1
