"""SVDAlignment: how the singular vectors of the heads align with the features."""

from __future__ import annotations

import torch

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import (
    align_pairs,
    cosine_matrix,
    logit_fidelity,
    n_significant,
    sigma_ratio,
    spearman,
    stable_rank,
)
from svf_lightning.probe import Probe


class SVDAlignment(ProbeMetric):
    """Measures the head's spectrum, and its singular vectors against the features.

    Per instance (or layer and head), unitless:
        spectrum/sigma_1, spectrum/sigma_2, spectrum/sigma_ratio (sigma_2 / sigma_1), spectrum/n_significant,
        spectrum/stable_rank; with features and target pairs also alignment/left, alignment/right (mean cosine of the
        matched pairs), alignment/matched (mean of the two), alignment/matched_min (weakest pair),
        alignment/subspace, alignment/logit_fidelity; with three pairs or more spectrum/target_spearman.

    Arrays: singular_values [rank]; U, V [d_model, rank]; pair/left, pair/right, pair/sigma, pair/index, pair/logit
    [pair]. (The cosines of all features with all singular vectors follow from these and the features; open_trajectory
    computes them.)

    Args:
        relative_gap: Singular values within this fraction of the matched one count as one block, in [0, 1).
        significant: n_significant counts singular values above this fraction of the largest, in (0, 1).
        keep_vectors: Keep U and V in the trajectory, where there are features (large for real models).

    Raises:
        InputError: An option out of range.
    """

    def __init__(self, relative_gap: float = 0.1, significant: float = 0.05, keep_vectors: bool = True) -> None:
        for name, value in (("relative_gap", relative_gap), ("significant", significant)):
            if not 0 <= value < 1:
                raise bad_value(name, value, "a fraction in [0, 1)", "change the SVDAlignment callback")
        self.relative_gap, self.significant, self.keep_vectors = relative_gap, significant, keep_vectors

    def measure(self, probe: Probe) -> Measurement:
        """One verified SVD of all heads; see the class for the names."""
        if probe.heads is None:
            return {}
        svd = probe.svd
        S = svd.S
        spectrum: Measurement = {
            "spectrum/sigma_1": S[..., 0],
            "spectrum/sigma_ratio": sigma_ratio(S),
            "spectrum/n_significant": n_significant(S, self.significant).to(S.dtype),
            "spectrum/stable_rank": stable_rank(S),
            "singular_values": Measured(S, ("rank",)),
        }
        if S.shape[-1] > 1:
            spectrum = {**spectrum, "spectrum/sigma_2": S[..., 1]}
        if probe.features is None:
            return spectrum
        if self.keep_vectors:
            vectors = {"U": Measured(svd.U, ("d_model", "rank")), "V": Measured(svd.V, ("d_model", "rank"))}
            spectrum = {**spectrum, **vectors}
        if len(probe.pairs) == 0:
            return spectrum
        features = probe.in_forms(probe.features)
        query, key = (features[..., probe.pairs[:, side]] for side in (0, 1))
        found = align_pairs(
            cosine_matrix(query, svd.U), cosine_matrix(key, svd.V), S, relative_gap=self.relative_gap
        )  # fmt: skip
        matched = (found.left + found.right) / 2
        plain = probe.for_heads(probe.features)  # without the bias coordinate
        logit = probe.heads.bilinear(plain[..., probe.pairs[:, 0]], plain[..., probe.pairs[:, 1]])
        alignment: Measurement = {
            "alignment/left": found.left.mean(-1),
            "alignment/right": found.right.mean(-1),
            "alignment/matched": matched.mean(-1),
            "alignment/matched_min": matched.amin(-1),
            "alignment/subspace": (found.subspace_left + found.subspace_right).mean(-1) / 2,
            "pair/left": Measured(found.left, ("pair",)),
            "pair/right": Measured(found.right, ("pair",)),
            "pair/sigma": Measured(found.sigma, ("pair",)),
            "pair/index": Measured(found.index.to(torch.int32), ("pair",)),
            "pair/logit": Measured(logit, ("pair",)),
        }
        if probe.pair_logits is None:  # proxy features of a real model: nobody knows the logits they should get
            return {**spectrum, **alignment}
        alignment = {**alignment, "alignment/logit_fidelity": logit_fidelity(logit, probe.pair_logits)}
        if len(probe.pairs) >= 3:
            alignment = {**alignment, "spectrum/target_spearman": spearman(found.sigma, probe.pair_logits)}
        return {**spectrum, **alignment}
