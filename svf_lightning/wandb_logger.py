"""W&B as a view of the run: it may fail, the training goes on."""

from __future__ import annotations

import netrc
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from filelock import FileLock, Timeout
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from svf_lightning.arguments import dotted
from svf_lightning.errors import one_line
from svf_lightning.run.identity import wandb_name
from svf_lightning.run.settings import Run
from svf_lightning.terminal import say
from svf_lightning.trajectory import has_trajectory

STEP_METRIC = "trainer/global_step"
_SUMMARIES = "last,min,max"
_OF_THE_SWEEP = ("run_id", "project", "entity", "group")  # settings that a W&B agent decides for its trial


class NoRun:
    """Takes every call and does nothing: W&B could not start."""

    disabled = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


class RunLogger(WandbLogger):
    """Lightning's W&B logger, made for runs that must not depend on it.

    Inside a trial of a W&B agent, id, project, entity and group are the sweep's.

    Without an API key the run is kept offline in ``save_dir/wandb``, and one line says how to upload it. Whatever W&B
    raises is reported once and then left alone. Plots use the training step as x-axis; summaries keep the last, the
    smallest and the largest value of every metric.

    Args:
        project: W&B project.
        entity: W&B user or team; null for the account's default.
        name: Name of the run; null for the run directory's name.
        group: Group of runs, e.g. the experiment.
        job_type: What the run does, e.g. "fit".
        tags: Labels to filter by.
        notes: A sentence about the run.
        run_id: W&B's id of the run; the same id goes on with the same run.
        save_dir: Directory in which W&B makes its folder ``wandb/``.
        mode: "online", "offline" or "disabled"; null: what WANDB_MODE says, else online if there is an API key.
        quiet: Do not say where the W&B run is.
        log_media: Log figures and tables of the run directory ``save_dir`` when the run has ended well.
        log_trajectory: Store its trajectory as an artifact of the W&B run, too.
    """

    def __init__(
        self,
        project: str = "svf-lightning",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        run_id: str | None = None,
        save_dir: str = ".",
        mode: Literal["online", "offline", "disabled"] | None = None,
        quiet: bool = False,
        log_media: bool = True,
        log_trajectory: bool = False,
    ) -> None:
        super().__init__(save_dir=save_dir)
        self.called: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "job_type": job_type,
            "tags": tags,
            "notes": notes,
            "run_id": run_id,
        }
        self.directory = Path(save_dir)
        self.mode = mode or _mode_from_environment()
        self._quiet = quiet
        self._logs_media, self._logs_trajectory = log_media, log_trajectory
        self._defined: set[str] = set()
        self._complained = False
        self._lock: FileLock | None = None

    def join(self, run: Run) -> None:
        """Take from the run what was not given: id, name, group, kind, tags; and where to write."""
        named = wandb_name(run.directory, run.command, run.experiment)
        self.called |= {name: value for name, value in named.items() if not self.called[name]}
        self.directory = run.directory

    @property
    def name(self) -> str | None:
        """The project, as Lightning's logger has it."""
        project: str | None = self.called["project"]
        return project

    @property
    def version(self) -> str | None:
        """The run's id."""
        run_id: str | None = self._experiment.id if self._experiment is not None else self.called["run_id"]
        return run_id

    @property
    def save_dir(self) -> str:
        """Directory in which W&B makes its folder."""
        return str(self.directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; a disabled one if W&B cannot start."""
        # Private in Lightning, which leaves this attribute out when it pickles a logger.
        if self._experiment is None:
            self._experiment = self._begin()
        return self._experiment

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Store the resolved configuration of the run, by dotted names (``model.lambda_attn``).

        They are the names that a sweep's parameters have, so a trial's configuration has every value once.
        """
        self._guard(lambda: self.experiment.config.update(dotted(config), allow_val_change=True))

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Store hyper-parameters beside the configuration."""
        self._guard(lambda: super(RunLogger, self).log_hyperparams(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one dictionary; ``step`` is the training step."""
        self._guard(lambda: self._log(metrics, step))

    def log_media(self, media: Mapping[str, Any], step: int) -> None:
        """Log W&B's objects (:func:`svf_lightning.wandb_media.run_media`) at a training step."""
        self._guard(lambda: self._log_media(media, step))

    def _log_media(self, media: Mapping[str, Any], step: int) -> None:
        for name in media:
            self.experiment.define_metric(name, step_metric=STEP_METRIC)
        self.experiment.log({**media, STEP_METRIC: step})

    def log_trajectory(self, run_dir: Path) -> None:
        """Store the trajectory of a run directory as an artifact."""
        self._guard(lambda: self._log_trajectory(run_dir))

    def _log_trajectory(self, run_dir: Path) -> None:
        from svf_lightning.wandb_media import trajectory_artifact

        self.experiment.log_artifact(trajectory_artifact(run_dir, self.experiment.id))

    def finalize(self, status: str) -> None:
        """End the W&B run, and say where it is."""
        if self._experiment is None:
            return
        run = self._experiment
        if getattr(run, "disabled", False):
            self._experiment = None
            return
        if status == "success" and has_trajectory(self.directory):
            if self._logs_media:
                self._guard(lambda: self._log_media(*self._made_media()))
            if self._logs_trajectory:
                self.log_trajectory(self.directory)
        offline_dir = Path(run.dir).parent if getattr(run, "offline", False) else None
        self._guard(lambda: run.finish(exit_code=0 if status == "success" else 1))
        self._experiment = None
        if self._lock is not None:
            self._lock.release()
        if offline_dir is not None and offline_dir.is_dir() and not self._quiet:
            say(f"W&B: kept offline; to upload it: wandb sync {_shortest(offline_dir)}")

    def _made_media(self) -> tuple[dict[str, Any], int]:
        from svf_lightning.wandb_media import run_media  # draws with plotly

        return run_media(self.directory)

    def _log(self, metrics: Mapping[str, float], step: int | None) -> None:
        run = self.experiment
        for name in metrics.keys() - self._defined:
            run.define_metric(name, step_metric=STEP_METRIC, summary=_SUMMARIES)
            self._defined.add(name)
        run.log(dict(metrics) if step is None else {**metrics, STEP_METRIC: step})

    def _begin(self) -> Any:
        settings = {"silent": True, "console": "off", "init_timeout": 30.0}
        if self._quiet:  # a sweep keeps the list of packages once, in requirements.txt
            settings["x_save_requirements"] = False
        modes: list[Any] = (
            ["disabled"] if self.mode == "disabled" else list(dict.fromkeys([self.mode, "offline", "disabled"]))
        )
        called = dict(self.called)
        if os.environ.get("WANDB_SWEEP_ID"):
            called |= dict.fromkeys(_OF_THE_SWEEP)
        called["id"] = called.pop("run_id")
        called["resume"] = "allow" if called["id"] else None
        for mode in modes:
            try:
                import wandb

                self.directory.mkdir(parents=True, exist_ok=True)
                run = wandb.init(**called, dir=str(self.directory), mode=mode, settings=settings, reinit="create_new")
                run.define_metric(STEP_METRIC, hidden=True)
                if mode == "online" and not self._quiet:
                    say(f"W&B: {run.url}")
                if mode != "disabled":
                    self._hold_lock()
                return run
            except Exception as error:
                self._complain(error)
        return NoRun()

    def _hold_lock(self) -> None:
        """Tell other processes that this directory is being logged."""
        self._lock = _lock_of(self.directory)
        # another logger holds it, or the file system has no locks
        with suppress(Timeout, OSError, NotImplementedError):
            self._lock.acquire(timeout=0)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            say(f"W&B: not available ({one_line(error)}); the run goes on, its run directory has everything")


def is_being_logged(run_dir: Path) -> bool:
    """True while a process logs a run directory to W&B; one that was killed does not."""
    lock = _lock_of(run_dir)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks
        return False


def _lock_of(run_dir: Path) -> FileLock:
    return FileLock(run_dir / "wandb" / ".lock")


def _mode_from_environment() -> Literal["online", "offline", "disabled"]:
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return mode  # type: ignore[return-value]
    return "online" if _has_api_key() else "offline"


def _has_api_key() -> bool:
    """True if W&B would find credentials without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _shortest(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
