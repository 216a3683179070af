"""Tokens, and the characters of a text that they cover."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from svf_lightning.errors import bad_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoding(NamedTuple):
    """Token ids; the characters [start, end) of each without white space, (0, 0) for added ones; the text's last."""

    ids: tuple[int, ...]
    spans: list[tuple[int, int]]
    query: int


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], prepend_bos: bool | None) -> list[Encoding]:
    """Texts as tokens, with special tokens unless ``prepend_bos`` is False.

    Raises:
        InputError: The tokenizer is not a fast one, or has neither BOS nor EOS to prepend.
    """
    if not getattr(tokenizer, "is_fast", False):
        fix = "load the tokenizer with transformers.AutoTokenizer"
        allowed = "a fast tokenizer, which can tell the characters of each token"
        raise bad_value("tokenizer", type(tokenizer).__name__, allowed, fix)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prepend_bos and bos is None:
        allowed = "None or False, for a tokenizer that has neither a BOS nor an EOS token"
        raise bad_value("prepend_bos", prepend_bos, allowed, "leave prepend_bos out, or set tokenizer.bos_token")
    encoded = tokenizer(
        texts,
        add_special_tokens=prepend_bos is not False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    encodings = []
    for text, ids, offsets, added in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        spans = [_trim(text, *offset) for offset in offsets]
        query = max((i for i, add in enumerate(added) if not add), default=-1)
        if prepend_bos and ids[:1] != [bos]:
            ids, spans, query = [bos, *ids], [(0, 0), *spans], query + 1
        encodings.append(Encoding(tuple(ids), spans, query))
    return encodings


def leading_token(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> int | None:
    """The special token that every prompt begins with; None if there is none.

    Raises:
        InputError: As for `ioi_prompts`.
    """
    (encoding,) = encode(tokenizer, ["a"], prepend_bos)
    return encoding.ids[0] if encoding.spans[0] == (0, 0) else None


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at either side; some tokenizers count the space before a word, some do not."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def spans_of(text: str, word: str) -> list[tuple[int, int]]:
    """Where a word occurs in a text, however accents are written; inside other words only if nowhere by itself."""
    composed, starts = _composed(text)
    word = unicodedata.normalize("NFC", word)
    left, right = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.search(r"\w\Z", word) else "")
    for pattern in (left + re.escape(word) + right, re.escape(word)):
        if spans := [match.span() for match in re.finditer(pattern, composed)]:
            return [(starts[start], starts[end]) for start, end in spans]
    return []


def _composed(text: str) -> tuple[str, list[int]]:
    """A text with accents as one character each, and where each of its characters begins in the original."""
    if unicodedata.is_normalized("NFC", text):
        return text, list(range(len(text) + 1))
    begins = [i for i, letter in enumerate(text) if i == 0 or not _joins_the_one_before(letter)]
    pieces = [text[start:end] for start, end in itertools.pairwise([*begins, len(text)])]
    forms = [unicodedata.normalize("NFC", piece) for piece in pieces]
    starts = [start for start, form in zip(begins, forms, strict=True) for _ in form]
    return "".join(forms), [*starts, len(text)]


def _joins_the_one_before(letter: str) -> bool:
    """True for accents and the like, and for the later parts of a Korean syllable."""
    return unicodedata.combining(letter) != 0 or "\u1160" <= letter <= "\u11ff"


def token_at(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str, span: tuple[int, int]
) -> tuple[int | None, list[str]]:
    """The position of the one token that is these characters, if there is one; and the tokens that they are in.

    A token that decodes to something else, as an unknown one, does not count. Upper and lower case do not matter: some
    tokenizers know one case only.
    """
    start, end = span
    touched = [i for i, (first, after) in enumerate(encoding.spans) if first < end and start < after]
    pieces = [str(tokenizer.decode([encoding.ids[i]])) for i in touched]
    same = [_plain(piece) for piece in pieces] == [_plain(text[start:end])]
    return (touched[0] if same else None), pieces


def _plain(piece: str) -> str:
    return unicodedata.normalize("NFC", piece.strip().casefold())


def answer_after_space(tokenizer: PreTrainedTokenizerBase, text: str, word: str) -> tuple[int | None, list[str]]:
    """The id of the one token by which a word after a space continues a text, if it is one; and the word's tokens."""
    continued = f"{text} {word}"
    before, after = encode(tokenizer, [text, continued], False)
    at, pieces = token_at(tokenizer, after, continued, (len(text) + 1, len(continued)))
    return (after.ids[-1] if at is not None and after.ids[:-1] == before.ids else None), pieces


def answer_token(tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> int | None:
    """The id of the one token by which a string continues a text, as it stands: with a space before it, or without."""
    before, after = encode(tokenizer, [text, text + answer], False)
    start = len(text) + len(answer) - len(answer.lstrip())
    at, _ = token_at(tokenizer, after, text + answer, (start, len(text) + len(answer)))
    return after.ids[-1] if at is not None and after.ids[:-1] == before.ids else None


def tokens_at(encoding: Encoding, span: tuple[int, int]) -> list[int]:
    """Positions of the tokens that cover some of the characters [start, end)."""
    return [i for i, (first, after) in enumerate(encoding.spans) if first < span[1] and span[0] < after]


def token_of(positions: Sequence[int], part: str) -> int | None:
    """One of the tokens that characters are in: the "first", the "last", or, with "only", the one that there is."""
    if not positions or (part == "only" and len(positions) > 1):
        return None
    return positions[-1] if part == "last" else positions[0]
