"""The figure of moved directions has means over templates and their intervals, and says what they say."""

import numpy as np
import pytest
from figures.head_datasets import N_TEMPLATES, T, named, synthetic, values_in

from svf_lightning.errors import InputError
from svf_lightning.figures import interventions
from svf_lightning.metrics import mean_interval

OPERATIONS = [
    "1 direction taken out",
    "4 directions taken out",
    "4 directions doubled",
    "4 directions as in the same prompt with the names exchanged",
    "4 directions as in the same prompt with a third name",
]
EFFECTS = ("attention", "logit_difference", "divergence")


@pytest.fixture(scope="module")
def run():
    return synthetic()


def values_of(run, effect):
    """Of the last row that was measured [operation, side, choice, template]."""
    ablated, boosted, patched = (
        run[f"directions/{kind}/{effect}"].values[T - 2] for kind in ("ablated", "boosted", "patched")
    )
    return np.concatenate([ablated, boosted[None], patched[:2]])


def test_every_operation_is_a_row_with_means_over_templates_and_their_intervals(run):
    figure = interventions(run)
    titles = [one.text for one in figure.layout.annotations]
    assert titles == [f"<b>{operation}</b>" for operation in OPERATIONS]
    for column, effect in enumerate(EFFECTS):
        values = values_of(run, effect)
        for row in range(len(OPERATIONS)):
            number = 3 * row + column + 1
            axis = f"x{number if number > 1 else ''}"
            for side, name in enumerate(("what the query is made of", "what the keys are made of")):
                points = named(figure, name, axis)
                np.testing.assert_allclose(points.x, values[row, side].mean(-1))
                low, high = mean_interval(values[row, side, 0])
                assert points.x[0] + points.error_x.array[0] == pytest.approx(high)
                assert points.x[0] - points.error_x.arrayminus[0] == pytest.approx(low)
    assert "step 100" in figure.layout.title.subtitle.text  # the last one that was measured
    assert f"{N_TEMPLATES} templates" in figure.layout.title.subtitle.text


def test_the_table_has_every_mean(run):
    table = interventions.table(run)
    for effect in EFFECTS:
        values = values_in(table, effect, ["operation", "side", "choice"])
        np.testing.assert_allclose(values, values_of(run, effect).mean(-1).ravel())


@pytest.mark.parametrize(
    ("shift", "words", "happened"),
    [(5.0, "more than", True), (-5.0, "less than", False), (0.0, "not clearly more than", False)],
)
def test_the_sentence_says_whether_the_strongest_control_is_exceeded(run, shift, words, happened):
    name = "template/directions/query/divergence"
    spread = np.tile(np.linspace(-1, 1, N_TEMPLATES), (T, 1))
    dims = ("step", "template")
    changed = run.assign({name: (dims, spread + shift), f"{name}_strongest_control": (dims, 0 * spread)})
    query, _ = interventions.sentences(changed)
    assert f" nats, {words} with the strongest control" in query.text
    assert query.happened is happened
    assert f"By themselves, {T - 2} of 2 heads go beyond every control." in query.text


def test_without_a_measured_checkpoint_there_is_no_figure(run):
    empty = run.assign({"directions/boosted/divergence": run["directions/boosted/divergence"] * np.nan})
    with pytest.raises(InputError, match="holds no score"):
        interventions(empty)
