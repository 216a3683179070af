"""How singular vectors of a head align with feature directions (arXiv 2602.13524, Figs. 1 to 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.metrics.geometry import unit_features

_SERVED = 0.5  # share of the target logit


class PairAlignment(NamedTuple):
    """What each of P target pairs (query feature i, key feature j) finds in the singular basis."""

    index: Int[Tensor, "... P"]  # type: ignore[assignment]  # matched singular index k, from 0; -1 if none is left for this pair
    left: Float[Tensor, "... P"]  # |cos(w_i, u_k)|, in [0, 1]; 0 where unmatched
    right: Float[Tensor, "... P"]  # |cos(w_j, v_k)|, in [0, 1]; 0 where unmatched
    sigma: Float[Tensor, "... P"]  # sigma_k, >= 0; 0 where unmatched
    subspace_left: Float[Tensor, "... P"]  # norm of the projection of w_i on the block of sigma_k, in [left, 1]
    subspace_right: Float[Tensor, "... P"]  # the same for w_j
    paired: Float[Tensor, "... P"]  # sum over the block of cos(w_i, u_k) cos(w_j, v_k), in [-1, 1]


def cosine_matrix(features: Float[Tensor, "... D N"], vectors: Float[Tensor, "... D R"]) -> Float[Tensor, "... N R"]:
    """Absolute cosines |cos(w_i, u_k)| between columns, in [0, 1]; 0 for a column that is zero.

    Raises:
        InputError: The two do not live in the same space (D differs).
    """
    return signed_cosine_matrix(features, vectors).abs()


def signed_cosine_matrix(
    features: Float[Tensor, "... D N"], vectors: Float[Tensor, "... D R"]
) -> Float[Tensor, "... N R"]:
    """Cosines between columns, in [-1, 1]; 0 for a column that is zero.

    Raises:
        InputError: The two do not live in the same space (D differs).
    """
    if features.shape[-2] != vectors.shape[-2]:
        raise bad_value(
            "vectors.shape",
            tuple(vectors.shape),
            f"[..., {features.shape[-2]}, R], as the features live in {features.shape[-2]} dimensions",
            "compare features and vectors of one residual stream",
        )
    return (unit_features(features).mT @ unit_features(vectors)).clamp(-1, 1)  # rounding may pass 1


def match_pairs(left: Float[Tensor, "... P R"], right: Float[Tensor, "... P R"]) -> Int[Tensor, "... P"]:
    """One-to-one assignment of P target pairs to R singular indices, maximizing the sum of ``left * right``.

    Hungarian algorithm (``scipy.optimize.linear_sum_assignment``), so a singular pair is never counted twice.

    Args:
        left: |cos(w_i, u_k)| for the query feature i of each pair.
        right: |cos(w_j, v_k)| for the key feature j of each pair.

    Returns:
        Singular index of each pair; -1 for the P - R pairs that are left over when P > R, and for a pair whose cosines
        hold NaN.
    """
    gain = (left * right).detach()
    undefined = gain.isnan().any(-1)
    gain = torch.nan_to_num(gain)
    n_pairs, n_singular = gain.shape[-2:]
    if n_pairs == 1:  # no competition: the best index is the best index
        return gain.argmax(-1).masked_fill(undefined, -1)
    rows = gain.double().cpu().numpy().reshape(-1, n_pairs, n_singular)
    index = torch.full((len(rows), n_pairs), -1, dtype=torch.long)
    for target, row in zip(index, rows, strict=True):
        pair, singular = linear_sum_assignment(row, maximize=True)
        target[torch.from_numpy(pair)] = torch.from_numpy(singular)
    return index.reshape(gain.shape[:-1]).to(gain.device).masked_fill(undefined, -1)


def align_pairs(
    left: Float[Tensor, "... P R"],
    right: Float[Tensor, "... P R"],
    S: Float[Tensor, "... R"],
    *,
    relative_gap: float = 0.1,
) -> PairAlignment:
    """Matched and subspace scores of the target pairs.

    Near-equal singular values leave their vectors free to rotate inside the common span; the subspace score is the norm
    of the projection of the unit feature on the span of all vectors whose sigma lies within ``relative_gap`` of the
    matched one, so it does not depend on that rotation. The paired score does not either, and knows which query goes
    with which key, and with which sign: ``cos(w_i, B w_j)`` with the part ``sum u_k v_k^T`` of the head that the block
    makes. It is 1 where the head turns key feature j into query feature i, 0 where it turns it into another one,
    negative where it takes attention off. A pair whose cosines hold NaN scores NaN throughout.

    Args:
        left: cos(w_i, u_k) for the query feature i of each pair (:func:`signed_cosine_matrix`). Absolute cosines give
            the same scores, but for the paired one.
        right: cos(w_j, v_k) for the key feature j of each pair.
        S: Singular values.
        relative_gap: Width of a block, as a fraction of the matched singular value.
    """
    paired_parts = left * right
    left, right = left.abs(), right.abs()
    index = match_pairs(left, right)
    is_matched = index >= 0
    undefined = (left * right).isnan().any(-1)
    at = index.clamp_min(0)
    sigma = S.gather(-1, at)
    block = (S[..., None, :] - sigma[..., :, None]).abs() <= relative_gap * sigma[..., :, None]

    def where_matched(scores: Tensor) -> Tensor:
        return scores.masked_fill(~is_matched, 0).masked_fill(undefined, torch.nan)

    def pick(cosines: Tensor) -> Tensor:
        return where_matched(cosines.gather(-1, at[..., None]).squeeze(-1))

    def project(cosines: Tensor) -> Tensor:
        return where_matched((cosines.square() * block).sum(-1).sqrt().clamp_max(1))

    paired = where_matched((paired_parts * block).sum(-1))
    return PairAlignment(index, pick(left), pick(right), where_matched(sigma), project(left), project(right), paired)


def share_served(effective: Float[Tensor, "... P"], target: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """Share of the pairs whose logit is nearer to its target than to 0, in [0, 1] (a choice: half of the target).

    Pairs with a target of 0 do not count; NaN where all are.
    """
    asked = target != 0
    served = asked & (effective / torch.where(asked, target, 1) >= _SERVED)
    return served.sum(-1).to(effective.dtype) / asked.sum(-1)


def logit_fidelity(effective: Float[Tensor, "... P"], target: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """``1 - mean |w_i^T Omega w_j - T_ij| / mean |T_ij|``: 1 where the head gives every pair its target logit.

    At most 1; 0 for a head that does nothing, negative for one that is further off than that (a choice). Where every
    target is 0 there is nothing to compare with: NaN, or -inf for a head that gives other logits.
    """
    return 1 - (effective - target).abs().mean(-1) / target.abs().mean(-1)


def line_through(
    x: Float[Tensor, "... P"], y: Float[Tensor, "... P"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Slope and intercept of the least-squares line of y on x; NaN where x is constant."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1)
    return slope, y.mean(-1) - slope * x.mean(-1)


def spearman(x: Float[Tensor, "... P"], y: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """Spearman rank correlation along the last dimension, ties at their mean rank; in [-1, 1], NaN for a constant."""

    def centred_ranks(values: Tensor) -> Tensor:
        below = (values[..., None, :] < values[..., :, None]).sum(-1)
        equal = (values[..., None, :] == values[..., :, None]).sum(-1)
        rank = below.double() + equal.double() / 2
        return rank - rank.mean(-1, keepdim=True)

    a, b = centred_ranks(x), centred_ranks(y)
    correlation = ((a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).to(x.dtype)
    return correlation.masked_fill(x.isnan().any(-1) | y.isnan().any(-1), torch.nan)
