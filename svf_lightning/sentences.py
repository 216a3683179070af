"""Sentences about a run, each with the numbers that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Sentence(NamedTuple):
    """What a page says of a run.

    Args:
        text: The sentence.
        evidence: The numbers of the run that it was made of, by name.
        happened: True if it says that something has happened, False if it says that it has not; None for a sentence
            that gives numbers alone.
    """

    text: str
    evidence: Mapping[str, Any]
    happened: bool | None = None


def number(value: Any) -> str:
    """A number in a sentence; "no number" for one that is not finite."""
    value = float(value)
    if not np.isfinite(value):
        return "no number"
    is_long = 100 <= abs(value) < 1e15  # digits after the point say nothing
    return f"{value:,.0f}" if is_long or value == 0 else f"{value:.3g}"


def capital(words: str) -> str:
    """Words with a capital at their beginning, as that of a sentence."""
    return words[:1].upper() + words[1:]


def from_to(what: str, steps: np.ndarray, values: np.ndarray, *, name: str) -> Sentence | None:
    """Between which values a curve goes, and when: "what: 0.41 at step 0, 0.08 at step 2,000".

    Args:
        what: Name of the curve.
        steps: Training step of each value.
        values: The curve [step]; what is not finite was not measured.
        name: Of the numbers, in the evidence.

    Returns:
        The sentence; None for fewer than two numbers.
    """
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) < 2:
        return None
    ends = rows[[0, -1]]
    told = " and ".join(f"{number(values[row])} at step {number(steps[row])}" for row in ends)
    return Sentence(f"{what}: {told}.", {name: values[ends], "step": np.asarray(steps)[ends]})


def joined(sentences: Sequence[Sentence | str | None]) -> str:
    """Sentences as a paragraph; those that there are."""
    return " ".join(one if isinstance(one, str) else one.text for one in sentences if one)
