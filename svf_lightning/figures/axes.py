"""Axes and what is drawn on them: panels, heat maps, lines over training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.colors import hex_to_rgb  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import bad_value
from svf_lightning.figures.reading import mean_of_finite

XAxis = Literal["linear", "log"]
Span = tuple[float, float]

MAX_POINTS = 500  # points per line; more cannot be seen
_TOLD_CELLS = 40_000  # cells of a heat map that can be pointed at one by one: 200 features squared


def axis_name(letter: str, number: int, suffix: str = "") -> str:
    """Plotly's name of an axis: x, y2; with the suffix "axis": xaxis, yaxis2."""
    return f"{letter}{suffix}{number if number > 1 else ''}"


def axes_of(number: int) -> dict[str, str]:
    """The axes of a panel, for a trace."""
    return {"xaxis": axis_name("x", number), "yaxis": axis_name("y", number)}


def place_panel(
    figure: go.Figure, number: int, domain: tuple[Span, Span], x: dict[str, Any], y: dict[str, Any]
) -> None:
    """Axes x<number> and y<number> in their part of the figure."""
    for letter, other, span, settings in (("x", "y", domain[0], x), ("y", "x", domain[1], y)):
        place = {"domain": list(span), "anchor": axis_name(other, number)}
        figure.update_layout({axis_name(letter, number, "axis"): {**place, **settings}})


def draw_rule(figure: go.Figure, number: int, direction: str, at: float, **line: Any) -> None:
    """A line across a panel: "x" at a column, "y" at a row."""
    along = "y" if direction == "x" else "x"
    place: dict[str, Any] = {
        f"{direction}ref": axis_name(direction, number),
        f"{along}ref": f"{axis_name(along, number)} domain",
    }
    ends = {f"{direction}0": at, f"{direction}1": at, f"{along}0": 0, f"{along}1": 1}
    figure.add_shape(type="line", **place, **ends, line=line, layer="below" if "dash" in line else "above")


def draw_chance(figure: go.Figure, number: int, chance: float, colour: str, label: str = "by chance") -> None:
    """A line at what random vectors give, with its value; nothing where that is not known."""
    if not math.isfinite(chance):
        return
    draw_rule(figure, number, "y", chance, color=colour, width=1.2, dash="dash")
    place = {"xref": f"{axis_name('x', number)} domain", "yref": axis_name("y", number)}
    figure.add_annotation(
        text=f"{label}: {chance:.2g}", x=0.995, y=chance, xanchor="right", yanchor="bottom", showarrow=False,
        font={"size": 11}, **place,
    )  # fmt: skip


def draw_heading(figure: go.Figure, text: str, x: Span, y: float) -> None:
    """A short title centred above a panel."""
    place = {"xref": "paper", "yref": "paper", "xanchor": "center", "yanchor": "bottom", "yshift": 6}
    figure.add_annotation(text=text, x=sum(x) / 2, y=y, showarrow=False, font={"size": 14}, **place)


def draw_heat(
    figure: go.Figure,
    number: int,
    domain: tuple[Span, Span],
    values: np.ndarray,
    *,
    columns: Sequence[Any],
    rows: Sequence[Any],
    hover: str,
    x: dict[str, Any],
    y: dict[str, Any],
    signed: np.ndarray | None = None,
    numbers: bool = False,
    number_format: str = ".2f",
    coloraxis: str = "coloraxis",
) -> None:
    """A heat map of square cells, first row at the top. ``hover`` has {row}, {column} and {value} in it.

    ``numbers`` writes the value into each cell, as ``number_format`` says; ``signed`` are values to tell instead of
    those shown.
    """
    exact = values if signed is None else signed
    told: np.ndarray | None = exact
    texts = None
    if values.size > _TOLD_CELLS:
        told, told_as = None, "%{z:.3f}"
    elif all(isinstance(label, (int, np.integer)) for label in (*rows, *columns)):
        # numbers take a third of the room that a text for each cell would
        labels = np.meshgrid(np.asarray(rows), np.asarray(columns), indexing="ij")
        told = np.stack([*labels, exact], axis=-1)
        told_as = hover.format(row="%{customdata[0]}", column="%{customdata[1]}", value="%{customdata[2]:.3f}")
    else:
        told_as = "%{text}%{customdata:.3f}"
        texts = [[hover.format(row=row, column=column, value="") for column in columns] for row in rows]
    figure.add_heatmap(
        z=values.astype(np.float32),
        x=list(range(values.shape[1])),
        y=list(range(values.shape[0])),
        customdata=None if told is None else told.astype(np.float32),
        text=texts,
        hovertemplate=f"{told_as}<extra></extra>",
        coloraxis=coloraxis,
        **({"texttemplate": f"%{{z:{number_format}}}"} if numbers else {}),
        **axes_of(number),
    )
    square = {"showgrid": False, "showline": False, "constrain": "domain"}
    x = {**square, "range": [-0.5, values.shape[1] - 0.5], **x}
    anchored = {"scaleanchor": axis_name("x", number), "constraintoward": "top"}
    place_panel(figure, number, domain, x, {**square, **anchored, "range": [values.shape[0] - 0.5, -0.5], **y})


