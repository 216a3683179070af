"""What all figures of the toy model have in common: titles, tables, options, and refusals of what lacks their data."""

from typing import get_type_hints

import jaxtyping
import numpy as np
import plotly.graph_objects as go
import pytest
from figures.datasets import N_I, NAMES, SPECIAL, R, named, rotary, run_for, several_heads, traces
from helpers.training import train

from svf_lightning.callbacks import (
    Capture,
    FeatureOrthogonality,
    HeadSharing,
    SVDAlignment,
    TheoryGap,
    TrajectoryWriter,
)
from svf_lightning.errors import InputError
from svf_lightning.figures import by_offset, cone_over_time, fig_1a, fig_2a, fig_3, head_shares
from svf_lightning.figures.figure import FIGURES
from svf_lightning.figures.look import TEMPLATES
from svf_lightning.trajectory import open_trajectory


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_names_its_axes_and_what_it_was_drawn_from(name):
    figure = FIGURES[name](run_for(name))
    assert isinstance(figure, go.Figure)
    assert FIGURES[name].description
    assert FIGURES[name].paper.startswith(("Fig.", "appendix"))
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


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_can_change_its_theme(name):
    figure = FIGURES[name](run_for(name))
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
        ("head_shares", "head/share", "HeadSharing.*n_heads=4"),
        ("head_shares", "heads/best", "HeadSharing.*n_heads=4"),
        ("by_offset", "alignment/matched", "SVDAlignment"),
        ("cone_over_time", "theory/cone_left", "TheoryGap"),
        ("cone_over_time", "cone_strength", "init_features=cone"),
    ],
)
def test_a_missing_quantity_is_named_with_what_to_do(name, lacking, fix):
    with pytest.raises(InputError, match=f"'{lacking}'.*Fix: .*{fix}"):
        FIGURES[name](run_for(name).drop_vars(lacking))


