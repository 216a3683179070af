"""The commands that run a model, with LightningCLI: ``fit``, ``validate``, ``test``, ``replay``."""

from svf_lightning.cli.commands import fit, run_command
from svf_lightning.cli.presets import DEFAULT_PRESET
from svf_lightning.cli.run import Interrupted, RunCLI
from svf_lightning.cli.training import FitSettings
from svf_lightning.preset_files import preset_path, presets

__all__ = [
    "DEFAULT_PRESET",
    "FitSettings",
    "Interrupted",
    "RunCLI",
    "fit",
    "preset_path",
    "presets",
    "run_command",
]
