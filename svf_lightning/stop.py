"""Ctrl-C and its like: asked once, a training ends after its step; asked twice, a command ends at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class Stop:
    """What this process was asked by signals; there is one (:data:`STOP`), as signals belong to the process.

    Used as a context, it takes SIGINT, SIGTERM and SIGUSR1 (which SLURM sends before the time is up, if it is told to).
    The first one raises KeyboardInterrupt, or, where :attr:`gently` is set, only sets :attr:`asked`. The second one
    raises KeyboardInterrupt, the third one ends the process. While nothing heavy is imported yet, the first one ends
    the process at once: nothing has been written.

    Attributes:
        asked: True once a signal came.
        gently: True while somebody looks at :attr:`asked` at every step.
        starting: True while the program imports what it needs.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.gently = False
        self.starting = False
        self._n_asked = 0
        self._depth = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True once a signal came."""
        return self._n_asked > 0

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth == 1:
            self._n_asked, self.gently, self.starting = 0, False, True
            if threading.current_thread() is threading.main_thread():
                # a shell starts background jobs with Ctrl-C ignored; they keep it so
                kept = {number: signal.getsignal(number) for number in self.signals}
                self._before = {number: before for number, before in kept.items() if before != signal.SIG_IGN}
            self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, before in self._before.items():
                signal.signal(number, before)
            self._before, self.gently, self.starting = {}, False, False

    def hold(self) -> None:
        """Take the signals (again): Lightning puts handlers of its own in place when a run begins."""
        for number in self._before:
            signal.signal(number, self._take)

    def check(self) -> None:
        """Raise what a library may have swallowed.

        Raises:
            KeyboardInterrupt: A signal came.
        """
        if self.asked:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._n_asked += 1
        if self.starting or self._n_asked > 2:
            _line("stopped")
            os._exit(INTERRUPTED)
        if self.gently and self._n_asked == 1:
            _line("stopping after this step; once more to stop at once")
            return
        raise KeyboardInterrupt


def _line(text: str) -> None:
    """One line on standard error, from inside a signal handler: streams may be in the middle of something."""
    os.write(2, f"\nsvf-lightning: {text}\n".encode())


STOP = Stop()
