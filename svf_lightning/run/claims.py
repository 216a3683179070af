"""Claims of the paper as data: stated in a preset, judged from a run beside their null, never assumed."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from svf_lightning.errors import bad_value
from svf_lightning.metrics.dynamics import LEVELS, UNKNOWN, Sizes
from svf_lightning.metrics.intervals import Interval, mean_interval, share_difference_interval, share_interval
from svf_lightning.quantities import Quantity

_RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_REDUCED: dict[str, Callable[..., Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
_HALFWAY = "halfway"
_EVENTS = "dynamics/"  # steps at which something happened; NaN where it did not
_WORST = {"<": "max", "<=": "max", ">": "min", ">=": "min"}
_KNOWN_NULLS = ("start", "chance")

Answer = Literal["yes", "no", "open", "vacuous"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim about the final state of a run, and what the same number is where the claim must not hold.

    It is judged over units that are independent of each other: instances (seeds), or what else the metric is of, such
    as heads. A claim says one of these:

    - ``relation`` and ``threshold``: so is the metric, on average over the units (``over``), or in a ``share`` of them;
    - ``relation`` and ``other``: so is the metric to another one, in a ``share`` of the units, or (without one) in more
      units than the share ``against`` which it is held;
    - ``relation`` and ``against`` alone: so is the metric to its null, on average over the units;
    - ``along`` and ``crosses``: the first value of another metric at which this one falls below a level (or rises above
      it), over the units from the lowest to the highest; ``relation`` and ``threshold`` say where that must be;
    - none of them: an open question, which is measured and not judged.

    Args:
        claim: The claim in words.
        figure: Where the paper makes it, e.g. "Fig. 2a".
        metric: Name of the metric that it is about.
        relation: Comparison of the metric with the threshold, with the other metric, or with the null.
        threshold: A number; the name of a level that follows from the sizes of the run (``metrics.dynamics.LEVELS``);
            or "halfway", from the null to the goal. With ``other`` the share that is needed, as ``share``.
        share: Share of the units, in [0, 1], that must satisfy the comparison; null: their mean must.
        over: Which value over the units is measured. With a threshold, "min" for >= and "max" for <= ask that every
            unit satisfies it.
        other: A second metric, compared unit by unit.
        against: The null, where the claim must not hold: "start" (the same run's first row: untrained weights),
            "chance" (random vectors, for a metric that has a level), another metric (a control), or a number.
        by: Smallest difference from the null that counts, >= 0; for a claim without a threshold.
        goal: What theory says of the metric, for a threshold that is halfway to it.
        of: "last": values of the last captured step; "change": those minus the values of the first captured step.
        among: Which units it is about, as conditions on their metrics: "orthogonality/interference >= 10 and
            orthogonality/interference <= 55"; null for all.
        within: What stands for a unit that has several values, such as one for each rotary offset.
        weights: Name of the metric that says how much each unit counts, such as a number of pairs.
        along: Metric along which units are ordered, for ``crosses``.
        crosses: Level whose crossing is measured.

    Raises:
        InputError: Options that say nothing together.
    """

    claim: str
    figure: str
    metric: str
    relation: Literal["<", "<=", ">", ">="] | None = None
    threshold: float | str | None = None
    share: float | None = None
    over: Literal["mean", "min", "max"] = "mean"
    other: str | None = None
    against: float | str | None = None
    by: float = 0.0
    goal: float | None = None
    of: Literal["last", "change"] = "last"
    among: str | None = None
    within: Literal["mean", "min", "max"] = "mean"
    weights: str | None = None
    along: str | None = None
    crosses: float | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise bad_value(name, getattr(self, name), allowed, f"change the claim {self.claim!r}")

        compares = self.threshold is not None or self.other is not None or self.against is not None
        if self.relation is not None and not compares:
            refuse("threshold", "with a relation a threshold, another metric or a null")
        if self.relation is None and (self.threshold is not None or self.other is not None or self.share is not None):
            refuse("relation", "with a threshold, another metric or a share one of <, <=, > and >=")
        if self.relation is not None and self.relation not in _RELATIONS:
            refuse("relation", "<, <=, > or >=")
        if self.other is not None and isinstance(self.threshold, str):
            refuse("threshold", "with another metric the share of the units that is needed")
        if isinstance(self.threshold, str) and self.threshold not in (*LEVELS, _HALFWAY):
            refuse("threshold", f"a number, {_HALFWAY}, or one of {', '.join(LEVELS)}")
        if (self.threshold == _HALFWAY) != (self.goal is not None):
            refuse("goal", f"a number with threshold={_HALFWAY}, null without")
        if self.threshold == _HALFWAY and self.against is None:
            refuse("against", f"with threshold={_HALFWAY} one of {', '.join(_KNOWN_NULLS)}, a metric or a number")
        needed = self.needed_share
        if needed is not None and not 0 <= needed <= 1:
            refuse("share" if self.share is not None else "threshold", "a share in [0, 1]")
        if needed is not None and self.threshold is None and self.other is None:
            refuse("share", "with a threshold or another metric")
        if self.by < 0 or (self.by and (self.threshold is not None or self.other is not None)):
            refuse("by", "a difference >= 0, and 0 with a threshold or another metric")
        if (self.along is None) != (self.crosses is None):
            refuse("crosses", "a number with along, null without")
        if self.along is not None and (self.other is not None or self.share is not None or self.against is not None):
            refuse("along", "null with another metric, a share or a null")
        if None in self.conditions():
            refuse("among", "METRIC RELATION NUMBER, joined by and")
        if self.of not in ("last", "change"):
            refuse("of", "last or change")
        for name in ("over", "within"):
            if getattr(self, name) not in _REDUCED:
                refuse(name, "mean, min or max")

    @property
    def needed_share(self) -> float | None:
        """Share of the units that must satisfy the comparison; None if their mean must, or one of them."""
        if self.share is not None:
            return self.share
        if self.other is not None:
            everywhere = None if self.against is not None else 1.0
            return everywhere if self.threshold is None else float(self.threshold)
        is_worst = self.along is None and self.relation is not None and self.threshold is not None
        if is_worst and self.over == _WORST.get(str(self.relation)):
            return 1.0
        return None

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

    def names(self) -> set[str]:
        """The metrics that it needs."""
        null = self.against if isinstance(self.against, str) and self.against not in _KNOWN_NULLS else None
        about = [condition[0] for condition in self.conditions() if condition is not None]
        return {name for name in (self.metric, self.other, null, self.weights, self.along, *about) if name is not None}


