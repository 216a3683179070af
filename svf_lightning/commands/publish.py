"""``python -m svf_lightning publish RUN_DIR``: the W&B run of a run directory, made from what the directory holds."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import psutil

from svf_lightning.errors import InputError, bad_value, one_line
from svf_lightning.files import is_file
from svf_lightning.registry import known
from svf_lightning.rows import Rows
from svf_lightning.run.changes import changes_of
from svf_lightning.run.directory import CONFIG, command_of, read_config
from svf_lightning.run.identity import wandb_name
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.settings import Experiment
from svf_lightning.run.summary import read_summary
from svf_lightning.sweep.results import TRIALS, Sweep, is_sweep
from svf_lightning.terminal import say
from svf_lightning.wandb_logger import STEP_METRIC, RunLogger, is_being_logged

if TYPE_CHECKING:
    import xarray as xr

# save_dir and mode belong to this call
_FROM_CONFIG = ("project", "entity", "name", "group", "job_type", "tags", "notes", "run_id")
_BLOCK = 4096  # rows in memory at a time
_LIGHTNINGS_LOG_EVERY = 50  # what trainer.log_every_n_steps=null means
_PATIENCE = 60.0  # seconds


def publish(
    run_dir: str,
    project: str | None = None,
    entity: str | None = None,
    mode: Literal["online", "offline"] | None = None,
    media: bool = True,
    trajectory: bool = False,
) -> Path:
    """Make the W&B run of a run directory: of a run that was offline, was interrupted, or was not logged at all.

    The W&B run has what the run itself would have logged: the settings, and mean, min and max of every metric at the
    same training steps; for a fit also dynamics/...; figures, and tables of claims, pairs and heads. All of it is
    read from config.yaml, the trajectory and summary.json. A trial of a sweep joins the sweep's group.

    A second call adds nothing twice, as the W&B run has the id that the run itself gives it, the directory's name.
    Offline, the new W&B run replaces those with this id in RUN_DIR/wandb, once it is whole. Online, W&B is first asked
    which training steps it has, and only the others are sent.

    What it cannot do: a metric that is not in the trajectory (left out by TrajectoryWriter's `include`, or logged past
    the metric callbacks) is not published; host, duration and system metrics are those of publishing; `wandb sync`
    appends, so what was uploaded once should go on with --mode=online; steps that were sent a few seconds ago may not
    be known to W&B yet; a run that a W&B agent started has an id of the sweep's, and is published under another one.

    Args:
        run_dir: A run directory; the run must have ended.
        project: W&B project; null for the one in the run's settings, else svf-lightning.
        entity: W&B user or team; null for the one in the run's settings, else the account's default.
        mode: "online" or "offline"; null: what WANDB_MODE says, else online if there is an API key.
        media: Log figures and tables.
        trajectory: Store the trajectory as an artifact; the same one again is not stored twice.

    Returns:
        The run directory.

    Raises:
        InputError: There is no run in the directory or nothing captured, the run is still being logged, or W&B cannot
            be reached.
    """
    if os.environ.get("WANDB_SWEEP_ID"):  # RunLogger would use the trial's id
        raise InputError("publish does not work inside a trial of a W&B agent. Fix: unset WANDB_SWEEP_ID.")
    run = _Run.read(Path(run_dir))
    settings = run.logger_settings()
    settings |= {name: value for name, value in (("project", project), ("entity", entity)) if value is not None}
    logger = _Publisher(**settings, save_dir=str(run.path), mode=mode, log_media=False)
    earlier = _offline_runs(run.path, settings["run_id"])
    if is_being_logged(run.path):
        raise bad_value("run_dir", run_dir, "a run that has ended", "wait for its end, it is being logged")
    if logger.is_online:
        _send(run, logger, media=media, trajectory=trajectory)
        return Path(run_dir)
    if any(any(folder.glob("*.wandb.synced")) for folder in earlier):
        say("W&B: this run was uploaded before; `wandb sync` would append to it, --mode=online adds what is missing")
    _wait_for_a_new_name(earlier, settings["run_id"])
    try:
        _send(run, logger, media=media, trajectory=trajectory)
    except BaseException:
        for folder in _offline_runs(run.path, settings["run_id"]):
            if folder not in earlier:  # an incomplete run; the earlier ones stay
                shutil.rmtree(folder, ignore_errors=True)
        raise
    new = set(_offline_runs(run.path, settings["run_id"])) - set(earlier)
    if new and all(map(_becomes_whole, new)):  # otherwise W&B wrote somewhere else, or hangs
        for folder in earlier:
            shutil.rmtree(folder)
    return Path(run_dir)


class _Run(NamedTuple):
    """What is in a run directory."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]  # empty for a run that was killed
    trajectory: xr.Dataset

    @classmethod
    def read(cls, path: Path) -> _Run:
        if not is_file(path / CONFIG):
            raise bad_value(
                "run_dir", str(path), f"a directory with {CONFIG} and a trajectory, as `fit` and `replay` make it",
                "pass the directory that the run printed as its last line",
            )  # fmt: skip
        return cls(path, read_config(path), read_summary(path), open_sound(path))

    @property
    def is_finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def command(self) -> str:
        """What made the run."""
        return command_of(self.path, self.config)

    def logger_settings(self) -> dict[str, Any]:
        """Arguments of the RunLogger that the run had, or would have had."""
        logger = self._part("trainer").get("logger")
        loggers = logger if isinstance(logger, list) else [logger]
        ours = (one for one in loggers if isinstance(one, Mapping) and str(one.get("class_path")).endswith("RunLogger"))
        init_args = next(ours, {}).get("init_args") or {}
        given = {name: init_args[name] for name in _FROM_CONFIG if init_args.get(name)}
        return {**self._named(), **given} if not self._is_trial else {**given, **self._named()}

    @property
    def _is_trial(self) -> bool:
        """True for a trial of a sweep, which is called as its sweep says."""
        parent = self.path.absolute().parent
        return parent.name == TRIALS and is_sweep(parent.parent)

    def _named(self) -> dict[str, Any]:
        """What W&B calls the run."""
        given = self._part("experiment")
        experiment = Experiment(given.get("name") or "", tags=given.get("tags") or [])
        if not self._is_trial:
            return wandb_name(self.path, self.command, experiment)
        sweep = Sweep(self.path.absolute().parents[1])
        label = next((trial.name for trial in sweep.trials if trial.id == self.path.absolute().name), "")
        return wandb_name(self.path, self.command, experiment, sweep=sweep.name, label=label)

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(training step, metrics), as the run itself logs them."""
        trainer = self._part("trainer")
        every, last = trainer.get("log_every_n_steps"), trainer.get("max_steps")
        every = max(1, _LIGHTNINGS_LOG_EVERY if every is None else every)
        if self.command != "fit":
            every = 1  # a row is a checkpoint
        for start in range(0, self.trajectory.sizes["step"], _BLOCK):
            rows = Rows.read(self.trajectory.isel(step=slice(start, start + _BLOCK)), known(self.trajectory))
            yield from rows.to_log(every=every, last=-1 if last is None else last)

    def changes(self) -> dict[str, float]:
        """What is known at the end of a training: when quantities changed."""
        if self.command != "fit":
            return {}
        happened = changes_of(self.trajectory, known(self.trajectory))
        return {name: value for change in happened.values() for name, value in change.to_log().items()}

    def _part(self, name: str) -> Mapping[str, Any]:
        return self.config.get(name) or {}


class _Publisher(RunLogger):
    """The run's logger, whose failures are errors here: nobody is training meanwhile."""

    def _complain(self, error: Exception) -> None:
        if isinstance(error, InputError):
            raise error
        raise InputError(
            f"W&B is not available ({one_line(error)}). Allowed: an account that can write to the project, or "
            "--mode=offline. Fix: try again, or publish with --mode=offline and upload that with `wandb sync`."
        ) from error

    @property
    def is_online(self) -> bool:
        """True if W&B is asked and told directly.

        Raises:
            InputError: W&B is switched off.
        """
        if self.mode == "disabled":
            raise bad_value("WANDB_MODE", "disabled", "online or offline", "unset it, or add --mode=offline")
        return self.mode == "online"

    def steps_with(self, *names: str) -> set[int]:
        """Training steps at which W&B has these metrics already."""
        if not self.is_online:
            return set()  # an offline run starts from nothing
        try:
            import wandb

            where = (self.called["entity"], self.called["project"], self.called["run_id"])
            run = wandb.Api().run("/".join(part for part in where if part))
            rows = run.scan_history(keys=[STEP_METRIC, *names], use_cache=False)
            return {int(row[STEP_METRIC]) for row in rows}
        except Exception as error:
            if "Could not find run" not in str(error):
                self._complain(error)  # without an answer, rows might be sent twice
            return set()


