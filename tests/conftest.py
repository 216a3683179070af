"""Shared pieces: a small model, a short training, and the real command line in a folder of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from svf_lightning.toy import ToyAttentionModel, ToyData

SMALL = {"n_features": 11, "d_model": 7, "n_instances": 3}


@pytest.fixture(autouse=True)
def _no_cloud(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def make_trainer(folder, steps, callbacks=(), **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "callbacks": list(callbacks),
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**settings, **options})


def train(folder, steps=12, callbacks=(), model=None, data=None, trainer=None, **fit):
    """A short training; returns the model."""
    model = ToyAttentionModel(**{**SMALL, **(model or {})})
    data = ToyData(
        **{"n_features": model.n_features, "n_instances": model.n_instances, "batch_size": 16, "context_length": 5}
        | (data or {})
    )
    make_trainer(folder, steps, callbacks, **(trainer or {})).fit(model, data, **fit)
    return model


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """Checkpoints of a language model, trained for eight steps."""
    from replays import SIZES

    from svf_lightning.replay.suite import train_suite

    return train_suite(tmp_path_factory.mktemp("suite") / "tiny", **SIZES)


class Command:
    """The real command, in an empty folder, without a source tree in sight."""

    def __init__(self, folder: Path):
        self.folder = folder
        # without this process's W&B service, which its children would share
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "_WANDB", "SVF_"))}
        self.environment |= {"WANDB_MODE": "offline", "COLUMNS": "100", "HOME": str(folder.parent)}
        self.environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin starve each other where CI is busy

    def __call__(self, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "svf_lightning", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
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


@pytest.fixture
def command(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return Command(folder)


@pytest.fixture
def typed(command, monkeypatch, capsys):
    """The same in this process, for commands that end before a run begins: without the seconds that a start takes."""
    from svf_lightning.__main__ import main

    monkeypatch.delenv("SVF_LIGHTNING_RUN_DIR", raising=False)  # and so it is afterwards

    def run(*arguments, **environment):
        monkeypatch.chdir(command.folder)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def run_dir_of(result, command):
    """The run directory, which a command prints as its last line."""
    assert result.returncode == 0, result.stderr
    return command.folder / result.stdout.strip().splitlines()[-1]
