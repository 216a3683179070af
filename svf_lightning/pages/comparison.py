"""Several runs side by side in one page: their claims, what they differ in, their dynamics over one step axis."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svf_lightning.arguments import dotted
from svf_lightning.errors import InputError, bad_value
from svf_lightning.figures import FIGURES, draw_all
from svf_lightning.figures.comparison import compared_quantities, over_steps
from svf_lightning.figures.look import as_text
from svf_lightning.pages.page import Section, Table, write_page
from svf_lightning.run.claims import in_words
from svf_lightning.run.directory import read_config
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.summary import read_summary

if TYPE_CHECKING:
    import xarray as xr

_NO_SETTINGS = ("trainer.callbacks", "trainer.logger", "experiment.claims", "experiment.shows")


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
    datasets = {name: open_sound(folder) for name, folder in runs.items()}
    sections = [
        Section("Claims", "What each run measured, and whether that is what the claim needs.", tables=claims)
        for claims in [_claims(runs)]
        if claims
    ]
    if different := _different_settings(runs):
        sections.append(Section("Settings that differ", tables=[different]))
    shared = compared_quantities(datasets)
    if not shared:
        raise InputError("the runs share no metric over steps. Fix: compare runs of one kind, with more than one step.")
    figures = [over_steps(datasets, name) for name in shared]
    text = "Mean over the instances or heads of each run. Dashes show where lines lie on each other."
    sections.append(Section("Over training", text, figures))
    sections += _side_by_side(datasets)
    commands = [f"python -m svf_lightning report {folder}" for folder in folders]
    sections.append(Section("Each run alone", commands=commands))
    write_page(out, "Comparison", " · ".join(runs), sections)
    return Path(out)


def _side_by_side(datasets: Mapping[str, xr.Dataset]) -> list[Section]:
    """The figures of the last step that tell most, of every run that has them."""
    drawn = {run: draw_all(dataset, among=lambda figure: figure.compared) for run, dataset in datasets.items()}
    sections = []
    for name, about in FIGURES.items():
        figures = [
            figures[name].update_layout(title_text=f"{as_text(run)}: {figures[name].layout.title.text}")
            for run, figures in drawn.items()
            if name in figures
        ]
        if len(figures) > 1:
            sections.append(Section(about.heading, about.see, figures))
    return sections


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
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, folder in runs.items():
        for claim in read_summary(folder).get("claims", []):
            told = in_words(claim)
            cells.setdefault((claim["claim"], claim["needed"]), {})[name] = f"{told.measured} ({told.verdict})"
    rows = [[claim, needed, *(values.get(name, "-") for name in runs)] for (claim, needed), values in cells.items()]
    return [Table(["claim", "needed", *runs], rows, frozenset(["claim", "needed"]))] if rows else []


def _different_settings(runs: Mapping[str, Path]) -> Table | None:
    """Settings that are not the same in all runs."""
    settings = {}
    for name, folder in runs.items():
        given = dotted(read_config(folder))
        settings[name] = {key: value for key, value in given.items() if not key.startswith(_NO_SETTINGS)}
    keys = dict.fromkeys(key for of_run in settings.values() for key in of_run)
    rows = []
    for key in keys:
        values = [json.dumps(of_run[key]) if key in of_run else "-" for of_run in settings.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["setting", *runs], rows, frozenset(["setting"])) if rows else None
