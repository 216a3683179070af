"""The theory of arXiv 2602.13524 as code that can be checked: Theorems 1 to 3 and un-whitening.

Notation: X and Y hold features in their columns as they are, not normalized (``w_i`` of the toy model, so
``Sigma = X X^T = W W^T``). Everything is computed in float64 and returned in the dtype of the input, batched over any
leading dimensions, which broadcast between arguments. Input that is not finite gives NaN where it enters, and does not
disturb the other batch elements.

Rank: a singular value at or below ``rtol`` times the largest one counts as zero, so nothing fails on a singular matrix.
By default rtol is the larger side of the matrix times the rounding unit of the dtype that it was passed in (of float32
for half precision, whose own would cut real directions), as what lies below cannot be told from rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.heads import verified_svd
from svf_lightning.metrics.geometry import interference, unit_features
from svf_lightning.metrics.spectrum import n_significant


class AlignmentBound(NamedTuple):
    """How far anisotropy can turn the singular vectors away from the features (Theorem 2)."""

    cosine: Float[Tensor, "... N"]  # cos(Sigma^+ x_i, x_i), in [bound, 1]; NaN for a column without a direction
    bound: Float[Tensor, "..."]  # 2 sqrt(k) / (1 + k), in (0, 1]
    interference: Float[Tensor, "..."]  # ||E_X||_2 of the unit columns, >= 0
    condition: Float[Tensor, "..."]  # k, largest over smallest non-zero eigenvalue of Sigma, >= 1
    by_interference: Float[Tensor, "..."]  # interference_bound of the interference, in [0, 1]; 0 where it says nothing


class BestOfRank(NamedTuple):
    """The head of limited rank that comes closest to a template (capacity; Appendix E)."""

    omega: Float[Tensor, "... D D"]  # of rank H at most, in logits per squared feature length
    logits: Float[Tensor, "... Nx Ny"]  # X^T omega Y: what every pair gets, in nats
    spectrum: Float[Tensor, "... r"]  # singular values of the whitened target, descending, in nats; r = min(D, Nx, Ny)
    lost: Float[Tensor, "..."]  # share of ||T||_F^2 that no head of this rank can give, in [0, 1]; NaN for T = 0


class AttentionPressure(NamedTuple):
    """The least-squares surrogate of the attention loss, and what it does to the features (Theorem 3)."""

    loss: Float[Tensor, "..."]  # sum_ij (w_i^T Omega w_j - T_ij)^2, >= 0, in logits squared
    gradient: Float[Tensor, "... D N"]  # d loss / d W at fixed Omega


class OrthogonalityResidual(NamedTuple):
    """What Theorem 3 says vanishes: the overlap of a head's directions with the features it should not see."""

    query: Float[Tensor, "..."]  # left singular vectors with features that are the query of no pair, in [0, 1]
    key: Float[Tensor, "..."]  # right singular vectors with features that are the key of no pair, in [0, 1]


def optimal_omega(
    X: Float[Tensor, "... D Nx"],
    T: Float[Tensor, "... Nx Ny"],
    Y: Float[Tensor, "... D Ny"],
    *,
    rtol: float | None = None,
) -> Float[Tensor, "... D D"]:
    """The Omega of least norm that minimizes ``sum_ij (x_i^T Omega y_j - T_ij)^2`` (Theorem 1).

    ``Omega* = (X X^T)^+ X T Y^T (Y Y^T)^+ = (X^+)^T T Y^+``, by pseudo-inverse. With fewer features than dimensions,
    or features that depend on each other, many Omega are optimal; this one maps everything outside the span to 0.

    The optimum reaches ``T`` only as far as the features allow: it gives the pair (i, j) the logit
    ``(P_X T P_Y)_ij`` with ``P_X = X^+ X``. For more features than dimensions and ``T = t e_i e_j^T`` that is
    ``t h_i h_j`` with the leverages ``h = x^T Sigma^+ x``, in [0, 1], which add up to the rank of X.

    Args:
        X: Query-side features.
        T: Target logits of all pairs.
        Y: Key-side features.
        rtol: Rank tolerance for X and Y, in [0, 1); None for the default of this module.

    Raises:
        InputError: The shapes do not fit each other, or rtol is out of range.
    """
    _check_pair_shapes(X, T, Y)
    left, right = _pinv(X, rtol).mT, _pinv(Y, rtol)
    broken = ~torch.isfinite(T).flatten(-2).all(-1)  # an Inf would leave some entries finite, and the result wrong
    omega = (left @ T.double() @ right).masked_fill(broken[..., None, None], torch.nan)
    return omega.to(torch.promote_types(torch.promote_types(X.dtype, T.dtype), Y.dtype))


