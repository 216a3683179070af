"""The figures of the paper, drawn from a trajectory: one function per figure, from a Dataset to a plotly Figure.

``python -m svf_lightning.report.figures RUN_DIR FOLDER`` writes every figure that the run has the data for as a PNG;
``--across FOLDER_OF_RUNS OUT.png`` compares runs that differ in a size.

Every function takes the dataset of :func:`svf_lightning.trajectory.open_trajectory` and raises InputError where it
lacks what the figure shows. ``instance`` says whose matrices to draw, ``x_axis`` is the scale of the training steps;
``signed`` shows cosines with their sign instead of their size. Features count from 0 as in templates, singular vectors
from 1 as in the paper.

Colours of text, grid and background live in :data:`TEMPLATES` alone, so ``figure.update_layout(template=...)`` changes
them. Lines have Okabe-Ito colours, cosines a perceptually uniform scale; cells of heat maps are squares.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
import torch
from plotly.colors import sample_colorscale  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value, closest
from svf_lightning.metrics import time_of_change
from svf_lightning.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    LEGEND_RIGHT,
    LINE_SCALE,
    MARGIN,
    MAX_POINTS,
    OTHERS,
    SHOWN,
    SIGMA,
    TEMPLATES,
    TIMES,
    VERMILLION,
    Entry,
    Groups,
    Span,
    Steps,
    XAxis,
    antipodal_order,
    as_text,
    axes_of,
    axis_name,
    can_provide,
    colour_axis,
    colour_bar,
    count_of,
    draw_heading,
    draw_heat,
    draw_rule,
    final_values,
    finish,
    index_ticks,
    mean_of_finite,
    pair_features,
    place_panel,
    read,
    read_last,
    require,
    require_finite,
    require_one_per_instance,
    save_png,
    subtitle_of,
    target_logits,
    ticks_at,
    value_axis,
)
from svf_lightning.report.replay_figures import REPLAY_FIGURES
from svf_lightning.trajectory import FILE_NAME, open_trajectory

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "ALL_FIGURES",
    "FIGURES",
    "MAX_POINTS",
    "TEMPLATES",
    "Entry",
    "across_runs",
    "against",
    "alignment_over_time",
    "by_offset",
    "cone_over_time",
    "fig_1a",
    "fig_1b",
    "fig_2a",
    "fig_2b",
    "fig_3",
    "fig_4",
    "head_shares",
    "main",
    "pair_map",
    "save_png",
    "spectrum_over_time",
]

# ---------------------------------------------------------------------------------------------- Figure 1


def _dimensionality(
    figure: go.Figure, number: int, dataset: xr.Dataset, instance: int, domain: tuple[Span, Span]
) -> None:
    """Panel: dimensions per feature at the last step, every instance."""
    values = require_finite("dimensionality", read_last(dataset, "dimensionality"))
    n = values.shape[1]
    others = [i for i in range(len(values)) if i != instance and np.isfinite(values[i]).any()]
    if others:
        figure.add_scatter(
            x=np.tile(np.arange(n), len(others)),
            y=values[others].ravel(),
            customdata=np.repeat(others, n),
            mode="markers",
            name="other instances",
            marker=OTHERS,
            hovertemplate="feature %{x}, instance %{customdata}: %{y:.3f}<extra></extra>",
            **axes_of(number),
        )
    if np.isfinite(values[instance]).any():
        figure.add_scatter(
            x=np.arange(n),
            y=values[instance],
            mode="markers",
            name=f"instance {instance}",
            marker={**SHOWN, "size": 9 if n <= 40 else 5},
            hovertemplate="feature %{x}: %{y:.3f}<extra></extra>",
            **axes_of(number),
        )
    for level in (0.5, 1.0):
        draw_rule(figure, number, "y", level, dash="dot", width=1)
    y = {"title": {"text": "dimensions per feature (1/2: antipodal pair)"}, "showgrid": False}
    y["range"] = [-0.02, 1.05 * max(1.0, float(np.nanmax(values)))]
    place_panel(figure, number, domain, {"title": {"text": "feature"}, "range": [-0.8, n - 0.2]}, y)


def _gram(
    figure: go.Figure,
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
    draw_heat(figure, number, domain, shown, columns=order, rows=order, hover=hover, signed=cosines, **axes)


def fig_1a(dataset: xr.Dataset, *, instance: int = 0, signed: bool = False) -> go.Figure:
    """Fig. 1a: how features lie without a head. Cosines at the last step, and dimensions per feature."""
    require(dataset, "gram", "dimensionality", instance=instance)
    gram = require_finite("gram", read(dataset, "gram", "feature", "feature_2", step=-1, instance=instance))
    order = antipodal_order(gram, range(len(gram)))
    every = 1 if len(order) <= 24 else max(1, round(len(order) / 50) * 10)
    shown = range(0, len(order), every)
    ticks = ticks_at(shown, [str(order[i]) for i in shown], tickangle=0, tickfont={"size": 11})
    figure, axis = go.Figure(), {"title": {"text": "feature"}, **ticks}
    _gram(figure, 1, ((0, 0.42), (0, 1)), gram, order, signed, x=axis, y=axis)
    _dimensionality(figure, 2, dataset, instance, ((0.64, 1), (0, 1)))
    more = f"cosines of instance {instance}, antipodal features side by side"
    return finish(
        figure,
        "Geometry of the features",
        subtitle_of(dataset, more, final=True),
        height=540,
        coloraxis=colour_axis(signed=signed, x=0.43, len=1.05),
        legend=LEGEND_RIGHT,
    )


def fig_1b(dataset: xr.Dataset, *, instance: int = 0, signed: bool = False) -> go.Figure:
    """Fig. 1b: how features lie with a head. Cosines at the first and the last step, and dimensions per feature.

    Attended features come first; lines part them from the rest, which is in the antipodal order of the last step.
    """
    require(dataset, "gram", "dimensionality", "query_feature", "key_feature", instance=instance, n_steps=2)
    grams = [
        require_finite("gram", read(dataset, "gram", "feature", "feature_2", step=step, instance=instance))
        for step in (0, -1)
    ]
    groups = Groups.of(dataset)
    groups = groups._replace(rest=antipodal_order(grams[-1], groups.rest))
    figure, top, between = go.Figure(), 0.94, GREY if signed else "#FFFFFF"
    spans: list[Span] = [(0, 0.29), (0.35, 0.64), (0.81, 1)]
    steps = [int(dataset["step"].values[i]) for i in (0, -1, -1)]
    for number, gram in enumerate(grams, start=1):
        x = {"title": {"text": "feature, ordered as the rows"}, **groups.columns()}
        y = {"title": {"text": "feature" if number == 1 else ""}, **groups.rows()}
        _gram(figure, number, (spans[number - 1], (0, top)), gram, groups.order, signed, x=x, y=y)
        if groups.rest:
            for direction in ("x", "y"):
                draw_rule(figure, number, direction, len(groups.attended) - 0.5, color=between, width=1.5)
    _dimensionality(figure, 3, dataset, instance, (spans[2], (0, top)))
    for span, step in zip(spans, steps, strict=True):
        draw_heading(figure, f"step {step:,}", span, top)
    return finish(
        figure,
        "Geometry of the features with a head",
        subtitle_of(dataset, f"cosines of instance {instance}, attended features in bold"),
        height=470,
        coloraxis=colour_axis(signed=signed, x=spans[1][1] + 0.005, y=top / 2, len=1),
        legend=LEGEND_RIGHT,
    )


# ---------------------------------------------------------------------------------------------- Figure 2

_FIG_2 = ("cosine_left", "cosine_right", "query_feature", "key_feature")


def _cosine_panels(figure: go.Figure, dataset: xr.Dataset, instance: int, spans: Sequence[Span], height: Span) -> None:
    """Two panels: features against left and right singular vectors, at the last step."""
    groups = Groups.of(dataset)
    ends = [len(groups.query), len(groups.attended)]
    for number, (side, letter) in enumerate((("left", "u"), ("right", "v")), start=1):
        name = f"cosine_{side}"
        values = require_finite(name, read(dataset, name, "feature", "rank", step=-1, instance=instance))[groups.order]
        n = values.shape[1]
        x = {"title": {"text": f"{side}{' singular vector' * (n >= 8)} {letter}<sub>k</sub>"}, **index_ticks(n)}
        y = {"title": {"text": "feature" if number == 1 else ""}, **groups.rows(), "showticklabels": number == 1}
        hover = f"feature {{row}}, {letter}<sub>{{column}}</sub><br>|cosine| {{value}}"
        columns = range(1, n + 1)
        draw_heat(
            figure,
            number,
            (spans[number - 1], height),
            values,
            columns=columns,
            rows=groups.order,
            hover=hover,
            x=x,
            y=y,
        )
        for end in dict.fromkeys(end for end in ends if 0 < end < len(groups.order)):
            draw_rule(figure, number, "y", end - 0.5, color="#FFFFFF", width=1.5)


def fig_2a(dataset: xr.Dataset, *, instance: int = 0) -> go.Figure:
    """Fig. 2a: every feature against every singular vector at the last step, singular values above."""
    require(dataset, *_FIG_2, "singular_values", instance=instance)
    sigma = require_finite("singular_values", read_last(dataset, "singular_values")[instance])
    figure = go.Figure()
    _cosine_panels(figure, dataset, instance, [(0, 0.49), (0.51, 1)], (0, 0.8))
    figure.update_layout(xaxis_constraintoward="right", xaxis2_constraintoward="left")
    for number in (1, 2):
        figure.add_bar(
            x=np.arange(len(sigma)),
            y=sigma,
            customdata=np.arange(1, len(sigma) + 1),
            marker={"color": GREY},
            width=0.7,
            showlegend=False,
            hovertemplate="singular value %{customdata}: %{y:.3f}<extra></extra>",
            xaxis=axis_name("x", number),
            yaxis=axis_name("y", number + 2),
        )
        title = {"text": f"{SIGMA}<sub>k</sub> (nats)" if number == 1 else ""}
        place = {"domain": [0.84, 1], "anchor": axis_name("x", number), "rangemode": "tozero", "nticks": 4}
        figure.update_layout(
            {axis_name("y", number + 2, "axis"): {**place, "title": title, "showticklabels": number == 1}}
        )
    bar: dict[str, Any] = {
        "orientation": "h",
        "x": 0.5,
        "xanchor": "center",
        "y": 0,
        "yref": "container",
        "yanchor": "bottom",
    }
    return finish(
        figure,
        "Features and singular vectors",
        subtitle_of(dataset, instance=instance, final=True),
        height=760,
        width=700,
        coloraxis=colour_axis(**bar, len=0.5),
        margin={**MARGIN, "t": 90, "b": 120},
    )


def fig_2b(dataset: xr.Dataset, *, instance: int = 0) -> go.Figure:
    """Fig. 2b: the same for many pairs, features in their order, and matched singular values against target logits."""
    require(dataset, *_FIG_2, "pair/sigma", "pair/index", "target_logit", instance=instance)
    index, target = read_last(dataset, "pair/index"), target_logits(dataset)
    sigma = require_finite(
        "pair/sigma", np.where(index >= 0, read_last(dataset, "pair/sigma"), np.nan)
    )  # no sigma if unmatched
    figure, spans = go.Figure(), [(0.0, 0.27), (0.29, 0.56), (0.74, 1.0)]
    _cosine_panels(figure, dataset, instance, spans, (0, 1))
    named = False
    for i in [*(i for i in range(len(sigma)) if i != instance), instance]:
        if not np.isfinite(sigma[i]).any():
            continue
        own = i == instance
        figure.add_scatter(
            x=target[i],
            y=sigma[i],
            customdata=index[i] + 1,
            mode="markers",
            name=f"instance {i}" if own else "other instances",
            legendgroup=str(own),
            showlegend=own or not named,
            marker=SHOWN if own else OTHERS,
            hovertemplate=f"instance {i}, T = %{{x:.3g}}: singular value %{{customdata}} = %{{y:.3f}}<extra></extra>",
            **axes_of(3),
        )
        named = True
    top = float(max(np.nanmax(sigma), np.nanmax(target)))
    line = {"dash": "dot", "width": 1}
    figure.add_shape(type="line", xref="x3", yref="y3", x0=0, y0=0, x1=top, y1=top, line=line, layer="below")
    place = {"xref": "x3", "yref": "y3", "x": top, "y": top, "xanchor": "right", "yanchor": "bottom", "xshift": -6}
    figure.add_annotation(text=f"{SIGMA} = T", showarrow=False, **place)
    limits = [-0.02 * top, 1.08 * top]
    x = {"title": {"text": "target logit T (nats)"}, "range": limits}
    y = {"title": {"text": f"matched singular value {SIGMA} (nats)"}, "range": limits}
    place_panel(figure, 3, (spans[2], (0.3, 1)), x, y)
    return finish(
        figure,
        "Features and singular vectors, many pairs",
        subtitle_of(dataset, f"{count_of(target.shape[1], 'pair')}, cosines of instance {instance}", final=True),
        height=640,
        coloraxis=colour_axis(x=0.57, len=0.5),
        legend=LEGEND_RIGHT,
    )


# ---------------------------------------------------------------------------------------------- Figure 3

_DYNAMICS = (
    ("alignment/matched", BLUE, "alignment of singular vectors", "t<sub>align</sub>"),
    ("orthogonality/attended_vs_rest", VERMILLION, "attended against other features", "t<sub>ortho</sub>"),
)


def fig_3(dataset: xr.Dataset, *, x_axis: XAxis = "linear") -> go.Figure:
    """Fig. 3: alignment and orthogonality over training, and when each has covered 90 % of its way.

    Thin lines and dots are instances, thick lines their mean; a vertical line is the median time of change
    (:func:`svf_lightning.metrics.time_of_change`).
    """
    require(dataset, *(name for name, *_ in _DYNAMICS), n_steps=2)
    figure, time = go.Figure(), Steps(dataset, x_axis)
    for name, colour, text, symbol in _DYNAMICS:
        values = require_finite(name, read(dataset, name, "step", "instance"))
        if values.shape[1] > 1:
            thin: dict[str, Any] = {"width": 1, "opacity": 0.35, "legendgroup": name, "showlegend": False}
            for i in range(values.shape[1]):
                time.line(figure, values[:, i], colour, f"{text}, instance {i}", **thin)
        times = time_of_change(torch.from_numpy(values), torch.from_numpy(time.steps)).numpy()
        changed = np.flatnonzero(np.isfinite(times))
        median = float(np.median(times[changed])) if len(changed) else math.nan
        mean = mean_of_finite(values, 1)
        label = f"{text}, {symbol} = {median:,.0f}" if len(changed) else text
        time.line(figure, mean, colour, label, width=2.5, legendgroup=name)
        if len(changed):
            rows = np.searchsorted(time.steps, times[changed])
            figure.add_scatter(
                x=time.x[rows],
                y=values[rows, changed],
                customdata=times[changed],
                mode="markers",
                name=symbol,
                legendgroup=name,
                showlegend=False,
                marker={"color": colour, "size": 7, "line": {"color": "#FFFFFF", "width": 1}},
                hovertemplate=f"{symbol} = %{{customdata:,}}<extra></extra>",
            )
            draw_rule(figure, 1, "x", float(np.interp(median, time.steps, time.x)), color=colour, width=1, dash="dot")
    return finish(
        figure,
        "When singular vectors align, and when features turn orthogonal",
        subtitle_of(dataset, "dots: 90 % of the way, per instance; dotted: their median"),
        xaxis=time.axis,
        yaxis={"title": {"text": "|cosine|"}, "range": [0, 1.03]},
    )


# ---------------------------------------------------------------------------------------------- Figure 4


def fig_4(dataset: xr.Dataset) -> go.Figure:
    """Fig. 4: alignment against the anisotropy of the features, as trained and as Theorem 1 predicts.

    Theorem 1's cosine (``theory/predicted_cosine``), that of trained and predicted vectors (mean of ``theory/left`` and
    ``theory/right``) and the bound on the former (``theory/bound``) are drawn if the run has them.
    """
    x_name = "orthogonality/interference"
    require(dataset, "alignment/matched", x_name)
    x = require_finite(x_name, read_last(dataset, x_name))
    series = (
        (("alignment/matched",), "trained vector and feature", BLUE, "circle"),
        (("theory/predicted_cosine",), "Theorem 1's vector and feature, mean of all features", VERMILLION, "x-thin"),
        (("theory/left", "theory/right"), "trained and Theorem 1's vector", GREEN, "diamond-open"),
        (("theory/bound",), "lower bound (Theorem 2)", GREY, "line-ew"),
    )
    require_finite("alignment/matched", read_last(dataset, "alignment/matched"))
    figure = go.Figure()
    for names, label, colour, symbol in series:
        if any(name not in dataset for name in names):
            continue
        y = np.mean([read_last(dataset, name) for name in names], axis=0)
        if np.isfinite(y).any():
            figure.add_scatter(
                x=x,
                y=y,
                customdata=np.arange(len(x)),
                mode="markers",
                name=label,
                marker={"color": colour, "symbol": symbol, "size": 9, "line": {"color": colour, "width": 2}},
                cliponaxis=False,
                hovertemplate=f"{label}<br>instance %{{customdata}}: |cosine| %{{y:.3f}}<extra></extra>",
            )
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    pad = max(0.05 * (high - low), 0.02 * high, 1e-3)
    return finish(
        figure,
        "Alignment and anisotropy of the features",
        subtitle_of(dataset, "one point per instance", final=True),
        xaxis={"title": {"text": LABELS[x_name]}, "range": [max(0, low - pad), high + pad]},
        yaxis={"title": {"text": "|cosine|"}, "range": [0, 1.03]},
    )


# ---------------------------------------------------------------------------------------------- appendix


def against(
    dataset: xr.Dataset, x: str = "lambda_attn", y: str | Sequence[str] = "alignment/matched", *, title: str = ""
) -> go.Figure:
    """Final metrics against something that differs between instances: every instance, and the mean at each value.

    Args:
        dataset: As for every figure.
        x: A coordinate with one value per instance, such as lambda_attn, or a metric. Its axis is logarithmic where
            it is positive and spans more than a decade. The mean is drawn for a coordinate alone.
        y: Name of a metric, or several of the same unit.
        title: Title; empty for one made of the names.

    Raises:
        InputError: The run lacks a quantity, it has not one value per instance, or x is the same in all instances.
    """
    names = [y] if isinstance(y, str) else list(y)
    known = [str(name) for name in (*dataset.coords, *dataset.data_vars) if "instance" in dataset[name].dims]
    for name in (x, *names):
        if name not in dataset and not can_provide(name):
            raise InputError(f"the run holds no {name!r}; {closest(name, known)} Fix: one of {', '.join(known)}.")
        require_one_per_instance(dataset, name)
    swept = "step" not in dataset[x].dims
    at = require_finite(x, read(dataset, x, "instance") if swept else read_last(dataset, x))
    ticks = np.unique(at[np.isfinite(at)])
    if swept and len(ticks) == 1:
        fix = "give one to each: --model.lambda_attn='[1,3,10]'"
        raise bad_value(x, float(ticks[0]), "values that differ between instances", fix)
    points = {name: (at, read_last(dataset, name)) for name in names}
    hover = [f"instance {i}, at {value:.4g}" for i, value in enumerate(at)]
    figure, y_axis = final_values(points, hover, means=swept)
    return finish(
        figure,
        title or f"{', '.join(names)} against {x}",
        subtitle_of(dataset, "dots: instances; line: their mean" if swept else "one dot per instance", final=True),
        xaxis={"title": {"text": LABELS.get(x, x)}, **value_axis(ticks, named=swept)},
        yaxis=y_axis,
    )


def spectrum_over_time(dataset: xr.Dataset, *, instance: int = 0, x_axis: XAxis = "linear") -> go.Figure:
    """Singular values of one instance over training; those that target pairs are matched with at the end stand out."""
    require(dataset, "singular_values", instance=instance, n_steps=2)
    values = require_finite("singular_values", read(dataset, "singular_values", "step", "rank", instance=instance))
    figure, time = go.Figure(), Steps(dataset, x_axis)
    index = read_last(dataset, "pair/index")[instance].tolist() if "pair/index" in dataset else []
    unnamed = {True, False}
    for k in sorted(range(values.shape[1]), key=lambda k: k in index):
        own = k in index
        name, colour = ("of a target pair", BLUE) if own else ("other singular values", GREY)
        look: dict[str, Any] = {
            "width": 1.5,
            "legendgroup": name,
            "showlegend": own in unnamed,
            "hover": f"singular value {k + 1}",
        }
        if time.line(figure, values[:, k], colour, name, **look):
            unnamed.discard(own)
    if index and "target_logit" in dataset:
        target = target_logits(dataset)[instance]
        figure.add_scatter(
            x=np.full(len(target), time.x[-1]),
            y=target,
            mode="markers",
            name="target logit",
            marker={"color": VERMILLION, "symbol": "triangle-left", "size": 8},
            cliponaxis=False,
            hovertemplate="target logit %{y:.3g}<extra></extra>",
        )
    return finish(
        figure,
        "Singular values over training",
        subtitle_of(dataset, instance=instance),
        xaxis=time.axis,
        yaxis={"title": {"text": f"singular value {SIGMA}<sub>k</sub> (nats)"}, "rangemode": "tozero"},
    )


def alignment_over_time(dataset: xr.Dataset, *, instance: int = 0, x_axis: XAxis = "linear") -> go.Figure:
    """Matched cosine of every target pair of one instance over training: the mean of its left and right cosine."""
    names = ("pair/left", "pair/right", "target_logit", "query_feature", "key_feature")
    require(dataset, *names, instance=instance, n_steps=2)
    sides = [read(dataset, name, "step", "pair", instance=instance) for name in names[:2]]
    values = (sides[0] + sides[1]) / 2
    if "pair/index" in dataset:  # a pair that found no vector left has no cosine
        values = np.where(read(dataset, "pair/index", "step", "pair", instance=instance) >= 0, values, np.nan)
    require_finite("pair/left", values)
    target, pairs = target_logits(dataset)[instance], list(zip(*pair_features(dataset), strict=True))
    low, high = float(target.min()), float(target.max())
    spread = high - low or 1.0
    figure, time = go.Figure(), Steps(dataset, x_axis)
    for i, (query, key) in reversed(list(enumerate(pairs))):  # the first, often the strongest, on top
        colour = sample_colorscale(LINE_SCALE, [(float(target[i]) - low) / spread])[0]
        time.line(figure, values[:, i], colour, f"query {query}, key {key}", width=1.5, showlegend=False)
    if np.isfinite(values[-1]).any():
        figure.add_scatter(
            x=np.full(len(pairs), time.x[-1]),
            y=values[-1],
            text=[f"query {query}, key {key}, T = {t:.3g}" for (query, key), t in zip(pairs, target, strict=True)],
            mode="markers",
            name="last step",
            showlegend=False,
            marker={"color": target, "coloraxis": "coloraxis", "size": 7},
            cliponaxis=False,
            hovertemplate="%{text}<br>last step: %{y:.3f}<extra></extra>",
        )
    scale = {"colorscale": LINE_SCALE, "cmin": low, "cmax": low + spread, "showscale": high > low}
    return finish(
        figure,
        "Alignment of every pair over training",
        subtitle_of(dataset, count_of(len(pairs), "pair"), instance=instance),
        xaxis=time.axis,
        yaxis={"title": {"text": "matched |cosine|, mean of left and right"}, "range": [0, 1.03]},
        coloraxis={**scale, "colorbar": colour_bar("target logit (nats)")},
        margin={**MARGIN, "t": 90},
    )


def pair_map(dataset: xr.Dataset, *, instance: int = 0) -> go.Figure:
    """Which pairs share a singular vector: left times right cosine of every pair with every singular index.

    For a head with fewer dimensions than pairs. A circle is the index that a pair was matched with, one to one; a pair
    without a circle found none left.
    """
    require(dataset, *_FIG_2, "pair/index", "target_logit", instance=instance)
    query, key = pair_features(dataset)
    left, right = (
        read(dataset, name, "feature", "rank", step=-1, instance=instance) for name in ("cosine_left", "cosine_right")
    )
    values = require_finite("cosine_left", left[query] * right[key])
    target = target_logits(dataset)[instance]
    n_pairs, n_singular = values.shape
    cell = min(36.0, 780 / n_singular, max(560 / n_pairs, 4))  # pixels
    tall, width = max(round(cell * n_pairs), 150), max(560, round(220 + cell * n_singular))
    end = min(1.0, cell * n_singular / (width - 220))
    labels = [f"{i} → {j}" for i, j in zip(query, key, strict=True)]
    shown = range(0, n_pairs, math.ceil(14 / cell))
    figure = go.Figure()
    draw_heat(
        figure,
        1,
        ((0, end), (0, 1)),
        values,
        columns=range(1, n_singular + 1),
        rows=labels,
        hover=f"pair {{row}}, index {{column}}<br>left {TIMES} right |cosine| {{value}}",
        x={"title": {"text": "singular index k"}, **index_ticks(n_singular)},
        y={
            "title": {"text": "query → key (target logit)" if cell * n_pairs >= 180 else "pair"},
            **ticks_at(shown, [f"{labels[p]} ({target[p]:.3g})" for p in shown]),
        },
    )
    index = read_last(dataset, "pair/index")[instance]
    matched = np.flatnonzero(index >= 0)
    if len(matched):
        marker = {**SHOWN, "size": min(9, max(3, round(cell * 0.6)))}
        points = {"x": index[matched], "y": matched, "hoverinfo": "skip", "cliponaxis": False}
        figure.add_scatter(**points, mode="markers", name="matched one to one", marker=marker)
    bar = {"x": end + 0.01, "y": 1, "yanchor": "top", "lenmode": "pixels", "len": tall + 20}
    return finish(
        figure,
        "Which singular vectors each pair uses",
        subtitle_of(dataset, instance=instance, final=True),
        height=tall + MARGIN["t"] + MARGIN["b"],
        width=width,
        coloraxis=colour_axis(f"left {TIMES} right |cosine|", **bar),
    )


# ---------------------------------------------------------------------------------------------- beyond one head


def head_shares(dataset: xr.Dataset, *, instance: int = 0, x_axis: XAxis = "linear") -> go.Figure:
    """How several heads share the pairs: each head's share of every pair's logit, and alignment of one head and of all.

    A column of the heat map sums to 1. ``heads/best`` is how well a pair aligns in the head where it aligns best,
    ``heads/combined`` how well it does in the sum of the heads; thin lines are instances, thick ones their mean.
    """
    names = ("heads/participation", "heads/best", "heads/combined", "query_feature", "key_feature")
    require(dataset, *names, n_steps=2)
    require(dataset, "head/share", instance=instance, dims=["head"])
    share = read(dataset, "head/share", "head", "pair", step=-1, instance=instance)
    require_finite("head/share", share)
    n_heads, n_pairs = share.shape
    participation = float(mean_of_finite(read_last(dataset, "heads/participation"), 0))
    labels = [f"{query} → {key}" for query, key in zip(*pair_features(dataset), strict=True)]
    shown = range(0, n_pairs, math.ceil(n_pairs / 20))
    pair_ticks = ticks_at(shown, [labels[p] for p in shown], tickangle=-45 if n_pairs > 4 else 0)
    figure, time, top = go.Figure(), Steps(dataset, x_axis), 0.92
    spans: list[Span] = [(0, 0.52), (0.7, 1)]
    draw_heat(
        figure,
        1,
        (spans[0], (0, top)),
        share,
        columns=labels,
        rows=range(n_heads),
        hover="head {row}, pair {column}<br>share {value}",
        x={"title": {"text": "pair: query → key feature"}, **pair_ticks},
        y={"title": {"text": "head"}, **ticks_at(range(n_heads), [str(head) for head in range(n_heads)])},
        numbers=n_pairs <= 12,
    )
    for name, colour, text in (("heads/combined", BLUE, "sum of the heads"), ("heads/best", VERMILLION, "best head")):
        values = require_finite(name, read(dataset, name, "step", "instance"))
        own = {"legendgroup": name, **axes_of(2)}
        for i in range(values.shape[1]) if values.shape[1] > 1 else ():
            time.line(
                figure, values[:, i], colour, f"{text}, instance {i}", width=1, opacity=0.35, showlegend=False, **own
            )
        time.line(figure, mean_of_finite(values, 1), colour, text, width=2.5, **own)
    y = {"title": {"text": "|cosine| of singular vectors and features"}, "range": [0, 1.03]}
    place_panel(figure, 2, (spans[1], (0, top)), time.axis, y)
    draw_heading(figure, f"instance {instance}, step {time.steps[-1]:,}", spans[0], top)
    draw_heading(figure, count_of(dataset.sizes["instance"], "instance"), spans[1], top)
    return finish(
        figure,
        f"A pair is spread over {participation:.1f} of {n_heads} heads (mean participation)",
        subtitle_of(dataset, "numbers: a head's part of a pair's |logit|; thin lines: instances"),
        coloraxis=colour_axis("share of |logit|", x=spans[0][1] + 0.01, y=top / 2, len=1),
        legend=LEGEND_RIGHT,
    )


def by_offset(dataset: xr.Dataset) -> go.Figure:
    """Alignment and first singular value at every offset of a head with rotary positions, at the last step.

    Dots are instances, lines their mean. The logit that the features get (``pair/logit``, signed) is that of the pair
    with the largest target, whose singular value is to come first. ``target_logit`` is drawn for each offset if it has
    that dimension, else where the factor of the position is 1, at the first.
    """
    names = ("alignment/matched", "spectrum/sigma_1")
    require(dataset, *names, dims=["offset"])
    offsets, figure = dataset["offset"].values, go.Figure()
    series: list[tuple[int, np.ndarray, str, str]] = [
        (number, require_finite(name, _last_by_offset(dataset, name)), BLUE, text)
        for number, name, text in ((1, names[0], "alignment"), (2, names[1], f"{SIGMA}<sub>1</sub>"))
    ]
    has_target = "target_logit" in dataset and "pair/logit" in dataset
    if has_target:
        target = dataset["target_logit"].mean(set(dataset["target_logit"].dims) - {"pair", "offset"})
        strongest = int(np.argmax((target.max("offset") if "offset" in target.dims else target).values))
        of = "of the pair" if dataset.sizes["pair"] == 1 else "of the strongest pair"
        logit = _last_by_offset(dataset.isel(pair=strongest), "pair/logit")
        if np.isfinite(logit).any():
            series.append((2, logit, VERMILLION, f"logit {of}"))
    for number, values, colour, text in series:
        shared = {"name": text, "legendgroup": text, **axes_of(number)}
        logits = colour == VERMILLION  # close to the singular values: beside and above these, not upon them
        aside = 0 if number == 1 else 0.1 if logits else -0.1
        figure.add_scatter(
            x=np.tile(offsets, len(values)) + aside,
            y=values.ravel(),
            customdata=[[i, offset] for i in range(len(values)) for offset in offsets],
            mode="markers",
            showlegend=False,
            marker={"color": colour, "size": 6, "opacity": 0.45},
            cliponaxis=False,
            hovertemplate=f"{text}<br>instance %{{customdata[0]}}, "
            "offset %{customdata[1]}: %{y:.3f}<extra></extra>",
            **shared,
        )
        figure.add_scatter(
            x=offsets,
            y=mean_of_finite(values, 0),
            mode="lines",
            showlegend=number == 2,
            line={"color": colour, "width": 2.5, "dash": "dash" if logits else "solid"},
            hovertemplate=f"{text}<br>mean at offset %{{x}}: %{{y:.3f}}<extra></extra>",
            **shared,
        )
    if has_target:
        every = "offset" in target.dims
        text = f"target {of}" + ("" if every else f" at offset {offsets[0]}")
        figure.add_scatter(
            x=offsets if every else offsets[:1],
            y=np.atleast_1d(target.isel(pair=strongest).values),
            mode="lines+markers",
            name=text,
            line={"color": GREY, "width": 1.5, "dash": "dot"},
            marker={"symbol": "diamond-open", "size": 9, "line": {"width": 2}},
            hovertemplate="target at offset %{x}: %{y:.3g}<extra></extra>",
            **axes_of(2),
        )
    x: dict[str, Any] = {"title": {"text": "offset: positions from the key to the query"}}
    x |= {"tickvals": offsets} if len(offsets) <= 16 else {}
    x["range"] = [float(offsets[0]) - 0.5, float(offsets[-1]) + 0.5]
    values = np.concatenate([np.ravel(t.y) for t in figure.data if t.yaxis == "y2"])
    y: dict[str, Any] = {"title": {"text": "singular value and logits (nats)"}}
    if np.nanmin(values) < 0:
        draw_rule(figure, 2, "y", 0, width=1, color=GREY)
    else:
        y["rangemode"] = "tozero"
    place_panel(figure, 1, ((0, 0.43), (0, 1)), x, {"title": {"text": LABELS[names[0]]}, "range": [0, 1.03]})
    place_panel(figure, 2, ((0.57, 1), (0, 1)), x, y)
    more = "dots: instances; lines: their mean"
    subtitle = subtitle_of(dataset, more, final=True)
    return finish(figure, "The head at every offset", subtitle, legend=LEGEND_RIGHT)


def _last_by_offset(dataset: xr.Dataset, name: str) -> np.ndarray:
    return read(dataset, name, "instance", "offset", step=-1)


def cone_over_time(dataset: xr.Dataset, *, x_axis: XAxis = "linear") -> go.Figure:
    """Cosine of the first left singular vector with the axis of the cone, and of the matched ones with their features.

    A line is the mean of the instances with one ``cone_strength``, a dot an instance at the last step.
    """
    names = ("theory/cone_left", "alignment/left")
    require(dataset, *names, "cone_strength", n_steps=2)
    strength = read(dataset, "cone_strength", "instance")
    distinct = np.unique(strength)
    low, spread = float(distinct[0]), float(distinct[-1] - distinct[0]) or 1.0
    figure, time, top = go.Figure(), Steps(dataset, x_axis), 0.93
    scale = sample_colorscale("Viridis", np.linspace(0, 0.9, 10))  # many hues, as the lines may cross
    headings = ("first left singular vector with the axis of the cone", "matched left singular vector with its feature")
    spans: list[Span] = [(0, 0.46), (0.54, 1)]
    for number, (name, heading) in enumerate(zip(names, headings, strict=True), start=1):
        values = require_finite(name, read(dataset, name, "step", "instance"))
        for at in distinct:
            colour = sample_colorscale(scale, [(float(at) - low) / spread])[0]
            mean = mean_of_finite(values[:, strength == at], 1)
            time.line(figure, mean, colour, f"strength {at:.4g}", width=2, showlegend=False, **axes_of(number))
        figure.add_scatter(
            x=np.full(len(strength), time.x[-1]),
            y=values[-1],
            customdata=np.stack([np.arange(len(strength)), strength], axis=1),
            mode="markers",
            name="last step",
            showlegend=False,
            marker={"color": strength, "coloraxis": "coloraxis", "size": 7},
            cliponaxis=False,
            hovertemplate="instance %{customdata[0]}, strength %{customdata[1]:.4g}<br>"
            "last step: %{y:.3f}<extra></extra>",
            **axes_of(number),
        )
        y = {"title": {"text": "|cosine|" if number == 1 else ""}, "range": [0, 1.03]}
        place_panel(figure, number, (spans[number - 1], (0, top)), time.axis, y)
        draw_heading(figure, heading, spans[number - 1], top)
    colours = {"colorscale": scale, "cmin": low, "cmax": low + spread, "showscale": len(distinct) > 1}
    ticks = {"tickvals": distinct, "ticktext": [f"{at:.4g}" for at in distinct]} if len(distinct) <= 10 else {}
    return finish(
        figure,
        "Singular vectors in a cone of features",
        subtitle_of(dataset, "lines: mean of the instances of one strength; dots: each at the last step"),
        coloraxis={**colours, "colorbar": colour_bar("strength of the cone", **ticks)},
        margin={**MARGIN, "t": 90},
    )


# ---------------------------------------------------------------------------------------------- several runs


def across_runs(
    datasets: Mapping[Any, xr.Dataset],
    x_title: str,
    y: str | Sequence[str] = "alignment/matched",
    *,
    title: str = "",
) -> go.Figure:
    """Final metrics of runs that differ in one setting, such as a size: every instance, and the mean of each run.

    Args:
        datasets: Each run under the value that it was trained with. If all of these are numbers ("20" is one), they
            are positions on the x axis, logarithmic where they are positive and span more than a decade; else they
            are labels, in the order given.
        x_title: What the value is.
        y: Name of a metric, or several of the same unit.
        title: Title; empty for one that says x_title.

    Raises:
        InputError: There is no run, or one lacks a metric or has not one value per instance of it.
    """
    if not datasets:
        raise bad_value("datasets", {}, "at least one run", "pass a dataset for each run")
    names = [y] if isinstance(y, str) else list(y)
    labels = list(datasets)
    numbers = [_number(label) for label in labels]
    numeric = None not in numbers
    positions = np.array(numbers if numeric else range(len(labels)), dtype=float)
    order = np.argsort(positions, kind="stable")
    labels, positions = [labels[i] for i in order], positions[order]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for label in labels:
        for name in names:
            try:
                require_one_per_instance(datasets[label], name)
            except InputError as error:
                raise InputError(f"run {label}: {error}") from error
            found[name].append(read_last(datasets[label], name))
    sizes = [len(values) for values in found[names[0]]]
    at = np.repeat(positions, sizes)
    hover = [f"instance {i} of run {as_text(label)}" for label, n in zip(labels, sizes, strict=True) for i in range(n)]
    figure, y_axis = final_values({name: (at, np.concatenate(found[name])) for name in names}, hover, means=True)
    axis = value_axis(positions, named=numeric)
    if not numeric:
        bar = {"symbol": "line-ew-open", "size": 28, "line": {"width": 3}}
        figure.update_traces(selector={"mode": "lines"}, mode="markers", marker=bar, hovertemplate="mean: %{y:.3f}")
        axis = {
            "tickvals": positions,
            "ticktext": [as_text(label) for label in labels],
            "range": [-0.5, len(labels) - 0.5],
        }
    last = [int(datasets[label]["step"].values[-1]) for label in labels]
    steps = f"step {last[0]:,}" if len(set(last)) == 1 else f"last steps {min(last):,} to {max(last):,}"
    instances = f"{min(sizes):,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    parts = [count_of(len(labels), "run"), f"{instances} instances each", steps, "dots: instances; line: their mean"]
    return finish(
        figure,
        title or f"Runs by {x_title}",
        " · ".join(parts),
        xaxis={"title": {"text": x_title}, **axis},
        yaxis=y_axis,
    )


def _number(label: object) -> float | None:
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------- all of them


_against_lambda = partial(
    against,
    x="lambda_attn",
    y=("alignment/matched", "orthogonality/attended_vs_rest"),
    title="What the weight of the attention loss does",
)

FIGURES: dict[str, Entry] = {
    "fig_1a": Entry(
        fig_1a,
        "Cosines between features and dimensions per feature, without a head",
        "Fig. 1a",
        "Features without a head lie in antipodal pairs: each row has one bright cell beside its own, and a feature "
        "has half a dimension.",
    ),
    "fig_1b": Entry(
        fig_1b,
        "Cosines between features and dimensions per feature with a head, at the first and the last step",
        "Fig. 1b",
        "Attended features (first rows and columns) fade against all others between the first and the last step, and"
        " end with more of a dimension of their own than the others.",
    ),
    "fig_2a": Entry(
        fig_2a,
        "Every feature against every singular vector",
        "Fig. 2a",
        "An attended feature is aligned if its row has one bright cell, and no other feature is bright in that column.",
    ),
    "fig_2b": Entry(
        fig_2b,
        "Many pairs against singular vectors, and singular values against target logits",
        "Fig. 2b",
        "Attended features have one bright cell each; on the right, singular values on the dotted line are as large "
        "as the logits that the pairs are to get.",
    ),
    "fig_3": Entry(
        fig_3,
        "Alignment and orthogonality over training",
        "Fig. 3",
        "Alignment comes before orthogonality if its vertical line, the median time of change, is further left.",
    ),
    "fig_4": Entry(
        fig_4,
        "Alignment against anisotropy, with Theorem 1's prediction",
        "Fig. 4",
        "The more anisotropic the features are (to the right), the less the singular vectors align with them; "
        "crosses are what Theorem 1 predicts from the features alone.",
    ),
    "against_lambda": Entry(
        _against_lambda,
        "Alignment and orthogonality against the attention loss's weight",
        "appendix",
        "Left, where the attention loss weighs little, singular vectors need not align; where the lines level off, "
        "more weight changes nothing.",
    ),
    "spectrum_over_time": Entry(
        spectrum_over_time,
        "Singular values over training",
        "appendix",
        "Singular values of target pairs rise to the pairs' logits while the others stay near zero.",
    ),
    "alignment_over_time": Entry(
        alignment_over_time,
        "Every pair's alignment over training",
        "appendix",
        "Pairs with the larger target logit (colour) align first.",
    ),
    "pair_map": Entry(
        pair_map,
        "Which pairs share a singular vector",
        "appendix",
        "A column that is bright in several rows is a singular vector that these pairs share, as they must where "
        "pairs outnumber the head's dimensions.",
    ),
    "head_shares": Entry(
        head_shares,
        "How several heads share the pairs",
        "appendix",
        "A column with one bright cell is a pair that a single head took over; on the right, a pair that heads share"
        " aligns better with their sum than with the best of them.",
    ),
    "by_offset": Entry(
        by_offset,
        "Alignment and singular values at every offset (rotary positions)",
        "appendix",
        "With rotary positions each offset has a head of its own: dots near 1 on the left say that its singular "
        "vectors are the features, too.",
    ),
    "cone_over_time": Entry(
        cone_over_time,
        "Singular vectors in a cone of features, over training",
        "appendix",
        "In a narrow cone (large strength) the first singular vector follows the axis of the cone, on the left, at "
        "the expense of its feature, on the right.",
    ),
}
ALL_FIGURES = {**FIGURES, **REPLAY_FIGURES}


def main(arguments: Sequence[str]) -> int:
    """RUN_DIR FOLDER [NAME ...]: write the named figures, or all that the run has the data for, as PNG files.

    ``--across FOLDER_OF_RUNS OUT.png``: write :func:`across_runs` for the run directories in a folder, each named by
    the value that it was trained with.
    """
    parser = argparse.ArgumentParser(
        prog="python -m svf_lightning.report.figures",
        description="Write figures of a run as PNG files: those named, or all that the run has the data for.",
        epilog=f"Figures: {', '.join(ALL_FIGURES)}.",
    )
    parser.add_argument("source", metavar="RUN_DIR", help="run directory; with --across, a folder of them")
    parser.add_argument("target", metavar="FOLDER", help="folder for the files; with --across, the file")
    parser.add_argument("names", metavar="NAME", nargs="*", help="figure to write")
    parser.add_argument("--across", action="store_true", help="compare the runs in a folder, each named by its value")
    parser.add_argument(
        "--title", metavar="TEXT", help="with --across: what the values are; default: its folder's name"
    )
    parser.add_argument("--y", metavar="METRIC", action="append", help="with --across: what to show; can be repeated")
    parser.add_argument(
        "--x-axis", choices=("linear", "log"), help="scale of the training steps; default: each its own"
    )
    parser.add_argument("--scale", type=float, default=2, help="pixels of the file for each of the figure, default: 2")
    try:
        chosen = parser.parse_intermixed_args(list(arguments))
        if chosen.across and chosen.names:
            parser.error("--across takes a folder of runs and a file, and no name")
        if not chosen.across and (chosen.title or chosen.y):
            parser.error("--title and --y belong to --across")
    except SystemExit as stop:  # the parser has said why
        return int(stop.code or 0)
    source, target = Path(chosen.source), Path(chosen.target)
    try:
        if chosen.across:
            figure = across_runs(_runs_in(source), chosen.title or source.name, chosen.y or "alignment/matched")
            drawn: Iterator[tuple[Path, go.Figure]] = iter([(target, figure)])
        else:
            drawn = _figures_of(source, target, chosen.names, chosen.x_axis)
        for path, figure in drawn:
            save_png(figure, path, scale=chosen.scale)
            sys.stdout.write(f"{path}\n")
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _figures_of(
    run_dir: Path, folder: Path, names: Sequence[str], x_axis: XAxis | None
) -> Iterator[tuple[Path, go.Figure]]:
    """The named figures of a run, or all that can be drawn, each with the file for it."""
    dataset = open_trajectory(run_dir)
    for name in names or ALL_FIGURES:
        if name not in ALL_FIGURES:
            raise bad_value("figure", name, ", ".join(ALL_FIGURES), "name one of these")
        try:
            draw = ALL_FIGURES[name].draw
            over_time = "x_axis" in inspect.signature(draw).parameters
            figure = draw(dataset, **({"x_axis": x_axis} if over_time and x_axis else {}))
        except InputError as error:
            if names:
                raise
            sys.stderr.write(f"{name} is left out: {error}\n")
            continue
        yield folder / f"{name}.png", figure


def _runs_in(folder: Path) -> dict[str, xr.Dataset]:
    """The runs in a folder by the names of their directories."""
    runs = sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}"))
    if not runs:
        raise InputError(
            f"{folder} holds no runs. Allowed: a folder whose sub-folders are run directories, named by their values. "
            "Fix: train them with --run_dir=FOLDER/VALUE."
        )
    return {path.name: open_trajectory(path) for path in runs}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
