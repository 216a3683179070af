"""Figures hold the numbers of the dataset, say what their axes are, and refuse datasets that lack what they show."""

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from conftest import train

from svf_lightning.callbacks import (
    Capture,
    FeatureOrthogonality,
    HeadSharing,
    SVDAlignment,
    TheoryGap,
    TrajectoryWriter,
)
from svf_lightning.errors import InputError
from svf_lightning.report import figures
from svf_lightning.report.figures import (
    FIGURES,
    MAX_POINTS,
    TEMPLATES,
    across_runs,
    against,
    by_offset,
    cone_over_time,
    fig_3,
    fig_4,
    head_shares,
    save_png,
)
from svf_lightning.trajectory import open_trajectory

T, N_I, D, N, R, P = 13, 3, 5, 11, 7, 2  # one size per axis
QUERY, KEY = [4, 2], [9, 0]


def synthetic(steps=None):
    """Random numbers under the names of a run; every value differs from every other."""
    rng = np.random.default_rng(0)
    steps = np.arange(T) * 10 if steps is None else np.asarray(steps)
    n = len(steps)

    def cosines(*shape):
        return rng.uniform(0.05, 0.95, shape)

    W = rng.normal(size=(n, N_I, D, N))
    unit = W / np.linalg.norm(W, axis=-2, keepdims=True)
    per_instance = {
        f"{name}": (("step", "instance"), cosines(n, N_I))
        for name in (
            "alignment/matched",
            "orthogonality/attended_vs_rest",
            "orthogonality/interference",
            "theory/left",
            "theory/right",
            "theory/predicted_cosine",
            "theory/bound",
        )
    }
    arrays = {
        "W": (("step", "instance", "d_model", "feature"), W),
        "gram": (("step", "instance", "feature", "feature_2"), unit.swapaxes(-1, -2) @ unit),
        "dimensionality": (("step", "instance", "feature"), cosines(n, N_I, N)),
        "cosine_left": (("step", "instance", "feature", "rank"), cosines(n, N_I, N, R)),
        "cosine_right": (("step", "instance", "feature", "rank"), cosines(n, N_I, N, R)),
        "singular_values": (("step", "instance", "rank"), np.sort(cosines(n, N_I, R))[..., ::-1] * 9),
        "pair/left": (("step", "instance", "pair"), cosines(n, N_I, P)),
        "pair/right": (("step", "instance", "pair"), cosines(n, N_I, P)),
        "pair/sigma": (("step", "instance", "pair"), cosines(n, N_I, P) * 9),
        "pair/index": (("step", "instance", "pair"), np.broadcast_to([3, 1], (n, N_I, P)).copy()),
    }
    coords = {
        "step": steps,
        "lambda_attn": ("instance", [1.0, 5.0, 20.0]),
        "query_feature": ("pair", QUERY),
        "key_feature": ("pair", KEY),
        "target_logit": (("instance", "pair"), rng.uniform(1, 9, (N_I, P))),
    }
    return xr.Dataset({**per_instance, **arrays}, coords=coords)


N_HEADS, OFFSETS = 4, [1, 2, 3, 5, 8, 9]
STRENGTHS = [0.5, 2.0, 0.5]


def several_heads():
    """A run with several heads: every head has numbers of its own."""
    rng = np.random.default_rng(1)
    run = synthetic()
    share = rng.uniform(size=(T, N_I, N_HEADS, P))
    own = {
        "head/share": (("step", "instance", "head", "pair"), share / share.sum(2, keepdims=True)),
        "heads/participation": (("step", "instance"), rng.uniform(1, N_HEADS, (T, N_I))),
        "heads/best": (("step", "instance"), rng.uniform(size=(T, N_I))),
        "heads/combined": (("step", "instance"), rng.uniform(size=(T, N_I))),
    }
    return per("head", N_HEADS, run).assign(own)


def rotary():
    """A run with rotary positions: every offset has numbers of its own."""
    rng = np.random.default_rng(2)
    own = {"pair/logit": (("step", "instance", "offset", "pair"), rng.normal(size=(T, N_I, len(OFFSETS), P)))}
    own["spectrum/sigma_1"] = (("step", "instance", "offset"), rng.uniform(1, 9, (T, N_I, len(OFFSETS))))
    return per("offset", len(OFFSETS), synthetic()).assign_coords(offset=OFFSETS).assign(own)


