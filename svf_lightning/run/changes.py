"""When the quantities of a run changed, and in how many of its instances they did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svf_lightning.metrics import has_happened, time_of_change
from svf_lightning.metrics.dynamics import Sizes
from svf_lightning.quantities import Place, Quantity
from svf_lightning.rows import scalar_variables
from svf_lightning.sentences import Sentence, capital, number

if TYPE_CHECKING:
    import xarray as xr


_MOST, _HALF = 0.9, 0.5  # of the way


@dataclass(frozen=True)
class Change:
    """The change of one quantity in every instance (or head) of a run.

    Args:
        of: The quantity that changes.
        quantity: What the steps are of, such as dynamics/t_align.
        steps: Training step from which a fraction of the way is covered, by instance; NaN where it did not happen.
        first: Values of the first row.
        last: Values of the last row.
        level: What the last value must reach; NaN if it is not known, None if the quantity has none.
        over: What the values are listed of: "instance" or "head".
    """

    of: Quantity
    quantity: Quantity
    steps: np.ndarray
    first: np.ndarray
    last: np.ndarray
    level: float | None
    over: str = "instance"

    @property
    def is_told(self) -> bool:
        """True if pages say so in words; the same change at half of its way, or on another scale, is left to tables."""
        return self.quantity == self.of.change and self.quantity.is_at(Place.TABLE)

    @property
    def happened(self) -> np.ndarray:
        """True for the instances in which it did."""
        return np.asarray(np.isfinite(self.steps))

    @property
    def median(self) -> float:
        """Median step of the instances in which it happened; NaN if it did in none."""
        return float(np.median(self.steps[self.happened])) if self.happened.any() else math.nan

    @property
    def title(self) -> str:
        """Its title and symbol: "singular vectors come to align (t_align)"."""
        symbol = self.quantity.symbol
        return f"{self.quantity.title} ({symbol})" if symbol else self.quantity.title

    def counted(self) -> str:
        """In how many instances it happened, or did not: "in 6 of 8 instances", "did not happen in any of 8 heads"."""
        n, k = len(self.steps), int(self.happened.sum())
        if k == 0:
            return "did not happen" if n == 1 else f"did not happen in any of {n} {self.over}s"
        return "happened" if n == 1 else f"in {k} of {n} {self.over}s"

    def sentence(self) -> Sentence:
        """What happened, or did not, with the numbers that say so."""
        k, n = int(self.happened.sum()), len(self.steps)
        words, evidence = self._ends(slice(None))
        evidence = {"happened": k, "n": n, "step": self.median, **evidence}
        when = f" at step {number(self.median)}" + (" (median)" if k > 1 else "") if k else ""
        return Sentence(f"{capital(self.title)}: {self.counted()}{when}; {words}.", evidence, k > 0)

    def sentence_of(self, i: int) -> Sentence:
        """The same of one instance."""
        step = float(self.steps[i])
        words, evidence = self._ends(slice(i, i + 1))
        when = f"step {number(step)}" if math.isfinite(step) else "did not happen"
        return Sentence(f"{capital(self.title)}: {when}; {words}.", {"step": step, **evidence}, math.isfinite(step))

    def _ends(self, chosen: slice) -> tuple[str, dict[str, float]]:
        """Ends of the curve of some instances, and the level that the last value has to reach: words and numbers."""
        known = np.isfinite(self.first[chosen]) & np.isfinite(self.last[chosen])
        if not known.any():
            return "its curve does not begin and end with a number", {}
        first, last = (float(values[chosen][known].mean(dtype=float)) for values in (self.first, self.last))
        mean = "mean " if known.sum() > 1 else ""
        words, numbers = f"{mean}{self.of.unit or 'value'} from {number(first)} to {number(last)}", {"from": first}
        if self.level is None:
            return words, {**numbers, "to": last}
        if math.isnan(self.level):
            return f"{words}; what it needs cannot be computed from what the run kept", {**numbers, "to": last}
        needed = f"needed {'>=' if self.of.rises else '<='} {number(self.level)}"
        return f"{words}, {needed}", {**numbers, "to": last, "level": self.level}

    def to_log(self) -> dict[str, float]:
        """What loggers get: mean, min and max over the instances in which it happened, and the share of these."""
        if self.quantity.logged == "no":
            return {}
        name, steps = self.quantity.name, self.steps[self.happened]
        known = {name: steps.mean(), f"{name}/min": steps.min(), f"{name}/max": steps.max()} if len(steps) else {}
        return {key: float(value) for key, value in known.items()} | {f"{name}/share": float(self.happened.mean())}


def changes(
    scalars: Mapping[str, Any],
    steps: np.ndarray,
    batch_dims: tuple[str, ...],
    quantities: Mapping[str, Quantity],
    sizes: Sizes,
) -> dict[str, Change]:
    """When quantities changed (``Quantity.change`` and ``halfway``, such as ``dynamics/t_align``), if they did.

    Args:
        scalars: Columns [K, *batch] by name.
        steps: Training step of each row [K].
        batch_dims: The module's own dimensions.
        quantities: What is known of them.
        sizes: Those of the run, which levels follow from (:func:`sizes_in`).

    Returns:
        By the name of the change.
    """
    found = {}
    over = "instance" if batch_dims[:1] == ("instance",) else "head"
    for name, quantity in quantities.items():
        steps_of_change = ((quantity.change, _MOST), (quantity.halfway, _HALF))
        wanted = [(step_of, fraction) for step_of, fraction in steps_of_change if step_of is not None]
        if not wanted or name not in scalars:
            continue
        values = per_unit(np.asarray(scalars[name]), batch_dims)
        series = torch.tensor(values if values.dtype == np.float32 else values.astype(float))
        level = quantity.level_in(sizes)
        happened = has_happened(series, level=level, rises=quantity.rises).numpy()
        for step_of, fraction in wanted:
            times = time_of_change(series, torch.tensor(steps), fraction=fraction).numpy()
            found[step_of.name] = Change(
                quantity, step_of, np.where(happened, times, np.nan), values[0], values[-1], level, over
            )
    return found


def changes_of(trajectory: xr.Dataset, quantities: Mapping[str, Quantity]) -> dict[str, Change]:
    """:func:`changes` of a stored training."""
    columns = {
        name: variable
        for name, variable in scalar_variables(trajectory).items()
        if name in quantities and len(quantities[name].with_changes()) > 1
    }
    return changes(columns, trajectory["step"].values, trajectory.attrs["batch_dims"], quantities, sizes_of(trajectory))


def sizes_of(trajectory: xr.Dataset) -> Sizes:
    """The sizes of a stored run."""
    return sizes_in({str(name): size for name, size in trajectory.sizes.items()}, trajectory.coords)


def sizes_in(sizes: Mapping[str, int], coords: Mapping[Any, Any]) -> Sizes:
    """The sizes that levels follow from, of a run with these dimensions and coordinates."""
    pairs = [coords[name] for name in ("query_feature", "key_feature") if name in coords]
    attended = {int(feature) for side in pairs for feature in np.asarray(side).ravel()}
    return Sizes(
        d_model=sizes.get("d_model"),
        n_singular=sizes.get("rank"),
        n_pairs=sizes.get("pair"),
        n_features=sizes.get("feature"),
        n_attended=len(attended) or None,
    )


def per_unit(values: np.ndarray, batch_dims: tuple[str, ...]) -> np.ndarray:
    """Values [K, *batch] as [K, instance], means over the other dimensions; without instances, as [K, head]."""
    flat = values.reshape(len(values), -1)
    if batch_dims[:1] != ("instance",) or values.ndim < 3:
        return flat
    return np.asarray(flat.reshape(len(values), values.shape[1], -1).mean(-1))
