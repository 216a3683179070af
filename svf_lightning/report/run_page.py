"""The page of one run: what it claims and measured, its dynamics, its figures, and how to repeat it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
import yaml

from svf_lightning.errors import InputError
from svf_lightning.report.drawing import Entry
from svf_lightning.report.dynamics import dynamics
from svf_lightning.report.explorer import time_slider
from svf_lightning.report.figures import ALL_FIGURES
from svf_lightning.report.page import Section, Table, write_page
from svf_lightning.report.replay_figures import REPLAY_FIGURES
from svf_lightning.report.words import head_picker
from svf_lightning.run_dir import CONFIG, SUMMARY, command_of, is_replay
from svf_lightning.trajectory import open_trajectory

if TYPE_CHECKING:
    import xarray as xr

REPORT = "report.html"


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
    command = f"python -m svf_lightning {command_of(run_dir, config)} --config {run_dir / CONFIG}"
    sections = [_verdict(summary, dataset, config, command)]
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


def _verdict(summary: Mapping[str, Any], dataset: xr.Dataset, config: Mapping[str, Any], command: str) -> Section:
    """Claims with their numbers, settings, versions, and the command that repeats the run."""
    last = int(dataset["step"].values[-1])
    text = f"The run has not ended, or was killed: {last:,} is the last step that it stored."
    tables = []
    if summary:
        judged = [claim["holds"] for claim in summary["claims"] if claim["holds"] is not None]
        hold = f"{sum(judged)} of {len(judged)} claims hold" if judged else "No claim was judged"
        end = f"The run is {summary['status']} at step {summary['steps']:,}, after {summary['seconds']:,.0f} s."
        text, tables = f"{hold}. {end}", _claims(summary)
    settings = [
        [f"{part}.{name}", json.dumps(value)]
        for part in ("model", "data", "trainer", "capture")
        for name, value in (config.get(part) or {}).items()
        if value is not None and name not in ("callbacks", "logger")
    ]
    versions = [[name, str(version)] for name, version in summary.get("versions", {}).items()]
    for titles, rows in ((["setting", "value"], settings), (["package", "version"], versions)):
        if rows:
            tables.append(Table(titles, rows, frozenset(titles), folded=f"{len(rows)} {titles[0]}s"))
    return Section("Verdict", f"{text} The command below repeats it.", tables=tables, commands=[command])


def _claims(summary: Mapping[str, Any]) -> list[Table]:
    rows = []
    for claim in summary["claims"]:
        holds, measured = in_words(claim)
        needed = claim["needed"].replace(", open question", "")
        rows.append([holds, claim["claim"], measured, needed, claim["figure"]])
    titles = ["holds", "claim", "measured", "needed", "paper"]
    return [Table(titles, rows, frozenset(["holds", "claim", "paper"]))] if rows else []


def in_words(claim: Mapping[str, Any]) -> tuple[str, str]:
    """Whether a claim of summary.json holds, and what was measured."""
    holds = {True: "yes", False: "no", None: "open"}[claim["holds"]]
    return holds, "not measured" if claim["measured"] is None else f"{claim['measured']:.4g}"


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


def figures_of(
    dataset: xr.Dataset, *, replay: bool, among: Collection[str] = ALL_FIGURES
) -> dict[str, tuple[Entry, go.Figure]]:
    """All figures that a run has the data for and that say something of it, by name, beside :func:`dynamics`.

    Args:
        dataset: A trajectory.
        replay: It is one of a language model.
        among: Names of the figures that are wanted.
    """
    left_out = () if replay else _left_out(dataset)
    found = {}
    for name, entry in (REPLAY_FIGURES if replay else ALL_FIGURES).items():
        if name in left_out or name not in among:
            continue
        log = {"x_axis": "log"} if "x_axis" in inspect.signature(entry.draw).parameters else {}
        with suppress(InputError):
            found[name] = entry, entry.draw(dataset, **log)
    return found
