"""Figures of how scores are made up: which singular pair contributes most, and how many make up a score.

They show firings (every query-key pair that a head attends to, see the Firings callback), where these were measured,
and beside them the task's key: (prompt, head) pairs of all heads, and of those that attend to it, with an attention
weight of at least ``attending``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, MARGIN, VERMILLION, count_of, finish
from svf_lightning.figures.reading import mean_of_finite, read, require_heads
from svf_lightning.figures.sparsity import N_RECON, index_axis, require_score, sizes_of_heads, when
from svf_lightning.metrics.sparsity import FEW, last_eighth
from svf_lightning.sentences import Sentence, capital

if TYPE_CHECKING:
    import xarray as xr

_FIRINGS, _ALL_HEADS = "firings of all heads", "task's key, all heads"
_PAIRS = "(prompt, head) pair"
_OF_PROMPT = ("layer", "head", "prompt")
_ROTATED = "rotated basis"
_DOTTED = {"dash": "dot", "width": 1}


class TopIndices(NamedTuple):
    """Which singular pair contributes most to a score, at the last step."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    group: Shaped[np.ndarray, "group"]  # names: firings if measured; all heads, and those that attend to the key
    n_scores: Int[np.ndarray, "group"]  # firings, or (prompt, head) pairs, of a group
    share: Float[np.ndarray, "group rank"]  # of these, in [0, 1]; 0 in an empty group
    share_in_last_eighth: Float[np.ndarray, "group"]  # of the spectrum
    chance: float  # share of the singular pairs that are the last eighth
    subtitle: str


class ReconCounts(NamedTuple):
    """How many singular pairs make up a score (N_recon), at the last step."""

    n_recon: Int[np.ndarray, "n_recon"]  # from 1, or from 0 if there is a score of 0, to the largest
    group: Shaped[np.ndarray, "group"]  # names: firings if measured; all heads, and those that attend to the key
    n_scores: Int[np.ndarray, "group"]  # firings, or (prompt, head) pairs, of a group
    share: Float[np.ndarray, "group n_recon"]  # of these, in [0, 1]; 0 in an empty group
    share_rotated: Float[np.ndarray, "group n_recon"]  # the same under shared rotations; NaN: not measured
    median: Float[np.ndarray, "group"]  # of N_recon; NaN in an empty group
    median_rotated: Float[np.ndarray, "group"]  # NaN: not measured
    share_at_most_4: Float[np.ndarray, "group"]  # NaN in an empty group
    share_at_most_4_rotated: Float[np.ndarray, "group"]  # NaN: not measured
    n_singular: int  # singular pairs of a head
    subtitle: str


def prepare_fig_8(dataset: xr.Dataset, *, attending: float = 0.5) -> TopIndices:
    """How often each singular pair is the largest contributor: to firings, and to scores of the task's key.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).

    Raises:
        InputError: The run lacks the quantities or has no score, or ``attending`` is out of range.
    """
    _require(dataset, "prompt/top_index", "firings/top_index_histogram")
    n_singular = dataset.sizes["rank"]
    counts = _counts(dataset, "prompt/top_index", "firings/top_index_histogram", n_singular, attending)
    share = _shares(counts.values())
    return TopIndices(
        rank=np.arange(1, n_singular + 1),
        group=np.array(list(counts)),
        n_scores=np.array([each.sum() for each in counts.values()]),
        share=share,
        share_in_last_eighth=share[:, -last_eighth(n_singular) :].sum(1),
        chance=last_eighth(n_singular) / n_singular,
        subtitle=sizes_of_heads(dataset, when(dataset, -1)),
    )


def draw_fig_8(data: TopIndices) -> go.Figure:
    """Fig. 8: a histogram of singular indices for each group.

    The last eighth of the spectrum is shaded. The dotted line is what every index would have if all came equally often.
    """
    n_singular = len(data.rank)
    notes = [f"in the last eighth: {share:.1%}, by chance {data.chance:.1%}" for share in data.share_in_last_eighth]
    drawn = _draw_shares(data, data.rank, _colours(data, BLUE, GREY), notes, "singular index")
    drawn.update_xaxes(title_text="singular index k of the largest contribution", **index_axis(n_singular))
    drawn.update_yaxes(range=[0, 1.08 * max(1 / n_singular, data.share.max())])
    start = n_singular - last_eighth(n_singular) + 0.5
    shade = {"fillcolor": GREY, "opacity": 0.2, "line_width": 0, "layer": "below"}
    for _, place in _with_scores(data):
        drawn.add_hline(1 / n_singular, **place, line=_DOTTED, layer="below")
        drawn.add_vrect(start, n_singular + 0.5, **place, **shade)
    subtitle = f"{data.subtitle} · shaded: last eighth; dotted: every index equally often"
    return finish(drawn, "Which singular pair contributes most", subtitle, **_layout(data))


