"""How sure a number is: 95 % intervals over what was sampled (seeds, heads, templates), and differences from a null.

Units of a sample are independent of each other, as runs from different seeds are; values inside one are not, so they
are averaged first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from svf_lightning.errors import bad_value

CONFIDENCE = 0.95
_RESAMPLES = 9999
_FEWEST = 6  # to be resampled: the resampled means of n units leave out the true one more often than 2 in 2^n times


class Interval(NamedTuple):
    """Ends of a 95 % interval; NaN where a sample does not tell."""

    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """True if the sample tells."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def mean_interval(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None, *, seed: int = 0
) -> Interval:
    """Bootstrap interval of a (weighted) mean over n units.

    Resamples units with their weights, so the mean is a ratio of sums, as over heads with different numbers of pairs.
    Expanded percentiles: a bootstrap of few units is too narrow, by the factor ``sqrt((n - 1) / n)`` and for want of
    Student's t; percentiles further out make up for it (Hesterberg 2015, *What Teachers Should Know About the
    Bootstrap*, section 5.3). Of fewer than six units no bootstrap covers 95 %: Student's t interval.

    Args:
        values: One per unit.
        weights: How much each counts, >= 0; None for alike.
        seed: Of the resamples, which come from a generator of their own.

    Returns:
        The interval; NaN for fewer than two units of weight, or values that are not finite.
    """
    from scipy.stats import bootstrap, norm, t

    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    values, weights = np.asarray(values, dtype=float)[weights > 0], weights[weights > 0]
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return Interval(math.nan, math.nan)
    quantile = t.ppf((1 - CONFIDENCE) / 2, n - 1)
    if n < _FEWEST:
        mean = float(np.average(values, weights=weights))
        error = math.sqrt(n / (n - 1) * np.square(weights * (values - mean)).sum()) / weights.sum()
        return Interval(mean + quantile * error, mean - quantile * error)
    tail = norm.cdf(math.sqrt(n / (n - 1)) * quantile)
    found = bootstrap(
        (values, weights),
        lambda x, w, axis: (x * w).sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, (1 << 22) // n),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def share_interval(k: int, n: int) -> Interval:
    """Exact interval of a share of which k of n units were seen (Clopper and Pearson 1934); NaN for no unit.

    Raises:
        InputError: k is not in 0..n.
    """
    if not 0 <= k <= n:
        raise bad_value("k", k, f"an integer in 0..{n}", "count units of the sample")
    if n == 0:
        return Interval(math.nan, math.nan)
    from scipy.stats import binomtest

    found = binomtest(k, n).proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(found.low), float(found.high))


def share_difference_interval(share: float, of: Interval, null: float, of_null: Interval) -> Interval:
    """Interval of the difference of two shares, from the interval of each (Newcombe 1998, method 10).

    Args:
        share: The share that was seen.
        of: Its interval.
        null: The share to compare with.
        of_null: Its interval; both ends the same for a share that is known.
    """
    d = share - null
    return Interval(
        d - math.hypot(share - of.low, of_null.high - null),
        d + math.hypot(of.high - share, null - of_null.low),
    )
