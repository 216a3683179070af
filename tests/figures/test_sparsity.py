"""Figures of attention scores hold the numbers of the dataset, leave out what has no score, and refuse what lacks it."""

from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from figures.head_datasets import (
    NAMES,
    NO_SCORE,
    OF_HEADS,
    STEPS,
    TASK,
    H,
    L,
    P,
    R,
    T,
    named,
    run_for,
    synthetic,
    toy,
    values_in,
    with_firings,
    without,
)  # fmt: skip
from helpers.training import train

from svf_lightning.callbacks import AttentionSparsity, Capture, SVDAlignment, TrajectoryWriter
from svf_lightning.errors import InputError
from svf_lightning.figures import fig_7a, fig_7b, fig_8, fig_9, heads_map, sparsity_over_time
from svf_lightning.figures.axes import draw_band
from svf_lightning.figures.figure import FIGURES, columns_of, draw_all
from svf_lightning.figures.look import TEMPLATES
from svf_lightning.figures.sparsity import Head, named_heads
from svf_lightning.trajectory import open_trajectory


@pytest.fixture(scope="module")
def run():
    return synthetic()


SPARSENESS_NAMES = [
    "sad/sparseness_shared_rotation",
    "sad/sparseness_independent_rotation",
    "sad/sparseness_permuted_pairing",
    "sad/sparseness",
]


def of_instances(run):
    """Quantities of the toy model [metric, step, instance]."""
    return np.stack([run[name].values for name in (*SPARSENESS_NAMES, "alignment/matched")])


def of_task(run, name):
    """A quantity of the task's heads [step, head, ...]."""
    return np.stack([run[name].values[:, layer, head] for layer, head in TASK], axis=1)


CONTROLS = {
    "draw/shared": "shared rotation",
    "draw/independent": "independent rotation",
    "draw/permuted": "permuted pairing",
}


def of_draws(run):
    """S(v) under the controls, mean of the task's heads [control, step, draw]."""
    return np.stack([of_task(run, name).mean(1) for name in CONTROLS])


def groups(run, name):
    """Values of all scores, and of those of heads that attend to the key."""
    values, weight = (run[f"prompt/{each}"].values[-1] for each in (name, "attention"))
    return values[values >= 0], values[(values >= 0) & (weight >= 0.5)]


def histogram(values, at):
    """Share of the values that each of ``at`` has."""
    return [np.count_nonzero(values == n) / len(values) for n in at]


def headings(figure):
    return [a.text.split("<br>") for a in figure.layout.annotations]


def polygon(band):
    """Lower and upper edge of a band without a gap."""
    assert band.fill == "toself"
    n = (len(band.x) - 1) // 2
    np.testing.assert_array_equal(band.x[:n], band.x[n : 2 * n][::-1])
    return np.array(band.y[:n]), np.array(band.y[n : 2 * n][::-1])


# ------------------------------------------------------------------------------------------------- all figures


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_names_its_axes_and_what_it_was_drawn_from(name):
    entry = FIGURES[name]
    figure = entry(run_for(name))
    assert isinstance(figure, go.Figure)
    assert entry.description
    assert entry.paper.startswith(("Fig.", "beyond the paper"))
    assert figure.layout.title.text
    subtitle = figure.layout.title.subtitle.text
    assert ("step 100" if name == "interventions" else "700") in subtitle  # the last one that was measured
    parts = {"sparsity_over_time": ("3 instances",), "unwhitening": ("5 layers", "11 heads", "tokens")}
    for part in parts.get(name, ("5 layers", "11 heads", "prompts")):
        assert part in subtitle
    titles = [
        [figure.layout[f"{letter}axis{(t[f'{letter}axis'] or letter)[1:]}"].title.text for letter in "xy"]
        for t in figure.data
    ]
    assert all(any(column) for column in zip(*titles, strict=True))
    for trace in figure.data:
        values = np.asarray(trace.z if trace.type == "heatmap" else trace.y, dtype=float)
        assert np.isfinite(values).any()


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_can_change_its_theme(name):
    figure = FIGURES[name](run_for(name))
    assert figure.layout.font.color is None
    assert all(a.font.color is None and a.bgcolor is None for a in figure.layout.annotations)
    figure.update_layout(template=TEMPLATES["dark"])
    assert figure.layout.template.layout.paper_bgcolor == TEMPLATES["dark"].layout.paper_bgcolor


