"""Where cohorts train: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from svf_lightning.errors import InputError, one_line, reason
from svf_lightning.sweep.cohort import train
from svf_lightning.sweep.trial import Trial

Cohort = Sequence[Trial]
Outcome = tuple[Cohort, str | None]  # a cohort that was tried, and why it failed

_BREAKS = 3  # worker processes that may die before the sweep gives up
_DIED = "its process was killed (out of memory?); a smaller --memory_gb makes smaller cohorts"


def attempt(trials: Cohort, log: Path | None = None) -> str | None:
    """Train a cohort; what it would print goes to a file.

    Returns:
        None, or one line that says why it failed.
    """
    with open(log or os.devnull, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            train(trials)
        except Exception as error:
            # a trial or a user's callback may raise anything; the other trials go on
            return one_line(error)
    return None


@contextmanager
def worker_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of this machine, each with its share of the cores; killed if what is done with them fails (Ctrl-C)."""
    n_threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(n_threads,)
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # on SIGTERM, Lightning would stop only after this batch
        raise
    pool.shutdown()


def run_local(cohorts: Sequence[Cohort], pool: ProcessPoolExecutor, *, jobs: int, log: Path) -> Iterator[Outcome]:
    """Train cohorts in processes of this machine.

    Args:
        cohorts: What to train.
        pool: Processes to begin with.
        jobs: How many processes to start in their place if one of them dies.
        log: File for what the trainings print.

    Yields:
        Cohorts as they end. One that failed is tried again trial by trial, so that a trial fails alone.
    """
    waiting, breaks = [list(cohort) for cohort in cohorts], 0
    with ExitStack() as stack:
        while waiting:
            running = {pool.submit(attempt, cohort, log): cohort for cohort in waiting}
            waiting, broken = [], False
            for future in as_completed(running):
                cohort = running[future]
                try:
                    error = future.result()
                except BrokenProcessPool:
                    broken = True
                    waiting += [cohort] if len(cohort) == 1 else [cohort[::2], cohort[1::2]]
                    continue
                if error is not None and len(cohort) > 1:
                    waiting += [[trial] for trial in cohort]
                else:
                    yield cohort, error
            breaks += broken
            if breaks > _BREAKS:
                for cohort in waiting:
                    yield cohort, _DIED
                return
            if broken:
                pool = stack.enter_context(worker_pool(min(jobs, len(waiting))))


def _begin_worker(n_threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the waiting process handles Ctrl-C
    torch.set_num_threads(n_threads)


def run_ray(
    cohorts: Sequence[Cohort], *, address: str | None, cpus: float, gpus: float, log: Path
) -> Iterator[Outcome]:
    """Train cohorts as tasks of a Ray cluster, which need not share a file system with this machine.

    Args:
        cohorts: What to train.
        address: Of the cluster; None starts one on this machine.
        cpus: Cores per cohort.
        gpus: GPUs per cohort.
        log: File for what the tasks print.

    Yields:
        Cohorts as they end; the run directories have arrived then.

    Raises:
        InputError: Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as absent:
        raise InputError(
            "--engine ray needs Ray, which is not installed. Fix: pip install 'svf-lightning[ray]', here and on the "
            "nodes; or use --engine local."
        ) from absent
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as unreachable:
        raise InputError(
            f"--ray_address={address!r}: no Ray cluster answers there ({reason(unreachable)}). "
            "Fix: check the address, or leave it out to start one on this machine."
        ) from unreachable
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_remote)
    try:
        waiting = {task.remote(cohort, max(1, int(cpus))): cohort for cohort in map(list, cohorts)}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            cohort = waiting.pop(done)
            try:
                error, printed, archives = ray.get(done)
            except ray.exceptions.RayError as lost:
                error, printed, archives = f"its task was lost ({reason(lost)})", "", {}
            with log.open("a", encoding="utf-8") as file:
                file.write(printed)
            if error is not None and len(cohort) > 1:
                waiting |= {task.remote([trial], max(1, int(cpus))): [trial] for trial in cohort}
                continue
            for trial in cohort:
                if trial.id in archives:
                    _unpack(archives[trial.id], trial.folder)
            yield cohort, error
    finally:
        ray.shutdown()


def _remote(cohort: list[Trial], n_threads: int) -> tuple[str | None, str, dict[str, bytes]]:
    """Train a cohort in a folder of the node, and send the run directories back."""
    import torch

    torch.set_num_threads(n_threads)
    folder = Path(tempfile.mkdtemp(prefix="svf-sweep-"))
    try:
        log = folder / "log.txt"
        here = [replace(trial, run_dir=folder / trial.folder.name) for trial in cohort]
        error = attempt(here, log)
        archives = {trial.id: _packed(trial.folder) for trial in here if trial.folder.is_dir()}
        return error, log.read_text(encoding="utf-8"), archives
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        # W&B's logs are links to files on the node
        archive.add(folder, arcname=".", filter=lambda entry: None if entry.issym() else entry)
    return buffer.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    """Replace a run directory by the one that arrived, at once."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(draft, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def default_memory_bytes(jobs: int) -> float:
    """Half of the memory that is free now, shared among the jobs."""
    import psutil

    return float(psutil.virtual_memory().available) / 2 / jobs
