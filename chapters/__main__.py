"""The book's command line: `python -m chapters list | tour | claim | run | leaderboard | …`.

What a chapter offers to `python -m chapters run NAME` is one of three functions, all optional:

    apply(model, tokens, args) -> dict[str, float | str]
        Compress `model` in place, with calibration tokens [N, T]. Weights stay plain `nn.Linear` weights that hold
        the compressed values (rounded, zeroed), so the result can be saved and loaded like any model. The dict has
        "bits per weight": what a packed weight of the block linears costs, scales and indices included; more entries
        are printed below it. `run` adds size and perplexity before and after.
    seams(args) -> dict[str, Callable]
        For techniques that compute the same model in another way: keywords for `Transformer`, {"attend": attend} or
        {"feed_forward": make}. `run` compares logits, perplexity and time with the plain model's.
    demonstrate(lab, args) -> dict[str, float | str]
        For what neither compresses nor enters the model: figures to print.

and `options(parser) -> None` adds the chapter's own argparse options, which arrive in `args`. Errors are ValueError,
TypeError or OSError; they become one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from chapters import (
    assignments,
    claims,
    contents,
    hints,
    leaderboard,
    long_context,
    mutants,
    readme,
    runner,
    tour,
    workbook,
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parser() -> Parser:
    """Every command and its options; a command's function is its default for `run`."""
    root = Parser(prog="python -m chapters", description="The book's chapters: claims, compression, exercises.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add_list(commands)
    add_tour(commands)
    add_claim(commands)
    runner.add_command(commands)
    add_leaderboard(commands)
    add_long_context(commands)
    workbook.add_command(commands)
    hints.add_command(commands)
    assignments.add_command(commands)
    add_mistakes(commands)
    add_mutants(commands)
    add_grade(commands)
    return root


def add_list(commands) -> None:
    """`list`: the table of contents."""
    command = commands.add_parser("list", help="the table of contents")
    command.add_argument("--markdown", action="store_true", help="as the README's markdown table")
    command.add_argument("--into", type=Path, metavar="FILE", help="put that table between FILE's contents markers")
    command.set_defaults(run=list_chapters)


def add_tour(commands) -> None:
    """`tour`: all claims and the report."""
    command = commands.add_parser("tour", help="run the chapters' claims and write an illustrated report")
    command.add_argument("--part", help="only the chapters of one part")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these chapters")
    command.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="default: report")
    runner.add_lab_options(command)
    command.set_defaults(run=run_tour)


def add_claim(commands) -> None:
    """`claim`: one chapter's finding."""
    command = commands.add_parser("claim", help="measure what chapters claim; with --full, keep the record")
    command.add_argument("names", nargs="+", metavar="NAME")
    runner.add_lab_options(command)
    command.set_defaults(run=run_claims)


def add_leaderboard(commands) -> None:
    """`leaderboard`: every compression on one scale."""
    command = commands.add_parser("leaderboard", help="measure bits and perplexity of every compression's settings")
    command.add_argument("names", nargs="*", metavar="NAME", help="chapters, such as gptq; all if none is given")
    command.set_defaults(run=leaderboard.run, model=None, text=None, full=True)


def add_long_context(commands) -> None:
    """`long-context`: a decode step of every attention chapter."""
    command = commands.add_parser("long-context", help="measure a decode step with each attention, up to 4,096 tokens")
    command.set_defaults(run=long_context.run, model=None, text=None, full=False)


def add_mistakes(commands) -> None:
    """`mistakes`: are the tests of the exercises good enough?"""
    command = commands.add_parser("mistakes", help="prove that the tests find every planted mistake")
    command.add_argument("names", nargs="*", metavar="NAME", help="chapters, such as gptq; all if none is given")
    command.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for each variant; default: 60")
    command.set_defaults(run=run_mistakes)


