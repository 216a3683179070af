"""``python -m svf_lightning sweep FILE``: every trial of a W&B sweep file, with or without the W&B cloud."""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from svf_lightning.cli import FitSettings
from svf_lightning.commands.report import report_sweep
from svf_lightning.errors import InputError, bad_value, one_line
from svf_lightning.files import write_text
from svf_lightning.run.directory import check_free
from svf_lightning.sweep.cohort import group_trials
from svf_lightning.sweep.engines import Outcome, default_memory_bytes, run_local, run_ray, worker_pool
from svf_lightning.sweep.file import SweepFile, read_sweep
from svf_lightning.sweep.results import ERROR, INDEX, TRIALS, Sweep
from svf_lightning.sweep.trial import Trial
from svf_lightning.terminal import say

_RUNS = Path("runs/sweeps")
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
        if value is not None and value <= 0:
            raise bad_value(name, value, "a number > 0", f"change --{name}")
    read = read_sweep(file)
    trials = read.trials(count=count, seed=seed)
    folder = Path(sweep_dir) if sweep_dir else _RUNS / read.name
    if dry_run:
        _print_trials(read, trials)
        return None, 0
    if not (folder / INDEX).is_file():
        check_free(folder)
    lock = _lock(folder)
    _write_index(read, trials, folder)
    trials = [replace(trial, run_dir=folder / TRIALS / trial.id) for trial in trials]
    known = Sweep(folder)
    left = [trial for trial in trials if known.state(trial) != "done"]
    say(f"{read.name}: {len(trials)} trials, {len(trials) - len(left)} done before, {len(left)} to run")
    n_jobs = jobs or os.cpu_count() or 1
    memory = memory_gb * _GB if memory_gb else default_memory_bytes(n_jobs if engine == "local" else 1)
    log = folder / "log.txt"

    def cohorts_of(ready: Sequence[Trial]) -> list[list[Trial]]:
        return group_trials(ready, memory_bytes=memory, n_workers=n_jobs, merge=cohorts)

    try:
        with worker_pool(min(n_jobs, max(1, len(left)))) as pool:
            ready = _resolved(left, pool)
            if engine == "local":
                _follow(run_local(cohorts_of(ready), pool, jobs=n_jobs, log=log), n_trials=len(ready))
        if engine == "ray" and ready:
            running = run_ray(cohorts_of(ready), address=ray_address, cpus=ray_cpus, gpus=ray_gpus, log=log)
            _follow(running, n_trials=len(ready))
    finally:  # also after Ctrl-C
        report_sweep(folder)
        lock.release()
    after = Sweep(folder)
    n_failed = sum(after.state(trial) != "done" for trial in trials)
    return folder, int(n_failed > 0)


def _lock(folder: Path) -> FileLock:
    """Keep a second sweep out of the directory, which would delete what this one trains; a process that ends lets go.

    Raises:
        InputError: A sweep is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as held:
        raise bad_value("sweep_dir", folder, "a directory that no sweep runs in", "wait for its end") from held
    return lock


def _resolved(trials: Sequence[Trial], pool: ProcessPoolExecutor) -> list[Trial]:
    """The trials with their settings; those that cannot be used are recorded as failed."""
    ready: list[Trial] = []
    settings = pool.map(_resolve, [trial.args[1:] for trial in trials], chunksize=4)
    for trial, (config, error) in zip(trials, settings, strict=True):
        if error is None:
            ready.append(replace(trial, config=config))
        else:
            write_text(trial.folder / ERROR, f"{error}\n")
    return ready


def _resolve(args: Sequence[str]) -> tuple[str, str | None]:
    """The settings that a trial's arguments stand for, YAML, or one line that says why they cannot be used."""
    try:
        return _fit_settings().of(args), None
    except (InputError, ArgumentError) as error:
        return "", one_line(error)


@cache
def _fit_settings() -> FitSettings:
    """The parser, once for each process."""
    return FitSettings()


def _write_index(read: SweepFile, trials: Sequence[Trial], folder: Path) -> None:
    write_text(folder / "sweep.yaml", read.text)
    # W&B makes this list for every run, which is too slow for hundreds of trials in one environment
    packages = sorted({f"{package.name}=={package.version}" for package in distributions()})
    write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
    Sweep.write_index(folder, read.name, read.metric, trials)


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
                write_text(trial.folder / ERROR, f"{error}\n")
                progress.console.print(f"failed: {trial.name}: {error}", markup=False, highlight=False)


def _print_trials(read: SweepFile, trials: Sequence[Trial]) -> None:
    from shlex import join

    for trial in trials:
        print(join(["python", "-m", "svf_lightning", *trial.args]))  # noqa: T201
    say(f"{read.name}: {len(trials)} trials, {len({trial.cell for trial in trials})} cells")
