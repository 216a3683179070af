"""Attention heads kept as their factors, and their SVD in head space.

A head's bilinear form is ``Omega = scale * W_Q^T W_K`` (method of arXiv 2602.13524, section 2), of rank at most H. It
is never built when H < D: orthonormal bases of the factors' row spaces leave an H x H core, and only the core is
decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from svf_lightning.bridged import AttentionLayer, attention_layers, check_scale
from svf_lightning.errors import bad_value

PARTS = ("W_Q", "W_K", "b_Q", "b_K", "c_Q", "c_K")  # tensors of AttentionHeads
BLOCK = 2**19  # entries of W_Q per block: the intermediate results of a block stay in a core's cache


class FactorizationError(ArithmeticError):
    """No LAPACK driver, in any precision, gave a factorization that reconstructs its input."""


class HeadSVD(NamedTuple):
    """``Omega = U diag(S) V^T`` with R = min(H, D) (D counts the bias coordinate where there are biases)."""

    U: Float[Tensor, "... D R"]  # left singular vectors (query side), orthonormal columns
    S: Float[Tensor, "... R"]  # singular values, >= 0, descending
    V: Float[Tensor, "... D R"]  # right singular vectors (key side), orthonormal columns


@dataclass(frozen=True)
class AttentionHeads:
    """Heads as factors; every method is batched over the leading dimensions.

    Args:
        W_Q: Query weights [..., H, D].
        W_K: Key weights [..., H, D].
        b_Q: Query bias [..., H], or None. A bias enters the bilinear form as one more coordinate, whose input is 1.
        b_K: Key bias [..., H], or None.
        scale: Factor of the scores: 1 in the toy model, 1/sqrt(H) in a transformer.
        c_Q: Bias of the queries after a norm (LayerNorm on q) [..., H], or None. It is a coordinate of its own: its
            input is 1, while W_Q and b_Q have the token's scalar, as the norm divides them.
        c_K: The same of the keys.

    Raises:
        InputError: The shapes do not fit each other.
    """

    W_Q: Float[Tensor, "... H D"]
    W_K: Float[Tensor, "... H D"]
    b_Q: Float[Tensor, "... H"] | None = None
    b_K: Float[Tensor, "... H"] | None = None
    scale: float = 1.0
    c_Q: Float[Tensor, "... H"] | None = None
    c_K: Float[Tensor, "... H"] | None = None

    def __post_init__(self) -> None:
        if self.W_Q.ndim < 2 or self.W_Q.shape != self.W_K.shape:
            raise bad_value(
                "W_K.shape",
                tuple(self.W_K.shape),
                f"[..., H, D], the shape of W_Q, which is {tuple(self.W_Q.shape)}",
                "repeat shared key heads so that each query head has its own W_K",
            )
        for name in ("b_Q", "b_K", "c_Q", "c_K"):
            bias = getattr(self, name)
            if bias is not None and bias.shape != self.W_Q.shape[:-1]:
                raise bad_value(
                    f"{name}.shape",
                    tuple(bias.shape),
                    f"{tuple(self.W_Q.shape[:-1])}, from W_Q",
                    "pass one bias per row",
                )

    @classmethod
    def from_bridge(cls, bridge: Any) -> AttentionHeads:
        """All heads of a TransformerLens ``TransformerBridge``, as [layer, head, ...], on the bridge's device.

        Shared key heads (grouped queries) are repeated, one for each query head; the scale is the model's own. Where
        layers have different ones, it is that of the first, and W_Q and b_Q of the others hold what is left of theirs.
        Blocks without attention are left out. Rotary positions are left out too: this is the form of a query and a key
        at the same position (offset 0). Weights are those of the bridge's present processing: after
        ``enable_compatibility_mode()`` the normalization is folded in. So are gains and centring of a norm of queries
        and keys (QK-norm); what it divides by is one number per token, which is no part of a head.

        Raises:
            InputError: A layer's scores are no bilinear form; the message says which term is in the way.
        """
        return cls.from_layers(attention_layers(bridge))

    @classmethod
    def from_layers(cls, layers: list[AttentionLayer]) -> AttentionHeads:
        """The same, of attention layers that were read already."""
        scale = check_scale([layer.scale for layer in layers])
        parts = [layer.factors() for layer in layers]
        relative = [layer.scale / scale for layer in layers]
        stacked = {
            name: _stacked([part[name] for part in parts], relative if name.endswith("Q") else None) for name in PARTS
        }
        repeats = len(layers[0].W_Q) // len(layers[0].W_K)
        of_keys = {
            name: None if part is None else part.repeat_interleave(repeats, dim=1)
            for name, part in stacked.items()
            if name.endswith("K")
        }
        return cls(**{**stacked, **of_keys}, scale=scale)  # type: ignore[arg-type]

    @property
    def has_bias(self) -> bool:
        """True if the bilinear form has coordinates beside those of the residual stream (D -> D + 1 or more)."""
        return self.n_constants > 0

    @property
    def n_constants(self) -> int:
        """Number of these coordinates: one for biases, and one for biases after a norm of queries or keys."""
        return sum(self._has(kind) for kind in "bc")

    def _has(self, kind: str) -> bool:
        return any(getattr(self, f"{kind}_{side}") is not None for side in "QK")

    def without_biases(self) -> AttentionHeads:
        """The same heads, as a form on the residual stream alone."""
        return replace(self, b_Q=None, b_K=None, c_Q=None, c_K=None)

    def factors(self) -> tuple[Float[Tensor, "... H D"], Float[Tensor, "... H D"]]:
        """W_Q and W_K with the biases as last columns, if there are any: first b, then c."""
        sides = []
        for side in "QK":
            W = getattr(self, f"W_{side}")
            columns = [getattr(self, f"{kind}_{side}") for kind in "bc" if self._has(kind)]
            whole = [torch.zeros_like(W[..., 0]) if column is None else column for column in columns]
            sides.append(torch.cat([W, torch.stack(whole, dim=-1)], dim=-1) if whole else W)
        return sides[0], sides[1]

    @torch.no_grad()
    def svd(self) -> HeadSVD:
        """Verified SVD of Omega in head space, without gradients.

        Costs O(D H^2) per head. A head that holds NaN or Inf gives NaN, and does not disturb the others.

        Raises:
            FactorizationError: No driver gave factors that reconstruct the core (not seen in practice).
        """
        W_Q, W_K = self.factors()
        n_head, n_model = W_Q.shape[-2:]
        if n_head >= n_model:  # D <= H: the core is [D, D] already
            core = (W_Q.mT @ W_K) * self.scale
            return HeadSVD(*verified_svd(core))
        flat_Q, flat_K = W_Q.reshape(-1, n_head, n_model), W_K.reshape(-1, n_head, n_model)
        svd = HeadSVD(*(flat_Q.new_empty(len(flat_Q), *s) for s in ((n_model, n_head), (n_head,), (n_model, n_head))))
        per_block = max(1, BLOCK // (n_head * n_model))
        for start in range(0, len(flat_Q), per_block):
            block = slice(start, start + per_block)
            q, k, out = flat_Q[block], flat_K[block], HeadSVD(*(part[block] for part in svd))
            rest = ~_svd_from_gram(q, k, self.scale, out)
            if bool(rest.any()):
                for part, exact in zip(out, _svd_from_qr(q[rest], k[rest], self.scale), strict=True):
                    part[rest] = exact
        return HeadSVD(*(part.reshape(*W_Q.shape[:-2], *part.shape[1:]) for part in svd))

    def bilinear(self, x: Float[Tensor, "... D P"], y: Float[Tensor, "... D P"]) -> Float[Tensor, "... P"]:
        """``x_p^T Omega y_p`` for P pairs of columns, without the biases: the logit that the pair (x, y) gets."""
        return ((self.W_Q @ x) * (self.W_K @ y)).sum(-2) * self.scale


def _stacked(parts: list[Tensor | None], factors: list[float] | None) -> Tensor | None:
    """Layers' weights or biases as one tensor [layer, ...], each times a factor; zeros where a layer has none."""
    present = next((part for part in parts if part is not None), None)
    if present is None:
        return None
    whole = torch.stack([torch.zeros_like(present) if part is None else part for part in parts])
    if factors is None or set(factors) == {1.0}:
        return whole
    return whole * torch.tensor(factors).to(whole).view(-1, *(1,) * (whole.ndim - 1))


