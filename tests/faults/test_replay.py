"""Faults in replays: prompts, dtypes, damaged and misplaced checkpoints, and a hub that fails."""

import json
import shutil
import time
import unicodedata
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.hub import Hub
from helpers.replays import STEPS, replay
from helpers.trainings import checkpoints_of, weights_of
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    NemotronConfig,
    OPTConfig,
    Qwen3Config,
)

from svf_lightning.errors import CheckpointError, InputError
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints, HubCheckpoints, ModelCheckpoints
from svf_lightning.replay.model_files import weight_hash
from svf_lightning.replay.prompts import read_prompts
from svf_lightning.replay.suite import suite_tokenizer
from svf_lightning.run.fingerprint import Weights, misplaced
from svf_lightning.run.ledger import Ledger, open_sound
from svf_lightning.trajectory import open_trajectory

TEXT = "When Mary and John went to the store, John gave a drink to"
GOOD = {"text": TEXT, "key": "Mary", "correct": "Mary", "wrong": "John"}


def is_line(error):
    return "\n" not in str(error) and 20 < len(str(error)) < 1000


# ---- prompts

_HALVES = ("\\ud800", "\\udbff", "\\udc00", "\\udfff x", "x\\ud83d\\ud83d")
_BAD_TEXTS = ("", " ", "\t", "a ", 5, None, [], {}, True)
_BAD_KEYS = (None, "", " ", "Bob", "John", 99, -99, 1.5, True, [], {}, "to the")


def prompt_files():
    """Contents of a file that cannot be used, by kind."""
    for field in ("text", "key", "correct", "wrong", "query"):
        for half in _HALVES:
            yield "half a character in a prompt", json.dumps({**GOOD, field: "HALF"}).replace("HALF", half).encode()
    for text in _BAD_TEXTS:
        yield "a prompt's text that is none", json.dumps({**GOOD, "text": text}).encode()
    for key in _BAD_KEYS:
        yield "a prompt's key that is none", json.dumps({**GOOD, "key": key}).encode()
        yield (
            "a prompt's key that is none",
            json.dumps({**GOOD, "query": 3, "key": key if key != "John" else 9}).encode(),
        )
    whole = json.dumps(GOOD).encode()
    for end in range(1, len(whole) - 1, 9):
        yield "a prompt file that is cut", whole[:end]
    for encoding in ("utf-16", "utf-32", "utf-16-le", "cp037"):
        yield "a prompt file in another encoding", json.dumps(GOOD).encode(encoding)
    yield (
        "a prompt file in another encoding",
        json.dumps({**GOOD, "text": "café " + TEXT}, ensure_ascii=False).encode("latin-1"),
    )
    rng = np.random.default_rng(0)
    for size in (1, 10, 1000, 100_000):
        yield "a prompt file of random bytes", rng.bytes(size)
    for content in (b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"3", b"null", b"[" * 50_000, b"{" * 50_000, b"x" * 10**6):
        yield "a prompt file with no prompt", content


def test_prompt_files_that_cannot_be_used(tmp_path, injected):
    tokenizer, path = suite_tokenizer(), tmp_path / "p.jsonl"
    for fault, content in prompt_files():
        path.write_bytes(content)
        message = ""
        try:
            read_prompts(path, tokenizer)
        except InputError as error:
            message = str(error)
        injected(fault, wrong=not is_line(message), message=message[:160], what=repr(content[:80]))


def test_prompt_files_that_are_written_otherwise_mean_the_same(tmp_path, injected):
    tokenizer, path = suite_tokenizer(), tmp_path / "p.jsonl"
    (expected,) = read(path, [GOOD], tokenizer)
    plain = json.dumps(GOOD).encode()
    for content in (
        b"\xef\xbb\xbf" + plain, plain + b"\r\n", b"\r\n\r\n" + plain + b"\r\n", b"\n  \n" + plain, plain + b"\r",
        json.dumps(GOOD, indent=None, separators=(",", ":")).encode(), json.dumps(GOOD | {"query": -1}).encode(),
        json.dumps(GOOD | {"correct": " Mary", "wrong": " John "}).encode(), json.dumps(GOOD | {"key": 1}).encode(),
    ):  # fmt: skip
        path.write_bytes(content)
        injected("another form of the same prompt file", wrong=read_prompts(path, tokenizer) != [expected])


