"""What a measured quantity is: name, unit, meaning, source, and where it is shown. It is defined once.

A metric callback lists its quantities (``ProbeMetric.quantities``). They travel with the rows into the trajectory, so
that everything downstream (closing table, summary, W&B, pages, figures) shows a quantity that it has never heard of,
also when the package that measured it is not installed any more. :data:`MODULE_QUANTITIES` are those that modules hand
over themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from enum import Flag, auto
from typing import TYPE_CHECKING, Any, Literal

from svf_lightning.errors import InputError, bad_value
from svf_lightning.metrics.dynamics import LEVELS, Sizes

if TYPE_CHECKING:
    import xarray as xr

ATTRIBUTE = "quantities"  # of a trajectory: JSON


@dataclass(frozen=True)
class Panel:
    """Axes over training steps that quantities of one unit share: on a page, and in W&B's saved view.

    Args:
        title: What the panel shows.
        axis: Title of its axis, with the unit.
        section: Title of the group of panels that it belongs to.
        log: The axis is logarithmic.
        low: Lower end of the axis; None for that of the values.
        high: Upper end.
    """

    title: str
    axis: str
    section: str
    log: bool = False
    low: float | None = None
    high: float | None = None


_TOY, _REPLAY = "Toy model", "Replay of a language model"
LOSSES = Panel("Losses", "loss", _TOY, log=True)
SPECTRUM = Panel("Spectrum", "σ_k (nats)", _TOY)
COSINES = Panel("Alignment and orthogonality", "|cosine|", _TOY, low=0, high=1)
SPARSENESS = Panel("Sparseness", "S(v)", _TOY)
TASK_SPARSENESS = Panel("Sparseness of the task's heads", "S(v)", _REPLAY)
TASK = Panel("Task", "share; attention weight", _REPLAY, low=0, high=1)
TASK_PAIRS = Panel("Singular pairs that a score needs", "median (count)", _REPLAY)
ABLATION = Panel("Logit difference with 4 contributions removed", "change (nats)", _REPLAY)
DIRECTIONS = Panel("Output without the directions that contribute most", "KL (nats)", _REPLAY, low=0)
_ORDER = (LOSSES, SPECTRUM, COSINES, SPARSENESS, TASK_SPARSENESS, TASK, TASK_PAIRS, ABLATION, DIRECTIONS)


def in_order(panels: Iterable[Panel]) -> list[Panel]:
    """Distinct panels: those above in their order, then others in that of their first mention."""
    distinct = list(dict.fromkeys(panels))
    return [*(panel for panel in _ORDER if panel in distinct), *(panel for panel in distinct if panel not in _ORDER)]


class Place(Flag):
    """Where a quantity is shown, beside its curve over the training steps."""

    NOWHERE = 0
    TABLE = auto()  # a row of the closing table
    SLIDER = auto()  # on the slider through training: a heat map or bars
    PROGRESS = auto()  # beside the progress bar
    COMPARISON = auto()  # a figure of the page that compares runs
    SWEEP = auto()  # along the axes of a sweep


@dataclass(frozen=True)
class Quantity:
    """One measured quantity.

    Args:
        name: Its name in the trajectory, in summary.json and in W&B, such as "alignment/matched".
        label: A few words for legends and tables; empty for the name.
        meaning: What it says, in one sentence.
        symbol: As in a formula; ``_`` begins a subscript: "σ_1", "S(v)".
        unit: Such as "nats", "|cosine|", "count", "steps", "share"; empty for a plain number.
        low: Lowest possible value; None if there is none.
        high: Highest possible value.
        source: Equation, figure or paper.
        dims: Its own dimensions, after those of the probe.
        better: Which way is better; None where neither is.
        needs: What a run must have for it to be measured, beside its callback.
        gaps: It is NaN where there is nothing to measure, such as for a head that attends to nothing.
        places: Where it is shown.
        logged: What W&B gets of it: the mean over instances or heads with the smallest and the largest ("extremes"),
            the mean alone ("mean"), or nothing ("no": a detail, which tables leave out, too).
        column: Its title in the table of checkpoints; empty to leave it out there.
        panel: The panel of its curve. None: a panel that quantities of its unit share, after all others.
        colour: Colour of its curve, from the palette of :mod:`svf_lightning.figures.look`; empty for one that is left.
        change: The quantity that says when this one has changed (90 % of its way from first to last value), where it
            has (``metrics.dynamics.has_happened``).
        halfway: The one that says when it has covered half of its way.
        level: What the final value must reach, as ``better`` says, so that the change has happened: a number, or the
            name of one that follows from the sizes of the run (``metrics.dynamics.LEVELS``). None: any, if the change
            is larger than the noise.
        provider: Class that measures it; filled in where quantities are collected.
    """

    name: str
    label: str = ""
    meaning: str = ""
    _: KW_ONLY
    symbol: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    source: str = ""
    dims: tuple[str, ...] = ()
    better: Literal["higher", "lower"] | None = None
    needs: str = ""
    gaps: bool = False
    places: Place = Place.TABLE | Place.SLIDER
    logged: Literal["extremes", "mean", "no"] = "extremes"
    column: str = ""
    panel: Panel | None = None
    colour: str = ""
    change: Quantity | None = None
    halfway: Quantity | None = None
    level: float | str | None = None
    provider: str = ""

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip("/ ") or "\n" in self.name:
            raise bad_value("name", self.name, 'a name such as "norm/mean"', "rename the quantity")
        if any(not dim or "/" in dim or "\n" in dim for dim in self.dims):
            raise bad_value("dims", self.dims, 'names without a slash, such as "feature"', f"change {self.name!r}")
        if isinstance(self.level, str) and self.level not in LEVELS:
            raise bad_value("level", self.level, f"a number or one of {', '.join(LEVELS)}", f"change {self.name!r}")
        if self.level is not None and self.better is None:
            raise bad_value("level", self.level, "a level with better=higher or lower", f"change {self.name!r}")

    def with_changes(self) -> list[Quantity]:
        """It, and those that say when it has changed."""
        return [quantity for quantity in (self, self.change, self.halfway) if quantity is not None]

    @property
    def title(self) -> str:
        """The label, or the name."""
        return self.label or self.name

    @property
    def axis(self) -> str:
        """Title of an axis: label and unit."""
        return f"{self.title} ({self.unit})" if self.unit and self.unit not in self.title else self.title

    @property
    def rises(self) -> bool | None:
        """Whether its change leads upwards; None for either way."""
        return None if self.better is None else self.better == "higher"

    def level_in(self, sizes: Sizes) -> float | None:
        """The level in a run of these sizes; NaN where a size that it needs is not known, None without a level."""
        return LEVELS[self.level].of(sizes) if isinstance(self.level, str) else self.level

    @property
    def range(self) -> str:
        """The possible values in words, such as "[0, 1]"; empty if they are not known."""
        if self.low is None and self.high is None:
            return ""
        left = "(-∞" if self.low is None else f"[{self.low:g}"
        right = "∞)" if self.high is None else f"{self.high:g}]"
        return f"{left}, {right}"

    def is_at(self, place: Place) -> bool:
        """True if it is shown there."""
        return place in self.places

    def attributes(self) -> dict[str, Any]:
        """Attributes of its variable in a dataset, by the names of the CF conventions, which xarray's plots know."""
        known = {
            "long_name": self.title,
            "units": self.unit,
            "description": self.meaning,
            "symbol": self.symbol,
            "source": self.source,
            "valid_min": self.low,
            "valid_max": self.high,
        }
        return {name: value for name, value in known.items() if value not in ("", None)}


