"""The commands that run a model, by their command lines."""

from __future__ import annotations

from collections.abc import Sequence

from svf_lightning.arguments import CommandLine
from svf_lightning.cli.messages import quiet_the_libraries
from svf_lightning.cli.presets import COMMANDS
from svf_lightning.cli.replaying import ReplayCLI
from svf_lightning.cli.run import RunCLI, options, parser_kwargs
from svf_lightning.cli.training import ToyCLI
from svf_lightning.toy import ToyAttentionModel, ToyData


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
            parser_kwargs=parser_kwargs(ReplayCLI),
            **options(args),
        )
    return ToyCLI(ToyAttentionModel, ToyData, parser_kwargs=parser_kwargs(ToyCLI), **options(args))


def fit(args: Sequence[str]) -> None:
    """Run ``fit`` inside a Python program.

    Raises:
        InputError: The arguments cannot be used.
        DivergedError: Every instance diverged.
    """
    quiet_the_libraries()
    run_command(["fit", *args])
