"""Figures of attention scores taken apart over singular pairs: of a language model's heads, and of the toy model.

They show what the AttentionSparsity callback measures (method, section 6). Singular indices count from 1 as in the
paper, layers and heads from 0: L2H3.

A head has no score where its query sees a single key. Such (prompt, head) pairs are NaN in the dataset, or -1 if they
are an index or a count; the figures leave them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value
from svf_lightning.figures.axes import Steps, XAxis, draw_chance, index_ticks
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import (
    BLUE,
    GREEN,
    GREY,
    MARGIN,
    ORANGE,
    PURPLE,
    SIGMA,
    SKY,
    TIMES,
    VERMILLION,
    as_text,
    count_of,
    finish,
)
from svf_lightning.figures.reading import (
    chance_of,
    mean_of_finite,
    quantity,
    range_of_finite,
    read,
    read_tokens,
    require,
    require_finite,
    require_heads,
    subtitle_of,
)
from svf_lightning.metrics.head_tests import LEVEL
from svf_lightning.sentences import Sentence, from_to

if TYPE_CHECKING:
    import xarray as xr

SPARSENESS, N_RECON = "sparseness S(v)", "N<sub>recon</sub>"
_C = "c\u0303<sub>k</sub>"  # c with a tilde
_SINGULAR = (GREEN, "singular basis")
_CONTROLS = {  # by the end of the quantity's name; earlier versions have no permuted pairing
    "shared_rotation": (ORANGE, "shared rotation"),
    "independent_rotation": (PURPLE, "independent rotation"),
    "permuted_pairing": (SKY, "permuted pairing"),
}
_DRAWS = dict(zip(("draw/shared", "draw/independent", "draw/permuted"), _CONTROLS.values(), strict=True))


# ---- what figures of a replay share ----------------------------------------------------------------------------------


class Head(NamedTuple):
    """An attention head of a language model; layers and heads count from 0."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


PAPER_HEADS: dict[str, tuple[Head, ...]] = {
    "paper_gpt2": (Head(8, 6), Head(4, 11), Head(3, 0), Head(9, 9), Head(9, 6), Head(10, 0)),
    "paper_pythia_160m": (Head(2, 6), Head(4, 11), Head(7, 9), Head(8, 2), Head(8, 10), Head(10, 7)),
}
"""The heads that the authors of arXiv 2602.13524 plot one by one, by preset; layers and heads from 0. By what rule they
chose them is not known here."""


def named_heads(names: str) -> list[Head]:
    """Heads from text: "8.6,4.11" (layer.head, from 0), or a name in :data:`PAPER_HEADS`.

    Raises:
        InputError: It is neither.
    """
    if names in PAPER_HEADS:
        return list(PAPER_HEADS[names])
    found = [re.fullmatch(r"\s*(\d+)\.(\d+)\s*", part) for part in names.split(",")]
    heads = [Head(int(match[1]), int(match[2])) for match in found if match]
    if len(heads) < len(found) or len(set(heads)) < len(heads):
        allowed = f"LAYER.HEAD,LAYER.HEAD,... from 0, each once, or one of {', '.join(PAPER_HEADS)}"
        raise bad_value("heads", names, allowed, "write 8.6,4.11 for head 6 of layer 8 and head 11 of layer 4")
    return heads


def check_heads(dataset: xr.Dataset, heads: Sequence[Head]) -> None:
    """Check that a model has these heads.

    Raises:
        InputError: It does not.
    """
    for head in heads:
        for name, number in head._asdict().items():
            if not 0 <= number < dataset.sizes[name]:
                raise bad_value(name, number, f"0..{dataset.sizes[name] - 1}", "pass one that the model has")


def heads_of(dataset: xr.Dataset, name: str, row: int) -> list[Head]:
    """The heads whose indices, among the flattened ones, a quantity such as ``task/layer_head`` has in a row."""
    return [Head(*divmod(int(flat), dataset.sizes["head"])) for flat in dataset[name].isel(step=row).values]


def when(dataset: xr.Dataset, row: int) -> str:
    """The checkpoint of a row: its training step, or the name of the only checkpoint that the run has."""
    if dataset.sizes["step"] == 1 and "checkpoint" in dataset:
        return str(dataset["checkpoint"].values[0])
    return f"step {int(dataset['step'].values[row]):,}"


