"""Sweep files, and directories of sweeps that are done, without the training."""

import numpy as np
import yaml

from svf_lightning.files import write_text
from svf_lightning.run.settings import Experiment
from svf_lightning.run.summary import Result, summarize
from svf_lightning.sweep.file import read_sweep
from svf_lightning.sweep.results import Sweep

COMMAND = ["${env}", "${interpreter}", "-m", "svf_lightning", "fit", "--config", "robust_seed", "${args}"]
SHORT = {
    "model.n_instances": {"value": 1},
    "trainer.max_steps": {"value": 10},
    "capture.every_n_steps": {"value": 5},
    "data.batch_size": {"value": 8},
}
SIX = {"model.lambda_attn": {"values": [1.0, 2.0, 3.0]}, "seed_everything": {"values": [0, 1]}}


def write_sweep(path, parameters, *, extra=(), **others):
    """A sweep file of short trials; ``extra`` are options of its command."""
    command = [*COMMAND[:-1], *extra, COMMAND[-1]]
    content = {"method": "grid", "command": command, "parameters": {**parameters, **SHORT}} | others
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def done_sweep(folder, parameters=SIX):
    """The directory of a sweep whose trials are done, each with its summary and its settings."""
    folder.mkdir(parents=True)
    read = read_sweep(write_sweep(folder / "sweep.yaml", parameters))
    Sweep.write_index(folder, "some", "alignment/matched", read.trials())
    for i, trial in enumerate(Sweep(folder).trials):
        values = {"alignment/matched": np.array([0.9 + i / 1000]), "loss/total": np.array([0.1])}
        summarize(trial.folder, Experiment(name="robust_seed"), Result(steps=10, last=values))
        model, seed = {"lambda_attn": trial.values["model.lambda_attn"]}, trial.values["seed_everything"]
        write_text(trial.folder / "config.yaml", yaml.safe_dump({"model": model, "seed_everything": seed}))
    return folder
