"""Final values along what differs: between instances (Fig. 4), runs, or trials of a sweep (Appendix A)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Shaped

from svf_lightning.arguments import short
from svf_lightning.errors import InputError, bad_value, closest
from svf_lightning.figures.axes import draw_chance
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    as_text,
    count_of,
    finish,
    markup,
)
from svf_lightning.figures.reading import (
    chance_of,
    for_plotly,
    mean_of_finite,
    quantity,
    read,
    read_last,
    require,
    require_finite,
    require_one_per_instance,
    subtitle_of,
)
from svf_lightning.quantities import Place, Quantity
from svf_lightning.registry import BUILT_IN

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

METRICS = tuple(sorted(name for name, q in BUILT_IN.items() if q.is_at(Place.SWEEP)))
_AXES = {
    "model.lambda_attn": BUILT_IN["lambda_attn"].title,
    "model.n_features": "number of features, N",
    "model.d_model": "dimension of a token, D",
    "model.d_head": "dimension of the head, H",
    "model.target_logit": "target logit",
    "data.context_length": "keys per query",
    "data.feature_probability": "probability that a feature is active",
    "data.frequency_decay": "decay of the features' frequencies, z",
    "data.feature_correlation": "correlation of the features, ρ",
}
_COSINES = [0, 1.03]  # range of an axis

# ---- Figure 4 --------------------------------------------------------------------------------------------------------


class Anisotropy(NamedTuple):
    """Alignment and anisotropy of the features at the last step; what the run does not hold is NaN."""

    interference: Float[np.ndarray, "instance"]  # anisotropy of the features
    alignment: Float[np.ndarray, "instance"]  # |cosine| of trained singular vectors and features
    predicted_cosine: Float[np.ndarray, "instance"]  # |cosine| of Theorem 1's vectors and features
    theory: Float[np.ndarray, "instance"]  # |cosine| of trained and Theorem 1's vectors, mean of left and right
    bound: Float[np.ndarray, "instance"]  # Theorem 2's lower bound on predicted_cosine
    chance: float  # alignment of random vectors; NaN: not known
    x_title: str
    subtitle: str


def prepare_fig_4(dataset: xr.Dataset) -> Anisotropy:
    """Alignment as trained, and, if the run has them, as Theorem 1 predicts and its bound.

    Raises:
        InputError: The run lacks alignment or anisotropy, or diverged.
    """
    x, y = "orthogonality/interference", "alignment/matched"
    require(dataset, y, x)

    def last(*names: str) -> np.ndarray:
        if any(name not in dataset for name in names):
            return np.full(dataset.sizes["instance"], np.nan)
        return np.asarray(np.mean([read_last(dataset, name) for name in names], axis=0))

    anisotropy = quantity(dataset, x)
    return Anisotropy(
        interference=require_finite(x, last(x)),
        alignment=require_finite(y, last(y)),
        predicted_cosine=last("theory/predicted_cosine"),
        theory=last("theory/left", "theory/right"),
        bound=last("theory/bound"),
        chance=chance_of(dataset, y),
        x_title=f"{anisotropy.axis}, {markup(anisotropy.symbol)}",
        subtitle=subtitle_of(dataset, "one point per instance", final=True),
    )


def draw_fig_4(data: Anisotropy) -> go.Figure:
    """Points: instances."""
    x, drawn = data.interference, go.Figure()
    draw_chance(drawn, 1, data.chance, BLUE)
    for y, label, colour, symbol in (
        (data.alignment, "trained vector and feature", BLUE, "circle"),
        (data.predicted_cosine, "Theorem 1's vector and feature, mean of all features", VERMILLION, "x-thin"),
        (data.theory, "trained and Theorem 1's vector", GREEN, "diamond-open"),
        (data.bound, "lower bound (Theorem 2)", GREY, "line-ew"),
    ):
        if np.isfinite(y).any():
            drawn.add_scatter(
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
        drawn,
        "Alignment and anisotropy of the features",
        data.subtitle,
        xaxis={"title": {"text": data.x_title}, "range": [max(0, low - pad), high + pad]},
        yaxis={"title": {"text": "|cosine|"}, "range": _COSINES},
    )


fig_4 = figure(
    "fig_4",
    prepare_fig_4,
    draw_fig_4,
    description="Alignment against anisotropy, with Theorem 1's prediction",
    paper="Fig. 4",
    see="Further right, features are more anisotropic; further up, vectors are closer to each other. Crosses are what "
    "Theorem 1 predicts from the features alone.",
    on_page=lambda dataset: "theory/predicted_cosine" in dataset,
    view="toy",
)

# ---- dots along a setting --------------------------------------------------------------------------------------------


class FinalValues(NamedTuple):
    """Final values of quantities along a setting."""

    metric: Shaped[np.ndarray, "metric"]  # names
    x: Float[np.ndarray, "dot"]  # the setting's value, or the place of its label
    y: Float[np.ndarray, "metric dot"]
    chance: Float[np.ndarray, "metric dot"]  # of random vectors; NaN: not known
    quantities: list[Quantity]
    dots: list[str]  # what each is
    labels: list[str]  # of the setting at 0, 1, ...; empty where it is a number
    is_named: bool  # the setting has ticks at its values, if they are few
    has_means: bool  # the mean at each value says something
    x_title: str
    title: str
    subtitle: str


def _draw_chance_along(drawn: go.Figure, x: np.ndarray, chance: np.ndarray, colour: str, shown: Quantity) -> None:
    """A dashed line at what random vectors give at each value of the setting; nothing where that is not known."""
    at, first = np.unique(x[np.isfinite(chance)], return_index=True)
    if not len(at):
        return
    drawn.add_scatter(
        x=at,
        y=chance[np.isfinite(chance)][first],
        mode="lines",
        name=f"{shown.title}, by chance",
        line={"color": colour, "width": 1.2, "dash": "dash"},
        hovertemplate="by chance: %{y:.3f}<extra></extra>",
    )


def draw_final_values(data: FinalValues, *, title: str = "", rule: float | None = None) -> go.Figure:
    """Dots, and a line through the means at each value of the setting.

    The axis of the setting is logarithmic where all values are positive and span more than a decade.

    Args:
        data: What to draw.
        title: Title; empty for the one that the data have.
        rule: A value to draw a line at; None for none.
    """
    drawn, several = go.Figure(), len(data.quantities) > 1
    values = np.unique(data.x[np.isfinite(data.x)])
    colours = cycle((BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY))
    for shown, y, chance, colour in zip(data.quantities, data.y, data.chance, colours, strict=False):
        shared = {"name": shown.title, "legendgroup": shown.name}
        _draw_chance_along(drawn, data.x, chance, colour, shown)
        if data.has_means:
            means = np.array([mean_of_finite(y[data.x == value], 0) for value in values])
            drawn.add_scatter(
                x=values[np.isfinite(means)],
                y=means[np.isfinite(means)],
                mode="lines",
                showlegend=several,
                line={"color": colour, "width": 2.5},
                hovertemplate="mean at %{x:.4g}: %{y:.3f}<extra></extra>",
                **shared,
            )
        drawn.add_scatter(
            x=data.x,
            y=y,
            text=data.dots,
            mode="markers",
            showlegend=several and not data.has_means,
            marker={"color": colour, "size": 8, "opacity": 0.6},
            cliponaxis=False,
            hovertemplate="%{text}: %{y:.3f}<extra></extra>",
            **shared,
        )
    x_axis: dict[str, Any] = {}
    if data.labels:
        x_axis = {"tickvals": np.arange(len(data.labels)), "ticktext": list(map(as_text, data.labels))}
        x_axis["range"] = [-0.5, len(data.labels) - 0.5]
    else:
        if values[0] > 0 and values[-1] / values[0] > 10:
            x_axis = {"type": "log", "dtick": 1}
        if data.is_named and len(values) <= 10:
            x_axis |= {"tickvals": values, "ticktext": [f"{value:,.4g}" for value in values]}
    unit = data.quantities[0].unit if len({q.unit for q in data.quantities}) == 1 else ""
    y_axis: dict[str, Any] = {"title": {"text": (unit or "value") if several else data.quantities[0].axis}}
    y_axis |= {"range": _COSINES} if unit == "|cosine|" else {"rangemode": "tozero"}
    subtitle = data.subtitle
    if rule is not None:
        drawn.add_hline(y=rule, line={"color": GREY, "dash": "dot"})
        subtitle += f" · dotted: {rule:g}"
    return finish(
        drawn,
        title or data.title,
        subtitle,
        xaxis={"title": {"text": data.x_title}, **x_axis},
        yaxis=y_axis,
    )


def _names(y: str | Sequence[str]) -> list[str]:
    return [y] if isinstance(y, str) else list(y)


def prepare_against(
    dataset: xr.Dataset, *, x: str = "lambda_attn", y: str | Sequence[str] = "alignment/matched"
) -> FinalValues:
    """A dot per instance; see :func:`against`."""
    names = _names(y)
    held = [str(name) for name in (*dataset.coords, *dataset.data_vars) if "instance" in dataset[name].dims]
    for name in (x, *names):
        if name not in dataset and name not in BUILT_IN:
            raise InputError(f"the run holds no {name!r}; {closest(name, held)} Fix: one of {', '.join(held)}.")
        require_one_per_instance(dataset, name)
    is_setting = "step" not in dataset[x].dims
    values = require_finite(x, read(dataset, x, "instance") if is_setting else read_last(dataset, x))
    distinct = np.unique(values[np.isfinite(values)])
    if is_setting and len(distinct) == 1:
        fix = "give one to each: --model.lambda_attn='[1,3,10]'"
        raise bad_value(x, float(distinct[0]), "values that differ between instances", fix)
    more = "dots: instances; line: their mean" if is_setting else "one dot per instance"
    return FinalValues(
        metric=np.array(names),
        x=values,
        y=np.stack([require_finite(name, read_last(dataset, name)) for name in names]),
        chance=np.array([[chance_of(dataset, name)] * len(values) for name in names]),
        quantities=[quantity(dataset, name) for name in names],
        dots=[f"instance {i}, at {value:.4g}" for i, value in enumerate(values)],
        labels=[],
        is_named=is_setting,
        has_means=is_setting,
        x_title=quantity(dataset, x).axis,
        title=f"{', '.join(names)} against {x}",
        subtitle=subtitle_of(dataset, more, final=True),
    )


def against(
    dataset: xr.Dataset, x: str = "lambda_attn", y: str | Sequence[str] = "alignment/matched", *, title: str = ""
) -> go.Figure:
    """Final metrics against something that differs between instances: every instance, and the mean at each value.

    Args:
        dataset: As for every figure.
        x: A coordinate with one value per instance, such as lambda_attn, or a metric. The mean is drawn for a
            coordinate alone.
        y: Name of a metric, or several of the same unit.
        title: Title; empty for one made of the names.

    Raises:
        InputError: The run lacks a quantity, it has not one value per instance, or x is the same in all instances.
    """
    return draw_final_values(prepare_against(dataset, x=x, y=y), title=title)


against_lambda = figure(
    "against_lambda",
    partial(prepare_against, x="lambda_attn", y=("alignment/matched", "orthogonality/attended_vs_rest")),
    partial(draw_final_values, title="Final values against the weight of the attention loss"),
    description="Alignment and orthogonality against the attention loss's weight",
    paper="appendix",
    see="Further right, the attention loss weighs more. Dots are instances, lines their means.",
)

# ---- runs ------------------------------------------------------------------------------------------------------------


def prepare_across_runs(
    datasets: Mapping[Any, xr.Dataset], x_title: str, y: str | Sequence[str] = "alignment/matched"
) -> FinalValues:
    """A dot per instance of each run; see :func:`across_runs`."""
    if not datasets:
        raise bad_value("datasets", {}, "at least one run", "pass a dataset for each run")
    names = _names(y)
    numbers = [_number(label) for label in datasets]
    is_number = None not in numbers
    positions = np.array(numbers if is_number else range(len(numbers)), dtype=float)
    order = np.argsort(positions, kind="stable")
    labels = [list(datasets)[i] for i in order]
    runs = [datasets[label] for label in labels]
    for label, run in zip(labels, runs, strict=True):
        try:
            for name in names:
                require_one_per_instance(run, name)
        except InputError as error:
            raise InputError(f"run {label}: {error}") from error
    sizes = [run.sizes["instance"] for run in runs]
    last = [int(run["step"].values[-1]) for run in runs]
    steps = f"step {last[0]:,}" if len(set(last)) == 1 else f"last steps {min(last):,} to {max(last):,}"
    instances = f"{min(sizes):,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    parts = [count_of(len(runs), "run"), f"{instances} instances each", steps, "dots: instances; line: their mean"]
    values = {name: np.concatenate([read_last(run, name) for run in runs]) for name in names}
    return FinalValues(
        metric=np.array(names),
        x=np.repeat(positions[order], sizes),
        y=np.stack([require_finite(name, of_runs) for name, of_runs in values.items()]),
        chance=np.stack([np.repeat([chance_of(run, name) for run in runs], sizes) for name in names]),
        quantities=[quantity(runs[0], name) for name in names],
        dots=[
            f"instance {i} of run {as_text(label)}" for label, n in zip(labels, sizes, strict=True) for i in range(n)
        ],
        labels=[] if is_number else list(map(str, labels)),
        is_named=True,
        has_means=True,
        x_title=as_text(x_title),
        title=f"Runs by {as_text(x_title)}",
        subtitle=" · ".join(parts),
    )


def draw_across_runs(data: FinalValues, *, title: str = "") -> go.Figure:
    """Dots, and the mean of each run: a line through them along numbers, bars beside each other along labels."""
    drawn = draw_final_values(data, title=title)
    if data.labels:
        bar = {"symbol": "line-ew-open", "size": 28, "line": {"width": 3}}
        drawn.update_traces(
            selector={"mode": "lines", "line.dash": None}, mode="markers", marker=bar, hovertemplate="mean: %{y:.3f}"
        )
    return drawn


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
            are positions on the x axis; else they are labels, in the order given.
        x_title: What the value is.
        y: Name of a metric, or several of the same unit.
        title: Title; empty for one that says x_title.

    Raises:
        InputError: There is no run, or one lacks a metric or has not one value per instance of it.
    """
    return draw_across_runs(prepare_across_runs(datasets, x_title, y), title=title)


