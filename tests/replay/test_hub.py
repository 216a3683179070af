"""Checkpoints from the Hugging Face hub: revisions, downloads, bounded disk, retries."""

import contextlib
import copy
import gc
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers.checkpoints import logits, make_model, one_line, only_ref, save, save_bert, save_bin
from helpers.hub import Hub
from huggingface_hub import constants, snapshot_download
from transformers import AutoTokenizer

from svf_lightning.errors import InputError
from svf_lightning.replay import CheckpointError, HubCheckpoints
from svf_lightning.replay.model_files import weight_hash
from svf_lightning.replay.source import PYTHIA_STEPS, CheckpointRef

REPO = "EleutherAI/pythia-tiny"
STEPS = (0, 1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six revisions, of which the first two serve the same weights, among files that nobody needs."""
    root = tmp_path_factory.mktemp("revisions")
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
def hub(folders, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):  # their own waiting between retries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    huggingface_hub.utils.close_session()
    hub = Hub()
    for folder in sorted(folders.iterdir()):
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


def test_longer_names_of_revisions_count_where_they_are_clear(hub, connect, folders):
    for name in ("main", "step1000-tokens4B", "step2000-tokens8B", "step2000"):
        hub.add("ai/olmo", name, folders / "step1")
    found = connect("ai/olmo").refs()
    assert [(r.step, r.name) for r in found] == [(1000, "step1000-tokens4B"), (2000, "step2000")]
    hub.add("ai/olmo", "stage2-step1000", folders / "step1")  # of a stage, which has an axis of its own
    assert connect("ai/olmo").refs() == found
    hub.add("ai/olmo", "step1000-seed1", folders / "step1")
    with pytest.raises(InputError, match="one revision per step"):
        connect("ai/olmo").refs()
    assert [r.name for r in connect("ai/olmo", ["step1000-tokens4B"]).refs()] == ["step1000-tokens4B"]
    hub.add("ai/plain", "main", folders / "step1")
    with pytest.raises(InputError, match=r"no revisions named after a step .*null"):
        connect("ai/plain").refs()


def test_the_tokenizer_costs_no_weights(hub, connect, folders):
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
        hub.add("ai/late", revision, folders / revision)
        hub.add("ai/early", revision, folders / revision)
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
    threads = [threading.Thread(target=source.fetch, args=(ref,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # loaded in one thread: transformers switches the tying of weights off for the whole process while it loads
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))
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
def test_without_the_hub_the_cache_is_enough(hub, connect, folders, monkeypatch, offline):
    for name in ("step1", "step2", "main"):
        hub.add("ai/own", name, folders / name)
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


def test_each_try_is_told_in_a_line_with_its_reason(hub, connect, capsys):
    source = connect(retries=2)
    ref = ref_of(source, 8)
    hub.fault(r"GET .*model\.safetensors", 502, times=2)
    source.fetch(ref)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(rf"svf-lightning: {REPO}@step8: .*502.*; trying again in 1 s \(1 of 2\)", lines[0])
    assert lines[1].endswith("trying again in 2 s (2 of 2)")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("file", [r"model\.safetensors", r"config\.json"])
def test_a_file_that_is_not_what_the_hub_describes_is_not_used(hub, connect, keep, file):
    source = connect(retries=1, keep=keep)
    ref = ref_of(source, 8)
    hub.fault(rf"GET .*resolve.*/{file}", "flip", times=1)
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))
    assert source.waited == [1.0]
    hub.fault(rf"GET .*resolve.*/{file}", "flip")
    source.release(ref)
    other = connect(retries=1, keep=keep, cache="other")
    with pytest.raises(CheckpointError, match="did not arrive as the hub describes it") as error:
        other.load(ref)
    one_line(error)
    hub.faults.clear()
    assert other.load(ref).weight_hash == weight_hash(make_model(seed=8))  # nothing of it was kept


def test_a_wrong_etag_does_not_matter_as_bytes_are_compared(hub, connect):
    source = connect(retries=1)
    hub.fault(r".*resolve.*model\.safetensors", "etag")
    assert source.load(ref_of(source, 8)).weight_hash == weight_hash(make_model(seed=8))


@pytest.mark.parametrize(
    "where", ["GET /api/models/[^/]*/[^/]*$", "/refs", "GET /api/models/.*revision", "GET .*model.safe"]
)
def test_a_hub_that_stalls_is_not_waited_for_forever(hub, connect, monkeypatch, where):
    monkeypatch.setattr("svf_lightning.replay.hub._TIMEOUT", 0.2)
    for module in (constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    source = connect(retries=1)
    hub.fault(where, "stall", times=1)
    assert source.load(ref_of(source, 8)).weight_hash == weight_hash(make_model(seed=8))


def test_a_file_beyond_the_limit_of_the_process_is_a_full_disk(hub, connect):
    source = connect(retries=3)
    ref = ref_of(source, 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step8 cannot be had: .*[Ff]ile too large") as error:
            source.fetch(ref)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert source.waited == []
    assert size_of(connect.cache) == 0
    assert source.load(ref).weight_hash == weight_hash(make_model(seed=8))


def test_the_name_of_a_model_is_that_of_its_repository():
    assert HubCheckpoints(REPO).model_name() == "pythia-tiny"
    assert HubCheckpoints("gpt2", None).model_name() == "gpt2"


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


# ---- revisions as other families name them


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["main", "checkpoint-10", "checkpoint-200"], {}, {10: "checkpoint-10", 200: "checkpoint-200"}),
        (
            ["main", "stage1-step0-tokens0B", "stage1-step1000-tokens5B", "stage2-ingredient1-step1000-tokens3B"],
            {}, {0: "stage1-step0-tokens0B", 1000: "stage1-step1000-tokens5B"},
        ),
        (
            ["stage1-step0-tokens0B", "stage2-ingredient1-step1000-tokens3B"],
            {"stage": "stage2-ingredient1"}, {1000: "stage2-ingredient1-step1000-tokens3B"},
        ),
        (["main", "iter_0000010", "ckpt_20"], {}, {10: "iter_0000010", 20: "ckpt_20"}),
        (["main", "v1.5-it7"], {"pattern": "v1.5-it{step}"}, {7: "v1.5-it7"}),
    ],
)  # fmt: skip
def test_revisions_of_other_families_are_measured(hub, folders, connect, names, options, expected):
    for name in names:
        hub.add("else/where", name, folders / "step4")
    source = connect("else/where", **options)
    assert {ref.step: ref.name for ref in source.refs()} == expected
    last = source.refs()[-1]
    assert source.load(last).weight_hash == weight_hash(make_model(seed=4))
    said = re.search(r"tokens(\d+)B", last.name)
    assert last.tokens == (None if said is None else int(said[1]) * 10**9)


def test_two_revisions_of_one_step_are_not_chosen_between(hub, folders, connect):
    for name in ("step10", "checkpoint-10"):
        hub.add("else/where", name, folders / "step4")
    with pytest.raises(InputError, match="one revision per step"):
        connect("else/where").refs()


def test_a_stage_that_there_is_not_names_those_that_there_are(hub, folders, connect):
    hub.add("else/where", "stage1-step0-tokens0B", folders / "step0")
    with pytest.raises(InputError, match=r"stage='stage9' .*Allowed: stage1"):
        connect("else/where", stage="stage9").refs()


@pytest.mark.parametrize("preset", ["pythia_410m", "polypythias", "stanford_gpt2", "olmo2_1b"])
def test_presets_of_hub_models_name_a_source_that_can_be_made(preset):
    import yaml

    from svf_lightning.cli import preset_path

    settings = yaml.safe_load(preset_path(preset, "replay").read_text())["data"]["source"]
    assert settings["class_path"] == "svf_lightning.replay.HubCheckpoints"
    source = HubCheckpoints(**settings["init_args"])
    assert source.model_name() == settings["init_args"]["repo"].split("/")[1]