def sizes_of_heads(dataset: xr.Dataset, checkpoints: str, *, prompts: str = "prompt") -> str:
    """The first words of a subtitle: sizes of the model, checkpoints, number of prompts.

    Args:
        dataset: Of a replay.
        checkpoints: Those that the figure shows, in words; see :func:`when`.
        prompts: The dimension of the prompts; its size is left out if the dataset does not have it.
    """
    model = f"{count_of(dataset.sizes['layer'], 'layer')} {TIMES} {count_of(dataset.sizes['head'], 'head')}"
    n_prompts = [count_of(dataset.sizes[prompts], "prompt")] if prompts in dataset.sizes else []
    return " · ".join([model, as_text(checkpoints), *n_prompts])


def require_score(name: str, has_score: np.ndarray) -> None:
    """Check that a quantity holds one score at least.

    Args:
        name: Of the quantity.
        has_score: Where it holds one, in any shape.

    Raises:
        InputError: Nowhere.
    """
    if not has_score.any():
        raise InputError(f"{name!r} holds no score. Fix: replay prompts whose query sees more keys than one.")


def index_axis(n: int) -> dict[str, Any]:
    """An axis of n singular indices with the first at 1."""
    ticks = index_ticks(n)
    return {**ticks, "tickvals": [at + 1 for at in ticks["tickvals"]], "range": [0.3, n + 0.7]}


# ---- Figure 7 --------------------------------------------------------------------------------------------------------


