"""When the metrics look: the schedule, and options that are given in two places."""

import pytest

from svf_lightning.callbacks import Capture, RunSummary, SVDAlignment
from svf_lightning.errors import InputError
from svf_lightning.run.settings import CaptureOptions, JoinsRun
from svf_lightning.wandb_logger import RunLogger


def scheduled(n_steps, **options):
    return [step for step in range(n_steps) if CaptureOptions(**options).is_scheduled(step)]


def test_every_nth_step_is_captured():
    assert scheduled(8) == list(range(8))
    assert scheduled(25, every_n_steps=7) == [0, 7, 14, 21]


def test_steps_may_be_spaced_by_their_logarithm():
    assert scheduled(30, log_spaced=3) == [0, 1, 3, 5, 10, 22]
    assert scheduled(2000, log_spaced=1) == [0, 1, 10, 100, 1000]


@pytest.mark.parametrize("per_decade", [1, 2, 5, 10, 20])
def test_about_as_many_steps_as_asked_for_are_captured_per_factor_of_ten(per_decade):
    for decade in (100, 1000, 10_000):
        options = CaptureOptions(log_spaced=per_decade)
        captured = [step for step in range(decade, 10 * decade) if options.is_scheduled(step)]
        assert len(captured) == per_decade
        assert captured[0] == decade
        ratios = [later / step for step, later in zip(captured, [*captured[1:], 10 * decade], strict=True)]
        assert ratios == pytest.approx([10 ** (1 / per_decade)] * per_decade, rel=0.02)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"every_n_steps": 0}, ">= 1"), ({"log_spaced": -1}, ">= 0"), ({"chunk": 0}, ">= 1")],
)
def test_an_option_out_of_range_is_refused_with_the_flag_to_change(options, allowed):
    (name,) = options
    with pytest.raises(InputError, match=rf"{name}=.*{allowed}.*Fix: change --capture\.{name}"):
        CaptureOptions(**options)


# ---- given to the run, and to its Capture callback


def test_options_that_are_given_in_one_place_are_joined():
    default = CaptureOptions()
    here, there = CaptureOptions(every_n_steps=5), CaptureOptions(log_spaced=3, chunk=16)
    whole = CaptureOptions(every_n_steps=5, log_spaced=3, chunk=16)
    assert here.joined(there) == there.joined(here) == whole
    assert default.joined(whole) == whole.joined(default) == whole
    assert default.joined(default) == default


def test_options_that_are_given_alike_in_both_places_are_no_contradiction():
    both = CaptureOptions(every_n_steps=5, chunk=16)
    assert both.joined(CaptureOptions(every_n_steps=5)) == both
    assert both.joined(both) == both


@pytest.mark.parametrize("name", ["every_n_steps", "log_spaced", "chunk"])
def test_options_that_contradict_each_other_are_refused_with_both_ways_out(name):
    callback, run = CaptureOptions(**{name: 5}), CaptureOptions(**{name: 7})
    with pytest.raises(InputError) as error:
        callback.joined(run)
    text = str(error.value)
    assert text.startswith(f"capture.{name}=7 and 5 in the Capture callback contradict each other. Allowed: ")
    assert f"leave out --capture.{name}, or the callback's {name}." in text


# ---- who is told of the run


def test_callbacks_and_loggers_that_join_a_run_are_told_from_the_others():
    assert isinstance(Capture(), JoinsRun)
    assert isinstance(RunSummary(), JoinsRun)
    assert isinstance(RunLogger(mode="disabled"), JoinsRun)
    assert not isinstance(SVDAlignment(), JoinsRun)
