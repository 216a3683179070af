"""RunSummary: summary.json, the verdict on the preset's claims, and the closing table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from svf_lightning.callbacks.capture import Capture
from svf_lightning.claims import Claim, Verdict
from svf_lightning.rows import is_detail
from svf_lightning.summary import (
    DYNAMICS,
    dynamics,
    dynamics_to_log,
    first_and_last,
    mean_min_max,
    per_instance,
    summarize,
)
from svf_lightning.trajectory import has_trajectory, open_trajectory

_IN_TABLE = (
    "loss/total",
    "spectrum/sigma_1",
    "spectrum/sigma_ratio",
    "spectrum/target_spearman",
    "alignment/matched",
    "alignment/matched_min",
    "alignment/subspace",
    "alignment/unwhitened",
    "alignment/nearest_left",
    "alignment/nearest_right",
    "alignment/nearest_random",
    "alignment/nearest_unwhitened_left",
    "alignment/nearest_unwhitened_right",
    "alignment/nearest_unwhitened_random",
    "orthogonality/interference",
    "alignment/logit_fidelity",
    "orthogonality/attended_vs_rest",
    "orthogonality/rest_vs_rest",
    "orthogonality/dimensionality",
    "orthogonality/antipodal",
    *DYNAMICS,
)
_PREFIXES_IN_TABLE = ("theory", "sharing", "heads", "sad", "causal")


class RunSummary(Callback):
    """Writes ``summary.json`` into the run directory and prints the closing table, however the run ends.

    Final values are those of the last captured step. ``dynamics/t_align`` and ``dynamics/t_ortho`` (training steps, see
    :func:`svf_lightning.metrics.time_of_change`) come from the trajectory, so they are right after a resume too; they
    are missing without a TrajectoryWriter, and null where nothing changed.

    Args:
        experiment: Name of the experiment.
        claims: What the paper says, to be computed from this run.
        run_dir: Directory of the summary; null for the trainer's default_root_dir.
    """

    def __init__(self, experiment: str = "", claims: list[Claim] | None = None, run_dir: str | None = None) -> None:
        self.experiment, self.claims, self.run_dir = experiment, claims or [], run_dir
        self.verdicts: list[Verdict] = []
        self._start = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        Capture.of(trainer)
        self._start = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize a training."""
        Capture.of(trainer).on_train_end(trainer, pl_module)  # whatever the order of the callbacks; once
        self._write(trainer, "finished")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize an evaluation."""
        Capture.of(trainer).on_test_end(trainer, pl_module)
        self._write(trainer, "finished")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize an evaluation (stand-alone validation only)."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Summarize what there is."""
        capture = Capture.of(trainer)
        capture.on_exception(trainer, pl_module, exception)
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if capture.last is not None:  # otherwise the run never began
            self._write(trainer, "interrupted" if stopped else "failed")

    def _write(self, trainer: Trainer, status: str) -> None:
        first, metrics = self._measured(trainer)
        summary, self.verdicts = summarize(
            Path(self.run_dir or trainer.default_root_dir),
            experiment=self.experiment,
            claims=self.claims,
            status=status,
            steps=self._last_step(trainer),
            seconds=time.monotonic() - self._start,
            first=first,
            metrics=metrics,
            settings=self._settings(trainer),
            batch_dims=self._batch_dims(trainer),
        )
        at_the_end = dynamics_to_log(metrics)
        if at_the_end:
            for logger in trainer.loggers:
                logger.log_metrics(at_the_end, step=summary["steps"])
        self._print(trainer, status, metrics, summary)

    def _batch_dims(self, trainer: Trainer) -> tuple[str, ...]:
        last = Capture.of(trainer).last
        return ("instance",) if last is None else last.batch_dims

    def _last_step(self, trainer: Trainer) -> int:
        run_dir = self.run_dir or trainer.default_root_dir
        captured = [int(rows.steps[-1]) for rows in [Capture.of(trainer).last] if rows is not None]
        if trainer.state.fn != "fit" and has_trajectory(run_dir):
            captured.append(int(open_trajectory(run_dir)["step"].values[-1]))
        return max(captured, default=0)

    def _settings(self, trainer: Trainer) -> dict[str, np.ndarray]:
        """What the instances differ in, so that a claim can be about some of them (``among: lambda_attn >= 1``)."""
        last = Capture.of(trainer).last
        return {name: values for name, (dims, values) in (last.coords if last else {}).items() if dims == ("instance",)}

    def _measured(self, trainer: Trainer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Values of the first step (from the trajectory) and of the last one, with the dynamics between them."""
        last = Capture.of(trainer).last
        first: dict[str, np.ndarray] = {}
        metrics: dict[str, np.ndarray] = {}
        if last is not None:
            metrics = {name: per_instance(v[-1:], last.batch_dims)[0] for name, v in last.scalars().items()}
        run_dir = self.run_dir or trainer.default_root_dir
        if not has_trajectory(run_dir):  # no TrajectoryWriter
            return first, metrics
        trajectory = open_trajectory(run_dir)
        batch_dims = trajectory.attrs["batch_dims"]
        scalars = {
            str(name): variable
            for name, variable in trajectory.data_vars.items()
            if variable.dims[1:] == batch_dims[: variable.ndim - 1] and variable.dtype.kind in "biuf"
        }
        first, final = first_and_last(scalars, batch_dims)
        steps = trajectory["step"].values
        if last is None or steps[-1] != last.steps[-1]:
            metrics = final  # the last step was measured earlier, or by another device
        if trainer.state.fn == "fit":
            metrics |= dynamics(scalars, steps, batch_dims)
        return first, metrics

    def _print(self, trainer: Trainer, status: str, metrics: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        if not trainer.is_global_zero:
            return
        console = Console()
        n = max((len(v) for v in metrics.values()), default=0)
        table = Table(title=f"{self.experiment}: {status} at step {summary['steps']:,}", title_justify="left")
        table.add_column("metric", overflow="fold")
        for column in ("mean", "min", "max") if n > 1 else ("value",):
            table.add_column(column, justify="right", no_wrap=True)
        extra = [n for n in sorted(metrics) if n.split("/")[0] in _PREFIXES_IN_TABLE and not is_detail(n)]
        for name in (*_IN_TABLE, *extra):
            if name in metrics:
                values = metrics[name]
                one = len(values) == 1
                shown = values[:1] if one else mean_min_max(values, self._batch_dims(trainer))
                table.add_row(name, *(_number(v) for v in shown))
        console.print(table)
        if n > 1:
            what = "instances" if self._batch_dims(trainer)[:1] == ("instance",) else "heads"
            console.print(Text(f"mean, min and max over {n} {what}"), style="dim")
        if not self.verdicts:
            return
        claims = Table(title="What the paper claims, and what this run measured", title_justify="left")
        claims.add_column("claim")
        claims.add_column("paper", no_wrap=True)
        claims.add_column("measured", justify="right", no_wrap=True)
        claims.add_column("needed", no_wrap=True)
        claims.add_column("holds", no_wrap=True)
        for v in self.verdicts:
            holds = Text("yes", style="green") if v.holds else Text("NO", style="bold red")
            if v.holds is None:
                holds = Text("?")
            measured = "not measured" if v.measured is None else _number(v.measured)
            claims.add_row(Text(v.claim), Text(v.figure), measured, Text(v.needed), holds)
        console.print(claims)


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
