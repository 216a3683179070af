"""Tasks beside IOI, as prompts for the tokenizer at hand: ``--data.task=NAME``, or a class of your own.

A task says, for each prompt, what the text is, which of its characters the heads of the task attend to, and two
continuations to tell apart. :func:`task_prompts` finds the tokens of these characters, and leaves out what a tokenizer
cuts in another way than the task needs. To write one of your own, copy a class, and give its import path as the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pydoc import ErrorDuringImport, locate
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from svf_lightning.errors import InputError, bad_value, closest, reason
from svf_lightning.replay.prompts import NAMES, OBJECTS, PLACES, Prompt
from svf_lightning.replay.tokens import answer_token, encode, token_of, tokens_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Usable = Callable[[Sequence[str]], list[str]]  # the words that are one token after a space, for the tokenizer at hand
_TRIES = 20  # drawn prompts for each that is asked for, before a task gives up on a tokenizer


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt of a task, in characters.

    Args:
        text: What the model reads; the last token asks.
        key: Characters [start, end) that the task's heads attend to.
        correct: What comes next, with the space before it, if there is one.
        wrong: What does not.
        template: Number of the sentence that it was made from; intervals are over templates.
        part: Which token counts if the key is more than one: "only" refuses such prompts.
    """

    text: str
    key: tuple[int, int]
    correct: str
    wrong: str
    template: int
    part: Literal["only", "first", "last"] = "only"


class Task(ABC):
    """A way to make prompts."""

    source: ClassVar[str] = ""  # the paper that measured it

    @abstractmethod
    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Prompts without end, balanced over templates as far as that can be.

        Args:
            rng: Where to draw from.
            usable: Filter of words that have to be one token after a space.
        """


def _key_of(text: str, word: str, occurrence: int = 0) -> tuple[int, int]:
    """Characters of an occurrence of a word."""
    start = -1
    for _ in range(occurrence + 1):
        start = text.index(word, start + 1)
    return start, start + len(word)


class Induction(Task):
    """Words at random, and the beginning of the same words again: ``A B C D ... A B`` goes on with ``C``.

    The heads attend to the token after the earlier occurrence of the last one (Olsson et al. 2022, arXiv 2209.11895).
    A template is the place in the sequence at which the repetition stops.

    Args:
        length: Distinct words before they repeat.
    """

    source = "Olsson et al. 2022"

    def __init__(self, length: int = 12) -> None:
        if length < 4:
            raise bad_value("length", length, "an integer >= 4", "ask for a longer sequence")
        self.length = length

    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Sequences of names, places and objects."""
        words = usable([*NAMES, *PLACES, *OBJECTS])
        if len(words) <= self.length:
            return
        while True:
            for stop in rng.permutation(np.arange(1, self.length - 1)).tolist():
                chosen = [words[i] for i in rng.choice(len(words), self.length, replace=False)]
                text = " ".join(["The", *chosen, *chosen[: stop + 1]])
                following = chosen[stop + 1]
                others = [word for i, word in enumerate(chosen) if abs(i - stop - 1) > 1]
                wrong = others[int(rng.integers(len(others)))]
                yield TaskPrompt(text, _key_of(text + " ", f" {following} "), f" {following}", f" {wrong}", stop)


_EVENTS = "war campaign expedition siege voyage project reign dispute strike famine journey festival"
_YEARS = (
    "The {event} lasted from the year {first} to the year {century}",
    "The {event} began in the year {first} and ended in the year {century}",
    "From the year {first} the {event} went on until the year {century}",
    "They say that the {event} of {first} was over in {century}",
    "A {event} that started in {first} came to its end in {century}",
)


