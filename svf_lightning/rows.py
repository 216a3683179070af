"""Measured rows on their way to a store or a logger, and what a logger gets of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from svf_lightning.quantities import Quantity

if TYPE_CHECKING:
    import xarray as xr

Column = tuple[tuple[str, ...], np.ndarray]  # dimensions, values


@dataclass(frozen=True)
class Rows:
    """K captured steps, measured, on the CPU."""

    steps: np.ndarray  # int64 [K]
    values: dict[str, Column]  # name -> (dimensions after "step", array [K, ...])
    batch_dims: tuple[str, ...]  # the probe's own, e.g. ("instance",)
    coords: dict[str, Column] = field(default_factory=dict)
    quantities: Mapping[str, Quantity] = field(default_factory=dict)  # what is known of the values, by name

    def quantity(self, name: str) -> Quantity:
        """What is known of a quantity; its name alone, if nothing is."""
        return self.quantities.get(name) or Quantity(name=name)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the dimensions of values and coordinates, without the step."""
        sizes: dict[str, int] = {}
        for dims, values in (*((dims, values[0]) for dims, values in self.values.values()), *self.coords.values()):
            sizes |= dict(zip(dims, values.shape, strict=True))
        return sizes

    def scalars(self) -> dict[str, np.ndarray]:
        """The numbers with no dimensions but the probe's: arrays [K, *batch], or [K] and the first few of them."""
        batch = self.batch_dims
        return {
            name: values
            for name, (dims, values) in self.values.items()
            if dims == batch[: len(dims)] and values.dtype.kind in "biuf"
        }

    @classmethod
    def read(cls, trajectory: xr.Dataset, quantities: Mapping[str, Quantity]) -> Rows:
        """The numbers in (some rows of) a trajectory, as they were measured; what has further dimensions is left."""
        scalars = scalar_variables(trajectory)
        values = {name: (tuple(map(str, v.dims[1:])), v.values) for name, v in scalars.items()}
        return cls(trajectory["step"].values, values, trajectory.attrs["batch_dims"], quantities=quantities)

    @classmethod
    def joined(cls, chunks: Sequence[Rows]) -> Rows:
        """Chunks of rows as one."""
        first = chunks[0]
        values = {
            name: (dims, np.concatenate([chunk.values[name][1] for chunk in chunks]))
            for name, (dims, _) in first.values.items()
        }
        return replace(first, steps=np.concatenate([chunk.steps for chunk in chunks]), values=values)

    def of_instances(self, instances: slice) -> Rows:
        """The same rows of some instances; what no instance has of its own stays."""

        def cut(dims: tuple[str, ...], values: np.ndarray, first: int) -> Column:
            return (dims, values[(slice(None),) * first + (instances,)] if dims[:1] == ("instance",) else values)

        return replace(
            self,
            values={name: cut(dims, values, 1) for name, (dims, values) in self.values.items()},
            coords={name: cut(dims, values, 0) for name, (dims, values) in self.coords.items()},
        )

    def to_log(self, *, every: int, last: int) -> list[tuple[int, dict[str, float]]]:
        """What a logger gets: of every n-th training step and of the last one, mean, min and max over the batch.

        These are at most about 100 names, whatever the size of the model: details, and the extremes of what is looked
        at less often, stay in the trajectory (``Quantity.logged``).

        Returns:
            (step, one dictionary) for each of these steps.
        """
        picked = [k for k, step in enumerate(self.steps) if step % every == 0 or step == last]
        columns: dict[str, np.ndarray] = {}
        for name, values in self.scalars().items() if picked else ():
            logged = self.quantity(name).logged
            if logged == "no":
                continue
            columns[name], low, high = statistics(values[picked], self.batch_dims)
            if values.ndim > 1 and logged == "extremes":
                columns |= {f"{name}/min": low, f"{name}/max": high}
        return [
            (int(self.steps[k]), {name: float(column[row]) for name, column in columns.items()})
            for row, k in enumerate(picked)
        ]


def scalar_variables(trajectory: xr.Dataset) -> dict[str, xr.DataArray]:
    """The numbers in a trajectory that have no dimensions but the step and the first few of the module's own."""
    batch = trajectory.attrs["batch_dims"]
    return {
        str(name): variable
        for name, variable in trajectory.data_vars.items()
        if variable.dims[:1] == ("step",)
        and variable.dims[1:] == tuple(batch)[: variable.ndim - 1]
        and variable.dtype.kind in "biuf"
    }


def statistics(values: np.ndarray, batch_dims: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest value over the batch dimensions [K, ...] -> [K] each.

    Heads that a metric says nothing about (NaN) do not count; an instance that diverged does.
    """
    flat = values.reshape(len(values), -1)
    if "instance" in batch_dims or not np.isnan(flat).any():
        return flat.mean(1), flat.min(1), flat.max(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns about rows without a number
        return np.nanmean(flat, 1), np.nanmin(flat, 1), np.nanmax(flat, 1)
