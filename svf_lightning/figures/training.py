"""Every scalar quantity of a run over one axis of training steps, in panels by unit (Fig. 3 is one of them)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped

from svf_lightning.errors import InputError
from svf_lightning.figures.axes import Steps, axis_name
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import DASHES, MARGIN, PALETTE, finish, markup
from svf_lightning.figures.reading import (
    chance_of,
    for_plotly,
    mean_of_finite,
    range_of_finite,
    read_tokens,
    sizes_in_words,
)
from svf_lightning.quantities import Panel, Quantity, in_order
from svf_lightning.registry import known
from svf_lightning.rows import scalar_variables
from svf_lightning.run.changes import Change, changes_of
from svf_lightning.sentences import Sentence

if TYPE_CHECKING:
    import xarray as xr

_PLACES_EACH = 64  # thin lines of a quantity; more cannot be told apart
_POINTS_EACH = 150  # of a thin line
_FEW_LINES = 3  # thin lines are drawn in panels with at most this many quantities
_PANEL, _GAP = 140, 30  # pixels of a panel, and of the gap below it
_LEGEND_LINE = 29  # pixels; a panel is as tall as its legend
_MARGIN = {**MARGIN, "t": 85, "b": 95, "r": 310}  # legends are at the right


class OverTraining(NamedTuple):
    """Scalar quantities over training, each with its instances (or heads)."""

    step: Int[np.ndarray, "step"]
    tokens: Float[np.ndarray, "step"] | None  # seen in training until then; None: not known
    metric: Shaped[np.ndarray, "metric"]  # names
    mean: Float[np.ndarray, "metric step"]  # over instances or heads, of what is finite
    lowest: Float[np.ndarray, "metric step"]
    highest: Float[np.ndarray, "metric step"]
    change: Shaped[np.ndarray, "change"]  # names of the steps of change
    median_change: Float[np.ndarray, "change"]  # training steps, of the instances in which it happened; NaN: in none
    chance: Float[np.ndarray, "metric"]  # of random vectors; NaN: not known
    quantities: list[Quantity]
    values: list[np.ndarray]  # of each quantity [step, place]
    changes: list[Change]
    sizes: str


def prepare_training(dataset: xr.Dataset) -> OverTraining:
    """The quantities that have a panel of their own kind.

    Raises:
        InputError: The run holds none of them, or has a single step.
    """
    return _prepare(dataset, lambda quantity: quantity.panel is not None and quantity.logged != "no")


def prepare_further(dataset: xr.Dataset) -> OverTraining:
    """All other quantities, without details.

    Raises:
        InputError: The run holds none of them, or has a single step.
    """
    return _prepare(dataset, lambda quantity: quantity.panel is None and quantity.logged != "no")


def _prepare(dataset: xr.Dataset, shows: Callable[[Quantity], bool]) -> OverTraining:
    declared = known(dataset)
    scalars = scalar_variables(dataset)
    ordered = [*(name for name in declared if name in scalars), *(name for name in scalars if name not in declared)]
    quantities = [quantity for name in ordered if shows(quantity := declared.get(name) or Quantity(name))]
    if dataset.sizes["step"] < 2 or not quantities:
        raise InputError(
            "this figure needs quantities over two captured steps or more. Fix: pass the run directory of a `fit`, or "
            "of a `replay` of several checkpoints."
        )
    n_steps = dataset.sizes["step"]
    values = [np.asarray(scalars[q.name].values, dtype=float).reshape(n_steps, -1) for q in quantities]
    changes = [change for change in changes_of(dataset, {q.name: q for q in quantities}).values() if change.is_told]
    ranges = [range_of_finite(each) for each in values]
    return OverTraining(
        step=dataset["step"].values,
        tokens=read_tokens(dataset),
        metric=np.array([q.name for q in quantities]),
        mean=np.stack([mean_of_finite(each, 1) for each in values]),
        lowest=np.stack([low for low, _ in ranges]),
        highest=np.stack([high for _, high in ranges]),
        change=np.array([change.quantity.name for change in changes]),
        median_change=np.array([change.median for change in changes]),
        chance=np.array([chance_of(dataset, q.name) for q in quantities]),
        quantities=quantities,
        values=values,
        changes=changes,
        sizes=sizes_in_words(dataset),
    )


def draw_training(data: OverTraining) -> go.Figure:
    """One panel for each kind of quantity, all on one axis of steps, with one cursor and the steps of change."""
    drawn = _draw(data, [q.panel or _of_unit(q) for q in data.quantities], "Over training")
    moments, time = [], Steps(data.step, "log", data.tokens)
    for change in sorted(
        (change for change in data.changes if change.happened.any()), key=lambda change: change.median
    ):
        at, name = change.median, change.of.name
        colour = next(trace.line.color for trace in drawn.data if trace.legendgroup == name)
        place = time.at(at)
        ends = {"x0": place, "x1": place, "y0": 0, "y1": 1, "yref": "paper"}
        drawn.add_shape(type="line", **ends, line={"dash": "dot", "width": 1.5, "color": colour})
        moments.append(f"{_symbol(change)} {at:,.0f}" + ("" if change.happened.all() else f" {change.counted()}"))
    if moments:
        drawn.layout.title.subtitle.text += f"; dotted: median step of change ({', '.join(moments)})"
    for change in data.changes:
        if not change.happened.any():
            drawn.layout.title.subtitle.text += f"; {_symbol(change)} {change.counted()}"
    return drawn


def _symbol(change: Change) -> str:
    return markup(change.quantity.symbol or change.quantity.title)


def what_changed(data: OverTraining) -> list[Sentence]:
    """For every change: whether it happened, in how many instances, when, and between which values."""
    return [change.sentence() for change in data.changes]


def draw_further(data: OverTraining) -> go.Figure:
    """One panel for each unit."""
    return _draw(data, [_of_unit(q) for q in data.quantities], "Other quantities over training")


def _of_unit(quantity: Quantity) -> Panel:
    """The panel of quantities that are alike in their unit; plain numbers, in the first part of their names."""
    axis = quantity.unit or quantity.name.split("/")[0]
    return Panel(axis, axis, "")


def _draw(data: OverTraining, panel_of: Sequence[Panel], title: str) -> go.Figure:
    """The quantities, each in its panel, with a legend beside it.

    Panels share one x axis, as a cursor through all of them needs that.
    """
    panels = in_order(panel_of)
    drawn, time = go.Figure(), Steps(data.step, "log", data.tokens)
    layout: dict[str, Any] = {}
    lines_of = [[i for i, its_panel in enumerate(panel_of) if its_panel == panel] for panel in panels]
    heights = [max(_PANEL, _LEGEND_LINE * len(lines)) for lines in lines_of]
    height = sum(heights) + _GAP * (len(panels) - 1)
    below = height  # pixels of what is not placed yet
    for number, (panel, chosen) in enumerate(zip(panels, lines_of, strict=True)):
        colours = _colours([data.quantities[i] for i in chosen])
        y, legend = axis_name("y", number + 1), f"legend{number + 2}"
        top = below / height
        domain = [max(0.0, (below - heights[number]) / height), top]
        below -= heights[number] + _GAP
        value_axis = _value_axis(panel, [data.values[i] for i in chosen])
        layout[axis_name("y", number + 1, "axis")] = {"domain": domain, **value_axis}
        layout[legend] = {"x": 1.01, "xanchor": "left", "y": top, "yanchor": "top", "font": {"size": 12}}
        for k, (i, colour) in enumerate(zip(chosen, colours, strict=True)):
            quantity = data.quantities[i]
            _draw_chance(drawn, y, float(data.chance[i]), colour)
            if len(chosen) <= _FEW_LINES:
                _draw_thin_lines(drawn, time, data.values[i], colour, quantity.name, y)
            time.line(
                drawn, data.mean[i], colour, for_plotly(quantity).title, width=2.5, legendgroup=quantity.name, yaxis=y,
                legend=legend, connectgaps=True, line_dash=DASHES[colours[:k].count(colour) % len(DASHES)],
            )  # fmt: skip
    return finish(
        drawn,
        title,
        f"{data.sizes} · {_lines_in_words(data)}",
        height=height + _MARGIN["t"] + _MARGIN["b"],
        margin=_MARGIN,
        xaxis={
            **time.axis, "anchor": axis_name("y", len(panels)), "showspikes": True,
            "spikemode": "across", "spikesnap": "cursor", "spikethickness": 1, "spikedash": "dot",
        },
        hovermode="x",
        hoversubplots="axis",
        updatemenus=[_scale_buttons(time.axis, Steps(data.step, "linear", data.tokens).axis)],
        **layout,
    )  # fmt: skip


def _draw_chance(drawn: go.Figure, y: str, chance: float, colour: str) -> None:
    """A line at what random vectors give, in a panel that shares its axis of steps with all others."""
    if not math.isfinite(chance):
        return
    ends = {"x0": 0, "x1": 1, "xref": "x domain", "y0": chance, "y1": chance, "yref": y}
    drawn.add_shape(type="line", **ends, line={"dash": "dash", "width": 1.2, "color": colour}, layer="below")
    drawn.add_annotation(
        text=f"by chance: {chance:.2g}", x=0.002, y=chance, xref="x domain", yref=y, xanchor="left", yanchor="bottom",
        showarrow=False, font={"size": 11},
    )  # fmt: skip


def _lines_in_words(data: OverTraining) -> str:
    """What thick and thin lines are."""
    n_places = max(values.shape[1] for values in data.values)
    if n_places == 1:
        return "one value per step"
    return f"thick: mean; thin: {'each' if n_places <= _PLACES_EACH else f'{_PLACES_EACH} of them'}"


def _colours(quantities: Sequence[Quantity]) -> list[str]:
    """Each quantity's own colour; the others of a panel take turns with what is left of the palette."""
    given = {q.colour for q in quantities}
    left = cycle([name for name in PALETTE if name not in given] or PALETTE)
    return [PALETTE[q.colour or next(left)] for q in quantities]