def per(dim, size, run):
    """The run with a further dimension for all that a head has."""
    scale = xr.DataArray(np.linspace(0.5, 1, size), dims=dim)
    of_head = [name for name in run.data_vars if name.startswith(("alignment/", "pair/", "cosine_", "singular"))]
    return run.assign({name: (run[name] * scale).transpose("step", "instance", dim, ...) for name in of_head})


def cone():
    rng = np.random.default_rng(3)
    own = {name: (("step", "instance"), rng.uniform(size=(T, N_I))) for name in ("theory/cone_left", "alignment/left")}
    return synthetic().assign(own).assign_coords(cone_strength=("instance", STRENGTHS))


SPECIAL = {"head_shares": several_heads, "by_offset": rotary, "cone_over_time": cone}


@pytest.fixture(scope="module")
def run():
    return synthetic()


def run_for(name):
    """A run with what the figure shows."""
    return SPECIAL.get(name, synthetic)()


def traces(figure, kind, axis=None):
    return [t for t in figure.data if t.type == kind and (axis is None or (t.xaxis or "x") == axis)]


def named(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def last(run, name, **at):
    return run[name].isel(step=-1, **at).values


def unordered(z, order):
    """Undo the order of the rows and columns of a heat map."""
    z = np.array(z)
    out = np.full_like(z, np.nan)
    out[np.ix_(order, order)] = z
    return out


# ------------------------------------------------------------------------------------------------- all figures


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_its_axes_and_what_it_was_drawn_from(name):
    entry = FIGURES[name]
    figure = entry.draw(run_for(name))
    assert isinstance(figure, go.Figure)
    assert entry.description
    assert entry.paper.startswith(("Fig.", "appendix"))
    assert figure.layout.title.text
    subtitle = figure.layout.title.subtitle.text
    assert "120" in subtitle
    assert "3 instances" in subtitle or "instance 0 of 3" in subtitle
    for trace in figure.data:
        x, y = trace.xaxis or "x", trace.yaxis or "y"
        assert figure.layout["xaxis" + x[1:]].title.text
        if y not in ("y2", "y4"):  # these share the title on their left
            assert figure.layout["yaxis" + y[1:]].title.text
        values = np.asarray(trace.z if trace.type == "heatmap" else trace.y, dtype=float)
        assert np.isfinite(values).any()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_change_its_theme(name):
    figure = FIGURES[name].draw(run_for(name))
    assert figure.layout.font.color is None
    assert all(a.font.color is None for a in figure.layout.annotations)
    assert figure.layout.template.layout.font.color == TEMPLATES["light"].layout.font.color
    figure.update_layout(template=TEMPLATES["dark"])
    assert figure.layout.template.layout.paper_bgcolor == TEMPLATES["dark"].layout.paper_bgcolor


@pytest.mark.parametrize(
    ("name", "lacking", "fix"),
    [
        ("fig_1a", "gram", "FeatureOrthogonality"),
        ("fig_1b", "query_feature", "template that has pairs"),
        ("fig_2a", "singular_values", "SVDAlignment"),
        ("fig_2b", "target_logit", "template that has pairs"),
        ("fig_3", "alignment/matched", "SVDAlignment"),
        ("fig_3", "orthogonality/attended_vs_rest", "FeatureOrthogonality"),
        ("fig_4", "orthogonality/interference", "FeatureOrthogonality"),
        ("against_lambda", "alignment/matched", "SVDAlignment"),
        ("spectrum_over_time", "singular_values", "SVDAlignment"),
        ("alignment_over_time", "pair/right", "SVDAlignment"),
        ("pair_map", "cosine_right", "SVDAlignment"),
        ("head_shares", "head/share", "n_heads=4.*HeadSharing"),
        ("head_shares", "heads/best", "n_heads=4.*HeadSharing"),
        ("by_offset", "alignment/matched", "SVDAlignment"),
        ("cone_over_time", "theory/cone_left", "TheoryGap"),
        ("cone_over_time", "cone_strength", "init_features=cone"),
    ],
)
def test_a_missing_quantity_is_named_with_what_to_do(name, lacking, fix):
    with pytest.raises(InputError, match=f"'{lacking}'.*Fix: .*{fix}"):
        FIGURES[name].draw(run_for(name).drop_vars(lacking))


@pytest.mark.parametrize(
    "name", ["fig_1b", "fig_3", "spectrum_over_time", "alignment_over_time", "head_shares", "cone_over_time"]
)
def test_what_happens_over_time_needs_two_steps(name):
    with pytest.raises(InputError, match="2 captured steps or more, and the run has 1"):
        FIGURES[name].draw(run_for(name).isel(step=[-1]))


@pytest.mark.parametrize("name", FIGURES)
def test_a_run_without_rows_or_instances_is_refused(name):
    run = run_for(name)
    with pytest.raises(InputError, match="the run has 0"):
        FIGURES[name].draw(run.isel(step=[]))
    with pytest.raises(InputError, match="dimension 'instance'"):
        FIGURES[name].draw(run.isel(instance=0))


@pytest.mark.parametrize(
    "name", ["fig_2a", "fig_2b", "fig_3", "fig_4", "spectrum_over_time", "alignment_over_time", "pair_map"]
)
@pytest.mark.parametrize(("make", "dim"), [(several_heads, "head"), (rotary, "offset")])
def test_one_head_of_several_has_to_be_selected(make, dim, name):
    run = make()
    with pytest.raises(InputError, match=rf"dimension {dim}, which.*Fix: select one: dataset\.isel\({dim}=0\)"):
        FIGURES[name].draw(run)
    FIGURES[name].draw(run.isel({dim: 1}))


@pytest.mark.parametrize(("name", "dim", "fix"), [("head_shares", "head", "n_heads"), ("by_offset", "offset", "rope")])
def test_a_figure_of_a_dimension_needs_it(name, dim, fix):
    with pytest.raises(InputError, match=f"dimension '{dim}'.*Fix: train with .*{fix}"):
        FIGURES[name].draw(run_for(name).isel({dim: 0}, drop=True))


@pytest.mark.parametrize(
    "name",
    ["fig_1a", "fig_1b", "fig_2a", "fig_2b", "spectrum_over_time", "alignment_over_time", "pair_map", "head_shares"],
)
@pytest.mark.parametrize("instance", [-1, N_I])
def test_an_instance_that_was_not_trained_is_refused(name, instance):
    with pytest.raises(InputError, match=rf"instance={instance}.*0\.\.2"):
        FIGURES[name].draw(run_for(name), instance=instance)


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("fig_1a", "gram"),
        ("fig_1a", "dimensionality"),
        ("fig_2a", "cosine_left"),
        ("fig_2a", "singular_values"),
        ("fig_2b", "pair/sigma"),
        ("fig_3", "alignment/matched"),
        ("fig_4", "alignment/matched"),
        ("against_lambda", "alignment/matched"),
        ("alignment_over_time", "pair/left"),
        ("pair_map", "cosine_left"),
        ("head_shares", "head/share"),
        ("head_shares", "heads/best"),
        ("by_offset", "spectrum/sigma_1"),
        ("cone_over_time", "alignment/left"),
    ],
)
def test_a_run_that_diverged_says_so_instead_of_an_empty_figure(name, quantity):
    run = run_for(name)
    with pytest.raises(InputError, match=f"{quantity}.*no finite number"):
        FIGURES[name].draw(run.assign({quantity: run[quantity] * np.nan}))


