"""How all figures look: colours, templates, titles and legends.

Colours of text, grid and background live in :data:`TEMPLATES` alone, so ``figure.update_layout(template=...)`` changes
them. Lines have Okabe-Ito colours, cosines a perceptually uniform scale.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.colors import sample_colorscale  # type: ignore[import-untyped,unused-ignore]

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
GREY = "#8C8C8C"  # readable on white and on black
BROWN = "#9C6B1F"  # the same; darker than the seven above, for the colour-blind
PALETTE = {
    "blue": BLUE,
    "vermillion": VERMILLION,
    "green": GREEN,
    "orange": ORANGE,
    "purple": PURPLE,
    "sky": SKY,
    "brown": BROWN,
    "grey": GREY,
}
DASHES = ("solid", "dash", "dot", "dashdot")  # where lines share a colour, or lie on each other
SIGMA, TIMES = "\u03c3", "\u00d7"

LINE_SCALE = sample_colorscale("Cividis", np.linspace(0.05, 0.85, 9))  # its yellow end is too pale for a thin line
SHOWN = {"color": VERMILLION, "symbol": "circle-open", "size": 9, "line": {"width": 2}}
OTHERS = {"color": GREY, "size": 5, "opacity": 0.6}
MARGIN = {"l": 70, "r": 30, "t": 120, "b": 60}
LEGEND_RIGHT = {"xref": "paper", "x": 1, "xanchor": "right"}  # above the panel that it belongs to


def _template(text: str, grid: str, background: str) -> go.layout.Template:
    lines = {"gridcolor": grid, "linecolor": text, "tickcolor": text, "showline": True, "zeroline": False}
    text_of = {"title": {"standoff": 8, "font": {"size": 13}}, "tickfont": {"size": 12}, "automargin": True}
    axis = {**lines, **text_of, "ticks": "outside", "ticklen": 4}
    return go.layout.Template(
        layout={
            "font": {"family": "Inter, Helvetica Neue, Helvetica, Arial, sans-serif", "size": 13, "color": text},
            "paper_bgcolor": background,
            "plot_bgcolor": background,
            "xaxis": {**axis, "showgrid": False},
            "yaxis": axis,
            "title": {"font": {"size": 18}, "subtitle": {"font": {"size": 13}}},
            "shapedefaults": {"line": {"color": text}},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "colorway": [BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY],
        }
    )


TEMPLATES = {
    "light": _template("#333333", "#E6E6E6", "#FFFFFF"),
    "dark": _template("#DDDDDD", "#3A3A3A", "#161616"),
}


def count_of(n: int, noun: str) -> str:
    """``3 runs``, ``1 run``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def finish(figure: go.Figure, title: str, subtitle: str, *, height: int = 450, **layout: Any) -> go.Figure:
    """The look that all figures share: title and subtitle at the top left, a legend in one row under them."""
    corner = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    figure.update_layout(
        template=TEMPLATES["light"],
        title={"text": title, "subtitle": {"text": subtitle}, **corner, "pad": {"l": 16, "t": 16}},
        legend={**corner, "x": 0.012, "y": 1 - 66 / height, "orientation": "h", "itemsizing": "constant"},
        margin=MARGIN,
        height=height,
        hovermode="closest",
        showlegend=True,
    )
    return figure.update_layout(layout)


def as_text(words: object) -> str:
    """Words that are not ours, such as a run's name, for plotly, which reads some of HTML's tags."""
    return escape(str(words), quote=False)


def markup(symbol: str) -> str:
    """A symbol for plotly: ``_x`` as a subscript."""
    return re.sub(r"_(\w+)", r"<sub>\1</sub>", as_text(symbol))
