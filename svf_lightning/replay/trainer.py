"""Lightning's Trainer with a method that is called like the command."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule


class ReplayTrainer(pl.Trainer):
    """Lightning's Trainer; ``replay`` is its ``test``, as nothing is trained."""

    def replay(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Evaluate every checkpoint of the data on its prompts.

        Args:
            model: A :class:`svf_lightning.replay.CheckpointReplay`.
            datamodule: A :class:`svf_lightning.replay.ReplayData`.
        """
        self.test(model, datamodule=datamodule, verbose=False)
