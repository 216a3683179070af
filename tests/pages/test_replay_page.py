"""The page of a real short replay, opened in a real browser."""

import json

import numpy as np
import pytest
from helpers.browser import LOOKS, assert_every_figure_is_drawn, in_browser, needs_browser
from helpers.replays import STEPS, replay

from svf_lightning.callbacks import AttentionOverWords, CausalAblation
from svf_lightning.pages.run import write_run_page
from svf_lightning.pages.words import word_frames
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.trajectory import open_trajectory

EVIL = "<script>document.title='broken'</script>"
TEXTS = [
    f"When Mary and John went to the {EVIL} store, John gave a <b>drink</b> to",
    "Then, Mary and John went to the park, and John gave a ball & a book to",
    "While John and Mary were working at the office, John handed a camera to",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, suite):
    """All checkpoints of the short suite, on prompts with markup in them."""
    folder = tmp_path_factory.mktemp("replay")
    prompts = [{"text": text, "key": "Mary", "correct": "Mary", "wrong": "John"} for text in TEXTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    replay(
        FolderCheckpoints(str(suite)),
        folder / "run",
        callbacks=(CausalAblation(n_removed=4), AttentionOverWords(n_prompts=3)),
        prompts=str(folder / "prompts.jsonl"),
    )
    (folder / "run" / "config.yaml").write_text("experiment: {name: ours}")  # as the command would
    return folder / "run"


@pytest.fixture(scope="module")
def page(run_dir):
    return write_run_page(run_dir)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_browser_draws_every_figure_without_an_error(page, width, dark):
    # over training, Figs. 7a, 7b, 8, 9, map, causal, words, and what no other figure shows
    assert assert_every_figure_is_drawn(page, width=width, dark=dark) == 9


def test_the_page_says_what_each_figure_shows_and_which_of_the_paper_it_mirrors(page):
    text = page.read_text()
    for paper in ("Fig. 7a", "Fig. 7b", "Fig. 8", "Fig. 9", "beyond the paper"):
        assert f"({paper})</h2>\n<p>" in text


def set_control(name, value):
    return (
        f"(() => {{ const c = document.getElementById('words-{name}'); c.value = {value}; "
        "c.dispatchEvent(new Event(c.type === 'range' ? 'input' : 'change')); return c.value; })()"
    )


SHOWN = (
    "(() => { const figure = document.getElementById('words-figure'); return JSON.stringify("
    "figure.data.map((trace) => [trace.name, [...trace.y]])); })()"
)


@needs_browser
def test_the_head_picker_shows_the_numbers_of_the_chosen_head_prompt_and_checkpoint(page, run_dir):
    rows = open_trajectory(run_dir)
    chosen = [(0, 0, 0), (4, 1, 2), (5, 2, 4)]  # head of 2 x 3, prompt, checkpoint
    expressions = []
    for head, prompt, checkpoint in chosen:
        controls = (("head", head), ("prompt", prompt), ("checkpoint", checkpoint))
        expressions += [*(set_control(*control) for control in controls), SHOWN]
        expressions += ["document.getElementById('words-now').textContent"]
    values, errors = in_browser(page, *expressions)
    assert errors == []
    for i, (head, prompt, checkpoint) in enumerate(chosen):
        own = rows.isel(step=checkpoint, layer=head // 3, head=head % 3, shown=prompt)
        number = int(own["words/prompt"])
        n = int(rows["query_position"][number]) + 1
        traces = json.loads(values[5 * i + 3])
        relative = own["words/relative"].values[:n]
        scale = float(np.nanmax(np.abs(rows["words/relative"].isel(step=checkpoint)))) / 32767 + 1e-6
        names = [f"pair {k + 1}" for k in own["words/top_index"].values]
        assert [name for name, _ in traces] == ["attention weight", *names, "all other pairs", "sum"]
        drawn = [np.array(y, dtype=float) for _, y in traces]
        np.testing.assert_allclose(drawn[0], own["words/attention"].values[:n], atol=1e-4)
        for t in range(len(names)):
            np.testing.assert_allclose(drawn[1 + t], own["words/top"].values[:n, t], atol=2 * scale)
        np.testing.assert_allclose(drawn[-1], relative, atol=2 * scale)
        np.testing.assert_allclose(np.sum(drawn[1:-1], axis=0), relative, atol=10 * scale)  # the bars add up
        assert values[5 * i + 4].startswith(f"L{head // 3}H{head % 3}, step {STEPS[checkpoint]}: attention ")


@needs_browser
def test_words_of_a_prompt_show_as_text(page, run_dir):
    number = next(
        i for i, k in enumerate(open_trajectory(run_dir)["words/prompt"].values[-1])
        if "script" in str(open_trajectory(run_dir)["prompt_text"].values[k])
    )  # fmt: skip
    values, errors = in_browser(
        page,
        set_control("prompt", number),
        "document.getElementById('words-text').textContent",
        "document.title",
        "document.querySelector('#words-prompt').selectedOptions[0].textContent",
        "[...document.querySelectorAll('#words-figure .xtick text')].map((text) => text.textContent).join('')",
        "document.querySelectorAll('#words-text .key').length",
        "document.querySelector('#words-text .key').textContent",
    )
    assert errors == []
    assert values[1].strip() == TEXTS[0]
    assert values[2] != "broken"
    assert values[3] == TEXTS[0]
    assert "<" in values[4]
    assert ">" in values[4]
    assert values[5:] == [1, "Mary"]


def test_where_checkpoints_are_too_many_for_a_page_the_first_and_the_last_stay(run_dir, monkeypatch):
    rows = open_trajectory(run_dir)
    assert [c["name"] for c in word_frames(rows)["checkpoints"]] == [f"step {step}" for step in STEPS]
    size = 2 * 6 * 3 * (int(rows["query_position"].max()) + 1) * 7
    monkeypatch.setattr("svf_lightning.pages.words.MAX_BYTES", 2 * size)
    assert [c["name"] for c in word_frames(rows)["checkpoints"]] == ["step 0", "step 8"]
    assert word_frames(rows.drop_vars("words/top")) is None


@needs_browser
def test_a_model_with_a_single_checkpoint_has_a_page_too(suite, tmp_path):
    replay(FolderCheckpoints(str(suite / "step8")), tmp_path / "run", callbacks=(AttentionOverWords(),), n_prompts=7)
    (tmp_path / "run" / "config.yaml").write_text("experiment: {name: ours}")
    page = write_run_page(tmp_path / "run")
    assert assert_every_figure_is_drawn(page, width=1440, dark=False) == 5  # Figs. 7a, 8, 9, map, words
    values, errors = in_browser(
        page,
        "document.getElementById('words-checkpoint')",
        "document.getElementById('words-now').textContent",
    )
    assert errors == []
    assert values[0] is None
    name = str(open_trajectory(tmp_path / "run")["checkpoint"].values[0])
    assert f", {name}: attention " in values[1]
