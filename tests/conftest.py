"""Fixtures that tests of several folders use."""

from types import SimpleNamespace

import jaxtyping
import pytest
from helpers.command_line import Command, ForkedCommand


@pytest.fixture(autouse=True)
def _no_cloud(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _shapes(request):
    """Annotations of arrays are checked, but where a test hands over what they forbid."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("wrong_shapes") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """Checkpoints of a language model, trained for eight steps."""
    from helpers.replays import SETTINGS

    from svf_lightning.replay.suite import train_suite

    return train_suite(tmp_path_factory.mktemp("suite") / "tiny", SETTINGS)


@pytest.fixture
def command(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    return Command(folder)


@pytest.fixture
def forked(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    return ForkedCommand(folder)


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
