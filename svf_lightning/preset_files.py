"""The presets that travel with the package, as files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

_DEFAULTS = "defaults"


def preset_path(name: str, folder: str = "") -> Path:
    """File of a preset that travels with the package; those of `replay` lie in the folder of that name."""
    return Path(str(resources.files("svf_lightning.configs"))) / folder / f"{name}.yaml"


def defaults_path(folder: str = "") -> Path:
    """File of what all presets of a folder start from."""
    return preset_path(_DEFAULTS, folder)


def presets(folder: str = "") -> list[str]:
    """Names of the presets that travel with the package."""
    return sorted(path.stem for path in defaults_path(folder).parent.glob("*.yaml") if path.stem != _DEFAULTS)


def read_preset(name: str, folder: str = "") -> dict[str, Any]:
    """What a preset sets, as it is written."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(preset_path(name, folder).read_text(encoding="utf-8"), Loader=fast)
    return found
