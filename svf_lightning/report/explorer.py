"""The time slider of a run's page: cosines, Gram matrix and geometry of the features, moving through training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svf_lightning.metrics import cosine_matrix
from svf_lightning.report.drawing import pair_features
from svf_lightning.report.page import Widget, largest, packed
from svf_lightning.summary import dynamics_of

if TYPE_CHECKING:
    import xarray as xr

N_FRAMES = 60
MAX_BYTES = 1_500_000  # of all frames of all instances; large models have fewer
_MOMENTS = (
    ("dynamics/t_align", "singular vectors are aligned (t_align)"),
    ("dynamics/t_ortho", "attended features are orthogonal to the rest (t_ortho)"),
)
_SIDES = {"left": "U", "right": "V"}


def time_slider(dataset: xr.Dataset) -> Widget | None:
    """The widget of a training's page; None where :func:`frames` has nothing to show."""
    data = frames(dataset)
    if data is None:
        return None
    n, of = len(data["instances"]), data["n_instances"]
    picker = "".join(f'<option value="{i}">{i}</option>' for i in range(n))
    note = f" (the first {n} of {of})" if n < of else ""
    choice = f'<label>instance{note} <select id="explorer-instance">{picker}</select></label>' if n > 1 else ""
    if n == 1 < of:
        choice = f"<span>instance 0 of {of}</span>"
    last = len(data["steps"]) - 1
    sides = {"left": "Cosines with left singular vectors", "right": "Cosines with right singular vectors"}
    cells = {**(sides if data["rank"] else {}), "gram": "Gram matrix of the features", "plane": "Features in a plane"}
    html = (
        '<div class="controls"><button type="button" id="explorer-play" aria-pressed="false">Play</button>'
        f'<label class="grow">training step <input type="range" id="explorer-step" min="0" max="{last}" value="{last}">'
        f'</label>{choice}</div><p id="explorer-now" role="status"></p>'
        '<div class="controls" id="explorer-marks"></div><div class="grid">'
        + "".join(f'<div id="explorer-{k}" class="cell" role="img" aria-label="{v}"></div>' for k, v in cells.items())
        + "</div>"
    )
    return Widget("explorer", html, data)


def frames(dataset: xr.Dataset) -> dict[str, Any] | None:
    """What the slider shows, as JSON values; None for a run without features or with a single step.

    Numbers are signed bytes (base64), in units of ``scale / 127``: what is shown as a colour or a place on a small
    figure needs no more. Steps are spread evenly over the logarithm, with the first, the last and the marked moments.

    Args:
        dataset: A trajectory of the toy model with ``W`` [step, instance, D, N]; with ``U`` and ``V`` if it has a head.

    Returns:
        ``steps`` [F]; ``moments``: for each instance, (step, words) of what happened; ``instances``, those that are
        shown; ``left``, ``right`` [F, N, R], ``gram`` [F, N, N] (signed, relative to its largest entry), ``plane``
        [F, 2, N] for each of them; the pair that spans the plane, or null where D = 2.
    """
    if "W" not in dataset or dataset.sizes["step"] < 2 or dataset["W"].dims[:2] != ("step", "instance"):
        return None
    has_head = all(name in dataset and dataset[name].dims[:2] == ("step", "instance") for name in ("U", "V"))
    has_head = has_head and all(dataset[name].ndim == 4 for name in ("U", "V"))  # not one per head or offset
    D, N = dataset.sizes["d_model"], dataset.sizes["feature"]
    rank = dataset.sizes["rank"] if has_head else 0
    per_frame = 2 * N * rank + N * N + 2 * N  # bytes
    n_frames = min(N_FRAMES, max(2, MAX_BYTES // per_frame))
    shown = list(range(max(1, min(dataset.sizes["instance"], MAX_BYTES // (n_frames * per_frame)))))
    all_steps = np.asarray(dataset["step"].values)
    changes = dynamics_of(dataset)
    moments = [_moments(changes, instance) for instance in shown]
    rows = _rows(all_steps, {step for found in moments for step, _ in found}, n_frames)
    pair = _plane_pair(dataset, D, N)
    some = dataset.isel(step=rows, instance=shown)
    W = torch.from_numpy(some["W"].values)  # [F, I, D, N]
    gram = torch.einsum("sidn,sidm->isnm", W, W).numpy()
    # from the rows that are shown, as the dataset's own cosines are computed for all of them
    sides = {side: cosine_matrix(W, torch.from_numpy(some[name].values)) for side, name in _SIDES.items() if has_head}
    per_instance = []
    for i in range(len(shown)):
        scale = largest(gram[i])
        arrays = {"gram": packed(gram[i], scale), "plane": packed(*_plane(W[:, i].numpy(), pair))}
        arrays |= {side: packed(values[:, i].numpy(), 1.0) for side, values in sides.items()}
        per_instance.append({"moments": moments[i], **arrays})
    return {
        "steps": [int(step) for step in all_steps[rows]],
        "features": N,
        "rank": rank,
        "dimensions": D,
        "pair": pair if D > 2 else None,
        "attended": sorted({feature for side in pair_features(dataset) for feature in side}) if has_head else [],
        "n_instances": dataset.sizes["instance"],
        "instances": per_instance,
    }


def _moments(changes: Mapping[str, np.ndarray], instance: int) -> list[tuple[int, str]]:
    """When one instance aligned, and when its features turned orthogonal."""
    found = ((changes[name][instance], words) for name, words in _MOMENTS if name in changes)
    return [(int(time), words) for time, words in found if math.isfinite(time)]


def _rows(steps: np.ndarray, marked: set[int], n: int) -> np.ndarray:
    """About n rows, evenly over the logarithm of the step, with the first, the last and the marked ones."""
    low, high = max(1, steps[steps > 0].min(initial=1)), max(2, steps[-1])
    wanted = np.geomspace(low, high, max(0, n - 1 - len(marked)))
    near = np.searchsorted(steps, [*wanted, *marked]).clip(max=len(steps) - 1)
    return np.unique([0, *near, len(steps) - 1])


def _plane_pair(dataset: xr.Dataset, D: int, N: int) -> tuple[int, int]:
    """The features that span the plane: the first attended pair, else the first two."""
    if "query_feature" in dataset and D > 2:
        queries, keys = pair_features(dataset)
        if queries[0] != keys[0]:
            return queries[0], keys[0]
    return 0, min(1, N - 1)


def _plane(W: np.ndarray, pair: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Features [F, D, N] in the plane of two of them [F, 2, N] (the first points right, the second up), and a scale."""
    if W.shape[1] == 1:
        points = np.concatenate([W, 0 * W], 1)
    elif W.shape[1] == 2:
        points = W
    else:
        first, second = W[:, :, pair[0]], W[:, :, pair[1]]
        right = first / np.linalg.norm(first, axis=1, keepdims=True).clip(1e-12)
        up = second - (second * right).sum(1, keepdims=True) * right
        up = up / np.linalg.norm(up, axis=1, keepdims=True).clip(1e-12)
        points = np.stack([np.einsum("sd,sdn->sn", axis, W) for axis in (right, up)], 1)
    return points, largest(points)
