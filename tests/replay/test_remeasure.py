"""What was measured with other options is refused, or measured again beside the old rows."""

import json

import numpy as np
import pytest
import yaml

from svf_lightning.run.ledger import Ledger
from svf_lightning.trajectory import open_trajectory

ONE = ("--data.n_prompts=5", "--data.batch_size=4", "--trainer.logger=false", "--report=false")


@pytest.fixture
def measured(suite, typed, command):
    """A replay by the command of three checkpoints, its directory, and what it takes to repeat it."""
    source = (
        "--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}",
        "--data.source.init_args.steps=[0,4,8]",
    )  # fmt: skip
    result = typed("replay", *source, *ONE, "--run_dir=first")
    assert result.returncode == 0, result.stderr
    return command.folder / "first"


def with_draws(run_dir, n):
    """The callbacks of a run, with another number of random rotations, as a configuration."""
    callbacks = yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["callbacks"]
    for callback in callbacks:
        if callback["class_path"].endswith("AttentionSparsity"):
            callback["init_args"]["n_draws"] = n
    path = run_dir.parent / "draws.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return path


def test_rows_of_one_replay_are_never_measured_with_two_kinds_of_options(measured, typed):
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    config = with_draws(measured, 5)
    result = typed("replay", "--config", measured / "config.yaml", "--config", config, "--run_dir=first")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "AttentionSparsity.n_draws=16, and this call has 5" in line
    assert "--remeasure=first" in line
    assert before == {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}


def test_measured_again_with_other_options_into_a_directory_that_names_its_parent(measured, typed, command):
    old = open_trajectory(measured).load()
    config = with_draws(measured, 5)
    result = typed("replay", "--remeasure=first", "--config", config, "--run_dir=second", "--report=true")
    assert result.returncode == 0, result.stderr
    new = open_trajectory(command.folder / "second")
    assert (old.sizes["draw"], new.sizes["draw"]) == (16, 5)
    np.testing.assert_array_equal(new["prompt/score"], old["prompt/score"])
    np.testing.assert_array_equal(new["weight_hash"], old["weight_hash"])
    assert json.loads((command.folder / "second" / "parent.json").read_text())["run"] == "first"
    assert "measured again from run first" in (command.folder / "second" / "report.html").read_text()
    assert open_trajectory(measured).load().equals(old)
    settings = yaml.safe_load((command.folder / "second" / "config.yaml").read_text())
    assert "remeasure" not in settings
    # its own settings repeat it, and it goes on like any other
    again = typed("replay", "--run_dir=second", "--report=false")
    assert (again.returncode, "nothing to replay" in again.stderr) == (0, True)


def test_an_interrupted_measurement_loses_neither_and_goes_on(measured, typed, command, monkeypatch):
    from svf_lightning.replay import FolderCheckpoints

    old, load = open_trajectory(measured).load(), FolderCheckpoints.load
    config = with_draws(measured, 5)

    def stop(self, ref, dtype):
        if ref.step == 8:
            raise KeyboardInterrupt
        return load(self, ref, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(FolderCheckpoints, "load", stop)
        stopped = typed("replay", "--remeasure=first", "--config", config, "--run_dir=second", "--report=false")
    assert stopped.returncode == 130
    assert open_trajectory(command.folder / "second")["step"].values.tolist() == [0, 4]
    assert open_trajectory(measured).load().equals(old)
    more = typed("replay", "--run_dir=second", "--report=false")
    assert more.returncode == 0, more.stderr
    assert open_trajectory(command.folder / "second")["step"].values.tolist() == [0, 4, 8]
    assert [entry.status for entry in Ledger(command.folder / "second").entries()] == ["done"] * 3


@pytest.mark.parametrize("given", ["nowhere", "."])
def test_only_a_replay_can_be_measured_again(given, typed, command):
    result = typed("replay", f"--remeasure={given}")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "that is no replay" in result.stderr
    assert command.files() == []
