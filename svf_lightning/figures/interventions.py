"""The figure of what happens if heads read other than they do along some directions (DirectionIntervention)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, MARGIN, VERMILLION, count_of, finish
from svf_lightning.figures.reading import read, require_heads
from svf_lightning.figures.sparsity import Head, heads_of, require_score, sizes_of_heads, when
from svf_lightning.metrics.intervals import mean_interval
from svf_lightning.sentences import Sentence, number

if TYPE_CHECKING:
    import xarray as xr

# in the callback's order
_CHOICES = (
    "largest contributions",
    "largest singular values",
    "largest in a rotated basis",
    "random in the head's space",
    "another head's",
    "drawn like the residuals",
    "others of the same nats",
    "all that the head reads",
)
_N_CONTROLS = 5
_SOURCES = ("with the names exchanged", "with a third name", "with the file's counterfactual")
_SIDES = {"query": (BLUE, "circle", 0.14), "key": (VERMILLION, "diamond", -0.14)}  # colour, symbol, shift
_EFFECTS = {
    "attention": "change of the attention on the key (weight)",
    "logit_difference": "change of the logit difference (nats)",
    "divergence": "KL of the output from the untouched one (nats)",
}
_ROW = 250  # pixels


class DirectionEffects(NamedTuple):
    """What changes at the last step that was measured: means over templates, and their 95 % intervals."""

    operation: Shaped[np.ndarray, "operation"]  # what is done along the directions
    side: Shaped[np.ndarray, "side"]  # whose input is moved
    choice: Shaped[np.ndarray, "choice"]  # which directions
    attention: Float[np.ndarray, "operation side choice"]  # change of the weight on the key, mean over heads too
    attention_low: Float[np.ndarray, "operation side choice"]
    attention_high: Float[np.ndarray, "operation side choice"]
    logit_difference: Float[np.ndarray, "operation side choice"]  # change (nats)
    logit_difference_low: Float[np.ndarray, "operation side choice"]
    logit_difference_high: Float[np.ndarray, "operation side choice"]
    divergence: Float[np.ndarray, "operation side choice"]  # KL (nats)
    divergence_low: Float[np.ndarray, "operation side choice"]
    divergence_high: Float[np.ndarray, "operation side choice"]
    against_controls: Float[np.ndarray, "effect side end"]  # top minus strongest control, taken out: mean, low, high
    n_templates: int
    n_directions: int
    beyond: list[float]  # heads of the task that are beyond every control, for each side
    heads: list[Head]
    subtitle: str


def prepare_interventions(dataset: xr.Dataset) -> DirectionEffects:
    """Effects of moving along directions of each choice, in every way that was measured.

    Args:
        dataset: Of a replay with the DirectionIntervention callback.

    Raises:
        InputError: The run lacks the quantities, or no checkpoint has numbers.
    """
    names = [f"directions/{kind}/{effect}" for kind in ("ablated", "boosted", "patched") for effect in _EFFECTS]
    require_heads(dataset, *names, "directions/layer_head", "directions/numbers")
    measured = np.isfinite(dataset["directions/boosted/divergence"].values).any(axis=(1, 2, 3))
    require_score("directions/boosted/divergence", measured)
    row = int(np.flatnonzero(measured)[-1])
    numbers = read(dataset, "directions/numbers", "n_directions", step=row).astype(int)
    most = int(numbers.max())
    labels = [_taken_out(n) for n in numbers] + [f"{count_of(most, 'direction')} doubled"]
    labels += [f"{count_of(most, 'direction')} as in the same prompt {source}" for source in _SOURCES]
    values: dict[str, np.ndarray] = {}
    for effect in _EFFECTS:
        one = ("side", "choice", "template")
        ablated = read(dataset, f"directions/ablated/{effect}", "n_directions", *one, step=row)
        boosted = read(dataset, f"directions/boosted/{effect}", *one, step=row)
        patched = read(dataset, f"directions/patched/{effect}", "source", *one, step=row)
        values[effect] = np.concatenate([ablated, boosted[None], patched])
    there = np.isfinite(values["attention"]).any(axis=(1, 2, 3))
    fields: dict[str, np.ndarray] = {}
    for effect, each in values.items():
        fields[effect], fields[f"{effect}_low"], fields[f"{effect}_high"] = _mean_and_interval(each[there])
    against = []
    for effect in _EFFECTS:
        pairs = [
            (
                dataset[f"template/directions/{side}/{effect}"].values[row],
                dataset[f"template/directions/{side}/{effect}_strongest_control"].values[row],
            )
            for side in _SIDES
        ]
        against.append(np.stack(_mean_and_interval(np.stack([top - control for top, control in pairs])), -1))
    return DirectionEffects(
        operation=np.array([label for label, known in zip(labels, there, strict=True) if known]),
        side=np.array(list(_SIDES)),
        choice=np.array(_CHOICES),
        **fields,
        against_controls=np.stack(against),
        n_templates=values["attention"].shape[-1],
        n_directions=most,
        beyond=[float(dataset[f"directions/{side}/heads_beyond_controls"].values[row]) for side in _SIDES],
        heads=heads_of(dataset, "directions/layer_head", row),
        subtitle=sizes_of_heads(dataset, when(dataset, row)),
    )


def draw_interventions(data: DirectionEffects) -> go.Figure:
    """A row for each way to move, a column for each effect; points with whiskers for each choice of directions."""
    n_rows = len(data.operation)
    titles = [title for operation in data.operation for title in (f"<b>{operation}</b>", "", "")]
    drawn = make_subplots(
        rows=n_rows, cols=len(_EFFECTS), horizontal_spacing=0.05, vertical_spacing=0.3 / n_rows, shared_yaxes=True,
        subplot_titles=titles,
    )  # fmt: skip
    place = np.arange(len(data.choice))[::-1].astype(float)
    for i in range(n_rows):
        for column, (effect, title) in enumerate(_EFFECTS.items(), start=1):
            mean, low, high = (getattr(data, f"{effect}{end}")[i] for end in ("", "_low", "_high"))
            for j, (side, (colour, symbol, shift)) in enumerate(_SIDES.items()):
                drawn.add_scatter(
                    x=mean[j],
                    y=place + shift,
                    error_x={
                        "type": "data", "array": high[j] - mean[j], "arrayminus": mean[j] - low[j], "thickness": 1.5,
                        "width": 3,
                    },
                    customdata=np.stack([data.choice, low[j], high[j]], -1),
                    mode="markers",
                    name=f"what the {side} is made of" if side == "query" else "what the keys are made of",
                    legendgroup=side,
                    showlegend=i == 0 and column == 1,
                    marker={"color": colour, "symbol": symbol, "size": 7},
                    hovertemplate="%{customdata[0]}: %{x:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
                    "<extra></extra>",
                    row=i + 1,
                    col=column,
                )  # fmt: skip
            drawn.add_vline(0, row=i + 1, col=column, line={"color": GREY, "width": 1})
            if i == n_rows - 1:
                drawn.update_xaxes(title_text=title, row=i + 1, col=column)
    drawn.update_yaxes(tickvals=place, ticktext=[f"{choice} " for choice in data.choice], range=[-0.6, place[0] + 0.6])
    drawn.update_yaxes(title_text="directions", col=1)
    drawn.update_annotations(xanchor="left", x=0, font={"size": 13})
    margin = {**MARGIN, "l": 190, "t": 150}
    return finish(
        drawn,
        f"Directions that the heads read along, moved in {', '.join(map(str, data.heads))} at once",
        f"{data.subtitle} · controls (rows two to six) move the input as far · whiskers: 95 % interval over "
        f"{data.n_templates} templates",
        height=_ROW * n_rows + margin["t"] + margin["b"],
        margin=margin,
        width=1150,
    )


def _taken_out(n: int) -> str:
    return f"{count_of(n, 'direction')} taken out"


def _mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the last axis of what is finite, and the ends of its 95 % interval; NaN for nothing."""
    flat = values.reshape(-1, values.shape[-1])
    found = np.full((3, len(flat)), np.nan)
    for i, row in enumerate(flat):
        finite = row[np.isfinite(row)].astype(float)
        if len(finite):
            found[:, i] = finite.mean(), *mean_interval(finite)
    mean, low, high = found.reshape(3, *values.shape[:-1])
    return mean, low, high


