"""The entrance, ``svf-lightning``: from its first line on, Ctrl-C ends the program without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from svf_lightning.stop import STOP
from svf_lightning.usage import answer


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; see :func:`svf_lightning.program.main`."""
    with STOP:
        if (text := answer(sys.argv[1:] if args is None else args)) is not None:
            print(text)  # noqa: T201
            return 0
        from svf_lightning.program import main as run  # imports take seconds, in which a user may change their mind

        return run(args)


if __name__ == "__main__":
    sys.exit(main())
