"""Heads in head space: the SVD from the factors is the SVD of the bilinear form, checked against dense NumPy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads, FactorizationError, verified_qr, verified_svd

SHAPES = [(5, 13), (7, 7), (11, 3), (1, 5), (3, 1)]  # (H, D): H < D, H = D, H > D, and the smallest ones
BIASES = ["none", "query", "key", "both"]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}  # relative to the size of the factors
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)
# Leading dimensions, and how many of the first one to compute at once. No chunk is one single matrix, and none starts
# off a 32-byte boundary: there the CPU kernels (MKL) take another path, and the last bits differ.
CHUNKS = pytest.mark.parametrize(
    ("batch", "chunk"), [((128, 8), 1), ((128, 8), 7), ((128, 8), 64), ((128,), 16), ((128,), 64)], ids=str
)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def make_heads(*batch, n_head=5, n_model=13, bias="none", scale=1.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64).to(dtype)

    W_Q, W_K, b_Q, b_K = draw(n_head, n_model), draw(n_head, n_model), draw(n_head), draw(n_head)
    return AttentionHeads(
        W_Q, W_K, b_Q if bias in ("query", "both") else None, b_K if bias in ("key", "both") else None, scale
    )


def dense_omega(heads):
    """The bilinear form in float64 NumPy, as the definition has it: append 1 to x and the bias to the weights."""
    W_Q, W_K = heads.W_Q.cpu().double().numpy(), heads.W_K.cpu().double().numpy()
    if heads.b_Q is not None or heads.b_K is not None:
        zero = np.zeros((*W_Q.shape[:-1], 1))
        b_Q = zero if heads.b_Q is None else heads.b_Q.cpu().double().numpy()[..., None]
        b_K = zero if heads.b_K is None else heads.b_K.cpu().double().numpy()[..., None]
        W_Q, W_K = np.concatenate([W_Q, b_Q], -1), np.concatenate([W_K, b_K], -1)
    return heads.scale * np.swapaxes(W_Q, -1, -2) @ W_K


def size_of(heads):
    """Bound on ||Omega||, the scale against which rounding errors are measured."""
    W_Q, W_K = heads.factors()
    return heads.scale * float(
        W_Q.double().flatten(-2).norm(dim=-1).max() * W_K.double().flatten(-2).norm(dim=-1).max()
    )


def assert_is_svd_of(svd, omega, tolerance, size):
    """U S V^T = omega, U and V have orthonormal columns, S is sorted, non-negative and agrees with dense NumPy."""
    U, S, V = (part.cpu().double().numpy() for part in svd)
    n_singular = S.shape[-1]
    dense = np.linalg.svd(omega, compute_uv=False)
    np.testing.assert_allclose(S, dense[..., :n_singular], rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(dense[..., n_singular:], 0, atol=1e-12 * max(size, 1))
    np.testing.assert_allclose((U * S[..., None, :]) @ np.swapaxes(V, -1, -2), omega, rtol=0, atol=tolerance * size)
    for factor in (U, V):
        product = np.swapaxes(factor, -1, -2) @ factor
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(n_singular), product.shape), atol=tolerance)
    assert (S >= 0).all()
    assert (np.diff(S, axis=-1) <= 0).all()


# --- the factored SVD is the dense SVD


@DTYPES
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_svd_equals_dense_svd(shape, bias, batch, dtype):
    n_head, n_model = shape
    heads = make_heads(*batch, n_head=n_head, n_model=n_model, bias=bias, scale=0.37, dtype=dtype)
    svd = heads.svd()
    width = n_model + (bias != "none")
    n_singular = min(n_head, width)
    assert svd.U.shape == svd.V.shape == (*batch, width, n_singular)
    assert svd.S.shape == (*batch, n_singular)
    assert {part.dtype for part in svd} == {dtype}
    assert_is_svd_of(svd, dense_omega(heads), TOLERANCE[dtype], size_of(heads))


@DTYPES
@SETTINGS
@given(
    n_head=st.integers(1, 12),
    n_model=st.integers(1, 12),
    n_batch=st.integers(0, 3),
    bias=st.sampled_from(BIASES),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**32),
)
def test_factored_svd_equals_dense_svd_for_any_shape_and_size(dtype, n_head, n_model, n_batch, bias, exponent, seed):
    heads = make_heads(n_batch, n_head=n_head, n_model=n_model, bias=bias, scale=10.0**exponent, dtype=dtype, seed=seed)
    size = size_of(heads) if n_batch else 1.0
    assert_is_svd_of(heads.svd(), dense_omega(heads), TOLERANCE[dtype], size)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_multiplies_the_singular_values(shape, dtype):
    plain, scaled = (make_heads(2, n_head=shape[0], n_model=shape[1], scale=c, dtype=dtype) for c in (1.0, 0.25))
    torch.testing.assert_close(scaled.svd().S, plain.svd().S / 4)


@pytest.mark.parametrize("bias", ["query", "key", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_with_biases_gives_the_exact_score_of_inputs_with_an_appended_one(shape, bias):
    heads = make_heads(2, 3, n_head=shape[0], n_model=shape[1], bias=bias, scale=0.5)
    x, y = torch.randn(2, 2, 3, shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = torch.einsum("...hd,...d->...h", heads.W_Q, x) + (0 if heads.b_Q is None else heads.b_Q)
    k = torch.einsum("...hd,...d->...h", heads.W_K, y) + (0 if heads.b_K is None else heads.b_K)
    one = torch.ones(2, 3, 1, dtype=torch.float64)
    U, S, V = heads.svd()
    left = torch.einsum("...dr,...d->...r", U, torch.cat([x, one], -1))
    right = torch.einsum("...dr,...d->...r", V, torch.cat([y, one], -1))
    torch.testing.assert_close((left * S * right).sum(-1), 0.5 * (q * k).sum(-1), rtol=1e-11, atol=1e-11)


@DTYPES
@pytest.mark.parametrize("n_pairs", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bilinear_is_x_omega_y_without_the_biases(shape, n_pairs, dtype):
    heads = make_heads(2, n_head=shape[0], n_model=shape[1], bias="both", scale=0.5, dtype=dtype)
    x, y = torch.randn(2, 2, shape[1], n_pairs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    omega = dense_omega(AttentionHeads(heads.W_Q, heads.W_K, scale=0.5))
    expected = np.einsum("bdp,bde,bep->bp", x.numpy(), omega, y.numpy())
    got = heads.bilinear(x.to(dtype), y.to(dtype))
    assert got.dtype == dtype
    atol = TOLERANCE[dtype] * size_of(heads) * float(x.norm() * y.norm())
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=atol)


# --- degenerate heads


@DTYPES
@pytest.mark.parametrize("bias", ["none", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_head_has_zero_singular_values_and_orthonormal_vectors(shape, bias, dtype):
    zero = torch.zeros(2, *shape, dtype=dtype)
    b = None if bias == "none" else torch.zeros(2, shape[0], dtype=dtype)
    heads = AttentionHeads(zero, zero, b, b)
    svd = heads.svd()
    assert not svd.S.any()
    assert_is_svd_of(svd, dense_omega(heads), TOLERANCE[dtype], 0.0)


@DTYPES
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(5, 13), (7, 7), (11, 3)], ids=str)
def test_rank_deficient_head_still_has_orthonormal_vectors(shape, rank, dtype):
    g = torch.Generator().manual_seed(0)
    n_head, n_model = shape
    W_Q = torch.randn(2, n_head, rank, generator=g, dtype=dtype) @ torch.randn(
        2, rank, n_model, generator=g, dtype=dtype
    )
    heads = AttentionHeads(W_Q, torch.randn(2, n_head, n_model, generator=g, dtype=dtype))
    svd = heads.svd()
    assert_is_svd_of(svd, dense_omega(heads), TOLERANCE[dtype], size_of(heads))
    assert (svd.S[..., rank:] <= TOLERANCE[dtype] * size_of(heads)).all()
    assert (svd.S[..., rank - 1] > 1e-2).all()


@DTYPES
@pytest.mark.parametrize("n_model", [7, 13])
def test_head_with_equal_singular_values_keeps_them_equal_and_its_vectors_orthonormal(n_model, dtype):
    g = torch.Generator().manual_seed(0)
    W_Q, W_K = (torch.linalg.qr(torch.randn(n_model, 7, generator=g, dtype=dtype)).Q.mT for _ in range(2))
    heads = AttentionHeads(3 * W_Q, W_K)
    svd = heads.svd()
    torch.testing.assert_close(svd.S, torch.full((7,), 3.0, dtype=dtype))
    assert_is_svd_of(svd, dense_omega(heads), TOLERANCE[dtype], size_of(heads))


@DTYPES
@SETTINGS
@given(seed=st.integers(0, 2**32), n_equal=st.integers(1, 5), n_zero=st.integers(0, 4))
def test_prescribed_spectrum_with_repeated_and_zero_values_comes_back(dtype, seed, n_equal, n_zero):
    g = torch.Generator().manual_seed(seed)
    S = torch.tensor([3.0] + [2.0] * n_equal + [0.0] * n_zero, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(13, len(S), generator=g, dtype=torch.float64)).Q for _ in range(2))
    svd = AttentionHeads((U * S).mT.to(dtype), V.mT.to(dtype)).svd()
    torch.testing.assert_close(svd.S, S.to(dtype), rtol=0, atol=20 * TOLERANCE[dtype])
    omega = ((U * S) @ V.mT).numpy()
    assert_is_svd_of(svd, omega, 10 * TOLERANCE[dtype], 10.0)


# --- cost


class NoTensorLargerThan(TorchDispatchMode):
    """Fails at the first operation that returns more than ``limit`` elements, before more is done with them."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        assert self.largest <= self.limit, f"{func} returns {self.largest} elements"
        return result


