"""A sweep file gives the same trials, and the same command lines, as W&B's own code."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from svf_lightning import cli
from svf_lightning.cli import FitSettings
from svf_lightning.errors import InputError
from svf_lightning.sweep.cohort import train
from svf_lightning.sweep.file import read_sweep
from svf_lightning.sweep.trial import Trial

FILES = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
COMMAND = ["${env}", "${interpreter}", "-m", "svf_lightning", "fit", "--config", "robust_seed", "${args}"]


def write(folder, parameters, **others):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, "command": COMMAND} | others))
    return path


@pytest.fixture(scope="module")
def fit():
    return FitSettings()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_valid_for_wandb_and_name_project_and_metric(path):
    config = pytest.importorskip("sweeps.config")
    content = yaml.safe_load(path.read_text())
    assert config.schema_violations_from_proposed_config(content) == []
    assert content["project"] == "svf-lightning"
    assert content["metric"]["name"] == "alignment/matched"
    assert content["command"][:5] == COMMAND[:5]
    assert content["command"][-1] == "${args}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_grid_has_the_trials_of_wandbs_own_grid_search(path):
    grid_search = pytest.importorskip("sweeps.grid_search")
    own = [dict(trial.values) for trial in read_sweep(path).trials()]
    runs = grid_search.grid_search_next_runs([], yaml.safe_load(path.read_text()), n=len(own) + 1)
    theirs = [{name: entry["value"] for name, entry in run.config.items()} for run in runs if run is not None]
    assert len(own) == len(theirs)
    for values in own:
        assert values in theirs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_agents_command_line_of_every_shipped_file_is_understood_by_fit(path, fit, monkeypatch, tmp_path):
    wandb_agent = pytest.importorskip("wandb.wandb_agent")
    trial = read_sweep(path).trials()[-1]
    started = []

    class Process:
        def __init__(self, command=None, **options):
            started.append(command)

    class Agent(wandb_agent.Agent):
        def __init__(self):
            self._in_jupyter, self._function, self._forward_signals = False, None, False
            self._sweep_command = yaml.safe_load(path.read_text())["command"]
            self._run_processes = {}

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    args = {name: {"value": value} for name, value in trial.values.items()}
    Agent()._command_run({"run_id": "abc", "program": None, "args": args})
    (command,) = started
    assert command[:4] == ["/usr/bin/env", "python", "-m", "svf_lightning"]
    assert tuple(command[4:]) == trial.args
    settings = yaml.safe_load(fit.of(command[5:]))
    for name, value in trial.values.items():
        found = settings
        for part in name.split("."):
            found = found[part]
        assert found == (None if value == "null" else value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shortened_trial_of_every_shipped_file_runs_and_measures_the_metric_that_the_file_names(path, fit, tmp_path):
    read = read_sweep(path)
    trial = read.trials()[0]
    short = ["--trainer.max_steps=6", "--data.batch_size=8", "--capture.every_n_steps=3", "--trainer.logger=false"]
    train([replace(trial, run_dir=tmp_path / trial.id, config=fit.of([*trial.args[1:], *short]))])
    summary = json.loads((tmp_path / trial.id / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert read.metric in summary["metrics"]
    assert summary["claims"]


def test_settings_are_resolved_as_by_the_command_itself(tmp_path, fit, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    args = ["--config=single_pair", "--seed_everything=5", "--model.lambda_attn=3.5", "--trainer.max_steps=2"]
    cli.fit([*args, "--run_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "config.yaml").read_text() == fit.of(args)


def test_values_arrive_unchanged(tmp_path, fit):
    values = {
        "model.learning_rate": 1.0e-05,
        "model.rope": True,
        "model.importance": [0.5, 0.25],
        "model.n_instances": 2,
        "model.d_head": "null",
        "experiment.name": "two words",
        "data.streams": "separate",
    }
    (trial,) = read_sweep(write(tmp_path, {name: {"value": value} for name, value in values.items()})).trials()
    assert "--model.learning_rate=1e-05" in trial.args
    settings = yaml.safe_load(fit.of(trial.args[1:]))
    model = settings["model"]
    assert (model["learning_rate"], model["rope"], model["importance"]) == (1e-5, True, [0.5, 0.25])
    assert (model["d_head"], settings["experiment"]["name"]) == (None, "two words")


def test_an_override_reaches_what_is_derived_from_it(tmp_path, fit):
    (trial,) = read_sweep(write(tmp_path, {"model.d_model": {"value": 16}, "seed_everything": {"value": 7}})).trials()
    settings = yaml.safe_load(fit.of(trial.args[1:]))
    assert settings["model"]["d_head"] == 16
    assert (settings["model"]["seed"], settings["data"]["seed"]) == (7, 7)


def test_the_last_parameter_of_a_grid_runs_fastest_and_seeds_make_no_cells(tmp_path):
    path = write(tmp_path, {"model.lambda_attn": {"values": [1, 3]}, "seed_everything": {"values": [0, 1]}})
    trials = read_sweep(path).trials()
    assert [trial.label for trial in trials] == [f"lambda_attn={a} seed={b}" for a in (1, 3) for b in (0, 1)]
    assert [trial.cell for trial in trials] == [(("model.lambda_attn", a),) for a in (1, 1, 3, 3)]
    assert len({trial.id for trial in trials}) == 4
    assert read_sweep(path).trials(count=3) == trials[:3]


def test_ids_depend_on_the_values_and_not_on_their_place(tmp_path):
    few = read_sweep(write(tmp_path, {"model.lambda_attn": {"values": [1, 3]}})).trials()
    more = read_sweep(write(tmp_path, {"model.lambda_attn": {"values": [2, 3, 1]}})).trials()
    assert {trial.id for trial in few} < {trial.id for trial in more}


DISTRIBUTIONS = {
    "uniform": ({"min": -1.0, "max": 2.0}, lambda x: (x + 1) / 3),
    "int_uniform": ({"min": 1, "max": 4}, None),
    "q_uniform": ({"min": 0.0, "max": 1.0, "q": 0.25}, None),
    "log_uniform": ({"min": 0.0, "max": 2.0}, lambda x: np.log(x) / 2),
    "log_uniform_values": ({"min": 1.0, "max": 100.0}, lambda x: np.log(x) / math.log(100)),
    "inv_log_uniform_values": ({"min": 1.0, "max": 100.0}, lambda x: np.log(x) / math.log(100)),
    "inv_log_uniform": ({"min": 0.0, "max": 2.0}, lambda x: -np.log(x) / 2),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_random_search_draws_from_wandbs_distributions(tmp_path, name):
    numbers, to_uniform = DISTRIBUTIONS[name]
    path = write(tmp_path, {"x": {"distribution": name, **numbers}}, method="random")
    drawn = np.array([trial.values["x"] for trial in read_sweep(path).trials(count=2000)])
    if to_uniform is None:
        expected = [1, 2, 3, 4] if name == "int_uniform" else [0, 0.25, 0.5, 0.75, 1]
        assert sorted(set(drawn.tolist())) == expected
        return
    u = np.sort(to_uniform(drawn))
    assert np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max() < 0.05  # Kolmogorov-Smirnov


def test_random_search_repeats_itself_and_needs_a_number(tmp_path):
    path = write(tmp_path, {"x": {"min": 0.0, "max": 1.0}}, method="random")
    assert read_sweep(path).trials(count=3, seed=1) == read_sweep(path).trials(count=3, seed=1)
    assert read_sweep(path).trials(count=3, seed=1) != read_sweep(path).trials(count=3, seed=2)
    with pytest.raises(InputError, match=r"has no end.*--count"):
        read_sweep(path).trials()
    assert len(read_sweep(write(tmp_path, {"x": {"min": 0.0, "max": 1.0}}, method="random", run_cap=5)).trials()) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: bayes", "wandb agent"),
        ("method: luck", "grid or random"),
        ("metod: grid", "unknown key 'metod'.*did you mean 'method'"),
        ("command: [${env}, python]", "not valid YAML.*quotes"),
        ("- a", "mapping"),
        ("method: grid\ncommand: [python, train.py]", "svf_lightning fit"),
        ("method: grid\ncommand: [svf_lightning, fit]\nparameters: {}", "parameters"),
        ("method: grid\ncommand: [svf_lightning, fit]\nparameters: {a: 3}", r"parameters\.a"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_sweep(path).trials()


def test_a_grid_over_a_continuous_range_is_refused(tmp_path):
    with pytest.raises(InputError, match="method: random"):
        read_sweep(write(tmp_path, {"x": {"min": 0.0, "max": 1.0}})).trials()


def test_a_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")


def test_a_trial_survives_the_file_that_keeps_it(tmp_path):
    path = write(tmp_path, {"model.importance": {"values": [[0.5, 1.0], [1.0, 1.0]]}, "seed_everything": {"value": 3}})
    for trial in read_sweep(path).trials():
        for whole in (trial, replace(trial, run_dir=tmp_path / trial.id, config="seed_everything: 3\n")):
            entry = json.loads(json.dumps(whole.as_json()))
            assert Trial.from_json(entry) == whole
            assert (entry["id"], entry["label"]) == (whole.id, whole.label)  # for those who read the file
    assert trial.cell == (("model.importance", "[1.0, 1.0]"),)