def best_of_rank(
    X: Float[Tensor, "... D Nx"],
    T: Float[Tensor, "... Nx Ny"],
    Y: Float[Tensor, "... D Ny"],
    rank: int,
    *,
    rtol: float | None = None,
) -> BestOfRank:
    """The Omega of rank <= H and least norm that minimizes ``sum_ij (x_i^T Omega y_j - T_ij)^2``: what a head can hold.

    With ``X = U_x S_x V_x^T`` and ``Y = U_y S_y V_y^T`` the logits are ``V_x M V_y^T`` with ``M = S_x U_x^T Omega U_y
    S_y``, any matrix of that rank. So the sum is ``||M - K||_F^2`` plus a constant, with the whitened target
    ``K = V_x^T T V_y``, and M is K cut off after its H largest singular values (Eckart and Young). For H >= rank(T)
    this is :func:`optimal_omega`.

    Not defined in the paper, which asks what happens with more pairs than dimensions (Appendix E) and answers by
    training. All pairs count alike here: the cross-entropy of a training weighs a pair by how often it occurs, and by
    its competitors.

    Args:
        X: Query-side features.
        T: Target logits of all pairs, in nats.
        Y: Key-side features.
        rank: H, dimension of the head, >= 1. Where the H-th and the next singular value of K are equal, many heads are
            the best, and this is one of them.
        rtol: Rank tolerance for X and Y, in [0, 1); None for the default of this module.

    Returns:
        The head, its logits, the spectrum that H cuts, and what is lost.

    Raises:
        InputError: The shapes do not fit each other, rank < 1, or rtol is out of range.
    """
    _check_pair_shapes(X, T, Y)
    if rank < 1:
        raise bad_value("rank", rank, "an integer >= 1", "pass the dimension of the head")
    x, y = _truncated_svd(X, rtol), _truncated_svd(Y, rtol)
    kept_x, kept_y = ((factors.inverse != 0).double()[..., None, :] for factors in (x, y))
    target = T.double()
    broken = ~torch.isfinite(target).flatten(-2).all(-1)[..., None, None]
    K = (x.V * kept_x).mT @ target @ (y.V * kept_y)
    U, S, V = verified_svd(K)
    M = (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank].mT
    to_query = x.U * (x.inverse / x.scale[..., None])[..., None, :]
    to_key = y.U * (y.inverse / y.scale[..., None])[..., None, :]
    omega = (to_query @ M @ to_key.mT).masked_fill(broken, torch.nan)
    logits = ((x.V * kept_x) @ M @ (y.V * kept_y).mT).masked_fill(broken, torch.nan)
    whole = target.square().sum((-2, -1))
    lost = (1 - S[..., :rank].square().sum(-1) / whole).clamp(0, 1)  # 0 / 0 for T = 0
    dtype = torch.promote_types(torch.promote_types(X.dtype, T.dtype), Y.dtype)
    return BestOfRank(omega.to(dtype), logits.to(dtype), S.to(dtype), lost.to(dtype))


