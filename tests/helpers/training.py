"""Short trainings of a small toy model."""

import json

import lightning.pytorch as pl
import numpy as np

from svf_lightning.toy import ToyAttentionModel, ToyData

SMALL = {"n_features": 11, "d_model": 7, "n_instances": 3}


def make_trainer(folder, steps, callbacks=(), **options):
    """A trainer on the CPU that writes nothing of its own."""
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "callbacks": list(callbacks),
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**settings, **options})


def train(folder, steps=12, callbacks=(), model=None, data=None, trainer=None, **fit):
    """A short training; returns the model."""
    model = ToyAttentionModel(**{**SMALL, **(model or {})})
    data = ToyData(
        **{"n_features": model.n_features, "n_instances": model.n_instances, "batch_size": 16, "context_length": 5}
        | (data or {})
    )
    make_trainer(folder, steps, callbacks, **(trainer or {})).fit(model, data, **fit)
    return model


class Weights(pl.Callback):
    """Keeps the weights before every update, and the loss of every step: an independent witness."""

    def __init__(self):
        self.weights, self.losses = [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.weights.append({k: v.detach().clone() for k, v in module.state_dict().items()})

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss/total"].detach().clone())

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module)


def keep_rows(run_dir, n):
    """Make a run one that was killed: readers see its first n rows."""
    path = run_dir / "trajectory.zarr" / ".zmetadata"
    metadata = json.loads(path.read_text())
    for name, array in metadata["metadata"].items():
        attributes = metadata["metadata"].get(name.replace(".zarray", ".zattrs"), {})
        if name.endswith(".zarray") and attributes.get("_ARRAY_DIMENSIONS", [""])[0] == "step":
            array["shape"][0] = n
    path.write_text(json.dumps(metadata))


def same_rows(one, other):
    """True for equal losses and features, bit for bit, and for metrics that are equal up to rounding.

    Rows that were measured in batches of another size may differ in the last digits.
    """
    if set(one.variables) != set(other.variables) or not one["step"].equals(other["step"]):
        return False
    exact = [name for name in one.variables if name == "W" or name.startswith("loss/") or one[name].dtype.kind != "f"]
    rest = set(one.variables) - set(exact)
    return all(one[name].equals(other[name]) for name in exact) and all(
        np.allclose(one[name], other[name], rtol=1e-4, atol=1e-5, equal_nan=True) for name in rest
    )
