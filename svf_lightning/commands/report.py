"""``python -m svf_lightning report RUN_DIR ...``: the page of a run, of a sweep, or of several runs side by side."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svf_lightning.run.directory import latest_run
from svf_lightning.sweep.results import (
    RULE_METRIC,
    RULE_THRESHOLD,
    Sweep,
    is_sweep,
    shown,
    title,
    write_tables,
)
from svf_lightning.terminal import console, say

if TYPE_CHECKING:
    import pandas as pd

_MOST_FAILURES = 10  # that are named at the terminal


def report(
    *folders: str,
    out: str | None = None,
    metric: str = RULE_METRIC,
    below: float = RULE_THRESHOLD,
    open: bool = False,
) -> Path:
    """Write one self-contained HTML page: of a run, of a sweep, or of several runs side by side.

    A run may go on, or may have been killed.

    Args:
        folders: A run directory (that of `fit` or `replay`), or the directory of a sweep; or several run directories;
            none for the latest run in the folder runs.
        out: The page; null for report.html in the folder, or comparison.html for several.
        metric: Of a sweep: metric of its table.
        below: Of a sweep: the table gives the share of trials whose metric is below this.
        open: Open the page in the browser.

    Returns:
        The page.

    Raises:
        InputError: There is no run and no sweep in a folder.
    """
    page = _written(folders or (str(latest_run()),), out, metric, below)
    if open:
        webbrowser.open(page.resolve().as_uri())
    return page


def _written(folders: Sequence[str], out: str | None, metric: str, below: float) -> Path:
    if len(folders) > 1:
        from svf_lightning.pages.comparison import write_comparison

        return write_comparison(folders, out or "comparison.html")
    (folder,) = folders
    if is_sweep(Path(folder)):
        page = report_sweep(folder, out=out, metric=metric, below=below)
        failures = Sweep(folder).failures()
        for name, why in failures[:_MOST_FAILURES]:
            say(f"failed: {name}: {why}")
        if len(failures) > _MOST_FAILURES:
            say(f"failed: {len(failures) - _MOST_FAILURES} more, all of them on the page")
        return page
    from svf_lightning.pages.run import write_run_page

    return write_run_page(folder, out)


def report_sweep(
    folder: str | Path, *, out: str | None = None, metric: str = RULE_METRIC, below: float = RULE_THRESHOLD
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
    from svf_lightning.pages.sweep import write_sweep_page

    sweep = Sweep(folder)
    cells = sweep.cells(metric=metric, below=below)
    write_tables(sweep, cells)
    page = write_sweep_page(sweep, cells, metric=metric, below=below, out=out)
    _print(sweep, cells, metric)
    return page


def _print(sweep: Sweep, cells: pd.DataFrame, metric: str) -> None:
    """The table of cells, narrow enough for a terminal: without counts that are all zero."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text  # not markup

    columns = cells.drop(columns=[name for name in ("failed", "missing") if not cells[name].any()])
    table = Table(
        title=Text(f"{sweep.name}: {metric} per cell"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    for name in columns.columns:
        table.add_column(Text(title(name).replace("_", "_\n")), justify="right", overflow="fold")
    for row in columns.to_dict("records"):
        table.add_row(*(Text(f"{value:.2g}" if name == "sd" else shown(value)) for name, value in row.items()))
    out = console()
    out.print(table)
    out.print(sweep.counts())
