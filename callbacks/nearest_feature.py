"""NearestFeature: which proxy feature the first singular vectors of a real model's heads point at."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import align_pairs, cosine_matrix, unit_features
from svf_lightning.probe import Probe


class NearestFeature(ProbeMetric):
    """Compares the first singular vectors with the features nearest to them, as they are and un-whitened.

    For features that are only proxies (embedding vectors of named tokens, a dictionary), where nobody knows which pairs
    the head should attend to. Per layer and head (or instance), cosines in [0, 1]:
        alignment/nearest_left, alignment/nearest_right: u_1 and v_1 with their nearest feature;
        alignment/nearest_unwhitened_left, alignment/nearest_unwhitened_right: the same for Sigma u_1 and Sigma v_1,
        with Sigma = X X^T of the unit features (Theorem 1 backwards; method, section 4);
        alignment/unwhitened: with attended pairs, as alignment/matched, for Sigma u and Sigma v.
    And alignment/nearest_random, alignment/nearest_unwhitened_random: the same for random directions, mean, which
    nearness has to be compared with: of many features in few dimensions one is always near, and un-whitening with few
    features puts any direction into their span.

    Arrays: nearest/left_feature, nearest/right_feature (indices of the nearest features).

    Args:
        n_random: Random directions.
        seed: Their seed; they come from a generator of their own.

    Raises:
        InputError: Fewer than one random direction.
    """

    def __init__(self, n_random: int = 64, seed: int = 0) -> None:
        if n_random < 1:
            raise bad_value("n_random", n_random, "an integer >= 1", "change the NearestFeature callback")
        self.n_random, self.seed = n_random, seed

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing without heads and features."""
        if probe.heads is None or probe.features is None:
            return {}
        X = probe.in_forms(unit_features(probe.features))  # [..., D', N], 1 for the dimensions that only heads have
        svd = probe.svd
        found: dict[str, Tensor | Measured] = {}
        for side, vectors in (("left", svd.U), ("right", svd.V)):
            first = vectors[..., :1]
            nearest = cosine_matrix(X, first).squeeze(-1).max(-1)
            found[f"alignment/nearest_{side}"] = nearest.values
            found[f"nearest/{side}_feature"] = nearest.indices.to(torch.int32)
            unwhitened = cosine_matrix(X, _unwhitened(X, first)).squeeze(-1).amax(-1)
            found[f"alignment/nearest_unwhitened_{side}"] = unwhitened
        D = probe.features.shape[-2]
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.randn(D, self.n_random, generator=generator).to(X)
        chance = cosine_matrix(probe.features, random).amax(-2).mean(-1)
        unit = unit_features(probe.features)
        unwhitened = cosine_matrix(unit, _unwhitened(unit, random)).amax(-2).mean(-1)
        own = (probe.feature_dims or ())[1:]
        found["alignment/nearest_random"] = Measured(chance, (), own)
        found["alignment/nearest_unwhitened_random"] = Measured(unwhitened, (), own)
        if len(probe.pairs):
            query, key = (X[..., probe.pairs[:, side]] for side in (0, 1))
            matched = align_pairs(
                cosine_matrix(query, _unwhitened(X, svd.U)), cosine_matrix(key, _unwhitened(X, svd.V)), svd.S
            )
            found["alignment/unwhitened"] = (matched.left + matched.right).mean(-1) / 2
        return found


def _unwhitened(X: Tensor, vectors: Tensor) -> Tensor:
    """``Sigma u`` for Sigma = X X^T, without Sigma [..., D, R]."""
    return X @ (X.mT @ vectors)
