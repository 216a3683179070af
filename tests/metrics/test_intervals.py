"""Intervals against closed forms, other libraries' numbers, and the coverage that they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import t

from svf_lightning.errors import InputError
from svf_lightning.metrics import Interval, mean_interval, share_difference_interval, share_interval

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))


def students(values):
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


@pytest.mark.parametrize("n", [2, 3, 5])
def test_of_fewer_than_six_units_it_is_students(n):
    values = np.random.default_rng(n).normal(size=n)
    assert mean_interval(values) == pytest.approx(students(values))


def test_of_normal_numbers_the_bootstrap_is_about_students():
    values = np.random.default_rng(0).normal(3, 2, size=60)
    found, expected = mean_interval(values), students(values)
    width = expected[1] - expected[0]
    assert found == pytest.approx(expected, abs=0.05 * width)


@pytest.mark.parametrize("n", [4, 8, 20])
def test_it_covers_the_true_mean_about_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    draws = [mean_interval(rng.normal(size=n)) for _ in range(200)]
    assert np.mean([low <= 0 <= high for low, high in draws]) == pytest.approx(0.95, abs=0.04)


@given(arrays(float, st.integers(6, 12), elements=NUMBERS), NUMBERS, st.floats(0.1, 10))
def test_it_contains_the_mean_and_moves_and_stretches_with_the_values(values, shift, factor):
    low, high = mean_interval(values)
    scale = np.abs(values).max() + abs(shift) + 1
    assert low - 1e-9 * scale <= values.mean() <= high + 1e-9 * scale
    moved = mean_interval(values * factor + shift)
    assert moved == pytest.approx((low * factor + shift, high * factor + shift), abs=1e-9 * scale * factor)


@pytest.mark.parametrize("n", [4, 12])
def test_weights_count_as_often_as_they_say_and_units_without_weight_do_not(n):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=n), rng.integers(1, 9, n).astype(float)
    low, high = mean_interval(values, weights)
    assert low < np.average(values, weights=weights) < high
    assert mean_interval(np.append(values, 99), np.append(weights, 0)) == (low, high)
    assert mean_interval(values, weights * 7) == pytest.approx((low, high))
    assert mean_interval(values, np.ones(n)) == mean_interval(values)


def test_the_same_numbers_always_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=30)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(np.full(9, 2.5)) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan, 2.0], [1.0, math.inf]])
def test_a_sample_that_does_not_tell_has_no_interval(values):
    assert not mean_interval(np.array(values)).is_known


# Clopper and Pearson (1934), as R's binom.test gives them
@pytest.mark.parametrize(("k", "n", "low", "high"), [
    (8, 8, 0.6305834, 1.0), (0, 8, 0.0, 0.3694166), (1, 1, 0.025, 1.0), (25, 64, 0.2713, 0.5207), (64, 64, 0.944, 1.0),
])  # fmt: skip
def test_the_interval_of_a_share_is_exact(k, n, low, high):
    assert share_interval(k, n) == pytest.approx((low, high), abs=2e-3)


def test_a_share_of_nothing_has_no_interval_and_more_than_all_is_refused():
    assert not share_interval(0, 0).is_known
    with pytest.raises(InputError):
        share_interval(3, 2)


def test_the_difference_of_a_share_from_one_that_is_known_has_its_width():
    of = share_interval(6, 8)
    found = share_difference_interval(0.75, of, 0.5, Interval(0.5, 0.5))
    assert found == pytest.approx((of.low - 0.5, of.high - 0.5))


# Newcombe (1998), table II: 56/70 against 48/80, Wilson limits: 0.0524 to 0.3339
def test_the_difference_of_two_shares_is_that_of_newcombes_table():
    first, second = Interval(0.6919, 0.8769), Interval(0.4905, 0.7003)
    found = share_difference_interval(0.8, first, 0.6, second)
    assert found == pytest.approx((0.0524, 0.3339), abs=2e-3)


def test_all_of_four_against_none_of_four_is_a_difference_and_all_of_two_is_not():
    differences = [
        share_difference_interval(1, share_interval(n, n), 0, share_interval(0, n)).low for n in (2, 4)
    ]  # fmt: skip
    assert differences[0] < 0 < differences[1]
