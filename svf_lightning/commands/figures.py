"""``python -m svf_lightning figures RUN_DIR FOLDER``: figures of a run as files, and their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svf_lightning.errors import DamagedError, InputError, bad_value
from svf_lightning.files import write_text
from svf_lightning.run.ledger import open_sound
from svf_lightning.terminal import say
from svf_lightning.trajectory import TRAJECTORY

if TYPE_CHECKING:
    import xarray as xr

    from svf_lightning.figures import Figure


def figures(
    source: str,
    target: str,
    *names: str,
    format: Literal["png", "svg", "pdf", "csv"] = "png",
    x_axis: Literal["linear", "log"] | None = None,
    scale: float = 2.0,
    across: bool = False,
    title: str | None = None,
    heads: str | None = None,
) -> Path:
    """Write figures of a run as files: those named, or all that the run has the data for.

    PNG, SVG and PDF need kaleido (pip install 'svf-lightning[figures]') and Chrome or Chromium. CSV holds the numbers
    of a figure: a row for each, with its quantity and its place along each dimension.

    Args:
        source: A run directory; with across, a folder of run directories, each named by the value that it has.
        target: Folder for the files; with across, the file, such as size.png.
        names: Names of figures, such as fig_2a; with across, names of metrics.
        format: "png", "svg", "pdf", or "csv" for the numbers.
        x_axis: Scale of the training steps; null for each figure's own.
        scale: Of PNG files: pixels for each of the figure.
        across: Compare the runs in a folder (Appendix A).
        title: With across: what the values are; null for the folder's name.
        heads: Of a replay: heads for figures of single heads, in place of the task's: 8.6,4.11 (layer.head, from 0), or
            paper_gpt2 or paper_pythia_160m for those that the paper's authors plot. Fig. 7a is written once for each.

    Returns:
        The folder, or with across the file.

    Raises:
        InputError: There is no such figure, a run lacks what it shows, or kaleido or the browser is missing.
    """
    if across:
        return _across(Path(source), Path(target), names, title, scale)
    dataset = open_sound(source)
    for figure, options in _chosen(dataset, names, x_axis):
        for ending, of_heads in _of_heads(dataset, figure, heads):
            path = Path(target) / f"{figure.name}{ending}.{format}"
            if format == "csv":
                write_text(path, figure.table(dataset, **of_heads).to_csv(index=False))
            else:
                from svf_lightning.figures.files import save_image

                save_image(figure(dataset, **options, **of_heads), path, scale=scale)
            say(str(path))
    return Path(target)


def _of_heads(dataset: xr.Dataset, figure: Figure, heads: str | None) -> list[tuple[str, dict[str, Any]]]:
    """What a figure is drawn with for the named heads: the end of the file's name, and options."""
    if heads is None:
        return [("", {})]
    from svf_lightning.figures.sparsity import check_heads, named_heads

    chosen = named_heads(heads)
    if not {"layer", "head"} <= set(dataset.sizes):
        raise bad_value("heads", heads, "null for a run without heads of a language model", "leave --heads out")
    check_heads(dataset, chosen)
    if figure.takes("layer"):
        return [(f"_{head}", head._asdict()) for head in chosen]
    return [("", {"heads": chosen} if figure.takes("heads") else {})]


def _chosen(dataset: xr.Dataset, names: tuple[str, ...], x_axis: str | None) -> Iterator[tuple[Figure, dict[str, Any]]]:
    """The named figures, or all that can be drawn."""
    from svf_lightning.figures import FIGURES

    for name in names or FIGURES:
        if name not in FIGURES:
            raise bad_value("figure", name, ", ".join(FIGURES), "name one of these")
        figure = FIGURES[name]
        if not names:
            try:
                figure.data(dataset)
            except DamagedError:
                raise
            except InputError as error:
                say(f"{name} is left out: {error}")
                continue
        yield figure, {"x_axis": x_axis} if x_axis and figure.takes("x_axis") else {}


def _across(folder: Path, out: Path, metrics: tuple[str, ...], title: str | None, scale: float) -> Path:
    """One figure of the runs in a folder."""
    from svf_lightning.figures.files import save_image
    from svf_lightning.figures.settings import across_runs

    runs = sorted(path.parent for path in folder.glob(f"*/{TRAJECTORY}"))
    if not runs:
        raise InputError(
            f"{folder} holds no runs. Allowed: a folder whose sub-folders are run directories, named by their values. "
            "Fix: train them with --run_dir=FOLDER/VALUE."
        )
    datasets = {path.name: open_sound(path) for path in runs}
    save_image(across_runs(datasets, title or folder.name, metrics or "alignment/matched"), out, scale=scale)
    return out
