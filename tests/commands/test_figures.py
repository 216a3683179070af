"""`figures`: what a run shows, as image files and as tables."""

import numpy as np
import pandas as pd
import pytest
from figures.datasets import last
from figures.head_datasets import synthetic
from helpers.browser import CHROMIUM
from helpers.training import train

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.figures import FIGURES, files
from svf_lightning.trajectory import open_trajectory


def run_of(folder, **model):
    callbacks = [Capture(), SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter()]
    train(folder, 12, callbacks, model=model)
    return open_trajectory(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    run_of(folder, template="single")
    return folder


@pytest.fixture
def saved(monkeypatch):
    """What would be drawn, by the browser, without the seconds that this takes."""
    figures = {}
    monkeypatch.setattr(files, "save_image", lambda figure, path, scale: figures.update({path: (figure, scale)}))
    return figures


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_the_files_are_images_of_their_kind(typed, single, tmp_path, kind, begins):
    pytest.importorskip("kaleido")
    result = typed("figures", single, tmp_path / "out", "fig_2a", f"--format={kind}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(tmp_path / "out")]
    assert (tmp_path / "out" / f"fig_2a.{kind}").read_bytes().startswith(begins)


def test_without_names_all_that_the_run_has_are_written_and_the_others_named_with_the_reason(typed, tmp_path, saved):
    run_of(tmp_path / "run", template="zero")
    result = typed("figures", tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0
    assert {path.name for path in saved} == {"fig_1a.png", "further.png", "training.png"}
    written, left_out = [], []
    for line in result.stderr.splitlines():
        (left_out if " is left out: " in line else written).append(line.split(" is left out: ")[0])
    assert set(written) == set(map(str, saved))
    assert set(left_out) == FIGURES.keys() - {"fig_1a", "further", "training"}
    assert "fig_3 is left out: " in result.stderr
    assert "SVDAlignment" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "out", "fig_10"], "figure='fig_10'"),
        (["RUN", "out", "cone_over_time"], "--trainer.callbacks+=svf_lightning.callbacks.TheoryGap"),
        (["nowhere", "out"], "not a trajectory"),
        ([], "source"),
        (["--across=true", ".", "a.png"], "holds no runs"),
        (["--across=true", ".", "a.gif"], "holds no runs"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line_and_nothing_is_written(typed, command, single, arguments, message):
    result = typed("figures", *(single if argument == "RUN" else argument for argument in arguments))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert command.files() == []


def test_scales_of_steps_and_of_files_are_passed_on(typed, single, tmp_path, saved):
    names = ["fig_3", "pair_map"]
    assert typed("figures", single, tmp_path, *names, "--x_axis=log", "--scale=1.5").returncode == 0
    drawn = {path.stem: (figure, scale) for path, (figure, scale) in saved.items()}
    assert [scale for _, scale in drawn.values()] == [1.5, 1.5]
    assert drawn["fig_3"][0].layout.xaxis.type == "log"
    assert drawn["pair_map"][0].layout.xaxis.type is None


@pytest.mark.parametrize("name", ["fig_2a", "fig_3", "training"])
def test_numbers_of_a_figure_are_a_table_with_a_row_for_each(typed, single, tmp_path, name):
    assert typed("figures", single, tmp_path, name, "--format=csv").returncode == 0
    run = open_trajectory(single)
    table = pd.read_csv(tmp_path / f"{name}.csv")
    pd.testing.assert_frame_equal(table, FIGURES[name].table(run), check_dtype=False)
    assert table.columns[0] == "quantity"
    assert table.columns[-1] == "value"
    shown = FIGURES[name].data(run)
    for quantity, rows in table.groupby("quantity"):
        assert len(rows) == getattr(shown, quantity).size


def test_named_heads_have_a_file_each_and_share_the_others(typed, tmp_path, saved, monkeypatch):
    monkeypatch.setattr("svf_lightning.commands.figures.open_sound", lambda source: synthetic())
    result = typed("figures", "run", tmp_path, "fig_7a", "fig_7b", "heads_map", "--heads=0.10,4.2")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in saved] == ["fig_7a_L0H10.png", "fig_7a_L4H2.png", "fig_7b.png", "heads_map.png"]
    result = typed("figures", "run", tmp_path, "fig_7a", "--heads=paper_gpt2")  # five layers
    assert result.returncode == 2
    assert "layer=8 is not usable. Allowed: 0..4" in result.stderr


def test_heads_of_a_run_without_a_language_model_are_refused(typed, single, tmp_path):
    result = typed("figures", single, tmp_path, "fig_2a", "--heads=0.1")
    assert result.returncode == 2
    assert "leave --heads out" in result.stderr


def test_runs_of_a_folder_are_compared_by_their_names(typed, tmp_path, saved):
    sizes = tmp_path / "sizes"
    runs = {n: run_of(sizes / str(n), template="single", n_features=n) for n in (9, 11)}
    (sizes / "notes").mkdir()
    out = tmp_path / "out.png"
    result = typed("figures", sizes, out, "--across=true", "--title=n_features")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(out)]
    figure, _ = saved[out]
    mean, chance, dots = figure.data
    np.testing.assert_array_equal(mean.x, [9, 11])
    np.testing.assert_array_equal(chance.x, [9, 11])
    np.testing.assert_array_equal(dots.y, np.concatenate([last(run, "alignment/matched") for run in runs.values()]))
    assert figure.layout.xaxis.title.text == "n_features"
    assert typed("figures", sizes, out, "alignment/left", "alignment/right", "--across").returncode == 0
    figure, _ = saved[out]
    assert {trace.legendgroup for trace in figure.data} == {"alignment/left", "alignment/right"}
    assert figure.layout.xaxis.title.text == "sizes"