def collect(providers: Iterable[tuple[str, Iterable[Quantity]]]) -> dict[str, Quantity]:
    """The quantities of several providers, by name, in their order.

    Args:
        providers: The name of each, which is what to type to add it to a run, and its quantities.

    Raises:
        InputError: Two of them provide the same name.
    """
    collected: dict[str, Quantity] = {}
    for provider, quantities in providers:
        for declared in quantities:
            for quantity in declared.with_changes():
                if quantity.name in collected:
                    raise InputError(_twice(quantity.name, collected[quantity.name].provider, provider))
                collected[quantity.name] = replace(quantity, provider=provider)
    return collected


def _twice(name: str, first: str, second: str) -> str:
    if first == second:
        return (
            f"{first} is in the run twice, and both measure {name!r}. Allowed: one callback for each quantity. "
            f"Fix: leave out one --trainer.callbacks+={second}."
        )
    return (
        f"{first} and {second} both measure {name!r}. Allowed: one callback for each quantity. Fix: leave out "
        f"--trainer.callbacks+={second}, or rename the quantity in {second.rsplit('.', 1)[-1]}.quantities."
    )


def as_json(quantities: Mapping[str, Quantity]) -> str:
    """Quantities as text, for a file's attributes."""
    return json.dumps([_as_dict(quantity) for quantity in quantities.values()])


def from_json(text: str) -> dict[str, Quantity]:
    """The quantities that :func:`as_json` wrote, with their changes; what another version wrote beside is left out."""
    stored = [_from_dict(entry) for entry in json.loads(text)]
    return {q.name: q for declared in stored for q in declared.with_changes()}


def _as_dict(quantity: Quantity) -> dict[str, Any]:
    given = {f.name: getattr(quantity, f.name) for f in fields(quantity) if getattr(quantity, f.name) != f.default}
    if quantity.panel is not None:
        given["panel"] = asdict(quantity.panel)
    given |= {name: _as_dict(given[name]) for name in ("change", "halfway") if name in given}
    if "places" in given:
        given["places"] = [place.name for place in Place if place in quantity.places]
    return given


