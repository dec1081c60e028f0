"""`python -m chapters run NAME`: a technique on the base model or the reader's own; `__main__` states the protocol."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from chapters import contents
from chapters.claims import require_writable
from chapters.lab import Lab
from chapters.report import shown
from minitfm import checkpoint, surgery
from minitfm.model import Transformer

MEGABYTE = 1e6


def add_command(commands) -> None:
    """`run`; the options after NAME are read by `run_chapter`, because each chapter has its own."""
    command = commands.add_parser("run", help="apply a technique to the base model or to yours", add_help=False)
    command.add_argument("name", metavar="NAME", help="options follow it: run NAME --help")
    command.add_argument("options", nargs=argparse.REMAINDER)
    command.set_defaults(run=run_chapter, parser_class=type(command))


def add_lab_options(parser: argparse.ArgumentParser) -> None:
    """Model, text and budget: the same options wherever there is a lab."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--quick", action="store_true", help="one seed, seconds per chapter (the default)")
    budget.add_argument("--full", action="store_true", help="three seeds and more text, minutes per chapter")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint instead of the book's base model")
    parser.add_argument("--text", type=Path, metavar="PATH", help="text to calibrate and measure on: file or folder")


def make_lab(args: argparse.Namespace) -> Lab:
    """The lab that those options ask for."""
    if args.model is None:
        torch.set_num_threads(1)  # a second thread costs the book's small model more than it brings
    return Lab(args.full, args.model, args.text)


def run_chapter(args: argparse.Namespace) -> int:
    """Read the chapter's options and run what it offers. Raises ValueError if it offers nothing."""
    entry = contents.find(args.name)
    chapter = entry.module()
    offered = next((how for name, how in OFFERS.items() if hasattr(chapter, name)), None)
    if offered is None:
        raise ValueError(f"{entry.title} has nothing to run; its finding is: python -m chapters claim {entry.name}")
    options = chapter_parser(args.parser_class, entry).parse_args(args.options)
    if options.save and not hasattr(chapter, "apply"):
        raise ValueError(f"--save: {entry.title} leaves the weights as they are, there is nothing to save")
    offered(entry, chapter, make_lab(options), options)
    return 0


def chapter_parser(kind: type[argparse.ArgumentParser], entry: contents.Entry) -> argparse.ArgumentParser:
    """Options of `run NAME`, in a parser of that kind: the lab's, calibration, --save, and the chapter's own."""
    chapter = entry.module()
    parser = kind(prog=f"python -m chapters run {entry.name}", description=f"{entry.title}: {entry.line}")
    add_lab_options(parser)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the changed model as a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration text (default 0)")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences (default 128)")
    if hasattr(chapter, "options"):
        chapter.options(parser.add_argument_group(entry.title))
    return parser


def run_apply(entry: contents.Entry, chapter: ModuleType, lab: Lab, args: argparse.Namespace) -> None:
    """Compress, print what it saves and costs, and save if asked."""
    model = lab.model()
    block_weights = sum(layer.weight.numel() for layer in surgery.linears(model).values())
    if args.save:
        require_writable(args.save)
    report = compress(chapter, model, lab, args)
    bits = float(report.pop("bits per weight"))
    rest = 32 * (lab.parameters - block_weights)
    rows = {
        "bits per weight": (32, bits),
        "size, MB": ((rest + 32 * block_weights) / 8 / MEGABYTE, (rest + bits * block_weights) / 8 / MEGABYTE),
        "perplexity": (lab.base_perplexity, lab.perplexity(model)),
        **{name: (None, value) for name, value in report.items()},
    }
    print_comparison(entry.title, rows)
    if args.save:
        save(args.save, model, lab, {"technique": entry.dotted, "bits per weight": bits, **report})


def compress(chapter: ModuleType, model: Transformer, lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Let `chapter` compress `model` in place, its random draws seeded by `args.seed`; what it reports."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        measured = chapter.apply(model, lab.calibration(args.seed, args.sequences), args)
    return {name: value if isinstance(value, str) else float(value) for name, value in measured.items()}


def save(folder: Path, model: Transformer, lab: Lab, extra: dict) -> None:
    """Write the changed model. Raises ValueError if its parameters are no longer those of a plain one of its config."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    if set(model.state_dict()) != set(plain.state_dict()):
        raise ValueError("--save: the changed model has other parameters than the plain one, it cannot be saved")
    checkpoint.save(folder, model, lab.tokenizer, lab.info | extra)
    if model.num_parameters() < lab.parameters:
        print(f"saved to {folder}: {model.num_parameters():,} of {lab.parameters:,} parameters, in float32.")
    else:
        print(f"saved to {folder}: the compressed values as plain float32 numbers, so the file itself is not smaller.")
    print(f"Try it: python -m minitfm generate --model {folder}")


def run_seams(entry: contents.Entry, chapter: ModuleType, lab: Lab, args: argparse.Namespace) -> None:
    """The same weights computed in another way, beside the plain model."""
    plain, other = lab.model(), lab.model(**chapter.seams(args))
    tokens = lab.validation[:8]
    (expected, before), (logits, after) = timed(plain, tokens), timed(other, tokens)
    rows = {
        "perplexity": (lab.base_perplexity, lab.perplexity(other)),
        f"seconds, {tokens.shape[0]} × {tokens.shape[1]} tokens": (before, after),
        "largest difference of a logit": (None, (logits - expected).abs().max().item()),
    }
    print_comparison(entry.title, rows)


@torch.no_grad()
def timed(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits and the seconds they took, after one pass to warm up."""
    model(tokens)
    start = time.perf_counter()
    return model(tokens), time.perf_counter() - start


def run_demonstration(entry: contents.Entry, chapter: ModuleType, lab: Lab, args: argparse.Namespace) -> None:
    """Figures of a technique that neither compresses nor enters the model."""
    print_comparison(entry.title, {name: (None, value) for name, value in chapter.demonstrate(lab, args).items()})


OFFERS: dict[str, Callable] = {"apply": run_apply, "seams": run_seams, "demonstrate": run_demonstration}


def print_comparison(title: str, rows: dict[str, tuple]) -> None:
    """A table of (before, after) values; None leaves a cell empty."""
    drawn = Table("", "plain", title, box=SIMPLE)
    for name, values in rows.items():
        drawn.add_row(name, *(shown(v) if isinstance(v, int | float) else (v or "") for v in values))
    Console().print(drawn)
