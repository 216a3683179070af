"""``python -m svf_lightning workspace``: a saved view of a W&B project that shows what matters first."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from svf_lightning.arguments import parsed
from svf_lightning.errors import InputError
from svf_lightning.wandb_logger import STEP_METRIC

_GUIDE = """**Toy model.** Look at *Alignment* first: the singular vectors align (|cosine| to 1) before the attended
features turn orthogonal to the rest (|cosine| to 0). *Spectrum*: one singular value for each attended pair rises, the
others fall. *Sparseness*: S(v) falls in the singular basis; in the shared rotation it stays. Lines are means over the
instances of a run; `/min` and `/max` are the extreme ones.

**Replay.** *Task heads*: S(v) of the heads that attend to the key, against both rotations, over checkpoints.

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


SECTIONS: dict[str, tuple[Lines, ...]] = {
    "Alignment and orthogonality (toy)": (
        Lines("Alignment", ("alignment/matched", "alignment/matched/min", "alignment/matched/max"), "|cosine|"),
        Lines("Orthogonality", ("orthogonality/attended_vs_rest", "orthogonality/rest_vs_rest"), "|cosine|"),
        Lines("Losses", ("loss/recon", "loss/attn"), "loss (attention: nats)", log_y=True),
        Lines("Spectrum", ("spectrum/sigma_1", "spectrum/sigma_2"), "singular value (nats)"),
        Lines(
            "Sparseness",
            ("sad/sparseness", "sad/sparseness_shared_rotation", "sad/sparseness_independent_rotation"),
            "S(v)",
        ),
    ),
    "Replay of a language model": (
        Lines(
            "Task heads",
            ("sad/task/sparseness", "sad/task/sparseness_shared_rotation", "sad/task/sparseness_independent_rotation"),
            "S(v)",
        ),
        Lines("Task", ("sad/accuracy", "sad/task/attention"), "share; attention weight"),
        Lines("Singular pairs that a score needs", ("sad/attending/n_recon", "sad/task/n_recon"), "median (count)"),
        Lines(
            "4 contributions removed",
            ("causal/top/logit_difference/4", "causal/random/logit_difference/4", "causal/spectrum/logit_difference/4"),
            "change of the logit difference (nats)",
        ),
    ),
}
MEDIA = {
    "Figures (toy)": ("figures/dynamics", "figures/fig_1b", "figures/fig_2a", "figures/fig_2b", "figures/fig_4"),
    "Figures (replay)": ("figures/fig_7b", "figures/fig_7a", "figures/fig_8", "figures/fig_9", "figures/heads_map"),
}
TABLES = ("tables/claims", "tables/pairs", "tables/instances", "tables/heads")
SETTINGS = ("model.lambda_attn", "model.n_features", "model.d_head", "data.context_length")
FINAL = ("alignment/matched", "orthogonality/attended_vs_rest")


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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the view was not saved ({reason}). Allowed: an account that can write to the project. "
            "Fix: wandb login, and check --project and --entity."
        ) from error


def workspace_command(args: Sequence[str]) -> tuple[str, int]:
    """``workspace`` with its arguments.

    Raises:
        ArgumentError: An argument is not known or not usable.
        InputError: The view cannot be saved.
    """
    return workspace(**parsed(workspace, args)), 0


def build(project: str, entity: str, name: str) -> Any:
    """The view (``wandb_workspaces.workspaces.Workspace``), not saved yet; needs no network."""
    # by name, as the modules give their parts through lists that a type checker cannot follow
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
            *(section(title, [lines(shown) for shown in panels]) for title, panels in SECTIONS.items()),
            *(section(title, [media(key) for key in keys]) for title, keys in MEDIA.items()),
            section("Tables", [table(key) for key in TABLES[1:]]),
            section("Settings (sweeps)", [wr.ParallelCoordinatesPlot(columns=columns), *against]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP_METRIC),
    )
