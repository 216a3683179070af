"""The real command, as a user types it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.command_line import Command, ForkedCommand, ForkedProcess, run_dir_of

from svf_lightning.pages.run import write_run_page
from svf_lightning.trajectory import open_trajectory

QUICK = ("--trainer.max_steps=40", "--data.batch_size=16", "--model.n_instances=2")
PLAIN = ("--report=false", "--trainer.logger.init_args.log_media=false")  # seconds of drawing for each run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run that several tests look at (and copy before they change it)."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    result = Command(folder)("fit", *QUICK)
    command = ForkedCommand(folder)
    return command, result, run_dir_of(result, command)


def test_fit_writes_everything_into_one_run_directory_and_prints_it_last(finished):
    command, result, run_dir = finished
    assert re.fullmatch(r"runs/single_pair/\d{8}-\d{6}-[0-9a-f]{4}", result.stdout.strip().splitlines()[-1])
    assert [p.name for p in command.folder.iterdir()] == ["runs"]
    names = {p.name for p in run_dir.iterdir()}
    assert names == {".lock", "checkpoints", "config.yaml", "report.html", "summary.json", "trajectory.zarr", "wandb"}
    assert re.search(r"judged claims hold.*measured +null", result.stdout, re.DOTALL)
    assert result.stderr.splitlines()[-1] == f"page: {run_dir.relative_to(command.folder)}/report.html"
    assert "Traceback" not in result.stderr
    assert f"wandb sync runs/single_pair/{run_dir.name}/wandb/offline-run-" in result.stderr


def test_the_summary_is_valid_json_and_agrees_with_the_trajectory(finished):
    _, _, run_dir = finished
    summary = json.loads((run_dir / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert summary["experiment"] == "single_pair"
    assert summary["status"] == "finished"
    assert summary["steps"] == 40
    assert {"torch", "lightning", "svf-lightning", "python"} <= summary["versions"].keys()
    last = open_trajectory(run_dir).isel(step=-1)
    for name in ("alignment/matched", "loss/total", "orthogonality/attended_vs_rest", "spectrum/sigma_1"):
        values = last[name].values
        np.testing.assert_allclose(summary["metrics"][name]["per_instance"], values)
        assert summary["metrics"][name]["mean"] == pytest.approx(values.mean())
        assert summary["metrics"][name]["min"] == pytest.approx(values.min())
    claims = {c["claim"]: c for c in summary["claims"]}
    assert len(claims) == 13
    first = claims["the top singular vectors are the attended features"]
    matched = last["alignment/matched"].values
    assert first["measured"] == pytest.approx(matched.mean())
    assert first["verdict"] == ("yes" if (matched >= first["threshold"]).all() else "no")
    assert 0.3 < first["null"]["value"] < first["threshold"]


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    command, _, run_dir = finished
    again = run_dir_of(command("fit", "--config", run_dir / "config.yaml", "--report=false"), command)
    assert again != run_dir
    assert (again / "config.yaml").read_text() == (run_dir / "config.yaml").read_text()
    a, b = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (run_dir, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert open_trajectory(run_dir).load().equals(open_trajectory(again).load())


def test_an_override_reaches_everything_that_is_derived_from_it(forked):
    result = forked("fit", *QUICK, *PLAIN, "--model.n_features=13", "--model.d_model=6", "--seed_everything=5")
    config = yaml.safe_load((run_dir_of(result, forked) / "config.yaml").read_text())
    dataset = open_trajectory(run_dir_of(result, forked))
    assert dataset.sizes["feature"] == 13
    assert dataset.sizes["d_model"] == config["model"]["d_head"] == 6
    assert dataset.sizes["instance"] == 2
    assert config["model"]["seed"] == config["data"]["seed"] == 5
    assert dataset["seed"].values.tolist() == [5, 6]


def test_the_same_command_twice_makes_two_runs(forked):
    runs = {run_dir_of(forked("fit", *QUICK, *PLAIN, "--trainer.max_steps=5"), forked) for _ in range(2)}
    assert len(runs) == 2


def test_lists_give_one_value_per_instance(forked):
    result = forked("fit", *QUICK, *PLAIN, "--model.lambda_attn=[1.0, 1e-05]", "--data.feature_probability=[0.1, 0.5]")
    assert open_trajectory(run_dir_of(result, forked))["lambda_attn"].values.tolist() == [1.0, 1e-5]


@pytest.mark.parametrize("command_name", ["test", "validate"])
def test_a_checkpoint_is_evaluated_in_a_run_directory_of_its_own(finished, command_name):
    command, _, run_dir = finished
    checkpoint = next((run_dir / "checkpoints").glob("*.ckpt"), None)
    assert checkpoint is not None
    result = command(command_name, "--ckpt_path", checkpoint)
    evaluated = run_dir_of(result, command)
    summary = json.loads((evaluated / "summary.json").read_text())
    assert evaluated.name.endswith(f"-{command_name}")
    assert summary["steps"] == 40
    last = open_trajectory(run_dir).isel(step=-1)
    found = summary["metrics"]["alignment/matched"]["per_instance"]
    np.testing.assert_allclose(found, last["alignment/matched"].values, rtol=1e-5)


def wait_for_rows(process, folder, n):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("runs/*/*/checkpoints/last.ckpt"):
            run_dir = path.parents[1]
            if open_trajectory(run_dir).sizes["step"] >= n:
                return run_dir
        time.sleep(0.05)
    process.kill()
    err = process.output("err") if isinstance(process, ForkedProcess) else process.communicate()[1]
    raise AssertionError(f"it ended, or wrote too few rows: {err}")


LONG = ("--trainer.max_steps=100000", "--data.batch_size=16", "--model.n_instances=2")


def test_ctrl_c_keeps_the_rows_and_writes_the_summary(command):
    process = command.start("fit", *LONG)
    run_dir = wait_for_rows(process, command.folder, 500)
    page = write_run_page(run_dir, command.folder / "meanwhile.html").read_text()  # while the run goes on
    assert "The run has not ended, or was killed" in page
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.strip().splitlines()[-1] == str(run_dir.relative_to(command.folder))
    summary = json.loads((run_dir / "summary.json").read_text())
    steps = open_trajectory(run_dir)["step"].values
    assert summary["status"] == "interrupted"
    assert summary["steps"] == steps[-1] == len(steps) - 1
    assert "Traceback" not in err


def test_a_killed_run_is_readable_and_resumes_to_the_run_that_was_not_killed(forked):
    process = forked.start("fit", *LONG)
    run_dir = wait_for_rows(process, forked.folder, 600)
    process.kill()
    rows = open_trajectory(run_dir).load()
    assert rows["step"].values.tolist() == list(range(rows.sizes["step"]))
    checkpoint = run_dir / "checkpoints" / "step-500.ckpt"
    resumed = run_dir_of(
        forked("fit", "--ckpt_path", checkpoint.relative_to(forked.folder), "--trainer.max_steps=700", *PLAIN),
        forked,
    )
    assert resumed == run_dir
    whole = run_dir_of(forked("fit", *LONG, "--trainer.max_steps=700", *PLAIN), forked)
    assert open_trajectory(whole).load().equals(open_trajectory(resumed).load())
    a, b = (json.loads((p / "summary.json").read_text()) for p in (whole, resumed))
    assert (a["metrics"], a["claims"], a["steps"]) == (b["metrics"], b["claims"], b["steps"])


# ---- bad input: one line, exit code 2, nothing left behind ----------------------------------------------------------


BAD = {
    "a shape that does not fit": (["--model.lambda_attn=[1.0,2.0,3.0]"], r"lambda_attn has 3 values for 8 instances.*Fix"),
    "no features": (["--model.n_features=0"], r"n_features=0.*>= 1"),
    "a template beyond the features": (["--model.n_features=1"], r"feature 1, which does not exist.*Fix"),
    "a template of an unknown name": (["--model.template=diagonal"], r"model.template.*single.*many_to_one"),
    "probability zero": (["--data.feature_probability=0"], r"feature_probability=0.0.*\(0, 1\]"),
    "probability above one": (["--data.feature_probability=1.5"], r"feature_probability=1.5.*\(0, 1\]"),
    "an unknown option": (["--model.lamda_attn=3"], r"unknown option --model.lamda_attn. Did you mean 'model.lambda_attn'\?"),
    "a word for a number": (["--model.d_model=ten"], r"model.d_model is not usable.*int.*ten"),
    "a file that is not there": (["--config", "nowhere.yaml"], r"nowhere.yaml: there is no such file.*single_pair"),
    "a misspelt preset": (["--config", "singel_pair"], r"Did you mean 'single_pair'\?"),
    "an unknown key in a file": (["--config", "unknown.yaml"], r"unknown key model.lamda in unknown.yaml"),
    "a file that is not YAML": (["--config", "broken.yaml"], r"broken.yaml"),
    "a missing checkpoint": (["--ckpt_path", "nowhere.ckpt"], r"nowhere.ckpt: there is no such file.*Fix"),
    "a corrupt checkpoint": (["--ckpt_path", "corrupt.ckpt"], r"corrupt.ckpt cannot be read.*Fix"),
    "a pickle that is not a checkpoint": (["--ckpt_path", "foreign.ckpt"], r"foreign.ckpt cannot be read.*Fix"),
    "a checkpoint of other sizes": (["--ckpt_path", "other.ckpt"], r"another shape: .*model.n_instances was 2 and is 8 now.*Fix"),
    "a directory that holds a run": (["--run_dir", "taken"], r"run_dir taken already holds a run.*Fix"),
    "a run directory that is a file": (["--run_dir", "unknown.yaml"], r"is a file.*Fix"),
    "accumulated gradients": (["--trainer.accumulate_grad_batches=2"], r"accumulate_grad_batches=2.*batch_size"),
    "a head without keys": (["--data.context_length=0"], r"context_length=0.*at least 2"),
    "weight decay with adam": (["--model.weight_decay=0.1"], r"optimizer=adamw"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(command, typed, finished, case):
    arguments, message = BAD[case]
    (command.folder / "unknown.yaml").write_text("model:\n  lamda: 3\n")
    (command.folder / "broken.yaml").write_text("model: [1,\n")
    (command.folder / "corrupt.ckpt").write_text("not a checkpoint")
    torch.save({"weights": 1}, command.folder / "foreign.ckpt")
    shutil.copy(next((finished[2] / "checkpoints").glob("*.ckpt")), command.folder / "other.ckpt")
    (command.folder / "taken").mkdir()
    (command.folder / "taken" / "summary.json").write_text("{}")
    before = command.files()
    run = command if case == "no features" else typed
    result = run("fit", *arguments)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert result.stdout == ""
    assert command.files() == before


def test_a_traceback_is_there_for_those_who_ask(command):
    result = command("fit", "--model.n_features=0", SVF_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_an_unknown_command_and_options_without_one_say_which_there_are(typed):
    for arguments in (("fat",), ("--model.lambda_attn=3",)):
        result = typed(*arguments)
        assert result.returncode == 2
        assert re.search(
            r"fit, validate, test, replay, presets, sweep, report, figures, publish, workspace", result.stderr
        )


def test_help_names_every_option_with_unit_and_default(typed):
    result = typed("fit", "--help=all")
    assert result.returncode == 0
    for option in (
        "--model.lambda_attn",
        "--data.feature_probability",
        "--run_dir",
        "--experiment.name",
        "--seed_everything",
    ):
        assert option in result.stdout
    flat = " ".join(result.stdout.split())
    assert "p, probability that a feature is active in a token, in (0, 1]" in flat
    assert "default: 0.001" in flat


def test_help_is_quick_since_nothing_heavy_is_imported(command):
    # beyond what Lightning itself imports: its torchmetrics takes transformers along where that is installed
    heavy = ("wandb", "xarray", "zarr", "plotly", "transformers", "transformer_lens", "huggingface_hub")
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); import svf_lightning.cli; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_wandb_that_cannot_start_does_not_stop_the_training(command):
    (command.folder / "wandb.py").write_text("raise RuntimeError('W&B is broken today')\n")
    environment = {"PYTHONPATH": str(command.folder)}
    result = command("fit", *QUICK, **environment)
    run_dir = run_dir_of(result, command)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert result.stderr.count("W&B") <= 2
    assert "the run goes on" in result.stderr


def test_the_installed_wheel_brings_callbacks_and_presets(tmp_path):
    """Built from the source tree, unpacked, and run from another folder with nothing of the source on the path."""
    source = Path(__file__).parents[2]
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(tmp_path / "source"),
    ]
    shutil.copytree(
        source, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "runs", "build", "tests", "*.egg-info")
    )
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((tmp_path / "dist").glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    work = tmp_path / "work"
    work.mkdir()
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p and p != {str(source)!r}]; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import svf_lightning.callbacks as c, svf_lightning.__main__ as cli; print(c.__file__); "
        "sys.exit(cli.main(['fit', '--trainer.max_steps=3', '--model.n_instances=1']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    assert next(work.glob("runs/*/*/report.html")).stat().st_size > 1e6  # with its script, a file of the package
    assert str(tmp_path / "site") in result.stdout
    assert list(work.glob("runs/single_pair/*/summary.json"))
