"""Figures of attention scores taken apart over singular pairs: of a language model's heads, and of the toy model.

For the datasets that the AttentionSparsity and CausalAblation callbacks fill (method, section 6); one function per
figure, as in :mod:`svf_lightning.report.figures`, which draws these too. Singular indices count from 1 as in the paper,
layers and heads from 0: L2H3.

What has no score is left out: a (prompt, head) pair with NaN, or with -1 as its N_recon or index, is a head that sees
no other key to compare with. A head attends to the key where its weight there is at least ``attending``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value
from svf_lightning.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MARGIN,
    ORANGE,
    PURPLE,
    SHOWN,
    SIGMA,
    TIMES,
    VERMILLION,
    Entry,
    Span,
    Steps,
    XAxis,
    axes_of,
    axis_name,
    colour_bar,
    count_of,
    draw_heading,
    draw_heat,
    draw_rule,
    finish,
    index_ticks,
    mean_of_finite,
    place_panel,
    read,
    require,
    require_finite,
    require_heads,
    subtitle_of,
    ticks_at,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "REPLAY_FIGURES",
    "causal",
    "fig_7a",
    "fig_7b",
    "fig_8",
    "fig_9",
    "heads_map",
    "sparsity_over_time",
]

_SINGULAR, _SHARED, _INDEPENDENT = GREEN, ORANGE, PURPLE  # the bases in which a score is taken apart
_S = "sparseness S(v)"
_C = "c\u0303<sub>k</sub>"  # c with a tilde
_FEW = 4  # "most heads need 1 to 4 singular pairs" (Fig. 9)
_Z = 1.96  # of a 95 % interval of a mean


# ---------------------------------------------------------------------------------------------- heads and prompts


class _Head(NamedTuple):
    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def _heads(dataset: xr.Dataset, name: str, at: int) -> list[_Head]:
    """The heads that ``name`` lists at a row, by their index among the flattened ones."""
    return [_Head(*divmod(int(flat), dataset.sizes["head"])) for flat in dataset[name].isel(step=at).values]


def _row_of(dataset: xr.Dataset, step: int | None) -> int:
    """Row of a training step; the last for None."""
    steps = dataset["step"].values.tolist()
    if step is None:
        return len(steps) - 1
    if step not in steps:
        raise bad_value("step", step, f"a captured one: {', '.join(map(str, steps))}", "pass one of these")
    return int(steps.index(step))


def when(dataset: xr.Dataset, at: int) -> str:
    """The checkpoint that a row is of: its training step, or the name of the only one that the run has."""
    if dataset.sizes["step"] == 1 and "checkpoint" in dataset:
        return str(dataset["checkpoint"].values[0])
    return f"step {int(dataset['step'].values[at]):,}"


def _subtitle(dataset: xr.Dataset, when: str, *more: str, prompts: str = "prompt") -> str:
    """Sizes of the model, checkpoints, prompts (the dimension of that name, if there is one)."""
    model = f"{count_of(dataset.sizes['layer'], 'layer')} {TIMES} {count_of(dataset.sizes['head'], 'head')}"
    number = [count_of(dataset.sizes[prompts], "prompt")] if prompts in dataset.sizes else []
    return " · ".join([model, when, *number, *more])


def _require_score(name: str, found: np.ndarray) -> None:
    """Check that one value at least is of a head that has a score."""
    if not found.any():
        raise InputError(f"{name!r} holds no score. Fix: replay prompts whose query sees more keys than one.")


def _scored(dataset: xr.Dataset, name: str, at: int, attending: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of the (prompt, head) pairs that have a score: of all heads, and of those that attend to the key."""
    if not 0 < attending < 1:
        raise bad_value("attending", attending, "an attention weight in (0, 1)", "pass 0.5")
    dims = ("layer", "head", "prompt")
    values = read(dataset, name, *dims, step=at)
    known = values >= 0
    _require_score(name, known)
    attends = read(dataset, "prompt/attention", *dims, step=at) >= attending
    return values[known].astype(int), values[known & attends].astype(int)