# ------------------------------------------------------------------------------------------------- each figure


@pytest.mark.parametrize("signed", [False, True])
def test_fig_1a_cosines_and_dimensions(run, signed):
    figure = figures.fig_1a(run, instance=1, signed=signed)
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
    figure = figures.fig_1a(run.assign(gram=(run["gram"].dims, gram)))
    order = [int(text) for text in figure.layout.xaxis.ticktext]
    assert sorted(order) == list(range(N))
    assert {frozenset(order[i : i + 2]) for i in range(0, 10, 2)} == {
        frozenset(pair) for pair in ((0, 4), (1, 6), (2, 7), (3, 9), (5, 8))
    }


def test_fig_1b_first_and_last_step_with_attended_features_first(run):
    figure = figures.fig_1b(run, instance=2)
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
    monkeypatch.setattr("svf_lightning.report.drawing._TOLD_CELLS", N * N - 1)
    (heat,) = traces(figures.fig_1a(run), "heatmap")
    assert heat.customdata is None
    assert heat.hovertemplate == "%{z:.3f}<extra></extra>"


@pytest.mark.parametrize("name", ["fig_2a", "fig_2b"])
def test_fig_2_features_against_singular_vectors(run, name):
    figure = FIGURES[name].draw(run, instance=1)
    order = [*QUERY, *KEY, *(f for f in range(N) if f not in {*QUERY, *KEY})]
    left, right = traces(figure, "heatmap")
    np.testing.assert_allclose(left.z, last(run, "cosine_left", instance=1)[order], rtol=1e-6)
    np.testing.assert_allclose(right.z, last(run, "cosine_right", instance=1)[order], rtol=1e-6)
    np.testing.assert_array_equal(left.customdata[0, 2, :2], [4, 3])
    assert left.hovertemplate.startswith("feature %{customdata[0]}, u<sub>%{customdata[1]}</sub>")
    assert figure.layout.xaxis.ticktext == tuple("1234567")


