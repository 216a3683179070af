"""SVDAlignment: how the singular vectors of the heads align with the features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import (
    align_pairs,
    line_through,
    logit_fidelity,
    n_significant,
    share_served,
    sigma_ratio,
    signed_cosine_matrix,
    spearman,
    stable_rank,
)
from svf_lightning.metrics.dynamics import alignment_by_chance
from svf_lightning.probe import Probe
from svf_lightning.quantities import COSINES, SPECTRUM, Place, Quantity, half_of_the_way, on_another_scale

_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1}
_PAIR: Any = {"dims": ("pair",), "places": Place.NOWHERE}
_VECTORS: Any = {"dims": ("d_model", "rank"), "places": Place.NOWHERE, "source": "method, section 5"}


class SVDAlignment(ProbeMetric):
    """Measures the heads' spectrum, and their singular vectors against the features (method, section 2).

    Per instance (or layer and head). The spectrum of heads alone; with features and target pairs their alignment; with
    three pairs or more the order of their singular values. The cosines of all features with all singular vectors follow
    from ``U``, ``V`` and ``W``; open_trajectory computes them.

    Args:
        relative_gap: Singular values within this fraction of the matched one count as one block, in [0, 1).
        significant: n_significant counts singular values above this fraction of the largest, in [0, 1).
        keep_vectors: Keep U and V in the trajectory, where there are features (large for real models).

    Raises:
        InputError: An option out of range.
    """

    needs = "a head (not template=zero)"
    quantities = (
        Quantity(
            "spectrum/sigma_1", "first singular value", "How strong the strongest singular pair of the head is.",
            symbol="σ_1", unit="nats", low=0, source="Fig. 2b; method, section 2", panel=SPECTRUM, colour="green",
        ),
        Quantity(
            "spectrum/sigma_2", "second singular value", "How strong the second singular pair is.",
            symbol="σ_2", unit="nats", low=0, source="method, section 2", places=Place.NOWHERE,
            panel=SPECTRUM, colour="orange",
        ),
        Quantity(
            "spectrum/sigma_ratio", "second over first singular value", "0 for a head of rank one.",
            symbol="σ_2/σ_1", low=0, high=1, source="Theorem 1", places=Place.TABLE | Place.COMPARISON,
        ),
        Quantity(
            "spectrum/sigma_ratio_in_span", "the same inside the span of the features",
            "Of Omega between the features' span alone: with fewer features than dimensions, what lies outside keeps "
            "its initial noise for ever.", low=0, high=1, logged="no", source="Theorem 1",
            needs="fewer features than dimensions", places=Place.TABLE,
        ),
        Quantity(
            "spectrum/n_significant_in_span", "significant singular values inside the span of the features",
            "As spectrum/n_significant, of Omega between the features' span alone.", unit="count", low=0, logged="no",
            source="method, section 2", needs="fewer features than dimensions", places=Place.TABLE,
        ),
        Quantity(
            "alignment/matched_in_span", "alignment inside the span of the features",
            "As alignment/matched, with singular vectors of Omega between the features' span alone.", **_COSINE,
            better="higher", logged="no", source="method, section 2", needs="fewer features than dimensions",
            places=Place.TABLE,
        ),
        Quantity(
            "spectrum/n_significant", "significant singular values",
            "Singular values above a fraction of the largest (5 % by default).",
            unit="count", low=0, source="method, section 2", places=Place.NOWHERE,
        ),
        Quantity(
            "spectrum/stable_rank", "stable rank", "||Omega||_F^2 / sigma_1^2: singular values that count.",
            low=1, source="method, section 2", places=Place.NOWHERE,
        ),
        Quantity(
            "spectrum/target_spearman", "order of singular values against target logits",
            "Spearman correlation of matched singular values with |T_ij| of their pairs.",
            low=-1, high=1, better="higher", source="Fig. 2b", logged="mean",
        ),
        Quantity(
            "spectrum/target_slope", "singular values against target logits, slope",
            "Slope of the least-squares line of matched singular values on |T_ij|.", better=None, logged="mean",
            source="Fig. 2b",
        ),
        Quantity(
            "spectrum/target_intercept", "singular values against target logits, intercept",
            "Where that line is at a target of 0.", unit="nats", logged="no", source="Fig. 2b",
        ),
        Quantity(
            "alignment/matched", "alignment of singular vectors",
            "Cosine of singular vectors with the features of their target pair, mean of left and right and over pairs.",
            **_COSINE, better="higher", source="Figs. 2a, 3; method, section 2", panel=COSINES, colour="blue",
            places=Place.TABLE | Place.PROGRESS | Place.COMPARISON | Place.SWEEP, level="aligned",
            change=Quantity(
                "dynamics/t_align", "singular vectors come to align",
                "Step from which the alignment has covered 90 % of its way, and stays there; null where they did not "
                "align.",
                symbol="t_align", unit="steps", low=0, source="Fig. 3; method, section 3",
            ),
            halfway=half_of_the_way("align", "singular vectors come to align"),
        ),
        Quantity(
            "alignment/above_chance", "alignment above chance",
            "(alignment/matched - c) / (1 - c) with the mean c of random features: 0 by chance, 1 at best.",
            high=1, better="higher", logged="mean", source="method, section 8",
        ),
        Quantity(
            "alignment/angle", "angle between singular vectors and features",
            "arccos of the matched cosines, mean of left and right and over pairs.", unit="degrees", low=0, high=90,
            better="lower", source="Fig. 3", level="aligned, degrees",
            **on_another_scale("align_degrees", "singular vectors come to align, in degrees"),
        ),
        Quantity(
            "alignment/sine", "sine of that angle", "Linear in a small angle, as a cosine near a right angle is; mean.",
            low=0, high=1, better="lower", source="Fig. 3", level="aligned, sine",
            **on_another_scale("align_sine", "singular vectors come to align, by their sine"),
        ),
        Quantity(
            "alignment/matched_min", "alignment of the weakest pair",
            "As alignment/matched, of the pair that aligns worst.", **_COSINE, better="higher", source="Fig. 2b",
            level="weakest aligned",
        ),
        Quantity(
            "alignment/paired", "alignment with sign and pairing",
            "cos(w_i, B w_j), B the part of the head that the matched singular value's block makes, with the sign of "
            "T_ij; mean over pairs: 1 only where the head turns the right key into the right query.",
            unit="cosine", low=-1, high=1, better="higher", logged="mean", source="method, section 2", level="paired",
        ),
        Quantity(
            "alignment/paired_min", "the same, weakest pair", "As alignment/paired, of the worst pair.",
            unit="cosine", low=-1, high=1, better="higher", logged="mean", source="method, section 2",
            level="weakest paired",
        ),
        Quantity(
            "alignment/left", "alignment of left singular vectors",
            "Cosine of u with the query feature of its pair, mean over pairs.", **_COSINE, better="higher",
            source="Fig. 2a", places=Place.NOWHERE,
        ),
        Quantity(
            "alignment/right", "alignment of right singular vectors",
            "Cosine of v with the key feature of its pair, mean over pairs.", **_COSINE, better="higher",
            source="Fig. 2a", places=Place.NOWHERE,
        ),
        Quantity(
            "alignment/subspace", "alignment with the singular subspace",
            "Length of a unit feature's projection on the vectors of near-equal singular values, mean.",
            **_COSINE, better="higher", source="method, section 2",
        ),
        Quantity(
            "alignment/logit_fidelity", "logits as targeted",
            "1 - mean |w_i^T Omega w_j - T_ij| / mean |T_ij|: 1 where each pair gets its target logit.",
            high=1, better="higher", source="method, section 2",
        ),
        Quantity(
            "alignment/served", "pairs that are served",
            "Share of the pairs whose logit w_i^T Omega w_j reaches half of its target or more.",
            unit="share", low=0, high=1, better="higher", logged="mean", source="Fig. 2b",
        ),
        Quantity(
            "singular_values", "singular value", "Singular values of the head, descending.",
            symbol="σ_k", unit="nats", low=0, dims=("rank",), places=Place.NOWHERE, source="Fig. 2b",
        ),
        Quantity("U", "left singular vectors", "Their signs are free.", symbol="U", **_VECTORS),
        Quantity("V", "right singular vectors", "Their signs are free.", symbol="V", **_VECTORS),
        Quantity("pair/left", "left cosine of a pair", "|cos(w_i, u_k)| of a matched pair.", **_COSINE, **_PAIR),
        Quantity("pair/right", "right cosine of a pair", "|cos(w_j, v_k)| of a matched pair.", **_COSINE, **_PAIR),
        Quantity("pair/sigma", "matched singular value", symbol="σ", unit="nats", low=0, **_PAIR),
        Quantity("pair/index", "matched singular index", "From 0; -1 for a pair that found none left.", **_PAIR),
        Quantity("pair/logit", "logit of a pair", "w_i^T Omega w_j, the logit that the head gives it.",
                 unit="nats", **_PAIR),
    )  # fmt: skip

    def __init__(self, relative_gap: float = 0.1, significant: float = 0.05, keep_vectors: bool = True) -> None:
        for name, value in (("relative_gap", relative_gap), ("significant", significant)):
            if not 0 <= value < 1:
                raise bad_value(name, value, "a fraction in [0, 1)", "change the SVDAlignment callback")
        self.relative_gap, self.significant, self.keep_vectors = relative_gap, significant, keep_vectors

    def _in_span(self, probe: Probe, features: Tensor) -> dict[str, Tensor]:
        """The head between fewer features than there are dimensions; nothing for more, or with biases."""
        D, N = features.shape[-2:]
        assert probe.heads is not None
        if N >= D or probe.heads.has_bias:
            return {}
        Q = torch.linalg.qr(features).Q
        inside = AttentionHeads(probe.heads.W_Q @ Q, probe.heads.W_K @ Q, scale=probe.heads.scale).svd()
        seen = Q.mT @ features
        query, key = (seen[..., probe.pairs[:, side]] for side in (0, 1))
        pairs = align_pairs(signed_cosine_matrix(query, inside.U), signed_cosine_matrix(key, inside.V), inside.S)
        return {
            "spectrum/sigma_ratio_in_span": sigma_ratio(inside.S),
            "spectrum/n_significant_in_span": n_significant(inside.S, self.significant).to(inside.S.dtype),
            "alignment/matched_in_span": (pairs.left + pairs.right).mean(-1) / 2,
        }

    def measure(self, probe: Probe) -> Measurement:
        """One verified SVD of all heads; nothing without heads."""
        if probe.heads is None:
            return {}
        svd = probe.svd
        S = svd.S
        measured: dict[str, Tensor] = {
            "spectrum/sigma_1": S[..., 0],
            "spectrum/sigma_ratio": sigma_ratio(S),
            "spectrum/n_significant": n_significant(S, self.significant).to(S.dtype),
            "spectrum/stable_rank": stable_rank(S),
            "singular_values": S,
        }
        if S.shape[-1] > 1:
            measured["spectrum/sigma_2"] = S[..., 1]
        if probe.features is None:
            return measured
        if self.keep_vectors:
            measured |= {"U": svd.U, "V": svd.V}
        if len(probe.pairs) == 0:
            return measured
        features = probe.in_forms(probe.features)
        query, key = (features[..., probe.pairs[:, side]] for side in (0, 1))
        pairs = align_pairs(
            signed_cosine_matrix(query, svd.U),
            signed_cosine_matrix(key, svd.V),
            S,
            relative_gap=self.relative_gap,
        )
        matched = (pairs.left + pairs.right) / 2
        chance = alignment_by_chance(svd.U.shape[-2], S.shape[-1], len(probe.pairs)).matched.mean
        sides = torch.stack([pairs.left, pairs.right])
        paired = pairs.paired if probe.pair_logits is None else pairs.paired * probe.pair_logits.sign()
        plain = probe.for_heads(probe.features)  # without the bias coordinate
        logit = probe.heads.bilinear(plain[..., probe.pairs[:, 0]], plain[..., probe.pairs[:, 1]])
        measured |= {
            "alignment/left": pairs.left.mean(-1),
            "alignment/right": pairs.right.mean(-1),
            "alignment/matched": matched.mean(-1),
            "alignment/matched_min": matched.amin(-1),
            "alignment/above_chance": (matched.mean(-1) - chance) / (1 - chance),
            "alignment/angle": torch.rad2deg(sides.acos()).mean((0, -1)),
            "alignment/sine": (1 - sides.square()).sqrt().mean((0, -1)),
            "alignment/paired": paired.mean(-1),
            "alignment/paired_min": paired.amin(-1),
            "alignment/subspace": (pairs.subspace_left + pairs.subspace_right).mean(-1) / 2,
            "pair/left": pairs.left,
            "pair/right": pairs.right,
            "pair/sigma": pairs.sigma,
            "pair/index": pairs.index.to(torch.int32),
            "pair/logit": logit,
        }
        measured |= self._in_span(probe, plain)
        if probe.pair_logits is None:  # proxy features of a real model have no target logits
            return measured
        measured["alignment/logit_fidelity"] = logit_fidelity(logit, probe.pair_logits)
        measured["alignment/served"] = share_served(logit, probe.pair_logits)
        if len(probe.pairs) >= 3:
            sizes = probe.pair_logits.abs()  # a singular value has no sign
            measured["spectrum/target_spearman"] = spearman(pairs.sigma, sizes)
            line = line_through(sizes.to(pairs.sigma), pairs.sigma)
            measured |= dict(zip(("spectrum/target_slope", "spectrum/target_intercept"), line, strict=True))
        return measured
