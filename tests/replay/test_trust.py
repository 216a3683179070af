"""A replay believes no checkpoint: what it computes is compared with the model, and checkpoints with each other."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import bridge, random_model
from helpers.replays import STEPS, replay
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    NemotronConfig,
    OPTConfig,
)

import svf_lightning.replay.model as model_file
import svf_lightning.replay.observed as observed_file
from svf_lightning.bridged import fold_when_read
from svf_lightning.errors import InputError
from svf_lightning.figures.reading import sizes_in_words
from svf_lightning.heads import AttentionHeads
from svf_lightning.pages.run import write_run_page
from svf_lightning.replay import (
    CheckpointError,
    CheckpointReplay,
    FolderCheckpoints,
    HeadSpace,
    ModelCheckpoints,
    decompose_attention,
)
from svf_lightning.replay.bridge import check_folded, make_bridge
from svf_lightning.replay.observed import tolerance
from svf_lightning.run.ledger import Ledger, open_sound
from svf_lightning.trajectory import open_trajectory

HALVES = ("float16", "bfloat16")
V = 222  # words of the suite's tokenizer
_SHAPE = {"vocab_size": V, "hidden_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64}
# attention that once was refused, or measured wrongly in half precision
OTHER_FORMS = {
    "bloom": BloomConfig(vocab_size=V, hidden_size=40, n_layer=2, n_head=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=V, hidden_size=40, num_layers=2, attention_types=[[["global"], 2]], num_heads=4,
        max_position_embeddings=64,
    ),
    "opt": OPTConfig(
        vocab_size=V, hidden_size=40, num_hidden_layers=2, ffn_dim=44, num_attention_heads=4, word_embed_proj_dim=40,
        max_position_embeddings=64,
    ),
    "gptj": GPTJConfig(vocab_size=V, n_positions=64, n_embd=40, n_layer=2, n_head=4, rotary_dim=4),
}  # fmt: skip


def made(config, spread=0.3, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokenizer(suite):
    return AutoTokenizer.from_pretrained(suite / "step0")


@pytest.fixture
def own_suite(suite, tmp_path):
    return shutil.copytree(suite, tmp_path / "suite")


def change(folder, change_it):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change_it(model)
    model.save_pretrained(folder)


def failures(run_dir):
    return {entry.step: entry.error for entry in Ledger(run_dir).entries() if entry.status == "failed"}


# ---- rebuilt scores against the model's own


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("family", OTHER_FORMS)
def test_attention_of_other_families_is_measured_in_every_dtype(tmp_path, tokenizer, family, dtype, processing):
    source = ModelCheckpoints({0: made(OTHER_FORMS[family], spread=0.1)}, tokenizer)
    replay(source, tmp_path / "run", model=CheckpointReplay(processing, dtype))
    (entry,) = Ledger(tmp_path / "run").entries()
    assert entry.status == "done"
    assert entry.score_error < tolerance(getattr(torch, dtype))
    row = open_trajectory(tmp_path / "run").isel(step=0)
    assert np.isfinite(row["sad/sparseness"]).all()
    assert ("sad/position_share" in row) == (family == "bloom")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma2"])
def test_half_precision_is_off_by_a_few_roundings_and_no_more(family, dtype):
    kind = getattr(torch, dtype)
    space = HeadSpace(make_bridge(random_model(family).to(kind)))
    tokens = torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(0))
    query, key = torch.full((3,), 16), torch.tensor([2, 5, 9])
    attended = space.attended(space.observe(tokens, query), key)
    assert 0.1 < float(attended.error.max()) / torch.finfo(kind).eps < 4
    exact = decompose_attention(bridge(family), tokens, query, key)
    half = space.decompose(space.observe(tokens, query), key)
    assert {part.dtype for part in half} == {torch.float32}
    torch.testing.assert_close(
        half.scores, exact.scores, rtol=0, atol=float(exact.scores.abs().max()) * (0.05 if dtype == "float16" else 0.2)
    )


@pytest.mark.parametrize(("off", "error"), [(3e-5, None), (1e-3, CheckpointError), (0.1, InputError)])
def test_scores_that_differ_by_more_than_rounding_are_an_error(monkeypatch, off, error):
    space = HeadSpace(bridge("gpt2"))
    tokens, query, key = torch.arange(12)[None], torch.tensor([11]), torch.tensor([3])
    observed = space.observe(tokens, query)
    observed = replace(observed, scores=observed.scores * (1 + off))
    if error is None:
        assert float(space.attended(observed, key).error.max()) == pytest.approx(off, rel=0.1)
    else:
        with pytest.raises(error, match=r"off by [\d.e-]+ of the largest"):
            space.attended(observed, key)
        with pytest.raises(error):
            space.decompose(observed, key)


def test_layers_without_positions_are_measured(tmp_path, tokenizer):
    from transformers import SmolLM3Config

    config = SmolLM3Config(
        **_SHAPE, num_hidden_layers=4, num_key_value_heads=2, intermediate_size=44, no_rope_layer_interval=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    rows = replay(ModelCheckpoints({0: made(config)}, tokenizer), tmp_path)
    assert float(rows["sad/score_error"].max()) < 1e-5


# ---- numbers beyond the range of a dtype


def test_scores_beyond_float16_are_a_failed_checkpoint_and_fine_in_float32(tmp_path, tokenizer):
    config = GPTNeoXConfig(**_SHAPE, num_hidden_layers=3, intermediate_size=44)
    large, small = made(config), made(config, seed=1)
    with torch.no_grad():
        large.gpt_neox.layers[1].attention.query_key_value.weight *= 2000
    source = ModelCheckpoints({0: small, 1: large, 2: made(config, seed=2)}, tokenizer)
    rows = replay(source, tmp_path / "half", model=CheckpointReplay(dtype="float16"))
    assert rows["step"].values.tolist() == [0, 2]
    (error,) = failures(tmp_path / "half").values()
    assert "layer 1 overflow" in error
    assert "beyond the range of float16 (6.55e+04)" in error
    assert replay(source, tmp_path / "single")["step"].values.tolist() == [0, 1, 2]


def test_a_checkpoint_that_fails_midway_leaves_nothing_in_the_rows_of_others(suite, tmp_path, monkeypatch):
    """The batch before has been measured by then; what callbacks keep of it is forgotten."""
    whole = replay(FolderCheckpoints(str(suite)), tmp_path / "whole")
    observe, seen = HeadSpace.observe, []

    def failing(self, tokens, query):
        seen.append(len(tokens))
        if len(seen) == 4 + 4 + 1 + 1 + 2:  # each checkpoint is run on 4 prompts first, then on three batches
            raise CheckpointError("the scores of layer 0 overflow")
        return observe(self, tokens, query)

    monkeypatch.setattr(HeadSpace, "observe", failing)
    rows = replay(FolderCheckpoints(str(suite)), tmp_path / "run")
    (step,) = failures(tmp_path / "run")
    assert rows["step"].values.tolist() == [s for s in STEPS if s != step]
    for name in whole.data_vars:
        np.testing.assert_array_equal(rows[name], whole[name].sel(step=rows["step"]), err_msg=str(name))


# ---- the bridge against plain transformers


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_the_errors_of_logits_and_scores_are_in_the_ledger(suite, tmp_path, processing, dtype):
    rows = replay(FolderCheckpoints(str(suite), steps=[0, 8]), tmp_path, model=CheckpointReplay(processing, dtype))
    eps = torch.finfo(getattr(torch, dtype)).eps
    for entry, worst in zip(Ledger(tmp_path).entries(), rows["sad/score_error"].max(("layer", "head")), strict=True):
        assert 0 <= entry.logit_error < max(1e-4, 32 * eps)
        assert 0 < entry.score_error < max(1e-4, 8 * eps)
        assert entry.score_error == pytest.approx(float(worst))


def test_a_bridge_that_computes_something_else_is_a_failed_checkpoint(suite, tmp_path, monkeypatch):
    def wrong(model, *, processing):
        if processing == "folded":
            with torch.no_grad():
                model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.mul_(1.5)
        return make_bridge(model, processing=processing)

    monkeypatch.setattr(model_file, "make_bridge", wrong)
    assert replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path / "folded") is None
    (error,) = failures(tmp_path / "folded").values()
    assert "TransformerLens computes other logits than transformers does" in error
    assert "processing=raw" in error
    raw = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path / "raw", model=CheckpointReplay("raw"))
    assert raw.sizes["step"] == 1


def test_a_normalization_that_the_library_does_not_fold_is_folded_where_weights_are_read(tmp_path, tokenizer):
    """That of Nemotron multiplies by 1 + weight."""
    config = NemotronConfig(
        **_SHAPE, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=44, partial_rotary_factor=0.4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    source = ModelCheckpoints({0: made(config)}, tokenizer)
    rows = {mode: replay(source, tmp_path / mode, model=CheckpointReplay(mode)) for mode in ("folded", "raw")}
    np.testing.assert_allclose(rows["folded"]["prompt/attention"], rows["raw"]["prompt/attention"], rtol=1e-4)
    assert not np.allclose(rows["folded"]["sad/sparseness"], rows["raw"]["sad/sparseness"], rtol=1e-3)
    heads = AttentionHeads.from_bridge(make_bridge(made(config), processing="folded"))
    attention, norm = made(config).model.layers[1].self_attn, made(config).model.layers[1].input_layernorm
    W = attention.q_proj.weight.view(4, 10, 40) * (1 + norm.weight)
    torch.testing.assert_close(heads.W_Q[1], W - W.mean(-1, keepdim=True))
    torch.testing.assert_close(heads.b_Q[1], (attention.q_proj.weight @ norm.bias).view(4, 10), rtol=1e-4, atol=1e-5)


def test_weights_folded_where_they_are_read_are_those_that_the_library_folds():
    for family in ("gpt2", "gpt_neox", "llama", "gemma2"):
        theirs = AttentionHeads.from_bridge(bridge(family))
        ours = make_bridge(random_model(family), processing="raw")
        fold_when_read(ours)
        for name in ("W_Q", "W_K", "b_Q", "b_K"):
            expected, found = (getattr(heads, name) for heads in (theirs, AttentionHeads.from_bridge(ours)))
            assert (expected is None) == (found is None)
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        check_folded(bridge(family), torch.arange(9)[None])


# ---- checkpoints that are another model


def test_a_checkpoint_of_another_shape_fails_and_the_others_go_on(own_suite, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(own_suite / "step2").config
    config.intermediate_size += 8
    made(config).save_pretrained(own_suite / "step2")
    rows = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    assert rows["step"].values.tolist() == [0, 1, 4, 8]
    assert "is another model than step 0" in failures(tmp_path / "run")[2]
    again = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")  # and it is known from the ledger
    assert again["step"].values.tolist() == [0, 1, 4, 8]


def test_a_checkpoint_of_another_kind_of_model_fails_and_the_others_go_on(own_suite, tmp_path):
    config = json.loads((own_suite / "step4" / "config.json").read_text())
    (own_suite / "step4" / "config.json").write_text(
        json.dumps(config | {"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    rows = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    assert rows["step"].values.tolist() == [0, 1, 2, 8]
    assert "not a causal language model" in failures(tmp_path / "run")[4]


@pytest.mark.parametrize("same_words", [True, False])
def test_a_checkpoint_with_another_tokenizer_fails_if_it_reads_the_prompts_otherwise(own_suite, tmp_path, same_words):
    path = own_suite / "step2" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    if same_words:
        path.write_text(json.dumps(content, indent=7))
    else:
        names = sorted(words)
        words |= dict(zip(names[50:], [words[name] for name in [*names[51:], names[50]]], strict=True))
        path.write_text(json.dumps(content))
    rows = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    assert rows["step"].values.tolist() == ([0, 1, 2, 4, 8] if same_words else [0, 1, 4, 8])
    if not same_words:
        assert "step2 has another tokenizer" in failures(tmp_path / "run")[2]


def test_a_model_that_is_not_all_in_memory_says_so(tmp_path, tokenizer):
    with torch.device("meta"):
        absent = AutoModelForCausalLM.from_config(GPTNeoXConfig(**_SHAPE, num_hidden_layers=1, intermediate_size=44))
    config = GPTNeoXConfig(**_SHAPE, num_hidden_layers=1, intermediate_size=44)
    rows = replay(ModelCheckpoints({0: made(config), 1: absent}, tokenizer), tmp_path)
    assert rows["step"].values.tolist() == [0]
    assert "not in memory" in failures(tmp_path)[1]


# ---- checkpoints that are flagged


@pytest.fixture
def flagged(own_suite, tmp_path):
    """A replay in which step 2 has the weights of the last step."""
    shutil.rmtree(own_suite / "step2")
    shutil.copytree(own_suite / "step8", own_suite / "step2")
    replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    return tmp_path / "run"


def test_flagged_checkpoints_are_stored_and_left_out_of_what_is_shown(flagged):
    assert open_trajectory(flagged)["step"].values.tolist() == STEPS  # everything that was captured
    shown = open_sound(flagged)
    assert shown["step"].values.tolist() == [0, 1, 4, 8]
    reason = "has the weights of step 8, the last one, bit for bit"
    assert shown.attrs["left_out"] == {2: reason}
    assert json.loads((flagged / "ledger" / "flagged.json").read_text()) == {"2": reason}
    assert "without 1 checkpoint" in sizes_in_words(shown)
    page = write_run_page(flagged).read_text()
    assert reason in page
    assert "Checkpoints that no curve and no figure shows: 1." in page


def test_the_summary_is_of_the_last_checkpoint_that_is_not_flagged(own_suite, tmp_path):
    shutil.rmtree(own_suite / "step8")
    shutil.copytree(own_suite / "step0", own_suite / "step8")
    rows = replay(FolderCheckpoints(str(own_suite)), tmp_path / "run")
    assert list(Ledger(tmp_path / "run").flagged()) == [0]  # of a group, the last weights are believed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["sad/accuracy"]["mean"] == pytest.approx(float(rows["sad/accuracy"].sel(step=8)))


def test_strict_fails_and_names_the_steps(own_suite, typed, command):
    shutil.rmtree(own_suite / "step2")
    shutil.copytree(own_suite / "step8", own_suite / "step2")
    options = [
        "replay", "--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={own_suite}",
        "--data.n_prompts=5", "--trainer.logger=false", "--report=false", "--run_dir=here",
    ]  # fmt: skip
    loose = typed(*options)
    assert loose.returncode == 0, loose.stderr
    assert "step 2 has the weights of step 8, the last one, bit for bit" in loose.stdout
    strict = typed(*options, "--data.strict=true")
    assert strict.returncode == 1
    assert "these steps are flagged: 2" in strict.stderr


def test_a_damaged_fingerprint_says_what_to_do(flagged):
    path = flagged / "ledger" / "step4.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": {"tensors": {}, "sample": "AAAA"}}))
    with pytest.raises(InputError, match="Fix: delete the folder"):
        Ledger(flagged).flagged()


def test_tolerances_are_those_that_the_documentation_gives():
    assert observed_file._TOLERANCE[torch.float32] == model_file._LOGIT_TOLERANCE == 1e-4
