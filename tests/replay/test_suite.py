"""The small suite: its files, its training, its text, and what a killed or repeated training leaves."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from svf_lightning.errors import DivergedError, InputError
from svf_lightning.replay import suite as suite_module
from svf_lightning.replay.prompts import NAMES, OBJECTS, PLACES, batches, ioi_prompts, ioi_sentences
from svf_lightning.replay.suite import (
    SuiteModel,
    SuiteSettings,
    SuiteText,
    held_out,
    suite_steps,
    suite_tokenizer,
    train_suite,
)

SMALL = SuiteSettings(max_steps=24, n_layers=2, d_model=32, n_heads=2, batch_size=8, seed=3)
SMALL_STEPS = [0, 1, 2, 4, 8, 16, 24]


@pytest.fixture(autouse=True)
def _no_bars():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return train_suite(tmp_path_factory.mktemp("suites") / "small", SMALL)


def contents(folder):
    """Every file of a folder, by its path: its bytes and the time it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def same_bytes(folder, other):
    one, two = contents(folder), contents(other)
    return list(one) == list(two) and all(one[name][0] == two[name][0] for name in one)


def weights(folder, step):
    return AutoModelForCausalLM.from_pretrained(folder / f"step{step}").state_dict()


def loss_of(model, tokens, pad):
    """Next-token loss as transformers computes it."""
    return model(tokens, labels=tokens.masked_fill(tokens == pad, -100)).loss


# --- steps and files


def test_the_default_suite_has_fifteen_steps_as_pythia_has_them():
    assert suite_steps(1536) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536]


@pytest.mark.parametrize(
    ("max_steps", "last"), [(1, [0, 1]), (3, [1, 2, 3]), (512, [256, 512]), (600, [512, 600]), (1024, [512, 768, 1024])]
)
def test_the_last_step_is_always_saved_and_none_after_it(max_steps, last):
    steps = suite_steps(max_steps)
    assert steps[-len(last) :] == last
    assert steps == sorted(set(steps))


def test_there_is_a_folder_for_every_step_and_nothing_else(suite):
    assert {path.name for path in suite.iterdir()} == {"suite.json", *(f"step{step}" for step in SMALL_STEPS)}
    for step in SMALL_STEPS:
        files = {path.name for path in (suite / f"step{step}").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files


def test_the_settings_are_written_down(suite):
    written = json.loads((suite / "suite.json").read_text())
    assert written["settings"] == {**SMALL.as_json(), "learning_rate": 1e-3}
    assert written["steps"] == SMALL_STEPS
    assert {"torch", "lightning", "transformers", "tokenizers", "python"} <= set(written["versions"])


def test_the_architecture_is_that_of_pythia(suite):
    config = AutoModelForCausalLM.from_pretrained(suite / "step0").config
    assert config.model_type == "gpt_neox"
    assert config.use_parallel_residual
    assert config.attention_bias
    assert not config.tie_word_embeddings
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 2)
    assert config.intermediate_size == 4 * 32


# --- training


def test_the_saved_loss_is_that_of_the_saved_weights(suite):
    model = AutoModelForCausalLM.from_pretrained(suite / "step24")
    tokenizer = AutoTokenizer.from_pretrained(suite / "step24")
    tokens = SuiteText(SMALL.batch_size, SMALL.seed).draw(24)
    expected = json.loads((suite / "suite.json").read_text())["final_loss"]
    assert loss_of(model, tokens, tokenizer.pad_token_id).item() == pytest.approx(expected, abs=1e-5)


def test_step_0_is_the_initial_weights(suite):
    initial = SuiteModel(SMALL).model.state_dict()
    saved = weights(suite, 0)
    assert set(saved) == set(initial)
    assert all(torch.equal(saved[name], initial[name]) for name in initial)
    other = SuiteModel(replace(SMALL, seed=4)).model.state_dict()["gpt_neox.embed_in.weight"]
    assert not torch.allclose(other, initial["gpt_neox.embed_in.weight"], atol=1e-3)


