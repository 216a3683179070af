"""What figures share: checking and reading a dataset, the look, panels, heat maps, lines over steps, PNG files.

Nothing here knows what a figure shows. :mod:`svf_lightning.report.figures` has one function per figure, and so has
:mod:`svf_lightning.report.replay_figures` for attention scores and the heads of language models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.colors import hex_to_rgb, sample_colorscale  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value

if TYPE_CHECKING:
    import xarray as xr

XAxis = Literal["linear", "log"]
Span = tuple[float, float]

MAX_POINTS = 600  # per line; more cannot be seen
_TOLD_CELLS = 40_000  # of a heat map that can be pointed at one by one: those of 200 features
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
GREY = "#8C8C8C"  # readable on white and on black
BROWN = "#9C6B1F"  # the same; with the seven above the eighth that the colour-blind tell apart by its darkness
SIGMA, TIMES, LAMBDA = "\u03c3", "\u00d7", "\u03bb"

LINE_SCALE = sample_colorscale("Cividis", np.linspace(0.05, 0.85, 9))  # its yellow end is too pale for a thin line
SHOWN = {"color": VERMILLION, "symbol": "circle-open", "size": 9, "line": {"width": 2}}
OTHERS = {"color": GREY, "size": 5, "opacity": 0.6}
MARGIN = {"l": 70, "r": 30, "t": 120, "b": 60}
LEGEND_RIGHT = {"xref": "paper", "x": 1, "xanchor": "right"}  # above the panel that it belongs to

LABELS = {
    "alignment/matched": "|cosine| of matched singular vectors and features",
    "alignment/matched_min": "|cosine|, weakest pair",
    "alignment/subspace": "|cosine| with the singular subspace",
    "orthogonality/attended_vs_rest": "|cosine| of attended and other features",
    "orthogonality/rest_vs_rest": "|cosine| among other features",
    "orthogonality/interference": "anisotropy of the features, ||E<sub>X</sub>||<sub>2</sub>",
    "orthogonality/dimensionality": "dimensions per feature",
    "spectrum/sigma_ratio": "second over first singular value",
    "spectrum/n_significant": "significant singular values (count)",
    "loss/recon": "reconstruction loss",
    "loss/attn": "attention loss (nats)",
    "lambda_attn": f"weight of the attention loss, {LAMBDA}",
}
_DIMS = {"step", "instance", "d_model", "feature", "feature_2", "rank", "pair"}  # what every figure knows how to show
_HEAD_DIMS = {  # and what figures of a language model's heads do
    "step", "layer", "head", "rank", "prompt", "draw", "task_head", "n_removed", "kind", "pair", "causal_head"
}  # fmt: skip
_REPLAY = "replay a language model (python -m svf_lightning replay) with the"
_DIM_FIXES = {
    "head": "train with several heads (--model.n_heads=4)",
    "offset": "train with rotary positions (--model.rope=true)",
}
_PROVIDERS = (  # what makes a run hold a quantity, by the start of its name
    (("query_feature", "key_feature", "target_logit"), "train with a template that has pairs (not template=zero)"),
    (
        ("alignment/", "pair/", "spectrum/", "singular_values", "cosine_", "U", "V"),
        "train with a head (not template=zero) and the SVDAlignment callback",
    ),
    (("head/", "heads/"), "train with several heads (--model.n_heads=4) and the HeadSharing callback"),
    (("cone_strength",), "train with --model.init_features=cone and one --model.cone_strength for each instance"),
    (("theory/",), "train with a head (not template=zero) and the TheoryGap callback"),
    (
        ("orthogonality/attended",),
        "train with the FeatureOrthogonality callback and a template that leaves features over",
    ),
    (("orthogonality/", "W", "gram", "dimensionality"), "train with the FeatureOrthogonality callback"),
    (
        ("prompt/", "draw/", "contribution/", "task/"),
        f"{_REPLAY} AttentionSparsity callback and its keep_prompts=true",
    ),
    (("sad/task/", "sad/attending/", "sad/attention", "sad/accuracy"), f"{_REPLAY} AttentionSparsity callback"),
    (("sad/",), "train with a head (not template=zero), --model.n_attended=64 and the AttentionSparsity callback"),
    (("causal/",), f"{_REPLAY} CausalAblation callback"),
)


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


class Entry(NamedTuple):
    """One figure of a registry."""

    draw: Callable[..., go.Figure]  # dataset -> figure; keyword options of its own
    description: str
    paper: str  # the figure of arXiv 2602.13524 that it mirrors
    see: str  # what to look for in it, in a sentence or two


# ---------------------------------------------------------------------------------------------- reading a dataset


def require(
    dataset: xr.Dataset,
    *names: str,
    instance: int | None = None,
    n_steps: int = 1,
    dims: Sequence[str] = (),
) -> None:
    """Check that a figure can be drawn.

    Args:
        dataset: What to draw.
        names: Quantities that it must hold.
        instance: The one to draw, if one.
        n_steps: How many captured steps the figure needs.
        dims: Dimensions that this figure shows and others do not, such as offset; the dataset must have them.

    Raises:
        InputError: It lacks one of these, or has a dimension that the figure does not show.
    """
    _require_names(dataset, names)
    for dim in dims:
        if dim not in dataset.sizes:
            held = ", ".join(map(str, dataset.sizes))
            raise InputError(f"this figure needs the dimension {dim!r}; the run has {held}. Fix: {_DIM_FIXES[dim]}.")
    if "instance" not in dataset.sizes:
        raise InputError(
            f"this figure needs the dimension 'instance'; the run has {', '.join(map(str, dataset.sizes))}. "
            "Fix: select one head and add the dimension: dataset.isel(layer=0, head=0).expand_dims('instance', 1)."
        )
    _require_no_further(dataset, names, _DIMS | set(dims))
    _require_steps(dataset, n_steps)
    if instance is not None and not 0 <= instance < dataset.sizes["instance"]:
        raise bad_value("instance", instance, f"0..{dataset.sizes['instance'] - 1}", "pass one that was trained")


def require_heads(dataset: xr.Dataset, *names: str, n_steps: int = 1) -> None:
    """Check that a figure of a language model can be drawn: it has layers and heads where the toy model has instances.

    Args:
        dataset: What to draw.
        names: Quantities that it must hold.
        n_steps: How many captured steps the figure needs.

    Raises:
        InputError: It lacks one of these, or has a dimension that the figure does not show.
    """
    _require_names(dataset, names)
    lacking = [dim for dim in ("layer", "head") if dim not in dataset.sizes]
    if lacking:
        raise InputError(
            f"this figure needs the dimension {' and '.join(map(repr, lacking))}; the run has "
            f"{', '.join(map(str, dataset.sizes))}. Fix: pass the run directory of a `replay` of a language model."
        )
    _require_no_further(dataset, names, _HEAD_DIMS)
    _require_steps(dataset, n_steps)


def _require_names(dataset: xr.Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name not in dataset:
            fix = next((fix for starts, fix in _PROVIDERS if name.startswith(starts)), "add the callback that has it")
            raise InputError(f"this figure needs {name!r}, which the run does not hold. Fix: {fix}.")


def _require_no_further(dataset: xr.Dataset, names: Sequence[str], dims: set[str]) -> None:
    further = {str(dim) for name in names for dim in dataset[name].dims} - dims
    if further:
        chosen = ", ".join(f"{dim}=0" for dim in sorted(further))
        raise InputError(
            f"the run has the dimension {', '.join(sorted(further))}, which this figure does not show. "
            f"Fix: select one: dataset.isel({chosen})."
        )


def _require_steps(dataset: xr.Dataset, n_steps: int) -> None:
    captured = dataset.sizes.get("step", 0)
    if captured < n_steps:
        fit = "pass the run directory of a `fit`, not of a `test` or `validate`"
        fix = "replay several checkpoints of one training" if "layer" in dataset.sizes else fit
        raise InputError(f"this figure needs {n_steps} captured steps or more, and the run has {captured}. Fix: {fix}.")


def require_one_per_instance(dataset: xr.Dataset, name: str) -> None:
    """Check that a quantity has one value per instance, at each step or for the whole run."""
    require(dataset, name)
    if set(dataset[name].dims) - {"step"} != {"instance"}:
        raise bad_value(name, dataset[name].dims, "a quantity with one value per instance", "name another one")


def can_provide(name: str) -> bool:
    """True for a quantity that a callback or an option would give a run."""
    return any(name.startswith(starts) for starts, _ in _PROVIDERS)


def read(dataset: xr.Dataset, name: str, *dims: str, **at: int) -> np.ndarray:
    """A quantity at the given position, with the given dimensions, in this order."""
    return np.asarray(dataset[name].isel(at).transpose(*dims).values, dtype=float)


def read_last(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Values at the last captured step; instances first."""
    return read(dataset, name, "instance", ..., step=-1)  # type: ignore[arg-type]


