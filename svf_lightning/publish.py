"""``python -m svf_lightning publish RUN_DIR``: the W&B run of a run directory, made from what the directory holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import psutil
import yaml

from svf_lightning.arguments import parsed
from svf_lightning.errors import InputError, bad_value
from svf_lightning.rows import Rows
from svf_lightning.run_dir import CONFIG, SUMMARY, command_of
from svf_lightning.summary import dynamics_of, dynamics_to_log
from svf_lightning.sweep.results import TRIALS, Sweep, is_sweep
from svf_lightning.trajectory import open_trajectory
from svf_lightning.wandb_logger import STEP_METRIC, RunLogger, say
from svf_lightning.wandb_media import media as media_of

if TYPE_CHECKING:
    import xarray as xr

_FROM_CONFIG = ("project", "entity", "name", "group", "job_type", "tags", "notes", "run_id")  # not: where and how
_BLOCK = 4096  # rows that are in memory together
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
    if os.environ.get("WANDB_SWEEP_ID"):  # RunLogger would take the trial's id
        raise InputError("publish does not work inside a trial of a W&B agent. Fix: unset WANDB_SWEEP_ID.")
    run = _Run.read(Path(run_dir))
    settings = run.logger_settings()
    settings |= {name: value for name, value in (("project", project), ("entity", entity)) if value is not None}
    logger = _Publisher(**settings, save_dir=str(run.path), mode=mode, log_media=False)
    earlier = _offline_runs(run.path, settings["run_id"])
    if any(map(_is_open, earlier)):
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
            if folder not in earlier:  # half a run; the earlier ones stay
                shutil.rmtree(folder, ignore_errors=True)
        raise
    new = set(_offline_runs(run.path, settings["run_id"])) - set(earlier)
    if new and all(map(_becomes_whole, new)):  # else W&B has put it elsewhere, or hangs
        for folder in earlier:
            shutil.rmtree(folder)
    return Path(run_dir)


def publish_command(args: Sequence[str]) -> tuple[Path, int]:
    """``publish`` with its arguments.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: The run cannot be published.
    """
    return publish(**parsed(publish, args)), 0


class _Run(NamedTuple):
    """What is in a run directory."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]  # empty for a run that was killed
    trajectory: xr.Dataset

    @classmethod
    def read(cls, path: Path) -> _Run:
        if not (path / CONFIG).is_file():
            raise bad_value(
                "run_dir", str(path), f"a directory with {CONFIG} and a trajectory, as `fit` and `replay` make it",
                "pass the directory that the run printed as its last line",
            )  # fmt: skip
        trajectory = open_trajectory(path)
        summary = {}
        try:
            config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
            if (path / SUMMARY).is_file():
                summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read ({error}). Fix: {CONFIG} or {SUMMARY} is damaged.") from error
        if not isinstance(config, Mapping):
            raise InputError(f"{path / CONFIG} holds no settings. Fix: the file is damaged; repeat the run.")
        return cls(path, config, summary, trajectory)

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
        experiment = self._part("experiment")
        name = Path(os.path.abspath(self.path)).name
        settings = {
            "run_id": name,
            "name": name,
            "group": experiment.get("name"),
            "job_type": self.command,
            "tags": experiment.get("tags"),
            **given,
        }
        return {**settings, **self._as_trial(name, experiment.get("tags") or [])}

    def _as_trial(self, name: str, tags: list[str]) -> dict[str, Any]:
        """What a sweep says about its trial."""
        parent = Path(os.path.abspath(self.path)).parent
        if parent.name != TRIALS or not is_sweep(parent.parent):
            return {}
        sweep = Sweep(parent.parent)
        label = next((trial["label"] for trial in sweep.trials if trial["id"] == name), None)
        found = {"run_id": name, "name": label or name, "group": sweep.name, "job_type": "sweep"}
        return {**found, "tags": [*tags, "sweep"]}

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(training step, metrics), as the run itself logs them."""
        trainer = self._part("trainer")
        every, last = trainer.get("log_every_n_steps"), trainer.get("max_steps")
        every = max(1, _LIGHTNINGS_LOG_EVERY if every is None else every)
        if self.command != "fit":
            every = 1  # a row is a checkpoint
        for start in range(0, self.trajectory.sizes["step"], _BLOCK):
            rows = Rows.read(self.trajectory.isel(step=slice(start, start + _BLOCK)))
            yield from rows.to_log(every=every, last=-1 if last is None else last)

    def dynamics(self) -> dict[str, float]:
        """What is known at the end of a training."""
        if self.command != "fit":
            return {}
        return dynamics_to_log(dynamics_of(self.trajectory))

    def _part(self, name: str) -> Mapping[str, Any]:
        return self.config.get(name) or {}


class _Publisher(RunLogger):
    """The run's logger, whose failures are errors here: nobody is training meanwhile."""

    def _complain(self, error: Exception) -> None:
        if isinstance(error, InputError):
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"W&B is not available ({reason}). Allowed: an account that can write to the project, or --mode=offline. "
            "Fix: try again, or publish with --mode=offline and upload that with `wandb sync`."
        ) from error

    @property
    def is_online(self) -> bool:
        """True if W&B is asked and told directly.

        Raises:
            InputError: W&B is switched off.
        """
        if self._mode == "disabled":
            raise bad_value("WANDB_MODE", "disabled", "online or offline", "unset it, or add --mode=offline")
        return self._mode == "online"

    def steps_with(self, *names: str) -> set[int]:
        """Training steps at which W&B has these metrics already."""
        if not self.is_online:
            return set()  # an offline run begins anew
        try:
            import wandb

            where = (self._wandb_init["entity"], self._wandb_init["project"], self._wandb_init["id"])
            run = wandb.Api().run("/".join(part for part in where if part))
            rows = run.scan_history(keys=[STEP_METRIC, *names], use_cache=False)
            return {int(row[STEP_METRIC]) for row in rows}
        except Exception as error:
            if "Could not find run" not in str(error):
                self._complain(error)  # without an answer, rows might come twice
            return set()


def _send(run: _Run, logger: _Publisher, *, media: bool, trajectory: bool) -> None:
    """Log what W&B does not have yet."""
    at_the_end, last = run.dynamics(), int(run.trajectory["step"].values[-1])
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
        found = media_of(run.path)[0] if media else {}
        if found and last not in logger.steps_with(next(iter(found))):
            logger.log_media(found, last)
        if trajectory:
            logger.log_trajectory(run.path)
    except BaseException:
        with suppress(Exception):  # the first one is the one to report
            logger.finalize("failed")
        raise
    logger.finalize("success" if run.is_finished else "failed")


def _offline_runs(run_dir: Path, run_id: str) -> list[Path]:
    """Directories of W&B's offline runs with this id."""
    name = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}")
    folders = (run_dir.resolve() / "wandb").glob("offline-run-*")
    return sorted(p for p in folders if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def _is_open(folder: Path) -> bool:
    """True while a W&B process writes into the directory of an offline run."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # of another user, or gone
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