def _send(run: _Run, logger: _Publisher, *, media: bool, trajectory: bool) -> None:
    """Log what W&B does not have yet."""
    at_the_end, last = run.changes(), int(run.trajectory["step"].values[-1])
    try:
        logged = logger.steps_with()
        if at_the_end and last in logger.steps_with(*at_the_end):
            at_the_end = {}
        logger.log_config(run.config)
        for step, metrics in run.rows():
            if step not in logged:
                logger.log_metrics(metrics, step=step)
        if at_the_end:
            logger.log_metrics(at_the_end, step=last)
        at_last_step = _media_of(run) if media else {}
        if at_last_step and last not in logger.steps_with(next(iter(at_last_step))):
            logger.log_media(at_last_step, last)
        if trajectory:
            logger.log_trajectory(run.path)
    except BaseException:
        with suppress(Exception):  # report the first error, not this one
            logger.finalize("failed")
        raise
    logger.finalize("success" if run.is_finished else "failed")


def _media_of(run: _Run) -> dict[str, Any]:
    """Figures and tables."""
    from svf_lightning.wandb_media import run_media  # draws with plotly

    return run_media(run.path)[0]


def _offline_runs(run_dir: Path, run_id: str) -> list[Path]:
    """Directories of W&B's offline runs with this id."""
    name = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}")
    folders = (run_dir.resolve() / "wandb").glob("offline-run-*")
    return sorted(p for p in folders if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def _is_open(folder: Path) -> bool:
    """True while W&B's process, which this one has started, writes into the directory of an offline run."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):  # the process has ended
            if any(Path(file.path).parent == folder and file.path.endswith(".wandb") for file in process.open_files()):
                return True
    return False


def _becomes_whole(folder: Path) -> bool:
    """Wait for W&B's process, which writes on for a moment after a run has finished; False if it does not end."""
    deadline = time.monotonic() + _PATIENCE
    while _is_open(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _wait_for_a_new_name(earlier: Sequence[Path], run_id: str) -> None:
    """W&B names directories by the second."""
    while any(folder.name == f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}" for folder in earlier):
        time.sleep(0.05)
