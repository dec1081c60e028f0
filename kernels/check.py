"""Compile every case of every kernel for three GPUs without having one, and refuse what would run badly.

Gates, each on the machine code that a launch would run:

- no register is spilled: one spilled loop costs more than any tuning wins back;
- shared memory fits: a kernel over the limit compiles and then fails to launch;
- at most 235 registers, so that an assembler that needs a few more, in an older Triton, does not spill (with the oldest
  Triton that the book supports there is none to leave room for, see `make check-old`);
- "matrix" cases: each of the case's kernels that says `tl.dot` has tensor-core instructions, and at least one says it;
- "matrix" cases on sm_90: a kernel with a product of 64 rows and more of 16 or 8 bits has wgmma instructions, which
  below 64 rows do not exist; mma.sync reaches about two thirds of their rate;
- "matrix" cases: no wgmma waits for the one before it, of which the assembler warns (C75xx) and Triton says nothing;
- "stream" cases: each kernel that carries weight loads 128 bits at a time. A kernel carries weight if its tensor
  arguments hold at least a tenth of the bytes of the case's largest launch: the reduction after a split may be small;
- "stream" cases: each kernel whose outputs hold more than that tenth stores 128 bits at a time, unless the case says
  why not. An output is a tensor that the wrapper made and no earlier launch took.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels import records
from kernels.cases import Case, find, techniques, unavailable
from kernels.hardware import ARCHITECTURES, GPUS, floor_seconds, occupancy
from kernels.tables import Table, markdown, replace_file, show

MAX_REGISTERS = 235
OLDEST_TRITON = "3.6"
RESULTS = Path(__file__).parent / "results"
LEGEND = "Load, store: bits of the widest global one; in brackets the share of load bytes that goes by 128 bits."


@dataclass
class Row:
    """One compiled kernel of one case on one architecture. Failures are sentences; none means that it passed."""

    technique: str
    case: str
    arch: int
    kind: str = ""
    kernel: str = ""
    compiler: str = ""
    grid: tuple[int, ...] = ()
    launches: int = 0
    warps: int = 0
    argument_bytes: int = 0
    made_bytes: int = 0
    narrow_stores: str = ""
    uses_dot: bool = False
    dot_rows: int = 0
    registers: int = 0
    stack: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    load_bits: int = 0
    store_bits: int = 0
    wide_load_share: float = 0.0
    async_copies: int = 0
    bulk_copies: int = 0
    tensor_instructions: dict[str, int] = field(default_factory=dict)
    serialized: tuple[str, ...] = ()
    occupancy: float = 0.0
    floor_seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def check_case(technique: str, case: Case, arch: int) -> list[Row]:
    """Compile every kernel that the case launches; one row each. A case that does not compile is one failed row."""
    import torch

    from kernels.compiled import recorded_launches

    row = Row(technique, case.name, arch, case.kind, floor_seconds={g: floor_seconds(case, c) for g, c in GPUS.items()})
    row.narrow_stores = case.narrow_stores
    try:
        inputs = case.inputs(torch.device("cpu"))
        with recorded_launches(arch, inputs) as launches, contextlib.redirect_stdout(io.StringIO()):
            case.run(*inputs)
        rows = [_compiled_row(row, launch) for launch in launches]
    except Exception as error:
        row.failures.append(_explain(error))
        return [row]
    if not rows:
        row.failures.append("the case launches no kernel")
        return [row]
    judge(rows)
    return rows


def _compiled_row(row: Row, launch: Any) -> Row:
    """The row of one launch: what `row` says of the case, and what its machine code says."""
    from kernels.compiled import compiler_version, dot_rows, machine_code, serialized

    metadata, code = launch.kernel.metadata, machine_code(launch.kernel.asm["cubin"])
    columns = getattr(metadata, "tmem_size", 0) or 0
    return replace(
        row,
        **code,
        failures=[],
        kernel=metadata.name,
        compiler=compiler_version(row.arch),
        grid=launch.grid,
        launches=launch.count,
        warps=metadata.num_warps,
        argument_bytes=launch.argument_bytes,
        made_bytes=launch.made_bytes,
        uses_dot="tt.dot" in launch.kernel.asm["ttir"],
        dot_rows=dot_rows(launch.kernel.asm["ttir"]),
        shared_bytes=metadata.shared,
        tensor_memory=columns,
        serialized=serialized(launch.kernel.asm["ptx"], row.arch),
        occupancy=occupancy(row.arch, code["registers"], metadata.num_warps, metadata.shared, columns),
    )


def _explain(error: BaseException) -> str:
    """The error and, since Triton often hides the reason there, its cause."""
    lines = [f"{type(error).__name__}: {error}".strip()]
    if error.__cause__ is not None:
        lines.append(f"because of {type(error.__cause__).__name__}: {error.__cause__}".strip())
    return "\n".join(lines)[:4000]


def judge(rows: list[Row]) -> None:
    """Apply the gates to the kernels of one case on one architecture; failures are added to their rows."""
    for row in rows:
        row.failures += _resource_failures(row)
    kind = rows[0].kind
    if kind == "matrix":
        for row in [row for row in rows if row.uses_dot] or rows:
            if not row.tensor_instructions:
                row.failures.append("a matrix kernel without tensor-core instructions")
            elif row.arch == 90 and row.dot_rows >= 64 and not any("GMMA" in kind for kind in row.tensor_instructions):
                row.failures.append(f"a product of {row.dot_rows} rows by mma.sync: from 64 on it should be wgmma")
        for row in rows:
            if row.serialized:
                row.failures.append(f"each wgmma waits for the one before (ptxas: {', '.join(row.serialized)})")
    if kind == "stream":
        heaviest = max(row.argument_bytes for row in rows)
        for row in rows:
            if row.argument_bytes >= heaviest / 10 and row.load_bits < 128:
                row.failures.append(f"a streaming kernel whose widest global load has {row.load_bits} bits, not 128")
            if row.made_bytes > heaviest / 10 and row.store_bits < 128 and not row.narrow_stores:
                row.failures.append(f"a streaming kernel whose widest global store has {row.store_bits} bits, not 128")
        if rows[0].narrow_stores and all(row.store_bits >= 128 for row in rows):
            rows[0].failures.append(f"the case explains narrow stores, but has none: {rows[0].narrow_stores}")


def _resource_failures(row: Row) -> list[str]:
    """Spills, shared memory and registers."""
    failures, limit = [], ARCHITECTURES[row.arch].shared_per_block
    if row.spill_bytes:
        failures.append(f"spills {row.spill_bytes} bytes of registers per thread")
    if row.shared_bytes > limit:
        failures.append(f"needs {row.shared_bytes} bytes of shared memory, more than the {limit} of sm_{row.arch}")
    if row.registers > MAX_REGISTERS and not row.compiler.startswith(f"triton {OLDEST_TRITON}."):
        failures.append(f"uses {row.registers} registers, more than {MAX_REGISTERS}: no headroom for another compiler")
    return failures


def check_module(module: str, technique: str, arch: int) -> list[Row]:
    """All rows of one kernel file on one architecture; a file that cannot be imported is one failed row."""
    prepare_compiler()
    try:
        found = importlib.import_module(module).CASES
    except Exception as error:
        return [Row(technique, "", arch, failures=[_explain(error)])]
    return [row for case in found for row in check_case(technique, case, arch)]


def prepare_compiler() -> None:
    """Settle what Triton's versions leave open: fused multiply-adds, and without a home a temporary cache folder."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    default = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    try:
        default.mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")


