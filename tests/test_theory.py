"""The theorems as code: against NumPy, gradient descent, closed forms and simulated tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads, verified_svd
from svf_lightning.metrics import interference, unit_features
from svf_lightning.theory import (
    alignment_bound,
    attention_pressure,
    best_of_rank,
    interference_bound,
    optimal_omega,
    orthogonality_residual,
    token_covariance,
    unwhitened,
    whitened,
)
from svf_lightning.toy import sparse_activations

SHAPES = [(13, 5, 3), (7, 7, 11), (3, 11, 5), (1, 5, 1)]  # (D, Nx, Ny): fewer features than dimensions, and more
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SETTINGS = settings(deadline=None, max_examples=30, derandomize=True)
SEEDS = st.integers(0, 2**32)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n_rows, n_columns, *, seed, dtype=torch.float64):
    return torch.linalg.qr(randn(n_rows, n_columns, seed=seed)).Q.to(dtype)


def low_rank(n_rows, n_columns, rank, *, seed):
    return randn(n_rows, rank, seed=seed) @ randn(rank, n_columns, seed=seed + 1)


def unit_tight_frame(n_model, n_features, *, seed, n_steps=300):
    """Unit columns with X X^T = (N / D) I, by alternating projections."""
    x = orthonormal(n_features, n_model, seed=seed).mT
    for _ in range(n_steps):
        x = unit_features(torch.linalg.solve(torch.linalg.cholesky(x @ x.mT), x))
    return x


def one_pair(n_x, n_y, i=0, j=1, logit=5.0, dtype=torch.float64):
    T = torch.zeros(n_x, n_y, dtype=dtype)
    T[i, j] = logit
    return T


def assert_close(got, expected, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(expected)).to(got)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def assert_parallel(a, b, tolerance=1e-10):
    """Columns agree up to sign and length."""
    a, b = unit_features(a.double()), unit_features(b.double())
    torch.testing.assert_close((a * b).sum(-2).abs(), torch.ones_like(a[..., 0, :]), rtol=0, atol=tolerance)


# --- the optimum of the logits


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimal_omega_is_the_least_squares_solution_of_the_kronecker_system(shape, dtype):
    n_model, n_x, n_y = shape
    X, Y, T = (randn(*s, seed=k, dtype=dtype) for k, s in enumerate([(n_model, n_x), (n_model, n_y), (n_x, n_y)]))
    got = optimal_omega(X, T, Y)
    assert got.dtype == dtype
    # x_i^T Omega y_j = (x_i kron y_j) . vec(Omega), row by row; lstsq gives the solution of least norm
    system = np.kron(X.double().mT.numpy(), Y.double().mT.numpy())
    expected = np.linalg.lstsq(system, T.double().numpy().reshape(-1), rcond=None)[0].reshape(n_model, n_model)
    assert_close(got, expected, TOLERANCE[dtype])


def test_optimal_omega_equals_the_formula_of_the_method_where_the_inverses_exist():
    X, Y, T = randn(5, 11, seed=0), randn(5, 7, seed=1), randn(11, 7, seed=2)
    assert_close(optimal_omega(X, T, Y), torch.linalg.inv(X @ X.mT) @ X @ T @ Y.mT @ torch.linalg.inv(Y @ Y.mT))


@SETTINGS
@given(
    seed=SEEDS,
    n_model=st.integers(1, 8),
    n_x=st.integers(1, 8),
    n_y=st.integers(1, 8),
    rank=st.integers(1, 4),
    exponent=st.integers(-30, 30),
)
def test_dependent_features_give_the_solution_of_least_norm_at_any_scale(seed, n_model, n_x, n_y, rank, exponent):
    X, Y = (low_rank(n_model, n, rank, seed=seed + k) for k, n in ((0, n_x), (2, n_y)))
    T = randn(n_x, n_y, seed=seed + 4)
    got = optimal_omega(X * 10.0**exponent, T, Y, rtol=1e-9)
    pinv_X, pinv_Y = (np.linalg.pinv(matrix.numpy(), rcond=1e-9) for matrix in (X, Y))
    assert_close(got * 10.0**exponent, pinv_X.T @ T.numpy() @ pinv_Y, 1e-6)


def test_features_that_depend_on_each_other_up_to_float32_rounding_count_as_dependent():
    X = low_rank(23, 11, 3, seed=0)
    T = randn(11, 11, seed=2)
    got = optimal_omega(X.float(), T.float(), X.float())
    assert int((verified_svd(got)[1] > 1e-4 * got.norm()).sum()) == 3
    assert_close(got, optimal_omega(X, T, X, rtol=1e-9), 1e-4)
    # the same numbers, declared exact
    assert optimal_omega(X.float().double(), T, X.float().double()).norm() > 1e6


def test_gradient_descent_on_the_logits_arrives_at_the_optimum():
    X, Y, T = randn(5, 11, seed=0), randn(5, 7, seed=1), one_pair(11, 7)
    omega = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([omega], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, history_size=30)

    def loss():
        optimizer.zero_grad()
        value = (X.mT @ omega @ Y - T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert_close(omega.detach(), optimal_omega(X, T, Y), 1e-8)


def test_gradient_descent_from_zero_arrives_at_the_solution_of_least_norm():
    X, Y, T = orthonormal(7, 3, seed=0) * torch.tensor([1.0, 1.2, 0.8]), orthonormal(7, 2, seed=1), randn(3, 2, seed=2)
    omega = torch.zeros(7, 7, dtype=torch.float64)
    for _ in range(300):
        omega -= 0.4 * X @ (X.mT @ omega @ Y - T) @ Y.mT
    assert_close(omega, optimal_omega(X, T, Y), 1e-10)


def test_no_other_omega_is_better():
    X, Y, T = randn(5, 11, seed=0), randn(5, 7, seed=1), randn(11, 7, seed=2)

    def loss(omega):
        return (X.mT @ omega @ Y - T).square().sum((-2, -1))

    best = optimal_omega(X, T, Y)
    assert (loss(best + 1e-3 * randn(101, 5, 5, seed=3)) > loss(best)).all()


def test_as_many_features_as_dimensions_reach_every_target():
    X, Y, T = randn(7, 7, seed=0), randn(7, 5, seed=1), randn(7, 5, seed=2)
    assert_close(X.mT @ optimal_omega(X, T, Y) @ Y, T)


def test_more_features_than_dimensions_reach_the_target_times_their_leverages():
    X, Y = randn(5, 11, seed=0), randn(5, 7, seed=1)
    reached = (X.mT @ optimal_omega(X, one_pair(11, 7, 2, 3, logit=4.0), Y) @ Y)[2, 3]
    leverage_X, leverage_Y = ((Z * torch.linalg.solve(Z @ Z.mT, Z)).sum(0) for Z in (X, Y))
    assert_close(reached, 4 * leverage_X[2] * leverage_Y[3])
    assert leverage_X.sum().item() == pytest.approx(5)


def test_target_scales_the_optimum():
    X, Y, T = randn(5, 11, seed=0), randn(5, 7, seed=1), randn(11, 7, seed=2)
    assert_close(optimal_omega(X, -3 * T, Y), -3 * optimal_omega(X, T, Y))
    assert not optimal_omega(X, 0 * T, Y).any()


# --- Theorem 1 and Corollary 1


@DTYPES
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pair_gives_rank_one_and_the_whitened_features_as_singular_vectors(shape, dependent, dtype):
    n_model, n_x, n_y = shape
    X, Y = randn(n_model, n_x, seed=0, dtype=dtype), randn(n_model, n_y, seed=1, dtype=dtype)
    if dependent:
        X[:, -1], Y[:, -1] = 2 * X[:, 0], -0.5 * Y[:, 0]
    i, j = n_x - 1, n_y - 1
    U, S, V = verified_svd(optimal_omega(X, one_pair(n_x, n_y, i, j, dtype=dtype), Y).double())
    assert (S[1:] <= 10 * TOLERANCE[dtype] * S[0]).all()
    assert_parallel(U[:, :1], whitened(X)[:, i : i + 1], TOLERANCE[dtype])
    assert_parallel(V[:, :1], whitened(Y)[:, j : j + 1], TOLERANCE[dtype])


def test_head_trained_on_one_pair_of_anisotropic_features_finds_the_whitened_features():
    X = unit_features(randn(7, 13, seed=0) + 2 * randn(7, 1, seed=1))
    T = one_pair(13, 13)
    weights = [randn(3, 7, seed=k).mul(0.3).requires_grad_() for k in (2, 3)]
    optimizer = torch.optim.LBFGS(weights, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, history_size=50)

    def loss():
        optimizer.zero_grad()
        value = (X.mT @ weights[0].mT @ weights[1] @ X - T).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    svd = AttentionHeads(*(w.detach() for w in weights)).svd()
    predicted = whitened(X)
    assert svd.S[1] < 1e-3 * svd.S[0]  # both factors shrink together: the spare rank fades slower than any exponential
    assert_parallel(svd.U[:, :1], predicted[:, :1], 1e-5)
    assert_parallel(svd.V[:, :1], predicted[:, 1:2], 1e-5)
    assert abs(svd.U[:, 0] @ X[:, 0]) < 0.95  # the features themselves are not the singular vectors


@DTYPES
@pytest.mark.parametrize("scale", [1e-25, 0.3, 1e25])
def test_tight_frame_is_predicted_by_itself(scale, dtype):
    X = (orthonormal(11, 5, seed=0).mT * scale).to(dtype)  # X X^T = scale^2 I, of unequal lengths
    torch.testing.assert_close(whitened(X), unit_features(X), rtol=0, atol=TOLERANCE[dtype])
    got = alignment_bound(X)
    torch.testing.assert_close(got.cosine, torch.ones(11, dtype=dtype), rtol=0, atol=TOLERANCE[dtype])
    assert got.condition.item() == pytest.approx(1, abs=TOLERANCE[dtype])
    assert got.bound.item() == pytest.approx(1, abs=TOLERANCE[dtype])


def test_tight_frame_and_one_pair_give_the_features_as_singular_vectors():
    X = unit_tight_frame(5, 13, seed=0)
    U, _, V = verified_svd(optimal_omega(X, one_pair(13, 13), X))
    assert_parallel(U[:, :1], X[:, :1])
    assert_parallel(V[:, :1], X[:, 1:2])


# --- heads of limited rank


@SETTINGS
@given(seed=SEEDS, rank=st.integers(1, 6), n_model=st.integers(2, 6), n_x=st.integers(2, 9), n_y=st.integers(2, 9))
def test_best_head_of_a_rank_reaches_the_loss_that_eckart_and_young_give(seed, rank, n_model, n_x, n_y):
    X, Y, T = randn(n_model, n_x, seed=seed), randn(n_model, n_y, seed=seed + 1), randn(n_x, n_y, seed=seed + 2)
    got = best_of_rank(X, T, Y, rank)
    P_x, P_y = (np.linalg.pinv(M.numpy(), rcond=1e-9) @ M.numpy() for M in (X, Y))
    singular = np.linalg.svd(P_x @ T.numpy() @ P_y, compute_uv=False)  # the logits that any head can reach
    assert_close(got.spectrum, singular[: got.spectrum.shape[-1]], 1e-8)
    least = (T**2).sum().item() - (singular[:rank] ** 2).sum()
    loss = (X.mT @ got.omega @ Y - T).square().sum()
    assert_close(loss, least, 1e-8)
    assert_close(got.lost, least / (T**2).sum().item(), 1e-8)
    assert_close(got.logits, X.mT @ got.omega @ Y, 1e-7)
    assert (verified_svd(got.omega)[1] > 1e-9 * got.omega.norm()).sum() <= rank


def test_no_head_of_two_factors_that_is_trained_does_better():
    """Gradient descent on W_Q and W_K themselves, from several starts."""
    X, Y, T = randn(5, 12, seed=0), randn(5, 9, seed=1), randn(12, 9, seed=2)
    got = best_of_rank(X, T, Y, 2)
    losses = []
    for start in range(4):
        factors = [randn(5, 2, seed=10 * start + k).requires_grad_() for k in (3, 4)]
        optimizer = torch.optim.LBFGS(factors, max_iter=800, tolerance_grad=1e-11, tolerance_change=0, history_size=20)

        def loss(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            value = (X.mT @ factors[0] @ factors[1].mT @ Y - T).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        losses.append(loss().item())
        if losses[-1] == min(losses):
            trained = (factors[0] @ factors[1].mT).detach()
    least = (got.logits - T).square().sum().item()
    assert min(losses) >= least - 1e-9
    assert min(losses) == pytest.approx(least, rel=1e-6)
    assert_close(trained, got.omega, 1e-3)


def test_a_head_of_full_rank_is_the_optimum_and_one_of_rank_h_serves_the_strongest_pairs_of_orthonormal_features():
    X, Y, T = randn(5, 11, seed=0), randn(5, 7, seed=1), randn(11, 7, seed=2)
    assert_close(best_of_rank(X, T, Y, 5).omega, optimal_omega(X, T, Y))
    assert_close(best_of_rank(X, T, Y, 99).omega, optimal_omega(X, T, Y))
    W = orthonormal(8, 8, seed=0)
    targets = torch.zeros(8, 8, dtype=torch.float64)
    targets[range(4), range(4, 8)] = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    got = best_of_rank(W, targets, W, 2)
    assert_close(got.logits[range(4), range(4, 8)], [4.0, 3.0, 0.0, 0.0])
    assert got.lost.item() == pytest.approx(5 / 30)


def test_a_rank_below_one_is_an_input_error_and_a_template_of_zero_loses_nothing_that_is_known():
    X = randn(3, 4, seed=0)
    with pytest.raises(InputError, match=r"rank=0 .*integer >= 1"):
        best_of_rank(X, torch.zeros(4, 4, dtype=torch.float64), X, 0)
    got = best_of_rank(X, torch.zeros(4, 4, dtype=torch.float64), X, 2)
    assert got.lost.isnan()
    assert (got.omega == 0).all()


# --- whitening and un-whitening


@DTYPES
@pytest.mark.parametrize("n_features", [3, 7, 11])
def test_whitened_equals_numpy(n_features, dtype):
    X = randn(2, 7, n_features, seed=0, dtype=dtype)
    got = whitened(X)
    assert got.dtype == dtype
    x = X.double().numpy()
    expected = np.linalg.pinv(x @ np.swapaxes(x, -1, -2), rcond=1e-9) @ x
    assert_close(got, expected / np.linalg.norm(expected, axis=-2, keepdims=True), TOLERANCE[dtype])


@SETTINGS
@given(seed=SEEDS, n_features=st.integers(1, 11), rank=st.integers(1, 7), exponent=st.integers(-100, 100))
def test_unwhitening_inverts_whitening(seed, n_features, rank, exponent):
    X = low_rank(7, n_features, rank, seed=seed)
    sigma = X @ X.mT
    back = unwhitened(whitened(X, rtol=1e-9), sigma * 10.0**exponent)
    assert_close(back, unit_features(X), 1e-4)  # signs too; Sigma has the square of X's condition number


def test_unwhitening_the_singular_vectors_of_the_optimum_recovers_the_features():
    X = unit_features(randn(7, 13, seed=0) + 2 * randn(7, 1, seed=1))
    U, _, V = verified_svd(optimal_omega(X, one_pair(13, 13), X))
    before = (U[:, 0] @ X[:, 0]).abs()
    assert before < 0.95
    assert_parallel(unwhitened(U[:, :1], X @ X.mT), X[:, :1])
    assert_parallel(unwhitened(V[:, :1], X @ X.mT), X[:, 1:2])


@DTYPES
def test_own_covariance_is_the_default(dtype):
    X = randn(7, 13, seed=0)
    got = whitened(X.to(dtype), (X @ X.mT).to(dtype))
    torch.testing.assert_close(got, whitened(X).to(dtype), rtol=0, atol=10 * TOLERANCE[dtype])


def test_covariance_is_that_of_the_features_as_they_are():
    X = randn(7, 13, seed=0) * torch.linspace(0.2, 3, 13, dtype=torch.float64)
    x = unit_features(X)
    assert_parallel(whitened(x, X @ X.mT), whitened(X))
    assert ((whitened(x) * whitened(X)).sum(0) < 0.99).any()


@SETTINGS
@given(seed=SEEDS, exponent=st.integers(-250, 250), sign=st.sampled_from([-1.0, 1.0]))
def test_directions_do_not_depend_on_scale_and_follow_the_sign(seed, exponent, sign):
    X, C = randn(5, 11, seed=seed), token_covariance(randn(23, 5, seed=seed + 1))
    factor = sign * 10.0**exponent
    assert_close(whitened(factor * X), sign * whitened(X), 1e-9)
    assert_close(whitened(factor * X, C * 10.0**exponent), sign * whitened(X, C), 1e-9)
    assert_close(unwhitened(factor * X, C * 10.0**exponent), sign * unwhitened(X, C), 1e-9)


@DTYPES
def test_direction_outside_the_span_is_zero_and_not_a_rounding_error(dtype):
    q = orthonormal(7, 5, seed=0, dtype=torch.float64)
    C = (q[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ q[:, :3].mT).to(dtype)
    inside, outside = q[:, :3].to(dtype), q[:, 3:].to(dtype)
    for function in (whitened, unwhitened):
        got = function(torch.cat([inside, outside], -1), C)
        torch.testing.assert_close(got[:, :3], inside, rtol=0, atol=TOLERANCE[dtype])
        assert not got[:, 3:].any()


@DTYPES
def test_zero_feature_has_no_direction_and_changes_no_other(dtype):
    X = randn(7, 13, seed=0, dtype=dtype)
    padded = torch.cat([X, torch.zeros(7, 1, dtype=dtype)], -1)
    assert not whitened(padded)[:, -1].any()
    torch.testing.assert_close(whitened(padded)[:, :-1], whitened(X), rtol=0, atol=TOLERANCE[dtype])
    assert not whitened(0 * X).any()
    assert not unwhitened(X, torch.zeros(7, 7, dtype=dtype)).any()


def test_very_short_feature_inside_the_span_keeps_its_predicted_direction():
    X = randn(5, 11, seed=0)
    X[:, 3] *= 1e-12
    others = torch.arange(11) != 3
    expected = torch.linalg.solve(X[:, others] @ X[:, others].mT, X[:, 3:4])
    assert_parallel(whitened(X)[:, 3:4], expected)


# --- covariance of observed tokens


@DTYPES
@pytest.mark.parametrize("centred", [True, False])
def test_token_covariance_equals_numpy(centred, dtype):
    r = (randn(3, 101, 7, seed=0) + 5).to(dtype)
    got = token_covariance(r, centred=centred)
    assert got.dtype == dtype
    for element, tokens in zip(got, r.double().numpy(), strict=True):
        expected = np.cov(tokens.T, bias=True) if centred else tokens.T @ tokens / len(tokens)
        assert_close(element, expected, TOLERANCE[dtype])
        assert torch.equal(element, element.mT)


def test_large_common_offset_does_not_cancel_the_covariance():
    r = randn(101, 5, seed=0)
    assert_close(token_covariance(r + 1e6), token_covariance(r), 1e-8)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_covariance_of_sparse_tokens_is_that_of_the_features_and_the_uncentred_moment_is_not(probability):
    W = unit_features(randn(5, 11, seed=0) + randn(5, 1, seed=1))
    uniform = torch.rand(100_000, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = sparse_activations(uniform, probability) @ W.mT
    mean, square = probability / 2, probability / 3  # of Bernoulli(p) times Uniform(0, 1)
    variance = square - mean**2
    expected = {
        True: variance * W @ W.mT,
        False: W @ (variance * torch.eye(11, dtype=torch.float64) + mean**2) @ W.mT,
    }
    for centred, matrix in expected.items():
        error = {c: (token_covariance(tokens, centred=centred) - other).norm() for c, other in expected.items()}
        assert error[centred] < 0.02 * matrix.norm()
        assert error[centred] < 0.2 * error[not centred]
    # and so with the directions
    alignment = {
        centred: (unwhitened(whitened(W), token_covariance(tokens, centred=centred)) * unit_features(W)).sum(0).min()
        for centred in expected
    }
    assert alignment[True] > 0.995
    assert alignment[False] < 0.98


def test_one_token_has_no_covariance():
    assert not token_covariance(randn(1, 5, seed=0)).any()
    r = randn(1, 5, seed=0)
    assert_close(token_covariance(r, centred=False), r.mT @ r)


# --- Theorem 2


@DTYPES
@SETTINGS
@given(
    seed=SEEDS,
    n_model=st.integers(1, 7),
    n_features=st.integers(1, 11),
    rank=st.integers(1, 7),
    log_condition=st.floats(0, 6),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
)
def test_predicted_alignment_never_falls_below_the_bound(dtype, seed, n_model, n_features, rank, log_condition, scale):
    n_singular = min(n_model, n_features, rank)
    spectrum = torch.logspace(0, -log_condition / 2, n_singular, dtype=torch.float64)
    U, V = orthonormal(n_model, n_singular, seed=seed), orthonormal(n_features, n_singular, seed=seed + 1)
    X = (scale * (U * spectrum) @ V.mT).to(dtype)
    got = alignment_bound(X)
    assert {part.dtype for part in got} == {dtype}
    assert (got.cosine >= got.bound - 1e-12).all()
    assert (got.cosine <= 1).all()
    assert 0 < got.bound <= 1
    if log_condition < 4:  # what float32 leaves of the smallest eigenvalue
        expected = 10**log_condition if n_singular > 1 else 1
        assert got.condition.item() == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-9)


@DTYPES
@pytest.mark.parametrize("n_features", [3, 7, 13])
def test_cosine_is_that_of_the_feature_and_its_prediction(n_features, dtype):
    X = randn(2, 7, n_features, seed=0, dtype=dtype) * 3
    got = alignment_bound(X)
    torch.testing.assert_close(got.cosine, (whitened(X) * unit_features(X)).sum(-2), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(got.interference, interference(X.double()).to(dtype))
    eigenvalues = np.linalg.eigvalsh(X.double().numpy() @ X.double().mT.numpy())[..., -min(7, n_features) :]
    k = eigenvalues[..., -1] / eigenvalues[..., 0]
    np.testing.assert_allclose(got.condition.double().numpy(), k, rtol=1e-5)
    np.testing.assert_allclose(got.bound.double().numpy(), 2 * np.sqrt(k) / (1 + k), rtol=1e-5)


@pytest.mark.parametrize("k", [1.0, 4.0, 100.0, 1e6])
def test_bound_is_reached_between_the_first_and_the_last_eigenvector(k):
    sigma = torch.diag(torch.tensor([k, np.sqrt(k), 1.0], dtype=torch.float64))
    x = 0.5 * torch.tensor([[np.sqrt(k / (1 + k))], [0.0], [np.sqrt(1 / (1 + k))]], dtype=torch.float64)
    X = torch.cat([x, torch.linalg.cholesky(sigma - x @ x.mT)], -1)  # X X^T = sigma
    got = alignment_bound(X)
    assert got.condition.item() == pytest.approx(k)
    assert got.cosine[0].item() == pytest.approx(got.bound.item(), rel=1e-9)
    assert (got.cosine >= got.bound - 1e-12).all()


@pytest.mark.parametrize(("share", "norm", "cosine"), [(0.5, 21, 0.90), (0.8, 39, 0.78), (1.0, 50, 0.71)])
def test_tight_frame_plus_a_cone_direction_has_the_measured_alignment(share, norm, cosine):
    X = unit_tight_frame(50, 100, seed=0)
    got = alignment_bound(unit_features(X + share * unit_features(randn(50, 1, seed=1))))
    assert got.interference.item() == pytest.approx(norm, abs=3)  # they vary with the draw
    assert got.cosine.mean().item() == pytest.approx(cosine, abs=0.015)


@SETTINGS
@given(seed=SEEDS, n_model=st.integers(2, 24), n_features=st.integers(1, 8), spread=st.floats(0, 3))
def test_no_feature_is_less_aligned_than_its_interference_allows(seed, n_model, n_features, spread):
    lengths = torch.exp(spread * randn(n_features, seed=seed + 1))
    X = lengths * unit_features(randn(n_model, n_features, seed=seed))
    got = alignment_bound(X, rtol=1e-12)
    assert (got.cosine >= got.by_interference - 1e-9).all()
    assert_close(got.by_interference, interference_bound(interference(X)))
    if n_features > n_model:
        assert got.by_interference == 0


@SETTINGS
@given(seed=SEEDS, n_features=st.integers(2, 7), norm=st.floats(0.01, 0.99))
def test_any_interference_below_one_has_features_that_reach_its_bound(seed, n_features, norm):
    gram = torch.eye(n_features, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = norm  # two features of this cosine, others orthogonal to all
    X = orthonormal(9, n_features, seed=seed) @ torch.linalg.cholesky(gram).mT
    got = alignment_bound(X)
    assert got.interference.item() == pytest.approx(norm, abs=1e-9)
    assert got.cosine[0].item() == pytest.approx(np.sqrt(1 - norm**2), abs=1e-9)
    assert got.by_interference.item() == pytest.approx(np.sqrt(1 - norm**2), abs=1e-9)


@SETTINGS
@given(seed=SEEDS, n_model=st.integers(1, 6), more=st.integers(1, 30), strength=st.floats(0, 3))
def test_with_more_features_than_dimensions_any_interference_leaves_room_for_no_alignment(
    seed, n_model, more, strength
):
    """A small component in one more dimension takes all cosines to zero, and leaves the interference as it was."""
    n_features = n_model + more
    X = unit_features(randn(n_model, n_features, seed=seed) + strength)
    sign = torch.where(randn(1, n_features, seed=seed + 1) > 0, 1.0, -1.0).double()
    tilted = [alignment_bound(unit_features(torch.cat([X, small * sign], 0)), rtol=0) for small in (1e-5, 1e-6)]
    for got in tilted:
        assert got.interference.item() == pytest.approx(interference(X).item(), rel=1e-6)
        assert got.by_interference < 1e-3
    # the new coordinate of Sigma^-1 x is of order 1/small where the signs are no combination of the other rows
    free = sign - sign @ torch.linalg.pinv(X) @ X
    if (free.abs() > 0.05).all():
        assert tilted[1].cosine.max() < 0.2 * tilted[0].cosine.max() < 1e-2


def test_feature_without_a_direction_has_no_cosine_and_leaves_the_bound_alone():
    X = randn(7, 5, seed=0)
    padded = torch.cat([X, torch.zeros(7, 1, dtype=torch.float64)], -1)
    got, clean = alignment_bound(padded), alignment_bound(X)
    assert got.cosine.isnan().tolist() == [False] * 5 + [True]
    assert_close(got.cosine[:-1], clean.cosine)
    assert_close(got.condition, clean.condition)
    nothing = alignment_bound(0 * X)
    for part in (nothing.cosine, nothing.bound, nothing.condition):
        assert part.isnan().all()


# --- Theorem 3


@DTYPES
@SETTINGS
@given(seed=SEEDS, n_model=st.integers(1, 7), n_features=st.integers(1, 11))
def test_pressure_equals_autograd(dtype, seed, n_model, n_features):
    W = randn(n_model, n_features, seed=seed, dtype=dtype)
    omega, T = randn(n_model, n_model, seed=seed + 1, dtype=dtype), randn(n_features, n_features, seed=seed + 2)
    got = attention_pressure(W, omega, T.to(dtype))
    assert got.loss.dtype == got.gradient.dtype == dtype
    leaf = W.double().requires_grad_()
    loss = sum(
        (leaf[:, i] @ omega.double() @ leaf[:, j] - T.to(dtype).double()[i, j]) ** 2
        for i in range(n_features)
        for j in range(n_features)
    )
    loss.backward()
    assert_close(got.loss, loss.detach(), TOLERANCE[dtype])
    assert_close(got.gradient, leaf.grad, TOLERANCE[dtype])


def solved_case(*, logit=5.0, n_model=7, n_features=11, seed=0):
    """Rank-one Omega = s u v^T, w_0 = a u, w_1 = b v, a b s = T_01, and a rest that is orthogonal to u and v."""
    q = orthonormal(n_model, n_model, seed=seed)
    u, v = q[:, :1], q[:, 1:2]
    rest = q[:, 2:] @ randn(n_model - 2, n_features - 2, seed=seed + 1)
    W = torch.cat([2 * u, 0.5 * v, rest], -1)
    return W, logit * u @ v.mT, one_pair(n_features, n_features, logit=logit)


PAIR = torch.tensor([[0, 1]])


@SETTINGS
@given(seed=SEEDS, logit=st.sampled_from([-3.0, 0.1, 5.0]))
def test_attended_features_orthogonal_to_the_rest_are_a_global_minimum(seed, logit):
    W, omega, T = solved_case(logit=logit, seed=seed)
    got = attention_pressure(W, omega, T)
    assert got.loss.item() == pytest.approx(0, abs=1e-20)
    assert got.gradient.abs().max().item() == pytest.approx(0, abs=1e-12)
    for residual in orthogonality_residual(W, omega, PAIR):
        assert residual.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("feature", "side", "direction"), [(4, "query", 0), (4, "key", 1), (1, "query", 0), (0, "key", 1)]
)
def test_overlap_with_a_feature_that_is_not_the_target_costs_loss_on_its_side(feature, side, direction):
    W, omega, T = solved_case()
    basis = orthonormal(7, 7, seed=0)
    W[:, feature] += 0.3 * basis[:, direction]
    assert attention_pressure(W, omega, T).loss > 0.01
    got = orthogonality_residual(W, omega, PAIR)._asdict()
    cosine = (unit_features(W)[:, feature] @ basis[:, direction]).abs().item()
    assert got.pop(side).item() == pytest.approx(cosine / 10)  # one of 10 features on this side
    assert next(iter(got.values())).item() == pytest.approx(0, abs=1e-12)  # the other side


def test_loss_does_not_see_what_is_outside_the_span_of_the_singular_vectors():
    W, omega, T = solved_case()
    beyond = orthonormal(7, 7, seed=0)[:, 2:] @ randn(5, 11, seed=5)
    assert attention_pressure(W + beyond, omega, T).loss.item() == pytest.approx(0, abs=1e-20)
    for residual in orthogonality_residual(W + beyond, omega, PAIR):
        assert residual.item() == pytest.approx(0, abs=1e-12)
    gradient = attention_pressure(randn(7, 11, seed=6), omega, T).gradient
    assert (orthonormal(7, 7, seed=0)[:, 2:].mT @ gradient).abs().max() < 1e-12


@pytest.mark.parametrize("orthogonal", [True, False], ids=["u orthogonal to v", "u oblique to v"])
def test_descent_in_the_features_alone_removes_the_overlap_with_the_rest(orthogonal):
    u, v = (orthonormal(7, 2, seed=0) if orthogonal else unit_features(randn(7, 2, seed=1))).split(1, dim=-1)
    omega, T = 3 * u @ v.mT, one_pair(11, 11)
    W = unit_features(randn(7, 11, seed=2))
    start = orthogonality_residual(W, omega, PAIR)
    assert min(start) > 0.2
    for _ in range(2000):
        W = W - 0.01 * attention_pressure(W, omega, T).gradient
    assert attention_pressure(W, omega, T).loss < 1e-12
    assert max(orthogonality_residual(W, omega, PAIR)) < 1e-6
    assert (u.mT @ omega @ v / 3).item() == pytest.approx(1)  # Omega was not touched
    rest = unit_features(W)[:, 2:]
    assert (u.mT @ rest).abs().max() < 1e-5
    assert (v.mT @ rest).abs().max() < 1e-5


def test_zero_loss_at_equal_rank_leaves_no_overlap_for_several_pairs():
    W = randn(11, 11, seed=0)
    pairs = torch.tensor([[0, 1], [3, 4], [5, 3]])  # feature 3 is a query and a key
    T = torch.zeros(11, 11, dtype=torch.float64)
    T[pairs[:, 0], pairs[:, 1]] = torch.tensor([5.0, -4.0, 3.0], dtype=torch.float64)
    omega = optimal_omega(W, T, W)  # W^-T T W^-1
    assert attention_pressure(W, omega, T).loss.item() == pytest.approx(0, abs=1e-15)
    for residual in orthogonality_residual(W, omega, pairs, threshold=1e-6):
        assert residual.item() == pytest.approx(0, abs=1e-9)
    assert min(orthogonality_residual(W, omega, PAIR, threshold=1e-6)) > 0.01  # the wrong pairs


def test_residual_is_the_mean_absolute_cosine_by_hand():
    omega = torch.zeros(3, 3)
    omega[0, 1] = -2  # u = e_0, v = e_1 up to sign
    W = torch.tensor([[1.0, 0.0, 3.0, -3.0], [0.0, 2.0, 4.0, 0.0], [0.0, 0.0, 0.0, 4.0]])
    got = orthogonality_residual(W, omega, PAIR)
    assert got.query.item() == pytest.approx((0 + 0.6 + 0.6) / 3)  # features 1, 2, 3
    assert got.key.item() == pytest.approx((0 + 0.8 + 0) / 3)  # features 0, 2, 3


@SETTINGS
@given(seed=SEEDS)
def test_residual_ignores_lengths_signs_and_the_basis_of_equal_singular_values(seed):
    a, b = orthonormal(7, 2, seed=seed), orthonormal(7, 2, seed=seed + 1)
    W, pairs = randn(7, 11, seed=seed + 2), torch.tensor([[0, 1], [2, 3]])
    got = orthogonality_residual(W, a @ b.mT, pairs)
    for side, (basis, attended) in zip(got, ((a, [0, 2]), (b, [1, 3])), strict=True):
        rest = [i for i in range(11) if i not in attended]
        assert_close(side, (basis.mT @ unit_features(W)[:, rest]).norm(dim=0).mean())
    lengths = randn(11, seed=seed + 3) * 10
    for side, scaled in zip(got, orthogonality_residual(W * lengths, -4 * a @ b.mT, pairs), strict=True):
        assert_close(scaled, side)


def test_singular_values_below_the_threshold_do_not_count():
    q, W = orthonormal(7, 4, seed=0), randn(7, 11, seed=1)
    strong, weak = q[:, :1] @ q[:, 1:2].mT, q[:, 2:3] @ q[:, 3:4].mT
    got = orthogonality_residual(W, strong + 0.04 * weak, PAIR)
    for side, expected in zip(got, orthogonality_residual(W, strong, PAIR), strict=True):
        assert_close(side, expected)
    assert (orthogonality_residual(W, strong + 0.04 * weak, PAIR, threshold=0.03).query > got.query).all()


def test_residual_of_no_rest_and_of_a_head_that_does_nothing_is_nan():
    W = randn(2, 7, 2, seed=0)
    omega = randn(2, 7, 7, seed=1)
    everything = torch.tensor([[0, 0], [1, 1]])
    assert all(side.isnan().all() for side in orthogonality_residual(W, omega, everything))
    omega[0] = 0
    for side in orthogonality_residual(W, omega, PAIR):
        assert side.isnan().tolist() == [True, False]


# --- batches, NaN, devices, errors

FUNCTIONS = {
    "optimal_omega": (optimal_omega, [(5, 11), (11, 7), (5, 7)]),
    "whitened": (whitened, [(5, 11)]),
    "whitened, few features": (whitened, [(7, 3)]),
    "whitened with a covariance": (whitened, [(5, 11), (5, 5)]),
    "unwhitened": (unwhitened, [(5, 3), (5, 5)]),
    "token_covariance": (token_covariance, [(23, 5)]),
    "alignment_bound": (alignment_bound, [(5, 11)]),
    "best_of_rank": (lambda X, T, Y: best_of_rank(X, T, Y, 2), [(5, 11), (11, 7), (5, 7)]),
    "attention_pressure": (attention_pressure, [(5, 11), (5, 5), (11, 11)]),
    "orthogonality_residual": (
        lambda W, omega: orthogonality_residual(W, omega, PAIR.to(W.device), threshold=0),
        [(5, 11), (5, 5)],
    ),
}
EVERY_FUNCTION = pytest.mark.parametrize(("function", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS)


def parts_of(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def arguments(shapes, *batch, dtype=torch.float64):
    return [randn(*batch, *shape, seed=k, dtype=dtype) for k, shape in enumerate(shapes)]


@EVERY_FUNCTION
@DTYPES
def test_batch_equals_one_by_one_and_keeps_the_dtype(function, shapes, dtype):
    inputs = arguments(shapes, 2, 3, dtype=dtype)
    before = [x.clone() for x in inputs]
    got = parts_of(function(*inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    for i in range(2):
        for j in range(3):
            for part, alone in zip(got, parts_of(function(*(x[i, j] for x in inputs))), strict=True):
                assert part.dtype == alone.dtype == dtype
                torch.testing.assert_close(part[i, j], alone, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@EVERY_FUNCTION
def test_leading_dimensions_broadcast_between_arguments(function, shapes):
    first, *others = arguments(shapes)
    batch = torch.stack([first, randn(*first.shape, seed=9)])
    for part, alone in zip(parts_of(function(batch, *others)), parts_of(function(first, *others)), strict=True):
        assert part.shape == (2, *alone.shape)
        torch.testing.assert_close(part[0], alone)


@EVERY_FUNCTION
def test_empty_batch_gives_an_empty_result(function, shapes):
    assert all(part.shape[0] == 0 for part in parts_of(function(*arguments(shapes, 0))))


@EVERY_FUNCTION
@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_batch_element_is_nan_and_leaves_the_others_alone(function, shapes, value, dtype):
    for broken in range(len(shapes)):
        inputs = arguments(shapes, 3, dtype=dtype)
        clean = parts_of(function(*inputs))
        inputs[broken][1, 2, 2] = value
        for part, expected in zip(parts_of(function(*inputs)), clean, strict=True):
            assert part[1].isnan().any()
            torch.testing.assert_close(part[[0, 2]], expected[[0, 2]], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_optimum_of_broken_input_is_nan_throughout(broken, value):
    inputs = arguments([(5, 11), (11, 7), (5, 7)])
    inputs[broken][2, 2] = value
    assert optimal_omega(*inputs).isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("centred", [True, False])
def test_covariance_of_broken_tokens_is_nan_throughout(centred, value):
    tokens = randn(23, 5, seed=0)
    tokens[3, 2] = value
    assert token_covariance(tokens, centred=centred).isnan().all()


def test_mixed_dtypes_give_the_wider_one():
    X, T, Y = arguments([(5, 11), (11, 7), (5, 7)])
    assert optimal_omega(X.float(), T, Y.float()).dtype == torch.float64
    assert attention_pressure(X, randn(5, 5, seed=3).float(), randn(11, 11, seed=4).float()).loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_real_directions(dtype):
    X = (orthonormal(7, 7, seed=0) * torch.logspace(0, -2, 7, dtype=torch.float64)).to(dtype)
    got = whitened(X)
    assert got.dtype == dtype
    assert_close(got.double(), whitened(X.double()), 1e-2)
    assert got.double().norm(dim=0).min() > 0.9


@EVERY_FUNCTION
@pytest.mark.parametrize("device", DEVICES)
def test_results_stay_on_their_device_and_agree_with_the_cpu(function, shapes, device):
    inputs = arguments(shapes, 2, dtype=torch.float32)
    got = parts_of(function(*(x.to(device) for x in inputs)))
    for part, expected in zip(got, parts_of(function(*(x.double() for x in inputs))), strict=True):
        assert part.device.type == device
        torch.testing.assert_close(part.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("function", "shapes", "named"),
    [
        (optimal_omega, [(5, 11), (11, 7), (6, 7)], "Y.shape=(6, 7)"),
        (optimal_omega, [(5, 11), (7, 11), (5, 7)], "T.shape=(7, 11)"),
        (optimal_omega, [(5,), (5, 5), (5, 5)], "X.shape=(5,)"),
        (optimal_omega, [(2, 5, 11), (3, 11, 7), (5, 7)], "leading dimensions="),
        (whitened, [(5, 0)], "features.shape=(5, 0)"),
        (whitened, [(5, 11), (11, 11)], "covariance.shape=(11, 11)"),
        (whitened, [(2, 5, 11), (3, 5, 5)], "leading dimensions="),
        (unwhitened, [(5, 3), (5, 3)], "covariance.shape=(5, 3)"),
        (token_covariance, [(0, 5)], "tokens.shape=(0, 5)"),
        (alignment_bound, [(5, 0)], "features.shape=(5, 0)"),
        (attention_pressure, [(5, 11), (11, 11), (11, 11)], "omega.shape=(11, 11)"),
        (attention_pressure, [(5, 11), (5, 5), (5, 5)], "template.shape=(5, 5)"),
        (attention_pressure, [(2, 5, 11), (5, 5), (3, 11, 11)], "leading dimensions="),
        (lambda W, omega: orthogonality_residual(W, omega, PAIR), [(5, 11), (5, 6)], "omega.shape=(5, 6)"),
        (lambda W, omega: orthogonality_residual(W, omega, PAIR[0]), [(5, 11), (5, 5)], "pairs.shape=(2,)"),
        (lambda W, omega: orthogonality_residual(W, omega, PAIR + 10), [(5, 11), (5, 5)], "pairs=[[10, 11]]"),
        (lambda W, omega: orthogonality_residual(W, omega, PAIR - 1), [(5, 11), (5, 5)], "pairs=[[-1, 0]]"),
        (lambda W, omega: orthogonality_residual(W, omega, PAIR, threshold=5), [(5, 11), (5, 5)], "threshold=5"),
        (lambda W: whitened(W, rtol=-1e-3), [(5, 11)], "rtol=-0.001"),
        (lambda W: alignment_bound(W, rtol=1.0), [(5, 11)], "rtol=1.0"),
        (lambda W: alignment_bound(W, rtol=float("nan")), [(5, 11)], "rtol=nan"),
    ],
)
def test_input_that_cannot_be_used_is_an_input_error_that_names_it(function, shapes, named):
    with pytest.raises(InputError) as error:
        function(*arguments(shapes))
    assert named in str(error.value)
    assert "Allowed: " in str(error.value)
