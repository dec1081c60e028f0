"""Figures with knobs: sliders where somebody can move them, and one picture elsewhere."""

from __future__ import annotations

import sys

from matplotlib.figure import Figure

from chapters import explore
from chapters.figures import figure


def draw(power: float = 2.0, name: str = "ours") -> Figure:
    drawn, axes = figure()
    axes.set(title=f"{name}, power {power}")
    return drawn


def test_exploring_without_a_live_notebook_gives_one_picture():
    assert explore.explore(draw, power=(1, 5), name=["a", "b"]).axes[0].get_title() == "ours, power 2.0"
    seen = explore.explore(
        lambda bits, share, mode: (bits, share, mode), bits=(1, 8), share=(0.0, 1.0), mode=["x", "y"]
    )
    assert seen == (4, 0.5, "x")


def test_exploring_in_a_live_notebook_gives_sliders(monkeypatch):
    monkeypatch.setattr(explore, "in_live_notebook", lambda: True)
    widget = explore.explore(draw, power=(1.0, 5.0, 0.5), name=["ours", "theirs"])
    slider, choice = widget.children[:2]
    assert (slider.min, slider.max, slider.step, slider.value) == (1.0, 5.0, 0.5, 2.0)
    assert choice.options == ("ours", "theirs") and choice.value == "ours"


def test_a_kernel_is_live_unless_a_build_asks_for_still_pictures(monkeypatch):
    class Shell:
        kernel = object()

    module = type("IPython", (), {"get_ipython": staticmethod(Shell)})
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.delenv("STATIC_FIGURES", raising=False)
    assert explore.in_live_notebook()
    monkeypatch.setenv("STATIC_FIGURES", "1")
    assert not explore.in_live_notebook()
