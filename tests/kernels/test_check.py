"""`python -m kernels check`: each gate lets a good kernel pass and refuses one made to fail it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from kernels import check
from kernels.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = {"uses_dot": True, "tensor_instructions": {"HGMMA": 4}}

# Compiles the examples and, for one that spills, also keeps what the assembler itself says of it.
SCRIPT = """
import contextlib, dataclasses, io, json, sys
from kernels import check

if __name__ == "__main__":
    import torch
    from triton import knobs
    from kernels.compiled import machine_code, recorded_launches
    from tests.kernels.examples import softmax

    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        with recorded_launches(90) as launches, contextlib.redirect_stdout(io.StringIO()) as log:
            softmax(torch.empty(1 << 20))
    code = machine_code(launches[0].kernel.asm["cubin"])
    rows = [row for arch in (80, 90) for row in check.check_module("tests.kernels.examples", "examples", arch)]
    rows = [dataclasses.asdict(row) for row in rows]
    print(json.dumps({"rows": rows, "code": code, "log": log.getvalue()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What SCRIPT prints, from a process that compiles: this one may interpret."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(compiled) -> list[check.Row]:
    """The report on the examples."""
    return [check.Row(**{**row, "grid": tuple(row["grid"])}) for row in compiled["rows"]]


def of(rows: list[check.Row], case: str) -> list[check.Row]:
    """The rows of one case; there is always one for each architecture at least."""
    found = [row for row in rows if row.case == case]
    assert {row.arch for row in found} == {80, 90}
    return found


def failures(rows: list[check.Row], case: str) -> set[str]:
    """All that is said against a case, with the numbers left out."""
    return {re.sub(r"\d+", "#", failure) for row in of(rows, case) for failure in row.failures}


def test_good_matrix_kernel(rows):
    for row, instruction in zip(of(rows, "matmul"), ("HMMA", "HGMMA"), strict=True):
        assert row.failures == []
        assert set(row.tensor_instructions) == {instruction}
        assert (row.kernel, row.grid, row.warps, row.launches) == ("matmul_kernel", (32, 32), 8, 1)
        assert row.load_bits == 128 and row.async_copies > 0 and row.uses_dot
        assert row.shared_bytes >= 2 * (128 * 64 + 64 * 128) * 2  # two stages of both tiles, 2 bytes a number
        assert 0 < row.occupancy <= 0.5 and 64 < row.registers <= check.MAX_REGISTERS
        assert (row.argument_bytes, row.made_bytes) == (3 * 4096 * 4096 * 2, 4096 * 4096 * 2)


def test_good_streaming_kernel(rows):
    for row in of(rows, "double"):
        assert row.failures == []
        assert (row.load_bits, row.store_bits, row.wide_load_share) == (128, 128, 1.0)
        assert row.tensor_instructions == {} and row.shared_bytes == 0 and row.occupancy == 1.0
        assert row.grid == (1024,)  # from a grid function


def test_launches_of_a_case_are_told_apart(rows):
    for arch in (80, 90):
        large, small = (row for row in of(rows, "two sizes") if row.arch == arch)
        assert (large.launches, large.load_bits, large.failures) == (2, 128, [])
        assert (large.made_bytes, small.made_bytes) == (4 << 20, 4)  # what it returns, not what it was given
        assert (small.launches, small.load_bits, small.failures) == (1, 32, [])  # carries no weight


def test_spills_are_refused(rows):
    for row in of(rows, "spills"):
        assert row.failures[0] == f"spills {row.spill_bytes} bytes of registers per thread" and row.spill_bytes > 0


def test_spilled_bytes_are_those_of_the_assembler(compiled):
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled["log"]).groups()
    assert compiled["code"]["spill_bytes"] == int(stores) + int(loads) > 0
    assert f"Used {compiled['code']['registers']} registers" in compiled["log"]
    assert f"{compiled['code']['stack']} bytes stack frame" in compiled["log"]


def test_too_much_shared_memory_is_refused(rows):
    found = failures(rows, "too much shared memory")
    assert {"needs # bytes of shared memory, more than the # of sm_#"} <= found
    assert all(row.occupancy == 0 for row in of(rows, "too much shared memory"))


def test_scalar_loads_are_refused(rows):
    """The same kernel as "double", on an address that is not a multiple of 16."""
    assert failures(rows, "scalar loads") == {"a streaming kernel whose widest global load has # bits, not #"}
    assert all(row.wide_load_share == 0 for row in of(rows, "scalar loads"))


def test_narrow_stores_are_refused_unless_the_case_explains_them(rows):
    """The same kernel as "double", writing bytes: 8 for each of a program's threads."""
    assert failures(rows, "narrow stores") == {"a streaming kernel whose widest global store has # bits, not #"}
    assert failures(rows, "explained stores") == set()
    assert "; stores below 128 bits: bytes, 8 for a thread\n" in check.static_text(of(rows, "explained stores"))


def test_matrix_kernels_without_tensor_cores_are_refused(rows):
    expected = {"a matrix kernel without tensor-core instructions"}
    assert failures(rows, "no tensor cores") == failures(rows, "no dot") == expected
    assert all(row.uses_dot for row in of(rows, "no tensor cores"))


def test_products_that_wait_for_each_other_are_refused(rows):
    old, new = of(rows, "serialized")
    assert old.failures == [] and set(old.tensor_instructions) == {"HMMA"}  # sm_80 has no wgmma
    assert new.failures == [f"each wgmma waits for the one before (ptxas: {', '.join(new.serialized)})"]
    assert new.serialized and all(re.fullmatch(r"C75\d\d", code) for code in new.serialized)


def test_what_does_not_compile_or_launch_is_reported(rows):
    for row in of(rows, "does not compile"):
        assert "K >= 16" in row.failures[0] and row.kernel == ""
    assert failures(rows, "launches nothing") == {"the case launches no kernel"}


def test_report_counts_failures(rows, capsys):
    assert check.report(rows) == 1
    printed = capsys.readouterr()
    assert "| sm_90 | matmul_kernel | 32x32 |" in printed.out and printed.out.count("FAILED") == 17
    assert "examples / no dot / double_kernel on sm_80, sm_90: a matrix kernel" in printed.err
    assert check.report([row for row in rows if not row.failures]) == 0
    assert check.report(rows[:1], as_json=True) == 0
    assert json.loads(capsys.readouterr().out.split("\n\n")[-1])[0]["case"] == "matmul"


def test_static_file_is_deterministic_and_says_what_made_it(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    check.write_static(rows)
    first = (tmp_path / "static.md").read_text()
    check.write_static(rows)
    assert (tmp_path / "static.md").read_text() == first
    assert re.search(r"sm_80 by triton 3\.\d+\.\d+, ptxas 1\d\.\d", first)
    assert [path.name for path in tmp_path.iterdir()] == ["static.md"]


def test_a_change_of_the_static_report_shows_line_by_line(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    assert "+# Static report of all kernels" in check.changes(rows)
    check.write_static(rows)
    assert check.changes(rows) == []
    old = rows[0].warps
    monkeypatch.setattr(rows[0], "warps", old + 1)
    changed = [line for line in check.changes(rows) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) == 2 and f"| {old} |" in changed[0] and f"| {old + 1} |" in changed[1]


def test_what_was_measured_stands_beside_the_floor(tmp_path, monkeypatch):
    case = {"case": "c", "median_us": 31.04}
    run = {"environment": {"gpu": "NVIDIA H200"}, "ceilings": {}, "cases": [case, {"case": "d", "failure": "no"}]}
    (tmp_path / "h200.json").write_text(json.dumps({"techniques": {"attention.flash": run}}))
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    titles = [table.title for table in check.tables([check.Row("attention.flash", name, 90) for name in "cd"])]
    assert "measured: H200 31.0" in titles[0] and "measured" not in titles[1]


def judged(**changes) -> list[str]:
    """Failures of a passing row with some fields changed."""
    row = check.Row("t", "c", 90, kind="other", kernel="k", registers=100, shared_bytes=1024, load_bits=128)
    for name, value in changes.items():
        assert hasattr(row, name)
        setattr(row, name, value)
    check.judge([row])
    return row.failures


def test_gates_hold_up_to_their_limits():
    assert judged() == judged(registers=235) == judged(shared_bytes=227 * 1024) == []
    assert judged(arch=80, shared_bytes=163 * 1024) == judged(kind="stream", load_bits=256) == []
    assert len(judged(registers=236)) == len(judged(spill_bytes=4)) == len(judged(shared_bytes=227 * 1024 + 1)) == 1
    assert judged(serialized=("C7515",)) == [] and len(judged(kind="matrix", **PRODUCT, serialized=("C7515",))) == 1
    assert len(judged(arch=80, shared_bytes=163 * 1024 + 1)) == len(judged(kind="stream", load_bits=64)) == 1


def test_the_oldest_compiler_needs_no_room_for_an_older_one():
    old, own = f"triton {check.OLDEST_TRITON}.0, ptxas 12.8", "triton 3.7.1, ptxas 12.8"
    assert judged(registers=236, compiler=old) == [] and len(judged(registers=236, compiler=own)) == 1
    assert len(judged(spill_bytes=4, compiler=old)) == 1


def pair(kind: str, first: dict, second: dict) -> list[bool]:
    """Whether each of two kernels of one case passes."""
    found = [check.Row("t", "c", 90, kind=kind, kernel="k", **fields) for fields in (first, second)]
    check.judge(found)
    return [not row.failures for row in found]


def test_matrix_gate_applies_to_kernels_with_a_dot():
    assert pair("matrix", PRODUCT, {}) == [True, True]
    assert pair("matrix", PRODUCT, {"uses_dot": True}) == [True, False]
    assert pair("matrix", {}, {}) == [False, False]


def test_tall_products_are_wgmma_on_the_gpu_that_has_it():
    by_mma = {"uses_dot": True, "tensor_instructions": {"HMMA": 4}, "kind": "matrix"}
    assert judged(**by_mma, dot_rows=32) == judged(arch=80, **by_mma, dot_rows=64) == []
    assert judged(kind="matrix", **PRODUCT, dot_rows=64) == []
    assert judged(**by_mma, dot_rows=64) == ["a product of 64 rows by mma.sync: from 64 on it should be wgmma"]


def test_rows_of_products_are_read_from_the_intermediate_code():
    dot_rows = pytest.importorskip("kernels.compiled", exc_type=ImportError).dot_rows
    line = "%1 = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<{}xf16> * tensor<32x16xf16> -> tensor<{}xf32>\n"
    assert dot_rows("".join(line.format(f"{rows}x32", f"{rows}x16") for rows in (16, 128, 64))) == 128
    assert dot_rows(line.format("64x32", "64x16").replace("f16", "f32")) == dot_rows("tt.load") == 0


def test_stream_gate_applies_to_kernels_that_carry_weight():
    large = {"argument_bytes": 1000, "load_bits": 128}
    assert pair("stream", large, {"argument_bytes": 99, "load_bits": 32}) == [True, True]
    assert pair("stream", large, {"argument_bytes": 100, "load_bits": 32}) == [True, False]


def test_store_gate_applies_to_kernels_with_large_outputs():
    large, wide = {"argument_bytes": 1000, "load_bits": 128}, {"load_bits": 128, "store_bits": 128}
    assert pair("stream", large, {"made_bytes": 100, "store_bits": 64}) == [True, True]
    assert pair("stream", large, {"made_bytes": 101, "store_bits": 64}) == [True, False]
    assert pair("stream", large, {"made_bytes": 101, "store_bits": 128}) == [True, True]
    assert pair("matrix", large | PRODUCT, {"made_bytes": 101, "store_bits": 64}) == [True, True]
    assert judged(kind="stream", narrow_stores="counts") == [] != judged(kind="stream", narrow_stores="counts", **wide)


def test_instructions_are_read_by_name_and_width():
    from kernels.compiled import summary

    memory = {"LDG.E.U8.CONSTANT": 3, "LDGSTS.E.BYPASS.LTC128B.128": 2, "STG.E.64": 1, "STL": 2, "LDL.LU.64": 1}
    products = {"QGMMA.64x64x32.F32.E4M3.E4M3": 2, "UTCHMMA.2CTA": 1}
    others = {"HFMA2.MMA": 7, "LDGDEPBAR": 5, "ULDC.64": 9, "LDS.128": 9}
    found = summary(Counter(memory | products | others))
    assert found["tensor_instructions"] == {"QGMMA": 2, "UTCHMMA": 1}  # HFMA2.MMA is an ordinary addition
    assert (found["load_bits"], found["store_bits"], found["async_copies"]) == (128, 64, 2)
    assert found["wide_load_share"] == pytest.approx(2 * 128 / (2 * 128 + 3 * 8))
    assert found["spill_bytes"] == 2 * 4 + 8
    bulk = summary(Counter({"UTMALDG.2D": 4, "UTMASTG.2D": 1}))
    assert (bulk["load_bits"], bulk["store_bits"], bulk["bulk_copies"], bulk["wide_load_share"]) == (128, 128, 5, 1.0)
    assert summary(Counter())["wide_load_share"] == 0.0


def test_an_interpreting_process_refuses_to_compile(monkeypatch):
    pytest.importorskip("triton")
    from kernels.compiled import recorded_launches

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recorded_launches(90):
        pass


def test_what_happens_to_the_compiling_processes_is_reported():
    """A file that cannot be imported fails alone; a process that dies takes the rest of the run along, in words."""
    rows = check.check_all({"no.such": "kernels.no_such_file"}, [80, 90])
    assert [row.arch for row in rows] == [80, 90] and all("ModuleNotFoundError" in row.failures[0] for row in rows)
    rows = check.check_all({"the.end": "tests.kernels.ends_its_process"}, [80])
    assert len(rows) == 1 and "the compiling process died" in rows[0].failures[0]
    assert check.report(rows) == 1


@pytest.mark.parametrize("command", ["check", "bench"])
def test_unknown_names_suggest_the_nearest(command, capsys):
    assert main([command, "attention.flasj"]) == 2
    assert re.fullmatch(r"error: .*'attention.flasj'.*did you mean attention.flash.*\n", capsys.readouterr().err)


def test_written_report_takes_no_selection():
    with pytest.raises(ValueError, match="leave out NAME"):
        check.main(Namespace(names=["flash"], arch=[80, 90, 100], json=False, write=True))


def test_static_report_of_an_unknown_kernel():
    with pytest.raises(ValueError, match="did you mean"):
        check.static_report("attention.flasj")


def test_without_triton_reports_are_empty_and_the_command_says_why(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert check.static_report("attention.flash", [90]) == []
    assert main(["check"]) == 2
    assert capsys.readouterr().err.startswith("error: Triton, which compiles the kernels, is not installed")