def _number(label: object) -> float | None:
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


# ---- trials of a sweep -----------------------------------------------------------------------------------------------


def prepare_along_axis(
    trials: pd.DataFrame,
    axis: str,
    others: Sequence[str] = (),
    y: str | Sequence[str] = METRICS,
    *,
    quantities: Mapping[str, Quantity] = BUILT_IN,
) -> FinalValues:
    """A dot per trial; see :func:`along_axis`."""
    names = [name for name in _names(y) if name in trials]
    if axis not in trials or not names:
        missing = axis if axis not in trials else y
        raise bad_value(
            "axis or y", missing, f"columns of the table: {', '.join(map(str, trials.columns))}", "name one of these"
        )
    done = trials[trials["state"] == "done"]
    if done.empty:
        raise InputError("no trial of the sweep is done. Fix: run it, or wait for its first trials.")
    values = [value if isinstance(value, (int, float)) else math.nan for value in done[axis]]
    labels: list[str] = []
    if not np.isfinite(values).all():
        labels = list(dict.fromkeys(map(str, done[axis])))
        values = [labels.index(str(value)) for value in done[axis]]
    dots = []
    for row in done.to_dict("records"):
        settings = [f"{short(name)} {row[name]}" for name in (axis, *others)]
        dots.append(as_text(", ".join([*settings, f"trial {row['trial']}"])))
    final = np.stack([require_finite(name, done[name].to_numpy(float)) for name in names])
    has_means = "seed" not in axis  # no line: the order of seeds has no meaning
    parts = [count_of(len(done), "trial"), "dots: trials; line: their mean" if has_means else "dots: trials"]
    if without := int((~np.isfinite(final)).any(0).sum()):
        parts.append(f"no number in {without}")
    parts += [f"over {', '.join(map(short, others))} and seeds"] if others else []
    return FinalValues(
        metric=np.array(names),
        x=np.array(values, dtype=float),
        y=final,
        chance=np.full_like(final, np.nan),  # sizes of the trials are not in their table
        quantities=[for_plotly(quantities.get(name) or Quantity(name)) for name in names],
        dots=dots,
        labels=labels,
        is_named=True,
        has_means=has_means,
        x_title=_AXES.get(axis) or as_text(short(axis)),
        title=f"Along {as_text(short(axis))}",
        subtitle=" · ".join(parts),
    )


def along_axis(
    trials: pd.DataFrame,
    axis: str,
    others: Sequence[str] = (),
    y: str | Sequence[str] = METRICS,
    *,
    rule: float | None = None,
    title: str = "",
    quantities: Mapping[str, Quantity] = BUILT_IN,
) -> go.Figure:
    """Final metrics of a sweep's trials along one of its parameters (Appendix A).

    Args:
        trials: One row per trial, as ``Sweep.table`` makes it; those that are not done are left out.
        axis: The parameter.
        others: Further parameters that differ; their values are shown for the dot under the pointer.
        y: Name of a metric, or several of the same unit; those that the trials lack are left out.
        rule: A value to draw a line at; None for none.
        title: Title; empty for one that says the axis.
        quantities: What is known of the metrics, by name.

    Raises:
        InputError: No trial is done, none has a number for a metric, or the table has no such column.
    """
    data = prepare_along_axis(trials, axis, others, y, quantities=quantities)
    return draw_final_values(data, title=title, rule=rule)