def prepare_fig_9(dataset: xr.Dataset, *, attending: float = 0.5) -> ReconCounts:
    """How often a score is made of each number of singular pairs: of firings, and of scores of the task's key.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).

    Raises:
        InputError: The run lacks the quantities or has no score, or ``attending`` is out of range.
    """
    _require(dataset, "prompt/n_recon", "firings/n_recon_histogram")
    n_singular = dataset.sizes["rank"]
    counts = _counts(dataset, "prompt/n_recon", "firings/n_recon_histogram", n_singular + 1, attending)
    rotated = {_FIRINGS: _firings(dataset, "firings/n_recon_histogram_rotated")} if _FIRINGS in counts else {}
    every = sum([*counts.values(), *rotated.values()])
    first, last = min(1, int(np.argmax(every > 0))), int(np.flatnonzero(every)[-1])
    at = slice(first, last + 1)
    few_rotated = {group: _up_to(each, FEW) for group, each in rotated.items()}
    of_prompts = "prompt/n_recon_at_most_4_rotated"
    if of_prompts in dataset:
        each_score = read(dataset, of_prompts, *_OF_PROMPT, step=-1)
        for group, members in _members(dataset, "prompt/n_recon", attending).items():
            few_rotated[group] = float(mean_of_finite(each_score[members], 0)) if members.any() else np.nan
    elif "sad/n_recon_at_most_4_rotated" in dataset:  # an earlier run: means of heads
        of_heads = read(dataset, "sad/n_recon_at_most_4_rotated", "layer", "head", step=-1)
        few_rotated[_ALL_HEADS] = float(mean_of_finite(of_heads.ravel(), 0))
    return ReconCounts(
        n_recon=np.arange(first, last + 1),
        group=np.array(list(counts)),
        n_scores=np.array([each.sum() for each in counts.values()]),
        share=_shares(counts.values())[:, at],
        share_rotated=np.stack(
            [_shares([rotated[g]])[0, at] if g in rotated else np.full(last + 1 - first, np.nan) for g in counts]
        ),
        median=np.array([_median(each) for each in counts.values()]),
        median_rotated=np.array([_median(rotated[g]) if g in rotated else np.nan for g in counts]),
        share_at_most_4=np.array([_up_to(each, FEW) for each in counts.values()]),
        share_at_most_4_rotated=np.array([few_rotated.get(g, np.nan) for g in counts]),
        n_singular=n_singular,
        subtitle=sizes_of_heads(dataset, when(dataset, -1)),
    )


def draw_fig_9(data: ReconCounts) -> go.Figure:
    """Fig. 9: a histogram of N_recon for each group; bars up to 4 are coloured, the dotted line is the median.

    Where it was measured, a line shows the same in a rotated basis.
    """
    notes = []
    for i, few in enumerate(data.share_at_most_4):
        rotated = ""
        if np.isfinite(data.share_at_most_4_rotated[i]):
            rotated = f" ({_ROTATED}: {data.share_at_most_4_rotated[i]:.1%})"
        notes.append(f"median {data.median[i]:.3g} of {data.n_singular}, at most {FEW}: {few:.1%}{rotated}")
    colours = [BLUE if n <= FEW else GREY for n in data.n_recon]
    drawn = _draw_shares(data, data.n_recon, [colours] * len(data.group), notes, N_RECON)
    first, last = int(data.n_recon[0]), int(data.n_recon[-1])
    title = f"{N_RECON}, singular pairs that make up the score (count)"
    drawn.update_xaxes(title_text=title, range=[first - 0.7, last + 0.7], dtick=1 if last <= 16 else 5)
    drawn.update_yaxes(range=[0, 1.08 * max(data.share.max(), np.nanmax([0, *data.share_rotated.flat]))])
    has_rotated = False
    for i, place in _with_scores(data):
        drawn.add_vline(data.median[i], **place, line=_DOTTED, layer="below")
        if np.isfinite(data.share_rotated[i]).any():
            has_rotated = True
            drawn.add_scatter(
                x=data.n_recon, y=data.share_rotated[i], name=f"{data.group[i]}, {_ROTATED}", mode="lines",
                line={"color": VERMILLION, "width": 2, "shape": "hvh"},
                hovertemplate=f"{_ROTATED}, {N_RECON} %{{x}}: %{{y:.1%}}<extra></extra>", **place,
            )  # fmt: skip
    line = f"; line: {_ROTATED}" if has_rotated else ""
    subtitle = f"{data.subtitle} · blue: at most {FEW}; dotted: median{line}"
    return finish(drawn, "How many singular pairs make up a score", subtitle, **_layout(data))


