"""Checkpoints in folders: which there are, their weights and tokenizers, damage, and files that nobody should run."""

import json
import logging
import os
import pickle

import pytest
import torch
from helpers.checkpoints import (
    edit_config,
    logits,
    make_model,
    make_tokenizer,
    one_line,
    only_ref,
    save,
    save_bert,
    save_bin,
)
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.utils import logging as transformers_logging

from svf_lightning.errors import InputError
from svf_lightning.replay import CheckpointError, FolderCheckpoints
from svf_lightning.replay.model_files import weight_hash
from svf_lightning.replay.source import CheckpointRef

# ---- which checkpoints there are


def test_subfolders_are_checkpoints_by_ascending_step(tmp_path):
    for name in ("checkpoint-200", "checkpoint-3", "checkpoint-1000", "logs", "checkpoint-best", "step"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-7").write_text("a file")
    source = FolderCheckpoints(str(tmp_path / "run"))
    assert [(r.step, r.name) for r in source.refs()] == [
        (3, "checkpoint-3"),
        (200, "checkpoint-200"),
        (1000, "checkpoint-1000"),
    ]
    assert source.identity() == {"kind": "folder", "name": "run"}
    assert [r.step for r in FolderCheckpoints(str(tmp_path / "run"), "last").refs()] == [1000]
    assert [r.step for r in FolderCheckpoints(str(tmp_path / "run"), [1000, 3]).refs()] == [3, 1000]
    with pytest.raises(InputError, match=r"^steps=5 .*near it: 3, 200, 1000"):
        FolderCheckpoints(str(tmp_path / "run"), [5]).refs()
    with pytest.raises(InputError, match=r"^steps="):
        FolderCheckpoints(str(tmp_path / "run"), "sometimes")


def test_each_step_has_its_own_weights(tmp_path):
    for step in (0, 2, 10):
        save(tmp_path / f"step{step}", seed=step)
    source = FolderCheckpoints(str(tmp_path))
    for ref in source.refs():
        source.fetch(ref)
        loaded = source.load(ref)
        source.release(ref)
        torch.testing.assert_close(logits(loaded.model), logits(make_model(seed=ref.step)), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("name", "step"), [("step512", 512), ("checkpoint-40", 40), ("gpt2-mine", 0)])
def test_a_model_folder_is_one_checkpoint(tmp_path, name, step, monkeypatch):
    save(tmp_path / name, "gpt2")
    if step == 0:
        (tmp_path / name / name).mkdir()
    source = FolderCheckpoints(str(tmp_path / name))
    assert source.refs() == [CheckpointRef(step, name)]
    assert source.load(only_ref(source)).weight_hash == weight_hash(make_model("gpt2"))
    assert source.tokenizer()("mary went").input_ids == [2, 5]
    monkeypatch.chdir(tmp_path / name)
    assert FolderCheckpoints(".").refs() == source.refs()


def test_checkpoints_in_a_model_folder_go_before_the_model_without_a_step(tmp_path):
    save(tmp_path, seed=9)  # as the trainer of transformers leaves it
    save(tmp_path / "checkpoint-6", seed=6)
    source = FolderCheckpoints(str(tmp_path))
    assert [r.step for r in source.refs()] == [6]
    assert source.load(only_ref(source)).weight_hash == weight_hash(make_model(seed=6))


def test_the_tokenizer_is_that_of_a_checkpoint_or_else_of_the_folder(tmp_path):
    save(tmp_path / "step1", tokenizer=False)
    with pytest.raises(InputError, match=r"has no tokenizer.*tokenizer\.json.*save_pretrained"):
        FolderCheckpoints(str(tmp_path)).tokenizer()
    make_tokenizer().save_pretrained(tmp_path)
    source = FolderCheckpoints(str(tmp_path))
    tokenizer = source.tokenizer()
    assert tokenizer.is_fast
    assert tokenizer("the store of john").input_ids == [7, 8, 0, 4]
    assert source.tokenizer() is tokenizer
    (tmp_path / "step1" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer of .*step1 cannot be read") as error:
        FolderCheckpoints(str(tmp_path)).tokenizer()
    one_line(error)


def test_a_folder_without_checkpoints_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        FolderCheckpoints(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        FolderCheckpoints(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"neither a config\.json nor folders named after a step"):
        FolderCheckpoints(str(tmp_path)).refs()
    (tmp_path / "step4").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match="two checkpoints of step 4: checkpoint-4 and step4"):
        FolderCheckpoints(str(tmp_path)).refs()


# ---- what is no language model


def save_classifier(folder):
    config = GPT2Config(vocab_size=48, n_embd=24, n_layer=1, n_head=4, n_positions=32)
    GPT2ForSequenceClassification(config).save_pretrained(folder)


def save_unknown(folder):
    save(folder)
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (folder / "own.py").write_text("raise SystemExit('code from outside was run')")


def save_seq2seq(folder):
    save(folder)
    edit_config(folder, model_type="marian", is_encoder_decoder=True)


def test_quantized_weights_are_refused(tmp_path):
    edit_config(save(tmp_path / "step1"), quantization_config={"quant_method": "gptq", "bits": 4})
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(InputError, match="step1 has quantized weights"):
        source.load(only_ref(source))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (save_bert, "bert"),
        (save_classifier, "GPT2ForSequenceClassification"),
        (save_unknown, "own"),
        (save_seq2seq, "marian"),
    ],
)
def test_what_is_not_a_causal_language_model_is_refused_at_once_and_when_loaded(tmp_path, make, reason):
    make(tmp_path / "step1")
    source = FolderCheckpoints(str(tmp_path))
    for attempt in (source.refs, lambda: source.load(CheckpointRef(1, "step1"))):
        with pytest.raises(InputError, match=f"step1 is not a causal language model .*{reason}") as error:
            attempt()
        one_line(error)


