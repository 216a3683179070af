"""AttentionOverWords against a language model's own attention and scores."""

import numpy as np
import pytest
import torch
from helpers.models import random_model
from helpers.probes import parts
from helpers.replays import replay
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.callbacks import AttentionOverWords
from svf_lightning.errors import InputError
from svf_lightning.replay import FolderCheckpoints, ModelCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge


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


def test_a_module_that_does_not_tell_about_all_keys_is_left_out():
    callback = AttentionOverWords()
    (probe,) = parts(1)
    callback.observe(probe)
    assert callback.measure(probe) == {}


@pytest.mark.parametrize("options", [{"n_prompts": 0}, {"n_top": 0}, {"max_words": 0}])
def test_options_out_of_range_are_input_errors(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=0.*>= 1"):
        AttentionOverWords(**options)


def test_its_options_are_its_arguments():
    assert AttentionOverWords().options() == {"n_prompts": 4, "n_top": 4, "max_words": 64}
    assert AttentionOverWords(3, max_words=9).options() == {"n_prompts": 3, "n_top": 4, "max_words": 9}
