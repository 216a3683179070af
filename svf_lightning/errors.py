"""Errors that a user can act on: what was wrong, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. The command line prints it as one line and exits with code 2."""


class CheckpointError(RuntimeError):
    """One checkpoint cannot be had; the others may be fine. One line: which one, and why."""


class DivergedError(ArithmeticError):
    """Every instance has a loss that is not finite: going on would only waste time."""


def bad_value(name: str, got: object, allowed: str, fix: str) -> InputError:
    """The error for one unusable value: ``name=got is not usable. Allowed: ... Fix: ...``."""
    return InputError(f"{name}={got!r} is not usable. Allowed: {allowed}. Fix: {fix}.")


def closest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt name, or an empty string if nothing is close."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1)
    if not match:  # a key given without its group (lambda_attn for model.lambda_attn)
        leaves = {known_name.rsplit(".", 1)[-1]: known_name for known_name in names}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1)
        match = [leaves[leaf[0]]] if leaf else []
    return f"did you mean '{match[0]}'?" if match else ""
