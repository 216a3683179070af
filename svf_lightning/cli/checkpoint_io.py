"""Checkpoints that are written whole: a full disk leaves the old file, and nothing torn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from svf_lightning.files import written_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's files in the same format. Its own writer moves them from the folder for temporary files, in parts."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place, then put it there.

        Raises:
            InputError: The disk does not take it.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with written_whole(Path(path)) as draft:
            draft.write_bytes(buffer.getvalue())
