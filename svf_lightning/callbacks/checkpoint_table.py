"""CheckpointTable: what a replay found, checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from svf_lightning.callbacks.base import RowSink, Status, quantities_of
from svf_lightning.quantities import Quantity
from svf_lightning.rows import Rows, scalar_variables, statistics
from svf_lightning.run.ledger import Ledger
from svf_lightning.run.settings import Run
from svf_lightning.terminal import console
from svf_lightning.trajectory import has_trajectory, open_trajectory

_FEW = 4  # checkpoints that are shown where not all are


class CheckpointTable(RowSink):
    """Prints one line per checkpoint of the run directory, whenever it was measured, and what went wrong.

    The columns are the quantities that have a title for one (``Quantity.column``), as means over heads. Of many
    checkpoints the command line shows some, from the first to the last; with ``--verbose`` all. Below the table:
    checkpoints that no curve shows, with the reason: those that failed, and those whose weights are not what they say
    they are.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def join(self, run: Run) -> None:
        """Take from the run how much is to be shown."""
        self._most = None if run.verbose else _FEW

    def consume(self, rows: Rows) -> None:
        """Nothing: the table is of all that the directory holds."""

    def finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """Print the table."""
        if trainer.is_global_zero and status == "finished":
            known = quantities_of(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
            self.show(Path(trainer.default_root_dir), known)

    def show(self, run_dir: Path, known: Mapping[str, Quantity]) -> None:
        """Print the table of a run directory; ``known``: its quantities, by name."""
        from rich.table import Table
        from rich.text import Text

        out = console()
        if has_trajectory(run_dir):
            trajectory = open_trajectory(run_dir)
            scalars, batch_dims = scalar_variables(trajectory), trajectory.attrs["batch_dims"]
            columns = {
                q.column: statistics(scalars[name].values, batch_dims)[0]
                for name, q in known.items()
                if q.column and name in scalars
            }
            table = Table(title="Checkpoints", title_justify="left")
            for title in ("step", *columns):
                table.add_column(title, justify="right", no_wrap=True)
            steps = trajectory["step"].values
            some = np.arange(len(steps))
            if self._most is not None and len(steps) > self._most:
                some = np.unique(np.linspace(0, len(steps) - 1, self._most).round().astype(int))
                table.box = None
            for k in some:
                table.add_row(f"{steps[k]:,}", *(f"{means[k]:.3f}" for means in columns.values()))
            if columns:
                out.print(table)
            if columns and len(some) < len(steps):
                out.print(Text(f"{len(some)} of {len(steps)}; all: --verbose", style="dim"))
        for step, why in Ledger(run_dir).left_out().items():
            failed = why.startswith("failed")
            out.print(Text(f"step {step:,} {why}", style="red" if failed else "yellow"))
            if not failed:
                out.print(Text("  it is left out of curves and figures", style="dim"))
