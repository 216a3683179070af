"""The page that compares runs."""

import shutil

import numpy as np
import pytest
from helpers.browser import assert_every_figure_is_drawn, in_browser, needs_browser

from svf_lightning import cli
from svf_lightning.commands.report import report
from svf_lightning.errors import InputError
from svf_lightning.figures.comparison import compared_quantities, over_steps
from svf_lightning.pages.comparison import write_comparison
from svf_lightning.trajectory import open_trajectory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("one", 30), ("<b>two", 50)):
        cli.fit(
            [
                "--config=single_pair", f"--trainer.max_steps={steps}", "--data.batch_size=32", "--model.n_instances=2",
                "--trainer.logger=false", "--run_dir", str(folder / name),
            ]
        )  # fmt: skip
    return [folder / "one", folder / "<b>two"]


def test_lines_are_the_means_of_each_run_on_one_axis(runs):
    datasets = {run.name: open_trajectory(run) for run in runs}
    figure = over_steps(datasets, "alignment/matched")
    assert [trace.name for trace in figure.data] == ["one", "&lt;b&gt;two"]  # plotly shows <b>two
    for trace, dataset in zip(figure.data, datasets.values(), strict=True):
        np.testing.assert_allclose(trace.y, dataset["alignment/matched"].values.mean(1), rtol=1e-5)
    assert figure.layout.xaxis.range[1] == pytest.approx(np.log10(50))


def test_a_metric_that_only_one_run_has_is_left_out(runs):
    datasets = {run.name: open_trajectory(run) for run in runs}
    assert "alignment/matched" in compared_quantities(datasets)
    datasets["one"] = datasets["one"].drop_vars("alignment/matched")
    assert "alignment/matched" not in compared_quantities(datasets)
    with pytest.raises(InputError, match="fewer than two of the runs hold 'alignment/matched'"):
        over_steps(datasets, "alignment/matched")


def test_the_page_shows_claims_of_all_runs_and_the_settings_that_differ(runs, tmp_path):
    page = report(*map(str, runs), out=str(tmp_path / "page.html"))
    text = page.read_text()
    assert page == tmp_path / "page.html"
    body = text[text.index("<body>") :]
    assert "trainer.max_steps" in body
    assert "model.n_features" not in body
    assert "<b>two" not in body[: body.index('<script type="application/json"')]


@needs_browser
def test_a_browser_draws_every_line(runs, tmp_path):
    page = write_comparison(runs, tmp_path / "page.html")
    values, errors = in_browser(
        page,
        "[...document.querySelectorAll('.js-plotly-plot')].map((figure) => figure.data.map((trace) => trace.name))",
        "[...document.querySelectorAll('.legendtext')].slice(0, 2).map((text) => text.textContent)",
        "[...document.querySelectorAll('figcaption strong')].map((title) => title.textContent)",
    )
    assert errors == []
    drawn, legend, titles = values
    assert sum(names == ["one", "&lt;b&gt;two"] for names in drawn) >= 4
    assert legend == ["one", "<b>two"]
    assert [f"{run}: Geometry of the features with a head" in titles for run in legend] == [True, True]
    assert assert_every_figure_is_drawn(page, width=390, dark=True) == len(drawn)


@pytest.mark.parametrize("which", [[0], [0, 0]])
def test_runs_that_cannot_be_compared_are_an_input_error(runs, which):
    with pytest.raises(InputError, match="two or more different ones"):
        write_comparison([runs[i] for i in which])


def test_a_run_without_a_trajectory_is_an_input_error(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "empty", ignore=shutil.ignore_patterns("*.zarr"))
    with pytest.raises(InputError, match="not a trajectory"):
        write_comparison([runs[0], tmp_path / "empty"])
