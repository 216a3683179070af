"""Several runs side by side in one page: their claims, what they differ in, their dynamics over one step axis."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
import yaml

from svf_lightning.arguments import dotted
from svf_lightning.errors import InputError, bad_value
from svf_lightning.report.drawing import (
    BLUE,
    GREEN,
    LABELS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Steps,
    as_text,
    finish,
    mean_of_finite,
)
from svf_lightning.report.page import Section, Table, write_page
from svf_lightning.report.run_page import figures_of, in_words
from svf_lightning.run_dir import CONFIG, SUMMARY, is_replay
from svf_lightning.trajectory import open_trajectory

if TYPE_CHECKING:
    import xarray as xr

_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
_DASHES = ("solid", "dash", "dot", "dashdot")  # a line shows through another that lies on it
_METRICS = {  # and their units
    "loss/total": "loss",
    "alignment/matched": "|cosine|",
    "orthogonality/attended_vs_rest": "|cosine|",
    "spectrum/sigma_ratio": "ratio",
    "sad/sparseness": "S(v)",
    "sad/task/sparseness": "S(v)",
    "sad/task/sparseness_shared_rotation": "S(v)",
    "sad/accuracy": "share of prompts",
    "sad/logit_difference": "nats",
}
_LAST = ("fig_1b", "fig_2a", "fig_2b", "fig_7a", "heads_map")
_NO_SETTINGS = ("trainer.callbacks", "trainer.logger", "experiment.claims")


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path = "comparison.html") -> Path:
    """Write a page that compares runs.

    Args:
        run_dirs: At least two run directories with a trajectory.
        out: The file.

    Returns:
        The file.

    Raises:
        InputError: Fewer than two runs, the same one twice, or one without a trajectory.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise bad_value(
            "run directories", [str(f) for f in folders], "two or more different ones", "name each run once"
        )
    runs = dict(zip(_names(folders), folders, strict=True))
    datasets = {name: open_trajectory(folder) for name, folder in runs.items()}
    sections = [
        Section("Claims", "What each run measured, and whether that is what the claim needs.", tables=claims)
        for claims in [_claims(runs)]
        if claims
    ]
    if different := _different_settings(runs):
        sections.append(Section("Settings that differ", tables=[different]))
    figures = [figure for metric in _METRICS if (figure := over_steps(datasets, metric)) is not None]
    if not figures:
        raise InputError("the runs share no metric over steps. Fix: compare runs of one kind, with more than one step.")
    text = "Mean over the instances or heads of each run. Where lines lie on each other, what differs does not matter."
    sections.append(Section("Over training", text, figures))
    sections += _side_by_side(runs, datasets)
    commands = [f"python -m svf_lightning report {folder}" for folder in folders]
    sections.append(Section("Each run alone", commands=commands))
    write_page(out, "Comparison", " · ".join(runs), sections)
    return Path(out)


def _side_by_side(runs: Mapping[str, Path], datasets: Mapping[str, xr.Dataset]) -> list[Section]:
    """The figures of the last step that tell most, of every run that has them."""
    sections = []
    drawn = {run: figures_of(dataset, replay=is_replay(runs[run]), among=_LAST) for run, dataset in datasets.items()}
    for name in _LAST:
        figures = []
        for run, found in drawn.items():
            if name in found:
                entry, figure = found[name]
                figures.append(figure.update_layout(title_text=f"{run}: {figure.layout.title.text}"))
        if len(figures) > 1:
            sections.append(Section(f"{entry.description} ({entry.paper})", entry.see, figures))
    return sections


def over_steps(datasets: Mapping[str, xr.Dataset], metric: str) -> go.Figure | None:
    """The mean of one metric in each run over training; None if fewer than two runs hold it.

    Args:
        datasets: Trajectories by the name of their run.
        metric: Name of a scalar metric.
    """
    figure, n = go.Figure(), 0
    axis: dict[str, Any] = {}
    ends: list[float] = []
    for i, (name, dataset) in enumerate(datasets.items()):
        batch_dims = dataset.attrs["batch_dims"]
        if metric not in dataset or dataset.sizes["step"] < 2:
            continue
        if dataset[metric].dims[1:] != tuple(batch_dims)[: dataset[metric].ndim - 1]:
            continue
        values = dataset[metric].values.reshape(dataset.sizes["step"], -1).astype(float)
        time = Steps(dataset, "log")
        look = {"line_dash": _DASHES[i % len(_DASHES)], "connectgaps": True}
        drawn = time.line(
            figure, mean_of_finite(values, 1), _COLOURS[i % len(_COLOURS)], as_text(name), width=2.5, **look
        )
        n += drawn
        ends += time.axis["range"]
        axis = time.axis
    if n < 2:
        return None
    label = LABELS.get(metric, metric)
    return finish(
        figure,
        metric,
        label if label != metric else "",
        height=380,
        xaxis={**axis, "range": [min(ends), max(ends)]},
        yaxis={
            "title": {"text": _METRICS.get(metric, "value")},
            **({"type": "log"} if metric.startswith("loss/") else {}),
        },
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart, from the ends of their paths; a run id says nothing alone."""
    ids = any(re.fullmatch(r"\d{8}-\d{6}-.*", folder.resolve().name) for folder in folders)
    for n in range(2 if ids else 1, 1 + max(len(folder.resolve().parts) for folder in folders)):
        names = ["/".join(folder.resolve().parts[-n:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def _claims(runs: Mapping[str, Path]) -> list[Table]:
    """One row per claim, one column per run."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, folder in runs.items():
        if not (folder / SUMMARY).is_file():
            continue
        for claim in json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["claims"]:
            holds, measured = in_words(claim)
            found.setdefault((claim["claim"], claim["needed"]), {})[name] = f"{measured} ({holds})"
    rows = [[claim, needed, *(values.get(name, "-") for name in runs)] for (claim, needed), values in found.items()]
    return [Table(["claim", "needed", *runs], rows, frozenset(["claim", "needed"]))] if rows else []


def _different_settings(runs: Mapping[str, Path]) -> Table | None:
    """Settings that are not the same in all runs."""
    settings = {}
    for name, folder in runs.items():
        path = folder / CONFIG
        found = dotted(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        settings[name] = {key: value for key, value in found.items() if not key.startswith(_NO_SETTINGS)}
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    rows = []
    for key in keys:
        values = [json.dumps(own[key]) if key in own else "-" for own in settings.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["setting", *runs], rows, frozenset(["setting"])) if rows else None
