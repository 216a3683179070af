"""Trainings in small: weights that drift and shake, as fingerprints of their checkpoints."""

import numpy as np
import torch

from svf_lightning.replay.model_files import hash_and_fingerprint
from svf_lightning.run.fingerprint import Weights

SHAPES = {"embed": (31, 11), "in": (17, 11), "out": (11, 17), "bias": (17,), "norm": (11,)}
STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]


def weights_of(seed=0, steps=STEPS, shake=0.1):
    """Weights by step: from a random start towards a random end, with noise, a norm that begins with ones."""
    rng = np.random.default_rng(seed)
    ends = {name: (rng.normal(size=shape), rng.normal(size=shape)) for name, shape in SHAPES.items()}
    trained = {}
    for step in steps:
        way = (step / max(*steps, 1)) ** 0.5
        trained[step] = {
            name: torch.tensor(
                (0.3 if name != "norm" else 0) * (1 - way) * start
                + way * end
                + shake * way * (1 - way) * rng.normal(size=start.shape)
                + (name == "norm"),
                dtype=torch.float32,
            )
            for name, (start, end) in ends.items()
        }
    return trained


def checkpoints_of(trained, with_fingerprint=True):
    """As the ledger knows them."""
    kept = []
    for step, tensors in trained.items():
        weight_hash, fingerprint = hash_and_fingerprint(torch.nn.ParameterDict(tensors))
        kept.append(Weights(step, weight_hash, fingerprint if with_fingerprint else None))
    return kept
