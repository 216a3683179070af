"""Who shares what: target pairs that share a singular vector, heads that share a template."""

from __future__ import annotations

import torch

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import align_pairs, cosine_matrix
from svf_lightning.probe import Probe


class PairSharing(ProbeMetric):
    """Counts target pairs that find, or share, a singular pair (Appendix E: more pairs than dimensions of the head).

    Per instance (or layer and head):
        sharing/n_aligned: target pairs whose matched cosines reach ``aligned`` on average, 0..P.
        sharing/n_shared: singular indices that are the best one for two target pairs or more, 0..R.
        sharing/best: mean over pairs of (left + right) / 2 at a pair's own best index, whoever shares it, in [0, 1].

    Arrays: pair/best, pair/best_index [pair].

    Args:
        aligned: From which mean cosine on a pair counts as aligned, in (0, 1).

    Raises:
        InputError: An option out of range.
    """

    def __init__(self, aligned: float = 0.9) -> None:
        if not 0 < aligned < 1:
            raise bad_value("aligned", aligned, "a cosine in (0, 1)", "change the PairSharing callback")
        self.aligned = aligned

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing without heads, features and target pairs."""
        if probe.heads is None or probe.features is None or len(probe.pairs) == 0:
            return {}
        svd = probe.svd
        features = probe.for_heads(probe.features)
        left, right = (
            cosine_matrix(features[..., probe.pairs[:, side]], vectors) for side, vectors in ((0, svd.U), (1, svd.V))
        )
        found = align_pairs(left, right, svd.S)
        index = (left * right).argmax(-1)
        best = ((left + right) / 2).gather(-1, index[..., None]).squeeze(-1)
        counts = torch.zeros(*index.shape[:-1], svd.S.shape[-1], device=index.device).scatter_add(
            -1, index, torch.ones_like(index, dtype=torch.float32)
        )
        return {
            "sharing/n_aligned": ((found.left + found.right) / 2 >= self.aligned).sum(-1).to(left.dtype),
            "sharing/n_shared": (counts >= 2).sum(-1).to(left.dtype),
            "sharing/best": best.mean(-1),
            "pair/best": Measured(best, ("pair",)),
            "pair/best_index": Measured(index.to(torch.int32), ("pair",)),
        }


class HeadSharing(ProbeMetric):
    """How several heads share one template (beyond the paper). The probe's last leading dimension is "head".

    Per instance:
        heads/participation: 1 / sum_h s_h^2, mean over pairs, where s_h is head h's share of the pair's logit
        |w_i^T Omega_h w_j|; in [1, n_heads]: 1 if one head carries a pair alone, n_heads if all carry it alike.
        heads/best: mean over pairs of (left + right) / 2 in the best head, at the best singular index, in [0, 1].
        heads/combined: the same, matched one to one, for the sum of the heads' forms, which is what the loss sees.
        heads/superposition: combined - best; above 0 where features are singular vectors of the sum of the heads
        rather than of a head.

    Arrays: head/share [head, pair].
    """

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing for a module without a dimension "head"."""
        if probe.heads is None or probe.features is None or "head" not in probe.batch_dims or len(probe.pairs) == 0:
            return {}
        if probe.batch_dims[-1] != "head":
            return {}
        features = probe.for_heads(probe.features)
        query, key = (features[..., probe.pairs[:, side]] for side in (0, 1))
        logit = probe.heads.bilinear(query, key).abs()  # [..., head, P]
        share = logit / logit.sum(-2, keepdim=True)
        svd = probe.svd
        left, right = cosine_matrix(query, svd.U), cosine_matrix(key, svd.V)
        at = (left * right).argmax(-1, keepdim=True)
        best = ((left + right) / 2).gather(-1, at).squeeze(-1).amax(-2).mean(-1)
        # heads that add up their logits are one head with all their rows
        together = AttentionHeads(
            probe.heads.W_Q.flatten(-3, -2), probe.heads.W_K.flatten(-3, -2), scale=probe.heads.scale
        )
        whole = together.svd()
        found = align_pairs(
            cosine_matrix(query[..., 0, :, :], whole.U), cosine_matrix(key[..., 0, :, :], whole.V), whole.S
        )
        combined = (found.left + found.right).mean(-1) / 2
        batch = probe.batch_dims[1:-1]
        return {
            "heads/participation": Measured((1 / share.square().sum(-2)).mean(-1), (), batch),
            "heads/best": Measured(best, (), batch),
            "heads/combined": Measured(combined, (), batch),
            "heads/superposition": Measured(combined - best, (), batch),
            "head/share": Measured(share, ("pair",)),
        }
