"""The commands `sweep` and `report`, and `fit` as a W&B agent starts it."""

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.command_line import Command, run_dir_of
from helpers.sweeps import write_sweep

from svf_lightning import cli
from svf_lightning.commands.report import report_sweep
from svf_lightning.commands.sweep import sweep
from svf_lightning.errors import InputError
from svf_lightning.pages.sweep import write_sweep_page
from svf_lightning.sweep.results import Sweep
from svf_lightning.wandb_logger import RunLogger

COMMAND = ["${env}", "${interpreter}", "-m", "svf_lightning", "fit", "--config", "robust_seed", "${args}"]
SHORT = {
    "model.n_instances": {"value": 1},
    "trainer.max_steps": {"value": 20},
    "capture.every_n_steps": {"value": 5},
    "data.batch_size": {"value": 16},
}


LAMBDA = {"model.lambda_attn": {"values": [1.0, 10.0]}, "seed_everything": {"values": [0, 1]}}


def write(folder, parameters, **others):
    path = folder / "few.yaml"
    content = {
        "method": "grid",
        "project": "svf-lightning",
        "command": COMMAND,
        "parameters": {**parameters, **SHORT},
    }
    path.write_text(yaml.safe_dump({**content, **others}, sort_keys=False))
    return path


@pytest.fixture
def file(tmp_path):
    return lambda parameters, **others: write(tmp_path, parameters, **others)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of four trials that the real command has run: the folder that it ran in, and its result."""
    root = tmp_path_factory.mktemp("finished")
    command = Command(root / "work")
    command.folder.mkdir()
    return command.folder, command("sweep", write(root, LAMBDA), "--jobs=1")


@pytest.fixture
def swept(finished, tmp_path):
    """A copy of that sweep's directory, to be changed."""
    folder, result = finished
    assert result.returncode == 0, result.stderr
    return shutil.copytree(folder / result.stdout.splitlines()[-1], tmp_path / "swept")


def test_a_sweep_runs_every_trial_once_and_writes_its_tables(finished):
    work, result = finished
    assert result.returncode == 0, result.stderr
    folder = work / result.stdout.splitlines()[-1]
    assert folder == work / "runs" / "sweeps" / "few"
    assert len(list(folder.glob("trials/*/summary.json"))) == 4
    assert "4 trials, 0 done before, 4 to run" in result.stderr
    assert "4 done, 0 failed, 0 missing" in result.stdout
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    assert [(row["model.lambda_attn"], row["n"]) for row in rows] == [("1.0", "2"), ("10.0", "2")]
    assert len(list(csv.DictReader((folder / "trials.csv").open()))) == 4
    assert (folder / "cells.md").read_text().startswith("| lambda_attn | n | failed | missing |")
    assert (folder / "report.html").is_file()
    assert "\ntorch==" in (folder / "requirements.txt").read_text()


def test_a_sweep_with_one_value_more_runs_the_trials_of_that_value_alone(swept, file, capsys):
    summaries = sorted(swept.glob("trials/*/summary.json"))
    written = [path.stat().st_mtime_ns for path in summaries]
    path = file({**LAMBDA, "model.lambda_attn": {"values": [1.0, 10.0, 3.0]}})
    assert sweep(str(path), sweep_dir=str(swept), jobs=1) == (swept, 0)
    assert "6 trials, 4 done before, 2 to run" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in summaries] == written
    assert len(list(swept.glob("trials/*/summary.json"))) == 6


def test_a_report_of_a_sweep_prints_its_cells_and_where_its_page_is(swept, typed):
    (swept / "report.html").unlink()
    table = typed("report", swept, "--below=0.5")
    assert table.returncode == 0, table.stderr
    assert "4 done, 0 failed, 0 missing" in table.stdout
    assert "below 0.5" in table.stdout
    assert table.stdout.splitlines()[-1] == str(swept / "report.html")
    assert (swept / "report.html").is_file()


def test_a_second_sweep_of_the_same_directory_is_refused_while_one_runs(file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="no sweep runs in"):
            sweep(str(file(LAMBDA)), sweep_dir=str(folder))
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_dry_run_prints_command_lines_and_writes_nothing(file, command: Command):
    result = command("sweep", file(LAMBDA), "--dry_run")
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("python -m svf_lightning fit")]
    assert len(lines) == 4
    assert "--model.lambda_attn=10.0 --seed_everything=1 --model.n_instances=1" in lines[-1]
    assert list(command.folder.iterdir()) == []