class GreaterThan(Task):
    """``The war lasted from the year 1732 to the year 17`` goes on with a number above 32 (Hanna et al. 2023).

    The heads attend to the last two digits of the first year. Where a tokenizer cuts years into single digits, the
    next digit is the question, and the heads attend to the third one (arXiv 2305.00586 has GPT-2's pairs of digits).
    """

    source = "Hanna et al. 2023"

    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Five sentences about twelve kinds of events."""
        while True:
            for template in rng.permutation(len(_YEARS)).tolist():
                century, two = int(rng.integers(11, 20)), int(rng.integers(12, 88))
                events = _EVENTS.split()
                event = events[int(rng.integers(len(events)))]
                text = _YEARS[template].format(event=event, first=f"{century}{two}", century=century)
                at = text.index(f"{century}{two}") + 2
                larger, smaller = int(rng.integers(two + 1, 99)), int(rng.integers(2, two))
                yield TaskPrompt(text, (at, at + 2), f"{larger:02}", f"{smaller:02}", template)
                tens = two // 10
                if 1 <= tens <= 8:
                    more, less = int(rng.integers(tens + 1, 10)), int(rng.integers(0, tens))
                    yield TaskPrompt(text, (at, at + 1), str(more), str(less), template)


_MEN = "Adam Alan Andrew Arthur Brian Carl Charles Daniel David Edward Eric Frank George Henry Jack Jacob James John"
_WOMEN = (
    "Alice Amanda Anna Barbara Carol Diana Elizabeth Emily Emma Helen Jane Jessica Julia Karen Laura Linda Lisa Mary"
)
_FRIENDS = (
    "So {name} is a really great friend, isn't",
    "I think {name} is a wonderful cook, isn't",
    "You see, {name} was late again yesterday, wasn't",
    "After all {name} has been here before, hasn't",
    "Of course {name} will come to the party tonight, won't",
    "Everyone knows that {name} can sing very well, can't",
)


class GenderedPronouns(Task):
    """``So Mary is a really great friend, isn't`` goes on with ``she`` (Mathwin et al. 2023).

    The heads attend to the name.
    """

    source = "Mathwin et al. 2023"

    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Six sentences about eighteen names of women and eighteen of men."""
        names = [(usable(_WOMEN.split()), " she", " he"), (usable(_MEN.split()), " he", " she")]
        if not all(found for found, *_ in names):
            return
        while True:
            for template in rng.permutation(len(_FRIENDS)).tolist():
                for of_gender, correct, wrong in names:
                    name = of_gender[int(rng.integers(len(of_gender)))]
                    text = _FRIENDS[template].format(name=name)
                    yield TaskPrompt(text, _key_of(text, name), correct, wrong, template)


_WORDS = (
    "load size file last name port page unit word line code list text order state table group value event field model "
    "image test plan note board light river stone house"
)


class Docstring(Task):
    """The third argument in the docstring of a Python function (Heimersheim & Janiak 2023).

    Two arguments are described already; the next ``:param`` is that of the third, which the heads attend to in the
    ``def`` line. The other answer is the argument after it.
    """

    source = "Heimersheim & Janiak 2023"

    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Functions with four arguments; a template is a number of words of the descriptions."""
        words = usable(_WORDS.split())
        if len(words) < 16:
            return
        while True:
            for n_words in rng.permutation(np.arange(1, 6)).tolist():
                chosen = [words[i] for i in rng.permutation(len(words))]
                name, first, second, third, fourth, *rest = chosen
                described = [" ".join(rest[i * n_words : (i + 1) * n_words]) for i in range(2)]
                if not all(described):
                    continue
                text = (
                    f"def {name}(self, {first}, {second}, {third}, {fourth}):\n"
                    f'    """{rest[-1]} {rest[-2]}\n\n'
                    f"    :param {first}: {described[0]}\n    :param {second}: {described[1]}\n    :param"
                )
                yield TaskPrompt(text, _key_of(text, third), f" {third}", f" {fourth}", n_words)


_CAPITALS = (
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Russia:Moscow Japan:Tokyo China:Beijing Egypt:Cairo "
    "Greece:Athens Ireland:Dublin Austria:Vienna Poland:Warsaw Portugal:Lisbon Norway:Oslo Sweden:Stockholm "
    "Cuba:Havana England:London Iraq:Baghdad Iran:Tehran Kenya:Nairobi Peru:Lima Turkey:Ankara Hungary:Budapest "
    "Thailand:Bangkok Belgium:Brussels Denmark:Copenhagen Finland:Helsinki Syria:Damascus Ukraine:Kiev Canada:Ottawa"
)
_ASKED = (
    "The capital of {country} is",
    "The capital city of {country} is called",
    "They moved to the capital of {country}, the city of",
    "The government of {country} sits in its capital,",
    "Everyone in {country} has been to its capital,",
)


