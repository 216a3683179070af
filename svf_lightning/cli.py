"""The commands that run a model, with LightningCLI: ``fit``, ``validate``, ``test``, ``replay``."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from svf_lightning.claims import Claim
from svf_lightning.errors import InputError, bad_value, closest
from svf_lightning.run_dir import CONFIG, check_free, is_replay, new_run_dir, owner_of, write_text
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.toy.model import check_state_fits
from svf_lightning.trajectory import FILE_NAME
from svf_lightning.wandb_logger import RunLogger, say

DEFAULT_PRESET = "single_pair"
_DEFAULT_REPLAY = "tiny_suite"
_COMMANDS = ("fit", "validate", "test", "replay")
_RUN_DIR = "SVF_LIGHTNING_RUN_DIR"
_DEFAULTS = "defaults"
_RUNS = Path("runs")


@dataclass
class Experiment:
    """What a run is about.

    Args:
        name: Name of the experiment: runs/<name>/, and the W&B group.
        figures: Figures of the paper that it mirrors.
        tags: W&B tags.
        claims: What the paper says, computed at the end of the run.
    """

    name: str = "toy"
    figures: str = ""
    tags: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


@dataclass
class CaptureOptions:
    """When the metrics look. The first step and the last one are always captured.

    Args:
        every_n_steps: Capture every n-th training step.
        log_spaced: Capture about this many steps per factor of ten instead (0: off).
        chunk: Rows that are measured and written together.
    """

    every_n_steps: int = 1
    log_spaced: int = 0
    chunk: int = 128


class RunCLI(LightningCLI):
    """LightningCLI with run directories, presets and one-line errors; what `fit` and `replay` share."""

    run_dir: Path
    config_text: str
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # the closing table says it all
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in this program's words what cannot be parsed.

        Raises:
            InputError: An unknown option or key, a value of the wrong type, an unknown command.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            parsers = self._subcommand_parsers
            command = next((name for name in parsers if name in args or parsers[name] is parser), None)
            known = list(parsers[command].get_defaults(skip_validation=True).keys()) if command else []
            raise InputError(_explain(" ".join(str(error).split()), command, known, _config_files(args))) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user wrote it; Lightning would override it by the checkpoint's settings."""

    def before_instantiate_classes(self) -> None:
        """Choose the run directory, and tell it to everything that writes."""
        config = self.config[self.subcommand]
        self.config_text = self.resolved()
        self.run_dir = self._choose_run_dir(config)
        experiment = config.experiment
        where = str(self.run_dir)
        config.trainer.default_root_dir = where
        logger = config.trainer.get("logger")
        for entry in logger if isinstance(logger, list) else [logger]:
            if isinstance(entry, Namespace) and entry.class_path.endswith(".RunLogger"):
                given = entry.init_args
                given.save_dir = where
                given.run_id = given.run_id or self.run_dir.name
                given.name = given.name or self.run_dir.name
                given.group = given.group or experiment.name
                given.job_type = given.job_type or self.subcommand
                given.tags = given.tags or experiment.tags
        for entry in config.trainer.get("callbacks") or []:
            if entry.class_path.endswith(".Capture"):
                entry.init_args.update(config.capture)
            if entry.class_path.endswith(".RunSummary"):
                entry.init_args.experiment = entry.init_args.experiment or experiment.name
                if self.subcommand in ("fit", "replay") and not entry.init_args.claims:
                    entry.init_args.claims = experiment.claims
            if entry.class_path.endswith(".ModelCheckpoint") and entry.init_args.dirpath is None:
                entry.init_args.dirpath = str(self.run_dir / "checkpoints")

    def resolved(self) -> str:
        """The settings that were parsed, as YAML that repeats the run; where it goes is not a setting."""
        config = self.config[self.subcommand]
        settings = Namespace(  # type: ignore[no-untyped-call]
            {k: v for k, v in config.items(branches=True) if k not in ("config", "ckpt_path", "run_dir", "report")}
        )
        text: str = self._parser(self.subcommand).dump(settings, skip_unset=False, skip_validation=True)
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
            saved = _load_checkpoint(self.checkpoint)
            check_state_fits(self.model, saved["state_dict"])
            if self.subcommand == "fit" and 0 <= self.trainer.max_steps <= saved["global_step"]:
                raise bad_value(
                    "trainer.max_steps", self.trainer.max_steps,
                    f"more than {saved['global_step']}, the step of {self.checkpoint}",
                    "raise --trainer.max_steps to train on",
                )  # fmt: skip
            if self.resumed is not None and not self.goes_on and (self.resumed / FILE_NAME).is_dir():
                shutil.copytree(self.resumed / FILE_NAME, self.run_dir / FILE_NAME)  # a branch keeps its history
        super()._begin_run()

    before_fit = before_validate = before_test = _begin_run