@pytest.mark.parametrize(
    ("name", "lacking", "fix"),
    [
        ("fig_7a", "contribution/mean", "the AttentionSparsity callback"),
        ("fig_7a", "contribution/sd", "the AttentionSparsity callback"),
        ("fig_7a", "task/layer_head", "the AttentionSparsity callback"),
        ("fig_7b", "prompt/sparseness", "the AttentionSparsity callback"),
        ("fig_7b", "draw/independent", "the AttentionSparsity callback"),
        ("fig_8", "prompt/top_index", "the AttentionSparsity callback"),
        ("fig_8", "prompt/attention", "the AttentionSparsity callback"),
        ("fig_9", "prompt/n_recon", "the AttentionSparsity callback"),
        ("heads_map", "sad/attention", "the AttentionSparsity callback"),
        ("heads_map", "sad/n_recon", "the AttentionSparsity callback"),
        ("causal", "causal/attention", "the CausalAblation callback.*a language model"),
        ("causal", "causal/layer_head", "the CausalAblation callback.*a language model"),
        (
            "sparsity_over_time",
            "sad/sparseness_shared_rotation",
            "the AttentionSparsity callback.*with a head.*n_attended=64",
        ),
        ("sparsity_over_time", "alignment/matched", "the SVDAlignment callback.*with a head"),
    ],
)
def test_a_missing_quantity_is_named_with_what_to_do(name, lacking, fix):
    with pytest.raises(InputError, match=f"'{lacking}'.*Fix: .*{fix}"):
        FIGURES[name](run_for(name).drop_vars(lacking))


