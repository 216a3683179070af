"""``python -m svf_lightning workspace``: a saved view of a W&B project that shows what matters first."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from svf_lightning.errors import InputError, one_line
from svf_lightning.quantities import Place, in_order
from svf_lightning.registry import BUILT_IN
from svf_lightning.wandb_logger import STEP_METRIC

_GUIDE = """**Toy model.** Look at *Alignment and orthogonality* first: do the singular vectors align (|cosine| to 1)
before the attended features turn orthogonal to the rest (|cosine| to 0)? *Spectrum*: does one singular value for each
attended pair rise, and do the others fall? *Sparseness*: does S(v) fall in the singular basis, and stay in the shared
rotation? Lines are means over the instances of a run; `/min` and `/max` are the extreme ones.

**Replay.** *Sparseness of the task's heads*: S(v) of the heads that attend to the key, against both rotations.

**Sweep.** *Settings*: final alignment against the settings of every run.

Values per head and prompt are in each run's directory (`open_trajectory`), and in its `report.html`.
"""
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2  # of a panel, in W&B's grid of 24 columns


class Lines(NamedTuple):
    """Metrics over training steps in one panel."""

    title: str
    metrics: tuple[str, ...]
    unit: str
    log_y: bool = False


def panels_by_section() -> dict[str, list[Lines]]:
    """The panels that quantities share, by section."""
    shown = [q for q in BUILT_IN.values() if q.panel is not None and q.logged != "no"]
    sections: dict[str, list[Lines]] = {}
    for panel in in_order(q.panel for q in shown if q.panel is not None):
        names = tuple(q.name for q in shown if q.panel == panel)
        sections.setdefault(panel.section, []).append(Lines(panel.title, names, panel.axis, panel.log))
    return sections


def media_keys() -> dict[str, tuple[str, ...]]:
    """Figures that the view shows, by section."""
    from svf_lightning.figures import FIGURES  # drawn with plotly

    return {
        title: tuple(f"figures/{name}" for name, figure in FIGURES.items() if figure.view == view)
        for title, view in (("Figures (toy)", "toy"), ("Figures (replay)", "replay"))
    }


TABLES = ("tables/claims", "tables/pairs", "tables/instances", "tables/heads", "tables/quantities")
SETTINGS = ("model.lambda_attn", "model.n_features", "model.d_head", "data.context_length")
FINAL = tuple(name for name, quantity in BUILT_IN.items() if quantity.is_at(Place.SWEEP))


def workspace(project: str = "svf-lightning", entity: str | None = None, name: str = "svf-lightning") -> str:
    """Save a view of a W&B project whose panels show what matters first, for runs of the toy model, replays and sweeps.

    Needs an account, and the package wandb-workspaces. A second call makes a second view.

    Args:
        project: W&B project.
        entity: W&B user or team; null for the account's default.
        name: Name of the view.

    Returns:
        Address of the view.

    Raises:
        InputError: The package or the account is missing, or W&B does not take the view.
    """
    try:
        import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise InputError(
            "workspace needs the package wandb-workspaces, which is not installed. "
            "Fix: pip install 'svf-lightning[workspace]'."
        ) from error
    try:
        import wandb

        view = build(project, entity or str(wandb.Api().default_entity), name)
        view.save()
        return str(view.url)
    except Exception as error:
        raise InputError(
            f"the view was not saved ({one_line(error)}). Allowed: an account that can write to the project. "
            "Fix: wandb login, and check --project and --entity."
        ) from error


def build(project: str, entity: str, name: str) -> Any:
    """The view (``wandb_workspaces.workspaces.Workspace``), not saved yet; needs no network."""
    # imported by name: a type checker cannot follow how these modules export their parts
    wr, ws = (import_module(f"wandb_workspaces.{part}") for part in ("reports.v2", "workspaces"))

    def section(title: str, panels: Sequence[Any]) -> Any:
        for i, panel in enumerate(panels):
            x, y = i % _COLUMNS * _WIDTH, i // _COLUMNS * _HEIGHT
            panel.layout = wr.Layout(x=x, y=y, w=_WIDTH, h=_HEIGHT)
        return ws.Section(title, panels=list(panels), is_open=True)

    def lines(shown: Lines) -> Any:
        axes = {"title_x": "training step", "title_y": shown.unit, "log_x": True, "log_y": shown.log_y}
        return wr.LinePlot(title=shown.title, x=STEP_METRIC, y=list(shown.metrics), **axes)

    def media(key: str) -> Any:
        return wr.MediaBrowser(title=key.split("/")[1], media_keys=[key], num_columns=1)

    def table(key: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=key)

    settings = [wr.Config(setting) for setting in SETTINGS]
    final = [wr.SummaryMetric(f"{metric}.last") for metric in FINAL]
    columns = [wr.ParallelCoordinatesPlotColumn(metric) for metric in (*settings, *final)]
    against = [
        wr.ScatterPlot(title=f"{metric} by {SETTINGS[0]}", x=settings[0], y=value)
        for metric, value in zip(FINAL, final, strict=True)
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            section("Where to look first", [wr.MarkdownPanel(_GUIDE), table(TABLES[0])]),
            *(section(title, [lines(shown) for shown in panels]) for title, panels in panels_by_section().items()),
            *(section(title, [media(key) for key in keys]) for title, keys in media_keys().items()),
            section("Tables", [table(key) for key in TABLES[1:]]),
            section("Settings (sweeps)", [wr.ParallelCoordinatesPlot(columns=columns), *against]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP_METRIC),
    )
