"""``python -m svf_lightning sweep FILE``: every trial of a W&B sweep file, with or without the W&B cloud."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from svf_lightning.errors import InputError, bad_value
from svf_lightning.run_dir import check_free, write_json, write_text
from svf_lightning.sweep.cohort import Member, group_members
from svf_lightning.sweep.engines import Outcome, default_memory_bytes, run_local, run_ray
from svf_lightning.sweep.file import SweepFile, Trial, read_sweep
from svf_lightning.sweep.results import ERROR, INDEX, TRIALS, Sweep, report

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
) -> tuple[Path, int]:
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
        The sweep's directory, and the exit code: 0, or 1 if a trial failed.

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
        return folder, 0
    if not (folder / INDEX).is_file():
        check_free(folder)
    _write_index(read, trials, folder)
    known = Sweep(folder)
    left = [trial for trial in trials if known.state(trial.id) != "done"]
    members = _members(left, read, folder)
    n_done = len(trials) - len(left)
    _say(f"{read.name}: {len(trials)} trials, {n_done} done before, {len(members)} to run")
    n_jobs = jobs or os.cpu_count() or 1
    memory = memory_gb * _GB if memory_gb else default_memory_bytes(n_jobs if engine == "local" else 1)
    grouped = group_members(members, memory_bytes=memory, n_workers=n_jobs, merge=cohorts)
    log = folder / "log.txt"
    if not grouped:
        outcomes: Iterator[Outcome] = iter(())
    elif engine == "ray":
        outcomes = run_ray(grouped, address=ray_address, cpus=ray_cpus, gpus=ray_gpus, log=log)
    else:
        outcomes = run_local(grouped, jobs=min(n_jobs, len(grouped)), log=log)
    try:
        _follow(outcomes, n_trials=len(members), n_cohorts=len(grouped))
    finally:  # also after Ctrl-C
        found = report(folder)
    n_failed = sum(found.state(trial.id) != "done" for trial in trials)
    return folder, int(n_failed > 0)


def _members(trials: Sequence[Trial], read: SweepFile, folder: Path) -> list[Member]:
    """The trials with their settings resolved; those that cannot be used are recorded as failed."""
    from svf_lightning.cli import FitSettings

    members: list[Member] = []
    settings = FitSettings() if trials else None
    for trial in trials:
        assert settings is not None
        run_dir = folder / TRIALS / trial.id
        try:
            config = settings.of(trial.args[1:])
        except (InputError, ArgumentError) as error:
            write_text(run_dir / ERROR, f"{' '.join(str(error).split())}\n")
            continue
        members.append(Member(trial.id, run_dir, config, trial.label or trial.id, read.name))
    return members


def sweep_command(args: Sequence[str]) -> tuple[Path, int]:
    """``sweep`` with its arguments.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: The file or an option cannot be used.
    """
    return sweep(**_parsed(sweep, args))


def report_command(args: Sequence[str]) -> tuple[Path, int]:
    """``report`` with its arguments.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: There is no sweep in the directory.
    """
    return report(**_parsed(report, args)).folder, 0


def _parsed(command: Callable[..., object], args: Sequence[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    name = command.__name__
    parser = ArgumentParser(prog=f"python -m svf_lightning {name}", exit_on_error=False, description=command.__doc__)
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    given = ["--dry_run=true" if arg == "--dry_run" else arg for arg in args]  # a flag, to whoever types it
    return dict(parser.parse_args(given).as_dict())


def _write_index(read: SweepFile, trials: Sequence[Trial], folder: Path) -> None:
    write_text(folder / "sweep.yaml", read.text)
    entries = [
        {"id": t.id, "label": t.label, "values": dict(t.values), "varied": t.varied, "args": t.args} for t in trials
    ]
    write_json(folder / INDEX, {"name": read.name, "metric": read.metric, "trials": entries})


def _follow(outcomes: Iterator[Outcome], *, n_trials: int, n_cohorts: int) -> None:
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
