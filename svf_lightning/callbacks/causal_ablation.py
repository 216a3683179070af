"""CausalAblation: how much of a score do the largest contributions make up, and what does the model do without it?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import contribution_order
from svf_lightning.probe import Intervene, Probe
from svf_lightning.quantities import ABLATION, Place, Quantity

KINDS = ("top", "random", "spectrum")
_WHICH = ("largest", "random others", "of the first pairs")
_DETAILS = (1, 2)  # these numbers of contributions stay out of loggers and tables
_IN_PANEL = 4
_Z = 1.96  # standard errors in a 95 % interval


def _of_n(n: int) -> list[Quantity]:
    """What is measured for n removed contributions."""
    logged: Any = "no" if n in _DETAILS else "mean"
    quantities = []
    for kind, which in zip(KINDS, _WHICH, strict=True):
        of = f"{n} {which} off"
        quantities += [
            Quantity(
                f"causal/{kind}/attention/{n}", f"change of attention, {of}",
                "Change of the attention weight on the key, mean over heads and pairs.",
                unit="weight", logged=logged, source="method, section 6",
            ),
            Quantity(
                f"causal/{kind}/logit_difference/{n}", f"change of logit difference, {of}", "Mean over pairs.",
                unit="nats", logged=logged, source="method, section 6", panel=ABLATION if n == _IN_PANEL else None,
            ),
        ]  # fmt: skip
    for kind, which in zip(KINDS[1:], _WHICH[1:], strict=True):
        name, label = (
            f"causal/top_vs_{kind}/logit_difference",
            f"logit difference, {n} largest against {which.removeprefix('of ')}",
        )
        text = "Difference between the two changes of the logit difference, pair by pair"
        quantities += [
            Quantity(f"{name}/{n}", label, f"{text}, mean.", unit="nats", logged=logged, source="method, section 6"),
            *(
                Quantity(f"{name}_{end}/{n}", f"{label}, {words}", f"{text}: end of the 95 % interval of its mean.",
                         unit="nats", logged="no", source="method, section 6")
                for end, words in (("low", "lower end"), ("high", "upper end"))
            ),
        ]  # fmt: skip
    return quantities


_ARRAYS = (
    Quantity("causal/attention", "change of attention", unit="weight", dims=("n_removed", "kind", "prompt"),
             places=Place.NOWHERE),
    Quantity("causal/logit_difference", "change of the logit difference", unit="nats",
             dims=("n_removed", "kind", "prompt"), places=Place.NOWHERE),
    Quantity("causal/layer_head", "heads of the task", "Index of the flattened heads.", dims=("causal_head",),
             places=Place.NOWHERE),
)  # fmt: skip


class _Part(NamedTuple):
    """One part of a step's query-key pairs, with its heads flattened."""

    contributions: Tensor  # [heads, pair, R], relative
    attention: Tensor  # [heads, pair]
    logit_difference: Tensor  # [pair]
    intervene: Intervene
    head_shape: tuple[int, ...]