def _require(dataset: xr.Dataset, name: str, of_firings: str) -> None:
    """Check that there are scores of the task's key, or firings, as of prompts without a key."""
    if name in dataset or of_firings not in dataset:
        require_heads(dataset, name, "prompt/attention", "contribution/mean")
        return
    require_heads(dataset, of_firings)
    if not _firings(dataset, of_firings).any():
        raise InputError(
            "no head attends to a key as much as Firings ask for at the last step. Fix: lower its tau, or add keys to "
            "the prompts."
        )


def _counts(dataset: xr.Dataset, name: str, of_firings: str, n: int, attending: float) -> dict[str, np.ndarray]:
    """How many scores have each of the values 0..n-1 at the last step [n], by group: firings, all heads, attending."""
    if name not in dataset:
        return {_FIRINGS: _firings(dataset, of_firings)}
    values = read(dataset, name, *_OF_PROMPT, step=-1)
    groups = _members(dataset, name, attending)
    counts = {group: np.bincount(values[members].astype(int), minlength=n) for group, members in groups.items()}
    return {_FIRINGS: _firings(dataset, of_firings), **counts} if of_firings in dataset else counts


def _members(dataset: xr.Dataset, name: str, attending: float) -> dict[str, np.ndarray]:
    """Which scores of the task's key belong to each group at the last step [layer, head, prompt]."""
    if not 0 < attending < 1:
        raise bad_value("attending", attending, "an attention weight in (0, 1)", "pass 0.5")
    has_score = read(dataset, name, *_OF_PROMPT, step=-1) >= 0
    require_score(name, has_score)
    attends = read(dataset, "prompt/attention", *_OF_PROMPT, step=-1) >= attending
    return {_ALL_HEADS: has_score, f"task's key, attention at least {attending:g}": has_score & attends}


def _firings(dataset: xr.Dataset, name: str) -> np.ndarray:
    """A histogram of the firings of all heads at the last step [n]."""
    counts: np.ndarray = read(dataset, name, "layer", "head", ..., step=-1).sum((0, 1)).astype(int)  # type: ignore[arg-type]
    return counts


def _shares(counts: Iterable[np.ndarray]) -> np.ndarray:
    """Share of each value in every group [group, n]; 0 in an empty one."""
    return np.stack([each / max(1, each.sum()) for each in counts])


def _up_to(counts: np.ndarray, last: int) -> float:
    """Share of the values that are at most ``last``; NaN for none."""
    return float(counts[: last + 1].sum() / counts.sum()) if counts.sum() else np.nan


