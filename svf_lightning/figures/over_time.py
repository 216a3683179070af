"""Over training: alignment and orthogonality (Fig. 3), singular values, every pair, a cone of features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int
from plotly.colors import sample_colorscale  # type: ignore[import-untyped,unused-ignore]
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.axes import Steps, XAxis, colour_bar, draw_chance, draw_rule
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import (
    BLUE,
    GREY,
    LINE_SCALE,
    MARGIN,
    SIGMA,
    VERMILLION,
    count_of,
    finish,
    markup,
)
from svf_lightning.figures.reading import (
    chance_of,
    mean_of_finite,
    quantity,
    read,
    read_last,
    require,
    require_finite,
    subtitle_of,
    target_logits,
)
from svf_lightning.registry import known
from svf_lightning.run.changes import Change, changes, sizes_of

if TYPE_CHECKING:
    import xarray as xr

_COSINE_AXIS = {"title": {"text": "|cosine|"}, "range": [0, 1.03]}


def _shades(values: np.ndarray, scale: list[str]) -> tuple[list[str], dict[str, Any]]:
    """A colour for each value, and the axis of the colours, which has no bar where all values are the same."""
    low, high = float(values.min()), float(values.max())
    spread = high - low or 1.0
    axis = {"colorscale": scale, "cmin": low, "cmax": low + spread, "showscale": high > low}
    return sample_colorscale(scale, (values - low) / spread), axis


# ---- Figure 3 --------------------------------------------------------------------------------------------------------


class Dynamics(NamedTuple):
    """Alignment and orthogonality over training, and when each has covered 90 % of its way."""

    step: Int[np.ndarray, "step"]
    alignment: Float[np.ndarray, "step instance"]  # |cosine| of matched singular vectors and features
    orthogonality: Float[np.ndarray, "step instance"]  # |cosine| of attended and other features
    t_align: Float[np.ndarray, "instance"]  # a training step; NaN: it did not happen
    t_ortho: Float[np.ndarray, "instance"]
    chance: tuple[float, float]  # of alignment and orthogonality of random vectors; NaN: not known
    changes: list[Change]
    labels: list[str]  # of alignment and orthogonality
    subtitle: str


def prepare_fig_3(dataset: xr.Dataset) -> Dynamics:
    """Alignment and orthogonality, and when they changed, if they did (:func:`svf_lightning.run.changes.changes`).

    Raises:
        InputError: The run lacks one of them or a second step, or diverged.
    """
    names = ("alignment/matched", "orthogonality/attended_vs_rest")
    require(dataset, *names, n_steps=2)
    values = [require_finite(name, read(dataset, name, "step", "instance")) for name in names]
    steps = np.array(dataset["step"])  # a copy, as torch warns about read-only arrays
    quantities = {name: known(dataset)[name] for name in names}
    happened = changes(dict(zip(names, values, strict=True)), steps, ("instance",), quantities, sizes_of(dataset))
    align, ortho = (change for change in happened.values() if change.is_told)
    any_did = align.happened.any() or ortho.happened.any()
    return Dynamics(
        step=steps,
        alignment=values[0],
        orthogonality=values[1],
        t_align=align.steps,
        t_ortho=ortho.steps,
        chance=(chance_of(dataset, names[0]), chance_of(dataset, names[1])),
        changes=[align, ortho],
        labels=[quantity(dataset, name).title for name in names],
        subtitle=subtitle_of(dataset, "dots: 90 % of the way, per instance; dotted: their median" if any_did else ""),
    )


def draw_fig_3(data: Dynamics, *, x_axis: XAxis = "linear") -> go.Figure:
    """Thin lines and dots are instances, thick lines their mean; a vertical line is the median time of change."""
    drawn, time = go.Figure(), Steps(data.step, x_axis)
    parts = ((data.alignment, data.t_align, BLUE), (data.orthogonality, data.t_ortho, VERMILLION))
    for chance, colour in zip(data.chance, (BLUE, VERMILLION), strict=True):
        draw_chance(drawn, 1, chance, colour)
    for (values, times, colour), label, change in zip(parts, data.labels, data.changes, strict=True):
        changed, symbol, median = np.flatnonzero(change.happened), markup(change.quantity.symbol), change.median
        if not len(changed):
            time.lines(drawn, values, colour, label, mean=f"{label}, {symbol}: {change.counted()}")
            continue
        some = "" if change.happened.all() else f" {change.counted()}"
        time.lines(drawn, values, colour, label, mean=f"{label}, {symbol} = {median:,.0f}{some}")
        rows = np.searchsorted(data.step, times[changed])
        drawn.add_scatter(
            x=time.x[rows],
            y=values[rows, changed],
            customdata=times[changed],
            mode="markers",
            name=symbol,
            legendgroup=label,
            showlegend=False,
            marker={"color": colour, "size": 7, "line": {"color": "#FFFFFF", "width": 1}},
            hovertemplate=f"{symbol} = %{{customdata:,}}<extra></extra>",
        )
        draw_rule(drawn, 1, "x", time.at(median), color=colour, width=1, dash="dot")
    title = "Alignment of singular vectors, and orthogonality of features, over training"
    return finish(drawn, title, data.subtitle, xaxis=time.axis, yaxis=_COSINE_AXIS)


fig_3 = figure(
    "fig_3",
    prepare_fig_3,
    draw_fig_3,
    description="Alignment and orthogonality over training",
    paper="Fig. 3",
    see="A vertical line is the median time of a change that happened; that of an earlier one is further left.",
    says=lambda data: [change.sentence() for change in data.changes],
    on_page=lambda dataset: False,  # the panels over steps show it
)

# ---- singular values -------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Singular values of one instance over training, and target logits of its pairs."""

    step: Int[np.ndarray, "step"]
    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    singular_values: Float[np.ndarray, "step rank"]  # nats
    matched_index: Int[np.ndarray, "pair"]  # at the last step, from 1; 0: none was left
    target_logit: Float[np.ndarray, "pair"]  # nats; NaN if not known
    subtitle: str