def test_step_s_is_s_updates_of_a_plain_loop(suite):
    model = AutoModelForCausalLM.from_pretrained(suite / "step0").train()
    text, pad = SuiteText(SMALL.batch_size, SMALL.seed), suite_tokenizer().pad_token_id
    # the same kernels: key biases have a gradient of rounding errors only, of which Adam makes whole steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    for step in range(25):
        if step in SMALL_STEPS:
            saved = weights(suite, step)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=0, msg=f"step {step}, {name}")
        tokens = text.draw(step)
        logits, following = model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, following, ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_loss_counts_every_token_of_every_sentence_and_no_padding():
    module, tokenizer, text = SuiteModel(SMALL), suite_tokenizer(), SuiteText(5)
    tokens = text.draw(0)
    assert (tokens == tokenizer.pad_token_id).any()
    total = count = 0
    for row in tokens:
        alone = row[row != tokenizer.pad_token_id][None]  # one sentence by itself, in a batch without padding
        following = alone.shape[1] - 1
        total, count = total + module.model(alone, labels=alone).loss * following, count + following
    torch.testing.assert_close(module.loss(tokens), total / count)


def test_the_same_settings_give_the_same_files_whatever_was_drawn_before(suite, tmp_path):
    torch.manual_seed(99)
    assert same_bytes(suite, train_suite(tmp_path / "again", SMALL))


def test_another_seed_gives_another_suite(suite, tmp_path):
    train_suite(tmp_path / "other", replace(SMALL, max_steps=1, seed=4))
    for step in (0, 1):
        assert weights(suite, step).keys() == weights(tmp_path / "other", step).keys()
        name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
        assert not torch.allclose(weights(suite, step)[name], weights(tmp_path / "other", step)[name], atol=1e-3)


def test_a_shorter_suite_is_the_beginning_of_a_longer_one(suite, tmp_path):
    shorter = train_suite(tmp_path / "shorter", replace(SMALL, max_steps=8))
    for step in (0, 1, 2, 4, 8):
        assert same_bytes(shorter / f"step{step}", suite / f"step{step}")


def test_a_training_leaves_the_global_random_states_and_the_working_directory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    train_suite("here", replace(SMALL, max_steps=2))
    SuiteModel(SuiteSettings(n_layers=1, d_model=16, n_heads=2))
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(one, two) for one, two in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_training_that_diverges_leaves_no_suite(tmp_path):
    with pytest.raises(DivergedError, match=r"loss is nan .*Fix: lower learning_rate"):
        train_suite(tmp_path / "suite", replace(SMALL, max_steps=3, learning_rate=1e38))
    assert list(tmp_path.iterdir()) == []


# --- text


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    first = [SuiteText(8, 3).draw(step) for step in range(4)]
    torch.manual_seed(0), np.random.seed(0)  # noqa: NPY002
    text = SuiteText(8, 3)
    backwards = [text.draw(step) for step in (3, 2, 1, 0)][::-1]
    assert all(torch.equal(one, two) for one, two in zip(first, backwards, strict=True))
    assert [torch.equal(batch, next_) for batch, next_ in zip(text.train_dataloader(), first, strict=False)] == [
        True
    ] * 4
    different = [SuiteText(8, 4).draw(0), *first]
    assert len({tuple(batch.flatten().tolist()) for batch in different}) == 5
    assert not set(SuiteText(8, 3).sentences(0)) & set(SuiteText(8, 4).sentences(0))


def test_a_training_that_goes_on_sees_the_draw_of_its_step():
    text = SuiteText(8, 3)
    text.trainer = type("Trainer", (), {"global_step": 7})()
    assert torch.equal(next(iter(text.train_dataloader())), SuiteText(8, 3).draw(7))


def test_sentences_end_with_the_indirect_object():
    for sentence in SuiteText(64, 1).sentences(2):
        *story, answer = re.findall(r"\w+", sentence)
        named = [word for word in story if word in NAMES]
        assert sorted(map(named.count, set(named))) == [1, 2]
        assert named.count(answer) == 1
        assert sentence.endswith(f" {answer}.")


def test_a_row_is_a_sentence_and_an_end_and_every_second_begins_with_one():
    text, tokenizer = SuiteText(64, 1), suite_tokenizer()
    begins = {"ABBA": [], "BABA": []}
    for step in range(20):
        for row, sentence in zip(text.draw(step), text.sentences(step), strict=True):
            ids = row[row != tokenizer.pad_token_id].tolist()
            begin = ids[0] == tokenizer.eos_token_id
            assert ids[begin:] == [*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]
            assert row[len(ids) :].eq(tokenizer.pad_token_id).all()
            named = [word for word in re.findall(r"\w+", sentence) if word in NAMES]
            begins["ABBA" if named[0] == named[-1] else "BABA"].append(begin)
    for order, share in {order: np.mean(values) for order, values in begins.items()}.items():
        assert share == pytest.approx(0.5, abs=0.1), order  # about 4 standard errors


