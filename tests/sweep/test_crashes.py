"""What becomes of a sweep whose processes are killed, whose directories are removed, or that is started twice."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from helpers.killers import killer
from helpers.sweeps import SIX, write_sweep

from svf_lightning.sweep.file import read_sweep
from svf_lightning.sweep.results import Sweep
from svf_lightning.trajectory import open_trajectory

LAMBDAS = {"model.lambda_attn": {"values": [1.0, 2.0, 3.0, 13.0, 5.0, 6.0]}}


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.output("err")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(group):
    return subprocess.run(["pgrep", "-a", "-g", str(group)], capture_output=True, text=True, check=False).stdout


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}


def the_waiting(folder):
    """Directory of the trial that waits."""
    return next(iter(folder.glob("trials/lambda_attn=13.0-*/config.yaml")), folder / "none" / "x").parent


@pytest.fixture
def gate(tmp_path):
    """A file that trials with lambda_attn=13 wait for."""
    return tmp_path / "gate"


@pytest.fixture
def begun(forked, tmp_path, gate):
    """A sweep of six trials, one of which waits while the others are done: its file, its directory, the process."""
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(guilty=13.0, until=gate))
    folder = forked.folder / "runs" / "sweeps" / "some"
    process = forked.start("sweep", file, "--jobs=2")
    wait_for(lambda: len(written(folder)) == 5 and the_waiting(folder).is_dir(), process)
    yield file, folder, process
    process.kill()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trial_whose_process_is_killed_fails_alone(forked, tmp_path, jobs):
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(guilty=13.0))
    result = forked("sweep", file, f"--jobs={jobs}")
    assert result.returncode == 1
    assert "5 done, 1 failed, 0 missing" in result.stdout
    folder = forked.folder / "runs" / "sweeps" / "some"
    ((name, why),) = Sweep(folder).failures()
    assert name == "lambda_attn=13.0"
    assert "killed (out of memory?)" in why
    assert not list(folder.glob("trials/.*"))


def test_cohorts_that_take_more_memory_than_there_is_are_made_smaller_and_nothing_fails(forked, tmp_path):
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(most=2))
    result = forked("sweep", file, "--jobs=1")
    assert result.returncode == 0, result.stderr
    assert "6 done, 0 failed, 0 missing" in result.stdout


def test_a_sweep_whose_process_is_killed_ends_its_workers_and_goes_on_where_it_was(begun, forked, gate):
    file, folder, process = begun
    before = written(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes_of(process.pid), None, seconds=30)
    gate.touch()
    assert not list(the_waiting(folder).glob("summary.json"))
    result = forked("sweep", file, "--jobs=2")  # the lock of a process that was killed is free
    assert result.returncode == 0, result.stderr
    assert "6 trials, 5 done before, 1 to run" in result.stderr
    assert "6 done, 0 failed, 0 missing" in result.stdout
    assert before.items() <= written(folder).items()
    assert not list(folder.glob("trials/.*"))


def test_a_second_sweep_of_the_same_file_is_refused_and_the_first_goes_on(begun, forked, gate):
    file, folder, process = begun
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    second = forked("sweep", file, "--jobs=2")
    assert (second.returncode, len(second.stderr.splitlines())) == (2, 1)
    assert "a directory that no sweep runs in" in second.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    gate.touch()
    assert process.wait() == 0
    assert "6 done, 0 failed, 0 missing" in process.output("out")


def test_of_two_sweeps_that_start_together_one_runs_and_one_is_refused(forked, tmp_path, gate):
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(guilty=13.0, until=gate))
    both = [forked.start("sweep", file, "--jobs=1") for _ in range(2)]
    wait_for(lambda: any(process.poll() is not None for process in both), None)
    gate.touch()
    assert sorted(process.wait() for process in both) == [0, 2]
    folder = forked.folder / "runs" / "sweeps" / "some"
    assert Sweep(folder).counts() == "6 done, 0 failed, 0 missing"
    logged = [len(list((trial.folder / "wandb").glob("offline-run-*"))) for trial in Sweep(folder).trials]
    assert logged == [1] * 6


def test_a_trial_whose_directory_is_removed_while_it_trains_is_trained_again(begun, gate):
    _, folder, process = begun
    shutil.rmtree(the_waiting(folder))
    shutil.rmtree(next(path for path in folder.glob("trials/lambda_attn=1.0-*")))  # and one that is done
    gate.touch()
    assert process.wait() == 1
    assert "1 failed, 1 missing" in process.output("out")
    ((name, why),) = Sweep(folder).failures()
    assert (name, "was removed while the trial trained" in why) == ("lambda_attn=13.0", True)


def test_a_link_in_the_place_of_a_trial_is_replaced_and_what_it_leads_to_is_not_touched(forked, tmp_path):
    file = write_sweep(tmp_path / "some.yaml", {"model.lambda_attn": {"values": [1.0, 2.0]}})
    folder, elsewhere = tmp_path / "swept", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "summary.json").write_text("{}")
    (elsewhere / "log").write_text("mine")
    (folder / "trials").mkdir(parents=True)
    (folder / "log.txt").symlink_to(elsewhere / "log")
    first, second = read_sweep(file).trials()
    (folder / "trials" / first.id).symlink_to(elsewhere)
    (folder / "trials" / second.id).write_text("a file")
    result = forked("sweep", file, "--sweep_dir", folder, "--jobs=1")
    assert result.returncode == 0, result.stderr
    assert "2 done, 0 failed, 0 missing" in result.stdout
    assert sorted(path.name for path in elsewhere.iterdir()) == ["log", "summary.json"]
    assert (elsewhere / "log").read_text() == "mine"
    for trial in Sweep(folder).trials:
        assert not trial.folder.is_symlink()
        assert open_trajectory(trial.folder)["step"].values.tolist() == [0, 5, 10]


@pytest.mark.parametrize("place", [".lock", "trials.json", "sweep.yaml", "trials"])
def test_what_is_in_the_way_of_a_sweeps_files_is_one_line(typed, tmp_path, place):
    file = write_sweep(tmp_path / "some.yaml", SIX)
    folder = tmp_path / "swept"
    folder.mkdir()
    if place == "trials":
        os.symlink(folder / "trials", folder / "trials")  # a loop
    else:
        (folder / place).mkdir()
    result = typed("sweep", file, "--sweep_dir", folder, "--jobs=1")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert str(folder) in result.stderr
    assert "Fix: " in result.stderr
