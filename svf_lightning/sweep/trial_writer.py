"""TrialWriter: a cohort's rows, taken apart again, so that every trial has a run directory and a W&B run of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from svf_lightning.arguments import class_of
from svf_lightning.callbacks import RowSink, TrajectoryWriter
from svf_lightning.callbacks.base import Driver, Status
from svf_lightning.errors import TakenAwayError
from svf_lightning.files import write_text
from svf_lightning.rows import Rows
from svf_lightning.run.changes import changes, sizes_in
from svf_lightning.run.claims import Claim
from svf_lightning.run.directory import CHECKPOINTS, CONFIG
from svf_lightning.run.identity import metric_identity, wandb_name
from svf_lightning.run.lineage import SETTINGS
from svf_lightning.run.settings import Experiment
from svf_lightning.run.summary import Result, summarize
from svf_lightning.sweep.trial import Trial
from svf_lightning.toy.optimizer import InstanceAdam
from svf_lightning.trajectory import TrajectoryStore
from svf_lightning.wandb_logger import RunLogger


class _Open(NamedTuple):
    """A trial whose rows are being written."""

    trial: Trial
    settings: Mapping[str, Any]
    instances: slice  # of the cohort's instances
    store: TrajectoryStore
    include: list[str] | None  # quantities of its trajectory; None for all

    def check(self) -> None:
        """Check that the run directory is still there: what is written into a new one would not be whole.

        Raises:
            TakenAwayError: It is not.
        """
        if not (self.trial.folder / CONFIG).is_file():
            raise TakenAwayError(f"{self.trial.folder} was removed while the trial trained")

    @property
    def experiment(self) -> Experiment:
        given = self.settings["experiment"]
        return Experiment(**{**given, "claims": [Claim(**claim) for claim in given["claims"]]})


class TrialWriter(RowSink):
    """Gives each trial of a cohort what ``fit`` would have given it alone, from its own instances.

    That is config.yaml, trajectory.zarr, checkpoints/last.ckpt, summary.json with its claims, and a W&B run, which is
    made when the training has ended. A trial whose instances all diverged is "failed".

    Args:
        trials: A JSON file with the trials (``Trial.as_json``), in the order of their instances.
    """

    def __init__(self, trials: str) -> None:
        self._file = Path(trials)
        self._trials: list[_Open] = []
        self._rows: list[Rows] = []  # scalars only
        self._sizes: Mapping[str, int] = {}  # of all that was measured
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the run directories."""
        self._start = time.monotonic()
        first = 0
        metrics = metric_identity(trainer.callbacks)  # type: ignore[attr-defined]
        for entry in json.loads(self._file.read_text(encoding="utf-8")):
            trial = Trial.from_json(entry)
            settings = trial.settings()
            instances = slice(first, first + settings["model"]["n_instances"])
            first = instances.stop
            write_text(trial.folder / CONFIG, trial.config)
            store = TrajectoryStore(trial.folder, rows_per_chunk=Driver.of(trainer).chunk, metrics=metrics)
            self._trials.append(_Open(trial, settings, instances, store, _included(settings)))

    def consume(self, rows: Rows) -> None:
        """Append one chunk to every trial's trajectory."""
        for one in self._trials:
            one.check()
            one.store.append(rows.of_instances(one.instances), one.include)
        scalars, self._sizes = rows.scalars().keys(), rows.sizes
        self._rows.append(replace(rows, values={name: rows.values[name] for name in scalars}))

    def finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """Checkpoints, summaries, W&B runs."""
        if status != "finished":
            return
        seconds = time.monotonic() - self._start
        for one in self._trials:
            one.check()
        self._save_checkpoints(trainer, pl_module)
        rows = Rows.joined(self._rows)
        for one in self._trials:
            share = (one.instances.stop - one.instances.start) / self._trials[-1].instances.stop
            self._summarize(one, rows.of_instances(one.instances), seconds * share)

    def _summarize(self, one: _Open, rows: Rows, seconds: float) -> None:
        result = Result.of_rows(rows, {name for claim in one.experiment.claims for name in claim.names()})
        sizes = sizes_in(self._sizes, {name: values for name, (_, values) in rows.coords.items()})
        happened = changes(rows.scalars(), rows.steps, rows.batch_dims, rows.quantities, sizes)
        result = replace(result.with_changes(happened), seconds=seconds, sizes=sizes)
        total = result.last.get("loss/total")
        if total is not None and not np.isfinite(total).any():
            result = replace(result, status="failed")
        self._log(one, rows, result)
        summarize(one.trial.folder, one.experiment, result)

    def _log(self, one: _Open, rows: Rows, result: Result) -> None:
        """The W&B run of a trial."""
        logger = one.settings["trainer"]["logger"]
        if not logger:
            return
        trial = one.trial
        named = wandb_name(trial.folder, "fit", one.experiment, sweep=trial.sweep, label=trial.name)
        # no media: drawing would cost more than the trial
        of_trial = {"save_dir": str(trial.folder), "quiet": True, "log_media": False}
        run = RunLogger(**{**logger["init_args"], **named, **of_trial})
        run.log_config(one.settings)
        at_the_end, last = result.changes_to_log(), result.steps
        for step, metrics in rows.to_log(every=max(1, one.settings["trainer"]["log_every_n_steps"] or 1), last=last):
            run.log_metrics({**metrics, **(at_the_end if step == last else {})}, step=step)
        run.finalize("success")

    def _save_checkpoints(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each trial's weights and optimizer state, as its own ``fit`` would save them, to be trained on or tested."""
        path = self._file.with_suffix(".ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        path.unlink()
        learning_rates: torch.Tensor = pl_module.learning_rates  # type: ignore[assignment]
        for one in self._trials:
            saved = {**whole, "callbacks": {}, "hyper_parameters": one.settings["model"], SETTINGS: one.trial.config}
            saved["state_dict"] = {name: value[one.instances].clone() for name, value in whole["state_dict"].items()}
            saved["optimizer_states"] = [_of_instances(state, one.instances) for state in whole["optimizer_states"]]
            rates = learning_rates[one.instances]
            if isinstance(trainer.optimizers[0], InstanceAdam) and bool((rates == rates[0]).all()):
                _use_one_rate(saved, rates[0].item())
            folder = one.trial.folder / CHECKPOINTS
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(saved, folder / "last.ckpt")


def _of_instances(optimizer: Mapping[str, Any], instances: slice) -> dict[str, Any]:
    """An optimizer's state with the first dimension of its moments cut; their step counter has none."""
    state = {
        index: {name: value[instances].clone() if value.ndim else value for name, value in moments.items()}
        for index, moments in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _use_one_rate(checkpoint: dict[str, Any], rate: float) -> None:
    """Turn factors of the cohort's learning rates into the one rate that the trial's own optimizer has."""
    for optimizer in checkpoint["optimizer_states"]:
        optimizer["param_groups"] = [
            {**group, "fused": True, **{name: group[name] * rate for name in ("lr", "initial_lr") if name in group}}
            for group in optimizer["param_groups"]
        ]
    checkpoint["lr_schedulers"] = [
        {**state, **{name: [factor * rate for factor in state[name]] for name in ("base_lrs", "_last_lr")}}
        for state in checkpoint["lr_schedulers"]
    ]


def _included(settings: Mapping[str, Any]) -> list[str] | None:
    """What the trial's TrajectoryWriter would keep; nothing is lost if it has none."""
    writers = (c for c in settings["trainer"]["callbacks"] or [] if class_of(c) is TrajectoryWriter)
    writer: Mapping[str, Any] = next(writers, {})
    included: list[str] | None = writer.get("init_args", {}).get("include")
    return included