def ticks_at(at: Sequence[float], text: Sequence[str], **options: Any) -> dict[str, Any]:
    """Settings of an axis with the given labels and no tick marks."""
    return {"tickvals": list(at), "ticktext": list(text), "ticks": "", **options}


def index_ticks(n: int) -> dict[str, Any]:
    """Singular indices, from 1."""
    every = next(every for every, most in ((1, 12), (5, 30), (10, 80), (20, 160), (50, n)) if n <= most)
    shown = sorted({0, *range(every - 1, n, every)})
    return ticks_at(shown, [str(i + 1) for i in shown], tickangle=0)


def colour_bar(title: str, **options: Any) -> dict[str, Any]:
    """A slim colour bar."""
    named = {"title": {"text": title, "side": "right", "font": {"size": 13}}, "tickfont": {"size": 12}}
    return {**named, "thickness": 12, "outlinewidth": 0, "ticks": "outside", **options}


def colour_axis(title: str = "|cosine|", *, signed: bool = False, **bar: Any) -> dict[str, Any]:
    """Colours from 0 to 1, or from -1 to 1 if signed, and their bar."""
    scale = {"colorscale": "RdBu_r", "cmin": -1} if signed else {"colorscale": "Cividis", "cmin": 0}
    bar = {"dtick": 1, **bar} if signed else bar
    return {**scale, "cmax": 1, "colorbar": colour_bar("cosine" if signed else title, **bar)}


