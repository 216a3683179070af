"""Geometry of features against explicit loops, closed forms and NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import (
    attended_vs_rest,
    degrees_from_orthogonal,
    feature_dimensionality,
    gram,
    interference,
    share_in_span,
    unit_features,
)

SHAPES = [(13, 5), (7, 7), (3, 11)]  # (D, N): N < D, N = D, N > D
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SETTINGS = settings(deadline=None, max_examples=30, derandomize=True)
# Leading dimensions, and how many of the first one to compute at once. No chunk is one single matrix, and none starts
# off a 32-byte boundary: there the CPU kernels (MKL) take another path, and the last bits differ.
CHUNKS = pytest.mark.parametrize(
    ("batch", "chunk"), [((128, 8), 1), ((128, 8), 7), ((128, 8), 64), ((128,), 16), ((128,), 64)], ids=str
)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def random_features(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.rand(*shape[:-2], 1, shape[-1], generator=g, dtype=torch.float64) + 0.1
    return (torch.randn(shape, generator=g, dtype=torch.float64) * lengths).to(dtype)


def orthonormal(n_model, n_features, dtype=torch.float64):
    return torch.linalg.qr(random_features(n_model, n_features)).Q.to(dtype)


def numpy_unit(features):
    """Unit columns in float64; a zero column stays zero."""
    x = features.cpu().double().numpy()
    length = np.linalg.norm(x, axis=-2, keepdims=True)
    return x / np.where(length == 0, 1, length)


def loop_attended_vs_rest(cosines, attended):
    between, inside = [], []
    for i in range(len(attended)):
        for j in range(len(attended)):
            if attended[i] and not attended[j]:
                between.append(abs(cosines[i, j]))
            if not attended[i] and not attended[j] and i != j:
                inside.append(abs(cosines[i, j]))
    return (np.mean(values) if values else np.nan for values in (between, inside))


def loop_dimensionality(features):
    w, x = features.cpu().double().numpy(), numpy_unit(features)
    result = []
    for i in range(w.shape[1]):
        overlap = sum(float(x[:, i] @ w[:, j]) ** 2 for j in range(w.shape[1]))
        result.append(float(w[:, i] @ w[:, i]) / overlap if overlap else 0.0)
    return np.array(result)


def norm_of_off_diagonal(features):
    x = numpy_unit(features)
    return np.linalg.norm(x.T @ x - np.eye(x.shape[1]), 2)


# --- unit columns and cosines


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_holds_the_signed_cosines(shape, dtype):
    w = random_features(2, *shape, dtype=dtype)
    got = gram(w)
    assert got.dtype == dtype
    x = numpy_unit(w)
    np.testing.assert_allclose(got.double().numpy(), np.swapaxes(x, -1, -2) @ x, rtol=0, atol=TOLERANCE[dtype])
    assert (got < -0.1).any()  # signed


@DTYPES
def test_zero_column_has_no_direction_and_stays_zero(dtype):
    w = random_features(7, 5, dtype=dtype)
    w[:, 2] = 0
    assert not unit_features(w)[:, 2].any()
    assert not gram(w)[2].any()
    assert not gram(w)[:, 2].any()
    torch.testing.assert_close(gram(w).diagonal(), torch.tensor([1.0, 1, 0, 1, 1], dtype=dtype))


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), exponents=st.lists(st.integers(-12, 12), min_size=5, max_size=5))
def test_cosines_do_not_depend_on_the_lengths_of_the_features(dtype, seed, exponents):
    w = random_features(7, 5, dtype=dtype, seed=seed)
    scales = torch.tensor([10.0**e for e in exponents], dtype=dtype)
    torch.testing.assert_close(gram(w * scales), gram(w), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-25), (torch.float64, 1e-170)], ids=str)
def test_feature_whose_square_underflows_has_no_cosine_above_one(dtype, scale):
    w = random_features(7, 5, dtype=dtype)
    w[:, 2] *= scale
    assert (gram(w).abs() <= 1 + TOLERANCE[dtype]).all()
    assert (feature_dimensionality(w) <= 1 + 10 * TOLERANCE[dtype]).all()
    assert interference(w) <= 4 + 10 * TOLERANCE[dtype]  # N - 1


# --- attended against the rest


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), attended=st.lists(st.booleans(), min_size=1, max_size=9))
def test_attended_vs_rest_equals_the_double_loop(dtype, seed, attended):
    cosines = gram(random_features(5, len(attended), dtype=dtype, seed=seed))
    got = attended_vs_rest(cosines, torch.tensor(attended))
    for value, expected in zip(got, loop_attended_vs_rest(cosines.double().numpy(), attended), strict=True):
        assert value.dtype == dtype
        assert value.item() == pytest.approx(expected, abs=10 * TOLERANCE[dtype], nan_ok=True)


def test_attended_vs_rest_of_a_hand_made_gram():
    cosines = torch.tensor([[1.0, 0.5, -0.1, 0.3], [0.5, 1, 0.2, -0.4], [-0.1, 0.2, 1, -0.6], [0.3, -0.4, -0.6, 1]])
    between, inside = attended_vs_rest(cosines, torch.tensor([True, True, False, False]))
    assert between.item() == pytest.approx((0.1 + 0.3 + 0.2 + 0.4) / 4)
    assert inside.item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("attended", "between_is_nan", "inside_is_nan"),
    [([True] * 3, True, True), ([False] * 3, True, False), ([True, True, False], False, True)],
)
def test_mean_over_an_empty_set_is_nan(attended, between_is_nan, inside_is_nan):
    between, inside = attended_vs_rest(gram(random_features(2, 5, 3)), torch.tensor(attended))
    assert between.isnan().tolist() == [between_is_nan] * 2
    assert inside.isnan().tolist() == [inside_is_nan] * 2


@DTYPES
@pytest.mark.parametrize("n_features", [5, 31, 97])
def test_orthonormal_features_do_not_overlap_at_all(n_features, dtype):
    got = attended_vs_rest(torch.eye(n_features, dtype=dtype), torch.arange(n_features) < 2)
    assert [value.item() for value in got] == [0.0, 0.0]


@DTYPES
def test_mean_cosine_of_the_rest_is_never_negative(dtype):
    w = torch.stack([torch.linalg.qr(random_features(97, 97, seed=seed)).Q for seed in range(7)]).to(dtype)
    between, inside = attended_vs_rest(gram(w), torch.arange(97) < 2)
    assert (between >= 0).all()
    assert (inside >= 0).all()


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("shape", [(4,), (6,), (1, 5), ()], ids=str)
def test_mask_of_the_wrong_length_is_an_input_error_that_names_the_shape(shape):
    with pytest.raises(InputError) as error:
        attended_vs_rest(torch.eye(5), torch.ones(shape, dtype=torch.bool))
    assert f"attended.shape={shape}" in str(error.value)
    assert "(5,)" in str(error.value)


# --- feature dimensionality


@DTYPES
@SETTINGS
@given(
    seed=st.integers(0, 2**32),
    n_model=st.sampled_from([1, 3, 7]),
    n_features=st.sampled_from([1, 2, 5, 11]),
    dead=st.booleans(),
)
def test_dimensionality_equals_the_explicit_loops(dtype, seed, n_model, n_features, dead):
    w = random_features(n_model, n_features, dtype=dtype, seed=seed)
    if dead:
        w[:, 0] = 0
    got = feature_dimensionality(w)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), loop_dimensionality(w), rtol=0, atol=10 * TOLERANCE[dtype])
    assert ((got >= 0) & (got <= 1 + 10 * TOLERANCE[dtype])).all()
    # the dimensions that the features use add up to the rank at most
    assert got.sum() <= min(n_model, n_features) + 20 * TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_dimensionality_does_not_depend_on_the_common_length_at_the_ends_of_float32(scale):
    w = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(feature_dimensionality(w * scale), feature_dimensionality(w))


@DTYPES
def test_orthonormal_features_have_one_dimension_each(dtype):
    got = feature_dimensionality(orthonormal(13, 5, dtype) * torch.tensor([1.0, 2, 3, 0.5, 0.1], dtype=dtype))
    torch.testing.assert_close(got, torch.ones(5, dtype=dtype))


@DTYPES
def test_antipodal_pairs_have_half_a_dimension_each(dtype):
    x = orthonormal(7, 3, dtype)
    torch.testing.assert_close(feature_dimensionality(torch.cat([x, -x], -1)), torch.full((6,), 0.5, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("n_copies", [2, 5, 11])
def test_copies_share_one_dimension(n_copies, dtype):
    w = random_features(7, 1, dtype=dtype).expand(-1, n_copies)
    torch.testing.assert_close(feature_dimensionality(w), torch.full((n_copies,), 1 / n_copies, dtype=dtype))


@DTYPES
def test_zero_column_has_dimensionality_zero_and_takes_none_from_the_others(dtype):
    w = torch.cat([orthonormal(7, 3, dtype), torch.zeros(7, 2, dtype=dtype)], -1)
    torch.testing.assert_close(feature_dimensionality(w), torch.tensor([1.0, 1, 1, 0, 0], dtype=dtype))
    assert not feature_dimensionality(torch.zeros(7, 3, dtype=dtype)).any()


@DTYPES
def test_precomputed_cosines_give_the_same_dimensionality(dtype):
    w = random_features(2, 3, 5, 11, dtype=dtype)
    assert torch.equal(feature_dimensionality(w, gram(w)), feature_dimensionality(w))
    # and they are used: identity cosines make every feature orthogonal
    eye = torch.eye(11, dtype=dtype).expand(2, 3, 11, 11)
    torch.testing.assert_close(feature_dimensionality(w, eye), torch.ones(2, 3, 11, dtype=dtype))


# --- interference


@DTYPES
@SETTINGS
@given(
    seed=st.integers(0, 2**32),
    n_model=st.sampled_from([1, 3, 5, 7]),
    n_features=st.sampled_from([1, 2, 3, 5, 7, 11]),
    dead=st.booleans(),
)
def test_interference_is_the_spectral_norm_of_the_off_diagonal_cosines(dtype, seed, n_model, n_features, dead):
    w = random_features(n_model, n_features, dtype=dtype, seed=seed)
    if dead:
        w[:, 0] = 0
    got = interference(w)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(norm_of_off_diagonal(w), abs=20 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("n_features", [5, 13])
def test_orthonormal_features_do_not_interfere(n_features, dtype):
    assert interference(orthonormal(13, n_features, dtype)).item() == pytest.approx(0, abs=10 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("n_copies", [2, 3, 7, 11])
def test_n_copies_of_a_direction_interfere_by_n_minus_one(n_copies, dtype):
    w = random_features(3, 1, dtype=dtype) * torch.linspace(0.5, 2, n_copies, dtype=dtype)
    assert interference(w).item() == pytest.approx(n_copies - 1, rel=20 * TOLERANCE[dtype])


def test_tight_frame_of_n_features_interferes_by_n_over_d_minus_one():
    x = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.mT
    for _ in range(2000):  # unit columns and X X^T = (N / D) I, alternating projections
        x = unit_features(torch.linalg.solve(torch.linalg.cholesky(x @ x.mT), x))
    torch.testing.assert_close(x @ x.mT, 4 * torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert interference(x).item() == pytest.approx(3, abs=1e-8)


# --- batches, NaN, devices

FUNCTIONS = {
    "gram": gram,
    "feature_dimensionality": feature_dimensionality,
    "interference": interference,
    "attended_vs_rest": lambda w: torch.stack(
        attended_vs_rest(gram(w), torch.arange(w.shape[-1], device=w.device) < 2), -1
    ),
}
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@EVERY_FUNCTION
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_equals_one_by_one(function, shape, dtype):
    w = random_features(2, 3, *shape, dtype=dtype)
    got = function(w)
    one_by_one = torch.stack([torch.stack([function(w[i, j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(got, one_by_one, rtol=0, atol=20 * TOLERANCE[dtype])


@EVERY_FUNCTION
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_broken_batch_element_is_nan_and_leaves_the_others_bit_identical(function, shape, value):
    w = random_features(3, *shape, dtype=torch.float32)
    clean = function(w)
    w[1, 0, 0] = value
    got = function(w)
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_is_not_a_score(shape):
    w = random_features(*shape, dtype=torch.float32)
    w[0, 0] = torch.nan
    assert gram(w)[0].isnan().all()
    assert gram(w)[:, 0].isnan().all()
    assert feature_dimensionality(w).isnan().all()
    assert interference(w).isnan()
    assert attended_vs_rest(gram(w), torch.arange(shape[1]) < 2)[0].isnan()


@EVERY_FUNCTION
@CHUNKS
@pytest.mark.parametrize("shape", [(10, 20), (20, 10), (13, 13)], ids=str)
def test_batch_is_bit_identical_to_its_slices(function, shape, chunk, batch):
    w = random_features(*batch, *shape, dtype=torch.float32)
    assert torch.equal(torch.cat([function(part) for part in w.split(chunk)]), function(w))


@EVERY_FUNCTION
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_stay_on_their_device_and_agree_with_the_cpu(function, shape, device):
    w = random_features(2, *shape, dtype=torch.float32)
    got = function(w.to(device))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu().double(), function(w.double()), rtol=0, atol=2e-5)


# --- in the span of others


@pytest.mark.parametrize(("n", "k"), [(5, 1), (7, 3), (4, 6)])
def test_the_share_in_a_span_is_the_length_of_the_least_squares_projection(n, k):
    rng = np.random.default_rng(n)
    vectors, span = rng.normal(size=(2, 9, n)), rng.normal(size=(2, 9, k))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    projected = np.stack([s @ np.linalg.lstsq(s, v, rcond=None)[0] for s, v in zip(span, unit, strict=True)])
    found = share_in_span(torch.from_numpy(vectors), torch.from_numpy(span))
    np.testing.assert_allclose(found, np.linalg.norm(projected, axis=1), atol=1e-12)


def test_vectors_that_depend_on_each_other_span_fewer_dimensions():
    e = torch.eye(4, dtype=torch.float64)
    twice = torch.stack([e[0], -2 * e[0], e[0]], 1)
    torch.testing.assert_close(share_in_span(e, twice), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    assert share_in_span(e, torch.full((4, 2), torch.nan).double()).isnan().all()


@pytest.mark.parametrize("degrees", [0.0, 1.0, 30.0, 90.0])
def test_the_angle_from_a_right_one(degrees):
    cosine = torch.tensor([np.sin(np.radians(degrees)), -np.sin(np.radians(degrees))])
    np.testing.assert_allclose(degrees_from_orthogonal(cosine), degrees, atol=1e-6)


def test_overlaps_do_not_depend_on_how_many_are_measured_together():
    X = torch.randn(64, 2, 10, 20, generator=torch.Generator().manual_seed(0))
    attended = torch.arange(20) < 2
    together = attended_vs_rest(gram(X), attended)
    for n in (1, 3, 4):
        alone = [attended_vs_rest(gram(part), attended) for part in X.split(n)]
        for side in (0, 1):
            assert torch.equal(torch.cat([one[side] for one in alone]), together[side])
