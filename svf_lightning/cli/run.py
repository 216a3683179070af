"""The commands that run a model: LightningCLI with run directories, presets and one-line errors."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
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
from svf_lightning.callbacks import TrajectoryWriter
from svf_lightning.callbacks.base import Driver, ProbeMetric, RowSink, quantities_of
from svf_lightning.cli.checkpoint_io import WholeCheckpointIO
from svf_lightning.cli.messages import explain, quiet_the_libraries
from svf_lightning.cli.naming import name_by_what_is_measured
from svf_lightning.cli.presets import COMMANDS, CONFIG_FLAGS, defaults_path, folder_of, with_preset
from svf_lightning.cli.trainer_options import AtTheStart, check_options, give_way, place_loggers
from svf_lightning.errors import InputError, bad_value, one_line, reason
from svf_lightning.files import is_file, write_text
from svf_lightning.run.checkpoint import has_training_state, read_checkpoint
from svf_lightning.run.directory import CHECKPOINTS, CONFIG, check_free, is_replay, new_run_dir, read_config
from svf_lightning.run.identity import check_same_metrics, metric_identity
from svf_lightning.run.ledger import Ledger
from svf_lightning.run.lineage import (
    SETTINGS,
    Parent,
    described,
    differences,
    find_checkpoint,
    newest_checkpoint,
    rewind,
)
from svf_lightning.run.lock import DirectoryLock
from svf_lightning.run.settings import CaptureOptions, Experiment, JoinsRun, Run
from svf_lightning.run.summary import read_summary
from svf_lightning.stop import STOP
from svf_lightning.terminal import say
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.toy.model import check_state_fits
from svf_lightning.trajectory import TRAJECTORY, has_trajectory
from svf_lightning.wandb_logger import RunLogger

_RUN_DIR = "SVF_LIGHTNING_RUN_DIR"
_RUNS = Path("runs")
_PARTS = ("experiment", "capture", "trainer", "model", "data")
# these say where a run begins and goes, and what is drawn of it
_NOT_SETTINGS = ("config", "ckpt_path", "weights_only", "run_dir", "overwrite", "report", "remeasure")


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
        settings = Namespace(  # type: ignore[no-untyped-call]
            {k: v for k, v in config.items(branches=True) if k not in _NOT_SETTINGS}
        )
        text: str = self.parser_of[str(self.subcommand)].dump(settings, skip_unset=False, skip_validation=True)
        return text

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
            name = new_run_dir(config.experiment.name, _RUNS)
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
        return new_run_dir(self.config[self.subcommand].experiment.name, _RUNS)

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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a replay has more."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--remeasure",
            type=str | None,
            default=None,
            help="Directory of a replay whose checkpoints are to be measured again, with its settings and those of "
            "this call; its own rows stay as they are.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and name the run by what it measures."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        files = CommandLine(args, COMMANDS).values(*CONFIG_FLAGS)
        parser_of_it = self.parser_of[self.config.subcommand]
        line = name_by_what_is_measured(
            config, args, files, lambda chosen: parser_of_it.parse_args([f"--config={file}" for file in chosen])
        )
        if line and "LOCAL_RANK" not in os.environ:
            say(line)

    def _choose_run_dir(self, config: Namespace) -> Path:
        inherited = os.environ.get(_RUN_DIR)  # processes of further devices run the same command line
        if inherited is not None and "LOCAL_RANK" in os.environ:
            return Path(inherited)
        run_dir = Path(config.run_dir) if config.run_dir else new_run_dir(config.experiment.name, _RUNS)
        if not is_replay(run_dir):
            check_free(run_dir)
            if config.remeasure:
                self.parent = Parent(config.remeasure)
        os.environ[_RUN_DIR] = str(run_dir)
        return run_dir

    def _begin_run(self) -> None:
        if not is_replay(self.run_dir):  # the settings of a run that goes on stay
            super()._begin_run()

    def before_replay(self) -> None:
        """Take the directory for this process, and check that a replay that goes on is the same one."""
        self.model.check(self.trainer, self.datamodule)
        if self.trainer.is_global_zero:
            self.lock.acquire()
        if not self.datamodule.missing(self.run_dir):
            say("every checkpoint is there already: nothing to replay")

    def after_replay(self) -> None:
        """Tell by the exit code whether every checkpoint is there; with ``strict``, and none is flagged."""
        flagged = Ledger(self.run_dir).flagged() if self.datamodule.strict else {}
        if flagged:
            steps = ", ".join(f"{step:,}" for step in flagged)
            say(f"svf-lightning: --data.strict=true, and these steps are flagged: {steps}")
        self.exit_code = 1 if flagged or self.datamodule.missing(self.run_dir) else 0


class Interrupted(Exception):
    """A run that Ctrl-C or SIGTERM ended; its directory is whole.

    Args:
        run_dir: The directory.
        again: The command that goes on with it.
    """

    def __init__(self, run_dir: Path, again: str = "") -> None:
        self.run_dir, self.again = run_dir, again


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


def _root_of(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _same(one: Path, other: Path) -> bool:
    """True for two names of one directory."""
    return os.path.realpath(one) == os.path.realpath(other)
