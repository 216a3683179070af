import itertools
import json
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import Command, run_dir_of
from models import random_model
from replays import STEPS, replay
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.callbacks import (
    AttentionOverWords,
    CausalAblation,
    FeatureOrthogonality,
    NearestFeature,
)
from svf_lightning.errors import InputError
from svf_lightning.metrics import cosine_matrix, relative_attention, sparseness
from svf_lightning.replay import (
    CheckpointError,
    CheckpointReplay,
    FolderCheckpoints,
    ModelCheckpoints,
    ReplayData,
    decompose_attention,
)
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.ledger import Ledger
from svf_lightning.trajectory import open_trajectory


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


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": CheckpointReplay("raw")}, "processing"), ({"n_prompts": 14}, "prompts")],
    ids=["processing", "prompts"],
)
def test_a_run_that_goes_on_refuses_to_mix_unlike_rows(suite, tmp_path, change, message):
    replay(FolderCheckpoints(str(suite), steps=[0]), tmp_path)
    with pytest.raises(InputError, match=f"measured with {message}.*must not mix"):
        replay(FolderCheckpoints(str(suite)), tmp_path, **change)


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


def test_proxy_features_are_embeddings_of_words_or_a_dictionary(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    words = [*list(dict.fromkeys(p.text.split()[-1] for p in ReplayData(source, n_prompts=4).prompts)), "the", "and"]
    tokenizer = source.tokenizer()
    words = [w for w in words if tokenizer.convert_tokens_to_ids(w) != tokenizer.unk_token_id]
    extra = (FeatureOrthogonality(), NearestFeature(n_random=5))
    model = CheckpointReplay(features=words, feature_pairs=[[words[0], words[1]]])
    rows = replay(source, tmp_path / "words", model=model, callbacks=extra).isel(step=0)
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    X = bridge.W_E[[tokenizer.convert_tokens_to_ids(w) for w in words]].T.detach()
    unit = X / X.norm(dim=0)
    expected = torch.linalg.matrix_norm(unit.T @ unit - torch.eye(len(words)), 2)
    assert float(rows["orthogonality/interference"]) == pytest.approx(float(expected), rel=1e-4)
    # u_1 of one head, from the dense form with its bias coordinate
    W_Q = torch.cat([bridge.W_Q[1, 2].T, bridge.b_Q[1, 2][:, None]], 1).double().detach()
    W_K = torch.cat([bridge.W_K[1, 2].T, bridge.b_K[1, 2][:, None]], 1).double().detach()
    U, _, Vt = torch.linalg.svd(W_Q.T @ W_K)
    padded = torch.cat([unit.double(), torch.zeros(1, len(words))])
    nearest = cosine_matrix(padded, U[:, :1]).max()
    assert float(rows["alignment/nearest_left"][1, 2]) == pytest.approx(float(nearest), rel=1e-3)
    unwhitened = padded @ (padded.T @ Vt[0])
    expected = (padded.T @ unwhitened).abs().max() / unwhitened.norm()
    assert float(rows["alignment/nearest_unwhitened_right"][1, 2]) == pytest.approx(float(expected), rel=1e-3)
    assert {"alignment/matched", "alignment/unwhitened"} <= set(rows.data_vars)
    # few features: un-whitening puts any direction into their span, and the control says so
    assert float(rows["alignment/nearest_unwhitened_random"]) > float(rows["alignment/nearest_random"])
    np.save(tmp_path / "dictionary.npy", X.numpy())
    model = CheckpointReplay(features=str(tmp_path / "dictionary.npy"))
    again = replay(source, tmp_path / "file", model=model, callbacks=extra).isel(step=0)
    for name in ("orthogonality/interference", "alignment/nearest_left"):
        np.testing.assert_allclose(again[name], rows[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["not-a-word"]}, "single tokens"),
        ({"features": "missing.npy"}, "does not exist"),
        ({"features": ["the"], "feature_pairs": [["the", "and"]]}, "feature_pairs"),
        ({"dtype": "float8"}, "float32"),
        ({"feature_pairs": [["a", "b"]]}, "model.features"),
    ],
)
def test_options_that_cannot_be_used_say_why(suite, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        replay(FolderCheckpoints(str(suite)), tmp_path, model=CheckpointReplay(**options))


def test_removing_contributions_from_every_head_changes_what_the_model_does(suite, tmp_path):
    """Independent of the callback: all contributions of a head removed = its relative score set to 0 by hand."""
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    source = FolderCheckpoints(str(suite), steps=[8])
    ablation = CausalAblation(n_removed=16, report=(1, 16), n_task_heads=1)
    rows = replay(source, tmp_path, callbacks=(ablation,), n_prompts=7).isel(step=0)
    layer, head = divmod(int(rows["causal/layer_head"][0]), 3)
    prompts = ReplayData(source, n_prompts=7).prompts
    assert (layer, head) == np.unravel_index(rows["prompt/attention"].mean("prompt").argmax(), (2, 3))
    for i, prompt in enumerate(prompts):
        off = float(rows["prompt/score"][layer, head, i])

        def change(scores, hook, prompt=prompt, off=off):
            scores = scores.clone()
            scores[0, head, prompt.query, prompt.key] -= off
            return scores

        logits = bridge.run_with_hooks(
            torch.tensor([prompt.tokens]), fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", change)]
        )[0, prompt.query]
        expected = float(logits[prompt.correct] - logits[prompt.wrong]) - float(rows["prompt/logit_difference"][i])
        for kind in (0, 2):  # with all of them removed, it does not matter in which order
            found = float(rows["causal/logit_difference"][15, kind, i])
            assert found == pytest.approx(expected, abs=1e-4)


def test_words_of_a_prompt_hold_the_models_own_attention_and_scores_taken_apart(suite, tmp_path):
    words = AttentionOverWords(n_prompts=3, n_top=16)  # all singular pairs
    source = FolderCheckpoints(str(suite), steps=[4])
    rows = replay(source, tmp_path, callbacks=(words,)).isel(step=0)
    prompts = ReplayData(source, n_prompts=13).prompts
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step4").eval())
    tokenizer = source.tokenizer()
    assert rows["words/prompt"].values.tolist() == [2, 6, 10]
    for shown, number in enumerate(rows["words/prompt"].values):
        prompt = prompts[number]
        n = prompt.query + 1
        _, cache = bridge.run_with_cache(torch.tensor([prompt.tokens]))
        own = rows.isel(shown=shown)
        for layer in range(2):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, prompt.query, :n].detach().numpy()
            scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, :, prompt.query, :n].detach().numpy()
            others = (scores.sum(1, keepdims=True) - scores) / (n - 1)
            here = own.isel(layer=layer, word=slice(n))
            np.testing.assert_allclose(here["words/attention"], pattern, atol=1e-5)
            np.testing.assert_allclose(here["words/relative"], scores - others, atol=1e-4)
            np.testing.assert_allclose(here["words/top"].sum("top"), scores - others, atol=1e-4)
        assert np.isnan(own["words/attention"].isel(word=slice(n, None))).all()
        # largest first, in the direction of the score
        signed = own["words/top"].isel(word=prompt.key) * np.sign(own["words/relative"].isel(word=prompt.key))
        assert (np.diff(signed.values, axis=-1) <= 1e-6).all()
        np.testing.assert_array_equal(own["words/top_index"].isel(top=0), rows["prompt/top_index"].isel(prompt=number))
        for token, (start, end) in zip(prompt.tokens, own["token_span"].values[number], strict=False):
            if start != end:
                assert prompt.text[start:end] == tokenizer.decode([token]).strip()


