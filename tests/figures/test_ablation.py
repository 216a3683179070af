"""The figure of removed contributions has means over prompts and their intervals."""

import numpy as np
import pytest
from figures.head_datasets import N_REMOVED, P, named, synthetic, values_in, without

from svf_lightning.figures import causal


@pytest.fixture(scope="module")
def run():
    return synthetic()


def test_causal_has_the_mean_change_and_its_confidence_interval_for_every_choice(run):
    figure = causal(run)
    for axis, name in (("x", "causal/attention"), ("x2", "causal/logit_difference")):
        for i, kind in enumerate(("largest contributions", "random others", "largest singular values")):
            values = run[name].values[-1, :, i]
            line = named(figure, kind, axis)
            np.testing.assert_allclose(line.y, values.mean(-1))
            np.testing.assert_allclose(line.error_y.array, 1.96 * values.std(-1, ddof=1) / np.sqrt(P))
            np.testing.assert_array_equal(line.customdata, np.arange(1, N_REMOVED + 1))
            np.testing.assert_allclose(line.x, line.customdata, atol=0.2)
    assert "the 1 head of" in figure.layout.title.text
    assert "13 prompts · L4H2 at once" in figure.layout.title.subtitle.text


def test_causal_leaves_out_pairs_without_a_number(run):
    line = named(causal(without(run, "causal/attention", -1, 4, 0, 3)), "largest contributions")
    values = np.delete(run["causal/attention"].values[-1, 4, 0], 3)
    assert line.y[4] == pytest.approx(values.mean())
    assert line.error_y.array[4] == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(P - 1))


def test_the_table_of_causal_has_the_mean_change_for_every_number_and_choice(run):
    table = causal.table(run)
    for quantity in ("attention", "logit_difference"):
        values = values_in(table, quantity, ["n_removed", "kind"])
        np.testing.assert_allclose(values, run[f"causal/{quantity}"].values[-1].mean(-1).ravel())
    assert set(table["n_removed"]) == set(range(1, N_REMOVED + 1))
    assert set(table["kind"]) == {"largest contributions", "random others", "largest singular values"}


def test_causal_draws_a_run_of_version_0_1_0_too(run):
    """There the prompts had another name in these two quantities."""
    names = ["causal/attention", "causal/logit_difference"]
    old = run.drop_vars(names).assign({name: run[name].rename(prompt="pair") for name in names})
    assert causal(old) == causal(run)
