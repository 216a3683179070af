"""The figure of what happens if contributions are taken off the scores of heads, as CausalAblation measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, VERMILLION, count_of, finish
from svf_lightning.figures.reading import mean_of_finite, quantity, read, require_heads
from svf_lightning.figures.sparsity import Head, heads_of, require_score, sizes_of_heads, when

if TYPE_CHECKING:
    import xarray as xr

_KINDS = {  # in the callback's order: colour, symbol, and a shift along x that separates equal values
    "largest contributions": (VERMILLION, "circle", -0.1),
    "random others": (GREY, "square", 0.0),
    "largest singular values": (BLUE, "diamond-open", 0.1),
}
_Z = 1.96  # standard errors in a 95 % interval


class Ablation(NamedTuple):
    """Changes that follow when n contributions are taken off the score of each of the task's heads, at the last step.

    Means over prompts, and half of the 95 % confidence interval of each.
    """

    n_removed: Int[np.ndarray, "n_removed"]  # contributions, from 1
    kind: Shaped[np.ndarray, "kind"]  # which contributions
    attention: Float[np.ndarray, "n_removed kind"]  # change of the attention weight on the key, mean over heads too
    attention_interval: Float[np.ndarray, "n_removed kind"]
    logit_difference: Float[np.ndarray, "n_removed kind"]  # change (nats)
    logit_difference_interval: Float[np.ndarray, "n_removed kind"]
    heads: list[Head]
    attention_axis: str
    logit_difference_axis: str
    subtitle: str


def prepare_causal(dataset: xr.Dataset) -> Ablation:
    """Change of attention and of logits without the n contributions that are largest, random, or of largest sigma.

    Args:
        dataset: Of a replay with the CausalAblation callback.

    Raises:
        InputError: The run lacks the quantities, or no head has a score.
    """
    names = ("causal/attention", "causal/logit_difference")
    require_heads(dataset, *names, "causal/layer_head")
    prompts = "pair" if names[0] in dataset and "pair" in dataset[names[0]].dims else "prompt"  # version 0.1.0: "pair"
    changes = [read(dataset, name, "n_removed", "kind", prompts, step=-1) for name in names]
    for name, values in zip(names, changes, strict=True):
        require_score(name, np.isfinite(values))
    (attention, attention_interval), (logits, logits_interval) = map(_mean_and_interval, changes)
    return Ablation(
        n_removed=np.arange(1, len(attention) + 1),
        kind=np.array(list(_KINDS)),
        attention=attention,
        attention_interval=attention_interval,
        logit_difference=logits,
        logit_difference_interval=logits_interval,
        heads=heads_of(dataset, "causal/layer_head", -1),
        attention_axis=quantity(dataset, names[0]).axis,
        logit_difference_axis=quantity(dataset, names[1]).axis,
        subtitle=sizes_of_heads(dataset, when(dataset, -1), prompts=prompts),
    )


def draw_causal(data: Ablation) -> go.Figure:
    """Lines over the number of contributions removed, with whiskers: attention on the left, logits on the right."""
    drawn = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    for column, (mean, half, title) in enumerate(
        (
            (data.attention, data.attention_interval, data.attention_axis),
            (data.logit_difference, data.logit_difference_interval, data.logit_difference_axis),
        ),
        start=1,
    ):
        for i, (kind, (colour, symbol, shift)) in enumerate(_KINDS.items()):
            drawn.add_scatter(
                x=data.n_removed + shift,
                y=mean[:, i],
                customdata=data.n_removed,
                error_y={"type": "data", "array": half[:, i], "thickness": 1.5, "width": 3},
                mode="lines+markers",
                name=kind,
                legendgroup=kind,
                showlegend=column == 1,
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"{kind}, n = %{{customdata}}: %{{y:.3f}}<extra></extra>",
                row=1,
                col=column,
            )
        drawn.add_hline(0, row=1, col=column, line={"color": GREY, "width": 1})
        drawn.update_yaxes(title_text=title, col=column)
    drawn.update_xaxes(title_text="contributions removed from each head, n (count)", tickvals=data.n_removed)
    together = f"{', '.join(map(str, data.heads))} at once"
    return finish(
        drawn,
        f"Removing contributions from the {count_of(len(data.heads), 'head')} of the task",
        f"{data.subtitle} · {together} · whiskers: 95 % confidence interval of the mean",
    )


def _mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean along the last axis, and half of its 95 % confidence interval, of the finite numbers."""
    mean = mean_of_finite(values, -1)
    n = np.isfinite(values).sum(-1)
    squares = np.where(np.isfinite(values), (values - mean[..., None]) ** 2, 0).sum(-1)
    return mean, _Z * np.sqrt(squares / np.where(n > 1, n - 1, np.nan) / np.where(n > 0, n, np.nan))


causal = figure(
    "causal",
    prepare_causal,
    draw_causal,
    description="Removing contributions from the task's heads",
    paper="beyond the paper",
    see="Each line takes n contributions off the scores of all these heads: the n largest, n random others, or those "
    "of the n largest singular values. Below 0, the model loses attention on the key, or preference for the right "
    "answer. What is taken off is an amount, and only its size matters, not the directions that it came from.",
)
