"""More than one head: how several heads share the pairs, and the head at every offset of rotary positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.axes import (
    Span,
    Steps,
    XAxis,
    axes_of,
    colour_axis,
    draw_chance,
    draw_heading,
    draw_heat,
    draw_rule,
    place_panel,
    ticks_at,
)
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, LEGEND_RIGHT, SIGMA, VERMILLION, count_of, finish
from svf_lightning.figures.reading import (
    chance_of,
    mean_of_finite,
    quantity,
    read,
    read_last,
    require,
    require_finite,
    subtitle_of,
)
from svf_lightning.sentences import number

if TYPE_CHECKING:
    import xarray as xr


class HeadShares(NamedTuple):
    """Each head's share of the pairs of one instance at the last step, and alignment of all instances over training."""

    step: Int[np.ndarray, "step"]
    share: Float[np.ndarray, "head pair"]  # of the pair's |logit|; the heads' shares add up to 1
    best: Float[np.ndarray, "step instance"]  # |cosine| in the head where a pair aligns best, mean of the pairs
    combined: Float[np.ndarray, "step instance"]  # |cosine| in the sum of the heads
    participation: Float[np.ndarray, "instance"]  # heads that carry a pair, at the last step
    query_feature: Int[np.ndarray, "pair"]
    key_feature: Int[np.ndarray, "pair"]
    instance: int
    subtitle: str


def prepare_head_shares(dataset: xr.Dataset, *, instance: int = 0) -> HeadShares:
    """How several heads share the pairs.

    Raises:
        InputError: The run lacks several heads, HeadSharing, a second step or such an instance, or diverged.
    """
    pair = ("query_feature", "key_feature")
    require(dataset, "heads/participation", "heads/best", "heads/combined", *pair, n_steps=2)
    require(dataset, "head/share", instance=instance, dims=["head"])
    best, combined = (
        require_finite(name, read(dataset, name, "step", "instance")) for name in ("heads/best", "heads/combined")
    )
    return HeadShares(
        step=dataset["step"].values,
        share=require_finite("head/share", read(dataset, "head/share", "head", "pair", step=-1, instance=instance)),
        best=best,
        combined=combined,
        participation=read_last(dataset, "heads/participation"),
        query_feature=dataset["query_feature"].values,
        key_feature=dataset["key_feature"].values,
        instance=instance,
        subtitle=subtitle_of(dataset, "numbers: a head's part of a pair's |logit|; thin lines: instances"),
    )


def draw_head_shares(data: HeadShares, *, x_axis: XAxis = "linear") -> go.Figure:
    """Heat map of shares; beside it thin lines for instances and thick ones for their mean."""
    n_heads, n_pairs = data.share.shape
    labels = [f"{query} → {key}" for query, key in zip(data.query_feature, data.key_feature, strict=True)]
    shown = range(0, n_pairs, math.ceil(n_pairs / 20))
    pair_ticks = ticks_at(shown, [labels[pair] for pair in shown], tickangle=-45 if n_pairs > 4 else 0)
    drawn, time, top = go.Figure(), Steps(data.step, x_axis), 0.92
    spans: list[Span] = [(0, 0.52), (0.7, 1)]
    draw_heat(
        drawn,
        1,
        (spans[0], (0, top)),
        data.share,
        columns=labels,
        rows=range(n_heads),
        hover="head {row}, pair {column}<br>share {value}",
        x={"title": {"text": "pair: query → key feature"}, **pair_ticks},
        y={"title": {"text": "head"}, **ticks_at(range(n_heads), [str(head) for head in range(n_heads)])},
        numbers=n_pairs <= 12,
    )
    time.lines(drawn, data.combined, BLUE, "sum of the heads", **axes_of(2))
    time.lines(drawn, data.best, VERMILLION, "best head", **axes_of(2))
    y = {"title": {"text": "|cosine| of singular vectors and features"}, "range": [0, 1.03]}
    place_panel(drawn, 2, (spans[1], (0, top)), time.axis, y)
    draw_heading(drawn, f"instance {data.instance}, step {data.step[-1]:,}", spans[0], top)
    draw_heading(drawn, count_of(len(data.participation), "instance"), spans[1], top)
    participation = float(mean_of_finite(data.participation, 0))
    return finish(
        drawn,
        f"Heads that carry a pair: {number(participation)} of {n_heads} (mean participation)",
        data.subtitle,
        coloraxis=colour_axis("share of |logit|", x=spans[0][1] + 0.01, y=top / 2, len=1),
        legend=LEGEND_RIGHT,
    )


class Offsets(NamedTuple):
    """The head at every offset of rotary positions, at the last step."""

    offset: Int[np.ndarray, "offset"]  # positions from the key to the query
    alignment: Float[np.ndarray, "instance offset"]  # |cosine| of matched singular vectors and features
    sigma_1: Float[np.ndarray, "instance offset"]  # nats
    logit: Float[np.ndarray, "instance offset"]  # nats; of the pair with the largest target; NaN if not known
    target_logit: Float[np.ndarray, "offset"]  # nats; of the same pair, mean of the instances; NaN where not known
    pair: str  # which it is, in words
    chance: float  # alignment of random vectors; NaN: not known
    alignment_axis: str  # title
    subtitle: str


