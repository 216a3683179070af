"""How features lie: cosines between them, and how much of a dimension each has (Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int

from svf_lightning.figures.axes import (
    Span,
    axes_of,
    colour_axis,
    draw_heading,
    draw_heat,
    draw_rule,
    place_panel,
    ticks_at,
)
from svf_lightning.figures.figure import figure
from svf_lightning.figures.groups import Groups, antipodal_order
from svf_lightning.figures.look import GREY, LEGEND_RIGHT, OTHERS, SHOWN, finish
from svf_lightning.figures.reading import read, read_last, require, require_finite, subtitle_of
from svf_lightning.sentences import Sentence, from_to

if TYPE_CHECKING:
    import xarray as xr


class Geometry(NamedTuple):
    """Cosines between the features of one instance, and dimensions per feature of all instances."""

    step: Int[np.ndarray, "step"]
    gram: Float[np.ndarray, "step feature feature_2"]  # signed cosines
    dimensionality: Float[np.ndarray, "instance feature"]  # at the last step; 1/2 in an antipodal pair
    groups: Groups  # features in the order of the rows
    instance: int
    subtitle: str


def prepare_fig_1a(dataset: xr.Dataset, *, instance: int = 0) -> Geometry:
    """The geometry at the last step, antipodal features side by side.

    Raises:
        InputError: The run lacks geometry or such an instance, or diverged.
    """
    require(dataset, "gram", "dimensionality", instance=instance)
    groups = Groups([], [], list(range(dataset.sizes["feature"])))
    more = f"cosines of instance {instance}, features beside their most negative cosine"
    return _prepare(dataset, [-1], groups, instance, subtitle_of(dataset, more, final=True))


def prepare_fig_1b(dataset: xr.Dataset, *, instance: int = 0) -> Geometry:
    """The geometry at the first and the last step: attended features, then the others in their antipodal order.

    Raises:
        InputError: The run lacks geometry, pairs, a second step or such an instance, or diverged.
    """
    require(dataset, "gram", "dimensionality", "query_feature", "key_feature", instance=instance, n_steps=2)
    subtitle = subtitle_of(dataset, f"cosines of instance {instance}, attended features in bold")
    return _prepare(dataset, [0, -1], Groups.of(dataset), instance, subtitle)


def _prepare(dataset: xr.Dataset, rows: Sequence[int], groups: Groups, instance: int, subtitle: str) -> Geometry:
    gram = [
        require_finite("gram", read(dataset, "gram", "feature", "feature_2", step=row, instance=instance))
        for row in rows
    ]
    return Geometry(
        step=dataset["step"].values[rows],
        gram=np.stack(gram),
        dimensionality=require_finite("dimensionality", read_last(dataset, "dimensionality")),
        groups=groups._replace(rest=antipodal_order(gram[-1], groups.rest)),
        instance=instance,
        subtitle=subtitle,
    )


def draw_fig_1a(data: Geometry, *, signed: bool = False) -> go.Figure:
    """Cosines (``signed``: with their sign, else their size), and dimensions per feature."""
    order = data.groups.order
    every = 1 if len(order) <= 24 else max(1, round(len(order) / 50) * 10)
    shown = range(0, len(order), every)
    ticks = ticks_at(shown, [str(order[i]) for i in shown], tickangle=0, tickfont={"size": 11})
    drawn, axis = go.Figure(), {"title": {"text": "feature"}, **ticks}
    _draw_gram(drawn, 1, ((0, 0.42), (0, 1)), data.gram[0], order, signed, x=axis, y=axis)
    _draw_dimensionality(drawn, 2, ((0.64, 1), (0, 1)), data)
    return finish(
        drawn,
        "Geometry of the features",
        data.subtitle,
        height=540,
        coloraxis=colour_axis(signed=signed, x=0.43, len=1.05),
        legend=LEGEND_RIGHT,
    )


def draw_fig_1b(data: Geometry, *, signed: bool = False) -> go.Figure:
    """Cosines (``signed``: with their sign, else their size) at both steps, and dimensions per feature.

    Lines part attended features from the rest.
    """
    drawn, top, groups = go.Figure(), 0.94, data.groups
    spans: list[Span] = [(0, 0.29), (0.35, 0.64), (0.81, 1)]
    for number, gram in enumerate(data.gram, start=1):
        x = {"title": {"text": "feature, ordered as the rows"}, **groups.columns()}
        y = {"title": {"text": "feature" if number == 1 else ""}, **groups.rows()}
        _draw_gram(drawn, number, (spans[number - 1], (0, top)), gram, groups.order, signed, x=x, y=y)
        for direction in ("x", "y") if groups.rest else ():
            line = {"color": GREY if signed else "#FFFFFF", "width": 1.5}
            draw_rule(drawn, number, direction, len(groups.attended) - 0.5, **line)
    _draw_dimensionality(drawn, 3, (spans[2], (0, top)), data)
    for span, step in zip(spans, data.step[[0, -1, -1]], strict=True):
        draw_heading(drawn, f"step {step:,}", span, top)
    return finish(
        drawn,
        "Geometry of the features with a head",
        data.subtitle,
        height=470,
        coloraxis=colour_axis(signed=signed, x=spans[1][1] + 0.005, y=top / 2, len=1),
        legend=LEGEND_RIGHT,
    )


def _draw_gram(
    drawn: go.Figure,
    number: int,
    domain: tuple[Span, Span],
    gram: np.ndarray,
    order: list[int],
    signed: bool,
    **axes: Any,
) -> None:
    """Panel: cosines between features."""
    cosines = gram[np.ix_(order, order)]
    shown = cosines if signed else np.abs(cosines)
    hover = "features {row} and {column}<br>cosine {value}"
    draw_heat(drawn, number, domain, shown, columns=order, rows=order, hover=hover, signed=cosines, **axes)


def _draw_dimensionality(drawn: go.Figure, number: int, domain: tuple[Span, Span], data: Geometry) -> None:
    """Panel: dimensions per feature, every instance."""
    values, n = data.dimensionality, data.dimensionality.shape[1]
    others = [i for i in range(len(values)) if i != data.instance and np.isfinite(values[i]).any()]
    if others:
        drawn.add_scatter(
            x=np.tile(np.arange(n), len(others)),
            y=values[others].ravel(),
            customdata=np.repeat(others, n),
            mode="markers",
            name="other instances",
            marker=OTHERS,
            hovertemplate="feature %{x}, instance %{customdata}: %{y:.3f}<extra></extra>",
            **axes_of(number),
        )
    if np.isfinite(values[data.instance]).any():
        drawn.add_scatter(
            x=np.arange(n),
            y=values[data.instance],
            mode="markers",
            name=f"instance {data.instance}",
            marker={**SHOWN, "size": 9 if n <= 40 else 5},
            hovertemplate="feature %{x}: %{y:.3f}<extra></extra>",
            **axes_of(number),
        )
    for level in (0.5, 1.0):
        draw_rule(drawn, number, "y", level, dash="dot", width=1)
    y = {"title": {"text": "dimensions per feature (1/2: as in an antipodal pair)"}, "showgrid": False}
    y["range"] = [-0.02, 1.05 * max(1.0, float(np.nanmax(values)))]
    place_panel(drawn, number, domain, {"title": {"text": "feature"}, "range": [-0.8, n - 0.2]}, y)


def _overlaps(data: Geometry) -> list[Sentence | None]:
    """How attended features lie to the others, at both steps."""
    attended, rest = data.groups.attended, data.groups.rest
    if not attended or not rest:
        return []
    means = np.abs(data.gram[:, attended][:, :, rest]).mean((1, 2))
    what = f"Mean |cosine| of attended and other features of instance {data.instance}"
    return [from_to(what, data.step, means, name="orthogonality/attended_vs_rest")]


fig_1a = figure(
    "fig_1a",
    prepare_fig_1a,
    draw_fig_1a,
    description="Cosines between features and dimensions per feature, without a head",
    paper="Fig. 1a",
    see="In antipodal pairs, each row has one bright cell beside its own, and each feature has half a dimension "
    "(right).",
    on_page=lambda dataset: "U" not in dataset,  # a run with a head has Fig. 1b
)
fig_1b = figure(
    "fig_1b",
    prepare_fig_1b,
    draw_fig_1b,
    description="Cosines between features and dimensions per feature with a head, at the first and the last step",
    paper="Fig. 1b",
    see="Attended features are the first rows and columns: dark where they are orthogonal to another feature. Right: "
    "which part of a dimension each feature has for itself.",
    says=_overlaps,
    compared=True,
    view="toy",
)
