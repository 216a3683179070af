"""NearestFeature: which proxy feature the first singular vectors of a real model's heads point at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import align_pairs, cosine_matrix, unit_features
from svf_lightning.probe import Probe
from svf_lightning.quantities import Place, Quantity

_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1, "logged": "mean"}


class NearestFeature(ProbeMetric):
    """Compares the first singular vectors with the features nearest to them, as they are and un-whitened.

    For features that are only proxies (embedding vectors of named tokens, a dictionary), where nobody knows which pairs
    the head should attend to. Per layer and head (or instance). "Un-whitened" is Theorem 1 backwards: Sigma u in place
    of u, with Sigma = X X^T of the unit features (method, section 4).

    Nearness has to be compared with that of random directions: of many features in few dimensions one is always near,
    and un-whitening with few features puts any direction into their span.

    Args:
        n_random: Random directions.
        seed: Their seed; they come from a generator of their own.

    Raises:
        InputError: Fewer than one random direction.
    """

    needs = "a head (not template=zero), and features (--model.features)"
    quantities = (
        *(
            Quantity(
                f"alignment/nearest_{prefix}{side}", f"{letter} against the nearest feature{after}",
                f"Cosine of {before}{letter}_1 with the feature nearest to it.", **_COSINE,
                source="Theorem 1; method, section 4" if prefix else "arXiv 2602.13524, section 5",
            )
            for prefix, before, after in (("", "", ""), ("unwhitened_", "Sigma ", ", un-whitened"))
            for side, letter in (("left", "u"), ("right", "v"))
        ),
        Quantity(
            "alignment/nearest_random", "random direction against the nearest feature",
            "What alignment/nearest_left and _right are by chance, mean over random directions.", **_COSINE,
        ),
        Quantity(
            "alignment/nearest_unwhitened_random", "random direction against the nearest feature, un-whitened",
            "What the un-whitened ones are by chance, mean over random directions.", **_COSINE,
        ),
        Quantity(
            "alignment/unwhitened_unit", "alignment, un-whitened by unit features",
            "As alignment/matched, with Sigma u and Sigma v for u and v; Sigma of the unit features.",
            **_COSINE, better="higher", source="Theorem 1; method, section 4",
        ),
        Quantity("nearest/left_feature", "feature nearest to u_1", "Its index.", logged="no", places=Place.NOWHERE),
        Quantity("nearest/right_feature", "feature nearest to v_1", "Its index.", logged="no", places=Place.NOWHERE),
    )  # fmt: skip

    def __init__(self, n_random: int = 64, seed: int = 0) -> None:
        if n_random < 1:
            raise bad_value("n_random", n_random, "an integer >= 1", "change the NearestFeature callback")
        self.n_random, self.seed = n_random, seed

    def measure(self, probe: Probe) -> Measurement:
        """The nearest feature of every head; nothing without heads and features."""
        if probe.heads is None or probe.features is None:
            return {}
        X = probe.in_forms(unit_features(probe.features))  # [..., D', N]; size 1 in dimensions that only heads have
        svd = probe.svd
        measured: dict[str, Tensor] = {}
        for side, vectors in (("left", svd.U), ("right", svd.V)):
            first = vectors[..., :1]
            nearest = cosine_matrix(X, first).squeeze(-1).max(-1)
            measured[f"alignment/nearest_{side}"] = nearest.values
            measured[f"nearest/{side}_feature"] = nearest.indices.to(torch.int32)
            unwhitened = cosine_matrix(X, _unwhitened(X, first)).squeeze(-1).amax(-1)
            measured[f"alignment/nearest_unwhitened_{side}"] = unwhitened
        D = probe.features.shape[-2]
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.randn(D, self.n_random, generator=generator).to(X)
        chance = cosine_matrix(probe.features, random).amax(-2).mean(-1)
        unit = unit_features(probe.features)
        unwhitened = cosine_matrix(unit, _unwhitened(unit, random)).amax(-2).mean(-1)
        measured["alignment/nearest_random"] = chance
        measured["alignment/nearest_unwhitened_random"] = unwhitened
        if len(probe.pairs):
            query, key = (X[..., probe.pairs[:, side]] for side in (0, 1))
            matched = align_pairs(
                cosine_matrix(query, _unwhitened(X, svd.U)), cosine_matrix(key, _unwhitened(X, svd.V)), svd.S
            )
            measured["alignment/unwhitened_unit"] = (matched.left + matched.right).mean(-1) / 2
        return measured


def _unwhitened(X: Tensor, vectors: Tensor) -> Tensor:
    """``Sigma u`` for Sigma = X X^T, without Sigma [..., D, R]."""
    return X @ (X.mT @ vectors)
