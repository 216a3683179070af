"""Firings: every query-key pair that a head attends to, wherever it is, taken apart over singular pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.metrics import measure_sparsity
from svf_lightning.metrics.sparsity import FEW, Sparsity, check_draws, check_share, last_eighth
from svf_lightning.probe import FiringBatch, FiringRule, Probe, Scores, VaryingThreshold, check_scores
from svf_lightning.quantities import Place, Quantity

_CHUNK = 8192  # firings that are measured together
_SPARSENESS = {
    "sparseness": "S(v) of the contributions to the score, mean.",
    "sparseness_shared_rotation": "S(v) in a basis rotated at random, alike on both sides; mean.",
    "sparseness_independent_rotation": "S(v) in bases rotated at random, each side by itself; mean.",
    "sparseness_permuted_pairing": "S(v) with the head's own u_k and sigma_k, each beside another v; mean.",
}
_CONTROLS = tuple(_SPARSENESS)[1:]
_STRONGEST = "sparseness_strongest_control"
_LOGGED = (
    "count", "sparseness", _STRONGEST, "n_recon", "n_recon_at_most_4", "n_recon_at_most_4_rotated",
    "top_in_last_eighth",
)  # fmt: skip
_ALWAYS = ("count", "last_eighth_by_chance")  # known of a head that never fires
_SHARE: Any = {"unit": "share", "low": 0, "high": 1}


def _statistics() -> list[Quantity]:
    """What is measured over firings, by the end of its name."""
    text: Any = {"unit": "S(v)", "low": 0, "high": 1, "source": "Fig. 7b; method, section 6"}
    sparseness = {name: name.replace("_", ", ", 1).replace("_", " ") for name in _SPARSENESS}
    return [
        Quantity("count", "firings", "Query-key pairs that count.", unit="count", low=0),
        *(
            Quantity(name, f"{words}{',' if ',' in words else ''} of firings", _SPARSENESS[name], **text)
            for name, words in sparseness.items()
        ),
        Quantity(_STRONGEST, "sparseness, strongest control, of firings", "The smallest of the three.", **text),
        Quantity("n_recon", "singular pairs that make up the score of a firing", "Median of N_recon.",
                 symbol="N_recon", unit="count", low=0, source="Fig. 9"),
        Quantity("n_recon_shared_rotation", "rotated pairs that make up the score of a firing",
                 "Median over firings and shared rotations.", symbol="N_recon", unit="count", low=0, source="Fig. 9"),
        Quantity("n_recon_at_most_4", "firings made of 1 to 4 singular pairs", "Share whose N_recon is at most 4.",
                 **_SHARE, source="Fig. 9"),
        Quantity("n_recon_at_most_4_rotated", "firings made of 1 to 4 rotated pairs",
                 "Share whose N_recon is at most 4, under shared rotations.", **_SHARE, source="Fig. 9"),
        Quantity("top_in_last_eighth", "firings with the largest contribution at the end of the spectrum",
                 "Share whose largest contributor is in the last eighth of the singular values.", **_SHARE,
                 source="Fig. 8"),
        Quantity("last_eighth_by_chance", "the same if every singular pair came equally often as largest",
                 "Share of the singular values that are the last eighth.", **_SHARE, source="Fig. 8"),
    ]  # fmt: skip


def _declared() -> list[Quantity]:
    """These over all firings, and of each head."""
    statistics = [replace(q, gaps=q.name not in _ALWAYS) for q in _statistics()]
    over_all = [replace(q, name=f"firings/{q.name}", logged="mean" if q.name in _LOGGED else "no") for q in statistics]
    of_heads = [
        replace(q, name=f"firings/head/{q.name}", label=f"{q.label}, of a head", logged="no", places=Place.NOWHERE)
        for q in statistics
    ]
    return [*over_all, *of_heads]


class _Counts:
    """Counts and sums over the firings of each head, or of several together.

    Args:
        shape: The module's own dimensions, such as (layers, heads).
        rank: R, singular pairs of a head.
        device: Where to keep them.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, device: torch.device) -> None:
        self.shape, self.rank = shape, rank

        def counts(*dims: int) -> Tensor:
            return torch.zeros(math.prod(shape), *dims, dtype=torch.long, device=device)

        self.n_recon, self.n_recon_rotated, self.top_index = counts(rank + 1), counts(rank + 1), counts(rank)
        self.sums = {name: counts().double() for name in _SPARSENESS}
        self.summed = {name: counts() for name in _SPARSENESS}  # of how many

    def add(self, head: Tensor, measured: Sparsity) -> None:
        """Add firings; those without a score (NaN: nothing to be relative to) are left out."""
        scored = measured.n_recon >= 0
        head = head[scored]
        draws = measured.n_recon_draws[scored]
        _count(self.n_recon, head, measured.n_recon[scored])
        _count(self.n_recon_rotated, head.repeat_interleave(draws.shape[-1]), draws.flatten())
        _count(self.top_index, head, measured.top_index[scored])
        values = (
            measured.sparseness,
            # of a head of rank one, most permutations leave zeros alone
            *(draws.nanmean(-1) for draws in (measured.shared, measured.independent, measured.permuted)),
        )
        for name, value in zip(_SPARSENESS, values, strict=True):
            value = value[scored].double()
            known = ~value.isnan()
            self.sums[name].index_add_(0, head[known], value[known])
            self.summed[name].index_add_(0, head[known], torch.ones_like(head[known]))

    def of_all(self) -> _Counts:
        """All heads together."""
        whole = _Counts((), self.rank, self.n_recon.device)
        for name in ("n_recon", "n_recon_rotated", "top_index"):
            getattr(whole, name).copy_(getattr(self, name).sum(0, keepdim=True))
        for mine, theirs in ((whole.sums, self.sums), (whole.summed, self.summed)):
            for name, value in theirs.items():
                mine[name].copy_(value.sum(0, keepdim=True))
        return whole

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of each head [*shape]; NaN where it has no firing."""
        count = self.n_recon.sum(-1)
        found = {name: self.sums[name] / self.summed[name] for name in _SPARSENESS}
        found[_STRONGEST] = torch.stack([found[name] for name in _CONTROLS]).amin(0)
        eighth = last_eighth(self.rank)
        found |= {
            "count": count,
            "n_recon": _median(self.n_recon),
            "n_recon_shared_rotation": _median(self.n_recon_rotated),
            "n_recon_at_most_4": self.n_recon[:, : FEW + 1].sum(-1) / count,
            "n_recon_at_most_4_rotated": self.n_recon_rotated[:, : FEW + 1].sum(-1) / self.n_recon_rotated.sum(-1),
            "top_in_last_eighth": self.top_index[:, -eighth:].sum(-1) / count,
            "last_eighth_by_chance": torch.full_like(count, eighth / self.rank, dtype=torch.double),
        }
        return {name: value.float().view(self.shape) for name, value in found.items()}

    def histograms(self) -> dict[str, Tensor]:
        """Counts of each head [*shape, R + 1] and [*shape, R]."""
        counts = {
            "n_recon_histogram": self.n_recon,
            "n_recon_histogram_rotated": self.n_recon_rotated,
            "top_index_histogram": self.top_index,
        }
        return {name: value.view(*self.shape, -1) for name, value in counts.items()}


def _count(histogram: Tensor, head: Tensor, value: Tensor) -> None:
    """Add 1 for each (head, value) to counts [heads, values]."""
    width = histogram.shape[-1]
    histogram += torch.bincount(head * width + value, minlength=histogram.numel()).view_as(histogram)


def _median(histogram: Tensor) -> Tensor:
    """Median of the values 0..n-1 that counts [heads, n] have, the mean of the middle two; NaN for no value."""
    up_to = histogram.cumsum(-1)
    n = up_to[:, -1:]
    middle = torch.cat([(n - 1) // 2, n // 2], dim=-1)  # places in the sorted values
    median = torch.searchsorted(up_to, middle, right=True).double().mean(-1)
    return median.masked_fill(n[:, 0] == 0, torch.nan)


class Firings(ProbeMetric):
    """Decomposes the score of every query-key pair that a head attends to, over all positions of all prompts.

    A firing of a head is a query and a key with attention of at least ``tau`` and a positive score. AttentionSparsity
    looks at one key of each prompt instead; which pairs are looked at decides what Figs. 8 and 9 show. Per step, over
    all firings: ``firings/NAME``; of each head: ``firings/head/NAME``, and histograms. A head that never fires has
    count 0 and no other number. What is kept are counts and sums, so memory does not grow with the prompts.

    Args:
        tau: Least attention weight on the key, in (0, 1), or a rule for n keys that the query sees.
        first_token: Count the first token as a key; heads park on it the attention that they do not need.
        self_attention: Count queries that attend to themselves.
        every_query: Count queries at all positions; False: each prompt's own query alone, such as the last token.
        scores: "relative": minus the mean of the other keys' scores (a query that sees one key alone does not count);
            or "raw", as the model computes them.
        recon_share: Share of the score that N_recon must reach, in (0, 1]; 0.7 is a tolerance of the authors' helper.
        n_draws: Random rotations, or permutations, of each control.
        seed: Seed of the rotations; they come from a generator of their own.

    Raises:
        InputError: An option out of range.
    """

    needs = "a language model"
    quantities = (
        *_declared(),
        Quantity("firings/n_recon_histogram", "firings by N_recon", "From 0 to R.", unit="count", low=0,
                 dims=("n_recon",), places=Place.NOWHERE, source="Fig. 9"),
        Quantity("firings/n_recon_histogram_rotated", "firings by N_recon, rotated",
                 "Under shared rotations: a count for each firing and rotation.", unit="count", low=0,
                 dims=("n_recon",), places=Place.NOWHERE, source="Fig. 9"),
        Quantity("firings/top_index_histogram", "firings by their largest contributor", "Singular indices from 0.",
                 unit="count", low=0, dims=("rank",), places=Place.NOWHERE, source="Fig. 8"),
    )  # fmt: skip

    def __init__(
        self,
        tau: float | VaryingThreshold = 0.5,
        first_token: bool = False,
        self_attention: bool = True,
        every_query: bool = True,
        scores: Scores = "relative",
        recon_share: float = 1.0,
        n_draws: int = 16,
        seed: int = 0,
    ) -> None:
        self.tau, self.first_token, self.self_attention, self.every_query = (
            tau,
            first_token,
            self_attention,
            every_query,
        )
        self._rule = FiringRule(tau, first_token, self_attention, every_query)
        check_scores(scores)
        check_share(recon_share)
        check_draws(n_draws)
        self.scores, self.recon_share, self.n_draws, self.seed = scores, recon_share, n_draws, seed
        self._seen: _Counts | None = None

    def observe(self, probe: Probe) -> None:
        """Add the firings of one part of a step's prompts."""
        if probe.find_firings is None or probe.heads is None:
            return
        if self._seen is None:
            heads = probe.heads
            *shape, d_head, d_model = heads.W_Q.shape
            self._seen = _Counts(tuple(shape), min(d_head, d_model + heads.n_constants), heads.W_Q.device)
        probe.find_firings(self._rule, self._add)

    def measure(self, probe: Probe) -> Measurement:
        """Statistics of all firings and of each head's; nothing for a module that does not tell of them."""
        seen, self._seen = self._seen, None
        if seen is None:
            return {}
        measured = {f"firings/{name}": value for name, value in seen.of_all().statistics().items()}
        measured |= {f"firings/head/{name}": value for name, value in seen.statistics().items()}
        measured |= {f"firings/{name}": value.to(torch.int32) for name, value in seen.histograms().items()}
        return {name: value[None] for name, value in measured.items()}

    def _add(self, found: FiringBatch) -> None:
        assert self._seen is not None
        scores = found.scores.taken(self.scores)
        n = len(found.head)
        S = scores.S.expand(n, -1)
        for start in range(0, n, _CHUNK):
            some = slice(start, start + _CHUNK)
            self._seen.add(
                found.head[some],
                measure_sparsity(
                    scores.query[some], scores.key[some], scores.direction[some], S[some],
                    n_draws=self.n_draws, seed=self.seed, share=self.recon_share,
                ),
            )  # fmt: skip
