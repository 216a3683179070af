"""Figures of how scores are made up, as shares of (prompt, head) pairs: which singular pair leads, and how many count.

A head attends to the key where its attention weight there is at least ``attending``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import bad_value
from svf_lightning.figures.figure import figure
from svf_lightning.figures.look import BLUE, GREY, MARGIN, count_of, finish
from svf_lightning.figures.reading import mean_of_finite, read, require_heads
from svf_lightning.figures.sparsity import N_RECON, index_axis, require_score, sizes_of_heads, when

if TYPE_CHECKING:
    import xarray as xr

_FEW = 4  # "most heads need 1 to 4 singular pairs" (Fig. 9)
_DOTTED = {"dash": "dot", "width": 1}
_LAYOUT: dict[str, Any] = {"showlegend": False, "margin": {**MARGIN, "t": 90}}


class TopIndices(NamedTuple):
    """Which singular pair contributes most to a score, at the last step."""

    rank: Int[np.ndarray, "rank"]  # singular indices, from 1
    group: Shaped[np.ndarray, "group"]  # names: all heads, and those that attend to the key
    n_scores: Int[np.ndarray, "group"]  # (prompt, head) pairs of a group
    share: Float[np.ndarray, "group rank"]  # of these pairs, in [0, 1]; 0 in an empty group
    share_in_last_eighth: Float[np.ndarray, "group"]  # of the spectrum
    subtitle: str


class ReconCounts(NamedTuple):
    """How many singular pairs make up a score (N_recon), at the last step."""

    n_recon: Int[np.ndarray, "n_recon"]  # from 1, or from 0 if there is a score of 0, to the largest
    group: Shaped[np.ndarray, "group"]  # names: all heads, and those that attend to the key
    n_scores: Int[np.ndarray, "group"]  # (prompt, head) pairs of a group
    share: Float[np.ndarray, "group n_recon"]  # of these pairs, in [0, 1]; 0 in an empty group
    median: Float[np.ndarray, "group"]  # of N_recon; NaN in an empty group
    share_at_most_4: Float[np.ndarray, "group"]  # NaN in an empty group
    n_singular: int  # singular pairs of a head
    subtitle: str


def prepare_fig_8(dataset: xr.Dataset, *, attending: float = 0.5) -> TopIndices:
    """How often each singular pair is the largest contributor: among all heads, and among those that attend.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).

    Raises:
        InputError: The run lacks the quantities or has no score, or ``attending`` is out of range.
    """
    require_heads(dataset, "prompt/top_index", "prompt/attention", "contribution/mean")
    groups = _scores(dataset, "prompt/top_index", attending)
    n_singular = dataset.sizes["rank"]
    share = _shares(groups.values(), n_singular)
    return TopIndices(
        rank=np.arange(1, n_singular + 1),
        group=np.array(list(groups)),
        n_scores=np.array([len(values) for values in groups.values()]),
        share=share,
        share_in_last_eighth=share[:, -_last_eighth(n_singular) :].sum(1),
        subtitle=sizes_of_heads(dataset, when(dataset, -1)),
    )


def draw_fig_8(data: TopIndices) -> go.Figure:
    """Fig. 8: a histogram of singular indices for each group.

    The last eighth of the spectrum is shaded. The dotted line is what every index would have if all came equally often.
    """
    n_singular = len(data.rank)
    notes = [f"in the last eighth: {share:.1%}" for share in data.share_in_last_eighth]
    drawn = _draw_shares(data, data.rank, (GREY, BLUE), notes, "singular index")
    drawn.update_xaxes(title_text="singular index k of the largest contribution", **index_axis(n_singular))
    drawn.update_yaxes(range=[0, 1.08 * max(1 / n_singular, data.share.max())])
    start = n_singular - _last_eighth(n_singular) + 0.5
    shade = {"fillcolor": GREY, "opacity": 0.2, "line_width": 0, "layer": "below"}
    for column in _columns_with_scores(data):
        drawn.add_hline(1 / n_singular, row=1, col=column, line=_DOTTED, layer="below")
        drawn.add_vrect(start, n_singular + 0.5, row=1, col=column, **shade)
    subtitle = f"{data.subtitle} · shaded: last eighth; dotted: every index equally often"
    return finish(drawn, "Which singular pair contributes most", subtitle, **_LAYOUT)


def prepare_fig_9(dataset: xr.Dataset, *, attending: float = 0.5) -> ReconCounts:
    """How often a score is made of each number of singular pairs: among all heads, and among those that attend.

    Args:
        dataset: Of a replay.
        attending: Attention weight from which a head attends to the key, in (0, 1).

    Raises:
        InputError: The run lacks the quantities or has no score, or ``attending`` is out of range.
    """
    require_heads(dataset, "prompt/n_recon", "prompt/attention", "contribution/mean")
    groups = _scores(dataset, "prompt/n_recon", attending)
    every = next(iter(groups.values()))
    first, last = min(1, int(every.min())), int(every.max())
    return ReconCounts(
        n_recon=np.arange(first, last + 1),
        group=np.array(list(groups)),
        n_scores=np.array([len(values) for values in groups.values()]),
        share=_shares(groups.values(), last + 1)[:, first:],
        median=np.array([np.median(values) if len(values) else np.nan for values in groups.values()]),
        share_at_most_4=np.array([mean_of_finite(values <= _FEW, 0) for values in groups.values()]),
        n_singular=dataset.sizes["rank"],
        subtitle=sizes_of_heads(dataset, when(dataset, -1)),
    )


def draw_fig_9(data: ReconCounts) -> go.Figure:
    """Fig. 9: a histogram of N_recon for each group; bars up to 4 are coloured, the dotted line is the median."""
    notes = [
        f"median {median:.3g} of {data.n_singular}, at most {_FEW}: {few:.1%}"
        for median, few in zip(data.median, data.share_at_most_4, strict=True)
    ]
    colours = [BLUE if n <= _FEW else GREY for n in data.n_recon]
    drawn = _draw_shares(data, data.n_recon, (colours, colours), notes, N_RECON)
    first, last = int(data.n_recon[0]), int(data.n_recon[-1])
    title = f"{N_RECON}, singular pairs that make up the score (count)"
    drawn.update_xaxes(title_text=title, range=[first - 0.7, last + 0.7], dtick=1 if last <= 16 else 5)
    drawn.update_yaxes(range=[0, 1.08 * data.share.max()])
    for column in _columns_with_scores(data):
        drawn.add_vline(data.median[column - 1], row=1, col=column, line=_DOTTED, layer="below")
    subtitle = f"{data.subtitle} · blue: at most {_FEW}; dotted: median"
    return finish(drawn, "How many singular pairs make up a score", subtitle, **_LAYOUT)


def _scores(dataset: xr.Dataset, name: str, attending: float) -> dict[str, np.ndarray]:
    """Values at the last step of the (prompt, head) pairs that have a score, by group: all, and those that attend."""
    if not 0 < attending < 1:
        raise bad_value("attending", attending, "an attention weight in (0, 1)", "pass 0.5")
    dims = ("layer", "head", "prompt")
    values = read(dataset, name, *dims, step=-1)
    has_score = values >= 0
    require_score(name, has_score)
    attends = read(dataset, "prompt/attention", *dims, step=-1) >= attending
    groups = {"all heads": has_score, f"attention on the key at least {attending:g}": has_score & attends}
    return {group: values[members].astype(int) for group, members in groups.items()}


def _shares(groups: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Share of each of the values 0..n-1 in every group [group, n]."""
    return np.stack([np.bincount(values, minlength=n) / max(1, len(values)) for values in groups])


