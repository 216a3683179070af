"""The figure of un-whitened singular vectors beside features (Unwhitening)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, VERMILLION, count_of, finish
from svf_lightning.figures.reading import mean_of_finite, read, require_heads
from svf_lightning.figures.sparsity import require_score, sizes_of_heads, when
from svf_lightning.metrics.intervals import mean_interval
from svf_lightning.sentences import Sentence, number

if TYPE_CHECKING:
    import xarray as xr

_SIDES = {"left": (BLUE, "circle", -0.15), "right": (VERMILLION, "diamond", 0.15)}  # colour, symbol, shift
_FORMS = {"as they are": "plain_", "un-whitened": ""}


class Nearness(NamedTuple):
    """How near the first singular vectors of all heads are to a feature, and random directions of their spaces."""

    form: Shaped[np.ndarray, "form"]
    side: Shaped[np.ndarray, "side"]
    cosine: Float[np.ndarray, "form side layer head"]  # |cos| with the nearest feature
    random: Float[np.ndarray, "form side layer head"]  # the same of random directions, mean
    percentile: Float[np.ndarray, "form side layer head"]  # share of these that are less near; 0.5 by chance
    subtitle: str


def prepare_unwhitening(dataset: xr.Dataset) -> Nearness:
    """Nearness of every head's first singular vectors at the last step, as they are and un-whitened.

    Args:
        dataset: Of a replay with the Unwhitening callback.

    Raises:
        InputError: The run lacks the quantities, or no head has one.
    """
    ends = {"cosine": "{}", "random": "random_{}", "percentile": "percentile_{}"}
    names = {
        field: [[f"unwhitening/{prefix}{end.format(side)}" for side in _SIDES] for prefix in _FORMS.values()]
        for field, end in ends.items()
    }
    require_heads(dataset, *(name for rows in names.values() for row in rows for name in row))
    values = {
        field: np.array([[read(dataset, name, "layer", "head", step=-1) for name in row] for row in rows])
        for field, rows in names.items()
    }
    require_score(names["cosine"][0][0], np.isfinite(values["cosine"]))
    tokens = read(dataset, "unwhitening/tokens", "layer", step=-1)
    return Nearness(
        form=np.array(list(_FORMS)),
        side=np.array(list(_SIDES)),
        **values,
        subtitle=f"{sizes_of_heads(dataset, when(dataset, -1), prompts='')} · covariance of "
        f"{count_of(int(tokens.max()), 'token')}",
    )


def draw_unwhitening(data: Nearness) -> go.Figure:
    """One panel for each form: every head at its layer, and the mean of random directions over the heads of a layer."""
    drawn = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=list(data.form))
    layers = np.arange(data.cosine.shape[2])
    for column, (cosine, random) in enumerate(zip(data.cosine, data.random, strict=True), start=1):
        for (side, (colour, symbol, shift)), its, chance in zip(_SIDES.items(), cosine, random, strict=True):
            layer, head = np.indices(its.shape)
            drawn.add_scatter(
                x=(layer + shift).ravel(), y=its.ravel(), customdata=np.stack([layer.ravel(), head.ravel()], -1),
                mode="markers", name=f"first {side} singular vectors", legendgroup=side, showlegend=column == 1,
                marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.7},
                hovertemplate="layer %{customdata[0]}, head %{customdata[1]}: %{y:.3f}<extra></extra>",
                row=1, col=column,
            )  # fmt: skip
            drawn.add_scatter(
                x=layers, y=mean_of_finite(chance, -1), mode="lines", name=f"random directions, {side}",
                legendgroup=f"random {side}", showlegend=column == 1,
                line={"color": GREY, "width": 2, "dash": "solid" if side == "left" else "dot"},
                hovertemplate="random, layer %{x}: %{y:.3f}<extra></extra>", row=1, col=column,
            )  # fmt: skip
    drawn.update_xaxes(title_text="layer")
    drawn.update_yaxes(title_text="|cosine| with the nearest feature", range=[0, 1], col=1)
    return finish(drawn, "First singular vectors of all heads against the nearest feature", data.subtitle)


def say_unwhitening(data: Nearness) -> list[Sentence]:
    """For each form and side, the mean percentile among random directions, with its interval over heads."""
    sentences = []
    for i, form in enumerate(data.form):
        for j, side in enumerate(data.side):
            shares = data.percentile[i, j].ravel()
            shares = shares[np.isfinite(shares)]
            low, high = mean_interval(shares)
            near, chance = (float(np.nanmean(values[i, j])) for values in (data.cosine, data.random))
            evidence = {
                "heads": len(shares), "cosine": near, "random": chance, "percentile": shares.mean(), "low": low,
                "high": high, "by_chance": 0.5,
            }  # fmt: skip
            happened = bool(low > 0.5)
            verdict = "nearer than by chance" if happened else "not nearer than by chance"
            if not happened and high >= 0.5:
                verdict = "not clearly nearer than by chance"
            sentences.append(
                Sentence(
                    f"First {side} singular vectors {form}: {verdict}. |cosine| with the nearest feature is "
                    f"{number(near)}, that of random directions {number(chance)}, and a share of "
                    f"{number(shares.mean())} [{number(low)}, {number(high)}] of these is less near "
                    f"(0.5 by chance; {len(shares):,} heads).",
                    evidence,
                    happened,
                )
            )
    return sentences


unwhitening = figure(
    "unwhitening",
    prepare_unwhitening,
    draw_unwhitening,
    description="Singular vectors against the nearest feature, as they are and un-whitened",
    paper="beyond the paper",
    see="Each point is a head: its first singular vector, as it is (left) and times the covariance of what the heads "
    "of its layer read (right). Un-whitening draws any direction towards where tokens lie, so only a distance from the "
    "line of random directions of the heads' own spaces, un-whitened alike, says something of singular vectors.",
    says=say_unwhitening,
)
