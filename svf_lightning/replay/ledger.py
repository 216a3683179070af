"""What became of each checkpoint of a replay: one small JSON file each, so that several devices can write at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from svf_lightning.errors import InputError
from svf_lightning.replay.source import CheckpointRef
from svf_lightning.run_dir import write_json
from svf_lightning.trajectory import has_trajectory, open_trajectory

_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    Args:
        step: Training step.
        name: How its source calls it.
        status: "done" (its row is in the trajectory) or "failed".
        error: Why it failed, in one line.
        revision: The commit that was loaded, from a hub.
        weight_hash: Hash of the weights as they were loaded.
        seconds: Time from loading to the stored row.
    """

    step: int
    name: str
    status: Literal["done", "failed"]
    error: str = ""
    revision: str = ""
    weight_hash: str = ""
    seconds: float = 0.0


class Ledger:
    """The checkpoints of one run directory.

    Args:
        run_dir: The run directory; entries are files of its folder ``checkpoints/``.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / _FOLDER

    def record(self, entry: Entry) -> None:
        """Write one entry, whole; a later one for the same step takes its place."""
        write_json(self.folder / f"step{entry.step}.json", asdict(entry))

    def entries(self) -> list[Entry]:
        """All entries, by step.

        Raises:
            InputError: A file cannot be read.
        """
        found = []
        for path in self.folder.glob("step*.json"):
            try:
                found.append(Entry(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}). Fix: delete it; its checkpoint is repeated."
                ) from error
        return sorted(found, key=lambda entry: entry.step)

    def missing(self, refs: list[CheckpointRef]) -> list[CheckpointRef]:
        """Those that have no row in the trajectory, which is what decides."""
        if not has_trajectory(self.run_dir):
            return refs
        there = set(open_trajectory(self.run_dir)["step"].values.tolist())
        return [ref for ref in refs if ref.step not in there]


def check_same_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Check that a run that goes on measures what it measured before.

    Args:
        path: File that keeps the identity; without it, the run is a new one.
        identity: Everything that two rows of one curve must share: model, processing, dtype, prompts, options.

    Raises:
        InputError: Something differs.
    """
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"the rows in {path.parent} were measured with {name}={before.get(name)!r}, and this call has "
            f"{now.get(name)!r}. Allowed: the same settings, as one curve must not mix them. "
            "Fix: use another --run_dir, or the settings of that run (its config.yaml)."
        )
