"""RunSummary: summary.json, the verdict on the preset's claims, and the closing table."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.base import RowSink, Status, quantities_of
from svf_lightning.rows import Rows, scalar_variables
from svf_lightning.run.changes import changes_of, sizes_of
from svf_lightning.run.claims import Claim, Verdict, in_words
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.settings import Experiment, Run
from svf_lightning.run.summary import Result, details, ends, summarize
from svf_lightning.terminal import console
from svf_lightning.trajectory import has_trajectory

_STYLES = {"yes": "green", "no": "bold red", "open": "", "vacuous": "yellow"}
_ROOM_FOR_LABELS = 96  # a terminal with this many columns has room for labels


class RunSummary(RowSink):
    """Writes ``summary.json`` into the run directory and prints the closing table, however the run ends.

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
        self._last: Rows | None = None
        self._start = time.monotonic()

    def join(self, run: Run) -> None:
        """Take name and claims of the run's experiment; an evaluation of a checkpoint has none to judge."""
        claims = self.experiment.claims or (run.experiment.claims if run.command in ("fit", "replay") else [])
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
        self._print(result)

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

    def _print(self, result: Result) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        out = console()
        n = max((len(v) for v in result.last.values()), default=0)
        title = f"{self.experiment.name}: {result.status} at step {result.steps:,}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("metric", no_wrap=True)
        if out.width >= _ROOM_FOR_LABELS:
            table.add_column("what")
        table.add_column("unit", no_wrap=True)
        for column in ("mean", "min", "max") if n > 1 else ("value",):
            table.add_column(column, justify="right", no_wrap=True)
        for name, quantity in result.shown_in_table().items():
            shown = result.statistics(name) if len(result.last[name]) > 1 else result.last[name][:1]
            words = [name, quantity.label, quantity.unit] if out.width >= _ROOM_FOR_LABELS else [name, quantity.unit]
            table.add_row(*map(Text, words), *(_number(v) for v in shown))
        out.print(table)
        if n > 1:
            out.print(Text(f"mean, min and max over {n} {result.over}"), style="dim")
        for change in result.changes.values():
            if change.is_told and not change.happened.all():
                out.print(Text(f"{change.quantity.name}: {change.sentence().text}"), style="dim")
        if not self.verdicts:
            return
        claims = Table(title="What the paper claims, and what this run measured", title_justify="left")
        claims.add_column("claim")
        claims.add_column("paper", no_wrap=True)
        for column in ("measured [95 %]", "null", "needed"):
            claims.add_column(column)
        claims.add_column("holds", no_wrap=True)
        for v in self.verdicts:
            told = in_words(v.as_dict())
            holds = Text(told.verdict, style=_STYLES[v.verdict])
            claims.add_row(*map(Text, (v.claim, v.figure, told.measured, told.null, told.needed)), holds)
        out.print(claims)
        note = (
            f"Intervals are over {result.over}, or what else the metric is of. null: the same number where the claim "
            "must not hold; vacuous: it passes there as well, or there is nothing to judge by. The page and "
            "summary.json have the difference from the null, n, and what decided."
        )
        out.print(Text(note), style="dim")


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
