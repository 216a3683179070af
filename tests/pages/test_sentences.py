"""What pages say is so: nothing is said to have happened that did not, and each number in a sentence is the run's."""

import re

import numpy as np
import pytest
from helpers.browser import assert_every_figure_is_drawn, in_browser, needs_browser
from helpers.page_text import Page
from helpers.trajectories import changed, heads, ramp, store, toy

from svf_lightning.figures import FIGURES
from svf_lightning.metrics.dynamics import LEVELS
from svf_lightning.pages.comparison import write_comparison
from svf_lightning.pages.run import write_run_page
from svf_lightning.registry import BUILT_IN, known
from svf_lightning.run.changes import changes_of, sizes_of
from svf_lightning.sentences import Sentence, from_to, joined, number
from svf_lightning.trajectory import open_trajectory

ALIGN, ORTHO = BUILT_IN["dynamics/t_align"].title, BUILT_IN["dynamics/t_ortho"].title
ALIGNMENT, OVERLAP = "alignment/matched", "orthogonality/attended_vs_rest"


def nothing(**options):
    return toy(aligns=False, orthogonal=False, sparser=False, **options)


def not_a_number(dataset, instances=slice(None), rows=slice(1, None)):
    """The run diverged after its first step: all that it measured is NaN."""
    for name, variable in dataset.data_vars.items():
        if variable.dtype.kind == "f":
            values = variable.values.copy()
            values[rows, instances] = np.nan
            dataset = changed(dataset, name, values)
    return dataset


def one_unaligned(n=4):
    dataset = toy(n_instances=n)
    values = dataset[ALIGNMENT].values.copy()
    values[:, 1] = ramp(0.5, 0.55, len(values))[:, 0]
    return changed(dataset, ALIGNMENT, values)


def constant(dataset):
    """Nothing moves, as with a learning rate of 0."""
    for name, variable in dataset.data_vars.items():
        dataset = changed(dataset, name, np.broadcast_to(variable.values[:1], variable.shape))
    return dataset


# how many of the instances align, and turn orthogonal
RUNS = {
    "everything happens": (lambda: toy(), 2, 2),
    "nothing happens": (nothing, 0, 0),
    "aligned, not orthogonal": (lambda: toy(orthogonal=False), 2, 0),
    "orthogonal, not aligned": (lambda: toy(aligns=False), 0, 2),
    "nothing moves": (lambda: constant(toy()), 0, 0),
    "one step": (lambda: toy(n_steps=2), 0, 0),
    "a single row": (lambda: toy(n_steps=1), 0, 0),
    "one of four does not align": (one_unaligned, 3, 4),
    "one diverged": (lambda: not_a_number(toy(), slice(0, 1)), 1, 1),
    "all diverged": (lambda: not_a_number(toy()), 0, 0),
    "all NaN from the start": (lambda: not_a_number(toy(), rows=slice(None)), 0, 0),
    "one instance": (lambda: toy(n_instances=1), 1, 1),
    "one instance in which nothing happens": (lambda: nothing(n_instances=1), 0, 0),
}
# verbs that say that something happens; only claims, which have their verdict beside them, may use them
CHANGES = re.compile(
    r"\b(aligns?|turns?|turned|grows?|grew|falls?|fell|rises?|rose|becomes?|became|learns?|learned|shrinks?|sharpens?|"
    r"emerges?|proves?|confirms?|succeeds?|improves?|shows? that)\b"
)
NO_NUMBER = re.compile(r"\b(nan|NaN|None|inf|Infinity|undefined|(?<!the )null)\b")  # "the null passes as well" is prose


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    made = {}

    def page_of(name):
        if name not in made:
            folder = store(tmp_path_factory.mktemp("runs"), RUNS[name][0]())
            made[name] = folder, write_run_page(folder)
        return made[name]

    return page_of