@dataclass(frozen=True)
class Null:
    """What a claim's number is where the claim must not hold."""

    name: str
    value: float | None


@dataclass(frozen=True)
class Effect:
    """How far a claim's number is from its null."""

    value: float
    interval: list[float] | None


@dataclass(frozen=True)
class Share:
    """How many units satisfy a comparison."""

    value: float
    interval: list[float]
    null: float | None  # share that satisfies it where the claim must not hold
    needed: float | None  # None: more than the null's


@dataclass(frozen=True)
class Verdict:
    """A claim and what a run says about it.

    ``verdict``: "yes" if the run shows it, "no" if the run contradicts it, "open" for a question, and where the sample
    decides neither; "vacuous" if the null passes as well, or nothing was sampled. ``holds`` is True for yes, False for
    no, None otherwise. ``measured`` is None where the run does not tell (a metric that is missing, or not a number).
    Intervals are of 95 %, over ``n`` units.
    """

    claim: str
    figure: str
    measured: float | None
    threshold: float | None
    holds: bool | None
    rule: str  # the comparison in symbols
    needed: str  # the same without the metric's name, for a table
    verdict: Answer = "open"
    null: Null | None = None
    interval: list[float] | None = None
    effect: Effect | None = None
    share: Share | None = None
    n: int = 0
    why: str = ""  # what decided, in words

    def as_dict(self) -> dict[str, object]:
        """The form in summary.json."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What a run measured, as claims look at it.

    Args:
        last: Values of the last row by metric: [n], or [n, k] for units with k values each.
        first: Those of the first row.
        sizes: Of the run, which levels and chance follow from.
        quantities: What is known of the metrics.
        unit: What values are of: "instance" or "head".
        units: The same for metrics of which it is something else, such as "template".
    """

    last: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray] = field(default_factory=dict)
    sizes: Sizes = UNKNOWN
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    unit: str = "instance"
    units: Mapping[str, str] = field(default_factory=dict)


