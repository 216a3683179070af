"""Tasks beside IOI, and prompts of one's own in all the forms that a file can give them."""

import json

import numpy as np
import pytest
import torch
from helpers.replays import replay
from transformers import AutoTokenizer

from svf_lightning.errors import InputError
from svf_lightning.replay import FolderCheckpoints, ReplayData, TinySuite, read_prompts
from svf_lightning.replay.prompts import PromptBatch
from svf_lightning.replay.suite import SuiteSettings, SuiteText, suite_tokenizer, train_suite
from svf_lightning.replay.tasks import TASKS, Task, TaskPrompt, find_task, task_prompts


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows every word and every pair of digits as one token, as GPT-2's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = Regex(r" ?[A-Za-z]+|\d{2}|[^\w\s]| |\n")
    texts = []
    for task in TASKS.values():
        rng = np.random.default_rng(0)
        for drawn, _ in zip(task().draw(rng, list), range(400), strict=False):
            texts += [drawn.text, drawn.text + drawn.correct, drawn.text + drawn.wrong]
    import re

    found = sorted({piece for text in texts for piece in re.findall(r" ?[A-Za-z]+|\d{2}|\d|[^\w\s]| |\n", text)})
    pairs = [f"{n:02}" for n in range(100)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<eos>", "<unk>", *pairs, *found]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_makes_distinct_prompts_whose_tokens_are_the_characters_that_it_names(words, name):
    prompts = task_prompts(find_task(name), words, 60, seed=3)
    assert len(set(prompts)) == 60
    assert prompts == task_prompts(find_task(name), words, 60, seed=3)
    assert prompts != task_prompts(find_task(name), words, 60, seed=4)
    templates = np.unique([prompt.template for prompt in prompts], return_counts=True)[1]
    assert len(templates) >= 5
    assert templates.min() >= 60 // len(templates) // 2
    for prompt in prompts:
        assert prompt.query == len(prompt.tokens) - 1
        assert 0 < prompt.key < prompt.query
        assert prompt.correct != prompt.wrong
        assert words.unk_token_id not in (*prompt.tokens, prompt.correct, prompt.wrong)


def test_induction_goes_on_with_what_followed_the_last_word_before(words):
    for prompt in task_prompts(find_task("induction"), words, 40):
        last = prompt.tokens[prompt.query]
        (before,) = [i for i, token in enumerate(prompt.tokens[:-1]) if token == last]
        assert prompt.key == before + 1
        assert prompt.tokens[prompt.key] == prompt.correct
        assert prompt.wrong in prompt.tokens


def test_years_end_after_they_begin(words):
    for prompt in task_prompts(find_task("greater_than"), words, 40):
        year, right, wrong = (
            int(words.decode([token])) for token in (prompt.tokens[prompt.key], prompt.correct, prompt.wrong)
        )
        assert wrong < year < right
        century = words.decode([prompt.tokens[prompt.query]])
        assert prompt.text.endswith(century)
        assert f"{century}{year}" in prompt.text


def test_a_docstring_goes_on_with_the_third_argument(words):
    for prompt in task_prompts(find_task("docstring"), words, 40):
        arguments = [word.strip() for word in prompt.text.split("(self,")[1].split(")")[0].split(",")]
        assert words.decode([prompt.correct]).strip() == arguments[2]
        assert words.decode([prompt.wrong]).strip() == arguments[3]
        assert words.decode([prompt.tokens[prompt.key]]).strip() == arguments[2]


def test_a_tokenizer_that_cuts_otherwise_is_told_what_was_in_the_way():
    for name in ("greater_than", "docstring"):
        with pytest.raises(InputError, match=r"makes 0 of 4 distinct prompts with this tokenizer \(.*Fix:") as error:
            task_prompts(find_task(name), suite_tokenizer(), 4)
        assert "\n" not in str(error.value)


class Colours(Task):
    """One of the user's own."""

    def draw(self, rng, usable):
        names = usable(["Mary", "John", "Emma", "Frank"])
        while True:
            for name in rng.permutation(names):
                other = "John" if name != "John" else "Mary"
                text = f"Then, {name} went to the store and"
                yield TaskPrompt(text, (6, 6 + len(name)), f" {name}", f" {other}", 0)


def test_a_task_of_ones_own_is_named_by_its_import_path():
    task = find_task(f"{__name__}.Colours") if _is_importable() else Colours()
    prompts = task_prompts(task, suite_tokenizer(), 3)
    assert {prompt.text.split()[1] for prompt in prompts} <= {"Mary", "John", "Emma", "Frank"}
    with pytest.raises(InputError, match=r"makes 4 of 5 distinct prompts"):
        task_prompts(Colours(), suite_tokenizer(), 5)


def _is_importable():
    from pydoc import locate

    return locate(f"{__name__}.Colours") is Colours


@pytest.mark.parametrize("name", ["inductoin", "os.path", "no.such.Task"])
def test_an_unknown_task_is_refused(name):
    with pytest.raises(InputError, match=r"task=.*induction"):
        find_task(name)


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_task.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot be imported") as error:
        find_task("broken_task.Mine")
    assert "\n" not in str(error.value)


def test_a_task_and_a_file_of_prompts_exclude_each_other(suite):
    with pytest.raises(InputError, match="beside a task"):
        ReplayData(FolderCheckpoints(str(suite)), prompts="mine.jsonl", task="induction")


# ---- the small suite learns a second task


def test_texts_of_the_suite_have_their_share_of_repeated_words_and_the_others_stay_as_they_were():
    plain, mixed = SuiteText(64, 5), SuiteText(64, 5, 0.4)
    sentences, texts = plain.sentences(3), mixed.sentences(3)
    changed = [(old, new) for old, new in zip(sentences, texts, strict=True) if old != new]
    assert 10 < len(changed) < 45
    for _, text in changed:
        told = text.removeprefix("The ").removesuffix(" .").split()
        assert told[: len(told) // 2] == told[len(told) // 2 :]
        assert len(set(told)) == len(told) // 2
    assert mixed.sentences(3) == texts


def test_settings_without_induction_are_those_of_earlier_versions(tmp_path):
    assert repr(SuiteSettings()) == (
        "SuiteSettings(max_steps=1536, n_layers=4, d_model=128, n_heads=4, batch_size=32, learning_rate=0.001, seed=0)"
    )
    assert "induction" not in SuiteSettings().as_json()
    assert TinySuite().identity() == {"kind": "tiny_suite", "settings": repr(SuiteSettings())}
    small = {"max_steps": 1, "n_layers": 1, "d_model": 16, "n_heads": 1, "batch_size": 2}
    assert TinySuite(settings=SuiteSettings(induction=0.4)).identity()["induction"] == "0.4"
    train_suite(tmp_path / "suite", SuiteSettings(**small, induction=0.4))
    with pytest.raises(InputError, match=r"induction=0\.4 there, None asked for"):
        train_suite(tmp_path / "suite", SuiteSettings(**small))
    with pytest.raises(InputError, match="induction"):
        SuiteSettings(induction=1.0)


def test_a_replay_of_a_task_is_named_after_it(suite, typed):
    source = ("--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}")
    few = ("--data.source.init_args.steps=[8]", "--data.n_prompts=20", "--trainer.logger=false", "--report=false")
    result = typed("replay", *source, *few, "--data.task=induction")
    assert result.returncode == 0, result.stderr
    run_dir = result.stdout.strip().splitlines()[-1]
    assert "/tiny_induction/" in run_dir


# ---- prompts of one's own


@pytest.fixture
def tokenizer(suite):
    return AutoTokenizer.from_pretrained(suite / "step0")


TEXT = "When Mary and John went to the store, John gave a drink to"


def read(tmp_path, tokenizer, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, tokenizer)


def at(tokenizer, prompt):
    return tokenizer.decode([prompt.tokens[prompt.key]]), prompt.key


@pytest.mark.parametrize(
    ("key", "word", "position"),
    [
        ("Mary", "Mary", 1),
        ({"word": "John", "occurrence": 1}, "John", 3),
        ({"word": "John", "occurrence": 2}, "John", 9),
        ({"word": "John", "occurrence": -1}, "John", 9),
        ({"span": [5, 9]}, "Mary", 1),
        ({"span": [5, 18], "part": "last"}, "John", 3),
        ({"span": [5, 18], "part": "first"}, "Mary", 1),
        ({"word": "gave a drink", "part": "last"}, None, 12),
        ({"token": 3}, "John", 3),
        ({"token": -1}, "to", 13),
    ],
)
def test_a_key_is_a_word_characters_or_a_token(tmp_path, tokenizer, key, word, position):
    (prompt,) = read(tmp_path, tokenizer, {"text": TEXT, "key": key, "correct": "Mary", "wrong": "John"})
    found, at_position = at(tokenizer, prompt)
    assert at_position == position
    assert word is None or found == word


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("John", r'occurs 2 times.*say which one: \{"word"'),
        ({"word": "John", "occurrence": 3}, r"1\.\.2"),
        ({"word": "John", "occurrence": 0}, r"1\.\.2"),
        ({"word": "gave a drink"}, r'"part": "last"'),
        ({"span": [5, 18]}, r'add "part"'),
        ({"span": [9, 5]}, "start < end"),
        ({"span": [4, 5]}, "characters that a token covers"),
        ({"token": "Mary"}, "whole number"),
        ({"name": "Mary"}, "write one of these"),
        ({"word": "Mary", "span": [5, 9]}, "write one of these"),
    ],
)
def test_a_key_that_is_not_clear_says_how_to_say_which(tmp_path, tokenizer, key, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, tokenizer, {"text": TEXT, "key": key, "correct": "Mary", "wrong": "John"})