def test_what_happens_over_training_needs_two_checkpoints(run):
    with pytest.raises(InputError, match=r"2 captured steps or more, and the run has 1.*replay several checkpoints"):
        fig_7b(run.isel(step=[-1]))
    with pytest.raises(InputError, match=r"2 captured steps or more, and the run has 1.*of a `fit`"):
        sparsity_over_time(toy().isel(step=[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_rows_is_refused(name):
    with pytest.raises(InputError, match="the run has 0"):
        FIGURES[name](run_for(name).isel(step=[]))


@pytest.mark.parametrize("name", OF_HEADS)
def test_figures_of_heads_need_layers_and_heads_and_nothing_else(name, run):
    with pytest.raises(InputError, match=r"dimension 'layer' and 'head'.*Fix: .*`replay`"):
        FIGURES[name](run.isel(layer=0, head=0))
    with pytest.raises(InputError, match=r"dimension 'layer'; .*Fix"):
        FIGURES[name](run.isel(layer=0))
    further = run.expand_dims(offset=2)
    with pytest.raises(InputError, match=r"dimension offset, which.*Fix: select one: dataset\.isel\(offset=0\)"):
        FIGURES[name](further)
    FIGURES[name](further.isel(offset=1))


def test_the_toy_figure_shows_instances_not_heads(run):
    with pytest.raises(InputError, match="dimension 'instance'"):
        sparsity_over_time(toy().isel(instance=0))
    with pytest.raises(InputError, match="dimension head, which"):
        sparsity_over_time(toy().expand_dims(head=2))


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("fig_7b", "prompt/sparseness"),
        ("fig_8", "prompt/top_index"),
        ("fig_9", "prompt/n_recon"),
        ("heads_map", "sad/sparseness"),
        ("heads_map", "sad/n_recon"),
        ("causal", "causal/attention"),
        ("causal", "causal/logit_difference"),
    ],
)
def test_a_run_without_a_score_says_so_instead_of_an_empty_figure(name, quantity, run):
    with pytest.raises(InputError, match=f"{quantity}.*no score.*Fix: .*more keys"):
        FIGURES[name](without(run, quantity, ...))


@pytest.mark.parametrize("name", ["fig_7a", "fig_8", "fig_9", "heads_map", "causal"])
def test_the_only_checkpoint_is_told_by_its_name(name, run):
    one = run.isel(step=[-1]).assign(checkpoint=("step", ["gpt2-small"]))
    subtitle = FIGURES[name](one).layout.title.subtitle.text
    assert "gpt2-small" in subtitle
    assert "step" not in subtitle


# ------------------------------------------------------------------------------------------------- numbers and drawing


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_every_figure_has_a_row_for_each_number(name):
    entry, dataset = FIGURES[name], run_for(name)
    table = entry.table(dataset)
    assert table.columns[0] == "quantity"
    assert table.columns[-1] == "value"
    sizes = {}
    for column in columns_of(entry.data(dataset)):
        assert len(column.dims) == column.values.ndim
        for dim, size in zip(column.dims, column.values.shape, strict=True):
            assert sizes.setdefault(dim, size) == size  # one size for each name of a dimension
        if column.dims != (column.name,):
            assert sum(table["quantity"] == column.name) == column.values.size
    assert set(table.columns[1:-1]) == sizes.keys()


@pytest.mark.parametrize(
    ("name", "quantity", "dims", "expected"),
    [
        ("fig_7a", "mean", ["rank"], lambda run: run["contribution/mean"][-1, 4, 2]),
        ("fig_7a", "sd", ["rank"], lambda run: run["contribution/sd"][-1, 4, 2]),
        ("fig_7a", "sigma", ["rank"], lambda run: run["singular_values"][-1, 4, 2]),
        ("fig_7b", "accuracy", ["step"], lambda run: run["sad/accuracy"]),
        ("fig_7b", "sparseness_each", ["step", "head"], lambda run: of_task(run, "prompt/sparseness").mean(2)),
        ("fig_7b", "attention_each", ["step", "head"], lambda run: of_task(run, "prompt/attention").mean(2)),
        ("fig_7b", "sparseness", ["step"], lambda run: of_task(run, "prompt/sparseness").mean((1, 2))),
        ("fig_7b", "control_highest", ["control", "step"], lambda run: of_draws(run).max(2)),
        ("fig_8", "share", ["group", "rank"], lambda run: [histogram(n, range(R)) for n in groups(run, "top_index")]),
        ("fig_8", "n_scores", ["group"], lambda run: [len(n) for n in groups(run, "top_index")]),
        ("fig_8", "share_in_last_eighth", ["group"], lambda run: [np.mean(n >= R - 2) for n in groups(run, "top_index")]),
        ("fig_9", "share", ["group", "n_recon"],
         lambda run: [histogram(n, range(1, R + 1)) for n in groups(run, "n_recon")]),
        ("fig_9", "median", ["group"], lambda run: [np.median(n) for n in groups(run, "n_recon")]),
        ("fig_9", "share_at_most_4", ["group"], lambda run: [np.mean(n <= 4) for n in groups(run, "n_recon")]),
        ("heads_map", "attention", ["layer", "head"], lambda run: run["sad/attention"][-1]),
        ("heads_map", "sparseness", ["layer", "head"], lambda run: run["sad/sparseness"][-1]),
        ("heads_map", "n_recon", ["layer", "head"], lambda run: run["sad/n_recon"][-1]),
        ("sparsity_over_time", "mean", ["metric", "step"], lambda run: of_instances(run).mean(2)),
        ("sparsity_over_time", "lowest", ["metric", "step"], lambda run: of_instances(run).min(2)),
        ("sparsity_over_time", "highest", ["metric", "step"], lambda run: of_instances(run).max(2)),
    ],
)  # fmt: skip
def test_the_table_holds_the_numbers_of_the_dataset(name, quantity, dims, expected):
    dataset = run_for(name)
    np.testing.assert_allclose(values_in(FIGURES[name].table(dataset), quantity, dims), np.ravel(expected(dataset)))


def test_fig_7b_shows_the_heads_that_are_named_in_place_of_the_tasks():
    run, heads = run_for("fig_7b"), [Head(1, 3), Head(2, 10), Head(0, 0)]
    data, figure = fig_7b.data(run, heads=heads), fig_7b(run, heads=heads)
    assert data.head.tolist() == ["L1H3", "L2H10", "L0H0"]
    for i, head in enumerate(heads):
        expected = run["prompt/sparseness"].values[:, head.layer, head.head].mean(-1)
        np.testing.assert_allclose(data.sparseness_each[:, i], expected)
    assert "chosen heads" in figure.layout.title.text
    assert "the task's heads" in fig_7b(run).layout.title.text
    with pytest.raises(InputError, match=r"layer=5 .*0\.\.4"):
        fig_7b(run, heads=[Head(5, 0)])


@pytest.mark.parametrize(("names", "expected"), [
    ("8.6,4.11", [(8, 6), (4, 11)]),
    (" 0.0 , 10.10 ", [(0, 0), (10, 10)]),
    ("paper_gpt2", [(8, 6), (4, 11), (3, 0), (9, 9), (9, 6), (10, 0)]),
    ("paper_pythia_160m", [(2, 6), (4, 11), (7, 9), (8, 2), (8, 10), (10, 7)]),
])  # fmt: skip
def test_heads_are_named_by_layer_and_number_or_by_preset(names, expected):
    assert named_heads(names) == expected


@pytest.mark.parametrize("names", ["", "8", "8.6,", "8.6.1", "L8H6", "8.6,8.6", "gpt2", "-1.2"])
def test_what_names_no_heads_is_an_input_error_that_says_how(names):
    with pytest.raises(InputError, match=r"heads=.*LAYER\.HEAD.*paper_gpt2.*write 8\.6,4\.11"):
        named_heads(names)


@pytest.mark.parametrize(("name", "quantity"), [
    ("fig_8", "firings/top_index_histogram"), ("fig_9", "firings/n_recon_histogram")
])  # fmt: skip
def test_firings_alone_are_drawn_where_prompts_have_no_key(name, quantity):
    run = with_firings(synthetic())
    keyless = run.drop_vars([v for v in run.data_vars if not str(v).startswith("firings/")])
    with_both, alone = FIGURES[name].data(run), FIGURES[name].data(keyless)
    assert list(alone.group) == list(with_both.group[:1])
    assert alone.n_scores[0] == with_both.n_scores[0] == float(run[quantity][-1].sum())
    kept = alone.share[0][: with_both.share.shape[1]]
    np.testing.assert_allclose(kept, with_both.share[0][: len(kept)])
    assert FIGURES[name](keyless).data
    nothing = keyless.assign({v: keyless[v] * 0 for v in keyless.data_vars})
    with pytest.raises(InputError, match=r"no head attends.*lower its tau"):
        FIGURES[name](nothing)


def test_the_table_names_steps_heads_and_singular_indices_as_the_figure_does():
    over_steps, of_one, of_toy = (
        FIGURES[name].table(run_for(name)) for name in ("fig_7b", "fig_7a", "sparsity_over_time")
    )
    assert set(over_steps["step"].dropna()) == set(STEPS)
    assert set(over_steps["head"].dropna()) == {"L4H2", "L0H9"}
    assert set(over_steps["control"].dropna()) == set(CONTROLS.values())
    assert set(of_one["rank"]) == set(range(1, R + 1))
    assert set(of_toy["metric"]) == {*SPARSENESS_NAMES, "alignment/matched"}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_are_drawn_alike(name):
    data = FIGURES[name].data(run_for(name))
    first = FIGURES[name].draw(data).to_json()
    assert FIGURES[name].draw(data).to_json() == first
    assert FIGURES[name](run_for(name)).to_json() == first


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(InputError, match=rf"option='colour'.*an option of {name}"):
        FIGURES[name](run_for(name), colour="red")


def test_all_figures_of_a_replay_are_drawn_with_steps_on_a_logarithmic_axis(run):
    drawn = draw_all(run, among=lambda figure: figure.name in NAMES)
    assert drawn.keys() == set(OF_HEADS)
    assert drawn["fig_7b"].layout.xaxis.type == "log"
    assert list(draw_all(toy(), among=lambda figure: figure.name in NAMES)) == ["sparsity_over_time"]


def test_replays_are_compared_by_one_head_and_by_the_map_of_all():
    assert {name for name in NAMES if FIGURES[name].compared} == {"fig_7a", "heads_map"}
    assert {name for name in NAMES if FIGURES[name].view} == {"fig_7a", "fig_7b", "fig_8", "fig_9", "heads_map"}


# ------------------------------------------------------------------------------------------------- each figure


def test_fig_7a_has_mean_and_spread_of_every_contribution_of_the_tasks_first_head(run):
    figure = fig_7a(run)
    assert "L4H2" in figure.layout.title.text
    bars = named(figure, "mean over prompts")
    at = {"step": -1, "layer": 4, "head": 2}
    np.testing.assert_array_equal(bars.x, np.arange(1, R + 1))
    np.testing.assert_array_equal(bars.y, run["contribution/mean"].isel(at))
    np.testing.assert_array_equal(bars.error_y.array, run["contribution/sd"].isel(at))
    sigma = named(figure, "singular value", "x2")
    np.testing.assert_array_equal(sigma.y, run["singular_values"].isel(at))
    np.testing.assert_array_equal(sigma.x, bars.x)
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range
    ticks = figure.layout.xaxis2
    assert [str(at) for at in ticks.tickvals] == list(ticks.ticktext)  # the bar at 1 is named 1
    assert f"S(v) = {run['sad/sparseness'].isel(at).item():.3f}" in figure.layout.title.subtitle.text
    assert "nats" in figure.layout.yaxis.title.text


def test_fig_7a_shows_the_head_and_the_step_that_were_asked_for(run):
    figure = fig_7a(run, layer=1, head=10, step=40)
    assert "L1H10" in figure.layout.title.text
    assert "step 40 ·" in figure.layout.title.subtitle.text
    values = run["contribution/mean"].sel(step=40).isel(layer=1, head=10)
    np.testing.assert_array_equal(named(figure, "mean over prompts").y, values)
    first = int(run["task/layer_head"].sel(step=40)[0])  # of that step, not of the last
    assert f"L{first // H}H{first % H} " in fig_7a(run, step=40).layout.title.text


def test_fig_7a_does_without_singular_values(run):
    figure = fig_7a(run.drop_vars(["singular_values", "sad/sparseness"]))
    assert len(figure.data) == 1
    assert figure.layout.xaxis.title.text == "singular index k"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 2}, "step=2.*0, 1, 3, 10, 40, 100, 700"),
        ({"layer": 1}, "layer, head=.*both"),
        ({"head": 1}, "layer, head=.*both"),
        ({"layer": 5, "head": 0}, r"layer=5.*0\.\.4"),
        ({"layer": 0, "head": 11}, r"head=11.*0\.\.10"),
        ({"layer": -1, "head": 0}, r"layer=-1.*0\.\.4"),
        ({"layer": 3, "head": 7}, "L3H7 has no score at step 700.*Fix"),
    ],
)
def test_fig_7a_refuses_a_head_or_a_step_that_is_not_there(options, message, run):
    with pytest.raises(InputError, match=message):
        fig_7a(run, **options)


