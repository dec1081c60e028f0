"""Figures that print the same everywhere and can be told apart without colour."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from chapters import figures
from chapters.figures import COLOURS, LINESTYLES, MARKERS, alt_text, figure, heatmap, legend, panels, series


def draw(power: float = 2.0, name: str = "ours") -> Figure:
    drawn, axes = figure()
    axes.plot([1, 2, 3], np.power([1, 2, 3], power), **series("method"), label=name)
    axes.set(xlabel="bits", ylabel="loss", title=f"power {power}")
    legend(axes)
    return drawn


def test_the_same_figure_gives_the_same_bytes_and_another_other_ones():
    png = figures.save_png_bytes(draw())
    assert png.startswith(b"\x89PNG") and png == figures.save_png_bytes(draw()) != figures.save_png_bytes(draw(3.0))


def test_a_notebook_shows_a_figure_without_pyplot():
    show = "import sys; from chapters.figures import figure; png = figure()[0]._repr_png_()"
    code = f"{show}; assert len(png) > 1000; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_roles_differ_in_marker_and_line_and_stay_readable_on_white():
    assert COLOURS.keys() == MARKERS.keys() == LINESTYLES.keys()
    looks = {(MARKERS[role], str(LINESTYLES[role])) for role in COLOURS}
    assert len(looks) == len(COLOURS)
    for colour in COLOURS.values():
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        luminance = np.dot([0.2126, 0.7152, 0.0722], light)
        assert 1.05 / (luminance + 0.05) >= 3, "WCAG asks a contrast of 3 of graphics"


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role must be one of reference, method"):
        series("methods")


def test_alt_text_says_what_is_drawn():
    assert alt_text(draw()) == "power 2.0; loss against bits; series: ours"
    assert alt_text(figure()[0]) == "figure"


@pytest.mark.parametrize(("values", "signed"), [([[0.0, 1.0]], False), ([[-1.0, np.nan]], True), ([[0.0, 0.0]], False)])
def test_a_heatmap_is_white_at_zero_only_where_signs_differ(values, signed):
    drawn, axes = panels(2)
    heatmap(axes[0], np.array(values), "weight", digits=1)
    low, high = axes[0].images[0].get_clim()
    assert (low == -high) if signed else (low == 0 < high)
    assert len(axes[0].texts) == np.size(values)
    figures.save_png_bytes(drawn)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 3))])
def test_a_heatmap_needs_a_matrix(values):
    with pytest.raises(ValueError, match="non-empty matrix"):
        heatmap(figure()[1], values, "weight")


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((40, 110), ["40", "50", "70", "100"]),
        ((4, 60), ["5", "10", "20", "50"]),
        ((0.011, 0.0119), ["0.011", "0.01125", "0.0115", "0.01175"]),
    ],
)
def test_a_short_logarithmic_axis_has_plain_numbers(limits, labels):
    drawn, axes = figure()
    axes.set(yscale="log", ylim=limits)
    figures.save_png_bytes(drawn)
    low, high = limits
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert shown == labels
    assert not any(text.get_text() for text in axes.get_yticklabels(minor=True))


def test_long_logarithmic_axes_and_those_with_ticks_of_their_own_stay():
    drawn, (left, right) = panels(2)
    left.set(yscale="log", ylim=(1, 1000))
    right.set(yscale="log", ylim=(2, 9), yticks=[3])
    figures.save_png_bytes(drawn)
    assert "$" in left.get_yticklabels()[1].get_text()
    assert right.get_yticks().tolist() == [3]
