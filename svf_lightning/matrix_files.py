"""Matrices in files of formats that cannot run code: .npy and .safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svf_lightning.errors import InputError, one_line

FORMATS = (".npy", ".safetensors")


def read_matrices(option: str, path: str | Path, allowed: str) -> dict[str, Tensor]:
    """The matrices in a file, by name; that of a .npy file has the name "".

    Args:
        option: What the error calls the setting that names the file.
        path: The file.
        allowed: What the error says a usable file holds.

    Raises:
        InputError: The file is missing, of another format, or damaged.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return {"": torch.from_numpy(np.asarray(np.load(path, allow_pickle=False)))}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        raise ValueError(f"it is no {' or '.join(FORMATS)} file")
    except Exception as error:  # the readers raise errors of many types for damaged files
        raise InputError(
            f"{option}: {path} cannot be read ({one_line(error)}). Allowed: {allowed}. "
            "Fix: check the path, or export the file again."
        ) from error
