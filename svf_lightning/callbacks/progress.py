"""StepProgress: a live progress bar with the loss and the alignment in it."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from svf_lightning.callbacks.base import RowSink, Status
from svf_lightning.errors import bad_value
from svf_lightning.quantities import Place
from svf_lightning.rows import Rows, statistics


class StepProgress(RowSink, ProgressBar):
    """One bar for the whole run, in training steps; redrawn by the clock, so its cost does not grow with the speed.

    Where the output is not a terminal there is no bar, as escape codes would fill the log.

    Args:
        refresh_rate: Redraws per second, > 0.
        metrics: Names to show, as means over the instances, where the run measures them; null for those of the
            quantities that are made for it (``Place.PROGRESS``).

    Raises:
        InputError: The rate is not positive.
    """

    def __init__(self, refresh_rate: float = 4.0, metrics: tuple[str, ...] | None = None) -> None:
        super().__init__()
        if not refresh_rate > 0:
            raise bad_value("refresh_rate", refresh_rate, "a number > 0", "remove the StepProgress callback for no bar")
        self.refresh_rate, self.metrics = refresh_rate, metrics
        self._enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next = 0.0
        self._shown = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the trainer, and have rows handed on."""
        RowSink.setup(self, trainer, pl_module, stage)
        ProgressBar.setup(self, trainer, pl_module, stage)
        self._shown = ""

    def consume(self, rows: Rows) -> None:
        """Remember the last values."""
        means = {name: float(statistics(values[-1:], rows.batch_dims)[0][0]) for name, values in rows.scalars().items()}
        names = self.metrics or [name for name, q in rows.quantities.items() if q.is_at(Place.PROGRESS)]
        self._shown = "  ".join(f"{name.rsplit('/', 1)[-1]} {means[name]:.4g}" for name in names if name in means)

    def finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """Leave the bar as it stands at the end."""
        if self._bar is not None:
            total = self._bar.tasks[0].total or 0
            self._draw(trainer.global_step if trainer.state.fn == "fit" else total)
        self._stop()

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar (again)."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        self._start("training", trainer.max_steps if trainer.max_steps > 0 else None, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time."""
        if self._bar is not None and time.monotonic() >= self._next:
            self._draw(trainer.global_step)

    def on_evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        total = trainer.num_test_batches if trainer.state.fn == "test" else trainer.num_val_batches
        counts = [n for n in total if isinstance(n, int)]
        self._start("evaluating", sum(counts) if len(counts) == len(total) else None, 0)

    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, n_done: int) -> None:
        """Move the bar, if it is time."""
        if self._bar is not None and time.monotonic() >= self._next:
            self._draw(n_done)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _start(self, what: str, total: float | None, done: int) -> None:
        console = Console(stderr=True)
        if not self._enabled or not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, metrics="")
        self._bar.start()
        self._next = 0.0

    def _draw(self, done: float) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=done, metrics=self._shown)
        self._bar.refresh()
        self._next = time.monotonic() + 1 / self.refresh_rate

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
