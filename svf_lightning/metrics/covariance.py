"""Covariance of vectors that come in parts, and an estimate of it that few of them allow."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from svf_lightning.errors import bad_value


class RunningCovariance:
    """Centred covariance of all rows so far, in float64; memory does not grow with them.

    Parts are joined by their means and scatters (Chan, Golub and LeVeque 1979), as ``E[x^2] - E[x]^2`` would cancel:
    tokens of one layer share a mean that is far longer than what differs between them.

    Args:
        n_dims: D.
        device: Where to keep it.
    """

    def __init__(self, n_dims: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(n_dims, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(n_dims, n_dims, dtype=torch.float64, device=device)

    def update(self, rows: Float[Tensor, "n D"]) -> None:
        """Add rows, any number of them.

        Raises:
            InputError: They have another length than D.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise bad_value("rows.shape", tuple(rows.shape), f"[n, {len(self.mean)}]", "pass one row per token")
        if not len(rows):
            return
        wide = rows.to(self.mean)
        n, mean = len(wide), wide.mean(0)
        centred = wide - mean
        shift = mean - self.mean
        total = self.count + n
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    def covariance(self) -> Float[Tensor, "D D"]:
        """Sum of squares around the mean, divided by the number of rows (a choice); NaN without rows."""
        return self._scatter / self.count if self.count else torch.full_like(self._scatter, torch.nan)


def shrunk_covariance(
    covariance: Float[Tensor, "... D D"], n: int
) -> tuple[Float[Tensor, "... D D"], Float[Tensor, "..."]]:
    """A covariance drawn towards a multiple of the identity, as far as the size of its sample asks for.

    ``(1 - rho) S + rho tr(S)/D I`` with the rho of OAS, for which nothing has to be chosen (Chen, Wiesel, Eldar and
    Hero 2010, *Shrinkage algorithms for MMSE covariance estimation*, Eq. 23):
    ``rho = min(1, ((1 - 2/D) tr(S^2) + tr(S)^2) / ((n + 1 - 2/D) (tr(S^2) - tr(S)^2 / D)))``. It is derived for
    independent Gaussian rows. Tokens of one text are neither, so that true errors are larger than it takes them to be.

    Args:
        covariance: S, symmetric and positive semi-definite.
        n: Number of rows that it was estimated from, >= 1.

    Returns:
        The estimate, and rho in [0, 1]: 1 where S is a multiple of the identity, as both are then the same.

    Raises:
        InputError: n < 1.
    """
    if n < 1:
        raise bad_value("n", n, "an integer >= 1", "add rows before estimating")
    D = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = covariance.square().sum((-2, -1))
    spread = squares - trace.square() / D  # of the eigenvalues; 0 if they are all equal
    rho = ((1 - 2 / D) * squares + trace.square()) / ((n + 1 - 2 / D) * spread)
    rho = torch.where(spread > D * torch.finfo(covariance.dtype).eps * squares, rho.clamp_max(1), 1.0)
    rho = rho.masked_fill(trace.isnan(), torch.nan)
    eye = torch.eye(D, dtype=covariance.dtype, device=covariance.device)
    target = (trace / D)[..., None, None] * eye
    return (1 - rho)[..., None, None] * covariance + rho[..., None, None] * target, rho


def effective_rank(covariance: Float[Tensor, "... D D"]) -> Float[Tensor, "..."]:
    """``tr(S)^2 / tr(S^2)``, the participation ratio of the eigenvalues: D if they are equal, 1 if there is only one.

    NaN for a covariance that is 0.
    """
    return covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square() / covariance.square().sum((-2, -1))
