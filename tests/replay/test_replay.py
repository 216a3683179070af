import itertools
import json
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
import yaml
from helpers.command_line import Command, run_dir_of
from helpers.models import random_model
from helpers.replays import STEPS, replay
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.callbacks import (
    AttentionOverWords,
    CausalAblation,
    FeatureOrthogonality,
    Firings,
    NearestFeature,
    ProbeMetric,
)
from svf_lightning.errors import InputError
from svf_lightning.metrics import relative_attention, sparseness
from svf_lightning.quantities import stored_quantities
from svf_lightning.replay import (
    CheckpointError,
    CheckpointReplay,
    FolderCheckpoints,
    ModelCheckpoints,
    ReplayData,
    decompose_attention,
)
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.run.ledger import Ledger
from svf_lightning.trajectory import TRAJECTORY, open_trajectory
from svf_lightning.zarr_files import METADATA


@pytest.fixture
def own_suite(suite, tmp_path):
    return shutil.copytree(suite, tmp_path / "suite")


class Recorded(FolderCheckpoints):
    """A source that writes down what happens to it."""

    def __init__(self, folder, **options):
        super().__init__(str(folder), **options)
        self.events = []
        self.models = []

    def fetch(self, ref):
        self.events.append(("fetch", ref.step, threading.current_thread().name))

    def load(self, ref, dtype=torch.float32):
        self.events.append(("load", ref.step, threading.current_thread().name))
        loaded = super().load(ref, dtype)
        assert all(model() is None for model in self.models), "an earlier checkpoint is still in memory"
        self.models.append(weakref.ref(loaded.model))
        return loaded

    def release(self, ref):
        self.events.append(("release", ref.step, threading.current_thread().name))


def test_every_checkpoint_gets_a_row_that_says_what_it_was(suite, tmp_path):
    rows = replay(FolderCheckpoints(str(suite)), tmp_path)
    assert rows["step"].values.tolist() == STEPS
    assert dict(rows.sizes) | {"layer": 2, "head": 3, "prompt": 13, "draw": 3} == dict(rows.sizes)
    assert set(rows["processing"].values) == {"folded"}
    assert set(rows["dtype"].values) == {"float32"}
    entries = Ledger(tmp_path).entries()
    assert [(e.step, e.status) for e in entries] == [(step, "done") for step in STEPS]
    assert rows["weight_hash"].values.tolist() == [e.weight_hash for e in entries]
    assert len({e.weight_hash for e in entries}) == len(STEPS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 8)
    assert summary["metrics"]["sad/accuracy"]["mean"] == pytest.approx(float(rows["sad/accuracy"][-1]))


def test_everything_that_a_replay_measures_is_told_by_its_trajectory(suite, tmp_path):
    metrics = (FeatureOrthogonality(), NearestFeature(n_random=3), CausalAblation(n_removed=2), AttentionOverWords())
    model = CheckpointReplay(features=["the", "and", "to"])
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path, model=model, callbacks=metrics)
    numbers = {name for name, variable in rows.data_vars.items() if variable.dtype.kind in "biuf"}
    assert {"words/top", "causal/attention", "sad/accuracy", "nearest/left_feature", "singular_values"} <= numbers
    told = stored_quantities(rows)
    assert numbers <= set(told)
    for name in numbers:
        own = told[name].dims
        assert rows[name].dims[:1] == ("step",)
        assert rows[name].dims[rows[name].ndim - len(own) :] == own, name
        assert rows[name].dims[1 : rows[name].ndim - len(own)] in ((), ("layer", "head")), name


