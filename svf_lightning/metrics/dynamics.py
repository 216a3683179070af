"""When things happen during training (arXiv 2602.13524, Fig. 3), and whether they happened at all.

A change has happened if its final value passes a level that belongs to the quantity, and if it is larger than the noise
of the curve. The levels follow from the sizes of a run, not from its numbers: the final value is nearer to the goal
than to what no preference would give, and beyond what random vectors give once in a thousand draws.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.metrics.alignment import match_pairs

NOISE_FACTOR = 5.0  # two values with Gaussian noise differ by more about once in 2,500 times
_LAST_PART, _FEWEST = 0.1, 3  # slow noise is that of the last tenth of the rows, and of no fewer than three
_SD_OF_MAD = 1.4826  # standard deviation of a Gaussian over its median absolute deviation
_DRAWS = 1000  # of random vectors
_AT_A_TIME = 1 << 22  # random numbers in memory
_MANY = 50  # attended, or other, features: of fewer, the mean cosine varies no less


def time_of_change(
    series: Float[Tensor, "T ..."], steps: Int[Tensor, " T"], *, fraction: float = 0.9
) -> Float[Tensor, "..."]:
    """First step from which a quantity has covered ``fraction`` of its way from first to last value, and stays there.

    Works for a rise and for a fall alike. ``fraction = 0.9`` on ``alignment/matched`` is t_align, on
    ``orthogonality/attended_vs_rest`` t_ortho, where these have happened (:func:`has_happened`): every curve that ends
    elsewhere than it began has such a step.

    Args:
        series: Values over T recorded steps.
        steps: Training step of each value, ascending.
        fraction: Share of the way, in (0, 1].

    Returns:
        A training step, as a float; NaN where the series holds NaN or ends where it began.

    Raises:
        InputError: Empty series, or lengths that differ.
    """
    if len(series) == 0 or len(series) != len(steps):
        raise bad_value(
            "series", len(series), f"as many values as steps ({len(steps)}), at least one", "pass both from one run"
        )
    way = series[-1] - series[0]
    progress = (series - series[0]) / way
    reached = progress >= fraction
    stays = reached.flip(0).cummin(0).values.flip(0)  # bool cummin: True while every later value is True
    first = stays.to(torch.int8).argmax(0)
    time = steps.to(series.device, torch.float64)[first]
    valid = torch.isfinite(series).all(0) & (way != 0)
    return torch.where(valid, time, torch.nan)


def noise_of(series: Float[Tensor, "T ..."]) -> Float[Tensor, "..."]:
    """Robust standard deviation of the noise of a curve: the larger of two, as either misses something.

    From row to row: second differences of the whole curve, which a straight course does not have (their standard
    deviation is sqrt(6) times that of the noise). Slower: distances from the median in the last tenth of the rows, of
    three at least, where a drift counts as noise. Both are 1.4826 times a median. Infinite for fewer than three rows,
    which show no noise.
    """
    if len(series) < _FEWEST:
        return torch.full_like(series[0], torch.inf)
    rough = (series[2:] - 2 * series[1:-1] + series[:-2]).abs() / math.sqrt(6)
    last = series[-max(_FEWEST, math.ceil(_LAST_PART * len(series))) :]
    slow = (last - _median(last)).abs()
    return _SD_OF_MAD * torch.maximum(_median(rough), _median(slow))


def _median(values: Float[Tensor, "K ..."]) -> Float[Tensor, "..."]:
    """The median of each curve; sorted, as torch's quantile refuses more than 16 million numbers."""
    ordered, middle = values.sort(0).values, len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def has_happened(
    series: Float[Tensor, "T ..."], *, level: float | None = None, rises: bool | None = None
) -> Bool[Tensor, "..."]:
    """Whether a quantity has changed: to a level, and by more than the noise.

    Args:
        series: Values over recorded steps.
        level: What the last value must reach; None for any. A level that is not known (NaN) is not reached.
        rises: True if the level is reached from below, False from above; None for a change in either direction.

    Returns:
        True where the last value is at the level or beyond it, the way to it leads in the right direction, and is more
        than :data:`NOISE_FACTOR` times :func:`noise_of`. False where the series holds a value that is not
        finite.

    Raises:
        InputError: A level without a direction.
    """
    if level is not None and rises is None:
        raise bad_value("level", level, "a level with a direction", "say whether the quantity rises or falls to it")
    finite = torch.isfinite(series).all(0)
    series = torch.where(finite, series, 0.0).double()  # differences of huge values are finite, too
    last, way = series[-1], series[-1] - series[0]
    happened = finite & (way.abs() > NOISE_FACTOR * noise_of(series))
    if rises is not None:
        happened &= way > 0 if rises else way < 0
    if level is not None:
        happened &= last >= level if rises else last <= level
    return happened


