"""The commands that train and evaluate the toy model."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from svf_lightning.arguments import CommandLine
from svf_lightning.callbacks import TrajectoryWriter
from svf_lightning.cli.presets import COMMANDS, with_preset
from svf_lightning.cli.run import RunCLI, options, parser_kwargs
from svf_lightning.errors import InputError, bad_value
from svf_lightning.files import is_file
from svf_lightning.run.checkpoint import has_training_state, read_checkpoint
from svf_lightning.run.directory import CONFIG, RUNS, check_free, new_run_dir, read_config
from svf_lightning.run.identity import check_same_metrics
from svf_lightning.run.lineage import (
    SETTINGS,
    Parent,
    described,
    differences,
    find_checkpoint,
    newest_checkpoint,
    rewind,
)
from svf_lightning.run.summary import read_summary
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.toy.model import check_state_fits
from svf_lightning.trajectory import TRAJECTORY, has_trajectory


class ToyCLI(RunCLI):
    """The commands that train and evaluate the toy model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands, each with the trainer arguments that do not come from the command line."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sizes that are written once."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Go back to an earlier checkpoint of a finished run, in place: what came after it is lost.",
        )
        parser.link_arguments("model.n_features", "data.n_features")
        parser.link_arguments("model.n_instances", "data.n_instances")
        parser.link_arguments("data.context_length", "model.context_length")

    def _choose_run_dir(self, config: Namespace) -> Path:
        command = str(self.subcommand)
        self.overwrite = config.get("overwrite", False)
        self.checkpoint, self.origin = find_checkpoint(config.get("ckpt_path"), config.run_dir, command)
        config.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        if config.run_dir is not None:
            run_dir = Path(config.run_dir)
        elif self.origin is not None and command == "fit":
            run_dir = self.origin
        else:
            suffix = "" if command == "fit" else f"-{command}"
            name = new_run_dir(config.experiment.name, RUNS)
            run_dir = name.with_name(name.name + suffix)
        self.goes_on = command == "fit" and self.origin is not None and _same(run_dir, self.origin)
        if not self.goes_on:
            check_free(run_dir)
        return run_dir

    def _check_start(self) -> None:
        """Check that the checkpoint can be used, and whether its run had other settings.

        Raises:
            InputError: It holds weights of other shapes, or weights alone; or the run cannot go on with these settings.
        """
        saved = read_checkpoint(self.checkpoint) if self.checkpoint is not None else {}
        self.step = int(saved.get("global_step", 0))
        settings = saved.get(SETTINGS)
        before = yaml.safe_load(settings) if settings else read_config(self.origin) if self.origin else {}
        differing = differences(before, yaml.safe_load(self.config_text)) if before else {}
        if self.checkpoint is not None:
            try:
                check_state_fits(self.model, saved["state_dict"])
            except InputError as error:
                if not differing:
                    raise
                raise InputError(
                    f"the checkpoint {self.checkpoint} is of a model of another shape: {described(differing)}. "
                    "Allowed: the sizes of its run. Fix: use the settings of that run (its config.yaml)."
                ) from error
        if self.subcommand != "fit" or self.checkpoint is None:
            if self.origin is not None and self.checkpoint is not None:
                self.parent = Parent(str(self.origin), self.checkpoint.name, self.step, differing)
            self._check_in_place(differing)
            return
        if not has_training_state(saved):
            raise InputError(
                f"--ckpt_path {self.checkpoint} holds weights alone, and a training also needs the state of its "
                "optimizer. Allowed for fit: a checkpoint that was saved without save_weights_only. "
                "Fix: take another one from its folder."
            )
        if 0 <= self.trainer.max_steps < self.step:
            raise bad_value(
                "trainer.max_steps", self.trainer.max_steps, f"at least {self.step}, the step of {self.checkpoint}",
                "raise --trainer.max_steps to train on",
            )  # fmt: skip
        if self.goes_on:
            assert self.origin is not None
            self.parent = Parent.read(self.origin)
            self._check_in_place(differing)
            return
        rows_from = self.step
        if not differing and self.origin is not None and has_trajectory(self.origin):
            # with the same settings, a branch keeps the rows of its parent
            check_same_metrics(self.origin, self.trainer.callbacks)  # type: ignore[attr-defined]
            self.copies_rows = True
            grandparent = Parent.read(self.origin)
            rows_from = grandparent.rows_from if grandparent is not None else 0
        self.parent = Parent(
            str(self.origin or self.checkpoint.parent), self.checkpoint.name, self.step, differing, rows_from
        )
        if differing:
            self.model.continue_differently()

    def _check_in_place(self, differing: Mapping[str, tuple[Any, Any]]) -> None:
        """Check that a run goes on as what it is.

        Raises:
            InputError: Its settings differ, or it has ended and would be undone.
        """
        if not self.goes_on:
            return
        assert self.origin is not None
        if differing:
            raise InputError(
                f"{self.origin} has other settings: {described(differing)}. Allowed in place: the same settings "
                "(length, devices, logging and display may differ). "
                f"Fix: leave them as they are, or begin a run of its own: --run_dir {self._elsewhere()}."
            )
        last = newest_checkpoint(self.origin)
        ended = read_summary(self.origin).get("status") == "finished"
        if ended and last is not None and not self.overwrite and read_checkpoint(last)["global_step"] > self.step:
            raise InputError(
                f"{self.origin} has finished, and going back to step {self.step} would undo what came after it. "
                f"Allowed: its last checkpoint, --ckpt_path {self.origin}. "
                f"Fix: begin a run of its own, --run_dir {self._elsewhere()}, or say --overwrite=true."
            )
        if self.step == self.trainer.max_steps and ended and self.step > 0:
            raise bad_value(
                "trainer.max_steps", self.trainer.max_steps, f"more than {self.step}, where {self.origin} has finished",
                "raise --trainer.max_steps to train on",
            )  # fmt: skip

    def _elsewhere(self) -> Path:
        """A directory for a run of its own, to be proposed."""
        return new_run_dir(self.config[self.subcommand].experiment.name, RUNS)

    def _before(self) -> None:
        """Take the directory for this process, and check what it holds."""
        self.model.check(self.trainer, self.datamodule, str(self.subcommand))
        self.lock.acquire()
        if self.goes_on:
            self._check_in_place({})  # another process may have ended meanwhile
            for writer in self._writers():
                writer.check(self.trainer, self.step)
        else:
            check_free(self.run_dir)

    def _begin_run(self) -> None:
        if self.goes_on:
            rewind(self.run_dir, self.checkpoint, self.step)
        elif self.copies_rows:
            assert self.origin is not None
            shutil.copytree(self.origin / TRAJECTORY, self.run_dir / TRAJECTORY)
        super()._begin_run()

    def _writers(self) -> list[TrajectoryWriter]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, TrajectoryWriter)] if self.step else []

    def _again(self) -> str:
        began = self.subcommand == "fit" and is_file(self.run_dir / CONFIG)
        return f"python -m svf_lightning fit --ckpt_path {self.run_dir}" if began else ""

    before_fit = before_validate = before_test = _before


class FitSettings(ToyCLI):
    """What `fit` makes of a command line, without doing it; the parser is built once."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning warns about arguments passed by a program
            super().__init__(ToyAttentionModel, ToyData, **options(["fit"]), parser_kwargs=parser_kwargs(ToyCLI))

    def of(self, args: Sequence[str]) -> str:
        """The resolved settings of ``fit ARGS``, YAML.

        Raises:
            InputError: The arguments cannot be used.
        """
        command, *rest = with_preset(CommandLine(["fit", *args], COMMANDS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the subcommand's parser gives the same settings in half the time
            self.parse_arguments(self.parser_of[command], rest)
        self.config = Namespace(subcommand=command, **{command: self.config})  # type: ignore[no-untyped-call]
        return self.resolved()

    def before_instantiate_classes(self) -> None:
        """Nothing: only the settings are of interest."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def after_instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


def _same(one: Path, other: Path) -> bool:
    """True for two names of one directory."""
    return os.path.realpath(one) == os.path.realpath(other)