def test_the_prompts_whose_words_are_kept_do_not_depend_on_the_batch_size_and_long_ones_are_left_out(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    found = {}
    for size in (2, 13):
        words = AttentionOverWords(n_prompts=5)
        found[size] = replay(source, tmp_path / str(size), callbacks=(words,), batch_size=size)
    assert found[2]["words/prompt"].values.tolist() == found[13]["words/prompt"].values.tolist()
    np.testing.assert_allclose(found[2]["words/top"], found[13]["words/top"], atol=2e-4)
    lengths = found[2]["query_position"].values + 1
    words = AttentionOverWords(n_prompts=13, max_words=int(np.median(lengths)))
    short = replay(source, tmp_path / "short", callbacks=(words,))
    assert short["words/prompt"].values[0].tolist() == np.flatnonzero(lengths <= np.median(lengths)).tolist()
    none = replay(source, tmp_path / "none", callbacks=(AttentionOverWords(max_words=1),))
    assert not any(name.startswith("words/") for name in none)


def test_words_that_a_sliding_window_hides_have_no_number(tmp_path, suite):
    tokenizer = AutoTokenizer.from_pretrained(suite / "step8")
    model = random_model("gemma2")
    model.resize_token_embeddings(len(tokenizer))
    source = ModelCheckpoints({0: model}, tokenizer)
    rows = replay(source, tmp_path, callbacks=(AttentionOverWords(n_prompts=1, n_top=2),), n_prompts=4).isel(step=0)
    own = rows.isel(shown=0)
    n = int(rows["query_position"][int(rows["words/prompt"][0])]) + 1
    seen = np.isfinite(own["words/attention"].values[..., :n]).sum(-1)
    assert (seen[0] == 5).all()
    assert (seen[1] == n).all()
    assert (own["words/top_index"].values[0] == -1).all()  # the attended name is out of sight
    assert (own["words/top_index"].values[1] >= 0).all()


@pytest.mark.parametrize("options", [{"n_prompts": 0}, {"n_top": 0}, {"max_words": 0}])
def test_options_of_attention_over_words_out_of_range_are_input_errors(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=0.*>= 1"):
        AttentionOverWords(**options)


def test_a_model_that_cannot_be_decomposed_stops_the_run_with_a_reason(tmp_path, suite):
    from transformers import Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, head_dim=6,
    )  # fmt: skip
    source = ModelCheckpoints({0: AutoModelForCausalLM.from_config(config)}, tokenizer)
    with pytest.raises(InputError, match="QK-norm"):
        replay(source, tmp_path)


def test_replay_data_is_needed_and_the_probe_needs_a_batch(tmp_path):
    with pytest.raises(RuntimeError, match="no"):
        CheckpointReplay().probe()
    assert random_model("gpt2") is not None


# ---- the command line


SHORT = ["--data.n_prompts=9", "--data.batch_size=4", "--trainer.logger=false"]


def suite_options(suite):
    return ["--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}"]


def test_the_command_replays_goes_on_and_says_when_nothing_is_missing(suite, command: Command):
    first = command("replay", *suite_options(suite), "--data.source.init_args.steps=[0,8]", *SHORT)
    assert first.returncode == 0, first.stderr
    run_dir = run_dir_of(first, command)
    assert open_trajectory(run_dir)["step"].values.tolist() == [0, 8]
    for text in ("Checkpoints", "accuracy", "sad/task/sparseness"):
        assert text in first.stdout
    more = command("replay", f"--run_dir={run_dir}", "--data.source.init_args.steps=[0,2,8]")
    assert more.returncode == 0, more.stderr
    assert open_trajectory(run_dir)["step"].values.tolist() == [0, 2, 8]
    again = command("replay", f"--run_dir={run_dir}", "--data.source.init_args.steps=[0,2,8]")
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
    commands = ("fit", "validate", "test", "replay", "sweep", "report", "publish", "workspace")
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
