"""Claims of the paper as data: stated in a preset, computed from a run, never assumed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from svf_lightning.errors import bad_value

_RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim about the final state of a run.

    Args:
        claim: The claim in words.
        figure: Where the paper makes it, e.g. "Fig. 2a".
        metric: Name of the metric it is about.
        over: Which value over the instances must hold: the worst one is "min" for >=, "max" for <=.
        relation: Comparison of the metric with the threshold, or with the other metric.
        threshold: Number to compare with; with ``other``, the share of instances, in [0, 1], that must satisfy it.
        other: A second metric, compared instance by instance; null for none.
    """

    claim: str
    figure: str
    metric: str
    relation: Literal["<", "<=", ">", ">="]
    threshold: float
    over: Literal["mean", "min", "max"] = "mean"
    other: str | None = None

    def __post_init__(self) -> None:
        if self.relation not in _RELATIONS:
            raise bad_value("relation", self.relation, "<, <=, > or >=", f"change the claim {self.claim!r}")
        if self.over not in ("mean", "min", "max"):
            raise bad_value("over", self.over, "mean, min or max", f"change the claim {self.claim!r}")


@dataclass(frozen=True)
class Verdict:
    """A claim and what a run says about it.

    ``measured`` is None where the run does not tell (a metric that is missing, or not a number); then it does not hold.
    """

    claim: str
    figure: str
    measured: float | None
    threshold: float
    holds: bool
    rule: str  # what was compared, in symbols
    needed: str  # the same without the metric's name, for a table

    def as_dict(self) -> dict[str, object]:
        """The form in summary.json."""
        return asdict(self)


def judge(claim: Claim, metrics: Mapping[str, np.ndarray]) -> Verdict:
    """Compute one claim.

    Args:
        claim: What is claimed.
        metrics: Final values by metric name, one entry per instance.
    """
    compare = _RELATIONS[claim.relation]
    values = metrics.get(claim.metric, np.empty(0))
    if claim.other is not None:
        others = metrics.get(claim.other, np.empty(0))
        needed = f"share >= {claim.threshold:g}"
        rule = f"{needed} of instances with {claim.metric} {claim.relation} {claim.other}"
        # a comparison with NaN is False
        measured = float(np.mean(compare(values, others))) if len(values) == len(others) > 0 else math.nan
        holds = measured >= claim.threshold
    else:
        needed = f"{claim.over} {claim.relation} {claim.threshold:g}"
        rule = f"{needed} of {claim.metric} over instances"
        measured = float(getattr(np, claim.over)(values)) if len(values) else math.nan
        holds = bool(compare(measured, claim.threshold))
    known = measured if math.isfinite(measured) else None
    return Verdict(claim.claim, claim.figure, known, claim.threshold, holds and known is not None, rule, needed)
