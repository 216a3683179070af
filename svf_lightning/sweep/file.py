"""A W&B sweep file and its trials: the same values in the same command lines as `wandb agent` makes of it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from omegaconf import OmegaConf
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from svf_lightning.errors import InputError, bad_value, closest, reason
from svf_lightning.sweep.parameters import DISTRIBUTIONS, MOST, Entry, Number, Parameter, Whole, by_path, read_parameter
from svf_lightning.sweep.trial import Trial

_LARGEST_FILE = 1_000_000  # bytes
_DEEPEST = 20  # levels of YAML
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # of a parameter, in W&B's schema
_LONGEST_NAME = 200  # bytes; a file system takes 255
_SHOWN = 80  # characters of a value in a message
_MACROS = (
    *("args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags"),
    *("args_json", "args_append_hydra", "args_override_hydra"),
)
_SEE = "see the files in sweeps/"
_WORDS = {"model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list", "too_short": "at least one"}
_PLAIN = TypeAdapter(dict[str, JsonValue], config=ConfigDict(strict=True, allow_inf_nan=False))


class _Metric(Entry):
    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: Number = 0.0
    impute: Literal["latest", "best", "worst"] = "worst"
    impute_while_running: Literal["latest", "best", "worst", "false"] = "false"


class _Hyperband(Entry):
    type: Literal["hyperband"]
    max_iter: Whole = 0
    min_iter: Annotated[Whole, Field(ge=1)] = 1
    s: Number = 0
    eta: Annotated[Number, Field(gt=1)] = 3
    strict: bool = True

    @model_validator(mode="after")
    def _says_when(self) -> _Hyperband:
        if "min_iter" not in self.model_fields_set and not {"max_iter", "s"} <= self.model_fields_set:
            raise ValueError("min_iter, or max_iter and s")
        return self


class _Controller(Entry):
    model_config = ConfigDict(extra="allow")

    type: Literal["local", "cloud"]


class _Content(Entry):
    """The keys of W&B's schema, but those of trials that another program decides about."""

    api_version: str = Field("", alias="apiVersion")
    kind: Literal["sweep"] = "sweep"
    controller: _Controller = _Controller(type="cloud")
    description: str = ""
    program: str = ""
    job: str = ""
    image_uri: str = ""
    entity: str = ""
    project: str | None = None
    method: Literal["grid", "random"]
    command: list[str | int | float]
    name: str = ""
    run_cap: Annotated[Whole, Field(gt=0)] | None = None
    metric: _Metric | None = None
    early_terminate: _Hyperband | None = None
    parameters: dict[str, Any] = Field(min_length=1)


_KEYS = tuple(known.alias or name for name, known in _Content.model_fields.items())