def whitened(
    features: Float[Tensor, "... D N"], covariance: Float[Tensor, "... D D"] | None = None, *, rtol: float | None = None
) -> Float[Tensor, "... D N"]:
    """Unit columns of ``Sigma^+ w_i``: the singular vectors that Theorem 1 predicts.

    For a template with the one pair (i, j), :func:`optimal_omega` has rank one; column i is its left singular vector,
    and column j, with the key side's features and Sigma, its right one. With several pairs this holds for each pair
    only as far as their predicted directions are orthogonal, as singular vectors always are.

    For isotropic features, ``Sigma = c I`` (a tight frame), the prediction is the feature itself (Corollary 1).

    Args:
        features: W, whose columns are the features.
        covariance: Sigma, symmetric and positive semi-definite, of any scale; None for ``W W^T``, of the features as
            they are: normalizing them first would give another Sigma. In a real model see :func:`token_covariance`.
        rtol: Rank tolerance, in [0, 1); None for the default of this module.

    Returns:
        Unit columns; 0 for a column that is 0, or of which no more than rtol lies in the span of Sigma.

    Raises:
        InputError: The shapes do not fit each other, or rtol is out of range.
    """
    _check_matrices(features=features)
    if covariance is None:
        factors = _truncated_svd(features, rtol)
        inverse = factors.inverse.square()  # Sigma = U S^2 U^T
    else:
        _check_covariance(covariance, "features", features)
        factors = _truncated_svd(covariance, rtol)
        inverse = factors.inverse  # Sigma = U S U^T
    direction = factors.U @ (inverse[..., None] * _coordinates(factors, features))
    return unit_features(direction).to(features.dtype)


def unwhitened(vectors: Float[Tensor, "... D K"], covariance: Float[Tensor, "... D D"]) -> Float[Tensor, "... D K"]:
    """Unit columns of ``Sigma u_k``: the feature directions behind singular vectors, the inverse of :func:`whitened`.

    Args:
        vectors: Singular vectors, of any length and sign.
        covariance: Sigma, symmetric, of any scale: ``W W^T`` where the features are known, else an estimate
            (:func:`token_covariance`).

    Returns:
        Unit columns, each with the sign of its vector; 0 where ``Sigma u`` is 0 up to the rounding of Sigma.

    Raises:
        InputError: The shapes do not fit each other.
    """
    _check_matrices(vectors=vectors)
    _check_covariance(covariance, "vectors", vectors)
    tiny = torch.finfo(torch.float64).tiny
    wide = covariance.double()
    scaled = wide / wide.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # squares may under- or overflow
    direction = scaled @ unit_features(vectors.double())
    size = scaled.square().sum((-2, -1)).sqrt()[..., None]
    rounding = _default_rtol(covariance) * size
    lost = direction.square().sum(-2).sqrt() <= rounding
    return unit_features(direction.masked_fill(lost[..., None, :], 0)).to(vectors.dtype)


def token_covariance(tokens: Float[Tensor, "... n D"], *, centred: bool = True) -> Float[Tensor, "... D D"]:
    """Estimate of Sigma, up to scale, from observed tokens: where the features are not known, their tokens are.

    For ``r = W f`` with independent activations f of one mean mu and one variance s2, the centred covariance is
    ``s2 W W^T``: Sigma up to its scale, which no direction depends on. The uncentred second moment is
    ``W (s2 I + mu^2 1 1^T) W^T``; as sparse activations are never negative, mu is not 0, and the moment is stretched
    along the mean token ``W 1`` (most where the features share a direction). Hence centred by default.

    Activations of unequal variance give ``W diag(s2_i) W^T``, in which frequent features weigh more.

    Args:
        tokens: r, one row per token. Ill-conditioned tokens are better passed in float64: the estimate squares their
            condition number, and is rounded to their dtype.
        centred: True: covariance around the mean token. False: second moment around 0. Both divide by n (a choice).

    Returns:
        Symmetric, positive semi-definite up to rounding; of rank n - 1 at most (n if not centred).

    Raises:
        InputError: There is no token.
    """
    _check_matrices(tokens=tokens)
    r = tokens.double()
    if centred:
        r = r - r.mean(-2, keepdim=True)  # before squaring: E[r^2] - E[r]^2 would cancel
    covariance = r.mT @ r / tokens.shape[-2]
    broken = ~torch.isfinite(tokens).flatten(-2).all(-1)
    covariance = (covariance + covariance.mT) / 2  # a matrix product may be asymmetric in its last bit
    return covariance.masked_fill(broken[..., None, None], torch.nan).to(tokens.dtype)


