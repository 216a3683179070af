"""A W&B sweep file and its trials: the same values in the same command lines as `wandb agent` makes of it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from svf_lightning.errors import InputError, bad_value, closest, reason
from svf_lightning.sweep.trial import Trial

_KEYS = (
    *("command", "description", "early_terminate", "entity", "method", "metric"),
    *("name", "parameters", "program", "project", "run_cap"),
)
_VALUE, _VALUES, _DISTRIBUTION = "value", "values", "distribution"


@dataclass(frozen=True)
class SweepFile:
    """A sweep file of W&B.

    Args:
        path: Where it is.
        name: What the sweep is called: its ``name``, or that of the file.
        method: "grid" or "random".
        parameters: By name, as in the file.
        command: With W&B's macros.
        metric: Name of the metric that it optimizes, or None.
        project: W&B project, or None.
        run_cap: Largest number of trials, or None.
    """

    path: Path
    name: str
    method: str
    parameters: Mapping[str, Mapping[str, Any]]
    command: Sequence[str]
    metric: str | None = None
    project: str | None = None
    run_cap: int | None = None
    text: str = field(default="", repr=False)

    def trials(self, *, count: int | None = None, seed: int = 0) -> list[Trial]:
        """The trials: for a grid all combinations, the last parameter fastest; for random search ``count`` draws.

        Args:
            count: Number of draws, or of the first combinations; None for ``run_cap``, or all of a grid.
            seed: Seed of the draws.

        Raises:
            InputError: A random search whose number of trials is not known, or a parameter that a grid cannot have.
        """
        limit = self.run_cap if count is None else count
        if self.method == "random":
            if limit is None:
                raise InputError(
                    f"{self.path} is a random search, which has no end. Allowed: a number of trials. "
                    "Fix: add --count=N, or run_cap: N to the file."
                )
            generator = np.random.default_rng(seed)
            combinations: Iterator[dict[str, Any]] = (
                {name: _draw(name, parameter, generator) for name, parameter in self.parameters.items()}
                for _ in range(limit)
            )
        else:
            choices = {name: _choices(name, parameter) for name, parameter in self.parameters.items()}
            product = itertools.product(*choices.values())
            combinations = (dict(zip(choices, combination, strict=True)) for combination in product)
        varied = tuple(name for name, parameter in self.parameters.items() if _varies(parameter))
        trials = [
            Trial(values, varied, self._args(values), self.name) for values in itertools.islice(combinations, limit)
        ]
        return list({trial.id: trial for trial in trials}.values())  # random draws may repeat

    def _args(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        # internal to wandb, which offers no other way to get the command line that its agent would start
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

        macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        command = create_sweep_command([str(part) for part in self.command])
        rendered: list[str] = []
        for part in command:
            macro = re.fullmatch(r"\$\{(\w+)\}", part)
            rendered += macros.get(macro[1], []) if macro else [part]
        return tuple(rendered[rendered.index("fit") :])


def read_sweep(file: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        InputError: It cannot be read, it is no sweep of ``python -m svf_lightning fit``, or its search method needs
            W&B's cloud.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}). Allowed: a W&B sweep file, such as sweeps/seed.yaml. "
            "Fix: check the path."
        ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{path} is not valid YAML ({reason(error)}). Fix: macros such as ${{args}} need a list with one item per "
            "line, or quotes."
        ) from error
    if not isinstance(content, dict):
        raise bad_value(
            str(path), type(content).__name__, "a mapping with method, parameters and command", "rewrite it"
        )
    for key in content:
        if key not in _KEYS:
            raise InputError(
                f"{path} has an unknown key {key!r}. {closest(str(key), _KEYS)}Allowed: {', '.join(_KEYS)}. "
                "Fix: correct it."
            )
    method = content.get("method")
    if method == "bayes":
        raise InputError(
            f"{path} is a Bayesian search, whose trials depend on the results before them: W&B's cloud decides them. "
            f"Fix: wandb sweep {path}, then wandb agent; or set method to grid or random."
        )
    if method not in ("grid", "random"):
        raise bad_value(f"{path}: method", method, "grid or random", "change it")
    command = content.get("command") or []
    if not isinstance(command, list) or "svf_lightning" not in command or "fit" not in command:
        raise bad_value(
            f"{path}: command", command, "a list that holds python -m svf_lightning fit ... ${args}", "rewrite it"
        )
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise bad_value(f"{path}: parameters", parameters, "parameters by name, each with value or values", "add some")
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict) or not {_VALUE, _VALUES, _DISTRIBUTION, "min", "max", "mu"} & set(parameter):
            raise bad_value(
                f"{path}: parameters.{name}", parameter, "value, values, or a distribution", "see the files in sweeps/"
            )
    metric = content.get("metric") or {}
    return SweepFile(
        path, str(content.get("name") or path.stem), method, parameters, command,
        metric=metric.get("name"), project=content.get("project"), run_cap=content.get("run_cap"), text=text,
    )  # fmt: skip


def _varies(parameter: Mapping[str, Any]) -> bool:
    """True for a parameter that can have several values: a distribution, or a list of more than one."""
    return _VALUE not in parameter and (_VALUES not in parameter or len(parameter[_VALUES]) > 1)


def _choices(name: str, parameter: Mapping[str, Any]) -> list[Any]:
    """All values of a parameter, for a grid."""
    if _VALUE in parameter:
        return [parameter[_VALUE]]
    if _VALUES in parameter and "probabilities" not in parameter:
        return list(parameter[_VALUES])
    kind = _kind(name, parameter)
    if kind == "int_uniform":
        return list(range(int(parameter["min"]), int(parameter["max"]) + 1))
    if kind == "q_uniform":
        return list(np.arange(parameter["min"], parameter["max"], parameter.get("q", 1)).tolist())
    raise bad_value(
        f"parameters.{name}", dict(parameter), "value, values, int_uniform or q_uniform in a grid", "use method: random"
    )


def _kind(name: str, parameter: Mapping[str, Any]) -> str:
    """The distribution of a parameter; as W&B does, uniform between min and max if none is named."""
    if _VALUE in parameter:
        return "constant"
    if _VALUES in parameter:
        return "categorical"
    given = parameter.get(_DISTRIBUTION)
    if given is None:
        whole = all(isinstance(parameter.get(end), int) for end in ("min", "max"))
        given = "normal" if "mu" in parameter else "int_uniform" if whole else "uniform"
    return str(given)


def _draw(name: str, parameter: Mapping[str, Any], generator: np.random.Generator) -> Any:
    """One draw of a parameter, with the distributions of W&B's sweep configuration.

    Raises:
        InputError: An unknown distribution, or one that lacks a number.
    """
    kind = _kind(name, parameter)
    if kind == "constant":
        return parameter[_VALUE]
    if kind == "categorical":
        values = parameter[_VALUES]
        return values[generator.choice(len(values), p=parameter.get("probabilities"))]
    base = kind.removeprefix("q_")

    def number(key: str, default: float | None = None) -> float:
        value = parameter.get(key, default)
        if not isinstance(value, (int, float)):
            raise bad_value(f"parameters.{name}.{key}", value, f"a number, for {kind}", "add it to the sweep file")
        return float(value)

    def uniform(transform: Callable[[float], float] = float) -> float:
        return generator.uniform(transform(number("min")), transform(number("max")))

    draws: dict[str, Callable[[], float]] = {
        "uniform": uniform,
        "int_uniform": lambda: float(generator.integers(int(number("min")), int(number("max")), endpoint=True)),
        "log_uniform": lambda: math.exp(uniform()),
        "log_uniform_values": lambda: math.exp(uniform(math.log)),
        "inv_log_uniform": lambda: math.exp(-uniform()),
        "inv_log_uniform_values": lambda: math.exp(uniform(math.log)),  # W&B's code treats the two alike
        "normal": lambda: generator.normal(number("mu", 0.0), number("sigma", 1.0)),
        "log_normal": lambda: math.exp(generator.normal(number("mu", 0.0), number("sigma", 1.0))),
        "beta": lambda: generator.beta(number("a", 1.0), number("b", 1.0)),
    }
    if base not in draws:
        raise bad_value(
            f"parameters.{name}.distribution", kind, f"one of {', '.join(draws)}, or q_ and one of them", "change it"
        )
    drawn = draws[base]()
    if base == kind:
        return int(drawn) if kind == "int_uniform" else float(drawn)
    q = parameter.get("q", 1)
    quantized = round(drawn / q) * q
    return int(quantized) if isinstance(q, int) else float(quantized)
