"""Reading a dataset for a figure: what it must hold, its numbers, and the words for its sizes.

Every function here raises InputError, with what to do, where a dataset lacks what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from svf_lightning.checkpoint_names import tokens_seen
from svf_lightning.errors import InputError, bad_value
from svf_lightning.figures.look import as_text, count_of
from svf_lightning.metrics.dynamics import LEVELS
from svf_lightning.quantities import Quantity
from svf_lightning.registry import how_to_have, known
from svf_lightning.run.changes import sizes_of

if TYPE_CHECKING:
    import xarray as xr

# figures know how to show these dimensions
_DIMS = {"step", "instance", "d_model", "feature", "feature_2", "rank", "pair"}
_HEAD_DIMS = {  # figures of a language model's heads know these as well
    "step", "layer", "head", "rank", "prompt", "draw", "task_head", "n_removed", "kind", "pair", "causal_head",
    "n_directions", "n_recon", "side", "choice", "source", "template", "direction_head",
}  # fmt: skip
_DIM_FIXES = {
    "head": "train with several heads (--model.n_heads=4)",
    "offset": "train with rotary positions (--model.rope=true)",
}


def chance_of(dataset: xr.Dataset, name: str, *, n_pairs: int | None = None) -> float:
    """What a quantity is on average of random vectors, in a run of these sizes; NaN where that is not known.

    Args:
        dataset: The run.
        name: A quantity with a level, such as alignment/matched.
        n_pairs: Pairs that are matched; None for those of the run.
    """
    known_as = known(dataset).get(name)
    level = LEVELS.get(str(known_as.level)) if known_as is not None else None
    if level is None:
        return math.nan
    sizes = sizes_of(dataset)
    chance = level.chance(sizes if n_pairs is None else sizes._replace(n_pairs=n_pairs))
    return math.nan if chance is None else chance.mean


def require(
    dataset: xr.Dataset,
    *names: str,
    instance: int | None = None,
    n_steps: int = 1,
    dims: Sequence[str] = (),
) -> None:
    """Check that a figure can be drawn.

    Args:
        dataset: What to draw.
        names: Quantities that it must hold.
        instance: The one to draw, if one.
        n_steps: How many captured steps the figure needs.
        dims: Dimensions that this figure shows and others do not, such as offset; the dataset must have them.

    Raises:
        InputError: It lacks one of these, or has a dimension that the figure does not show.
    """
    _require_names(dataset, names)
    for dim in dims:
        if dim not in dataset.sizes:
            held = ", ".join(map(str, dataset.sizes))
            raise InputError(f"this figure needs the dimension {dim!r}; the run has {held}. Fix: {_DIM_FIXES[dim]}.")
    if "instance" not in dataset.sizes:
        raise InputError(
            f"this figure needs the dimension 'instance'; the run has {', '.join(map(str, dataset.sizes))}. "
            "Fix: select one head and add the dimension: dataset.isel(layer=0, head=0).expand_dims('instance', 1)."
        )
    _require_no_further(dataset, names, _DIMS | set(dims))
    _require_steps(dataset, n_steps)
    if instance is not None and not 0 <= instance < dataset.sizes["instance"]:
        raise bad_value("instance", instance, f"0..{dataset.sizes['instance'] - 1}", "pass one that was trained")


def require_heads(dataset: xr.Dataset, *names: str, n_steps: int = 1) -> None:
    """Check that a figure of a language model can be drawn: it has layers and heads where the toy model has instances.

    Args:
        dataset: What to draw.
        names: Quantities that it must hold.
        n_steps: How many captured steps the figure needs.

    Raises:
        InputError: It lacks one of these, or has a dimension that the figure does not show.
    """
    _require_names(dataset, names)
    lacking = [dim for dim in ("layer", "head") if dim not in dataset.sizes]
    if lacking:
        raise InputError(
            f"this figure needs the dimension {' and '.join(map(repr, lacking))}; the run has "
            f"{', '.join(map(str, dataset.sizes))}. Fix: pass the run directory of a `replay` of a language model."
        )
    _require_no_further(dataset, names, _HEAD_DIMS)
    _require_steps(dataset, n_steps)


def _require_names(dataset: xr.Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name not in dataset:
            raise InputError(f"this figure needs {name!r}, which the run does not hold. Fix: {how_to_have(name)}.")


def _require_no_further(dataset: xr.Dataset, names: Sequence[str], dims: set[str]) -> None:
    further = {str(dim) for name in names for dim in dataset[name].dims} - dims
    if further:
        chosen = ", ".join(f"{dim}=0" for dim in sorted(further))
        raise InputError(
            f"the run has the dimension {', '.join(sorted(further))}, which this figure does not show. "
            f"Fix: select one: dataset.isel({chosen})."
        )


def _require_steps(dataset: xr.Dataset, n_steps: int) -> None:
    captured = dataset.sizes.get("step", 0)
    if captured < n_steps:
        fit = "pass the run directory of a `fit`, not of a `test` or `validate`"
        fix = "replay several checkpoints of one training" if "layer" in dataset.sizes else fit
        raise InputError(f"this figure needs {n_steps} captured steps or more, and the run has {captured}. Fix: {fix}.")


def require_one_per_instance(dataset: xr.Dataset, name: str) -> None:
    """Check that a quantity has one value per instance, at each step or for the whole run."""
    require(dataset, name)
    if set(dataset[name].dims) - {"step"} != {"instance"}:
        raise bad_value(name, dataset[name].dims, "a quantity with one value per instance", "name another one")


def quantity(dataset: xr.Dataset, name: str) -> Quantity:
    """What is known of a quantity or a coordinate, its words for plotly; its name alone, if nothing is."""
    return for_plotly(known(dataset).get(name) or Quantity(name))


def for_plotly(quantity: Quantity) -> Quantity:
    """A quantity whose label and unit, which may be anyone's, are text for plotly."""
    return replace(quantity, label=as_text(quantity.title), unit=as_text(quantity.unit))


