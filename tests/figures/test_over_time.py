"""Alignment and orthogonality over training (Fig. 3), singular values, every pair, and a cone of features."""

import numpy as np
import pytest
import xarray as xr
from figures.datasets import N_I, STRENGTHS, cone, named, synthetic, traces

from svf_lightning.errors import InputError
from svf_lightning.figures import alignment_over_time, cone_over_time, fig_3, spectrum_over_time
from svf_lightning.figures.axes import MAX_POINTS


@pytest.fixture(scope="module")
def run():
    return synthetic()


def changes(steps):
    """Alignment rises from 0 to 1 between two steps, attended-vs-rest falls later; one instance differs."""
    steps = np.asarray(steps)
    run = synthetic(steps)

    def ramp(start, end):
        return np.clip((steps[:, None] - np.asarray(start)) / (np.asarray(end) - np.asarray(start)), 0, 1)

    dims = ("step", "instance")
    return run.assign(
        {
            "alignment/matched": (dims, ramp([0, 0, 10], [100, 200, 310])),
            "orthogonality/attended_vs_rest": (dims, 1 - ramp([300, 300, 300], [400, 500, 700])),
        }
    )


def test_fig_3_lines_means_and_times_of_change():
    run = changes(range(0, 801, 10))
    figure = fig_3(run)
    for name, text, times in (
        ("alignment/matched", "alignment of singular vectors", [90, 180, 280]),
        ("orthogonality/attended_vs_rest", "attended against other features", [390, 480, 660]),
    ):
        values = run[name].values
        for i in range(N_I):
            line = named(figure, f"{text}, instance {i}")
            np.testing.assert_array_equal(line.x, run["step"])
            np.testing.assert_array_equal(line.y, values[:, i])
        symbol = "t<sub>align</sub>" if name.startswith("align") else "t<sub>ortho</sub>"
        mean = named(figure, f"{text}, {symbol} = {times[1]}")
        np.testing.assert_allclose(mean.y, values.mean(1))
        dots = named(figure, symbol)
        np.testing.assert_array_equal(dots.x, times)
        np.testing.assert_array_equal(dots.y, [values[t // 10, i] for i, t in enumerate(times)])
        assert times[1] in [shape.x0 for shape in figure.layout.shapes]
        assert mean.line.width > named(figure, f"{text}, instance 0").line.width
    assert figure.layout.xaxis.title.text == "training step"
    assert figure.layout.yaxis.title.text == "|cosine|"


def test_fig_3_on_a_log_axis_keeps_step_0():
    figure = fig_3(changes(range(0, 801, 10)), x_axis="log")
    line = named(figure, "alignment of singular vectors, instance 0")
    assert figure.layout.xaxis.type == "log"
    assert line.x[0] == pytest.approx(10**0.5)  # half a decade before step 10
    np.testing.assert_array_equal(line.x[1:], range(10, 801, 10))
    np.testing.assert_array_equal(line.customdata, range(0, 801, 10))
    assert dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True)) == pytest.approx(
        {"0": 10**0.5, "10": 10, "100": 100}
    )
    with pytest.raises(InputError, match="x_axis='symlog'"):
        fig_3(changes(range(0, 801, 10)), x_axis="symlog")


def test_a_curve_that_moves_and_arrives_nowhere_has_no_time():
    run = changes(range(0, 801, 10))
    figure = fig_3(run.assign({"alignment/matched": 0.3 * run["alignment/matched"]}))
    name = "alignment of singular vectors, t<sub>align</sub>: did not happen in any of 3 instances"
    np.testing.assert_allclose(named(figure, name).y, 0.3 * run["alignment/matched"].values.mean(1))
    assert not [t for t in figure.data if t.name == "t<sub>align</sub>"]
    assert len([shape for shape in figure.layout.shapes if shape.line.dash == "dot"]) == 1  # that of orthogonality


def test_an_instance_that_diverged_is_left_out():
    run = changes(range(0, 801, 10))
    broken = run["alignment/matched"].copy()
    broken[:, 1] = np.nan
    figure = fig_3(run.assign({"alignment/matched": broken}))
    assert not [t for t in figure.data if t.name == "alignment of singular vectors, instance 1"]
    mean = named(figure, "alignment of singular vectors, t<sub>align</sub> = 185 in 2 of 3 instances")
    np.testing.assert_allclose(mean.y, broken.values[:, [0, 2]].mean(1))


@pytest.mark.parametrize("x_axis", ["linear", "log"])
@pytest.mark.parametrize("steps", [np.arange(5001), np.unique(np.geomspace(7, 1e5, 3000).astype(int))])
def test_long_lines_are_thinned_along_the_step_axis(x_axis, steps):
    series = np.arange(len(steps)) * [[1.0], [2.0]]
    run = xr.Dataset(
        dict.fromkeys(("alignment/matched", "orthogonality/attended_vs_rest"), (("instance", "step"), series)),
        coords={"step": steps},
    )
    line = named(fig_3(run, x_axis=x_axis), "alignment of singular vectors, instance 1")
    assert 100 < len(line.y) <= MAX_POINTS
    assert line.customdata[0] == steps[0]
    assert line.customdata[-1] == steps[-1]
    np.testing.assert_array_equal(steps[(line.y / 2).astype(int)], line.customdata)  # each value at its own step
    gaps = np.diff(np.log(line.customdata + 1) if x_axis == "log" else line.customdata)
    gaps_here = np.diff(np.log(steps + 1) if x_axis == "log" else steps)
    assert gaps.max() <= 2 * max(gaps_here.max(), (np.sum(gaps_here)) / (MAX_POINTS - 1)) + 1e-9


def test_spectrum_over_time_marks_what_belongs_to_pairs(run):
    figure = spectrum_over_time(run, instance=1)
    values = run["singular_values"].isel(instance=1).values
    own = [t for t in figure.data if t.name == "of a target pair"]
    np.testing.assert_array_equal([t.y for t in own], values[:, [1, 3]].T)
    others = [t for t in figure.data if t.name == "other singular values"]
    np.testing.assert_array_equal([t.y for t in others], values[:, [0, 2, 4, 5, 6]].T)
    assert sum(t.showlegend for t in own + others) == 2
    np.testing.assert_array_equal(named(figure, "target logit").y, run["target_logit"][1])


def test_alignment_over_time_has_a_line_per_pair(run):
    index = run["pair/index"].copy()
    index[3, 1, 0] = -1  # the first pair found no singular vector left at that step
    figure = alignment_over_time(run.assign({"pair/index": index}), instance=1)
    values = ((run["pair/left"] + run["pair/right"]) / 2).isel(instance=1).values
    gap = values[:, 0].copy()
    gap[3] = np.nan
    np.testing.assert_allclose(named(figure, "query 4, key 9").y, gap)
    np.testing.assert_allclose(named(figure, "query 2, key 0").y, values[:, 1])
    np.testing.assert_allclose(named(figure, "last step").y, values[-1])
    np.testing.assert_array_equal(named(figure, "last step").marker.color, run["target_logit"][1])


def test_cone_over_time_has_a_line_per_strength():
    run = cone()
    figure = cone_over_time(run)
    for axis, name in (("x", "theory/cone_left"), ("x2", "alignment/left")):
        lines = {t.name: t for t in traces(figure, "scatter", axis) if t.mode == "lines"}
        values = run[name].values
        assert list(lines) == ["strength 0.5", "strength 2"]
        np.testing.assert_allclose(lines["strength 0.5"].y, values[:, [0, 2]].mean(1))
        np.testing.assert_allclose(lines["strength 2"].y, values[:, 1])
        np.testing.assert_array_equal(lines["strength 2"].x, run["step"])
        (dots,) = [t for t in traces(figure, "scatter", axis) if t.mode == "markers"]
        np.testing.assert_array_equal(dots.y, values[-1])
        np.testing.assert_array_equal(dots.marker.color, STRENGTHS)
        low, high = figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax
        assert (low, high) == (0.5, 2)
        scale = [colour for _, colour in figure.layout.coloraxis.colorscale]  # the bar has the colours of the lines
        assert [lines["strength 0.5"].line.color, lines["strength 2"].line.color] == [scale[0], scale[-1]]
    assert figure.layout.coloraxis.colorbar.ticktext == ("0.5", "2")
    assert not cone_over_time(run.isel(instance=[1])).layout.coloraxis.showscale
