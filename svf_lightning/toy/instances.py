"""One value, or one per instance: how settings of a cohort are given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from svf_lightning.errors import InputError, bad_value

PerInstance = float | list[float]
_LARGEST_SIZE = 2**31 - 1


def per_instance(
    name: str,
    value: float | Sequence[float],
    n_instances: int,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    key: str | None = None,
) -> Float[Tensor, " I"]:
    """The setting as one float64 value per instance.

    Args:
        name: The setting's name, for the message.
        value: One number, or one per instance.
        n_instances: Number of instances I.
        low: Smallest allowed value.
        high: Largest allowed value.
        open_low: ``low`` itself is not allowed.
        key: Configuration key to name in the message; "model.<name>" by default.

    Raises:
        InputError: Wrong number of values, or a value that is out of range or not finite.
    """
    values = [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]
    key = key or f"model.{name}"
    if len(values) not in (1, n_instances) or (
        len(values) == 1 and not isinstance(value, (int, float)) and n_instances != 1
    ):
        raise InputError(
            f"{name} has {len(values)} values for {n_instances} instances. Allowed: one number, or one per instance. "
            f"Fix: set --model.n_instances={len(values)}, or give --{key} one number."
        )
    for v in values:
        if not math.isfinite(v) or v < low or v > high or (open_low and v == low):
            left = "(" if open_low or low == -math.inf else "["
            right = ")" if high == math.inf else "]"
            raise bad_value(name, v, f"a number in {left}{low:g}, {high:g}{right}", f"change --{key}")
    return torch.tensor(values, dtype=torch.float64).expand(n_instances).clone()


def instance_seeds(seed: int | Sequence[int], n_instances: int, *, key: str) -> list[int]:
    """One seed per instance: ``seed + i`` for a single number, or the list as it is.

    Raises:
        InputError: A negative seed, or a list of another length.
    """
    seeds = [seed + i for i in range(n_instances)] if isinstance(seed, int) else list(seed)
    if len(seeds) != n_instances:
        raise InputError(
            f"{key} has {len(seeds)} seeds for {n_instances} instances. Allowed: one integer, or one per instance. "
            f"Fix: set --model.n_instances={len(seeds)}, or give --{key} one integer."
        )
    for unusable in (one for one in seeds if not 0 <= one < 2**63):
        raise bad_value(key, unusable, "integers >= 0 and < 2^63", f"change --{key}")
    return seeds


def at_least(name: str, value: int, low: int, *, key: str) -> int:
    """The value, if it is at least ``low``, and a size that something can have.

    Raises:
        InputError: It is not.
    """
    if not low <= value <= _LARGEST_SIZE:
        most = "" if value < low else f" and <= {_LARGEST_SIZE:,}"
        raise bad_value(name, value, f"an integer >= {low}{most}", f"change --{key}")
    return value


def check_memory(what: str, n_bytes: int, sizes: str) -> None:
    """Check that something fits into the memory that is free.

    Args:
        what: What the error calls it.
        n_bytes: What it takes at least.
        sizes: The options that it follows from.

    Raises:
        InputError: It does not fit.
    """
    free = psutil.virtual_memory().available
    if n_bytes > free:
        raise InputError(
            f"{what} would take {n_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are free. "
            f"Allowed: what fits. Fix: lower {sizes}."
        )