class FactualRecall(Task):
    """``The capital of France is`` goes on with ``Paris`` (Meng et al. 2022).

    The heads attend to the last token of the subject.
    """

    source = "Meng et al. 2022"

    def draw(self, rng: np.random.Generator, usable: Usable) -> Iterator[TaskPrompt]:
        """Five sentences about thirty countries; the other answer is the capital of another one."""
        pairs = [tuple(pair.split(":")) for pair in _CAPITALS.split()]
        known = set(usable([capital for _, capital in pairs]))
        pairs = [pair for pair in pairs if pair[1] in known]
        if len(pairs) < 2:
            return
        while True:
            for template in rng.permutation(len(_ASKED)).tolist():
                i, j = rng.choice(len(pairs), 2, replace=False)
                country, capital = pairs[i]
                text = _ASKED[template].format(country=country)
                yield TaskPrompt(text, _key_of(text, country), f" {capital}", f" {pairs[j][1]}", template, part="last")


TASKS: dict[str, type[Task]] = {
    "induction": Induction,
    "greater_than": GreaterThan,
    "gendered_pronouns": GenderedPronouns,
    "docstring": Docstring,
    "factual_recall": FactualRecall,
}


def find_task(name: str) -> Task:
    """A task by its name, or by the import path of a class.

    Raises:
        InputError: There is none.
    """
    if name in TASKS:
        return TASKS[name]()
    allowed = f"ioi, {', '.join(TASKS)}, or the import path of a class, such as my_package.MyTask"
    try:
        found = locate(name) if "." in name else None
    except ErrorDuringImport as error:
        raise InputError(
            f"task={name!r} cannot be imported ({reason(error)}). Allowed: {allowed}. Fix: mend it."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise bad_value("task", name, allowed, closest(name, TASKS) or "change --data.task")
    return found()


def task_prompts(
    task: Task, tokenizer: PreTrainedTokenizerBase, n_prompts: int, *, seed: int = 0, prepend_bos: bool | None = None
) -> list[Prompt]:
    """Distinct prompts of a task that the tokenizer cuts as the task needs it.

    The query is the last token; ``correct`` and ``wrong`` are the single tokens that continue the text.

    Args:
        task: The task.
        tokenizer: A fast tokenizer.
        n_prompts: Number of prompts, >= 1.
        seed: Seed of the draws, >= 0.
        prepend_bos: As for `ioi_prompts`.

    Raises:
        InputError: The tokenizer does not allow as many; the message shows a prompt that did not work, and why.
    """

    def usable(words: Sequence[str]) -> list[str]:
        return [word for word in words if answer_token(tokenizer, "The", f" {word}") is not None]

    prompts: dict[Prompt, None] = {}
    trouble = "it has too few of the words that are single tokens for this tokenizer"
    for n_tried, drawn in enumerate(task.draw(np.random.default_rng(seed), usable), 1):
        made = _made(drawn, tokenizer, prepend_bos)
        if isinstance(made, Prompt):
            prompts.setdefault(made)
        else:
            trouble = made
        if len(prompts) == n_prompts or n_tried >= _TRIES * n_prompts + 200:
            break
    if len(prompts) < n_prompts:
        name = type(task).__name__
        raise InputError(
            f"the task {name} makes {len(prompts)} of {n_prompts} distinct prompts with this tokenizer ({trouble}). "
            "Allowed: as many as it makes, if it makes any. Fix: ask for fewer (--data.n_prompts), choose another "
            "task, or give prompts of your own in a .jsonl or .csv file."
        )
    return list(prompts)


def _made(drawn: TaskPrompt, tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> Prompt | str:
    """The prompt in tokens, or why there is none."""
    (encoding,) = encode(tokenizer, [drawn.text], prepend_bos)
    key = drawn.text[slice(*drawn.key)].strip()
    start = drawn.text.index(key, drawn.key[0])
    at = tokens_at(encoding, (start, start + len(key)))
    position = token_of(at, drawn.part)
    if drawn.part == "only" and not (len(at) == 1 and encoding.spans[at[0]] == (start, start + len(key))):
        pieces = [str(tokenizer.decode([encoding.ids[i]])) for i in at]
        return f"in {drawn.text!r}, {key!r} is in {pieces}"
    answers = []
    for answer in (drawn.correct, drawn.wrong):
        token = answer_token(tokenizer, drawn.text, answer)
        if token is None:
            return f"after {drawn.text!r}, {answer!r} is not one token"
        answers.append(token)
    if answers[0] == answers[1] or position is None or position > encoding.query:
        return f"in {drawn.text!r}, the answers are the same token, or the key comes after the query"
    return Prompt(
        drawn.text, encoding.ids, encoding.query, position, answers[0], answers[1], spans=tuple(encoding.spans),
        template=drawn.template,
    )  # fmt: skip
