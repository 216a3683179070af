"""The real command line, in a folder of its own."""

import os
import signal
import subprocess
import sys
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
