"""Checkpoints of a training, read with their checksums: torch itself loads a damaged file as other weights."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svf_lightning.errors import InputError, reason

_BLOCK_BYTES = 1 << 20
_IS_FOLDER = 0x10  # among a member's attributes; torch gives such a member's tensor whatever is in memory


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a .ckpt file holds, on the CPU; every byte of it was compared with its checksum, and no code was run.

    Args:
        path: A file that `fit` wrote, or that Lightning's ``Trainer.save_checkpoint`` wrote.

    Raises:
        InputError: It is missing, damaged, or no checkpoint.
    """
    try:
        _check_members(path)
        saved: object = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise ValueError("it holds no dictionary")
        state, step = saved.get("state_dict"), saved.get("global_step")
        if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
        ):
            raise ValueError("it has no state_dict of tensors")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError("it has no global_step")
    except Exception as error:  # zipfile and torch raise errors of many types for damaged files
        raise InputError(
            f"the checkpoint {path} cannot be read ({reason(error)}). Allowed: a .ckpt file that fit wrote. "
            "Fix: the file is damaged or not a checkpoint of this program; take another one from its folder."
        ) from error
    return saved


def has_training_state(saved: Mapping[str, Any]) -> bool:
    """True if a training can go on from a checkpoint; False if it holds weights alone (``save_weights_only``)."""
    return isinstance(saved.get("optimizer_states"), list) and isinstance(saved.get("loops"), Mapping)


def _check_members(path: Path) -> None:
    """Compare every member of a file in torch's format, a zip archive, with its checksum.

    Raises:
        ValueError: A member is not as torch writes it.
        zipfile.BadZipFile: It is no zip archive, or damaged.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.external_attr & _IS_FOLDER:
                raise ValueError(f"{member.filename} is not as torch writes it")
            with archive.open(member) as content:  # the last read compares
                while content.read(_BLOCK_BYTES):
                    pass
