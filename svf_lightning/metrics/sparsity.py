"""How sparse attention scores are in the singular basis of a head (arXiv 2602.13524, section 6; arXiv 2410.00340).

A score is a sum over singular pairs: ``score_j = sum_k c_jk`` with contributions
``c_jk = (r . u_k) sigma_k (v_k . s_j)`` of pair k to the score of key j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.draws import keyed_generator
from svf_lightning.errors import bad_value

FEW = 4  # "most heads need 1 to 4 singular pairs" (Fig. 9)
_PERMUTATIONS = 1  # key of their draws
_COUNTED_DRAWS = 4  # rotations in which n_recon is counted, as it sorts


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


def n_recon(v: Float[Tensor, "... R"], share: float = 1.0) -> Int[Tensor, "..."]:
    """Smallest n such that the n largest signed entries add up to a share of the sum of all (for a sum < 0, mirrored).

    arXiv 2602.13524 (Fig. 9) has N_recon without a tolerance; its authors' helper takes shares of 1.0 and 0.7. The
    count for a share of 1.0 jumps on rounding where what is left over cancels: entries that add up to 1e-7 of the sum
    may make it larger by many. Shares below 1 do not have this.

    Args:
        v: Contributions of the singular pairs to a score.
        share: Of the sum that they must reach, in (0, 1].

    Returns:
        In 0..R: 0 only for a sum of 0; few if a few large contributions make the score, more than half of R if it is
        made of many small ones. -1 for a vector that holds NaN.

    Raises:
        InputError: A share out of range.
    """
    check_share(share)
    wide = v.double()
    total = wide.sum(-1, keepdim=True)
    mirrored = torch.where(total < 0, -wide, wide)
    reached = mirrored.sort(-1, descending=True).values.cumsum(-1) >= share * total.abs()
    reached[..., -1] = True  # all contributions together are the sum, whatever the rounding
    n = reached.to(torch.int8).argmax(-1) + 1
    return n.masked_fill(total.squeeze(-1) == 0, 0).masked_fill(v.isnan().any(-1), -1)


def last_eighth(rank: int) -> int:
    """How many of so many singular indices are the last eighth of the spectrum; at least one."""
    return max(1, rank // 8)


def check_share(share: float) -> None:
    """Raises InputError for a share of a score that is not in (0, 1]."""
    if not 0 < share <= 1:
        raise bad_value("recon_share", share, "a share of the score in (0, 1]", "take 1.0, or 0.7 for a tolerance")


def check_draws(n_draws: int) -> None:
    """Raises InputError for fewer than one random draw."""
    if n_draws < 1:
        raise bad_value("n_draws", n_draws, "an integer >= 1; one rotation alone is no control", "take 16")


def contribution_order(v: Float[Tensor, "... R"]) -> Int[Tensor, "... R"]:
    """Singular indices 0..R-1 from the largest contribution to the smallest, in the direction of their sum."""
    return torch.where(v.sum(-1, keepdim=True) < 0, -v, v).argsort(-1, descending=True)


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


class Sparsity(NamedTuple):
    """How sparse n relative scores are, each head's own n [..., n], and the three controls."""

    contributions: Float[Tensor, "... n R"]  # c~_k, relative
    score: Float[Tensor, "... n"]  # their sum, logit~_j
    sparseness: Float[Tensor, "... n"]  # S(v) in the singular basis
    n_recon: Int[Tensor, "... n"]
    top_index: Int[Tensor, "... n"]  # singular index that contributes most, 0..R-1; -1 for NaN
    shared: Float[Tensor, "... n draws"]  # S(v) under shared rotations
    independent: Float[Tensor, "... n draws"]  # S(v) under independent rotations
    permuted: Float[Tensor, "... n draws"]  # S(v) with u_k and v_k paired at random
    n_recon_draws: Int[Tensor, "... n counted"]  # n_recon under some of the shared rotations; -1 for NaN

    @property
    def n_recon_shared(self) -> Float[Tensor, "... n"]:
        """Mean of n_recon over some shared rotations."""
        return self._of_draws(self.n_recon_draws)

    @property
    def few_shared(self) -> Float[Tensor, "... n"]:
        """Share of these rotations in which n_recon is at most FEW."""
        return self._of_draws(self.n_recon_draws <= FEW)

    def _of_draws(self, values: Tensor) -> Tensor:
        is_nan = (self.n_recon_draws < 0).any(-1)
        return values.to(self.score.dtype).mean(-1).masked_fill(is_nan, torch.nan)


def measure_sparsity(
    query: Float[Tensor, "... n R"],
    key: Float[Tensor, "... n R"],
    direction: Float[Tensor, "... n R"],
    S: Float[Tensor, "... n1 R"],
    *,
    n_draws: int = 16,
    seed: int = 0,
    share: float = 1.0,
) -> Sparsity:
    """Sparseness of relative scores in the singular basis and in three controls.

    With A and B Haar-random: the **shared** rotation has ``U A`` on the query side and the key side's ``S V^T s~`` in
    the same A, so that every score stays what it was; the **independent** rotation has ``U A`` and ``V B`` with S kept,
    which keeps the spectrum and breaks the pairing. Identity matrices give the singular basis. The **permuted pairing**
    keeps the singular vectors themselves: ``u_k`` and ``sigma_k`` with another ``v``.

    Args:
        query: ``r . u_k``.
        key: ``u_k^T Omega s~`` with ``s~ = s_j - mean of the other keys``; times ``query`` the contributions.
        direction: ``v_k . s~``.
        S: Singular values, one row for all pairs (n1 = 1) or one each.
        n_draws: Rotations (or permutations) drawn for each control; the same for all heads and pairs.
        seed: Seed of the draws.
        share: Of the score, that N_recon must reach.
    """
    contributions = query * key
    R = query.shape[-1]
    A, B = haar_orthogonal(R, 2 * n_draws, seed=seed, device=query.device).to(query.dtype).chunk(2)
    shared, independent = [], []
    counts = []
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        left = query @ a
        rotated = left * (key @ a)
        shared.append(sparseness(rotated))
        if i < _COUNTED_DRAWS:
            counts.append(n_recon(rotated, share))
        independent.append(sparseness(left * S * (direction @ b)))
    generator = keyed_generator(seed, _PERMUTATIONS)
    orders = [torch.randperm(R, generator=generator).to(query.device) for _ in range(n_draws)]
    permuted = [sparseness(query * S * direction[..., order]) for order in orders]
    return Sparsity(
        contributions,
        contributions.sum(-1),
        sparseness(contributions),
        n_recon(contributions, share),
        top_contributor(contributions),
        torch.stack(shared, -1),
        torch.stack(independent, -1),
        torch.stack(permuted, -1),
        torch.stack(counts, -1),
    )


def top_contributor(v: Float[Tensor, "... R"]) -> Int[Tensor, "..."]:
    """Index of the entry that contributes most to the sum: the largest, or for a sum < 0 the smallest.

    Returns:
        In 0..R-1; -1 for a vector that holds NaN.
    """
    mirrored = torch.where(v.sum(-1, keepdim=True) < 0, -v, v)
    return mirrored.argmax(-1).masked_fill(v.isnan().any(-1), -1)
