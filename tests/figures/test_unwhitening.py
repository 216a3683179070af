"""The figure of un-whitened singular vectors shows every head beside the null, and says "no" where it is one."""

import numpy as np
import pytest
from figures.head_datasets import SIDES, H, L, T, named, synthetic, values_in

from svf_lightning.errors import InputError
from svf_lightning.figures import unwhitening
from svf_lightning.metrics import mean_interval

FORMS = {"x": "plain_", "x2": ""}


@pytest.fixture(scope="module")
def run():
    return synthetic()


def last(run, name):
    return run[f"unwhitening/{name}"].values[-1]


def test_every_head_is_a_point_beside_the_random_directions_of_its_layer(run):
    figure = unwhitening(run)
    for axis, prefix in FORMS.items():
        for side in SIDES:
            points = named(figure, f"first {side} singular vectors", axis)
            np.testing.assert_allclose(points.y, last(run, f"{prefix}{side}").ravel())
            np.testing.assert_allclose(points.customdata, [[layer, head] for layer in range(L) for head in range(H)])
            np.testing.assert_allclose(np.round(points.x), np.repeat(np.arange(L), H))
            line = named(figure, f"random directions, {side}", axis)
            np.testing.assert_allclose(line.y, last(run, f"{prefix}random_{side}").mean(-1))
    assert "4,321 tokens" in figure.layout.title.subtitle.text
    assert "step 700" in figure.layout.title.subtitle.text


def test_the_table_has_every_head(run):
    table = unwhitening.table(run)
    for field, end in (("cosine", ""), ("random", "random_"), ("percentile", "percentile_")):
        values = values_in(table, field, ["form", "side", "layer", "head"])
        expected = [[last(run, f"{prefix}{end}{side}") for side in SIDES] for prefix in FORMS.values()]
        np.testing.assert_allclose(values, np.ravel(expected))


@pytest.mark.parametrize(
    ("middle", "words", "happened"),
    [(0.8, "nearer than", True), (0.2, "not nearer than", False), (0.5, "not clearly nearer than", False)],
)
def test_the_sentence_holds_the_mean_percentile_against_a_half(run, middle, words, happened):
    spread = np.tile(np.linspace(-0.2, 0.2, L * H).reshape(L, H), (T, 1, 1)) + middle
    changed = run.assign({"unwhitening/percentile_left": (("step", "layer", "head"), spread)})
    sentence = unwhitening.sentences(changed)[2]
    assert sentence.text.startswith(f"First left singular vectors un-whitened: {words} by chance.")
    assert sentence.happened is happened
    low, high = mean_interval(spread[-1].ravel())
    assert (sentence.evidence["low"], sentence.evidence["high"]) == pytest.approx((low, high))


def test_without_a_number_there_is_no_figure(run):
    names = [name for name in run if name.startswith("unwhitening/")]
    with pytest.raises(InputError, match="holds no score"):
        unwhitening(run.assign({name: run[name] * np.nan for name in names}))
    with pytest.raises(InputError, match="unwhitening/left"):
        unwhitening(run.drop_vars("unwhitening/left"))