def prepare_spectrum_over_time(dataset: xr.Dataset, *, instance: int = 0) -> Spectrum:
    """Singular values, and which of them target pairs are matched with at the end.

    Raises:
        InputError: The run lacks singular values, a second step or such an instance, or diverged.
    """
    require(dataset, "singular_values", instance=instance, n_steps=2)
    values = require_finite("singular_values", read(dataset, "singular_values", "step", "rank", instance=instance))
    index = read_last(dataset, "pair/index")[instance] if "pair/index" in dataset else np.empty(0)
    has_target = len(index) and "target_logit" in dataset
    return Spectrum(
        step=dataset["step"].values,
        rank=np.arange(1, values.shape[1] + 1),
        singular_values=values,
        matched_index=index.astype(int) + 1,
        target_logit=target_logits(dataset)[instance] if has_target else np.full(len(index), np.nan),
        subtitle=subtitle_of(dataset, instance=instance),
    )


def draw_spectrum_over_time(data: Spectrum, *, x_axis: XAxis = "linear") -> go.Figure:
    """A line per singular value; those of target pairs stand out. Triangles at the end are target logits."""
    drawn, time = go.Figure(), Steps(data.step, x_axis)
    named: set[str] = set()
    is_of_pair = np.isin(data.rank, data.matched_index)
    for k in np.argsort(is_of_pair, kind="stable"):
        name, colour = ("of a target pair", BLUE) if is_of_pair[k] else ("other singular values", GREY)
        look = {"legendgroup": name, "showlegend": name not in named, "hover": f"singular value {data.rank[k]}"}
        if time.line(drawn, data.singular_values[:, k], colour, name, width=1.5, **look):
            named.add(name)
    if np.isfinite(data.target_logit).any():
        drawn.add_scatter(
            x=np.full(len(data.target_logit), time.x[-1]),
            y=data.target_logit,
            mode="markers",
            name="target logit",
            marker={"color": VERMILLION, "symbol": "triangle-left", "size": 8},
            cliponaxis=False,
            hovertemplate="target logit %{y:.3g}<extra></extra>",
        )
    y_axis = {"title": {"text": f"singular value {SIGMA}<sub>k</sub> (nats)"}, "rangemode": "tozero"}
    return finish(drawn, "Singular values over training", data.subtitle, xaxis=time.axis, yaxis=y_axis)