def check_all(modules: dict[str, str], arches: Sequence[int]) -> list[Row]:
    """Check kernel files ({technique: module}) on each architecture in two processes; rows in a fixed order."""
    tasks = [(module, technique, arch) for technique, module in modules.items() for arch in arches]
    with ProcessPoolExecutor(min(2, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(check_module, *task) for task in tasks]
        rows = []
        for (_, technique, arch), future in zip(tasks, futures, strict=True):
            try:
                rows += future.result()
            except Exception as error:
                rows.append(Row(technique, "", arch, failures=[f"the compiling process died: {_explain(error)}"]))
    order = {key: place for place, key in enumerate(dict.fromkeys((row.technique, row.case) for row in rows))}
    return sorted(rows, key=lambda row: order[row.technique, row.case])


def static_report(name: str, arches: Iterable[int] = (80, 90, 100)) -> list[dict[str, Any]]:
    """The rows of one kernel file as dicts (fields of Row), compiled in another process.

    So it works in tests and notebooks where Triton interprets. [] where Triton is not installed: `cases.unavailable`
    says so in words. ValueError if there is no such kernel.
    """
    name = find(name)
    if unavailable():
        return []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(RESULTS.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kernels", "check", name, "--json", "--arch", *map(str, arches)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)


COLUMNS = "arch,kernel,grid,warps,regs,spill B,shared KiB,load,store,copies,tensor cores,occupancy,verdict".split(",")


def cells(row: Row) -> list[str]:
    """One line of the table, a cell for each of COLUMNS. Loads and stores: bits of the widest global one."""
    verdict = "FAILED" if row.failures else "ok"
    if not row.kernel:
        return [f"sm_{row.arch}", *["-"] * (len(COLUMNS) - 2), verdict]
    copies = [f"{n} {kind}" for n, kind in ((row.async_copies, "cp.async"), (row.bulk_copies, "TMA")) if n]
    mixed = f" ({row.wide_load_share:.0%})" if row.load_bits >= 128 and row.wide_load_share < 1 else ""
    return [
        f"sm_{row.arch}",
        row.kernel if row.launches == 1 else f"{row.kernel} ({row.launches} launches)",
        "x".join(map(str, row.grid)),
        str(row.warps),
        str(row.registers),
        str(row.spill_bytes),
        f"{row.shared_bytes / 1024:.1f}",
        f"{row.load_bits}{mixed}" if row.load_bits else "-",
        str(row.store_bits or "-"),
        ", ".join(copies) or "-",
        ", ".join(f"{n} {kind}" for kind, n in row.tensor_instructions.items()) or "-",
        f"{row.occupancy:.1%}",
        verdict,
    ]


def measured(technique: str, case: str) -> str:
    """What `bench` recorded of a case, to stand behind its floor, such as "; measured: H200 31.0"; "" if nothing."""
    found = [run for run in records.cases_of(technique, RESULTS) if run["case"] == case and "median_us" in run]
    times = ", ".join(f"{run['gpu'].removeprefix('NVIDIA ')} {run['median_us']:.1f}" for run in found)
    return f"; measured: {times}" if times else ""


def tables(rows: list[Row]) -> list[Table]:
    """A table per case, its title the floor under the case's time."""
    found = []
    for (technique, case), group in itertools.groupby(rows, key=lambda row: (row.technique, row.case)):
        group = list(group)
        times = {gpu: f"{1e6 * seconds:.1f}" for gpu, seconds in group[0].floor_seconds.items()}
        floors = ", ".join(f"{gpu} {time}" for gpu, time in times.items())
        title = f"{technique}: {case} ({group[0].kind}; floor in µs: {floors}{measured(technique, case)})"
        title = title if case else technique
        title += f"; stores below 128 bits: {group[0].narrow_stores}" * bool(group[0].narrow_stores)
        failed = {number for number, row in enumerate(group) if row.failures}
        found.append(Table(title, COLUMNS, [cells(row) for row in group], failed))
    return found


def explanations(rows: list[Row]) -> list[str]:
    """What failed and why; what fails alike on several architectures is said once."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for failure in row.failures:
            where = " / ".join(filter(None, (row.technique, row.case, row.kernel)))
            places.setdefault((where, failure), []).append(f"sm_{row.arch}")
    return [f"{where} on {', '.join(arches)}: {failure}" for (where, failure), arches in places.items()]


def static_text(rows: list[Row]) -> str:
    """What results/static.md holds for these rows."""
    versions = sorted({f"sm_{row.arch} by {row.compiler}" for row in rows if row.compiler})
    head = ["# Static report of all kernels", "", "Written by `python -m kernels check --write`; no GPU took part."]
    head += [f"Registers and counts differ between compilers; these: {'; '.join(versions)}.", LEGEND, ""]
    return "\n".join(head) + "\n" + markdown(tables(rows))


def write_static(rows: list[Row]) -> None:
    """Replace results/static.md by these rows."""
    replace_file(RESULTS / "static.md", static_text(rows).encode())


def changes(rows: list[Row]) -> list[str]:
    """How results/static.md differs from these rows, as lines of a diff; none if it says the same."""
    path = RESULTS / "static.md"
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    return [*difflib.unified_diff(kept.splitlines(), static_text(rows).splitlines(), "static.md", "now", lineterm="")]


def main(arguments: Namespace) -> int:
    """Exit status: 0 if every kernel passes every gate, 1 if one does not. ValueError for a bad option."""
    if (arguments.write or arguments.compare) and (arguments.names or arguments.arch != list(ARCHITECTURES)):
        option = "write" if arguments.write else "compare"
        raise ValueError(f"--{option} reports all kernels on all architectures: leave out NAME and --arch")
    if unavailable():
        raise ValueError(unavailable())
    names = [find(name) for name in arguments.names] or techniques()
    os.environ.pop("TRITON_INTERPRET", None)
    rows = check_all({name: f"kernels.{name}" for name in names}, arguments.arch)
    if arguments.write:
        write_static(rows)
    differs = changes(rows) if arguments.compare else []
    status = report(rows, arguments.json)
    if differs:
        print(*differs[:60], "static.md is not what the kernels compile to: look at the change, then check --write",
              sep="\n", file=sys.stderr)  # fmt: skip
    return max(status, int(bool(differs)))


def report(rows: list[Row], as_json: bool = False) -> int:
    """Print the rows, then on stderr what failed and why. Returns the exit status."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(tables(rows))
    failed = sum(bool(row.failures) for row in rows)
    print(*explanations(rows), f"{len(rows) - failed} of {len(rows)} passed", sep="\n", file=sys.stderr)
    return int(failed > 0)
