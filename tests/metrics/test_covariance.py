"""Covariances that come in parts against NumPy's, and their shrinkage against its formula and against what it is for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import RunningCovariance, effective_rank, shrunk_covariance


@given(
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    mean=st.floats(-1e4, 1e4),
    seed=st.integers(0, 99),
)
def test_parts_have_the_covariance_of_the_whole_wherever_it_is_cut(n, cuts, mean, seed):
    rows = mean + np.random.default_rng(seed).normal(size=(n, 5))
    running = RunningCovariance(5)
    for part in np.split(rows, sorted(min(cut, n) for cut in cuts)):
        running.update(torch.from_numpy(part))
    assert running.count == n
    np.testing.assert_allclose(running.covariance(), np.cov(rows.T, bias=True), atol=1e-8)
    np.testing.assert_allclose(running.mean, rows.mean(0), rtol=1e-12)


def test_a_mean_far_longer_than_the_spread_does_not_cancel_it():
    rows = 1e8 + torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0], [3.0, 6.0]], dtype=torch.float64)
    running = RunningCovariance(2)
    for part in rows.split(2):
        running.update(part)
    np.testing.assert_allclose(running.covariance(), np.cov((rows - 1e8).T, bias=True), rtol=1e-9)


def test_without_rows_there_is_no_covariance():
    running = RunningCovariance(3)
    running.update(torch.zeros(0, 3))
    assert running.covariance().isnan().all()
    with pytest.raises(InputError, match=r"rows.shape.*\[n, 3\]"):
        running.update(torch.zeros(2, 4))


def of_oas(S, n):
    """Eq. 23 of Chen et al. 2010, in eigenvalues."""
    values = np.linalg.eigvalsh(S)
    D, squares, trace = len(values), (values**2).sum(), values.sum()
    rho = min(1.0, ((1 - 2 / D) * squares + trace**2) / ((n + 1 - 2 / D) * (squares - trace**2 / D)))
    return (1 - rho) * S + rho * trace / D * np.eye(D), rho


@given(n=st.integers(2, 60), D=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_shrinkage_is_that_of_oas(n, D, seed):
    rng = np.random.default_rng(seed)
    S = np.cov((rng.normal(size=(n, D)) * np.geomspace(1, 9, D)).T, bias=True)
    found, rho = shrunk_covariance(torch.from_numpy(S), n)
    expected, of = of_oas(S, n)
    assert rho.item() == pytest.approx(of)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert np.trace(found) == pytest.approx(np.trace(S))


def test_of_few_rows_the_shrunk_covariance_is_nearer_to_the_truth_and_of_many_the_same():
    rng = np.random.default_rng(3)
    truth = np.diag(np.geomspace(1, 4, 20))
    for n, factor in ((10, 0.5), (100_000, 1.0)):
        off = {"own": 0.0, "shrunk": 0.0}
        for _ in range(20 if n < 100 else 1):
            S = torch.from_numpy(np.cov((rng.normal(size=(n, 20)) @ np.sqrt(truth)).T, bias=True))
            off["own"] += float((S - torch.from_numpy(truth)).square().sum())
            off["shrunk"] += float((shrunk_covariance(S, n)[0] - torch.from_numpy(truth)).square().sum())
        assert off["shrunk"] < factor * off["own"] * 1.01


def test_a_multiple_of_the_identity_stays_what_it_is_and_a_broken_one_is_seen():
    found, rho = shrunk_covariance(3 * torch.eye(4, dtype=torch.float64), 7)
    torch.testing.assert_close(found, 3 * torch.eye(4, dtype=torch.float64))
    assert rho == 1
    found, rho = shrunk_covariance(torch.full((2, 2), torch.nan), 7)
    assert found.isnan().all()
    assert rho.isnan()
    with pytest.raises(InputError, match="n=0"):
        shrunk_covariance(torch.eye(2), 0)


def test_the_effective_rank_counts_equal_directions():
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3)
    assert effective_rank(torch.diag(torch.tensor([5.0, 0.0]))) == pytest.approx(1)