def _panels(dataset: xr.Dataset, name: str, attending: float) -> list[tuple[str, np.ndarray, str]]:
    """Heading, values and colour of the two panels that Figs. 8 and 9 have."""
    every, own = _scored(dataset, name, -1, attending)
    pairs = "(prompt, head) pair"
    return [
        (f"all heads: {count_of(len(every), pairs)}", every, GREY),
        (f"attention on the key at least {attending:g}: {count_of(len(own), pairs)}", own, BLUE),
    ]


# ---------------------------------------------------------------------------------------------- Figure 7


def fig_7a(
    dataset: xr.Dataset, *, layer: int | None = None, head: int | None = None, step: int | None = None
) -> go.Figure:
    """Fig. 7a: relative contribution of every singular pair of one head to the attended key's score.

    Bars are means over prompts, whiskers their standard deviation. Below, if the run has them, the singular values of
    the head for a query and a key at the same position; with rotary positions, the contributions of a prompt are in the
    singular basis of its own offset.

    Args:
        dataset: Of a replay.
        layer: Layer of the head, from 0; with ``head``. None for the head with most attention on the key.
        head: Number of the head in its layer, from 0.
        step: Training step of the checkpoint; None for the last.

    Raises:
        InputError: The run lacks the quantities, the checkpoint or the head.
    """
    require_heads(dataset, "contribution/mean", "contribution/sd")
    at = _row_of(dataset, step)
    if (layer is None) != (head is None):
        raise bad_value("layer, head", (layer, head), "both, or none for the task's first head", "name both")
    if layer is None or head is None:
        require_heads(dataset, "task/layer_head")
        own = _heads(dataset, "task/layer_head", at)[0]
    else:
        own = _Head(layer, head)
        for name, number in zip(own._fields, own, strict=True):
            if not 0 <= number < dataset.sizes[name]:
                raise bad_value(name, number, f"0..{dataset.sizes[name] - 1}", "pass one that the model has")
    place = {"step": at, **own._asdict()}
    mean, sd = (read(dataset, f"contribution/{name}", "rank", **place) for name in ("mean", "sd"))
    if not np.isfinite(mean).any():
        raise InputError(f"{own} has no score at {when(dataset, at)}. Fix: pass another layer and head.")
    index = np.arange(1, len(mean) + 1)
    shows_sigma = "singular_values" in dataset
    figure, low = go.Figure(), 0.42 if shows_sigma else 0.0
    figure.add_bar(
        x=index,
        y=mean,
        name="mean over prompts",
        marker={"color": _SINGULAR, "opacity": 0.7},
        width=0.7,
        error_y={"type": "data", "array": sd, "color": GREY, "thickness": 1.2, "width": 2},
        hovertemplate=f"singular pair %{{x}}: {_C} = %{{y:.3f}}<extra></extra>",
    )
    x = _index_axis(len(mean), "singular index k")
    draw_rule(figure, 1, "y", 0, width=1, color=GREY)
    y = {"title": {"text": f"relative contribution {_C} (nats)"}}
    if shows_sigma:
        figure.add_bar(
            x=index,
            y=read(dataset, "singular_values", "rank", **place),
            name="singular value",
            marker={"color": GREY},
            width=0.7,
            hovertemplate=f"{SIGMA}<sub>%{{x}}</sub> = %{{y:.3f}}<extra></extra>",
            **axes_of(2),
        )
        sigma_axis = {"title": {"text": f"{SIGMA}<sub>k</sub> at offset 0 (nats)"}, "nticks": 4}
        place_panel(figure, 2, ((0, 1), (0, low - 0.06)), x, sigma_axis)
        x = {**x, "title": {"text": ""}, "showticklabels": False}
    place_panel(figure, 1, ((0, 1), (low, 1)), x, y)
    more = ["bars: mean over prompts; whiskers: their standard deviation"]
    if "sad/sparseness" in dataset:
        more.append(f"mean S(v) = {float(dataset['sad/sparseness'].isel(place)):.3f}")
    return finish(
        figure,
        f"How the singular pairs of {own} make up its attention",
        _subtitle(dataset, when(dataset, at), *more),
        height=520 if shows_sigma else 450,
        showlegend=False,
        margin={**MARGIN, "t": 80},
    )