def test_held_out_pairs_are_never_trained_on_and_every_name_is():
    pairs, text = set(), SuiteText(64, 0)
    for step in range(200):
        for sentence in text.sentences(step):
            named = [word for word in re.findall(r"\w+", sentence) if word in NAMES]
            pairs.add(frozenset(named))
    assert not any(held_out(*pair) for pair in pairs)
    possible = [(one, two) for i, one in enumerate(NAMES) for two in NAMES[:i]]
    share = np.mean([held_out(*pair) for pair in possible])
    assert share == pytest.approx(1 / 8, abs=0.01)
    assert len(pairs) > 0.85 * len(possible) * (1 - share)  # so what is missing is missing by intent
    partners = [sum(name in pair for pair in possible if held_out(*pair)) for name in NAMES]
    assert min(partners) >= 8
    assert max(partners) <= 12
    assert all(held_out(one, two) == held_out(two, one) for one, two in possible)


def test_a_batch_is_filled_although_pairs_are_held_out(monkeypatch):
    monkeypatch.setattr(suite_module, "_HELD_OUT", 1)  # everything
    calls = []

    def sentences(n, *, seed):
        calls.append(seed)
        monkeypatch.setattr(suite_module, "_HELD_OUT", 8 if len(calls) > 2 else 1)
        return ioi_sentences(n, seed=seed)

    monkeypatch.setattr(suite_module, "ioi_sentences", sentences)
    assert len(set(SuiteText(16).sentences(0))) == 16
    assert len(set(calls)) == len(calls) == 3


# --- tokenizer


def test_the_tokenizer_that_is_saved_is_the_one_of_the_training(suite):
    sentences = SuiteText(64).sentences(0)
    expected = [suite_tokenizer()(sentence)["input_ids"] for sentence in sentences]
    for step in (0, 24):
        tokenizer = AutoTokenizer.from_pretrained(suite / f"step{step}")
        assert [tokenizer(sentence)["input_ids"] for sentence in sentences] == expected
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        assert tokenizer.bos_token_id == 0
        assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(suite / f"step{step}").config.vocab_size


def test_every_sentence_survives_the_tokenizer():
    tokenizer = suite_tokenizer()
    for sentence, *_ in ioi_sentences(200, seed=5):
        ids = tokenizer(sentence)["input_ids"]
        assert tokenizer.decode(ids) == sentence
        assert not {0, 1, 2} & set(ids)
        assert len(ids) == len(re.findall(r"\w+|[,.]", sentence))


def test_every_name_place_and_object_is_one_token_of_its_own():
    tokenizer = suite_tokenizer()
    words = [*NAMES, *PLACES, *OBJECTS]
    ids = [tokenizer(word)["input_ids"] for word in words]
    assert all(len(found) == 1 and found[0] > 2 for found in ids)
    assert len({found[0] for found in ids}) == len(words)
    assert [tokenizer.decode(found) for found in ids] == words


def test_the_vocabulary_is_used_up_by_the_sentences():
    tokenizer = suite_tokenizer()
    seen = {token for sentence, *_ in ioi_sentences(4000, seed=0) for token in tokenizer(sentence)["input_ids"]}
    assert seen | {0, 1, 2} == set(range(len(tokenizer)))


def test_an_unknown_word_is_unknown_and_not_dropped():
    tokenizer = suite_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("Mary and Zebulon, too")["input_ids"]) == [
        "Mary", "and", "<unk>", ",", "<unk>",
    ]  # fmt: skip


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_the_prompts_of_a_replay_are_made_of_all_names(prepend_bos):
    tokenizer = suite_tokenizer()
    prompts = ioi_prompts(tokenizer, 1024, seed=9, prepend_bos=prepend_bos)
    assert {tokenizer.decode([prompt.correct]) for prompt in prompts} == set(NAMES)
    assert all(prompt.tokens[prompt.key] == prompt.correct for prompt in prompts)
    assert max(len(prompt.tokens) for prompt in prompts) <= 31


# --- a folder that is there already


