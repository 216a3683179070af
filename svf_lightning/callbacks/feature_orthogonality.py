"""FeatureOrthogonality: how the features of a module lie to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.metrics import (
    attended_vs_rest,
    degrees_from_orthogonal,
    feature_dimensionality,
    gram,
    interference,
    share_in_span,
)
from svf_lightning.probe import Probe
from svf_lightning.quantities import COSINES, Place, Quantity, half_of_the_way, on_another_scale

_DICTIONARY = 4096  # with more features than this, W is a dictionary
_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1}


class FeatureOrthogonality(ProbeMetric):
    """Measures the geometry of the features, per instance (method, section 3).

    Of a dictionary with more than 4,096 features only the interference is measured: its Gram matrix would be too large.
    The Gram matrix follows from ``W``; open_trajectory computes it.

    Args:
        keep_features: Keep W in the trajectory.
    """

    quantities = (
        Quantity(
            "orthogonality/interference", "anisotropy of the features",
            "Spectral norm of the cosines between different features: ||X^T X - I||_2; 0 if they are orthonormal.",
            symbol="||E_X||_2", low=0, source="arXiv 2602.13524, section 5",
        ),
        Quantity(
            "orthogonality/attended_vs_rest", "attended against other features",
            "Cosine of the template's features with the others, mean.", **_COSINE, better="lower",
            source="Figs. 1b, 3; method, section 3", panel=COSINES, colour="vermillion",
            needs="a template that leaves features over",
            places=Place.TABLE | Place.PROGRESS | Place.COMPARISON | Place.SWEEP, level="orthogonal",
            change=Quantity(
                "dynamics/t_ortho", "attended features turn orthogonal to the rest",
                "Step from which orthogonality/attended_vs_rest has covered 90 % of its way, and stays there; null "
                "where they did not turn orthogonal.",
                symbol="t_ortho", unit="steps", low=0, source="Fig. 3; method, section 3",
            ),
            halfway=half_of_the_way("ortho", "attended features turn orthogonal to the rest"),
        ),
        Quantity(
            "orthogonality/angle", "angle that attended and other features miss of a right one",
            "arcsin of their |cosine|, mean.", unit="degrees", low=0, high=90, better="lower", source="Fig. 3",
            needs="a template that leaves features over", level="orthogonal, degrees",
            **on_another_scale("ortho_degrees", "attended features turn orthogonal to the rest, in degrees"),
        ),
        Quantity(
            "orthogonality/rest_vs_rest", "among other features",
            "Cosine between features that the template does not name, mean.", **_COSINE,
            source="Fig. 1b; method, section 3", panel=COSINES, colour="sky",
        ),
        Quantity(
            "orthogonality/rest_in_span", "other features in the span of attended ones",
            "Length of a unit feature's projection on the span of the template's features, mean over the others: 0 if "
            "they live in the D - k dimensions that the k attended ones leave.",
            low=0, high=1, better="lower", source="Fig. 1b", logged="mean",
            needs="a template that leaves features over, and names fewer than there are dimensions",
        ),
        Quantity(
            "orthogonality/dimensionality", "dimensions per feature",
            "Elhage's D_i = |w_i|^2 / sum_j (x_i . w_j)^2, mean over features: 1/2 in an antipodal pair.",
            low=0, high=1, source="Elhage et al. 2022", logged="mean",
        ),
        Quantity(
            "orthogonality/antipodal", "nearness of an antipode",
            "Minus the most negative cosine of a feature, mean: 1 if all have an antipode.",
            unit="cosine", low=-1, high=1, source="Fig. 1a; Elhage et al. 2022", logged="mean",
        ),
        Quantity("W", "features", "Columns are the features.", symbol="W", dims=("d_model", "feature"),
                 places=Place.NOWHERE, source="method, section 1"),
    )  # fmt: skip

    def __init__(self, keep_features: bool = True) -> None:
        self.keep_features = keep_features

    def measure(self, probe: Probe) -> Measurement:
        """Cosines between all features; nothing without features."""
        W = probe.features
        if W is None:
            return {}
        measured: dict[str, Tensor] = {"orthogonality/interference": interference(W)}
        if W.shape[-1] > _DICTIONARY:
            return measured
        G = gram(W)
        attended = torch.zeros(W.shape[-1], dtype=torch.bool, device=W.device)
        attended[probe.pairs.flatten()] = True
        between, inside = attended_vs_rest(G, attended)
        n_rest = int((~attended).sum())
        measured |= {
            "orthogonality/dimensionality": feature_dimensionality(W, G).mean(-1),
            "orthogonality/antipodal": -G.amin(-1).mean(-1),
        }
        if self.keep_features:
            measured["W"] = W
        if n_rest >= 2:
            measured["orthogonality/rest_vs_rest"] = inside
        if 0 < n_rest < W.shape[-1]:
            measured["orthogonality/attended_vs_rest"] = between
            if W.shape[-1] - n_rest < W.shape[-2]:
                measured["orthogonality/rest_in_span"] = share_in_span(W[..., ~attended], W[..., attended]).mean(-1)
            measured["orthogonality/angle"], _ = attended_vs_rest(degrees_from_orthogonal(G), attended)
        return measured
