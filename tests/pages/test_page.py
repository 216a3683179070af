"""The HTML page, opened in a real browser where there is one."""

import base64
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers.browser import in_browser, needs_browser
from helpers.page_text import Page

from svf_lightning.figures.look import finish
from svf_lightning.pages.page import Section, Table, write_page

EVIL = "<script>document.title='broken'</script>&\"'"


@pytest.fixture
def page(tmp_path):
    figure = finish(go.Figure().add_scatter(x=[1, 2, 3], y=[2, 1, 3], name=EVIL), "||E<sub>X</sub>|| over steps", EVIL)
    sections = [
        Section("First", f"see {EVIL}", [figure], commands=[f"run {EVIL}"]),
        Section("Second", tables=[Table(["name", "value"], [[EVIL, "1"]], frozenset(["name"]))]),
    ]
    path = tmp_path / "page.html"
    write_page(path, f"Title {EVIL}", "subtitle", sections)
    return path


def test_a_page_needs_no_network_and_stays_small(page):
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert len(text) < 8e6


def test_strings_show_as_text(page):
    text = page.read_text()
    body = text[text.index("<body>") : text.index('<script type="application/json"')]
    assert "<script>" not in body
    assert body.count("&lt;script&gt;") == 5  # title, text, command, subtitle of the figure, cell
    assert "||E<sub>X</sub>|| over steps" in body


@needs_browser
def test_a_browser_draws_the_figure_and_runs_no_string(page):
    values, errors = in_browser(page, "document.querySelectorAll('.js-plotly-plot .point').length", "document.title")
    assert values == [3, f"Title {EVIL}"]
    assert errors == []


@pytest.mark.parametrize("kind", ["array", "list"])
def test_long_curves_are_in_single_precision_and_keep_their_gaps(tmp_path, kind):
    x, y = np.arange(1000.0), np.random.default_rng(0).normal(size=1000)
    y[300] = np.nan
    convert = {"array": np.asarray, "list": np.ndarray.tolist}[kind]
    short = go.Scatter(x=x[:9], y=y[:9])
    figure = go.Figure([go.Scatter(x=convert(x), y=convert(y)), short])
    write_page(tmp_path / "page.html", "", "", [Section("", figures=[finish(figure, "", "")])])
    long, kept = Page(tmp_path / "page.html").data["figures"]["figures"]["figure-0"]["data"]
    for name, values in (("x", x), ("y", y)):
        assert long[name]["dtype"] == "f4"
        numbers = np.frombuffer(base64.b64decode(long[name]["bdata"]), "<f4")
        np.testing.assert_allclose(numbers, values, rtol=1e-7)
    assert kept["y"]["dtype"] == "f8"