def require_finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values, if one of them at least is a number."""
    if not np.isfinite(values).any():
        raise InputError(f"{name!r} holds no finite number. Fix: the run diverged; lower the learning rate and repeat.")
    return values


def mean_of_finite(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of the finite numbers, as of the instances that did not diverge; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.asarray(np.where(finite, values, 0).sum(axis) / np.where(count > 0, count, np.nan))


def target_logits(dataset: xr.Dataset) -> np.ndarray:
    """Target logits [instance, pair]."""
    logits = dataset["target_logit"]
    if "instance" not in logits.dims:
        logits = logits.expand_dims(instance=dataset.sizes["instance"])
    return np.asarray(logits.transpose("instance", "pair").values, dtype=float)


def pair_features(dataset: xr.Dataset) -> tuple[list[int], list[int]]:
    """Query and key feature of every pair."""
    return dataset["query_feature"].values.tolist(), dataset["key_feature"].values.tolist()


def thinned(steps: np.ndarray, x_axis: XAxis) -> np.ndarray:
    """Indices of at most MAX_POINTS rows, evenly spread over the step axis; the first and the last are among them."""
    if len(steps) <= MAX_POINTS:
        return np.arange(len(steps))
    if x_axis == "log":
        wanted = np.geomspace(1, steps[-1] - steps[0] + 1, MAX_POINTS) + steps[0] - 1
    else:
        wanted = np.linspace(steps[0], steps[-1], MAX_POINTS)
    return np.unique(np.searchsorted(steps, np.round(wanted).astype(steps.dtype)).clip(0, len(steps) - 1))


def antipodal_order(gram: np.ndarray, features: Sequence[int]) -> list[int]:
    """The given features, those with the most negative cosine next to each other (greedy)."""
    index = np.asarray(features, dtype=int)
    first, second = (index[side] for side in np.triu_indices(len(index), 1))
    order: dict[int, None] = {}
    for i in np.argsort(gram[first, second], kind="stable"):
        pair = int(first[i]), int(second[i])
        if pair[0] not in order and pair[1] not in order:
            order |= dict.fromkeys(pair)
    return list(order | dict.fromkeys(index.tolist()))


class Groups(NamedTuple):
    """Features in the order of a heat map: query features by pair, key features by pair, the rest."""

    query: list[int]
    key: list[int]
    rest: list[int]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Groups:
        """The groups of a run."""
        query, key = (list(dict.fromkeys(side)) for side in pair_features(dataset))
        key = [f for f in key if f not in query]
        return cls(query, key, [f for f in range(dataset.sizes["feature"]) if f not in {*query, *key}])

    @property
    def attended(self) -> list[int]:
        """Query features, then key features."""
        return self.query + self.key

    @property
    def order(self) -> list[int]:
        """All features."""
        return self.attended + self.rest

    def rows(self) -> dict[str, Any]:
        """Tick labels: every feature where there is room, else the groups."""
        if len(self.order) <= 24:
            text = [f"<b>query {f}</b>" for f in self.query] + [f"<b>key {f}</b>" for f in self.key]
            return ticks_at(range(len(self.order)), [*text, *map(str, self.rest)], tickfont={"size": 11})
        parts = {"<b>query</b>": self.query, "<b>key</b>": self.key, "other": self.rest}
        if min(len(self.query), len(self.key)) < len(self.order) / 25:  # too close to have a label each
            parts = {"<b>attended</b>": self.attended, "other": self.rest}
        ends = np.cumsum([len(part) for part in parts.values()])
        named = zip(parts.values(), ends, parts, strict=True)
        middles = [(float(end) - len(part) / 2 - 0.5, text) for part, end, text in named if part]
        return ticks_at([at for at, _ in middles], [text for _, text in middles])

    def columns(self) -> dict[str, Any]:
        """Tick labels for narrow columns in the order of the rows: attended features only."""
        n = len(self.attended)
        if n <= 4 and len(self.order) <= 40:
            return ticks_at(range(n), [f"<b>{f}</b>" for f in self.attended], tickangle=0)
        return ticks_at([(n - 1) / 2], ["<b>attended</b>"], tickangle=0)


# ---------------------------------------------------------------------------------------------- drawing


def count_of(n: int, noun: str) -> str:
    """``3 runs``, ``1 run``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def subtitle_of(dataset: xr.Dataset, more: str = "", *, instance: int | None = None, final: bool = False) -> str:
    """Sizes, instances and steps of what is drawn."""
    first, last = (int(dataset["step"].values[i]) for i in (0, -1))
    n = dataset.sizes["instance"]
    parts = [
        count_of(n, "instance") if instance is None else f"instance {instance} of {n}",
        f"step {last:,}" if final or first == last else f"steps {first:,} to {last:,}",
        *([more] if more else []),
    ]
    if "feature" in dataset.sizes and "d_model" in dataset.sizes:
        parts.insert(0, f"{count_of(dataset.sizes['feature'], 'feature')} in {dataset.sizes['d_model']} dimensions")
    return " · ".join(parts)


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
        # numbers rather than a text for each cell, which for 100 features take a third of the room
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
    every = 1 if n <= 12 else 5 if n <= 30 else 10
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


