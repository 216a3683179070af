"""Errors that a user can act on: what was wrong, what is allowed, what to do."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

_LONGEST_REASON = 240  # characters


class InputError(ValueError):
    """Input that cannot be used. The command line prints it as one line and exits with code 2."""


class DamagedError(InputError):
    """A file of a run is damaged: nothing is shown of it, as the rest would look like the whole."""


class CheckpointError(RuntimeError):
    """One checkpoint cannot be had; the others may be fine. One line: which one, and why."""


class TakenAwayError(RuntimeError):
    """What a run writes was removed, or changed by somebody else, while it went on: it must not write any more."""


class DivergedError(ArithmeticError):
    """Every instance has a loss that is not finite: going on would only waste time."""


def bad_value(name: str, got: object, allowed: str, fix: str) -> InputError:
    """The error for one unusable value: ``name=got is not usable. Allowed: ... Fix: ...``."""
    return InputError(f"{name}={shortened(repr(got))} is not usable. Allowed: {allowed}. Fix: {fix}.")


def damaged(path: Path, error: BaseException) -> DamagedError:
    """The error for a file of a run that cannot be read: it is damaged, or this machine cannot read it now."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in _RESOURCES:
        return DamagedError(
            f"{path} cannot be read ({_RESOURCES[cause.errno]}). Fix: mend that, and try again; "
            "nothing says that the file is damaged."
        )
    return DamagedError(f"{path} cannot be read ({reason(error)}). Fix: the file is damaged; repeat the run.")


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


_RESOURCES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the file system was lost",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.ENOMEM: "out of memory",
}


def out_of_resources(error: BaseException) -> str | None:
    """One line for an error that the machine is the cause of; None for any other."""
    if isinstance(error, MemoryError):
        return "out of memory. What was written before is whole. Fix: make room, and go on from the last checkpoint."
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if not isinstance(cause, OSError) or cause.errno not in _RESOURCES:
        return None
    where = f" ({cause.filename})" if cause.filename else ""
    return (
        f"{_RESOURCES[cause.errno]}{where}. What was written before is whole. "
        "Fix: make room, and go on from the last checkpoint."
    )


def closest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt name, or an empty string if nothing is close."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1)
    if not match:  # the key without its group: lambda_attn for model.lambda_attn
        leaves = {known_name.rsplit(".", 1)[-1]: known_name for known_name in names}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1)
        match = [leaves[leaf[0]]] if leaf else []
    return f"did you mean '{match[0]}'?" if match else ""
