"""The verdict on a run: summary.json, and what is known of its dynamics at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svf_lightning.claims import Claim, Verdict, judge
from svf_lightning.metrics import time_of_change
from svf_lightning.rows import statistics
from svf_lightning.run_dir import SUMMARY, versions, write_json

if TYPE_CHECKING:
    import xarray as xr

# what happens when (method, section 3), by the metric whose change is timed
DYNAMICS = {
    "dynamics/t_align": "alignment/matched",
    "dynamics/t_ortho": "orthogonality/attended_vs_rest",
}


def summarize(
    run_dir: Path,
    *,
    experiment: str,
    claims: Sequence[Claim],
    status: str,
    steps: int,
    seconds: float,
    first: Mapping[str, np.ndarray],
    metrics: Mapping[str, np.ndarray],
    settings: Mapping[str, np.ndarray],
    batch_dims: tuple[str, ...],
) -> tuple[dict[str, Any], list[Verdict]]:
    """Judge a run's claims and write its summary.json.

    Args:
        run_dir: The run directory.
        experiment: Name of the experiment.
        claims: What the paper says.
        status: "finished", "interrupted" or "failed".
        steps: Training step of the last row.
        seconds: How long the run took.
        first: Values of the first row by metric, one per instance.
        metrics: Those of the last row.
        settings: What the instances differ in.
        batch_dims: The module's own dimensions.

    Returns:
        What was written, and the verdicts.
    """
    verdicts = [judge(claim, {**settings, **metrics}, first) for claim in claims]
    summary = {
        "experiment": experiment,
        "status": status,
        "steps": steps,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "metrics": {
            name: {
                **dict(zip(("mean", "min", "max"), mean_min_max(values, batch_dims), strict=True)),
                "per_instance": [float(v) for v in values],
            }
            for name, values in sorted(metrics.items())
        },
        "claims": [verdict.as_dict() for verdict in verdicts],
    }
    write_json(run_dir / SUMMARY, summary)
    return summary, verdicts


def first_and_last(
    scalars: Mapping[str, Any], batch_dims: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values of the first and of the last row, one per instance, of columns [K, *batch] (anything that slices)."""
    ends = slice(None, 1), slice(-1, None)
    first, last = (
        {name: per_instance(np.asarray(values[end]), batch_dims)[0] for name, values in scalars.items()} for end in ends
    )
    return first, last


def dynamics(scalars: Mapping[str, Any], steps: np.ndarray, batch_dims: tuple[str, ...]) -> dict[str, np.ndarray]:
    """``dynamics/t_align`` and ``dynamics/t_ortho`` of columns [K, *batch]: training steps, one per instance."""
    return {
        name: time_of_change(
            torch.tensor(per_instance(np.asarray(scalars[source]), batch_dims)), torch.tensor(steps)
        ).numpy()
        for name, source in DYNAMICS.items()
        if source in scalars
    }


def dynamics_of(trajectory: xr.Dataset) -> dict[str, np.ndarray]:
    """:func:`dynamics` of a stored training; NaN for an instance in which nothing changed."""
    columns = {source: trajectory[source] for source in DYNAMICS.values() if source in trajectory}
    return dynamics(columns, trajectory["step"].values, trajectory.attrs["batch_dims"])


def dynamics_to_log(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What loggers get of the dynamics, which are known at the end: mean, min and max over instances."""
    return {
        f"{name}{suffix}": float(of(metrics[name]))
        for name in DYNAMICS
        if name in metrics
        for suffix, of in (("", np.mean), ("/min", np.min), ("/max", np.max))
    }


def per_instance(values: np.ndarray, batch_dims: tuple[str, ...]) -> np.ndarray:
    """Values [K, *batch] as [K, instance], means over the other dimensions; without instances, as [K, all heads]."""
    flat = values.reshape(len(values), -1)
    if batch_dims[:1] != ("instance",) or values.ndim < 3:
        return flat
    return np.asarray(flat.reshape(len(values), values.shape[1], -1).mean(-1))


def mean_min_max(values: np.ndarray, batch_dims: tuple[str, ...]) -> list[float]:
    """Mean, smallest and largest of one step's values."""
    return [float(value[0]) for value in statistics(values[None], batch_dims)]
