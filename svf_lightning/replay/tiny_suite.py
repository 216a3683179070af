"""The default source of a replay: a small suite that is trained the first time it is asked for."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from svf_lightning.replay.checkpoints import FolderCheckpoints
from svf_lightning.replay.source import CheckpointRef, CheckpointSource, LoadedCheckpoint
from svf_lightning.replay.suite import SuiteSettings, train_suite

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FOLDER = "runs/suites/tiny"


class TinySuite(CheckpointSource):
    """A small GPT-NeoX trained on IOI text, with its checkpoints at Pythia-like steps.

    Trained into ``folder`` if it is not there yet (one to two minutes on two cores); kept for the next call.

    Args:
        folder: Where the suite is, or will be; null for runs/suites/tiny, with those settings in its name that are not
            the default ones.
        steps: Which of its checkpoints: "all", "log", "every_<N>th", "last", or a list of steps.
        settings: Sizes and training of the suite.
    """

    def __init__(
        self,
        folder: str | None = None,
        steps: str | list[int] = "all",
        settings: SuiteSettings = SuiteSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.folder, self.steps, self.settings = folder, steps, settings
        self._checkpoints: FolderCheckpoints | None = None

    def identity(self) -> dict[str, str]:
        """Its settings, which decide its weights."""
        induction = {"induction": str(self.settings.induction)} if self.settings.induction else {}
        return {"kind": "tiny_suite", "settings": repr(self.settings), **induction}

    def subject(self) -> dict[str, str]:
        """Its settings without the seed."""
        return self.identity() | {"settings": repr(replace(self.settings, seed=0))}

    def model_name(self) -> str:
        """The suite's name, with those settings that are not the default ones."""
        return "_".join(["tiny_suite", *self._changed])

    @property
    def _changed(self) -> list[str]:
        default = asdict(SuiteSettings())
        return [f"{name}={value}" for name, value in asdict(self.settings).items() if value != default[name]]

    def config(self) -> PretrainedConfig | None:
        """That of the first checkpoint."""
        return self._trained().config()

    def other_tokenizer(self, ref: CheckpointRef) -> PreTrainedTokenizerBase | None:
        """As for a folder."""
        return self._trained().other_tokenizer(ref)

    def refs(self) -> list[CheckpointRef]:
        """The checkpoints; trains them if they are not there.

        Raises:
            InputError: The folder holds something else.
        """
        return self._trained().refs()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The suite's tokenizer; trains the suite if it is not there."""
        return self._trained().tokenizer()

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """As for a folder."""
        return self._trained().load(ref, dtype)

    def _trained(self) -> FolderCheckpoints:
        if self._checkpoints is None:
            folder = self.folder or "_".join([_FOLDER, *self._changed])
            train_suite(folder, self.settings)
            self._checkpoints = FolderCheckpoints(folder, self.steps)
        return self._checkpoints
