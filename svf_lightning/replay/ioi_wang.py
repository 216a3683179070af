"""The IOI prompts of Wang et al. (2022, arXiv 2211.00593), for runs that are to be compared with theirs.

Names, places, objects and the fifteen templates are those of their published code: ``NAMES``, ``PLACES``, ``OBJECTS``,
``BABA_TEMPLATES`` and ``ABBA_TEMPLATES`` of ``easy_transformer/ioi_dataset.py`` in
https://github.com/redwoodresearch/Easy-Transformer (revision ea15315). So is the way that they are drawn: template,
names, place and object uniformly and independently of each other, so that counts vary and a sentence may come twice.

Their sentences are shorter and more alike than our own (:func:`~svf_lightning.replay.prompts.ioi_sentences`), and two
of the fifteen templates name neither a place nor an object. The seed's draws are ours: which sentences their code drew
is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from svf_lightning.errors import InputError, bad_value
from svf_lightning.replay.prompts import IOISentence, Prompt, check_words, prompts_of, single_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDERS: tuple[Literal["ABBA"], Literal["BABA"]] = ("ABBA", "BABA")

_WANG_NAMES = (
    "Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert John Joseph Andrew "
    "Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole Nicholas Anthony Heather Eric Elizabeth "
    "Adam Megan Melissa Kevin Steven Thomas Timothy Christina Kyle Rachel Laura Lauren Amber Brittany Danielle Richard "
    "Kimberly Jeffrey Amy Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles Rebecca Jacob Stephen "
    "Patrick Sean Erin Jamie Kelly Samantha Nathan Sara Dustin Paul Angela Tyler Scott Katherine Andrea Gregory Erica "
    "Mary Travis Lisa Kenneth Bryan Lindsey Kristen Jose Alexander Jesse Katie Lindsay Shannon Vanessa Courtney "
    "Christine Alicia Cody Allison Bradley Samuel"
)
WANG_NAMES = tuple(_WANG_NAMES.split())
WANG_PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
WANG_OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")

# In their order. {A} is named first and {B} second; {S} is named again, and the other one is the answer.
WANG_TEMPLATES = (
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {object} to",
    "Then, {A} and {B} were working at the {place}. {S} decided to give a {object} to",
    "Then, {A} and {B} were thinking about going to the {place}. {S} wanted to give a {object} to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
    "After {A} and {B} went to the {place}, {S} gave a {object} to",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give it to",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give the {object} to",
    "While {A} and {B} were working at the {place}, {S} gave a {object} to",
    "While {A} and {B} were commuting to the {place}, {S} gave a {object} to",
    "After the lunch, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Afterwards, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Then, {A} and {B} had a long argument. Afterwards {S} said to",
    "The {place} {A} and {B} went to had a {object}. {S} gave it to",
    "Friends {A} and {B} found a {object} at the {place}. {S} gave it to",
)


def wang_sentences(
    n_per_order: int = 128,
    *,
    seed: int,
    names: Sequence[str] = WANG_NAMES,
    places: Sequence[str] = WANG_PLACES,
    objects: Sequence[str] = WANG_OBJECTS,
) -> list[IOISentence]:
    """Sentences of Wang et al. (2022), as many with IO named first (ABBA) as with S named first (BABA).

    Draws from a generator of its own.

    Args:
        n_per_order: Sentences of each order, >= 1.
        seed: Seed of the draws, >= 0.
        names: First names, at least two.
        places: What fits in "went to the ...".
        objects: What fits in "gave a ... to".

    Returns:
        2 * n_per_order sentences, ABBA first; ``template`` is an index into ``WANG_TEMPLATES``, which both orders
        share. For the same word lists, n_per_order and seed always the same.

    Raises:
        InputError: A word list is too short or names a word twice, or a number is out of range.
    """
    check_words(names, places, objects)
    if n_per_order < 1:
        raise bad_value("n_per_order", n_per_order, "an integer >= 1", "ask for at least one sentence")
    if seed < 0:
        raise bad_value("seed", seed, "an integer >= 0", "choose another seed")
    rng = np.random.default_rng(seed)
    sentences = []
    for order in ORDERS:
        drawn = (rng.integers(size, size=n_per_order) for size in (len(WANG_TEMPLATES), len(places), len(objects)))
        io, s = rng.integers(len(names), size=n_per_order), rng.integers(len(names) - 1, size=n_per_order)
        s += s >= io  # any name but IO
        for template, place, thing, a, b in np.stack([*drawn, io, s], axis=1).tolist():
            first, second = (names[a], names[b]) if order == "ABBA" else (names[b], names[a])
            text = WANG_TEMPLATES[template].format(
                A=first, B=second, S=names[b], place=places[place], object=objects[thing]
            )
            sentences.append(IOISentence(text, names[a], names[b], template, order))
    return sentences


def wang_prompts(
    tokenizer: PreTrainedTokenizerBase, n_per_order: int = 128, *, seed: int = 0, prepend_bos: bool | None = None
) -> list[Prompt]:
    """Prompts of Wang et al. (2022), of those words that are single tokens for this tokenizer (for GPT-2 all are).

    Query, key and answers are those of :func:`~svf_lightning.replay.prompts.ioi_prompts`.

    Args:
        tokenizer: A fast tokenizer, which can tell the characters of each token.
        n_per_order: Prompts of each order, >= 1.
        seed: Seed of the draws, >= 0.
        prepend_bos: As for `ioi_prompts`.

    Returns:
        2 * n_per_order prompts, ABBA first.

    Raises:
        InputError: Fewer than 2 names, 1 place and 1 object are single tokens, the tokenizer is not a fast one, or it
            has neither BOS nor EOS to prepend.
    """
    candidates = {"names": WANG_NAMES, "places": WANG_PLACES, "objects": WANG_OBJECTS}
    kept, counts = single_tokens(tokenizer, candidates)
    if len(kept["names"]) < 2 or not kept["places"] or not kept["objects"]:
        raise InputError(
            f"prompts=ioi_wang needs 2 names, 1 place and 1 object that are single tokens, and this tokenizer has "
            f"{counts}. Allowed: a tokenizer of whole words. Fix: give prompts of your own in a .jsonl or .csv file "
            "(`read_prompts`)."
        )
    sentences = wang_sentences(n_per_order, seed=seed, **kept)
    return prompts_of(tokenizer, sentences, prepend_bos, names=kept["names"], seed=seed)