def _index_axis(n: int, title: str) -> dict[str, Any]:
    """An axis of singular indices with the first at 1."""
    ticks = index_ticks(n)
    ticks["tickvals"] = [at + 1 for at in ticks["tickvals"]]
    return {"title": {"text": title}, "range": [0.3, n + 0.7], **ticks}


def fig_7b(dataset: xr.Dataset, *, x_axis: XAxis = "log") -> go.Figure:
    """Fig. 7b: S(v) of the task's heads over training, with both rotated controls, and what these heads come to do.

    The heads are the same at every step: those with most attention on the key at the LAST one (``task/layer_head``).
    A thin line is the mean over prompts of one head, a thick line the mean of the heads. A control is the mean over its
    random rotations; its band goes from the lowest to the highest of them. Below: the heads' attention on the key, and
    the share of prompts that the model gets right, if the run has it.
    """
    names = ("prompt/sparseness", "draw/shared", "draw/independent", "prompt/attention", "task/layer_head")
    require_heads(dataset, *names, "contribution/mean", n_steps=2)
    heads = _heads(dataset, "task/layer_head", -1)
    figure, time = go.Figure(), Steps(dataset, x_axis)
    sparse, attention = (
        mean_of_finite(_of_heads(dataset, name, heads), -1) for name in ("prompt/sparseness", "prompt/attention")
    )
    _require_score("prompt/sparseness", np.isfinite(sparse))
    n_draws = dataset.sizes["draw"]
    for name, colour, text in (
        ("draw/shared", _SHARED, "shared rotation"),
        ("draw/independent", _INDEPENDENT, "independent rotation"),
    ):
        draws = mean_of_finite(_of_heads(dataset, name, heads), 1)  # [step, draw]
        low, high = _range_of_finite(draws)
        time.band(figure, low, high, colour, name=f"{text}, range", **axes_of(1))
        time.line(figure, mean_of_finite(draws, 1), colour, text, width=2, **axes_of(1))
    for number, values, colour, text in (
        (1, sparse, _SINGULAR, "singular basis"),
        (2, attention, BLUE, "attention on the key"),
    ):
        for i, own in enumerate(heads if len(heads) > 1 else ()):
            look: dict[str, Any] = {"width": 1, "opacity": 0.5, "showlegend": False, **axes_of(number)}
            time.line(figure, values[:, i], colour, f"{text}, {own}", **look)
        first = {"legendrank": 1} if number == 1 else {}
        time.line(figure, mean_of_finite(values, 1), colour, text, width=2.5, **first, **axes_of(number))
    shares = "attention weight"
    if "sad/accuracy" in dataset:
        time.line(figure, read(dataset, "sad/accuracy", "step"), VERMILLION, "accuracy", width=2, **axes_of(2))
        shares = "attention weight, accuracy"
    hidden = {"title": {"text": ""}, "showticklabels": False}
    place_panel(figure, 1, ((0, 1), (0.4, 1)), {**time.axis, **hidden}, _sparseness_axis(dataset))
    place_panel(figure, 2, ((0, 1), (0, 0.34)), time.axis, {"title": {"text": shares}, "range": [0, 1.03]})
    start, last = (int(time.steps[i]) for i in (0, -1))
    names_of = ", ".join(map(str, heads))
    when = f"{len(time.steps)} checkpoints, steps {start:,} to {last:,}"
    more = [f"thin: {names_of}, the heads of step {last:,}", f"bands: all {n_draws} rotations"]
    return finish(
        figure,
        "Sparseness of the task's heads over training",
        _subtitle(dataset, when, *more),
        height=600,
    )