class CausalAblation(ProbeMetric):
    """Takes n contributions off the score that the task's heads give the attended key, and runs the model again.

    Beyond the paper (method, section 6). What is taken off is a number, so only its size matters, not the directions
    that it came from; DirectionIntervention asks for these. The task's heads are the ``n_task_heads`` with most
    attention on the key; the contributions, relative to the other keys, are removed in all of them at once, before the
    softmax. Which n of them: "top", those that contribute most; "random", n others at random; "spectrum", those of the
    n largest singular values.

    Per step, for n in ``report``: changes of attention and of the logit difference, and how much more the "top" ones
    change it than the others, pair by pair, with a 95 % confidence interval over pairs.

    Args:
        n_removed: Largest number of contributions to remove; 1 to this are all measured.
        report: For which of them numbers are logged.
        n_task_heads: Heads that count as the task's.
        seed: Seed of the random choices, which come from a generator of their own.

    Raises:
        InputError: An option out of range.
    """

    needs = "a language model"

    def __init__(
        self,
        n_removed: int = 8,
        report: tuple[int, ...] = (1, 2, 4, 8),
        n_task_heads: int = 3,
        seed: int = 0,
    ) -> None:
        for name, value in (("n_removed", n_removed), ("n_task_heads", n_task_heads)):
            if value < 1:
                raise bad_value(name, value, "an integer >= 1", "change the CausalAblation callback")
        self.n_removed, self.report, self.n_task_heads, self.seed = n_removed, report, n_task_heads, seed
        self._reported = tuple(n for n in report if 1 <= n <= n_removed)
        if not self._reported:
            raise bad_value("report", report, f"numbers in 1..{n_removed}", "change the CausalAblation callback")
        self._parts: list[_Part] = []
        self.quantities = (*(q for n in self._reported for q in _of_n(n)), *_ARRAYS)

    def observe(self, probe: Probe) -> None:
        """Keep one part of the pairs, as the task's heads are known only when all parts were seen."""
        scores = probe.scores
        if scores is None or probe.intervene is None or scores.attention is None or scores.logit_difference is None:
            return
        contributions = scores.contributions
        self._parts.append(
            _Part(
                contributions.flatten(0, -3),
                scores.attention.flatten(0, -2),
                scores.logit_difference,
                probe.intervene,
                tuple(contributions.shape[:-2]),
            )
        )

    def measure(self, probe: Probe) -> Measurement:
        """What removing contributions changes; nothing for a module that cannot be run again."""
        if not self._parts:
            return {}
        parts, self._parts = self._parts, []
        attention = torch.cat([part.attention for part in parts], dim=1).nanmean(1)
        heads = attention.topk(min(self.n_task_heads, len(attention))).indices
        generator = torch.Generator().manual_seed(self.seed)
        changes = [self._remove(part, heads, generator) for part in parts]
        on_key, difference = (torch.cat([change[i] for change in changes], dim=-1) for i in (0, 1))
        measured: dict[str, Tensor] = {}
        for n in self._reported:
            for i, kind in enumerate(KINDS):
                measured[f"causal/{kind}/attention/{n}"] = on_key[n - 1, i].mean()
                measured[f"causal/{kind}/logit_difference/{n}"] = difference[n - 1, i].mean()
            for i, kind in enumerate(KINDS[1:], start=1):
                paired = difference[n - 1, 0] - difference[n - 1, i]
                mean, half = paired.mean(), _Z * paired.std() / len(paired) ** 0.5
                name = f"causal/top_vs_{kind}/logit_difference"
                measured |= {f"{name}/{n}": mean, f"{name}_low/{n}": mean - half, f"{name}_high/{n}": mean + half}
        measured |= {
            "causal/attention": on_key,
            "causal/logit_difference": difference,
            "causal/layer_head": heads.to(torch.int32),
        }
        return {name: value[None] for name, value in measured.items()}

    def _remove(self, part: _Part, heads: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Changes of the attention on the key (mean over heads) and of the logit difference [n_removed, kind, pair]."""
        # NaN where a head does not see the key: nothing to remove
        contributions = part.contributions[heads].nan_to_num()
        on_key, difference = [], []
        for n in range(1, self.n_removed + 1):
            for kind in KINDS:
                removed = torch.zeros_like(part.attention)
                removed[heads] = contributions.gather(-1, chosen(contributions, n, kind, generator)).sum(-1)
                outcome = part.intervene(removed.view(*part.head_shape, -1))
                change = outcome.attention.flatten(0, -2)[heads] - part.attention[heads]
                on_key.append(change.mean(0))
                difference.append(outcome.logit_difference - part.logit_difference)
        shape = (self.n_removed, len(KINDS), -1)
        return torch.stack(on_key).view(shape), torch.stack(difference).view(shape)


def chosen(contributions: Tensor, n: int, kind: str, generator: torch.Generator) -> Tensor:
    """Indices of n singular pairs for each head and query-key pair [..., n].

    Args:
        contributions: [..., R], in the order of descending singular values.
        n: How many; at most R.
        kind: "top": the largest in the direction of their sum; "random": n of the others, or of all if there are not
            enough others; "spectrum": the first n.
        generator: For the random choice; on the CPU.
    """
    n = min(n, contributions.shape[-1])
    if kind == "spectrum":
        return torch.arange(n, device=contributions.device).expand(*contributions.shape[:-1], n)
    order = contribution_order(contributions)
    if kind == "top":
        return order[..., :n]
    others = order[..., n:] if order.shape[-1] >= 2 * n else order
    draw = torch.rand(others.shape, generator=generator).to(others.device).argsort(-1)[..., :n]
    return others.gather(-1, draw)
