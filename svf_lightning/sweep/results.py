"""What came out of a sweep: per cell of equal settings, over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from svf_lightning.errors import InputError
from svf_lightning.run_dir import SUMMARY, write_text
from svf_lightning.sweep.file import SEEDS, short

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

INDEX, TRIALS, ERROR = "trials.json", "trials", "error.txt"
RULE_METRIC, RULE_THRESHOLD = "alignment/matched", 0.9
_METRICS = ("alignment/matched", "orthogonality/attended_vs_rest", "dynamics/t_align", "dynamics/t_ortho", "loss/total")

State = Literal["done", "failed", "missing"]


def is_sweep(folder: Path) -> bool:
    """True for the directory of a sweep."""
    return (folder / INDEX).is_file()


class Sweep:
    """A sweep's directory.

    Args:
        folder: The directory that ``sweep`` printed.

    Raises:
        InputError: There is no sweep in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_sweep(self.folder):
            raise InputError(
                f"{self.folder} holds no sweep. Allowed: a directory that `sweep` printed as its last line. "
                "Fix: check the path."
            )
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.name: str = index["name"]
        self.metric: str | None = index["metric"]
        self.trials: list[dict[str, Any]] = index["trials"]

    @property
    def varied(self) -> list[str]:
        """The parameters that vary."""
        return list(self.trials[0]["varied"]) if self.trials else []

    @property
    def axes(self) -> list[str]:
        """The parameters that vary, without seeds."""
        return [name for name in self.varied if name not in SEEDS]

    def run_dir(self, trial_id: str) -> Path:
        """The run directory of a trial."""
        return self.folder / TRIALS / trial_id

    def summary(self, trial_id: str) -> Mapping[str, Any] | None:
        """The summary.json of a trial, if it has one."""
        path = self.run_dir(trial_id) / SUMMARY
        if not path.is_file():
            return None
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def state(self, trial_id: str) -> State:
        """Whether a trial has finished, has failed, or is still to be run."""
        summary = self.summary(trial_id)
        if summary is not None and summary["status"] in ("finished", "failed"):
            return "done" if summary["status"] == "finished" else "failed"
        return "failed" if (self.run_dir(trial_id) / ERROR).is_file() else "missing"

    def table(self) -> pd.DataFrame:
        """One row per trial: its values, its state, final metrics (means over its instances), claims that hold."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            summary = self.summary(trial["id"]) or {}
            metrics = {name: value["mean"] for name, value in summary.get("metrics", {}).items()}
            claims = [claim["holds"] for claim in summary.get("claims", []) if claim["holds"] is not None]
            values = {name: _cell_value(trial["values"][name]) for name in trial["varied"]}
            rows.append(
                {
                    "trial": trial["id"],
                    **values,
                    "state": self.state(trial["id"]),
                    "claims": len(claims),
                    "claims that hold": sum(claims),
                    "seconds": summary.get("seconds"),
                    **metrics,
                }
            )
        return pd.DataFrame(rows)

    def cells(self, *, metric: str = RULE_METRIC, below: float = RULE_THRESHOLD) -> pd.DataFrame:
        """One row per cell (trials that differ in the seed alone).

        Args:
            metric: What is averaged.
            below: A trial fails the rule if its metric is below this, or is not a number.

        Returns:
            The cell's values; n (trials done), failed, missing; mean, sd and min of the metric; "below", the share of
            done trials that fail the rule; claims, the share of claims that hold.
        """
        import pandas as pd

        table = self.table()
        if metric not in table:
            table[metric] = np.nan
        rows = []
        grouped = table.groupby(self.axes, sort=False, dropna=False) if self.axes else [((), table)]
        for key, group in grouped:
            done = group[group["state"] == "done"]
            values = done[metric].astype(float)
            judged = done["claims"].sum()
            rows.append(
                {
                    **dict(zip(self.axes, key, strict=True)),
                    "n": len(done),
                    "failed": int((group["state"] == "failed").sum()),
                    "missing": int((group["state"] == "missing").sum()),
                    "mean": values.mean(),
                    "sd": values.std(ddof=1),
                    "min": values.min(),
                    _below(below): float((~(values >= below)).mean()) if len(values) else np.nan,
                    "claims that hold": done["claims that hold"].sum() / judged if judged else np.nan,
                }
            )
        return pd.DataFrame(rows)


def report_sweep(
    folder: str | Path, *, out: str | Path | None = None, metric: str = RULE_METRIC, below: float = RULE_THRESHOLD
) -> Path:
    """Write trials.csv, cells.csv, cells.md and report.html into a sweep's directory, and print the cells.

    Args:
        folder: Directory of the sweep.
        out: The page; None for report.html in the directory.
        metric: Metric of the table.
        below: The table gives the share of trials whose metric is below this.

    Returns:
        The page.

    Raises:
        InputError: There is no sweep in the directory.
    """
    sweep = Sweep(folder)
    cells = sweep.cells(metric=metric, below=below)
    write_text(sweep.folder / "trials.csv", sweep.table().to_csv(index=False))
    write_text(sweep.folder / "cells.csv", cells.to_csv(index=False))
    write_text(sweep.folder / "cells.md", markdown(cells))
    page = Path(out) if out else sweep.folder / "report.html"
    _write_page(sweep, cells, metric, below, page)
    _print(sweep, cells, metric)
    return page


def _counts(sweep: Sweep) -> str:
    states = [sweep.state(trial["id"]) for trial in sweep.trials]
    return ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))


def _print(sweep: Sweep, cells: pd.DataFrame, metric: str) -> None:
    """The table of cells, narrow enough for a terminal: without counts that are all zero."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = cells.drop(columns=[name for name in ("failed", "missing") if not cells[name].any()])
    title = f"{sweep.name}: {metric} per cell"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in shown.columns:
        table.add_column(_title(column).replace("_", "_\n"), justify="right", overflow="fold")
    for row in shown.to_dict("records"):
        table.add_row(*(f"{value:.2g}" if name == "sd" else _shown(value) for name, value in row.items()))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has room
    console.print(table)
    console.print(_counts(sweep))