def read(path, rows, tokenizer):
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_prompts(path, tokenizer)


def test_accents_in_either_form(tmp_path, injected):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["Zoë", "José", "Ñandú", "Ångström", "한국", "Việt"]
    for name in names:
        for text_form in ("NFC", "NFD"):
            for word_form in ("NFC", "NFD"):
                text = unicodedata.normalize(text_form, f"é {name} and John went to")
                words = {"<unk>": 0, **{word: i for i, word in enumerate(dict.fromkeys(text.split()), start=1)}}
                core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
                core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
                word = unicodedata.normalize(word_form, name)
                row = {"text": text, "key": word, "correct": word, "wrong": "John"}
                (prompt,) = read(tmp_path / "p.jsonl", [row], tokenizer)
                injected("accents written in another form", wrong=(prompt.key, prompt.text) != (1, text))


# ---- models whose scores are something else

V = len(suite_tokenizer())
_SIZES = {"vocab_size": V, "hidden_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
REFUSED = {
    "bloom": lambda: BloomConfig(vocab_size=V, hidden_size=40, n_layer=2, n_head=4),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=V, hidden_size=40, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        max_position_embeddings=64, window_size=5,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=V, hidden_size=40, num_hidden_layers=2, ffn_dim=44, num_attention_heads=4, word_embed_proj_dim=40,
        max_position_embeddings=64,
    ),
    "gptj": lambda: GPTJConfig(vocab_size=V, n_positions=64, n_embd=40, n_layer=2, n_head=4, rotary_dim=4),
    "qwen3": lambda: Qwen3Config(
        **_SIZES, num_hidden_layers=1, num_key_value_heads=2, intermediate_size=44, head_dim=10, **_IDS
    ),
    "short context": lambda: GPTNeoXConfig(
        **_SIZES | {"max_position_embeddings": 8}, num_hidden_layers=1, intermediate_size=44
    ),
    "small vocabulary": lambda: GPTNeoXConfig(**_SIZES | {"vocab_size": 40}, num_hidden_layers=1, intermediate_size=44),
    "no attention bias": lambda: GPTNeoXConfig(
        **_SIZES, num_hidden_layers=1, intermediate_size=44, attention_bias=False
    ),
}  # fmt: skip


def made(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokenizer(suite):
    return AutoTokenizer.from_pretrained(suite / "step0")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_models_whose_scores_are_something_else(tmp_path, tokenizer, injected, processing, dtype):
    for name, config in REFUSED.items():
        run_dir, message = tmp_path / name.replace(" ", "_"), ""
        try:
            replay(ModelCheckpoints({0: made(config())}, tokenizer), run_dir, model=CheckpointReplay(processing, dtype))
        except InputError as error:
            message = str(error)
        written = run_dir.exists() and any(run_dir.iterdir())
        injected(
            f"a model of another form, {dtype}", lost=written, wrong=not is_line(message), message=message, what=name
        )


def test_folding_that_does_nothing(tmp_path, tokenizer, injected):
    for seed in range(3):
        config = NemotronConfig(
            **_SIZES,
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=44,
            partial_rotary_factor=0.4,
            **_IDS,
        )
        with pytest.raises(InputError) as error:
            replay(ModelCheckpoints({0: made(config, seed)}, tokenizer), tmp_path / str(seed))
        injected(
            "a normalization that is not folded",
            wrong="processing=raw" not in str(error.value),
            message=str(error.value),
        )


def test_numbers_beyond_float16(tmp_path, tokenizer, injected):
    config = GPTNeoXConfig(**_SIZES, num_hidden_layers=3, intermediate_size=44)
    for layer in range(3):
        for part in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"):
            model = made(config, layer)
            with torch.no_grad():
                model.gpt_neox.layers[layer].get_submodule(part).weight.mul_(40_000)
                model.gpt_neox.layers[layer].get_submodule(part).weight.clamp_(-60_000, 60_000)
            run_dir = tmp_path / f"{layer}{part}"
            source = ModelCheckpoints({0: made(config, 9), 1: model, 2: made(config, 8)}, tokenizer)
            rows = replay(source, run_dir, model=CheckpointReplay(dtype="float16"))
            measured = rows["step"].values.tolist()
            failed = {e.step: e.error for e in Ledger(run_dir).entries() if e.status == "failed"}
            finite = all(bool(np.isfinite(rows[n]).all()) for n in ("prompt/score", "sad/score", "sad/accuracy"))
            right = failed.keys() == {1} and "overflow" in failed[1] if 1 not in measured else finite
            injected(
                "scores beyond float16", lost=not {0, 2} <= set(measured), wrong=not (right and finite),
                message=failed.get(1, ""), what=f"{layer} {part} {measured} {failed}",
            )  # fmt: skip


# ---- damaged checkpoints


def edit(folder, change):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)


