"""Pages of real runs, opened in a real browser."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from helpers.browser import LOOKS, assert_every_figure_is_drawn, in_browser, needs_browser
from helpers.trajectories import store, toy

from svf_lightning import cli
from svf_lightning.commands.report import report
from svf_lightning.errors import InputError
from svf_lightning.figures import FIGURES, draw_all
from svf_lightning.metrics.dynamics import alignment_by_chance
from svf_lightning.pages.explorer import frames
from svf_lightning.pages.run import write_run_page
from svf_lightning.preset_files import read_preset
from svf_lightning.run.claims import reading
from svf_lightning.trajectory import open_trajectory

EVIL = "<img src=x onerror=document.title='broken'>"
LEFT = "left singular vectors (|cosine|)"
training = FIGURES["training"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run of the default preset, under a name that would be markup."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    cli.fit(
        [
            "--config=single_pair", "--trainer.max_steps=60", "--data.batch_size=32", "--model.n_instances=3",
            "--trainer.logger=false", f"--experiment.name={EVIL}", "--run_dir", str(folder),
        ]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page(run_dir):
    return write_run_page(run_dir)


def test_the_page_has_the_claims_and_says_how_to_repeat_the_run(page, run_dir):
    text = page.read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    for claim in summary["claims"]:
        assert f"{claim['measured']:.4g}" in text
    assert f"python -m svf_lightning fit --config {run_dir / 'config.yaml'}" in text
    assert "model.n_features" in text
    assert summary["versions"]["torch"] in text


def test_the_page_needs_no_network_and_stays_small(page):
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert len(text) < 8e6


@needs_browser
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_browser_draws_every_figure_without_an_error(page, dark, width):
    assert assert_every_figure_is_drawn(page, width=width, dark=dark, title=EVIL) >= 8


@needs_browser
def test_the_slider_moves_the_heat_maps_through_training(page, run_dir):
    left = [cell["title"] for cell in frames(open_trajectory(run_dir))["cells"]].index(LEFT)
    shown = f"JSON.stringify(document.getElementById('explorer-{left}').data[0].z)"
    move = (
        "{s} = document.getElementById('explorer-step'); {s}.value = {at}; {s}.dispatchEvent(new Event('input')); {z}"
    )
    pick = "p = document.getElementById('explorer-place'); p.value = 1; p.dispatchEvent(new Event('change')); " + shown
    values, errors = in_browser(
        page,
        shown,
        move.format(s="s", at=0, z=shown),
        "document.getElementById('explorer-now').textContent",
        pick,
        "document.getElementById('explorer-step').getAttribute('aria-valuetext')",
    )
    assert errors == []
    dataset = open_trajectory(run_dir)
    for text, step, instance in ((values[0], -1, 0), (values[1], 0, 0), (values[3], 0, 1)):
        expected = dataset["cosine_left"].isel(step=step, instance=instance).values
        np.testing.assert_allclose(np.array(json.loads(text)), expected, atol=0.5 / 127 + 1e-6)
    assert values[2] == values[4] == "step 0"


def named(page, heading):
    """The element of the figure with a heading."""
    (found,) = re.findall(rf'<div id="(figure-\d+)" role="img" aria-label="{re.escape(heading)}"', page.read_text())
    return found


@needs_browser
def test_the_axis_of_steps_is_logarithmic_or_linear_at_the_push_of_a_button(page):
    figure = named(page, "Over training")
    look = f"JSON.stringify([document.getElementById('{figure}').layout.xaxis.type, [...document.querySelectorAll("
    look += f"'button[data-figure={figure}]')].map((button) => button.getAttribute('aria-pressed'))])"
    push = f"document.querySelectorAll('button[data-figure={figure}]')[{{}}].click()"
    values, errors = in_browser(page, look, push.format(1), look, push.format(0), look)
    assert errors == []
    first, _, second, _, third = values
    assert json.loads(second) == ["linear", ["false", "true"]]
    assert json.loads(third) == ["log", ["true", "false"]]
    assert json.loads(first)[1] == ["true", "false"]


@needs_browser
def test_the_slider_follows_the_keyboard_and_says_where_it_stands(page):
    values, errors = in_browser(
        page,
        "(() => { const slider = document.getElementById('explorer-step'); slider.focus(); return slider.value; })()",
        "document.activeElement.id",
        ("key", "Home"),
        "document.getElementById('explorer-step').getAttribute('aria-valuetext')",
        ("key", "ArrowRight"),
        "document.getElementById('explorer-step').value",
        "document.getElementById('explorer-now').textContent",
    )
    assert errors == []
    assert values[1] == "explorer-step"
    assert values[3] == "step 0"
    assert values[5] == "1"
    assert values[6].startswith("step 1")


@needs_browser
def test_pointing_at_a_cell_tells_its_value_and_at_a_step_those_of_all_panels(page, run_dir):
    figure, over = (
        named(page, draw_all(open_trajectory(run_dir))["fig_2a"].layout.title.text),
        named(page, "Over training"),
    )
    values, errors = in_browser(
        page,
        f"Plotly.Fx.hover('{figure}', {{xval: 2, yval: 0}}, ['xy']); "
        f"[...document.querySelectorAll('#{figure} .hoverlayer text')].map((text) => text.textContent).join('')",
        f"Plotly.Fx.hover('{over}', {{xval: 5}}, ['xy']); "
        f"[...document.querySelectorAll('#{over} .hoverlayer text')].map((text) => text.textContent)",
    )
    cosine = float(open_trajectory(run_dir)["cosine_left"].isel(step=-1, instance=0, feature=0, rank=2))
    assert errors == []
    assert (
        values[0].replace("\u200b", "") == f"feature 0, u3|cosine| {cosine:.3f}"
    )  # plotly puts marks about a subscript
    lines = [trace for trace in training(open_trajectory(run_dir)).data if trace.hoverinfo != "skip"]
    at, *told = values[1]
    assert len(told) == len(lines) > 6
    assert all(f"step {at}: " in text for text in told)


@needs_browser
def test_the_play_button_runs_to_the_end_and_stops(page):
    wait = (
        "new Promise((done) => { const button = document.getElementById('explorer-play'), end = Date.now() + 60000; "
        "const look = () => button.textContent === 'Play' || Date.now() > end ? done(button.textContent) "
        ": setTimeout(look, 100); look(); })"
    )
    values, errors = in_browser(
        page,
        "document.getElementById('explorer-play').click(); document.getElementById('explorer-play').textContent",
        wait,
        "document.getElementById('explorer-step').value === document.getElementById('explorer-step').max",
    )
    assert errors == []
    assert values == ["Pause", "Play", True]


def test_large_models_have_fewer_frames_and_always_the_first_and_the_last(run_dir, monkeypatch):
    dataset = open_trajectory(run_dir)
    many = frames(dataset)
    per_frame = 2 * 20 * 10 + 20 * 20 + 2 * 20
    monkeypatch.setattr("svf_lightning.pages.explorer.MAX_BYTES", 7 * per_frame)
    few = frames(dataset)
    assert len(many["steps"]) > 30
    assert 2 <= len(few["steps"]) <= 7 + 2
    assert (few["steps"][0], few["steps"][-1]) == (0, 60)
    assert (len(few["places"]), few["n_places"]) == (1, 3)
    assert {step for step, _ in few["places"][0]["moments"]} <= set(few["steps"])


def test_the_plane_shows_the_attended_pair_at_its_lengths_and_angle(run_dir):
    dataset = open_trajectory(run_dir)
    data = frames(dataset)
    assert data["pair"] == (0, 1)
    assert (data["steps"][0], data["steps"][-1]) == (0, 60)
    F, N = len(data["steps"]), dataset.sizes["feature"]
    (plane,) = (i for i, cell in enumerate(data["cells"]) if cell["kind"] == "plane")
    numbers = base64.b64decode(data["places"][2]["cells"][plane]["values"])
    points = np.frombuffer(numbers, np.int8).reshape(F, 2, N).astype(float)
    W = dataset["W"].isel(step=-1, instance=2).values
    x, y = points[-1, :, 0], points[-1, :, 1]
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert y[1] >= 0
    assert cosine == pytest.approx(W[:, 0] @ W[:, 1] / np.linalg.norm(W[:, 0]) / np.linalg.norm(W[:, 1]), abs=0.03)
    assert np.linalg.norm(x) / np.linalg.norm(y) == pytest.approx(
        np.linalg.norm(W[:, 0]) / np.linalg.norm(W[:, 1]), abs=0.03
    )


def test_curves_over_training_show_the_mean_and_every_instance_on_one_axis(run_dir):
    dataset = open_trajectory(run_dir)
    figure = training(dataset)
    thick = next(trace for trace in figure.data if trace.name == "alignment of singular vectors")
    np.testing.assert_allclose(thick.y, dataset["alignment/matched"].values.mean(1), rtol=1e-5)
    assert {trace.xaxis for trace in figure.data} == {None}  # one x axis for all panels
    thin = [trace for trace in figure.data if trace.line.width == 0.8 and trace.legendgroup == "alignment/matched"]
    assert np.isnan(np.array(thin[0].y, dtype=float)).sum() == 3  # a gap after each instance


def test_curves_over_training_mark_when_the_median_instance_has_changed(tmp_path):
    folder = store(tmp_path, toy(n_instances=3))
    figure = training(open_trajectory(folder))
    moments = json.loads((folder / "summary.json").read_text())["metrics"]
    expected = {name: float(np.median(moments[f"dynamics/t_{name}"]["per_instance"])) for name in ("align", "ortho")}
    moments = [shape for shape in figure.layout.shapes if shape.line.dash == "dot"]
    assert [shape.x0 for shape in moments] == sorted(expected.values())
    for name, step in expected.items():
        assert f"t<sub>{name}</sub> {step:,.0f}" in figure.layout.title.subtitle.text


def test_curves_over_training_have_lines_at_what_random_vectors_give(tmp_path):
    dataset = open_trajectory(store(tmp_path, toy(n_instances=3)))
    lines = [shape.y0 for shape in training(dataset).layout.shapes if shape.line.dash == "dash"]
    sizes = dataset.sizes
    chance = alignment_by_chance(sizes["d_model"], sizes["rank"], sizes["pair"]).matched.mean
    assert lines[0] == pytest.approx(chance)
    assert lines[1] == pytest.approx(np.sqrt(2 / np.pi / sizes["d_model"]), rel=0.1)  # mean |cosine| in D dimensions
    assert f"by chance: {chance:.2g}" in [text.text for text in training(dataset).layout.annotations]


def test_curves_over_a_training_too_short_for_a_change_have_no_mark_and_say_so(run_dir):
    figure = training(open_trajectory(run_dir))
    assert [shape for shape in figure.layout.shapes if shape.line.dash == "dot"] == []
    for name in ("align", "ortho"):
        assert f"t<sub>{name}</sub> did not happen in any of 3 instances" in figure.layout.title.subtitle.text


def test_the_page_of_a_killed_run_says_so(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    page = report(str(tmp_path / "killed"), out=str(tmp_path / "page.html"))
    assert page == tmp_path / "page.html"
    assert "has not ended, or was killed: 60 is the last step" in page.read_text()


def test_a_folder_without_a_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a trajectory"):
        report(str(tmp_path))


def test_the_page_of_an_evaluation_repeats_the_evaluation(run_dir, tmp_path):
    evaluated = tmp_path / "run-test"
    shutil.copytree(run_dir, evaluated)
    with (evaluated / "config.yaml").open("a") as file:
        file.write("verbose: true\n")
    assert f"python -m svf_lightning test --config {evaluated / 'config.yaml'}" in write_run_page(evaluated).read_text()


def test_the_first_screen_says_what_was_run_and_leads_to_every_part_and_file(page, run_dir):
    html = page.read_text()
    body = html[html.index("<body>") : html.index('<script type="application/json" id="figures"')]
    shows = read_preset("single_pair")["experiment"]["shows"]
    lead = re.search(r'<p class="lead">(.*?)</p>', body)[1]
    assert lead.lower().startswith(shows.lower())
    rows = open_trajectory(run_dir)
    assert f"{rows.sizes['instance']} instances" in lead
    assert f"steps 0 to {rows['step'].values[-1]:,}" in lead
    anchors = re.findall(r'<a href="#(part-\d+)">(.*?)</a>', body)
    assert anchors == re.findall(r'<h2 id="(part-\d+)">(.*?)</h2>', body)
    assert anchors[0][1] == FIGURES["fig_3"].heading
    assert [title for _, title in anchors].count(FIGURES["fig_3"].heading) == 1
    files = re.findall(r'<a href="([^#"]+)">', body)
    assert files == ["config.yaml", "summary.json"]
    assert all((page.parent / name).is_file() for name in files)


def test_every_claim_has_a_reading_with_its_metric_and_its_null(page, run_dir):
    html = page.read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    text = html.replace("&lt;", "<").replace("&gt;", ">")
    for claim in summary["claims"]:
        told = reading(claim)
        assert f">{told}</td>" in text
        assert claim["rule"].split(" ")[0] in told or claim["rule"].split(": ")[-1].split(" over")[0] in told
        assert f"{claim['measured']:.4g}" in told
        assert claim["null"] is None or claim["null"]["value"] is None or f"{claim['null']['value']:.4g}" in told


@needs_browser
def test_on_a_phone_no_claim_is_cut(page):
    values, errors = in_browser(
        page,
        "(() => { const cut = [...document.querySelectorAll('.cards td')].filter((cell) => { const box = "
        "cell.getBoundingClientRect(); return box.right > window.innerWidth || cell.scrollWidth > cell.clientWidth + 1; "
        "}); return [cut.length, document.querySelectorAll('.cards td').length]; })()",
        "document.documentElement.scrollWidth <= window.innerWidth",
        width=390,
    )
    assert errors == []
    assert values[0][0] == 0
    assert values[0][1] > 10
    assert values[1] is True
