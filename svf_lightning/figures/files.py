"""Figures as files."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError, bad_value
from svf_lightning.files import written_whole

_KINDS = ("png", "svg", "pdf")


def save_image(
    figure: go.Figure, path: str | Path, width: int | None = None, height: int | None = None, scale: float = 2
) -> None:
    """Write a figure as an image.

    Needs kaleido and a Chrome or Chromium on this machine (Debian: ``apt-get install chromium``); no network.

    Args:
        figure: Any plotly figure.
        path: The file; its ending says what it is: .png, .svg or .pdf. Its folder is made.
        width: In CSS pixels; None for the figure's own, or 1,000.
        height: In CSS pixels; None for the figure's own, or 450.
        scale: Of a PNG: pixels of the file for each of these.

    Raises:
        InputError: Another kind of file, or kaleido or the browser is missing.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in _KINDS:
        raise bad_value("path", str(path), f"a file that ends in .{', .'.join(_KINDS)}", "rename it")
    try:
        import kaleido  # type: ignore[import-untyped,import-not-found,unused-ignore]
        from kaleido.errors import ChromeNotFoundError  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError(f"an image needs kaleido ({error}). Fix: pip install 'kaleido>=1'.") from error
    size = {"width": width or figure.layout.width or 1000, "height": height or figure.layout.height or 450}
    options = {"format": kind, "scale": scale if kind == "png" else 1, **size}
    try:
        with written_whole(path) as draft:  # mathjax would be loaded from the network
            kaleido.write_fig_sync(figure, path=str(draft), opts=options, kopts={"mathjax": False})
    except ChromeNotFoundError as error:
        raise InputError(
            "an image needs Chrome or Chromium, and none was found. Fix: install it (Debian: apt-get install chromium)."
        ) from error