@DTYPES
@pytest.mark.parametrize("bias", ["none", "both"])
def test_svd_never_allocates_a_d_by_d_matrix(bias, dtype):
    n_model = 20011
    heads = make_heads(n_head=3, n_model=n_model, bias=bias, dtype=dtype)
    with NoTensorLargerThan(3 * (n_model + 1)) as sizes:
        svd = heads.svd()
    assert sizes.largest >= 3 * n_model  # it has seen the operations
    assert svd.U.shape == (n_model + (bias == "both"), 3)
    # sigma_k u_k = Omega v_k, with Omega applied through its factors
    W_Q, W_K = (w.double() for w in heads.factors())
    U, S, V = (part.double() for part in svd)
    torch.testing.assert_close(W_Q.mT @ (W_K @ V), U * S, rtol=0, atol=TOLERANCE[dtype] * size_of(heads))


# --- NaN and Inf


@pytest.mark.parametrize("where", ["W_Q", "W_K", "b_Q", "b_K"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(5, 13), (7, 7), (11, 3)], ids=str)
def test_one_broken_head_gives_nan_and_leaves_the_others_bit_identical(shape, value, where):
    def svd(broken):
        heads = make_heads(2, 3, n_head=shape[0], n_model=shape[1], bias="both", dtype=torch.float32)
        if broken:
            getattr(heads, where)[1, 2].view(-1)[0] = value
        return heads.svd()

    clean, got = svd(broken=False), svd(broken=True)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    for expected, part in zip(clean, got, strict=True):
        assert part[1, 2].isnan().all()
        assert torch.equal(part[others], expected[others])


