"""Options of Lightning's Trainer: every line of docs/trainer.md is run."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import run_dir_of

from svf_lightning.trajectory import has_trajectory, open_trajectory

DOCS = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
WORKS, REFUSED = (
    [match[1] for match in re.finditer(r"^\| `(--[^`]+)` \|", part, re.MULTILINE)] for part in DOCS.split("## Refused")
)
SMALL = ("--data.batch_size=16", "--model.n_instances=2", "--report=false")
NO_LOGGER = "--trainer.logger=false"
QUICK_ONES = [  # the others take a minute in all
    option for option in WORKS if any(word in option for word in ("64-true", "bf16-true", "EarlyStopping", "matched", "CSVLogger --trainer.logger.save", "callbacks=["))
]  # fmt: skip


def arguments_of(option):
    given = shlex.split(option)
    steps = [] if "max_steps" in option or "max_epochs" in option else ["--trainer.max_steps=6"]
    logger = [] if "logger" in option else [NO_LOGGER]
    return [*SMALL, *steps, *logger, *given]


def test_the_table_has_both_kinds():
    assert len(WORKS) > 30
    assert len(REFUSED) > 20


@pytest.mark.parametrize(
    "option", [option if option in QUICK_ONES else pytest.param(option, marks=pytest.mark.slow) for option in WORKS]
)
def test_an_option_that_works(forked, option):
    result = forked("fit", *arguments_of(option))
    run_dir = run_dir_of(result, forked)
    assert "Traceback" not in result.stderr
    assert [path.name for path in forked.folder.iterdir()] == ["runs"]
    if has_trajectory(run_dir):
        steps = open_trajectory(run_dir)["step"].values
        assert (np.diff(steps) > 0).all()
        checkpoint = run_dir / "checkpoints" / "last.ckpt"
        if checkpoint.exists():
            assert torch.load(checkpoint, weights_only=True)["global_step"] == steps[-1]
        if (run_dir / "summary.json").exists():
            assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps[-1]


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_refused_leaves_nothing_behind(typed, command, option):
    result = typed("fit", *arguments_of(option))
    assert result.returncode == 2, result.stderr
    assert [line for line in result.stderr.strip().splitlines() if line.startswith("svf-lightning: ")], result.stderr
    assert "Traceback" not in result.stderr
    assert command.files() == []


def test_a_monitored_quantity_is_that_of_the_step(forked):
    """Not that of the last chunk, which may be a hundred steps old."""
    arguments = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=loss/recon")
    more = ("--trainer.callbacks.every_n_train_steps=4", "--trainer.callbacks.save_top_k=-1")
    run_dir = run_dir_of(forked("fit", *SMALL, NO_LOGGER, "--trainer.max_steps=13", *arguments, *more), forked)
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = [s for name, s in saved["callbacks"].items() if "loss/recon" in name]
    scores = {Path(path).name: float(score) for path, score in state["best_k_models"].items()}
    losses = open_trajectory(run_dir)["loss/recon"].mean("instance")
    # the row of step t - 1 is the last one that is whole when the checkpoint of step t is written
    expected = {f"epoch=0-step={t}.ckpt": float(losses.sel(step=t - 1)) for t in (4, 8, 12)}
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_precision_reaches_the_weights_and_the_rows(forked, precision, dtype):
    run_dir = run_dir_of(
        forked("fit", *SMALL, NO_LOGGER, "--trainer.max_steps=6", f"--trainer.precision={precision}"), forked
    )
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["W"]
    assert saved.dtype == dtype
    W = torch.tensor(open_trajectory(run_dir)["W"].isel(step=-1).values)
    assert W.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(W, saved.to(W.dtype))
