"""`python -m kernels check` compiles every kernel without a GPU; `python -m kernels bench` times them on one."""

from __future__ import annotations

import argparse
import importlib
import sys

from kernels.hardware import ARCHITECTURES


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compile every case for three GPUs, without one")
    bench = commands.add_parser("bench", help="time every case on the GPU at hand")
    for command in (check, bench):
        command.add_argument("names", nargs="*", metavar="NAME", help='such as "attention.flash"; all without')
    check.add_argument("--arch", nargs="+", type=int, choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    check.add_argument("--json", action="store_true", help="print the rows as JSON")
    check.add_argument("--write", action="store_true", help="write results/static.md, for all kernels")
    check.add_argument("--compare", action="store_true", help="fail if results/static.md says something else")
    bench.add_argument("--seconds", type=float, default=420.0, help="begin no case later than that (default 420)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit status: 0, 1 if a kernel fails, 2 if it cannot be done, with one line that says why."""
    chosen = parser().parse_args(arguments)
    try:
        return importlib.import_module(f"kernels.{chosen.command}").main(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was written before stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