def judge(claim: Claim, evidence: Evidence) -> Verdict:
    """Compute one claim.

    The rules: a share must be reached, and its distance from the null's share must be beyond chance. A mean must be
    beyond the threshold with its whole interval, and beyond its null with the whole interval of the difference. Where
    an interval contains both answers, or there is none, the claim stays open. Where the null satisfies the same
    comparison, it is vacuous.
    """
    sample = _Sample.of(claim, evidence)
    verdict = replace(sample.described(), **sample.measured())
    answer, why = sample.answer(verdict)
    return replace(verdict, verdict=answer, why=why, holds={"yes": True, "no": False}.get(answer))


@dataclass(frozen=True)
class _Sample:
    """The units that a claim is about, with their values and those of their null."""

    claim: Claim
    evidence: Evidence
    values: np.ndarray  # [n]
    others: np.ndarray | None  # [n], of the other metric
    null: np.ndarray | None  # [n] or draws [m], of the null
    is_paired: bool  # the null has a value for each unit
    is_known: bool  # the null is no sample, or a large one
    null_name: str
    weights: np.ndarray  # [n]
    threshold: float | None
    n_all: int  # units that the run has
    along: np.ndarray | None = None  # [n]

    @classmethod
    def of(cls, claim: Claim, evidence: Evidence) -> _Sample:
        values = _values(claim.metric, claim, evidence)
        weights = _last(claim.weights, claim, evidence) if claim.weights else np.ones(len(values))
        chosen = _among(claim, evidence, len(values))
        evidence = replace(evidence, unit=evidence.units.get(claim.metric, evidence.unit))
        if evidence.unit != "instance":  # a head that a metric says nothing about; an instance has diverged
            chosen &= np.isfinite(values)
        if claim.weights:  # a unit without weight has no value
            chosen = chosen & (weights > 0 if len(weights) == len(values) else np.zeros(len(values), dtype=bool))
            weights = weights if len(weights) == len(values) else np.zeros(len(values))
        others = _values(claim.other, claim, evidence) if claim.other else None
        null, is_paired, is_known, name = _null(claim, evidence)
        if others is not None:
            others = others[chosen] if len(others) == len(values) else np.empty(0)
        if null is not None and is_paired:
            null = null[chosen] if len(null) == len(values) else np.empty(0)
        along = _last(claim.along, claim, evidence) if claim.along else None
        threshold = None if claim.other else _threshold(claim, evidence, null)
        return cls(
            claim, evidence, values[chosen], others, null, is_paired, is_known, name, weights[chosen], threshold,
            len(values), None if along is None else along[chosen] if len(along) == len(values) else np.empty(0),
        )  # fmt: skip

    @property
    def n(self) -> int:
        """Units that it is about."""
        return len(self.values)

    # ---- the comparison ---------------------------------------------------------------------------------------------

    def satisfied(self, values: np.ndarray, others: np.ndarray | float | None) -> np.ndarray:
        """Where a comparison is satisfied; nowhere for NaN."""
        assert self.claim.relation is not None
        return np.asarray(_RELATIONS[self.claim.relation](values, math.nan if others is None else others))

    def described(self) -> Verdict:
        """The claim in words and symbols."""
        claim, unit = self.claim, self.evidence.unit
        what = claim.metric if claim.of == "last" else f"the change of {claim.metric}"
        if claim.within != "mean":
            what = f"the {claim.within} of {what}"
        where = f" with {claim.among}" if claim.among else ""
        share, over = claim.needed_share, claim.over
        change = " change" if claim.of == "change" else ""
        threshold = self.threshold
        if claim.crosses is not None:
            what = f"{claim.along} at which {what} crosses {claim.crosses:g}"
        if claim.relation is None:
            rule, needed = f"{over} of {what} over {unit}s{where}", f"{over}, open question"
        elif claim.other is not None and share is None:
            needed = f"{claim.relation} {claim.other} in more {unit}s than {self.null_name}"
            rule = f"{what} {needed}{where}"
        elif share is not None:
            of = "every" if share == 1 else f"at least {share:g} of the"
            of_units = f"in {of} {unit}" + ("" if share == 1 else "s")
            against = claim.other or _number(threshold)
            rule = f"{what} {claim.relation} {against} {of_units}{where}"
            needed = f"{claim.relation} {against} {of_units}"
            threshold = share if claim.other else threshold
        else:
            against = self.null_name if claim.threshold is None else _number(threshold)
            by = f" by {claim.by:g} or more" if claim.by else ""
            needed = f"{over}{change} {claim.relation} {against}{by}"
            rule = f"{needed}: {what} over {unit}s{where}"
        return Verdict(claim.claim, claim.figure, None, _finite(threshold), None, rule, needed)

    # ---- the numbers ------------------------------------------------------------------------------------------------

    def measured(self) -> dict[str, Any]:
        """Measured value, null, effect, share, and their intervals."""
        if self.n == 0:
            return {"n": 0, "null": None if self.claim.against is None else Null(self.null_name, None)}
        if self.claim.other is not None:
            return self._of_share()
        if self.claim.crosses is not None:
            return self._of_crossing()
        value = self._reduced(self.values, self.weights)
        interval = (
            mean_interval(self.values, self.weights) if self.claim.over == "mean" else Interval(math.nan, math.nan)
        )
        found: dict[str, Any] = {"measured": _finite(value), "interval": _pair(interval), "n": self.n}
        null = self._null_value()
        if self.claim.against is not None:
            found["null"] = Null(self.null_name, _finite(null))
        if math.isfinite(null) and math.isfinite(value):
            found["effect"] = Effect(value - null, _pair(self._effect_interval(null)))
        if self.claim.needed_share is not None:
            found["share"] = self._share()
        return found

    def _of_crossing(self) -> dict[str, Any]:
        """Where the metric crosses a level along another one, with a bootstrap over units."""
        assert self.claim.crosses is not None
        level = self.claim.crosses
        assert self.along is not None
        if len(self.along) != self.n or not np.isfinite([*self.values, *self.along]).all():
            return {"n": self.n}
        value = crossing(self.along, self.values, level)
        rng = np.random.default_rng(0)
        drawn = [
            crossing(self.along[some], self.values[some], level) for some in rng.integers(self.n, size=(999, self.n))
        ]
        ends = np.quantile(drawn, [0.025, 0.975]) if self.n > 1 else (math.nan, math.nan)
        return {"n": self.n, "measured": value, "interval": _pair(Interval(*map(float, ends)))}

    def _reduced(self, values: np.ndarray, weights: np.ndarray | None) -> float:
        if not len(values):
            return math.nan
        if self.claim.over == "mean":
            return float(np.average(values, weights=weights))
        return float(_REDUCED[self.claim.over](values))

    def _null_value(self) -> float:
        if self.null is None:
            return math.nan
        return self._reduced(self.null, self.weights if self.is_paired else None)

    def _effect_interval(self, null: float) -> Interval:
        """Of the difference from the null, unit by unit where the null has their values."""
        if self.claim.over != "mean":
            return Interval(math.nan, math.nan)
        paired = self.null if self.is_paired and self.null is not None else np.full(self.n, null)
        return mean_interval(self.values - paired, self.weights)

    def _share(self) -> Share:
        others = self.threshold if self.others is None else self.others
        of = self.n if self.others is None or len(self.others) == self.n else 0
        k = int(self.satisfied(self.values, others).sum()) if of else 0
        of_null = self._null_share()
        return Share(k / self.n, list(share_interval(k, self.n)), of_null, self.claim.needed_share)

    def _null_share(self) -> float | None:
        """Share of the null that satisfies the comparison, where that is known."""
        if self.null is None or not len(self.null):
            return None
        if self.claim.other is not None:  # the null is a share
            return float(self.null.mean())
        return float(self.satisfied(self.null, self.threshold).mean())

    def _of_share(self) -> dict[str, Any]:
        """What is measured is the share itself."""
        share = self._share()
        null = None if self.claim.against is None else Null(self.null_name, share.null)
        known = self.others is not None and len(self.others) == self.n
        effect = None if share.null is None else Effect(share.value - share.null, _pair(self._share_effect(share)))
        return {
            "measured": share.value if known else None,
            "interval": share.interval if known else None,
            "n": self.n,
            "null": null,
            "effect": effect if known else None,
            "share": share,
        }

    def _share_effect(self, share: Share) -> Interval:
        assert share.null is not None
        n_null = len(self.null) if self.null is not None else 0
        of_null = Interval(share.null, share.null)
        if not self.is_known:
            of_null = share_interval(round(share.null * n_null), n_null)
        return share_difference_interval(share.value, Interval(*share.interval), share.null, of_null)

    # ---- the answer -------------------------------------------------------------------------------------------------

    def answer(self, found: Verdict) -> tuple[Answer, str]:
        """The verdict and what decided it."""
        claim, unit = self.claim, self.evidence.unit
        if self.n == 0:
            return "vacuous", f"no {unit} to judge it by" if self.n_all else f"{claim.metric} was not measured"
        if claim.relation is None:
            return "open", ""
        if self._nothing_happened():
            return "vacuous", f"neither has happened in any {unit}"
        if found.measured is None:
            return "no", "not a finite number"
        if claim.threshold is not None and claim.other is None and _finite(self.threshold) is None:
            return "vacuous", "what it needs cannot be computed from what the run kept"
        if found.share is not None and found.share.needed is not None:
            return self._of_shares(found.share, found.share.needed)
        up = claim.other is not None or claim.relation in (">", ">=")  # of a share, more is claimed
        if claim.threshold is not None:
            if claim.over != "mean":  # one unit decides
                passes = bool(self.satisfied(np.array(found.measured), self.threshold))
                return ("yes" if passes else "no"), f"one {unit} decides"
            assert self.threshold is not None
            if claim.against is not None and bool(self.satisfied(np.array(self._null_value()), self.threshold)):
                return "vacuous", f"the null ({self.null_name}) passes as well"
            if found.interval is None:
                return "open", f"one {unit} gives no interval"
            ends = [bool(self.satisfied(np.array(end), self.threshold)) for end in found.interval]
            if not any(ends):
                return "no", "the whole interval misses the threshold"
            if not all(ends):
                return "open", "the interval contains the threshold"
        if found.effect is None:
            return (
                ("yes", "the whole interval passes the threshold") if claim.against is None else ("vacuous", "no null")
            )
        if found.effect.interval is None:
            return "open", f"one {unit} gives no interval"
        low, high = found.effect.interval if up else (-found.effect.interval[1], -found.effect.interval[0])
        if low > claim.by:
            return "yes", "beyond the null, interval and all"
        if claim.threshold is None and high < 0:
            return "no", "beyond the null, on the other side"
        if claim.threshold is None and high < claim.by:
            return "no", f"the difference is smaller than {claim.by:g}, interval and all"
        return "open", f"the interval of the difference from the null contains {claim.by:g}"

    def _nothing_happened(self) -> bool:
        """True where a claim is about the order of two events, and no unit has seen one of them: none has an order."""
        if self.claim.other is None or self.others is None or not len(self.others):
            return False
        are_events = all(name.startswith(_EVENTS) for name in (self.claim.metric, self.claim.other))
        return are_events and not np.isfinite(np.concatenate([self.values, self.others])).any()

    def _of_shares(self, share: Share, needed: float) -> tuple[Answer, str]:
        counted = f"{round(share.value * self.n)} of {self.n} {self.evidence.unit}s"
        if share.null is not None and share.null >= needed:
            return "vacuous", f"the null ({self.null_name}) passes as well"
        if self.claim.against is not None and share.null is None:
            return "vacuous", f"the null ({self.null_name}) was not measured"
        if share.value < needed:
            return "no", counted
        if share.null is not None and self._share_effect(share).low <= 0:
            return "open", f"{counted}: too few to tell from the null"
        return "yes", counted


