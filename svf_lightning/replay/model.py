"""The replay: a LightningModule that becomes one checkpoint after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from svf_lightning import __version__
from svf_lightning.errors import CheckpointError, InputError, bad_value
from svf_lightning.files import write_json
from svf_lightning.probe import AllKeys, AttendedScores, Coordinate, Decompose, Intervene, Outcome, Probe
from svf_lightning.replay.bridge import Processing, make_bridge
from svf_lightning.replay.data import ReplayBatch, ReplayData
from svf_lightning.replay.decompose import HeadSpace
from svf_lightning.replay.features import named_pairs, read_dictionary, token_ids
from svf_lightning.replay.prompts import Prompt
from svf_lightning.replay.source import CheckpointRef, LoadedCheckpoint
from svf_lightning.run.directory import IDENTITY
from svf_lightning.run.identity import check_same_identity, metric_identity
from svf_lightning.run.ledger import Entry, Ledger

MEASUREMENT = 1  # version of the measurement: raise it when the same weights give other scores than before
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointReplay(pl.LightningModule):
    """Evaluates training checkpoints of a language model; each test batch is one batch of prompts for one checkpoint.

    Its probe shows all heads as [layer, head], the scores of each prompt's query for its attended key in singular
    coordinates, and proxy features if there are any; it stands for the training step of the checkpoint.

    Args:
        processing: "folded" (normalization folded into the weights, as in the paper) or "raw"; singular vectors differ
            between the two, so a run has one of them.
        dtype: Type of the weights: "float32", "bfloat16" or "float16". Factorizations are in float64.
        features: Proxy features: words, whose embedding vectors are taken, or a .npy or .safetensors file with a
            dictionary (SAE decoder); null for none.
        feature_pairs: Pairs of words (query side, key side) among them whose alignment is measured.

    Raises:
        InputError: An option out of range, or options that do not fit each other.
    """

    def __init__(
        self,
        processing: Processing = "folded",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        features: str | list[str] | None = None,
        feature_pairs: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        if processing not in ("folded", "raw"):
            raise bad_value("processing", processing, "'folded' or 'raw'", "change --model.processing")
        if dtype not in _DTYPES:
            raise bad_value("dtype", dtype, ", ".join(_DTYPES), "change --model.dtype")
        if feature_pairs and not isinstance(features, list):
            raise bad_value("feature_pairs", feature_pairs, "null without words in features", "set --model.features")
        self.processing: Processing = processing
        self.dtype_name = dtype
        self.features_from, self.feature_pairs = features, feature_pairs or []
        self._pairs = named_pairs(features, self.feature_pairs) if isinstance(features, list) else None
        self._current: _Replayed | None = None
        self._failed: CheckpointRef | None = None
        self._probe: Probe | None = None
        self._fetched: dict[CheckpointRef, Future[None]] = {}
        self._fetcher: ThreadPoolExecutor | None = None

    @property
    def data(self) -> ReplayData:
        """The trainer's data."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReplayData):
            raise InputError("CheckpointReplay needs ReplayData. Fix: pass datamodule=ReplayData(...) to the trainer.")
        return data

    def identity(self, trainer: pl.Trainer, data: ReplayData) -> dict[str, Any]:
        """What all rows of one curve share: model, prompts, and how they are measured."""
        return {
            **{f"source.{name}": value for name, value in data.source.identity().items()},
            "processing": self.processing,
            "dtype": self.dtype_name,
            "features": self.features_from,
            "prompts": [[prompt.text, prompt.query, prompt.key] for prompt in data.prompts],
            "measurement": MEASUREMENT,
            "metrics": metric_identity(trainer.callbacks),  # type: ignore[attr-defined]
        }

    def probe(self) -> Probe:
        """The checkpoint and the prompts of the last batch.

        Raises:
            RuntimeError: No checkpoint was loaded yet.
        """
        if self._probe is None:
            raise RuntimeError("probe() shows the last test batch, and there was none")
        return self._probe

    # ---- the loop --------------------------------------------------------------------------------------------------

    def check(self, trainer: pl.Trainer, data: ReplayData) -> None:
        """Check that a run that goes on is the same run, before anything is written.

        Raises:
            InputError: It is another one, or the prompts do not fit the model.
        """
        check_same_identity(Path(trainer.default_root_dir) / IDENTITY, self.identity(trainer, data))

    def on_test_start(self) -> None:
        """Be what the directory says, and get ready to fetch ahead."""
        path = Path(self.trainer.default_root_dir) / IDENTITY
        identity = self.identity(self.trainer, self.data)
        check_same_identity(path, identity)
        if self.trainer.is_global_zero:
            write_json(path, identity)
        self._fetcher = ThreadPoolExecutor(1, "svf-fetch")

    def test_step(self, batch: ReplayBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Run one batch of prompts; None for a checkpoint that cannot be had."""
        if self._failed == batch.ref:
            return None
        if self._current is None or self._current.loaded.ref != batch.ref:
            try:
                self._current = self._load(batch)
            except CheckpointError as error:
                self._ledger.record(Entry(batch.ref.step, batch.ref.name, "failed", error=str(error)))
                self._failed = batch.ref
                return None
        current, prompts = self._current, batch.prompts
        observed = current.space.observe(prompts.tokens, prompts.query)
        at = torch.arange(len(prompts), device=prompts.query.device)
        difference = observed.logits[at, prompts.correct] - observed.logits[at, prompts.wrong]
        scores = replace(current.space.attended(observed, prompts.key), logit_difference=difference.float())

        def intervene(removed: Tensor) -> Outcome:
            logits, attention = current.space.rerun(prompts.tokens, prompts.query, prompts.key, removed)
            return Outcome(attention.float(), (logits[at, prompts.correct] - logits[at, prompts.wrong]).float())

        def decompose(chosen: Tensor) -> AllKeys:
            some = observed.of_prompts(chosen)
            key = prompts.key[chosen]
            contributions, _ = current.space.decompose(some, key)
            return AllKeys(contributions, some.pattern.float(), some.is_key[:, None], some.query, key)

        self._probe = self._make_probe(current, scores, intervene, decompose, batch.part)
        return {}

    def on_test_batch_end(self, outputs: Any, batch: ReplayBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After the callbacks: the row of a complete checkpoint is stored."""
        if outputs is None or batch.part[0] + 1 < batch.part[1] or self._current is None:
            return
        loaded = self._current.loaded
        seconds = round(time.monotonic() - self._current.start, 3)
        entry = Entry(
            batch.ref.step, batch.ref.name, "done",
            revision=loaded.revision, weight_hash=loaded.weight_hash, seconds=seconds,
        )  # fmt: skip
        self._ledger.record(entry)
        self._forget()
        self.data.source.release(batch.ref)

    def teardown(self, stage: str) -> None:
        """End the fetching."""
        if self._fetcher is not None:
            self._fetcher.shutdown(cancel_futures=True)
            self._fetcher = None
        self._fetched.clear()

    # ---- one checkpoint --------------------------------------------------------------------------------------------

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self.trainer.default_root_dir)

    def _load(self, batch: ReplayBatch) -> _Replayed:
        start = time.monotonic()
        self._forget()
        source = self.data.source
        fetched = self._fetched.pop(batch.ref, None)
        if fetched is not None:
            fetched.result()
        else:
            source.fetch(batch.ref)
        if batch.upcoming is not None and self._fetcher is not None:
            self._fetched[batch.upcoming] = self._fetcher.submit(source.fetch, batch.upcoming)
        loaded = source.load(batch.ref, _DTYPES[self.dtype_name])
        _check_finite(loaded)
        torch.nn.Module.to(loaded.model, self.device)
        space = HeadSpace(make_bridge(loaded.model, processing=self.processing))
        return _Replayed(loaded, space, self._features(space), start)

    def _forget(self) -> None:
        """Free the memory of a checkpoint before the next one takes it."""
        self._current = self._probe = None
        gc.collect()  # a bridge is part of reference cycles, so it must be collected

    def _features(self, space: HeadSpace) -> Tensor | None:
        """Proxy features as columns [D', N]; the bias coordinate of a feature is 0."""
        if self.features_from is None:
            return None
        if isinstance(self.features_from, list):
            ids = token_ids(self.data.source.tokenizer(), self.features_from)
            features = space.bridge.W_E[ids].detach().T.float()
        else:
            features = read_dictionary(self.features_from, space.bridge.cfg.d_model).to(self.device)
        return features

    def _make_probe(
        self,
        current: _Replayed,
        scores: AttendedScores,
        intervene: Intervene,
        decompose: Decompose,
        part: tuple[int, int],
    ) -> Probe:
        loaded = current.loaded
        prompts = self.data.prompts
        coords: dict[str, Coordinate] = {
            "prompt_text": (("prompt",), [prompt.text for prompt in prompts]),
            "query_position": (("prompt",), [prompt.query for prompt in prompts]),
            "key_position": (("prompt",), [prompt.key for prompt in prompts]),
            "token_span": (("prompt", "token", "end"), _spans(prompts)),
        }
        if isinstance(self.features_from, list):
            coords["feature_name"] = (("feature",), self.features_from)
        return Probe(
            loaded.ref.step,
            heads=current.space.heads,
            features=current.features,
            **({} if self._pairs is None else {"pairs": self._pairs.to(self.device)}),
            scores=scores,
            intervene=intervene,
            decompose=decompose,
            part=part,
            batch_dims=("layer", "head"),
            feature_dims=(),
            coords=coords,
            labels={
                "checkpoint": loaded.ref.name[:64],
                "revision": loaded.revision,
                "weight_hash": loaded.weight_hash,
                "processing": self.processing,
                "dtype": self.dtype_name,
                "code_version": __version__,
            },
        )


def _spans(prompts: Sequence[Prompt]) -> Tensor:
    """Characters of each prompt's text that its tokens cover, int32 [prompt, token, 2]; -1 where there is no token."""
    spans = [torch.tensor(prompt.spans or [(0, 0)] * len(prompt.tokens), dtype=torch.int32) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(spans, batch_first=True, padding_value=-1)


class _Replayed:
    """A checkpoint in use; wrapped, so that Lightning does not take the model for a part of the replay."""

    def __init__(self, loaded: LoadedCheckpoint, space: HeadSpace, features: Tensor | None, start: float) -> None:
        self.loaded, self.space, self.features, self.start = loaded, space, features, start


def _check_finite(loaded: LoadedCheckpoint) -> None:
    """Raises CheckpointError for weights that hold NaN or Inf: their rows would be NaN without a reason given."""
    for name, parameter in loaded.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{loaded.ref.name}: the weights are damaged, {name} holds NaN or Inf")
