"""What a source of checkpoints is, and which of its steps are chosen."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import make_model, make_tokenizer, one_line, only_ref, save
from jsonargparse import ArgumentParser

from svf_lightning.errors import InputError
from svf_lightning.replay import CheckpointSource, FolderCheckpoints, ModelCheckpoints
from svf_lightning.replay.source import PYTHIA_STEPS, select_steps

# ---- which steps


@pytest.mark.parametrize(
    ("steps", "selection", "expected"),
    [
        ([4, 0, 2], "all", [0, 2, 4]),
        ([4, 0, 2, 4], "last", [4]),
        (range(11), "every_3rd", [0, 3, 6, 9, 10]),
        (range(11), "every_5th", [0, 5, 10]),
        (range(5), "every_1st", [0, 1, 2, 3, 4]),
        (range(5), "every_100th", [0, 4]),
        (range(11), "spread_3", [0, 5, 10]),
        (range(11), "spread_2", [0, 10]),
        (range(5), "spread_4", [0, 1, 3, 4]),
        (range(5), "spread_99", [0, 1, 2, 3, 4]),
        ([7], "spread_2", [7]),
        (range(101), "log", [0, 1, 2, 4, 8, 16, 32, 64, 100]),
        (range(0, 1001, 100), "log", [0, 100, 200, 400, 800, 1000]),
        ([0, 7, 1000], "log", [0, 7, 1000]),
        ([0], "log", [0]),
        ([5], "log", [5]),
        (range(0, 1001, 100), [300, 0, 300], [0, 300]),
        (
            PYTHIA_STEPS,
            "log",
            [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000, 143000],
        ),
    ],
)  # fmt: skip
def test_a_selection_of_steps(steps, selection, expected):
    assert select_steps(list(steps), selection) == expected


def test_the_schedule_of_pythia():
    assert len(PYTHIA_STEPS) == len(set(PYTHIA_STEPS)) == 154
    assert list(PYTHIA_STEPS) == sorted(PYTHIA_STEPS)
    assert PYTHIA_STEPS[:3] + PYTHIA_STEPS[10:13] + PYTHIA_STEPS[-1:] == (0, 1, 2, 512, 1000, 2000, 143000)


def test_130_checkpoints_of_pythia_are_spread_over_all_of_them():
    chosen = select_steps(list(PYTHIA_STEPS), "spread_130")
    assert len(set(chosen)) == 130
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, 143_000)
    at = [PYTHIA_STEPS.index(step) for step in chosen]
    assert {after - before for before, after in pairwise(at)} == {1, 2}  # no two in a row are left out


@pytest.mark.parametrize(
    "selection",
    [
        "some",
        "every_0th",
        "every_th",
        "every_-2th",
        "spread_1",
        "spread_0",
        "spread_",
        "spread_-3",
        "",
        [],
        [1.5],
        ["a"],
        [True],
        None,
    ],
)
def test_a_selection_that_is_none_is_refused(selection):
    with pytest.raises(InputError, match=r'Allowed: "all", "log"') as error:
        select_steps([0, 1, 2], selection)
    one_line(error)


def test_a_step_that_is_not_there_is_refused_with_its_neighbours():
    with pytest.raises(InputError, match=r"=513 .*: 256, 512, 1000, 2000\. "):
        select_steps(PYTHIA_STEPS, [512, 513])
    with pytest.raises(InputError, match=r"near it: 142000, 143000\. "):
        select_steps(PYTHIA_STEPS, [150_000])
    with pytest.raises(InputError, match="at least one"):
        select_steps([], "all")


# ---- what every source does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_comes_frozen_in_eval_mode_and_in_the_asked_dtype(tmp_path, dtype):
    save(tmp_path / "step5", "llama")
    sources = [
        FolderCheckpoints(str(tmp_path)),
        ModelCheckpoints({5: make_model("llama").train()}, make_tokenizer()),
    ]
    hashes = set()
    for source in sources:
        loaded = source.load(only_ref(source), dtype)
        assert not loaded.model.training
        assert {(p.dtype, p.requires_grad, p.device.type) for p in loaded.model.parameters()} == {(dtype, False, "cpu")}
        assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (loaded.ref.step, loaded.revision) == (5, "")
        hashes.add(loaded.weight_hash)
    assert len(hashes) == 1
    assert sources[0].load(only_ref(sources[0]), torch.float64).weight_hash not in hashes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FolderCheckpoints", {"folder": "FOLDER", "steps": "every_10th"}),
        ("FolderCheckpoints", {"folder": "FOLDER", "steps": [0, 4]}),
        ("HubCheckpoints", {"repo": "EleutherAI/pythia-160m"}),
        ("HubCheckpoints", {"repo": "gpt2", "revisions": None, "step": 5, "keep": True, "retries": 0}),
        ("HubCheckpoints", {"repo": "EleutherAI/pythia-160m", "revisions": [0, 512], "cache_dir": "FOLDER"}),
        ("HubCheckpoints", {"repo": "EleutherAI/pythia-160m", "revisions": ["step0", "step512"]}),
        ("GGUFCheckpoint", {"file": "FOLDER/a.gguf", "step": 3}),
    ],
)
def test_a_source_is_made_from_yaml(tmp_path, name, arguments):
    (tmp_path / "a.gguf").write_bytes(b"")
    arguments = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for k, v in arguments.items()}
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_argument("--source", type=CheckpointSource)
    config = parser.parse_object({"source": {"class_path": f"svf_lightning.replay.{name}", "init_args": arguments}})
    source = parser.instantiate(config).source
    assert type(source).__name__ == name
    for key, value in arguments.items():
        got = getattr(source, key)
        assert (str(got) if isinstance(got, Path) else got) == value


def test_importing_the_module_brings_no_heavy_library():
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", sys.argv[1])
sys.modules["alone"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["alone"])
print([name for name in ("transformers", "huggingface_hub", "gguf") if name in sys.modules])
"""
    file = sys.modules[CheckpointSource.__module__].__file__
    result = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
