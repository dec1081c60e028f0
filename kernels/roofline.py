"""The figure of recorded benchmarks: how far each case is below the ceilings measured with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.tables import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*Xh<>p"  # one per technique: told apart without colour


def draw(runs: dict[str, Any], gpu: str, path: Path) -> None:
    """Write the figure of all cases in `runs` ({technique: run}) to `path`, a PNG; none if no case has a time."""
    measured = {name: [case for case in run["cases"] if "failure" not in case] for name, run in runs.items()}
    measured = {name: found for name, found in measured.items() if found}
    if measured:
        content = io.BytesIO()
        chart(runs, measured, gpu).savefig(content, format="png", dpi=120)
        replace_file(path, content.getvalue())


def chart(runs: dict[str, Any], measured: dict[str, list[dict]], gpu: str) -> Figure:
    """Two charts of the measured cases: rate over intensity on the left, the fraction of each on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = sum(map(len, measured.values()))
    figure = Figure(figsize=(14, max(4.5, 1.5 + 0.28 * count)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    dates = sorted({runs[name]["environment"]["date"] for name in measured})
    figure.suptitle(f"{gpu}, measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}")
    newest = max(measured, key=lambda name: runs[name]["environment"]["date"])
    _roofline(left, measured, runs[newest]["ceilings"])
    _fractions(right, measured)
    return figure


def _roofline(axes: Any, measured: dict[str, list[dict]], ceilings: dict[str, float]) -> None:
    """Achieved rate over intensity, both logarithmic, under the ceilings of the newest run."""
    for marker, (name, found) in zip(_markers(measured), measured.items(), strict=True):
        computing = [case for case in found if case["operations"]]
        intensity = [case["operations"] / case["bytes"] for case in computing]
        if computing:
            axes.plot(intensity, [case["tflop_per_s"] for case in computing], marker, color="black", label=name)
    intensity = np.geomspace(0.1, 1e5, 200)
    for rate, style in (("bf16", "-"), ("int8", "--")):
        roof = np.minimum(intensity * ceilings["bandwidth"], ceilings[rate]) / 1e12
        axes.plot(intensity, roof, style, color="grey", label=f"{rate} roof, {ceilings[rate] / 1e12:.0f} TFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(f"Roofline, copy bandwidth {ceilings['bandwidth'] / 1e12:.2f} TB/s")
    axes.legend()


def _fractions(axes: Any, measured: dict[str, list[dict]]) -> None:
    """A line per case: the kernel's fraction of its ceiling, filled, and its peers', hollow."""
    labels = []
    for marker, (name, found) in zip(_markers(measured), measured.items(), strict=True):
        for case in found:
            peers = [case["floor_us"] / time for time in case["peers_us"].values()]
            axes.plot(peers, [len(labels)] * len(peers), marker, color="black", fillstyle="none")
            axes.plot(case["fraction"], len(labels), marker, color="black")
            labels.append(f"{name}: {case['case']}")
    axes.axvline(1.0, color="grey")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, None), xlabel="fraction of the ceiling that binds")
    axes.set_title("Kernels filled, peers hollow")


def _markers(measured: dict[str, list[dict]]) -> list[str]:
    """A marker for each technique."""
    return [MARKERS[number % len(MARKERS)] for number in range(len(measured))]