def _values(name: str, claim: Claim, evidence: Evidence) -> np.ndarray:
    """Values of a metric [n]: the last ones, or their change."""
    last = _last(name, claim, evidence)
    if claim.of == "last":
        return last
    first = _reduced(evidence.first.get(name, np.empty(0)), claim.within)
    return last - first if len(first) == len(last) else np.empty(0)


def _last(name: str, claim: Claim, evidence: Evidence) -> np.ndarray:
    return _reduced(evidence.last.get(name, np.empty(0)), claim.within)


def _reduced(values: np.ndarray, within: str) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values if values.ndim < 2 else np.asarray(_REDUCED[within](values.reshape(len(values), -1), axis=-1))


def _null(claim: Claim, evidence: Evidence) -> tuple[np.ndarray | None, bool, bool, str]:
    """Values of the null, whether they belong to the units, whether they are more than a sample, and its name."""
    null = claim.against
    if null is None:
        return None, False, True, ""
    if isinstance(null, (int, float)):
        return np.array([float(null)]), False, True, f"{null:g}"
    if null == "chance":
        quantity = evidence.quantities.get(claim.metric)
        level = LEVELS.get(str(quantity.level)) if quantity is not None else None
        chance = level.chance(evidence.sizes) if level is not None else None
        return (np.empty(0) if chance is None else chance.draws), False, True, "chance"
    if null == "start":
        if claim.other is not None:
            first = replace(evidence, last=evidence.first)
            pair = [_last(name, claim, first) for name in (claim.metric, claim.other)]
            if len(pair[0]) != len(pair[1]) or not len(pair[0]):
                return np.empty(0), False, False, "start"
            assert claim.relation is not None
            return _RELATIONS[claim.relation](*pair).astype(float), False, False, "start"
        return _reduced(evidence.first.get(claim.metric, np.empty(0)), claim.within), True, False, "start"
    return _values(null, claim, evidence), True, False, null


