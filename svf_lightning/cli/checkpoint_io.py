"""Checkpoints that are written whole: a full disk leaves the old file, and nothing torn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from svf_lightning.files import write_bytes


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's files in the same format. Its own writer moves them from the folder for temporary files, in parts."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place, then put it there.

        Raises:
            OSError: It cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getvalue())