def test_fig_7b_follows_the_heads_of_the_last_step_through_training(run):
    figure = fig_7b(run)
    for name, text, axis in (
        ("prompt/sparseness", "singular basis", "x"),
        ("prompt/attention", "attention on the key", "x2"),
    ):
        own = np.stack([run[name].isel(layer=layer, head=head).values.mean(-1) for layer, head in TASK])
        np.testing.assert_allclose(named(figure, text, axis).y, own.mean(0))
        for (layer, head), values in zip(TASK, own, strict=True):
            np.testing.assert_allclose(named(figure, f"{text}, L{layer}H{head}", axis).y, values)
    np.testing.assert_array_equal(named(figure, "accuracy", "x2").y, run["sad/accuracy"])
    assert "L4H2, L0H9, the heads of step 700" in figure.layout.title.subtitle.text
    assert "7 checkpoints, steps 0 to 700" in figure.layout.title.subtitle.text


def test_fig_7b_has_the_mean_and_the_range_of_the_controls_of_these_heads(run):
    figure = fig_7b(run)
    for name, text in CONTROLS.items():
        draws = np.mean([run[name].isel(layer=layer, head=head).values for layer, head in TASK], axis=0)
        np.testing.assert_allclose(named(figure, text).y, draws.mean(1))
        low, high = polygon(named(figure, f"{text}, range"))
        np.testing.assert_allclose(low, draws.min(1))
        np.testing.assert_allclose(high, draws.max(1))
        assert named(figure, text).line.color != named(figure, "singular basis").line.color


