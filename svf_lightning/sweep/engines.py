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
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from svf_lightning.errors import InputError, one_line, reason
from svf_lightning.run.directory import SUMMARY
from svf_lightning.run.summary import read_summary
from svf_lightning.sweep.backlog import Backlog, Cohort
from svf_lightning.sweep.cohort import DRAFT, clear, train, trial_bytes
from svf_lightning.sweep.trial import Trial

Outcome = tuple[Cohort, str | None]  # a cohort that was tried, and why it failed
_R = TypeVar("_R")

KILLED = "its process was killed (out of memory?)"
_FAILED_STARTS = 3  # of processes, one after the other, until there is no hope


def attempt(trials: Cohort, log: Path | None = None) -> str | None:
    """Train a cohort; what it would print goes to a file.

    Returns:
        None, or one line that says why it failed.
    """
    with open(log or os.devnull, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            train(trials)
        except BaseException as error:
            return why_it_failed(error)
    return None


def why_it_failed(error: BaseException) -> str:
    """One line. A trial or a user's callback may raise anything, and exit; the other trials go on."""
    return one_line(error) if isinstance(error, Exception) else f"{type(error).__name__}: {one_line(error)}"


class Done(NamedTuple, Generic[_R]):
    """A part of a backlog that a process worked on.

    Args:
        cohort: Which one.
        result: What the function returned; None if the process died.
        killed: Whether it died, and these trials are to blame; if not, they had ended before.
    """

    cohort: Cohort
    result: _R | None
    killed: bool = False


class Workers:
    """Processes of this machine, each with its share of the cores, and a pool of its own.

    So it is known what a process that dies was doing, and the others go on. If what is done with them fails (Ctrl-C),
    they are killed; if this process is killed, they end.

    Args:
        n: How many.

    Raises:
        InputError: The system has no room for as many.
    """

    def __init__(self, n: int) -> None:
        self._n_threads = max(1, (os.cpu_count() or 1) // n)
        self._idle = [self._begin() for _ in range(n)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pool in self._idle:
            pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in multiprocessing.active_children():
                process.kill()  # on SIGTERM, Lightning would stop only after this batch

    def _begin(self) -> ProcessPoolExecutor:
        """A pool of one process, which starts when there is something to do."""
        context = multiprocessing.get_context("spawn")
        try:
            return ProcessPoolExecutor(1, context, initializer=_begin_worker, initargs=(self._n_threads,))
        except OSError as error:
            raise _no_process(f"cannot be started ({reason(error)})") from error

    def run(
        self,
        function: Callable[..., _R],
        backlog: Backlog,
        *args: object,
        before: Callable[[Cohort], None] = lambda cohort: None,
        has_ended: Callable[[Trial], bool] = lambda trial: False,
    ) -> Iterator[Done[_R]]:
        """Call ``function(cohort, *args)`` for everything in a backlog, which may be added to meanwhile.

        Args:
            function: For another process, so it is picklable.
            backlog: What to do.
            args: The same for every call.
            before: What to do here before it is called.
            has_ended: True for a trial that was done before its process died.

        Yields:
            Cohorts as they end.

        Raises:
            InputError: No process starts.
        """
        running: dict[Future[_R], tuple[Cohort, ProcessPoolExecutor, Future[int]]] = {}
        failed_starts = 0
        try:
            while backlog or running:
                while self._idle and (cohort := backlog.take(running=len(running))) is not None:
                    before(cohort)
                    pool, start, future = self._submit(function, cohort, *args)
                    running[future] = cohort, pool, start
                n_running = len(running)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cohort, pool, start = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        pool.shutdown(wait=False)
                        self._idle.append(self._begin())
                        if start.exception() is not None:  # it has not even begun
                            failed_starts += 1
                            if failed_starts >= _FAILED_STARTS:
                                raise _no_process("end as soon as they start") from None
                            backlog.put_back(cohort)
                            continue
                        if ended := [trial for trial in cohort if has_ended(trial)]:
                            yield Done(ended, None)
                        left = [trial for trial in cohort if not has_ended(trial)]
                        if left and backlog.died(left, sure=n_running == 1):
                            yield Done(left, None, killed=True)
                    else:
                        self._idle.append(pool)
                        failed_starts = 0
                        yield Done(cohort, result)
        finally:
            self._idle += [pool for _, pool, _ in running.values()]  # to be shut down

    def _submit(
        self, function: Callable[..., _R], *args: object
    ) -> tuple[ProcessPoolExecutor, Future[int], Future[_R]]:
        """A pool, a call that ends as soon as its process has started, and the call that matters."""
        while True:
            pool = self._idle.pop()
            try:
                return pool, pool.submit(os.getpid), pool.submit(function, *args)
            except BrokenProcessPool:  # it died while it had nothing to do
                self._idle.append(self._begin())
            except OSError as error:
                raise _no_process(f"cannot be started ({reason(error)})") from error


def _no_process(what: str) -> InputError:
    return InputError(
        f"processes for the trials {what}. Allowed: as many as the machine has memory and open files for. "
        "Fix: use fewer --jobs; the same command goes on."
    )


def run_local(cohorts: Sequence[Cohort], workers: Workers, *, log: Path) -> Iterator[Outcome]:
    """Train cohorts in processes of this machine.

    Args:
        cohorts: What to train.
        workers: The processes.
        log: File for what the trainings print.

    Yields:
        Cohorts as they end. One that failed is tried again trial by trial, and one whose process was killed in halves,
        so that a trial fails alone.
    """
    backlog = Backlog(cohorts, memory=trial_bytes)
    for done in workers.run(attempt, backlog, log, before=_forget, has_ended=_has_ended):
        if done.killed:
            yield done.cohort, f"{KILLED}; the other trials went on"
        elif done.result is None or len(done.cohort) == 1:
            yield done.cohort, done.result
        else:
            if ended := [trial for trial in done.cohort if _has_ended(trial)]:
                yield ended, None
            backlog.split([trial for trial in done.cohort if not _has_ended(trial)])


def _forget(cohort: Cohort) -> None:
    """Remove the summaries of former attempts."""
    for trial in cohort:
        with suppress(OSError):
            (trial.folder / SUMMARY).unlink()


def _has_ended(trial: Trial) -> bool:
    with suppress(InputError, OSError):
        return bool(read_summary(trial.folder))
    return False


def _begin_worker(n_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the waiting process handles Ctrl-C
    # a process that outlives its parent would write into what the next sweep trains
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(n_threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
    # a task that is lost is begun again by what follows: Ray's own way would try what lacks memory without end
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_remote)
    backlog, alone = Backlog(cohorts, memory=trial_bytes), set[str]()
    running: dict[Any, Cohort] = {}
    try:
        while backlog or running:
            while (cohort := backlog.take(running=0)) is not None:
                running[task.remote(list(cohort), max(1, int(cpus)))] = cohort
            (ended,), _ = ray.wait(list(running), num_returns=1)
            cohort = running.pop(ended)
            try:
                error, printed, archives = ray.get(ended)
            except ray.exceptions.RayError as lost:
                # a trial alone is tried twice: it may have been its node that died
                if backlog.died(cohort, sure=cohort[0].id in alone):
                    yield cohort, f"its task was lost ({reason(lost)})"
                alone |= {cohort[0].id} if len(cohort) == 1 else set()
                continue
            with log.open("a", encoding="utf-8") as file:
                file.write(printed)
            if error is not None and len(cohort) > 1:
                backlog.split(cohort)
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
    draft = folder.with_name(f"{DRAFT}{os.getpid()}")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(draft, filter="data")
    clear(folder)
    draft.rename(folder)


def default_memory_bytes(jobs: int) -> float:
    """Half of the memory that is free now, shared among the jobs."""
    import psutil

    return float(psutil.virtual_memory().available) / 2 / jobs