class Contributions(NamedTuple):
    """What every singular pair of one head contributes to the score of the attended key."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    mean: Float[np.ndarray, "rank"]  # relative contribution (nats), mean over prompts
    sd: Float[np.ndarray, "rank"]  # its standard deviation over prompts (nats)
    sigma: Float[np.ndarray, "rank"]  # singular values (nats); NaN if the run has none
    sparseness: float  # S(v), mean over prompts; NaN if the run does not have it
    head: Head
    subtitle: str


def prepare_fig_7a(
    dataset: xr.Dataset, *, layer: int | None = None, head: int | None = None, step: int | None = None
) -> Contributions:
    """Relative contribution of every singular pair of one head, and its singular values.

    Args:
        dataset: Of a replay.
        layer: Layer of the head, from 0; with ``head``. None for the head with most attention on the key.
        head: Number of the head in its layer, from 0.
        step: Training step of the checkpoint; None for the last.

    Raises:
        InputError: The run lacks the quantities, the checkpoint or the head, or the head has no score.
    """
    require_heads(dataset, "contribution/mean", "contribution/sd")
    row = _row_of(dataset, step)
    if (layer is None) != (head is None):
        raise bad_value("layer, head", (layer, head), "both, or none for the task's first head", "name both")
    if layer is None or head is None:
        require_heads(dataset, "task/layer_head")
        chosen = heads_of(dataset, "task/layer_head", row)[0]
    else:
        chosen = Head(layer, head)
        check_heads(dataset, [chosen])
    at = {"step": row, **chosen._asdict()}
    mean = read(dataset, "contribution/mean", "rank", **at)
    if not np.isfinite(mean).any():
        raise InputError(f"{chosen} has no score at {when(dataset, row)}. Fix: pass another layer and head.")
    has_sigma, has_sparseness = (name in dataset for name in ("singular_values", "sad/sparseness"))
    return Contributions(
        rank=np.arange(1, len(mean) + 1),
        mean=mean,
        sd=read(dataset, "contribution/sd", "rank", **at),
        sigma=read(dataset, "singular_values", "rank", **at) if has_sigma else np.full_like(mean, np.nan),
        sparseness=float(read(dataset, "sad/sparseness", **at)) if has_sparseness else np.nan,
        head=chosen,
        subtitle=sizes_of_heads(dataset, when(dataset, row)),
    )


def draw_fig_7a(data: Contributions) -> go.Figure:
    """Fig. 7a: bars of the contributions, and below, if the run has them, of the singular values.

    Singular values are those for a query and a key at the same position. With rotary positions, the contributions of a
    prompt are in the singular basis of its own offset.
    """
    n_rows = 2 if np.isfinite(data.sigma).any() else 1
    heights = [0.58, 0.36][:n_rows]
    drawn = make_subplots(rows=n_rows, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    drawn.add_bar(
        x=data.rank,
        y=data.mean,
        name="mean over prompts",
        marker={"color": GREEN, "opacity": 0.7},
        width=0.7,
        error_y={"type": "data", "array": data.sd, "color": GREY, "thickness": 1.2, "width": 2},
        hovertemplate=f"singular pair %{{x}}: {_C} = %{{y:.3f}}<extra></extra>",
        row=1,
        col=1,
    )
    drawn.add_hline(0, row=1, col=1, line={"width": 1, "color": GREY})
    drawn.update_yaxes(title_text=f"relative contribution {_C} (nats)", row=1)
    if n_rows == 2:
        drawn.add_bar(
            x=data.rank,
            y=data.sigma,
            name="singular value",
            marker={"color": GREY},
            width=0.7,
            hovertemplate=f"{SIGMA}<sub>%{{x}}</sub> = %{{y:.3f}}<extra></extra>",
            row=2,
            col=1,
        )
        drawn.update_yaxes(title_text=f"{SIGMA}<sub>k</sub> at offset 0 (nats)", nticks=4, row=2)
    drawn.update_xaxes(index_axis(len(data.rank)))
    drawn.update_xaxes(title_text="singular index k", row=n_rows)
    sparseness = f" · mean S(v) = {data.sparseness:.3f}" if np.isfinite(data.sparseness) else ""
    return finish(
        drawn,
        f"What each singular pair of {data.head} contributes to its score of the key",
        f"{data.subtitle} · bars: mean over prompts; whiskers: their standard deviation{sparseness}",
        height=520 if n_rows == 2 else 450,
        showlegend=False,
        margin={**MARGIN, "t": 80},
    )


def _row_of(dataset: xr.Dataset, step: int | None) -> int:
    """Row of a training step; the last for None."""
    steps = dataset["step"].values.tolist()
    if step is None:
        return len(steps) - 1
    if step not in steps:
        raise bad_value("step", step, f"a captured one: {', '.join(map(str, steps))}", "pass one of these")
    return int(steps.index(step))


class TaskHeads(NamedTuple):
    """The task's heads over training: their S(v) with its controls, and what they come to do.

    They are the same heads at every step: those with most attention on the key at the last one, or those that were
    named.
    """

    step: Int[np.ndarray, "step"]
    tokens: Float[np.ndarray, "step"] | None  # seen in training until then; None: not known
    head: Shaped[np.ndarray, "head"]  # names such as L2H3
    control: Shaped[np.ndarray, "control"]  # names of the controls
    sparseness_each: Float[np.ndarray, "step head"]  # S(v) in the singular basis, mean over prompts
    sparseness: Float[np.ndarray, "step"]  # mean over heads
    attention_each: Float[np.ndarray, "step head"]  # attention weight on the key, mean over prompts
    attention: Float[np.ndarray, "step"]  # mean over heads
    accuracy: Float[np.ndarray, "step"]  # share of the prompts that the model gets right; NaN if the run lacks it
    control_mean: Float[np.ndarray, "control step"]  # S(v) of the heads, mean over random draws
    control_lowest: Float[np.ndarray, "control step"]  # of the draws
    control_highest: Float[np.ndarray, "control step"]
    shares: dict[str, float]  # of all heads: sparser than every control, denser than one; empty if not tested
    n_heads: int  # heads that were tested
    n_draws: int
    n_singular: int  # singular pairs of a head
    attention_label: str
    accuracy_label: str
    is_task: bool  # the task's heads, not heads that were named
    subtitle: str


def prepare_fig_7b(dataset: xr.Dataset, *, heads: Sequence[Head] | None = None) -> TaskHeads:
    """S(v) of the task's heads over training, with both controls, their attention on the key, and the accuracy.

    Args:
        dataset: Of a replay.
        heads: Other heads than the task's.

    Raises:
        InputError: The run lacks the quantities or a head, has fewer than two checkpoints, or no score.
    """
    names = ("prompt/sparseness", "draw/shared", "draw/independent", "prompt/attention", "task/layer_head")
    require_heads(dataset, *names, "contribution/mean", n_steps=2)
    is_task = heads is None
    heads = heads_of(dataset, "task/layer_head", -1) if heads is None else heads
    check_heads(dataset, heads)
    sparseness, attention = (
        mean_of_finite(_of_heads(dataset, name, heads), -1) for name in ("prompt/sparseness", "prompt/attention")
    )
    require_score("prompt/sparseness", np.isfinite(sparseness))
    controls = {name: label for name, (_, label) in _DRAWS.items() if name in dataset}
    drawn = [mean_of_finite(_of_heads(dataset, name, heads), 1) for name in controls]
    mean, lowest, highest = _mean_and_range(drawn)
    shares, n_heads = _tested(dataset)
    step = dataset["step"].values
    has_accuracy = "sad/accuracy" in dataset
    return TaskHeads(
        step=step,
        tokens=read_tokens(dataset),
        head=np.array([str(head) for head in heads]),
        control=np.array(list(controls.values())),
        sparseness_each=sparseness,
        sparseness=mean_of_finite(sparseness, 1),
        attention_each=attention,
        attention=mean_of_finite(attention, 1),
        accuracy=read(dataset, "sad/accuracy", "step") if has_accuracy else np.full(len(step), np.nan),
        control_mean=mean,
        control_lowest=lowest,
        control_highest=highest,
        shares=shares,
        n_heads=n_heads,
        n_draws=dataset.sizes["draw"],
        n_singular=dataset.sizes["rank"],
        attention_label=quantity(dataset, "sad/attention").title,
        accuracy_label=quantity(dataset, "sad/accuracy").title,
        is_task=is_task,
        subtitle=sizes_of_heads(dataset, f"{len(step)} checkpoints, steps {step[0]:,} to {step[-1]:,}"),
    )


def draw_fig_7b(data: TaskHeads, *, x_axis: XAxis = "log") -> go.Figure:
    """Fig. 7b: lines over the training steps, S(v) above, attention and accuracy below.

    A thin line is one head, a thick line the mean of the heads. A control is the mean over its random draws; its band
    goes from the lowest to the highest of them.
    """
    time = Steps(data.step, x_axis, data.tokens)
    drawn = _panels_over_steps(time, 0.6, data.n_singular)
    colours = {label: colour for colour, label in _CONTROLS.values()}
    for i, label in enumerate(data.control):
        band = {"name": f"{label}, range", "row": 1, "col": 1}
        time.band(drawn, data.control_lowest[i], data.control_highest[i], colours[label], **band)
        time.line(drawn, data.control_mean[i], colours[label], label, width=2, row=1, col=1)
    for row, each, mean, (colour, label), rank in (
        (1, data.sparseness_each, data.sparseness, _SINGULAR, 1),
        (2, data.attention_each, data.attention, (BLUE, data.attention_label), None),
    ):
        for i, head in enumerate(data.head if len(data.head) > 1 else ()):
            thin: dict[str, Any] = {"width": 1, "opacity": 0.5, "showlegend": False, "row": row, "col": 1}
            time.line(drawn, each[:, i], colour, f"{label}, {head}", **thin)
        time.line(drawn, mean, colour, label, width=2.5, row=row, col=1, legendrank=rank)
    has_accuracy = time.line(drawn, data.accuracy, VERMILLION, data.accuracy_label, width=2, row=2, col=1)
    drawn.update_yaxes(title_text=f"attention weight{', accuracy' if has_accuracy else ''}", row=2)
    thin_lines = f"thin: {', '.join(data.head)}"
    if data.is_task:
        thin_lines += f", the heads of step {data.step[-1]:,}"
    return finish(
        drawn,
        "Sparseness of the task's heads over training" if data.is_task else "Sparseness of chosen heads over training",
        f"{data.subtitle} · {thin_lines} · bands: all {data.n_draws} draws",
        height=600,
    )


def _tested(dataset: xr.Dataset) -> tuple[dict[str, float], int]:
    """Share of all heads that are sparser than every control, and denser than one, at the last step; how many heads."""
    names = {"sparser": "sad/sparser", "denser": "sad/denser"}
    if any(name not in dataset for name in names.values()):
        return {}, 0
    found = {way: read(dataset, name, "layer", "head", step=-1) for way, name in names.items()}
    known = np.isfinite(found["sparser"])
    if not known.any():  # too few templates
        return {}, 0
    return {way: float(values[known].mean()) for way, values in found.items()}, int(known.sum())


def _of_heads(dataset: xr.Dataset, name: str, heads: Sequence[Head]) -> np.ndarray:
    """A quantity of the given heads at every step [step, head, ...]."""
    values = np.asarray(dataset[name].transpose("step", "layer", "head", ...).values, dtype=float)
    return np.stack([values[:, head.layer, head.head] for head in heads], axis=1)


def _mean_and_range(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest finite number along the last axis of arrays [step, n], each [array, step]."""
    ranges = [range_of_finite(values) for values in arrays]
    mean = np.stack([mean_of_finite(values, 1) for values in arrays])
    return mean, np.stack([lowest for lowest, _ in ranges]), np.stack([highest for _, highest in ranges])


