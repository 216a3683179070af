"""Features against singular vectors (Fig. 2), and which of them pairs share."""

import numpy as np
import pytest
from figures.datasets import KEY, QUERY, N, last, named, synthetic, traces

from svf_lightning.figures import fig_2a, fig_2b, pair_map
from svf_lightning.figures.figure import FIGURES


@pytest.fixture(scope="module")
def run():
    return synthetic()


@pytest.mark.parametrize("name", ["fig_2a", "fig_2b"])
def test_fig_2_features_against_singular_vectors(run, name):
    figure = FIGURES[name](run, instance=1)
    order = [*QUERY, *KEY, *(f for f in range(N) if f not in {*QUERY, *KEY})]
    left, right = traces(figure, "heatmap")
    np.testing.assert_allclose(left.z, last(run, "cosine_left", instance=1)[order], rtol=1e-6)
    np.testing.assert_allclose(right.z, last(run, "cosine_right", instance=1)[order], rtol=1e-6)
    np.testing.assert_array_equal(left.customdata[0, 2, :2], [4, 3])
    assert left.hovertemplate.startswith("feature %{customdata[0]}, u<sub>%{customdata[1]}</sub>")
    assert figure.layout.xaxis.ticktext == tuple("1234567")


def test_fig_2a_singular_values_stand_above_their_vectors(run):
    figure = fig_2a(run, instance=1)
    for bar, heat in zip(traces(figure, "bar"), traces(figure, "heatmap"), strict=True):
        np.testing.assert_array_equal(bar.y, last(run, "singular_values", instance=1))
        assert bar.xaxis == heat.xaxis
        np.testing.assert_array_equal(bar.x, heat.x)


def test_fig_2b_singular_values_against_target_logits(run):
    index = run["pair/index"].copy()
    index[-1, 0, 1] = -1  # this pair was left over, so it has no singular value
    figure = fig_2b(run.assign({"pair/index": index}), instance=1)
    sigma, target = last(run, "pair/sigma"), run["target_logit"].values
    own = named(figure, "instance 1")
    np.testing.assert_array_equal(own.y, sigma[1])
    np.testing.assert_array_equal(own.x, target[1])
    np.testing.assert_array_equal(own.customdata, [4, 2])
    others = [t for t in figure.data if t.name == "other instances"]
    np.testing.assert_array_equal([t.y for t in others], [[sigma[0, 0], np.nan], sigma[2]])
    np.testing.assert_array_equal([t.x for t in others], target[[0, 2]])
    assert [t.showlegend for t in others] == [True, False]


def test_pair_map_multiplies_left_and_right_cosines(run):
    index = run["pair/index"].copy()
    index[-1, 1, 0] = -1
    figure = pair_map(run.assign({"pair/index": index}), instance=1)
    (heat,) = traces(figure, "heatmap")
    left, right = last(run, "cosine_left", instance=1), last(run, "cosine_right", instance=1)
    np.testing.assert_allclose(heat.z, [left[i] * right[j] for i, j in zip(QUERY, KEY, strict=True)])
    circles = named(figure, "matched one to one")
    np.testing.assert_array_equal([circles.x, circles.y], [[1], [1]])  # the second pair at the second index
