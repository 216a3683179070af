"""The prompts of Wang et al. (2022): their templates in both orders, drawn as their code draws."""

from collections import Counter

import pytest
from helpers.replays import replay
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from svf_lightning.errors import InputError
from svf_lightning.replay import FolderCheckpoints, ReplayData
from svf_lightning.replay.ioi_wang import (
    WANG_NAMES,
    WANG_OBJECTS,
    WANG_PLACES,
    WANG_TEMPLATES,
    wang_prompts,
    wang_sentences,
)


def byte_level(words):
    """As GPT-2's: a word of the corpus and the space before it are one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(["", *words, ", .", *" ".join(WANG_TEMPLATES).split()])] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level([*WANG_NAMES, *WANG_PLACES, *WANG_OBJECTS])


def test_the_words_and_templates_are_as_many_as_in_the_published_code():
    assert len(set(WANG_NAMES)) == len(WANG_NAMES) == 99
    assert len(set(WANG_PLACES)) == len(WANG_PLACES) == 8
    assert len(set(WANG_OBJECTS)) == len(WANG_OBJECTS) == 8
    assert len(set(WANG_TEMPLATES)) == len(WANG_TEMPLATES) == 15
    for template in WANG_TEMPLATES:
        assert template.endswith(" to")
        assert template.index("{A}") < template.index("{B}") < template.index("{S}")


def test_there_are_as_many_sentences_of_each_order_and_the_order_tells_who_is_named_first():
    sentences = wang_sentences(seed=0)
    assert [s.order for s in sentences] == ["ABBA"] * 128 + ["BABA"] * 128
    for sentence in sentences:
        words = sentence.text.split()
        assert words.count(sentence.io) == 1
        assert words.count(sentence.s) == 2
        assert (words.index(sentence.io) < words.index(sentence.s)) == (sentence.order == "ABBA")
        assert words.index(sentence.io) < len(words) - 1 - words[::-1].index(sentence.s)


def test_templates_names_places_and_objects_are_drawn_uniformly_and_independently():
    sentences = wang_sentences(20_000, seed=1)
    n = len(sentences)
    for pick, kinds in ((lambda s: s.template, 15), (lambda s: s.io, 99), (lambda s: s.s, 99)):
        counts = Counter(map(pick, sentences))
        assert len(counts) == kinds
        spread = 5 * (n / kinds) ** 0.5  # of a count
        assert all(abs(count - n / kinds) < spread for count in counts.values())
    with_both = [s.text for s in sentences if s.template == 0]
    pairs = Counter((p, o) for t in with_both for p in WANG_PLACES for o in WANG_OBJECTS if p in t and f" {o} " in t)
    assert len(pairs) == 64
    assert max(pairs.values()) < len(with_both) / 64 + 5 * (len(with_both) / 64) ** 0.5


def test_the_same_seed_gives_the_same_sentences_and_another_one_others():
    assert wang_sentences(40, seed=3) == wang_sentences(40, seed=3)
    assert wang_sentences(40, seed=3) != wang_sentences(40, seed=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_per_order": 0}, "n_per_order=0 .*integer >= 1"),
        ({"seed": -1}, "seed=-1 .*integer >= 0"),
        ({"names": ["Ann"]}, "names=.*at least 2 distinct"),
        ({"objects": []}, "objects=.*at least 1 distinct"),
    ],
)
def test_unusable_arguments_are_input_errors(change, message):
    with pytest.raises(InputError, match=message):
        wang_sentences(**{"seed": 0, **change})


def test_the_last_token_asks_and_the_key_is_the_indirect_object(tokenizer):
    prompts = wang_prompts(tokenizer, 64, seed=2)
    sentences = wang_sentences(64, seed=2)
    assert [p.text for p in prompts] == [s.text for s in sentences]
    for prompt, sentence in zip(prompts, sentences, strict=True):
        words = [tokenizer.decode([token]).strip() for token in prompt.tokens]
        assert words[prompt.query] == "to"
        assert prompt.query == len(words) - 1
        assert words[prompt.key] == tokenizer.decode([prompt.correct]).strip() == sentence.io
        assert [words[i] for i in prompt.subjects] == [sentence.s] * 2
        assert tokenizer.decode([prompt.wrong]).strip() == sentence.s
        assert prompt.template == sentence.template


def test_names_that_are_several_tokens_are_left_out():
    prompts = wang_prompts(byte_level([*WANG_NAMES[:10], *WANG_PLACES, *WANG_OBJECTS]), 200)
    text = " ".join(p.text for p in prompts).split()
    assert {name for name in WANG_NAMES if name in text} <= set(WANG_NAMES[:10])


def test_too_few_single_tokens_are_an_input_error_with_counts_and_an_example():
    with pytest.raises(InputError, match=r"1 of 99 names.*8 of 8 objects are single tokens \('.*' becomes \["):
        wang_prompts(byte_level(["Michael", *WANG_PLACES, *WANG_OBJECTS]))


def test_a_replay_takes_these_prompts_by_name_as_many_of_each_order(suite, tmp_path):
    source = FolderCheckpoints(suite)
    data = ReplayData(source, prompts="ioi_wang", n_prompts=6)
    assert len(data.prompts) == 12
    expected = wang_prompts(source.tokenizer(), 6)
    assert {prompt.text for prompt in data.prompts} == {prompt.text for prompt in expected}
    rows = replay(source, tmp_path, prompts="ioi_wang", n_prompts=6)
    assert rows.sizes["prompt"] == 12
    assert rows["template/sparseness"].sizes["template"] == len({prompt.template for prompt in expected})


def test_a_misspelt_name_of_prompts_is_an_input_error_that_names_the_right_one(suite):
    with pytest.raises(InputError, match=r"prompts='ioi_wnag' .*ioi, ioi_wang, or a .*did you mean 'ioi_wang'\?"):
        _ = ReplayData(FolderCheckpoints(suite), prompts="ioi_wnag").prompts