def test_single_broken_head_without_batch_dimensions_gives_nan():
    for shape in ((5, 13), (11, 3)):
        W = torch.full(shape, torch.nan)
        assert all(part.isnan().all() for part in AttentionHeads(W, W).svd())


def test_product_that_overflows_gives_nan_and_not_a_score():
    W = torch.full((2, 5, 13), 1e30)
    W[1] = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    svd = AttentionHeads(W, W).svd()
    assert svd.S[0].isnan().all()
    assert torch.isfinite(svd.S[1]).all()


# --- verified_svd: drivers that fail


def matrices(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def spoil(parts, how):
    """Wrong factors, as a silently failing driver returns them."""
    U, S, Vh = (part.clone() for part in parts)
    if how == "wrong values":
        S *= 1.01
    elif how == "wrong vectors":
        U = U.roll(1, -1)
    elif how == "not orthonormal":  # reconstructs, but is no SVD
        U, S = U * 2, S / 2
    elif how == "right vectors not orthonormal":
        Vh, S = Vh * 2, S / 2
    else:
        U, S, Vh = U * torch.nan, S * torch.nan, Vh * torch.nan
    return U, S, Vh


SPOILED = ["wrong values", "wrong vectors", "not orthonormal", "right vectors not orthonormal", "nan"]


@DTYPES
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("how", SPOILED)
def test_verified_svd_repairs_the_one_matrix_that_the_first_driver_gets_wrong(monkeypatch, how, shape, dtype):
    matrix = matrices(2, 3, *shape, dtype=dtype)
    clean = verified_svd(matrix)
    real = torch.linalg.svd

    def broken(a, full_matrices=True):
        parts = [part.clone() for part in real(a, full_matrices=full_matrices)]
        for part, wrong in zip(parts, spoil([p[1, 2] for p in parts], how), strict=True):
            part[1, 2] = wrong
        return tuple(parts)

    monkeypatch.setattr(torch.linalg, "svd", broken)
    got = verified_svd(matrix)
    assert_is_svd_of(got, matrix.double().numpy(), TOLERANCE[dtype], 10.0)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    for expected, part in zip(clean, got, strict=True):
        assert part.dtype == dtype
        assert torch.equal(part[others], expected[others])


@DTYPES
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 3, 5, 7)], ids=str)
def test_verified_svd_falls_back_when_the_first_driver_raises(monkeypatch, shape, dtype):
    def fails(a, full_matrices=True):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    matrix = matrices(*shape, dtype=dtype)
    assert_is_svd_of(verified_svd(matrix), matrix.double().numpy(), TOLERANCE[dtype], 10.0)