def test_fig_2a_singular_values_stand_above_their_vectors(run):
    figure = figures.fig_2a(run, instance=1)
    for bar, heat in zip(traces(figure, "bar"), traces(figure, "heatmap"), strict=True):
        np.testing.assert_array_equal(bar.y, last(run, "singular_values", instance=1))
        assert bar.xaxis == heat.xaxis
        np.testing.assert_array_equal(bar.x, heat.x)


def test_fig_2b_singular_values_against_target_logits(run):
    index = run["pair/index"].copy()
    index[-1, 0, 1] = -1  # this pair was left over, so it has no singular value
    figure = figures.fig_2b(run.assign({"pair/index": index}), instance=1)
    sigma, target = last(run, "pair/sigma"), run["target_logit"].values
    own = named(figure, "instance 1")
    np.testing.assert_array_equal(own.y, sigma[1])
    np.testing.assert_array_equal(own.x, target[1])
    np.testing.assert_array_equal(own.customdata, [4, 2])
    others = [t for t in figure.data if t.name == "other instances"]
    np.testing.assert_array_equal([t.y for t in others], [[sigma[0, 0], np.nan], sigma[2]])
    np.testing.assert_array_equal([t.x for t in others], target[[0, 2]])
    assert [t.showlegend for t in others] == [True, False]


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


def test_an_instance_that_diverged_is_left_out():
    run = changes(range(0, 801, 10))
    broken = run["alignment/matched"].copy()
    broken[:, 1] = np.nan
    figure = fig_3(run.assign({"alignment/matched": broken}))
    assert not [t for t in figure.data if t.name == "alignment of singular vectors, instance 1"]
    mean = named(figure, "alignment of singular vectors, t<sub>align</sub> = 185")
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


def test_fig_4_measured_and_predicted_cosines(run):
    figure = fig_4(run)
    expected = {
        "trained vector and feature": last(run, "alignment/matched"),
        "Theorem 1's vector and feature, mean of all features": last(run, "theory/predicted_cosine"),
        "trained and Theorem 1's vector": (last(run, "theory/left") + last(run, "theory/right")) / 2,
        "lower bound (Theorem 2)": last(run, "theory/bound"),
    }
    assert [t.name for t in figure.data] == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(named(figure, name).y, values)
        np.testing.assert_array_equal(named(figure, name).x, last(run, "orthogonality/interference"))
    low, high = figure.layout.xaxis.range
    assert low < min(figure.data[0].x)
    assert max(figure.data[0].x) < high


