"""The page of a sweep: final metrics along each of its axes, and a table of its cells."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.arguments import short
from svf_lightning.errors import InputError
from svf_lightning.figures.look import count_of
from svf_lightning.figures.settings import METRICS, along_axis
from svf_lightning.pages.page import Section, Table, write_page
from svf_lightning.quantities import Quantity
from svf_lightning.registry import BUILT_IN
from svf_lightning.run.directory import REPORT
from svf_lightning.sentences import Sentence
from svf_lightning.sweep.results import Sweep, shown, title

if TYPE_CHECKING:
    import pandas as pd


def write_sweep_page(
    sweep: Sweep, cells: pd.DataFrame, *, metric: str, below: float, out: str | Path | None = None
) -> Path:
    """Write the page of a sweep.

    Args:
        sweep: The sweep.
        cells: Its cells, as ``Sweep.cells`` makes them of the same metric and threshold.
        metric: Metric of the table.
        below: Threshold of the table.
        out: The file; None for report.html in the sweep's directory.

    Returns:
        The file.
    """
    table = sweep.table()
    judged, hold = int(table["claims"].sum()), int(table["claims that hold"].sum())
    claims = f"{hold} of {judged} claims hold" if judged else "No claim was judged"
    text = f"{sweep.counts()}. {claims}. {_below(table, metric, below).text}"
    sections = [Section("Verdict", text)]
    if failures := sweep.failures():
        titles = ["trial", "why"]
        sections.append(Section("Failed", tables=[Table(titles, failures, frozenset(titles))]))
    if drawn := figures_along_axes(sweep, table, rule=below, metric=metric):
        text = "Final values along each parameter. Dots: trials."
        sections.append(Section("Axes (Appendix A)", text, list(drawn.values())))
    about = f"Trials that differ in the seed alone: mean, standard deviation and smallest {metric}, and the share"
    rows = [[shown(value) for value in row] for row in cells.itertuples(index=False)]
    table_of_cells = Table([title(name) for name in cells.columns], rows)
    sections.append(
        Section("Cells", f"{about} of them that are below {below:g} or have no number.", tables=[table_of_cells])
    )
    one = f"python -m svf_lightning report {sweep.trials[0].folder}"
    sections.append(Section("Each trial alone", "The page of a trial, such as the first:", commands=[one]))
    path = Path(out) if out else sweep.folder / REPORT
    write_page(path, f"Sweep {sweep.name}", f"{len(sweep.trials)} trials", sections)
    return path


def _below(table: pd.DataFrame, metric: str, below: float) -> Sentence:
    """How many trials are below the threshold, and how many have no number, as they diverged or it did not happen."""
    done = table[table["state"] == "done"]
    values = done[metric].to_numpy(float) if metric in done else np.full(len(done), np.nan)
    is_number = np.isfinite(values)
    n, n_below, n_none = len(values), int((values[is_number] < below).sum()), int((~is_number).sum())
    evidence = {"trials": n, "below": n_below, "without a number": n_none, "threshold": below}
    none = f", and has no number in {n_none}" if n_none else ""
    return Sentence(
        f"Of {count_of(n, 'trial')} that are done, {metric} is below {below:g} in {n_below}{none}.", evidence
    )


def figures_along_axes(
    sweep: Sweep, table: pd.DataFrame, *, metric: str, rule: float | None = None
) -> Mapping[str, go.Figure]:
    """One figure per axis (the seeds, if nothing else varies), by its name; none while no trial is done.

    Args:
        sweep: The sweep.
        table: Its trials, as ``Sweep.table`` makes it.
        metric: What to show; one that is shown for every sweep stands for all of these.
        rule: A value to draw a line at; None for none.
    """
    metrics = METRICS if metric in METRICS else (metric,)
    quantities: dict[str, Quantity] = {**sweep.quantities(), **BUILT_IN}
    drawn = {}
    for axis in sweep.axes or sweep.varied:  # a sweep of seeds alone has a dot for each
        others = [other for other in sweep.axes if other != axis]
        with suppress(InputError):  # no trial is done
            drawn[short(axis)] = along_axis(table, axis, others, metrics, rule=rule, quantities=quantities)
    return drawn
