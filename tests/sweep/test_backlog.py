"""A cohort whose process dies is cut until the trial that kills it is alone; the others go on."""

import os
import resource
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.sweep import engines
from svf_lightning.sweep.backlog import Backlog
from svf_lightning.sweep.engines import Workers
from svf_lightning.sweep.trial import Trial


def trials(n):
    return [Trial({"x": i}, ("x",), ("fit", f"--x={i}")) for i in range(n)]


def work_off(backlog, dies, *, jobs=1):
    """What every process of some would have done: names of the trials that were done, and of those to blame."""
    done, blamed, sizes, running = [], [], [], []
    while backlog or running:
        while len(running) < jobs and (cohort := backlog.take(running=len(running))) is not None:
            running.append(cohort)
        cohort = running.pop(0)
        sizes.append(len(cohort))
        if not dies(cohort):
            done += [trial.values["x"] for trial in cohort]
        elif backlog.died(cohort, sure=not running):
            blamed += [trial.values["x"] for trial in cohort]
    return done, blamed, sizes


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sets(st.integers(0, 30), max_size=4),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_exactly_the_guilty_trials_are_blamed_and_every_other_is_done_once(sizes, guilty, jobs, most):
    every = trials(sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    cohorts = [every[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    guilty &= set(range(len(every)))

    def dies(cohort):
        return len(cohort) > most or bool({trial.values["x"] for trial in cohort} & guilty)

    done, blamed, _ = work_off(Backlog(cohorts, memory=lambda trial: 1.0), dies, jobs=jobs)
    assert sorted(blamed) == sorted(guilty)
    assert sorted(done) == sorted(set(range(len(every))) - guilty)


def test_after_a_death_by_memory_no_cohort_is_as_large_again():
    every = trials(32)
    backlog = Backlog([every[:8], every[8:16], every[16:24], every[24:]], memory=lambda trial: 10.0)
    done, blamed, sizes = work_off(backlog, lambda cohort: len(cohort) > 3)
    assert (sorted(done), blamed) == (list(range(32)), [])
    assert sizes.count(8) == 1
    assert sizes.count(4) == 1
    assert max(sizes[3:]) <= 2


def test_a_trial_that_kills_whatever_it_is_with_makes_no_other_cohort_smaller():
    every = trials(32)
    backlog = Backlog([every[:8], every[8:16], every[16:24], every[24:]], memory=lambda trial: 10.0)
    _, blamed, sizes = work_off(backlog, lambda cohort: every[5] in cohort)
    assert blamed == [5]
    assert sizes.count(8) == 4


def test_a_trial_that_died_beside_others_is_tried_again_with_nothing_beside_it():
    one, two, three = ([trial] for trial in trials(3))
    backlog = Backlog([one, two, three], memory=lambda trial: 1.0)
    assert backlog.take(running=0) == one
    assert backlog.take(running=1) == two
    assert not backlog.died(one, sure=False)
    assert backlog.take(running=1) == three
    assert backlog.take(running=1) is None
    assert backlog
    assert backlog.take(running=0) == one
    assert backlog.died(one, sure=True)
    assert not backlog


# ---- real processes --------------------------------------------------------------------------------------------------


def work(cohort, guilty):
    if guilty & {trial.values["x"] for trial in cohort}:
        os.kill(os.getpid(), signal.SIGKILL)
    return [trial.values["x"] for trial in cohort]


def test_a_process_that_is_killed_is_replaced_and_the_others_go_on():
    every = trials(8)
    with Workers(2) as workers:
        ended = list(workers.run(work, Backlog([every[:4], every[4:]], memory=lambda trial: 1.0), {2}))
    assert sorted(value for done in ended if not done.killed for value in done.result) == [0, 1, 3, 4, 5, 6, 7]
    assert [[trial.values["x"] for trial in done.cohort] for done in ended if done.killed] == [[2]]


def die(n_threads):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_never_start_are_an_error_and_no_endless_loop(monkeypatch):
    monkeypatch.setattr(engines, "_begin_worker", die)
    with pytest.raises(InputError, match="end as soon as they start"), Workers(1) as workers:
        list(workers.run(work, Backlog([trials(2)], memory=lambda trial: 1.0), set()))


def exits(trials):
    raise SystemExit("as a user's callback may")


def test_a_trial_that_exits_is_a_trial_that_fails(monkeypatch):
    monkeypatch.setattr(engines, "train", exits)
    assert engines.attempt(trials(1)) == "SystemExit: as a user's callback may"


def test_more_processes_than_there_are_files_for_are_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be started .*Too many open files"), Workers(200) as workers:
            list(workers.run(work, Backlog([trials(1)], memory=lambda trial: 1.0), set()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
