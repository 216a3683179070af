"""Errors that a user can act on: what was wrong, what is allowed, what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

_LONGEST_REASON = 240  # characters


class InputError(ValueError):
    """Input that cannot be used. The command line prints it as one line and exits with code 2."""


class CheckpointError(RuntimeError):
    """One checkpoint cannot be had; the others may be fine. One line: which one, and why."""


class DivergedError(ArithmeticError):
    """Every instance has a loss that is not finite: going on would only waste time."""


def bad_value(name: str, got: object, allowed: str, fix: str) -> InputError:
    """The error for one unusable value: ``name=got is not usable. Allowed: ... Fix: ...``."""
    return InputError(f"{name}={shortened(repr(got))} is not usable. Allowed: {allowed}. Fix: {fix}.")


def one_line(error: BaseException) -> str:
    """An error's message on one line; its type's name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException, *, hide: Path | None = None) -> str:
    """The message of another library's error as a part of a sentence: short, and without its full stop.

    Args:
        error: The error.
        hide: A folder to leave out of the message.
    """
    text = one_line(error)
    if hide is not None:
        text = text.replace(f"{hide}{os.sep}", "").replace(str(hide), hide.name)
    return shortened(text).rstrip(".")


def shortened(text: str) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def closest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt name, or an empty string if nothing is close."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1)
    if not match:  # the key without its group: lambda_attn for model.lambda_attn
        leaves = {known_name.rsplit(".", 1)[-1]: known_name for known_name in names}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1)
        match = [leaves[leaf[0]]] if leaf else []
    return f"did you mean '{match[0]}'?" if match else ""