def _sparseness_axis(dataset: xr.Dataset) -> dict[str, Any]:
    """Axis of S(v); it is least for a score that a single singular pair makes."""
    return {"title": {"text": f"{_S}, at least 1/{dataset.sizes['rank']}"}, "rangemode": "tozero"}


def _of_heads(dataset: xr.Dataset, name: str, heads: list[_Head]) -> np.ndarray:
    """A quantity of the given heads at every step [step, head, ...]."""
    values = np.asarray(dataset[name].transpose("step", "layer", "head", ...).values, dtype=float)
    return np.stack([values[:, own.layer, own.head] for own in heads], axis=1)


def _range_of_finite(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest finite number of each row; NaN where there is none."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return np.fmin.reduce(finite, axis=1), np.fmax.reduce(finite, axis=1)


# ---------------------------------------------------------------------------------------------- Figures 8 and 9


def fig_8(dataset: xr.Dataset, *, attending: float = 0.5) -> go.Figure:
    """Fig. 8: which singular pair contributes most, as shares of (prompt, head) pairs, at the last step.

    Left all heads, right those that attend to the key. The last eighth of the spectrum is shaded; the dotted line is
    what every index would have if all came equally often.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).
    """
    require_heads(dataset, "prompt/top_index", "prompt/attention", "contribution/mean")
    rank = dataset.sizes["rank"]
    last_eighth = rank - max(1, rank // 8)
    figure, spans, top = go.Figure(), [(0.0, 0.47), (0.53, 1.0)], 0.88
    highest = 1 / rank
    for number, (heading, values, colour) in enumerate(_panels(dataset, "prompt/top_index", attending), start=1):
        share = np.bincount(values, minlength=rank) / max(1, len(values))
        highest = max(highest, float(share.max()))
        _histogram(figure, number, np.arange(1, rank + 1), share, colour, heading, "singular index")
        if len(values):
            draw_rule(figure, number, "y", 1 / rank, dash="dot", width=1)
            ends = {"x0": last_eighth + 0.5, "x1": rank + 0.5, "y0": 0, "y1": 1}
            place = {"xref": axis_name("x", number), "yref": f"{axis_name('y', number)} domain", "layer": "below"}
            figure.add_shape(type="rect", fillcolor=GREY, opacity=0.2, line_width=0, **ends, **place)
        x = _index_axis(rank, "singular index k of the largest contribution")
        _place_shares(figure, number, (spans[number - 1], (0, top)), x)
        found = f"in the last eighth: {share[last_eighth:].sum():.1%}" if len(values) else "none"
        draw_heading(figure, f"{heading}<br>{found}", spans[number - 1], top)
    return finish(
        figure,
        "Which singular pair contributes most",
        _subtitle(dataset, when(dataset, -1), "shaded: last eighth; dotted: every index equally often"),
        showlegend=False,
        yaxis_range=[0, 1.08 * highest],
        yaxis2_range=[0, 1.08 * highest],
        margin={**MARGIN, "t": 90},
    )


def fig_9(dataset: xr.Dataset, *, attending: float = 0.5) -> go.Figure:
    """Fig. 9: how many singular pairs make up a score (N_recon), as shares of (prompt, head) pairs, at the last step.

    Left all heads, right those that attend to the key. Bars up to 4 are coloured.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).
    """
    require_heads(dataset, "prompt/n_recon", "prompt/attention", "contribution/mean")
    rank = dataset.sizes["rank"]
    panels = _panels(dataset, "prompt/n_recon", attending)
    first, end = min(1, int(panels[0][1].min())), int(panels[0][1].max())  # 0 for a score of 0
    figure, spans, top, highest = go.Figure(), [(0.0, 0.47), (0.53, 1.0)], 0.88, 0.0
    for number, (heading, values, _) in enumerate(panels, start=1):
        share = np.bincount(values, minlength=end + 1)[first:] / max(1, len(values))
        highest = max(highest, float(share.max()))
        n = np.arange(first, end + 1)
        colours = [BLUE if at <= _FEW else GREY for at in n]
        _histogram(figure, number, n, share, colours, heading, "N<sub>recon</sub>")
        found = "none"
        if len(values):
            found = f"median {np.median(values):.3g} of {rank}, at most {_FEW}: {(values <= _FEW).mean():.1%}"
            draw_rule(figure, number, "x", float(np.median(values)), dash="dot", width=1)
        title = {"text": "N<sub>recon</sub>, singular pairs that make up the score (count)"}
        x = {"title": title, "range": [first - 0.7, end + 0.7], "dtick": 1 if end <= 16 else 5}
        _place_shares(figure, number, (spans[number - 1], (0, top)), x)
        draw_heading(figure, f"{heading}<br>{found}", spans[number - 1], top)
    return finish(
        figure,
        "How many singular pairs make up a score",
        _subtitle(dataset, when(dataset, -1), f"blue: at most {_FEW}; dotted: median"),
        showlegend=False,
        yaxis_range=[0, 1.08 * highest],
        yaxis2_range=[0, 1.08 * highest],
        margin={**MARGIN, "t": 90},
    )


def _histogram(
    figure: go.Figure, number: int, at: np.ndarray, share: np.ndarray, colour: Any, name: str, what: str
) -> None:
    figure.add_bar(
        x=at,
        y=share,
        name=name,
        marker={"color": colour, "line": {"width": 0}},
        width=0.8,
        hovertemplate=f"{what} %{{x}}: %{{y:.1%}}<extra></extra>",
        **axes_of(number),
    )


def _place_shares(figure: go.Figure, number: int, domain: tuple[Span, Span], x: dict[str, Any]) -> None:
    y = {"title": {"text": "share of (prompt, head) pairs" if number == 1 else ""}, "tickformat": ".0%"}
    place_panel(figure, number, domain, x, y)


# ---------------------------------------------------------------------------------------------- beyond the paper


def heads_map(dataset: xr.Dataset) -> go.Figure:
    """All heads of the model at the last step: attention on the key, S(v), and median N_recon; means over prompts.

    Circles are the task's heads, those with most attention on the key, if the run names them. A head without a score
    has an empty cell.
    """
    maps = (
        ("sad/attention", "attention on the key", ".2f"),
        ("sad/sparseness", _S, ".2f"),
        ("sad/n_recon", "N<sub>recon</sub>, median (count)", ".1~f"),
    )
    require_heads(dataset, *(name for name, _, _ in maps))
    n_layers, n_heads = dataset.sizes["layer"], dataset.sizes["head"]
    cell = min(48.0, 220 / n_heads, 600 / n_layers)  # pixels
    tall = max(round(cell * n_layers), 140)
    heads = _heads(dataset, "task/layer_head", -1) if "task/layer_head" in dataset else []
    figure, width = go.Figure(), 1000
    inner = width - MARGIN["l"] - MARGIN["r"]
    end = cell * n_heads / inner
    layout: dict[str, Any] = {}
    for number, (name, text, shown) in enumerate(maps, start=1):
        values = read(dataset, name, "layer", "head", step=-1)
        _require_score(name, np.isfinite(values))
        left = (number - 1) * 0.36
        axis = f"coloraxis{number if number > 1 else ''}"
        draw_heat(
            figure,
            number,
            ((left, left + end), (0, 1)),
            values,
            columns=range(n_heads),
            rows=range(n_layers),
            hover=f"layer {{row}}, head {{column}}<br>{text} {{value}}",
            x={"title": {"text": "head"}, **_count_ticks(n_heads, cell)},
            y={"title": {"text": "layer" if number == 1 else ""}, **_count_ticks(n_layers, cell)},
            numbers=cell >= 36,
            number_format=shown,
            coloraxis=axis,
        )
        if heads:
            figure.add_scatter(
                x=[own.head for own in heads],
                y=[own.layer for own in heads],
                text=[str(own) for own in heads],
                mode="markers",
                name=f"heads of the task: {', '.join(map(str, heads))}",
                legendgroup="task",
                showlegend=number == 1,
                marker={**SHOWN, "size": 0.75 * cell},
                hovertemplate="%{text}: head of the task<extra></extra>",
                **axes_of(number),
            )
        bar = {"x": left + end + 0.005, "y": 1, "yanchor": "top", "ypad": 0, "lenmode": "pixels", "len": tall}
        low, high = 0.0, float(np.nanmax(values))
        if name == "sad/n_recon":
            low, bar = 1.0, {**bar, "tick0": 1, "dtick": max(1, math.ceil((high - 1) / 8))}
        layout[axis] = {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": colour_bar(text, **bar)}
    return finish(
        figure,
        "Attention, sparseness and N<sub>recon</sub> of every head",
        _subtitle(dataset, when(dataset, -1)),
        height=tall + MARGIN["t"] + MARGIN["b"],
        width=width,
        **layout,
    )


def _count_ticks(n: int, cell: float) -> dict[str, Any]:
    """Numbers from 0, as many as there is room for."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, n) if step * cell >= 18 or step >= n)
    return ticks_at(range(0, n, every), [str(i) for i in range(0, n, every)], tickangle=0, ticklabelstandoff=3)


def causal(dataset: xr.Dataset) -> go.Figure:
    """What happens if n contributions are taken off the scores of the task's heads: change of attention and of logits.

    At the last step, mean over prompts with its 95 % confidence interval. The n are those that contribute most, n
    others at random, or those of the largest singular values.
    """
    panels = (
        ("causal/attention", "change of the attention weight on the key"),
        ("causal/logit_difference", "change of the logit difference (nats)"),
    )
    require_heads(dataset, *(name for name, _ in panels), "causal/layer_head")
    heads = _heads(dataset, "causal/layer_head", -1)
    kinds = (  # in the order of the callback; beside one another, as the first and the last may be alike
        ("largest contributions", VERMILLION, "circle", -0.1),
        ("random others", GREY, "square", 0.0),
        ("largest singular values", BLUE, "diamond-open", 0.1),
    )
    figure, spans = go.Figure(), [(0.0, 0.45), (0.55, 1.0)]
    for number, (name, text) in enumerate(panels, start=1):
        values = read(dataset, name, "n_removed", "kind", "pair", step=-1)
        _require_score(name, np.isfinite(values))
        n_removed = np.arange(1, len(values) + 1)
        for i, (kind, colour, symbol, aside) in enumerate(kinds):
            mean, half = _mean_and_interval(values[:, i])
            figure.add_scatter(
                x=n_removed + aside,
                y=mean,
                customdata=n_removed,
                error_y={"type": "data", "array": half, "thickness": 1.5, "width": 3},
                mode="lines+markers",
                name=kind,
                legendgroup=kind,
                showlegend=number == 1,
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"{kind}, n = %{{customdata}}: %{{y:.3f}}<extra></extra>",
                **axes_of(number),
            )
        draw_rule(figure, number, "y", 0, color=GREY, width=1)
        x = {"title": {"text": "contributions removed from each head, n (count)"}, "tickvals": n_removed}
        place_panel(figure, number, (spans[number - 1], (0, 1)), x, {"title": {"text": text}})
    more = [f"{', '.join(map(str, heads))} at once", "whiskers: 95 % confidence interval of the mean"]
    return finish(
        figure,
        f"Removing contributions from the {count_of(len(heads), 'head')} of the task",
        _subtitle(dataset, when(dataset, -1), *more, prompts="pair"),
    )


def _mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean along the last axis, and half of its 95 % confidence interval, without what is no number."""
    mean = mean_of_finite(values, -1)
    n = np.isfinite(values).sum(-1)
    squares = np.where(np.isfinite(values), (values - mean[..., None]) ** 2, 0).sum(-1)
    return mean, _Z * np.sqrt(squares / np.where(n > 1, n - 1, np.nan) / np.where(n > 0, n, np.nan))


def sparsity_over_time(dataset: xr.Dataset, *, x_axis: XAxis = "linear") -> go.Figure:
    """Toy model: S(v) of the attended scores over training with its controls, and the alignment of singular vectors.

    Lines are means of the instances, bands go from the lowest instance to the highest.
    """
    series = (
        ("sad/sparseness_shared_rotation", _SHARED, "shared rotation", 1),
        ("sad/sparseness_independent_rotation", _INDEPENDENT, "independent rotation", 1),
        ("sad/sparseness", _SINGULAR, "singular basis", 1),
        ("alignment/matched", BLUE, "alignment of singular vectors", 2),
    )
    require(dataset, *(name for name, *_ in series), "singular_values", n_steps=2)
    measured = np.isfinite(read(dataset, "sad/sparseness", "step", "instance")).any(1)
    if measured.sum() >= 2:  # AttentionSparsity may look at every n-th step alone
        dataset = dataset.isel(step=measured)
    figure, time = go.Figure(), Steps(dataset, x_axis)
    for name, colour, text, number in series:
        values = require_finite(name, read(dataset, name, "step", "instance"))
        low, high = _range_of_finite(values)
        time.band(figure, low, high, colour, name=f"{text}, range", **axes_of(number))
        first = {"legendrank": 1} if name == "sad/sparseness" else {}
        time.line(figure, mean_of_finite(values, 1), colour, text, width=2.5, **first, **axes_of(number))
    hidden = {"title": {"text": ""}, "showticklabels": False}
    place_panel(figure, 1, ((0, 1), (0.46, 1)), {**time.axis, **hidden}, _sparseness_axis(dataset))
    label = "|cosine| of matched singular<br>vectors and features"
    place_panel(figure, 2, ((0, 1), (0, 0.4)), time.axis, {"title": {"text": label}, "range": [0, 1.03]})
    return finish(
        figure,
        "Sparseness of attention scores, and alignment, over training",
        subtitle_of(dataset, "lines: mean of the instances; bands: lowest to highest"),
        height=600,
    )


# ---------------------------------------------------------------------------------------------- all of them

REPLAY_FIGURES: dict[str, Entry] = {
    "fig_7a": Entry(
        fig_7a,
        "Contributions of the singular pairs of one head",
        "Fig. 7a",
        "A sparse head has a few tall bars, and they are the same from prompt to prompt (short whiskers); they need "
        "not be those of the largest singular values, below.",
    ),
    "fig_7b": Entry(
        fig_7b,
        "S(v) of the task's heads over training, with rotated controls",
        "Fig. 7b",
        "The singular basis falls, while scores in a basis that all heads share at random do not: sparseness grows "
        "with training and belongs to the singular vectors. Below, the heads learn the task meanwhile.",
    ),
    "fig_8": Entry(
        fig_8,
        "Which singular pair contributes most",
        "Fig. 8",
        "If singular values alone decided, the first indices would have it all; bars in the shaded end are scores "
        "that small singular values make.",
    ),
    "fig_9": Entry(
        fig_9,
        "How many singular pairs make up a score",
        "Fig. 9",
        "The more of the bars are blue, the more scores are made of 1 to 4 singular pairs.",
    ),
    "heads_map": Entry(
        heads_map,
        "Attention, sparseness and N_recon of every head",
        "beyond the paper",
        "Heads that attend to the key (bright on the left, circled) are to be dark in the middle and on the right: "
        "sparse, and made of few pairs.",
    ),
    "causal": Entry(
        causal,
        "Removing contributions from the task's heads",
        "beyond the paper",
        "If the few largest contributions are what the model uses, taking them off hurts at once, and taking off "
        "others does not. Where the diamonds lie on the circles, the largest contributions are those of the largest "
        "singular values.",
    ),
    "sparsity_over_time": Entry(
        sparsity_over_time,
        "S(v) of the toy model over training",
        "beyond the paper",
        "The score becomes sparse in the singular basis as its vectors align (below), and not in a rotated one.",
    ),
}
