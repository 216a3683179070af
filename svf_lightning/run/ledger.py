"""What became of each checkpoint of a replay: one small JSON file each, so that several devices can write at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from svf_lightning.errors import InputError, reason
from svf_lightning.files import read_json, write_json
from svf_lightning.trajectory import has_trajectory, open_trajectory


class HasStep(Protocol):
    """What stands for a checkpoint."""

    @property
    def step(self) -> int:
        """Its training step."""
        ...


_Ref = TypeVar("_Ref", bound=HasStep)
_FOLDER = "ledger"
_OLD_FOLDER = "checkpoints"  # of version 0.1.0
_ENTRY = {
    "step": int,
    "name": str,
    "status": str,
    "error?": str,
    "revision?": str,
    "weight_hash?": str,
    "seconds?": (int, float),
}


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
        run_dir: The run directory; entries are files of its folder ``ledger/``.
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
        latest: dict[int, Entry] = {}
        for path in (*(self.run_dir / _OLD_FOLDER).glob("step*.json"), *self.folder.glob("step*.json")):
            try:
                entry = Entry(**read_json(path, _ENTRY))
                latest[entry.step] = entry
            except (InputError, TypeError) as error:
                raise InputError(
                    f"{path} cannot be read ({reason(error.__cause__ or error)}). "
                    "Fix: delete it; its checkpoint is repeated."
                ) from error
        return [latest[step] for step in sorted(latest)]

    def missing(self, refs: list[_Ref]) -> list[_Ref]:
        """Those that have no row in the trajectory, which is what decides."""
        if not has_trajectory(self.run_dir):
            return refs
        there = set(open_trajectory(self.run_dir)["step"].values.tolist())
        return [ref for ref in refs if ref.step not in there]