def test_pairs_of_features_and_prompts_whose_contributions_are_removed_are_told_apart(suite, tmp_path):
    model = CheckpointReplay(features=["the", "and", "to"], feature_pairs=[["the", "and"]])
    ablation = CausalAblation(n_removed=2)
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path, model=model, callbacks=(ablation,))
    assert rows["pair/left"].shape == (1, 2, 3, 1)
    assert rows["causal/attention"].shape == (1, 2, 3, 13)


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_rows_equal_what_the_model_and_a_decomposition_by_hand_give(suite, tmp_path, processing):
    model = CheckpointReplay(processing=processing)
    source = FolderCheckpoints(str(suite), steps=[4])
    rows = replay(source, tmp_path, model=model).isel(step=0)
    folder = suite / "step4"
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ReplayData(source, n_prompts=13).prompts
    assert rows["prompt_text"].values.tolist() == [prompt.text for prompt in prompts]
    differences = []
    for prompt in prompts:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt.tokens])).logits[0, prompt.query]
        differences.append(float(logits[prompt.correct] - logits[prompt.wrong]))
    np.testing.assert_allclose(rows["prompt/logit_difference"], differences, atol=1e-5)
    assert float(rows["sad/accuracy"]) == pytest.approx(np.mean(np.array(differences) > 0))
    bridge = make_bridge(plain, processing=processing)
    for i, prompt in enumerate(prompts[:3]):
        n, key = prompt.query + 1, prompt.key
        tokens = torch.tensor([prompt.tokens[:n]])
        contributions, _ = decompose_attention(bridge, tokens, torch.tensor([prompt.query]), torch.tensor([key]))
        relative = relative_attention(contributions[:, :, 0])[:, :, key]
        at = {"prompt": i}
        np.testing.assert_allclose(rows["prompt/score"].isel(at), relative.sum(-1), atol=1e-5)
        np.testing.assert_allclose(rows["prompt/sparseness"].isel(at), sparseness(relative), atol=1e-4)


def test_the_batch_size_changes_nothing(suite, tmp_path):
    one, other = (
        replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path / str(size), batch_size=size) for size in (3, 13)
    )
    for name in one.data_vars:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=2e-4, err_msg=str(name))


