"""How people name training checkpoints: what step a revision, a branch or a folder stands for.

Known are ``step512`` (Pythia, and longer names such as ``step512-tokens2B``), ``checkpoint-1000`` (transformers'
Trainer, Stanford's GPT-2), ``ckpt_100``, ``iter_0001000`` (Megatron), ``global_step1000`` (NeoX) and
``stage1-step1000-tokens5B`` (OLMo-2, whose stages have an axis of their own each). Any other takes a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from svf_lightning.errors import bad_value

_TOKENS = r"(?:[-_]tokens?[-_]?(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[KMBT]?))?"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<stage>stage\d+(?:-ingredient\d+)?)[-_]step[-_]?(?P<step>\d+){_TOKENS}",
        rf"(?:step|checkpoint|ckpt|iter|global_step)[-_]?(?P<step>\d+){_TOKENS}",
        rf"(?:.*(?<![a-z]))?step[-_]?(?P<step>\d+){_TOKENS}(?!\d).*",
    )
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
KNOWN = "step512, checkpoint-1000, ckpt_100, iter_0001000, stage1-step1000-tokens5B"


class CheckpointName(NamedTuple):
    """What a name says."""

    step: int
    stage: str = ""  # of a training in stages: "stage1", "stage2-ingredient1"
    tokens: int | None = None  # seen in training, as far as the name says


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """A pattern of names: "run-{step}" or "run-{step}-{tokens}", or a regular expression with a group ``step``.

    Raises:
        InputError: It is neither.
    """
    if pattern is None:
        return None
    form = pattern
    if "{step}" in pattern:
        form = re.escape(pattern).replace(r"\{step\}", r"(?P<step>\d+)")
        form = form.replace(r"\{tokens\}", r"(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[KMBT]?)")
    try:
        known = re.compile(form)
    except re.error:
        known = None
    if known is None or "step" not in known.groupindex:
        raise bad_value(
            "pattern", pattern, 'names with {step} in them, such as "run-{step}-{tokens}", or a regular expression '
            "with a group (?P<step>\\d+)", "put {step} where the number of the step stands",
        )  # fmt: skip
    return known


def read_name(name: str, pattern: re.Pattern[str] | None = None, *, loose: bool = False) -> CheckpointName | None:
    """What a name says, by a pattern of the user's or by those that are known; None if nothing.

    Args:
        name: Of a revision or a folder.
        pattern: The user's.
        loose: Whether "step512" may stand anywhere in it, as in the names of revisions.
    """
    for form in (_FORMS if loose else _FORMS[:-1]) if pattern is None else (pattern,):
        match = form.fullmatch(name)
        if match is None:
            continue
        found = match.groupdict()
        if not (found["step"] or "").isdigit():
            return None
        tokens = found.get("tokens")
        n_tokens = None if tokens is None else round(float(tokens) * _UNITS[found.get("unit") or ""])
        return CheckpointName(int(found["step"]), found.get("stage") or "", n_tokens)
    return None


def is_short(name: str) -> bool:
    """Whether a name is a word and a step alone, so that it goes before longer ones of the same step."""
    return re.fullmatch(r"[a-z_]+[-_]?\d+", name) is not None


def of_stage(
    names: Iterable[str], pattern: re.Pattern[str] | None = None, stage: str | None = None, *, loose: bool = False
) -> dict[str, CheckpointName]:
    """The names that stand for a step of one stage of training: of the first, or of the one that is asked for.

    Raises:
        InputError: There is no such stage.
    """
    read = {name: found for name in names if (found := read_name(name, pattern, loose=loose)) is not None}
    stages = sorted({found.stage for found in read.values()}, key=_in_order)
    if stage is not None and stage not in stages:
        allowed = ", ".join(filter(None, stages)) or "null, as these checkpoints have no stages"
        raise bad_value("stage", stage, allowed, "choose one of these")
    chosen = stage if stage is not None else next(iter(stages), "")
    return {name: found for name, found in read.items() if found.stage == chosen}


def tokens_seen(names: Sequence[str], steps: np.ndarray) -> np.ndarray | None:
    """Tokens seen in training at some of its steps, as far as the names of the checkpoints say.

    Names round (``step1000-tokens5B``), so that tokens are taken to be proportional to steps, at the rate of the last
    checkpoint, where that agrees with every name; else they are what the names say.

    Args:
        names: Of the checkpoints, one for each step.
        steps: Ascending training steps.

    Returns:
        Ascending numbers of tokens, float64; None if a name tells none, or if they do not grow with the steps.
    """
    read = [read_name(name, loose=True) for name in names]
    printed = [
        0 if step == 0 else None if found is None else found.tokens for step, found in zip(steps, read, strict=True)
    ]
    if not printed or None in printed or not printed[-1]:
        return None
    said = np.array(printed, dtype=float)
    by_steps = said[-1] * steps / steps[-1]
    unit = next(unit for unit in (10**9, 10**6, 10**3, 1) if not (said % unit).any())
    if (abs(by_steps - said) <= unit).all():
        return np.asarray(by_steps)
    return said if (np.diff(said) > 0).all() else None


def _in_order(stage: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", stage)]
