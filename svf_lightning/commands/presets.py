"""``python -m svf_lightning presets``: the presets, one line each."""

from __future__ import annotations

import yaml

from svf_lightning.cli.presets import preset_path
from svf_lightning.cli.presets import presets as names_of
from svf_lightning.terminal import console


def presets() -> None:
    """Print the presets of `fit` and of `replay`: name, figures of the paper, and what each shows."""
    from rich.table import Table

    for command, folder in (("fit", ""), ("replay", "replay")):
        table = Table(box=None, title=f"{command} --config NAME", title_justify="left", pad_edge=False)
        for column in ("name", "paper", "shows"):
            table.add_column(column, no_wrap=column != "shows")
        for name in names_of(folder):
            about = yaml.safe_load(preset_path(name, folder).read_text(encoding="utf-8"))["experiment"]
            table.add_row(name, about["figures"], about["shows"])
        console().print(table)
