"""What came out of a sweep: per cell of equal settings, over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from svf_lightning.arguments import short
from svf_lightning.errors import InputError
from svf_lightning.files import is_file, write_json, write_text
from svf_lightning.quantities import Quantity
from svf_lightning.run.summary import read_summary
from svf_lightning.sweep.trial import SEEDS, Trial, as_cell

if TYPE_CHECKING:
    import pandas as pd

INDEX, TRIALS, ERROR = "trials.json", "trials", "error.txt"
RULE_METRIC, RULE_THRESHOLD = "alignment/matched", 0.9

State = Literal["done", "failed", "missing"]


def is_sweep(folder: Path) -> bool:
    """True for the directory of a sweep."""
    return is_file(folder / INDEX)


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
        trials = (Trial.from_json({"sweep": self.name, **entry}) for entry in index["trials"])
        self.trials = [replace(trial, run_dir=self.folder / TRIALS / trial.id) for trial in trials]

    @staticmethod
    def write_index(folder: Path, name: str, metric: str | None, trials: Sequence[Trial]) -> None:
        """Make a directory that of a sweep; trials that it had before and has no more are left alone."""
        write_json(folder / INDEX, {"name": name, "metric": metric, "trials": [trial.as_json() for trial in trials]})

    @property
    def varied(self) -> list[str]:
        """The parameters that vary."""
        return list(self.trials[0].varied) if self.trials else []

    @property
    def axes(self) -> list[str]:
        """The parameters that vary, without seeds."""
        return [name for name in self.varied if name not in SEEDS]

    def state(self, trial: Trial) -> State:
        """Whether a trial has finished, has failed, or is still to be run."""
        status = read_summary(trial.folder).get("status")
        if status in ("finished", "failed"):
            return "done" if status == "finished" else "failed"
        return "failed" if (trial.folder / ERROR).is_file() else "missing"

    def error(self, trial: Trial) -> str:
        """Why a trial failed before it could write a summary; empty if it did not."""
        path = trial.folder / ERROR
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def counts(self) -> str:
        """How many trials are in which state, in words."""
        states = [self.state(trial) for trial in self.trials]
        return ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))

    def quantities(self) -> dict[str, Quantity]:
        """Label and unit of the metrics, as the trials' summaries tell them."""
        quantities: dict[str, Quantity] = {}
        for trial in self.trials:
            for name, metric in read_summary(trial.folder).get("metrics", {}).items():
                quantities.setdefault(name, Quantity(name, metric.get("label", ""), unit=metric.get("unit", "")))
        return quantities

    def table(self) -> pd.DataFrame:
        """One row per trial: its values, its state, final metrics (means over its instances), claims that hold."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            summary = read_summary(trial.folder)
            metrics = {name: value["mean"] for name, value in summary.get("metrics", {}).items()}
            claims = [claim["holds"] for claim in summary.get("claims", []) if claim["holds"] is not None]
            rows.append(
                {
                    "trial": trial.id,
                    **{name: as_cell(trial.values[name]) for name in trial.varied},
                    "state": self.state(trial),
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
                    below_title(below): float((~(values >= below)).mean()) if len(values) else np.nan,
                    "claims that hold": done["claims that hold"].sum() / judged if judged else np.nan,
                }
            )
        return pd.DataFrame(rows)


def write_tables(sweep: Sweep, cells: pd.DataFrame) -> None:
    """Write trials.csv, cells.csv and cells.md into a sweep's directory."""
    write_text(sweep.folder / "trials.csv", sweep.table().to_csv(index=False))
    write_text(sweep.folder / "cells.csv", cells.to_csv(index=False))
    write_text(sweep.folder / "cells.md", markdown(cells))


def below_title(threshold: float) -> str:
    """Title of the column that has the share of trials below a threshold."""
    return f"below {threshold:g}"


def markdown(cells: pd.DataFrame) -> str:
    """The table of cells as Markdown."""
    lines = [" | ".join(map(title, cells.columns)), " | ".join("---" for _ in cells.columns)]
    lines += [" | ".join(map(shown, row)) for row in cells.itertuples(index=False)]
    return "".join(f"| {line} |\n" for line in lines)


def title(column: str) -> str:
    """Title of a column: a parameter by the last part of its name."""
    return column if " " in column else short(column)


def shown(value: Any) -> str:
    """A value of a cell as text."""
    if isinstance(value, (float, np.floating)):
        return "-" if np.isnan(value) else f"{value:.3g}"
    return str(value)
