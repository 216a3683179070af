"""What W&B gets of a run at its end beside the metrics: figures, tables of claims, pairs and heads, the trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svf_lightning.figures import draw_all
from svf_lightning.registry import known
from svf_lightning.run.claims import in_words
from svf_lightning.run.directory import CONFIG, SUMMARY
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.summary import read_summary
from svf_lightning.trajectory import trajectory_parts

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

MAX_ROWS = 10_000  # of a table; W&B's own limit
_VERDICT = (
    "claim", "figure", "verdict", "measured", "low", "high", "null", "null_value", "difference", "difference_low",
    "difference_high", "n", "needed", "holds", "threshold", "rule", "why",
)  # fmt: skip
_ABOUT = ("name", "label", "symbol", "unit", "range", "better", "meaning", "source", "provider")


def run_media(run_dir: Path) -> tuple[dict[str, Any], int]:
    """Figures and tables of a run at its last step, as W&B's objects by key.

    ``figures/NAME``: interactive, as in the run's page. ``tables/claims``, if the run has ended; ``tables/quantities``:
    unit, range, meaning and source of everything that was measured; ``tables/pairs``: every attended pair of every
    instance; ``tables/instances`` or ``tables/heads``: all numbers of each.

    Returns:
        Them, and the training step of the last row.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    import wandb

    dataset = open_sound(run_dir)
    drawn = draw_all(dataset, among=lambda figure: figure.logged)
    media: dict[str, Any] = {f"figures/{name}": wandb.Plotly(figure) for name, figure in drawn.items()}
    if claims := read_summary(run_dir).get("claims"):
        media["tables/claims"] = _table(_VERDICT, [_flat(claim) for claim in claims])
    measured = [quantity for name, quantity in known(dataset).items() if name in dataset]
    about = [{name: getattr(quantity, name) for name in _ABOUT} for quantity in measured]
    media["tables/quantities"] = _table(_ABOUT, about)
    batch_dims = tuple(dataset.attrs["batch_dims"])
    parts = {"pairs": (*batch_dims, "pair"), f"{batch_dims[-1]}s" if batch_dims else "run": batch_dims}
    for name, dims in parts.items():
        if (rows := _rows(dataset, dims)) is not None:
            media[f"tables/{name}"] = wandb.Table(dataframe=rows)
    return media, int(dataset["step"].values[-1])


def trajectory_artifact(run_dir: Path, name: str) -> Any:
    """The trajectory with settings and summary, as a W&B artifact of type "trajectory"."""
    import wandb

    artifact = wandb.Artifact(f"trajectory-{name}", type="trajectory")
    for part in trajectory_parts(run_dir):
        artifact.add_dir(str(part), name=part.name)
    for file in (CONFIG, SUMMARY):
        if (run_dir / file).is_file():
            artifact.add_file(str(run_dir / file), name=file)
    return artifact


def _flat(claim: Mapping[str, Any]) -> dict[str, Any]:
    """A claim of summary.json as one level."""
    null, effect = (claim.get(name) or {} for name in ("null", "effect"))
    low, high = claim.get("interval") or (None, None)
    effect_low, effect_high = effect.get("interval") or (None, None)
    return {
        **claim,
        "verdict": in_words(claim).verdict,
        "low": low,
        "high": high,
        "null": null.get("name"),
        "null_value": null.get("value"),
        "difference": effect.get("value"),
        "difference_low": effect_low,
        "difference_high": effect_high,
    }


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[[row.get(column) for column in columns] for row in rows])


def _rows(dataset: xr.Dataset, dims: tuple[str, ...]) -> pd.DataFrame | None:
    """The numbers of the last step that have just these dimensions, a row for each place; None if there are none."""
    names = [
        name
        for name, variable in dataset.data_vars.items()
        if dims and variable.dims == ("step", *dims) and variable.dtype.kind in "biuf"
    ]
    if not names:
        return None
    labels = [name for name, variable in dataset.coords.items() if variable.dims and set(variable.dims) <= set(dims)]
    last = dataset[names].isel(step=-1).reset_coords(drop=True).assign_coords({name: dataset[name] for name in labels})
    table = last.to_dataframe().reset_index()
    return table[[*dims, *(name for name in labels if name not in dims), *names]].head(MAX_ROWS)