@pytest.mark.parametrize("name", RUNS)
def test_a_page_says_of_a_change_in_how_many_instances_it_happened(pages, name):
    folder, path = pages(name)
    text, n = Page(path).text, open_trajectory(folder).sizes["instance"]
    for title, k in zip((ALIGN, ORTHO), RUNS[name][1:], strict=True):
        title, text = title.lower(), text.lower()  # a sentence begins with a capital
        said = re.findall(rf"{title} \([\w]+\): ([^;|]*)", text)
        mentions = len(re.findall(title, text))
        if n == 1:
            expected = "step" if k else "did not happen"
        else:
            expected = f"in {k} of {n} instances at step " if k else f"did not happen in any of {n} instances"
        if open_trajectory(folder).sizes["step"] > 1:
            assert sum(expected in one for one in said) >= 1, said
        for one in said:  # the overall sentence, and one for each instance at the slider
            assert re.match(r"in \d+ of \d+ instances at step |happened at step |step |did not happen", one)
        if k == 0:
            assert all(one.startswith("did not happen") for one in said)
            assert mentions == len(said)  # no mark, no button, no hover text without its "did not happen"
        elif n > 1:
            # those of the slider: a mark for each instance in which it happened, a sentence for each other one
            marks = [m for m in re.findall(rf"(step [\d,]+: )?{title}", text) if not m]
            assert text.count(f"{title} (t_") == mentions
            assert sum(one.startswith("did not happen") for one in said) == n - k
            assert marks


@pytest.mark.parametrize("name", RUNS)
def test_apart_from_claims_no_sentence_has_a_verb_of_change_and_none_shows_a_number_that_is_none(pages, name):
    page = Page(pages(name)[1])
    text = re.sub(rf"({ALIGN}|{ORTHO}) \(", "(", page.text, flags=re.IGNORECASE)  # counted by the test above
    assert CHANGES.findall(text) == []
    cells = [cell for cell in page.tables if cell.strip() != "null"]  # the title of a column
    assert NO_NUMBER.findall(" ".join([*page.words, *cells])) == []


def test_a_page_of_a_diverged_run_says_so_and_of_another_does_not(pages):
    for name, words in (
        ("one diverged", "In 1 of 2 instances the loss is not a finite number"),
        ("all diverged", "In 2 of 2 instances the loss is not a finite number"),
    ):
        assert words in Page(pages(name)[1]).text
    assert "not a finite number" not in Page(pages("nothing happens")[1]).text


@pytest.mark.parametrize("name", RUNS)
def test_every_number_in_a_sentence_is_one_of_its_evidence(pages, name):
    dataset = open_trajectory(pages(name)[0])
    walk(dataset, FIGURES.values())


def walk(dataset, figures):
    """Every sentence of the figures that a dataset has the data for."""
    told = []
    for figure in figures:
        try:
            sentences = figure.sentences(dataset)
        except ValueError:  # the run lacks what the figure shows
            continue
        told += sentences
        for sentence in sentences:
            assert isinstance(sentence, Sentence)
            values = [v for value in sentence.evidence.values() for v in np.ravel(value) if v is not None]
            evidence = {number(v) for v in values}
            names = "|".join(re.escape(word) for word in ("S(v)", "u_1", "step 0:"))
            numbers = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?%?", re.sub(names, "", sentence.text))
            shares = {f"{v:.1%}" for v in values if isinstance(v, float) and 0 <= v <= 1}
            allowed = evidence | shares | {str(i) for i in range(dataset.sizes.get("instance", 0))}  # "of instance 0"
            assert {n.rstrip(",") for n in numbers} <= allowed, sentence
    return told


def test_what_a_replay_says_of_its_curves_is_where_they_begin_and_end(tmp_path):
    for name, sparser in (("one", True), ("other", False)):
        folder = store(tmp_path / name, heads(sparser=sparser))
        dataset = open_trajectory(folder)
        said = walk(dataset, FIGURES.values())
        (own,) = [one for one in said if one.text.startswith("S(v), singular basis")]
        first, last = own.evidence["S(v), singular basis"]
        assert (last < first) == sparser
        text = Page(write_run_page(folder)).text
        assert own.text in text
        assert CHANGES.findall(text) == []


