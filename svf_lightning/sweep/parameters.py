"""Parameters of a sweep file: what W&B's schema allows, the values of a grid, and draws of a random search."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

MOST = 100_000  # trials of a sweep, and values of a parameter


def _representable(number: float) -> float:
    """A number as it is; a whole one may be too large to count with."""
    if abs(number) > sys.float_info.max:
        raise ValueError("a number that is not beyond what a float can hold")
    return number


Number = Annotated[int | float, AfterValidator(_representable)]
# 2.0 is a whole number in a JSON schema
Whole = Annotated[int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]
_LARGEST_EXPONENT = math.log(sys.float_info.max)


class Entry(BaseModel):
    """A part of a sweep file: no keys but those of its fields, values of their types, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Parameter(Entry):
    """How a parameter gets its value.

    Args:
        distribution: Its name, also where the file leaves it out.
    """

    distribution: str

    @property
    def varies(self) -> bool:
        """True if it can have several values."""
        return True

    def choices(self) -> Sequence[Any] | None:
        """All values, for a grid; None if there is no list of them.

        Raises:
            ValueError: They are too many.
            OverflowError: The same.
        """
        return None

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Any:
        """One draw.

        Raises:
            ValueError: It is beyond what a number can hold.
            OverflowError: The same.
        """


class _Constant(Parameter):
    value: Any

    @property
    def varies(self) -> bool:
        return False

    def choices(self) -> Sequence[Any]:
        return [self.value]

    def draw(self, generator: np.random.Generator) -> Any:
        return self.value


class _Categorical(Parameter):
    values: list[Any] = Field(min_length=1)

    @property
    def varies(self) -> bool:
        return len(self.values) > 1

    def choices(self) -> Sequence[Any] | None:
        return self.values

    def draw(self, generator: np.random.Generator) -> Any:
        return self.values[generator.choice(len(self.values))]


class _Weighted(_Categorical):
    probabilities: list[Annotated[Number, Field(ge=0)]]

    @model_validator(mode="after")
    def _are_probabilities(self) -> _Weighted:
        if len(self.probabilities) != len(self.values):
            raise ValueError(f"as many probabilities as values, {len(self.values)}, not {len(self.probabilities)}")
        if not np.isclose(sum(self.probabilities), 1):
            raise ValueError(f"probabilities that sum to 1, not to {sum(self.probabilities):g}")
        return self

    def choices(self) -> None:
        return None

    def draw(self, generator: np.random.Generator) -> Any:
        p = np.array(self.probabilities, dtype=float)
        return self.values[generator.choice(len(self.values), p=p / p.sum())]


class _Range(Parameter):
    min: Number
    max: Number

    @model_validator(mode="after")
    def _is_not_empty(self) -> _Range:
        if self.min >= self.max:
            raise ValueError(f"min less than max, not {self.min} and {self.max}")
        return self


class _IntUniform(_Range):
    min: int
    max: int

    def choices(self) -> Sequence[int]:
        if self.max - self.min >= MOST:
            raise ValueError
        return range(self.min, self.max + 1)

    def draw(self, generator: np.random.Generator) -> int:
        return int(generator.integers(self.min, self.max, endpoint=True))


class _Uniform(_Range):
    def draw(self, generator: np.random.Generator) -> float:
        return generator.uniform(float(self.min), float(self.max))


class _LogUniform(_Range):
    sign: ClassVar[int] = 1

    @model_validator(mode="after")
    def _are_exponents(self) -> _LogUniform:
        if max(self.sign * self.min, self.sign * self.max) > _LARGEST_EXPONENT:
            raise ValueError(
                f"for min and max exponents of e, to at most {int(_LARGEST_EXPONENT)}; {self.distribution}_values has "
                "the values themselves"
            )
        return self

    def draw(self, generator: np.random.Generator) -> float:
        return math.exp(self.sign * generator.uniform(float(self.min), float(self.max)))


class _InverseLogUniform(_LogUniform):
    sign: ClassVar[int] = -1


class _LogUniformValues(_Range):
    """Also for inv_log_uniform_values: W&B's code treats the two alike."""

    min: Annotated[Number, Field(gt=0)]

    def draw(self, generator: np.random.Generator) -> float:
        return math.exp(generator.uniform(math.log(self.min), math.log(self.max)))


class _Normal(Parameter):
    mu: Number = 0.0
    sigma: Annotated[Number, Field(ge=0)] = 1.0

    def draw(self, generator: np.random.Generator) -> float:
        return generator.normal(float(self.mu), float(self.sigma))


class _LogNormal(_Normal):
    def draw(self, generator: np.random.Generator) -> float:
        return math.exp(super().draw(generator))


class _Beta(Parameter):
    a: Annotated[Number, Field(gt=0)] = 1
    b: Annotated[Number, Field(gt=0)] = 1

    def draw(self, generator: np.random.Generator) -> float:
        return generator.beta(float(self.a), float(self.b))


class _Quantized(Parameter):
    """Multiples of q."""

    q: Annotated[Number, Field(gt=0)] = 1.0

    def draw(self, generator: np.random.Generator) -> float:
        quantized = round(super().draw(generator) / self.q) * self.q  # type: ignore[safe-super]
        return int(quantized) if isinstance(self.q, int) else float(quantized)


class _QuantizedUniform(_Quantized, _Uniform):
    def choices(self) -> Sequence[float]:
        if (self.max - self.min) / self.q > MOST:
            raise ValueError
        values: list[float] = np.arange(self.min, self.max, self.q).tolist()
        return values


_KINDS: dict[str, type[Parameter]] = {
    "constant": _Constant,
    "categorical": _Categorical,
    "categorical_w_probabilities": _Weighted,
    "int_uniform": _IntUniform,
    "uniform": _Uniform,
    "log_uniform": _LogUniform,
    "log_uniform_values": _LogUniformValues,
    "inv_log_uniform": _InverseLogUniform,
    "inv_log_uniform_values": _LogUniformValues,
    "normal": _Normal,
    "log_normal": _LogNormal,
    "beta": _Beta,
    "q_uniform": _QuantizedUniform,
}
for _name in ("log_uniform", "log_uniform_values", "normal", "log_normal", "beta"):
    _KINDS[f"q_{_name}"] = create_model(f"q_{_name}", __base__=(_Quantized, _KINDS[_name]))
DISTRIBUTIONS = tuple(_KINDS)


def read_parameter(entry: Mapping[str, Any]) -> Parameter | None:
    """A parameter, from its entry in a sweep file; None if it is of no kind.

    Raises:
        pydantic.ValidationError: It is not one of its kind.
    """
    given = entry.get("distribution", _implied(entry))
    kind = _KINDS.get(given) if isinstance(given, str) else None
    return kind.model_validate({**entry, "distribution": given}) if kind else None


def _implied(entry: Mapping[str, Any]) -> str:
    """The distribution of an entry that names none, as W&B has it."""
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if {"min", "max"} & entry.keys():
        return "uniform" if any(isinstance(entry.get(end), float) for end in ("min", "max")) else "int_uniform"
    return ""


def by_path(entries: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Entries of ``parameters``, with their names; in W&B's nested form, a name has several parts."""
    for name, entry in entries.items():
        inner = entry.get("parameters") if isinstance(entry, dict) and len(entry) == 1 else None
        if isinstance(inner, dict) and inner:
            yield from by_path(inner, (*above, name))
        else:
            yield (*above, name), entry
