"""Disks that are full and folders that may not be written: one line, and what was there before is as it was."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager, suppress

import pytest
from helpers.command_line import ForkedCommand, run_dir_of
from helpers.permissions import obey_permissions

from svf_lightning.errors import InputError
from svf_lightning.files import write_json, write_text, written_whole

TINY = ("--trainer.max_steps=6", "--data.batch_size=8", "--model.n_instances=2", "--report=false")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    command = ForkedCommand(folder)
    return run_dir_of(command("fit", "--run_dir=run", *TINY, "--trainer.logger=false"), command)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk, leave=0):
    """Take all room but some."""
    with (disk / "filling").open("wb", buffering=0) as filling, suppress(OSError):
        while filling.write(bytes(4096)):
            pass
    if leave:
        os.truncate(disk / "filling", os.path.getsize(disk / "filling") - leave)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_one_line(result):
    lines = result.stderr.strip().splitlines()
    return result.returncode == 2 and len(lines) == 1 and "Fix: " in lines[0]


@pytest.mark.parametrize("leave", [0, 4096, 65536, 262144])
def test_commands_on_a_full_disk_leave_what_was_there_and_nothing_else(finished, disk, forked, injected, leave):
    run = shutil.copytree(finished, forked.folder / "run")
    (disk / "page.html").write_text("the page of before")
    (disk / "fig_2a.csv").write_text("the numbers of before")
    fill(disk, leave)
    for arguments in (
        ("report", run, f"--out={disk / 'page.html'}"),
        ("report", run, f"--out={disk / 'new.html'}"),
        ("report", run, finished, f"--out={disk / 'page.html'}"),
    ):
        before = contents(disk)
        result = forked(*arguments)
        wrong = not is_one_line(result) or contents(disk) != before
        injected("page on a full disk", wrong=wrong, message=result.stderr, what=result.stderr)
    if leave < 65536:
        before = contents(disk)
        result = forked("figures", run, disk, "fig_2a", "--format=csv", "--scale=1")
        wrong = (not is_one_line(result) or contents(disk) != before) and result.returncode != 0
        wrong = wrong or any(path.name.startswith(".") for path in contents(disk))
        injected("numbers of a figure on a full disk", wrong=wrong, message=result.stderr, what=result.stderr)


def test_a_run_does_not_begin_on_a_full_disk(disk, forked, injected):
    fill(disk)
    before = contents(disk)
    result = forked("fit", f"--run_dir={disk / 'run'}", *TINY, "--trainer.logger=false")
    wrong = not is_one_line(result) or contents(disk) != before
    injected("settings of a run on a full disk", wrong=wrong, message=result.stderr, what=result.stderr)


@pytest.mark.parametrize("write", ["text", "json", "image"])
def test_a_file_of_any_size_is_whole_or_not_there(disk, injected, write):
    path = disk / "file.json"
    for size in (100, 5_000, 50_000, 300_000, 600_000, 3_000_000):
        for leave in (0, 4096, 40960, 409600):
            path.unlink(missing_ok=True)
            (disk / "filling").unlink(missing_ok=True)
            before = '"before"\n'
            path.write_text(before)
            fill(disk, leave)
            text = json.dumps("x" * size)
            try:
                if write == "text":
                    write_text(path, text)
                elif write == "json":
                    write_json(path, "x" * size)
                else:
                    with written_whole(path) as draft:
                        draft.write_bytes(text.encode())
                wrong, message = path.read_text().strip() != text, ""
            except InputError as error:
                wrong, message = path.read_text() != before or "\n" in str(error), str(error)
            wrong = wrong or {p.name for p in disk.iterdir()} != {"file.json", "filling"}
            injected("file on a full disk", wrong=wrong, message=message, what=f"{size} {leave}")


def with_small_files():
    """Files may not grow beyond 64 KiB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


@contextmanager
def read_only(folder):
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def test_a_page_beyond_the_limit_of_a_file_s_size_is_one_line(finished, forked, injected):
    (forked.folder / "page.html").write_text("the page of before")
    before = contents(forked.folder)
    process = forked.start("report", finished, "--out=page.html", before=with_small_files)
    process.wait()
    lines = process.output("err").strip().splitlines()
    wrong = process.returncode != 2 or len(lines) != 1 or contents(forked.folder) != before
    injected("page beyond the limit of a file's size", wrong=wrong, message=lines[0], what=str(lines))


PLACES = {
    "a folder that may not be written": "closed/page.html",
    "a folder in one that may not be written": "closed/new/page.html",
    "a folder": "folder",
    "below a file": "file/page.html",
    "a name that is too long": "n" * 300 + ".html",
    "a null byte": "a\0b.html",
    "a device": "/dev/null",
    "a link to itself": "loop/page.html",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_takes_no_page_is_one_line(finished, forked, injected, place):
    for name in ("closed", "folder"):
        (forked.folder / name).mkdir()
    (forked.folder / "file").write_text("")
    (forked.folder / "loop").symlink_to("loop")
    shutil.copytree(finished, forked.folder / "run")
    shutil.copytree(finished, forked.folder / "run_2")
    before = contents(forked.folder)
    for runs in (("run",), ("run", "run_2")):
        with read_only(forked.folder / "closed"):
            process = forked.start("report", *runs, f"--out={PLACES[place]}", before=obey_permissions)
            process.wait()
        lines = process.output("err").strip().splitlines()
        wrong = process.returncode != 2 or len(lines) != 1 or contents(forked.folder) != before
        injected(
            "place that takes no page", wrong=wrong, message=lines[0] if lines else "", what=f"{place} {lines[-4:]}"
        )
    with read_only(forked.folder / "run"):
        process = forked.start("report", "run", before=obey_permissions)
        process.wait()
    lines = process.output("err").strip().splitlines()
    wrong = process.returncode != 2 or len(lines) != 1 or contents(forked.folder) != before
    injected("run directory that may not be written", wrong=wrong, message=lines[0], what=f"{lines}")