def test_fig_7b_of_an_earlier_version_has_two_controls_and_no_test_of_heads(run):
    old = run.drop_vars(["draw/permuted", "sad/sparser", "sad/denser"])
    assert fig_7b.data(old).control.tolist() == ["shared rotation", "independent rotation"]
    assert len(fig_7b.sentences(old)) == 3


@pytest.mark.parametrize(("sparser", "denser", "happened"), [(7, 2, True), (2, 7, False), (0, 0, False)])
def test_fig_7b_says_how_many_heads_are_sparser_than_every_control_and_how_many_denser_than_one(
    sparser, denser, happened, run
):
    values = {"sad/sparser": np.arange(L * H) < sparser, "sad/denser": np.arange(L * H) >= L * H - denser}
    found = {name: np.tile(each.reshape(L, H).astype(float), (T, 1, 1)) for name, each in values.items()}
    for each in found.values():
        each[:, 2, 2] = np.nan  # a head that could not be tested
    changed = run.assign({name: (("step", "layer", "head"), each) for name, each in found.items()})
    sentence = fig_7b.sentences(changed)[-1]
    n = L * H - 1
    assert sentence.text.startswith(
        f"Of all {n} heads, {sparser / n:.1%} are sparser than every control at the last step, and {denser / n:.1%} are"
    )
    assert sentence.happened is happened
    assert len(fig_7b.sentences(run.assign({"sad/sparser": changed["sad/sparser"] * np.nan}))) == 4


def test_fig_7b_has_a_log_axis_with_step_0_unless_told_otherwise(run):
    log, linear = fig_7b(run), fig_7b(run, x_axis="linear")
    for axis in ("xaxis", "xaxis2"):
        assert log.layout[axis].type == "log"
        assert log.layout[axis].ticktext == ("0", "1", "10", "100")
        assert linear.layout[axis].type is None
    x = named(log, "singular basis").x
    assert 0 < x[0] < 1
    np.testing.assert_array_equal(x[1:], STEPS[1:])
    np.testing.assert_array_equal(named(linear, "singular basis").x, STEPS)
    np.testing.assert_array_equal(named(log, "singular basis").customdata, STEPS)
    assert log.layout.xaxis.range == log.layout.xaxis2.range


def test_fig_7b_leaves_out_prompts_without_a_score_and_gaps_where_there_is_none(run):
    (layer, head), (other, other_head) = TASK
    gap = without(run, "prompt/sparseness", 2, layer, head, 5)
    gap = without(gap, "prompt/sparseness", 4, layer, head)
    values = gap["prompt/sparseness"].values
    one = named(fig_7b(gap), f"singular basis, L{layer}H{head}").y
    assert one[2] == pytest.approx(np.delete(values[2, layer, head], 5).mean())
    assert np.isnan(one[4])
    mean = named(fig_7b(gap), "singular basis").y
    assert mean[4] == pytest.approx(values[4, other, other_head].mean())
    assert np.isfinite(mean).all()


def test_fig_7b_does_without_the_accuracy(run):
    figure = fig_7b(run.drop_vars("sad/accuracy"))
    assert "accuracy" not in {t.name for t in figure.data}
    assert figure.layout.yaxis2.title.text == "attention weight"


@pytest.mark.parametrize("attending", [0.5, 0.8])
def test_fig_8_counts_the_largest_contributors_of_all_heads_and_of_those_that_attend(run, attending):
    figure = fig_8(run, attending=attending)
    index, weight = (run[f"prompt/{name}"].values[-1] for name in ("top_index", "attention"))
    every, own = index[index >= 0], index[(index >= 0) & (weight >= attending)]
    assert len(every) == (L * H - 1) * P
    assert 0 < len(own) < len(every)
    for bars, values, (heading, found), what in zip(
        figure.data,
        (every, own),
        headings(figure),
        ("task's key, all heads", f"task's key, attention at least {attending}"),
        strict=True,
    ):
        np.testing.assert_array_equal(bars.x, np.arange(1, R + 1))
        np.testing.assert_allclose(bars.y, histogram(values, range(R)))
        assert sum(bars.y) == pytest.approx(1)
        assert heading == f"{what}: {len(values)} (prompt, head) pairs"
        assert found == f"in the last eighth: {np.mean(values >= R - 2):.1%}, by chance {2 / R:.1%}"
    for shape in (s for s in figure.layout.shapes if s.type == "rect"):
        assert (shape.x0, shape.x1) == (R - 2 + 0.5, R + 0.5)  # an eighth of 17 are 2
    rules = [s.y0 for s in figure.layout.shapes if s.type == "line"]
    assert rules == pytest.approx([1 / R, 1 / R])
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range
    assert figure.layout.yaxis.range[1] > max(max(bars.y) for bars in figure.data)


