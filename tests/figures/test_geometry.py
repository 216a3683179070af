"""Cosines between features, and dimensions per feature (Fig. 1)."""

import numpy as np
import pytest
import xarray as xr
from figures.datasets import KEY, QUERY, D, N, last, named, synthetic, traces

from svf_lightning.figures import fig_1a, fig_1b


@pytest.fixture(scope="module")
def run():
    return synthetic()


def unordered(z, order):
    """Undo the order of the rows and columns of a heat map."""
    z = np.array(z)
    out = np.full_like(z, np.nan)
    out[np.ix_(order, order)] = z
    return out


@pytest.mark.parametrize("signed", [False, True])
def test_fig_1a_cosines_and_dimensions(run, signed):
    figure = fig_1a(run, instance=1, signed=signed)
    (heat,) = traces(figure, "heatmap")
    order = [int(text) for text in figure.layout.xaxis.ticktext]
    gram = last(run, "gram", instance=1)
    np.testing.assert_allclose(unordered(heat.z, order), gram if signed else abs(gram))
    np.testing.assert_allclose(unordered(heat.customdata[..., 2], order), gram, rtol=1e-6)
    np.testing.assert_array_equal(heat.customdata[..., 0], np.repeat(np.array(order)[:, None], N, axis=1))
    np.testing.assert_array_equal(heat.customdata[..., 1], heat.customdata[..., 0].T)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1 if signed else 0, 1)
    np.testing.assert_array_equal(named(figure, "instance 1").y, last(run, "dimensionality", instance=1))
    others = named(figure, "other instances")
    np.testing.assert_array_equal(others.y, last(run, "dimensionality", instance=[0, 2]).ravel())
    np.testing.assert_array_equal(others.x, [*range(N), *range(N)])
    assert figure.layout.yaxis.scaleanchor == "x"  # cells are squares


def test_antipodal_features_stand_side_by_side(run):
    directions = np.eye(D)[[0, 1, 2, 3, 0, 4, 1, 2, 4, 3, 4]]
    signs = np.array([1, 1, 1, 1, -1, 1, -1, -1, -1, -1, 0.5])[:, None]
    x = directions * signs
    gram = np.broadcast_to(x @ x.T, run["gram"].shape)
    figure = fig_1a(run.assign(gram=(run["gram"].dims, gram)))
    order = [int(text) for text in figure.layout.xaxis.ticktext]
    assert sorted(order) == list(range(N))
    assert {frozenset(order[i : i + 2]) for i in range(0, 10, 2)} == {
        frozenset(pair) for pair in ((0, 4), (1, 6), (2, 7), (3, 9), (5, 8))
    }


def test_fig_1b_first_and_last_step_with_attended_features_first(run):
    figure = fig_1b(run, instance=2)
    order = [int("".join(filter(str.isdigit, text))) for text in figure.layout.yaxis.ticktext]
    assert order[:4] == [*QUERY, *KEY]
    assert figure.layout.yaxis.ticktext[:4] == ("<b>query 4</b>", "<b>query 2</b>", "<b>key 9</b>", "<b>key 0</b>")
    for heat, step in zip(traces(figure, "heatmap"), (0, -1), strict=True):
        gram = run["gram"].isel(step=step, instance=2).values
        np.testing.assert_allclose(unordered(heat.z, order), abs(gram))
    assert [a.text for a in figure.layout.annotations] == ["step 0", "step 120", "step 120"]
    lines = [shape for shape in figure.layout.shapes if shape.line.dash is None]
    assert {shape.x0 for shape in lines} | {shape.y0 for shape in lines} == {0, 3.5}


def test_the_cells_of_a_very_large_heat_map_tell_their_value_alone(run, monkeypatch):
    monkeypatch.setattr("svf_lightning.figures.axes._TOLD_CELLS", N * N - 1)
    (heat,) = traces(fig_1a(run), "heatmap")
    assert heat.customdata is None
    assert heat.hovertemplate == "%{z:.3f}<extra></extra>"


def test_a_hundred_features_are_grouped_instead_of_numbered():
    n, pairs = 100, 20
    rng = np.random.default_rng(1)
    run = xr.Dataset(
        {
            "gram": (("step", "instance", "feature", "feature_2"), rng.uniform(-1, 1, (2, 1, n, n))),
            "dimensionality": (("step", "instance", "feature"), rng.uniform(0, 1, (2, 1, n))),
        },
        coords={"step": [0, 9], "query_feature": ("pair", np.arange(20)), "key_feature": ("pair", 20 + np.arange(20))},
    )
    axis = fig_1b(run).layout.yaxis
    assert axis.ticktext == ("<b>query</b>", "<b>key</b>", "other")
    assert axis.tickvals == ((pairs - 1) / 2, pairs + (pairs - 1) / 2, (2 * pairs + n - 1) / 2)