def _panels_over_steps(time: Steps, upper: float, n_singular: int) -> go.Figure:
    """Two panels over one step axis: S(v), with this share of the height, and below something between 0 and 1.

    S(v) is least, 1/n_singular, for a score that a single one of the singular pairs makes.
    """
    heights = [upper, 0.94 - upper]
    drawn = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    drawn.update_xaxes(time.axis)
    drawn.update_xaxes(title_text="", row=1)
    drawn.update_yaxes(title_text=f"{SPARSENESS}, at least 1/{n_singular}", rangemode="tozero", row=1)
    return drawn.update_yaxes(range=[0, 1.03], row=2)


# ---- the toy model ---------------------------------------------------------------------------------------------------


class SparsityOverTime(NamedTuple):
    """Toy model: S(v) of the attended scores with its controls, and the alignment of singular vectors.

    Means and ranges are those of the instances.
    """

    step: Int[np.ndarray, "step"]
    metric: Shaped[np.ndarray, "metric"]  # names: S(v) of the controls, S(v) in the singular basis, alignment
    mean: Float[np.ndarray, "metric step"]
    lowest: Float[np.ndarray, "metric step"]
    highest: Float[np.ndarray, "metric step"]
    n_singular: int  # singular pairs of the head
    chance: float  # alignment of random vectors; NaN: not known
    alignment_label: str
    subtitle: str