def test_processing_modes_differ_in_singular_vectors_and_not_in_scores(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    folded, raw = (replay(source, tmp_path / p, model=CheckpointReplay(p)) for p in ("folded", "raw"))
    np.testing.assert_allclose(folded["prompt/score"], raw["prompt/score"], atol=1e-4)
    assert np.abs(folded["prompt/sparseness"] - raw["prompt/sparseness"]).max() > 0.01


def test_a_checkpoint_that_fails_is_recorded_and_the_next_call_tries_only_what_is_missing(own_suite, tmp_path):
    run_dir = tmp_path / "run"
    weights = own_suite / "step2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    first = Recorded(own_suite)
    assert replay(first, run_dir)["step"].values.tolist() == [0, 1, 4, 8]
    failed = Ledger(run_dir).entries()[2]
    assert (failed.step, failed.status) == (2, "failed")
    assert "step2" in failed.error
    before = open_trajectory(run_dir).load()
    weights.write_bytes(whole)
    second = Recorded(own_suite)
    rows = replay(second, run_dir)
    assert [step for what, step, _ in second.events if what == "load"] == [2]
    assert rows["step"].values.tolist() == STEPS
    assert Ledger(run_dir).entries()[2].status == "done"
    assert (rows.sel(step=before["step"])["prompt/score"].values == before["prompt/score"].values).all()
    third = Recorded(own_suite)
    replay(third, run_dir)
    assert third.events == []


@pytest.mark.parametrize("part", [0, 1])
def test_a_checkpoint_that_a_metric_cannot_trust_is_recorded_and_the_others_are_as_without_it(suite, tmp_path, part):
    class Doubtful(ProbeMetric):
        def observe(self, probe):
            if int(probe.step) == 2 and probe.part[0] == part:
                raise CheckpointError("what the heads of layer 0 read overflows")

        def measure(self, probe):
            return {}

    source = FolderCheckpoints(str(suite))
    callbacks = (Doubtful(), CausalAblation(n_removed=2, report=(1, 2)), Firings(n_draws=2))
    rows = replay(source, tmp_path / "one", callbacks=callbacks)
    entries = {entry.step: entry for entry in Ledger(tmp_path / "one").entries()}
    assert entries[2].status == "failed"
    assert entries[2].error == "what the heads of layer 0 read overflows"
    whole = replay(source, tmp_path / "two", callbacks=callbacks[1:])
    assert rows.step.values.tolist() == [0, 1, 4, 8]
    for name in ("sad/sparseness", "firings/count", "causal/attention"):
        np.testing.assert_array_equal(rows[name], whole[name].sel(step=rows.step))


def test_weights_that_are_not_finite_are_a_failed_checkpoint(own_suite, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(own_suite / "step1")
    with torch.no_grad():
        model.gpt_neox.layers[0].attention.dense.weight[0, 0] = torch.nan
    model.save_pretrained(own_suite / "step1")
    rows = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    assert 1 not in rows["step"]
    assert "NaN" in Ledger(tmp_path / "run").entries()[1].error


class Killed(Exception):
    pass


def test_a_killed_replay_keeps_finished_checkpoints_and_goes_on(suite, tmp_path):
    class Dies(FolderCheckpoints):
        def load(self, ref, dtype=torch.float32):
            if ref.step == 2:
                raise Killed
            return super().load(ref, dtype)

    with pytest.raises(Killed):
        replay(Dies(str(suite)), tmp_path / "killed")
    assert open_trajectory(tmp_path / "killed")["step"].values.tolist() == [0, 1]
    resumed = replay(FolderCheckpoints(str(suite)), tmp_path / "killed")
    whole = replay(FolderCheckpoints(str(suite)), tmp_path / "whole")
    assert resumed["step"].values.tolist() == STEPS
    for name in whole.data_vars:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=str(name))


def test_a_replay_does_not_go_on_where_its_rows_cannot_be_read(suite, tmp_path):
    replay(FolderCheckpoints(str(suite), steps=[0]), tmp_path)
    (tmp_path / TRAJECTORY / METADATA).unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"\.zmetadata is missing"):
        replay(FolderCheckpoints(str(suite)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": CheckpointReplay("raw")}, "processing"), ({"n_prompts": 14}, "prompts")],
    ids=["processing", "prompts"],
)
def test_a_run_that_goes_on_refuses_to_mix_unlike_rows(suite, tmp_path, change, message):
    replay(FolderCheckpoints(str(suite), steps=[0]), tmp_path)
    with pytest.raises(InputError, match=f"measured with {message}.*must not mix"):
        replay(FolderCheckpoints(str(suite)), tmp_path, **change)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ([CausalAblation], [lambda: CausalAblation(seed=1)], r"CausalAblation\.seed=0, and this call has 1"),
        ([], [lambda: NearestFeature(n_random=5)], r"NearestFeature\.n_random=None, and this call has 5"),
    ],
    ids=["another option", "one metric more"],
)
def test_a_run_that_goes_on_with_other_options_of_a_metric_is_refused(suite, tmp_path, before, now, message):
    replay(FolderCheckpoints(str(suite), steps=[0]), tmp_path, callbacks=[make() for make in before])
    rows = open_trajectory(tmp_path).load()
    with pytest.raises(InputError, match=f"measured with {message}.*must not mix"):
        replay(FolderCheckpoints(str(suite)), tmp_path, callbacks=[make() for make in now])
    assert rows.equals(open_trajectory(tmp_path).load())


def test_another_version_of_the_package_goes_on(suite, tmp_path, monkeypatch):
    replay(FolderCheckpoints(str(suite), steps=[0]), tmp_path)
    monkeypatch.setattr("svf_lightning.replay.model.__version__", "9.9.9")
    rows = replay(FolderCheckpoints(str(suite)), tmp_path)
    assert rows["code_version"].values.tolist()[1:] == ["9.9.9"] * 4
    assert rows["code_version"].values[0] != "9.9.9"


