"""What a head of limited dimension gives each pair, and what the best head of its rank would give (Appendix E)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int

from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, VERMILLION, finish
from svf_lightning.figures.reading import read_last, require, require_finite, subtitle_of, target_logits
from svf_lightning.sentences import Sentence
from svf_lightning.sentences import number as in_words

if TYPE_CHECKING:
    import xarray as xr


class Served(NamedTuple):
    """The logit of every pair at the last step, by target."""

    target_logit: Float[np.ndarray, "instance pair"]  # nats
    logit: Float[np.ndarray, "instance pair"]  # what the trained head gives, nats
    predicted: Float[np.ndarray, "instance pair"]  # what the best head of its rank gives for the same features, nats
    query_feature: Int[np.ndarray, "pair"]
    key_feature: Int[np.ndarray, "pair"]
    subtitle: str


def prepare_capacity(dataset: xr.Dataset) -> Served:
    """Logits of the pairs, and their prediction.

    Raises:
        InputError: The run lacks the Capacity callback or pairs, or diverged.
    """
    require(dataset, "pair/logit", "pair/predicted_logit", "query_feature", "key_feature", "target_logit")
    logit, predicted = (require_finite(name, read_last(dataset, name)) for name in ("pair/logit", _PREDICTED))
    return Served(
        target_logit=target_logits(dataset),
        logit=logit,
        predicted=predicted,
        query_feature=dataset["query_feature"].values,
        key_feature=dataset["key_feature"].values,
        subtitle=subtitle_of(dataset, final=True),
    )


_PREDICTED = "pair/predicted_logit"


def draw_capacity(data: Served) -> go.Figure:
    """Dots for every pair of every instance: trained and predicted logit against the target, met on the dotted line."""
    drawn = go.Figure()
    names = np.array([f"{i} → {j}" for i, j in zip(data.query_feature, data.key_feature, strict=True)])
    for values, label, colour, symbol in (
        (data.predicted, "best head of its rank", VERMILLION, "diamond-open"),
        (data.logit, "trained head", BLUE, "circle"),
    ):
        drawn.add_scatter(
            x=data.target_logit.ravel(),
            y=values.ravel(),
            customdata=np.broadcast_to(names, values.shape).ravel(),
            mode="markers",
            name=label,
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
            hovertemplate=f"pair %{{customdata}}, T = %{{x:.3g}}<br>{label}: %{{y:.3f}}<extra></extra>",
        )
    top = float(np.nanmax(data.target_logit))
    for slope, label in ((1.0, "target"), (0.5, "half of it: served")):
        line = {"dash": "dot", "width": 1, "color": GREY}
        drawn.add_shape(type="line", x0=0, y0=0, x1=top, y1=slope * top, line=line, layer="below")
        drawn.add_annotation(x=top, y=slope * top, text=label, showarrow=False, xanchor="right", yanchor="bottom")
    drawn.update_xaxes(title_text="target logit T (nats)")
    drawn.update_yaxes(title_text="logit of the pair (nats)")
    return finish(drawn, "What a head of its size can hold, and what it holds", data.subtitle, height=480)


def _says(data: Served) -> Sequence[Sentence | None]:
    half = data.target_logit / 2
    served, predicted = (
        float(100 * np.mean(np.where(data.target_logit < 0, values <= half, values >= half)))
        for values in (data.logit, data.predicted)
    )
    text = (
        f"The trained head gives {in_words(served)} % of the pairs half of their target logit or more, the best head "
        f"of its rank for the same features {in_words(predicted)} %."
    )
    return [Sentence(text, {"served": served, "predicted": predicted})]


capacity = figure(
    "capacity",
    prepare_capacity,
    draw_capacity,
    description="What a head of its size can hold of the template",
    paper="Appendix E",
    see="Every pair of features that the template names: the logit that training gave it, and the one that it "
    "has in the head of this rank whose logits of all feature pairs come closest to the template (least squares).",
    says=_says,
)
