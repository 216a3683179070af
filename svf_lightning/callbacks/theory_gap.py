"""TheoryGap: how far a trained head is from what the theorems predict for its features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import align_pairs, cosine_matrix, effective_rank, haar_orthogonal, unit_features
from svf_lightning.probe import Probe
from svf_lightning.quantities import Quantity
from svf_lightning.theory import (
    alignment_bound,
    optimal_omega,
    orthogonality_residual,
    token_covariance,
    unwhitened,
)

_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1, "logged": "mean"}


class TheoryGap(ProbeMetric):
    """Compares the head with the least-squares optimum Omega* for the current features (Theorem 1), per instance.

    Biases of the head are left out, as the theorems have none.

    Args:
        covariance: Where Sigma comes from when singular vectors are un-whitened: "exact" (W W^T), or "tokens" (the
            covariance of the queries and keys that the probe shows, as one has to in a real model; set
            --model.n_observed).
        n_random: Pairs of random bases that are un-whitened, too, by the same Sigma.
        seed: Their seed; they come from a generator of their own.

    Raises:
        InputError: An unknown covariance, or no tokens to estimate it from; fewer than one pair of random bases.
    """

    needs = "a head (not template=zero)"
    quantities = (
        Quantity(
            "theory/left", "left vector against Theorem 1's",
            "The head's first left singular vector with that of Omega*; for a single pair, with Sigma^-1 x_1.",
            **_COSINE, better="higher", source="Theorem 1",
        ),
        Quantity(
            "theory/right", "right vector against Theorem 1's",
            "The head's first right singular vector with that of Omega*; for a single pair, with Sigma^-1 y_1.",
            **_COSINE, better="higher", source="Theorem 1",
        ),
        Quantity(
            "theory/omega", "head against the optimum", "Omega with Omega* (Frobenius).",
            unit="cosine", low=-1, high=1, logged="mean", better="higher", source="Theorem 1",
        ),
        Quantity(
            "theory/predicted_cosine", "Theorem 1's vector against its feature",
            "cos(Sigma^-1 x, x), mean over all features: the alignment that the features alone allow.",
            **_COSINE, source="Theorems 1, 2",
        ),
        Quantity(
            "theory/bound", "lower bound on it", "Kantorovich's bound 2 sqrt(k) / (1 + k), k the condition of Sigma.",
            **_COSINE, source="Theorem 2; method, section 4",
        ),
        Quantity(
            "theory/cone_left", "left vector against the axis of the cone",
            "The first left singular vector with the mean of the unit features.", **_COSINE, source="Appendix C",
        ),
        Quantity(
            "theory/cone_right", "right vector against the axis of the cone",
            "The first right singular vector with the mean of the unit features.", **_COSINE, source="Appendix C",
        ),
        Quantity(
            "theory/cone_features", "attended features against the axis of the cone",
            "The template's features with the mean of the unit features, mean.", **_COSINE, source="Appendix C",
        ),
        Quantity(
            "theory/residual", "overlap with features not attended to",
            "Of the head's directions with features that it should not respond to; Theorem 3 sends it to 0.",
            low=0, high=1, logged="mean", better="lower", source="Theorem 3",
        ),
        Quantity(
            "theory/token_rank", "effective rank of the tokens",
            "tr(Sigma)^2 / tr(Sigma^2) of the covariance of keys: D if tokens lie alike in all directions.",
            unit="dimensions", low=1, logged="mean", gaps=True, needs="TheoryGap with covariance=tokens",
        ),
        Quantity(
            "alignment/unwhitened", "alignment, un-whitened",
            "As alignment/matched, with Sigma u and Sigma v for u and v; Sigma of the features, or of tokens.",
            **_COSINE, better="higher", source="Theorem 1; method, section 4",
        ),
        Quantity(
            "alignment/unwhitened_random", "alignment of random bases, un-whitened",
            "The same of random orthonormal u and v of the same rank, mean: Sigma draws any vector towards features.",
            **_COSINE, source="Theorem 1; method, section 4",
        ),
    )  # fmt: skip
    later = frozenset({"n_random", "seed"})

    def __init__(self, covariance: Literal["exact", "tokens"] = "exact", n_random: int = 16, seed: int = 0) -> None:
        if covariance not in ("exact", "tokens"):
            raise bad_value("covariance", covariance, "'exact' or 'tokens'", "change the TheoryGap callback")
        if n_random < 1:
            raise bad_value("n_random", n_random, "an integer >= 1", "change the TheoryGap callback")
        self.covariance, self.n_random, self.seed = covariance, n_random, seed

    def measure(self, probe: Probe) -> Measurement:
        """The optimum of every step; nothing without heads, features and target pairs."""
        if probe.heads is None or probe.features is None or probe.pair_logits is None or len(probe.pairs) == 0:
            return {}
        W = probe.for_heads(probe.features)
        svd = probe.heads.without_biases().svd() if probe.heads.has_bias else probe.svd
        T = W.new_zeros(*probe.pair_logits.shape[:-1], W.shape[-1], W.shape[-1])
        T[..., probe.pairs[:, 0], probe.pairs[:, 1]] = probe.pair_logits
        best = optimal_omega(W, T, W)
        eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device).expand_as(best)
        U, _, V = AttentionHeads(eye, best).svd()
        omega = (probe.heads.W_Q.mT @ probe.heads.W_K) * probe.heads.scale
        agreement = (omega * best).sum((-2, -1)) / (omega.norm(dim=(-2, -1)) * best.norm(dim=(-2, -1)))

        query, key = (W[..., probe.pairs[:, side]] for side in (0, 1))
        to_query, to_key = self._covariances(probe)

        def unwhitened_alignment(U: Tensor, V: Tensor) -> Tensor:
            left, right = cosine_matrix(query, unwhitened(U, to_query)), cosine_matrix(key, unwhitened(V, to_key))
            aligned = align_pairs(left, right, svd.S)
            return (aligned.left + aligned.right).mean(-1) / 2

        D, R = svd.U.shape[-2:]
        bases = haar_orthogonal(D, 2 * self.n_random, seed=self.seed, device=W.device)[..., :R].to(W.dtype)
        bases = bases.reshape(self.n_random, 2, *(1,) * (W.ndim - 2), D, R).expand(-1, -1, *svd.U.shape)
        by_chance = torch.stack([unwhitened_alignment(U, V) for U, V in bases]).mean(0)
        first_u, first_v = svd.U[..., :1], svd.V[..., :1]
        named = torch.unique(probe.pairs.flatten())
        axis = _axis(W)
        predicted = alignment_bound(probe.features)
        residual = orthogonality_residual(W, omega, probe.pairs)
        return {
            "theory/left": _cosine(first_u, U[..., :1]),
            "theory/right": _cosine(first_v, V[..., :1]),
            "theory/omega": agreement,
            "theory/predicted_cosine": predicted.cosine.mean(-1),
            "theory/bound": predicted.bound,
            "theory/cone_left": _cosine(first_u, axis),
            "theory/cone_right": _cosine(first_v, axis),
            "theory/cone_features": cosine_matrix(probe.features[..., named], _axis(probe.features)).mean((-2, -1)),
            "theory/residual": (residual.query + residual.key) / 2,
            **({} if self.covariance == "exact" else {"theory/token_rank": effective_rank(to_key)}),
            "alignment/unwhitened": unwhitened_alignment(svd.U, svd.V),
            "alignment/unwhitened_random": by_chance,
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