def figures(sweep: Sweep, *, rule: float | None = None, metric: str = RULE_METRIC) -> dict[str, go.Figure]:
    """One figure per axis (the seeds, if nothing else varies), by its name; none while no trial is done."""
    from svf_lightning.report.sweep_figures import METRICS, along_axis

    table = sweep.table()
    shown = METRICS if metric in METRICS else metric
    found = {}
    for axis in sweep.axes or sweep.varied:  # of seeds alone, one dot each
        others = [other for other in sweep.axes if other != axis]
        with suppress(InputError):  # nothing is there yet
            found[short(axis)] = along_axis(table, axis, others, shown, rule=rule)
    return found


def _write_page(sweep: Sweep, cells: pd.DataFrame, metric: str, below: float, path: Path) -> None:
    from svf_lightning.report.page import Section, Table, write_page

    table = sweep.table()
    judged, hold = int(table["claims"].sum()), int(table["claims that hold"].sum())
    n_below = round(float((cells[_below(below)] * cells["n"]).sum()))
    text = f"{_counts(sweep)}. {hold} of {judged} claims hold. {metric} is below {below:g} in {n_below} trials."
    failures = [
        [trial["label"] or trial["id"], (sweep.run_dir(trial["id"]) / ERROR).read_text(encoding="utf-8").strip()]
        for trial in sweep.trials
        if sweep.state(trial["id"]) == "failed" and (sweep.run_dir(trial["id"]) / ERROR).is_file()
    ]
    drawn = list(figures(sweep, rule=below, metric=metric).values())
    sections = [Section("Verdict", text)]
    if failures:
        titles = ["trial", "why"]
        sections.append(Section("Failed", tables=[Table(titles, failures, frozenset(titles))]))
    if drawn:
        text = "Final values along each parameter. Dots: trials. Where the line is flat, the setting does not matter."
        sections.append(Section("Axes (Appendix A)", text, drawn))
    about = f"Trials that differ in the seed alone: mean, standard deviation and smallest {metric}, and the share"
    rows = [[_shown(value) for value in row] for row in cells.itertuples(index=False)]
    table_of_cells = Table([_title(name) for name in cells.columns], rows)
    sections.append(Section("Cells", f"{about} of them below {below:g}.", tables=[table_of_cells]))
    one = f"python -m svf_lightning report {sweep.run_dir(sweep.trials[0]['id'])}"
    sections.append(Section("Each trial alone", "The page of a trial, such as the first:", commands=[one]))
    write_page(path, f"Sweep {sweep.name}", f"{len(sweep.trials)} trials", sections)


def _below(threshold: float) -> str:
    return f"below {threshold:g}"


def markdown(cells: pd.DataFrame) -> str:
    """The table of cells as Markdown."""
    lines = [" | ".join(map(_title, cells.columns)), " | ".join("---" for _ in cells.columns)]
    lines += [" | ".join(map(_shown, row)) for row in cells.itertuples(index=False)]
    return "".join(f"| {line} |\n" for line in lines)


def _title(column: str) -> str:
    return column if " " in column else short(column)


def _shown(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "-" if np.isnan(value) else f"{value:.3g}"
    return str(value)


def _cell_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
