"""The map of all heads of a language model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float

from svf_lightning.figures.axes import axes_of, colour_bar, draw_heat, ticks_at
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import MARGIN, SHOWN, finish
from svf_lightning.figures.reading import quantity, read, require_heads
from svf_lightning.figures.sparsity import N_RECON, SPARSENESS, Head, heads_of, require_score, sizes_of_heads, when

if TYPE_CHECKING:
    import xarray as xr

_WIDTH = 1000  # pixels of the figure


class HeadsMap(NamedTuple):
    """Three numbers of every head at the last step; NaN where a head has no score."""

    attention: Float[np.ndarray, "layer head"]  # attention weight on the key, mean over prompts
    sparseness: Float[np.ndarray, "layer head"]  # S(v), mean over prompts
    n_recon: Float[np.ndarray, "layer head"]  # median over prompts (count)
    task_heads: list[Head]  # those with most attention on the key; empty if the run does not name them
    attention_label: str
    subtitle: str


def prepare_heads_map(dataset: xr.Dataset) -> HeadsMap:
    """Attention on the key, S(v) and N_recon of all heads at the last step.

    Args:
        dataset: Of a replay.

    Raises:
        InputError: The run lacks the quantities, or no head has a score.
    """
    names = ("sad/attention", "sad/sparseness", "sad/n_recon")
    require_heads(dataset, *names)
    maps = [read(dataset, name, "layer", "head", step=-1) for name in names]
    for name, values in zip(names, maps, strict=True):
        require_score(name, np.isfinite(values))
    attention, sparseness, n_recon = maps
    return HeadsMap(
        attention=attention,
        sparseness=sparseness,
        n_recon=n_recon,
        task_heads=heads_of(dataset, "task/layer_head", -1) if "task/layer_head" in dataset else [],
        attention_label=quantity(dataset, "sad/attention").title,
        subtitle=sizes_of_heads(dataset, when(dataset, -1)),
    )


def draw_heads_map(data: HeadsMap) -> go.Figure:
    """Three heat maps, a cell for each head; circles are the task's heads. A head without a score has an empty cell."""
    n_layers, n_heads = data.attention.shape
    cell = min(48.0, 220 / n_heads, 600 / n_layers)  # pixels
    tall = max(round(cell * n_layers), 140)
    wide = cell * n_heads / (_WIDTH - MARGIN["l"] - MARGIN["r"])  # of a map, as a share of the figure's inner width
    drawn, layout = go.Figure(), dict[str, Any]()
    for number, (values, label, number_format, low) in enumerate(
        (
            (data.attention, data.attention_label, ".2f", 0.0),
            (data.sparseness, SPARSENESS, ".2f", 0.0),
            (data.n_recon, f"{N_RECON}, median (count)", ".1~f", min(1.0, float(np.nanmin(data.n_recon)))),
        ),
        start=1,
    ):
        left = (number - 1) * 0.36
        axis = f"coloraxis{number if number > 1 else ''}"
        draw_heat(
            drawn,
            number,
            ((left, left + wide), (0, 1)),
            values,
            columns=range(n_heads),
            rows=range(n_layers),
            hover=f"layer {{row}}, head {{column}}<br>{label} {{value}}",
            x={"title": {"text": "head"}, **_count_ticks(n_heads, cell)},
            y={"title": {"text": "layer" if number == 1 else ""}, **_count_ticks(n_layers, cell)},
            numbers=cell >= 36,
            number_format=number_format,
            coloraxis=axis,
        )
        if data.task_heads:
            drawn.add_scatter(
                x=[head.head for head in data.task_heads],
                y=[head.layer for head in data.task_heads],
                text=[str(head) for head in data.task_heads],
                mode="markers",
                name=f"heads of the task: {', '.join(map(str, data.task_heads))}",
                legendgroup="task",
                showlegend=number == 1,
                marker={**SHOWN, "size": 0.75 * cell},
                hovertemplate="%{text}: head of the task<extra></extra>",
                **axes_of(number),
            )
        high = max(float(np.nanmax(values)), low + 1 if values is data.n_recon else low)
        counts = {"tick0": 1, "dtick": max(1, math.ceil((high - low) / 8))} if values is data.n_recon else {}
        place = {"x": left + wide + 0.005, "y": 1, "yanchor": "top", "ypad": 0, "lenmode": "pixels", "len": tall}
        bar = colour_bar(label, **place, **counts)
        layout[axis] = {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}
    return finish(
        drawn,
        f"Attention, sparseness and {N_RECON} of every head",
        data.subtitle,
        height=tall + MARGIN["t"] + MARGIN["b"],
        width=_WIDTH,
        **layout,
    )


def _count_ticks(n: int, cell: float) -> dict[str, Any]:
    """Numbers from 0, as many as there is room for in cells of that many pixels."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, n) if step * cell >= 18 or step >= n)
    return ticks_at(range(0, n, every), [str(i) for i in range(0, n, every)], tickangle=0, ticklabelstandoff=3)


heads_map = figure(
    "heads_map",
    prepare_heads_map,
    draw_heads_map,
    description="Attention, sparseness and number of singular pairs of every head",
    paper="beyond the paper",
    see="Circled: the heads with most attention on the key. A dark cell in the middle is a sparse score (low S(v)), a "
    "dark one on the right a score that few singular pairs make up.",
    compared=True,
    view="replay",
)
