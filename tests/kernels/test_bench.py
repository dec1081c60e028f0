"""`python -m kernels bench` without a GPU: everything but the clock."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import bench
from kernels.__main__ import main
from kernels.cases import Case
from tests.kernels.stand_ins import CEILINGS, CPU, CRASHES, GOOD, MACHINE, WRONG, Clock, Here, case


def run(monkeypatch, folder: Path, found: dict[str, list[Case]], timer=None, worker=None, seconds=1e3) -> int:
    """The whole command on the CPU and in this process, with these cases and known ceilings."""

    def ceilings(device, timer):
        timer(lambda: None, [()])
        return CEILINGS

    monkeypatch.setattr(bench, "cases", found.__getitem__)
    monkeypatch.setattr(bench, "measure_ceilings", ceilings)
    monkeypatch.setattr(bench, "environment", lambda device: MACHINE)
    deadline = time.monotonic() + seconds
    return bench.bench_all(list(found), CPU, folder, worker or Here(), deadline, timer or Clock())


def test_results_are_written_shown_drawn_and_read_back(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, {"attention.flash": [GOOD]}) == 0
    assert (
        "| double | 10.0 | 5.0 | 2000 | 400.0 | 50% | memory | sum 20.0 (2.00x), none not timed |"
        in capsys.readouterr().out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200.json", "h200.png"]
    assert (tmp_path / "h200.png").read_bytes().startswith(b"\x89PNG")
    (row,) = bench.recorded("flash", tmp_path)
    assert row["gpu"] == "NVIDIA H200" and row["date"] == "2026-01-31" and row["fraction"] == pytest.approx(0.5)
    assert row["ceilings"] == {"bandwidth": 4e12, "bf16": 800e12, "int8": 1600e12}
    assert bench.recorded("quantization.weight_only", tmp_path) == []


def test_a_second_run_replaces_only_its_techniques(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, {"attention.flash": [GOOD], "sparsity.n_m": [GOOD]})
    before = json.loads((tmp_path / "h200.json").read_text())
    run(monkeypatch, tmp_path, {"sparsity.n_m": [case("other")]})
    after = json.loads((tmp_path / "h200.json").read_text())
    assert after["techniques"]["attention.flash"] == before["techniques"]["attention.flash"]
    assert [found["case"] for found in after["techniques"]["sparsity.n_m"]["cases"]] == ["other"]


def test_what_was_never_measured_comes_first_then_what_is_oldest(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, {"attention.flash": [GOOD], "attention.heads": [GOOD]})
    content = json.loads((tmp_path / "h200.json").read_text())
    content["techniques"]["attention.heads"]["environment"]["date"] = "2025-12-31"
    (tmp_path / "h200.json").write_text(json.dumps(content))
    names = bench.oldest_first(tmp_path / "h200.json")
    assert sorted(names) == bench.techniques() and names[-2:] == ["attention.heads", "attention.flash"]


def test_failures_are_recorded_and_change_the_exit_status(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, {"attention.flash": [WRONG, GOOD, CRASHES]}) == 1
    assert [("failure" in row) for row in bench.recorded("flash", tmp_path)] == [True, False, True]
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_case_that_takes_the_process_down_fails_alone(monkeypatch, tmp_path):
    found = {"attention.flash": [case("dies"), GOOD], "sparsity.n_m": [GOOD]}
    assert run(monkeypatch, tmp_path, found, worker=Here("dies")) == 1
    dead, alive = bench.recorded("flash", tmp_path)
    assert dead["failure"] == "took its process down, exit status -11" and dead["bytes"] == 20_000_000
    assert alive["median_us"] == pytest.approx(10) and "failure" not in bench.recorded("n_m", tmp_path)[0]


def test_a_process_that_a_kernel_has_spoilt_is_replaced(monkeypatch, tmp_path):
    worker = Here()
    monkeypatch.setattr(bench, "settle", lambda device: False)
    assert run(monkeypatch, tmp_path, {"attention.flash": [GOOD, GOOD]}, worker=worker) == 0
    assert worker.stops == 2


def test_no_case_begins_or_goes_on_after_the_deadline(monkeypatch, tmp_path, capsys):
    """What was recorded before stays; what was left is said, and the exit status too."""
    run(monkeypatch, tmp_path, {"sparsity.n_m": [GOOD]})
    before, now = bench.recorded("n_m", tmp_path), [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys.modules[__name__], "time", bench.time)

    def slow(x):
        now[0] += 80
        return 2 * x

    worker, clock = Here("hangs"), Clock()
    found = {"attention.flash": [GOOD], "quantization.weight_only": [case("hangs", slow)], "sparsity.n_m": [WRONG]}
    assert run(monkeypatch, tmp_path, found, clock, worker, seconds=45) == 1
    assert worker.limits[-1] == 45 and clock.timed.count(GOOD.run) == 1
    assert len(bench.recorded("flash", tmp_path)) == 1 and bench.recorded("n_m", tmp_path) == before
    assert bench.recorded("weight_only", tmp_path) == []
    assert capsys.readouterr().out.count("not measured, time was up; run bench again with this name") == 2


def test_a_case_gets_a_minute_of_a_long_run(monkeypatch, tmp_path):
    worker = Here()
    run(monkeypatch, tmp_path, {"attention.flash": [GOOD]}, worker=worker)
    assert worker.limits == [bench.CASE_SECONDS] * 3 == [60.0] * 3


def test_what_the_worker_is_asked_can_be_sent_to_it():
    asked = bench.measure, ("attention.flash", 0, bench.Bench(CPU, MACHINE, CEILINGS, bench.cuda_samples))
    assert pickle.loads(pickle.dumps(asked)) == asked
    ceilings = bench.measure_ceilings, (CPU, bench.cuda_samples), bench.environment
    assert pickle.loads(pickle.dumps(ceilings)) == ceilings


def test_only_failures_leave_no_figure(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, {"attention.flash": [WRONG]}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["h200.json"]


def test_a_file_that_cannot_be_imported_fails_alone(monkeypatch, tmp_path):
    def load(name):
        if name == "attention.flash":
            raise ImportError("no such thing")
        return [GOOD]

    monkeypatch.setattr(bench, "cases", load)
    measure = bench.Bench(CPU, MACHINE, CEILINGS, Clock())
    runs = bench.run_bench(["attention.flash", "sparsity.n_m"], measure, tmp_path, Here(), time.monotonic() + 1e3)
    assert runs["attention.flash"]["cases"] == [{"case": "attention.flash", "failure": "ImportError: no such thing"}]
    assert bench.recorded("flash", tmp_path) == [] and len(bench.recorded("n_m", tmp_path)) == 1


def test_an_interrupted_run_keeps_what_is_done(monkeypatch, tmp_path):
    def interrupted(x):
        raise KeyboardInterrupt

    found = {"attention.flash": [GOOD], "sparsity.n_m": [case("stops", interrupted)]}
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, found)
    assert len(bench.recorded("flash", tmp_path)) == 1 and bench.recorded("n_m", tmp_path) == []


def test_a_broken_results_file_stops_before_the_work(monkeypatch, tmp_path):
    clock = Clock()
    for content in ("{", "[]", '{"gpu": "NVIDIA H200"}', '{"techniques": 3}'):
        (tmp_path / "h200.json").write_text(content)
        with pytest.raises(ValueError, match=r"h200\.json"):
            run(monkeypatch, tmp_path, {"attention.flash": [GOOD]}, clock)
    assert clock.timed == [] and (tmp_path / "h200.json").read_text() == '{"techniques": 3}'


def test_a_folder_that_cannot_be_written_stops_before_the_work(monkeypatch, tmp_path):
    clock = Clock()
    with pytest.raises(OSError, match="cannot write"):
        run(monkeypatch, tmp_path / "absent", {"attention.flash": [GOOD]}, clock)
    assert clock.timed == []


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("Tesla T4", "tesla-t4")]
)
def test_results_are_named_after_the_gpu(gpu, name):
    assert bench.results_path(gpu, Path("x")) == Path("x") / f"{name}.json"


def test_environment_says_what_was_measured_on(monkeypatch):
    pytest.importorskip("triton")
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=1, L2_cache_size=2, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    found = bench.environment(CPU)
    assert (found["gpu"], found["l2_bytes"], found["driver"]) == ("NVIDIA H200", 2, "unknown")
    assert found["torch"] == torch.__version__ and len(found["date"]) == 10


def test_without_a_gpu_one_line_and_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: bench needs a CUDA GPU and torch sees none; nothing was measured\n"
    assert printed.out == ""


def test_without_triton_one_line_and_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("error: Triton, which compiles the kernels, is not installed")


def test_the_command_ends_its_worker(monkeypatch):
    worker = Here()
    asked = {}

    def interrupted(names, device, folder, given, deadline):
        asked.update(names=names, device=device, worker=given, left=deadline - time.monotonic())
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "unavailable", lambda: "")
    monkeypatch.setattr(bench, "prepare_compiler", lambda: None)
    monkeypatch.setattr(bench, "Worker", lambda: worker)
    monkeypatch.setattr(bench, "bench_all", interrupted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "flash", "--seconds", "90"]) == 130
    assert asked["names"] == ["attention.flash"] and asked["device"].type == "cuda" and 60 < asked["left"] <= 90
    assert worker.stops == 1 and "TRITON_INTERPRET" not in bench.os.environ


def test_recorded_refuses_unknown_names():
    with pytest.raises(ValueError, match="did you mean"):
        bench.recorded("attention.flasj")