def prepare_sparsity_over_time(dataset: xr.Dataset) -> SparsityOverTime:
    """S(v) and alignment at the steps at which S(v) is measured.

    Args:
        dataset: Of the toy model.

    Raises:
        InputError: The run lacks the quantities, has fewer than two steps, or none of its numbers is finite.
    """
    controls = [name for name in _CONTROLS if name != "permuted_pairing" or f"sad/sparseness_{name}" in dataset]
    names = [*(f"sad/sparseness_{control}" for control in controls), "sad/sparseness", "alignment/matched"]
    require(dataset, *names, "singular_values", n_steps=2)
    measured = np.isfinite(read(dataset, "sad/sparseness", "step", "instance")).any(1)
    if measured.sum() >= 2:  # AttentionSparsity may measure every n-th step alone
        dataset = dataset.isel(step=measured)
    mean, lowest, highest = _mean_and_range(
        [require_finite(name, read(dataset, name, "step", "instance")) for name in names]
    )
    return SparsityOverTime(
        step=dataset["step"].values,
        metric=np.array(names),
        mean=mean,
        lowest=lowest,
        highest=highest,
        n_singular=dataset.sizes["rank"],
        chance=chance_of(dataset, "alignment/matched"),
        alignment_label=quantity(dataset, "alignment/matched").title,
        subtitle=subtitle_of(dataset),
    )