def _svd_from_gram(
    W_Q: Float[Tensor, "n H D"], W_K: Float[Tensor, "n H D"], scale: float, out: HeadSVD
) -> Bool[Tensor, "n"]:
    """Write the SVD of ``scale W_Q^T W_K`` to ``out``; return which heads it is accurate for.

    With the Cholesky factors W W^T = L L^T, W^T L^-T is an orthonormal basis of the row space of W, so Omega has the
    core L_Q^T L_K, and its singular vectors are W^T times a small matrix M. Gram matrices are in float64, as they
    square the condition number. Takes half the time of QR; heads that are too ill-conditioned for it, or not finite, do
    not pass.
    """
    eps = torch.finfo(W_Q.dtype).eps
    grams = [wide @ wide.mT for wide in (W_Q.double(), W_K.double())]
    L_Q, L_K = (torch.linalg.cholesky_ex(gram)[0] for gram in grams)
    core = (L_Q.mT @ L_K) * scale
    core_U, S, core_V = verified_svd(core)
    out.S.copy_(S)
    accurate = torch.ones_like(S[:, 0], dtype=torch.bool)
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    rows = []
    for W, gram, L, small, basis in ((W_Q, grams[0], L_Q, core_U, out.U), (W_K, grams[1], L_K, core_V, out.V)):
        M = torch.linalg.solve_triangular(L.mT, small, upper=True).to(W)
        torch.matmul(W.mT, M, out=basis)
        M = M.double()
        # A cheap check in head space: W^T M has orthonormal columns, and rounding has not grown in it.
        accurate &= (M.mT @ gram @ M - identity).abs().amax((-2, -1)) <= 64 * eps
        accurate &= gram.diagonal(dim1=-2, dim2=-1).sum(-1) * M.square().sum(-2).amax(-1) <= (16**2) * S.shape[-1]
        rows.append(L.mT @ M)
    residual = core - (rows[0] * S[:, None]) @ rows[1].mT
    accurate &= residual.abs().amax((-2, -1)) <= 64 * eps * S[:, 0]
    return accurate


