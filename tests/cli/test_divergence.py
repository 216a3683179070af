"""Instances whose loss stops being a number."""

import json

import numpy as np
import pytest
import torch
from helpers.command_line import run_dir_of

from svf_lightning.run.lineage import LAST
from svf_lightning.trajectory import open_trajectory

SMALL = ("--data.batch_size=16", "--model.n_instances=3", "--trainer.logger=false", "--capture.chunk=8")
STEPS = "--trainer.max_steps=40"


def rates(*values):
    return f"--model.learning_rate={list(values)}"


def test_an_instance_that_diverges_ends_there_and_the_others_are_bit_for_bit_what_they_are_without_it(forked):
    result = forked("fit", *SMALL, STEPS, "--run_dir=run", rates(1e-3, 1e30, 2e-3))
    run = open_trajectory(run_dir_of(result, forked)).load()
    quiet = forked("fit", *SMALL, STEPS, "--run_dir=quiet", "--report=false", rates(1e-3, 3e-3, 2e-3))
    without = open_trajectory(run_dir_of(quiet, forked)).load()
    assert run.isel(instance=[0, 2]).equals(without.isel(instance=[0, 2]))
    finite = np.isfinite(run["loss/total"].values[:, 1])
    ended = int(finite.argmin())
    assert 0 < ended < 10
    assert not finite[ended:].any()
    assert np.isnan(run["W"].values[ended + 1 :, 1]).all()
    (line,) = [line for line in result.stderr.splitlines() if "diverged" in line]
    assert f"instance 1 diverged at step {ended}: loss/" in line
    summary = json.loads((forked.folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    about_all = [claim for claim in summary["claims"] if claim["threshold"] is not None]
    assert about_all
    assert not any(claim["holds"] and "min" in claim["needed"] for claim in about_all)
    assert "1 of 3 instances the loss is not a finite number" in (forked.folder / "run" / "report.html").read_text()


def test_a_run_whose_instances_all_diverged_has_failed_and_keeps_its_last_good_checkpoint(forked):
    saves = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1")
    more = ("--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.save_last=true")
    result = forked("fit", *SMALL, STEPS, "--run_dir=run", rates(1e30, 1e29, 1e28), *saves, *more)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "every instance diverged by step" in result.stderr
    run_dir = forked.folder / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert not any(claim["holds"] for claim in summary["claims"])
    saved = torch.load(run_dir / "checkpoints" / LAST, weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert forked("report", "run").returncode == 0


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_only_an_instance_that_diverged_is_said_to_have(forked, rate):
    result = forked("fit", *SMALL, "--trainer.max_steps=9", "--report=false", rates(1e-3, rate, 2e-3))
    assert ("diverged" in result.stderr) == (rate > 1)
