"""A metric of a user's own package shows everywhere, with unit and label, and no file of this package knows of it."""

import base64
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.browser import in_browser, needs_browser
from helpers.command_line import Command, run_dir_of
from helpers.replays import replay
from helpers.wandb_runs import live_run, table_of

from svf_lightning.callbacks import CheckpointTable
from svf_lightning.figures import FIGURES
from svf_lightning.pages.explorer import frames
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.testing import check_metric
from svf_lightning.trajectory import open_trajectory

TESTS = str(Path(__file__).parent)
THEIRS = "--trainer.callbacks+=their_package."
QUICK = ("--trainer.max_steps=30", "--data.batch_size=16", "--model.n_instances=2")
LABEL = "mean length of the features"


def _theirs(name, **options):
    return getattr(importlib.import_module("their_package"), name)(**options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of the default preset with the user's metric, as typed."""
    folder = tmp_path_factory.mktemp("own") / "work"
    folder.mkdir()
    command = Command(folder)
    result = command("fit", *QUICK, f"{THEIRS}FeatureNorms", PYTHONPATH=TESTS, COLUMNS="120")
    return result, run_dir_of(result, command)


@pytest.fixture(scope="module")
def run_dir(fitted):
    return fitted[1]


def test_its_numbers_are_those_of_the_features_at_every_step(run_dir):
    rows = open_trajectory(run_dir)
    expected = np.linalg.norm(rows["W"].values, axis=-2)
    np.testing.assert_allclose(rows["norms"].values, expected, rtol=1e-5)
    np.testing.assert_allclose(rows["norm/mean"].values, expected.mean(-1), rtol=1e-5)
    assert rows["shares"].dims == ("step", "instance", "d_model", "feature")
    assert rows["norm/mean"].attrs["units"] == "length"
    assert rows["norm/mean"].attrs["long_name"] == LABEL


def test_the_closing_output_shows_it_with_its_unit(fitted, run_dir):
    (line,) = [line for line in fitted[0].stdout.splitlines() if line.startswith("norm/mean ")]
    values = open_trajectory(run_dir)["norm/mean"].values[-1]
    shown = [f"{value:.4g}" for value in (values.mean(), values.min(), values.max())]
    assert line.split() == ["norm/mean", *shown, "length"]


def test_the_summary_has_it_with_unit_and_label(run_dir):
    entry = json.loads((run_dir / "summary.json").read_text())["metrics"]["norm/mean"]
    values = open_trajectory(run_dir)["norm/mean"].values[-1]
    assert (entry["label"], entry["unit"]) == (LABEL, "length")
    np.testing.assert_allclose(entry["per_instance"], values, rtol=1e-6)


def test_wandb_gets_it_at_every_logged_step_and_a_table_that_says_what_it_is(run_dir):
    logged = live_run(run_dir)
    values = open_trajectory(run_dir)["norm/mean"].values
    rows = [row for row in logged.history if "norm/mean" in row]
    assert float(rows[-1]["norm/mean"]) == pytest.approx(values[-1].mean())
    assert float(rows[0]["norm/mean/max"]) == pytest.approx(values[0].max())
    assert not any(name in row for row in logged.history for name in ("norms", "shares"))
    (about,) = [row for row in table_of(run_dir, "quantities") if row["name"] == "norm/mean"]
    assert (about["label"], about["unit"], about["meaning"]) == (LABEL, "length", "How long they are.")
    assert about["provider"] == "their_package.FeatureNorms"
    assert "figures/further" not in logged.history[-1]  # the page has it; W&B draws its own curves


def test_the_page_has_a_curve_of_the_scalar_on_an_axis_with_its_unit(run_dir):
    rows = open_trajectory(run_dir)
    figure = FIGURES["further"](rows)
    (curve,) = [trace for trace in figure.data if trace.name == LABEL]
    np.testing.assert_allclose(curve.y, rows["norm/mean"].values.mean(1)[-len(curve.y) :], rtol=1e-5)
    axis = figure.layout[curve.yaxis.replace("y", "yaxis")]
    assert axis.title.text == "length"


def test_the_slider_has_bars_of_the_vector_and_a_heat_map_of_the_matrix(run_dir):
    rows, data = open_trajectory(run_dir), frames(open_trajectory(run_dir))
    cells = {cell["title"]: (i, cell) for i, cell in enumerate(data["cells"])}
    for name, title, kind in (
        ("norms", "length of a feature", "bars"),
        ("shares", "share of a feature in a dimension", "heat"),
    ):
        i, cell = cells[title]
        assert (cell["kind"], cell["sizes"]) == (kind, list(rows[name].shape[2:]))
        packed = data["places"][1]["cells"][i]
        numbers = np.frombuffer(base64.b64decode(packed["values"]), np.int8).reshape(-1, *cell["sizes"])
        shown = numbers[-1] / 127 * packed["scale"]
        np.testing.assert_allclose(shown, rows[name].values[-1, 1], atol=0.51 / 127 * packed["scale"])


@needs_browser
def test_a_browser_draws_curve_bars_and_heat_map(run_dir):
    cells = [cell["title"] for cell in frames(open_trajectory(run_dir))["cells"]]
    bars, heat = cells.index("length of a feature"), cells.index("share of a feature in a dimension")
    values, errors = in_browser(
        run_dir / "report.html",
        "[...document.querySelectorAll('[class^=legend][class$=text]')].map((text) => text.textContent)",
        f"document.getElementById('explorer-{bars}').data[0].y.length",
        f"document.getElementById('explorer-{heat}').data[0].z.length",
        f"document.querySelectorAll('#explorer-{bars} .point').length",
    )
    assert errors == []
    assert LABEL in values[0]
    assert values[1:] == [20, 10, 20]


def test_its_page_is_the_same_where_the_package_is_not_installed(run_dir, typed, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "their_package", None)  # an import of it fails
    assert typed("report", run_dir, "--out", tmp_path / "page.html").returncode == 0
    pages = [path.read_text().split("<main>") for path in (tmp_path / "page.html", run_dir / "report.html")]
    # but for where the run lies, as seen from the page
    without_paths = [re.sub('<code>.*?</code>|href="[^#"]*"', "", main) for _, main in pages]
    assert without_paths[0] == without_paths[1]
    assert typed("figures", run_dir, tmp_path, "further", "--format=csv").returncode == 0
    numbers = pd.read_csv(tmp_path / "further.csv")
    shown = numbers[(numbers["quantity"] == "mean") & (numbers["metric"] == "norm/mean")]
    expected = open_trajectory(run_dir)["norm/mean"].values.mean(1)
    np.testing.assert_allclose(shown.sort_values("step")["value"], expected, rtol=1e-5)


def test_heads_of_a_replay_have_it_too(suite, tmp_path, capsys):
    rows = replay(FolderCheckpoints(str(suite)), tmp_path / "run", callbacks=(_theirs("HeadNorms"), CheckpointTable()))
    assert rows["head/norm"].dims == ("step", "layer", "head")
    titles, *lines = (re.split("[│┃]", line)[1:-1] for line in capsys.readouterr().out.splitlines() if line[:1] in "│┃")
    column = [title.strip() for title in titles].index("|W_Q|")
    assert [line[column].strip() for line in lines] == [f"{v:.3f}" for v in rows["head/norm"].values.mean((1, 2))]
    further = FIGURES["further"].data(rows)
    assert "head/norm" in further.metric


# ---- what cannot be is refused before anything is written, with what to type


@pytest.mark.parametrize(
    ("added", "first", "name"),
    [
        (["AlignmentAgain"], "svf_lightning.callbacks.SVDAlignment", "alignment/matched"),
        (["FeatureNorms", "FeatureNorms"], "their_package.FeatureNorms", "norm/mean"),
    ],
)
def test_a_name_that_two_callbacks_provide_is_refused_and_the_fix_can_be_typed(typed, command, added, first, name):
    flags = [THEIRS + callback for callback in added]
    result = typed("fit", *QUICK, *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert first in line
    assert repr(name) in line
    assert command.files() == []
    (fix,) = re.findall(r"Fix: leave out (?:one )?(--trainer\.callbacks\+=[\w.]*\w)", line)
    flags.remove(fix)
    result = typed("fit", *QUICK, *flags, "--report=false", "--trainer.logger=false", "--trainer.max_steps=2")
    assert result.returncode == 0, result.stderr


def test_a_training_that_goes_on_with_other_options_is_refused_and_the_difference_named(fitted, typed, command):
    run_dir = fitted[1]
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    resume = ("fit", f"--ckpt_path={run_dir}/checkpoints/last.ckpt", "--trainer.max_steps=35", "--report=false")
    resume += ("--trainer.logger=false", "--model.n_instances=2", "--data.batch_size=16")
    for flags, difference in (
        (["--config=single_pair", *QUICK[1:]], "FeatureNorms.power was 2.0 and is None now"),
        (["--trainer.callbacks.power=3"], "FeatureNorms.power was 2.0 and is 3.0 now"),
    ):
        result = typed(*resume, *flags)
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        assert difference in line
        assert command.files() == []
        assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = typed(*resume, f"--run_dir={command.folder / 'on'}")  # with its settings, as they are
    assert result.returncode == 0, result.stderr
    assert open_trajectory(command.folder / "on")["norm/mean"].sizes["step"] == 36


def test_an_argument_that_a_metric_does_not_keep_is_refused(typed, command):
    result = typed("fit", *QUICK, f"{THEIRS}Forgetful")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "does not keep its argument 'power'" in line
    assert "self.power = power" in line
    assert command.files() == []


@pytest.mark.parametrize("capture", ["svf_lightning.callbacks.Capture", "their_package.CarefulCapture", None])
def test_options_of_capture_reach_whatever_captures(typed, command, capture):
    """A list of callbacks of the user's own, a subclass, and a run whose Capture joins by itself."""
    writer = "svf_lightning.callbacks.TrajectoryWriter"
    callbacks = [{"class_path": path} for path in (capture, "their_package.FeatureNorms", writer) if path]
    (command.folder / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": False}}))
    result = typed("fit", "--config=own.yaml", *QUICK, "--capture.every_n_steps=10", "--report=false")
    assert result.returncode == 0, result.stderr
    run_dir = run_dir_of(result, command)
    assert open_trajectory(run_dir)["step"].values.tolist() == [0, 10, 20, 30]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["capture"]["every_n_steps"] == 10


def test_the_same_metric_keeps_the_contract_that_a_user_can_check():
    check_metric(_theirs("FeatureNorms", power=3.0))