class FitSettings(ToyCLI):
    """What `fit` makes of a command line, without doing it; the parser is built once."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's, about arguments from within a program
            super().__init__(ToyAttentionModel, ToyData, **_options(["fit"]), parser_kwargs=_parser_kwargs(ToyCLI))

    def of(self, args: Sequence[str]) -> str:
        """The resolved settings of ``fit ARGS``, YAML.

        Raises:
            InputError: The arguments cannot be used.
        """
        command, *rest = _with_preset(["fit", *args])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.parse_arguments(self._parser(command), rest)  # the same as the whole parser, in half the time
        self.config = Namespace(subcommand=command, **{command: self.config})  # type: ignore[no-untyped-call]
        return self.resolved()

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None:
        """Nothing: only the settings are of interest."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


class ReplayCLI(RunCLI):
    """The command that replays checkpoints of real models."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand, with the trainer arguments that do not come from the command line."""
        return {"replay": {"model", "datamodule"}}

    def _choose_run_dir(self, config: Namespace) -> Path:
        inherited = os.environ.get(_RUN_DIR)  # the processes of further devices run this same command line again
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
    if next((a for a in args if a in _COMMANDS), None) == "replay":
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
        "args": _with_preset(args),
    }


def _parser_kwargs(cli: type[ToyCLI | ReplayCLI]) -> dict[str, Any]:
    common = {"parser_mode": "omegaconf+", "exit_on_error": False}
    folder = "" if cli is ToyCLI else "replay"
    each = {**common, "default_config_files": [str(preset_path(_DEFAULTS, folder))]}
    return {**common, "description": __doc__, **{name: dict(each) for name in cli.subcommands()}}


def preset_path(name: str, folder: str = "") -> Path:
    """File of a preset that travels with the package; those of `replay` lie in the folder of that name."""
    return Path(str(resources.files("svf_lightning.configs"))) / folder / f"{name}.yaml"


def presets(folder: str = "") -> list[str]:
    """Names of the presets that travel with the package."""
    return sorted(path.stem for path in preset_path(_DEFAULTS, folder).parent.glob("*.yaml") if path.stem != _DEFAULTS)


def _with_preset(args: list[str]) -> list[str]:
    """The arguments with a configuration: the one given, else that of the checkpoint's run, else the default preset."""
    subcommand = next((i for i, a in enumerate(args) if a in _COMMANDS), None)
    if subcommand is None:
        return args
    folder = "replay" if args[subcommand] == "replay" else ""
    found = list(args)
    has_config = False
    for i, arg in enumerate(args):
        for flag in ("--config", "-c"):
            if arg == flag and i + 1 < len(args):
                found[i + 1] = _config_file(args[i + 1], folder)
                has_config = True
            elif arg.startswith(f"{flag}="):
                found[i] = f"{flag}={_config_file(arg.split('=', 1)[1], folder)}"
                has_config = True
    if has_config:
        return found
    if folder:
        given = _option(args, "--run_dir")
        run_dir = Path(given) if given and is_replay(Path(given)) else None
    else:
        checkpoint = _option(args, "--ckpt_path")
        run_dir = owner_of(Path(checkpoint)) if checkpoint else None
    config = run_dir / CONFIG if run_dir else preset_path(_DEFAULT_REPLAY if folder else DEFAULT_PRESET, folder)
    return [*found[: subcommand + 1], "--config", str(config), *found[subcommand + 1 :]]