class _Short:
    """A value as messages show it."""

    def __init__(self, value: Any) -> None:
        self._text = repr(value)

    def __repr__(self) -> str:
        return self._text if len(self._text) <= _SHOWN else f"{self._text[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class SweepFile:
    """A sweep file of W&B.

    Args:
        path: Where it is.
        name: What the sweep is called: its ``name``, or that of the file.
        method: "grid" or "random".
        parameters: By name, in the order of the file; in W&B's nested form, a name has several parts.
        command: With W&B's macros.
        metric: Name of the metric that it optimizes, or None.
        project: W&B project, or None.
        run_cap: Largest number of trials, or None.
        text: The file.
    """

    path: Path
    name: str
    method: str
    parameters: Mapping[tuple[str, ...], Parameter]
    command: Sequence[str]
    metric: str | None = None
    project: str | None = None
    run_cap: int | None = None
    text: str = field(default="", repr=False)

    @property
    def folder(self) -> str:
        """The name as that of a directory.

        Raises:
            InputError: No directory can have it.
        """
        name = self.name
        if name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name) or not name.strip():
            allowed = "a name that a directory can have, without / and \\, that does not begin with a dot"
        elif len(name.encode()) > _LONGEST_NAME:
            allowed = f"at most {_LONGEST_NAME} bytes"
        else:
            return name
        raise bad_value(f"{self.path}: name", _Short(name), allowed, "change it, or choose the --sweep_dir")

    def trials(self, *, count: int | None = None, seed: int = 0) -> list[Trial]:
        """The trials: for a grid all combinations, the last parameter fastest; for random search ``count`` draws.

        Args:
            count: Number of draws, or of the first combinations; None for ``run_cap``, or all of a grid.
            seed: Seed of the draws.

        Raises:
            InputError: A random search whose number of trials is not known, a parameter that a grid cannot have, or
                more trials than a directory should hold.
        """
        limit = self.run_cap if count is None else count
        if self.method == "random":
            if limit is None:
                raise InputError(
                    f"{self.path} is a random search, which has no end. Allowed: a number of trials. "
                    "Fix: add --count=N, or run_cap: N to the file."
                )
            n, combinations = limit, self._draws(np.random.default_rng(seed))
        else:
            choices = [self._choices(path, parameter) for path, parameter in self.parameters.items()]
            n, combinations = math.prod(map(len, choices)), itertools.product(*choices)
            n = n if limit is None else min(n, limit)
        if n > MOST:
            raise InputError(f"{self.path} has {n} trials. Allowed: at most {MOST}. Fix: fewer values, or --count=N.")
        varied = tuple(".".join(path) for path, parameter in self.parameters.items() if parameter.varies)
        trials: dict[tuple[str, ...], Trial] = {}
        for values in itertools.islice(combinations, n):
            args = self._args(values)
            if args not in trials:  # random draws may repeat
                trials[args] = Trial(dict(zip(self._names, values, strict=True)), varied, args, self.name)
        if len({trial.id for trial in trials.values()}) < len(trials):
            raise InputError(f"{self.path} has two trials whose directories would have one name. Fix: split the file.")
        return list(trials.values())

    @property
    def _names(self) -> list[str]:
        return [".".join(path) for path in self.parameters]

    def _choices(self, path: Sequence[str], parameter: Parameter) -> Sequence[Any]:
        """All values of a parameter, for a grid."""
        name = f"{self.path}: parameters.{'.'.join(path)}"
        try:
            choices = parameter.choices()
        except (ValueError, OverflowError) as many:
            raise bad_value(
                name,
                _Short(parameter.model_dump(exclude_defaults=True)),
                f"at most {MOST} values of a parameter in a grid",
                "use method: random",
            ) from many
        if choices is None:
            raise bad_value(
                name,
                _Short(parameter.model_dump(exclude_defaults=True)),
                "value, values, int_uniform or q_uniform in a grid",
                "use method: random",
            )
        return choices

    def _draws(self, generator: np.random.Generator) -> Iterator[tuple[Any, ...]]:
        """Values of one trial after the other, without end."""
        while True:
            yield tuple(self._draw(path, parameter, generator) for path, parameter in self.parameters.items())

    def _draw(self, path: Sequence[str], parameter: Parameter, generator: np.random.Generator) -> Any:
        try:
            drawn = parameter.draw(generator)
            if isinstance(drawn, float) and not math.isfinite(drawn):
                raise OverflowError("not a finite number")
        except (ValueError, OverflowError) as error:
            name, got = f"{self.path}: parameters.{'.'.join(path)}", _Short(parameter.model_dump(exclude_defaults=True))
            raise bad_value(name, got, "a distribution of finite numbers", "change its numbers") from error
        return drawn

    def _args(self, values: Sequence[Any]) -> tuple[str, ...]:
        # internal to wandb, which offers no other way to get the command line that its agent would start
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

        args: dict[str, dict[str, Any]] = {}
        for (first, *others), value in zip(self.parameters, values, strict=True):
            # of W&B's nested form, the agent makes one argument that is a mapping
            place, key = args.setdefault(first, {}), "value"
            for name in others:
                place, key = place.setdefault(key, {}), name
            place[key] = value
        macros = create_sweep_command_args({"args": args})
        rendered: list[str] = []
        for part in create_sweep_command(list(self.command)):
            macro = _macro(part)
            rendered += macros.get(macro, []) if macro else [part]
        return tuple(rendered[_place_of_fit(rendered) :])


