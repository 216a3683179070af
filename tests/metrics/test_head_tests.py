"""Sign flips and their correction over heads against scipy, enumeration by hand, and their nominal error."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from svf_lightning.errors import InputError
from svf_lightning.metrics import compare_heads, sign_flips
from svf_lightning.metrics.head_tests import LEVEL


def sign_flip_p(x):
    return sign_flips(x).above


@given(n=st.integers(1, 9), shift=st.floats(-1, 1), seed=st.integers(0, 99))
def test_p_is_the_share_of_all_sign_flips_with_as_large_a_mean(n, shift, seed):
    x = np.random.default_rng(seed).normal(size=n) + shift
    flips = [(np.array(signs) * x).mean() for signs in itertools.product([1, -1], repeat=n)]
    assert sign_flips(x).above == pytest.approx(np.mean(np.array(flips) >= x.mean() - 1e-12))
    assert sign_flips(x).below == pytest.approx(np.mean(np.array(flips) <= x.mean() + 1e-12))
    assert sign_flips(-x).above == pytest.approx(float(sign_flips(x).below))


def test_p_is_that_of_scipy_for_many_rows_at_once_and_whatever_the_order_of_the_sum():
    x = np.random.default_rng(0).normal(size=(3, 7, 12)) + 0.1
    expected = permutation_test(
        (x,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf,
        alternative="greater", axis=-1,
    ).pvalue  # fmt: skip
    np.testing.assert_allclose(sign_flip_p(x), expected, rtol=1e-9)
    np.testing.assert_allclose(sign_flip_p(x[..., ::-1] * 1e6), expected, rtol=1e-9)


def test_ways_to_flip_signs_that_give_the_same_mean_count_with_it():
    whole = np.random.default_rng(1).integers(-3, 4, size=(20, 8))
    flips = np.array(list(itertools.product([1, -1], repeat=8))) @ whole.T  # exact
    np.testing.assert_allclose(sign_flip_p(whole / 10), (flips >= whole.sum(-1)).mean(0))


def test_of_many_units_ways_are_drawn_and_the_one_that_was_seen_counts():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 40)) + np.array([[0.0], [0.2], [0.4], [9.0]])
    p = sign_flip_p(x)
    exact = permutation_test(
        (x,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=30_000,
        alternative="greater", axis=-1, rng=2,
    ).pvalue  # fmt: skip
    np.testing.assert_allclose(p, exact, atol=0.015)
    assert p[3] == 2**-14
    np.testing.assert_array_equal(p, sign_flip_p(x))


def test_a_row_that_is_not_known_has_no_p_and_does_not_disturb_the_others():
    x = np.random.default_rng(2).normal(size=(3, 6))
    broken = x.copy()
    broken[1, 2] = np.nan
    p = sign_flip_p(broken)
    assert np.isnan(p[1])
    np.testing.assert_allclose(p[[0, 2]], sign_flip_p(x)[[0, 2]])
    with pytest.raises(InputError, match="n >= 1"):
        sign_flip_p(np.zeros((2, 0)))


def by_hand(p):
    """Benjamini and Hochberg's step-up correction."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    least = 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        corrected[order[rank - 1]] = least
    return corrected


def heads(n_heads, n=8, seed=0):
    rng = np.random.default_rng(seed)
    own = 0.3 + 0.02 * rng.normal(size=(n_heads, n))
    return own, own[None] + 0.02 * rng.normal(size=(3, n_heads, n))


def test_sparser_is_against_every_control_and_denser_against_one_and_both_are_corrected_over_heads():
    own, controls = heads(9)
    found = compare_heads(own, controls)
    sparser = np.max([[sign_flip_p(c - o) for o, c in zip(own, control, strict=True)] for control in controls], axis=0)
    denser = np.min([[sign_flip_p(o - c) for o, c in zip(own, control, strict=True)] for control in controls], axis=0)
    np.testing.assert_allclose(found.sparser, by_hand(sparser))
    np.testing.assert_allclose(found.denser, by_hand(np.minimum(1, 3 * denser)))


def test_a_head_that_beats_two_controls_of_three_is_not_sparser():
    own, controls = heads(4, n=16)
    controls[:, 0] += 0.5  # beats all
    controls[:2, 1] += 0.5  # two, and ties with the third
    controls[2, 2] -= 0.5  # one control is far sparser
    found = compare_heads(own, controls)
    assert (found.sparser <= LEVEL).tolist() == [True, False, False, False]
    assert (found.denser <= LEVEL).tolist() == [False, False, True, False]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_of_heads_that_do_not_differ_few_are_found(seed):
    own, controls = heads(60, n=12, seed=seed)
    found = compare_heads(own, controls)
    assert (found.sparser <= LEVEL).mean() < 0.1


def test_where_no_head_differs_one_is_found_in_five_of_a_hundred_models_at_most():
    hits = np.array([[(p <= LEVEL).any() for p in compare_heads(*heads(12, n=10, seed=seed))] for seed in range(300)])
    # 300 models; 5 % of them with three standard errors
    assert (hits.mean(0) < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5).all()
    assert hits[:, 1].any()


def test_heads_without_a_score_are_left_out_and_too_few_units_test_nothing():
    own, controls = heads(6, n=16)
    controls[:, 0] += 0.5
    alone = compare_heads(own, controls)
    own[3] = np.nan
    found = compare_heads(own, controls)
    assert np.isnan(found.sparser[3])
    assert np.isnan(found.denser[3])
    rest = np.delete(np.arange(6), 3)
    np.testing.assert_allclose(found.sparser[rest], compare_heads(own[rest], controls[:, rest]).sparser)
    assert found.sparser[0] < alone.sparser[0]  # five heads are corrected for
    few = compare_heads(own[:, :4], controls[..., :4])
    assert np.isnan(few.sparser).all()
    assert np.isnan(few.denser).all()
    assert compare_heads(own[:, :5], controls[..., :5]).sparser[0] <= 5 * 2**-5