def _median(counts: np.ndarray) -> float:
    """Median of the values 0..n-1 that come so often [n]; NaN for none."""
    n = int(counts.sum())
    if not n:
        return np.nan
    return float(np.searchsorted(counts.cumsum(), [(n - 1) // 2, n // 2], side="right").mean())


def _places(data: TopIndices | ReconCounts) -> list[dict[str, int]]:
    """Row and column of each group's panel, from 1: firings above, the task's key below them."""
    has_firings = data.group[0] == _FIRINGS
    n_of_key = len(data.group) - int(has_firings)  # 0 for prompts without a key
    of_key = [{"row": 1 + int(has_firings), "col": 1 + column} for column in range(n_of_key)]
    return [{"row": 1, "col": 1}, *of_key] if has_firings else of_key


def _with_scores(data: TopIndices | ReconCounts) -> list[tuple[int, dict[str, int]]]:
    """Groups that are not empty, by their number, each with the place of its panel."""
    return [(i, place) for i, place in enumerate(_places(data)) if data.n_scores[i]]


def _layout(data: TopIndices | ReconCounts) -> dict[str, Any]:
    height = {"height": 700} if _places(data)[-1]["row"] == 2 else {}
    return {"showlegend": False, "margin": {**MARGIN, "t": 90}, **height}


def _colours(data: TopIndices, of_attended: str, of_others: str) -> list[str]:
    """A colour for each group: one for what heads attend to, one for the key of a task that most do not attend to."""
    return [of_others if group == _ALL_HEADS else of_attended for group in data.group]


def _draw_shares(
    data: TopIndices | ReconCounts, x: np.ndarray, colours: Sequence[Any], notes: Sequence[str], what: str
) -> go.Figure:
    """A histogram of each group, with its name, its size and a note above it; ``what`` is at x."""
    headings = [
        f"{group}: {f'{n:,}' if group == _FIRINGS else count_of(n, _PAIRS)}<br>{note if n else 'none'}"
        for group, n, note in zip(data.group, data.n_scores, notes, strict=True)
    ]
    places = _places(data)
    n_rows = places[-1]["row"]
    has_firings = data.group[0] == _FIRINGS
    room: list[list[Any]] = [[{"t": 0.12 / n_rows}] * 2] * (n_rows - int(has_firings))  # for the headings
    if has_firings:
        room.insert(0, [{"t": 0.12 / n_rows, "colspan": 2}, None])
    drawn = make_subplots(
        rows=n_rows, cols=2, horizontal_spacing=0.06, vertical_spacing=0.12, specs=room, subplot_titles=headings
    )
    drawn.update_annotations(font_size=14, yshift=6)
    for place, share, colour, group in zip(places, data.share, colours, data.group, strict=True):
        drawn.add_bar(
            x=x,
            y=share,
            name=group,
            marker={"color": colour, "line": {"width": 0}},
            width=0.8,
            hovertemplate=f"{what} %{{x}}: %{{y:.1%}}<extra></extra>",
            **place,
        )
    drawn.update_yaxes(tickformat=".0%")
    drawn.update_yaxes(title_text=f"share of {_PAIRS}s", row=n_rows, col=1)
    return drawn.update_yaxes(title_text="share of firings", row=1) if has_firings else drawn


def _says_fig_8(data: TopIndices) -> list[Sentence | None]:
    """How often the largest contributor is in the last eighth, of each group with a score."""
    return [
        Sentence(
            f"{capital(group)}: the largest contributor is in the last eighth of the spectrum in {share:.1%} of "
            f"{n:,} scores, and by chance in {data.chance:.1%}.",
            {"share_in_last_eighth": share, "chance": data.chance, "n": n},
        )
        for group, share, n in zip(data.group, data.share_in_last_eighth, data.n_scores, strict=True)
        if n
    ]


def _says_fig_9(data: ReconCounts) -> list[Sentence | None]:
    """How often 4 singular pairs are enough, of each group with a score, and in a rotated basis."""
    told: list[Sentence | None] = []
    for i, _ in _with_scores(data):
        few, rotated = data.share_at_most_4[i], data.share_at_most_4_rotated[i]
        evidence = {"at_most": FEW, "share_at_most_4": few, "n": data.n_scores[i]}
        beside = ""
        if np.isfinite(rotated):
            evidence["share_at_most_4_rotated"] = rotated
            beside = f", and of a rotated basis {rotated:.1%}"
        told.append(
            Sentence(
                f"{capital(data.group[i])}: {FEW} singular pairs or fewer make up {few:.1%} of the scores{beside}.",
                evidence,
            )
        )
    return told


fig_8 = figure(
    "fig_8",
    prepare_fig_8,
    draw_fig_8,
    description="Which singular pair contributes most",
    paper="Fig. 8",
    see="Singular pairs are numbered from the largest singular value to the smallest; the last eighth is shaded. On "
    "the dotted line, each would be the largest contributor equally often. Firings are all query-key pairs that heads "
    "attend to; the task's key is one of each prompt, whether a head attends to it or not.",
    says=_says_fig_8,
    view="replay",
)
fig_9 = figure(
    "fig_9",
    prepare_fig_9,
    draw_fig_9,
    description="How many singular pairs make up a score",
    paper="Fig. 9",
    see="Blue bars are scores that 1 to 4 singular pairs make up. The line is what a basis gives that is rotated at "
    "random, where every score stays what it is. Firings are all query-key pairs that heads attend to; the task's key "
    "is one of each prompt, whether a head attends to it or not.",
    says=_says_fig_9,
    view="replay",
)