def in_tokens(n: float) -> str:
    """A number of tokens to three digits, with the letters of the names of checkpoints: 4.19B."""
    size, letter = next(((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if n >= s), (1, ""))
    return f"{n / size:.3g}{letter}"


class _Time(NamedTuple):
    """What an axis of training counts, and how its numbers are written."""

    title: str
    ticks: dict[str, Any]  # format of what plotly writes
    tick: Callable[[float], str]


_IN_STEPS = _Time("training step", {"tickformat": ",d"}, lambda step: f"{step:,.0f}")
_IN_TOKENS = _Time("tokens seen in training", {"exponentformat": "B"}, in_tokens)


def step_axis(steps: np.ndarray, x_axis: XAxis, tokens: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Positions of steps, and their axis. On a log axis, step 0 stands half a decade before the first other one.

    Args:
        steps: Ascending training steps.
        x_axis: Its scale.
        tokens: Seen at each of these steps; the axis counts them then.

    Raises:
        InputError: There is no such scale.
    """
    if x_axis not in ("linear", "log"):
        raise bad_value("x_axis", x_axis, "linear or log", "choose one of them")
    time = _IN_STEPS if tokens is None else _IN_TOKENS
    counted = (steps if tokens is None else tokens).astype(float)
    if x_axis == "linear":
        return counted, {"title": {"text": time.title}, "range": [counted[0], counted[-1]], **time.ticks}
    positive = counted[counted > 0]
    zero = float(positive[0]) / math.sqrt(10)
    x = np.where(counted > 0, counted, zero)
    ticks = {
        **({zero: "0"} if (counted <= 0).any() else {}),
        **{d: time.tick(d) for d in _round_ones(*positive[[0, -1]])},
    }
    limits = [math.log10(x[0]), math.log10(x[-1])]
    named = {"title": {"text": f"{time.title} (log scale)"}, "tickvals": list(ticks), "ticktext": list(ticks.values())}
    return x, {"type": "log", "range": limits, **named}


def _round_ones(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers; where these are less than two, 1, 2 and 5 times them, or else the two."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        found = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
        if len(found) > 1:
            return found
    return sorted({low, high})


def thinned(steps: np.ndarray, x_axis: XAxis) -> np.ndarray:
    """Indices of at most MAX_POINTS rows, evenly spread over the step axis; the first and the last are among them."""
    if len(steps) <= MAX_POINTS:
        return np.arange(len(steps))
    if x_axis == "log":
        wanted = np.geomspace(1, steps[-1] - steps[0] + 1, MAX_POINTS) + steps[0] - 1
    else:
        wanted = np.linspace(steps[0], steps[-1], MAX_POINTS)
    return np.unique(np.searchsorted(steps, np.round(wanted).astype(steps.dtype)).clip(0, len(steps) - 1))


class Steps:
    """The step axis of a figure, in steps or in the tokens seen until then, and lines along it."""

    def __init__(self, steps: np.ndarray, x_axis: XAxis, tokens: np.ndarray | None = None) -> None:
        self.steps, self.tokens = steps, tokens
        self.x, self.axis = step_axis(steps, x_axis, tokens)
        self.kept = thinned(steps, x_axis)

    def line(self, figure: go.Figure, y: np.ndarray, colour: str, name: str, *, width: float, **options: Any) -> bool:
        """Draw the kept points of one line, unless none of them is a number."""
        y = y[self.kept]
        if not np.isfinite(y).any():
            return False
        seen = "" if self.tokens is None else " (%{text} tokens)"
        template = f"{options.pop('hover', name)}<br>step %{{customdata:,}}{seen}: %{{y:.3f}}<extra></extra>"
        line = {"color": colour, "width": width}
        points: dict[str, Any] = {"x": self.x[self.kept], "y": y, "customdata": self.steps[self.kept]}
        if self.tokens is not None:
            points["text"] = [in_tokens(n) for n in self.tokens[self.kept]]
        figure.add_scatter(**points, mode="lines", name=name, line=line, hovertemplate=template, **options)
        return True

    def at(self, step: float) -> float:
        """Where a step lies that need not be one of these."""
        return float(np.interp(step, self.steps, self.x))

    def lines(
        self, figure: go.Figure, values: np.ndarray, colour: str, name: str, *, mean: str = "", **options: Any
    ) -> None:
        """Draw thin lines, one per instance if there are several, and a thick one for their mean.

        Args:
            figure: Where to draw.
            values: Values [step, instance], at all steps.
            colour: Colour of the lines.
            name: What the values are; lines of one name can be hidden together.
            mean: Name of the thick line in the legend; empty for ``name``.
            options: Of the traces, such as their axes.
        """
        options = {"legendgroup": name, **options}
        for i in range(values.shape[1]) if values.shape[1] > 1 else ():
            thin = {"width": 1, "opacity": 0.35, "showlegend": False}
            self.line(figure, values[:, i], colour, f"{name}, instance {i}", **thin, **options)
        self.line(figure, mean_of_finite(values, 1), colour, mean or name, width=2.5, **options)

    def band(self, figure: go.Figure, low: np.ndarray, high: np.ndarray, colour: str, **options: Any) -> None:
        """Fill what lies between two lines; a gap where one of them is no number."""
        draw_band(figure, self.x[self.kept], low[self.kept], high[self.kept], colour, **options)


def draw_band(figure: go.Figure, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, **options: Any) -> None:
    """Fill what lies between two lines; a gap where one of them is no number."""
    known = np.isfinite(low) & np.isfinite(high)
    outline: list[tuple[float, float]] = []  # for every part without a gap: to the right along low, back along high
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if known[part].all():
            back = part[::-1]
            outline += [*zip(x[part], low[part], strict=True), *zip(x[back], high[back], strict=True), (np.nan, np.nan)]
    figure.add_scatter(
        x=[at for at, _ in outline],
        y=[value for _, value in outline],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba{(*hex_to_rgb(colour), 0.2)}",
        line={"width": 0},
        showlegend=False,
        hoverinfo="skip",
        **options,
    )
