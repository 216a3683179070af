"""``fit --help``: the settings that matter, with the values that this command line would run with."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from svf_lightning.arguments import dotted
from svf_lightning.cli.run import RunCLI
from svf_lightning.terminal import console

ALL = "--help=all"
_ASKS = ("--help", "-h", ALL)
_PARTS = ("model", "data", "capture")  # of which every setting is shown; of others, these
_OF_RUN = {  # in fewer words than the parser has, where it has many
    "run_dir": "",
    "ckpt_path": "A checkpoint, or a run directory for its last one, to go on from or to evaluate.",
    "remeasure": "",
    "overwrite": "",
    "seed_everything": "Seed of everything that is drawn; data at a step depend on seed and step alone.",
    "trainer.max_steps": "Training step at which the run ends.",
    "trainer.accelerator": 'Where it runs: "cpu", "gpu" or "auto".',
    "trainer.devices": "How many devices, or which.",
    "trainer.logger": "RunLogger is W&B, offline without an API key; false for none.",
    "report": "",
    "open": "",
    "verbose": "Print every metric at the end.",
}
_NOT_OF = {"replay": {"trainer.max_steps"}}
_WIDTH = 100  # columns; longer lines are hard to read
_LONGEST = 60  # characters of a value


class ParsedOnly(Exception):
    """The settings are known, and nothing is to be run.

    Args:
        cli: What has parsed them.
    """

    def __init__(self, cli: RunCLI) -> None:
        self.cli = cli


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a command line asks for the settings that matter, and not for all of them or a run."""
    return any(arg in _ASKS for arg in args) and ALL not in args


def without_help(args: Sequence[str]) -> list[str]:
    """The arguments that are settings; what asks for all help in the parser's own words."""
    if ALL in args:
        return ["--help" if arg == ALL else arg for arg in args]
    return [arg for arg in args if arg not in _ASKS]


def that_stops(cli: type[RunCLI]) -> type[RunCLI]:
    """The class of a command line that parses and then raises ParsedOnly."""

    class Stops(cli):  # type: ignore[valid-type,misc]
        def before_instantiate_classes(self) -> None:
            raise ParsedOnly(self)

    return Stops


def show_help(cli: RunCLI) -> None:
    """Print the settings of a command: for each the value that it would run with, and what it is."""
    from rich.text import Text

    command = str(cli.subcommand)
    out = console()
    width = min(_WIDTH, out.width)
    config = cli.config[command]
    given = dotted(config.as_dict())
    about = cli.described()
    lines = [
        f"usage: svf-lightning {command} [--config NAME | FILE | RUN_DIR] [--SETTING=VALUE ...]",
        f"\nThe settings that matter, with the values of {config.experiment.name}; --help=all lists the rest.",
    ]
    for part, names in (
        ("the run", [name for name in _OF_RUN if name in about and name not in _NOT_OF.get(command, ())]),
        *((part, [n for n in about if n.startswith(f"{part}.") and not n.endswith(".help")]) for part in _PARTS),
    ):
        lines.append(f"\n{part}")
        for name in names:
            if "." in name and any(other.startswith(f"{name}.") for other in names):
                continue  # a group of settings, which follow
            lines.append(f"  --{name}={_shown(given, name)}")
            text = _OF_RUN.get(name) or " ".join(about[name].split()).split(" (type:")[0].replace("%%", "%")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    out.print(Text("\n".join(lines)), soft_wrap=True)


def _shown(given: dict[str, Any], name: str) -> str:
    """A value as it is written on a command line; of an object, the name of its class."""
    if name in given:
        value = given[name]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    else:
        text = str(given.get(f"{name}.class_path", "null"))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
