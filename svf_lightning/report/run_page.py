"""The page of one run: what it claims and measured, its dynamics, its figures, and how to repeat it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
import torch
import yaml

from svf_lightning.errors import InputError
from svf_lightning.metrics import time_of_change
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
    Entry,
    Steps,
    finish,
    mean_of_finite,
    read,
    subtitle_of,
)
from svf_lightning.report.explorer import time_slider
from svf_lightning.report.figures import FIGURES
from svf_lightning.report.page import Section, Table, write_page
from svf_lightning.report.replay_figures import REPLAY_FIGURES
from svf_lightning.report.words import head_picker
from svf_lightning.run_dir import CONFIG, SUMMARY, is_replay
from svf_lightning.trajectory import open_trajectory

if TYPE_CHECKING:
    import xarray as xr

REPORT = "report.html"
_INSTANCES_EACH = 64  # lines of a panel; more cannot be told apart
_POINTS_EACH = 150  # of an instance's thin line
_MOMENTS = (
    ("alignment/matched", "alignment", BLUE),
    ("orthogonality/attended_vs_rest", "orthogonality", VERMILLION),
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


def write_run_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, also of one that goes on or was killed.

    Args:
        run_dir: A run directory with a trajectory.
        out: The file; None for report.html in the run directory.

    Returns:
        The file.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    run_dir = Path(run_dir)
    dataset = open_trajectory(run_dir)
    summary = _read(run_dir / SUMMARY, json.loads)
    config = _read(run_dir / CONFIG, yaml.safe_load)
    replay = is_replay(run_dir)
    experiment = summary.get("experiment") or config.get("experiment", {}).get("name") or run_dir.parent.name
    command = f"python -m svf_lightning {'replay' if replay else 'fit'} --config {run_dir / CONFIG}"
    sections = [_verdict(summary, dataset)]
    if not replay:
        if (figure := dynamics(dataset)) is not None:
            text = (
                "What happens when: losses fall, a singular value rises, singular vectors align, features turn "
                "orthogonal. Thick: mean over instances; thin: every instance. Pointing at a step shows its values."
            )
            sections.append(Section("Dynamics (Fig. 3)", text, [figure]))
        if (slider := time_slider(dataset)) is not None:
            text = "In the Gram matrix, attended features (bold) fade against the others as they become orthogonal."
            if slider.data["rank"]:
                text = f"An attended feature is aligned when one singular vector points along it alone. {text}"
            sections.append(Section("Through training (Figs. 1 and 2)", text, widget=slider))
    for name, (entry, figure) in figures_of(dataset, replay=replay).items():
        sections.append(Section(f"{entry.description} ({entry.paper})", entry.see, [figure]))
        if name == "fig_7a":  # of one head over all prompts; now of one prompt
            sections += _words(dataset)
    sections.append(_settings(config, summary, command))
    path = Path(out) if out else run_dir / REPORT
    about = [f"run {run_dir.name}", "replay of a language model" if replay else "toy model"]
    write_page(path, experiment, " · ".join(about), sections)
    return path


def _words(dataset: xr.Dataset) -> list[Section]:
    """The head picker, if the run kept the words of prompts."""
    picker = head_picker(dataset)
    if picker is None:
        return []
    text = (
        "Words are shaded by the attention that the query (dashed) gives them; the key (outlined) is the word that "
        "the task attends to. Bars: score of each word relative to the mean of the others, taken apart over the "
        "singular pairs that matter most for the key. In a sparse head one or two of them lift it above the rest."
    )
    return [Section("One head over the words of a prompt (Fig. 7a)", text, widget=picker)]


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    return dict(parse(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def _verdict(summary: Mapping[str, Any], dataset: xr.Dataset) -> Section:
    """Claims with their numbers."""
    last = int(dataset["step"].values[-1])
    if not summary:
        return Section("Verdict", f"The run has not ended, or was killed: {last:,} is the last step that it stored.")
    answers = {True: "yes", False: "no", None: "open"}
    rows = [
        [
            answers[claim["holds"]],
            claim["claim"],
            "not measured" if claim["measured"] is None else f"{claim['measured']:.4g}",
            claim["needed"].replace(", open question", ""),
            claim["figure"],
        ]
        for claim in summary["claims"]
    ]
    judged = [claim["holds"] for claim in summary["claims"] if claim["holds"] is not None]
    hold = f"{sum(judged)} of {len(judged)} claims hold" if judged else "No claim was judged"
    text = f"{hold}. The run is {summary['status']} at step {summary['steps']:,}, after {summary['seconds']:,.0f} s."
    words = frozenset(["holds", "claim", "paper"])
    titles = ["holds", "claim", "measured", "needed", "paper"]
    return Section("Verdict", text, tables=[Table(titles, rows, words)] if rows else [])


def _settings(config: Mapping[str, Any], summary: Mapping[str, Any], command: str) -> Section:
    """Settings that the model and the data have, versions, and the command that repeats the run."""
    rows = [
        [f"{part}.{name}", json.dumps(value)]
        for part in ("model", "data", "trainer", "capture")
        for name, value in (config.get(part) or {}).items()
        if value is not None and name not in ("callbacks", "logger")
    ]
    versions = [[name, str(version)] for name, version in summary.get("versions", {}).items()]
    tables = [Table(["setting", "value"], rows, frozenset(["setting", "value"]))] if rows else []
    tables += [Table(["package", "version"], versions, frozenset(["package", "version"]))] if versions else []
    return Section("Settings", "The same run again:", tables=tables, commands=[command])


def _left_out(dataset: xr.Dataset) -> list[str]:
    """Figures of the toy model that tell nothing here, or what another one tells."""
    names = ["fig_3", "spectrum_over_time"]  # the panels over steps show it
    if "U" in dataset:
        names.append("fig_1a")  # Fig. 1b shows it with the head that the run has
    if dataset.sizes.get("pair", 0) < 2:
        names += ["fig_2b", "alignment_over_time", "pair_map"]
    else:
        names.append("fig_2a")  # Fig. 2b shows the same and more
    if "theory/predicted_cosine" not in dataset:
        names.append("fig_4")
    return names


def figures_of(dataset: xr.Dataset, *, replay: bool) -> dict[str, tuple[Entry, go.Figure]]:
    """All figures that a run has the data for and that say something of it, by name, beside :func:`dynamics`.

    Args:
        dataset: A trajectory.
        replay: It is one of a language model.
    """
    entries = dict(REPLAY_FIGURES) if replay else {**FIGURES, **REPLAY_FIGURES}
    for name in () if replay else _left_out(dataset):
        del entries[name]
    found = {}
    for name, entry in entries.items():
        log = {"x_axis": "log"} if "x_axis" in inspect.signature(entry.draw).parameters else {}
        with suppress(InputError):
            found[name] = entry, entry.draw(dataset, **log)
    return found


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
        axis = f"y{number + 1 if number else ''}"
        top = 1 - number * height
        domain = [max(0.0, top - height + (gap if number < len(panels) - 1 else 0)), top]
        layout[f"yaxis{number + 1 if number else ''}"] = {"title": {"text": title}, "type": scale, "domain": domain}
        if scale == "log" and _spans_decades(dataset, lines):
            layout[f"yaxis{number + 1 if number else ''}"]["dtick"] = 1
        if title == "|cosine|":
            layout[f"yaxis{number + 1 if number else ''}"]["range"] = [0, 1.03]
        for name, label, colour in lines:
            values = read(dataset, name, "step", "instance")
            _thin_lines(figure, time, values, colour, name, axis)
            mean = mean_of_finite(values, 1)
            options = {"legendgroup": name, "yaxis": axis, "hover": LABELS.get(name, label), "connectgaps": True}
            time.line(figure, mean, colour, label, width=2.5, **options)
    moments = []
    for name, word, colour in _MOMENTS:
        at = _median_change(dataset, name)
        if at is not None:
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
            **time.axis, "anchor": f"y{len(panels) if len(panels) > 1 else ''}", "showspikes": True,
            "spikemode": "across", "spikesnap": "cursor", "spikethickness": 1, "spikedash": "dot",
        },
        hovermode="x",
        hoversubplots="axis",
        updatemenus=[{"type": "buttons", "buttons": buttons, "direction": "right", "x": 1, "y": 0, "pad": {"t": 45}}],
        **layout,
    )  # fmt: skip


def _median_change(dataset: xr.Dataset, name: str) -> float | None:
    """When a metric has covered most of its way [training steps], in the median of the instances that change."""
    if name not in dataset or dataset[name].dims != ("step", "instance"):
        return None
    steps = torch.from_numpy(np.asarray(dataset["step"].values).copy())
    times = time_of_change(torch.from_numpy(read(dataset, name, "step", "instance").copy()), steps)
    times = times[times.isfinite()]
    return float(np.median(times.numpy())) if len(times) else None


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
