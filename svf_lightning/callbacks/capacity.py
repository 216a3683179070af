"""Capacity: what a head of its size can hold of a template, beside what training made of it (Appendix E)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import share_served
from svf_lightning.probe import Probe
from svf_lightning.quantities import Place, Quantity
from svf_lightning.theory import best_of_rank

_SHARE: Any = {"unit": "share", "low": 0, "high": 1, "logged": "mean"}

_ZERO = 1e-5  # singular values below this share of the largest count as zero


class Capacity(ProbeMetric):
    """Compares the head with the best one of its rank for the current features (a closed form), per instance.

    The best head minimizes the squared error of the logits of all feature pairs, H singular values at most being other
    than zero: :func:`svf_lightning.theory.best_of_rank`. Biases of the head are left out, and where several heads share
    a template each of them is compared with it.
    """

    needs = "a head (not template=zero)"
    quantities = (
        Quantity(
            "capacity/predicted_served", "pairs that the best head of its rank serves",
            "Share of the pairs to which the best head of rank H gives half of their target logit or more.",
            **_SHARE, source="Appendix E",
        ),
        Quantity(
            "capacity/lost", "share of the template that no head of its rank holds",
            "Least squared error of the logits of all feature pairs with rank H, over that of a head of zero.",
            **_SHARE, better="lower", source="Appendix E",
        ),
        Quantity(
            "capacity/subspace", "head's subspaces in those of the best head of its rank",
            "Mean squared cosine of the principal angles between the spans of the first H singular vectors of both "
            "heads, mean of both sides; H/D by chance.",
            low=0, high=1, logged="mean", better="higher", source="Appendix E",
        ),
        Quantity(
            "capacity/omega", "head against the best one of its rank", "Omega with that head's (Frobenius).",
            unit="cosine", low=-1, high=1, logged="mean", better="higher", source="Appendix E",
        ),
        Quantity(
            "capacity/logit_error", "prediction of the pairs' logits, its error",
            "Root mean square over pairs of w_i^T Omega w_j minus the logit that the best head of rank H gives, over "
            "that of the target logits.",
            low=0, logged="mean", better="lower", source="Appendix E",
        ),
        Quantity(
            "capacity/logit_error_of_any_rank", "the same with the best head of any rank",
            "A prediction that knows the features, and not that the head has H dimensions.",
            low=0, logged="mean", source="Appendix E",
        ),
        Quantity("pair/predicted_logit", "logit of a pair in the best head of rank H", unit="nats", dims=("pair",),
                 places=Place.NOWHERE, source="Appendix E"),
    )  # fmt: skip

    def measure(self, probe: Probe) -> Measurement:
        """The best head at every step; nothing without heads, features and target pairs."""
        if probe.heads is None or probe.features is None or probe.pair_logits is None or len(probe.pairs) == 0:
            return {}
        W, target = probe.for_heads(probe.features), probe.pair_logits
        query, key = probe.pairs[:, 0], probe.pairs[:, 1]
        T = W.new_zeros(*target.shape[:-1], W.shape[-1], W.shape[-1])
        T[..., query, key] = target
        heads = probe.heads.without_biases()
        rank = min(heads.W_Q.shape[-2:])
        best, unlimited = best_of_rank(W, T, W, rank), best_of_rank(W, T, W, min(W.shape[-2:]))
        eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device).expand_as(best.omega)
        U, S, V = AttentionHeads(eye, best.omega).svd()
        # of fewer pairs than the head has dimensions the best head has a lower rank, and the rest of U is arbitrary
        counted = (_ZERO * S[..., :1] < S)[..., :rank]
        svd = heads.svd() if probe.heads.has_bias else probe.svd
        omega = (heads.W_Q.mT @ heads.W_K) * heads.scale
        logit = heads.bilinear(W[..., query], W[..., key])
        size = target.square().mean(-1).sqrt()

        def error(predicted: Tensor) -> Tensor:
            return (logit - predicted[..., query, key]).square().mean(-1).sqrt() / size

        return {
            "capacity/predicted_served": share_served(best.logits[..., query, key], target),
            "capacity/lost": best.lost,
            "capacity/subspace": sum(
                _overlap(of_head, of_best[..., :rank], counted) for of_head, of_best in ((svd.U, U), (svd.V, V))
            )
            / 2,
            "capacity/omega": (omega * best.omega).sum((-2, -1))
            / (omega.norm(dim=(-2, -1)) * best.omega.norm(dim=(-2, -1))),
            "capacity/logit_error": error(best.logits),
            "capacity/logit_error_of_any_rank": error(unlimited.logits),
            "pair/predicted_logit": best.logits[..., query, key],
        }


def _overlap(a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles of the span of a and of those columns of b that count [..., R]."""
    return ((a.mT @ b).square().sum(-2) * counted).sum(-1) / counted.sum(-1)
