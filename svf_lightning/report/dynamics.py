"""What happens when in a training of the toy model: everything over one step axis (Fig. 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.report.drawing import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    PURPLE,
    SIGMA,
    SKY,
    VERMILLION,
    Steps,
    axis_name,
    finish,
    mean_of_finite,
    read,
    subtitle_of,
)
from svf_lightning.summary import dynamics_of

if TYPE_CHECKING:
    import xarray as xr

_INSTANCES_EACH = 64  # lines of a panel; more cannot be told apart
_POINTS_EACH = 150  # of an instance's thin line
_MOMENTS = (
    ("dynamics/t_align", "alignment", BLUE),
    ("dynamics/t_ortho", "orthogonality", VERMILLION),
)
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss", "log", (("loss/recon", "reconstruction loss", GREY), ("loss/attn", "attention loss (nats)", BROWN))),
    (
        f"{SIGMA}<sub>k</sub> (nats)",
        "linear",
        (("spectrum/sigma_1", "first singular value", GREEN), ("spectrum/sigma_2", "second singular value", ORANGE)),
    ),
    (
        "|cosine|",
        "linear",
        (
            ("alignment/matched", "alignment of singular vectors", BLUE),
            ("orthogonality/attended_vs_rest", "attended against other features", VERMILLION),
            ("orthogonality/rest_vs_rest", "among other features", SKY),
        ),
    ),
    ("S(v)", "linear", (("sad/sparseness", "sparseness of attention scores", PURPLE),)),
)


def dynamics(dataset: xr.Dataset) -> go.Figure | None:
    """Losses, singular values, alignment, orthogonality and sparseness over one step axis, with one cursor (Fig. 3).

    Args:
        dataset: A trajectory of the toy model.

    Returns:
        The figure; None if the run holds none of them, or has a single step.
    """
    if dataset.sizes["step"] < 2:
        return None
    panels = []
    for title, scale, lines in _PANELS:
        known = tuple(line for line in lines if line[0] in dataset and dataset[line[0]].dims == ("step", "instance"))
        if known:
            panels.append((title, scale, known))
    if not panels:
        return None
    figure, time = go.Figure(), Steps(dataset, "log")
    gap, height = 0.05, 1 / len(panels)
    layout: dict[str, Any] = {}
    for number, (title, scale, lines) in enumerate(panels):
        own = axis_name("y", number + 1)
        top = 1 - number * height
        domain = [max(0.0, top - height + (gap if number < len(panels) - 1 else 0)), top]
        axis: dict[str, Any] = {"title": {"text": title}, "type": scale, "domain": domain}
        if scale == "log" and _spans_decades(dataset, lines):
            axis["dtick"] = 1
        if title == "|cosine|":
            axis["range"] = [0, 1.03]
        layout[axis_name("y", number + 1, "axis")] = axis
        for name, label, colour in lines:
            values = read(dataset, name, "step", "instance")
            _thin_lines(figure, time, values, colour, name, own)
            mean = mean_of_finite(values, 1)
            options = {"legendgroup": name, "yaxis": own, "hover": LABELS.get(name, label), "connectgaps": True}
            time.line(figure, mean, colour, label, width=2.5, **options)
    moments = []
    changes = dynamics_of(dataset)
    for name, word, colour in _MOMENTS:
        times = changes.get(name, np.empty(0))
        if np.isfinite(times).any():
            at = float(np.nanmedian(times))
            ends = {"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"}
            figure.add_shape(type="line", **ends, line={"dash": "dot", "width": 1.5, "color": colour})
            moments.append(f"{word} {at:,.0f}")
    log = {"xaxis.type": "log", "xaxis.tickmode": "array", "xaxis.title.text": "training step (log scale)"}
    linear = {"xaxis.type": "linear", "xaxis.tickmode": "auto", "xaxis.title.text": "training step"}
    buttons = [
        {"label": label, "method": "relayout", "args": [{**axis, "xaxis.autorange": True}]}
        for label, axis in (("log steps", log), ("linear steps", linear))
    ]
    n = dataset.sizes["instance"]
    thin = f"; thin: {'each' if n <= _INSTANCES_EACH else f'{_INSTANCES_EACH} of them'}" if n > 1 else ""
    dotted = f"; dotted: median step of change ({', '.join(moments)})" if moments else ""
    return finish(
        figure,
        "Losses, singular values, alignment and orthogonality",
        subtitle_of(dataset, f"thick: mean over instances{thin}{dotted}"),
        height=190 * len(panels) + 150,
        xaxis={
            **time.axis, "anchor": axis_name("y", len(panels)), "showspikes": True,
            "spikemode": "across", "spikesnap": "cursor", "spikethickness": 1, "spikedash": "dot",
        },
        hovermode="x",
        hoversubplots="axis",
        updatemenus=[{"type": "buttons", "buttons": buttons, "direction": "right", "x": 1, "y": 0, "pad": {"t": 45}}],
        **layout,
    )  # fmt: skip


def _spans_decades(dataset: xr.Dataset, lines: Iterable[tuple[str, str, str]]) -> bool:
    values = np.concatenate([dataset[name].values.ravel() for name, _, _ in lines])
    values = values[np.isfinite(values) & (values > 0)]
    return values.size > 0 and bool(values.max() > 20 * values.min())


def _thin_lines(figure: go.Figure, time: Steps, values: np.ndarray, colour: str, name: str, axis: str) -> None:
    """Every instance, as one trace with gaps."""
    if values.shape[1] < 2:
        return
    kept = time.kept[np.isfinite(values[time.kept]).any(1)]  # some quantities are not measured at every step
    rows = kept[:: max(1, len(kept) // _POINTS_EACH)]
    n = min(values.shape[1], _INSTANCES_EACH)
    x = np.tile([*time.x[rows], np.nan], n)
    y = np.concatenate([[*values[rows, i], np.nan] for i in range(n)])
    figure.add_scatter(
        x=np.round(x, 3),
        y=[float(f"{value:.4g}") for value in y],
        mode="lines",
        line={"color": colour, "width": 0.8},
        opacity=0.3,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
        yaxis=axis,
    )
