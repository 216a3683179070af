"""TheoryGap: how far a trained head is from what the theorems predict for its features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import align_pairs, cosine_matrix, unit_features
from svf_lightning.probe import Probe
from svf_lightning.theory import (
    alignment_bound,
    optimal_omega,
    orthogonality_residual,
    token_covariance,
    unwhitened,
)


class TheoryGap(ProbeMetric):
    """Compares the head with the least-squares optimum Omega* for the current features (Theorem 1).

    Per instance (or layer and head), cosines in [0, 1]:
        theory/left, theory/right: the head's first singular vectors with those of Omega*; for a single pair these are
        Sigma^-1 x_1 and Sigma^-1 y_1. theory/omega: Omega with Omega* (Frobenius), signed.
        alignment/unwhitened: as alignment/matched, with Sigma u and Sigma v in place of u and v.
        theory/predicted_cosine: mean over all features of cos(Sigma^-1 x, x); theory/bound: Kantorovich's lower
        bound on it (Theorem 2). theory/cone_left, theory/cone_right: the first singular vectors with the mean of
        the unit features, the axis of a cone; theory/cone_features: the template's features with that axis, mean.
        theory/residual: overlap of the head's singular directions with the features that it should not respond to,
        which Theorem 3 sends to 0 (mean of both sides).

    Args:
        covariance: Where Sigma comes from when singular vectors are un-whitened: "exact" (W W^T), or "tokens" (the
            covariance of the queries and keys that the probe shows, as one has to in a real model; set
            --model.n_observed).

    Raises:
        InputError: An unknown covariance, or no tokens to estimate it from.
    """

    def __init__(self, covariance: Literal["exact", "tokens"] = "exact") -> None:
        if covariance not in ("exact", "tokens"):
            raise bad_value("covariance", covariance, "'exact' or 'tokens'", "change the TheoryGap callback")
        self.covariance = covariance

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing without heads, features and target pairs."""
        if probe.heads is None or probe.features is None or probe.pair_logits is None or len(probe.pairs) == 0:
            return {}
        W = probe.for_heads(probe.features)
        svd = probe.svd
        T = W.new_zeros(*probe.pair_logits.shape[:-1], W.shape[-1], W.shape[-1])
        T[..., probe.pairs[:, 0], probe.pairs[:, 1]] = probe.pair_logits
        best = optimal_omega(W, T, W)
        eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device).expand_as(best)
        U, _, V = AttentionHeads(eye, best).svd()
        omega = (probe.heads.W_Q.mT @ probe.heads.W_K) * probe.heads.scale
        agreement = (omega * best).sum((-2, -1)) / (omega.norm(dim=(-2, -1)) * best.norm(dim=(-2, -1)))

        query, key = (W[..., probe.pairs[:, side]] for side in (0, 1))
        to_query, to_key = self._covariances(probe)
        unwhite = align_pairs(
            cosine_matrix(query, unwhitened(svd.U, to_query)), cosine_matrix(key, unwhitened(svd.V, to_key)), svd.S
        )
        first_u, first_v = svd.U[..., :1], svd.V[..., :1]
        named = torch.unique(probe.pairs.flatten())
        axis = _axis(W)
        predicted = alignment_bound(probe.features)
        residual = orthogonality_residual(W, omega, probe.pairs)
        own = (probe.feature_dims or ())[1:]
        return {
            "theory/left": _cosine(first_u, U[..., :1]),
            "theory/right": _cosine(first_v, V[..., :1]),
            "theory/omega": agreement,
            "theory/predicted_cosine": Measured(predicted.cosine.mean(-1), (), own),
            "theory/bound": Measured(predicted.bound, (), own),
            "theory/cone_left": _cosine(first_u, axis),
            "theory/cone_right": _cosine(first_v, axis),
            "theory/cone_features": Measured(
                cosine_matrix(probe.features[..., named], _axis(probe.features)).mean((-2, -1)), (), own
            ),
            "theory/residual": (residual.query + residual.key) / 2,
            "alignment/unwhitened": (unwhite.left + unwhite.right).mean(-1) / 2,
        }

    def _covariances(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """Sigma on the query side and on the key side."""
        assert probe.features is not None
        if self.covariance == "exact":
            sigma = probe.for_heads(probe.features @ probe.features.mT)
            return sigma, sigma
        if probe.queries is None or probe.keys is None:
            raise InputError(
                "TheoryGap(covariance=tokens) needs tokens to look at, and the probe shows none. "
                "Fix: set --model.n_observed=256."
            )
        queries, keys = (token_covariance(t) for t in (probe.queries, probe.keys.flatten(-3, -2)))
        return probe.for_heads(queries), probe.for_heads(keys)


def _axis(features: Tensor) -> Tensor:
    """Mean of the unit features: the axis of the cone that they lie in [..., D, 1]."""
    return unit_features(features).mean(-1, keepdim=True)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_matrix(a, b)[..., 0, 0]
