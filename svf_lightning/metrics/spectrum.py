"""Shape of a head's singular spectrum."""

from jaxtyping import Float, Int
from torch import Tensor


def n_significant(S: Float[Tensor, "... R"], threshold: float = 0.05) -> Int[Tensor, "..."]:
    """Number of singular values above ``threshold`` (fraction, in (0, 1)) of the largest (a choice: 5 %).

    Returns:
        Count in 0..R; 0 for a head that is zero, or not finite.
    """
    return (threshold * S[..., :1] < S).sum(-1)


def stable_rank(S: Float[Tensor, "... R"]) -> Float[Tensor, "..."]:
    """``||Omega||_F^2 / sigma_1^2``, in [1, R]; NaN for a head that is zero."""
    return (S / S[..., :1]).square().sum(-1)


def sigma_ratio(S: Float[Tensor, "... R"]) -> Float[Tensor, "..."]:
    """``sigma_2 / sigma_1``, in [0, 1]: 0 for a rank-one head (and for R = 1), NaN for a head that is zero."""
    return S[..., 1] / S[..., 0] if S.shape[-1] > 1 else 0 * S[..., 0] / S[..., 0]
