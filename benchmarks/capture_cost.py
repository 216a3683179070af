"""What capturing every step costs, and how many instance-steps per second the training does.

    python benchmarks/capture_cost.py [--repeats 9] [--steps 512]

Capture off and on alternate inside one process, in segments of equal length, each timed as a whole: taking probes,
measuring, writing, and waiting for the last row are all inside. The ratio is the median over neighbouring segments.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from rich.console import Console
from rich.table import Table

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.cli import preset_path
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.wandb_logger import RunLogger

LOG_EVERY = 5  # as in configs/defaults.yaml


class Clock(pl.Callback):
    """Seconds from the first training step to the end of training, everything that is written included."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop, after the last row."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Capture):
                callback.on_train_end(trainer, pl_module)
        self.seconds = time.perf_counter() - self.start


def segment(settings: dict[str, Any], steps: int, *, capture: bool, wandb: bool = False) -> float:
    """Milliseconds per step of one short training."""
    model_settings = {**settings["model"], "d_head": None}
    with tempfile.TemporaryDirectory() as folder:
        model = ToyAttentionModel(**model_settings)
        data = ToyData(n_features=model.n_features, n_instances=model.n_instances, **settings["data"])
        callbacks: list[pl.Callback] = [Clock()]
        if capture:
            callbacks += [Capture(), SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter()]
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
        clock = callbacks[0]
        assert isinstance(clock, Clock)
        return 1e3 * clock.seconds / steps


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="segments of each kind")
    parser.add_argument("--steps", type=int, default=512, help="steps per segment")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    table = Table("preset", "off [ms/step]", "capture [ms/step]", "+ W&B offline", "capture / off", "with W&B / off")
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
        off, on, both = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio, ratio_both = (statistics.median(row[i] / row[0] for row in rows) for i in (1, 2))
        table.add_row(preset, f"{off:.2f}", f"{on:.2f}", f"{both:.2f}", f"{ratio:.3f}", f"{ratio_both:.3f}")
    console = Console(width=120)
    console.print(table)

    table = Table("instances", "ms/step", "instance-steps per second")
    settings = yaml.safe_load(Path(preset_path("single_pair")).read_text())
    for n in (1, 8, 64):
        sized = {**settings, "model": {**settings["model"], "n_instances": n}}
        times = [
            segment(sized, max(64, options.steps // 2), capture=False) for _ in range(max(1, options.repeats // 3))
        ]
        ms = statistics.median(times)
        table.add_row(str(n), f"{ms:.2f}", f"{1e3 * n / ms:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
