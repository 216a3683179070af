"""Prompts whose asking token, attended token and right answer are known, for measuring attention heads.

The built-in ones are of indirect object identification (IOI; Wang et al. 2022, arXiv 2211.00593): after "When Mary and
John went to the store, John gave a drink to", the next token is " Mary", the indirect object (IO), and not " John", the
subject (S). The last token asks, and heads that move the name attend to the token of IO.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import InputError, bad_value, closest, reason, shortened
from svf_lightning.replay.tokens import (
    Encoding,
    answer_after_space,
    answer_token,
    encode,
    spans_of,
    token_at,
    token_of,
    tokens_at,
)
from svf_lightning.terminal import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Each of them is a single token after a space for GPT-2 and SmolLM2. The objects follow "a", not "an".
_NAMES = (
    "Aaron Adam Alice Amanda Amy Andrew Angela Anna Anthony Arthur Ashley Benjamin Brian Carl Caroline Charles Chris "
    "Christine Claire Daniel David Diana Edward Elizabeth Emily Emma Eric Frank George Helen Henry Jack Jacob James "
    "Jane Jason Jeff Jennifer Jessica Joe John Jonathan Joseph Joshua Julia Justin Karen Kate Kevin Laura Linda Lisa "
    "Lucy Margaret Maria Martin Mary Matthew Michael Michelle Nancy Nicholas Oliver Patrick Paul Peter Rachel Rebecca "
    "Richard Robert Ruth Ryan Samuel Sarah Simon Stephen Steven Susan Thomas Victoria Walter William"
)
_PLACES = (
    "airport bank beach castle church cinema factory farm garden harbor hospital hotel house library market museum "
    "office park restaurant school station store studio theater"
)
_OBJECTS = (
    "bag ball basket book bottle box camera card coat coin computer cup drink flower guitar hat jacket key lamp letter "
    "map necklace newspaper phone photo ring sandwich snack stone ticket toy watch"
)
NAMES = tuple(_NAMES.split())
PLACES = tuple(_PLACES.split())
OBJECTS = tuple(_OBJECTS.split())

# Each has one place and one object, so every template allows equally many sentences. Names follow a space and stand
# before one, so they are the same token at every mention.
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} went to the {place}, and {S} gave a {object} to",
    "After {A} and {B} had a long talk at the {place}, {S} decided to give a {object} to",
    "While {A} and {B} were working at the {place}, {S} handed a {object} to",
    "Yesterday {A} met {B} near the {place}, where {S} showed a {object} to",
    "The {place} was quiet when {A} and {B} arrived, and soon {S} passed a {object} to",
    "As soon as {A} and {B} got to the {place}, {S} offered a {object} to",
    "At the {place} there was a {object} that {A} and {B} liked, so {S} handed it to",
    "Because {A} and {B} had found a {object} near the {place}, {S} showed it to",
    "Last week, when {A} was walking with {B} to the {place}, {S} sold a {object} to",
    "On a cold morning {A} saw {B} outside the {place} and {S} brought a {object} to",
    "There was a {object} for sale at the {place}, and {A} and {B} looked at it until {S} bought it and gave it to",
    "Before {A} and {B} left the {place}, {S} wanted to give a {object} to",
    "It was late, but {A} stayed with {B} at the {place}, and in the end {S} sent out for a {object} and gave it to",
    "Last summer {A} and {B} bought a {object} near the {place}. At the end of the trip {S} gave it to",
    "Everyone at the {place} knew that {A} and {B} were friends, so nobody was surprised when {S} gave a {object} to",
)

_OWN_PROMPTS = "give prompts of your own in a .jsonl or .csv file (`read_prompts`)"
_FIELDS = ("text", "query", "key", "correct", "wrong", "template", "counterfactual", "tokens")
_NO_ANSWER = _NO_KEY = -1
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # names of a context window
_THIRD_NAMES = 1  # key of their draws
PROMPT_FILES = (".jsonl", ".csv")
_MAX_BYTES = 16 << 20  # of a file: every prompt is kept in memory, with its scores


@dataclass(frozen=True)
class Prompt:
    """A text, the two positions that an attention head connects, and the two next tokens to tell apart.

    Args:
        text: The text as it was tokenized.
        tokens: Token ids, special tokens included.
        query: Position of the asking token, in 0..len(tokens) - 1.
        key: Position of the attended token, in 0..query; -1 for none, as where every pair of tokens is looked at that a
            head attends to (Firings).
        correct: Id of the right next token; -1 for none, as where attention alone is measured.
        wrong: Id of the wrong next token; -1 for none.
        subjects: IOI only: positions of both mentions of S.
        spans: Characters [start, end) of the text that each token covers, without white space; (0, 0) for a token that
            the tokenizer adds. Empty if not known.
        template: Number of the sentence that it was made from, which it shares with others; -1 for one of its own.
            Intervals are over templates, as prompts of one template are no independent sample.
        counterfactuals: Names and token ids of other prompts to take inputs of heads from, each as long as this one.
            IOI has "swapped", where IO and S have changed places at every mention, and "abc", where the second mention
            of S is another name, so that no name is the answer.

    Raises:
        InputError: The positions are out of range, the key comes after the query, or a counterfactual has another
            number of tokens.
    """

    text: str
    tokens: tuple[int, ...]
    query: int
    key: int
    correct: int = _NO_ANSWER
    wrong: int = _NO_ANSWER
    subjects: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    template: int = dataclasses.field(default=-1, compare=False)
    counterfactuals: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not min(self.key, 0) >= _NO_KEY or not self.key <= self.query < len(self.tokens):
            raise bad_value(
                "(key, query)",
                (self.key, self.query),
                f"0 <= key <= query <= {len(self.tokens) - 1}, or -1 for no key",
                "count positions from 0, special tokens included; a causal model sees no later token",
            )
        for name, ids in self.counterfactuals:
            if len(ids) != len(self.tokens):
                allowed = f"{len(self.tokens)} tokens, as the prompt"
                raise bad_value(f"counterfactual {name!r}", f"{len(ids)} tokens", allowed, "change words alone")


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one batch, int64, padded on the right: a causal model's query never sees what comes after it.

    Args:
        tokens: Token ids; n is the length of the batch's longest prompt.
        query: Positions of the asking tokens.
        key: Positions of the attended tokens; -1 for none.
        correct: Ids of the right next tokens; -1 for none.
        wrong: Ids of the wrong next tokens; -1 for none.
        length: Number of tokens of each prompt; what comes after them is padding.
        counterfactuals: Token ids of other prompts by name, if all of these have one of that name.
    """

    tokens: Int[Tensor, "batch n"]
    query: Int[Tensor, "batch"]
    key: Int[Tensor, "batch"]
    correct: Int[Tensor, "batch"]
    wrong: Int[Tensor, "batch"]
    length: Int[Tensor, "batch"]
    counterfactuals: Mapping[str, Int[Tensor, "batch n"]] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on another device."""
        return PromptBatch(
            tokens=self.tokens.to(device),
            query=self.query.to(device),
            key=self.key.to(device),
            correct=self.correct.to(device),
            wrong=self.wrong.to(device),
            length=self.length.to(device),
            counterfactuals={name: tokens.to(device) for name, tokens in self.counterfactuals.items()},
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def has_keys(self) -> bool:
        """Whether every prompt has an attended token."""
        return bool((self.key != _NO_KEY).all())

    @property
    def any_key(self) -> Int[Tensor, "batch"]:
        """Positions of the attended tokens, and of the query itself for a prompt without one."""
        return torch.where(self.key == _NO_KEY, self.query, self.key)

    def logit_difference(self, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch"]:
        """Next-token logit of the right answer minus that of the wrong one; NaN for prompts without answers."""
        at = torch.arange(len(self), device=logits.device)
        difference: Tensor = logits[at, self.correct] - logits[at, self.wrong]
        return difference.masked_fill((self.correct < 0) | (self.wrong < 0), torch.nan)


class IOISentence(NamedTuple):
    """An IOI sentence without its last word, which is ``io``.

    ``template`` is an index into the templates that it was made from: ``TEMPLATES``, or ``WANG_TEMPLATES``.
    ``order`` is "ABBA" if IO is named first (Mary and John ... John gave it to), "BABA" if S is (John and Mary ... John
    gave it to).
    """

    text: str
    io: str
    s: str
    template: int
    order: Literal["ABBA", "BABA"]


# --- text


def ioi_sentences(
    n: int,
    *,
    seed: int,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
) -> list[IOISentence]:
    """Distinct IOI sentences, balanced over templates and name orders.

    Among the first m of them, for every m, the counts of two templates differ by at most one, and so do those of the
    two orders and those of two pairs of template and order. Draws from a generator of its own.

    Args:
        n: Number of sentences, >= 1.
        seed: Seed of the draws, >= 0.
        names: First names, at least two.
        places: What fits in "went to the ...".
        objects: What fits in "gave a ... to".

    Returns:
        n sentences. For the same word lists, n and seed always the same.

    Raises:
        InputError: A word list is too short or names a word twice, or allows fewer than n distinct sentences.
    """
    check_words(names, places, objects)
    if seed < 0:
        raise bad_value("seed", seed, "an integer >= 0", "choose another seed")
    n_templates, n_choices = len(TEMPLATES), _n_choices(names, places, objects)
    most = 2 * n_templates * n_choices
    if not 1 <= n <= most:
        raise bad_value("n", n, f"1..{most} from these word lists", "ask for fewer, or add words")

    rng = np.random.default_rng(seed)
    rounds = -(-n // (2 * n_templates))
    shuffled = rng.permuted(np.tile(np.arange(n_templates), (rounds, 1)), axis=1)
    template = np.concatenate([shuffled, shuffled], axis=1).ravel()[:n]
    half, step = np.divmod(np.arange(n), n_templates)
    order = (half + step) % 2  # the second half of a round gives each template its other order

    choice = np.empty(n, dtype=np.int64)
    for cell in range(2 * n_templates):
        rows = np.flatnonzero(2 * template + order == cell)
        choice[rows] = rng.choice(n_choices, len(rows), replace=False)  # each choice once, so each sentence once
    choice, i_object = np.divmod(choice, len(objects))
    choice, i_place = np.divmod(choice, len(places))
    i_io, i_s = np.divmod(choice, len(names) - 1)
    i_s += i_s >= i_io  # any name but IO

    sentences = []
    for t, swapped, a, b, p, o in zip(
        template.tolist(), order.tolist(), i_io.tolist(), i_s.tolist(), i_place.tolist(), i_object.tolist(), strict=True
    ):
        io_name, s_name = names[a], names[b]
        first, second = (s_name, io_name) if swapped else (io_name, s_name)
        text = TEMPLATES[t].format(A=first, B=second, S=s_name, place=places[p], object=objects[o])
        sentences.append(IOISentence(text, io_name, s_name, t, "BABA" if swapped else "ABBA"))
    return sentences


def check_words(names: Sequence[str], places: Sequence[str], objects: Sequence[str]) -> None:
    """Check that sentences can be made of these words.

    Raises:
        InputError: There are too few, or one of them is there twice.
    """
    for label, words, least in (("names", names, 2), ("places", places, 1), ("objects", objects, 1)):
        if len(words) < least or len(set(words)) < len(words):
            raise bad_value(label, list(words), f"at least {least} distinct words", "add words, and each one once")


def _n_choices(names: Sequence[str], places: Sequence[str], objects: Sequence[str]) -> int:
    """Number of sentences that one template allows in one order."""
    return len(names) * (len(names) - 1) * len(places) * len(objects)


def ioi_prompts(
    tokenizer: PreTrainedTokenizerBase, n_prompts: int = 128, *, seed: int = 0, prepend_bos: bool | None = None
) -> list[Prompt]:
    """Distinct IOI prompts of names, places and objects that are single tokens for this tokenizer.

    The query is the last token of the text, the key is IO's token, ``correct`` is IO and ``wrong`` is S. Balanced over
    templates and orders as `ioi_sentences`.

    Args:
        tokenizer: A fast tokenizer, which can tell the characters of each token.
        n_prompts: Number of prompts, >= 1.
        seed: Seed of the draws, >= 0.
        prepend_bos: None to tokenize as the tokenizer does, True to make sure that the first token is BOS (EOS for a
            tokenizer without one), False for no special tokens.

    Returns:
        n_prompts prompts. For the same tokenizer, n_prompts and seed always the same.

    Raises:
        InputError: Too few words are single tokens for n_prompts distinct prompts, the tokenizer is not a fast one, or
            it has neither BOS nor EOS to prepend.
    """
    if n_prompts < 1:
        raise bad_value("n_prompts", n_prompts, "an integer >= 1", "ask for at least one prompt")
    words, counts = single_tokens(tokenizer, {"names": NAMES, "places": PLACES, "objects": OBJECTS})
    most = 2 * len(TEMPLATES) * _n_choices(**words)
    if n_prompts > most:
        raise InputError(
            f"n_prompts={n_prompts} is more than this tokenizer allows: {counts}, and at least 2 names, 1 place and "
            "1 object must be. Allowed: "
            + (f"1..{most} distinct prompts. Fix: ask for fewer, or " if most else "no IOI prompt at all. Fix: ")
            + f"{_OWN_PROMPTS}."
        )
    sentences = ioi_sentences(n_prompts, seed=seed, **words)
    return prompts_of(tokenizer, sentences, prepend_bos, names=words["names"], seed=seed)


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[IOISentence],
    prepend_bos: bool | None = None,
    *,
    names: Sequence[str],
    seed: int,
) -> list[Prompt]:
    """IOI sentences as prompts: the last token asks, IO's is attended to, and IO and S are the two answers.

    Args:
        tokenizer: A fast tokenizer, which can tell the characters of each token.
        sentences: At least one.
        prepend_bos: As for `ioi_prompts`.
        names: Names to draw the third one of the counterfactual "abc" from, single tokens.
        seed: Of these draws, >= 0.

    Raises:
        InputError: A name is more than one token somewhere, the tokenizer is not a fast one, or it has neither BOS nor
            EOS to prepend.
    """
    encodings = encode(tokenizer, [sentence.text for sentence in sentences], prepend_bos)
    rng = np.random.default_rng([seed, _THIRD_NAMES])
    prompts = []
    for sentence, encoding in zip(sentences, encodings, strict=True):
        others = [name for name in names if name not in (sentence.io, sentence.s)]
        third = others[rng.integers(len(others))] if others else None
        prompts.append(_ioi_prompt(tokenizer, sentence, encoding, third))
    return prompts


def _ioi_prompt(
    tokenizer: PreTrainedTokenizerBase, sentence: IOISentence, encoding: Encoding, third: str | None
) -> Prompt:
    """The prompt of a sentence, with every position and answer checked in this very text.

    Args:
        tokenizer: A fast one.
        sentence: The sentence.
        encoding: Its tokens.
        third: Another name, for the counterfactual "abc"; None for none.
    """
    text = sentence.text
    positions_of: dict[str, list[int]] = {}
    answers: dict[str, int] = {}
    for name in (sentence.io, sentence.s):
        spans = spans_of(text, name)
        positions = [at for at, _ in (token_at(tokenizer, encoding, text, span) for span in spans) if at is not None]
        answer, _ = answer_after_space(tokenizer, text, name)
        if answer is None or len(positions) < len(spans):  # the tokenizer merges a name with the words around it
            raise bad_value("prompt", text, f"{name!r} is one token wherever it occurs", _OWN_PROMPTS)
        positions_of[name], answers[name] = positions, answer
    (key,), subjects = positions_of[sentence.io], tuple(positions_of[sentence.s])
    correct, wrong = answers[sentence.io], answers[sentence.s]
    swapped = _replaced(encoding.ids, {key: (correct, wrong), **dict.fromkeys(subjects, (wrong, correct))})
    other = None if third is None else answer_after_space(tokenizer, text, third)[0]
    abc = None if other is None else _replaced(encoding.ids, {subjects[-1]: (wrong, other)})
    counterfactuals = tuple((name, ids) for name, ids in (("swapped", swapped), ("abc", abc)) if ids is not None)
    return Prompt(
        text, encoding.ids, encoding.query, key, correct, wrong, subjects, tuple(encoding.spans), sentence.template,
        counterfactuals,
    )  # fmt: skip


def _replaced(ids: tuple[int, ...], changes: Mapping[int, tuple[int, int]]) -> tuple[int, ...] | None:
    """Token ids with some exchanged: (old, new) by position; None if one of them is not the old one."""
    if any(ids[at] != old for at, (old, _) in changes.items()):
        return None
    return tuple(changes[at][1] if at in changes else token for at, token in enumerate(ids))


def single_tokens(
    tokenizer: PreTrainedTokenizerBase, candidates: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], str]:
    """The words that are single tokens after a space; of "names", those that are one token as an answer as well.

    Args:
        tokenizer: A fast tokenizer.
        candidates: Words by kind: "names", "places", "objects".

    Returns:
        The words that are left, by kind, and how many of how many these are, in words, with an example of each kind.
    """
    kept: dict[str, list[str]] = {}
    examples: dict[str, str] = {}
    for label, words in candidates.items():
        texts = [f"Then the {word} and" for word in words]
        kept[label] = []
        for word, text, encoding in zip(words, texts, encode(tokenizer, texts, False), strict=True):
            at, pieces = token_at(tokenizer, encoding, text, (9, 9 + len(word)))
            if at is not None and label == "names":  # a name is an answer as well
                at, pieces = answer_after_space(tokenizer, "Then the drink went to", word)
            if at is not None:
                kept[label].append(word)
            else:
                examples.setdefault(label, f"{word!r} becomes {pieces}")
    counts = ", ".join(f"{len(kept[label])} of {len(words)} {label}" for label, words in candidates.items())
    return kept, f"{counts} are single tokens" + (f" ({'; '.join(examples.values())})" if examples else "")


# --- files


def read_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool | None = None
) -> list[Prompt]:
    """Prompts from a file: .jsonl with one object a line, or .csv with a header.

    Fields of a prompt:

    - ``text``: what the model reads, without the answer and without a space at the end; or ``tokens``, its token ids.
    - ``query``: the asking token; empty or left out for the last token of the text.
    - ``key``: the attended token, not after the query; or a list of several, each of which counts as a prompt. Left out
      (in every prompt of a run), nothing is said of one pair of tokens, and all pairs that a head attends to are still
      measured (Firings, with their ``tau``).
    - ``correct``, ``wrong``: the two next words, or token ids; both may be left out, and attention alone is measured. A
      word follows a space, if it is one token then; else it follows the text as it is. One that is written with its
      space follows a space. Of an answer of several tokens the first one counts.
    - ``template``: which prompts are variations of one sentence: the same name (or whole number) for all of them. May
      be left out; a prompt where it is empty is a sentence of its own. Intervals are over templates, as prompts of one
      template are no independent sample.
    - ``counterfactual``: another text of as many tokens, to patch inputs of heads from (DirectionIntervention). May be
      left out; it is used if every prompt of a batch has one.

    A word is found however its accents are written, as one character (NFC) or as a letter and a mark (NFD). The model
    reads the text as the file has it.

    ``query`` and ``key`` are positions, counted from 0 with special tokens included, negative ones from the end; or the
    word meant, if it occurs once in the text, as one token. In a .jsonl file they may also be ``{"word": "Mary",
    "occurrence": 2}`` (from 1, or -1 for the last), with ``"part": "first"`` or ``"last"`` for a word of several
    tokens; ``{"span": [5, 9]}``, characters of the text, with a part as well; or ``{"token": 4}``. In a .csv file,
    whole numbers are positions.

    Args:
        path: The file, UTF-8, of at most 16 MiB.
        tokenizer: A fast tokenizer, which can tell the characters of each token.
        prepend_bos: As for `ioi_prompts`.

    Returns:
        The prompts, in the order of the file. If some are repeated, a line on standard error says so.

    Raises:
        InputError: The file or a line of it cannot be used; the message names both.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    first_line: dict[Prompt, int] = {}
    templates: dict[str, int] = {}
    repeated: list[tuple[int, int]] = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        found = _read_prompt(where, row, tokenizer, prepend_bos)
        name = _template_name(f"{where}: template", row.get("template"))
        if not name and len(found) > 1:
            name = f"{where}"  # several keys of one text are no independent sample
        if name:
            number = templates.setdefault(name, len(templates))
            found = [dataclasses.replace(prompt, template=number) for prompt in found]
        prompts += found
        repeated += [(line, first_line[prompt]) for prompt in found if first_line.setdefault(prompt, line) != line]
    if not prompts:
        raise bad_value(str(path), "no prompt", "at least one", "write one prompt a line")
    if repeated:
        (line, first), n = repeated[0], len(repeated)
        more = "" if n == 1 else f", and {n - 1} more do the like"
        say(f"svf-lightning: {path}, line {line} repeats line {first}{more}: each counts as often as it is there")
    return prompts


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of the first line, and the fields, of each prompt in a file."""
    if path.suffix not in PROMPT_FILES:
        raise bad_value("prompts", str(path), "a .jsonl or .csv file", "rename or convert the file")
    if not path.is_file():
        raise bad_value("prompts", str(path), "a file that exists", "check the path")
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)  # not the whole of it, whatever it is
    except OSError as error:
        raise bad_value("prompts", str(path), f"a readable file ({reason(error)})", "check the file") from error
    if len(raw) > _MAX_BYTES:
        size, most = path.stat().st_size, f"{_MAX_BYTES >> 20} MiB"
        raise bad_value("prompts", str(path), f"at most {most} (it has {size / 2**20:,.0f} MiB)", "give fewer prompts")
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_value("prompts", str(path), f"UTF-8 text ({reason(error)})", "save the file as UTF-8") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in content:
        raise bad_value("prompts", str(path), "text (it holds zero bytes)", "check that it is the right file")
    return _csv_rows(path, content) if path.suffix == ".csv" else _jsonl_rows(path, content)


def _jsonl_rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, raw in enumerate(content.split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise bad_value(
                where, raw, f"one JSON object a line ({reason(error)})", "correct or delete the line"
            ) from error
        if not isinstance(row, dict):
            raise bad_value(where, raw, "one JSON object a line", 'write {"text": ..., "key": ...}')
        _check_fields(where, row)
        yield line, row


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] = []
    end = 0
    while True:
        where = f"{path}, line {end + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise bad_value(where, str(error), "CSV with quotes that close", "correct the line") from error
        line, end = end + 1, reader.line_num
        if cells is None:
            return
        if not any(cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            _check_fields(where, header)
            continue
        if len(cells) != len(header):
            fix = "put texts with a comma in quotes, and leave empty cells in"
            raise bad_value(f"{where}: cells", len(cells), f"{len(header)}, as in the header", fix)
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        for field in {"query", "key"} & set(header):
            if re.fullmatch(r"\s*[+-]?[0-9]+\s*", row[field]):
                row[field] = int(row[field])
        yield line, row


def _check_fields(where: str, fields: Iterable[str]) -> None:
    fields = list(fields)
    allowed = (
        f"{', '.join(_FIELDS)} (query, template, counterfactual may be left out; so may correct and wrong, both, and "
        "then key; tokens stand in place of text)"
    )
    for field in fields:
        if field not in _FIELDS or fields.count(field) > 1:
            fix = closest(field, set(_FIELDS) - set(fields)) or "delete it"
            raise bad_value(f"{where}: field", field, f"{allowed}, each once", fix)
    missing = ["text"] if "text" not in fields and "tokens" not in fields else []
    answers = {"correct", "wrong"} & set(fields)
    missing += ["key"] if "key" not in fields and answers else []
    missing += sorted({"correct", "wrong"} - answers) if len(answers) == 1 else []
    if missing:
        raise bad_value(f"{where}: fields", fields, allowed, f"add {', '.join(missing)}")


def _template_name(where: str, given: Any) -> str:
    """The name of a template, or an empty string for none; 3 and "3" are the same one, as in a .csv file."""
    _check_characters(where, given)
    if given is None:
        return ""
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise bad_value(where, given, "a name, or a whole number", "give prompts of one sentence the same name")
    return str(given).strip()


def _read_prompt(
    where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None
) -> list[Prompt]:
    """The prompts of one line: one for each key."""
    for field in _FIELDS:
        _check_characters(f"{where}: {field}", row.get(field))
    text, encoding = _text_of(where, row, tokenizer, prepend_bos)
    given = row.get("query")
    query = encoding.query if given in (None, "") else _position(f"{where}: query", given, tokenizer, encoding, text)
    key = row.get("key")
    if all(row.get(field) in (None, "") for field in ("key", "correct", "wrong")):
        return [Prompt(text, encoding.ids, query, _NO_KEY, spans=tuple(encoding.spans))]
    keys = key if isinstance(key, list) and key else [key]
    positions = [_position(f"{where}: key", one, tokenizer, encoding, text) for one in keys]
    for one, key in zip(keys, positions, strict=True):
        if key > query:
            fix = "choose an earlier key or a later query; a causal model sees no later token"
            raise bad_value(f"{where}: key", one, f"a token up to the query, at {query} (the key is at {key})", fix)
    correct, wrong = _answers(where, row, tokenizer, text)
    counterfactuals = _counterfactual(where, row.get("counterfactual"), tokenizer, encoding, prepend_bos)
    spans = tuple(encoding.spans)
    return [
        Prompt(text, encoding.ids, query, key, correct, wrong, spans=spans, counterfactuals=counterfactuals)
        for key in positions
    ]


def _text_of(
    where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None
) -> tuple[str, Encoding]:
    """The text of a line and its tokens, whichever of the two it gives."""
    text, ids = row.get("text"), row.get("tokens")
    if ids in (None, ""):
        if not isinstance(text, str) or not text.strip() or text != text.rstrip():
            fix = "write the text up to the word before the answer"
            raise bad_value(f"{where}: text", text, "words, without a space at the end", fix)
        return text, encode(tokenizer, [text], prepend_bos)[0]
    if text not in (None, ""):
        raise bad_value(f"{where}: tokens", ids, "tokens without a text, or a text without tokens", "leave one out")
    if not isinstance(ids, list) or not ids or not all(_is_token(one, tokenizer) for one in ids):
        allowed = f"a list of token ids, 0..{len(tokenizer) - 1}"
        raise bad_value(f"{where}: tokens", ids, allowed, "give the ids of this tokenizer, special tokens included")
    return str(tokenizer.decode(ids)), Encoding(tuple(ids), [(0, 0)] * len(ids), len(ids) - 1)


def _is_token(value: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(tokenizer)


def _answers(where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int]:
    """Ids of the right and the wrong next token; -1 for none."""
    given = [row.get(field) for field in ("correct", "wrong")]
    if all(one in (None, "") for one in given):
        return _NO_ANSWER, _NO_ANSWER
    answers: list[int] = []
    for field, answer in zip(("correct", "wrong"), given, strict=True):
        if isinstance(answer, int) and _is_token(answer, tokenizer):
            answers.append(answer)
            continue
        if not isinstance(answer, str) or not answer.strip():
            allowed = "a word that may follow the text, or a token id; or neither correct nor wrong"
            raise bad_value(f"{where}: {field}", answer, allowed, "write the word")
        answers.append(_answer(f"{where}: {field}", tokenizer, text, answer))
    if answers[0] == answers[1]:
        allowed = "another token than correct (of an answer of several tokens, the first counts)"
        raise bad_value(f"{where}: wrong", row["wrong"], allowed, "choose another word")
    return answers[0], answers[1]


def _answer(where: str, tokenizer: PreTrainedTokenizerBase, text: str, word: str) -> int:
    """The token by which a word continues a text: the one that it is, or the first of several."""
    plain = word.strip()
    written = [f" {plain}"] if word != word.lstrip() else [f" {plain}", plain]
    for one in written:  # as one character and as a letter and a mark, an accent has tokens of its own
        for form in (one, *(unicodedata.normalize(form, one) for form in ("NFC", "NFD"))):
            token = answer_token(tokenizer, text, form)
            if token is not None:
                return token
    pieces: list[str] = []
    for one in written:
        before, after = encode(tokenizer, [text, text + one], False)
        n = len(before.ids)
        following = after.ids[n:] if after.ids[:n] == before.ids else encode(tokenizer, [one], False)[0].ids
        pieces = pieces or [str(tokenizer.decode([token])) for token in following]
        first = str(tokenizer.decode(list(following[:1]))).strip()
        if first and plain.casefold().startswith(first.casefold()):
            return following[0]
    allowed = f"a word that is one token after the text and a space (this one becomes {pieces})"
    raise bad_value(where, word, allowed, "choose another word")


def _counterfactual(
    where: str, given: Any, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prepend_bos: bool | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The other text that a file gives for a prompt, if it gives one."""
    if given in (None, ""):
        return ()
    n = len(encoding.ids)
    ids = encode(tokenizer, [given], prepend_bos)[0].ids if isinstance(given, str) else ()
    if len(ids) != n:
        allowed = f"a text of {n} tokens, as the prompt" + (f" (it has {len(ids)})" if ids else "")
        raise bad_value(f"{where}: counterfactual", given, allowed, "change words, not their number, or leave it out")
    return (("counterfactual", ids),)


