"""The HTML page, opened in a real browser where there is one."""

import re
import shutil
import subprocess

import plotly.graph_objects as go
import pytest

from svf_lightning.report.drawing import finish
from svf_lightning.report.page import Section, Table, write_page

EVIL = "<script>document.title='broken'</script>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_figure_and_runs_no_string(page):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.count('class="main-svg"') >= 1
    assert len(re.findall(r'class="point"', shown)) == 3
    assert "<title>broken</title>" not in shown