# ---- safety


def test_code_inside_a_checkpoint_is_never_run(tmp_path):
    folder = save(tmp_path / "step1")
    (folder / "own.py").write_text("raise SystemExit('code from outside was run')")
    edit_config(folder, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    edit = json.loads((folder / "tokenizer_config.json").read_text())
    edit["auto_map"] = {"AutoTokenizer": ["own.T", "own.T"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(edit))
    source = FolderCheckpoints(str(tmp_path))
    assert source.load(only_ref(source)).weight_hash == weight_hash(make_model())
    assert source.tokenizer()("mary").input_ids == [2]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_does_more_than_hold_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_bin(tmp_path / "step1")
    source = FolderCheckpoints(str(tmp_path))
    assert source.load(only_ref(source)).weight_hash == weight_hash(make_model())
    torch.save({**make_model().state_dict(), "bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"step1 cannot be loaded: .*more than tensors") as error:
        source.load(only_ref(source))
    assert "weights_only" not in one_line(error)  # no advice to unpickle everything
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(CheckpointError, match="step1 cannot be loaded"):
        source.load(only_ref(source))
    assert not (tmp_path / "exploded").exists()


# ---- damage


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    elif how == "garbage":
        weights.write_bytes(b"garbage" * 5000)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "absent":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "impossible config":
        edit_config(folder, num_attention_heads=5)
    elif how == "more layers":
        edit_config(folder, num_hidden_layers=3)
    elif how == "other shape":
        edit_config(folder, intermediate_size=40)
    elif how == "no tensor":
        tensors = load_file(weights)
        tensors.pop("gpt_neox.layers.1.attention.query_key_value.weight")
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "cannot be loaded .*incomplete metadata"),
        ("garbage", "cannot be loaded .*header"),
        ("empty", "cannot be loaded .*header"),
        ("absent", r"incomplete: it has no weights \(looked for model\.safetensors"),
        ("no config", r"incomplete: it has no config\.json"),
        ("broken config", r"config\.json is damaged"),
        ("impossible config", "cannot be loaded .*not divisible"),
        ("more layers", r"lacks weights .*: gpt_neox\.layers\.2\.\S+, \S+, \S+ and 9 more"),
        ("other shape", r"weights of other shapes .*mlp\.dense_4h_to_h\.weight.* and 3 more"),
        ("no tensor", r"lacks weights .*: gpt_neox\.layers\.1\.attention\.query_key_value\.weight\."),
    ],
)
def test_a_damaged_checkpoint_is_an_error_of_its_own_and_leaves_the_others_alone(tmp_path, how, reason):
    save(tmp_path / "run" / "step1", seed=1)
    damage(save(tmp_path / "run" / "step2", seed=2), how)
    source = FolderCheckpoints(str(tmp_path / "run"))
    first, second = source.refs()
    with pytest.raises(CheckpointError, match=f"^run/step2 .*{reason}") as error:
        source.load(second)
    assert str(tmp_path) not in one_line(error)
    assert source.load(first).weight_hash == weight_hash(make_model(seed=1))


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = save(tmp_path / "step1", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "away")
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"step1 is incomplete: it has no {shard.name}"):
        source.load(only_ref(source))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../away"}}')
    with pytest.raises(CheckpointError, match="names files outside"):
        source.load(only_ref(source))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        source.load(only_ref(source))


def test_weights_without_a_use_are_said(tmp_path):
    edit_config(save(tmp_path / "step1"), num_hidden_layers=1)
    source = FolderCheckpoints(str(tmp_path))
    with pytest.warns(UserWarning, match=r"step1 has weights .* no use for: gpt_neox\.layers\.1\."):
        source.load(only_ref(source))


def test_loading_prints_nothing_and_leaves_the_settings_of_transformers(tmp_path, capfd):
    save(tmp_path / "step1", "gpt2")
    save(tmp_path / "step2", "gpt2")
    edit_config(tmp_path / "step2", n_layer=3)
    source = FolderCheckpoints(str(tmp_path))
    said = []
    listener = logging.Handler()
    listener.emit = said.append
    transformers_logging.add_handler(listener)
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    try:
        source.tokenizer()
        source.load(source.refs()[0])
        with pytest.raises(CheckpointError):
            source.load(source.refs()[1])
        assert capfd.readouterr() == ("", "")
        assert said == []
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
        transformers_logging.remove_handler(listener)