def step_axis(steps: np.ndarray, x_axis: XAxis) -> tuple[np.ndarray, dict[str, Any]]:
    """Positions of steps, and their axis. On a log axis, step 0 stands half a decade before the first other one."""
    if x_axis not in ("linear", "log"):
        raise bad_value("x_axis", x_axis, "linear or log", "choose one of them")
    if x_axis == "linear":
        limits = [float(steps[0]), float(steps[-1])]
        return steps.astype(float), {"title": {"text": "training step"}, "range": limits, "tickformat": ",d"}
    positive = steps[steps > 0]
    zero = float(positive[0]) / math.sqrt(10)
    x = np.where(steps > 0, steps, zero).astype(float)
    decades = [10**k for k in range(math.ceil(math.log10(positive[0])), math.floor(math.log10(positive[-1])) + 1)]
    ticks = {**({zero: "0"} if (steps <= 0).any() else {}), **{d: f"{d:,}" for d in decades}}
    limits = [math.log10(x[0]), math.log10(x[-1])]
    named = {"title": {"text": "training step (log scale)"}, "tickvals": list(ticks), "ticktext": list(ticks.values())}
    return x, {"type": "log", "range": limits, **named}


class Steps:
    """The step axis of a figure, and lines along it."""

    def __init__(self, dataset: xr.Dataset, x_axis: XAxis) -> None:
        self.steps = np.array(dataset["step"].values)
        self.x, self.axis = step_axis(self.steps, x_axis)
        self.kept = thinned(self.steps, x_axis)

    def line(self, figure: go.Figure, y: np.ndarray, colour: str, name: str, *, width: float, **options: Any) -> bool:
        """Draw the kept points of one line, unless none of them is a number."""
        y = y[self.kept]
        if not np.isfinite(y).any():
            return False
        template = f"{options.pop('hover', name)}<br>step %{{customdata:,}}: %{{y:.3f}}<extra></extra>"
        line = {"color": colour, "width": width}
        points = {"x": self.x[self.kept], "y": y, "customdata": self.steps[self.kept]}
        figure.add_scatter(**points, mode="lines", name=name, line=line, hovertemplate=template, **options)
        return True

    def band(self, figure: go.Figure, low: np.ndarray, high: np.ndarray, colour: str, **options: Any) -> None:
        """Fill what lies between two lines; a gap where one of them is no number."""
        draw_band(figure, self.x[self.kept], low[self.kept], high[self.kept], colour, **options)


