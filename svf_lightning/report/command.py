"""``python -m svf_lightning report RUN_DIR ...``: the page of a run, of a sweep, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from svf_lightning.arguments import parsed
from svf_lightning.report.comparison import write_comparison
from svf_lightning.report.run_page import write_run_page
from svf_lightning.sweep.results import RULE_METRIC, RULE_THRESHOLD, is_sweep, report_sweep


def report(
    folder: str, out: str | None = None, metric: str = RULE_METRIC, below: float = RULE_THRESHOLD
) -> tuple[Path, int]:
    """Write one self-contained HTML page: of a run, also of one that goes on or was killed, or of a sweep.

    Args:
        folder: A run directory (that of `fit` or `replay`), or the directory of a sweep.
        out: The page; null for report.html in the folder.
        metric: Of a sweep: metric of its table.
        below: Of a sweep: the table gives the share of trials whose metric is below this.

    Returns:
        The page and exit code 0.

    Raises:
        InputError: There is no run and no sweep in the folder.
    """
    if is_sweep(Path(folder)):
        return report_sweep(folder, out=out, metric=metric, below=below), 0
    return write_run_page(folder, out), 0


def report_command(args: Sequence[str]) -> tuple[Path, int]:
    """``report`` with its arguments; with more than one folder, a page that compares these runs.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: There is no run and no sweep in the folder.
    """
    folders = list(takewhile(lambda arg: not arg.startswith("-"), args))
    if len(folders) < 2:
        return report(**parsed(report, args))
    rest = parsed(_out_of_comparison, args[len(folders) :])
    return write_comparison(folders, rest["out"]), 0


def _out_of_comparison(out: str = "comparison.html") -> None:
    """Write one page that compares runs.

    Args:
        out: The page.
    """
