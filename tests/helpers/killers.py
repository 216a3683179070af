"""A callback whose process dies as if the system had killed it: that of one trial, or of cohorts that are too large."""

import os
import signal
import sys

from lightning.pytorch import Callback

# trials with a callback of the user's train alone; with one of the package's they train together
_NAME = "svf_lightning.callbacks.killers"
sys.modules[_NAME] = sys.modules[__name__]


class Killer(Callback):
    """Kills its process in the third step.

    Args:
        guilty: Value of lambda_attn of the trial that does.
        most: Number of instances that a cohort may have.
    """

    __module__ = _NAME

    def __init__(self, guilty: float = -1.0, most: int = 1_000_000):
        self.guilty, self.most = guilty, most

    def on_train_batch_end(self, trainer, pl_module, *args):
        weights = pl_module.hparams["lambda_attn"]
        weights = weights if isinstance(weights, list) else [weights]
        if trainer.global_step == 3 and (self.guilty in weights or len(weights) > self.most):
            os.kill(os.getpid(), signal.SIGKILL)
