"""What came out of a sweep: per cell of equal settings, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, Field, JsonValue, ValidationError, model_validator

from svf_lightning.arguments import short
from svf_lightning.errors import InputError, reason
from svf_lightning.files import is_file, write_json, write_text
from svf_lightning.quantities import Quantity
from svf_lightning.run.directory import CONFIG, SUMMARY
from svf_lightning.sweep.trial import SEEDS, Trial, as_cell

if TYPE_CHECKING:
    import pandas as pd

INDEX, TRIALS, ERROR = "trials.json", "trials", "error.txt"
RULE_METRIC, RULE_THRESHOLD = "alignment/matched", 0.9
_SAME_NUMBER = 1e-9  # relative difference

State = Literal["done", "failed", "missing"]


class _Metric(BaseModel):
    label: str = ""
    unit: str = ""
    mean: float | None = None


class _Claim(BaseModel):
    holds: bool | None = None


class Summary(BaseModel):
    """What a sweep reads of the summary.json of a trial."""

    status: str
    seconds: float | None = None
    metrics: dict[str, _Metric] = Field(default_factory=dict)
    claims: list[_Claim] = Field(default_factory=list)


class _Entry(BaseModel):
    values: dict[str, JsonValue]
    varied: list[str]
    args: list[str]
    sweep: str = ""

    @model_validator(mode="after")
    def _has_values(self) -> _Entry:
        if missing := set(self.varied) - self.values.keys():
            raise ValueError(f"a value of {missing.pop()}")
        return self


class _Index(BaseModel):
    name: str
    metric: str | None = None
    trials: list[_Entry]


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial.

    Args:
        state: Whether it has finished, has failed, or is still to be run.
        error: Why it failed, or why what is in its directory cannot be used; may be empty.
        summary: What its summary.json says; None if it has none that can be used.
    """

    state: State
    error: str = ""
    summary: Summary | None = None


def is_sweep(folder: Path) -> bool:
    """True for the directory of a sweep."""
    return is_file(folder / INDEX)


class Sweep:
    """A sweep's directory. What is known of a trial is read once.

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
        try:
            index = _Index.model_validate_json((self.folder / INDEX).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder / INDEX} cannot be read ({first_reason(error)}). Allowed: what `sweep` wrote. "
                "Fix: the file is damaged; sweep FILE --sweep_dir writes it again, and keeps the trials."
            ) from error
        self.name, self.metric = index.name, index.metric
        trials = (
            Trial.from_json({"sweep": self.name, **entry.model_dump(exclude_unset=True)}) for entry in index.trials
        )
        self.trials = [replace(trial, run_dir=self.folder / TRIALS / trial.id) for trial in trials]
        self._results: dict[str, TrialResult] = {}

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

    def result(self, trial: Trial) -> TrialResult:
        """What became of a trial."""
        if trial.id not in self._results:
            self._results[trial.id] = read_result(trial)
        return self._results[trial.id]

    def state(self, trial: Trial) -> State:
        """Whether a trial has finished, has failed, or is still to be run."""
        return self.result(trial).state

    def error(self, trial: Trial) -> str:
        """Why a trial failed, or why what is in its directory cannot be used; may be empty."""
        return self.result(trial).error

    def counts(self) -> str:
        """How many trials are in which state, in words."""
        states = [self.state(trial) for trial in self.trials]
        return ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))

    def failures(self) -> list[tuple[str, str]]:
        """Names of the trials that failed, with the reason where one is known."""
        return [(trial.name, self.error(trial)) for trial in self.trials if self.error(trial)]

    def quantities(self) -> dict[str, Quantity]:
        """Label and unit of the metrics, as the trials' summaries tell them."""
        quantities: dict[str, Quantity] = {}
        for summary in (self.result(trial).summary for trial in self.trials):
            for name, metric in summary.metrics.items() if summary else ():
                quantities.setdefault(name, Quantity(name, metric.label, unit=metric.unit))
        return quantities

    def table(self) -> pd.DataFrame:
        """One row per trial: its values, its state, final metrics (means over its instances), claims that hold."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            summary = self.result(trial).summary or Summary(status="")
            claims = [claim.holds for claim in summary.claims if claim.holds is not None]
            rows.append(
                {
                    "trial": trial.id,
                    **{name: as_cell(trial.values[name]) for name in trial.varied},
                    "state": self.state(trial),
                    "claims": len(claims),
                    "claims that hold": sum(claims),
                    "seconds": summary.seconds,
                    **{name: metric.mean for name, metric in summary.metrics.items()},
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


def read_result(trial: Trial) -> TrialResult:
    """What is in the directory of a trial. It may be damaged, or not be that of the trial."""
    path = trial.folder / SUMMARY
    try:
        if not path.exists():
            error = trial.folder / ERROR
            known = error.read_text(encoding="utf-8", errors="replace").strip() if error.is_file() else ""
            return TrialResult("failed" if error.is_file() else "missing", known)
        summary = Summary.model_validate_json(path.read_bytes())
        if summary.status not in ("finished", "failed"):
            return TrialResult("missing")
        path = trial.folder / CONFIG
        if other := _other_setting(trial):
            return TrialResult("failed", f"its directory holds another run ({other})")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return TrialResult("failed", f"its {path.name} is damaged ({first_reason(error)})")
    return TrialResult("done" if summary.status == "finished" else "failed", summary=summary)


def _other_setting(trial: Trial) -> str:
    """A number that a trial varies and that its run was not trained with; empty if there is none."""
    path = trial.folder / CONFIG
    settings = replace(trial, config=path.read_text(encoding="utf-8")).settings() if path.is_file() else {}
    for name in trial.varied:
        used: Any = settings
        for part in name.split("."):
            used = used.get(part) if isinstance(used, dict) else None
        given = trial.values[name]
        if not any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in (used, given)) and not math.isclose(
            used, given, rel_tol=_SAME_NUMBER
        ):
            return f"{name}={used}, not {given}"
    return ""


def first_reason(error: Exception) -> str:
    """What is wrong with a JSON file, as a part of a sentence."""
    if not isinstance(error, ValidationError):
        return reason(error)
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


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
