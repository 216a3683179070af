"""Figures along the axes of a sweep, from a table of trials."""

import numpy as np
import pandas as pd
import pytest

from svf_lightning.errors import InputError
from svf_lightning.report.sweep_figures import along_axis


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
        "|cosine| of matched singular vectors and features", "|cosine| of attended and other features"
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