def _threshold(claim: Claim, evidence: Evidence, null: np.ndarray | None) -> float | None:
    if claim.threshold is None:
        return None
    if claim.threshold == _HALFWAY:
        assert claim.goal is not None
        return (float(np.mean(null)) + claim.goal) / 2 if null is not None and len(null) else math.nan
    if isinstance(claim.threshold, str):
        return float(LEVELS[claim.threshold].of(evidence.sizes))
    return float(claim.threshold)


def _among(claim: Claim, evidence: Evidence, n: int) -> np.ndarray:
    """Which of n units the claim is about; none where a condition was not measured."""
    chosen = np.ones(n, dtype=bool)
    for condition in claim.conditions():
        assert condition is not None  # __post_init__ has checked it
        name, relation, number = condition
        values = _last(name, claim, evidence)
        chosen &= _RELATIONS[relation](values, number) if len(values) == n else False
    return chosen


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _pair(interval: Interval) -> list[float] | None:
    return [interval.low, interval.high] if interval.is_known else None


def _number(value: float | None) -> str:
    return "?" if value is None or not math.isfinite(value) else f"{value:.3g}"


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Where a curve that rises or falls throughout crosses a level.

    The curve is the isotonic regression of y on x (falling or rising, whichever is nearer), linear between the means
    of its steps.

    Returns:
        A value of x; the largest (or the smallest) one for a curve that is above the level (or below) everywhere.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    fits = [isotonic_regression(y, increasing=rises) for rises in (False, True)]
    errors = [float(np.square(fit.x - y).sum()) for fit in fits]
    fit = fits[int(errors[1] < errors[0])]
    blocks = itertools.pairwise(fit.blocks)
    at, height = np.array([(x[a:b].mean(), fit.x[a]) for a, b in blocks]).T
    above = height >= level
    if above.all() or not above.any():
        return float(x[-1] if above[0] else x[0])
    i = int(np.flatnonzero(above[1:] != above[:-1])[0])
    return float(at[i] + (height[i] - level) / (height[i] - height[i + 1]) * (at[i + 1] - at[i]))