def draw_sparsity_over_time(data: SparsityOverTime, *, x_axis: XAxis = "linear") -> go.Figure:
    """Lines over the training steps, S(v) above, alignment below; bands go from the lowest instance to the highest."""
    time = Steps(data.step, x_axis)
    drawn = _panels_over_steps(time, 0.54, data.n_singular)
    for i, name in enumerate(data.metric):
        colour, label = _look_of(name, data.alignment_label)
        row, rank = (2 if name == "alignment/matched" else 1), (1 if name == "sad/sparseness" else None)
        time.band(drawn, data.lowest[i], data.highest[i], colour, name=f"{label}, range", row=row, col=1)
        time.line(drawn, data.mean[i], colour, label, width=2.5, row=row, col=1, legendrank=rank)
    drawn.update_yaxes(title_text="|cosine| of matched singular<br>vectors and features", row=2)
    draw_chance(drawn, 2, data.chance, BLUE)
    return finish(
        drawn,
        "Sparseness of attention scores, and alignment, over training",
        f"{data.subtitle} · lines: mean of the instances; bands: lowest to highest",
        height=600,
    )


def _look_of(name: str, alignment_label: str) -> tuple[str, str]:
    """Colour and label of one of the metrics over time."""
    if name == "alignment/matched":
        return BLUE, alignment_label
    return _CONTROLS.get(name.removeprefix("sad/sparseness_"), _SINGULAR)


# ---- what they say ---------------------------------------------------------------------------------------------------

_LOWER = (
    "A lower S(v) is a sparser score: fewer singular pairs make it up. The controls are what a basis gives that is not "
    "the head's own, and the head's own singular values with vectors that do not belong together."
)


def _ends(step: np.ndarray, labels: Sequence[str], curves: Sequence[np.ndarray]) -> list[Sentence | None]:
    """Ends of the curves of S(v): in the singular basis, then under the controls."""
    return [
        from_to(f"S(v), {label}", step, curve, name=f"S(v), {label}")
        for label, curve in zip(labels, curves, strict=True)
    ]


def _say_fig_7b(data: TaskHeads) -> list[Sentence | None]:
    """Ends of the curves, and how many of all heads are sparser than their controls."""
    labels = [_SINGULAR[1], *map(str, data.control)]
    sentences = _ends(data.step, labels, (data.sparseness, *data.control_mean))
    if data.shares:
        sparser, denser = data.shares["sparser"], data.shares["denser"]
        sentences.append(
            Sentence(
                f"Of all {data.n_heads:,} heads, {sparser:.1%} are sparser than every control at the last step, and "
                f"{denser:.1%} are denser than one of them (each tested over templates; false discoveries: "
                f"{LEVEL:.1%}).",
                {"heads": data.n_heads, "sparser": sparser, "denser": denser, "false discoveries": LEVEL},
                bool(sparser > denser),
            )
        )
    return sentences


def _say_over_time(data: SparsityOverTime) -> list[Sentence | None]:
    """Ends of the curves of S(v)."""
    names = ["sad/sparseness", *(name for name in data.metric if name.startswith("sad/sparseness_"))]
    rows = [data.metric.tolist().index(name) for name in names]
    return _ends(data.step, [_look_of(name, "")[1] for name in names], list(data.mean[rows]))


# ---- all of them -----------------------------------------------------------------------------------------------------

fig_7a = figure(
    "fig_7a",
    prepare_fig_7a,
    draw_fig_7a,
    description="Contributions of the singular pairs of one head",
    paper="Fig. 7a",
    see="Few tall bars are a sparse score; short whiskers are contributions that are the same from prompt to prompt. "
    "Below: the singular values of the same pairs.",
    compared=True,
    view="replay",
)
fig_7b = figure(
    "fig_7b",
    prepare_fig_7b,
    draw_fig_7b,
    description="S(v) of the task's heads over training, with its controls",
    paper="Fig. 7b",
    see=f"{_LOWER} Below: attention on the key, and the model's accuracy.",
    says=_say_fig_7b,
    view="replay",
)
sparsity_over_time = figure(
    "sparsity_over_time",
    prepare_sparsity_over_time,
    draw_sparsity_over_time,
    description="S(v) of the toy model over training",
    paper="beyond the paper",
    see=f"{_LOWER} Below: the alignment of singular vectors at the same steps.",
    says=_say_over_time,
)