@pytest.mark.parametrize("attending", [0.5, 0.8])
def test_fig_9_counts_n_recon_of_all_heads_and_of_those_that_attend(run, attending):
    figure = fig_9(run, attending=attending)
    n, weight = (run[f"prompt/{name}"].values[-1] for name in ("n_recon", "attention"))
    every, own = n[n >= 0], n[(n >= 0) & (weight >= attending)]
    for i, (bars, values, (heading, found)) in enumerate(zip(figure.data, (every, own), headings(figure), strict=True)):
        np.testing.assert_array_equal(bars.x, np.arange(1, R + 1))
        np.testing.assert_allclose(bars.y, histogram(values, range(1, R + 1)))
        assert heading.endswith(f": {len(values)} (prompt, head) pairs")
        assert found == f"median {np.median(values):.3g} of {R}, at most 4: {np.mean(values <= 4):.1%}"
        assert figure.layout.shapes[i].x0 == np.median(values)
        colours = bars.marker.color
        assert len(set(colours[:4])) == len(set(colours[4:])) == 1
        assert colours[3] != colours[4]


def test_fig_9_shows_a_score_of_zero_and_ends_at_the_largest(run):
    values = np.where(run["prompt/n_recon"] > 5, 5, run["prompt/n_recon"])
    values[-1, 0, 0, 0] = 0
    bars = fig_9(run.assign({"prompt/n_recon": (run["prompt/n_recon"].dims, values)})).data[0]
    np.testing.assert_array_equal(bars.x, range(6))
    np.testing.assert_allclose(bars.y, histogram(values[-1][values[-1] >= 0], range(6)))


def test_fig_8_has_the_firings_of_all_heads_above_the_tasks_key(run):
    figure = fig_8(with_firings(run))
    counts = with_firings(run)["firings/top_index_histogram"].values[-1].sum((0, 1))
    np.testing.assert_array_equal(figure.data[0].x, np.arange(1, R + 1))
    np.testing.assert_allclose(figure.data[0].y, counts / counts.sum())
    heading, found = headings(figure)[0]
    assert heading == f"firings of all heads: {counts.sum():,}"
    assert found == f"in the last eighth: {counts[-2:].sum() / counts.sum():.1%}, by chance {2 / R:.1%}"
    below = fig_8(run)
    for bars, alone in zip(figure.data[1:], below.data, strict=True):
        np.testing.assert_array_equal(bars.y, alone.y)
    assert headings(figure)[1:] == headings(below)
    domains = [figure.layout[f"yaxis{i}"].domain for i in ("", 2, 3)]
    assert domains[0][0] > domains[1][1]  # above
    assert domains[1] == domains[2]
    lines = {(s.yref, s.y0) for s in figure.layout.shapes if s.type == "line"}
    assert lines == {("y", 1 / R), ("y2", 1 / R), ("y3", 1 / R)}
    assert figure.layout.yaxis.title.text == "share of firings"


def test_fig_9_has_the_firings_of_all_heads_with_what_a_rotated_basis_gives(run):
    dataset = with_firings(run)
    figure = fig_9(dataset)
    counts, rotated = (dataset[f"firings/n_recon_histogram{end}"].values[-1].sum((0, 1)) for end in ("", "_rotated"))
    last = max(np.flatnonzero(counts + rotated)[-1], run["prompt/n_recon"].values[-1].max())
    (bars,) = [t for t in figure.data if t.name == "firings of all heads"]
    (line,) = [t for t in figure.data if t.type == "scatter"]
    np.testing.assert_array_equal(bars.x, np.arange(0, last + 1))  # a firing may need none
    np.testing.assert_array_equal(line.x, bars.x)
    np.testing.assert_allclose(bars.y, counts[: last + 1] / counts.sum())
    np.testing.assert_allclose(line.y, rotated[: last + 1] / rotated.sum())
    few, few_rotated = (each[:5].sum() / each.sum() for each in (counts, rotated))
    median = np.median(np.repeat(np.arange(R + 1), counts))
    heading = [f"firings of all heads: {counts.sum():,}", f"median {median:.3g} of {R}, at most 4: {few:.1%}"]
    assert headings(figure)[0] == [heading[0], f"{heading[1]} (rotated basis: {few_rotated:.1%})"]
    assert figure.layout.shapes[0].x0 == median
    assert figure.layout.yaxis.range[1] > max(*line.y, *bars.y)


