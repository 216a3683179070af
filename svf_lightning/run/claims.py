"""Claims of the paper as data: stated in a preset, computed from a run, never assumed."""

from __future__ import annotations

import math
import operator
import re
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
        relation: Comparison of the metric with the threshold, or with the other metric; null for an open question,
            whose answer is measured and not judged.
        threshold: Number to compare with; with ``other``, the share of instances, in [0, 1], that must satisfy it. Null
            for an open question.
        other: A second metric, compared instance by instance; null for none.
        of: "last": values of the last captured step; "change": those minus the values of the first captured step.
        among: Which instances the claim is about, as conditions on their metrics: "orthogonality/interference >= 35 and
            orthogonality/interference <= 45"; null for all.
    """

    claim: str
    figure: str
    metric: str
    relation: Literal["<", "<=", ">", ">="] | None = None
    threshold: float | None = None
    over: Literal["mean", "min", "max"] = "mean"
    other: str | None = None
    of: Literal["last", "change"] = "last"
    among: str | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.threshold is None):
            raise bad_value(
                "threshold",
                self.threshold,
                "a number with a relation, null without",
                f"change the claim {self.claim!r}",
            )
        if self.relation is None and self.other is not None:
            raise bad_value("other", self.other, "null for an open question", f"change the claim {self.claim!r}")
        if self.relation is not None and self.relation not in _RELATIONS:
            raise bad_value("relation", self.relation, "<, <=, > or >=", f"change the claim {self.claim!r}")
        for condition in self.conditions():
            if condition is None:
                raise bad_value(
                    "among", self.among, "METRIC RELATION NUMBER, joined by and", f"change the claim {self.claim!r}"
                )
        if self.of not in ("last", "change"):
            raise bad_value("of", self.of, "last or change", f"change the claim {self.claim!r}")
        if self.over not in ("mean", "min", "max"):
            raise bad_value("over", self.over, "mean, min or max", f"change the claim {self.claim!r}")

    def conditions(self) -> list[tuple[str, str, float] | None]:
        """The conditions in ``among``: (metric, relation, number); None for one that cannot be read."""
        conditions: list[tuple[str, str, float] | None] = []
        for part in self.among.split(" and ") if self.among else []:
            match = re.fullmatch(r"\s*(\S+) (<|<=|>|>=) (\S+)\s*", part)
            try:
                conditions.append((match[1], match[2], float(match[3])) if match else None)
            except ValueError:
                conditions.append(None)
        return conditions


@dataclass(frozen=True)
class Verdict:
    """A claim and what a run says about it.

    ``measured`` is None where the run does not tell (a metric that is missing, or not a number); then it does not hold.
    ``threshold`` and ``holds`` are None for an open question; ``holds`` also where no instance of the run is among
    those that the claim is about.
    """

    claim: str
    figure: str
    measured: float | None
    threshold: float | None
    holds: bool | None
    rule: str  # the comparison in symbols
    needed: str  # the same without the metric's name, for a table

    def as_dict(self) -> dict[str, object]:
        """The form in summary.json."""
        return asdict(self)


def judge(claim: Claim, metrics: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray] | None = None) -> Verdict:
    """Compute one claim.

    Args:
        claim: What is claimed.
        metrics: Final values by metric name, one entry per instance.
        first: Values of the first captured step, for claims about a change.
    """
    chosen = _among(claim, metrics)
    if claim.of == "change":
        first = first or {}
        metrics = {name: values - first[name] for name, values in metrics.items() if name in first}
    if chosen is not None:
        metrics = {name: values[chosen] for name, values in metrics.items() if len(values) == len(chosen)}
    what = claim.metric if claim.of == "last" else f"the change of {claim.metric}"
    values = metrics.get(claim.metric, np.empty(0))
    where = f" with {claim.among}" if claim.among else ""
    if claim.relation is None or claim.threshold is None:
        measured = float(getattr(np, claim.over)(values)) if len(values) else math.nan
        known = measured if math.isfinite(measured) else None
        rule = f"{claim.over} of {what} over instances{where}"
        return Verdict(claim.claim, claim.figure, known, None, None, rule, f"{claim.over}, open question")
    compare = _RELATIONS[claim.relation]
    if claim.other is not None:
        others = metrics.get(claim.other, np.empty(0))
        needed = f"share >= {claim.threshold:g}"
        rule = f"{needed} of instances{where} have {what} {claim.relation} {claim.other}"
        # a comparison with NaN is False
        measured = float(np.mean(compare(values, others))) if len(values) == len(others) > 0 else math.nan
        holds = measured >= claim.threshold
    else:
        needed = f"{claim.over}{' change' if claim.of == 'change' else ''} {claim.relation} {claim.threshold:g}"
        rule = f"{needed} of {what} over instances{where}"
        measured = float(getattr(np, claim.over)(values)) if len(values) else math.nan
        holds = bool(compare(measured, claim.threshold))
    known = measured if math.isfinite(measured) else None
    about_none = chosen is not None and len(chosen) > 0 and not chosen.any()
    judged = None if about_none else holds and known is not None
    return Verdict(claim.claim, claim.figure, known, claim.threshold, judged, rule, needed)


def _among(claim: Claim, metrics: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which instances the claim is about; None for all."""
    chosen: np.ndarray | None = None
    for condition in claim.conditions():
        assert condition is not None  # __post_init__ has checked it
        name, relation, number = condition
        holds = _RELATIONS[relation](metrics.get(name, np.empty(0)), number)
        if chosen is not None and len(chosen) != len(holds):  # the metric was not measured
            return np.empty(0, dtype=bool)
        chosen = holds if chosen is None else chosen & holds
    return chosen