def test_a_second_call_does_not_train(suite, monkeypatch):
    before = contents(suite)
    monkeypatch.setattr(suite_module, "_train", None)
    assert train_suite(str(suite), SMALL) == suite
    assert contents(suite) == before


def test_other_settings_are_refused_and_named(suite):
    before = contents(suite)
    with pytest.raises(
        InputError, match=r"seed=3 there, 4 asked for.*Fix: ask for the same settings, or choose another"
    ):
        train_suite(suite, replace(SMALL, seed=4))
    with pytest.raises(InputError) as caught:
        train_suite(suite, replace(SMALL, max_steps=8, learning_rate=2e-3))
    assert "max_steps=24 there, 8 asked for; learning_rate=0.001 there, 0.002 asked for" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert contents(suite) == before


def test_a_suite_of_other_sentences_is_refused(suite, monkeypatch):
    monkeypatch.setattr(suite_module, "PLACES", (*PLACES, "moon"))
    with pytest.raises(InputError, match="other sentences"):
        train_suite(suite, SMALL)


def test_a_folder_with_foreign_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis.*no suite\.json.*Fix: choose another folder"):
        train_suite(tmp_path / "thesis", SMALL)
    with pytest.raises(InputError, match=r"this is a file.*Fix: choose another folder"):
        train_suite(tmp_path / "thesis" / "chapter.txt", SMALL)
    with pytest.raises(InputError, match=r"cannot be made.*Fix: choose another folder"):
        train_suite(tmp_path / "thesis" / "chapter.txt" / "suite", SMALL)
    assert list(contents(tmp_path)) == ["thesis/chapter.txt"]


@pytest.mark.parametrize("missing", ["step4", "step0/model.safetensors", "step24/tokenizer.json"])
def test_a_suite_with_a_part_missing_is_refused_and_kept(suite, tmp_path, missing):
    copy = shutil.copytree(suite, tmp_path / "copy")
    shutil.rmtree(copy / missing) if (copy / missing).is_dir() else (copy / missing).unlink()
    before = contents(copy)
    with pytest.raises(InputError, match=rf"{missing}.* is missing.*Fix: delete the folder"):
        train_suite(copy, SMALL)
    assert contents(copy) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": 3, "text": ""}', "\udcff"])
