"""What became of each checkpoint of a replay: one small JSON file each, so that several devices can write at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from svf_lightning.errors import InputError, reason
from svf_lightning.files import read_json, write_json
from svf_lightning.run.fingerprint import Fingerprint, Weights, misplaced
from svf_lightning.trajectory import has_trajectory, open_trajectory

if TYPE_CHECKING:
    import xarray as xr


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
    "logit_error?": (int, float, NoneType),
    "score_error?": (int, float, NoneType),
    "fingerprint?": (Mapping, NoneType),
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
        logit_error: Largest difference of the logits that were measured with from those of plain transformers, relative
            to the largest; None for a checkpoint of version 0.1.0, or one that failed before.
        score_error: The same of rebuilt attention scores and the model's own.
        fingerprint: What tells its weights from those of other checkpoints, as JSON
            (:class:`svf_lightning.run.fingerprint.Fingerprint`).
    """

    step: int
    name: str
    status: Literal["done", "failed"]
    error: str = ""
    revision: str = ""
    weight_hash: str = ""
    seconds: float = 0.0
    logit_error: float | None = None
    score_error: float | None = None
    fingerprint: dict[str, Any] | None = None

    @property
    def weights(self) -> Weights:
        """What is known of its weights.

        Raises:
            ValueError: The fingerprint is damaged.
        """
        kept = self.fingerprint
        return Weights(self.step, self.weight_hash, None if kept is None else Fingerprint.from_json(kept))


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

    def flagged(self) -> dict[int, str]:
        """Measured checkpoints whose weights are not what they say they are, and why, by step.

        Computed from all that is there, so it can change as more checkpoints come.

        Raises:
            InputError: A file cannot be read.
        """
        done = [entry for entry in self.entries() if entry.status == "done"]
        try:
            return misplaced([entry.weights for entry in done])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{self.folder} cannot be read ({error}). Fix: delete the folder; weights are then not compared."
            ) from error

    def write_flagged(self) -> None:
        """Write :meth:`flagged` down beside the entries, for those who read the files; it is never read here."""
        if self.folder.is_dir():
            write_json(self.folder / "flagged.json", self.flagged())

    def left_out(self) -> dict[int, str]:
        """Checkpoints that no curve shows, and why, by step: those that failed, and those that are flagged."""
        failed = {entry.step: f"failed: {entry.error}" for entry in self.entries() if entry.status == "failed"}
        return dict(sorted({**failed, **self.flagged()}.items()))


def open_sound(run_dir: str | Path) -> xr.Dataset:
    """The trajectory of a run as curves and figures show it: of a replay, without the rows that its ledger flags.

    ``attrs["left_out"]`` says of a replay which checkpoints are not there, and why, by step.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    dataset = open_trajectory(run_dir)
    ledger = Ledger(run_dir)
    flagged = ledger.flagged()
    if flagged:
        dataset = dataset.isel(step=[i for i, step in enumerate(dataset["step"].values) if int(step) not in flagged])
    return dataset.assign_attrs(left_out=ledger.left_out())
