"""Unwhitening: are singular vectors of a real model nearer to features once Theorem 1 is taken back?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from svf_lightning.callbacks.base import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.heads import HeadSVD
from svf_lightning.metrics import (
    RunningCovariance,
    align_pairs,
    cosine_matrix,
    effective_rank,
    haar_orthogonal,
    shrunk_covariance,
)
from svf_lightning.probe import Probe
from svf_lightning.quantities import Place, Quantity
from svf_lightning.theory import unwhitened

_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1, "logged": "mean", "gaps": True}
_SHARE: Any = {"unit": "share", "low": 0, "high": 1, "logged": "mean", "gaps": True}
_SOURCE = "Theorem 1; method, section 4"
_SIDES = (("left", "u"), ("right", "v"))
_FORMS = (("", "Sigma ", ", un-whitened"), ("plain_", "", ""))  # prefix, before the letter, after the words


class Unwhitening(ProbeMetric):
    """Compares ``Sigma u_1`` and ``Sigma v_1`` of every head with the nearest feature, and with rotated bases.

    Theorem 1 says that a head which serves a feature x has ``Sigma^-1 x`` as its singular vector. Taking that back
    needs Sigma, and in a real model nobody has it: it is estimated from tokens, as the covariance of what the heads of
    a layer read, with OAS shrinkage (:func:`~svf_lightning.metrics.shrunk_covariance`). The first token of a prompt and
    padding are left out, and so is the bias coordinate of a head, in which no token varies. Singular vectors are those
    without rotary positions.

    Sigma draws *any* direction towards where many tokens lie, and so do features. So every number stands beside that of
    random directions of the head's own space: its first singular vector in a basis that is rotated at random, with the
    same Sigma. A percentile says which share of these are less near; by chance it is 0.5 on average.

    In a replay, features are proxies (``--model.features``), tokens are those of a text (``--data.text``) or, if there
    is none, of the prompts, and ``--model.processing=folded`` is the one in which features and what heads read live in
    one space, but for the length of a token.

    Args:
        n_random: Random directions of each head and side.
        seed: Their seed; they come from a generator of their own.

    Raises:
        InputError: Fewer than one random direction.
    """

    needs = "a language model (replay), and features (--model.features)"
    quantities = (
        *(
            Quantity(
                f"unwhitening/{prefix}{side}", f"{before}{letter}{as_it_is} against the nearest feature",
                f"Cosine of {before}{letter}_1 with the feature nearest to it; Sigma from tokens.", **_COSINE,
                better="higher", source=_SOURCE,
            )
            for (prefix, before, _), as_it_is in zip(_FORMS, ("", " as it is"), strict=True)
            for side, letter in _SIDES
        ),
        *(
            Quantity(
                f"unwhitening/{prefix}random_{side}", f"rotated {letter} against the nearest feature{after}",
                f"The same of random directions of the head's own space (of its {letter}), mean.", **_COSINE,
            )
            for prefix, _, after in _FORMS for side, letter in _SIDES
        ),
        *(
            Quantity(
                f"unwhitening/{prefix}percentile_{side}", f"nearer than rotated {letter}{after}",
                f"Share of these random directions that are less near than {before}{letter}_1; 0.5 by chance.",
                **_SHARE,
            )
            for prefix, before, after in _FORMS for side, letter in _SIDES
        ),
        *(
            Quantity(
                f"unwhitening/{side}_feature", f"feature nearest to Sigma {letter}_1", "Its index.", logged="no",
                places=Place.NOWHERE,
            )
            for side, letter in _SIDES
        ),
        Quantity(
            "unwhitening/matched", "alignment, un-whitened by tokens",
            "As alignment/matched, with Sigma u and Sigma v for u and v.", **_COSINE, better="higher", source=_SOURCE,
            needs="pairs of features (--model.feature_pairs)",
        ),
        Quantity(
            "unwhitening/matched_random", "alignment of rotated bases, un-whitened by tokens",
            "The same with u and v rotated at random, each side by itself, mean.", **_COSINE,
            needs="pairs of features (--model.feature_pairs)",
        ),
        Quantity("unwhitening/shrinkage", "shrinkage of the covariance",
                 "rho of OAS: 0 is the sample's own covariance, 1 a multiple of the identity.", unit="share",
                 low=0, high=1, logged="mean", source="Chen et al. 2010, Eq. 23"),
        Quantity("unwhitening/effective_rank", "effective rank of the covariance",
                 "tr(Sigma)^2 / tr(Sigma^2) after shrinkage: D if tokens lie alike in all directions.",
                 unit="dimensions", low=1, logged="mean"),
        Quantity("unwhitening/tokens", "tokens of the covariance", unit="count", low=0, logged="no"),
    )  # fmt: skip

    def __init__(self, n_random: int = 64, seed: int = 0) -> None:
        if n_random < 1:
            raise bad_value("n_random", n_random, "an integer >= 1", "change the Unwhitening callback")
        self.n_random, self.seed = n_random, seed
        self._seen: list[RunningCovariance] = []

    def observe(self, probe: Probe) -> None:
        """Add the tokens of one part of a step's prompts."""
        if probe.read_tokens is None or probe.heads is None or probe.features is None:
            return
        if not self._seen:
            n_layers, D = probe.heads.W_Q.shape[0], probe.heads.W_Q.shape[-1]
            self._seen = [RunningCovariance(D, probe.heads.W_Q.device) for _ in range(n_layers)]
        probe.read_tokens(lambda layer, tokens: self._seen[layer].update(tokens))

    def measure(self, probe: Probe) -> Measurement:
        """Every head's first singular vectors; nothing without features, or tokens to estimate from."""
        seen, self._seen = self._seen, []
        if not seen or any(not layer.count for layer in seen) or probe.features is None:
            return {}
        svd = probe.svd  # [1, layer, head, ...]: each row of a replay is measured by itself
        D = probe.features.shape[-2]
        features = probe.for_heads(probe.features).expand(*svd.S.shape[:-1], *probe.features.shape[-2:])[0]
        covariances, rho = zip(*(shrunk_covariance(layer.covariance(), layer.count) for layer in seen), strict=True)
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for layer, Sigma in enumerate(covariances):
            of_layer = HeadSVD(svd.U[0, layer, :, :D], svd.S[0, layer], svd.V[0, layer, :, :D])
            rows.append(self._of_layer(of_layer, features[layer], Sigma, probe.pairs, generator))
        measured: dict[str, Tensor | Measured] = {
            f"unwhitening/{name}": torch.stack([row[name] for row in rows])[None] for name in rows[0]
        }
        by_layer = {
            "shrinkage": torch.stack(rho),
            "effective_rank": torch.stack([effective_rank(Sigma) for Sigma in covariances]),
            "tokens": torch.tensor([float(layer.count) for layer in seen]),
        }
        for name, value in by_layer.items():
            measured[f"unwhitening/{name}"] = Measured(value.float()[None], batch_dims=probe.batch_dims[1:2])
        return measured

    def _of_layer(
        self,
        svd: HeadSVD,
        features: Float[Tensor, "head D N"],
        Sigma: Float[Tensor, "D D"],
        pairs: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Of the heads of one layer; the singular vectors have no bias coordinate, so they may be shorter than 1."""
        found: dict[str, Tensor] = {}
        R = svd.S.shape[-1]
        for (side, _), vectors in zip(_SIDES, (svd.U, svd.V), strict=True):
            mix = torch.randn(len(vectors), R, self.n_random, generator=generator).to(vectors)
            looked_at = torch.cat([vectors[..., :1], vectors @ mix], dim=-1)  # the first is the one
            for (prefix, _, _), directions in zip(_FORMS, (unwhitened(looked_at, Sigma), looked_at), strict=True):
                # one head at a time: a dictionary may have more features than fit for all heads at once
                nearest = [cosine_matrix(x, some).max(0) for x, some in zip(features, directions, strict=True)]
                cosine = torch.stack([values for values, _ in nearest])
                own, random = cosine[:, :1], cosine[:, 1:]
                less = (random < own).to(own) + (random == own).to(own) / 2
                found[f"{prefix}{side}"] = own[:, 0]
                found[f"{prefix}random_{side}"] = random.mean(-1)
                found[f"{prefix}percentile_{side}"] = less.mean(-1)
                if not prefix:
                    found[f"{side}_feature"] = torch.stack([index[0] for _, index in nearest]).to(torch.int32)
        if len(pairs):
            found["matched"] = self._matched(svd, features, Sigma, pairs)
            A, B = haar_orthogonal(R, 2 * self.n_random, seed=self.seed, device=svd.U.device).to(svd.U).chunk(2)
            rotated = HeadSVD(svd.U[:, None] @ A, svd.S[:, None].expand(-1, self.n_random, -1), svd.V[:, None] @ B)
            found["matched_random"] = self._matched(rotated, features[:, None], Sigma, pairs).mean(-1)
        return found

    def _matched(self, svd: HeadSVD, features: Tensor, Sigma: Tensor, pairs: Tensor) -> Tensor:
        """Alignment of named pairs with un-whitened bases [head, ...]."""
        query, key = (features[..., pairs[:, side]] for side in (0, 1))
        left, right = (
            cosine_matrix(of_side.expand(*vectors.shape[:-2], *of_side.shape[-2:]), unwhitened(vectors, Sigma))
            for of_side, vectors in ((query, svd.U), (key, svd.V))
        )
        aligned = align_pairs(left, right, svd.S)
        return (aligned.left + aligned.right).mean(-1) / 2