class Told(NamedTuple):
    """A verdict in words, cell by cell of a table."""

    verdict: str
    measured: str  # with its interval
    null: str  # with its name
    effect: str  # difference from the null, with its interval
    needed: str
    n: str  # units, and how many of them satisfy it
    why: str


def in_words(claim: Mapping[str, Any]) -> Told:
    """The words for a claim of summary.json; one that an earlier version judged has neither null nor interval."""
    verdict = claim.get("verdict") or {True: "yes", False: "no", None: "open"}[claim["holds"]]
    measured = "not measured" if claim["measured"] is None else f"{claim['measured']:.4g}"
    null, effect, share = (claim.get(name) or {} for name in ("null", "effect", "share"))
    value = null.get("value")
    n = claim.get("n")
    passed = f"{round(share['value'] * n)} of " if share and n else ""
    return Told(
        verdict,
        measured + _ends(claim.get("interval")),
        "" if not null else _of_null(null["name"], value),
        "" if not effect else f"{effect['value']:+.4g}" + _ends(effect.get("interval")),
        claim["needed"].replace(", open question", ""),
        "" if n is None else f"{passed}{n}",
        claim.get("why") or "",
    )


def reading(claim: Mapping[str, Any]) -> str:
    """A claim of summary.json in a line: its metric and what it measured, the null, what was needed, what decided."""
    told, rule = in_words(claim), claim.get("rule") or ""
    metric, null = _metric_in(rule), claim.get("null") or {}
    relation, _, rest = told.needed.partition(" ")
    other = rest.split(" ")[0]
    if claim.get("share") and relation in _RELATIONS and "/" in other:  # unit by unit: the share of them is measured
        parts, needed = [f"share of units with {metric} {relation} {other}: {told.measured}"], rest[len(other) + 1 :]
    else:
        parts = [f"{metric} {told.measured}".strip()]
        needed = told.needed if set(told.needed.split()) & _RELATIONS.keys() else ""
    if null.get("value") is not None:
        value = f"{null['value']:.4g}"
        name = {"chance": "by chance", "start": "at the start", value: "null"}.get(null["name"], null["name"])
        parts.append(f"{name} {value}")
    if needed:
        parts.append(f"needed: {needed}")
    return "; ".join([*parts, *([told.why] if told.why else [])])


def _metric_in(rule: str) -> str:
    """The metric that a rule of summary.json is about."""
    found = re.search(r"(?:: | of |^)(\S+/\S+)(?: over |$)", rule)
    return found[1] if found else rule.split(" ")[0]


def _of_null(name: str, value: float | None) -> str:
    known = "not known" if value is None else f"{value:.4g}"
    return known if known == name else f"{known} ({name.rsplit('/', 1)[-1]})"


def _ends(interval: Sequence[float] | None) -> str:
    return "" if not interval else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