spectrum_over_time = figure(
    "spectrum_over_time",
    prepare_spectrum_over_time,
    draw_spectrum_over_time,
    description="Singular values over training",
    paper="appendix",
    see="A triangle at the right is the logit that a pair is to get; its line is the singular value that it is matched "
    "with at the last step.",
    on_page=lambda dataset: False,  # the panels over steps show it
)

# ---- every pair ------------------------------------------------------------------------------------------------------


class PairAlignment(NamedTuple):
    """Alignment of every target pair of one instance over training."""

    step: Int[np.ndarray, "step"]
    alignment: Float[np.ndarray, "step pair"]  # mean of left and right |cosine|; NaN: no singular vector was left
    target_logit: Float[np.ndarray, "pair"]  # nats
    query_feature: Int[np.ndarray, "pair"]
    key_feature: Int[np.ndarray, "pair"]
    chance: float  # mean of random pairs, matched alike; NaN: not known
    subtitle: str


def prepare_alignment_over_time(dataset: xr.Dataset, *, instance: int = 0) -> PairAlignment:
    """Matched cosine of every target pair: the mean of its left and right cosine.

    Raises:
        InputError: The run lacks the pairs' cosines, a second step or such an instance, or diverged.
    """
    names = ("pair/left", "pair/right")
    require(dataset, *names, "target_logit", "query_feature", "key_feature", instance=instance, n_steps=2)
    left, right = (read(dataset, name, "step", "pair", instance=instance) for name in names)
    values = (left + right) / 2
    if "pair/index" in dataset:
        values = np.where(read(dataset, "pair/index", "step", "pair", instance=instance) >= 0, values, np.nan)
    return PairAlignment(
        step=dataset["step"].values,
        alignment=require_finite("pair/left", values),
        target_logit=target_logits(dataset)[instance],
        query_feature=dataset["query_feature"].values,
        key_feature=dataset["key_feature"].values,
        chance=chance_of(dataset, "alignment/matched"),
        subtitle=subtitle_of(dataset, count_of(values.shape[1], "pair"), instance=instance),
    )


def draw_alignment_over_time(data: PairAlignment, *, x_axis: XAxis = "linear") -> go.Figure:
    """A line per pair, a dot at its end; their colour is the target logit."""
    target = data.target_logit
    colours, colour_axis = _shades(target, LINE_SCALE)
    names = [f"query {query}, key {key}" for query, key in zip(data.query_feature, data.key_feature, strict=True)]
    drawn, time = go.Figure(), Steps(data.step, x_axis)
    draw_chance(drawn, 1, data.chance, GREY)
    for i in reversed(range(len(names))):  # the first, often the strongest, on top
        time.line(drawn, data.alignment[:, i], colours[i], names[i], width=1.5, showlegend=False)
    if np.isfinite(data.alignment[-1]).any():
        drawn.add_scatter(
            x=np.full(len(names), time.x[-1]),
            y=data.alignment[-1],
            text=[f"{name}, T = {logit:.3g}" for name, logit in zip(names, target, strict=True)],
            mode="markers",
            name="last step",
            showlegend=False,
            marker={"color": target, "coloraxis": "coloraxis", "size": 7},
            cliponaxis=False,
            hovertemplate="%{text}<br>last step: %{y:.3f}<extra></extra>",
        )
    return finish(
        drawn,
        "Alignment of every pair over training",
        data.subtitle,
        xaxis=time.axis,
        yaxis={**_COSINE_AXIS, "title": {"text": "matched |cosine|, mean of left and right"}},
        coloraxis={**colour_axis, "colorbar": colour_bar("target logit (nats)")},
        margin={**MARGIN, "t": 90},
    )


