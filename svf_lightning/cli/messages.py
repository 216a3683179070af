"""What the command line says in place of its parser and its libraries."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence

from svf_lightning.errors import closest

_LONGEST = 400  # characters of what a parser says


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
    see = f"`python -m svf_lightning {command} --help=all` lists them"
    fix = f"Allowed: the options of {command}; {see}. Fix: correct the name."
    where = " or ".join(files)
    if match := re.match(r"unrecognized arguments: --(\S+)", message):
        name = _short(match[1].split("=")[0])
        return f"unknown option --{name}. {suggestion(name, known)}{fix}"
    if match := re.search(r"does not accept option '([^']+)'", message):
        name = _short(match[1])
        return f"unknown key {name} in {where}. {suggestion(name, known)}{fix}"
    if match := re.match(r'Parser key "([^"]+)": (.*)', message):
        name, reason = match[1], _short(_of_types(match[2]))
        return f"{name} is not usable: {reason}. Fix: change --{name}; `{command} --help=all` describes it."
    if match := re.match(r"(.*?) full_key: (\S+) object_type=", message):  # OmegaConf's
        reason, name = re.sub(r".* while resolving interpolation: ", "", match[1]), match[2].removeprefix(f"{command}.")
        return (
            f"{_short(name)} is not usable: {_short(reason)}. Allowed: a value, or ${{.NAME}}, ${{..PART.NAME}} or "
            f"${{oc.env:VARIABLE}} of something that is there. Fix: correct it (in {where})."
        )
    return f"{_short(message)} (in {where}). Fix: correct it; {see}."


def _of_types(message: str) -> str:
    """What the parser says of a value that is of none of some types, in fewer words, where these are plain."""
    match = re.match(r".*Union subtypes Subtypes: \[(.*)\] Errors: .* Given value type: .*? Given value: (.*)", message)
    if match is None:
        return message
    names = re.sub(r"<class '([\w.]+)'>", r"\1", match[1]).replace("typing.", "").replace("NoneType", "null")
    # of a class, the parser's reasons say more
    return message if "lightning" in names else f"it must be one of the types {names}, and was {match[2]}"


def _short(text: str) -> str:
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...").rstrip(".")


def suggestion(name: str, known: Sequence[str]) -> str:
    """``Did you mean 'x'? `` for a misspelt name; empty if nothing is close."""
    words = closest(name, known)
    return f"{words[0].upper()}{words[1:]} " if words else ""
