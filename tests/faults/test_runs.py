"""Trainings that are killed, interrupted, or cannot write: what is left is whole, and they go on to the same end."""

import errno
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.command_line import ForkedCommand
from helpers.training import same_rows

from svf_lightning.trajectory import has_trajectory, open_trajectory

STEPS = 23
ARGUMENTS = (
    "--data.batch_size=8", "--model.n_instances=2", "--trainer.logger=false", "--report=false", "--capture.chunk=4",
    "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=5",
    "--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.save_last=true", "--trainer.callbacks.filename=at-{step}",
    "--run_dir=run",
)  # fmt: skip
SETTINGS = {
    "adam": (),
    "schedule, rates, AdamW": (
        "--model.lr_schedule=cosine", "--model.learning_rate=[1e-3,3e-3]", "--model.optimizer=adamw",
        "--model.weight_decay=0.01",
    ),
}  # fmt: skip
POINTS = int(os.environ.get("FAULT_POINTS", "40"))  # of each kind of fault


class AtFileOperation:
    """Does something when the process is about to open, rename or remove its n-th file below a folder."""

    def __init__(self, folder, n, action):
        self.folder, self.n, self.action, self.count = str(folder), n, action, 0

    def __call__(self, event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(
            self.folder
        ):
            return
        self.count += 1
        if self.count == self.n:
            self.action()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail(number):
    def action():
        raise OSError(number, os.strerror(number), "a file")

    return action


def fit(forked, *arguments, at=None, action=None):
    process = forked.start(
        "fit", *arguments, before=None if at is None else lambda: sys.addaudithook(at_file(forked, at, action))
    )
    process.wait(120)
    return process


def at_file(forked, n, action):
    return AtFileOperation(forked.folder / "run", n, action)


@pytest.fixture(scope="module", params=list(SETTINGS))
def whole(request, tmp_path_factory):
    """The run that nothing happens to, and how many file operations it takes."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    folder.mkdir()
    forked = ForkedCommand(folder)
    settings = (*ARGUMENTS, *SETTINGS[request.param], f"--trainer.max_steps={STEPS}")
    counter = folder.parent / "count"
    hook = AtFileOperation(folder / "run", -1, None)

    def count():
        sys.addaudithook(hook)
        exit_now = os._exit
        os._exit = lambda code: (counter.write_text(str(hook.count)), exit_now(code))

    process = forked.start("fit", *settings, before=count)
    assert process.wait(120) == 0, process.output("err")
    return folder / "run", settings, int(counter.read_text())


def points(n, how_many=POINTS):
    return sorted({int(x) for x in np.linspace(1, n, how_many)})


def goes_on_to_the_same_end(forked, whole, settings, equal=xr.Dataset.equals):
    """1 if the run, made to go on, does not end as the run that nothing happened to; and what was said."""
    run = forked.folder / "run"
    if not (run / "config.yaml").exists():
        return 0, "nothing had begun"
    process = fit(forked, *settings, "--ckpt_path=run")
    if process.returncode != 0:
        summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
        if summary.get("status") != "finished":
            return 1, process.output("err")
    a, b = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, whole))
    same = a["global_step"] == b["global_step"]
    same = same and all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in b["state_dict"])
    same = same and equal(open_trajectory(run).load(), open_trajectory(whole).load())
    names = [{p.name for p in (path / "checkpoints").iterdir() if not p.name.startswith(".")} for path in (run, whole)]
    metrics = [json.loads((path / "summary.json").read_text())["metrics"] for path in (run, whole)]
    same = same and names[0] == names[1] and metrics[0] == metrics[1]
    return int(not same), process.output("err")


def rows_are_whole(run, whole, equal=xr.Dataset.equals):
    """1 if a row that a reader sees is not that of the run that nothing happened to."""
    if not has_trajectory(run):
        return 0
    there, full = open_trajectory(run).load(), open_trajectory(whole).load()
    steps = there["step"].values
    if steps.tolist() != list(range(len(steps))):
        return 1
    before_the_end = there.isel(
        step=slice(0, max(0, min(len(steps), STEPS) - 1))
    )  # a run that stops has a last row of its own
    return int(not equal(before_the_end, full.isel(step=slice(0, before_the_end.sizes["step"]))))


def torn(run):
    """Checkpoints under their final names that cannot be read."""
    n = 0
    for path in (run / "checkpoints").glob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            n += 1
    return n


@pytest.mark.parametrize("part", range(8))
def test_a_run_that_is_killed_at_any_file_operation(injected, forked, whole, part):
    run, settings, n = whole
    for at in points(n)[part::8]:
        shutil.rmtree(forked.folder / "run", ignore_errors=True)
        fit(forked, *settings, at=at, action=kill)
        wrong = rows_are_whole(forked.folder / "run", run)
        lost = torn(forked.folder / "run")
        differs, said = goes_on_to_the_same_end(forked, run, settings)
        injected(
            "SIGKILL of a training, at a file operation",
            lost=lost,
            wrong=wrong + differs,
            what=f"at {at} of {n}: {said}",
        )


@pytest.mark.parametrize("part", range(4))
def test_a_run_that_is_killed_while_it_goes_on_from_an_older_checkpoint(injected, forked, whole, part):
    run, settings, n = whole
    for at in points(n // 2, POINTS // 2)[part::4]:
        shutil.rmtree(forked.folder / "run", ignore_errors=True)
        shutil.copytree(run, forked.folder / "run")
        back = ("--ckpt_path=run/checkpoints/at-step=10.ckpt", "--overwrite=true")
        fit(forked, *settings, *back, at=at, action=kill)
        wrong = rows_are_whole(forked.folder / "run", run)
        lost = torn(forked.folder / "run")
        differs, said = goes_on_to_the_same_end(forked, run, settings)
        injected(
            "SIGKILL of a resume from an older checkpoint", lost=lost, wrong=wrong + differs, what=f"at {at}: {said}"
        )


@pytest.mark.parametrize("part", range(8))
def test_ctrl_c_at_any_file_operation(injected, forked, whole, part):
    run, settings, n = whole
    for at in points(n)[part::8]:
        shutil.rmtree(forked.folder / "run", ignore_errors=True)
        process = fit(forked, *settings, at=at, action=interrupt)
        said = process.output("err")
        swallowed = process.returncode != 130
        summary = forked.folder / "run" / "summary.json"
        if swallowed and process.returncode == 0 and json.loads(summary.read_text())["status"] == "finished":
            swallowed = at < n - 12  # after the last step there is nothing left to stop
        loud = "Traceback" in said
        wrong = rows_are_whole(forked.folder / "run", run, same_rows)
        differs, more = goes_on_to_the_same_end(forked, run, settings, same_rows)
        injected(
            "Ctrl-C, at a file operation", wrong=int(swallowed or loud) + wrong + differs, message=said.strip().splitlines()[-1] if said.strip() else "",
            what=f"at {at} of {n}, exit {process.returncode}: {said} {more}",
        )  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("part", range(4))
def test_a_write_that_fails(injected, forked, whole, part, number):
    run, settings, n = whole
    for at in points(n, POINTS // 2)[part::4]:
        shutil.rmtree(forked.folder / "run", ignore_errors=True)
        process = fit(forked, *settings, at=at, action=fail(number))
        said = process.output("err")
        loud = "Traceback" in said or process.returncode not in (0, 1, 2)
        wrong = rows_are_whole(forked.folder / "run", run)
        lost = torn(forked.folder / "run")
        differs, more = goes_on_to_the_same_end(forked, run, settings)
        injected(
            f"{errno.errorcode[number]} of a training", lost=lost, wrong=int(loud) + wrong + differs,
            message=said.strip().splitlines()[-1] if said.strip() else "",
            what=f"at {at} of {n}, exit {process.returncode}: {said} {more}",
        )  # fmt: skip


@pytest.mark.parametrize("kilobytes", [40, 80, 120, 160, 200, 260, 320, 400, 500, 700])
def test_a_disk_that_is_full(injected, forked, whole, kilobytes):
    run, settings, _ = whole
    disk = forked.folder / "run"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk}") != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        process = fit(forked, *settings)
        said = process.output("err")
        loud = "Traceback" in said
        wrong, lost = rows_are_whole(disk, run), torn(disk)
        known = {".lock", ".lock.holder", ".zmetadata", ".zattrs", ".zgroup", ".zarray"}
        drafts = [path for path in disk.rglob(".*") if path.is_file() and path.name not in known]
        assert os.system(f"mount -o remount,size=64m {disk}") == 0
        differs, more = goes_on_to_the_same_end(forked, run, settings)
        injected(
            "a full disk (tmpfs)", lost=lost + len(drafts), wrong=int(loud) + wrong + differs,
            message=said.strip().splitlines()[-1] if said.strip() else "", what=f"{kilobytes} kB: {said} {more} {drafts}",
        )  # fmt: skip
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize("step", [4, 5, 6, 9, 10, 11, 19, 20, 21])
def test_a_run_that_goes_on_twice_from_around_a_checkpoint(injected, forked, whole, step):
    run, settings, _ = whole
    for end in (step, min(STEPS - 1, step + 6), STEPS):
        given = ("--ckpt_path=run",) if (forked.folder / "run").exists() else ()
        process = fit(forked, *settings, f"--trainer.max_steps={end}", *given)
    if "lr_schedule" in " ".join(
        settings
    ):  # its length belongs to a schedule, so a run of another length is another run
        injected(
            "going on with another length and a schedule",
            lost=int(process.returncode != 2),
            message=process.output("err"),
        )
        return
    differs, said = goes_on_to_the_same_end(forked, run, settings)
    injected("going on twice, at k - 1, k, k + 1 of a checkpoint", wrong=differs, what=f"{step}: {said}")
