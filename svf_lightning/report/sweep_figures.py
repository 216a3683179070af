"""Figures of a sweep: final metrics along each of its axes, as in the paper's Appendix A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value
from svf_lightning.report.drawing import GREY, LABELS, as_text, count_of, final_values, finish, value_axis

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("alignment/matched", "orthogonality/attended_vs_rest")
_AXES = {
    "model.lambda_attn": LABELS["lambda_attn"],
    "model.n_features": "number of features, N",
    "model.d_model": "dimension of a token, D",
    "model.d_head": "dimension of the head, H",
    "model.target_logit": "target logit",
    "data.context_length": "keys per query",
    "data.feature_probability": "probability that a feature is active",
}


def along_axis(
    trials: pd.DataFrame,
    axis: str,
    others: Sequence[str] = (),
    y: str | Sequence[str] = METRICS,
    *,
    rule: float | None = None,
    title: str = "",
) -> go.Figure:
    """Final metrics of a sweep's trials along one of its parameters (Appendix A).

    Args:
        trials: One row per trial, as ``Sweep.table`` makes it; those that are not done are left out.
        axis: The parameter.
        others: Further parameters that differ; their values are shown for the dot under the pointer.
        y: Name of a metric, or several of the same unit; those that the trials lack are left out.
        rule: A value to draw a line at; None for none.
        title: Title; empty for one that says the axis.

    Raises:
        InputError: No trial is done, none has a number for a metric, or the table has no such column.
    """
    names = [name for name in ([y] if isinstance(y, str) else y) if name in trials]
    if axis not in trials or not names:
        missing = axis if axis not in trials else y
        raise bad_value(
            "axis or y", missing, f"columns of the table: {', '.join(map(str, trials.columns))}", "name one of these"
        )
    done = trials[trials["state"] == "done"]
    if done.empty:
        raise InputError("no trial of the sweep is done. Fix: run it, or wait for its first trials.")
    values = done[axis]
    numbers = np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=float)
    numeric = bool(np.isfinite(numbers).all())
    labels = sorted(set(values)) if numeric else list(dict.fromkeys(map(str, values)))
    at = numbers if numeric else np.array([labels.index(str(value)) for value in values], dtype=float)
    hover = []
    for row in done.to_dict("records"):
        settings = [f"{name.rsplit('.', 1)[-1]} {row[name]}" for name in (axis, *others)]
        hover.append(as_text(", ".join([*settings, f"trial {row['trial']}"])))
    ordered = "seed" not in axis  # a line from seed to seed means nothing
    figure, y_axis = final_values({name: (at, done[name].to_numpy(float)) for name in names}, hover, means=ordered)
    ticks = np.unique(at)
    x_axis = value_axis(ticks, named=True)
    if not numeric:
        x_axis = {
            "tickvals": list(range(len(labels))),
            "ticktext": list(map(as_text, labels)),
            "range": [-0.5, len(labels) - 0.5],
        }
    if rule is not None:
        figure.add_hline(y=rule, line={"color": GREY, "dash": "dot"})
    further = f"over {', '.join(name.rsplit('.', 1)[-1] for name in others)} and seeds" if others else ""
    parts = [
        count_of(len(done), "trial"),
        "dots: trials; line: their mean" if ordered else "dots: trials",
        further,
        f"dotted: {rule:g}" if rule is not None else "",
    ]
    name = _AXES.get(axis, axis.rsplit(".", 1)[-1])
    return finish(
        figure,
        title or f"Along {axis.rsplit('.', 1)[-1]}",
        " · ".join(part for part in parts if part),
        xaxis={"title": {"text": name}, **x_axis},
        yaxis=y_axis,
    )
