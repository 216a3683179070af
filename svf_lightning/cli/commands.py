"""The commands that run a model, by their command lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svf_lightning.arguments import CommandLine
from svf_lightning.cli.help import ParsedOnly, asks_for_help, show_help, that_stops, without_help
from svf_lightning.cli.messages import quiet_the_libraries
from svf_lightning.cli.presets import COMMANDS
from svf_lightning.cli.replaying import ReplayCLI
from svf_lightning.cli.run import RunCLI, options, parser_kwargs
from svf_lightning.cli.training import ToyCLI
from svf_lightning.toy import ToyAttentionModel, ToyData


def run_command(args: list[str]) -> RunCLI:
    """Run ``fit``, ``validate``, ``test`` or ``replay``; with ``--help``, show the settings and exit.

    Raises:
        SystemExit: Help was asked for.
        InputError: The arguments cannot be used.
        Interrupted: Ctrl-C or SIGTERM ended the run.
        DivergedError: Every instance diverged.
        CheckpointError: No checkpoint could be replayed.
    """
    if asks_for_help(args):
        show_help(parsed(without_help(args)))
        raise SystemExit(0)
    return _made(without_help(args), lambda cli: cli)


def parsed(args: list[str]) -> RunCLI:
    """A command line with its settings, of which nothing is run.

    Raises:
        InputError: The arguments cannot be used.
    """
    try:
        return _made(args, that_stops)
    except ParsedOnly as stop:
        return stop.cli


def _made(args: list[str], of: Callable[[type[RunCLI]], type[RunCLI]]) -> RunCLI:
    if CommandLine(args, COMMANDS).command == "replay":
        from svf_lightning.replay import CheckpointReplay, ReplayData
        from svf_lightning.replay.trainer import ReplayTrainer

        return of(ReplayCLI)(
            CheckpointReplay,
            ReplayData,
            trainer_class=ReplayTrainer,
            parser_kwargs=parser_kwargs(ReplayCLI),
            **options(args),
        )
    return of(ToyCLI)(ToyAttentionModel, ToyData, parser_kwargs=parser_kwargs(ToyCLI), **options(args))


def fit(args: Sequence[str]) -> None:
    """Run ``fit`` inside a Python program.

    Raises:
        InputError: The arguments cannot be used.
        DivergedError: Every instance diverged.
    """
    quiet_the_libraries()
    run_command(["fit", *args])
