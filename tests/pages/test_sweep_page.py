"""The page of a real short sweep, opened in a real browser."""

import pytest
import yaml
from helpers.browser import LOOKS, assert_every_figure_is_drawn, in_browser, needs_browser

from svf_lightning.commands.sweep import sweep

NAME = "<script>document.title='broken'<"
OPTIMIZERS = ["adam", "<b>sgd</b>"]  # there is no such optimizer


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    content = {
        "method": "grid",
        "name": NAME,
        "command": ["python", "-m", "svf_lightning", "fit", "--config", "robust_seed", "${args}"],
        "parameters": {
            "model.lambda_attn": {"values": [0.01, 1.0, 10.0]},
            "model.optimizer": {"values": OPTIMIZERS},
            "seed_everything": {"values": [0, 1]},
            "model.n_instances": {"value": 1},
            "trainer.max_steps": {"value": 20},
            "capture.every_n_steps": {"value": 5},
            "data.batch_size": {"value": 16},
        },
    }
    (folder / "few.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    sweep(str(folder / "few.yaml"), sweep_dir=str(folder / "few"), jobs=1)
    return folder / "few" / "report.html"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_browser_draws_an_axis_in_each_figure_without_an_error(page, width, dark):
    assert assert_every_figure_is_drawn(page, width=width, dark=dark, title=f"Sweep {NAME}") == 2


@needs_browser
def test_dots_are_trials_and_failures_say_why_as_text(page):
    values, errors = in_browser(
        page,
        "document.querySelectorAll('#figure-0 .scatterlayer .point').length",
        "document.querySelector('h1').textContent",
        "[...document.querySelectorAll('h2')].map((title) => title.textContent)",
        "[...document.querySelectorAll('td')].filter((cell) => cell.textContent.includes('<b>sgd</b>')).length",
        "[...document.querySelectorAll('section')].pop().textContent",
    )
    assert errors == []
    points, title, headings, cells, last = values
    assert points == 2 * 6  # two metrics, six trials that are done
    assert title == f"Sweep {NAME}"
    assert headings == ["Verdict", "Failed", "Axes (Appendix A)", "Cells", "Each trial alone"]
    assert cells > 6
    assert "python -m svf_lightning report" in last
