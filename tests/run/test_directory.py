"""Where a run goes: one folder for the experiment, one for the run, and nowhere else."""

import re
from pathlib import Path

import pytest

from svf_lightning.errors import InputError
from svf_lightning.run.directory import check_free, new_run_dir


@pytest.mark.parametrize("name", ["single_pair", "with spaces", "äöü", "a.b", "..x", "n" * 60, "<b>"])
def test_the_name_of_an_experiment_is_that_of_a_folder(name):
    run_dir = new_run_dir(name, Path("runs"))
    assert run_dir.parent == Path("runs") / name
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run_dir.name)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "/tmp", "../x", "a\\b", "a\nb", "a\0b", "\x1b[2J", " a", "n" * 61]
)
def test_any_other_name_is_refused(name):
    with pytest.raises(InputError, match=r"experiment.name=.* is not usable.*without slashes.*Fix"):
        new_run_dir(name, Path("runs"))


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "to_nowhere").symlink_to("nowhere")
    (tmp_path / "to_itself").symlink_to("to_itself")
    for name in ("file", "file/run", "to_nowhere", "to_itself", "to_itself/run", "n" * 300, "a\nb"):
        with pytest.raises(InputError, match=r"run_dir.*Fix: choose another --run_dir"):
            check_free(tmp_path / name)
    check_free(tmp_path / "new" / "run")
    assert len(list(tmp_path.iterdir())) == 3