def prepare_by_offset(dataset: xr.Dataset) -> Offsets:
    """Alignment, first singular value, and the logit of the pair whose singular value is to come first.

    Its target is known at each offset if ``target_logit`` has that dimension, else where the factor of the position is
    1, at the first.

    Raises:
        InputError: The run lacks rotary positions or singular vectors, or diverged.
    """
    names = ("alignment/matched", "spectrum/sigma_1")
    require(dataset, *names, dims=["offset"])
    alignment, sigma_1 = (require_finite(name, read(dataset, name, "instance", "offset", step=-1)) for name in names)
    logit, target_logit = np.full_like(sigma_1, np.nan), np.full(sigma_1.shape[1], np.nan)
    if "target_logit" in dataset and "pair/logit" in dataset:
        target = dataset["target_logit"].mean(set(dataset["target_logit"].dims) - {"pair", "offset"})
        largest = target.max("offset") if "offset" in target.dims else target
        strongest = int(np.argmax(largest.values))
        logit = read(dataset, "pair/logit", "instance", "offset", step=-1, pair=strongest)
        target_logit[slice(None) if "offset" in target.dims else 0] = target.isel(pair=strongest).values
    return Offsets(
        offset=dataset["offset"].values,
        alignment=alignment,
        sigma_1=sigma_1,
        logit=logit,
        target_logit=target_logit,
        pair="the pair" if dataset.sizes.get("pair") == 1 else "the strongest pair",
        chance=chance_of(dataset, names[0]),
        alignment_axis=quantity(dataset, names[0]).axis,
        subtitle=subtitle_of(dataset, "dots: instances; lines: their mean", final=True),
    )


def draw_by_offset(data: Offsets) -> go.Figure:
    """Two panels: alignment, and singular values with logits. Dots are instances, lines their mean."""
    drawn, offsets = make_subplots(1, 2, horizontal_spacing=0.14), data.offset
    sigma = f"{SIGMA}<sub>1</sub>"
    # logits are close to the singular values, so dots are shifted and lines dashed
    for column, values, colour, text, aside, dash in (
        (1, data.alignment, BLUE, "alignment", 0, "solid"),
        (2, data.sigma_1, BLUE, sigma, -0.1, "solid"),
        (2, data.logit, VERMILLION, f"logit of {data.pair}", 0.1, "dash"),
    ):
        if not np.isfinite(values).any():
            continue
        shared: dict[str, Any] = {"name": text, "legendgroup": text, "row": 1, "col": column}
        drawn.add_scatter(
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
        drawn.add_scatter(
            x=offsets,
            y=mean_of_finite(values, 0),
            mode="lines",
            showlegend=column == 2,
            line={"color": colour, "width": 2.5, "dash": dash},
            hovertemplate=f"{text}<br>mean at offset %{{x}}: %{{y:.3f}}<extra></extra>",
            **shared,
        )
    known = np.isfinite(data.target_logit)
    if known.any():
        drawn.add_scatter(
            x=offsets[known],
            y=data.target_logit[known],
            mode="lines+markers",
            name=f"target of {data.pair}" + ("" if known.all() else f" at offset {offsets[0]}"),
            line={"color": GREY, "width": 1.5, "dash": "dot"},
            marker={"symbol": "diamond-open", "size": 9, "line": {"width": 2}},
            hovertemplate="target at offset %{x}: %{y:.3g}<extra></extra>",
            row=1,
            col=2,
        )
    ticks = {"tickvals": offsets} if len(offsets) <= 16 else {}
    limits = [float(offsets[0]) - 0.5, float(offsets[-1]) + 0.5]
    drawn.update_xaxes(title="offset: positions from the key to the query", range=limits, **ticks)
    drawn.update_yaxes(title=data.alignment_axis, range=[0, 1.03], col=1)
    draw_chance(drawn, 1, data.chance, GREY)
    drawn.update_yaxes(title="singular value and logits (nats)", col=2)
    if (data.logit < 0).any() or (data.target_logit < 0).any():
        draw_rule(drawn, 2, "y", 0, width=1, color=GREY)
    else:
        drawn.update_yaxes(rangemode="tozero", col=2)
    return finish(drawn, "The head at every offset", data.subtitle, legend=LEGEND_RIGHT)


head_shares = figure(
    "head_shares",
    prepare_head_shares,
    draw_head_shares,
    description="How several heads share the pairs",
    paper="appendix",
    see="A column with one bright cell is a pair that a single head has. Right: how close pairs are to singular "
    "vectors of the best of the heads, and to those of the sum of all.",
)
by_offset = figure(
    "by_offset",
    prepare_by_offset,
    draw_by_offset,
    description="Alignment and singular values at every offset (rotary positions)",
    paper="appendix",
    see="With rotary positions each offset has a bilinear form of its own: where dots are near 1 on the left, its "
    "singular vectors are close to the features. Right: its first singular value, and the logit that it gives.",
)
