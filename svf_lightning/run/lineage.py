"""How a run goes on: from which checkpoint, with which settings, and what it may replace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svf_lightning.arguments import class_of, dotted
from svf_lightning.errors import InputError
from svf_lightning.files import is_file, write_json
from svf_lightning.run.checkpoint import read_checkpoint
from svf_lightning.run.directory import CHECKPOINTS, CONFIG, REPORT, SUMMARY, owner_of

PARENT = "parent.json"
LAST = "last.ckpt"
SETTINGS = "svf_lightning/settings"  # key of a checkpoint: the resolved settings of its run, YAML
_KEYWORDS = ("last", "best", "hpc")  # that Lightning knows
# Settings that change no number of a run: its length, its devices, what is logged and displayed.
_FREE = (
    "experiment",
    "verbose",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.min_steps",
    "trainer.min_epochs",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_checkpointing",
    "trainer.profiler",
    "trainer.plugins",
    "trainer.default_root_dir",
    "trainer.enable_autolog_hparams",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "trainer.num_sanity_val_steps",
)
_MOST_NAMED = 6  # differences that a message names


@dataclass(frozen=True)
class Parent:
    """Where a run comes from: ``parent.json`` of a run that began from another run's checkpoint, or measures it again.

    Args:
        run: Directory of the other run.
        checkpoint: Its checkpoint; empty for a replay, which measures all of them again.
        step: Training step of the checkpoint.
        differences: Settings that differ, by dotted name: before and now.
        rows_from: Step of the first row that this run's trajectory has: 0 where it holds its parent's rows, too.
    """

    run: str
    checkpoint: str = ""
    step: int = 0
    differences: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    rows_from: int = 0

    def write(self, run_dir: Path) -> None:
        """Keep it in a run directory."""
        write_json(run_dir / PARENT, asdict(self))

    @staticmethod
    def read(run_dir: Path) -> Parent | None:
        """That of a run; None for a run that began with its own first step.

        Raises:
            InputError: The file cannot be read.
        """
        path = run_dir / PARENT
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            differences = {name: (before, now) for name, (before, now) in kept.pop("differences").items()}
            return Parent(**kept, differences=differences)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}). Fix: the file is damaged; repeat the run.") from error


def run_of(given: str) -> Path | None:
    """The run that a --ckpt_path names: a run directory, its folder of checkpoints, or a checkpoint in it."""
    path = Path(given)
    if is_file(path / CONFIG):
        return path
    folder = path.absolute()
    if folder.name == CHECKPOINTS and is_file(folder.parent / CONFIG):
        return path.parent
    return owner_of(path)


def find_checkpoint(given: str | None, run_dir: str | None, command: str) -> tuple[Path | None, Path | None]:
    """What a --ckpt_path stands for.

    Args:
        given: A checkpoint, a run directory (its newest checkpoint), or "last" (that of ``run_dir``).
        run_dir: The --run_dir.
        command: The command; only "fit" can do without a checkpoint.

    Returns:
        The checkpoint, and the run that it belongs to. A run that was stopped before its first checkpoint has none: it
        begins again.

    Raises:
        InputError: There is no such checkpoint.
    """
    if given is None:
        if command == "fit":
            return None, None
        raise InputError(
            f"{command} needs a checkpoint to look at. Allowed: a .ckpt file that fit wrote, or a run directory. "
            "Fix: add --ckpt_path RUN_DIR/checkpoints/last.ckpt."
        )
    if given in _KEYWORDS:
        if given != "last" or run_dir is None:
            raise InputError(
                f"--ckpt_path {given} does not say of which run. Allowed: a run directory, or a .ckpt file in it. "
                "Fix: --ckpt_path RUN_DIR."
            )
        given = run_dir
    path = Path(given)
    if not is_file(path) and os.path.isdir(path):
        run = run_of(given)
        if run is None:
            raise InputError(
                f"--ckpt_path {given} is a directory without a run. Allowed: a run directory, or a .ckpt file in it. "
                "Fix: check the path."
            )
        checkpoint = newest_checkpoint(run)
        if checkpoint is None and command != "fit":
            raise InputError(f"{run} holds no checkpoint yet. Fix: go on with it first: fit --ckpt_path {run}.")
        return checkpoint, run
    if not is_file(path):
        raise InputError(
            f"--ckpt_path {given}: there is no such file. Allowed: a .ckpt file that fit wrote "
            "(RUN_DIR/checkpoints/last.ckpt), or a run directory. Fix: check the path."
        )
    return path, owner_of(path)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step that can be read; None if the run has none at all.

    Raises:
        InputError: It has some, and none can be read.
    """
    steps = {}
    failed: InputError | None = None
    for path in checkpoints_of(run_dir):
        try:
            steps[path] = read_checkpoint(path)["global_step"]
        except InputError as error:
            failed = error
    if not steps and failed is not None:
        raise failed
    return max(steps, key=lambda path: (steps[path], path.name == LAST), default=None)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Checkpoints of a run."""
    return sorted((run_dir / CHECKPOINTS).glob("*.ckpt"))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that matter and differ: by dotted name, the value before and the value now.

    Length, devices, logging and display do not matter. Callbacks are compared one by one, by class, and those that only
    look on are left out.
    """
    flat = [_that_matter(settings) for settings in (before, now)]
    # how long a run is decides how fast a schedule falls
    if any(one.get("model.lr_schedule", "constant") != "constant" for one in flat):
        for one, settings in zip(flat, (before, now), strict=True):
            one["trainer.max_steps"] = settings.get("trainer", {}).get("max_steps")
    missing = object()
    return {
        name: (flat[0].get(name), flat[1].get(name))
        for name in sorted({*flat[0], *flat[1]})
        if flat[0].get(name, missing) != flat[1].get(name, missing)
    }