@pytest.mark.parametrize("lacking", ["theory/left", "theory/predicted_cosine"])
def test_fig_4_does_without_the_theory(run, lacking):
    assert len(fig_4(run.drop_vars(lacking)).data) == 3
    assert len(fig_4(run.assign({lacking: run[lacking] * np.nan})).data) == 3


def test_against_draws_every_instance_and_the_mean_at_each_value(run):
    run = run.assign_coords(lambda_attn=("instance", [20.0, 1.0, 20.0]))
    figure = against(run, "lambda_attn", ["alignment/matched", "theory/left"])
    for name in ("alignment/matched", "theory/left"):
        mean, dots = [t for t in figure.data if t.legendgroup == name]
        values = last(run, name)
        np.testing.assert_array_equal(mean.x, [1, 20])
        np.testing.assert_allclose(mean.y, [values[1], (values[0] + values[2]) / 2])
        np.testing.assert_array_equal(dots.x, [20, 1, 20])
        np.testing.assert_array_equal(dots.y, values)
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.ticktext == ("1", "20")


@pytest.mark.parametrize(("values", "scale"), [([1, 5, 10], None), ([1, 5, 10.5], "log"), ([0, 5, 100], None)])
def test_against_has_a_log_axis_over_more_than_a_decade(run, values, scale):
    assert against(run.assign_coords(lambda_attn=("instance", values))).layout.xaxis.type == scale


def test_against_a_metric_has_no_mean(run):
    (dots,) = against(run, "orthogonality/interference", "alignment/matched").data
    np.testing.assert_array_equal(dots.x, last(run, "orthogonality/interference"))
    np.testing.assert_array_equal(dots.y, last(run, "alignment/matched"))


def test_against_says_what_it_cannot_use(run):
    with pytest.raises(InputError, match=r"lambda_atn.*did you mean 'lambda_attn'"):
        against(run, "lambda_atn")
    with pytest.raises(InputError, match=r"target_logit=\('instance', 'pair'\).*one value per instance"):
        against(run, "target_logit")
    with pytest.raises(InputError, match=r"lambda_attn=3\.0.*values that differ"):
        against(run.assign_coords(lambda_attn=("instance", [3.0] * N_I)))


def test_spectrum_over_time_marks_what_belongs_to_pairs(run):
    figure = figures.spectrum_over_time(run, instance=1)
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
    figure = figures.alignment_over_time(run.assign({"pair/index": index}), instance=1)
    values = ((run["pair/left"] + run["pair/right"]) / 2).isel(instance=1).values
    gap = values[:, 0].copy()
    gap[3] = np.nan
    np.testing.assert_allclose(named(figure, "query 4, key 9").y, gap)
    np.testing.assert_allclose(named(figure, "query 2, key 0").y, values[:, 1])
    np.testing.assert_allclose(named(figure, "last step").y, values[-1])
    np.testing.assert_array_equal(named(figure, "last step").marker.color, run["target_logit"][1])


def test_pair_map_multiplies_left_and_right_cosines(run):
    index = run["pair/index"].copy()
    index[-1, 1, 0] = -1
    figure = figures.pair_map(run.assign({"pair/index": index}), instance=1)
    (heat,) = traces(figure, "heatmap")
    left, right = last(run, "cosine_left", instance=1), last(run, "cosine_right", instance=1)
    np.testing.assert_allclose(heat.z, [left[i] * right[j] for i, j in zip(QUERY, KEY, strict=True)])
    circles = named(figure, "matched one to one")
    np.testing.assert_array_equal([circles.x, circles.y], [[1], [1]])  # the second pair at the second index


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
    axis = figures.fig_1b(run).layout.yaxis
    assert axis.ticktext == ("<b>query</b>", "<b>key</b>", "other")
    assert axis.tickvals == ((pairs - 1) / 2, pairs + (pairs - 1) / 2, (2 * pairs + n - 1) / 2)


# ------------------------------------------------------------------------------------------------- beyond one head


