"""The commands from Python."""

import importlib
import os
import subprocess
import sys

import pytest
import yaml
from helpers.replays import SETTINGS, STEPS

import svf_lightning as svf
from svf_lightning.errors import InputError
from svf_lightning.trajectory import open_trajectory

QUICK = {
    "max_steps": 12,
    "batch_size": 16,
    "n_instances": 2,
    "trainer.logger": False,
    "trainer.enable_progress_bar": False,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_training_is_the_commands_and_its_run_can_be_looked_at(here):
    run = svf.fit("single_pair", **QUICK, seed_everything=3)
    assert run.directory.parent == svf.Run("runs/single_pair").directory
    assert run.settings["model"]["n_instances"] == 2
    assert run.settings["seed_everything"] == 3
    assert run.summary["status"] == "finished"
    rows = run.trajectory()
    assert rows["step"].values.tolist() == list(range(13))
    assert open_trajectory(run.directory).equals(rows)
    metric = run.metrics.loc["alignment/matched"]
    assert metric["mean"] == pytest.approx(float(rows["alignment/matched"][-1].mean()))
    assert metric["unit"] == "|cosine|"
    claims = yaml.safe_load(run.directory.joinpath("config.yaml").read_text())["experiment"]["claims"]
    assert run.claims["claim"].tolist() == [claim["claim"] for claim in claims]
    assert set(run.claims["verdict"]) <= {"yes", "no", "open", "vacuous"}
    assert not (run.directory / "report.html").exists()
    assert run.page() == run.directory / "report.html"
    assert svf.Run(str(run.directory)) == run


def test_settings_come_from_a_run_directory_and_values_are_those_of_yaml(here):
    first = svf.fit(run_dir=here / "first", **QUICK, lambda_attn=[1.0, 2.5])
    second = svf.fit(first.directory, run_dir=here / "second", max_steps=3)
    assert second.settings["model"]["lambda_attn"] == first.settings["model"]["lambda_attn"] == [1.0, 2.5]
    assert second.settings["trainer"]["max_steps"] == 3


def test_a_replay_is_the_commands_too(here, suite):
    source = {"class_path": "svf_lightning.replay.FolderCheckpoints", "init_args": {"folder": str(suite)}}
    options = {"trainer.logger": False, "trainer.callbacks": ["svf_lightning.callbacks.Capture",
               "svf_lightning.callbacks.AttentionSparsity", "svf_lightning.callbacks.TrajectoryWriter"]}  # fmt: skip
    run = svf.replay(source=source, n_prompts=4, run_dir=here / "run", **options)
    assert run.trajectory()["step"].values.tolist() == STEPS
    assert run.trajectory().sizes["layer"] == SETTINGS.n_layers


@pytest.mark.parametrize(("settings", "message"), [
    ({"nope": 1}, r"setting='nope'.*fit --help"),
    ({"seed": 1}, r"data\.seed or model\.seed"),
    ({"n_instances": "many"}, r"model\.n_instances is not usable"),
    ({"config": "x"}, r"--config x: there is no such file"),
])  # fmt: skip
def test_a_setting_that_is_none_is_an_input_error_before_anything_is_written(here, settings, message):
    with pytest.raises(InputError, match=message):
        svf.fit(**settings)
    assert list(here.iterdir()) == []


def test_replay_is_a_package_and_a_command_however_it_was_imported():
    package = importlib.import_module("svf_lightning.replay")
    assert svf.replay is package
    assert callable(svf.replay)
    assert svf.replay.FolderCheckpoints is package.FolderCheckpoints


def test_the_package_imports_nothing_until_it_is_used():
    code = (
        "import sys, svf_lightning as svf; assert 'torch' not in sys.modules; assert 'fit' in dir(svf); "
        "assert callable(svf.fit) and callable(svf.replay) and callable(svf.open_trajectory); "
        "assert not hasattr(svf, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
