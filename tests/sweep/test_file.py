"""A sweep file gives the same trials, and the same command lines, as W&B's own code."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from svf_lightning import cli
from svf_lightning.cli import FitSettings
from svf_lightning.errors import InputError
from svf_lightning.sweep.cohort import train
from svf_lightning.sweep.file import read_sweep
from svf_lightning.sweep.parameters import DISTRIBUTIONS as KINDS
from svf_lightning.sweep.parameters import read_parameter
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
        ("just text", "mapping"),
        ("", "grid or random"),
        ("method: grid\nmethod: random", "duplicate key method"),
        ("method: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("method: !!int x", "not valid YAML"),
        (f"method: {'9' * 5000}", "not valid YAML"),
        ("a: &a [1]\nb: &b [*a, *b]", "not valid YAML"),
        (f"method: {'[' * 50000}{']' * 50000}", "nested more than 20 levels"),
        ('name: "\\ud800"', "not valid YAML"),
        ("name: !!binary aGVsbG8=", "name=b'hello' is not usable"),
        ("1: grid", "unknown key 1"),
        (f"description: {'x' * 1000000}", "too large"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_sweep(path).trials()


PARAMETERS = {  # as people post them
    "min above max": ({"min": 0.3, "max": 0.1}, "min less than max, not 0.3 and 0.1"),
    "min above max, of whole numbers": ({"distribution": "int_uniform", "min": 20, "max": 4}, "min less than max"),
    "exponents beyond a float": ({"distribution": "log_uniform", "min": 100, "max": 1_000_000}, "log_uniform_values"),
    "a product beyond a float": ({"distribution": "log_normal", "mu": 700, "sigma": 100}, "finite numbers"),
    "a range beyond a float": ({"min": -1.7e308, "max": 1.7e308}, "finite numbers"),
    "a number beyond a float": (
        {"distribution": "q_uniform", "min": 0, "max": 1, "q": 10**400},
        "what a float can hold",
    ),
    "probabilities of another length": ({"values": [1, 3], "probabilities": [1.0]}, "as many probabilities as values"),
    "probabilities of another sum": ({"values": [1, 3], "probabilities": [0.9, 0.9]}, "sum to 1, not to 1.8"),
    "a negative probability": ({"values": [1, 3], "probabilities": [-0.5, 1.5]}, "greater than or equal to 0"),
    "q of 0": (
        {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0},
        r"q=0 is not usable. Allowed: greater than 0",
    ),
    "values as a scalar": ({"values": 3}, "values=3 is not usable. Allowed: a list"),
    "values as a text": ({"values": "abc"}, "values='abc' is not usable. Allowed: a list"),
    "no values": ({"values": []}, "at least one"),
    "not a number": ({"value": math.nan}, "finite numbers"),
    "a bound that is text": ({"min": "low", "max": 1.0}, "min='low' is not usable"),
    "a bound that is missing": ({"distribution": "uniform", "min": 1}, "max is missing"),
    "a key of another kind": ({"values": [1], "q": 2}, "q has no meaning here"),
    "no distribution of W&B's": ({"distribution": "poisson", "mu": 2}, "value, values, or a distribution"),
    "a mapping with numbers as keys": ({"value": {1: 2}}, "text as keys"),
    "nested, and empty": ({"parameters": {}}, "value, values, or a distribution"),
}


@pytest.mark.parametrize("method", ["grid", "random"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_that_cannot_be_used_is_one_line_that_names_it(tmp_path, name, method):
    parameter, message = PARAMETERS[name]
    path = write(tmp_path, {"model.lambda_attn": parameter}, method=method, run_cap=50)
    continuous = method == "grid" and name.startswith(("a product", "a range"))
    with pytest.raises(InputError, match="method: random" if continuous else message) as error:
        read_sweep(path).trials()
    assert "parameters.model.lambda_attn" in str(error.value)
    assert "Allowed: " in str(error.value)
    assert "Fix: " in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"metric": "alignment/matched"}, "metric='alignment/matched' is not usable. Allowed: a mapping"),
        ({"metric": {"goal": "maximize"}}, "metric.name is missing"),
        ({"metric": {"name": "x", "goal": "best"}}, "minimize or maximize"),
        ({"run_cap": "two"}, "run_cap='two' is not usable"),
        ({"run_cap": 0}, "run_cap=0 is not usable"),
        ({"run_cap": True}, "run_cap=True is not usable"),
        ({"name": 3}, "name=3 is not usable"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter, or max_iter and s"),
        ({"scheduler": {"engine": "optuna"}}, "wandb agent"),
        ({"command": "python -m svf_lightning fit"}, "command"),
        ({"command": [*COMMAND[:-1]]}, "parameters reach"),
        ({"command": [*COMMAND[:-1], "${args_json_file}"]}, "a file that W&B's agent writes"),
        ({"command": [*COMMAND, "${arg}"]}, "no macro"),
        ({"parameters": {"a b": {"value": 1}}}, "letters, digits"),
        ({"parameters": {"--x": {"value": 1}}}, "letters, digits"),
        ({"parameters": {"model": {"parameters": {"d": {"value": 1}}}, "model.d": {"value": 2}}}, "twice"),
        ({"parameters": {"x": {"distribution": "int_uniform", "min": 0, "max": 10**15}}}, "at most 100000 values"),
        (
            {"parameters": {"x": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-300}}},
            "at most 100000 values",
        ),
        ({"parameters": {name: {"values": list(range(100))} for name in "abcd"}}, "100000000 trials. Allowed: at most"),
        ({"method": "random", "run_cap": 10**9}, "1000000000 trials. Allowed: at most"),
    ],
)
def test_a_key_that_cannot_be_used_is_one_line_that_names_it(tmp_path, others, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.").replace("{", r"\{")):
        read_sweep(write(tmp_path, **{"parameters": {"model.lambda_attn": {"values": [1, 3]}}} | others)).trials()


def test_numbers_and_dates_are_read_as_by_fit(tmp_path):
    path = write(tmp_path, {"x": {"value": 0}}, method="random", run_cap=20)
    path.write_text(
        path.read_text().replace("value: 0", "distribution: log_uniform_values\n    min: 1e-5\n    max: 1e-2")
    )
    assert all(1e-5 <= trial.values["x"] <= 1e-2 for trial in read_sweep(path).trials())
    path = write(tmp_path, {"x": {"values": ["here"]}})
    path.write_text(path.read_text().replace("here", "2026-11-25"))
    (trial,) = read_sweep(path).trials()
    assert trial.args[-1] == "--x=2026-11-25"


def test_the_nested_form_gives_the_agents_command_line_and_names_with_dots(tmp_path, fit):
    nested = {"lambda_attn": {"values": [1.0, 3.0]}, "d_model": {"value": 16}}
    trials = read_sweep(write(tmp_path, {"model": {"parameters": nested}, "seed_everything": {"value": 1}})).trials()
    assert [trial.label for trial in trials] == ["lambda_attn=1.0", "lambda_attn=3.0"]
    assert trials[1].values == {"model.lambda_attn": 3.0, "model.d_model": 16, "seed_everything": 1}
    grouped, seed = trials[1].args[-2:]
    assert ast.literal_eval(grouped.removeprefix("--model=")) == {"lambda_attn": 3.0, "d_model": 16}
    assert seed == "--seed_everything=1"
    model = yaml.safe_load(fit.of(trials[1].args[1:]))["model"]
    assert (model["lambda_attn"], model["d_model"], model["d_head"]) == (3.0, 16, 16)


def test_keys_of_wandb_that_do_not_matter_here_are_no_error(tmp_path):
    others = {"controller": {"type": "local"}, "apiVersion": "1", "kind": "sweep", "job": "x", "run_cap": 1.0}
    assert len(read_sweep(write(tmp_path, {"x": {"values": [1, 2]}}, **others)).trials()) == 1


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", ".hidden", "a/b", "a\\b", "a\0b", "é" * 150, " "])
def test_a_name_that_no_directory_can_have_is_refused_as_one(tmp_path, name):
    read = read_sweep(write(tmp_path, {"x": {"values": [1, 2]}}, name=name))
    assert len(read.trials()) == 2  # a directory of another name can have them
    with pytest.raises(InputError, match="--sweep_dir"):
        _ = read.folder


@pytest.mark.parametrize("value", ["../../evil", "/etc/passwd", "é" * 300, "x" * 300, "\n", "$(true)", "", ".."])
def test_ids_of_trials_are_names_of_directories(tmp_path, value):
    for trial in read_sweep(write(tmp_path, {"experiment.name": {"values": [value, "other"]}})).trials():
        (tmp_path / "trials" / trial.id).mkdir(parents=True)
        assert (tmp_path / "trials" / trial.id).parent == tmp_path / "trials"
        assert {"/", "\n", "$"}.isdisjoint(trial.id)


_NUMBERS = st.one_of(st.integers(-5, 5), st.floats(-5, 5), st.sampled_from([0, 1.0, 0.5, "1", None, True, [1]]))
_KEYS = {
    **dict.fromkeys(("min", "max", "mu", "sigma", "q", "a", "b", "value"), _NUMBERS),
    "values": st.lists(_NUMBERS, max_size=3) | _NUMBERS,
    "probabilities": st.sampled_from([[0.5, 0.5], [1], [0.25, 0.25, 0.5]]) | st.lists(_NUMBERS, max_size=3),
    "distribution": st.sampled_from([*KINDS, "x", 3]),
}
_OF_KIND = {
    "constant": ["value"],
    "categorical": ["values"],
    "categorical_w_probabilities": ["values", "probabilities"],
}


@st.composite
def parameters(draw):
    """An entry of a parameter that is near to what W&B allows."""
    kind = draw(st.sampled_from(KINDS))
    numbers = ["min", "max"] if "uniform" in kind else ["mu", "sigma"] if "normal" in kind else ["a", "b"]
    keys = [*_OF_KIND.get(kind, numbers), *draw(st.lists(st.sampled_from(sorted(_KEYS)), max_size=1))]
    entry = {key: draw(_KEYS[key]) for key in keys}
    return entry | ({"distribution": kind} if draw(st.booleans()) else {})


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(parameters())
def test_a_parameter_is_usable_when_it_is_for_wandbs_own_schema(entry):
    config = pytest.importorskip("sweeps.config")
    try:
        usable = read_parameter(entry) is not None
    except ValidationError:
        usable = False
    try:
        violations = config.schema_violations_from_proposed_config({"method": "random", "parameters": {"x": entry}})
        # log_uniform is deprecated there, and works
        theirs = all("base-e exponents" in violation for violation in violations)
    except Exception:
        theirs = False
    if "beta" in str(entry.get("distribution")) and 0 in (entry.get("a"), entry.get("b")):
        theirs = False  # the schema allows it; there is no such distribution
    assert usable == theirs


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
