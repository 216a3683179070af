"""The commands: ``svf-lightning COMMAND``, or ``python -m svf_lightning COMMAND``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from svf_lightning.arguments import CommandLine, call
from svf_lightning.cli import Interrupted, RunCLI, run_command
from svf_lightning.cli.messages import no_such_command, quiet_the_libraries
from svf_lightning.cli.presets import COMMANDS as RUN_COMMANDS
from svf_lightning.commands.figures import figures
from svf_lightning.commands.presets import presets
from svf_lightning.commands.publish import publish
from svf_lightning.commands.report import report
from svf_lightning.commands.sweep import sweep
from svf_lightning.commands.workspace import workspace
from svf_lightning.errors import CheckpointError, DivergedError, InputError, TakenAwayError, one_line, out_of_resources
from svf_lightning.stop import INTERRUPTED, STOP
from svf_lightning.terminal import say
from svf_lightning.trajectory import has_trajectory
from svf_lightning.usage import answer

# Commands that are plain functions. Each returns what it made (the last line of the output), or that and an exit code.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "presets": presets,
    "sweep": sweep,
    "report": report,
    "figures": figures,
    "publish": publish,
    "workspace": workspace,
}
_BAD_INPUT = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0, 1 if the run failed, 2 for input that cannot be used, 130 after Ctrl-C.
    """
    STOP.starting = False  # everything is imported
    given = list(sys.argv[1:] if args is None else args)
    if (text := answer(given)) is not None:
        print(text)  # noqa: T201
        return 0
    quiet_the_libraries()
    try:
        made, code = _run(given)
    except (InputError, ArgumentError, MisconfigurationException) as error:
        if os.environ.get("SVF_DEBUG") == "1":
            raise
        say(f"svf-lightning: {one_line(error)}")
        return _BAD_INPUT
    except (DivergedError, CheckpointError, TakenAwayError) as error:
        say(f"svf-lightning: {error}")
        return 1
    except Interrupted as stop:
        if stop.again:
            say(f"to go on: {stop.again}")
        print(stop.run_dir)  # noqa: T201
        return INTERRUPTED
    except KeyboardInterrupt:  # a sweep has reported its state already
        return INTERRUPTED
    except (OSError, MemoryError) as error:
        line = out_of_resources(error)
        if line is None or os.environ.get("SVF_DEBUG") == "1":
            raise
        say(f"svf-lightning: {line}")
        return 1
    except SystemExit as stop:  # --help, --print_config
        return int(stop.code or 0)
    if made is not None:
        print(made)  # noqa: T201
    return code


def _run(given: list[str]) -> tuple[Path | str | None, int]:
    """Run a command; what it made, and the exit code."""
    if given and given[0] in FUNCTIONS:
        made = call(FUNCTIONS[given[0]], given[0], given[1:])
        return made if isinstance(made, tuple) else (made, 0)
    if CommandLine(given, RUN_COMMANDS).command is None:
        raise InputError(no_such_command(given[0], [*RUN_COMMANDS, *FUNCTIONS]))
    cli = run_command(given)
    _write_report(cli)
    return cli.run_dir, cli.exit_code


def _write_report(cli: RunCLI) -> None:
    """The page of a run that has ended. Whatever goes wrong with it, the run itself is whole."""
    config = cli.config[cli.subcommand]
    if cli.subcommand not in ("fit", "replay") or not config.report or not cli.trainer.is_global_zero:
        return
    if not has_trajectory(cli.run_dir):
        return
    try:
        page = report(str(cli.run_dir), open=config.open)
        say(f"page: {page}")
    except Exception as error:
        say(
            f"report.html was not written ({one_line(error)}); "
            f"to try again: python -m svf_lightning report {cli.run_dir}"
        )
