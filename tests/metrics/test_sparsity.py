"""Sparseness of contributions, against explicit loops and known distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.draws import keyed_generator
from svf_lightning.errors import InputError
from svf_lightning.metrics import (
    SparseAttention,
    haar_orthogonal,
    measure_sparsity,
    n_recon,
    relative_attention,
    sparseness,
    top_contributor,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- relative attention


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), n_keys=st.integers(2, 7), n_hidden=st.integers(0, 3))
def test_relative_attention_equals_the_explicit_loops(dtype, seed, n_keys, n_hidden):
    c = randn(3, n_keys + n_hidden, 5, seed=seed, dtype=dtype)
    is_key = torch.arange(n_keys + n_hidden) < n_keys
    got = relative_attention(c, is_key)
    expected = np.zeros(c.shape)
    for b in range(3):
        for j in range(n_keys):
            others = [c[b, i].double().numpy() for i in range(n_keys) if i != j]
            expected[b, j] = c[b, j].double().numpy() - np.mean(others, axis=0)
    np.testing.assert_allclose(got.double().numpy(), expected, atol=20 * torch.finfo(dtype).eps)


def test_relative_attention_does_not_change_when_every_score_rises_alike():
    c = randn(4, 6, 5)
    torch.testing.assert_close(relative_attention(c + randn(4, 1, 5, seed=1)), relative_attention(c))


def test_nan_at_a_hidden_position_does_not_reach_the_keys():
    c = randn(4, 5)
    c[3] = torch.nan
    got = relative_attention(c, torch.tensor([True, True, True, False]))
    torch.testing.assert_close(got[:3], relative_attention(c[:3]))
    assert (got[3] == 0).all()


def test_a_single_key_has_nothing_to_be_relative_to():
    assert relative_attention(randn(1, 5)).isnan().all()


@pytest.mark.wrong_shapes
def test_a_mask_of_another_length_is_an_input_error():
    with pytest.raises(InputError, match="is_key"):
        relative_attention(randn(4, 5), torch.ones(3, dtype=torch.bool))


# --- sparseness


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), log_scale=st.integers(-30, 30))
def test_sparseness_equals_the_formula_and_ignores_scale_order_and_sign(dtype, seed, n, log_scale):
    v = randn(3, n, seed=seed, dtype=dtype)
    got = sparseness(v)
    w = v.double().numpy()
    np.testing.assert_allclose(got, np.abs(w).mean(-1) ** 2 / (w**2).mean(-1), rtol=40 * torch.finfo(dtype).eps)
    assert (got >= (1 - 1e-5) / n).all()
    assert (got <= 1 + 1e-5).all()
    torch.testing.assert_close(sparseness(-v.flip(-1) * 10.0**log_scale), got)


def test_one_entry_is_the_sparsest_and_equal_sizes_the_least_sparse():
    assert sparseness(torch.eye(8)[2]).item() == pytest.approx(1 / 8)
    assert sparseness(torch.tensor([2.0, -2.0, 2.0, -2.0])).item() == pytest.approx(1)
    assert sparseness(torch.zeros(4)).isnan()


def test_gaussian_entries_give_two_over_pi_and_their_products_its_square():
    a, b = randn(400_000, seed=1), randn(400_000, seed=2)
    assert sparseness(a).item() == pytest.approx(2 / math.pi, abs=3e-3)
    assert sparseness(a * b).item() == pytest.approx((2 / math.pi) ** 2, abs=3e-3)


# --- N_recon


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), shift=st.floats(-1, 1))
def test_n_recon_is_the_smallest_number_that_reaches_the_sum(dtype, seed, n, shift):
    v = randn(n, seed=seed, dtype=dtype) + shift
    found = int(n_recon(v))
    w = np.sort(v.double().numpy() * (-1 if v.double().sum() < 0 else 1))[::-1]
    assert w[:found].sum() >= w.sum() - 1e-12 * np.abs(w).sum()
    assert found == 1 or w[: found - 1].sum() < w.sum()
    assert int(n_recon(-v)) == found
    assert int(n_recon(v.flip(-1) * 7)) == found


@pytest.mark.parametrize(
    ("v", "expected"),
    [
        ([5.0, 0.1, 0.1], 3),
        ([5.0, 1.0, -2.0], 1),
        ([-5.0, -1.0, 2.0], 1),
        ([1.0, 1.0, 1.0, 1.0], 4),
        ([3.0, 3.0, -2.0, -1.0], 1),
        ([3.0, 3.0, -2.0], 2),
        ([1.0, -1.0], 0),
        ([0.0, 0.0], 0),
        ([1.0, math.nan], -1),
    ],
)
def test_n_recon_of_known_vectors(v, expected):
    assert int(n_recon(torch.tensor(v))) == expected


@SETTINGS
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), share=st.floats(0.01, 1))
def test_n_recon_of_a_share_is_the_smallest_number_that_reaches_it(seed, n, share):
    v = randn(n, seed=seed)
    found = int(n_recon(v, share))
    w = np.sort(v.numpy() * (-1 if v.sum() < 0 else 1))[::-1]
    assert w[:found].sum() >= share * w.sum() - 1e-12 * np.abs(w).sum()
    assert found == 1 or w[: found - 1].sum() < share * w.sum()
    assert found <= int(n_recon(v))
    assert int(n_recon(-3 * v, share)) == found


def test_what_cancels_moves_the_count_of_the_whole_and_not_that_of_a_share():
    v = torch.tensor([2.0, 1.0, *(1e-9 * (-1) ** i for i in range(20))], dtype=torch.float64)
    v[2] += 1e-8
    assert int(n_recon(v)) > 2
    assert int(n_recon(v, 0.999)) == 2
    assert int(n_recon(v, 0.5)) == 1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01])
def test_a_share_out_of_range_is_an_input_error(share):
    with pytest.raises(InputError, match=r"recon_share=.*\(0, 1\]"):
        n_recon(torch.ones(3), share)
    with pytest.raises(InputError, match=r"recon_share=.*\(0, 1\]"):
        SparseAttention(share=share)


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_the_share_reaches_the_rotated_bases_too(share):
    R, n, n_draws = 12, 40, 4
    q, k, S = randn(n, R, seed=0), randn(n, R, seed=1), torch.ones(1, R, dtype=torch.float64)
    found = measure_sparsity(q, k, k, S, n_draws=n_draws, seed=3, share=share)
    A = haar_orthogonal(R, 2 * n_draws, seed=3)[:n_draws]
    assert torch.equal(found.n_recon, n_recon(q * k, share))
    assert torch.equal(found.n_recon_draws, torch.stack([n_recon((q @ a) * (k @ a), share) for a in A], -1))


# --- controls


@pytest.mark.parametrize("size", [1, 2, 16])
def test_haar_matrices_are_orthogonal_and_depend_on_the_seed_alone(size):
    A = haar_orthogonal(size, 5, seed=3)
    torch.testing.assert_close(A.mT @ A, torch.eye(size, dtype=torch.float64).expand(5, -1, -1))
    state = torch.get_rng_state()
    assert torch.equal(A, haar_orthogonal(size, 5, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    if size > 1:
        assert not torch.equal(A, haar_orthogonal(size, 5, seed=4))


def test_haar_matrices_have_no_preferred_direction():
    """Entries of a Haar matrix have mean 0 and variance 1/R; without the signs, the diagonal would be biased."""
    A = haar_orthogonal(4, 20_000, seed=0)
    assert A.mean(0).abs().max() < 0.02
    assert (A.square().mean(0) - 1 / 4).abs().max() < 0.01


@pytest.mark.parametrize("seed", [0, 7])
def test_controls_equal_the_dense_change_of_basis(seed):
    """U A and V B in place of U and V, for tokens in D dimensions; the shared rotation keeps every score."""
    D, R, n, n_draws = 9, 4, 5, 3
    U, V = (torch.linalg.qr(randn(2, D, R, seed=s)).Q for s in (0, 1))  # two heads
    S, r, s = randn(2, R, seed=2).abs(), randn(n, D, seed=3), randn(n, D, seed=4)
    direction = s @ V
    found = measure_sparsity(r @ U, S[:, None] * direction, direction, S[:, None], n_draws=n_draws, seed=seed)
    Omega = U @ torch.diag_embed(S) @ V.mT
    torch.testing.assert_close(found.score, torch.einsum("nd,hde,ne->hn", r, Omega, s))
    torch.testing.assert_close(found.sparseness, sparseness((r @ U) * S[:, None] * (s @ V)))
    A, B = haar_orthogonal(R, 2 * n_draws, seed=seed).chunk(2)
    for draw in range(n_draws):
        left = r @ (U @ A[draw])
        shared = left * (s @ (V @ torch.diag_embed(S) @ A[draw]))
        torch.testing.assert_close(shared.sum(-1), found.score)
        torch.testing.assert_close(found.shared[..., draw], sparseness(shared))
        independent = left * S[:, None] * (s @ (V @ B[draw]))
        torch.testing.assert_close(found.independent[..., draw], sparseness(independent))
        assert not torch.allclose(independent.sum(-1), found.score)
    generator = keyed_generator(seed, 1)
    for draw in range(n_draws):
        order = torch.randperm(R, generator=generator)
        Omega_of_others = torch.stack([U[h] * S[h] @ V[h][:, order].T for h in range(2)])
        permuted = (r @ U) * S[:, None] * (s @ V[..., order])
        torch.testing.assert_close(permuted.sum(-1), torch.einsum("nd,hde,ne->hn", r, Omega_of_others, s))
        torch.testing.assert_close(found.permuted[..., draw], sparseness(permuted))


def test_n_recon_of_rotated_bases_is_that_of_the_dense_change_of_basis():
    R, n, n_draws = 12, 40, 4
    q, k, S = randn(n, R, seed=0), randn(n, R, seed=1), torch.ones(1, R, dtype=torch.float64)
    found = measure_sparsity(q, k, k, S, n_draws=n_draws, seed=3)
    A = haar_orthogonal(R, 2 * n_draws, seed=3)[:n_draws]
    counts = torch.stack([n_recon((q @ a) * (k @ a)) for a in A], -1).double()
    torch.testing.assert_close(found.n_recon_shared, counts.mean(-1))
    torch.testing.assert_close(found.few_shared, (counts <= 4).double().mean(-1))


def test_controls_of_a_single_contributor_are_not_sparse():
    R, n = 32, 2
    axis = torch.zeros(n, R, dtype=torch.float64)
    axis[:, 5] = 1
    found = measure_sparsity(axis, axis, axis, torch.ones(1, R, dtype=torch.float64), n_draws=500)
    torch.testing.assert_close(found.sparseness, torch.full((n,), 1 / R, dtype=torch.float64))
    assert (found.top_index == 5).all()
    # squares of the entries of a random unit vector (1/3 for large R), and products of two independent ones
    assert abs(found.shared.mean() - (R + 2) / (3 * R)) < 0.04
    assert abs(found.independent.mean() - (2 / math.pi) ** 2) < 0.04


def test_the_top_contributor_is_the_largest_in_the_direction_of_the_sum():
    v = torch.tensor([[3.0, -1, 0], [1, -5, 2], [-2, -3, 4.9], [math.nan, 1, 1]])
    assert top_contributor(v).tolist() == [0, 1, 1, -1]


# --- accumulation over batches of prompts


def pairs(n: int, *, heads: int = 3, R: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    names = ("query", "key", "direction", "S")
    return {name: randn(heads, n, R, seed=seed + i) for i, name in enumerate(names)} | {
        "attention": randn(heads, n, seed=seed + 9).sigmoid()
    }


def test_batches_accumulate_to_what_one_batch_gives():
    whole = pairs(11)
    parts, once = SparseAttention(4), SparseAttention(4)
    once.update(**whole)
    for cut in (slice(0, 4), slice(4, 5), slice(5, 11)):
        parts.update(**{name: value[:, cut] for name, value in whole.items()})
    for name, one, many in zip(once.compute()._fields, once.compute(), parts.compute(), strict=True):
        torch.testing.assert_close(one, many, msg=name)
    assert once.compute().n_recon.shape == (3, 11)
    assert once.compute().shared_draws.shape == (3, 4)


def test_the_metric_forgets_on_reset_and_does_not_touch_the_global_generator():
    metric = SparseAttention()
    state = torch.get_rng_state()
    metric.update(**pairs(5))
    metric.reset()
    metric.update(**pairs(2, seed=20))
    assert metric.compute().sparseness.shape == (3, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_no_pairs_and_no_draws_are_input_errors():
    with pytest.raises(InputError, match="no pairs"):
        SparseAttention().compute()
    with pytest.raises(InputError, match="n_draws"):
        SparseAttention(0)