def _svd_from_qr(W_Q: Float[Tensor, "n H D"], W_K: Float[Tensor, "n H D"], scale: float) -> HeadSVD:
    """SVD of ``scale W_Q^T W_K`` by QR of both factors: whatever their condition."""
    Q_q, A_q = verified_qr(W_Q.mT)
    Q_k, A_k = verified_qr(W_K.mT)
    U, S, V = verified_svd((A_q @ A_k.mT) * scale)
    return HeadSVD(Q_q @ U, S, Q_k @ V)


def _random_signs(n: int) -> Tensor:
    """Up to three vectors of +-1 / sqrt(n) [n, 3], always the same, to check factorizations with (Freivalds 1977)."""
    signs = torch.randint(0, 2, (n, min(n, 3)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    vectors: Tensor = signs / n**0.5
    return vectors


def verified_svd(matrix: Float[Tensor, "... n m"]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (U, S, V), each checked for reconstruction and orthonormality.

    LAPACK's gesdd has been seen to fail silently on weights of real heads. A matrix whose factors do not pass is
    decomposed again in float64, then by the slower gesvd. Matrices that are not finite give NaN.

    Returns:
        U [..., n, r], S [..., r], V [..., m, r] with r = min(n, m), in the dtype of the input.

    Raises:
        FactorizationError: Some matrix passes with no driver (only seen for subnormal entries, below about 1e-308).
    """
    finite = torch.isfinite(matrix).flatten(-2).all(-1)
    if not bool(finite.all()):
        matrix = torch.where(finite[..., None, None], matrix, 0.0)
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        failed = ~_accurate(matrix, U, S, Vh)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        *batch, n, m = matrix.shape
        U, S, Vh = (matrix.new_zeros(*batch, *s) for s in ((n, min(n, m)), (min(n, m),), (min(n, m), m)))
        failed = torch.ones(batch, dtype=torch.bool, device=matrix.device)
    if bool(failed.any()):
        for index in failed.nonzero():
            at = tuple(index.tolist())
            U[at], S[at], Vh[at] = _robust_svd(matrix[at])
    if not bool(finite.all()):
        for part in (U, S, Vh):  # in place: products round differently where memory is laid out differently
            part[~finite] = torch.nan
    return U, S, Vh.mT


def _robust_svd(matrix: Float[Tensor, "n m"]) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of one matrix: gesdd in float64, then gesvd in float64."""
    wide = matrix.detach().double().cpu()
    for driver in ("gesdd", "gesvd"):
        try:
            parts = scipy.linalg.svd(wide.numpy(), full_matrices=False, lapack_driver=driver, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        U, S, Vh = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
        if bool(_accurate(wide, U, S, Vh)):
            return U.to(matrix), S.to(matrix), Vh.to(matrix)
    raise FactorizationError(
        f"no SVD driver reconstructs a {tuple(matrix.shape)} matrix (largest entry {matrix.abs().max().item():.3g})"
    )


def _accurate(matrix: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """One bool per matrix: factors reconstruct it and are orthonormal, to a few hundred ulps of the largest entry."""
    tolerance = 32 * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps
    residual = (matrix - (U * S[..., None, :]) @ Vh).abs().amax((-2, -1))
    ok = residual <= tolerance * matrix.abs().amax((-2, -1))
    for factor in (U.mT @ U, Vh @ Vh.mT):
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        ok = ok & ((factor - identity).abs().amax((-2, -1)) <= tolerance)
    return ok


def verified_qr(matrix: Float[Tensor, "... n m"], *, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Thin QR (n >= m), checked like the SVD; a batch that does not pass is done again in float64.

    Args:
        matrix: What to factorize.
        tolerance: Largest error of Q^T Q and (relative) of Q R that is good enough; None for rounding error alone. With
            a tolerance, Q R is first tried from the Cholesky factor R of the Gram matrix (in float64 twice as fast, and
            as exact unless the matrix is ill-conditioned).
    """
    if tolerance is not None:
        L, info = torch.linalg.cholesky_ex(matrix.mT @ matrix)
        if not bool(info.any()):
            Q = torch.linalg.solve_triangular(L, matrix.mT, upper=False).mT
            if bool(_accurate_qr(matrix, Q, L.mT, tolerance).all()):
                return Q, L.mT
    Q, R = torch.linalg.qr(matrix)
    if bool(_accurate_qr(matrix, Q, R).all()):
        return Q, R
    wide = matrix.double()
    Q, R = torch.linalg.qr(wide)
    if not bool(_accurate_qr(wide, Q, R).all()):
        raise FactorizationError(f"QR does not reconstruct a {tuple(matrix.shape)} batch, even in float64")
    return Q.to(matrix), R.to(matrix)


def _accurate_qr(matrix: Tensor, Q: Tensor, R: Tensor, tolerance: float | None = None) -> Tensor:
    """One bool per matrix; a matrix that is not finite passes, as its NaN goes on to the result.

    Reconstruction and orthonormality are checked on random vectors (Freivalds 1977), as the products themselves would
    cost as much as the factorization: a wrong column shows in every product with a vector that has no zeros.
    """
    n, m = matrix.shape[-2:]
    tolerance = 8 * n * torch.finfo(matrix.dtype).eps if tolerance is None else tolerance
    x = _random_signs(m).to(matrix)
    size = matrix.abs().amax((-2, -1))
    ok = ((matrix @ x - Q @ (R @ x)).abs().amax((-2, -1)) <= tolerance * size) & (
        (Q.mT @ (Q @ x) - x).abs().amax((-2, -1)) <= tolerance
    )
    passed: Tensor = ok | ~torch.isfinite(size)
    return passed