def _value_axis(panel: Panel, values: Sequence[np.ndarray]) -> dict[str, Any]:
    scale = "log" if panel.log else "linear"
    axis: dict[str, Any] = {"title": {"text": markup(panel.axis)}, "type": scale, "exponentformat": "e"}
    flat = np.concatenate([each.ravel() for each in values])
    positive = flat[np.isfinite(flat) & (flat > 0)]
    if panel.log and positive.size and positive.max() > 20 * positive.min():
        axis["dtick"] = 1
    if panel.low is not None and panel.high is not None:
        axis["range"] = [panel.low, panel.high + 0.03 * (panel.high - panel.low)]
    return axis


def _scale_buttons(log_axis: dict[str, Any], linear_axis: dict[str, Any]) -> dict[str, Any]:
    """Buttons for the scale of the steps."""
    buttons = [
        {"label": label, "method": "relayout", "args": [{
            "xaxis.type": scale, "xaxis.tickmode": ticks, "xaxis.title.text": axis["title"]["text"],
            "xaxis.autorange": True,
        }]}
        for label, scale, ticks, axis in (
            ("log steps", "log", "array", log_axis), ("linear steps", "linear", "auto", linear_axis)
        )
    ]  # fmt: skip
    return {"type": "buttons", "buttons": buttons, "direction": "right", "x": 1, "y": 0, "pad": {"t": 45}}