def _from_dict(entry: Mapping[str, Any]) -> Quantity:
    known = {f.name for f in fields(Quantity)}
    given = {name: value for name, value in entry.items() if name in known}
    if "panel" in given:
        panel = {f.name: given["panel"][f.name] for f in fields(Panel) if f.name in given["panel"]}
        given["panel"] = Panel(**panel)
    given |= {name: _from_dict(given[name]) for name in ("change", "halfway") if name in given}
    if isinstance(given.get("level"), str) and given["level"] not in LEVELS:
        del given["level"]
    if "places" in given:
        names = [name for name in given["places"] if name in Place.__members__]
        given["places"] = Place.NOWHERE
        for name in names:
            given["places"] |= Place[name]
    return Quantity(**{**given, "dims": tuple(given.get("dims", ()))})


def stored_quantities(dataset: xr.Dataset) -> dict[str, Quantity]:
    """The quantities that a trajectory says it holds; none for one that an earlier version wrote."""
    return from_json(dataset.attrs.get(ATTRIBUTE, "[]"))


def attach(dataset: xr.Dataset, quantities: Mapping[str, Quantity]) -> xr.Dataset:
    """The dataset with what is known of its quantities as attributes."""
    held = {name: quantity for name, quantity in quantities.items() if name in dataset}
    dataset = dataset.assign_attrs({ATTRIBUTE: as_json(held)})
    for name, quantity in held.items():
        dataset[name].attrs.update(quantity.attributes())
    return dataset


def half_of_the_way(name: str, label: str) -> Quantity:
    """The step at which a change has covered half of its way, ``dynamics/t_NAME_half``."""
    return Quantity(
        f"dynamics/t_{name}_half", f"{label}, half of the way",
        "Step from which half of the way is covered, and stays so; null where it did not happen.",
        symbol=f"t_{name}_half", unit="steps", low=0, source="Fig. 3", logged="no",
    )  # fmt: skip


def on_another_scale(name: str, label: str) -> dict[str, Any]:
    """What says when a quantity has changed that is another one on another scale: in tables of all numbers alone."""
    halfway = replace(half_of_the_way(name, label), places=Place.NOWHERE)
    most = replace(
        halfway,
        name=f"dynamics/t_{name}",
        label=label,
        meaning="Step from which 90 % of the way are covered, and stay so; null where it did not happen.",
        symbol=f"t_{name}",
    )
    return {"change": most, "halfway": halfway, "places": Place.NOWHERE, "logged": "no"}


# ---- what modules hand over themselves: losses, by the names of their outputs, and coordinates of the probe ----------

_COORDINATE: Any = {"places": Place.NOWHERE, "logged": "no"}
_PAIRS = "a template that has pairs (not template=zero)"
MODULE_QUANTITIES = {
    quantity.name: replace(quantity, provider="the module")
    for quantity in (
        Quantity(
            "loss/total", "loss", "What is minimized: L = L_recon + lambda * L_attn.",
            low=0, better="lower", source="arXiv 2602.13524, section 3",
            places=Place.TABLE | Place.PROGRESS | Place.COMPARISON, panel=LOSSES, colour="blue",
        ),
        Quantity(
            "loss/recon", "reconstruction loss", "Squared error summed over features, mean over tokens.",
            low=0, better="lower", source="Elhage et al. 2022", places=Place.NOWHERE, panel=LOSSES, colour="grey",
        ),
        Quantity(
            "loss/attn", "attention loss", "Cross-entropy of the head's attention with the target's, mean.",
            unit="nats", low=0, better="lower", source="arXiv 2602.13524, section 3", places=Place.NOWHERE,
            panel=LOSSES, colour="brown",
        ),
        Quantity(
            "loss/kl", "attention's divergence", "KL divergence of the head's attention from the target's, mean.",
            unit="nats", low=0, better="lower", source="arXiv 2602.13524, section 3", places=Place.NOWHERE,
            panel=LOSSES, colour="orange", logged="mean",
        ),
        Quantity("lambda_attn", "weight of the attention loss, λ", symbol="λ", **_COORDINATE),
        Quantity(
            "cone_strength", "strength of the cone", **_COORDINATE,
            needs="--model.init_features=cone and one --model.cone_strength for each instance",
        ),
        Quantity("query_feature", "query feature of a pair", needs=_PAIRS, **_COORDINATE),
        Quantity("key_feature", "key feature of a pair", needs=_PAIRS, **_COORDINATE),
        Quantity("target_logit", "target logit of a pair", unit="nats", needs=_PAIRS, **_COORDINATE),
    )
}  # fmt: skip
