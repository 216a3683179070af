"""Presets that travel with the package, and which configuration a command line starts from."""

from __future__ import annotations

from pathlib import Path

from yaml import MappingNode

from svf_lightning.arguments import CommandLine
from svf_lightning.cli.messages import suggestion
from svf_lightning.errors import InputError, reason
from svf_lightning.files import is_file, parse_yaml
from svf_lightning.preset_files import preset_path, presets
from svf_lightning.run.directory import CONFIG, is_replay
from svf_lightning.run.lineage import run_of

DEFAULT_PRESET = "single_pair"
COMMANDS = ("fit", "validate", "test", "replay")
CONFIG_FLAGS = ("--config", "-c")
_DEFAULT_REPLAY = "tiny_suite"


def folder_of(command: str | None) -> str:
    """Folder of the presets of a command: those of `replay` lie in the folder of that name."""
    return "replay" if command == "replay" else ""


def with_preset(line: CommandLine) -> list[str]:
    """The arguments with a configuration: the one given, else that of the run that goes on, else the default preset.

    What is measured again has the settings of its run first, and those that are given after them.

    Raises:
        InputError: The configuration that was given is neither a file nor a preset, or there is no run to measure
            again.
    """
    command = line.command
    if command is None:
        return list(line.args)
    folder = folder_of(command)
    if again := line.option("--remeasure"):
        if not folder or not is_replay(Path(again)):
            raise InputError(
                f"--remeasure {again}: that is no replay. Allowed: the directory of a run that `replay` made. Fix: "
                "check the path."
            )
        args = line.with_values(lambda name: _config_file(name, folder), *CONFIG_FLAGS)
        at = args.index(command) + 1
        return [*args[:at], "--config", str(Path(again) / CONFIG), *args[at:]]
    if line.values(*CONFIG_FLAGS):
        return line.with_values(lambda given: _config_file(given, folder), *CONFIG_FLAGS)
    run_dir: Path | None = None
    if folder:
        given = line.option("--run_dir")
        run_dir = Path(given) if given and is_replay(Path(given)) else None
    else:
        checkpoint = line.option("--ckpt_path")
        if checkpoint == "last":
            checkpoint = line.option("--run_dir")
        run_dir = run_of(checkpoint) if checkpoint else None
    config = run_dir / CONFIG if run_dir else preset_path(_DEFAULT_REPLAY if folder else DEFAULT_PRESET, folder)
    _check_settings(config)
    at = list(line.args).index(command) + 1
    return [*line.args[:at], "--config", str(config), *line.args[at:]]


def _config_file(given: str, folder: str) -> str:
    """A file as it is, that of a run directory, or the preset of that name, so that presets work from any folder."""
    path = Path(given)
    if is_file(path / CONFIG):
        path, given = path / CONFIG, str(path / CONFIG)
    if is_file(path):
        _check_settings(path)
        return given
    known = presets(folder)
    if path.stem in known and path.parts[:-1] in ((), ("configs",), ("configs", folder), (folder,)):
        return str(preset_path(path.stem, folder))
    raise InputError(
        f"--config {given}: there is no such file. {suggestion(path.stem, known)}"
        f"Allowed: a YAML file, a run directory, or one of the presets {', '.join(known)}. Fix: check the path."
    )


def _check_settings(path: Path) -> None:
    """Check that a file holds settings, before the parser reads it, which would take more for settings than it should.

    Raises:
        InputError: It does not.
    """
    try:
        settings = parse_yaml(path)
        if not isinstance(settings, MappingNode):
            raise ValueError("it holds no settings")
        if any(name.value == "config" for name, _ in settings.value):
            raise ValueError("it names another file with config; a second --config does that")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {path} cannot be read ({reason(error)}). Allowed: a YAML file of options, in UTF-8, with each "
            "name once. Fix: correct the file."
        ) from error
