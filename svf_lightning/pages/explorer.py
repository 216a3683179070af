"""The time slider of a page: matrices, and the geometry of the features, moving through training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from svf_lightning.figures.reading import pair_features
from svf_lightning.pages.page import Widget, largest, packed
from svf_lightning.quantities import Place, Quantity
from svf_lightning.registry import known
from svf_lightning.run.changes import Change, changes_of
from svf_lightning.sentences import Sentence
from svf_lightning.trajectory import derived_from, with_derived

if TYPE_CHECKING:
    import xarray as xr

N_FRAMES = 60
_FEW = 6  # names of attended features that are shown beside those of every tenth one
MAX_BYTES = 1_500_000  # of all frames of all instances; a large model has fewer frames


class _Cell(NamedTuple):
    """One picture of the slider."""

    kind: str  # "heat", "bars" or "plane"
    title: str  # with the unit
    dims: tuple[str, ...]  # rows and columns of a heat map; the bars
    values: np.ndarray  # [frame, rows, columns], [frame, bars] or [frame, 2, feature]
    scale: float  # largest size; 1 for cosines
    is_signed: bool = False  # numbers of both signs are possible, whether or not there are any


def time_slider(dataset: xr.Dataset) -> Widget | None:
    """The widget of a page; None where :func:`frames` has nothing to show."""
    data = frames(dataset)
    return None if data is None else Widget("explorer", data)


def frames(dataset: xr.Dataset) -> dict[str, Any] | None:
    """What the slider shows, as JSON values; None for a run with nothing to show, or with a single step.

    Shown are all quantities that say so (``Place.SLIDER``) and have one or two dimensions of their own: bars or heat
    maps; and of features W, their products and the plane of a pair. Numbers are signed bytes (base64) in units of
    ``scale / 127``: a colour, or a place on a small figure, needs no more. Steps are spread evenly over the logarithm,
    with the first, the last and those at which something has changed.

    Args:
        dataset: A trajectory.

    Returns:
        ``steps`` [F]; ``places``, instances (or heads) that are shown, each with its ``name``, ``moments`` (step and
        words for what happened), ``absent`` (a sentence for each change that did not), and for each of the ``cells``
        its ``values`` and ``scale``. ``is_named``: heat maps name the attended features.
    """
    declared = known(dataset)
    shown = [q for name, q in declared.items() if name in dataset and _is_shown(q, dataset)]
    has_features = "W" in dataset and dataset["W"].dims[-2:] == ("d_model", "feature")
    if not (shown or has_features) or dataset.sizes["step"] < 2:
        return None
    sizes = dataset.sizes
    batch_dims = [dim for dim in dataset.attrs["batch_dims"] if dim in sizes]
    shape = tuple(sizes[dim] for dim in batch_dims)
    n_features = sizes["feature"] if has_features else 0
    per_frame = sum(math.prod(sizes[dim] for dim in q.dims) for q in shown) + n_features**2 + 2 * n_features  # bytes
    n_frames = min(N_FRAMES, max(2, MAX_BYTES // per_frame))
    n_places = max(1, min(math.prod(shape), MAX_BYTES // (n_frames * per_frame)))
    all_steps = np.asarray(dataset["step"].values)
    changes = changes_of(dataset, declared)
    told = [_told(changes, place, shape) for place in range(n_places)]
    moments = [_moments(each) for each in told]
    rows = _rows(all_steps, {step for each in moments for step, _ in each}, n_frames)
    stored = {name for q in shown for name in derived_from(q.name) or (q.name,)} | ({"W"} if has_features else set())
    some = with_derived(dataset[sorted(stored)].isel(step=rows).load())
    pair = _plane_pair(dataset) if has_features else (0, 0)
    places: list[dict[str, Any]] = []
    signed: set[int] = set()  # cells that hold a negative number
    cells: list[_Cell] = []
    for place in range(n_places):
        at = dict(zip(batch_dims, np.unravel_index(place, shape), strict=True))
        cells = [_cell(q, _values(some, q.name, at)) for q in shown]
        if has_features:
            cells += _feature_cells(_values(some, "W", at), pair)
        signed |= {i for i, cell in enumerate(cells) if cell.is_signed or np.nanmin(cell.values, initial=0) < 0}
        packed_cells = [{"values": packed(cell.values, cell.scale), "scale": cell.scale} for cell in cells]
        name = ", ".join(f"{dim} {i}" for dim, i in at.items())
        absent = [sentence.text for _, sentence in told[place] if not sentence.happened]
        places.append({"name": name, "moments": moments[place], "absent": absent, "cells": packed_cells})
    attended = sorted({feature for side in pair_features(dataset) for feature in side}) if _has_pairs(dataset) else []
    return {
        "steps": [int(step) for step in all_steps[rows]],
        "place": " and ".join(batch_dims) or "run",
        "n_places": math.prod(shape),
        "attended": attended,
        "is_named": 0 < len(attended) <= _FEW,
        "pair": pair if has_features and sizes["d_model"] > 2 else None,
        "cells": [{**_described(cell), "signed": i in signed} for i, cell in enumerate(cells)],
        "places": places,
    }


def _is_shown(quantity: Quantity, dataset: xr.Dataset) -> bool:
    variable = dataset[quantity.name]
    n_own = len(quantity.dims)
    batch = tuple(dataset.attrs["batch_dims"])[: variable.ndim - 1 - n_own]
    placed = variable.dims == ("step", *batch, *quantity.dims)
    return quantity.is_at(Place.SLIDER) and n_own in (1, 2) and placed and variable.dtype.kind in "biuf"


def _has_pairs(dataset: xr.Dataset) -> bool:
    return "query_feature" in dataset and "U" in dataset


def _values(some: xr.Dataset, name: str, at: Mapping[str, Any]) -> np.ndarray:
    """A quantity at one place [frame, ...]; what all heads share is the same for all of them."""
    variable = some[name]
    return np.asarray(variable.isel({dim: int(i) for dim, i in at.items() if dim in variable.dims}).values)


def _cell(quantity: Quantity, values: np.ndarray) -> _Cell:
    kind = "heat" if len(quantity.dims) == 2 else "bars"
    limits = (quantity.low, quantity.high)
    scale = 1.0 if limits in ((0, 1), (-1, 1)) else largest(values)
    return _Cell(kind, quantity.axis, quantity.dims, values, scale, limits == (-1, 1))


def _feature_cells(W: np.ndarray, pair: tuple[int, int]) -> list[_Cell]:
    """Products of the features [frame, D, N], and their places in the plane of a pair."""
    features = torch.from_numpy(W)
    products = (features.mT @ features).numpy()
    scale = largest(products)
    points = _plane(W, pair)
    title = "products of features, WᵀW, of the largest"
    return [
        _Cell("heat", title, ("feature", "feature_2"), products / scale, 1.0, is_signed=True),
        _Cell("plane", "features in a plane", ("feature",), points, largest(points)),
    ]


def _described(cell: _Cell) -> dict[str, Any]:
    """What is the same in all frames and places."""
    dims = [dim.removesuffix("_2") for dim in cell.dims]
    return {
        "kind": cell.kind,
        "title": cell.title,
        "spoken": f"{cell.title} through training",
        "dims": ["singular index" if dim == "rank" else dim for dim in dims],
        "features": [dim == "feature" for dim in dims],
        "counted_from": [int(dim == "rank") for dim in dims],
        "sizes": list(cell.values.shape[1:]),
    }


def _told(changes: Mapping[str, Change], place: int, shape: Sequence[int]) -> list[tuple[Change, Sentence]]:
    """What happened in one place, or did not."""
    told = []
    for change in (change for change in changes.values() if change.is_told):
        # steps of change belong to instances, which are the first dimension
        n_times = len(change.steps)
        index = place if n_times == math.prod(shape) else int(np.unravel_index(place, tuple(shape))[0])
        told.append((change, change.sentence_of(index)))
    return told


def _moments(told: Sequence[tuple[Change, Sentence]]) -> list[tuple[int, str]]:
    """When it happened, and what."""
    return [(int(one.evidence["step"]), change.title) for change, one in told if one.happened]


def _rows(steps: np.ndarray, marked: set[int], n: int) -> np.ndarray:
    """About n rows, evenly over the logarithm of the step, with the first, the last and the marked ones."""
    low, high = max(1, steps[steps > 0].min(initial=1)), max(2, steps[-1])
    wanted = np.geomspace(low, high, max(0, n - 1 - len(marked)))
    near = np.searchsorted(steps, [*wanted, *marked]).clip(max=len(steps) - 1)
    return np.unique([0, *near, len(steps) - 1])


def _plane_pair(dataset: xr.Dataset) -> tuple[int, int]:
    """The features that span the plane: the first attended pair, else the first two."""
    if "query_feature" in dataset and dataset.sizes["d_model"] > 2:
        queries, keys = pair_features(dataset)
        if queries[0] != keys[0]:
            return queries[0], keys[0]
    return 0, min(1, dataset.sizes["feature"] - 1)


def _plane(W: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    """Features [F, D, N] in the plane of two of them [F, 2, N]: the first points right, the second up."""
    if W.shape[1] == 1:
        return np.concatenate([W, 0 * W], 1)
    if W.shape[1] == 2:
        return W
    first, second = W[:, :, pair[0]], W[:, :, pair[1]]
    right = first / np.linalg.norm(first, axis=1, keepdims=True).clip(1e-12)
    up = second - (second * right).sum(1, keepdims=True) * right
    up = up / np.linalg.norm(up, axis=1, keepdims=True).clip(1e-12)
    return np.stack([np.einsum("sd,sdn->sn", axis, W) for axis in (right, up)], 1)
