"""Figures as PNG files."""

import pytest
from figures.datasets import synthetic

from svf_lightning.errors import InputError
from svf_lightning.figures import fig_4, pair_map
from svf_lightning.figures.files import save_image


@pytest.fixture(scope="module")
def run():
    return synthetic()


def test_a_figure_becomes_a_png(run, tmp_path):
    kaleido_errors = pytest.importorskip("kaleido.errors")
    path = tmp_path / "new" / "fig.png"
    try:
        save_image(pair_map(run), path, width=300, height=200)
    except InputError as error:
        if not isinstance(error.__cause__, kaleido_errors.ChromeNotFoundError):
            raise
        pytest.skip("no Chrome or Chromium")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [600, 400]


def test_a_missing_browser_is_an_error_with_a_fix(run, tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido")
    from kaleido.errors import ChromeNotFoundError

    def fail(*_, **__):
        raise ChromeNotFoundError("nowhere")

    monkeypatch.setattr(kaleido, "write_fig_sync", fail)
    with pytest.raises(InputError, match=r"Chrome or Chromium.*apt-get install chromium"):
        save_image(fig_4(run), tmp_path / "a.png")
