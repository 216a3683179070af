"""FeatureOrthogonality: how the features of a module lie to each other."""

from __future__ import annotations

import torch

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.metrics import attended_vs_rest, feature_dimensionality, gram, interference
from svf_lightning.probe import Probe

_DICTIONARY = 4096  # features from which W is a dictionary


class FeatureOrthogonality(ProbeMetric):
    """Measures the geometry of the features (method, section 3).

    Per instance, unitless:
        orthogonality/attended_vs_rest (with target pairs), orthogonality/rest_vs_rest: mean |cosine|;
        orthogonality/interference: ||E_X||_2; orthogonality/dimensionality: mean over features of Elhage's D_i;
        orthogonality/antipodal: mean over features of minus their most negative cosine (1: all have an antipode).

    Arrays: W [d_model, feature]. (The Gram matrix follows from it; open_trajectory computes it.)

    Of a dictionary with more than 4,096 features only the interference is measured: its Gram matrix would be too large.

    Args:
        keep_features: Keep W in the trajectory.
    """

    def __init__(self, keep_features: bool = True) -> None:
        self.keep_features = keep_features

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing without features."""
        W = probe.features
        if W is None:
            return {}
        if W.shape[-1] > _DICTIONARY:
            return {"orthogonality/interference": interference(W)}
        G = gram(W)
        attended = torch.zeros(W.shape[-1], dtype=torch.bool, device=W.device)
        attended[probe.pairs.flatten()] = True
        between, inside = attended_vs_rest(G, attended)
        dimensionality = feature_dimensionality(W, G)
        n_rest = int((~attended).sum())
        found: dict[str, torch.Tensor | Measured] = {
            "orthogonality/interference": interference(W),
            "orthogonality/dimensionality": dimensionality.mean(-1),
            "orthogonality/antipodal": -G.amin(-1).mean(-1),
        }
        if self.keep_features:
            found["W"] = Measured(W, ("d_model", "feature"), (probe.feature_dims or ())[1:])
        if n_rest >= 2:
            found["orthogonality/rest_vs_rest"] = inside
        if 0 < n_rest < W.shape[-1]:
            found["orthogonality/attended_vs_rest"] = between
        return found