def test_a_replay_with_one_checkpoint_speaks_of_no_course(tmp_path):
    folder = store(tmp_path, heads(n_steps=1))
    text = Page(write_run_page(folder)).text
    assert "at step 0 and" not in text
    assert "Through training" not in text
    assert CHANGES.findall(text) == []


def test_captions_of_all_figures_hold_whatever_the_run_shows():
    for figure in FIGURES.values():
        assert figure.see
        words = figure.see.replace("is aligned if", "").replace("falls with", "")
        assert CHANGES.findall(f"{figure.heading} {words}") == [], figure.name


def test_a_comparison_says_what_each_run_measured_and_nothing_of_what_did_not_happen(tmp_path):
    runs = [store(tmp_path / name, make()) for name, make in (("one", toy), ("other", nothing))]
    page = Page(write_comparison(runs, tmp_path / "page.html"))
    text = re.sub(rf"({ALIGN}|{ORTHO}) \(", "(", page.text, flags=re.IGNORECASE)
    assert CHANGES.findall(text) == []
    assert NO_NUMBER.findall(" ".join([*page.words, *page.tables])) == []


def test_the_level_of_a_run_is_that_of_its_sizes(tmp_path):
    dataset = open_trajectory(store(tmp_path, toy()))
    sizes = sizes_of(dataset)
    assert sizes == (5, 5, 1, 9, 2)
    happened = changes_of(dataset, known(dataset))
    assert happened["dynamics/t_align"].level == LEVELS["aligned"].of(sizes)
    assert happened["dynamics/t_ortho"].level == LEVELS["orthogonal"].of(sizes)
    lacking = changes_of(dataset.drop_vars(["W", "U", "V", "gram", "dimensionality", "cosine_left", "cosine_right"]),
                         known(dataset))  # fmt: skip
    assert lacking["dynamics/t_align"].happened.all()  # as many singular vectors as dimensions
    assert not lacking["dynamics/t_ortho"].happened.any()
    assert "cannot be computed from what the run kept" in lacking["dynamics/t_ortho"].sentence().text


def test_a_curve_is_told_by_its_first_and_last_number():
    steps, curve = np.array([0, 1, 10, 1000]), np.array([np.nan, 0.5, 0.25, np.nan])
    assert from_to("it", steps, curve, name="x").text == "it: 0.5 at step 1 and 0.25 at step 10."
    assert from_to("it", steps, np.array([np.nan, 0.5, np.nan, np.nan]), name="x") is None
    assert joined(["One.", None, Sentence("Two.", {})]) == "One. Two."
    assert [number(v) for v in (0, 0.12345, 172.5, 12345.0, np.nan, 1e20)] == [
        "0", "0.123", "172", "12,345", "no number", "1e+20",
    ]  # fmt: skip


@needs_browser
@pytest.mark.parametrize("name", ["nothing happens", "one step", "nothing moves"])
def test_a_browser_draws_every_figure_of_runs_in_which_nothing_happens(pages, name):
    assert assert_every_figure_is_drawn(pages(name)[1], width=1440, dark=False) > 3


@needs_browser
@pytest.mark.parametrize("name", ["one diverged", "all diverged", "all NaN from the start"])
def test_a_browser_opens_the_page_of_a_run_that_diverged_and_the_slider_says_that_it_has_no_numbers(pages, name):
    values, errors = in_browser(
        pages(name)[1],
        "document.getElementById('explorer-now').textContent",
        "document.querySelectorAll('.js-plotly-plot').length",
        "document.documentElement.scrollWidth <= window.innerWidth",
        width=390,
        dark=True,
    )
    assert errors == []
    assert values == ["step 400: no number was measured", values[1], True]
    assert values[1] > 3
