"""The figure of recorded benchmarks shows the recorded numbers."""

from __future__ import annotations

import pytest

from kernels.roofline import MARKERS, chart, draw


def case(name: str, fraction: float, operations: int = 10**12, **peers_us: float) -> dict:
    """A recorded case of 1 GB whose floor is 100 µs."""
    time = 1e-4 / fraction
    rate = operations / time / 1e12
    return {
        "case": name, "bytes": 10**9, "operations": operations, "fraction": fraction, "floor_us": 100.0,
        "tflop_per_s": rate, "peers_us": peers_us,
    }  # fmt: skip


def run(date: str, bandwidth: float, *cases: dict) -> dict:
    """A recorded run."""
    ceilings = {"bandwidth": bandwidth, "bf16": 800e12, "int8": 1600e12}
    return {"environment": {"date": date}, "ceilings": ceilings, "cases": list(cases)}


RUNS = {
    "a.one": run("2026-02-01", 4e12, case("big", 0.5, torch=400.0), case("small", 0.25)),
    "b.two": run("2026-01-01", 3e12, case("copy", 0.8, operations=0)),
}
MEASURED = {name: found["cases"] for name, found in RUNS.items()}


def test_points_and_roofs():
    left, _ = chart(RUNS, MEASURED, "NVIDIA H200").axes
    points, bf16, int8 = left.lines  # a technique without operations has no place under a roof
    assert points.get_label() == "a.one" and points.get_xydata().tolist() == [[1000, 5000], [1000, 2500]]
    assert max(bf16.get_ydata()) == pytest.approx(800) and max(int8.get_ydata()) == pytest.approx(1600)
    assert bf16.get_ydata()[0] / bf16.get_xdata()[0] == pytest.approx(4)  # TB/s, of the newer run


def test_fractions_of_kernels_and_peers():
    figure = chart(RUNS, MEASURED, "NVIDIA H200")
    right = figure.axes[1]
    filled = [line for line in right.lines if line.get_fillstyle() == "full" and line.get_marker() in MARKERS]
    assert [(*line.get_xdata(), *line.get_ydata(), line.get_marker()) for line in filled] == [
        (0.5, 0, "o"), (0.25, 1, "o"), (0.8, 2, "s"),
    ]  # fmt: skip
    hollow = [tuple(line.get_xdata()) for line in right.lines if line.get_fillstyle() == "none"]
    assert hollow == [(0.25,), (), ()]  # 100 of 400 µs
    assert [label.get_text() for label in right.get_yticklabels()] == ["a.one: big", "a.one: small", "b.two: copy"]
    assert figure.get_suptitle() == "NVIDIA H200, measured 2026-01-01 to 2026-02-01"


def test_failed_cases_are_left_out(tmp_path):
    failed = {"a.one": run("2026-02-01", 4e12, {"case": "x", "failure": "wrong"})}
    draw(failed, "NVIDIA H200", tmp_path / "none.png")
    draw(failed | {"b.two": RUNS["b.two"]}, "NVIDIA H200", tmp_path / "one.png")
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