def _draw_thin_lines(drawn: go.Figure, time: Steps, values: np.ndarray, colour: str, name: str, y: str) -> None:
    """Every instance (or head), as one trace with gaps."""
    if values.shape[1] < 2:
        return
    measured = time.kept[np.isfinite(values[time.kept]).any(1)]  # some quantities are not measured at every step
    rows = measured[:: max(1, len(measured) // _POINTS_EACH)]
    n = min(values.shape[1], _PLACES_EACH)
    x = np.tile([*time.x[rows], np.nan], n)
    y_values = np.concatenate([[*values[rows, i], np.nan] for i in range(n)])
    drawn.add_scatter(
        x=np.round(x, 3),
        y=[float(f"{value:.4g}") for value in y_values],
        mode="lines",
        line={"color": colour, "width": 0.8},
        opacity=0.3,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
        yaxis=y,
    )


training = figure(
    "training",
    prepare_training,
    draw_training,
    description="Main quantities over training",
    paper="",
    see="Panels share one axis of steps; pointing at a step shows its values.",
    says=what_changed,
    view="toy",
)
further = figure(
    "further",
    prepare_further,
    draw_further,
    description="Every other quantity over training",
    paper="",
    see="By unit. A click on a name in the legend hides its line, a double click all others.",
    logged=False,
)
