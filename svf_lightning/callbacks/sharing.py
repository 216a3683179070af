"""Who shares what: target pairs that share a singular vector, heads that share a template."""

from __future__ import annotations

import torch

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.heads import PARTS, AttentionHeads
from svf_lightning.metrics import align_pairs, cosine_matrix
from svf_lightning.probe import Probe
from svf_lightning.quantities import Place, Quantity


class PairSharing(ProbeMetric):
    """Counts target pairs that find, or share, a singular pair (Appendix E: more pairs than dimensions of the head).

    Per instance (or layer and head).

    Args:
        aligned: From which mean cosine on a pair counts as aligned, in (0, 1).

    Raises:
        InputError: An option out of range.
    """

    needs = "a head (not template=zero)"
    quantities = (
        Quantity(
            "sharing/n_aligned", "pairs with a singular pair of their own",
            "Target pairs whose matched cosines reach a threshold on average (0.9 by default).",
            unit="count", low=0, logged="mean", better="higher", source="Appendix E",
        ),
        Quantity(
            "sharing/n_shared", "singular pairs that are shared",
            "Singular indices that are the best one for two target pairs or more.",
            unit="count", low=0, logged="mean", source="Appendix E",
        ),
        Quantity(
            "sharing/n_distinct", "singular pairs in use",
            "Distinct singular indices that are the best one for a pair.",
            unit="count", low=0, logged="mean", source="Theorem 1, Appendix E",
        ),
        Quantity(
            "sharing/best", "alignment with the best singular pair",
            "Mean of left and right cosine at a pair's own best index, whoever shares it, mean over pairs.",
            unit="|cosine|", low=0, high=1, logged="mean", better="higher", source="Appendix E",
        ),
        Quantity("pair/best", "cosine of a pair at its best index", unit="|cosine|", low=0, high=1, dims=("pair",),
                 places=Place.NOWHERE),
        Quantity("pair/best_index", "best singular index of a pair", "From 0.", dims=("pair",), places=Place.NOWHERE),
    )  # fmt: skip

    def __init__(self, aligned: float = 0.9) -> None:
        if not 0 < aligned < 1:
            raise bad_value("aligned", aligned, "a cosine in (0, 1)", "change the PairSharing callback")
        self.aligned = aligned

    def measure(self, probe: Probe) -> Measurement:
        """The best singular index of every pair; nothing without heads, features and target pairs."""
        if probe.heads is None or probe.features is None or len(probe.pairs) == 0:
            return {}
        svd = probe.svd
        features = probe.in_forms(probe.features)
        left, right = (
            cosine_matrix(features[..., probe.pairs[:, side]], vectors) for side, vectors in ((0, svd.U), (1, svd.V))
        )
        aligned = align_pairs(left, right, svd.S)
        index = (left * right).argmax(-1)
        best = ((left + right) / 2).gather(-1, index[..., None]).squeeze(-1)
        counts = torch.zeros(*index.shape[:-1], svd.S.shape[-1], device=index.device).scatter_add(
            -1, index, torch.ones_like(index, dtype=torch.float32)
        )
        return {
            "sharing/n_aligned": ((aligned.left + aligned.right) / 2 >= self.aligned).sum(-1).to(left.dtype),
            "sharing/n_shared": (counts >= 2).sum(-1).to(left.dtype),
            "sharing/n_distinct": (counts >= 1).sum(-1).to(left.dtype),
            "sharing/best": best.mean(-1),
            "pair/best": best,
            "pair/best_index": index.to(torch.int32),
        }


class HeadSharing(ProbeMetric):
    """How several heads share one template (beyond the paper), per instance.

    The probe's last leading dimension is "head".
    """

    needs = "several heads (--model.n_heads=4)"
    quantities = (
        Quantity(
            "heads/participation", "heads that carry a pair",
            "1 / sum_h s_h^2 with head h's share s_h of a pair's |w_i^T Omega_h w_j|, mean over pairs: 1 for one head "
            "alone, n_heads if all carry it alike.", unit="count", low=1, logged="mean", source="beyond the paper",
        ),
        Quantity(
            "heads/best", "alignment in the best head",
            "Mean of left and right cosine in the best head, at the best singular index, mean over pairs.",
            unit="|cosine|", low=0, high=1, logged="mean", better="higher", source="beyond the paper",
        ),
        Quantity(
            "heads/combined", "alignment of the sum of the heads",
            "As alignment/matched, for the sum of the heads' forms, which is what the loss sees.",
            unit="|cosine|", low=0, high=1, logged="mean", better="higher", source="beyond the paper",
        ),
        Quantity(
            "heads/superposition", "superposition across heads",
            "heads/combined - heads/best: above 0 where features are singular vectors of the sum of the heads.",
            unit="cosine", low=-1, high=1, logged="mean", source="beyond the paper",
        ),
        Quantity("head/share", "share of a pair's logit", "A head's part of a pair's |logit|; they sum to 1.",
                 low=0, high=1, dims=("pair",), places=Place.NOWHERE, source="beyond the paper"),
    )  # fmt: skip

    def measure(self, probe: Probe) -> Measurement:
        """Every head's part in every pair; nothing for a module without a dimension "head"."""
        if probe.heads is None or probe.features is None or "head" not in probe.batch_dims or len(probe.pairs) == 0:
            return {}
        if probe.batch_dims[-1] != "head":
            return {}
        features = probe.for_heads(probe.features)
        query, key = (features[..., probe.pairs[:, side]] for side in (0, 1))
        logit = probe.heads.bilinear(query, key).abs()  # [..., head, P]
        share = logit / logit.sum(-2, keepdim=True)
        svd = probe.svd
        query, key = (probe.in_forms(probe.features)[..., probe.pairs[:, side]] for side in (0, 1))
        left, right = cosine_matrix(query, svd.U), cosine_matrix(key, svd.V)
        at = (left * right).argmax(-1, keepdim=True)
        best = ((left + right) / 2).gather(-1, at).squeeze(-1).amax(-2).mean(-1)
        whole = _together(probe.heads).svd()
        aligned = align_pairs(
            cosine_matrix(query[..., 0, :, :], whole.U), cosine_matrix(key[..., 0, :, :], whole.V), whole.S
        )
        combined = (aligned.left + aligned.right).mean(-1) / 2
        return {
            "heads/participation": (1 / share.square().sum(-2)).mean(-1),
            "heads/best": best,
            "heads/combined": combined,
            "heads/superposition": combined - best,
            "head/share": share,
        }


def _together(heads: AttentionHeads) -> AttentionHeads:
    """The sum of the forms of several heads, the last leading dimension: one head with the rows of all."""
    biases = {name: getattr(heads, name) for name in PARTS[2:]}
    flat = {name: None if bias is None else bias.flatten(-2) for name, bias in biases.items()}
    return AttentionHeads(heads.W_Q.flatten(-3, -2), heads.W_K.flatten(-3, -2), scale=heads.scale, **flat)
