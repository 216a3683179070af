"""Features against singular vectors at the last step (Fig. 2), and which singular vectors pairs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int

from svf_lightning.figures.axes import (
    Span,
    axes_of,
    axis_name,
    colour_axis,
    draw_heat,
    draw_rule,
    index_ticks,
    place_panel,
    ticks_at,
)
from svf_lightning.figures.figure import figure
from svf_lightning.figures.groups import Groups
from svf_lightning.figures.look import GREY, LEGEND_RIGHT, MARGIN, OTHERS, SHOWN, SIGMA, TIMES, count_of, finish
from svf_lightning.figures.reading import read, read_last, require, require_finite, subtitle_of, target_logits
from svf_lightning.sentences import Sentence
from svf_lightning.sentences import number as in_words

if TYPE_CHECKING:
    import xarray as xr

_COSINES = ("cosine_left", "cosine_right")
_PAIRS = ("query_feature", "key_feature")


class SingularVectors(NamedTuple):
    """Every feature of one instance against every singular vector, at the last step."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    cosine_left: Float[np.ndarray, "feature rank"]  # |cosine|
    cosine_right: Float[np.ndarray, "feature rank"]
    singular_values: Float[np.ndarray, "rank"]  # nats, descending
    groups: Groups  # features in the order of the rows
    subtitle: str


class SingularVectorsOfPairs(NamedTuple):
    """The same, with the singular value that each pair was matched with, of all instances."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    cosine_left: Float[np.ndarray, "feature rank"]  # |cosine|
    cosine_right: Float[np.ndarray, "feature rank"]
    target_logit: Float[np.ndarray, "instance pair"]  # nats
    sigma: Float[np.ndarray, "instance pair"]  # nats; NaN: the pair found no singular vector left
    matched_index: Int[np.ndarray, "instance pair"]  # singular index, from 1; 0: none
    groups: Groups
    instance: int
    subtitle: str


class PairMap(NamedTuple):
    """Every pair of one instance against every singular index, at the last step."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    product: Float[np.ndarray, "pair rank"]  # left times right |cosine|
    target_logit: Float[np.ndarray, "pair"]  # nats
    matched_index: Int[np.ndarray, "pair"]  # matched one to one, from 1; 0: none was left
    query_feature: Int[np.ndarray, "pair"]
    key_feature: Int[np.ndarray, "pair"]
    subtitle: str


def prepare_fig_2a(dataset: xr.Dataset, *, instance: int = 0) -> SingularVectors:
    """Features against singular vectors, and singular values.

    Raises:
        InputError: The run lacks singular vectors, pairs or such an instance, or diverged.
    """
    require(dataset, *_COSINES, *_PAIRS, "singular_values", instance=instance)
    left, right = _cosines(dataset, instance)
    return SingularVectors(
        rank=_indices(left),
        cosine_left=left,
        cosine_right=right,
        singular_values=require_finite("singular_values", read_last(dataset, "singular_values")[instance]),
        groups=Groups.of(dataset),
        subtitle=subtitle_of(dataset, instance=instance, final=True),
    )


def prepare_fig_2b(dataset: xr.Dataset, *, instance: int = 0) -> SingularVectorsOfPairs:
    """Features against singular vectors, and matched singular values with target logits.

    Raises:
        InputError: The run lacks singular vectors, pairs or such an instance, or diverged.
    """
    require(dataset, *_COSINES, *_PAIRS, "pair/sigma", "pair/index", "target_logit", instance=instance)
    index, target = _last_index(dataset), target_logits(dataset)
    more = f"{count_of(target.shape[1], 'pair')}, cosines of instance {instance}"
    left, right = _cosines(dataset, instance)
    return SingularVectorsOfPairs(
        rank=_indices(left),
        cosine_left=left,
        cosine_right=right,
        target_logit=target,
        sigma=require_finite("pair/sigma", np.where(index > 0, read_last(dataset, "pair/sigma"), np.nan)),
        matched_index=index,
        groups=Groups.of(dataset),
        instance=instance,
        subtitle=subtitle_of(dataset, more, final=True),
    )


def prepare_pair_map(dataset: xr.Dataset, *, instance: int = 0) -> PairMap:
    """Left times right cosine of every pair with every singular index.

    Raises:
        InputError: The run lacks singular vectors, pairs or such an instance, or diverged.
    """
    require(dataset, *_COSINES, *_PAIRS, "pair/index", "target_logit", instance=instance)
    query, key = (dataset[name].values for name in _PAIRS)
    left, right = _cosines(dataset, instance)
    return PairMap(
        rank=_indices(left),
        product=left[query] * right[key],
        target_logit=target_logits(dataset)[instance],
        matched_index=_last_index(dataset)[instance],
        query_feature=query,
        key_feature=key,
        subtitle=subtitle_of(dataset, instance=instance, final=True),
    )