def test_verified_svd_gives_nan_for_the_broken_matrix_also_when_the_first_driver_raises(monkeypatch):
    def fails(a, full_matrices=True):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    matrix = matrices(3, 5, 7)
    matrix[1, 0, 0] = torch.nan
    U, S, V = verified_svd(matrix)
    assert all(part[1].isnan().all() for part in (U, S, V))
    good = torch.tensor([0, 2])
    assert_is_svd_of((U[good], S[good], V[good]), matrix[good].double().numpy(), 2e-5, 10.0)


def raise_error():
    raise np.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("how", [*SPOILED, "raises"])
def test_verified_svd_goes_on_to_gesvd_when_gesdd_fails_too(monkeypatch, how):
    real, used = scipy.linalg.svd, []

    def svd(a, full_matrices=True, lapack_driver="gesdd", **kwargs):
        used.append(lapack_driver)
        parts = real(a, full_matrices=full_matrices, lapack_driver=lapack_driver, **kwargs)
        if lapack_driver == "gesvd":
            return parts
        if how == "raises":
            raise_error()
        return tuple(p.numpy() for p in spoil([torch.from_numpy(np.ascontiguousarray(p)) for p in parts], how))

    monkeypatch.setattr(torch.linalg, "svd", lambda a, full_matrices: (a * 0, a[:, 0] * 0, a * 0))
    monkeypatch.setattr(scipy.linalg, "svd", svd)
    matrix = matrices(5, 5)
    assert_is_svd_of(verified_svd(matrix), matrix.double().numpy(), 2e-5, 10.0)
    assert used == ["gesdd", "gesvd"]