def _config_files(args: Sequence[str]) -> list[str]:
    """The configuration files that a command line names."""
    flags = ("--config", "-c")
    return [_value(list(args), i) for i, arg in enumerate(args) if arg.split("=", 1)[0] in flags]


def _option(args: list[str], name: str) -> str | None:
    """Value of an option on a command line, or None."""
    return next((_value(args, i) for i, a in enumerate(args) if a.split("=")[0] == name), None)


def _value(args: list[str], i: int) -> str:
    return args[i].split("=", 1)[1] if "=" in args[i] else (args[i + 1] if i + 1 < len(args) else "")


def _config_file(given: str, folder: str) -> str:
    """A file as it is; else the preset of that name, so that presets work from any folder."""
    path = Path(given)
    if path.is_file():
        return given
    known = presets(folder)
    if path.stem in known and path.parts[:-1] in ((), ("configs",), ("configs", folder), (folder,)):
        return str(preset_path(path.stem, folder))
    raise InputError(
        f"--config {given}: there is no such file. {_suggest(path.stem, known)}"
        f"Allowed: a YAML file, or one of the presets {', '.join(known)}. Fix: check the path."
    )


def _find_checkpoint(given: str | None, subcommand: str) -> Path | None:
    if given is None:
        if subcommand == "fit":
            return None
        raise InputError(
            f"{subcommand} needs a checkpoint to look at. Allowed: a .ckpt file that fit wrote. "
            "Fix: add --ckpt_path RUN_DIR/checkpoints/last.ckpt."
        )
    if not Path(given).is_file():
        raise InputError(
            f"--ckpt_path {given}: there is no such file. Allowed: a .ckpt file that fit wrote "
            "(RUN_DIR/checkpoints/last.ckpt). Fix: check the path."
        )
    return Path(given)


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(saved["state_dict"], dict)
        assert isinstance(saved["global_step"], int)
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--ckpt_path {path} cannot be read ({reason}). Allowed: a .ckpt file that fit wrote. "
            "Fix: the file is damaged or not a checkpoint of this program; take another one from its folder."
        ) from error
    return saved


def quiet_the_libraries() -> None:
    """Keep lines off the terminal that tell a user of this program nothing."""
    import logging

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*LightningCLI's args parameter is intended to run from within Python.*",  # the preset joins the arguments
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Total length of `.*` across ranks is zero.*",  # no validation inside fit; nothing left to replay
    ):
        warnings.filterwarnings("ignore", message=message)


def _explain(message: str, command: str | None, known: list[str], files: list[str]) -> str:
    """The parser's message as: what was wrong, what is allowed, what to do."""
    if command is None:
        commands = ", ".join((*_COMMANDS, "sweep", "report", "publish", "workspace"))
        return f"no such command ({message}). Allowed: {commands}. Fix: try `python -m svf_lightning fit`."
    see = f"`python -m svf_lightning {command} --help` lists them"
    if found := re.match(r"unrecognized arguments: --(\S+)", message):
        name = found[1].split("=")[0]
        return f"unknown option --{name}. {_suggest(name, known)}Allowed: the options of {command}; {see}."
    if found := re.search(r"does not accept option '([^']+)'", message):
        where = " or ".join(files)
        return (
            f"unknown key {found[1]} in {where}. {_suggest(found[1], known)}Allowed: the options of {command}; {see}."
        )
    if found := re.match(r'Parser key "([^"]+)": (.*)', message):
        name, reason = found[1], found[2].rstrip(".")
        return f"{name} is not usable: {reason}. Fix: change --{name}; `{command} --help` describes it."
    return f"{message.rstrip('.')} (in {' or '.join(files)}). Fix: correct it; {see}."


def _suggest(name: str, known: list[str]) -> str:
    suggestion = closest(name, known)
    return f"{suggestion[0].upper()}{suggestion[1:]} " if suggestion else ""
