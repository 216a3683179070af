"""What capturing every step costs, and how many instance-steps per second the training does.

    python benchmarks/capture_cost.py [--repeats 5] [--steps 1024]

Capture off and on alternate inside one process, in segments of equal length. Two times per step are taken from each
segment: that of its median step, and that of the whole (every chunk measured and written, divided by the number of
steps). Ratios are medians over neighbouring segments.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import instantiate_class
from rich.console import Console
from rich.table import Table

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.cli import preset_path
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.wandb_logger import RunLogger

LOG_EVERY = 5  # as in configs/defaults.yaml


class Clock(pl.Callback):
    """Time per step: of the median step, and of the whole from the first step to the last row written [ms]."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self.times = [time.perf_counter()]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """One step ends, the next begins."""
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop, after the last row."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Capture):
                callback.on_train_end(trainer, pl_module)
        n_steps = len(self.times) - 1
        self.whole = 1e3 * (time.perf_counter() - self.times[0]) / n_steps
        self.median = 1e3 * statistics.median(b - a for a, b in pairwise(self.times[1:]))


def segment(settings: dict[str, Any], steps: int, *, capture: bool, wandb: bool = False) -> Clock:
    """One short training, timed."""
    model_settings = {**settings["model"], "d_head": None}
    with tempfile.TemporaryDirectory() as folder:
        model = ToyAttentionModel(**model_settings)
        data = ToyData(n_features=model.n_features, n_instances=model.n_instances, **settings["data"])
        clock = Clock()
        callbacks: list[pl.Callback] = [clock]
        if capture:
            callbacks += [Capture(), SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter()]
            for extra in settings["trainer"].get("callbacks+", []):  # those that the preset adds
                callbacks.append(instantiate_class((), extra))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=RunLogger(save_dir=folder, mode="offline") if wandb else False,
            log_every_n_steps=LOG_EVERY,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if wandb:
            trainer.loggers[0].log_hyperparams({})  # W&B starts here, not in the first step
        trainer.fit(model, data)
        return clock


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="segments of each kind")
    parser.add_argument("--steps", type=int, default=1024, help="steps per segment")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    table = Table("preset", "ms/step", "off", "capture", "+ W&B offline", "capture / off", "with W&B / off")
    for preset in ("single_pair", "multi_pair"):
        settings = yaml.safe_load(Path(preset_path(preset)).read_text())
        segment(settings, 128, capture=True)  # warm up
        rows = [
            (
                segment(settings, options.steps, capture=False),
                segment(settings, options.steps, capture=True),
                segment(settings, options.steps, capture=True, wandb=True),
            )
            for _ in range(options.repeats)
        ]
        for kind in ("median", "whole"):
            times = [[getattr(clock, kind) for clock in row] for row in rows]
            medians = (f"{statistics.median(column):.2f}" for column in zip(*times, strict=True))
            ratios = (f"{statistics.median(row[i] / row[0] for row in times):.3f}" for i in (1, 2))
            table.add_row(preset, kind, *medians, *ratios)
    console = Console(width=120)
    console.print(table)

    table = Table("instances", "ms/step", "instance-steps per second")
    settings = yaml.safe_load(Path(preset_path("single_pair")).read_text())
    for n in (1, 8, 64):
        sized = {**settings, "model": {**settings["model"], "n_instances": n}}
        n_steps, n_repeats = max(64, options.steps // 4), max(1, options.repeats // 2)
        ms = statistics.median(segment(sized, n_steps, capture=False).whole for _ in range(n_repeats))
        table.add_row(str(n), f"{ms:.2f}", f"{1e3 * n / ms:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