def test_several_keys_are_several_prompts_of_one_template(tmp_path, tokenizer):
    row = {"text": TEXT, "key": ["Mary", {"token": 3}], "correct": "Mary", "wrong": "John"}
    prompts = read(tmp_path, tokenizer, row, {**row, "key": "store"})
    assert [prompt.key for prompt in prompts] == [1, 3, 7]
    assert [prompt.template for prompt in prompts] == [0, 0, -1]


def test_tokens_in_place_of_a_text(tmp_path, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    (prompt,) = read(tmp_path, tokenizer, {"tokens": ids, "key": 1, "correct": ids[1], "wrong": "John"})
    assert list(prompt.tokens) == ids
    assert (prompt.correct, prompt.wrong) == (ids[1], ids[3])
    for tokens in ([], ["a"], [len(tokenizer)], [True], 5):
        with pytest.raises(InputError, match=r"token ids|field|text"):
            read(tmp_path, tokenizer, {"tokens": tokens, "key": 0})
    with pytest.raises(InputError, match="leave one out"):
        read(tmp_path, tokenizer, {"text": TEXT, "tokens": ids, "key": 1})


def test_prompts_without_answers_measure_attention_alone(suite, tmp_path, tokenizer):
    rows = [{"text": TEXT, "key": "Mary"}, {"text": TEXT, "key": "store"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FolderCheckpoints(str(suite), steps=[8])
    found = replay(source, tmp_path / "run", prompts=str(path))
    assert np.isfinite(found["sad/sparseness"]).all()
    assert "sad/accuracy" not in found
    mixed = [*rows, {"text": TEXT, "key": "Mary", "correct": "Mary", "wrong": "John"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    found = replay(source, tmp_path / "mixed", prompts=str(path))
    assert float(found["sad/accuracy"].isel(step=0)) in (0.0, 1.0)
    assert int(np.isfinite(found["prompt/logit_difference"]).sum()) == 1


def test_a_difference_of_logits_is_none_without_answers():
    zeros = torch.zeros(2, dtype=torch.long)
    batch = PromptBatch(zeros[:, None], zeros, zeros, torch.tensor([1, -1]), torch.tensor([2, -1]), zeros + 1)
    difference = batch.logit_difference(torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]]))
    assert difference[0] == 2
    assert difference[1].isnan()


def test_answers_with_and_without_a_space_and_of_several_tokens(tmp_path, words):
    text = "The war lasted from the year 1732 to the year 17"
    key = {"span": [31, 33]}
    one, other = (words.convert_tokens_to_ids(token) for token in ("45", "18"))
    (prompt,) = read(tmp_path, words, {"text": text, "key": key, "correct": "45", "wrong": "18"})
    assert (prompt.correct, prompt.wrong) == (one, other)  # no word follows a space here
    (prompt,) = read(tmp_path, words, {"text": text, "key": key, "correct": "4533", "wrong": "1877"})
    assert (prompt.correct, prompt.wrong) == (one, other)  # of several tokens the first
    with pytest.raises(InputError, match="the first counts"):
        read(tmp_path, words, {"text": text, "key": key, "correct": "4533", "wrong": "4577"})
    text = "So Mary is a really great friend, isn't"
    (prompt,) = read(tmp_path, words, {"text": text, "key": "Mary", "correct": " she", "wrong": "he"})
    assert words.decode([prompt.correct]) == " she"
    with pytest.raises(InputError, match="add wrong"):
        read(tmp_path, words, {"text": text, "key": "Mary", "correct": "she"})
