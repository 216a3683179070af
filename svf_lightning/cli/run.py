"""The commands that run a model: LightningCLI with run directories, presets and one-line errors."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from svf_lightning.arguments import CommandLine
from svf_lightning.callbacks.base import Driver, ProbeMetric, RowSink, quantities_of
from svf_lightning.cli.messages import explain, quiet_the_libraries
from svf_lightning.cli.presets import COMMANDS, CONFIG_FLAGS, defaults_path, folder_of, with_preset
from svf_lightning.errors import InputError, bad_value, one_line, reason
from svf_lightning.files import is_file, write_text
from svf_lightning.run.checkpoint import read_checkpoint
from svf_lightning.run.directory import CHECKPOINTS, CONFIG, check_free, is_replay, new_run_dir, owner_of
from svf_lightning.run.identity import check_same_metrics, metric_identity
from svf_lightning.run.settings import CaptureOptions, Experiment, JoinsRun, Run
from svf_lightning.terminal import say
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.toy.model import check_state_fits
from svf_lightning.trajectory import TRAJECTORY
from svf_lightning.wandb_logger import RunLogger

_RUN_DIR = "SVF_LIGHTNING_RUN_DIR"
_RUNS = Path("runs")
_PARTS = ("experiment", "capture", "trainer", "model", "data")
_NOT_SETTINGS = ("config", "ckpt_path", "run_dir", "report")  # these say where a run goes, and what is drawn of it


class RunCLI(LightningCLI):
    """LightningCLI with run directories, presets and one-line errors; what `fit` and `replay` share."""

    run_dir: Path
    config_text: str
    parsers: tuple[LightningArgumentParser, ...]
    parser_of: dict[str, LightningArgumentParser]
    exit_code = 0

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the project adds."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Directory of this run (default: runs/<experiment.name>/<id>).",
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Write report.html into the run directory, after fit and replay."
        )
        parser.add_class_arguments(Experiment, "experiment")
        parser.add_class_arguments(CaptureOptions, "capture")

        self.parsers = (*getattr(self, "parsers", ()), parser)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parsers, one for each subcommand."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        self.parser_of = dict(zip(self.subcommands(), self.parsers, strict=True))
        for name in {"validate", "test"} & self.parser_of.keys():
            self.parser_of[name].set_defaults(verbose=False)  # the closing table has all of it

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in this program's words what cannot be parsed.

        Raises:
            InputError: An unknown option or key, a value of the wrong type, or one that cannot be resolved.
        """
        try:
            super().parse_arguments(parser, args)
        except InputError:
            raise
        except Exception as error:  # the parser and OmegaConf raise errors of many types
            named = (name for name, its in self.parser_of.items() if name in args or its is parser)
            command = next(named, next(iter(self.parser_of)))
            known = list(self.parser_of[command].get_defaults(skip_validation=True).keys())
            files = CommandLine(args, COMMANDS).values(*CONFIG_FLAGS)
            raise InputError(explain(one_line(error), command, known, files)) from error
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        for part in _PARTS:
            if not isinstance(config.get(part), Namespace):
                raise bad_value(part, config.get(part), "options by name", f"leave out {part}, or correct it")
        seed = config.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise bad_value("seed_everything", seed, f"0 to {2**32 - 1}", "change --seed_everything")

    def instantiate_classes(self) -> None:
        """Build trainer, model and data.

        Raises:
            InputError: They cannot be built with these settings.
        """
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:  # of any class that the settings name
            raise InputError(
                f"the run cannot be set up ({reason(error)}). Allowed: settings that its classes take. "
                "Fix: change the settings; with SVF_DEBUG=1 you see where it failed."
            ) from error

    # Private in Lightning, and there is no public switch. It would let a checkpoint's settings override the user's.
    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user wrote it."""

    def before_instantiate_classes(self) -> None:
        """Choose the run directory."""
        config = self.config[self.subcommand]
        self.config_text = self.resolved()
        self.run_dir = self._choose_run_dir(config)
        config.trainer.default_root_dir = str(self.run_dir)

    def after_instantiate_classes(self) -> None:
        """Tell the run to all that takes part in it, and check that no two callbacks measure the same.

        Raises:
            InputError: They do, or they contradict the run's options, or one does not keep its own.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, (ProbeMetric, RowSink)) for callback in callbacks):
            Driver.of(self.trainer)
        quantities_of(callbacks, self.model)
        metric_identity(callbacks)
        given = self.config_init[self.subcommand]
        run = Run(self.run_dir, str(self.subcommand), given.experiment, given.capture)
        for part in (*callbacks, *self.trainer.loggers):
            if isinstance(part, JoinsRun):
                part.join(run)
            if isinstance(part, ModelCheckpoint) and part.dirpath is None:
                part.dirpath = os.path.realpath(self.run_dir / CHECKPOINTS)

    def resolved(self) -> str:
        """The settings that were parsed, as YAML that repeats the run; where it goes is not a setting."""
        config = self.config[self.subcommand]
        settings = Namespace(  # type: ignore[no-untyped-call]
            {k: v for k, v in config.items(branches=True) if k not in _NOT_SETTINGS}
        )
        text: str = self.parser_of[str(self.subcommand)].dump(settings, skip_unset=False, skip_validation=True)
        return text

    def _choose_run_dir(self, config: Namespace) -> Path:
        """Directory of this run, free or one that the run goes on in."""
        raise NotImplementedError

    def _begin_run(self) -> None:
        """Everything was valid: only now something is written."""
        write_text(self.run_dir / CONFIG, self.config_text)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_config(yaml.safe_load(self.config_text))

    # Private in Lightning, and there is no public hook around the whole run.
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (SystemExit, KeyboardInterrupt, SIGTERMException) as stop:  # Lightning turns Ctrl-C into an exit
            raise Interrupted(self.run_dir) from stop


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
        parser.link_arguments("model.n_features", "data.n_features")
        parser.link_arguments("model.n_instances", "data.n_instances")
        parser.link_arguments("data.context_length", "model.context_length")

    def _choose_run_dir(self, config: Namespace) -> Path:
        self.checkpoint = _find_checkpoint(config.get("ckpt_path"), str(self.subcommand))
        self.resumed = owner_of(self.checkpoint) if self.checkpoint and self.subcommand == "fit" else None
        if config.run_dir is not None:
            run_dir = Path(config.run_dir)
        elif self.resumed is not None:
            run_dir = self.resumed
        else:
            suffix = "" if self.subcommand == "fit" else f"-{self.subcommand}"
            name = new_run_dir(config.experiment.name, _RUNS)
            run_dir = name.with_name(name.name + suffix)
        self.goes_on = self.resumed is not None and run_dir.absolute() == self.resumed.absolute()
        if not self.goes_on:
            check_free(run_dir)
        return run_dir

    def _begin_run(self) -> None:
        self.model.check(self.trainer, self.datamodule, str(self.subcommand))
        if self.checkpoint is not None:
            saved = read_checkpoint(self.checkpoint)
            check_state_fits(self.model, saved["state_dict"])
            if self.subcommand == "fit" and 0 <= self.trainer.max_steps <= saved["global_step"]:
                raise bad_value(
                    "trainer.max_steps", self.trainer.max_steps,
                    f"more than {saved['global_step']}, the step of {self.checkpoint}",
                    "raise --trainer.max_steps to train on",
                )  # fmt: skip
            if self.resumed is not None:
                check_same_metrics(self.resumed, self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.resumed is not None and not self.goes_on and (self.resumed / TRAJECTORY).is_dir():
                # a branch keeps the rows of its parent
                shutil.copytree(self.resumed / TRAJECTORY, self.run_dir / TRAJECTORY)
        super()._begin_run()

    before_fit = before_validate = before_test = _begin_run


class FitSettings(ToyCLI):
    """What `fit` makes of a command line, without doing it; the parser is built once."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning warns about arguments passed by a program
            super().__init__(ToyAttentionModel, ToyData, **_options(["fit"]), parser_kwargs=_parser_kwargs(ToyCLI))

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


class ReplayCLI(RunCLI):
    """The command that replays checkpoints of real models."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand, with the trainer arguments that do not come from the command line."""
        return {"replay": {"model", "datamodule"}}

    def _choose_run_dir(self, config: Namespace) -> Path:
        inherited = os.environ.get(_RUN_DIR)  # processes of further devices run the same command line
        if inherited is not None and "LOCAL_RANK" in os.environ:
            return Path(inherited)
        run_dir = Path(config.run_dir) if config.run_dir else new_run_dir(config.experiment.name, _RUNS)
        if not is_replay(run_dir):
            check_free(run_dir)
        os.environ[_RUN_DIR] = str(run_dir)
        return run_dir

    def before_replay(self) -> None:
        """Write the configuration; that of a run that goes on stays, after a check that it is the same run."""
        self.model.check(self.trainer, self.datamodule)
        if not is_replay(self.run_dir):
            self._begin_run()
        if not self.datamodule.missing(self.run_dir):
            say("every checkpoint is there already: nothing to replay")

    def after_replay(self) -> None:
        """Tell by the exit code whether every checkpoint is there."""
        self.exit_code = 1 if self.datamodule.missing(self.run_dir) else 0


class Interrupted(Exception):
    """A run that Ctrl-C or SIGTERM ended; its directory is whole."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir


def run_command(args: list[str]) -> RunCLI:
    """Run ``fit``, ``validate``, ``test`` or ``replay``.

    Raises:
        InputError: The arguments cannot be used.
        Interrupted: Ctrl-C or SIGTERM ended the run.
        DivergedError: Every instance diverged.
        CheckpointError: No checkpoint could be replayed.
    """
    if CommandLine(args, COMMANDS).command == "replay":
        from svf_lightning.replay import CheckpointReplay, ReplayData
        from svf_lightning.replay.trainer import ReplayTrainer

        return ReplayCLI(
            CheckpointReplay,
            ReplayData,
            trainer_class=ReplayTrainer,
            parser_kwargs=_parser_kwargs(ReplayCLI),
            **_options(args),
        )
    return ToyCLI(ToyAttentionModel, ToyData, parser_kwargs=_parser_kwargs(ToyCLI), **_options(args))


def fit(args: Sequence[str]) -> None:
    """Run ``fit`` inside a Python program.

    Raises:
        InputError: The arguments cannot be used.
        DivergedError: Every instance diverged.
    """
    quiet_the_libraries()
    run_command(["fit", *args])


def _options(args: list[str]) -> dict[str, Any]:
    """What all commands have in common."""
    return {
        "save_config_callback": None,
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
        "args": with_preset(CommandLine(args, COMMANDS)),
    }


def _parser_kwargs(cli: type[ToyCLI | ReplayCLI]) -> dict[str, Any]:
    common = {"parser_mode": "omegaconf+", "exit_on_error": False}
    each = {
        name: {**common, "default_config_files": [str(defaults_path(folder_of(name)))]} for name in cli.subcommands()
    }
    return {**common, "description": __doc__, **each}


def _find_checkpoint(given: str | None, subcommand: str) -> Path | None:
    if given is None:
        if subcommand == "fit":
            return None
        raise InputError(
            f"{subcommand} needs a checkpoint to look at. Allowed: a .ckpt file that fit wrote. "
            "Fix: add --ckpt_path RUN_DIR/checkpoints/last.ckpt."
        )
    if not is_file(Path(given)):
        raise InputError(
            f"--ckpt_path {given}: there is no such file. Allowed: a .ckpt file that fit wrote "
            "(RUN_DIR/checkpoints/last.ckpt). Fix: check the path."
        )
    return Path(given)