def test_head_shares_at_the_last_step_and_alignment_over_time():
    run = several_heads()
    figure = head_shares(run, instance=1)
    (heat,) = traces(figure, "heatmap")
    np.testing.assert_allclose(heat.z, last(run, "head/share", instance=1), rtol=1e-6)
    np.testing.assert_allclose(np.sum(heat.z, axis=0), 1)
    assert heat.text[2][1] == "head 2, pair 2 → 0<br>share "
    assert figure.layout.xaxis.ticktext == ("4 → 9", "2 → 0")
    assert figure.layout.yaxis.ticktext == tuple("0123")
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first head on top
    mean = last(run, "heads/participation").mean()
    assert f"{mean:.1f} of 4 heads" in figure.layout.title.text
    for name, text in (("heads/best", "best head"), ("heads/combined", "sum of the heads")):
        np.testing.assert_allclose(named(figure, text).y, run[name].values.mean(1))
        np.testing.assert_array_equal(named(figure, text).x, run["step"])
        np.testing.assert_array_equal(named(figure, f"{text}, instance 2").y, run[name].values[:, 2])
        assert named(figure, text).xaxis == "x2"


def test_by_offset_has_the_last_value_of_every_instance_at_its_offset():
    run = rotary()
    figure = by_offset(run)
    strongest = int(run["target_logit"].values.mean(0).argmax())
    for text, name, axis, at in (
        ("alignment", "alignment/matched", "x", {}),
        ("\u03c3<sub>1</sub>", "spectrum/sigma_1", "x2", {}),
        ("logit of the strongest pair", "pair/logit", "x2", {"pair": strongest}),
    ):
        values = last(run, name, **at)
        dots, mean = [t for t in figure.data if t.name == text]
        assert {dots.xaxis, mean.xaxis} == {axis}
        np.testing.assert_array_equal(dots.y, values.ravel())
        np.testing.assert_allclose(dots.x, OFFSETS * N_I, atol=0.2)
        np.testing.assert_array_equal([offset for _, offset in dots.customdata], OFFSETS * N_I)
        np.testing.assert_allclose(mean.y, values.mean(0))
        np.testing.assert_array_equal(mean.x, OFFSETS)
    np.testing.assert_array_equal(figure.layout.xaxis.tickvals, OFFSETS)


def test_by_offset_draws_the_target_where_it_is_known():
    run = rotary()
    target = run["target_logit"].values.mean(0)
    at_first = named(by_offset(run), "target of the strongest pair at offset 1")
    assert list(at_first.x) == [1]
    np.testing.assert_allclose(at_first.y, [target.max()])
    decay = np.exp(1 - run["offset"])
    for dims in (("instance", "offset", "pair"), ("offset", "pair", "instance")):
        decayed = run.assign_coords(target_logit=(run["target_logit"] * decay).transpose(*dims))
        curve = named(by_offset(decayed), "target of the strongest pair")
        np.testing.assert_array_equal(curve.x, OFFSETS)
        np.testing.assert_allclose(curve.y, target.max() * decay)
    alone = by_offset(run.isel(pair=[0]))
    assert named(alone, "target of the pair at offset 1").y[0] == pytest.approx(target[0])
    without = by_offset(run.drop_vars(["target_logit", "pair/logit"]))
    assert {t.name for t in without.data} == {"alignment", "\u03c3<sub>1</sub>"}


def test_by_offset_leaves_out_an_instance_that_diverged():
    run = rotary()
    sigma = run["spectrum/sigma_1"].copy()
    sigma[:, 1] = np.nan
    mean = [t for t in by_offset(run.assign({"spectrum/sigma_1": sigma})).data if t.xaxis == "x2"][1]
    np.testing.assert_allclose(mean.y, sigma.values[-1, [0, 2]].mean(0))


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


# ------------------------------------------------------------------------------------------------- several runs