def _cosines(dataset: xr.Dataset, instance: int) -> list[np.ndarray]:
    """|cosine| of features with left and with right singular vectors, both [feature, rank]."""
    return [
        require_finite(name, read(dataset, name, "feature", "rank", step=-1, instance=instance)) for name in _COSINES
    ]


def _last_index(dataset: xr.Dataset) -> np.ndarray:
    """Matched singular indices [instance, pair], from 1; 0: none."""
    return read_last(dataset, "pair/index").astype(int) + 1


def _indices(cosines: np.ndarray) -> np.ndarray:
    """Singular indices of cosines [feature, rank], from 1."""
    return np.arange(1, cosines.shape[1] + 1)


def draw_fig_2a(data: SingularVectors) -> go.Figure:
    """Two heat maps, singular values above them."""
    drawn = go.Figure()
    _draw_cosines(drawn, data, [(0, 0.49), (0.51, 1)], (0, 0.8))
    drawn.update_layout(xaxis_constraintoward="right", xaxis2_constraintoward="left")
    sigma = data.singular_values
    for number in (1, 2):
        drawn.add_bar(
            x=np.arange(len(sigma)),
            y=sigma,
            customdata=data.rank,
            marker={"color": GREY},
            width=0.7,
            showlegend=False,
            hovertemplate="singular value %{customdata}: %{y:.3f}<extra></extra>",
            xaxis=axis_name("x", number),
            yaxis=axis_name("y", number + 2),
        )
        title = {"text": f"{SIGMA}<sub>k</sub> (nats)" if number == 1 else ""}
        place = {"domain": [0.84, 1], "anchor": axis_name("x", number), "rangemode": "tozero", "nticks": 4}
        drawn.update_layout(
            {axis_name("y", number + 2, "axis"): {**place, "title": title, "showticklabels": number == 1}}
        )
    below: dict[str, Any] = {"orientation": "h", "x": 0.5, "xanchor": "center"}
    below |= {"y": 0, "yref": "container", "yanchor": "bottom"}
    return finish(
        drawn,
        "Features and singular vectors",
        data.subtitle,
        height=760,
        width=700,
        coloraxis=colour_axis(**below, len=0.5),
        margin={**MARGIN, "t": 90, "b": 120},
    )


def draw_fig_2b(data: SingularVectorsOfPairs) -> go.Figure:
    """Two heat maps, and matched singular values against target logits, which they equal on the dotted line."""
    drawn = go.Figure()
    spans: list[Span] = [(0.0, 0.27), (0.29, 0.56), (0.74, 1.0)]
    _draw_cosines(drawn, data, spans, (0, 1))
    others = [i for i in range(len(data.sigma)) if i != data.instance]
    finite = [i for i in [*others, data.instance] if np.isfinite(data.sigma[i]).any()]
    for i in finite:
        is_shown = i == data.instance
        drawn.add_scatter(
            x=data.target_logit[i],
            y=data.sigma[i],
            customdata=data.matched_index[i],
            mode="markers",
            name=f"instance {i}" if is_shown else "other instances",
            legendgroup=str(is_shown),
            showlegend=is_shown or i == finite[0],
            marker=SHOWN if is_shown else OTHERS,
            hovertemplate=f"instance {i}, T = %{{x:.3g}}: singular value %{{customdata}} = %{{y:.3f}}<extra></extra>",
            **axes_of(3),
        )
    top = float(max(np.nanmax(data.sigma), np.nanmax(data.target_logit)))
    line = {"dash": "dot", "width": 1}
    drawn.add_shape(type="line", xref="x3", yref="y3", x0=0, y0=0, x1=top, y1=top, line=line, layer="below")
    place = {"xref": "x3", "yref": "y3", "x": top, "y": top, "xanchor": "right", "yanchor": "bottom", "xshift": -6}
    drawn.add_annotation(text=f"{SIGMA} = T", showarrow=False, **place)
    limits = [-0.02 * top, 1.08 * top]
    x = {"title": {"text": "target logit T (nats)"}, "range": limits}
    y = {"title": {"text": f"matched singular value {SIGMA} (nats)"}, "range": limits}
    place_panel(drawn, 3, (spans[2], (0.3, 1)), x, y)
    return finish(
        drawn,
        "Features and singular vectors, many pairs",
        data.subtitle,
        height=640,
        coloraxis=colour_axis(x=0.57, len=0.5),
        legend=LEGEND_RIGHT,
    )