def read(dataset: xr.Dataset, name: str, *dims: str, **at: int) -> np.ndarray:
    """A quantity at the given position, with the given dimensions, in this order."""
    return np.asarray(dataset[name].isel(at).transpose(*dims).values, dtype=float)


def read_tokens(dataset: xr.Dataset) -> np.ndarray | None:
    """Tokens seen in training at each step, float64; None where the names of the checkpoints do not say."""
    if "checkpoint" not in dataset or dataset["checkpoint"].dims != ("step",):
        return None
    return tokens_seen([str(name) for name in dataset["checkpoint"].values], dataset["step"].values)


def read_last(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Values at the last captured step; instances first."""
    return read(dataset, name, "instance", ..., step=-1)  # type: ignore[arg-type]


def require_finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values, if one of them at least is a number."""
    if not np.isfinite(values).any():
        raise InputError(f"{name!r} holds no finite number. Fix: the run diverged; lower the learning rate and repeat.")
    return values


def range_of_finite(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest finite number of each row; NaN where there is none."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return np.fmin.reduce(finite, axis=1), np.fmax.reduce(finite, axis=1)


def sizes_in_words(dataset: xr.Dataset) -> str:
    """Sizes of the module and steps, whatever its dimensions are called."""
    sizes = dataset.sizes
    parts = [count_of(sizes[dim], dim) for dim in dataset.attrs["batch_dims"] if dim in sizes]
    if "feature" in sizes and "d_model" in sizes:
        parts.insert(0, f"{count_of(sizes['feature'], 'feature')} in {sizes['d_model']} dimensions")
    first, last = (int(dataset["step"].values[i]) for i in (0, -1))
    parts.append(f"step {last:,}" if first == last else f"steps {first:,} to {last:,}")
    if left_out := dataset.attrs.get("left_out"):  # of a replay: checkpoints that failed, or are flagged
        parts.append(f"without {count_of(len(left_out), 'checkpoint')}")
    return " · ".join(parts)


def mean_of_finite(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of the finite numbers, as of the instances that did not diverge; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.asarray(np.where(finite, values, 0).sum(axis) / np.where(count > 0, count, np.nan))


def target_logits(dataset: xr.Dataset) -> np.ndarray:
    """Target logits [instance, pair]."""
    logits = dataset["target_logit"]
    if "instance" not in logits.dims:
        logits = logits.expand_dims(instance=dataset.sizes["instance"])
    return np.asarray(logits.transpose("instance", "pair").values, dtype=float)


def pair_features(dataset: xr.Dataset) -> tuple[list[int], list[int]]:
    """Query and key feature of every pair."""
    return dataset["query_feature"].values.tolist(), dataset["key_feature"].values.tolist()


def subtitle_of(dataset: xr.Dataset, more: str = "", *, instance: int | None = None, final: bool = False) -> str:
    """Sizes, instances and steps of what is drawn."""
    first, last = (int(dataset["step"].values[i]) for i in (0, -1))
    n = dataset.sizes["instance"]
    parts = [
        count_of(n, "instance") if instance is None else f"instance {instance} of {n}",
        f"step {last:,}" if final or first == last else f"steps {first:,} to {last:,}",
        *([more] if more else []),
    ]
    if "feature" in dataset.sizes and "d_model" in dataset.sizes:
        parts.insert(0, f"{count_of(dataset.sizes['feature'], 'feature')} in {dataset.sizes['d_model']} dimensions")
    return " · ".join(parts)