def test_across_runs_has_the_final_values_of_each_run_at_its_number(run):
    runs = {"40": run.isel(instance=[0, 1]), "12": run * 0.5, 20: run.isel(step=slice(0, 5))}
    figure = across_runs(runs, "features", ["alignment/matched", "theory/left"])
    for name in ("alignment/matched", "theory/left"):
        mean, dots = [t for t in figure.data if t.legendgroup == name]
        values = [last(runs[label], name) for label in ("12", 20, "40")]
        np.testing.assert_array_equal(mean.x, [12, 20, 40])
        np.testing.assert_allclose(mean.y, [v.mean() for v in values])
        np.testing.assert_array_equal(dots.x, [12] * 3 + [20] * 3 + [40] * 2)
        np.testing.assert_array_equal(dots.y, np.concatenate(values))
        assert dots.text[3] == "instance 0 of run 20"
    assert figure.layout.xaxis.title.text == "features"
    assert figure.layout.xaxis.ticktext == ("12", "20", "40")
    assert figure.layout.xaxis.type is None
    assert figure.layout.title.subtitle.text.startswith("3 runs · 2 to 3 instances each · last steps 40 to 120")


def test_across_runs_has_a_log_axis_over_more_than_a_decade(run):
    assert across_runs({1: run, 20: run}, "heads").layout.xaxis.type == "log"


def test_across_runs_keeps_labels_that_are_no_numbers_in_their_order(run):
    figure = across_runs({"b": run, "a": run * 0.5, "3": run}, "kind")
    mean, dots = figure.data
    assert figure.layout.xaxis.ticktext == ("b", "a", "3")
    np.testing.assert_allclose(mean.y, last(run, "alignment/matched").mean() * np.array([1, 0.5, 1]))
    assert mean.mode == "markers"  # no line between labels
    np.testing.assert_array_equal(dots.x, np.repeat([0, 1, 2], N_I))


def test_across_runs_names_the_run_that_it_cannot_use(run):
    with pytest.raises(InputError, match="at least one run"):
        across_runs({}, "features")
    with pytest.raises(InputError, match=r"run 20: .*'alignment/matched'.*Fix"):
        across_runs({12: run, 20: run.drop_vars("alignment/matched")}, "features")
    with pytest.raises(InputError, match=r"run 20: .*dimension offset.*isel\(offset=0\)"):
        across_runs({12: run, 20: rotary()}, "features")
    with pytest.raises(InputError, match=r"run 20: target_logit=.*one value per instance"):
        across_runs({20: run}, "features", "target_logit")


# ------------------------------------------------------------------------------------------------- real runs


def real(folder, *measured, **model):
    callbacks = [Capture(), SVDAlignment(), FeatureOrthogonality(), *measured, TrajectoryWriter()]
    train(folder, 12, callbacks, model=model)
    return open_trajectory(folder)


def test_every_figure_draws_a_real_run(tmp_path):
    run = real(tmp_path, template="linear", n_pairs=3, lambda_attn=[1.0, 4.0, 30.0])
    for name in FIGURES.keys() - SPECIAL:
        FIGURES[name].draw(run)
    line = named(fig_3(run), "alignment of singular vectors, instance 2")
    np.testing.assert_allclose(line.y, run["alignment/matched"].values[:, 2])
    (heat, _) = traces(figures.fig_2a(run, instance=1), "heatmap")
    np.testing.assert_allclose(heat.z[:3], run["cosine_left"].isel(step=-1, instance=1).values[:3])


