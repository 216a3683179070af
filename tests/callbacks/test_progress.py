"""StepProgress: a bar at a terminal, nothing elsewhere."""

import io
import re

import pytest
from helpers.training import train
from rich.console import Console

from svf_lightning.callbacks import Capture, FeatureOrthogonality, StepProgress, SVDAlignment, TrajectoryWriter
from svf_lightning.callbacks import progress as module
from svf_lightning.errors import InputError
from svf_lightning.trajectory import open_trajectory


@pytest.fixture
def terminal(monkeypatch):
    """What a person at a terminal sees, with the codes that move the cursor."""
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=200))
    return screen


def last_bar(screen):
    """The last state of the bar, as plain text."""
    bars = re.findall(r"training .*", re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue()))
    return bars[-1] if bars else ""


def test_where_the_output_is_no_terminal_nothing_is_shown(tmp_path, capfd):
    bar = StepProgress()
    train(tmp_path, callbacks=[SVDAlignment(), bar])
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" not in err
    assert "\x1b[" not in err
    assert bar._bar is None


def test_at_a_terminal_the_bar_ends_at_the_last_step_with_the_measured_means(tmp_path, terminal):
    metrics = [SVDAlignment(), FeatureOrthogonality()]
    train(tmp_path, steps=12, callbacks=[Capture(chunk=4), *metrics, StepProgress(), TrajectoryWriter()])
    last = open_trajectory(tmp_path).isel(step=-1)
    shown = last_bar(terminal)
    assert "12/12" in shown
    for name in ("loss/total", "alignment/matched", "orthogonality/attended_vs_rest"):
        assert f"{name.split('/')[1]} {float(last[name].mean()):.4g}" in shown


def test_the_metrics_to_show_can_be_chosen(tmp_path, terminal):
    bar = StepProgress(metrics=("spectrum/sigma_1", "not/measured"))
    train(tmp_path, callbacks=[SVDAlignment(), bar, TrajectoryWriter()])
    sigma = float(open_trajectory(tmp_path)["spectrum/sigma_1"].isel(step=-1).mean())
    assert last_bar(terminal).rstrip().endswith(f"sigma_1 {sigma:.4g}")


def test_the_bar_is_redrawn_by_the_clock_and_not_by_the_step(tmp_path, terminal, monkeypatch):
    drawn = []
    draw = StepProgress._draw
    monkeypatch.setattr(StepProgress, "_draw", lambda bar, done: (drawn.append(done), draw(bar, done))[1])
    train(tmp_path, steps=40, callbacks=[SVDAlignment(), StepProgress(refresh_rate=1e-3)])
    assert drawn == [1, 40]  # at the first step, and when the run has ended


def test_a_run_that_fails_gives_the_terminal_back(tmp_path, terminal):
    class Broken(SVDAlignment):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("broken")

    bar = StepProgress()
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, callbacks=[Broken(), bar])
    assert bar._bar is None
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_bar_that_is_switched_off_shows_nothing(tmp_path, terminal):
    bar = StepProgress()
    bar.disable()
    train(tmp_path, callbacks=[SVDAlignment(), bar])
    assert terminal.getvalue() == ""
    bar.enable()
    train(tmp_path, callbacks=[SVDAlignment(), bar])
    assert "12/12" in last_bar(terminal)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_not_positive_is_an_input_error(rate):
    with pytest.raises(InputError, match="refresh_rate="):
        StepProgress(refresh_rate=rate)
