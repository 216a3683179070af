"""The command line: ``python -m svf_lightning COMMAND``; without one that is known, a line says which there are."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from svf_lightning import __version__
from svf_lightning.cli import Interrupted, RunCLI, quiet_the_libraries, run_command
from svf_lightning.errors import CheckpointError, DivergedError, InputError
from svf_lightning.trajectory import has_trajectory
from svf_lightning.wandb_logger import say

_HELP = """usage: python -m svf_lightning COMMAND [options]

  fit        train the toy model; with no option, the preset single_pair
  validate   measure a checkpoint of the toy model on held-out draws
  test       the same on other held-out draws
  replay     measure the training checkpoints of a language model; with no option, of a small suite that it trains
  sweep      run every trial of a W&B sweep file, without the W&B cloud
  report     one HTML page for a run directory or a sweep's directory, at any time
  publish    the W&B run of a run directory: of a run that was offline, interrupted, or not logged
  workspace  a saved view of a W&B project with the panels to look at first

COMMAND --help lists the options of a command; --config NAME chooses a preset or a YAML file.
"""
_FUNCTIONS = {  # commands that are plain functions, imported when they are called
    "sweep": "svf_lightning.sweep.command",
    "report": "svf_lightning.report.command",
    "publish": "svf_lightning.publish",
    "workspace": "svf_lightning.workspace",
}
_BAD_INPUT = 2
_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0, 1 if the run failed, 2 for input that cannot be used, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        print(f"svf-lightning {__version__}")  # noqa: T201
        return 0
    if given in (["--help"], ["-h"]):
        print(_HELP)  # noqa: T201
        return 0
    quiet_the_libraries()
    place: Path | str | None
    code: int
    try:
        if given and given[0] in _FUNCTIONS:
            command = getattr(import_module(_FUNCTIONS[given[0]]), f"{given[0]}_command")
            place, code = command(given[1:])
        else:
            cli = run_command(given)
            place, code = cli.run_dir, cli.exit_code
            _write_report(cli)
    except (InputError, ArgumentError, MisconfigurationException) as error:
        if os.environ.get("SVF_DEBUG") == "1":
            raise
        print(f"svf-lightning: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        return _BAD_INPUT
    except (DivergedError, CheckpointError) as error:
        print(f"svf-lightning: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except Interrupted as stop:
        print(stop.run_dir)  # noqa: T201
        return _INTERRUPTED
    except KeyboardInterrupt:  # a sweep has said where it stands
        return _INTERRUPTED
    except SystemExit as stop:  # --help, --print_config
        return int(stop.code or 0)
    if place is not None:
        print(place)  # noqa: T201
    return code


def _write_report(cli: RunCLI) -> None:
    """The page of a run that has ended. Whatever goes wrong with it, the run itself is whole."""
    config = cli.config[cli.subcommand]
    if cli.subcommand not in ("fit", "replay") or not config.report or not cli.trainer.is_global_zero:
        return
    if not has_trajectory(cli.run_dir):
        return
    try:
        from svf_lightning.report.run_page import write_run_page

        write_run_page(cli.run_dir)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"report.html was not written ({reason}); to try again: python -m svf_lightning report {cli.run_dir}")


def _one_line(error: Exception) -> str:
    """What was wrong, on one line."""
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
