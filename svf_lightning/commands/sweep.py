"""``python -m svf_lightning sweep FILE``: every trial of a W&B sweep file, with or without the W&B cloud."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock, Timeout

from svf_lightning.arguments import dotted
from svf_lightning.cli import FitSettings
from svf_lightning.commands.report import report_sweep
from svf_lightning.errors import InputError, bad_value, one_line, reason
from svf_lightning.files import write_text
from svf_lightning.run.directory import check_free, read_config
from svf_lightning.run.lineage import described, differences
from svf_lightning.sweep.backlog import Backlog
from svf_lightning.sweep.cohort import clear_drafts, group_trials
from svf_lightning.sweep.engines import (
    KILLED,
    Outcome,
    Workers,
    default_memory_bytes,
    run_local,
    run_ray,
    why_it_failed,
)
from svf_lightning.sweep.file import SweepFile, read_sweep
from svf_lightning.sweep.results import ERROR, TRIALS, Sweep, is_sweep, read_result
from svf_lightning.sweep.trial import Trial
from svf_lightning.terminal import say

_RUNS = Path("runs/sweeps")
_LOG = "log.txt"
_AT_ONCE = 4  # trials whose settings are resolved in one call
_GB = 1e9


def sweep(
    file: str,
    engine: Literal["local", "ray"] = "local",
    jobs: int | None = None,
    dry_run: bool = False,
    sweep_dir: str | None = None,
    count: int | None = None,
    seed: int = 0,
    cohorts: bool = True,
    memory_gb: float | None = None,
    ray_address: str | None = None,
    ray_cpus: float = 1.0,
    ray_gpus: float = 0.0,
) -> tuple[Path | None, int]:
    """Run every trial of a W&B sweep file; call it again to go on.

    Finished trials are not run again, failed and missing ones are. Trials that differ in no shape train together.

    Args:
        file: W&B sweep file, grid or random search, whose command is ``python -m svf_lightning fit ...``.
        engine: "local": processes of this machine; "ray": tasks of a Ray cluster.
        jobs: Cohorts that train at the same time, each with its share of the cores; null for one per core.
        dry_run: Print the trials, and do nothing.
        sweep_dir: Directory of the sweep; null for runs/sweeps/<name>.
        count: Number of trials; null for the file's run_cap, or all of a grid.
        seed: Seed of random search.
        cohorts: Train trials that differ in no shape side by side, in one program; with false, each alone.
        memory_gb: Memory that one cohort may take; null for half of what is free, shared among the jobs.
        ray_address: Address of the Ray cluster; null starts one on this machine.
        ray_cpus: Cores of one cohort, with Ray.
        ray_gpus: GPUs of one cohort, with Ray.

    Returns:
        The sweep's directory (None for a dry run), and the exit code: 0, or 1 if a trial failed.

    Raises:
        InputError: The file or an option cannot be used.
    """
    for name, value in (("jobs", jobs), ("count", count), ("memory_gb", memory_gb)):
        if value is not None and not 0 < value < math.inf:
            raise bad_value(name, value, "a number > 0", f"change --{name}")
    for name, value in (("seed", seed), ("ray_cpus", ray_cpus), ("ray_gpus", ray_gpus)):
        if not 0 <= value < math.inf:
            raise bad_value(name, value, "a number >= 0", f"change --{name}")
    read = read_sweep(file)
    trials = read.trials(count=count, seed=seed)
    folder = Path(sweep_dir) if sweep_dir else _RUNS / read.folder
    if dry_run:
        _print_trials(read, trials)
        return None, 0
    with _locked(folder):
        _check_same_settings(replace(trial, run_dir=folder / TRIALS / trial.id) for trial in trials)
        _begin(read, trials, folder)
        known = Sweep(folder)
        left = [trial for trial in known.trials if known.state(trial) != "done"]
        say(f"{read.name}: {len(trials)} trials, {len(trials) - len(left)} done before, {len(left)} to run")
        for trial in left:
            if trial.folder.is_symlink():
                trial.folder.unlink()  # what it leads to is not the sweep's
        n_jobs = jobs or os.cpu_count() or 1
        memory = memory_gb * _GB if memory_gb else default_memory_bytes(n_jobs if engine == "local" else 1)
        log = folder / _LOG

        def cohorts_of(ready: Sequence[Trial]) -> list[list[Trial]]:
            return group_trials(ready, memory_bytes=memory, n_workers=n_jobs, merge=cohorts)

        try:
            with Workers(min(n_jobs, max(1, len(left)))) as workers:
                ready = _resolved(left, workers)
                if engine == "local":
                    _follow(run_local(cohorts_of(ready), workers, log=log), n_trials=len(ready))
            if engine == "ray" and ready:
                running = run_ray(cohorts_of(ready), address=ray_address, cpus=ray_cpus, gpus=ray_gpus, log=log)
                _follow(running, n_trials=len(ready))
        finally:  # also after Ctrl-C
            _end(folder)
    after = Sweep(folder)
    n_failed = sum(after.state(trial) != "done" for trial in after.trials)
    return folder, int(n_failed > 0)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of the directory, which would delete what this one trains; a process that ends lets go.

    Raises:
        InputError: A sweep is running there, or it is no place for one.
    """
    if not is_sweep(folder):
        check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as held:
        raise bad_value("sweep_dir", str(folder), "a directory that no sweep runs in", "wait for its end") from held
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _check_same_settings(trials: Iterable[Trial]) -> None:
    """Check that a sweep goes on with the settings that it began with: files that it names may have changed.

    What is the same in all trials is looked at in one that is done.

    Raises:
        InputError: Its settings were other ones.
    """
    done = next((trial for trial in trials if read_result(trial).state == "done"), None)
    if done is None:
        return
    before, now = read_config(done.folder), yaml.safe_load(_fit_settings().of(done.args[1:]))
    said, steps = dotted(before), "trainer.max_steps"
    # what an earlier version did not know has its default
    found = differences(before, now).items()
    differing = {name: values for name, values in found if name in said or values[0] is not None}
    if steps in said and said[steps] != dotted(now)[steps]:
        differing[steps] = (said[steps], dotted(now)[steps])
    if differing:
        raise InputError(
            f"{done.folder} was trained with other settings: {described(differing)}. Allowed in a sweep that goes on: "
            "the same settings (logging and display may differ). Fix: restore them, or choose another --sweep_dir."
        )


