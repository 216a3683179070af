"""The verdict on a run: summary.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from svf_lightning.files import read_json, write_json
from svf_lightning.metrics.dynamics import UNKNOWN, Sizes
from svf_lightning.quantities import Place, Quantity
from svf_lightning.rows import Rows, statistics
from svf_lightning.run.changes import Change, per_unit, sizes_in
from svf_lightning.run.claims import Evidence, Verdict, judge
from svf_lightning.run.directory import SUMMARY, versions
from svf_lightning.run.settings import Experiment

_NUMBER = (int, float)
_MAYBE = (int, float, NoneType)  # null: not a number
_INTERVAL = ([_NUMBER], NoneType)
_CLAIM = {
    "claim": str,
    "figure": str,
    "measured": _MAYBE,
    "threshold?": _MAYBE,
    "holds": (bool, NoneType),
    "rule?": str,
    "needed": str,
    "verdict?": str,
    "null?": ({"name": str, "value": _MAYBE}, NoneType),
    "interval?": _INTERVAL,
    "effect?": ({"value": _NUMBER, "interval": _INTERVAL}, NoneType),
    "share?": ({"value": _NUMBER, "interval": _INTERVAL, "null": _MAYBE, "needed": _MAYBE}, NoneType),
    "n?": int,
    "why?": str,
}
_METRIC = {"label?": str, "unit?": str, "mean": _MAYBE, "min": _MAYBE, "max": _MAYBE, "per_instance": [_MAYBE]}
_SUMMARY = {  # what readers rely on
    "experiment?": str,
    "status": str,
    "steps": int,
    "seconds": _NUMBER,
    "versions?": {"*": str},
    "over?": str,
    "metrics": {"*": _METRIC},
    "claims": [_CLAIM],
}


class Ends(NamedTuple):
    """Values of the first row and of the last one: [n], or [n, k] for units with k values each."""

    first: np.ndarray
    last: np.ndarray
    unit: str = ""  # what they are of, if that is neither an instance nor a head


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a run.

    Args:
        status: "finished", "interrupted" or "failed".
        steps: Training step of the last row.
        seconds: How long the run took.
        first: Values of the first row by metric, one per instance (or head).
        last: Those of the last row, and the steps of change (NaN where it did not happen).
        changes: What happened, by the name of the change.
        batch_dims: The module's own dimensions.
        settings: What the instances differ in, so that a claim can be about some of them.
        quantities: What is known of the metrics.
        sizes: Of the run, which levels and chance follow from.
        details: What claims may look at beside ``first`` and ``last``, by metric.
    """

    status: str = "finished"
    steps: int = 0
    seconds: float = 0.0
    first: Mapping[str, np.ndarray] = field(default_factory=dict)
    last: Mapping[str, np.ndarray] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    batch_dims: tuple[str, ...] = ("instance",)
    settings: Mapping[str, np.ndarray] = field(default_factory=dict)
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    sizes: Sizes = UNKNOWN
    details: Mapping[str, Ends] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, rows: Rows, names: Iterable[str] = ()) -> Result:
        """The ends of some rows; ``names``: what claims look at."""
        first, last = ends(rows.scalars(), rows.batch_dims)
        return cls(
            steps=int(rows.steps[-1]),
            first=first,
            last=last,
            batch_dims=rows.batch_dims,
            settings={name: values for name, (dims, values) in rows.coords.items() if dims == ("instance",)},
            quantities=rows.quantities,
            sizes=sizes_in(rows.sizes, {name: values for name, (_, values) in rows.coords.items()}),
            details=details({name: rows.values[name] for name in names if name in rows.values}, rows.batch_dims),
        )

    def evidence(self) -> Evidence:
        """What claims look at."""
        return Evidence(
            last={**self.settings, **self.last, **{name: ends_of.last for name, ends_of in self.details.items()}},
            first={**self.first, **{name: ends_of.first for name, ends_of in self.details.items()}},
            sizes=self.sizes,
            quantities=self.quantities,
            unit=self.over.removesuffix("s"),
            units={name: ends_of.unit for name, ends_of in self.details.items() if ends_of.unit},
        )

    def with_changes(self, changes: Mapping[str, Change]) -> Result:
        """The result with what happened, whose steps are among its last values."""
        return replace(self, changes=changes, last={**self.last, **{name: c.steps for name, c in changes.items()}})

    @property
    def over(self) -> str:
        """What values are listed of: "instances" or "heads"."""
        return "instances" if self.batch_dims[:1] == ("instance",) else "heads"

    def quantity(self, name: str) -> Quantity:
        """What is known of a metric; its name alone, if nothing is."""
        return self.quantities.get(name) or Quantity(name)

    def shown_in_table(self) -> dict[str, Quantity]:
        """The metrics of the closing table, in the order in which they are declared; then those that are not."""
        names = [*(name for name in self.quantities if name in self.last), *self.last]
        quantities = {name: self.quantity(name) for name in names}
        return {name: q for name, q in quantities.items() if q.is_at(Place.TABLE) and q.logged != "no"}

    def statistics(self, name: str) -> tuple[float, float, float]:
        """Mean, smallest and largest of the final values of a metric; of steps of change, where it happened."""
        if name in self.changes:
            steps = self.last[name][self.changes[name].happened]
            return (float(steps.mean()), float(steps.min()), float(steps.max())) if len(steps) else (math.nan,) * 3
        mean, low, high = (float(value[0]) for value in statistics(self.last[name][None], self.batch_dims))
        return mean, low, high

    def changes_to_log(self) -> dict[str, float]:
        """What loggers get at the end: when quantities changed, and in which share of the instances."""
        return {name: value for change in self.changes.values() for name, value in change.to_log().items()}


