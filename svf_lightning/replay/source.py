"""What a source of training checkpoints is, and how some of its steps are chosen."""

from __future__ import annotations

import bisect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from svf_lightning.errors import bad_value
from svf_lightning.run.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


PYTHIA_STEPS: tuple[int, ...] = (0, *(2**k for k in range(10)), *range(1000, 143_001, 1000))
"""The 154 steps that every Pythia model was saved at: 0, 1, 2, 4, ..., 512, 1000, 2000, ..., 143000."""

_SELECTIONS = (
    '"all", "log", "last", "every_<N>th" such as "every_10th", "spread_<N>" such as "spread_130", or a list of steps'
)


@dataclass(frozen=True)
class CheckpointRef:
    """One checkpoint of a source.

    Args:
        step: Training step, >= 0.
        name: How the source calls it: a hub revision ("step512"), a folder, a file.
        tokens: Tokens seen in training, if its name says it.
    """

    step: int
    name: str
    tokens: int | None = None


@dataclass
class LoadedCheckpoint:
    """A checkpoint in memory.

    Args:
        ref: Which one.
        model: On the CPU, in the asked dtype, in eval mode, without gradients. Nobody else uses it.
        revision: What was really loaded: the commit hash of the hub, or "" for what is local.
        weight_hash: 16 hex digits, see :func:`weight_hash`.
        fingerprint: What tells it from other checkpoints tensor by tensor; None: it is made when it is needed.
    """

    ref: CheckpointRef
    model: PreTrainedModel
    revision: str
    weight_hash: str
    fingerprint: Fingerprint | None = None


class CheckpointSource(ABC):
    """Checkpoints of one model, in the order of training."""

    @abstractmethod
    def refs(self) -> list[CheckpointRef]:
        """The checkpoints, by ascending and distinct steps.

        Raises:
            InputError: There are none, or those that were asked for are not there.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer that all checkpoints share; read once.

        Raises:
            InputError: There is none, or it cannot be used.
            CheckpointError: It cannot be downloaded.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What decides, beside steps and weight hashes, whether two runs look at the same thing. No machine's paths."""

    def subject(self) -> dict[str, str]:
        """What claims are about, of its identity: all of it, but for what chance decides, such as a seed."""
        return self.identity()

    def model_name(self) -> str:
        """What to call the model: a run is named by what it measured. For most sources a part of the identity."""
        return self.identity().get("name") or type(self).__name__

    def config(self) -> PretrainedConfig | None:
        """The configuration of the first checkpoint, where it can be had without the weights; else None."""
        return None

    def other_tokenizer(self, ref: CheckpointRef) -> PreTrainedTokenizerBase | None:
        """The tokenizer that lies with a checkpoint, if its files are not those of :meth:`tokenizer`; else None.

        Args:
            ref: A checkpoint that is on this machine.

        Raises:
            InputError: It cannot be read.
        """
        return None

    def fetch(self, ref: CheckpointRef) -> None:  # noqa: B027  most sources have nothing to fetch
        """Bring a checkpoint to this machine; may run in another thread while an earlier one is in use.

        Raises:
            CheckpointError: It cannot be had.
        """

    @abstractmethod
    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a checkpoint into memory; fetches it first if that was not done.

        Args:
            ref: One of ``refs()``.
            dtype: Floating-point type of the weights.

        Raises:
            CheckpointError: It cannot be had, it is damaged, or weights are missing.
            InputError: It is not a causal language model.
        """

    def release(self, ref: CheckpointRef) -> None:  # noqa: B027  most sources have nothing to release
        """Say that the files of a checkpoint are not needed any more. Models loaded from them stay usable."""


def select_steps(steps: Sequence[int], selection: str | list[int], *, name: str = "selection") -> list[int]:
    """Choose some of the available steps.

    "log" keeps the first and the last step and, with s the first step above 0, one for each of s, 2s, 4s, ...: that
    step itself if it is there, otherwise the first one that is larger, or smaller by no more than 2.5% (so that 1000
    stands for 1024). Of the Pythia steps: 0, 1, 2, 4, ..., 512, 1000, 2000, 4000, ..., 128000, 143000.

    The authors of arXiv 2602.13524 measured 130 of Pythia's 154 checkpoints. Which ones is not known here; "spread_130"
    is a rule of ours that gives as many, and "all" leaves nothing to choose.

    Args:
        steps: Available steps, in any order.
        selection: "all"; "log"; "last"; "every_10th" (any N; every N-th of them, and always the first and the last);
            "spread_130" (any N >= 2; that many, spread evenly over their numbers from the first to the last, or all if
            there are no more); or the steps themselves.
        name: What errors call the selection.

    Returns:
        Ascending distinct steps.

    Raises:
        InputError: The selection is none of these, or names a step that is not available.
    """
    check_selection(name, selection)
    known = sorted(set(steps))
    if not known:
        raise bad_value("steps", list(steps), "at least one step", "pass the steps that are available")
    if not isinstance(selection, str):
        missing = [step for step in selection if step not in set(known)]
        if missing:
            raise bad_value(
                name, missing[0], f"available steps; near it: {steps_near(missing[0], known)}", "choose one of these"
            )
        return sorted(set(selection))
    if selection == "all":
        return known
    if selection == "last":
        return known[-1:]
    if selection == "log":
        return sorted({known[0], known[-1], *_doubling(known)})
    if selection.startswith("spread_"):
        n = min(int(selection.removeprefix("spread_")), len(known))
        return [known[(2 * i * (len(known) - 1) + n - 1) // (2 * (n - 1))] for i in range(n)] if n > 1 else known
    n = int(selection.removeprefix("every_")[:-2])
    return sorted({*known[::n], known[-1]})


_NAMED = r"all|log|last|every_[1-9]\d*(st|nd|rd|th)|spread_([2-9]|[1-9]\d+)"


def _doubling(known: Sequence[int]) -> Iterator[int]:
    target = next((step for step in known if step > 0), 0)
    while 0 < target <= known[-1]:
        at_least = bisect.bisect_left(known, 0.975 * target)
        yield target if target in known else known[at_least]
        target *= 2


def steps_near(step: int, known: Sequence[int]) -> str:
    """The available steps next to one that is not, as a part of a message; ``known`` ascends."""
    at = bisect.bisect_left(known, step)
    return ", ".join(str(near) for near in known[max(0, at - 2) : at + 2])


def check_selection(name: str, selection: object) -> None:
    """Check the form of a selection of steps; ``name`` is what the error calls it.

    Raises:
        InputError: It is none of those that :func:`select_steps` knows.
    """
    if isinstance(selection, str):
        fine = re.fullmatch(_NAMED, selection) is not None
    else:
        fine = isinstance(selection, (list, tuple)) and bool(selection) and all(is_step(step) for step in selection)
    if not fine:
        raise bad_value(name, selection, _SELECTIONS, f'set {name} to one of these; "log" suits most')


def is_step(value: object) -> bool:
    """Whether a value can be a training step: an integer >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
