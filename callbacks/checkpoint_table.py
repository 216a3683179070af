"""CheckpointTable: what a replay found, checkpoint by checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from svf_lightning.callbacks.capture import Capture
from svf_lightning.trajectory import has_trajectory, open_trajectory

_COLUMNS = {
    "accuracy": "sad/accuracy",
    "logits": "sad/logit_difference",
    "attn": "sad/task/attention",
    "S(v)": "sad/task/sparseness",
    "shared": "sad/task/sparseness_shared_rotation",
    "indep": "sad/task/sparseness_independent_rotation",
    "N_recon": "sad/attending/n_recon",
}


class CheckpointTable(Callback):
    """Prints one line per checkpoint of the run directory, whenever it was measured, and what went wrong.

    Columns: the task's accuracy and logit difference; attention, S(v) and its two rotated controls of the task's heads;
    median N_recon of the heads that attend to the key. Below it: checkpoints that failed, with the reason, and steps
    whose weights are the same, bit for bit.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        Capture.of(trainer).on_test_end(trainer, pl_module)
        if trainer.is_global_zero:
            self.show(Path(trainer.default_root_dir))

    def show(self, run_dir: Path) -> None:
        """Print the table of a run directory."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        if has_trajectory(run_dir):
            trajectory = open_trajectory(run_dir)
            columns = {title: trajectory[name].values for title, name in _COLUMNS.items() if name in trajectory}
            table = Table(title="Checkpoints", title_justify="left")
            for title in ("step", *columns):
                table.add_column(title, justify="right", no_wrap=True)
            for k, step in enumerate(trajectory["step"].values):
                table.add_row(f"{step:,}", *(f"{values[k]:.3f}" for values in columns.values()))
            console.print(table)
            for steps in _same_weights(trajectory["step"].values, trajectory["weight_hash"].values):
                shown = ", ".join(f"{step:,}" for step in steps)
                console.print(Text(f"steps {shown} have the same weights, bit for bit"), style="yellow")
        for entry in map(json.loads, (p.read_text("utf-8") for p in sorted((run_dir / "checkpoints").glob("*.json")))):
            if entry["status"] == "failed":
                console.print(Text(f"step {entry['step']:,} failed: {entry['error']}"), style="red")


def _same_weights(steps: object, hashes: object) -> list[list[int]]:
    """Groups of steps with equal hashes."""
    groups: dict[str, list[int]] = {}
    for step, weight_hash in zip(steps, hashes, strict=True):  # type: ignore[call-overload]
        groups.setdefault(str(weight_hash), []).append(int(step))
    return [group for group in groups.values() if len(group) > 1]