def _says(data: DirectionEffects) -> list[Sentence]:
    """For each side, what taking the directions out does to the output, against the strongest control."""
    at = list(data.operation).index(_taken_out(data.n_directions))
    sentences = []
    for j, side in enumerate(_SIDES):
        top = float(data.divergence[at, j, 0])
        difference, low, high = (float(value) for value in data.against_controls[-1, j])
        if np.isfinite([low, high]).all():
            verdict = "more than" if low > 0 else "less than" if high < 0 else "not clearly more than"
        else:
            verdict = "compared with"
        of = "the query" if side == "query" else "the keys"
        sentences.append(
            Sentence(
                f"Without the {data.n_directions} directions of {of} that contribute most, the output moves by "
                f"{number(top)} nats, {verdict} with the strongest control in each template (difference "
                f"{number(difference)} [{number(low)}, {number(high)}]). By themselves, {number(data.beyond[j])} of "
                f"{count_of(len(data.heads), 'head')} go beyond every control.",
                {f"directions/{side}/divergence": top, "difference": data.against_controls[-1, j]},
                happened=bool(low > 0),
            )
        )
    return sentences


interventions = figure(
    "interventions",
    prepare_interventions,
    draw_interventions,
    description="Directions taken out of what heads read, doubled, or taken from another prompt",
    paper="beyond the paper",
    see="Each row moves what the heads read along some directions: those of the singular pairs that contribute most to "
    "the score, and controls that move it exactly as far. If heads use their singular vectors, the first point lies "
    "further from 0 than all controls. Others of the same nats take as much off the score along other pairs, without "
    "regard to how far they must go.",
    says=_says,
)