def test_a_trial_that_fails_is_counted_and_tried_again_and_the_others_go_on(file, tmp_path, capsys):
    path = file({"data.feature_probability": {"values": [0.1, 7.0]}, "seed_everything": {"values": [0, 1]}})
    folder, code = sweep(str(path), sweep_dir=str(tmp_path / "out"), jobs=1)
    assert code == 1
    found = Sweep(folder)
    states = {trial.label: found.state(trial) for trial in found.trials}
    assert states == {
        "feature_probability=0.1 seed=0": "done",
        "feature_probability=0.1 seed=1": "done",
        "feature_probability=7.0 seed=0": "failed",
        "feature_probability=7.0 seed=1": "failed",
    }
    assert "feature_probability" in (found.trials[2].folder / "error.txt").read_text()
    cells = found.cells()
    assert cells["n"].tolist() == [2, 0]
    assert cells["failed"].tolist() == [0, 2]
    capsys.readouterr()
    sweep(str(path), sweep_dir=str(tmp_path / "out"), jobs=1)
    assert "2 done before, 2 to run" in capsys.readouterr().err


def test_an_option_that_no_trial_can_have_is_a_failure_of_each(file, tmp_path):
    folder, code = sweep(str(file({"model.lambda": {"values": [1, 2]}})), sweep_dir=str(tmp_path / "out"), jobs=1)
    found = Sweep(folder)
    assert code == 1
    assert [found.state(trial) for trial in found.trials] == ["failed", "failed"]
    assert "model.lambda" in (found.trials[0].folder / "error.txt").read_text()