def test_figures_of_several_heads_offsets_and_cones_draw_real_runs(tmp_path):
    run = real(tmp_path / "heads", HeadSharing(), template="linear", n_pairs=3, n_heads=2, d_head=3)
    (heat,) = traces(head_shares(run, instance=2), "heatmap")
    np.testing.assert_allclose(np.sum(heat.z, axis=0), 1, rtol=1e-5)
    assert np.shape(heat.z) == (2, 3)
    run = real(tmp_path / "rope", template="single", rope=True, d_head=6, context_length=5)
    figure = by_offset(run)
    np.testing.assert_array_equal(figure.layout.xaxis.tickvals, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(named(figure, "target of the pair").y, run["target_logit"].values[0, :, 0])
    run = real(tmp_path / "cone", TheoryGap(), template="single", init_features="cone", cone_strength=[0.0, 1.0, 3.0])
    assert len([t for t in cone_over_time(run).data if t.mode == "lines"]) == 6


def test_a_real_run_without_a_head_has_its_geometry_only(tmp_path):
    run = real(tmp_path, template="zero")
    figures.fig_1a(run)
    for name in FIGURES.keys() - {"fig_1a"}:
        with pytest.raises(InputError, match="Fix: train with"):
            FIGURES[name].draw(run)


# ------------------------------------------------------------------------------------------------- files


def test_a_figure_becomes_a_png(run, tmp_path):
    kaleido_errors = pytest.importorskip("kaleido.errors")
    path = tmp_path / "new" / "fig.png"
    try:
        save_png(figures.pair_map(run), path, width=300, height=200)
    except InputError as error:
        if not isinstance(error.__cause__, kaleido_errors.ChromeNotFoundError):
            raise
        pytest.skip("no Chrome or Chromium")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [600, 400]


def test_a_missing_browser_is_an_error_with_a_fix(run, tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido")
    from kaleido.errors import ChromeNotFoundError

    def fail(*_, **__):
        raise ChromeNotFoundError("nowhere")

    monkeypatch.setattr(kaleido, "write_fig_sync", fail)
    with pytest.raises(InputError, match=r"Chrome or Chromium.*apt-get install chromium"):
        save_png(fig_4(run), tmp_path / "a.png")


def test_the_command_draws_what_the_run_has(tmp_path, monkeypatch, capsys):
    real(tmp_path / "run", template="zero")
    drawn = []
    monkeypatch.setattr(figures, "save_png", lambda figure, path, scale: drawn.append(path))
    assert figures.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert drawn == [tmp_path / "out" / "fig_1a.png"]
    said = capsys.readouterr()
    assert "fig_3 is left out" in said.err
    assert said.out.strip() == str(drawn[0])
    assert figures.main([str(tmp_path / "run"), str(tmp_path), "fig_3"]) == 2
    assert figures.main([str(tmp_path / "run"), str(tmp_path), "fig_10"]) == 2
    assert "figure='fig_10'" in capsys.readouterr().err
    assert figures.main([str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    assert figures.main([]) == 2


def test_the_command_passes_scales_on(tmp_path, monkeypatch):
    real(tmp_path / "run", template="single")
    drawn = {}
    monkeypatch.setattr(figures, "save_png", lambda figure, path, scale: drawn.update({path.stem: (figure, scale)}))
    options = ["--x-axis", "log", "--scale", "1.5"]
    assert figures.main([str(tmp_path / "run"), str(tmp_path), "fig_3", "fig_4", *options]) == 0
    assert [scale for _, scale in drawn.values()] == [1.5, 1.5]
    assert drawn["fig_3"][0].layout.xaxis.type == "log"
    assert drawn["fig_4"][0].layout.xaxis.type is None


def test_the_command_compares_the_runs_of_a_folder(tmp_path, monkeypatch, capsys):
    sizes = tmp_path / "sizes"
    runs = {n: real(sizes / str(n), template="single", n_features=n) for n in (9, 11)}
    (sizes / "notes").mkdir()
    drawn = {}
    monkeypatch.setattr(figures, "save_png", lambda figure, path, scale: drawn.update({path: figure}))
    out = tmp_path / "out.png"
    assert figures.main(["--across", str(sizes), str(out), "--title", "n_features"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    mean, dots = drawn[out].data
    np.testing.assert_array_equal(mean.x, [9, 11])
    np.testing.assert_array_equal(dots.y, np.concatenate([last(run, "alignment/matched") for run in runs.values()]))
    assert drawn[out].layout.xaxis.title.text == "n_features"
    metrics = ["--y", "alignment/left", "--y", "alignment/right"]
    assert figures.main(["--across", str(sizes), str(out), *metrics]) == 0
    assert {t.legendgroup for t in drawn[out].data} == {"alignment/left", "alignment/right"}
    assert drawn[out].layout.xaxis.title.text == "sizes"


def test_the_command_says_what_it_cannot_compare(tmp_path, capsys):
    assert figures.main(["--across", str(tmp_path), str(tmp_path / "a.png")]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert figures.main(["--across", str(tmp_path), "a.png", "fig_3"]) == 2
    assert figures.main([str(tmp_path), "out", "--title", "n"]) == 2
    assert "belong to --across" in capsys.readouterr().err