def summarize(run_dir: Path, experiment: Experiment, result: Result) -> list[Verdict]:
    """Judge a run's claims and write its summary.json; its ``over`` says what ``per_instance`` lists."""
    evidence = result.evidence()
    verdicts = [judge(claim, evidence) for claim in experiment.claims]
    if result.steps == 0 and result.over == "instances":  # initial weights can neither show nor contradict a claim
        verdicts = [replace(verdict, verdict="vacuous", holds=None, why="no step was trained") for verdict in verdicts]
    metrics = {}
    for name, values in sorted(result.last.items()):
        quantity = result.quantity(name)
        known = zip(("mean", "min", "max"), result.statistics(name), strict=True)
        per_instance = [float(value) for value in values]
        metrics[name] = {"label": quantity.title, "unit": quantity.unit, **dict(known), "per_instance": per_instance}
        if name in result.changes:
            metrics[name] |= {"happened": int(result.changes[name].happened.sum())}
    summary = {
        "experiment": experiment.name,
        "status": result.status,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "versions": versions(),
        "over": result.over,
        "metrics": metrics,
        "claims": [verdict.as_dict() for verdict in verdicts],
    }
    write_json(run_dir / SUMMARY, summary)
    return verdicts


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The summary.json of a run; empty for a run that has none, as it goes on or was killed.

    Raises:
        DamagedError: It cannot be read, or is no summary.
    """
    return dict(read_json(run_dir / SUMMARY, _SUMMARY) or {})


def ends(
    scalars: Mapping[str, Any], batch_dims: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values of the first and of the last row, one per instance, of columns [K, *batch] (anything that slices)."""
    first, last = (
        {name: per_unit(np.asarray(values[rows]), batch_dims)[0] for name, values in scalars.items()}
        for rows in (slice(None, 1), slice(-1, None))
    )
    return first, last


def details(columns: Mapping[str, tuple[Sequence[Any], Any]], batch_dims: tuple[str, ...]) -> dict[str, Ends]:
    """The ends of columns as claims look at them: one row for each instance (or head), or for each unit of their own.

    Args:
        columns: Dimensions without the step, and values [K, ...] (anything that slices).
        batch_dims: The module's own dimensions.
    """
    found = {}
    units = batch_dims[:1] if batch_dims[:1] == ("instance",) else batch_dims
    for name, (dims, values) in columns.items():
        first, last = (np.asarray(values[rows])[0] for rows in (slice(None, 1), slice(-1, None)))
        are_units = bool(units) and tuple(dims[: len(units)]) == units
        n = int(np.prod(first.shape[: len(units)])) if are_units else first.size
        first, last = (end.reshape(n, -1) for end in (first, last))
        if first.shape[1] == 1:
            first, last = first[:, 0], last[:, 0]
        found[name] = Ends(first, last, "" if are_units else (str(dims[0]) if dims else "model"))
    return found
