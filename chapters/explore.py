"""Figures that a reader can turn: sliders in a live notebook, a still picture everywhere else."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure


def explore(draw: Callable[..., Figure], **knobs: Sequence) -> Any:
    """Let the reader turn `draw(**values)`: sliders in a live notebook, one picture in its middle elsewhere.

    A knob is a range (low, high) or (low, high, step) as a tuple, or a list of choices. `draw`'s own default is
    where a knob starts. The environment variable STATIC_FIGURES=1 asks for the picture, as a notebook's build does.
    """
    start = {name: initial(draw, name, knob) for name, knob in knobs.items()}
    if not in_live_notebook():
        return draw(**start)
    try:
        import ipywidgets
    except ImportError:
        return draw(**start)
    return ipywidgets.interactive(draw, **{name: slider(ipywidgets, knob, start[name]) for name, knob in knobs.items()})


def initial(draw: Callable, name: str, knob: Sequence) -> Any:
    """Where a knob starts: the function's default, else the middle of the range or the first choice."""
    default = inspect.signature(draw).parameters[name].default
    if default is not inspect.Parameter.empty:
        return default
    if isinstance(knob, list):
        return knob[0]
    middle = (knob[0] + knob[1]) / 2
    return int(middle) if isinstance(knob[0], int) and isinstance(knob[1], int) else middle


def slider(ipywidgets: Any, knob: Sequence, value: Any) -> Any:
    """The widget for one knob; it reports when released, so that slow pictures are not drawn on the way."""
    if isinstance(knob, list):
        return ipywidgets.Dropdown(options=knob, value=value)
    whole = all(isinstance(number, int) for number in knob)
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = knob[2] if len(knob) > 2 else (1 if whole else (knob[1] - knob[0]) / 50)
    return kind(min=knob[0], max=knob[1], step=step, value=value, continuous_update=False)


def in_live_notebook() -> bool:
    """Whether a Jupyter kernel runs this and somebody may move a slider."""
    if os.environ.get("STATIC_FIGURES") == "1" or "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None
