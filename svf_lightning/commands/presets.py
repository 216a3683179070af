"""``python -m svf_lightning presets``: the presets, one line each."""

from __future__ import annotations

from svf_lightning.preset_files import presets as names_of
from svf_lightning.preset_files import read_preset
from svf_lightning.terminal import console


def presets() -> None:
    """Print the presets of `fit` and of `replay`: name, figures of the paper, and what each shows."""
    from rich.table import Table

    for command, folder in (("fit", ""), ("replay", "replay")):
        table = Table(box=None, title=f"{command} --config NAME", title_justify="left", pad_edge=False)
        for column in ("name", "paper", "shows"):
            table.add_column(column, no_wrap=column != "shows")
        for name in names_of(folder):
            about = read_preset(name, folder)["experiment"]
            table.add_row(name, about["figures"], about["shows"])
        console().print(table)
