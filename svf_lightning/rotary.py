"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), as the model families define them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Layout = Literal["halves", "adjacent", "interleaved"]


def rotary_angles(
    positions: Shaped[Tensor, "*positions"], n_rotary: int, *, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "*positions rotary"], Float[Tensor, "*positions rotary"]]:
    """Cosines and sines for :func:`rotate` in the layout "halves": component k turns by ``position * base^(-2k/n)``.

    Args:
        positions: Positions of any sign, whole or not.
        n_rotary: n, number of components that turn; even.
        base: Base of the frequencies, > 1.
        dtype: Of the result; angles are computed in float64.
    """
    half = n_rotary // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions[..., None] * frequencies
    cos, sin = (torch.cat([part, part], dim=-1).to(dtype) for part in (angles.cos(), angles.sin()))
    return cos, sin


def rotate(
    x: Float[Tensor, "... H"],
    cos: Float[Tensor, "... rotary"],
    sin: Float[Tensor, "... rotary"],
    *,
    layout: Layout = "halves",
    transpose: bool = False,
) -> Float[Tensor, "... H"]:
    """Rotate the first ``rotary`` components of vectors.

    Args:
        x: Vectors.
        cos: Cosines of the angles. Their leading dimensions and those of x are broadcast against each other.
        sin: Sines.
        layout: "halves": component k turns with k + rotary/2 (GPT-NeoX, Llama). "adjacent": 2k with 2k + 1, angles
            given in halves (GLM). "interleaved": 2k with 2k + 1, each angle given twice in a row (Cohere).
        transpose: Rotate back (the transposed matrix).
    """
    n = cos.shape[-1]
    if layout == "adjacent":
        cos, sin = (part[..., : n // 2].repeat_interleave(2, dim=-1) for part in (cos, sin))
    turning, rest = x[..., :n], x[..., n:]

    def quarter(v: Tensor) -> Tensor:
        """A turn by 90 degrees."""
        if layout == "halves":
            return torch.cat([-v[..., n // 2 :], v[..., : n // 2]], dim=-1)
        return torch.stack([-v[..., 1::2], v[..., 0::2]], dim=-1).flatten(-2)

    turned = turning * cos - quarter(turning * sin) if transpose else turning * cos + quarter(turning) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
