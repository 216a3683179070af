"""``python -m svf_lightning sweep FILE``: every trial of a W&B sweep file, with or without the W&B cloud."""

from __future__ import annotations

import fcntl
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from svf_lightning.arguments import parsed
from svf_lightning.errors import InputError, bad_value
from svf_lightning.run_dir import check_free, write_json, write_text
from svf_lightning.sweep.cohort import Member, group_members
from svf_lightning.sweep.engines import Outcome, default_memory_bytes, run_local, run_ray, worker_pool
from svf_lightning.sweep.file import SweepFile, Trial, read_sweep
from svf_lightning.sweep.results import ERROR, INDEX, TRIALS, Sweep, report_sweep

if TYPE_CHECKING:
    from svf_lightning.cli import FitSettings

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
    known = Sweep(folder)
    left = [trial for trial in trials if known.state(trial.id) != "done"]
    _say(f"{read.name}: {len(trials)} trials, {len(trials) - len(left)} done before, {len(left)} to run")
    n_jobs = jobs or os.cpu_count() or 1
    memory = memory_gb * _GB if memory_gb else default_memory_bytes(n_jobs if engine == "local" else 1)
    log = folder / "log.txt"

    def cohorts_of(members: Sequence[Member]) -> list[list[Member]]:
        return group_members(members, memory_bytes=memory, n_workers=n_jobs, merge=cohorts)

    try:
        with worker_pool(min(n_jobs, max(1, len(left)))) as pool:
            members = _members(left, read, folder, pool)
            if engine == "local":
                _follow(run_local(cohorts_of(members), pool, jobs=n_jobs, log=log), n_trials=len(members))
        if engine == "ray" and members:
            running = run_ray(cohorts_of(members), address=ray_address, cpus=ray_cpus, gpus=ray_gpus, log=log)
            _follow(running, n_trials=len(members))
    finally:  # also after Ctrl-C
        report_sweep(folder)
        lock.close()
    found = Sweep(folder)
    n_failed = sum(found.state(trial.id) != "done" for trial in trials)
    return folder, int(n_failed > 0)


def _lock(folder: Path) -> IO[str]:
    """Keep a second sweep out of the directory, which would delete what this one trains; a process that ends lets go.

    Raises:
        InputError: A sweep is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as held:
        file.close()
        raise bad_value("sweep_dir", folder, "a directory that no sweep runs in", "wait for its end") from held
    return file


def _members(
    trials: Sequence[Trial], read: SweepFile, folder: Path, pool: ProcessPoolExecutor | None = None
) -> list[Member]:
    """The trials with their settings resolved; those that cannot be used are recorded as failed."""
    args = [trial.args[1:] for trial in trials]
    resolved = map(_resolve, args) if pool is None else pool.map(_resolve, args, chunksize=4)
    members: list[Member] = []
    for trial, (config, error) in zip(trials, resolved, strict=True):
        run_dir = folder / TRIALS / trial.id
        if error is None:
            members.append(Member(trial.id, run_dir, config, trial.label or trial.id, read.name))
        else:
            write_text(run_dir / ERROR, f"{error}\n")
    return members


def _resolve(args: Sequence[str]) -> tuple[str, str | None]:
    """The settings that a trial's arguments stand for, YAML, or one line that says why they cannot be used."""
    try:
        return _fit_settings().of(args), None
    except (InputError, ArgumentError) as error:
        return "", " ".join(str(error).split())


@cache
def _fit_settings() -> FitSettings:
    from svf_lightning.cli import FitSettings

    return FitSettings()


def sweep_command(args: Sequence[str]) -> tuple[Path | None, int]:
    """``sweep`` with its arguments.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: The file or an option cannot be used.
    """
    return sweep(**parsed(sweep, args))


def _write_index(read: SweepFile, trials: Sequence[Trial], folder: Path) -> None:
    write_text(folder / "sweep.yaml", read.text)
    entries = [
        {"id": t.id, "label": t.label, "values": dict(t.values), "varied": t.varied, "args": t.args} for t in trials
    ]
    # W&B keeps this list with every run; for hundreds of trials of one environment it takes too long to make
    packages = sorted({f"{package.name}=={package.version}" for package in distributions()})
    write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
    write_json(folder / INDEX, {"name": read.name, "metric": read.metric, "trials": entries})


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
            for member in cohort:
                write_text(member.run_dir / ERROR, f"{error}\n")
                progress.console.print(f"failed: {member.name}: {error}", markup=False, highlight=False)


def _print_trials(read: SweepFile, trials: Sequence[Trial]) -> None:
    from shlex import join

    for trial in trials:
        print(join(["python", "-m", "svf_lightning", *trial.args]))  # noqa: T201
    _say(f"{read.name}: {len(trials)} trials, {len({trial.cell for trial in trials})} cells")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
