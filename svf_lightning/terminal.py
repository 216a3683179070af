"""Lines and tables for the person at the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 160  # columns of output that goes to a file


def say(line: str) -> None:
    """One line on standard error; standard output is left to results."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def console() -> Console:
    """Standard output for tables: as wide as the terminal; a file has room."""
    from rich.console import Console

    terminal = Console()
    if not terminal.is_terminal:
        terminal.width = max(terminal.width, _FILE_WIDTH)
    return terminal
