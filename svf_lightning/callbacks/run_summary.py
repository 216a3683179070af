"""RunSummary: summary.json, the verdict on the preset's claims, and the closing table."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.base import RowSink, Status, quantities_of
from svf_lightning.rows import Rows, scalar_variables
from svf_lightning.run.changes import changes_of, sizes_of
from svf_lightning.run.claims import Claim, Verdict
from svf_lightning.run.closing import print_all, print_brief
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.settings import Experiment, Run
from svf_lightning.run.summary import Result, details, ends, summarize
from svf_lightning.trajectory import has_trajectory


class RunSummary(RowSink):
    """Writes ``summary.json`` into the run directory and prints what was found, however the run ends.

    On the command line that is brief, and all of it with ``--verbose``; a trainer of your own prints all.

    Final values are those of the last captured step. ``dynamics/t_align`` and its like (training steps, see
    :func:`svf_lightning.metrics.time_of_change`) come from the trajectory, so they are right after a resume too; they
    are missing without a TrajectoryWriter, and null where the change did not happen: their mean, min and max are over
    the instances in which it did, and ``happened`` says how many these are.

    Args:
        experiment: Name of the experiment; empty for that of the run.
        claims: What the paper says, to be computed from this run; null for those of the run.
        run_dir: Directory of the summary; null for the trainer's default_root_dir.
    """

    def __init__(self, experiment: str = "", claims: list[Claim] | None = None, run_dir: str | None = None) -> None:
        self.experiment = Experiment(experiment, claims=claims or [])
        self.run_dir = run_dir
        self.verdicts: list[Verdict] = []
        self._is_brief = False
        self._last: Rows | None = None
        self._start = time.monotonic()

    def join(self, run: Run) -> None:
        """Take name and claims of the run's experiment; an evaluation of a checkpoint has none to judge."""
        claims = self.experiment.claims or (run.experiment.claims if run.command in ("fit", "replay") else [])
        self._is_brief = not run.verbose
        self.experiment = replace(run.experiment, name=self.experiment.name or run.experiment.name, claims=claims)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        super().setup(trainer, pl_module, stage)
        self._start, self._last = time.monotonic(), None

    def consume(self, rows: Rows) -> None:
        """Remember the last rows."""
        self._last = rows

    def finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """Summarize the run."""
        if not trainer.is_global_zero:
            return
        result = self._result(trainer, pl_module, status)
        self.verdicts = summarize(Path(self.run_dir or trainer.default_root_dir), self.experiment, result)
        if at_the_end := result.changes_to_log():
            for logger in trainer.loggers:
                logger.log_metrics(at_the_end, step=result.steps)
        show = print_brief if self._is_brief else print_all
        show(self.experiment, result, self.verdicts)

    def _result(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> Result:
        """What the run measured at its ends, from the last rows and from the trajectory."""
        quantities = quantities_of(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        seconds = time.monotonic() - self._start
        rows, run_dir = self._last, self.run_dir or trainer.default_root_dir
        names = sorted({name for claim in self.experiment.claims for name in claim.names()})
        last = Result.of_rows(rows, names) if rows is not None else Result()
        last = replace(last, status=status, seconds=seconds, quantities=quantities)
        if not has_trajectory(run_dir):  # there was no TrajectoryWriter
            return replace(last, first={}, details={})
        trajectory = open_sound(run_dir)
        scalars, steps = scalar_variables(trajectory), trajectory["step"].values
        batch_dims = trajectory.attrs["batch_dims"]
        first, final = ends(scalars, batch_dims)
        # an earlier call, or another device, may have measured the last step
        is_last = rows is not None and steps[-1] == rows.steps[-1]
        held = {name: trajectory[name] for name in names if name in trajectory and "step" in trajectory[name].dims}
        result = replace(
            last,
            first=first,
            last=dict(last.last if is_last else final),
            batch_dims=batch_dims,
            sizes=sizes_of(trajectory),
            details=details({name: (variable.dims[1:], variable) for name, variable in held.items()}, batch_dims),
        )
        if trainer.state.fn != "fit":
            return replace(result, steps=int(steps[-1]))
        return result.with_changes(changes_of(trajectory, quantities))