def test_fig_9_tells_what_a_rotated_basis_gives_for_the_key_where_it_was_measured(run):
    few = np.linspace(0, 1, T * L * H).reshape(T, L, H)
    few[-1, *NO_SCORE] = np.nan
    figure = fig_9(run.assign({"sad/n_recon_at_most_4_rotated": (("step", "layer", "head"), few)}))
    assert headings(figure)[0][1].endswith(f"(rotated basis: {np.nanmean(few[-1]):.1%})")
    assert "rotated" not in headings(figure)[1][1]


def test_fig_9_tells_what_a_rotated_basis_gives_for_the_very_scores_of_each_group(run):
    n_recon, attention = (run[f"prompt/{name}"].values[-1] for name in ("n_recon", "attention"))
    few = np.random.default_rng(7).random((T, *n_recon.shape))
    few[:, *NO_SCORE] = np.nan
    dataset = run.assign({"prompt/n_recon_at_most_4_rotated": (run["prompt/n_recon"].dims, few)})
    scored = n_recon >= 0
    for attending in (0.3, 0.5):
        attends = scored & (attention >= attending)
        assert 0 < attends.sum() < scored.sum()
        figure = fig_9(dataset, attending=attending)
        for heading, members in zip(headings(figure), (scored, attends), strict=True):
            assert heading[1].endswith(f"(rotated basis: {few[-1][members].mean():.1%})")
    assert f"{few[-1][attends].mean():.1%}" in FIGURES["fig_9"].sentences(dataset)[1].text


@pytest.mark.parametrize("name", ["fig_8", "fig_9"])
def test_what_figures_of_scores_say_has_the_numbers_of_each_group_beside_chance_or_a_rotated_basis(name, run):
    dataset = with_firings(run)
    data = FIGURES[name].data(dataset)
    sentences = FIGURES[name].sentences(dataset)
    assert len(sentences) == 3
    for i, sentence in enumerate(sentences):
        assert sentence.text.startswith(data.group[i].capitalize()[:9])
        measured = data.share_in_last_eighth[i] if name == "fig_8" else data.share_at_most_4[i]
        assert f"{measured:.1%}" in sentence.text
        assert int(sentence.evidence["n"]) == data.n_scores[i]
    null = data.chance if name == "fig_8" else data.share_at_most_4_rotated[0]
    assert f"{null:.1%}" in sentences[0].text


def test_no_firing_at_all_leaves_an_empty_panel_and_is_not_told(run):
    dataset = with_firings(run)
    dataset = dataset.assign({name: dataset[name] * 0 for name in dataset if name.startswith("firings/")})
    for name in ("fig_8", "fig_9"):
        figure = FIGURES[name](dataset)
        assert headings(figure)[0] == ["firings of all heads: 0", "none"]
        assert not any(figure.data[0].y)
        assert len(FIGURES[name].sentences(dataset)) == 2


@pytest.mark.parametrize("name", ["fig_8", "fig_9"])
def test_that_no_head_attends_is_said_beside_what_all_heads_do(name, run):
    quiet = run.assign({"prompt/attention": run["prompt/attention"] * 0.5})
    figure = FIGURES[name](quiet)
    assert headings(figure)[1] == ["task's key, attention at least 0.5: 0 (prompt, head) pairs", "none"]
    assert sum(figure.data[0].y) == pytest.approx(1)
    assert not any(figure.data[1].y)
    assert {(s.xref or "x")[:2] for s in figure.layout.shapes} <= {"x", "x "}


@pytest.mark.parametrize("name", ["fig_8", "fig_9"])
@pytest.mark.parametrize("attending", [0, 1, 1.5])
def test_an_attention_weight_out_of_range_is_refused(name, attending, run):
    with pytest.raises(InputError, match=rf"attending={attending}.*\(0, 1\)"):
        FIGURES[name](run, attending=attending)


def test_heads_map_has_three_numbers_of_every_head_and_marks_those_of_the_task(run):
    figure = heads_map(run)
    maps = [t for t in figure.data if t.type == "heatmap"]
    axes = [figure.layout[f"coloraxis{i}"] for i in ("", 2, 3)]
    for heat, axis, name in zip(maps, axes, ("sad/attention", "sad/sparseness", "sad/n_recon"), strict=True):
        values = run[name].values[-1]
        np.testing.assert_allclose(heat.z, values, rtol=1e-6)
        assert np.isnan(heat.z[NO_SCORE[0]][NO_SCORE[1]])
        assert axis.cmax == np.nanmax(values)
        np.testing.assert_array_equal(heat.customdata[4, 2, :2], [4, 2])
        assert heat.hovertemplate.startswith("layer %{customdata[0]}, head %{customdata[1]}<br>")
    assert [t.coloraxis for t in maps] == ["coloraxis", "coloraxis2", "coloraxis3"]
    assert [axis.cmin for axis in axes] == [0, 0, 1]
    circles = [t for t in figure.data if t.type == "scatter"]
    assert [t.xaxis for t in circles] == ["x", "x2", "x3"]
    for t in circles:
        assert list(zip(t.y, t.x, strict=True)) == TASK
        assert t.name == "heads of the task: L4H2, L0H9"
    assert figure.layout.yaxis.range == (L - 0.5, -0.5)  # the first layer on top
    assert figure.layout.yaxis.scaleanchor == "x"  # cells are squares
    assert [figure.layout[f"xaxis{i}"].ticktext for i in ("", 2, 3)] == [tuple(map(str, range(H)))] * 3


