"""``python -m svf_lightning presets``: the presets, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svf_lightning.preset_files import presets as names_of
from svf_lightning.preset_files import read_preset
from svf_lightning.terminal import console


def presets() -> None:
    """Print the presets of `fit` and of `replay`: name, figures of the paper, length, and what each shows."""
    from rich.table import Table

    for command, folder in (("fit", ""), ("replay", "replay")):
        table = Table(box=None, title=f"{command} --config NAME", title_justify="left", pad_edge=False)
        trains = command == "fit"
        for column in ("name", "paper", *(["length"] if trains else []), "shows"):
            table.add_column(column, no_wrap=column != "shows")
        for name in names_of(folder):
            preset = read_preset(name, folder)
            about = preset["experiment"]
            table.add_row(name, about["figures"], *([_length(preset)] if trains else []), about["shows"])
        console().print(table)


def _length(preset: Mapping[str, Any]) -> str:
    """Training steps of a preset of fit, and instances side by side."""
    n_steps, n_instances = preset["trainer"]["max_steps"], preset.get("model", {}).get("n_instances", 1)
    return f"{n_steps:,} steps x {n_instances}"
