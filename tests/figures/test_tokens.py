"""Training counted in tokens, where the names of the checkpoints tell them."""

import numpy as np
import pytest
from figures.head_datasets import STEPS, synthetic
from hypothesis import given
from hypothesis import strategies as st

from svf_lightning.checkpoint_names import tokens_seen
from svf_lightning.figures import FIGURES
from svf_lightning.figures.axes import in_tokens, step_axis
from svf_lightning.figures.comparison import over_steps

RATE = 4_194_304  # tokens of a step


def olmo(steps, unit=10**9, letter="B"):
    return [f"stage1-step{step}-tokens{-(-step * RATE // unit)}{letter}" for step in steps]


def with_names(run, names):
    return run.assign_coords(checkpoint=("step", names))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9, unique=True).map(sorted))
def test_rounded_names_give_tokens_in_proportion_to_the_steps(steps):
    steps = np.array([0, *steps])
    seen = tokens_seen(olmo(steps), steps)
    assert (abs(seen - RATE * steps) <= 10**9 * steps / steps[-1] + 1e-3).all()
    assert (np.diff(seen) > 0).all()


def test_names_that_do_not_agree_with_one_rate_are_taken_at_their_word():
    names = ["step10-tokens1B", "step20-tokens5B", "step30-tokens30B"]
    assert tokens_seen(names, np.array([10, 20, 30])).tolist() == [1e9, 5e9, 30e9]


@pytest.mark.parametrize("names", [
    ["step1", "step2"],
    ["step1-tokens1B", "main"],
    ["step1-tokens9B", "step2-tokens3B"],
    ["step1-tokens0B", "step2-tokens0B"],
])  # fmt: skip
def test_names_that_tell_no_growing_number_of_tokens_tell_none(names):
    assert tokens_seen(names, np.array([1, 2])) is None


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (999, "999"), (2e6, "2M"), (4.194304e9, "4.19B"), (1.5e13, "15T")])
def test_tokens_are_written_as_checkpoints_are_named(n, text):
    assert in_tokens(n) == text


@pytest.mark.parametrize("x_axis", ["linear", "log"])
def test_fig_7b_counts_tokens_where_the_names_tell_them(x_axis):
    run = synthetic()
    figure = FIGURES["fig_7b"](with_names(run, olmo(STEPS, 10**6, "M")), x_axis=x_axis)
    assert figure.layout.xaxis2.title.text.startswith("tokens seen in training")
    line = next(trace for trace in figure.data if trace.customdata is not None)
    np.testing.assert_allclose(line.x[1:], np.array(STEPS[1:]) * RATE, rtol=2e-3)
    assert list(line.customdata) == STEPS
    assert line.text[-1] == "2.94B"
    assert "%{text} tokens" in line.hovertemplate
    in_steps = FIGURES["fig_7b"](with_names(run, [f"step{step}" for step in STEPS]), x_axis=x_axis)
    assert in_steps.layout.xaxis2.title.text.startswith("training step")


def test_all_quantities_of_a_replay_are_counted_in_tokens_on_both_scales():
    figure = FIGURES["further"](with_names(synthetic().assign_attrs(batch_dims=("layer", "head")), olmo(STEPS)))
    assert figure.layout.xaxis.title.text == "tokens seen in training (log scale)"
    titles = [button.args[0]["xaxis.title.text"] for button in figure.layout.updatemenus[0].buttons]
    assert titles == ["tokens seen in training (log scale)", "tokens seen in training"]


def test_runs_are_compared_in_tokens_if_all_of_them_tell_these():
    run = synthetic().assign_attrs(batch_dims=("layer", "head"))
    half = with_names(run, [f"step{step}-tokens{step * 2}M" for step in STEPS])
    whole = with_names(run, [f"step{step}-tokens{step * 4}M" for step in STEPS])
    figure = over_steps({"half": half, "whole": whole}, "sad/attention")
    assert [trace.x[-1] for trace in figure.data] == [1400e6, 2800e6]
    assert figure.layout.xaxis.title.text.startswith("tokens")
    assert figure.layout.xaxis.range[1] == pytest.approx(np.log10(2800e6))
    figure = over_steps({"half": half, "steps": run}, "sad/attention")
    assert [trace.x[-1] for trace in figure.data] == [700, 700]
    assert figure.layout.xaxis.title.text.startswith("training step")


@pytest.mark.parametrize(("steps", "ticks"), [
    ([0, 3, 700], ["0", "10", "100"]),
    ([500, 700, 900], ["500", "900"]),
    ([300, 700, 900], ["500", "900"]),
    ([30, 700], ["100", "500"]),
    ([90, 2000], ["100", "1,000"]),
])  # fmt: skip
def test_a_log_axis_has_two_ticks_at_least(steps, ticks):
    shown = step_axis(np.array(steps), "log")[1]["ticktext"]
    assert len(shown) >= 2
    assert set(ticks) & set(shown)