def processes_of(group):
    return subprocess.run(["pgrep", "-a", "-g", str(group)], capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A sweep that Ctrl-C has stopped while it trained: its file, its directory, and the process."""
    root = tmp_path_factory.mktemp("interrupted")
    command = Command(root / "work")
    command.folder.mkdir()
    path = write(root, {"seed_everything": {"values": [0, 1]}, "model.n_features": {"values": [20, 21]}})
    path.write_text(path.read_text().replace("value: 20\n", "value: 1000000\n"))
    process = subprocess.Popen(
        [sys.executable, "-m", "svf_lightning", "sweep", str(path), "--jobs=2"],
        cwd=command.folder, env=command.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # a shell's background job ignores Ctrl-C, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    folder = command.folder / "runs" / "sweeps" / "few"
    deadline = time.monotonic() + 120
    while not list(folder.glob("trials/*/config.yaml")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    return path, folder, process


def test_ctrl_c_stops_the_workers_and_the_same_sweep_goes_on(interrupted, capsys):
    path, folder, process = interrupted
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "0 done, 0 failed, 4 missing" in out
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == ""
    path.write_text(path.read_text().replace("value: 1000000\n", "value: 20\n"))
    assert sweep(str(path), sweep_dir=str(folder), jobs=1) == (folder, 0)
    assert "4 done, 0 failed, 0 missing" in capsys.readouterr().out


def test_ray_runs_the_same_trials_and_brings_them_back(swept, file, tmp_path):
    pytest.importorskip("ray")
    folder, code = sweep(str(file(LAMBDA)), engine="ray", sweep_dir=str(tmp_path / "ray"), jobs=2)
    assert code == 0
    names = sorted(path.relative_to(folder) for path in folder.glob("trials/*/*"))
    assert names
    assert names == sorted(path.relative_to(swept) for path in swept.glob("trials/*/*"))
    mean = "alignment/matched"
    assert Sweep(folder).table()[mean].round(4).tolist() == Sweep(swept).table()[mean].round(4).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "cannot be read"),
        ([], "file"),
        (["FILE", "--jobs=0"], "jobs=0 is not usable"),
        (["FILE", "--engine=slurm"], "engine"),
        (["FILE", "--sweep_dir=RUN"], "already holds a run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(file, command: Command, typed, arguments, message):
    run = command.folder / "a_run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    path = file(LAMBDA)
    result = typed("sweep", *(a.replace("FILE", str(path)).replace("RUN", str(run)) for a in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_report_needs_a_sweep(tmp_path):
    with pytest.raises(InputError, match="holds no sweep"):
        report_sweep(tmp_path)


def test_the_rule_counts_trials_below_it_and_those_without_a_number(swept, tmp_path):
    found = Sweep(swept)
    values = [0.95, 0.85, 0.99, None]
    for trial, value in zip(found.trials, values, strict=True):
        path = trial.folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["metrics"]["alignment/matched"]["mean"] = value
        path.write_text(json.dumps(summary))
    cells = Sweep(swept).cells(below=0.9)
    assert cells["below 0.9"].tolist() == [0.5, 0.5]
    assert cells["mean"].tolist() == pytest.approx([0.9, 0.99])
    assert cells["min"].tolist() == [0.85, 0.99]
    page = write_sweep_page(found, cells, metric="alignment/matched", below=0.9, out=tmp_path / "page.html").read_text()
    assert "Of 4 trials that are done, alignment/matched is below 0.9 in 1, and has no number in 1." in page
    assert "no number in 1" in page.split("Axes (Appendix A)")[1]


def test_under_an_agent_the_run_is_the_sweeps_and_its_configuration_is_stored_once(command: Command, tmp_path):
    # what wandb.wandb_agent.Agent sets up for a trial
    parameters = tmp_path / "config-abc123.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, "model.lambda_attn": {"value": 3.0}}))
    agent = {"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "abc123", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    agent |= {"WANDB_PROJECT": "of-the-sweep", "WANDB_ENTITY": "somebody"}
    trial = [
        "fit",
        "--config=robust_seed",
        "--model.lambda_attn=3.0",
        "--model.n_instances=1",
        "--trainer.max_steps=10",
    ]
    for _ in range(2):  # the same command twice is never an error
        result = command(*trial, **agent)
        assert result.returncode == 0, result.stderr
        assert "W&B: not available" not in result.stderr
        run_dir = command.folder / result.stdout.splitlines()[-1]
        (run,) = (run_dir / "wandb").glob("offline-run-*-abc123")
        written = b"".join(path.read_bytes() for path in run.glob("*.wandb"))
        assert b"sw33p" in written
        assert b"of-the-sweep" in written
        assert b"alignment/matched" in written


def test_early_termination_sees_values_while_a_trial_trains(monkeypatch, tmp_path):
    """Rows reach the logger during training, and W&B's own hyperband stops the trial that does not align."""
    hyperband = pytest.importorskip("sweeps.hyperband_stopping")
    from sweeps import RunState, SweepRun

    monkeypatch.setenv("WANDB_MODE", "disabled")
    runs = []
    for name, weight in (("aligns", 30), ("does not", 0)):
        logged = []

        def log(self, metrics, step=None, logged=logged):
            logged.append((self.trained(), step, dict(metrics)))

        model = {}
        monkeypatch.setattr(
            RunLogger, "trained", lambda self, model=model: model["cli"].trainer.global_step, raising=False
        )
        monkeypatch.setattr(RunLogger, "log_metrics", log)
        monkeypatch.setattr(cli.RunCLI, "_begin_run", lambda self, model=model: model.update(cli=self))
        cli.fit(
            [
                "--config=robust_seed", "--model.n_instances=1", f"--model.lambda_attn={weight}",
                "--trainer.max_steps=600", "--data.batch_size=32", "--model.learning_rate=0.01",
                "--capture.chunk=20", "--run_dir", str(tmp_path / name),
            ]
        )  # fmt: skip
        assert sum(trained < 600 and "alignment/matched" in metrics for trained, _, metrics in logged) >= 5
        assert max(trained - step for trained, step, metrics in logged if step is not None) <= 100  # a chunk of rows
        history = [metrics for _, _, metrics in logged if "alignment/matched" in metrics]
        runs.append(SweepRun(name=name, state=RunState.running, history=history))
    config = {
        "method": "grid",
        "parameters": {"model.lambda_attn": {"values": [0, 30]}},
        "metric": {"name": "alignment/matched", "goal": "maximize"},
        "early_terminate": {"type": "hyperband", "min_iter": 10, "eta": 3},
    }
    stopped = hyperband.hyperband_stop_runs(runs, config)
    assert [run.name for run in stopped] == ["does not"]


def test_a_sweep_does_not_go_on_with_other_settings_in_a_file_that_it_names(forked, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text("model: {d_head: 4}\ntrainer: {logger: false}\n")
    file = write_sweep(
        tmp_path / "some.yaml", {"model.lambda_attn": {"values": [1.0, 2.0]}}, extra=["--config", str(settings)]
    )
    folder = run_dir_of(forked("sweep", file, "--jobs=1"), forked)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    settings.write_text("model: {d_head: 5}\ntrainer: {logger: false, gradient_clip_val: 1}\n")
    more = write_sweep(
        tmp_path / "some.yaml", {"model.lambda_attn": {"values": [1.0, 2.0, 3.0]}}, extra=["--config", str(settings)]
    )
    result = forked("sweep", more, "--jobs=1")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert (
        "was trained with other settings: model.d_head was 4 and is 5 now; trainer.gradient_clip_val was None and is 1"
        in result.stderr
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    settings.write_text("model: {d_head: 4}\ntrainer: {logger: false, enable_progress_bar: false}\n")
    assert forked("sweep", more, "--jobs=1").returncode == 0
    assert Sweep(folder).counts() == "3 done, 0 failed, 0 missing"