@pytest.mark.parametrize(("layers", "heads"), [(2, 2), (30, 9), (12, 12), (61, 37)])
def test_heads_maps_of_any_size_do_not_overlap(layers, heads):
    rng = np.random.default_rng(2)
    names = ("sad/attention", "sad/sparseness", "sad/n_recon")
    values = {name: (("step", "layer", "head"), rng.uniform(1, 2, (1, layers, heads))) for name in names}
    figure = heads_map(xr.Dataset(values, coords={"step": [0]}))
    domains = [figure.layout[f"xaxis{i}"].domain for i in ("", 2, 3)]
    pixels = [1000 - 100, figure.layout.height - 180]  # without the margins
    assert all(end + 0.09 < start for (_, end), (start, _) in pairwise(domains))
    assert domains[-1][1] < 0.97
    width = (domains[0][1] - domains[0][0]) * pixels[0] / heads
    assert width * layers <= pixels[1] + 1  # a square cell has the room that it needs
    assert figure.layout.height <= 800
    assert not [t for t in figure.data if t.type == "scatter"]


def test_sparsity_over_time_has_the_mean_and_the_range_of_the_instances():
    run = toy()
    figure = sparsity_over_time(run)
    for name, text, axis in (
        ("sad/sparseness", "singular basis", "x"),
        ("sad/sparseness_shared_rotation", "shared rotation", "x"),
        ("sad/sparseness_independent_rotation", "independent rotation", "x"),
        ("sad/sparseness_permuted_pairing", "permuted pairing", "x"),
        ("alignment/matched", "alignment of singular vectors", "x2"),
    ):
        values = run[name].values
        np.testing.assert_allclose(named(figure, text, axis).y, values.mean(1))
        low, high = polygon(named(figure, f"{text}, range", axis))
        np.testing.assert_array_equal(low, values.min(1))
        np.testing.assert_array_equal(high, values.max(1))
    assert "1/17" in figure.layout.yaxis.title.text
    assert sparsity_over_time(run, x_axis="log").layout.xaxis2.type == "log"


def test_sparsity_over_time_of_an_earlier_version_has_no_permuted_pairing():
    old = toy().drop_vars("sad/sparseness_permuted_pairing")
    assert not [t for t in sparsity_over_time(old).data if t.name == "permuted pairing"]
    assert len(sparsity_over_time.sentences(old)) == 3
    assert [one.text.split(":")[0] for one in sparsity_over_time.sentences(toy())] == [
        "S(v), singular basis", "S(v), shared rotation", "S(v), independent rotation", "S(v), permuted pairing",
    ]  # fmt: skip


def test_sparsity_over_time_leaves_out_an_instance_that_diverged():
    run = toy()
    one = sparsity_over_time(without(run, "sad/sparseness", slice(None), 1))
    values = run["sad/sparseness"].values[:, [0, 2]]
    np.testing.assert_allclose(named(one, "singular basis").y, values.mean(1))
    np.testing.assert_array_equal(polygon(named(one, "singular basis, range"))[1], values.max(1))
    with pytest.raises(InputError, match=r"sad/sparseness.*no finite number"):
        sparsity_over_time(without(run, "sad/sparseness", ...))


def test_a_band_has_a_gap_where_there_is_no_number():
    figure = go.Figure()
    low = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    draw_band(figure, np.arange(5.0), low, low + 1, "#0072B2")
    (band,) = figure.data
    np.testing.assert_array_equal(band.x, [0, 1, 1, 0, np.nan, 3, 4, 4, 3, np.nan])
    np.testing.assert_array_equal(band.y, [1, 2, 3, 2, np.nan, 4, 5, 6, 5, np.nan])
    assert band.fillcolor == "rgba(0, 114, 178, 0.2)"


# ------------------------------------------------------------------------------------------------- real runs, files


def test_a_real_run_of_the_toy_model_shows_its_sparsity_over_time(tmp_path):
    callbacks = [Capture(), SVDAlignment(), AttentionSparsity(n_draws=3), TrajectoryWriter()]
    train(tmp_path, 12, callbacks, model={"template": "single", "n_attended": 5}, data={"feature_probability": 0.5})
    run = open_trajectory(tmp_path)
    figure = sparsity_over_time(run)
    np.testing.assert_allclose(named(figure, "singular basis").y, run["sad/sparseness"].values.mean(1), rtol=1e-6)
    for name in OF_HEADS:
        with pytest.raises(InputError, match=r"Fix: .*(replay|AttentionSparsity|CausalAblation|DirectionIntervention)"):
            FIGURES[name](run)
