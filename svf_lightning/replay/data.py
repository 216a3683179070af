"""What a replay looks at: checkpoints, and the prompts that each of them is run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from svf_lightning.errors import CheckpointError, InputError, bad_value, closest, shortened
from svf_lightning.replay.ioi_wang import wang_prompts
from svf_lightning.replay.prompts import (
    PROMPT_FILES,
    Prompt,
    PromptBatch,
    batches,
    ioi_prompts,
    read_prompts,
)
from svf_lightning.replay.source import CheckpointRef, CheckpointSource
from svf_lightning.replay.tasks import find_task, task_prompts
from svf_lightning.replay.text import Text, read_text
from svf_lightning.replay.tokens import leading_token
from svf_lightning.run.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IOI, IOI_WANG = "ioi", "ioi_wang"


@dataclass(frozen=True)
class ReplayBatch:
    """One batch of prompts for one checkpoint.

    Args:
        ref: The checkpoint.
        upcoming: The one after it, to be fetched meanwhile; None for the last.
        part: (i, n): the i-th of the checkpoint's n batches.
        prompts: The prompts.
    """

    ref: CheckpointRef
    upcoming: CheckpointRef | None
    part: tuple[int, int]
    prompts: PromptBatch


class ReplayData(pl.LightningDataModule):
    """Checkpoints of one model and the prompts to run them on.

    Checkpoints that the run directory holds already are left out. Several devices take turns: device d of n measures
    the checkpoints d, d + n, d + 2n, ...

    Args:
        source: Where the checkpoints come from.
        prompts: "ioi" (indirect object identification, our own sentences), "ioi_wang" (those of Wang et al. 2022, in
            both orders, ABBA and BABA), or a .jsonl or .csv file with the fields text, query, key, correct, wrong,
            template and counterfactual.
        n_prompts: Number of IOI prompts; with "ioi_wang", of each of its two orders.
        batch_size: Prompts that go through the model together.
        seed: Seed of the IOI prompts.
        prepend_bos: Begin prompts with the beginning-of-sequence token; null: as the tokenizer does.
        strict: Fail (exit code 1) if a checkpoint is flagged, as its weights are not what they say they are.
        text: Text whose tokens the covariance of what heads read is estimated from (Unwhitening), in windows of up to
            128 tokens: a file, or "pydoc", Python's own manual; null: the prompts' own tokens.
        text_tokens: Most tokens of the text.
        task: Instead of IOI, a task whose prompts are made for the tokenizer at hand: "induction", "greater_than",
            "gendered_pronouns", "docstring", "factual_recall", or the import path of a class of your own
            (svf_lightning.replay.tasks).

    Raises:
        InputError: An option out of range.
    """

    def __init__(
        self,
        source: CheckpointSource,
        prompts: str = IOI,
        n_prompts: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        prepend_bos: bool | None = None,
        strict: bool = False,
        text: str | None = None,
        text_tokens: int = 16384,
        task: str | None = None,
    ) -> None:
        super().__init__()
        self._task = None if task in (None, IOI) else find_task(str(task))
        if self._task is not None and prompts != IOI:
            raise bad_value("prompts", prompts, f"{IOI} (the default) beside a task", "set one of the two")
        for name, value in (("n_prompts", n_prompts), ("batch_size", batch_size), ("text_tokens", text_tokens)):
            if value < 1:
                raise bad_value(name, value, "an integer >= 1", f"change --data.{name}")
        self.source, self.prompts_from = source, prompts
        self.n_prompts, self.batch_size, self.seed, self.prepend_bos = n_prompts, batch_size, seed, prepend_bos
        self.strict = strict
        self.text_from, self.text_tokens = text, text_tokens
        self._text: Text | None = None
        self._prompts: list[Prompt] | None = None
        self._refs: list[CheckpointRef] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, those with the same offset from query to key together, as they share singular bases.

        Raises:
            InputError: The prompts do not fit the tokenizer, or the file cannot be read.
        """
        if self._prompts is None:
            prompts = self._read(self.source.tokenizer())
            lonely = next((p for p in prompts if p.query < 1), None)
            if lonely is not None:
                raise InputError(
                    f"the prompt {lonely.text!r} has its query at the first token, which sees no other key. "
                    "Allowed: a query at a later token. Fix: change the prompt, or its query."
                )
            if len({prompt.key < 0 for prompt in prompts}) > 1:
                keyless = next(prompt for prompt in prompts if prompt.key < 0)
                raise InputError(
                    f"the prompt {shortened(repr(keyless.text))} has no key, and others have one. Allowed: a key in "
                    "every prompt, or in none. Fix: add its key, or make two runs."
                )
            self._prompts = sorted(prompts, key=_order)
        return self._prompts

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        if self._task is not None:
            return task_prompts(self._task, tokenizer, self.n_prompts, seed=self.seed, prepend_bos=self.prepend_bos)
        if self.prompts_from == IOI:
            return ioi_prompts(tokenizer, self.n_prompts, seed=self.seed, prepend_bos=self.prepend_bos)
        if self.prompts_from == IOI_WANG:
            return wang_prompts(tokenizer, self.n_prompts, seed=self.seed, prepend_bos=self.prepend_bos)
        if Path(self.prompts_from).suffix not in PROMPT_FILES:
            raise bad_value(
                "prompts", self.prompts_from, f"{IOI}, {IOI_WANG}, or a {' or '.join(PROMPT_FILES)} file",
                closest(self.prompts_from, (IOI, IOI_WANG)) or "change --data.prompts",
            )  # fmt: skip
        return read_prompts(self.prompts_from, tokenizer, prepend_bos=self.prepend_bos)

    @property
    def text(self) -> Text | None:
        """The text; None if there is none.

        Raises:
            InputError: It cannot be read.
        """
        if self._text is None and self.text_from is not None:
            self._text = self._read_text(self.source.tokenizer())
        return self._text

    def _read_text(self, tokenizer: PreTrainedTokenizerBase) -> Text:
        assert self.text_from is not None
        bos = leading_token(tokenizer, self.prepend_bos)
        return read_text(self.text_from, tokenizer, self.text_tokens, bos)

    @property
    def fields_of_text(self) -> dict[str, str]:
        """What decides about the numbers of a text, if there is one: runs of earlier versions had none."""
        return {} if self.text is None else {"text": self.text.hash}

    @property
    def fields_of_file(self) -> dict[str, list[Any]]:
        """What a file of prompts gives beside the prompts and decides about the numbers: by field, where it is used."""
        if self.prompts_from in (IOI, IOI_WANG):
            return {}
        fields: dict[str, list[Any]] = {}
        if any(prompt.template >= 0 for prompt in self.prompts):
            fields["templates"] = [prompt.template for prompt in self.prompts]
        if any(prompt.counterfactuals for prompt in self.prompts):
            fields["counterfactuals"] = [[list(ids) for _, ids in prompt.counterfactuals] for prompt in self.prompts]
        return fields

    def check_tokenizer(self, ref: CheckpointRef) -> None:
        """Check that a checkpoint's own tokenizer, if it has one, reads the prompts as the shared one does.

        Args:
            ref: A checkpoint that is on this machine.

        Raises:
            CheckpointError: It does not, or cannot be read.
        """
        try:
            other = self.source.other_tokenizer(ref)
            prompts = [] if other is None else self._read(other)
            text = None if other is None or self.text is None else self._read_text(other)
        except InputError as error:
            raise CheckpointError(f"{ref.name} has another tokenizer, which cannot be used: {error}") from error
        for prompt, expected in zip(sorted(prompts, key=_order), self.prompts, strict=False):
            if prompt != expected:
                raise CheckpointError(
                    f"{ref.name} has another tokenizer: it reads {shortened(repr(expected.text))} as other tokens than "
                    "that of the other checkpoints"
                )
        if text is not None and text != self.text:
            raise CheckpointError(
                f"{ref.name} has another tokenizer: it reads the text as other tokens than that of the other "
                "checkpoints"
            )

    @property
    def refs(self) -> list[CheckpointRef]:
        """All checkpoints of the source, by step."""
        if self._refs is None:
            self._refs = self.source.refs()
        return self._refs

    def missing(self, run_dir: str | Path) -> list[CheckpointRef]:
        """Checkpoints that a run directory has no row of."""
        return Ledger(run_dir).missing(self.refs)

    def test_dataloader(self) -> _Batches:
        """Batches of the checkpoints that are missing in the run directory, for this device."""
        trainer = self.trainer
        assert trainer is not None
        missing = self.missing(trainer.default_root_dir)
        return _Batches(missing[trainer.global_rank :: trainer.world_size], self.prompts, self.batch_size)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the prompts."""
        return ReplayBatch(batch.ref, batch.upcoming, batch.part, batch.prompts.to(device))


def _order(prompt: Prompt) -> tuple[int, int]:
    return prompt.key - prompt.query, prompt.query


class _Batches:
    """Iterable over all batches of all checkpoints; its length is known, so nothing is fetched ahead of its turn."""

    def __init__(self, refs: list[CheckpointRef], prompts: list[Prompt], batch_size: int) -> None:
        self._refs = refs
        self._batches = batches(prompts, batch_size)

    def __iter__(self) -> Iterator[ReplayBatch]:
        n = len(self._batches)
        for ref, upcoming in zip(self._refs, [*self._refs[1:], None], strict=True):
            for i, prompts in enumerate(self._batches):
                yield ReplayBatch(ref, upcoming, (i, n), prompts)

    def __len__(self) -> int:
        return len(self._refs) * len(self._batches)
