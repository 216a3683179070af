"""What a run is about, and what its callbacks and loggers are told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

from svf_lightning.errors import InputError, bad_value
from svf_lightning.run.claims import Claim


@dataclass(frozen=True)
class Experiment:
    """What a run is about.

    Args:
        name: Name of the experiment: runs/<name>/, and the W&B group; one folder's name.
        figures: Figures of the paper that it mirrors.
        shows: What it shows, in a line.
        tags: W&B tags.
        claims: What the paper says, computed at the end of the run.
    """

    name: str = "toy"
    figures: str = ""
    shows: str = ""
    tags: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


@dataclass(frozen=True)
class CaptureOptions:
    """When the metrics look. The first step and the last one are always captured.

    Args:
        every_n_steps: Capture every n-th training step.
        log_spaced: Capture about this many steps per factor of ten instead (0: off).
        chunk: Rows that are measured and written together.

    Raises:
        InputError: An option out of range.
    """

    every_n_steps: int = 1
    log_spaced: int = 0
    chunk: int = 128

    def __post_init__(self) -> None:
        for name, low in (("every_n_steps", 1), ("log_spaced", 0), ("chunk", 1)):
            if (value := getattr(self, name)) < low:
                raise bad_value(name, value, f"an integer >= {low}", f"change --capture.{name}")

    def is_scheduled(self, step: int) -> bool:
        """True if the schedule captures this training step."""
        if self.log_spaced:
            # a step is captured if the grid 10^(k / n) has a point in (step - 1, step]
            return step == 0 or _grid_index(step, self.log_spaced) != _grid_index(step - 1, self.log_spaced)
        return step % self.every_n_steps == 0

    def joined(self, other: CaptureOptions) -> CaptureOptions:
        """Two sets of options as one, where each option is given in one of them at most.

        Raises:
            InputError: Both have an option, with different values.
        """
        options = {}
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            if f.default not in (mine, its) and mine != its:
                raise InputError(
                    f"capture.{f.name}={its} and {mine} in the Capture callback contradict each other. "
                    f"Allowed: one of them. Fix: leave out --capture.{f.name}, or the callback's {f.name}."
                )
            options[f.name] = its if mine == f.default else mine
        return CaptureOptions(**options)


def _grid_index(step: int, per_decade: int) -> int:
    """Number of points of the grid 10^(k / per_decade), k >= 0, that are <= step."""
    return 0 if step < 1 else math.floor(per_decade * math.log10(step) + 1e-9) + 1


@dataclass(frozen=True)
class Run:
    """What a run tells its callbacks and loggers.

    Args:
        directory: The run directory.
        command: What it does: "fit", "validate", "test" or "replay".
        experiment: What it is about.
        capture: When its metrics look.
        settings: All its settings, resolved, YAML; checkpoints carry them.
        rows_from: Training step of the first row that its trajectory has.
        verbose: Print all that was found at the end, and not only what the claims are about.
    """

    directory: Path
    command: str
    experiment: Experiment
    capture: CaptureOptions = CaptureOptions()
    settings: str = ""
    rows_from: int = 0
    verbose: bool = False


@runtime_checkable
class JoinsRun(Protocol):
    """A callback or logger that is told which run it is in, before the run begins."""

    def join(self, run: Run) -> None:
        """Take from the run what was not given to it alone."""
        ...
