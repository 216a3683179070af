"""Geometry of a set of features: Gram matrix, interference, dimensionality, attended features against the rest."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from svf_lightning.errors import bad_value


def unit_features(features: Float[Tensor, "... D N"]) -> Float[Tensor, "... D N"]:
    """Columns divided by their norm. A column that is zero has no direction and stays zero (a choice)."""
    tiny = torch.finfo(features.dtype).tiny
    scaled = features / features.abs().amax(-2, keepdim=True).clamp_min(tiny)  # squares may overflow
    return scaled / scaled.square().sum(-2, keepdim=True).sqrt().clamp_min(tiny)


def gram(features: Float[Tensor, "... D N"]) -> Float[Tensor, "... N N"]:
    """Signed cosines ``G = X^T X`` of the unit columns, in [-1, 1] up to rounding."""
    x = unit_features(features)
    return x.mT @ x


def degrees_from_orthogonal(cosines: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Angle by which vectors of a given cosine miss a right angle, in [0, 90] degrees."""
    return torch.rad2deg(cosines.abs().clamp_max(1).asin())


def share_in_span(vectors: Float[Tensor, "... D n"], span: Float[Tensor, "... D k"]) -> Float[Tensor, "... n"]:
    """Length of the projection of unit vectors on the span of others, in [0, 1]; of a random one about sqrt(k / D).

    Others that depend on each other span fewer dimensions than they are. NaN where something is not finite.
    """
    axes = unit_features(span)
    finite = torch.isfinite(axes).flatten(-2).all(-1)[..., None, None]
    U, S, _ = torch.linalg.svd(torch.where(finite, axes, 0.0), full_matrices=False)
    counted = S[..., :1] * max(span.shape[-2:]) * torch.finfo(S.dtype).eps < S
    along = (unit_features(vectors).mT @ U).square() * counted[..., None, :]
    share: Tensor = along.sum(-1).sqrt().clamp_max(1)
    return share.masked_fill(~finite.squeeze(-1), torch.nan)


def attended_vs_rest(
    gram: Float[Tensor, "... N N"], attended: Bool[Tensor, " N"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Mean |cosine| between the template's features and the rest, and inside the rest.

    Args:
        gram: Cosines of the features (:func:`gram`), or another symmetric measure of each two; sizes count.
        attended: True for the features that the template names.

    Returns:
        attended_vs_rest: mean of |G_ij| over i attended, j not; in [0, 1]; NaN if either set is empty.
        rest_vs_rest: mean of |G_ij| over i != j, both not attended; in [0, 1]; NaN for fewer than two such features.

    Raises:
        InputError: The mask does not have one entry per feature.
    """
    if attended.shape != gram.shape[-1:]:
        raise bad_value(
            "attended.shape", tuple(attended.shape), f"({gram.shape[-1]},), one entry per feature", "pass N"
        )
    size = gram.abs().double()  # a matrix product adds in another order for one matrix than for many: not to be seen
    a = attended.to(size.dtype)
    r = 1 - a
    to_rest = size @ r
    between = (to_rest @ a) / (a.sum() * r.sum())
    inside = (to_rest @ r - size.diagonal(dim1=-2, dim2=-1) @ r) / (r.sum() * (r.sum() - 1))
    return between.to(gram.dtype), inside.to(gram.dtype)


def feature_dimensionality(
    features: Float[Tensor, "... D N"], cosines: Float[Tensor, "... N N"] | None = None
) -> Float[Tensor, "... N"]:
    """``D_i = |w_i|^2 / sum_j (x_i . w_j)^2`` (Elhage et al. 2022, *Toy Models of Superposition*).

    Args:
        features: W.
        cosines: :func:`gram` of the features, if it is there already.

    Returns:
        In [0, 1]: 1 for a feature with a dimension of its own, 1/2 for one of an antipodal pair, 0 for a zero column.
    """
    cosines = gram(features) if cosines is None else cosines
    tiny = torch.finfo(features.dtype).tiny
    scaled = features / features.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # squares may under- or overflow
    size = scaled.square().sum(-2)
    overlap = (cosines.square() @ size[..., None]).squeeze(-1)
    return size / overlap.clamp_min(tiny)


def interference(features: Float[Tensor, "... D N"]) -> Float[Tensor, "..."]:
    """``||E_X||_2`` with ``E_X = X^T X - I``: spectral norm of the off-diagonal cosines (arXiv 2602.13524, section 5).

    0 for orthonormal features, N - 1 for N copies of one direction. Computed on the smaller of X^T X and X X^T: they
    share their non-zero eigenvalues, and for N > D the remaining ones are 0, which makes the norm at least 1.
    """
    x = unit_features(features)
    n_model, n_features = x.shape[-2:]
    small = x @ x.mT if n_features > n_model else x.mT @ x
    finite = torch.isfinite(small).flatten(-2).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], small, 0.0))
    low = torch.zeros_like(eigenvalues[..., 0]) if n_features > n_model else eigenvalues[..., 0]
    norm = torch.maximum(eigenvalues[..., -1] - 1, 1 - low)
    return torch.where(finite, norm, torch.nan)
