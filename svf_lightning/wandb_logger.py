"""W&B as a view of the run: it may fail, the training goes on."""

from __future__ import annotations

import netrc
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from svf_lightning.arguments import dotted
from svf_lightning.trajectory import has_trajectory
from svf_lightning.wandb_media import media, trajectory_artifact

STEP_METRIC = "trainer/global_step"
_SUMMARIES = "last,min,max"


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
        if os.environ.get("WANDB_SWEEP_ID"):
            # an agent's trial: the sweep has decided which run of which project this is
            run_id = project = entity = group = None  # type: ignore[assignment]
        super().__init__(
            name=name,
            save_dir=save_dir,
            id=run_id,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            resume="allow" if run_id else None,
        )
        self._wandb_init.pop("anonymous", None)  # Lightning still passes it; wandb warns about it
        self._mode = mode or _mode_from_environment()
        self._quiet = quiet
        self._logs_media, self._logs_trajectory = log_media, log_trajectory
        self._defined: set[str] = set()
        self._complained = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; a disabled one if W&B cannot start."""
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

    def log_media(self, found: Mapping[str, Any], step: int) -> None:
        """Log W&B's objects (:func:`svf_lightning.wandb_media.media`) at a training step."""
        self._guard(lambda: self._log_media(found, step))

    def _log_media(self, found: Mapping[str, Any], step: int) -> None:
        for name in found:
            self.experiment.define_metric(name, step_metric=STEP_METRIC)
        self.experiment.log({**found, STEP_METRIC: step})

    def log_trajectory(self, run_dir: Path) -> None:
        """Store the trajectory of a run directory as an artifact."""
        self._guard(lambda: self.experiment.log_artifact(trajectory_artifact(run_dir, self.experiment.id)))

    def finalize(self, status: str) -> None:
        """End the W&B run, and say where it is."""
        if self._experiment is None:
            return
        run = self._experiment
        if isinstance(run, _DummyExperiment):
            self._experiment = None
            return
        run_dir = Path(self._save_dir or ".")
        if status == "success" and has_trajectory(run_dir) and not getattr(run, "disabled", False):
            if self._logs_media:
                self._guard(lambda: self._log_media(*media(run_dir)))
            if self._logs_trajectory:
                self.log_trajectory(run_dir)
        offline_dir = Path(run.dir).parent if getattr(run, "offline", False) else None
        self._guard(lambda: run.finish(exit_code=0 if status == "success" else 1))
        self._experiment = None
        if offline_dir is not None and not self._quiet and not getattr(run, "disabled", False):
            say(f"W&B: kept offline; to upload it: wandb sync {_shortest(offline_dir)}")

    def _log(self, metrics: Mapping[str, float], step: int | None) -> None:
        run = self.experiment
        for name in metrics.keys() - self._defined:
            run.define_metric(name, step_metric=STEP_METRIC, summary=_SUMMARIES)
            self._defined.add(name)
        run.log(dict(metrics) if step is None else {**metrics, STEP_METRIC: step})

    def _begin(self) -> Any:
        settings = {"silent": True, "console": "off", "init_timeout": 30.0}
        if self._quiet:  # a trial among many: its sweep keeps the list of packages, once (requirements.txt)
            settings["x_save_requirements"] = False
        modes = list(dict.fromkeys([self._mode, "offline", "disabled"]))
        if self._mode == "disabled":
            modes = ["disabled"]
        for mode in modes:
            try:
                import wandb

                Path(self._save_dir or ".").mkdir(parents=True, exist_ok=True)
                run = wandb.init(**self._wandb_init, mode=mode, settings=settings, reinit="create_new")
                run.define_metric(STEP_METRIC, hidden=True)
                if mode == "online" and not self._quiet:
                    say(f"W&B: {run.url}")
                return run
            except Exception as error:
                self._complain(error)
        return _DummyExperiment()

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"W&B: not available ({reason}); the run goes on, its run directory has everything")


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


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