class Sizes(NamedTuple):
    """Sizes of a run that levels depend on; None for one that is not known."""

    d_model: int | None = None
    n_singular: int | None = None  # singular vectors of a head
    n_pairs: int | None = None
    n_features: int | None = None
    n_attended: int | None = None  # features that a pair names


UNKNOWN = Sizes()


class Chance(NamedTuple):
    """What a quantity is of random vectors."""

    mean: float
    extreme: float  # the best of a thousand draws
    draws: Float[np.ndarray, " n"]


class Level(NamedTuple):
    """What the final value of a quantity must pass so that its change has happened."""

    reason: str  # how it follows from the sizes, in a sentence
    of: Callable[[Sizes], float]  # NaN where a size is missing
    chance: Callable[[Sizes], Chance | None]  # what the quantity is of random vectors; None where a size is missing


class ChanceAlignment(NamedTuple):
    """How random features align with an orthonormal basis."""

    matched: Chance  # alignment/matched
    weakest: Chance  # alignment/matched_min
    paired: Chance  # alignment/paired, which has a sign
    weakest_paired: Chance  # alignment/paired_min


@lru_cache(maxsize=64)
def alignment_by_chance(d_model: int, n_singular: int, n_pairs: int) -> ChanceAlignment:
    """Alignment of features that point anywhere.

    Features are random directions; seen from an orthonormal basis, whichever it is, their cosines are coordinates of
    random unit vectors. Pairs are matched as they are in a run. A thousand seeded draws.
    """
    rng = np.random.default_rng(0)
    n_at_a_time = max(1, _AT_A_TIME // (2 * n_pairs * n_singular))
    drawn: list[tuple[Tensor, ...]] = []
    for start in range(0, _DRAWS, n_at_a_time):
        shape = (min(n_at_a_time, _DRAWS - start), n_pairs)
        sides = []
        for _ in ("left", "right"):
            seen = rng.normal(size=(*shape, n_singular))
            # the coordinates along which no singular vector points
            unseen = rng.chisquare(d_model - n_singular, shape) if d_model > n_singular else np.zeros(shape)
            sides.append(seen / np.sqrt((seen**2).sum(-1) + unseen)[..., None])
        left, right = (torch.from_numpy(side) for side in sides)
        index = match_pairs(left.abs(), right.abs())
        at = index.clamp_min(0)[..., None]
        cosines, products = (
            torch.where(index >= 0, of.gather(-1, at).squeeze(-1), 0)
            for of in ((left.abs() + right.abs()) / 2, left * right)
        )
        drawn.append((cosines.mean(-1), cosines.amin(-1), products.mean(-1), products.amin(-1)))
    columns = (torch.cat(column).numpy() for column in zip(*drawn, strict=True))
    return ChanceAlignment(*(Chance(float(draws.mean()), float(draws.max()), draws) for draws in columns))


@lru_cache(maxsize=64)
def overlap_by_chance(d_model: int, n_features: int, n_attended: int) -> Chance:
    """``orthogonality/attended_vs_rest`` of features that point anywhere.

    The mean is ``E|cos| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))``, the extreme the smallest of a thousand seeded draws
    (of 50 features on each side at most, which vary no less).
    """
    mean = math.exp(math.lgamma(d_model / 2) - math.lgamma((d_model + 1) / 2)) / math.sqrt(math.pi)
    drawn = []
    rng = np.random.default_rng(0)
    n, n_rest = min(n_attended, _MANY), min(n_features - n_attended, _MANY)
    n_at_a_time = max(1, _AT_A_TIME // ((n + n_rest) * d_model))
    for start in range(0, _DRAWS, n_at_a_time):
        X = rng.normal(size=(min(n_at_a_time, _DRAWS - start), n + n_rest, d_model))
        X /= np.linalg.norm(X, axis=-1, keepdims=True)
        drawn.append(np.abs(X[:, :n] @ X[:, n:].swapaxes(-1, -2)).mean((-2, -1)))
    draws = np.concatenate(drawn)
    return Chance(mean, float(draws.min()), draws)


def least_overlap(d_model: int, n_features: int) -> float:
    """Mean |cosine| that N features in D < N dimensions cannot be below: ``(N - D) / (D (N - 1))``.

    Welch's bound (1974): so large is the mean squared cosine at least, over all pairs of any N unit vectors, and no
    |cosine| is smaller than its square. One antipode for each of N = 2D features is near it.
    """
    return (n_features - d_model) / (d_model * (n_features - 1))


def _chance_alignment(sizes: Sizes) -> ChanceAlignment | None:
    # no feature was kept: there are at least as many dimensions as singular vectors, and fewer align more by chance
    d_model = sizes.d_model or sizes.n_singular
    if not (d_model and sizes.n_singular and sizes.n_pairs):
        return None
    return alignment_by_chance(d_model, sizes.n_singular, sizes.n_pairs)


def _chance_overlap(sizes: Sizes) -> Chance | None:
    if not (sizes.d_model and sizes.n_features and sizes.n_attended and sizes.n_features > sizes.n_attended):
        return None
    return overlap_by_chance(sizes.d_model, sizes.n_features, sizes.n_attended)


def _orthogonal(sizes: Sizes) -> float:
    chance = _chance_overlap(sizes)
    if chance is None:
        return math.nan
    assert sizes.d_model is not None
    assert sizes.n_features is not None
    is_crowded = sizes.n_features > sizes.d_model
    before = least_overlap(sizes.d_model, sizes.n_features) if is_crowded else chance.mean
    return min(chance.extreme, before / 2)


def _aligned(reason: str, of: Callable[[ChanceAlignment], Chance]) -> Level:
    """A level of alignment, between chance and 1."""

    def chance(sizes: Sizes) -> Chance | None:
        alignment = _chance_alignment(sizes)
        return None if alignment is None else of(alignment)

    def level(sizes: Sizes) -> float:
        drawn = chance(sizes)
        return math.nan if drawn is None else max(drawn.extreme, (drawn.mean + 1) / 2)

    return Level(reason, level, chance)


def _on_scale(level: str, scale: Callable[[float], float]) -> Level:
    """A level on another scale, whose values for a mean are not the mean of its values: nothing is said of chance."""
    return Level(f"that of '{level}', on this scale", lambda sizes: scale(LEVELS[level].of(sizes)), lambda sizes: None)


def _sine(cosine: float) -> float:
    return math.sqrt(1 - cosine**2) if cosine <= 1 else math.nan


_NEARER_TO_1 = (
    "nearer to 1 than to the mean of random vectors of that dimension, matched alike, and no less than the best of a "
    "thousand draws of them"
)
LEVELS: dict[str, Level] = {
    "aligned": _aligned(_NEARER_TO_1, lambda chance: chance.matched),
    "weakest aligned": _aligned(f"{_NEARER_TO_1}, of their weakest pair", lambda chance: chance.weakest),
    "paired": _aligned(f"{_NEARER_TO_1}, with signs", lambda chance: chance.paired),
    "weakest paired": _aligned(
        f"{_NEARER_TO_1}, with signs, of their weakest pair", lambda chance: chance.weakest_paired
    ),
    "orthogonal": Level(
        "nearer to 0 than to (N - D) / (D (N - 1)), which the mean |cosine| of N features in D < N dimensions cannot "
        "be below (Welch's bound), or than to the mean of random vectors where N <= D, and no more than the least of "
        "a thousand draws of them",
        _orthogonal,
        _chance_overlap,
    ),
    "aligned, degrees": _on_scale("aligned", lambda cosine: math.degrees(math.acos(cosine))),
    "aligned, sine": _on_scale("aligned", _sine),
    "orthogonal, degrees": _on_scale("orthogonal", lambda cosine: math.degrees(math.asin(cosine))),
}
"""Levels that quantities name (``Quantity.level``)."""