def read_sweep(file: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        InputError: It cannot be read, it is no sweep of ``python -m svf_lightning fit``, or its search method needs
            W&B's cloud.
    """
    path = Path(file)
    text = _read_text(path)
    entries = _entries(path, text)
    if entries.get("method") == "bayes":
        raise InputError(
            f"{path} is a Bayesian search, whose trials depend on the results before them: W&B's cloud decides them. "
            f"Fix: wandb sweep {path}, then wandb agent; or set method to grid or random."
        )
    for key in ("scheduler", "metrics"):
        if key in entries:
            raise InputError(
                f"{path} has {key}: another program decides about its trials. Allowed: a grid or random search. "
                f"Fix: wandb sweep {path}, then wandb agent; or leave {key} out."
            )
    if entries.get("method") not in ("grid", "random"):
        raise bad_value(f"{path}: method", _Short(entries.get("method")), "grid or random", "change it")
    command = _command(f"{path}: command", entries.get("command"))
    try:
        content = _Content.model_validate(entries)
    except ValidationError as error:
        raise _unusable(str(path), error, _Content) from error
    parameters = {}
    for names, entry in by_path(content.parameters):
        parameters[names] = _parameter(f"{path}: parameters.{'.'.join(names)}", names, entry)
    if len({".".join(names) for names in parameters}) < len(parameters):
        raise InputError(f"{path} has a parameter twice, nested and with a dot. Fix: leave one of them out.")
    _check_macros(f"{path}: command", command)
    return SweepFile(
        path, content.name or path.stem, content.method, parameters, command,
        metric=content.metric.name if content.metric else None, project=content.project, run_cap=content.run_cap,
        text=text,
    )  # fmt: skip


def _read_text(path: Path) -> str:
    allowed = "Allowed: a W&B sweep file, such as sweeps/seed.yaml"
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file. {allowed}. Fix: check the path.")
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} is too large. {allowed}, of at most {_LARGEST_FILE} bytes. Fix: split it.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). {allowed}. Fix: check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({reason(error)}). {allowed}. Fix: save it as UTF-8.") from error


def _entries(path: Path, text: str) -> dict[str, Any]:
    """The file's mapping, as ``fit --config`` reads YAML: dates are text, 1e-5 is a number, no key is there twice."""
    try:
        depth = 0
        # the parser of events does not recurse; what makes objects of them would overflow the stack
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise InputError(f"{path} is nested more than {_DEEPEST} levels deep. Fix: {_SEE}.")
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except InputError:
        raise
    except Exception as error:  # values that are not what their tag says raise whatever Python does
        raise InputError(
            f"{path} is not valid YAML ({reason(error)}). Fix: macros such as ${{args}} need a list with one item per "
            "line, or quotes."
        ) from error
    if not isinstance(content, dict) or list(content.values()) == [None]:  # OmegaConf makes a mapping of a text
        raise bad_value(str(path), _Short(text), "a mapping with method, parameters and command", "rewrite it")
    for key in content:
        if key not in _KEYS and key not in ("scheduler", "metrics"):
            raise InputError(
                f"{path} has an unknown key {_Short(key)}. {closest(str(key), _KEYS)}Allowed: {', '.join(_KEYS)}. "
                "Fix: correct it."
            )
    try:
        return _PLAIN.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("dict", "list", "float"))
        allowed = "text, finite numbers, true, false, null, lists, and mappings with text as keys"
        raise bad_value(f"{path}: {place}", _Short(first["input"]), allowed, "change it") from error


def _command(place: str, given: Any) -> list[str]:
    """The command, if it is one of ours.

    Raises:
        InputError: It is not.
    """
    command = [str(part) for part in given] if isinstance(given, list) else []
    if _place_of_fit(command) == len(command):
        allowed = "a list that holds python -m svf_lightning fit ... ${args}"
        raise bad_value(place, _Short(given), allowed, "rewrite it")
    return command


def _check_macros(place: str, command: Sequence[str]) -> None:
    """Check that the parameters reach the command.

    Raises:
        InputError: They do not.
    """
    macros = [_macro(part) for part in command[_place_of_fit(command) :]]
    for macro in macros:
        if macro and macro not in _MACROS and not macro.startswith("envvar:"):
            why = "is a file that W&B's agent writes" if macro == "args_json_file" else "is no macro for arguments"
            raise InputError(
                f"{place}: ${{{macro}}} {why}. Allowed: {', '.join(f'${{{known}}}' for known in _MACROS)}. "
                "Fix: use ${args}."
            )
    if not set(macros) & set(_MACROS):
        allowed = "a command that the parameters reach"
        raise bad_value(place, _Short(command), allowed, "add ${args}, at the end of the list")


def _place_of_fit(command: Sequence[str]) -> int:
    """Where ``fit`` stands in a command; its length if it is not there."""
    ours = (i for i in range(1, len(command)) if tuple(command[i - 1 : i + 1]) == ("svf_lightning", "fit"))
    return next(ours, len(command))


def _macro(part: str) -> str:
    """Name of the macro that a part of a command is; empty for any other. The agent replaces whole parts."""
    return part[2:-1] if part.startswith("${") and part.endswith("}") else ""


def _parameter(place: str, names: Sequence[str], entry: Any) -> Parameter:
    if not all(map(_NAME.fullmatch, names)):
        raise bad_value(place, _Short(entry), "names of letters, digits, _, - and dots", "change the name")
    try:
        parameter = read_parameter(entry) if isinstance(entry, dict) else None
    except ValidationError as error:
        raise _unusable(place, error) from error
    if parameter is None:
        raise bad_value(place, _Short(entry), f"value, values, or a distribution: {', '.join(DISTRIBUTIONS)}", _SEE)
    return parameter


def _unusable(place: str, error: ValidationError, model: type[Entry] | None = None) -> InputError:
    """One line for the first thing that is wrong with a part of a sweep file."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("int", "float", "str")]
    place = f"{place}{'.' if model is None and names else ': ' if names else ''}{'.'.join(names)}"
    kind, message = first["type"], _WORDS.get(first["type"], first["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        return InputError(f"{place} is missing. Allowed: a sweep file that has it. Fix: add it; {_SEE}.")
    if kind == "extra_forbidden":
        return InputError(f"{place} has no meaning here. Allowed: the keys of its kind. Fix: leave it out; {_SEE}.")
    return bad_value(place, _Short(first["input"]), message.removeprefix("Input should be ").replace("'", ""), _SEE)
