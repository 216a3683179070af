"""torchmetrics classes that accumulate what a loop over batches measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from svf_lightning.errors import bad_value
from svf_lightning.metrics.sparsity import check_draws, check_share, measure_sparsity


class InstanceMean(Metric):
    """Mean over the batches of a loop, one value per instance (torchmetrics' own mean would average the instances).

    Sums in float64. Synchronizes over processes by sum, as torchmetrics does.

    Args:
        shape: Shape of one batch's value, e.g. (n_instances,).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Float[Tensor, "..."], weight: float = 1.0) -> None:
        """Add one batch's value, with its weight (e.g. its number of sequences).

        Raises:
            InputError: The value has another shape than announced.
        """
        if value.shape != self.total.shape:
            raise bad_value("value.shape", tuple(value.shape), str(tuple(self.total.shape)), "pass one per instance")
        self.total += value.detach().to(self.total) * weight
        self.weight += weight

    def compute(self) -> Float[Tensor, "..."]:
        """Weighted mean so far; NaN before the first update; torchmetrics turns shape (1,) into ()."""
        return self.mean()

    def mean(self) -> Float[Tensor, "..."]:
        """Weighted mean so far, in the shape of one batch's value; NaN before the first update."""
        return self.total / self.weight


class SparsityOverPairs(NamedTuple):
    """What :class:`SparseAttention` gathers from n query-key pairs (prompts) of each head [...]."""

    score: Float[Tensor, "... n"]  # relative attention score
    sparseness: Float[Tensor, "... n"]
    sparseness_shared_rotation: Float[Tensor, "... n"]  # mean over draws
    sparseness_independent_rotation: Float[Tensor, "... n"]  # mean over draws
    sparseness_permuted_pairing: Float[Tensor, "... n"]  # mean over draws
    n_recon: Int[Tensor, "... n"]
    n_recon_shared_rotation: Float[Tensor, "... n"]  # mean over draws
    few_shared_rotation: Float[Tensor, "... n"]  # share of the draws in which it is at most FEW
    top_index: Int[Tensor, "... n"]
    shared_draws: Float[Tensor, "... draws"]  # mean over pairs, for each draw
    independent_draws: Float[Tensor, "... draws"]
    permuted_draws: Float[Tensor, "... draws"]
    attention: Float[Tensor, "... n"] | None
    contribution_mean: Float[Tensor, "... R"]  # relative contribution of each singular pair, over the query-key pairs
    contribution_sd: Float[Tensor, "... R"]

    def each(self, change: Callable[[Tensor], Tensor]) -> SparsityOverPairs:
        """The same with every tensor changed."""
        return SparsityOverPairs(*(None if v is None else change(v) for v in self))  # type: ignore[arg-type]

    def at_pairs(self, chosen: Bool[Tensor, "... n"]) -> SparsityOverPairs:
        """The values of chosen query-key pairs, whichever head they are of [n']."""
        pairs = {name: getattr(self, name) for name in SparseAttention.PER_PAIR}
        return self._replace(**{name: None if v is None else v[chosen] for name, v in pairs.items()})  # type: ignore[arg-type]


class SparseAttention(Metric):
    """Accumulates the sparseness of attention scores over batches of query-key pairs (method, section 6).

    Keeps a few numbers per pair and head, nothing of the size of a vector. Synchronizes over processes by
    concatenation of the pairs, as torchmetrics does.

    Args:
        n_draws: Random rotations for each control.
        seed: Seed of the rotations.
        share: Of the score, that N_recon must reach; in (0, 1].
        sync_on_compute: Gather what other processes saw; False where each process looks at a model of its own.

    Raises:
        InputError: Fewer than one draw, or a share out of range.
    """

    full_state_update = False
    contribution_sum: Tensor
    contribution_squares: Tensor
    contribution_count: Tensor
    PER_PAIR = (
        "score", "sparseness", "sparseness_shared_rotation", "sparseness_independent_rotation",
        "sparseness_permuted_pairing", "n_recon", "n_recon_shared_rotation", "few_shared_rotation", "top_index",
        "attention",
    )  # fmt: skip
    DRAWS = ("shared_draws", "independent_draws", "permuted_draws")

    def __init__(self, n_draws: int = 16, seed: int = 0, *, share: float = 1.0, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        check_draws(n_draws)
        check_share(share)
        self.n_draws, self.seed, self.share = n_draws, seed, share
        self.rank = 0  # R, known from the first update on
        for name in (*self.PER_PAIR, *self.DRAWS):
            self.add_state(name, [], dist_reduce_fx="cat")  # pairs first
        for name in ("contribution_sum", "contribution_squares", "contribution_count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        query: Float[Tensor, "... n R"],
        key: Float[Tensor, "... n R"],
        direction: Float[Tensor, "... n R"],
        S: Float[Tensor, "... n1 R"],
        attention: Float[Tensor, "... n"] | None = None,
    ) -> None:
        """Add pairs; see :func:`svf_lightning.metrics.measure_sparsity` for the arguments."""
        self.rank = query.shape[-1]
        measured = measure_sparsity(query, key, direction, S, n_draws=self.n_draws, seed=self.seed, share=self.share)
        per_pair = {
            "score": measured.score,
            "sparseness": measured.sparseness,
            "sparseness_shared_rotation": measured.shared.mean(-1),
            "sparseness_independent_rotation": measured.independent.mean(-1),
            # of a head of rank one, most permutations leave zeros alone
            "sparseness_permuted_pairing": measured.permuted.nanmean(-1),
            "n_recon": measured.n_recon,
            "n_recon_shared_rotation": measured.n_recon_shared,
            "few_shared_rotation": measured.few_shared,
            "top_index": measured.top_index,
            "attention": attention,
        }
        for name, values in per_pair.items():
            if values is not None:
                getattr(self, name).append(values.movedim(-1, 0))
        scored = ~measured.score.isnan()
        contributions = torch.where(scored[..., None], measured.contributions, 0).double()
        self.contribution_sum = self.contribution_sum + contributions.sum(-2)
        self.contribution_squares = self.contribution_squares + contributions.square().sum(-2)
        self.contribution_count = self.contribution_count + scored.sum(-1, keepdim=True)
        controls = (measured.shared, measured.independent, measured.permuted)
        for name, draws in zip(self.DRAWS, controls, strict=True):
            getattr(self, name).append(draws.movedim(-2, 0))

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        self.rank = 0

    def compute(self) -> SparsityOverPairs:
        """Everything so far.

        Raises:
            InputError: No pair was added.
        """
        if self.rank == 0:
            raise bad_value("SparseAttention", "no pairs", "at least one update", "add pairs before computing")
        # contiguous: sums over strided memory add in an order that depends on what else is there
        per_pair: dict[str, Any] = {
            name: dim_zero_cat(getattr(self, name)).movedim(0, -1).contiguous() if len(getattr(self, name)) else None
            for name in self.PER_PAIR
        }
        draws = {name: dim_zero_cat(getattr(self, name)).nanmean(0) for name in self.DRAWS}
        mean = self.contribution_sum / self.contribution_count
        variance = (self.contribution_squares / self.contribution_count - mean.square()).clamp_min(0)
        dtype = draws["shared_draws"].dtype
        moments = {"contribution_mean": mean.to(dtype), "contribution_sd": variance.sqrt().to(dtype)}
        return SparsityOverPairs(**per_pair, **draws, **moments)