def set_number(name, value):
    def change(folder):
        edit(folder, lambda model: model.get_parameter(name).reshape(-1).__setitem__(3, value))

    return change


def cut(name, keep):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return change


def reshape(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.intermediate_size += 8
    made(config).save_pretrained(folder)


def another_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    names = sorted(words)[50:]
    words |= dict(zip(names, [words[name] for name in [*names[1:], names[0]]], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))


def configured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


QKV = "gpt_neox.layers.0.attention.query_key_value.weight"
DAMAGED = {
    "weights that are cut": [cut("model.safetensors", keep) for keep in (0, 0.001, 0.1, 0.5, 0.999)],
    "weights with NaN or Inf": [
        set_number(name, value)
        for name in (QKV, "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.bias")
        for value in (torch.nan, torch.inf)
    ],
    "a checkpoint of another shape": [
        reshape,
        configured(num_hidden_layers=1),
        configured(num_hidden_layers=3),
        configured(vocab_size=50),
    ],
    "a checkpoint with another tokenizer": [another_tokenizer],
    "a configuration that is damaged": [cut("config.json", 0.5), cut("config.json", 0), configured(model_type="no")],
    "a checkpoint that lacks a file": [remove("config.json"), remove("model.safetensors")],
    "a checkpoint of another kind": [configured(model_type="bert", architectures=["BertForMaskedLM"])],
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_checkpoints_fail_by_themselves_and_are_repeated(suite, tmp_path, injected, fault):
    for number, damage in enumerate(DAMAGED[fault]):
        folder, run_dir = tmp_path / f"suite{number}", tmp_path / f"run{number}"
        shutil.copytree(suite, folder)
        damage(folder / "step4")
        rows = replay(FolderCheckpoints(str(folder)), run_dir)
        failed = {e.step: e.error for e in Ledger(run_dir).entries() if e.status == "failed"}
        others = rows["step"].values.tolist() == [0, 1, 2, 8]
        message = failed.get(4, "")
        shutil.rmtree(folder / "step4")
        shutil.copytree(suite / "step4", folder / "step4")
        loaded = []
        again = replay(Counting(str(folder), loaded), run_dir)
        injected(
            fault, lost=not others or loaded != [4], message=message,
            wrong=not (failed.keys() == {4} and is_line(message)) or again["step"].values.tolist() != STEPS,
            what=f"{number}: {failed} {loaded}",
        )  # fmt: skip


class Counting(FolderCheckpoints):
    def __init__(self, folder, loaded):
        super().__init__(folder)
        self.loaded = loaded

    def load(self, ref, dtype=torch.float32):
        self.loaded.append(ref.step)
        return super().load(ref, dtype)


# ---- checkpoints that are not what they say they are


def test_weights_of_another_step(injected):
    rng = np.random.default_rng(0)
    for seed in range(20):
        trained = weights_of(seed)
        steps = list(trained)
        for fault in ("weights of another step", "weights of the last step", "a tensor of another step"):
            at = steps[rng.integers(2, len(steps) - 2)]
            of = (
                steps[-1]
                if "last" in fault
                else rng.choice([s for s in steps if abs(steps.index(s) - steps.index(at)) > 1])
            )
            changed = dict(trained)
            changed[at] = trained[of] if "tensor" not in fault else trained[at] | {"embed": trained[of]["embed"]}
            reasons = misplaced(checkpoints_of(changed))
            injected(
                fault, wrong=at not in reasons, message=next(iter(reasons.values()), ""), what=f"{at} {of} {reasons}"
            )


def test_weights_of_another_training_among_close_checkpoints(injected):
    """Checkpoints that lie close on the way of a training, as those of Pythia every 1,000 steps."""
    steps = list(range(0, 41, 2))
    rng = np.random.default_rng(1)
    for seed in range(20):
        trained, other = weights_of(seed, steps, 0.02), weights_of(seed + 100, steps, 0.02)
        at = int(rng.choice(steps[2:-2]))
        reasons = misplaced(checkpoints_of(trained | {at: other[at]}))
        injected("weights of another training", wrong=list(reasons) != [at], message=str(reasons), what=f"{at}")
        at = int(rng.choice(steps[2:-6]))
        late = {name: tensor + 1e-6 for name, tensor in trained[steps[-2]].items()}
        reasons = misplaced(checkpoints_of(trained | {at: late}))
        injected("weights of the end, equal to none", wrong=list(reasons) != [at], message=str(reasons), what=f"{at}")


def test_trainings_as_they_should_be_are_not_flagged(injected):
    for seed in range(40):
        reasons = misplaced(checkpoints_of(weights_of(seed, shake=(seed % 5) / 10)))
        injected("nothing: a training as it should be", wrong=len(reasons), what=str(reasons))


def test_a_replay_of_misplaced_checkpoints(suite, tmp_path, injected):
    for number, (at, of) in enumerate([(1, 8), (2, 8), (4, 8), (4, 0), (2, 0)]):
        folder, run_dir = tmp_path / f"suite{number}", tmp_path / f"run{number}"
        shutil.copytree(suite, folder)
        shutil.rmtree(folder / f"step{at}")
        shutil.copytree(suite / f"step{of}", folder / f"step{at}")
        replay(FolderCheckpoints(str(folder)), run_dir)
        shown = open_sound(run_dir)["step"].values.tolist()
        reasons = Ledger(run_dir).flagged()
        injected(
            "a replay of weights of another step", lost=open_trajectory(run_dir)["step"].values.tolist() != STEPS,
            wrong=at not in reasons or at in shown, message=str(reasons), what=f"{at} {of}",
        )  # fmt: skip


def test_old_ledgers_without_fingerprints(injected):
    for at in (1, 8, 64):
        kept = [Weights(one.step, one.hash) for one in checkpoints_of(weights_of())]
        kept[at % 11] = Weights(kept[at % 11].step, kept[-1].hash)
        injected("equal weights in a run of version 0.1.0", wrong=list(misplaced(kept)) != [kept[at % 11].step])


# ---- a hub that fails

REPO = "EleutherAI/pythia-tiny"


@pytest.fixture
def hub(suite, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("svf_lightning.replay.hub._TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):  # their own waiting between retries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    huggingface_hub.utils.close_session()
    hub = Hub()
    for step in STEPS:
        hub.add(REPO, f"step{step}", suite / f"step{step}")
    hub.add(REPO, "main", suite / f"step{STEPS[-1]}")
    yield hub
    hub.close()


def connected(hub, cache, **options):
    source = HubCheckpoints(REPO, "all", cache_dir=str(cache), **options)
    source._endpoint, source._sleep = hub.url, lambda seconds: None
    return source


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, 408, "cut", "flip", "stall"])
@pytest.mark.parametrize("keep", [False, True])
def test_downloads_that_fail_once_or_for_good(hub, tmp_path, injected, fault, keep, suite):
    expected = weight_hash(AutoModelForCausalLM.from_pretrained(suite / "step4"))
    places = {
        "weights": rf"GET .*resolve/{hub.commit(REPO, 'step4')}/model|GET .*resolve/step4/model",
        "configuration": rf"GET .*resolve/{hub.commit(REPO, 'step4')}/config|GET .*resolve/step4/config",
        "revision": f"GET /api/models/.*revision/{hub.commit(REPO, 'step4')}",
    }
    for where, pattern in places.items():
        if where == "revision" and fault in ("cut", "flip"):
            continue
        for times in (1, 10**9):
            if times > 1 and fault == "stall":
                continue  # waited for in test_hub.py
            cache = tmp_path / f"{where}{times}"
            source = connected(hub, cache, keep=keep, retries=2)
            ref = next(ref for ref in source.refs() if ref.step == 4)
            hub.fault(pattern, fault, times=times)
            message, got = "", None
            try:
                got = source.load(ref).weight_hash
            except CheckpointError as error:
                message = str(error)
            hub.faults.clear()
            right = got == expected if times == 1 else got is None and is_line(message)
            source.release(ref)
            left = [] if keep or not cache.exists() else [p for p in cache.rglob("*") if p.is_file()]
            later = connected(hub, cache, keep=keep, retries=0)
            injected(
                f"a hub that answers {fault}", lost=later.load(ref).weight_hash != expected,
                wrong=not right or bool(left), message=message, what=f"{where} {times} {got} {message} {left}",
            )  # fmt: skip


def test_flipped_bits_on_the_way(hub, tmp_path, injected, suite):
    """Whichever bit of the weights flips, a checksum tells."""
    expected = weight_hash(AutoModelForCausalLM.from_pretrained(suite / "step4"))
    whole = hub.repos[REPO]["step4"]["model.safetensors"]
    rng = np.random.default_rng(0)
    commit = hub.commit(REPO, "step4")
    hub.commit = lambda repo, revision, real=hub.commit: commit if revision == "step4" else real(repo, revision)
    described = hub.described("model.safetensors", whole)
    hub.described = lambda name, data, real=hub.described: (
        described if name == "model.safetensors" and len(data) == len(whole) else real(name, data)
    )
    for number in range(20):
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        hub.repos[REPO]["step4"]["model.safetensors"] = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        source = connected(hub, tmp_path / str(number), retries=1)
        ref = next(ref for ref in source.refs() if ref.step == 4)
        message = ""
        try:
            got = source.load(ref).weight_hash
        except CheckpointError as error:
            got, message = None, str(error)
        hub.repos[REPO]["step4"]["model.safetensors"] = whole
        injected(
            "a bit of the weights flips on the way", wrong=got is not None or not is_line(message), message=message,
            lost=source.load(ref).weight_hash != expected, what=f"byte {at}",
        )  # fmt: skip


@pytest.mark.parametrize("fault", [500, "cut", "flip"])
def test_a_replay_over_a_hub_that_loses_one_checkpoint_goes_on_and_repeats_it_alone(hub, tmp_path, injected, fault):
    for step in (0, 2, 8):
        run_dir = tmp_path / f"{fault}{step}"
        hub.fault(rf"GET .*resolve/{hub.commit(REPO, f'step{step}')}/model", fault)
        rows = replay(connected(hub, tmp_path / f"cache{fault}{step}", retries=1), run_dir)
        others = rows["step"].values.tolist() == [s for s in STEPS if s != step]
        failed = {e.step: e.error for e in Ledger(run_dir).entries() if e.status == "failed"}
        hub.faults.clear()
        hub.requests.clear()
        again = replay(connected(hub, tmp_path / f"cache{fault}{step}", retries=1), run_dir)
        fetched = hub.count(r"GET .*resolve/.*/model\.safetensors")
        injected(
            f"a replay over a hub that answers {fault}", lost=not others or fetched != 1,
            wrong=failed.keys() != {step} or again["step"].values.tolist() != STEPS,
            message=next(iter(failed.values()), ""), what=f"{step} {failed} {fetched}",
        )  # fmt: skip