def _that_matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {
        name: value
        for name, value in dotted(settings).items()
        if name != "trainer.callbacks" and not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    }
    flat = {name: value for name, value in flat.items() if name not in _LATER or value != _LATER[name]}
    for entry in (settings.get("trainer") or {}).get("callbacks") or []:
        name = str(entry["class_path"]).rsplit(".", 1)[-1]
        if name in _ONLY_LOOK_ON or name.endswith(("ProgressBar", "Summary")):
            continue
        key = f"trainer.callbacks.{name}"
        while key in flat:  # a second one of its class
            key = f"{key}'"
        options = {**(entry.get("init_args") or {}), **(entry.get("dict_kwargs") or {})}
        later: Mapping[str, Any] = getattr(class_of(entry), "later_defaults", dict)()
        flat |= {
            f"{key}.{option}": value
            for option, value in options.items()
            if option not in later or value != later[option]
        }
        if name != _DRIVER:
            flat[key] = "there"
    return flat


# Settings that earlier versions did not have, with the values that give the numbers of these.
_LATER = {"data.frequency_decay": 0.0, "data.feature_correlation": 0.0}

# Callbacks that change neither weights nor rows: they say when a run ends, save, log or display.
_ONLY_LOOK_ON = {
    "StepProgress",
    "RunSummary",
    "ModelCheckpoint",
    "OnExceptionCheckpoint",
    "EarlyStopping",
    "Timer",
    "LearningRateMonitor",
    "DeviceStatsMonitor",
    "ThroughputMonitor",
}
_DRIVER = "Capture"  # joins a run that does not name it


def described(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as words: ``model.lambda_attn was 10.0 and is 0.1 now``."""
    words = [f"{name} was {before!r} and is {now!r} now" for name, (before, now) in differing.items()]
    more = len(words) - _MOST_NAMED
    return "; ".join(words[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def rewind(run_dir: Path, checkpoint: Path | None, step: int) -> None:
    """Make a checkpoint the newest one of its run, which is about to redo what came after it.

    At every moment, the newest checkpoint is one from which the run can go on.

    Args:
        run_dir: The run directory.
        checkpoint: The checkpoint from which the run goes on; None if it begins again.
        step: Its training step.
    """
    last = run_dir / CHECKPOINTS / LAST
    if checkpoint is not None and checkpoint.absolute() != last.absolute():
        draft = last.with_name(f".{last.name}.{os.getpid()}")
        shutil.copyfile(checkpoint, draft)
        draft.replace(last)
    for path in checkpoints_of(run_dir):
        if _step_of(path) > step:
            path.unlink()
    if checkpoint is None:
        for part in run_dir.glob("trajectory*.zarr"):
            shutil.rmtree(part)
    for name in (SUMMARY, REPORT):  # they speak of the end that is undone
        (run_dir / name).unlink(missing_ok=True)


def _step_of(path: Path) -> float:
    try:
        step: int = read_checkpoint(path)["global_step"]
        return step
    except InputError:
        return float("inf")  # torn: nobody can go on from it
