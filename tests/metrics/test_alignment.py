"""Alignment of singular vectors with features: NumPy, brute force and the freedoms that must not matter."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import (
    align_pairs,
    cosine_matrix,
    line_through,
    logit_fidelity,
    match_pairs,
    share_served,
    signed_cosine_matrix,
    spearman,
)

D, N, R, P = 17, 11, 7, 5  # model dimension, features, singular pairs, target pairs
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SETTINGS = settings(deadline=None, max_examples=30, derandomize=True)
SEEDS = st.integers(0, 2**32)
# Leading dimensions, and how many of the first one to compute at once. No chunk is one single matrix, and none starts
# off a 32-byte boundary: there the CPU kernels (MKL) take another path, and the last bits differ.
CHUNKS = pytest.mark.parametrize(
    ("batch", "chunk"), [((128, 8), 1), ((128, 8), 7), ((128, 8), 64), ((128,), 16), ((128,), 64)], ids=str
)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
SCORES = ("left", "right", "sigma", "subspace_left", "subspace_right")


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n_rows, n_columns, *, seed, dtype=torch.float64):
    return torch.linalg.qr(randn(n_rows, n_columns, seed=seed)).Q.to(dtype)


def random_case(seed, dtype=torch.float64, n_singular=R, n_pairs=P):
    """Query and key feature of each pair, and a singular basis with gaps on both sides of 10 %."""
    S = torch.tensor([3.0, 2.9, 2.0, 1.5, 1.45, 1.4, 0.3], dtype=dtype)[:n_singular]
    return (
        randn(D, n_pairs, seed=seed, dtype=dtype),
        randn(D, n_pairs, seed=seed + 1, dtype=dtype),
        orthonormal(D, n_singular, seed=seed + 2, dtype=dtype),
        S,
        orthonormal(D, n_singular, seed=seed + 3, dtype=dtype),
    )


def aligned(query, key, U, S, V, **kwargs):
    return align_pairs(cosine_matrix(query, U), cosine_matrix(key, V), S, **kwargs)


# --- cosines


@DTYPES
@SETTINGS
@given(seed=SEEDS, n_batch=st.integers(0, 3))
def test_cosine_matrix_equals_numpy(dtype, seed, n_batch):
    w, u = randn(n_batch, D, N, seed=seed, dtype=dtype), randn(n_batch, D, R, seed=seed + 1, dtype=dtype)
    got = cosine_matrix(w, u)
    assert got.shape == (n_batch, N, R)
    assert got.dtype == dtype
    a, b = w.double().numpy(), u.double().numpy()
    lengths = np.linalg.norm(a, axis=-2)[..., :, None] * np.linalg.norm(b, axis=-2)[..., None, :]
    np.testing.assert_allclose(
        got.double().numpy(), np.abs(np.swapaxes(a, -1, -2) @ b) / lengths, rtol=0, atol=TOLERANCE[dtype]
    )
    assert ((got >= 0) & (got <= 1 + TOLERANCE[dtype])).all()


@DTYPES
def test_feature_that_is_a_singular_vector_has_cosine_one_whatever_its_length_and_sign(dtype):
    u = orthonormal(D, R, seed=0, dtype=dtype)
    w = u * torch.tensor([1, -1, 1e-9, -1e9, 3, 0.1, 7], dtype=dtype)
    torch.testing.assert_close(cosine_matrix(w, u), torch.eye(R, dtype=dtype), rtol=0, atol=TOLERANCE[dtype])


@DTYPES
def test_zero_feature_column_has_cosine_zero(dtype):
    w, u = randn(D, N, seed=0, dtype=dtype), randn(D, R, seed=1, dtype=dtype)
    w[:, 3], u[:, 2] = 0, 0
    got = cosine_matrix(w, u)
    assert not got[3].any()
    assert not got[:, 2].any()
    rest = got[torch.arange(N) != 3][:, torch.arange(R) != 2]
    assert (rest > 0).all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_cosine_does_not_depend_on_the_length_of_the_feature_at_the_ends_of_float32(scale):
    w, u = randn(D, N, seed=0, dtype=torch.float32), orthonormal(D, R, seed=1, dtype=torch.float32)
    torch.testing.assert_close(cosine_matrix(w * scale, u), cosine_matrix(w, u))


@pytest.mark.parametrize("seed", range(5))
def test_no_cosine_exceeds_one_by_rounding(seed):
    w = randn(D, 500, seed=seed, dtype=torch.float32)
    assert cosine_matrix(w, w).max() <= 1


def test_nan_feature_gives_nan_cosines_and_leaves_the_others_alone():
    w, u = randn(D, N, seed=0, dtype=torch.float32), randn(D, R, seed=1, dtype=torch.float32)
    clean = cosine_matrix(w, u)
    w[0, 3] = torch.nan
    got = cosine_matrix(w, u)
    assert got[3].isnan().all()
    others = torch.arange(N) != 3
    assert torch.equal(got[others], clean[others])


@pytest.mark.wrong_shapes
def test_features_and_vectors_of_different_spaces_are_an_input_error_that_names_the_shape():
    with pytest.raises(InputError, match=r"vectors\.shape=\(2, 13, 7\).*\[\.\.\., 17, R\]"):
        cosine_matrix(torch.zeros(2, 17, 11), torch.zeros(2, 13, 7))


# --- freedoms of an SVD


@DTYPES
@SETTINGS
@given(seed=SEEDS)
def test_signs_of_singular_vectors_and_features_do_not_matter(dtype, seed):
    query, key, U, S, V = random_case(seed, dtype)
    flips = [(randn(1, n, seed=seed + i, dtype=dtype) >= 0).to(dtype) * 2 - 1 for i, n in enumerate((P, P, R, R), 4)]
    plain = aligned(query, key, U, S, V)
    flipped = aligned(query * flips[0], key * flips[1], U * flips[2], S, V * flips[3])
    for a, b in zip(plain, flipped, strict=True):
        assert torch.equal(a, b)


@DTYPES
@SETTINGS
@given(seed=SEEDS, permutation=st.permutations(range(R)), n_pairs=st.sampled_from([1, 3, 5, 7, 11]))
def test_order_of_the_singular_pairs_does_not_matter(dtype, seed, permutation, n_pairs):
    query, key, U, S, V = random_case(seed, dtype, n_pairs=n_pairs)
    plain = aligned(query, key, U, S, V)
    order = torch.tensor(permutation)
    permuted = aligned(query, key, U[:, order], S[order], V[:, order])
    for name in SCORES:
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name), rtol=0, atol=TOLERANCE[dtype])
    found = plain.index >= 0
    assert torch.equal(permuted.index >= 0, found)
    assert torch.equal(order[permuted.index[found]], plain.index[found])


@DTYPES
@SETTINGS
@given(seed=SEEDS)
def test_order_of_the_target_pairs_does_not_matter(dtype, seed):
    query, key, U, S, V = random_case(seed, dtype)
    order = torch.tensor([3, 0, 4, 2, 1])
    plain, permuted = aligned(query, key, U, S, V), aligned(query[:, order], key[:, order], U, S, V)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(b, a[order], rtol=0, atol=TOLERANCE[dtype])


# --- matching


def best_total(gain):
    """Largest sum over all one-to-one assignments, by trying each."""
    n_pairs, n_singular = gain.shape
    if n_pairs > n_singular:
        return best_total(gain.T)
    return max(
        sum(gain[i, k] for i, k in enumerate(choice)) for choice in itertools.permutations(range(n_singular), n_pairs)
    )


@DTYPES
@SETTINGS
@given(
    seed=SEEDS, n_pairs=st.integers(1, 5), n_singular=st.integers(1, 5), ties=st.booleans(), n_batch=st.integers(1, 3)
)
def test_matching_is_the_best_one_to_one_assignment(dtype, seed, n_pairs, n_singular, ties, n_batch):
    left, right = torch.rand(2, n_batch, n_pairs, n_singular, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if ties:
        left, right = (left * 2).round() / 2, (right * 2).round() / 2
    index = match_pairs(left, right)
    assert index.shape == (n_batch, n_pairs)
    for a, b, matched in zip(left, right, index, strict=True):
        gain = (a * b).double().numpy()
        used = [(i, k) for i, k in enumerate(matched.tolist()) if k >= 0]
        assert len({k for _, k in used}) == len(used) == min(n_pairs, n_singular)
        assert matched.tolist().count(-1) == max(n_pairs - n_singular, 0)
        assert sum(gain[i, k] for i, k in used) == pytest.approx(best_total(gain), abs=1e-6)


def test_matching_gives_up_the_greedy_choice_where_the_sum_is_larger():
    left = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
    assert match_pairs(left, torch.ones(2, 2)).tolist() == [1, 0]


def test_matching_uses_both_sides():
    left = torch.tensor([[0.9, 0.6, 0.0]])
    right = torch.tensor([[0.1, 0.6, 1.0]])
    assert match_pairs(left, right).tolist() == [1]
    two = [x.repeat(2, 1) for x in (left, right)]
    assert sorted(match_pairs(*two).tolist()) == [0, 1]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("n_pairs", [1, 3, 11])
def test_matching_of_a_batch_is_the_matching_of_each_slice(batch, n_pairs):
    left, right = torch.rand(2, *batch, n_pairs, R, generator=torch.Generator().manual_seed(0))
    index = match_pairs(left, right)
    assert index.shape == (*batch, n_pairs)
    for at in np.ndindex(*batch):
        assert torch.equal(index[at], match_pairs(left[at], right[at]))


@pytest.mark.parametrize("n_pairs", [3, 7, 11])
def test_unmatched_pairs_score_zero(n_pairs):
    got = aligned(*random_case(0, n_pairs=n_pairs, n_singular=3))
    unmatched = got.index < 0
    assert unmatched.sum() == n_pairs - 3
    for name in SCORES:
        assert not getattr(got, name)[unmatched].any()
        assert (getattr(got, name)[~unmatched] > 0).all()


@DTYPES
@SETTINGS
@given(seed=SEEDS)
def test_scores_are_those_of_the_matched_singular_pair(dtype, seed):
    query, key, U, S, V = random_case(seed, dtype)
    got = aligned(query, key, U, S, V)
    for p, k in enumerate(got.index.tolist()):
        cosines = [
            abs(torch.nn.functional.cosine_similarity(a[:, p], b[:, k], dim=0).item())
            for a, b in ((query, U), (key, V))
        ]
        assert [got.left[p].item(), got.right[p].item()] == pytest.approx(cosines, abs=TOLERANCE[dtype])
        assert got.sigma[p].item() == S[k].item()


def test_features_that_are_the_singular_vectors_are_matched_to_them_with_score_one():
    U, V = orthonormal(D, R, seed=0), orthonormal(D, R, seed=1)
    order = torch.tensor([4, 0, 6, 2, 5])
    S = torch.linspace(5, 1, R, dtype=torch.float64)
    got = aligned(3 * U[:, order], -V[:, order], U, S, V)
    assert torch.equal(got.index, order)
    assert torch.equal(got.sigma, S[order])
    for name in ("left", "right", "subspace_left", "subspace_right"):
        torch.testing.assert_close(getattr(got, name), torch.ones(P, dtype=torch.float64))


# --- subspace scores


@DTYPES
@SETTINGS
@given(seed=SEEDS)
def test_subspace_score_is_the_norm_of_the_projection_and_blind_to_rotations_inside_the_block(dtype, seed):
    """Two pairs whose features lie (up to 5 %) in a block of three equal singular values."""
    S = torch.tensor([3.0, 2.0, 2.0, 2.0, 0.5], dtype=torch.float64)
    block = slice(1, 4)
    U, V = orthonormal(D, 5, seed=seed), orthonormal(D, 5, seed=seed + 1)
    inside = orthonormal(3, 2, seed=seed + 2)  # the same coordinates on both sides, as a real head has them
    noise = [orthonormal(D, 2, seed=seed + 3 + i) * 0.05 for i in range(2)]
    query, key = U[:, block] @ inside + noise[0], V[:, block] @ inside + noise[1]
    Q = orthonormal(3, 3, seed=seed + 5)
    rotated = [factor.clone() for factor in (U, V)]
    for factor in rotated:
        factor[:, block] = factor[:, block] @ Q

    got = [aligned(*(x.to(dtype) for x in (query, key, u, S, v))) for u, v in ((U, V), (rotated[0], rotated[1]))]
    for side, features, basis in (("subspace_left", query, U), ("subspace_right", key, V)):
        b = basis[:, block].numpy()
        x = features.numpy() / np.linalg.norm(features.numpy(), axis=0)
        solution = np.linalg.lstsq(b, x, rcond=None)[0]
        expected = np.linalg.norm(b @ solution, axis=0)
        for result in got:
            assert set(result.index.tolist()) <= {1, 2, 3}
            np.testing.assert_allclose(getattr(result, side).double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype])
            assert (result.sigma == 2).all()


@DTYPES
@SETTINGS
@given(seed=SEEDS, n_pairs=st.sampled_from([1, 5, 11]), relative_gap=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_subspace_score_lies_between_the_matched_score_and_one(dtype, seed, n_pairs, relative_gap):
    got = aligned(*random_case(seed, dtype, n_pairs=n_pairs), relative_gap=relative_gap)
    for matched, subspace in ((got.left, got.subspace_left), (got.right, got.subspace_right)):
        assert (subspace >= matched - TOLERANCE[dtype]).all()
        assert (subspace <= 1).all()
        assert (matched >= 0).all()


@pytest.mark.parametrize(("relative_gap", "members"), [(0.0, [1]), (0.1, [0, 1, 2]), (0.2, [0, 1, 2, 3])])
def test_block_holds_the_values_within_the_relative_gap_of_the_matched_one(relative_gap, members):
    S = torch.tensor([10.5, 10.0, 9.5, 8.5, 5.0])
    left = torch.tensor([[0.1, 0.8, 0.2, 0.3, 0.4]])
    right = torch.tensor([[0.2, 0.7, 0.3, 0.4, 0.1]])
    got = align_pairs(left, right, S, relative_gap=relative_gap)
    assert got.index.tolist() == [1]
    assert got.subspace_left.item() == pytest.approx(left[0, members].norm().item())
    assert got.subspace_right.item() == pytest.approx(right[0, members].norm().item())


@DTYPES
def test_subspace_of_all_singular_vectors_holds_every_feature_and_scores_no_more_than_one(dtype):
    query, key = randn(2, D, 997, seed=0, dtype=dtype)
    U, V = orthonormal(D, D, seed=1, dtype=dtype), orthonormal(D, D, seed=2, dtype=dtype)
    left, right = cosine_matrix(query, U)[:, None], cosine_matrix(key, V)[:, None]  # each feature a target of its own
    got = align_pairs(left, right, torch.ones(997, D, dtype=dtype))
    for score in (got.subspace_left, got.subspace_right):
        torch.testing.assert_close(score, torch.ones(997, 1, dtype=dtype), rtol=0, atol=TOLERANCE[dtype])
        assert (score <= 1).all()


# --- NaN


def test_nan_head_gives_nan_scores_and_leaves_the_other_heads_alone():
    cases = [random_case(seed, torch.float32) for seed in (0, 10, 20)]
    parts = [torch.stack(x) for x in zip(*cases, strict=True)]
    clean = aligned(*parts)
    for part in parts[2:]:
        part[1] = torch.nan  # U, S and V, as AttentionHeads.svd gives them for a broken head
    got = aligned(*parts)
    for name in SCORES:
        assert getattr(got, name)[1].isnan().all(), name
        assert torch.equal(getattr(got, name)[[0, 2]], getattr(clean, name)[[0, 2]])


@pytest.mark.parametrize("n_pairs", [1, 5, 7])
def test_nan_feature_gives_a_nan_score_and_leaves_the_other_pairs_alone(n_pairs):
    query, key, U, S, V = random_case(0, n_pairs=n_pairs)
    others = torch.arange(n_pairs) != n_pairs // 2
    query[0, ~others] = torch.nan
    got = aligned(query, key, U, S, V)
    assert (got.index[~others] == -1).all()
    for name in SCORES:
        assert getattr(got, name)[~others].isnan().all(), name
    if n_pairs > 1:
        alone = aligned(query[:, others], key[:, others], U, S, V)
        for name in ("index", *SCORES):
            torch.testing.assert_close(getattr(got, name)[others], getattr(alone, name))


# --- logits


def paired(query, key, U, S, V, **kwargs):
    return align_pairs(signed_cosine_matrix(query, U), signed_cosine_matrix(key, V), S, **kwargs).paired


E = torch.eye(8, dtype=torch.float64)


def head_of(*parts):
    """Singular vectors of the head that adds up size * e_i e_j^T over its parts (size, i, j)."""
    return torch.linalg.svd(sum(size * torch.outer(E[i], E[j]) for size, i, j in parts))


@pytest.mark.parametrize(("parts", "pairs", "expected"), [
    ([(5, 0, 5), (5, 1, 6)], [(0, 5), (1, 6)], [1, 1]),
    ([(5, 0, 6), (5, 1, 5)], [(0, 5), (1, 6)], [0, 0]),  # inside one block, but each with the partner of the other
    ([(-5, 0, 5)], [(0, 5)], [-1]),  # attention is taken off
    ([(5, 0, 5), (-5, 1, 6)], [(0, 5), (1, 6)], [1, -1]),
    ([(5, 0, 5), (3, 1, 6)], [(0, 6), (1, 5)], [0, 0]),
])  # fmt: skip
def test_the_paired_score_knows_the_partner_and_the_sign(parts, pairs, expected):
    U, S, Vh = head_of(*parts)
    rank = len(parts)
    query, key = E[:, [i for i, _ in pairs]], E[:, [j for _, j in pairs]]
    found = paired(query, key, U[:, :rank], S[:rank], Vh.mT[:, :rank])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@SETTINGS
@given(SEEDS)
def test_the_paired_score_does_not_depend_on_a_rotation_inside_a_block_nor_on_signs(seed):
    query, key, U, _, V = random_case(seed)
    S = torch.ones(R, dtype=torch.float64)  # one block
    A = orthonormal(R, R, seed=seed + 9)
    flip = torch.where(randn(R, seed=seed + 5) > 0, 1.0, -1.0)
    expected = paired(query, key, U, S, V)
    torch.testing.assert_close(paired(query, key, U @ A, S, V @ A), expected)
    torch.testing.assert_close(paired(query, key, U * flip, S, V * flip), expected)
    unit_query, unit_key = query / query.norm(dim=0), key / key.norm(dim=0)
    torch.testing.assert_close(expected, (unit_query * (U @ V.mT @ unit_key)).sum(0))


@SETTINGS
@given(SEEDS)
def test_other_scores_do_not_depend_on_the_signs_of_the_cosines(seed):
    query, key, U, S, V = random_case(seed)
    signed = align_pairs(signed_cosine_matrix(query, U), signed_cosine_matrix(key, V), S)
    absolute = aligned(query, key, U, S, V)
    for name in ("index", *SCORES):
        torch.testing.assert_close(getattr(signed, name), getattr(absolute, name))
    assert (signed.paired.abs() <= 1 + 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_line_through_points_is_numpys(seed):
    x, y = randn(2, 6, seed=seed), randn(2, 6, seed=seed + 9)
    slope, intercept = line_through(x, y)
    for i in range(2):
        np.testing.assert_allclose((slope[i], intercept[i]), np.polyfit(x[i], y[i], 1))
    assert line_through(torch.ones(3), torch.arange(3.0))[0].isnan()


def test_a_pair_is_served_from_half_of_its_target_on_whatever_the_sign():
    target = torch.tensor([4.0, 4.0, -4.0, -4.0, 0.0])
    logit = torch.tensor([2.0, 1.9, -3.0, 3.0, 9.0])
    assert share_served(logit, target).item() == 0.5  # of the four that have a target
    assert share_served(torch.ones(3), torch.zeros(3)).isnan()


@DTYPES
@SETTINGS
@given(seed=SEEDS)
def test_logit_fidelity_is_one_for_the_exact_head_and_zero_for_one_that_does_nothing(dtype, seed):
    target = randn(3, P, seed=seed, dtype=dtype)
    assert torch.equal(logit_fidelity(target, target), torch.ones(3, dtype=dtype))
    assert torch.equal(logit_fidelity(torch.zeros_like(target), target), torch.zeros(3, dtype=dtype))
    torch.testing.assert_close(logit_fidelity(-target, target), -torch.ones(3, dtype=dtype))
    torch.testing.assert_close(logit_fidelity(0.75 * target, target), torch.full((3,), 0.75, dtype=dtype))


def test_logit_fidelity_equals_numpy():
    effective, target = randn(2, 3, P, seed=0), randn(2, 3, P, seed=1)
    expected = 1 - np.abs((effective - target).numpy()).mean(-1) / np.abs(target.numpy()).mean(-1)
    np.testing.assert_allclose(logit_fidelity(effective, target).numpy(), expected, rtol=1e-12)
    assert (logit_fidelity(effective, target) <= 1).all()


@pytest.mark.parametrize("broken", [0, 1])
def test_logit_fidelity_of_nan_is_nan(broken):
    pair = [randn(3, P, seed=0), randn(3, P, seed=1)]
    pair[broken][1, 2] = torch.nan
    assert logit_fidelity(*pair).isnan().tolist() == [False, True, False]


# --- rank correlation


@DTYPES
@SETTINGS
@given(
    pairs=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=13),
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_spearman_equals_scipy_including_ties(dtype, pairs):
    x, y = torch.tensor(pairs, dtype=dtype).unbind(-1)
    got = spearman(x, y)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-6, nan_ok=True)
    assert got.isnan() or abs(got) <= 1


def test_spearman_of_a_constant_is_nan():
    x, y = torch.full((P,), 0.3), torch.arange(P).float()
    assert spearman(x, y).isnan()
    assert spearman(y, x).isnan()
    assert spearman(x, x).isnan()


@SETTINGS
@given(seed=SEEDS)
def test_spearman_sees_the_order_only(seed):
    x, y = randn(2, 3, 13, seed=seed)
    plain = spearman(x, y)
    assert plain.shape == (3,)
    torch.testing.assert_close(spearman(x.exp(), y**3), plain)
    torch.testing.assert_close(spearman(-x, y), -plain)
    torch.testing.assert_close(spearman(x, x), torch.ones(3, dtype=torch.float64))
    for row in range(3):
        assert plain[row].item() == pytest.approx(scipy.stats.spearmanr(x[row], y[row]).statistic, abs=1e-12)


@pytest.mark.parametrize("broken", [0, 1])
def test_spearman_of_nan_is_nan(broken):
    pair = [randn(3, 13, seed=0), randn(3, 13, seed=1)]
    pair[broken][1, 2] = torch.nan
    assert spearman(*pair).isnan().tolist() == [False, True, False]


# --- batches and devices


@CHUNKS
@pytest.mark.parametrize("shape", [(10, 20, 5), (20, 10, 10), (13, 31, 7)], ids=str)
def test_cosine_matrix_of_a_batch_is_bit_identical_to_that_of_its_slices(shape, chunk, batch):
    n_model, n_features, n_singular = shape
    w = randn(*batch, n_model, n_features, seed=0, dtype=torch.float32)
    u = randn(*batch, n_model, n_singular, seed=1, dtype=torch.float32)
    slices = [cosine_matrix(*parts) for parts in zip(w.split(chunk), u.split(chunk), strict=True)]
    assert torch.equal(torch.cat(slices), cosine_matrix(w, u))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("n_pairs", [1, 5])
def test_alignment_of_a_batch_is_bit_identical_to_that_of_its_slices(n_pairs, chunk):
    left, right = torch.rand(2, 128, 2, n_pairs, R, generator=torch.Generator().manual_seed(0))
    S = torch.rand(128, 2, R, generator=torch.Generator().manual_seed(1)).sort(-1, descending=True).values
    slices = [align_pairs(*parts) for parts in zip(*(x.split(chunk) for x in (left, right, S)), strict=True)]
    for expected, *got in zip(align_pairs(left, right, S), *slices, strict=True):
        assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_pairs", [1, 5, 11])
def test_alignment_stays_on_its_device_and_agrees_with_the_cpu(n_pairs, device):
    case = random_case(0, n_pairs=n_pairs)
    got = aligned(*(x.float().to(device) for x in case))
    for part, expected in zip(got, aligned(*case), strict=True):
        assert part.device.type == device
        torch.testing.assert_close(part.cpu().double(), expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_logit_measures_stay_on_their_device_and_agree_with_the_cpu(device):
    x, y = randn(2, 3, 13, seed=0, dtype=torch.float32)
    for measure in (logit_fidelity, spearman):
        got = measure(x.to(device), y.to(device))
        assert got.device.type == device
        torch.testing.assert_close(got.cpu(), measure(x, y))
