"""How sparse attention scores are in the singular basis of a head (arXiv 2602.13524, section 6; arXiv 2410.00340).

A score is a sum over singular pairs: ``score_j = sum_k c_jk`` with contributions
``c_jk = (r . u_k) sigma_k (v_k . s_j)`` of pair k to the score of key j.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value


def relative_attention(
    contributions: Float[Tensor, "... keys R"], is_key: Bool[Tensor, "... keys"] | None = None
) -> Float[Tensor, "... keys R"]:
    """Contributions relative to the other keys: ``c_jk`` minus the mean of ``c_ik`` over the keys i != j.

    The softmax sees differences of scores only, and the sum over k of these is such a difference.

    Args:
        contributions: c, any sign.
        is_key: False for positions that the query does not see (padding, or after the query); None if it sees all.

    Returns:
        In the units of the scores; 0 at positions that are no keys, NaN where there is only one key to compare.

    Raises:
        InputError: The mask has another number of keys.
    """
    if is_key is None:
        is_key = torch.ones(contributions.shape[-2], dtype=torch.bool, device=contributions.device)
    if is_key.shape[-1] != contributions.shape[-2]:
        raise bad_value(
            "is_key.shape", tuple(is_key.shape), f"[..., {contributions.shape[-2]}], one entry per key", "pass n keys"
        )
    seen = is_key[..., None]
    kept = contributions.masked_fill(~seen, 0)
    n_others = (seen.sum(-2, keepdim=True) - 1).to(contributions.dtype)
    others = (kept.sum(-2, keepdim=True) - kept) / n_others
    return (kept - others).masked_fill(~seen, 0)


def sparseness(v: Float[Tensor, "... R"]) -> Float[Tensor, "..."]:
    """Rolls-Tovee sparseness ``S(v) = (mean |v|)^2 / mean(v^2)`` (Rolls and Tovee 1995).

    Returns:
        In [1/R, 1]: 1/R if a single entry is not 0, 1 if all have the same size; lower is sparser. Independent Gaussian
        entries give 2/pi = 0.637, products of two of them (2/pi)^2 = 0.405. NaN for a vector of zeros.
    """
    size = v.abs()
    size = size / size.amax(-1, keepdim=True)  # squares may under- or overflow
    return size.mean(-1).square() / size.square().mean(-1)


def n_recon(v: Float[Tensor, "... R"]) -> Int[Tensor, "..."]:
    """Smallest n such that the n largest signed entries add up to at least the sum of all (for a sum < 0, mirrored).

    Returns:
        In 0..R: 0 only for a sum of 0; few if a few large contributions make the score, more than half of R if it is
        made of many small ones. -1 for a vector that holds NaN.
    """
    wide = v.double()
    total = wide.sum(-1, keepdim=True)
    mirrored = torch.where(total < 0, -wide, wide)
    reached = mirrored.sort(-1, descending=True).values.cumsum(-1) >= total.abs()
    reached[..., -1] = True  # all of them are the sum, whatever the rounding
    n = reached.to(torch.int8).argmax(-1) + 1
    return n.masked_fill(total.squeeze(-1) == 0, 0).masked_fill(v.isnan().any(-1), -1)


def haar_orthogonal(
    size: int, n_draws: int, *, seed: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "n R R"]:
    """Orthogonal matrices drawn from the Haar measure, float64, the same on every device.

    QR of Gaussian matrices with the signs of R's diagonal taken out (Mezzadri 2007, *How to generate random matrices
    from the classical compact groups*). Draws from a generator of its own, so training is not disturbed.

    Args:
        size: R.
        n_draws: Number of matrices.
        seed: Seed of the draws.
        device: Where to put them.
    """
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n_draws, size, size, generator=generator, dtype=torch.float64))
    haar: Tensor = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return haar.to(device)


def rotated_contributions(
    query: Float[Tensor, "... R"],
    S: Float[Tensor, "... R"],
    keys: Float[Tensor, "... n R"],
    A: Float[Tensor, "... R R"],
    B: Float[Tensor, "... R R"] | None = None,
) -> Float[Tensor, "... n R"]:
    """Contributions in a rotated basis: the controls for sparseness in the singular basis.

    Args:
        query: Coordinates ``r . u_k`` of the query.
        S: Singular values.
        keys: Coordinates ``v_k . s_j`` of the keys.
        A: Orthogonal matrix for the query side.
        B: None for the **shared** rotation: query side ``U A``, and ``S V^T s`` in the same A, so every score stays
            what it was. An orthogonal matrix for the **independent** rotation: ``U A`` and ``V B`` with S kept, which
            keeps the spectrum and breaks the pairing.

    Returns:
        Contributions [..., n, R]; identity matrices give those of the singular basis.
    """
    A = A.to(query.dtype)
    left = (query[..., None, :] @ A).squeeze(-2)
    if B is None:
        return left[..., None, :] * ((keys * S[..., None, :]) @ A)
    return (left * S)[..., None, :] * (keys @ B.to(keys.dtype))
