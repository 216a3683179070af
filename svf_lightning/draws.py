"""Random draws that depend on a key alone, so that an interrupted run goes on with the same numbers."""

from __future__ import annotations

import numpy as np
import torch


def keyed_seed(*key: int) -> int:
    """A seed for a key of integers >= 0, in [0, 2^63).

    numpy's SeedSequence mixes the key, so that neighbouring keys give unrelated seeds. It pads keys with zeros: keys
    that differ in trailing zeros alone, such as (3,) and (3, 0), give the same seed.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on the key alone, and on the kind of device: CPU and CUDA generators differ."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))