def _last_eighth(n: int) -> int:
    """How many of n singular indices are the last eighth of the spectrum."""
    return max(1, n // 8)


def _columns_with_scores(data: TopIndices | ReconCounts) -> list[int]:
    """Panels, from 1, whose group is not empty."""
    return [column for column, n in enumerate(data.n_scores, start=1) if n]


def _draw_shares(
    data: TopIndices | ReconCounts, x: np.ndarray, colours: Sequence[Any], notes: Sequence[str], what: str
) -> go.Figure:
    """A histogram of each group, side by side, with its name, its size and a note above it; ``what`` is at x."""
    headings = [
        f"{group}: {count_of(n, '(prompt, head) pair')}<br>{note if n else 'none'}"
        for group, n, note in zip(data.group, data.n_scores, notes, strict=True)
    ]
    room = [[{"t": 0.12}] * 2]  # for the headings
    drawn = make_subplots(rows=1, cols=2, horizontal_spacing=0.06, specs=room, subplot_titles=headings)
    drawn.update_annotations(font_size=14, yshift=6)
    for column, (share, colour, group) in enumerate(zip(data.share, colours, data.group, strict=True), start=1):
        drawn.add_bar(
            x=x,
            y=share,
            name=group,
            marker={"color": colour, "line": {"width": 0}},
            width=0.8,
            hovertemplate=f"{what} %{{x}}: %{{y:.1%}}<extra></extra>",
            row=1,
            col=column,
        )
    drawn.update_yaxes(tickformat=".0%")
    return drawn.update_yaxes(title_text="share of (prompt, head) pairs", col=1)


fig_8 = figure(
    "fig_8",
    prepare_fig_8,
    draw_fig_8,
    description="Which singular pair contributes most",
    paper="Fig. 8",
    see="Singular pairs are numbered from the largest singular value to the smallest; the last eighth is shaded. On "
    "the dotted line, each would be the largest contributor equally often.",
    view="replay",
)
fig_9 = figure(
    "fig_9",
    prepare_fig_9,
    draw_fig_9,
    description="How many singular pairs make up a score",
    paper="Fig. 9",
    see="Blue bars are scores that 1 to 4 singular pairs make up; on the right, only those of heads that attend to the "
    "key.",
    view="replay",
)