def as_version_0_1_0(run_dir):
    """The run directory of a replay as version 0.1.0 left it."""
    identity = json.loads((run_dir / "identity.json").read_text())
    metrics = identity.pop("metrics")
    identity.pop("measurement")
    (run_dir / "identity.json").write_text(json.dumps(identity | {"version": "0.1.0"}))
    for options in metrics.values():
        options.pop("version")
    callbacks = [{"class_path": f"svf_lightning.callbacks.{n}", "init_args": o} for n, o in metrics.items()]
    callbacks.append({"class_path": "svf_lightning.callbacks.CheckpointTable"})
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    (run_dir / "ledger").rename(run_dir / "checkpoints")
    for name in (".zattrs", ".zmetadata"):  # trajectories said nothing of their quantities
        path = run_dir / "trajectory.zarr" / name
        content = json.loads(path.read_text())
        (content["metadata"][".zattrs"] if name == ".zmetadata" else content).pop("quantities")
        path.write_text(json.dumps(content))


def test_a_run_of_version_0_1_0_goes_on_with_the_same_options_and_with_no_others(suite, tmp_path):
    old = tmp_path / "old"
    replay(FolderCheckpoints(str(suite), steps=[0, 4]), old)
    as_version_0_1_0(old)
    with pytest.raises(InputError, match="CausalAblation"):
        replay(FolderCheckpoints(str(suite)), old, callbacks=(CausalAblation(),))
    source = Recorded(suite)
    rows = replay(source, old)
    assert [step for what, step, _ in source.events if what == "load"] == [1, 2, 8]
    whole = replay(FolderCheckpoints(str(suite)), tmp_path / "whole")
    for name in whole.data_vars:
        np.testing.assert_array_equal(rows[name], whole[name], err_msg=str(name))
    assert [(entry.step, entry.status) for entry in Ledger(old).entries()] == [(step, "done") for step in STEPS]
    assert json.loads((old / "identity.json").read_text()) == json.loads(
        (tmp_path / "whole" / "identity.json").read_text()
    )


def test_the_next_checkpoint_is_fetched_while_the_current_one_is_measured_and_files_are_released(suite, tmp_path):
    source = Recorded(suite)
    replay(source, tmp_path)
    order = [(what, step) for what, step, _ in source.events]
    for this, following in itertools.pairwise(STEPS):
        assert order.index(("fetch", following)) < order.index(("release", this)) < order.index(("load", following))
    # never more than one ahead
    for ahead, later in zip(STEPS, STEPS[2:], strict=False):
        assert order.index(("release", ahead)) < order.index(("fetch", later))
    threads = {step: name for what, step, name in source.events if what == "fetch"}
    assert all("svf-fetch" in threads[step] for step in STEPS[1:])


def test_a_fetch_that_fails_in_the_background_is_the_failure_of_its_own_checkpoint(suite, tmp_path):
    class Broken(Recorded):
        def fetch(self, ref):
            if ref.step == 4:
                raise CheckpointError("step4: no network")

    rows = replay(Broken(suite), tmp_path)
    assert rows["step"].values.tolist() == [0, 1, 2, 8]
    assert [e.error for e in Ledger(tmp_path).entries() if e.status == "failed"] == ["step4: no network"]