def draw_band(figure: go.Figure, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, **options: Any) -> None:
    """Fill what lies between two lines; a gap where one of them is no number."""
    known = np.isfinite(low) & np.isfinite(high)
    outline: list[tuple[float, float]] = []  # to the right along low, back along high, for every part without a gap
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


def as_text(words: object) -> str:
    """Words that are not ours, such as a run's name, for plotly, which reads some of HTML's tags."""
    return escape(str(words), quote=False)


def value_axis(values: np.ndarray, *, named: bool) -> dict[str, Any]:
    """Logarithmic where all values are positive and span more than a decade; ticks at the values, if few."""
    axis: dict[str, Any] = {}
    if values[0] > 0 and values[-1] / values[0] > 10:
        axis |= {"type": "log", "dtick": 1}
    if named and len(values) <= 10:
        axis |= {"tickvals": values, "ticktext": [f"{value:,.4g}" for value in values]}
    return axis


def final_values(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]], hover: Sequence[str], *, means: bool
) -> tuple[go.Figure, dict[str, Any]]:
    """Dots at (x, y) of every metric, a line through the means at each x, and the y axis for them."""
    figure = go.Figure()
    for i, (name, (x, y)) in enumerate(points.items()):
        require_finite(name, y)
        colour, label = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)[i % 6], LABELS.get(name, name)
        if means:
            mean = {at: mean_of_finite(y[x == at], 0) for at in np.unique(x[np.isfinite(x)])}
            mean = {at: value for at, value in mean.items() if np.isfinite(value)}
            figure.add_scatter(
                x=list(mean),
                y=[float(value) for value in mean.values()],
                mode="lines",
                name=label,
                legendgroup=name,
                showlegend=len(points) > 1,
                line={"color": colour, "width": 2.5},
                hovertemplate="mean at %{x:.4g}: %{y:.3f}<extra></extra>",
            )
        figure.add_scatter(
            x=x,
            y=y,
            text=hover,
            mode="markers",
            name=label,
            legendgroup=name,
            showlegend=not means and len(points) > 1,
            marker={"color": colour, "size": 8, "opacity": 0.6},
            cliponaxis=False,
            hovertemplate="%{text}: %{y:.3f}<extra></extra>",
        )
    labels = [LABELS.get(name, name) for name in points]
    cosines = all("|cosine|" in label for label in labels)
    unit = labels[0] if len(labels) == 1 else "|cosine|" if cosines else "value"
    return figure, {"title": {"text": unit}, **({"range": [0, 1.03]} if cosines else {"rangemode": "tozero"})}