def _begin(read: SweepFile, trials: Sequence[Trial], folder: Path) -> None:
    """Make a directory that of the sweep, and remove what processes that were killed have left in it.

    Raises:
        InputError: It cannot be written.
    """
    # W&B makes this list for every run, which is too slow for hundreds of trials in one environment
    packages = sorted({f"{package.name}=={package.version}" for package in distributions()})
    try:
        (folder / TRIALS).mkdir(exist_ok=True)
        clear_drafts(folder / TRIALS)
        if (log := folder / _LOG).is_symlink():
            log.unlink()  # what it leads to would be appended to
        write_text(folder / "sweep.yaml", read.text)
        write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
        Sweep.write_index(folder, read.name, read.metric, trials)
    except OSError as error:
        raise _not_writable(folder, error) from error


def _end(folder: Path) -> None:
    """The page and the tables. Whatever goes wrong with them, the trials are whole."""
    try:
        clear_drafts(folder / TRIALS)
        report_sweep(folder)
    except Exception as error:
        say(f"report.html was not written ({one_line(error)}); to try again: python -m svf_lightning report {folder}")


def _not_writable(folder: Path, error: OSError) -> InputError:
    allowed, fix = f"a directory that can be written ({reason(error)})", "choose another --sweep_dir"
    return bad_value("sweep_dir", str(folder), allowed, fix)


def _resolved(trials: Sequence[Trial], workers: Workers) -> list[Trial]:
    """The trials with their settings; those that cannot be used are recorded as failed."""
    parts = [trials[i : i + _AT_ONCE] for i in range(0, len(trials), _AT_ONCE)]
    ready: dict[str, Trial] = {}
    for done in workers.run(_resolve, Backlog(parts, memory=lambda trial: 0.0)):
        settings = done.result or [("", KILLED)] * len(done.cohort)
        for trial, (config, error) in zip(done.cohort, settings, strict=True):
            if error is None:
                ready[trial.id] = replace(trial, config=config)
            else:
                _record(trial, error)
                say(f"failed: {trial.name}: {error}")
    return [ready[trial.id] for trial in trials if trial.id in ready]


def _resolve(trials: Sequence[Trial]) -> list[tuple[str, str | None]]:
    """The settings that trials' arguments stand for, YAML, or one line that says why they cannot be used."""
    settings: list[tuple[str, str | None]] = []
    for trial in trials:
        try:
            settings.append((_fit_settings().of(trial.args[1:]), None))
        except BaseException as error:
            settings.append(("", why_it_failed(error)))
    return settings


def _record(trial: Trial, error: str) -> None:
    """Keep why a trial failed in its directory, if it can be written."""
    try:
        if trial.folder.is_symlink() or trial.folder.is_file():
            trial.folder.unlink()
        write_text(trial.folder / ERROR, f"{error}\n")
    except OSError as unwritable:
        say(f"{trial.folder} cannot be written ({reason(unwritable)})")


@cache
def _fit_settings() -> FitSettings:
    """The parser, once for each process."""
    return FitSettings()


def _follow(outcomes: Iterator[Outcome], *, n_trials: int) -> None:
    """A progress bar over the trials; failures are recorded, and said when they happen."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=n_trials)
        for cohort, error in outcomes:
            progress.advance(bar, len(cohort))
            if error is None:
                continue
            for trial in cohort:
                _record(trial, error)
                progress.console.print(f"failed: {trial.name}: {error}", markup=False, highlight=False)


def _print_trials(read: SweepFile, trials: Sequence[Trial]) -> None:
    from shlex import join

    for trial in trials:
        print(join(["python", "-m", "svf_lightning", *trial.args]))  # noqa: T201
    say(f"{read.name}: {len(trials)} trials, {len({trial.cell for trial in trials})} cells")
