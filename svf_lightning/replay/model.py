"""The replay: a LightningModule that becomes one checkpoint after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from svf_lightning import __version__
from svf_lightning.errors import CheckpointError, InputError, bad_value, one_line
from svf_lightning.files import write_json
from svf_lightning.probe import (
    AllKeys,
    AttendedScores,
    Coordinate,
    Decompose,
    FindFirings,
    FiringBatch,
    FiringRule,
    Probe,
    ReadTokens,
    TakeReads,
)
from svf_lightning.replay.bridge import Processing, check_folded, make_bridge
from svf_lightning.replay.data import ReplayBatch, ReplayData
from svf_lightning.replay.decompose import Biases, HeadSpace, RopeBasis, check_biases, check_rope_basis
from svf_lightning.replay.features import named_pairs, read_dictionary, token_ids
from svf_lightning.replay.intervention import PromptInterventions
from svf_lightning.replay.model_files import hash_and_fingerprint
from svf_lightning.replay.prompts import Prompt, PromptBatch, batches, check_prompts_fit, context_window
from svf_lightning.replay.source import CheckpointRef, LoadedCheckpoint
from svf_lightning.replay.text import hand_over_reads
from svf_lightning.run.directory import IDENTITY
from svf_lightning.run.fingerprint import Fingerprint
from svf_lightning.run.identity import check_same_identity, metric_identity
from svf_lightning.run.ledger import Entry, Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# versions of the measurement: raise one when the same weights give other scores than before
MEASUREMENT = 1
_MEASUREMENT_OF_HALF = 2  # in half precision: version 1 also rounded what is computed from the weights
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_N_COMPARED = 4  # prompts on which a bridge's logits are compared with those of plain transformers
# how far these may be from each other, in the largest (centred) logit: this much, or 32 rounding errors
_LOGIT_TOLERANCE, _LOGIT_ROUNDINGS = 1e-4, 32.0


class CheckpointReplay(pl.LightningModule):
    """Evaluates training checkpoints of a language model; each test batch is one batch of prompts for one checkpoint.

    Its probe shows all heads as [layer, head], the scores of each prompt's query for its attended key in singular
    coordinates, and proxy features if there are any; it stands for the training step of the checkpoint.

    Args:
        processing: "folded" (normalization folded into the weights, as in the paper) or "raw"; singular vectors differ
            between the two, so a run has one of them.
        dtype: Type of the weights: "float32", "float64", "bfloat16" or "float16". Weights stored in half precision are
            exact in the first two. Factorizations are in float64.
        features: Proxy features: words, whose embedding vectors are taken, or a .npy or .safetensors file with a
            dictionary (SAE decoder); null for none.
        feature_pairs: Pairs of words (query side, key side) among them whose alignment is measured.
        rope_basis: Singular vectors of a head with rotary positions: "offset", those of the offset from query to key
            (arXiv 2602.13524), or "fixed", one basis for all, with positions moved into the tokens through
            the pseudo-inverses of W_Q and W_K (its authors' later code). Scores are the same.
        biases: What becomes of the biases of heads: "appended", one more coordinate of what they read; "separate",
            left beside the singular pairs; or "pseudo_inverse", moved into what they read.

    Raises:
        InputError: An option out of range, or options that do not fit each other.
    """

    def __init__(
        self,
        processing: Processing = "folded",
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        features: str | list[str] | None = None,
        feature_pairs: list[list[str]] | None = None,
        rope_basis: RopeBasis = "offset",
        biases: Biases = "appended",
    ) -> None:
        super().__init__()
        if processing not in ("folded", "raw"):
            raise bad_value("processing", processing, "'folded' or 'raw'", "change --model.processing")
        if dtype not in _DTYPES:
            raise bad_value("dtype", dtype, ", ".join(_DTYPES), "change --model.dtype")
        if feature_pairs and not isinstance(features, list):
            raise bad_value("feature_pairs", feature_pairs, "null without words in features", "set --model.features")
        check_rope_basis(rope_basis)
        check_biases(biases)
        self.processing: Processing = processing
        self.rope_basis: RopeBasis = rope_basis
        self.biases: Biases = biases
        self.dtype_name = dtype
        self.features_from, self.feature_pairs = features, feature_pairs or []
        self._pairs = named_pairs(features, self.feature_pairs) if isinstance(features, list) else None
        self._current: _Replayed | None = None
        self._failed: CheckpointRef | None = None
        self._ready: tuple[CheckpointRef, _Replayed | CheckpointError] | None = None  # the first, from `check`
        self._shapes: tuple[int, dict[str, str]] | None = None  # of the tensors of a measured step
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
            **self._conventions,
            "features": self.features_from,
            "prompts": [[prompt.text, prompt.query, prompt.key] for prompt in data.prompts],
            **data.fields_of_file,
            **data.fields_of_text,
            "measurement": _MEASUREMENT_OF_HALF if self.dtype_name in ("bfloat16", "float16") else MEASUREMENT,
            "metrics": metric_identity(trainer.callbacks),  # type: ignore[attr-defined]
        }

    @property
    def _conventions(self) -> dict[str, str]:
        """Conventions, where they are not those that earlier versions had: their runs go on."""
        chosen = {"rope_basis": (self.rope_basis, "offset"), "biases": (self.biases, "appended")}
        return {name: value for name, (value, default) in chosen.items() if value != default}

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
        """Check that a run that goes on is the same run, and its first checkpoint, before anything is written.

        Raises:
            InputError: It is another one, or the prompts do not fit the model, or its scores cannot be taken apart.
        """
        check_same_identity(Path(trainer.default_root_dir) / IDENTITY, self.identity(trainer, data))
        config = data.source.config()
        if config is not None:
            check_prompts_fit(data.prompts, config, data.source.model_name())
        if trainer.world_size == 1:
            self._get_ready(trainer, data)

    def on_test_start(self) -> None:
        """Be what the directory says, and get ready to fetch ahead."""
        self.check(self.trainer, self.data)
        if self.trainer.is_global_zero:
            write_json(Path(self.trainer.default_root_dir) / IDENTITY, self.identity(self.trainer, self.data))
        self._fetcher = ThreadPoolExecutor(1, "svf-fetch")

    def test_step(self, batch: ReplayBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Run one batch of prompts; None for a checkpoint that cannot be had, or cannot be trusted."""
        if self._failed == batch.ref:
            return None
        try:
            if self._current is None or self._current.loaded.ref != batch.ref:
                self._current = self._take(batch.ref)
                if batch.upcoming is not None and self._fetcher is not None:
                    self._fetched[batch.upcoming] = self._fetcher.submit(self.data.source.fetch, batch.upcoming)
            self._probe = self._observe(self._current, batch)
        except CheckpointError as error:
            self._fail(batch.ref, error)
            return None
        except InputError as error:
            if self._shapes is None:  # the first one says what is wrong with all of them
                raise
            self._fail(batch.ref, error)
            return None
        return {}

    def on_test_batch_end(self, outputs: Any, batch: ReplayBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After the callbacks: the row of a complete checkpoint is stored."""
        if outputs is None or batch.part[0] + 1 < batch.part[1] or self._current is None:
            return
        current = self._current
        entry = Entry(
            batch.ref.step, batch.ref.name, "done",
            revision=current.loaded.revision,
            weight_hash=current.loaded.weight_hash,
            seconds=round(time.monotonic() - current.start, 3),
            logit_error=current.logit_error,
            score_error=current.score_error,
            fingerprint=current.fingerprint.as_json(),
        )  # fmt: skip
        self._ledger.record(entry)
        self._shapes = self._shapes or (batch.ref.step, current.fingerprint.shapes)
        self._forget()
        self.data.source.release(batch.ref)

    def on_test_end(self) -> None:
        """Write down which checkpoints are not what they say they are, for those who read the files."""
        if self.trainer.is_global_zero:
            self._ledger.write_flagged()

    def teardown(self, stage: str) -> None:
        """End the fetching."""
        if self._fetcher is not None:
            self._fetcher.shutdown(cancel_futures=True)
            self._fetcher = None
        self._fetched.clear()
        self._ready = None

    # ---- one checkpoint --------------------------------------------------------------------------------------------

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self.trainer.default_root_dir)

    def _get_ready(self, trainer: pl.Trainer, data: ReplayData) -> None:
        """Load the first checkpoint that is missing, so that what is wrong with the model is said before the run."""
        ledger = Ledger(trainer.default_root_dir)
        if self._shapes is None:
            measured = next((entry.weights for entry in ledger.entries() if entry.fingerprint is not None), None)
            if measured is not None and measured.fingerprint is not None:
                self._shapes = measured.step, measured.fingerprint.shapes
        missing = data.missing(trainer.default_root_dir)
        if not missing or (self._ready is not None and self._ready[0] == missing[0]):
            return
        try:
            self._ready = missing[0], self._load(missing[0], data, trainer.strategy.root_device)
        except CheckpointError as error:  # it is recorded when its turn comes
            self._ready = missing[0], error

    def _take(self, ref: CheckpointRef) -> _Replayed:
        """A checkpoint whose turn has come.

        Raises:
            CheckpointError: It cannot be had, or cannot be trusted.
            InputError: No checkpoint of such a model can be measured.
        """
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != ref:
            return self._load(ref, self.data, self.device)
        if isinstance(ready[1], CheckpointError):
            raise ready[1]
        return ready[1]

    def _load(self, ref: CheckpointRef, data: ReplayData, device: torch.device) -> _Replayed:
        """Load a checkpoint, and check that it is whole and that its bridge computes what the model does."""
        start = time.monotonic()
        self._forget()
        source = data.source
        fetched = self._fetched.pop(ref, None)
        if fetched is not None:
            fetched.result()
        else:
            source.fetch(ref)
        loaded = source.load(ref, _DTYPES[self.dtype_name])
        fingerprint = loaded.fingerprint or hash_and_fingerprint(loaded.model)[1]
        _check_finite(loaded)
        self._check_shapes(ref, fingerprint)
        check_prompts_fit(data.prompts, loaded.model.config, ref.name)
        data.check_tokenizer(ref)
        torch.nn.Module.to(loaded.model, device)
        every = -(-len(data.prompts) // _N_COMPARED)
        (some,) = batches(data.prompts[::every], _N_COMPARED)
        some = some.to(device)
        logits = _plain_logits(loaded.model, some)
        bridge = make_bridge(loaded.model, processing=self.processing)
        space = HeadSpace(bridge, rope_basis=self.rope_basis, biases=self.biases)
        if self.processing == "folded":
            check_folded(space.bridge, some.tokens)
        observed = space.observe(some.tokens, some.query)
        logit_error = _compare_logits(ref, observed.logits, logits)
        space.attended(observed, some.any_key)  # compares rebuilt scores with the model's own
        return _Replayed(loaded, space, self._features(space, data, device), fingerprint, logit_error, start)

    def _check_shapes(self, ref: CheckpointRef, fingerprint: Fingerprint) -> None:
        if self._shapes is None:
            return
        step, expected = self._shapes
        shapes = fingerprint.shapes
        differing = sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{ref.name} is another model than step {step}: {name} is {shapes.get(name, 'not there')}, and "
                f"{expected.get(name, 'not there')} in step {step}"
            )

    def _observe(self, current: _Replayed, batch: ReplayBatch) -> Probe:
        """Run one batch of prompts.

        Raises:
            CheckpointError: Numbers overflow, or rebuilt scores are not those of the model.
            InputError: The model's scores are no bilinear form.
        """
        prompts = batch.prompts
        observed = current.space.observe(prompts.tokens, prompts.query)
        difference = prompts.logit_difference(observed.logits)
        scores = replace(current.space.attended(observed, prompts.any_key), logit_difference=difference.float())
        if scores.error is not None:
            current.score_error = max(current.score_error, float(scores.error.max()))

        again = PromptInterventions(current.space, observed, prompts)

        def decompose(chosen: Tensor) -> AllKeys:
            some = observed.of_prompts(chosen)
            key = prompts.key[chosen]
            contributions, _ = current.space.decompose(some, key)
            return AllKeys(contributions, some.pattern.float(), some.is_key[:, None], some.query, key)

        def find_firings(rule: FiringRule, take: Callable[[FiringBatch], None]) -> None:
            current.space.find_firings(prompts.tokens, prompts.length, rule, take, query=prompts.query)

        def read_tokens(take: TakeReads) -> None:
            bridge, text = current.space.bridge, self.data.text
            layers = current.space.layers
            if text is None:
                hand_over_reads(bridge, prompts.tokens, prompts.length, take, layers=layers)
            elif batch.part[0] == 0:
                for windows in text.batches(context_window(current.loaded.model.config)):
                    hand_over_reads(bridge, windows, None, take, layers=layers)

        if not prompts.has_keys:
            return self._make_probe(current, None, None, None, find_firings, read_tokens, batch.part)
        return self._make_probe(current, scores, again, decompose, find_firings, read_tokens, batch.part)

    def give_up(self, error: CheckpointError) -> None:
        """Write down that what a metric saw of the present checkpoint cannot be trusted; the others go on."""
        assert self._current is not None
        self._fail(self._current.loaded.ref, error)

    def _fail(self, ref: CheckpointRef, error: Exception) -> None:
        """Write down that a checkpoint failed; the others go on."""
        self._ledger.record(Entry(ref.step, ref.name, "failed", error=one_line(error)))
        self._failed = ref
        self._forget()
        self.data.source.release(ref)

    def _forget(self) -> None:
        """Free the memory of a checkpoint before the next one takes it."""
        self._current = self._probe = None
        gc.collect()  # a bridge is part of reference cycles, so it must be collected

    def _features(self, space: HeadSpace, data: ReplayData, device: torch.device) -> Tensor | None:
        """Proxy features as columns [D', N]; the bias coordinate of a feature is 0."""
        if self.features_from is None:
            return None
        if isinstance(self.features_from, list):
            ids = token_ids(data.source.tokenizer(), self.features_from)
            features = space.bridge.W_E[ids].detach().T.float()
        else:
            features = read_dictionary(self.features_from, space.bridge.cfg.d_model).to(device)
        return features

    def _make_probe(
        self,
        current: _Replayed,
        scores: AttendedScores | None,
        again: PromptInterventions | None,
        decompose: Decompose | None,
        find_firings: FindFirings,
        read_tokens: ReadTokens,
        part: tuple[int, int],
    ) -> Probe:
        loaded = current.loaded
        prompts = self.data.prompts
        coords: dict[str, Coordinate] = {
            "prompt_text": (("prompt",), [prompt.text for prompt in prompts]),
            "query_position": (("prompt",), [prompt.query for prompt in prompts]),
            "key_position": (("prompt",), [prompt.key for prompt in prompts]),
            "prompt_template": (("prompt",), torch.tensor([prompt.template for prompt in prompts])),
            "token_span": (("prompt", "token", "end"), _spans(prompts)),
        }
        blocks = [layer.block for layer in current.space.layers]
        if blocks != list(range(len(current.space.bridge.blocks))):  # a hybrid: layers are those with attention
            coords["block"] = (("layer",), torch.tensor(blocks))
        if isinstance(self.features_from, list):
            coords["feature_name"] = (("feature",), self.features_from)
        return Probe(
            loaded.ref.step,
            heads=current.space.heads,
            features=current.features,
            **({} if self._pairs is None else {"pairs": self._pairs.to(self.device)}),
            scores=scores,
            intervene=None if again is None else again.take_off,
            interventions=again if current.space.reads_inputs else None,
            decompose=decompose,
            find_firings=find_firings,
            read_tokens=read_tokens,
            part=part,
            is_last=loaded.ref == self.data.refs[-1],
            batch_dims=("layer", "head"),
            feature_dims=(),
            coords=coords,
            labels={
                "checkpoint": loaded.ref.name[:64],
                "revision": loaded.revision,
                "weight_hash": loaded.weight_hash,
                "processing": self.processing,
                "dtype": self.dtype_name,
                **self._conventions,
                "code_version": __version__,
            },
        )


def _spans(prompts: Sequence[Prompt]) -> Tensor:
    """Characters of each prompt's text that its tokens cover, int32 [prompt, token, 2]; -1 where there is no token."""
    spans = [torch.tensor(prompt.spans or [(0, 0)] * len(prompt.tokens), dtype=torch.int32) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(spans, batch_first=True, padding_value=-1)


class _Replayed:
    """A checkpoint in use; wrapped, so that Lightning does not take the model for a part of the replay."""

    def __init__(
        self,
        loaded: LoadedCheckpoint,
        space: HeadSpace,
        features: Tensor | None,
        fingerprint: Fingerprint,
        logit_error: float,
        start: float,
    ) -> None:
        self.loaded, self.space, self.features, self.start = loaded, space, features, start
        self.fingerprint, self.logit_error, self.score_error = fingerprint, logit_error, 0.0


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, prompts: PromptBatch) -> Tensor:
    """Next-token logits at the queries [batch, vocabulary] from transformers alone."""
    logits: Tensor = model(prompts.tokens, use_cache=False).logits
    return logits[torch.arange(len(prompts)), prompts.query]


def _compare_logits(ref: CheckpointRef, logits: Tensor, expected: Tensor) -> float:
    """Compare a bridge's logits with those of the model that it was made from, each minus their mean.

    Folding takes a number off all logits of a prompt, which changes no probability.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        CheckpointError: They are not the same, but for rounding.
    """
    dtype = logits.dtype
    bridged, plain = (part.double() - part.double().mean(-1, keepdim=True) for part in (logits, expected))
    error = float((bridged - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
    tolerance = max(_LOGIT_TOLERANCE, _LOGIT_ROUNDINGS * torch.finfo(dtype).eps)
    if not error <= tolerance:  # NaN is not
        raise CheckpointError(
            f"{ref.name}: TransformerLens computes other logits than transformers does (off by {error:.2g} of the "
            f"largest, and rounding explains {tolerance:.2g}); try --model.processing=raw"
        )
    return error


def _check_finite(loaded: LoadedCheckpoint) -> None:
    """Raises CheckpointError for weights that hold NaN or Inf: their rows would be NaN without a reason given."""
    for name, parameter in loaded.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{loaded.ref.name}: the weights are damaged, {name} holds NaN or Inf")