@pytest.mark.parametrize(
    "name", ["fig_1b", "fig_3", "spectrum_over_time", "alignment_over_time", "head_shares", "cone_over_time"]
)
def test_what_happens_over_time_needs_two_steps(name):
    with pytest.raises(InputError, match="2 captured steps or more, and the run has 1"):
        FIGURES[name](run_for(name).isel(step=[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_rows_or_instances_is_refused(name):
    run = run_for(name)
    with pytest.raises(InputError, match="the run has 0"):
        FIGURES[name](run.isel(step=[]))
    with pytest.raises(InputError, match="dimension 'instance'"):
        FIGURES[name](run.isel(instance=0))


@pytest.mark.parametrize(
    "name", ["fig_2a", "fig_2b", "fig_3", "fig_4", "spectrum_over_time", "alignment_over_time", "pair_map"]
)
@pytest.mark.parametrize(("make", "dim"), [(several_heads, "head"), (rotary, "offset")])
def test_one_head_of_several_has_to_be_selected(make, dim, name):
    run = make()
    with pytest.raises(InputError, match=rf"dimension {dim}, which.*Fix: select one: dataset\.isel\({dim}=0\)"):
        FIGURES[name](run)
    FIGURES[name](run.isel({dim: 1}))


@pytest.mark.parametrize(("name", "dim", "fix"), [("head_shares", "head", "n_heads"), ("by_offset", "offset", "rope")])
def test_a_figure_of_a_dimension_needs_it(name, dim, fix):
    with pytest.raises(InputError, match=f"dimension '{dim}'.*Fix: train with .*{fix}"):
        FIGURES[name](run_for(name).isel({dim: 0}, drop=True))


@pytest.mark.parametrize(
    "name",
    ["fig_1a", "fig_1b", "fig_2a", "fig_2b", "spectrum_over_time", "alignment_over_time", "pair_map", "head_shares"],
)
@pytest.mark.parametrize("instance", [-1, N_I])
def test_an_instance_that_was_not_trained_is_refused(name, instance):
    with pytest.raises(InputError, match=rf"instance={instance}.*0\.\.2"):
        FIGURES[name](run_for(name), instance=instance)


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
        FIGURES[name](run.assign({quantity: run[quantity] * np.nan}))


# ------------------------------------------------------------------------------------------------- data and options


@pytest.mark.parametrize("name", NAMES)
def test_the_data_have_the_types_and_shapes_that_they_are_said_to_have(name):
    data = FIGURES[name].data(run_for(name))
    hints = get_type_hints(type(data), include_extras=True)
    arrays = {field: value for field, value in data._asdict().items() if isinstance(value, np.ndarray)}
    assert arrays
    with jaxtyping.jaxtyped("context"):  # one size per dimension
        for field, value in arrays.items():
            assert isinstance(value, hints[field]), field


@pytest.mark.parametrize(
    ("name", "quantity", "dims", "source", "at"),
    [
        ("fig_1a", "gram", "step feature feature_2", "gram", {"step": [-1], "instance": 1}),
        ("fig_1a", "dimensionality", "instance feature", "dimensionality", {"step": -1}),
        ("fig_1b", "gram", "step feature feature_2", "gram", {"step": [0, -1], "instance": 1}),
        ("fig_2a", "cosine_left", "feature rank", "cosine_left", {"step": -1, "instance": 1}),
        ("fig_2a", "singular_values", "rank", "singular_values", {"step": -1, "instance": 1}),
        ("fig_2b", "cosine_right", "feature rank", "cosine_right", {"step": -1, "instance": 1}),
        ("fig_2b", "sigma", "instance pair", "pair/sigma", {"step": -1}),
        ("fig_2b", "target_logit", "instance pair", "target_logit", {}),
        ("fig_3", "alignment", "step instance", "alignment/matched", {}),
        ("fig_3", "orthogonality", "step instance", "orthogonality/attended_vs_rest", {}),
        ("fig_4", "interference", "instance", "orthogonality/interference", {"step": -1}),
        ("fig_4", "bound", "instance", "theory/bound", {"step": -1}),
        ("against_lambda", "x", "dot", "lambda_attn", {}),
        ("spectrum_over_time", "singular_values", "step rank", "singular_values", {"instance": 1}),
        ("alignment_over_time", "target_logit", "pair", "target_logit", {"instance": 1}),
        ("pair_map", "key_feature", "pair", "key_feature", {}),
        ("head_shares", "share", "head pair", "head/share", {"step": -1, "instance": 1}),
        ("head_shares", "combined", "step instance", "heads/combined", {}),
        ("by_offset", "sigma_1", "instance offset", "spectrum/sigma_1", {"step": -1}),
        ("cone_over_time", "cone_left", "step instance", "theory/cone_left", {}),
        ("cone_over_time", "cone_strength", "instance", "cone_strength", {}),
    ],
)
def test_the_table_has_the_numbers_of_the_dataset(name, quantity, dims, source, at):
    run = run_for(name)
    table = FIGURES[name].table(run, **({"instance": 1} if FIGURES[name].takes("instance") else {}))
    assert [table.columns[0], table.columns[-1]] == ["quantity", "value"]
    rows = table[table["quantity"] == quantity].dropna(axis=1, how="all")
    assert set(rows.columns) == {"quantity", *dims.split(), "value"}
    expected = run.assign_coords(rank=np.arange(1, R + 1))[source].isel(at).to_series()
    np.testing.assert_array_equal(rows[dims.split()], expected.index.to_frame())
    np.testing.assert_array_equal(rows["value"], expected)


def test_the_table_of_several_metrics_names_them():
    run = run_for("against_lambda")
    table = FIGURES["against_lambda"].table(run)
    for name in ("alignment/matched", "orthogonality/attended_vs_rest"):
        values = table[(table["quantity"] == "y") & (table["metric"] == name)].sort_values("dot")["value"]
        np.testing.assert_array_equal(values, run[name][-1])


@pytest.mark.parametrize("name", NAMES)
def test_drawing_leaves_the_data_as_they_were(name):
    shown = FIGURES[name]
    data = shown.data(run_for(name))
    first = shown.draw(data).to_json()
    for options in ({"x_axis": "log"}, {"signed": True}):
        if shown.takes(next(iter(options))):
            assert shown.draw(data, **options).to_json() != first
    assert shown.draw(data).to_json() == first == shown(run_for(name)).to_json()


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(InputError, match=f"option='color'.*an option of {name}"):
        FIGURES[name](run_for(name), color="red")


def test_a_page_shows_what_no_other_figure_shows():
    def left_out(run):
        return {name for name in NAMES if not FIGURES[name].on_page(run)}

    run = run_for("fig_1a")
    assert left_out(run) == {"fig_2a", "fig_3", "spectrum_over_time"}
    assert left_out(run.assign(U=run["W"])) == {"fig_1a", "fig_2a", "fig_3", "spectrum_over_time"}
    of_many_pairs = {"fig_2b", "pair_map", "alignment_over_time"}
    assert left_out(run.isel(pair=[0])) == {"fig_3", "spectrum_over_time", *of_many_pairs}
    assert "fig_4" in left_out(run.drop_vars("theory/predicted_cosine"))


# ------------------------------------------------------------------------------------------------- real runs


def real(folder, *measured, **model):
    callbacks = [Capture(), SVDAlignment(), FeatureOrthogonality(), *measured, TrajectoryWriter()]
    train(folder, 12, callbacks, model=model)
    return open_trajectory(folder)


def test_every_figure_draws_a_real_run(tmp_path):
    run = real(tmp_path, template="linear", n_pairs=3, lambda_attn=[1.0, 4.0, 30.0])
    for name in NAMES:
        if name not in SPECIAL:
            FIGURES[name](run)
    line = named(fig_3(run), "alignment of singular vectors, instance 2")
    np.testing.assert_allclose(line.y, run["alignment/matched"].values[:, 2])
    (heat, _) = traces(fig_2a(run, instance=1), "heatmap")
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
    fig_1a(run)
    for name in set(NAMES) - {"fig_1a"}:
        with pytest.raises(InputError, match=r"Fix: (train|run) with"):
            FIGURES[name](run)