def _check_characters(where: str, value: object) -> None:
    """Raises InputError for half a character, which JSON can write and no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            allowed = f"whole characters (at {error.start} there is half of one)"
            raise bad_value(where, value, allowed, "write the character itself, or both halves of it") from error


def _position(where: str, given: Any, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str) -> int:
    """The position that a file gives as a number, as a word, or as an object."""
    n = len(encoding.ids)
    part = "only"
    which: Any = None
    if isinstance(given, dict):
        kinds = [kind for kind in ("word", "span", "token") if kind in given]
        part, which = given.get("part", "only"), given.get("occurrence")
        if len(kinds) != 1 or set(given) - {*kinds, "part", "occurrence"} or part not in ("only", "first", "last"):
            allowed = (
                '{"word": ..., "occurrence": ..., "part": "first" or "last"}, {"span": [start, end]}, {"token": ...}'
            )
            raise bad_value(where, given, allowed, "write one of these")
        if kinds == ["span"]:
            return _in_span(where, given["span"], part, tokenizer, encoding, text)
        given = given[kinds[0]]
        if kinds == ["token"] and (isinstance(given, bool) or not isinstance(given, int)):
            raise bad_value(where, given, "the position of a token", "give a whole number")
    if isinstance(given, int) and not isinstance(given, bool):
        position = given + n if given < 0 else given
        if not 0 <= position <= encoding.query:  # a token that the tokenizer puts after the text is no part of it
            allowed = f"0..{encoding.query}, or {-n}..{encoding.query - n} from the end, special tokens included"
            raise bad_value(where, given, allowed, "correct the position, or give the word")
        return position
    if not isinstance(given, str) or not given.strip():
        raise bad_value(where, given, "the position of a token, or a word of the text", "give one of them")
    found = spans_of(text, given.strip())
    if which is not None:
        if isinstance(which, bool) or not isinstance(which, int) or not 1 <= abs(which) <= len(found):
            allowed = f"1..{len(found)}, or -1 for the last; the word occurs {len(found)} times"
            raise bad_value(f"{where}: occurrence", which, allowed, "correct the number")
        found = [found[which - 1 if which > 0 else which]]
    if len(found) != 1:
        allowed = f"a word that occurs once in {shortened(repr(text))} (this one occurs {len(found)} times)"
        say_which = 'give the position of the token, or say which one: {"word": ..., "occurrence": 1}'
        raise bad_value(where, given, allowed, say_which if found else "correct the word")
    if part != "only":
        return _in_span(where, list(found[0]), part, tokenizer, encoding, text)
    token, pieces = token_at(tokenizer, encoding, text, found[0])
    if token is None:
        allowed = f"a word that is one token (this one is in {pieces})"
        fix = 'give the position of one of the tokens, or say which: {"word": ..., "part": "last"}'
        raise bad_value(where, given, allowed, fix)
    return token


def _in_span(
    where: str, span: Any, part: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str
) -> int:
    """The token that covers characters, or the first or the last one of several."""
    if (
        not isinstance(span, list | tuple)
        or len(span) != 2
        or not all(isinstance(at, int) and not isinstance(at, bool) for at in span)
        or not 0 <= span[0] < span[1] <= len(text)
    ):
        allowed = f"two numbers, 0 <= start < end <= {len(text)}, the characters of the text"
        raise bad_value(f"{where}: span", span, allowed, "count characters from 0; the end is not included")
    positions = tokens_at(encoding, (span[0], span[1]))
    position = token_of(positions, part)
    if position is None:
        pieces = [str(tokenizer.decode([encoding.ids[i]])) for i in positions]
        allowed = f"characters of one token (these are in {pieces})" if pieces else "characters that a token covers"
        raise bad_value(f"{where}: span", span, allowed, 'add "part": "first" or "last", or change the span')
    return position


def context_window(config: PretrainedConfig) -> int | None:
    """Most tokens that a model can read at once; None if its configuration names no limit."""
    of_text: Any = config.get_text_config()
    return next((n for name in _WINDOWS if isinstance(n := getattr(of_text, name, None), int) and n > 0), None)


def check_prompts_fit(prompts: Sequence[Prompt], config: PretrainedConfig, where: str) -> None:
    """Check that a model can read prompts.

    Args:
        prompts: At least one.
        config: The model's.
        where: What errors call the model.

    Raises:
        InputError: One has more tokens than the model's context window, or a token that is not in its vocabulary.
    """
    text_config: Any = config.get_text_config()
    window = context_window(config)
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    if window is not None and len(longest.tokens) > window:
        raise bad_value(
            "prompt", longest.text, f"at most {window} tokens, the context window of {where} (it has "
            f"{len(longest.tokens)})", "shorten it, or leave it out",
        )  # fmt: skip
    n_words = getattr(text_config, "vocab_size", None)
    if isinstance(n_words, int):
        for prompt in prompts:
            token = max(*prompt.tokens, prompt.correct, prompt.wrong)
            if token >= n_words:
                raise bad_value(
                    "prompt", prompt.text, f"tokens 0..{n_words - 1}, the vocabulary of {where} (it has {token}): the "
                    "tokenizer is larger than the model", "use the tokenizer that the model was trained with",
                )  # fmt: skip


# --- batches


def batches(prompts: Sequence[Prompt], batch_size: int, *, pad: int = 0) -> list[PromptBatch]:
    """Prompts in batches, in the given order, each padded on the right to its own longest prompt.

    Args:
        prompts: At least one.
        batch_size: Most prompts in a batch, >= 1; the last batch may hold fewer.
        pad: Token id to pad with; no query sees it.

    Raises:
        InputError: There is no prompt, or batch_size < 1.
    """
    if batch_size < 1:
        raise bad_value("batch_size", batch_size, "an integer >= 1", "choose a larger one")
    if not prompts:
        raise bad_value("prompts", [], "at least one prompt", "pass prompts of `ioi_prompts` or `read_prompts`")
    return [_batch(prompts[start : start + batch_size], pad) for start in range(0, len(prompts), batch_size)]


def _batch(prompts: Sequence[Prompt], pad: int) -> PromptBatch:
    longest = max(len(prompt.tokens) for prompt in prompts)

    def padded(rows: Iterable[tuple[int, ...]]) -> Tensor:
        return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])

    others = [dict(prompt.counterfactuals) for prompt in prompts]
    names = [name for name in others[0] if all(name in other for other in others)]
    return PromptBatch(
        tokens=padded(prompt.tokens for prompt in prompts),
        query=torch.tensor([prompt.query for prompt in prompts]),
        key=torch.tensor([prompt.key for prompt in prompts]),
        correct=torch.tensor([prompt.correct for prompt in prompts]),
        wrong=torch.tensor([prompt.wrong for prompt in prompts]),
        length=torch.tensor([len(prompt.tokens) for prompt in prompts]),
        counterfactuals={name: padded(other[name] for other in others) for name in names},
    )