@pytest.mark.parametrize("how", [*SPOILED, "raises"])
def test_factorization_error_when_no_driver_works(monkeypatch, how):
    real = scipy.linalg.svd

    def svd(a, full_matrices=True, **kwargs):
        if how == "raises":
            raise_error()
        parts = real(a, full_matrices=full_matrices, **kwargs)
        return tuple(p.numpy() for p in spoil([torch.from_numpy(np.ascontiguousarray(p)) for p in parts], how))

    monkeypatch.setattr(torch.linalg, "svd", lambda a, full_matrices: (a * 0, a[..., 0] * 0, a * 0))
    monkeypatch.setattr(scipy.linalg, "svd", svd)
    with pytest.raises(FactorizationError, match=r"\(5, 5\)"):
        verified_svd(matrices(3, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_does_without_qr_for_well_conditioned_heads_and_takes_it_for_the_others_alone(monkeypatch, dtype):
    calls = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a: calls.append(tuple(a.shape)) or real(a))
    W_Q, W_K = torch.randn(2, 4, 6, 40, generator=torch.Generator().manual_seed(0), dtype=dtype)
    AttentionHeads(W_Q, W_K).svd()
    assert calls == []
    W_K[2, 1] = W_K[2, 0]  # singular
    heads = AttentionHeads(W_Q, W_K)
    assert_is_svd_of(heads.svd(), dense_omega(heads), 100 * torch.finfo(dtype).eps, size_of(heads))
    assert calls == [(1, 40, 6)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3, 1e4, 1e6, 1e9])
def test_svd_is_accurate_whatever_the_condition_of_the_factors(condition, dtype):
    g = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(2, 5, n, 6, generator=g, dtype=torch.float64)).Q for n in (40, 6))
    spectrum = torch.logspace(0, -math.log10(condition), 6, dtype=torch.float64)
    W_Q, W_K = (left * spectrum @ right.mT).mT.to(dtype)
    heads = AttentionHeads(W_Q, W_K)
    assert_is_svd_of(heads.svd(), dense_omega(heads), 100 * torch.finfo(dtype).eps, 1.0)


def test_svd_of_more_heads_than_a_block_is_that_of_each_head(monkeypatch):
    heads = make_heads(5, dtype=torch.float64)
    whole = heads.svd()
    monkeypatch.setattr("svf_lightning.heads.BLOCK", 2 * heads.W_Q[0].numel())
    for one, other in zip(whole, heads.svd(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def singular_heads(dtype):
    """Two heads, each with a query row twice: no Cholesky factorization."""
    heads = make_heads(2, dtype=dtype)
    heads.W_Q[:, 1] = heads.W_Q[:, 0]
    return heads


def test_a_wrong_qr_is_done_again_in_float64(monkeypatch):
    real, dtypes = torch.linalg.qr, []

    def qr(a):
        dtypes.append(a.dtype)
        Q, R = real(a)
        return (Q * 2, R / 2) if a.dtype == torch.float32 else (Q, R)

    monkeypatch.setattr(torch.linalg, "qr", qr)
    heads = singular_heads(torch.float32)
    svd = heads.svd()
    assert dtypes == [torch.float32, torch.float64] * 2
    assert svd.U.dtype == torch.float32
    assert_is_svd_of(svd, dense_omega(heads), 2e-5, size_of(heads))


@pytest.mark.parametrize("how", ["not orthonormal", "does not reconstruct"])
def test_factorization_error_when_no_qr_works(monkeypatch, how):
    real = torch.linalg.qr

    def qr(a):
        Q, R = real(a)
        return (Q * 2, R / 2) if how == "not orthonormal" else (Q, R * 1.01)

    monkeypatch.setattr(torch.linalg, "qr", qr)
    with pytest.raises(FactorizationError, match=r"\(2, 13, 5\)"):
        singular_heads(torch.float64).svd()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e12])
