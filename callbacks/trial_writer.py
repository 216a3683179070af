"""TrialWriter: a cohort's rows, taken apart again, so that every trial has a run directory and a W&B run of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.capture import Capture, RowSink
from svf_lightning.claims import Claim
from svf_lightning.rows import Rows
from svf_lightning.run_dir import CHECKPOINTS, CONFIG, write_text
from svf_lightning.summary import dynamics, dynamics_to_log, first_and_last, summarize
from svf_lightning.toy.optimizer import InstanceAdam
from svf_lightning.trajectory import TrajectoryStore


@dataclass
class _Trial:
    run_dir: Path
    config_text: str
    config: Mapping[str, Any]
    wandb: Mapping[str, Any] | None
    instances: slice
    store: TrajectoryStore
    include: list[str] | None


class TrialWriter(RowSink):
    """Gives each trial of a cohort what ``fit`` would have given it alone, from its own instances.

    That is config.yaml, trajectory.zarr, checkpoints/last.ckpt, summary.json with its claims, and a W&B run, which is
    made when the training has ended. A trial whose instances all diverged is "failed".

    Args:
        trials: A JSON file with a list of trials in the order of their instances: ``run_dir``, ``config`` (YAML text),
            ``wandb`` (arguments of RunLogger, or null) and ``include`` (quantities of the trajectory, or null).
    """

    def __init__(self, trials: str) -> None:
        self._file = Path(trials)
        self._trials: list[_Trial] = []
        self._rows: list[Rows] = []  # the numbers alone
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the run directories."""
        self._start = time.monotonic()
        first = 0
        for entry in json.loads(self._file.read_text(encoding="utf-8")):
            config = yaml.safe_load(entry["config"])
            run_dir = Path(entry["run_dir"])
            instances = slice(first, first + config["model"]["n_instances"])
            first = instances.stop
            write_text(run_dir / CONFIG, entry["config"])
            store = TrajectoryStore(run_dir, rows_per_chunk=Capture.of(trainer).chunk)
            trial = _Trial(run_dir, entry["config"], config, entry["wandb"], instances, store, entry["include"])
            self._trials.append(trial)

    def consume(self, rows: Rows) -> None:
        """Append one chunk to every trial's trajectory."""
        for trial in self._trials:
            own = rows.of_instances(trial.instances)
            values = {n: v for n, v in own.values.items() if trial.include is None or n in trial.include}
            trial.store.append({"step": ((), own.steps), **values}, own.coords, own.batch_dims)
        scalars = rows.scalars().keys()
        self._rows.append(Rows(rows.steps, {n: rows.values[n] for n in scalars}, rows.batch_dims, rows.coords))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints, summaries, W&B runs."""
        Capture.of(trainer).on_train_end(trainer, pl_module)  # whatever the order of the callbacks; once
        seconds = time.monotonic() - self._start
        self._save_checkpoints(trainer, pl_module)
        rows = _joined(self._rows)
        for trial in self._trials:
            self._finish(trial, rows.of_instances(trial.instances), seconds)

    def _finish(self, trial: _Trial, rows: Rows, seconds: float) -> None:
        scalars, batch_dims = rows.scalars(), rows.batch_dims
        first, metrics = first_and_last(scalars, batch_dims)
        metrics |= dynamics(scalars, rows.steps, batch_dims)
        experiment = trial.config["experiment"]
        total = metrics.get("loss/total")
        diverged = total is not None and not np.isfinite(total).any()
        last = int(rows.steps[-1])
        self._log(trial, rows, last, dynamics_to_log(metrics))
        summarize(
            trial.run_dir,
            experiment=experiment["name"],
            claims=[Claim(**claim) for claim in experiment["claims"]],
            status="failed" if diverged else "finished",
            steps=last,
            seconds=seconds * (trial.instances.stop - trial.instances.start) / self._trials[-1].instances.stop,
            first=first,
            metrics=metrics,
            settings={name: values for name, (dims, values) in rows.coords.items() if dims == ("instance",)},
            batch_dims=batch_dims,
        )

    def _log(self, trial: _Trial, rows: Rows, last: int, at_the_end: dict[str, float]) -> None:
        """The W&B run of a trial."""
        if trial.wandb is None:
            return
        from svf_lightning.wandb_logger import RunLogger

        logger = RunLogger(**trial.wandb)
        logger.log_config(trial.config)
        for step, metrics in rows.to_log(every=max(1, trial.config["trainer"]["log_every_n_steps"] or 1), last=last):
            logger.log_metrics({**metrics, **(at_the_end if step == last else {})}, step=step)
        logger.finalize("success")

    def _save_checkpoints(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each trial's weights and optimizer state, as its own ``fit`` would save them, to be trained on or tested."""
        path = self._file.with_suffix(".ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        path.unlink()
        learning_rates: torch.Tensor = pl_module.learning_rates  # type: ignore[assignment]
        for trial in self._trials:
            own = {**whole, "callbacks": {}, "hyper_parameters": trial.config["model"]}
            own["state_dict"] = {name: value[trial.instances].clone() for name, value in whole["state_dict"].items()}
            own["optimizer_states"] = [_of_instances(state, trial.instances) for state in whole["optimizer_states"]]
            rates = learning_rates[trial.instances]
            if isinstance(trainer.optimizers[0], InstanceAdam) and bool((rates == rates[0]).all()):
                _use_one_rate(own, rates[0].item())
            folder = trial.run_dir / CHECKPOINTS
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(own, folder / "last.ckpt")


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


def _joined(chunks: list[Rows]) -> Rows:
    """Chunks of rows as one."""
    first = chunks[0]
    values = {
        name: (dims, np.concatenate([chunk.values[name][1] for chunk in chunks]))
        for name, (dims, _) in first.values.items()
    }
    return Rows(np.concatenate([chunk.steps for chunk in chunks]), values, first.batch_dims, first.coords)
