"""TrajectoryWriter: everything that is measured goes into the run's trajectory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.base import Driver, RowSink
from svf_lightning.errors import InputError
from svf_lightning.rows import Rows
from svf_lightning.run.identity import check_same_metrics, metric_identity
from svf_lightning.trajectory import TrajectoryStore


class TrajectoryWriter(RowSink):
    """Appends the captured rows to ``trajectory.zarr`` in the run directory (``trainer.default_root_dir``).

    Rows are there to read (``open_trajectory``) chunk by chunk while the run goes on, and after a kill. A run that
    resumes from a checkpoint at step s writes the rows of s and later again.

    Args:
        run_dir: Directory of the trajectory; null for the trainer's default_root_dir.
        include: Names of the quantities to keep, for example [W, "alignment/matched"]; null keeps all.
        add: Add rows to a trajectory that is there already (a replay that goes on), instead of refusing it.
    """

    def __init__(self, run_dir: str | None = None, include: list[str] | None = None, add: bool = False) -> None:
        self.run_dir, self.include, self.add = run_dir, include, add
        self._store: TrajectoryStore | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store; on resume, forget what will be written again.

        Raises:
            InputError: The directory holds the trajectory of another run, or rows that were measured with other
                options.
        """
        self._open(trainer, resume_at=trainer.global_step)

    def on_evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store."""
        self._open(trainer)

    def _open(self, trainer: Trainer, resume_at: int = 0) -> None:
        run_dir = Path(self.run_dir or trainer.default_root_dir)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        store = TrajectoryStore(
            run_dir,
            rows_per_chunk=Driver.of(trainer).chunk,
            rank=trainer.global_rank,
            metrics=metric_identity(callbacks),
        )
        check_same_metrics(run_dir, callbacks)
        if store.exists and not self.add:
            if resume_at == 0:
                raise InputError(f"{run_dir} already holds a run's trajectory. Fix: use another run directory.")
            store.truncate(resume_at)
        self._store = store

    def consume(self, rows: Rows) -> None:
        """Append one chunk."""
        assert self._store is not None
        self._store.append(rows, self.include)
