"""Measured rows on their way to a store or a logger, and what a logger gets of them."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

_DETAIL = re.compile(r"_sd$|_low/|_high/|^causal/.*/(1|2)$")
_MEAN_ALONE = re.compile(  # what loggers get no extremes of, so that a run has at most about 100 names
    r"(theory|sharing|heads)/|alignment/(unwhitened|nearest_)|orthogonality/(antipodal|dimensionality)$"
    r"|spectrum/target_spearman$|sad/(attention|score|score_error|top_in_last_eighth)$"
)


@dataclass(frozen=True)
class Rows:
    """K captured steps, measured, on the CPU."""

    steps: np.ndarray  # int64 [K]
    values: dict[str, tuple[tuple[str, ...], np.ndarray]]  # name -> (dimensions after "step", array [K, ...])
    batch_dims: tuple[str, ...]  # the probe's own, e.g. ("instance",)
    coords: dict[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)

    def scalars(self) -> dict[str, np.ndarray]:
        """The numbers with no dimensions but the probe's: arrays [K, *batch], or [K] and the first few of them."""
        batch = self.batch_dims
        return {
            name: values
            for name, (dims, values) in self.values.items()
            if dims == batch[: len(dims)] and values.dtype.kind in "biuf"
        }

    @classmethod
    def read(cls, trajectory: xr.Dataset) -> Rows:
        """The numbers in (some rows of) a trajectory, as they were measured; what has further dimensions is left."""
        batch = trajectory.attrs["batch_dims"]
        values = {
            str(name): (tuple(map(str, variable.dims[1:])), variable.values)
            for name, variable in trajectory.data_vars.items()
            if variable.dims[1:] == batch[: variable.ndim - 1] and variable.dtype.kind in "biuf"
        }
        return cls(trajectory["step"].values, values, batch)

    def of_instances(self, instances: slice) -> Rows:
        """The same rows of some instances; what no instance has of its own stays."""

        def cut(dims: tuple[str, ...], values: np.ndarray, first: int) -> tuple[tuple[str, ...], np.ndarray]:
            return (dims, values[(slice(None),) * first + (instances,)] if dims[:1] == ("instance",) else values)

        return replace(
            self,
            values={name: cut(dims, values, 1) for name, (dims, values) in self.values.items()},
            coords={name: cut(dims, values, 0) for name, (dims, values) in self.coords.items()},
        )

    def to_log(self, *, every: int, last: int) -> list[tuple[int, dict[str, float]]]:
        """What a logger gets: of every n-th training step and of the last one, mean, min and max over the batch.

        These are at most about 100 names, whatever the size of the model: details, and the extremes of what is looked
        at less often, stay in the trajectory.

        Returns:
            (step, one dictionary) for each of these steps.
        """
        picked = [k for k, step in enumerate(self.steps) if step % every == 0 or step == last]
        columns: dict[str, np.ndarray] = {}
        for name, values in self.scalars().items() if picked else ():
            if is_detail(name):
                continue
            columns[name], low, high = statistics(values[picked], self.batch_dims)
            if values.ndim > 1 and not _MEAN_ALONE.match(name):
                columns |= {f"{name}/min": low, f"{name}/max": high}
        return [
            (int(self.steps[k]), {name: float(column[row]) for name, column in columns.items()})
            for row, k in enumerate(picked)
        ]


def is_detail(name: str) -> bool:
    """True for numbers that the trajectory and summary.json hold, and neither tables nor loggers show."""
    return _DETAIL.search(name) is not None


def statistics(values: np.ndarray, batch_dims: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest value over the batch dimensions [K, ...] -> [K] each.

    Heads that a metric says nothing about (NaN) do not count; an instance that diverged does.
    """
    flat = values.reshape(len(values), -1)
    if "instance" in batch_dims or not np.isnan(flat).any():
        return flat.mean(1), flat.min(1), flat.max(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a row that is NaN everywhere
        return np.nanmean(flat, 1), np.nanmin(flat, 1), np.nanmax(flat, 1)