def interference_bound(interference: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The least alignment that ``||E_X||_2`` leaves, whatever the features (Theorem 2): ``sqrt(1 - ||E_X||^2)``.

    Derived here; the paper's own constant is not known. Below 1, the Gram matrix ``G = I + E_X`` of the unit columns is
    invertible, so the features are independent (N <= D), ``Sigma^+ x_i`` is parallel to ``X G^-1 e_i`` whatever their
    lengths, and ``cos(Sigma^+ x_i, x_i) = 1 / sqrt((G^-1)_ii)``. As ``G_ii = 1`` and G has its eigenvalues between
    ``1 - ||E_X||`` and ``1 + ||E_X||``, Kantorovich's inequality gives ``(G^-1)_ii <= 1 / (1 - ||E_X||^2)``. Two unit
    vectors of cosine c have ``||E_X|| = c`` and reach it.

    From 1 on there is no such bound, and the value is 0. More features than dimensions always have ``||E_X|| >= 1``
    (and at least N/D - 1), so this is every case of superposition, with the paper's 10 to 55 for GPT-2. There the norm
    says how large the largest eigenvalue of ``Sigma = X X^T`` is and nothing of the smallest one, and ``Sigma^-1``
    amplifies what is smallest: of any N > D - 1 unit features in D - 1 dimensions, given a component of size epsilon in
    one more dimension, ``||E_X||`` hardly changes, and every cosine goes to 0 with epsilon. What does bound them is the
    condition of Sigma (:func:`alignment_bound`): ``2 sqrt(k) / (1 + k) = sqrt(1 - e^2)`` with
    ``e = min_c ||Sigma / c - I|| = (k - 1) / (k + 1)``, the distance from a tight frame, which for a frame of N > D
    features takes the place that ``||E_X||``, the distance from orthonormal features, has here.

    Args:
        interference: ``||E_X||_2`` of unit columns, >= 0 (:func:`~svf_lightning.metrics.interference`).

    Returns:
        Unitless, in [0, 1]; NaN for NaN.
    """
    return (1 - interference.square()).clamp_min(0).sqrt()


def alignment_bound(features: Float[Tensor, "... D N"], *, rtol: float | None = None) -> AlignmentBound:
    """Predicted alignment of every feature, and the least that anisotropy can leave of it (Theorem 2).

    ``cos(Sigma^+ x, x) >= 2 sqrt(k) / (1 + k)`` for every x in the span of the features (Kantorovich's inequality for
    ``Sigma^(1/2) x``), with ``k = cond(Sigma)`` over the non-zero eigenvalues. It is 1 for a tight frame, and reached
    by an x between the first and the last eigenvector.

    Args:
        features: X, as they are, not normalized.
        rtol: Rank tolerance, in [0, 1); None for the default of this module.

    Returns:
        All unitless; the last one is what ``||E_X||`` gives by itself (:func:`interference_bound`). A column that is 0,
        or outside the span at this tolerance, has no direction and NaN for its cosine; features that are all 0 have NaN
        for bound and condition too.

    Raises:
        InputError: There is no feature, or rtol is out of range.
    """
    _check_matrices(features=features)
    factors = _truncated_svd(features, rtol)
    c = _coordinates(factors, features)
    spread = factors.S[..., 0] * factors.inverse.amax(-1)  # sqrt(k); 0 if nothing is left
    spread = torch.where(spread > 0, spread, torch.nan)
    # In coordinates of the span, where the bound holds for any c. With s_1 = 1 no power leaves the range of a float
    relative = (factors.inverse * factors.S[..., :1]).square()[..., None]
    along = (c.square() * relative).sum(-2)
    cosine = along / ((c * relative).square().sum(-2).sqrt() * c.square().sum(-2).sqrt())  # 0 / 0 for no direction
    norm = interference(features.double())
    values = (cosine.clamp_max(1), 2 / (spread + 1 / spread), norm, spread.square(), interference_bound(norm))
    return AlignmentBound(*(value.to(features.dtype) for value in values))


def attention_pressure(
    features: Float[Tensor, "... D N"], omega: Float[Tensor, "... D D"], template: Float[Tensor, "... N N"]
) -> AttentionPressure:
    """Surrogate attention loss and its gradient in the features, with Omega fixed (Theorem 3).

    ``loss = ||R||_F^2`` and ``d loss / d W = 2 (Omega W R^T + Omega^T W R)`` with ``R = W^T Omega W - T``. It stands
    in for the cross-entropy: both are least exactly where ``W^T Omega W = T``, if that can be reached. The pull of the
    reconstruction loss is not part of it.

    A feature moves inside the span of Omega's singular vectors only: the loss does not see its other components.

    Args:
        features: W, on both sides.
        omega: The head.
        template: T, the target logits.

    Raises:
        InputError: The shapes do not fit each other.
    """
    _check_matrices(features=features)
    _check_covariance(omega, "features", features, name="omega")
    n_features = features.shape[-1]
    if template.shape[-2:] != (n_features, n_features):
        raise bad_value(
            "template.shape", tuple(template.shape), f"[..., {n_features}, {n_features}], from features", "pass T"
        )
    _check_batch(features=features, omega=omega, template=template)
    W, omega_, T = features.double(), omega.double(), template.double()
    to_key, to_query = omega_ @ W, omega_.mT @ W
    R = W.mT @ to_key - T
    R = R.masked_fill(~torch.isfinite(R), torch.nan)  # an Inf could cancel to a finite loss
    gradient = 2 * (to_key @ R.mT + to_query @ R)
    dtype = torch.promote_types(torch.promote_types(features.dtype, omega.dtype), template.dtype)
    return AttentionPressure(R.square().sum((-2, -1)).to(dtype), gradient.to(dtype))


def orthogonality_residual(
    features: Float[Tensor, "... D N"],
    omega: Float[Tensor, "... D D"],
    pairs: Int[Tensor, "P 2"],
    *,
    threshold: float = 0.05,
) -> OrthogonalityResidual:
    """Mean overlap of a head's singular directions with the features that it should not respond to (Theorem 3).

    With ``Omega = U S V^T`` of the same rank as T, ``W^T Omega W = T`` (a surrogate loss of 0) implies
    ``U^T w_i = 0`` for every feature i that is the query of no pair: its row of T is 0, so
    ``(U^T w_i)^T S (V^T W) = 0``, and ``V^T W`` has full row rank, as T could not have that rank otherwise. Likewise
    ``V^T w_j = 0`` for every feature j that is the key of no pair. For one pair (0, 1) and ``Omega = s u v^T`` these
    conditions and ``s (u^T w_0) (v^T w_1) = T_01`` are together equivalent to a loss of 0.

    The query of a pair belongs to the rest on the key side, and the key on the query side. So ``w_0 = a u`` and
    ``w_1 = b v`` reach a loss of 0 only if u and v are orthogonal.

    Args:
        features: W.
        omega: The head.
        pairs: (query feature i, key feature j) of the template.
        threshold: Singular directions count above this share of the largest singular value, in [0, 1) (a choice: the
            5 % of :func:`~svf_lightning.metrics.n_significant`).

    Returns:
        For each side, the mean over the rest of the norm of the unit feature's projection on the counted directions
        (|cos| for a head of rank one); 0 for a zero feature. NaN if there is no rest, or the head is 0.

    Raises:
        InputError: The shapes do not fit each other, a pair names a feature that does not exist, or the threshold is
            out of range.
    """
    _check_matrices(features=features)
    _check_covariance(omega, "features", features, name="omega")
    n_features = features.shape[-1]
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise bad_value("pairs.shape", tuple(pairs.shape), "[P, 2]", "pass (query feature, key feature) in each row")
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < n_features:
        raise bad_value("pairs", pairs.tolist(), f"features 0..{n_features - 1}", "pass the pairs of this template")
    if not 0 <= threshold < 1:
        raise bad_value("threshold", threshold, "0 <= threshold < 1", "pass a share of the largest singular value")
    U, S, V = verified_svd(omega.double())
    x = unit_features(features.double())
    index = torch.arange(S.shape[-1], device=S.device)
    counted = index < n_significant(S, threshold)[..., None]
    vanished = S[..., 0] == 0

    def mean_overlap(vectors: Tensor, attended: Tensor) -> Tensor:
        rest = torch.ones(n_features, dtype=torch.bool, device=x.device)
        rest[attended.to(x.device).long()] = False
        cosines = vectors.mT @ x[..., rest]
        overlap = (cosines.square() * counted[..., None]).sum(-2).sqrt().clamp_max(1)
        return overlap.mean(-1).masked_fill(vanished, torch.nan).to(features.dtype)

    return OrthogonalityResidual(mean_overlap(U, pairs[:, 0]), mean_overlap(V, pairs[:, 1]))


class _Factors(NamedTuple):
    """``matrix = scale * U diag(S) V^T``, and ``1 / S`` with 0 for the singular values that count as zero."""

    U: Float[Tensor, "... n r"]
    S: Float[Tensor, "... r"]
    inverse: Float[Tensor, "... r"]
    V: Float[Tensor, "... m r"]
    scale: Float[Tensor, "..."]
    rtol: float


def _default_rtol(matrix: Tensor) -> float:
    return max(matrix.shape[-2:]) * min(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)


def _truncated_svd(matrix: Float[Tensor, "... n m"], rtol: float | None) -> _Factors:
    if rtol is None:
        rtol = _default_rtol(matrix)
    elif not 0 <= rtol < 1:
        raise bad_value("rtol", rtol, "0 <= rtol < 1", "pass a share of the largest singular value, or None")
    wide = matrix.double()
    # to a largest entry of 1: neither squares nor inverses leave the range of a float then, at any scale of the input
    scale = wide.abs().amax((-2, -1)).clamp_min(torch.finfo(torch.float64).tiny)
    U, S, V = verified_svd(wide / scale[..., None, None])
    zero = rtol * S[..., :1] >= S  # NaN compares False and passes through
    return _Factors(U, S, torch.where(zero, 0.0, 1 / S), V, scale, rtol)


def _coordinates(factors: _Factors, features: Float[Tensor, "... D N"]) -> Float[Tensor, "... r N"]:
    """``U^T x_i`` of the unit features in the span; 0 for one that is outside, whose coordinates are rounding errors.

    From unit features, so that one which is very short keeps its direction.
    """
    kept = (factors.inverse != 0)[..., None]
    c = torch.where(kept, factors.U.mT @ unit_features(features.double()), 0.0)
    outside = c.square().sum(-2, keepdim=True).sqrt() <= factors.rtol
    return c.masked_fill(outside, 0)


def _pinv(matrix: Float[Tensor, "... n m"], rtol: float | None) -> Float[Tensor, "... m n"]:
    factors = _truncated_svd(matrix, rtol)
    return (factors.V * factors.inverse[..., None, :]) @ factors.U.mT / factors.scale[..., None, None]


def _check_pair_shapes(X: Tensor, T: Tensor, Y: Tensor) -> None:
    _check_matrices(X=X, Y=Y)
    if X.shape[-2] != Y.shape[-2]:
        raise bad_value(
            "Y.shape",
            tuple(Y.shape),
            f"[..., {X.shape[-2]}, Ny], as X has D = {X.shape[-2]}",
            "use one residual stream",
        )
    pairs = (X.shape[-1], Y.shape[-1])
    if T.shape[-2:] != pairs:
        raise bad_value("T.shape", tuple(T.shape), f"[..., {pairs[0]}, {pairs[1]}], from X and Y", "one row per x_i")
    _check_batch(X=X, T=T, Y=Y)


def _check_matrices(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
            raise bad_value(f"{name}.shape", tuple(matrix.shape), "[..., a, b] with a, b >= 1", "pass a matrix")


def _check_covariance(covariance: Tensor, other: str, vectors: Tensor, name: str = "covariance") -> None:
    n_model = vectors.shape[-2]
    if covariance.shape[-2:] != (n_model, n_model):
        raise bad_value(
            f"{name}.shape",
            tuple(covariance.shape),
            f"[..., {n_model}, {n_model}], as {other} has D = {n_model}",
            "use one residual stream",
        )
    _check_batch(**{other: vectors, name: covariance})


def _check_batch(**matrices: Tensor) -> None:
    batches = {name: tuple(matrix.shape[:-2]) for name, matrix in matrices.items()}
    try:
        np.broadcast_shapes(*batches.values())
    except ValueError:
        raise bad_value(
            "leading dimensions", batches, "shapes that broadcast with each other", "repeat or unsqueeze one of them"
        ) from None
