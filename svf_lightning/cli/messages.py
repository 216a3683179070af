"""What the command line says in place of its parser and its libraries."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence

from svf_lightning.errors import closest


def quiet_the_libraries() -> None:
    """Keep lines off the terminal that tell a user of this program nothing."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        "(?s).*Unable to serialize instance.*",  # a default of a callback that is refused or not compared
        ".*The dirpath has changed from.*",  # a branch, or an evaluation
        # with_preset adds --config to the arguments
        ".*LightningCLI's args parameter is intended to run from within Python.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Total length of `.*` across ranks is zero.*",  # no validation inside fit; nothing left to replay
    ):
        warnings.filterwarnings("ignore", message=message)


def no_such_command(message: str, commands: Sequence[str]) -> str:
    """The message for a command that does not exist, or for none."""
    return f"no such command ({message}). Allowed: {', '.join(commands)}. Fix: try `python -m svf_lightning fit`."


def explain(message: str, command: str, known: Sequence[str], files: Sequence[str]) -> str:
    """The parser's message as: what was wrong, what is allowed, what to do.

    Args:
        message: What the parser says, on one line.
        command: The command.
        known: Its options.
        files: The configuration files that it reads.
    """
    see = f"`python -m svf_lightning {command} --help` lists them"
    where = " or ".join(files)
    if match := re.match(r"unrecognized arguments: --(\S+)", message):
        name = match[1].split("=")[0]
        return f"unknown option --{name}. {suggestion(name, known)}Allowed: the options of {command}; {see}."
    if match := re.search(r"does not accept option '([^']+)'", message):
        return (
            f"unknown key {match[1]} in {where}. {suggestion(match[1], known)}Allowed: the options of {command}; {see}."
        )
    if match := re.match(r'Parser key "([^"]+)": (.*)', message):
        name, reason = match[1], match[2].rstrip(".")
        return f"{name} is not usable: {reason}. Fix: change --{name}; `{command} --help` describes it."
    return f"{message.rstrip('.')} (in {where}). Fix: correct it; {see}."


def suggestion(name: str, known: Sequence[str]) -> str:
    """``Did you mean 'x'? `` for a misspelt name; empty if nothing is close."""
    words = closest(name, known)
    return f"{words[0].upper()}{words[1:]} " if words else ""