def _draw_cosines(
    drawn: go.Figure, data: SingularVectors | SingularVectorsOfPairs, spans: Sequence[Span], height: Span
) -> None:
    """Two panels: features against left and right singular vectors."""
    groups = data.groups
    ends = {len(groups.query), len(groups.attended)} - {0, len(groups.order)}
    sides = (("left", "u", data.cosine_left), ("right", "v", data.cosine_right))
    for number, (side, letter, cosines) in enumerate(sides, start=1):
        n = cosines.shape[1]
        title = f"{side}{' singular vector' * (n >= 8)} {letter}<sub>k</sub>"
        draw_heat(
            drawn,
            number,
            (spans[number - 1], height),
            cosines[groups.order],
            columns=data.rank.tolist(),
            rows=groups.order,
            hover=f"feature {{row}}, {letter}<sub>{{column}}</sub><br>|cosine| {{value}}",
            x={"title": {"text": title}, **index_ticks(n)},
            y={"title": {"text": "feature" if number == 1 else ""}, **groups.rows(), "showticklabels": number == 1},
        )
        for end in sorted(ends):
            draw_rule(drawn, number, "y", end - 0.5, color="#FFFFFF", width=1.5)


def draw_pair_map(data: PairMap) -> go.Figure:
    """Heat map with a circle at the index that each pair was matched with, one to one, if one was left for it."""
    n_pairs, n_singular = data.product.shape
    cell = min(36.0, 780 / n_singular, max(560 / n_pairs, 4))  # pixels
    tall, width = max(round(cell * n_pairs), 150), max(560, round(220 + cell * n_singular))
    end = min(1.0, cell * n_singular / (width - 220))
    labels = [f"{query} → {key}" for query, key in zip(data.query_feature, data.key_feature, strict=True)]
    shown = range(0, n_pairs, math.ceil(14 / cell))
    drawn = go.Figure()
    draw_heat(
        drawn,
        1,
        ((0, end), (0, 1)),
        data.product,
        columns=data.rank.tolist(),
        rows=labels,
        hover=f"pair {{row}}, index {{column}}<br>left {TIMES} right |cosine| {{value}}",
        x={"title": {"text": "singular index k"}, **index_ticks(n_singular)},
        y={
            "title": {"text": "query → key (target logit)" if cell * n_pairs >= 180 else "pair"},
            **ticks_at(shown, [f"{labels[pair]} ({data.target_logit[pair]:.3g})" for pair in shown]),
        },
    )
    matched = np.flatnonzero(data.matched_index)
    if len(matched):
        marker = {**SHOWN, "size": min(9, max(3, round(cell * 0.6)))}
        points = {"x": data.matched_index[matched] - 1, "y": matched, "hoverinfo": "skip", "cliponaxis": False}
        drawn.add_scatter(**points, mode="markers", name="matched one to one", marker=marker)
    bar = {"x": end + 0.01, "y": 1, "yanchor": "top", "lenmode": "pixels", "len": tall + 20}
    return finish(
        drawn,
        "Which singular vectors each pair uses",
        data.subtitle,
        height=tall + MARGIN["t"] + MARGIN["b"],
        width=width,
        coloraxis=colour_axis(f"left {TIMES} right |cosine|", **bar),
    )


def _largest(data: SingularVectors | SingularVectorsOfPairs, instance: int) -> list[Sentence]:
    """How close attended features come to a singular vector."""
    sentences = []
    for side, features, cosines in (
        ("query", data.groups.query, data.cosine_left),
        ("key", [*data.groups.key] or data.groups.query, data.cosine_right),
    ):
        largest = cosines[features].max(1)
        if not np.isfinite(largest).any():
            continue
        each = " to ".join(dict.fromkeys(in_words(end) for end in (np.nanmin(largest), np.nanmax(largest))))
        text = f"Largest |cosine| of a {side} feature with a {'left' if side == 'query' else 'right'} singular vector: "
        sentences.append(Sentence(f"{text}{each}.", {f"largest/{side}": largest}))
    return sentences


def _has_several_pairs(dataset: xr.Dataset) -> bool:
    return dataset.sizes.get("pair", 0) >= 2


fig_2a = figure(
    "fig_2a",
    prepare_fig_2a,
    draw_fig_2a,
    description="Every feature against every singular vector",
    paper="Fig. 2a",
    see="An attended feature is aligned if its row has one bright cell, and no other feature is bright in that column.",
    says=lambda data: _largest(data, 0),
    on_page=lambda dataset: not _has_several_pairs(dataset),  # Fig. 2b shows the same and more
    compared=True,
    view="toy",
)
fig_2b = figure(
    "fig_2b",
    prepare_fig_2b,
    draw_fig_2b,
    description="Many pairs against singular vectors, and singular values against target logits",
    paper="Fig. 2b",
    see="Attended features are aligned if they have one bright cell each; on the right, singular values on the dotted "
    "line are as large as the logits that the pairs are to get.",
    says=lambda data: _largest(data, data.instance),
    on_page=_has_several_pairs,
    compared=True,
    view="toy",
)
pair_map = figure(
    "pair_map",
    prepare_pair_map,
    draw_pair_map,
    description="Which pairs share a singular vector",
    paper="appendix",
    see="A column that is bright in several rows is a singular vector that these pairs share.",
    on_page=_has_several_pairs,
)
