"""One quantity of several runs over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float, Int, Shaped

from svf_lightning.errors import InputError
from svf_lightning.figures.axes import Steps
from svf_lightning.figures.look import BLUE, DASHES, GREEN, ORANGE, PURPLE, SKY, VERMILLION, as_text, finish
from svf_lightning.figures.reading import mean_of_finite, quantity, read_tokens
from svf_lightning.quantities import Place, Quantity
from svf_lightning.registry import known
from svf_lightning.rows import scalar_variables

if TYPE_CHECKING:
    import xarray as xr

_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)


class OverSteps(NamedTuple):
    """The mean of one quantity in each run, on the steps of all of them."""

    run: Shaped[np.ndarray, "run"]  # names
    step: Int[np.ndarray, "step"]
    tokens: Float[np.ndarray, "run step"] | None  # seen until then; NaN where a run has no row; None: one does not say
    mean: Float[np.ndarray, "run step"]  # over instances or heads; NaN at a step that the run did not capture
    quantity: Quantity


def compared_quantities(datasets: Mapping[str, xr.Dataset]) -> list[str]:
    """Names of the quantities to compare (``Place.COMPARISON``) that two runs or more hold over steps."""
    declared: dict[str, Quantity] = {}
    for dataset in datasets.values():
        declared |= known(dataset)
    names = [name for name, q in declared.items() if q.is_at(Place.COMPARISON)]
    return [name for name in names if sum(_has(dataset, name) for dataset in datasets.values()) > 1]


def _has(dataset: xr.Dataset, name: str) -> bool:
    return dataset.sizes["step"] > 1 and name in scalar_variables(dataset)


def prepare_over_steps(datasets: Mapping[str, xr.Dataset], name: str) -> OverSteps:
    """The mean of a quantity in each run that holds it over steps.

    Args:
        datasets: Trajectories by the name of their run.
        name: Name of a scalar quantity.

    Raises:
        InputError: Fewer than two runs hold it over steps.
    """
    holders = {run: dataset for run, dataset in datasets.items() if _has(dataset, name)}
    if len(holders) < 2:
        raise InputError(f"fewer than two of the runs hold {name!r} over steps. Fix: compare runs of one kind.")
    steps = np.unique(np.concatenate([dataset["step"].values for dataset in holders.values()]))
    mean, tokens = (np.full((len(holders), len(steps)), np.nan) for _ in range(2))
    seen = [read_tokens(dataset) for dataset in holders.values()]
    for i, dataset in enumerate(holders.values()):
        values = np.asarray(dataset[name].values, dtype=float).reshape(dataset.sizes["step"], -1)
        rows = np.searchsorted(steps, dataset["step"].values)
        mean[i, rows], tokens[i, rows] = mean_of_finite(values, 1), seen[i]
    known = None if any(each is None for each in seen) else tokens
    return OverSteps(np.array(list(holders)), steps, known, mean, quantity(next(iter(holders.values())), name))


def draw_over_steps(data: OverSteps) -> go.Figure:
    """A line for each run."""
    drawn = go.Figure()
    ends: list[float] = []
    for i, (run, mean) in enumerate(zip(data.run, data.mean, strict=True)):
        captured = np.isfinite(mean)
        if not captured.any():
            continue
        time = Steps(data.step[captured], "log", None if data.tokens is None else data.tokens[i, captured])
        # dashes, so that a line shows through one that lies on it
        look = {"line_dash": DASHES[i % len(DASHES)], "connectgaps": True}
        time.line(drawn, mean[captured], _COLOURS[i % len(_COLOURS)], as_text(run), width=2.5, **look)
        ends += time.axis["range"]
    shown = data.quantity
    limits = {"range": [min(ends), max(ends)]} if ends else {}
    counted = None if data.tokens is None else np.unique(data.tokens[np.isfinite(data.tokens)])
    axis = Steps(data.step if counted is None else np.arange(len(counted)), "log", counted).axis
    scale = "log" if shown.panel is not None and shown.panel.log else "linear"
    return finish(
        drawn,
        as_text(shown.name),
        shown.label if shown.label != as_text(shown.name) else "",
        height=380,
        xaxis={**axis, **limits},
        yaxis={"title": {"text": shown.unit or "value"}, "type": scale},
    )


def over_steps(datasets: Mapping[str, xr.Dataset], name: str) -> go.Figure:
    """The mean of one quantity in each run over training; see :func:`prepare_over_steps`."""
    return draw_over_steps(prepare_over_steps(datasets, name))