def test_a_broken_list_of_settings_is_refused(suite, tmp_path, text):
    copy = shutil.copytree(suite, tmp_path / "copy")
    (copy / "suite.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=r"suite\.json cannot be read.*Fix: delete it"):
        train_suite(copy, SMALL)


def test_an_empty_folder_and_a_link_to_one_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert train_suite(tmp_path / "link", replace(SMALL, max_steps=1)) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert weights(tmp_path / "empty", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}


def test_of_two_trainings_at_once_the_first_to_finish_stays(suite, tmp_path, monkeypatch):
    train, target = suite_module._train, tmp_path / "suite"

    def overtaken(*arguments):
        shutil.copytree(suite, target)
        return train(*arguments)

    monkeypatch.setattr(suite_module, "_train", overtaken)
    inodes = []
    monkeypatch.setattr(suite_module, "say", lambda line: inodes.append((target / "suite.json").exists()))
    assert train_suite(target, SMALL) == target
    assert inodes == [False, True]
    assert same_bytes(target, suite)
    assert [path.name for path in tmp_path.iterdir()] == ["suite"]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_steps", 0, ">= 1"),
        ("max_steps", 2.5, "an integer"),
        ("n_layers", 0, ">= 1"),
        ("n_heads", True, "an integer"),
        ("batch_size", -1, ">= 1"),
        ("seed", -1, ">= 0"),
        ("d_model", 24, "a multiple of 8 \\* n_heads = 16"),
        ("learning_rate", 0.0, "a finite number > 0"),
        ("learning_rate", float("nan"), "a finite number > 0"),
        ("learning_rate", "fast", "a finite number > 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, allowed):
    with pytest.raises(InputError, match=rf"{name}=.*{allowed}.*Fix: change {name}"):
        SuiteSettings(**{**asdict(SMALL), name: value})


# --- a training that ends early


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch, error):
    draw = SuiteText.draw

    def interrupted(self, step):
        if step == 9:
            (draft,) = tmp_path.iterdir()
            assert (draft / "step8" / "model.safetensors").is_file()
            raise error
        return draw(self, step)

    monkeypatch.setattr(SuiteText, "draw", interrupted)
    handler, state = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    with pytest.raises(error):
        train_suite(tmp_path / "suite", SMALL)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys
from svf_lightning.replay.suite import SuiteSettings, train_suite
small = dict(n_layers=2, d_model=32, n_heads=2, batch_size=8, seed=3)
train_suite("whole", SuiteSettings(max_steps=24, **small))
train_suite("killed", SuiteSettings(max_steps=10**6, **small))
"""


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """A program that trains a suite, and is killed in the next: its folder, stdout, and lines on stderr."""
    folder = tmp_path_factory.mktemp("terminal")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 240  # a busy machine imports for a long time
    while not list(folder.glob(".killed.*/step32/config.json")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    output, errors = process.communicate()
    return folder, output, errors.splitlines()


def test_a_killed_training_leaves_nothing_that_looks_whole_and_the_next_one_works(suite, terminal):
    folder, _, _ = terminal
    (left,) = (path for path in folder.iterdir() if path.name != "whole")
    assert left.name.startswith(".killed.")
    assert (left / "step32").is_dir()
    assert not (left / "suite.json").exists()
    train_suite(folder / "killed", SMALL)
    assert same_bytes(folder / "killed", suite)
    assert {path.name for path in folder.iterdir()} == {"whole", "killed", left.name}


def test_the_terminal_shows_one_line_at_the_start_and_one_at_the_end(suite, terminal):
    folder, output, errors = terminal
    assert output == ""
    began, ended, began_again = errors
    assert began == "svf-lightning: training a small GPT-NeoX suite, 24 steps, for whole"
    assert re.fullmatch(r"svf-lightning: the suite is trained: \d+ s, loss \d\.\d+", ended)
    assert began_again.startswith("svf-lightning: training")
    assert same_bytes(folder / "whole", suite)


# --- the task


def measure(folder, step, prompts):
    """Shares of prompts where IO is above S, and where it is the most probable token; attention on IO and S1, by head."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"step{step}", attn_implementation="eager").eval()
    (batch,) = batches(prompts, len(prompts), pad=model.config.pad_token_id)
    rows = torch.arange(len(batch))
    with torch.no_grad():
        result = model(batch.tokens, output_attentions=True)
    logits = result.logits[rows, batch.query]
    above = logits[rows, batch.correct] > logits[rows, batch.wrong]
    first = torch.tensor([prompt.subjects[0] for prompt in prompts])
    on_io, on_s = (
        torch.stack([layer[rows, :, batch.query, key].mean(0) for layer in result.attentions])
        for key in (batch.key, first)
    )
    return above.float().mean().item(), (logits.argmax(-1) == batch.correct).float().mean().item(), on_io, on_s


def test_the_untrained_model_guesses(suite):
    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    above, best, on_io, _ = measure(suite, 0, ioi_prompts(tokenizer, 1024, seed=77))
    assert above == pytest.approx(0.5, abs=0.08)  # 5 standard errors
    assert best < 0.05
    assert on_io.max() < 0.15


@pytest.mark.slow
def test_the_full_suite_learns_the_task_and_has_a_head_that_attends_to_the_answer(tmp_path):
    folder = train_suite(
        tmp_path / "suite", SuiteSettings(seed=3)
    )  # heads of other seeds may attend to both names alike
    tokenizer = AutoTokenizer.from_pretrained(folder / "step1536")
    for prepend_bos in (None, True):
        prompts = ioi_prompts(tokenizer, 1024, seed=12345, prepend_bos=prepend_bos)
        names = [(tokenizer.decode([prompt.correct]), tokenizer.decode([prompt.wrong])) for prompt in prompts]
        new = [prompt for prompt, pair in zip(prompts, names, strict=True) if held_out(*pair)]
        assert len(new) > 90
        for some in (prompts[:128], new):
            above, best, on_io, on_s = measure(folder, 1536, some)
            assert above >= 0.98
            assert best >= 0.98
            head = on_io.argmax()
            assert on_io.flatten()[head] >= 0.5
            assert on_io.flatten()[head] > 2 * on_s.flatten()[head]  # it tells the names apart
    above, best, _, _ = measure(folder, 0, prompts)
    assert above == pytest.approx(0.5, abs=0.08)
    assert best < 0.05
