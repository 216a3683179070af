"""All quantities that this package measures, and what is known of those in a trajectory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from svf_lightning import callbacks
from svf_lightning.callbacks import ProbeMetric, quantities_of
from svf_lightning.quantities import Quantity, stored_quantities
from svf_lightning.trajectory import DERIVED_QUANTITIES, derived_from

if TYPE_CHECKING:
    import xarray as xr

METRICS: dict[str, type[ProbeMetric]] = {
    name: member
    for name in callbacks.__all__
    if isinstance(member := getattr(callbacks, name), type)
    and issubclass(member, ProbeMetric)
    and member is not ProbeMetric
}
BUILT_IN: dict[str, Quantity] = {**quantities_of([metric() for metric in METRICS.values()]), **DERIVED_QUANTITIES}


def known(trajectory: xr.Dataset) -> dict[str, Quantity]:
    """What is known of the quantities in a trajectory: what it says itself, else what this package says of the name.

    Trajectories that earlier versions wrote know of no levels; those of this package's own quantities are added, with
    what is said of their changes.
    """
    stored = stored_quantities(trajectory)
    for name, quantity in stored.items():
        ours = BUILT_IN.get(name)
        if ours is not None and quantity.level is None and quantity.provider == ours.provider:
            stored[name] = replace(quantity, level=ours.level, change=ours.change, halfway=ours.halfway)
    return stored | {name: quantity for name, quantity in BUILT_IN.items() if name not in stored}


def how_to_have(name: str) -> str:
    """What makes a run hold a quantity, as a part of a sentence."""
    sources = derived_from(name)
    quantity = BUILT_IN.get(sources[-1] if sources else name)
    metric = METRICS.get(quantity.provider.rsplit(".", 1)[-1]) if quantity else None
    parts = (
        [f"the {metric.__name__} callback (--trainer.callbacks+={quantity.provider})"] if metric and quantity else []
    )
    parts += [needs for needs in (metric.needs if metric else "", quantity.needs if quantity else "") if needs]
    return f"run with {', with '.join(parts)}" if parts else "add the callback that measures it"
