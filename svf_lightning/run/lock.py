"""One writer per directory: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from svf_lightning.errors import InputError
from svf_lightning.terminal import say

_LOCK = ".lock"
_HOLDER = ".lock.holder"  # who holds it, for the message; it says nothing once the lock is free


class DirectoryLock:
    """Keeps other processes from writing into a directory.

    The operating system's lock on a file (flock) ends with its process, so none is ever stale. On a file system that is
    shared between hosts it holds where the file system passes locks on (NFS 4, Lustre and GPFS as they are usually
    mounted, CephFS); where it has none, a line says that nothing keeps a second writer out.

    Args:
        directory: What to lock; it is made if it is not there.
        what: What it is, for the message: "run", "sweep".
    """

    def __init__(self, directory: Path, what: str = "run") -> None:
        self.directory, self._what = directory, what
        self._lock = FileLock(directory / _LOCK)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            InputError: Another process has it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            holder = self.directory / _HOLDER
            who = holder.read_text(encoding="utf-8", errors="replace").strip() if holder.is_file() else ""
            raise InputError(
                f"the {self._what} in {self.directory} is being written by another process"
                f"{f' ({who})' if who else ''}. Allowed: one at a time. "
                "Fix: wait for its end, stop it, or choose another directory."
            ) from error
        except NotImplementedError:
            say(f"svf-lightning: {self.directory} is on a file system without locks: nothing keeps a second writer out")
            return
        with suppress(OSError):  # a full disk: the lock holds without it
            (self.directory / _HOLDER).write_text(
                f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8"
            )

    def release(self) -> None:
        """Give it back; does nothing if it is not held."""
        if self._lock.is_locked:
            (self.directory / _HOLDER).unlink(missing_ok=True)
            self._lock.release()