alignment_over_time = figure(
    "alignment_over_time",
    prepare_alignment_over_time,
    draw_alignment_over_time,
    description="Every pair's alignment over training",
    paper="appendix",
    see="A line for each pair, coloured by its target logit; further left is earlier.",
    on_page=lambda dataset: dataset.sizes.get("pair", 0) >= 2,
)

# ---- a cone of features ----------------------------------------------------------------------------------------------


class Cone(NamedTuple):
    """Left singular vectors in a cone of features, over training."""

    step: Int[np.ndarray, "step"]
    cone_left: Float[np.ndarray, "step instance"]  # |cosine| of the first with the axis of the cone
    alignment_left: Float[np.ndarray, "step instance"]  # |cosine| of the matched ones with their features
    cone_strength: Float[np.ndarray, "instance"]
    subtitle: str


def prepare_cone_over_time(dataset: xr.Dataset) -> Cone:
    """Cosines of left singular vectors with the axis of the cone, and with their features.

    Raises:
        InputError: The run lacks a cone, its cosines or a second step, or diverged.
    """
    names = ("theory/cone_left", "alignment/left")
    require(dataset, *names, "cone_strength", n_steps=2)
    cone_left, alignment_left = (require_finite(name, read(dataset, name, "step", "instance")) for name in names)
    more = "lines: mean of the instances of one strength; dots: each at the last step"
    return Cone(
        step=dataset["step"].values,
        cone_left=cone_left,
        alignment_left=alignment_left,
        cone_strength=read(dataset, "cone_strength", "instance"),
        subtitle=subtitle_of(dataset, more),
    )


def draw_cone_over_time(data: Cone, *, x_axis: XAxis = "linear") -> go.Figure:
    """Two panels. A line is the mean of the instances with one strength, a dot an instance at the last step."""
    strength = data.cone_strength
    distinct = np.unique(strength)
    many_hues = sample_colorscale("Viridis", np.linspace(0, 0.9, 10))  # the lines may cross
    colours, colour_axis = _shades(distinct, many_hues)
    headings = ("first left singular vector with the axis of the cone", "matched left singular vector with its feature")
    drawn, time = make_subplots(1, 2, horizontal_spacing=0.08, subplot_titles=headings), Steps(data.step, x_axis)
    drawn.update_annotations(font_size=14, yshift=6)
    drawn.update_xaxes(time.axis).update_yaxes(range=_COSINE_AXIS["range"])
    drawn.update_yaxes(title=_COSINE_AXIS["title"], col=1)
    for column, values in enumerate((data.cone_left, data.alignment_left), start=1):
        place = {"row": 1, "col": column}
        for at, colour in zip(distinct, colours, strict=True):
            mean = mean_of_finite(values[:, strength == at], 1)
            time.line(drawn, mean, colour, f"strength {at:.4g}", width=2, showlegend=False, **place)
        drawn.add_scatter(
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
            **place,
        )
    ticks = {"tickvals": distinct, "ticktext": [f"{at:.4g}" for at in distinct]} if len(distinct) <= 10 else {}
    return finish(
        drawn,
        "Singular vectors in a cone of features",
        data.subtitle,
        coloraxis={**colour_axis, "colorbar": colour_bar("strength of the cone", **ticks)},
        margin={**MARGIN, "t": 111},
    )


cone_over_time = figure(
    "cone_over_time",
    prepare_cone_over_time,
    draw_cone_over_time,
    description="Singular vectors in a cone of features, over training",
    paper="appendix",
    see="Left: how close the first singular vector is to the axis of the cone. Right: how close matched ones are to "
    "their features. A large strength is a narrow cone.",
)
