"""TrajectoryWriter: everything that is measured goes into the run's trajectory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.base import Driver, RowSink
from svf_lightning.errors import InputError
from svf_lightning.rows import Rows
from svf_lightning.run.identity import check_same_metrics, metric_identity
from svf_lightning.run.ledger import Ledger
from svf_lightning.run.settings import Run
from svf_lightning.trajectory import TrajectoryStore


class TrajectoryWriter(RowSink):
    """Appends the captured rows to ``trajectory.zarr`` in the run directory (``trainer.default_root_dir``).

    Rows are there to read (``open_trajectory``) chunk by chunk while the run goes on, and after a kill. A run that
    resumes from a checkpoint at step s writes the rows of s and later again; all rows before s must be there.

    Args:
        run_dir: Directory of the trajectory; null for the trainer's default_root_dir.
        include: Names of the quantities to keep, for example [W, "alignment/matched"]; null keeps all.
        add: Add rows to a trajectory that is there already (a replay that goes on), instead of refusing it.
    """

    def __init__(self, run_dir: str | None = None, include: list[str] | None = None, add: bool = False) -> None:
        self.run_dir, self.include, self.add = run_dir, include, add
        self._store: TrajectoryStore | None = None
        self._rows_from = 0

    def join(self, run: Run) -> None:
        """Learn at which step the run's own rows begin."""
        self._rows_from = run.rows_from

    def check(self, trainer: Trainer, step: int) -> TrajectoryStore:
        """Check that rows of ``step`` and later can be written; nothing is.

        Raises:
            InputError: The directory holds the trajectory of another run, rows that were measured with other options,
                or not all rows before the step.
        """
        run_dir = Path(self.run_dir or trainer.default_root_dir)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        driver = Driver.of(trainer)
        store = TrajectoryStore(
            run_dir, rows_per_chunk=driver.chunk, rank=trainer.global_rank, metrics=metric_identity(callbacks)
        )
        check_same_metrics(run_dir, callbacks)
        if self.add:
            if any(entry.status == "done" for entry in Ledger(run_dir).entries()):
                store.check_metadata()
            return store
        if step == 0 and store.exists:
            raise InputError(f"{run_dir} already holds a run's trajectory. Fix: use another run directory.")
        if step > 0:
            store.go_on(step, filter(driver.is_scheduled, range(self._rows_from, step)))
        return store

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store; raises as :meth:`check`."""
        self._store = self.check(trainer, trainer.global_step if trainer.state.fn == "fit" else 0)

    def consume(self, rows: Rows) -> None:
        """Append one chunk.

        Raises:
            TakenAwayError: The run directory or its trajectory was removed, or another process writes into it.
        """
        assert self._store is not None
        self._store.append(rows, self.include)
