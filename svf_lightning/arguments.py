"""Command lines: what they say before they are parsed, those of plain functions, and settings by dotted names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pydoc import locate
from typing import Any, TypeVar

_T = TypeVar("_T")


def class_of(entry: Mapping[str, Any]) -> object:
    """The class that an entry of the settings names by its ``class_path``; None if there is none."""
    return locate(entry["class_path"])


@dataclass(frozen=True)
class CommandLine:
    """A command line of the commands that run a model, which decides about its configuration before it is parsed.

    Args:
        args: The arguments, as they were given.
        commands: Names that a command can have.
    """

    args: Sequence[str]
    commands: Sequence[str]

    @property
    def command(self) -> str | None:
        """The command, or None."""
        return next((arg for arg in self.args if arg in self.commands), None)

    def values(self, *flags: str) -> list[str]:
        """Values of an option that goes by these names, one for each time that it is given."""
        return [value for _, value in self._given(flags)]

    def option(self, flag: str) -> str | None:
        """Value of an option, or None."""
        return next(iter(self.values(flag)), None)

    def with_values(self, change: Callable[[str], str], *flags: str) -> list[str]:
        """The arguments with the values of an option changed."""
        changed = list(self.args)
        for i, value in self._given(flags):
            if "=" in changed[i]:
                changed[i] = f"{changed[i].split('=', 1)[0]}={change(value)}"
            elif i + 1 < len(changed):
                changed[i + 1] = change(value)
        return changed

    def _given(self, flags: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Position and value of every option that goes by one of these names."""
        for i, arg in enumerate(self.args):
            flag, equals, value = arg.partition("=")
            if flag in flags:
                yield i, value if equals else next(iter(self.args[i + 1 : i + 2]), "")


def call(command: Callable[..., _T], name: str, args: Sequence[str]) -> _T:
    """Call a function with its arguments from a command line.

    Parameters without a default are given by position, those that take any number (``*names``) after them, the others
    as options; a bool is a flag.

    Raises:
        ArgumentError: An argument is not known or not usable.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"svf-lightning {name}", exit_on_error=False, description=_summary(command))
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    parameters = inspect.signature(command).parameters.values()
    many = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    for rest in many:
        parser.add_argument(rest, nargs="*", type=str, default=[], help=_described(command, rest))
    flags = {f"--{p.name}" for p in parameters if p.annotation in ("bool", bool)}
    given = parser.parse_args([f"{arg}=true" if arg in flags else arg for arg in args]).as_dict()
    first = [given.pop(p.name) for p in parameters if many and p.kind is p.POSITIONAL_OR_KEYWORD]
    return command(*first, *(value for rest in many for value in given.pop(rest)), **given)


def _summary(command: Callable[..., Any]) -> str:
    """What a function does, without the parts of its documentation that help shows beside each argument."""
    return re.split(r"\n\s*(?:Args|Returns|Raises):", inspect.getdoc(command) or "")[0]


def _described(command: Callable[..., Any], name: str) -> str:
    """What the documentation of a function says of an argument."""
    description = re.search(rf"\n *{name}: (.+?)(?=\n *\w+: |\n\n|\Z)", inspect.getdoc(command) or "", re.DOTALL)
    return " ".join(description[1].split()) if description else ""


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level; lists stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def short(name: str) -> str:
    """The last part of a dotted name; "seed" for seed_everything."""
    return name.rsplit(".", 1)[-1].removesuffix("_everything")