def test_qr_with_a_tolerance_keeps_it_whatever_the_condition(condition):
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(3, n, 6, generator=g, dtype=torch.float64)).Q for n in (40, 6))
    matrix = U * torch.logspace(0, -math.log10(condition), 6, dtype=torch.float64) @ V.mT
    Q, R = verified_qr(matrix, tolerance=1e-9)
    assert (Q.mT @ Q - torch.eye(6)).abs().max() < 1e-8
    assert (Q @ R - matrix).abs().max() < 1e-12
    assert R.triu().equal(R)


def test_qr_with_a_tolerance_does_without_qr_only_where_cholesky_is_enough(monkeypatch):
    calls = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a: calls.append(len(a)) or real(a))
    matrix = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    verified_qr(matrix, tolerance=1e-9)
    assert calls == []
    matrix[1, :, 0] = matrix[1, :, 1]  # singular
    verified_qr(matrix, tolerance=1e-9)
    assert calls == [3]
    verified_qr(matrix)
    assert calls == [3, 3]


# --- errors


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("W_Q", "W_K", "offending"),
    [
        ((5, 13), (5, 11), r"W_K\.shape=\(5, 11\)"),
        ((3, 5, 13), (2, 5, 13), r"\(2, 5, 13\)"),
        ((13,), (13,), r"\(13,\)"),
    ],
)
def test_weights_that_do_not_fit_are_an_input_error_that_names_the_shape(W_Q, W_K, offending):
    with pytest.raises(InputError, match=offending + ".*Fix: repeat shared key heads"):
        AttentionHeads(torch.zeros(W_Q), torch.zeros(W_K))


@pytest.mark.wrong_shapes
@pytest.mark.parametrize("name", ["b_Q", "b_K"])
@pytest.mark.parametrize("shape", [(13,), (3, 13), (5,), (3, 5, 1)], ids=str)
def test_bias_that_does_not_fit_is_an_input_error_that_names_the_shape(name, shape):
    W = torch.zeros(3, 5, 13)
    with pytest.raises(InputError) as error:
        AttentionHeads(W, W, **{name: torch.zeros(shape)})
    assert f"{name}.shape={shape}" in str(error.value)
    assert "(3, 5)" in str(error.value)


# --- batches


@CHUNKS
@pytest.mark.parametrize("bias", ["none", "both"])
@pytest.mark.parametrize("shape", [(10, 20), (20, 10), (3, 13)], ids=str)
def test_svd_of_a_batch_is_bit_identical_to_the_svd_of_its_slices(shape, bias, chunk, batch):
    heads = make_heads(*batch, n_head=shape[0], n_model=shape[1], bias=bias, scale=0.3, dtype=torch.float32)
    whole = heads.svd()
    parts = [None if p is None else p.split(chunk) for p in (heads.W_Q, heads.W_K, heads.b_Q, heads.b_K)]
    slices = [
        AttentionHeads(*(None if p is None else p[i] for p in parts), scale=0.3).svd() for i in range(len(parts[0]))
    ]
    for expected, *got in zip(whole, *slices, strict=True):
        assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", ["none", "both"])
@pytest.mark.parametrize("shape", [(5, 13), (7, 7), (11, 3)], ids=str)
def test_svd_stays_on_its_device_and_agrees_with_dense_numpy(shape, bias, device):
    heads = make_heads(2, 3, n_head=shape[0], n_model=shape[1], bias=bias, dtype=torch.float32)
    omega, size = dense_omega(heads), size_of(heads)
    parts = (None if p is None else p.to(device) for p in (heads.W_Q, heads.W_K, heads.b_Q, heads.b_K))
    svd = AttentionHeads(*parts).svd()
    assert {part.device.type for part in svd} == {device}
    assert_is_svd_of(svd, omega, 2e-5, size)


@pytest.mark.parametrize("device", DEVICES)
def test_fallback_driver_returns_to_the_device_of_the_input(monkeypatch, device):
    def fails(a, full_matrices=True):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    matrix = matrices(3, 5, 7)
    svd = verified_svd(matrix.to(device))
    assert {part.device.type for part in svd} == {device}
    assert_is_svd_of(svd, matrix.double().numpy(), 2e-5, 10.0)
