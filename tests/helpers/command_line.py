"""The real command line, in a folder of its own."""

import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from contextlib import suppress
from pathlib import Path


class Command:
    """The real command, in an empty folder, without a source tree in sight."""

    def __init__(self, folder: Path):
        self.folder = folder
        # without this process's W&B service, which its children would share
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "_WANDB", "SVF_"))}
        self.environment |= {"WANDB_MODE": "offline", "COLUMNS": "100", "HOME": str(folder.parent)}
        self.environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin starve each other where CI is busy

    def __call__(self, *arguments, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-m", "svf_lightning", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "svf_lightning", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell starts background jobs with Ctrl-C ignored, and a child would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def files(self):
        """Everything in the folder, relative."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


def run_dir_of(result, command):
    """The run directory, which a command prints as its last line."""
    assert result.returncode == 0, result.stderr
    return command.folder / result.stdout.strip().splitlines()[-1]


class ForkedCommand(Command):
    """The same command in a fork of this process, which has imported everything: no start-up, for faults by the hundred.

    What is not the same: Python and the imports have happened already.
    """

    def __call__(self, *arguments, timeout=300, **environment):
        process = self.start(*arguments, **environment)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(arguments, code, process.output("out"), process.output("err"))

    def start(self, *arguments, before=None, **environment):
        """Begin; ``before`` is called in the child first, as to inject a fault."""
        from svf_lightning.__main__ import main  # here, so that the child has it

        logs = self.folder.parent / "logs"
        logs.mkdir(exist_ok=True)
        base = logs / uuid.uuid4().hex  # two that start together have a file each
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return ForkedProcess(pid, base)
        code = 70
        try:
            os.setsid()
            for fd, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{base}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(self.environment | environment)
            os.chdir(self.folder)
            warnings.simplefilter("ignore", ResourceWarning)  # as Python does where pytest is not
            if before is not None:
                before()
            code = main([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class ForkedProcess:
    """A running :class:`ForkedCommand`."""

    def __init__(self, pid, base):
        self.pid, self._base, self.returncode = pid, base, None

    def poll(self):
        """Exit code, or None while it runs; negative for a signal."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=300):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s: {self.output('err')[-2000:]}")
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """End it and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def output(self, name):
        """What it has written so far: "out" or "err"."""
        return Path(f"{self._base}.{name}").read_text(errors="replace")
