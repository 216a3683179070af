"""The verdict on a run: summary.json, and when its quantities changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svf_lightning.files import read_json, write_json
from svf_lightning.metrics import time_of_change
from svf_lightning.quantities import Place, Quantity
from svf_lightning.rows import Rows, scalar_variables, statistics
from svf_lightning.run.claims import Verdict, judge
from svf_lightning.run.directory import SUMMARY, versions
from svf_lightning.run.settings import Experiment

if TYPE_CHECKING:
    import xarray as xr


_NUMBER = (int, float)
_MAYBE = (int, float, NoneType)  # null: not a number
_CLAIM = {
    "claim": str,
    "figure": str,
    "measured": _MAYBE,
    "threshold?": _MAYBE,
    "holds": (bool, NoneType),
    "rule?": str,
    "needed": str,
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


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a run.

    Args:
        status: "finished", "interrupted" or "failed".
        steps: Training step of the last row.
        seconds: How long the run took.
        first: Values of the first row by metric, one per instance (or head).
        last: Those of the last row, and the steps of change.
        batch_dims: The module's own dimensions.
        settings: What the instances differ in, so that a claim can be about some of them.
        quantities: What is known of the metrics.
    """

    status: str = "finished"
    steps: int = 0
    seconds: float = 0.0
    first: Mapping[str, np.ndarray] = field(default_factory=dict)
    last: Mapping[str, np.ndarray] = field(default_factory=dict)
    batch_dims: tuple[str, ...] = ("instance",)
    settings: Mapping[str, np.ndarray] = field(default_factory=dict)
    quantities: Mapping[str, Quantity] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, rows: Rows) -> Result:
        """The ends of some rows."""
        first, last = ends(rows.scalars(), rows.batch_dims)
        return cls(
            steps=int(rows.steps[-1]),
            first=first,
            last=last,
            batch_dims=rows.batch_dims,
            settings={name: values for name, (dims, values) in rows.coords.items() if dims == ("instance",)},
            quantities=rows.quantities,
        )

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
        """Mean, smallest and largest of the final values of a metric."""
        mean, low, high = (float(value[0]) for value in statistics(self.last[name][None], self.batch_dims))
        return mean, low, high

    def changes_to_log(self) -> dict[str, float]:
        """What loggers get at the end: mean, min and max of the steps of change."""
        return changes_to_log({name: self.last[name] for name in _sources(self.quantities) if name in self.last})


def summarize(run_dir: Path, experiment: Experiment, result: Result) -> list[Verdict]:
    """Judge a run's claims and write its summary.json; its ``over`` says what ``per_instance`` lists."""
    verdicts = [judge(claim, {**result.settings, **result.last}, result.first) for claim in experiment.claims]
    metrics = {}
    for name, values in sorted(result.last.items()):
        quantity = result.quantity(name)
        known = zip(("mean", "min", "max"), result.statistics(name), strict=True)
        per_instance = [float(value) for value in values]
        metrics[name] = {"label": quantity.title, "unit": quantity.unit, **dict(known), "per_instance": per_instance}
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


def changes(
    scalars: Mapping[str, Any], steps: np.ndarray, batch_dims: tuple[str, ...], quantities: Mapping[str, Quantity]
) -> dict[str, np.ndarray]:
    """When quantities changed (``Quantity.change``, such as ``dynamics/t_align``): training steps, one per instance.

    Args:
        scalars: Columns [K, *batch] by name.
        steps: Training step of each row [K].
        batch_dims: The module's own dimensions.
        quantities: What is known of them.

    Returns:
        By the name of the change; NaN for an instance in which nothing changed.
    """
    return {
        name: time_of_change(
            torch.tensor(per_unit(np.asarray(scalars[source]), batch_dims)), torch.tensor(steps)
        ).numpy()
        for name, source in _sources(quantities).items()
        if source in scalars
    }


def changes_of(trajectory: xr.Dataset, quantities: Mapping[str, Quantity]) -> dict[str, np.ndarray]:
    """:func:`changes` of a stored training."""
    sources = set(_sources(quantities).values())
    columns = {name: variable for name, variable in scalar_variables(trajectory).items() if name in sources}
    return changes(columns, trajectory["step"].values, trajectory.attrs["batch_dims"], quantities)


def changes_to_log(steps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What loggers get of the steps of change, which are known at the end: mean, min and max over instances."""
    return {
        f"{name}{suffix}": float(of(values))
        for name, values in steps.items()
        for suffix, of in (("", np.mean), ("/min", np.min), ("/max", np.max))
    }


def _sources(quantities: Mapping[str, Quantity]) -> dict[str, str]:
    """Names of changes, each with the quantity whose change it is."""
    return {quantity.change.name: name for name, quantity in quantities.items() if quantity.change is not None}


def per_unit(values: np.ndarray, batch_dims: tuple[str, ...]) -> np.ndarray:
    """Values [K, *batch] as [K, instance], means over the other dimensions; without instances, as [K, head]."""
    flat = values.reshape(len(values), -1)
    if batch_dims[:1] != ("instance",) or values.ndim < 3:
        return flat
    return np.asarray(flat.reshape(len(values), values.shape[1], -1).mean(-1))
