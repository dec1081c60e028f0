"""What `bench` has recorded: results/<gpu>.json, the runs of techniques on one GPU. Needs no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kernels.cases import find

RESULTS = Path(__file__).parent / "results"


def results_path(gpu: str, folder: Path = RESULTS) -> Path:
    """Where a GPU's results lie: "NVIDIA H200" has h200.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-") + ".json")


def load_results(path: Path) -> dict[str, Any]:
    """The runs in a results file by technique; none if there is no file. ValueError if it is not such a file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["techniques"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no benchmark results ({error}); remove it and measure again") from error


def cases_of(technique: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Recorded cases of the technique of this dotted name on every GPU measured: figures, machine, ceilings."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        run = load_results(path).get(technique, {"cases": []})
        rows += [{**run["environment"], "ceilings": run["ceilings"], **case} for case in run["cases"]]
    return rows


def recorded(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """`cases_of` the kernel with this name, which may be short. ValueError if there is no such kernel."""
    return cases_of(find(name), folder)
