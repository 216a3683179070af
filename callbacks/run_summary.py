"""RunSummary: summary.json, the verdict on the preset's claims, and the closing table."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from svf_lightning.callbacks.capture import Capture, statistics
from svf_lightning.claims import Claim, Verdict, judge
from svf_lightning.metrics import time_of_change
from svf_lightning.run_dir import SUMMARY, versions, write_json
from svf_lightning.trajectory import has_trajectory, open_trajectory

# what happens when (method, section 3), by the metric whose change is timed
_DYNAMICS = {
    "dynamics/t_align": "alignment/matched",
    "dynamics/t_ortho": "orthogonality/attended_vs_rest",
}
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
    *_DYNAMICS,
)
_PREFIXES_IN_TABLE = ("theory", "sharing", "heads", "sad", "causal")
_DETAIL = re.compile(r"_sd$|_low/|_high/|^causal/.*/(1|2)$")  # in the files, not in the table


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
        dynamics = dynamics_to_log(metrics)
        if dynamics:
            for logger in trainer.loggers:
                logger.log_metrics(dynamics, step=summary["steps"])
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
            metrics = {name: _per_instance(v[-1:], last.batch_dims)[0] for name, v in last.scalars().items()}
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
        extra = [n for n in sorted(metrics) if n.split("/")[0] in _PREFIXES_IN_TABLE and not _DETAIL.search(n)]
        for name in (*_IN_TABLE, *extra):
            if name in metrics:
                values = metrics[name]
                one = len(values) == 1
                shown = values[:1] if one else _statistics(values, self._batch_dims(trainer))
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


def summarize(
    run_dir: Path,
    *,
    experiment: str,
    claims: Sequence[Claim],
    status: str,
    steps: int,
    seconds: float,
    first: Mapping[str, np.ndarray],
    metrics: Mapping[str, np.ndarray],
    settings: Mapping[str, np.ndarray],
    batch_dims: tuple[str, ...],
) -> tuple[dict[str, Any], list[Verdict]]:
    """Judge a run's claims and write its summary.json.

    Args:
        run_dir: The run directory.
        experiment: Name of the experiment.
        claims: What the paper says.
        status: "finished", "interrupted" or "failed".
        steps: Training step of the last row.
        seconds: How long the run took.
        first: Values of the first row by metric, one per instance.
        metrics: Those of the last row.
        settings: What the instances differ in.
        batch_dims: The module's own dimensions.

    Returns:
        What was written, and the verdicts.
    """
    verdicts = [judge(claim, {**settings, **metrics}, first) for claim in claims]
    summary = {
        "experiment": experiment,
        "status": status,
        "steps": steps,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "metrics": {
            name: {
                **dict(zip(("mean", "min", "max"), _statistics(values, batch_dims), strict=True)),
                "per_instance": [float(v) for v in values],
            }
            for name, values in sorted(metrics.items())
        },
        "claims": [verdict.as_dict() for verdict in verdicts],
    }
    write_json(run_dir / SUMMARY, summary)
    return summary, verdicts


def first_and_last(
    scalars: Mapping[str, Any], batch_dims: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values of the first and of the last row, one per instance, of columns [K, *batch] (anything that slices)."""
    ends = slice(None, 1), slice(-1, None)
    first, last = (
        {name: _per_instance(np.asarray(values[end]), batch_dims)[0] for name, values in scalars.items()}
        for end in ends
    )
    return first, last


def dynamics(scalars: Mapping[str, Any], steps: np.ndarray, batch_dims: tuple[str, ...]) -> dict[str, np.ndarray]:
    """``dynamics/t_align`` and ``dynamics/t_ortho`` of columns [K, *batch]: training steps, one per instance."""
    return {
        name: time_of_change(
            torch.tensor(_per_instance(np.asarray(scalars[source]), batch_dims)), torch.tensor(steps)
        ).numpy()
        for name, source in _DYNAMICS.items()
        if source in scalars
    }


def dynamics_to_log(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What loggers get of the dynamics, which are known at the end: mean, min and max over instances."""
    return {
        f"{name}{suffix}": float(of(metrics[name]))
        for name in _DYNAMICS
        if name in metrics
        for suffix, of in (("", np.mean), ("/min", np.min), ("/max", np.max))
    }


def _per_instance(values: np.ndarray, batch_dims: tuple[str, ...]) -> np.ndarray:
    """Values [K, *batch] as [K, instance], means over the other dimensions; without instances, as [K, all heads]."""
    flat = values.reshape(len(values), -1)
    if batch_dims[:1] != ("instance",) or values.ndim < 3:
        return flat
    return np.asarray(flat.reshape(len(values), values.shape[1], -1).mean(-1))


def _statistics(values: np.ndarray, batch_dims: tuple[str, ...]) -> list[float]:
    """Mean, smallest and largest of one step's values."""
    return [float(value[0]) for value in statistics(values[None], batch_dims)]


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