def test_models_in_memory_are_replayed_and_left_as_they_are(suite, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(suite / "step4").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = ModelCheckpoints({4: model}, AutoTokenizer.from_pretrained(suite / "step4"))
    rows = replay(source, tmp_path / "object")
    folder = replay(FolderCheckpoints(str(suite), steps=[4]), tmp_path / "folder")
    np.testing.assert_array_equal(rows["prompt/score"], folder["prompt/score"])
    assert rows["weight_hash"].values == folder["weight_hash"].values
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_own_prompts_come_from_a_file(suite, tmp_path):
    text = "When Mary and John went to the store, John gave a drink to"
    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    if tokenizer.unk_token_id in tokenizer(text)["input_ids"]:
        text = ReplayData(FolderCheckpoints(str(suite)), n_prompts=1).prompts[0].text
    names = [w for w in text.replace(",", " ").split() if w.istitle() and text.count(w) == 1][-1:]
    line = {"text": text, "query": -1, "key": 1, "correct": names[0], "wrong": "the"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path / "run", prompts=str(tmp_path / "own.jsonl"))
    assert rows.sizes["prompt"] == 1
    assert int(rows["key_position"][0]) == 1


def test_prompts_without_a_key_have_all_pairs_of_tokens_that_a_head_attends_to_and_nothing_else(suite, tmp_path):
    """The numbers of Firings are those of the same prompts with keys."""
    source = FolderCheckpoints(str(suite), steps=[4, 8])
    known = ReplayData(source, n_prompts=5).prompts
    ids = [{"tokens": list(prompt.tokens)} for prompt in known]
    keyed = [{**line, "key": prompt.key} for line, prompt in zip(ids, known, strict=True)]
    rows = {}
    for name, lines in (("keyless", ids), ("keyed", keyed)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        prompts = str(tmp_path / f"{name}.jsonl")
        rows[name] = replay(source, tmp_path / name, prompts=prompts, callbacks=(Firings(tau=0.2),))
    assert int(rows["keyless"]["firings/count"][-1]) > 0
    for name in rows["keyless"].data_vars:
        if str(name).startswith("firings/"):
            np.testing.assert_array_equal(rows["keyless"][name], rows["keyed"][name])
    assert "sad/sparseness" in rows["keyed"]
    assert not any(str(name).startswith(("sad/", "prompt/")) for name in rows["keyless"].data_vars)
    assert rows["keyless"]["key_position"].values.tolist() == [-1] * 5


def test_prompts_with_and_without_a_key_are_no_run(suite, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"tokens": [5, 6, 7], "key": 1}\n{"tokens": [5, 6, 7]}\n')
    data = ReplayData(FolderCheckpoints(str(suite)), prompts=str(tmp_path / "own.jsonl"))
    with pytest.raises(InputError, match=r"has no key, and others have one.*make two runs"):
        _ = data.prompts


def test_proxy_features_are_embeddings_of_words_or_a_dictionary(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    words = [*list(dict.fromkeys(p.text.split()[-1] for p in ReplayData(source, n_prompts=4).prompts)), "the", "and"]
    tokenizer = source.tokenizer()
    words = [w for w in words if tokenizer.convert_tokens_to_ids(w) != tokenizer.unk_token_id]
    extra = (FeatureOrthogonality(),)
    model = CheckpointReplay(features=words, feature_pairs=[[words[0], words[1]]])
    rows = replay(source, tmp_path / "words", model=model, callbacks=extra).isel(step=0)
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    X = bridge.W_E[[tokenizer.convert_tokens_to_ids(w) for w in words]].T.detach()
    np.testing.assert_allclose(rows["W"], X, rtol=1e-6)
    assert rows["feature_name"].values.tolist() == words
    unit = X / X.norm(dim=0)
    expected = torch.linalg.matrix_norm(unit.T @ unit - torch.eye(len(words)), 2)
    assert float(rows["orthogonality/interference"]) == pytest.approx(float(expected), rel=1e-4)
    assert rows["alignment/matched"].dims == ("layer", "head")
    np.save(tmp_path / "dictionary.npy", X.numpy())
    model = CheckpointReplay(features=str(tmp_path / "dictionary.npy"))
    again = replay(source, tmp_path / "file", model=model, callbacks=extra).isel(step=0)
    np.testing.assert_allclose(again["orthogonality/interference"], rows["orthogonality/interference"], rtol=1e-5)
    assert "alignment/matched" not in again  # no pairs are named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["not-a-word"]}, "single tokens"),
        ({"features": "missing.npy"}, r"features: missing\.npy cannot be read"),
        ({"features": ["the"], "feature_pairs": [["the", "and"]]}, "feature_pairs"),
        ({"dtype": "float8"}, "float32"),
        ({"feature_pairs": [["a", "b"]]}, "model.features"),
    ],
)
def test_options_that_cannot_be_used_say_why(suite, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        replay(FolderCheckpoints(str(suite)), tmp_path, model=CheckpointReplay(**options))


def test_a_model_that_cannot_be_decomposed_stops_the_run_with_a_reason(tmp_path, suite):
    from transformers import MambaConfig

    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, state_size=4)
    source = ModelCheckpoints({0: AutoModelForCausalLM.from_config(config)}, tokenizer)
    with pytest.raises(InputError, match="no layer has attention"):
        replay(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # it was found before anything was written


def test_replay_data_is_needed_and_the_probe_needs_a_batch(tmp_path):
    with pytest.raises(RuntimeError, match="no"):
        CheckpointReplay().probe()
    assert random_model("gpt2") is not None


# ---- the command line


SHORT = ["--data.n_prompts=9", "--data.batch_size=4", "--trainer.logger=false", "--report=false"]


def suite_options(suite):
    return ["--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}"]


def test_the_command_replays_goes_on_and_says_when_nothing_is_missing(suite, command: Command, typed):
    first = command("replay", *suite_options(suite), "--data.source.init_args.steps=[0,8]", *SHORT)
    assert first.returncode == 0, first.stderr
    run_dir = run_dir_of(first, command)
    assert open_trajectory(run_dir)["step"].values.tolist() == [0, 8]
    for text in ("Checkpoints", "accuracy", "sad/task/sparseness"):
        assert text in first.stdout
    more = typed("replay", f"--run_dir={run_dir}", "--data.source.init_args.steps=[0,2,8]", "--report=false")
    assert more.returncode == 0, more.stderr
    assert open_trajectory(run_dir)["step"].values.tolist() == [0, 2, 8]
    again = typed("replay", f"--run_dir={run_dir}", "--data.source.init_args.steps=[0,2,8]", "--report=false")
    assert again.returncode == 0
    assert "nothing to replay" in again.stderr


def test_the_exit_code_tells_that_a_checkpoint_is_missing(own_suite, command: Command):
    (own_suite / "step1" / "model.safetensors").write_bytes(b"no weights")
    result = command("replay", *suite_options(own_suite), "--data.source.init_args.steps=[0,1]", *SHORT)
    assert result.returncode == 1
    assert "step 1 failed" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("preset", ["gpt2", "pythia_160m"])
def test_without_a_network_a_hub_preset_says_so_in_one_line(preset, command: Command):
    result = command(
        "replay",
        "--config",
        preset,
        "--data.source.init_args.retries=0",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME="hub",
    )
    assert result.returncode == 1
    assert "cannot be had" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (command.folder / "runs").exists()


def test_help_names_every_command(typed):
    result = typed("--help")
    assert result.returncode == 0
    commands = ("fit", "validate", "test", "replay", "presets", "sweep", "report", "figures", "publish", "workspace")
    assert all(f"  {name} " in result.stdout for name in commands)
    assert "replay" in typed("repaly").stderr


@pytest.mark.parametrize("where", [[], ["--run_dir=here"]])
def test_two_devices_share_the_checkpoints(suite, command: Command, where):
    options = [*suite_options(suite), *SHORT, "--trainer.devices=2", "--trainer.strategy=ddp", *where]
    result = command("replay", *options)
    assert result.returncode == 0, result.stderr
    run_dir = run_dir_of(result, command)
    assert open_trajectory(run_dir)["step"].values.tolist() == STEPS
    assert open_trajectory(run_dir / "trajectory.zarr")["step"].values.tolist() == [0, 2, 8]
    assert open_trajectory(run_dir / "trajectory.rank1.zarr")["step"].values.tolist() == [1, 4]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny_suit"], "tiny_suite"),
        (["--model.processing=fold"], "folded"),
        (["--data.n_prompts=0"], "n_prompts"),
        (["--data.source=svf_lightning.replay.FolderCheckpoints", "--data.source.init_args.folder=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command: Command, typed, arguments, message):
    result = typed("replay", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (command.folder / "runs").exists()
