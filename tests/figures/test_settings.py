"""Final values along what differs: between instances (Fig. 4), runs, and trials of a sweep."""

import numpy as np
import pandas as pd
import pytest
from figures.datasets import N_I, last, named, rotary, synthetic

from svf_lightning.errors import InputError
from svf_lightning.figures import across_runs, against, along_axis, fig_4
from svf_lightning.figures.look import BLUE, VERMILLION
from svf_lightning.metrics.dynamics import alignment_by_chance
from svf_lightning.quantities import Quantity


@pytest.fixture(scope="module")
def run():
    return synthetic()


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
    chance, dots = against(run, "orthogonality/interference", "alignment/matched").data
    assert chance.name == "alignment of singular vectors, by chance"
    by_chance = alignment_by_chance(run.sizes["d_model"], run.sizes["rank"], run.sizes["pair"]).matched.mean
    np.testing.assert_allclose(chance.y, by_chance)
    np.testing.assert_array_equal(dots.x, last(run, "orthogonality/interference"))
    np.testing.assert_array_equal(dots.y, last(run, "alignment/matched"))


def test_against_says_what_it_cannot_use(run):
    with pytest.raises(InputError, match=r"lambda_atn.*did you mean 'lambda_attn'"):
        against(run, "lambda_atn")
    with pytest.raises(InputError, match=r"target_logit=\('instance', 'pair'\).*one value per instance"):
        against(run, "target_logit")
    with pytest.raises(InputError, match=r"lambda_attn=3\.0.*values that differ"):
        against(run.assign_coords(lambda_attn=("instance", [3.0] * N_I)))


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
    chance, mean, dots = figure.data
    assert (chance.mode, chance.line.dash) == ("lines", "dash")
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


def table(**columns):
    values = {
        "trial": list("abcdef"),
        "model.lambda_attn": [1.0, 1.0, 10.0, 10.0, 100.0, 100.0],
        "model.d_head": [5, 10, 5, 10, 5, 10],
        "state": ["done"] * 6,
        "alignment/matched": [0.1, 0.3, 0.9, 1.0, 0.8, np.nan],
        "orthogonality/attended_vs_rest": [0.4, 0.2, 0.1, 0.1, 0.0, 0.0],
    }
    return pd.DataFrame({**values, **columns})


def test_dots_are_trials_and_the_line_is_their_mean():
    figure = along_axis(table(), "model.lambda_attn", ["model.d_head"])
    mean, dots = figure.data[:2]
    assert list(mean.x) == [1, 10, 100]
    assert list(mean.y) == pytest.approx([0.2, 0.95, 0.8])
    assert list(dots.x) == [1, 1, 10, 10, 100, 100]
    assert list(dots.y)[:5] == [0.1, 0.3, 0.9, 1.0, 0.8]
    assert dots.text[1] == "lambda_attn 1.0, d_head 10, trial b"
    assert figure.layout.xaxis.type == "log"
    assert {trace.name for trace in figure.data} == {
        "alignment of singular vectors", "attended against other features"
    }  # fmt: skip


def test_trials_that_are_not_done_are_left_out():
    figure = along_axis(table(state=["done", "failed", "missing", "done", "done", "done"]), "model.d_head")
    assert "4 trials" in figure.layout.title.subtitle.text
    assert len(figure.data[1].x) == 4


def test_values_that_are_no_numbers_stand_in_their_order():
    axis = ["zero", "single", "zero", "single", "linear", "linear"]
    figure = along_axis(table(**{"model.template": axis}), "model.template", y="alignment/matched")
    assert list(figure.layout.xaxis.ticktext) == ["zero", "single", "linear"]
    assert list(figure.data[0].y) == pytest.approx([0.5, 0.65, 0.8])


def test_the_rule_is_a_line():
    figure = along_axis(table(), "model.d_head", rule=0.9)
    assert [shape.y0 for shape in figure.layout.shapes] == [0.9]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"state": ["failed"] * 6}, {}, "no trial of the sweep is done"),
        ({}, {"axis": "model.seed"}, "model.seed"),
        ({}, {"y": "nothing"}, "nothing"),
        ({"alignment/matched": [np.nan] * 6}, {"y": "alignment/matched"}, "alignment/matched"),
    ],
)
def test_a_table_that_shows_nothing_says_why(changes, options, message):
    options = {"axis": "model.d_head", **options}
    with pytest.raises(InputError, match=message):
        along_axis(table(**changes), **options)


def test_trials_that_differ_in_the_seed_alone_are_dots_without_a_line():
    trials = table().assign(seed_everything=range(len(table())))
    figure = along_axis(trials, "seed_everything", y="alignment/matched")
    assert [trace.mode for trace in figure.data] == ["markers"]
    done = trials[trials["state"] == "done"]
    assert list(figure.data[0].x) == done["seed_everything"].tolist()
    assert "line" not in figure.layout.title.subtitle.text


def test_the_axis_of_several_quantities_says_their_unit(run):
    units = [
        (["alignment/matched", "theory/left"], "|cosine|"),
        (["spectrum/sigma_ratio", "spectrum/stable_rank"], "value"),  # plain numbers
        (["alignment/matched", "orthogonality/interference"], "value"),
    ]
    run = run.assign(dict.fromkeys(units[1][0], run["alignment/matched"]))
    for names, unit in units:
        axis = against(run, y=names).layout.yaxis
        assert axis.title.text == unit
        assert (axis.range == (0, 1.03)) == (unit == "|cosine|")
    assert against(run).layout.yaxis.title.text == "alignment of singular vectors (|cosine|)"


def test_along_axis_shows_a_metric_of_another_package_as_it_is_described():
    trials = table(**{"norm/mean": np.arange(6.0)})
    described = {"norm/mean": Quantity("norm/mean", "mean norm", unit="nats")}
    figure = along_axis(trials, "model.d_head", y="norm/mean", quantities=described)
    assert figure.data[0].name == "mean norm"
    assert figure.layout.yaxis.title.text == "mean norm (nats)"
    assert along_axis(trials, "model.d_head", y="norm/mean").layout.yaxis.title.text == "norm/mean"


def test_along_axis_shows_what_sweeps_are_about_unless_told_otherwise():
    figure = along_axis(table(), "model.d_head")
    assert [trace.line.color for trace in figure.data if trace.mode == "lines"] == [BLUE, VERMILLION]  # as in Fig. 3
    assert {trace.legendgroup for trace in figure.data} == {"alignment/matched", "orthogonality/attended_vs_rest"}
