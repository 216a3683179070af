"""Options of Lightning's Trainer: which of ours give way to the user's, and which cannot be used here."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)

from svf_lightning.arguments import class_of
from svf_lightning.callbacks import StepProgress
from svf_lightning.errors import InputError, bad_value

# Some of Lightning's classes have defaults that are text and an enumeration at once, which YAML cannot write.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))

_PRESETS_CHECKPOINTS = "step-{step}"  # file name of the checkpoints that the presets ask for
_UNUSABLE: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "a step would no longer be one draw; raise --data.batch_size instead",
    StochasticWeightAveraging: "rows are of the weights that are trained, and not of an average",
    WeightAveraging: "rows are of the weights that are trained, and not of an average",
    LearningRateFinder: "the run would not have the learning rate that its config.yaml names; give a list, "
    "--model.learning_rate='[1e-3,1e-2]', which trains side by side",
    BatchSizeFinder: "the run would not have the batch size that its config.yaml names; set --data.batch_size",
    ModelPruning: "the toy model has no layers to prune",
    BackboneFinetuning: "the toy model has no backbone; --model.freeze keeps features or head as they are",
}


def check_options(trainer: Namespace) -> None:
    """Refuse what cannot work as Lightning documents it.

    Args:
        trainer: The trainer's settings.

    Raises:
        InputError: One of its options cannot be used.
    """
    for entry in _entries(trainer.callbacks):
        for cls, why in _UNUSABLE.items():
            if issubclass(_class_of(entry), cls):
                raise InputError(
                    f"the callback {cls.__name__} cannot be used: {why}. Allowed: callbacks that leave steps and "
                    "weights as they are. Fix: leave it out."
                )
    refused = {
        "barebones": (True, "a run captures, logs and saves", "use --trainer.logger=false and fewer callbacks"),
        "default_root_dir": (..., "null: everything goes into the run directory", "use --run_dir"),
        "overfit_batches": (..., "0: every batch is drawn afresh", "lower --data.batch_size"),
        "val_check_interval": (..., "null: no batch is seen twice, so none is held out", "test --ckpt_path RUN_DIR"),
    }  # fmt: skip
    for name, (value, allowed, fix) in refused.items():
        given = trainer.get(name)
        if given == value or (value is ... and given not in (None, 0, 0.0)):
            raise bad_value(f"trainer.{name}", given, allowed, fix)
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise bad_value("trainer.gradient_clip_val", trainer.gradient_clip_val, "null or a number >= 0", "change it")
    if trainer.precision in ("16-true", "16-mixed", 16, "16", "transformer-engine", "transformer-engine-float16"):
        raise bad_value(
            "trainer.precision", trainer.precision, "32-true, 64-true, bf16-true, bf16-mixed",
            "take bf16: float16 would need its losses scaled, all instances alike",
        )  # fmt: skip


def give_way(trainer: Namespace, goes_on: bool) -> None:
    """Leave out those callbacks of the presets that contradict what was asked for.

    Args:
        trainer: The trainer's settings; they are changed.
        goes_on: The callbacks are those of a run that goes on; who repeats its command adds theirs a second time, and
            these are left out, too.
    """
    entries = _entries(trainer.callbacks)
    classes = [_class_of(entry) for entry in entries]
    other_bar = any(issubclass(cls, ProgressBar) and cls is not StepProgress for cls in classes)
    kept = []
    for entry, cls in zip(entries, classes, strict=True):
        options = entry.get("init_args") or {}
        if cls is StepProgress and (trainer.enable_progress_bar is False or other_bar):
            continue
        if issubclass(cls, ModelCheckpoint):
            if trainer.enable_checkpointing is False and options.get("filename") == _PRESETS_CHECKPOINTS:
                continue
            if options.get("dirpath") is None:  # in the run directory, a run that goes on replaces what it redoes
                options["enable_version_counter"] = False
        if not (goes_on and entry in kept):
            kept.append(entry)
    if trainer.callbacks is not None:
        trainer.callbacks = kept


def place_loggers(trainer: Namespace, run_dir: Path) -> None:
    """Have loggers write into the run directory: a relative ``save_dir`` is a folder of it.

    Args:
        trainer: The trainer's settings; they are changed.
        run_dir: The run directory.
    """
    for entry in _entries(trainer.logger):
        options = entry.get("init_args")
        if options is not None and "save_dir" in options:
            options.save_dir = str(run_dir / (options.save_dir or "."))


class AtTheStart(Callback):
    """Calls a function once, when a run has passed all checks and its first step is next.

    Args:
        begin: The function.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin: Callable[[], None] | None = begin

    def _once(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training begins."""
        self._once()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It has no step to take."""
        self._once()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins."""
        self._once()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins."""
        self._once()


def _entries(given: Any) -> list[Namespace]:
    """Entries with a class_path, of a setting that may be one, a list, a bool or null."""
    listed = given if isinstance(given, list) else [given]
    return [entry for entry in listed if isinstance(entry, Namespace) and "class_path" in entry]


def _class_of(entry: Namespace) -> type:
    cls = class_of(vars(entry))  # the parser has imported it already
    assert isinstance(cls, type)
    return cls
