"""What the commands that run a model share: LightningCLI with run directories, presets and one-line errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
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
from svf_lightning.cli.checkpoint_io import WholeCheckpointIO
from svf_lightning.cli.messages import explain
from svf_lightning.cli.presets import COMMANDS, CONFIG_FLAGS, folder_of, with_preset
from svf_lightning.cli.trainer_options import AtTheStart, check_options, give_way, place_loggers
from svf_lightning.errors import InputError, bad_value, one_line, reason
from svf_lightning.files import write_text
from svf_lightning.preset_files import defaults_path
from svf_lightning.run.directory import CHECKPOINTS, CONFIG
from svf_lightning.run.identity import metric_identity
from svf_lightning.run.lineage import Parent
from svf_lightning.run.lock import DirectoryLock
from svf_lightning.run.settings import CaptureOptions, Experiment, JoinsRun, Run
from svf_lightning.stop import STOP
from svf_lightning.trajectory import has_trajectory
from svf_lightning.wandb_logger import RunLogger

_PARTS = ("experiment", "capture", "trainer", "model", "data")
# these say where a run begins and goes, and what is drawn of it
_NOT_SETTINGS = ("config", "ckpt_path", "weights_only", "run_dir", "overwrite", "report", "open", "remeasure")

_EVALUATIONS = ("validate", "test")
_FLAGS = ("--open", "--verbose", "--overwrite", "--report")


class RunCLI(LightningCLI):
    """LightningCLI with run directories, presets and one-line errors; what `fit` and `replay` share."""

    run_dir: Path
    config_text: str
    lock: DirectoryLock
    parent: Parent | None = None
    copies_rows = False
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
        parser.add_argument("--open", type=bool, default=False, help="Open report.html in the browser at the end.")
        parser.add_class_arguments(Experiment, "experiment")
        parser.add_class_arguments(CaptureOptions, "capture")

        self.parsers = (*getattr(self, "parsers", ()), parser)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parsers, one for each subcommand."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        self.parser_of = dict(zip(self.subcommands(), self.parsers, strict=True))
        for name, its in self.parser_of.items():
            if name in _EVALUATIONS:  # Lightning's own option
                its.set_defaults(verbose=False)
            else:
                its.add_argument("--verbose", type=bool, default=False, help="Print every metric at the end.")

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

    # Private in Lightning, and there is no public switch. It would let a checkpoint's settings override the user's.
    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user wrote it."""

    def before_instantiate_classes(self) -> None:
        """Choose the run directory.

        Raises:
            InputError: There is none to choose, or an option of the trainer cannot be used.
        """
        config = self.config[self.subcommand]
        check_options(config.trainer)
        give_way(config.trainer, goes_on=config.get("ckpt_path") is not None)
        self.config_text = self.resolved()
        self.run_dir = self._choose_run_dir(config)
        self._was_there = self.run_dir.exists()
        config.trainer.default_root_dir = str(self.run_dir)
        place_loggers(config.trainer, self.run_dir)
        self.lock = DirectoryLock(self.run_dir)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer.

        Raises:
            InputError: One of them cannot be made of its settings; most often a package is missing.
        """
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:  # what a class of Lightning, of another package or of the user raises
            raise InputError(
                f"the run cannot be set up ({reason(_root_of(error))}). Allowed: settings that its classes take, with "
                "the packages that they need. Fix: change the settings; with SVF_DEBUG=1 you see where it failed."
            ) from error

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
        self._check_start()
        run = Run(
            self.run_dir,
            str(self.subcommand),
            given.experiment,
            given.capture,
            self.config_text,
            self.parent.rows_from if self.parent is not None else 0,
            bool(self.config[self.subcommand].get("verbose")),
        )
        self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        callbacks.insert(0, AtTheStart(self._begin_run))
        for part in (*callbacks, *self.trainer.loggers):
            if isinstance(part, JoinsRun):
                part.join(run)
            if isinstance(part, ModelCheckpoint) and part.dirpath is None:
                part.dirpath = os.path.realpath(self.run_dir / CHECKPOINTS)

    def resolved(self) -> str:
        """The settings that were parsed, as YAML that repeats the run; where it goes is not a setting."""
        config = self.config[self.subcommand]
        # of an evaluation, "verbose" has always been among them
        left_out = _NOT_SETTINGS if self.subcommand in _EVALUATIONS else (*_NOT_SETTINGS, "verbose")
        settings = Namespace(  # type: ignore[no-untyped-call]
            {k: v for k, v in config.items(branches=True) if k not in left_out}
        )
        text: str = self.parser_of[str(self.subcommand)].dump(settings, skip_unset=False, skip_validation=True)
        return text

    def described(self) -> dict[str, str]:
        """The options that the command takes, with their help; not those that follow others."""
        actions = self.parser_of[str(self.subcommand)]._actions
        taken = [action for action in actions if any(flag.startswith("--") for flag in action.option_strings)]
        return {action.dest: action.help or "" for action in taken}

    def _choose_run_dir(self, config: Namespace) -> Path:
        """Directory of this run, free or one that the run goes on in."""
        raise NotImplementedError

    def _check_start(self) -> None:
        """Check where the run begins, before anything is written."""

    def _begin_run(self) -> None:
        """Everything was valid, and the first step is next: only now something is written."""
        if self.parent is not None:
            self.parent.write(self.run_dir)
        write_text(self.run_dir / CONFIG, self.config_text)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_config(yaml.safe_load(self.config_text))

    # Private in Lightning, and there is no public hook around the whole run.
    def _run_subcommand(self, subcommand: str) -> None:
        STOP.gently = subcommand == "fit"
        try:
            super()._run_subcommand(subcommand)
        except (SystemExit, KeyboardInterrupt, SIGTERMException) as stop:  # Lightning turns Ctrl-C into an exit
            raise Interrupted(self.run_dir, self._again()) from stop
        except (InputError, MisconfigurationException):
            self._leave_nothing()
            raise
        finally:
            STOP.gently = False
            self.lock.release()
        if STOP.asked:
            raise Interrupted(self.run_dir, self._again())

    def _leave_nothing(self) -> None:
        """Remove what was made of a run that did not come to its first row."""
        if self._was_there or has_trajectory(self.run_dir):
            return
        shutil.rmtree(self.run_dir, ignore_errors=True)
        with suppress(OSError):  # the folders above it, if nothing else is in them
            self.run_dir.parent.rmdir()
            self.run_dir.parent.parent.rmdir()

    def _again(self) -> str:
        """The command that goes on with this run; empty if there is nothing to go on from."""
        return ""


class Interrupted(Exception):
    """A run that Ctrl-C or SIGTERM ended; its directory is whole.

    Args:
        run_dir: The directory.
        again: The command that goes on with it.
    """

    def __init__(self, run_dir: Path, again: str = "") -> None:
        self.run_dir, self.again = run_dir, again


def _with_flags(args: Sequence[str]) -> list[str]:
    """The arguments, where an option that can stand alone has its value; a parser of types wants one."""
    following = [*args[1:], ""]
    return [
        f"{arg}=true" if arg in _FLAGS and after.lower() not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def options(args: list[str]) -> dict[str, Any]:
    """What all commands have in common."""
    return {
        "save_config_callback": None,
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
        "args": with_preset(CommandLine(_with_flags(args), COMMANDS)),
    }


def parser_kwargs(cli: type[RunCLI]) -> dict[str, Any]:
    """Of the parser of a command line, and of those of its subcommands."""
    common = {"parser_mode": "omegaconf+", "exit_on_error": False}
    each = {
        name: {**common, "default_config_files": [str(defaults_path(folder_of(name)))]} for name in cli.subcommands()
    }
    return {**common, "prog": "svf-lightning", "description": "The commands that run a model.", **each}


def _root_of(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