def add_mutants(commands) -> None:
    """`mutants`: the same question, asked by small changes of the solutions."""
    command = commands.add_parser("mutants", help="mutation testing of the exercises' reference functions")
    command.add_argument("names", nargs="*", metavar="NAME", help="chapters, such as routing; all if none is given")
    command.add_argument("--sample", type=int, metavar="N", help="at most N mutants of each function")
    command.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for each mutant; default: 60")
    command.set_defaults(run=run_mutants)


def add_grade(commands) -> None:
    """`grade`: points for submissions."""
    command = commands.add_parser("grade", help="grade a folder that holds one folder per submission")
    command.add_argument("submissions", type=Path, metavar="SUBMISSIONS")
    command.add_argument("--out", type=Path, default=Path("grades.csv"), metavar="FILE", help="default: grades.csv")
    command.add_argument("--assignment", type=int, metavar="N", help="only what the course's assignment N asks")
    command.add_argument("--feedback", type=Path, metavar="FOLDER", help="write NAME.md and NAME.xml (JUnit) there")
    command.add_argument("--tests", type=Path, metavar="DIR", help="your own tests instead of the book's")
    command.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for each exercise; default: 120")
    command.set_defaults(run=run_grade)


def list_chapters(args: argparse.Namespace) -> int:
    """Print the contents, or write them into a file such as the README."""
    if args.into:
        readme.insert_table(args.into)
    elif args.markdown:
        print(readme.table())
    else:
        Console().print(contents_table())
    return 0


def contents_table() -> Table:
    """The contents for a terminal."""
    drawn = Table("part", box=SIMPLE)
    drawn.add_column("name", no_wrap=True)
    drawn.add_column("technique")
    drawn.add_column("idea", ratio=1)
    drawn.add_column("claim")
    for entry in contents.CONTENTS:
        record = claims.recorded(entry.name)
        outcome = "not recorded" if record is None else ("reproduced" if record["holds"] else "not reproduced")
        drawn.add_row(contents.PARTS[entry.part], entry.name, entry.title, entry.line, outcome)
    return drawn


def run_tour(args: argparse.Namespace) -> int:
    """The tour; see chapters/tour.py."""
    entries = tour.choose(args.part, args.only)
    return tour.tour(entries, runner.make_lab(args), args.out, Console())


def run_claims(args: argparse.Namespace) -> int:
    """Measure claims, print them, and record full-budget runs of the base model."""
    entries = [contents.find(name) for name in args.names]
    lab = runner.make_lab(args)
    keep = lab.full and lab.path is None and lab.text is None
    if keep:
        claims.require_writable(claims.RESULTS)
    worst = 0
    for entry in entries:
        result = claims.run_claim(entry, lab)
        Console().print(tour.table([result], lab))
        print(result.traceback, end="", file=sys.stderr)
        if result.claim and keep:
            print(f"recorded in {claims.record(result, lab)}")
        worst |= int(result.claim is None)
    return worst


def run_mistakes(args: argparse.Namespace) -> int:
    """See chapters/mistakes.py, which like grading needs pytest: it is imported only here."""
    require_pytest()
    from chapters import mistakes

    return mistakes.run(args)


def run_mutants(args: argparse.Namespace) -> int:
    """See chapters/mutants.py."""
    require_pytest()
    return mutants.run(args)


def run_grade(args: argparse.Namespace) -> int:
    """See chapters/grading.py."""
    require_pytest()
    from chapters import grading

    return grading.run(args)


def require_pytest() -> None:
    """Raise ValueError without pytest, which comes with the extra `dev`: a reader of chapters may not have it."""
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("answers are judged by pytest, which is not installed: python -m pip install -e .[dev]")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"python -m chapters {args.command}: interrupted", file=sys.stderr)
        return tour.INTERRUPTED
    except (ValueError, TypeError, OSError) as error:
        print(f"python -m chapters {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # numbers below 1e-38 make a CPU ten times as slow, and mean nothing here
    sys.exit(main())
