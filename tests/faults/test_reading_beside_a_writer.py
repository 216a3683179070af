"""A trajectory is read while another process writes it, and by commands that have little of everything."""

import os
import resource
import shutil
import signal

import numpy as np
import pytest
from helpers.command_line import ForkedCommand, run_dir_of

from svf_lightning.errors import InputError
from svf_lightning.rows import Rows
from svf_lightning.trajectory import TrajectoryStore, has_trajectory, open_trajectory

N_READS = 10_000


def rows(first, n):
    """Rows whose every value follows from their step."""
    steps = np.arange(first, first + n)
    column = steps[:, None].astype(np.float32)
    vectors = column[:, :, None] + np.arange(300, dtype=np.float32)
    values = {"a/b": (("instance",), column + 1), "vectors": (("instance", "part"), vectors + 2)}
    return Rows(steps, values, ("instance",))


def write_forever(folder):
    store, step = TrajectoryStore(folder, rows_per_chunk=16), 0
    while True:
        n = 1 + step % 7
        store.append(rows(step, n))
        step += n
        if step > 400:  # as a run that goes on from a checkpoint
            store.go_on(200, range(200))
            step = 200


def test_every_read_sees_whole_rows(tmp_path, injected):
    pid = os.fork()
    if pid == 0:
        try:
            write_forever(tmp_path)
        finally:
            os._exit(1)
    try:
        while not (tmp_path / "trajectory.zarr" / ".zmetadata").is_file() or not has_trajectory(tmp_path):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        for _ in range(N_READS):
            try:
                dataset = open_trajectory(tmp_path).load()
                steps = dataset["step"].values
                expected = rows(0, len(steps))
                wrong = not np.array_equal(steps, expected.steps) or any(
                    not np.array_equal(dataset[name].values, values) for name, (_, values) in expected.values.items()
                )
                message = ""
            except InputError as error:
                wrong, message = True, str(error)
            injected("read beside a writer", wrong=wrong, what=message)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    command = ForkedCommand(folder)
    arguments = ("--trainer.max_steps=300", "--data.batch_size=8", "--model.n_instances=2", "--report=false")
    return run_dir_of(command("fit", "--run_dir=run", *arguments, "--trainer.logger=false"), command)


def limit(kind, value):
    return lambda: resource.setrlimit(kind, (value, value))


LIMITS = {
    "64 open files": (resource.RLIMIT_NOFILE, 64),
    "24 open files": (resource.RLIMIT_NOFILE, 24),
    "few threads": (resource.RLIMIT_NPROC, 1),
}


@pytest.mark.parametrize("case", LIMITS)
@pytest.mark.parametrize("arguments", [("report", "run"), ("figures", "run", "images", "--format=csv")])
def test_commands_that_have_little_of_everything_do_it_or_say_so(finished, forked, injected, case, arguments):
    shutil.copytree(finished, forked.folder / "run")
    process = forked.start(*arguments, before=limit(*LIMITS[case]))
    code, lines = process.wait(), process.output("err").strip().splitlines()
    *made, last = lines or [""]  # files that are whole are named before the line
    wrong = code not in (0, 2) or (code == 2 and not (last.startswith("svf-lightning: ") and "Fix: " in last))
    wrong |= any(not (forked.folder / line).is_file() for line in (made if code else ()))
    injected(f"command with {case}", wrong=wrong, message=last if code else "", what=str(lines[-3:]))


@pytest.mark.parametrize("more", [20 << 20, 60 << 20, 150 << 20, 1 << 30])
def test_a_report_with_little_memory_is_made_or_says_so(finished, forked, injected, more):
    import psutil

    shutil.copytree(finished, forked.folder / "run")
    available = psutil.Process().memory_info().vms + more
    process = forked.start("report", "run", before=limit(resource.RLIMIT_AS, available))
    code, lines = process.wait(), process.output("err").strip().splitlines()
    *made, last = lines or [""]  # files that are whole are named before the line
    wrong = code not in (0, 2) or (code == 2 and not (last.startswith("svf-lightning: ") and "Fix: " in last))
    wrong |= any(not (forked.folder / line).is_file() for line in (made if code else ()))
    wrong = wrong or ((code == 0) != (forked.folder / "run" / "report.html").is_file())
    injected("report with little memory", wrong=wrong, message=last if code else "", what=str(lines[-3:]))
