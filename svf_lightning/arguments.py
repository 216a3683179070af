"""Settings by dotted names, and command lines of the commands that are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def parsed(command: Callable[..., object], args: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function from a command line: those without a default by position, the others as options.

    Raises:
        ArgumentError: An argument is not known or not usable.
    """
    from jsonargparse import ArgumentParser

    name = command.__name__
    parser = ArgumentParser(prog=f"python -m svf_lightning {name}", exit_on_error=False, description=command.__doc__)
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    given = ["--dry_run=true" if arg == "--dry_run" else arg for arg in args]  # a flag, to whoever types it
    return dict(parser.parse_args(given).as_dict())


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level; lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= dotted(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