# ---------------------------------------------------------------------------------------------- files


def save_png(
    figure: go.Figure, path: str | Path, width: int | None = None, height: int | None = None, scale: float = 2
) -> None:
    """Write a figure as a PNG.

    Needs kaleido and a Chrome or Chromium on this machine (Debian: ``apt-get install chromium``); no network.

    Args:
        figure: Any plotly figure.
        path: The file; its folder is made.
        width: In CSS pixels; None for the figure's own, or 1,000.
        height: In CSS pixels; None for the figure's own, or 450.
        scale: Pixels of the file for each of these.

    Raises:
        InputError: kaleido or the browser is missing.
    """
    try:
        import kaleido  # type: ignore[import-untyped,import-not-found,unused-ignore]
        from kaleido.errors import ChromeNotFoundError  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError(f"a PNG needs kaleido ({error}). Fix: pip install 'kaleido>=1'.") from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    size = {"width": width or figure.layout.width or 1000, "height": height or figure.layout.height or 450}
    options = {"format": "png", "scale": scale, **size}
    try:
        kaleido.write_fig_sync(figure, path=str(path), opts=options, kopts={"mathjax": False})  # it is on the network
    except ChromeNotFoundError as error:
        raise InputError(
            "a PNG needs Chrome or Chromium, and none was found. Fix: install it (Debian: apt-get install chromium)."
        ) from error
