"""What the program says of itself, in a moment: nothing heavy is imported for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from svf_lightning import __version__
from svf_lightning.preset_files import presets, read_preset

PROGRAM = "svf-lightning"

_COMMANDS = """usage: svf-lightning COMMAND [options]        (or: python -m svf_lightning COMMAND)

commands
  fit        train the toy model; with no option, the preset single_pair
  validate   measure a checkpoint of the toy model on held-out draws
  test       the same on other held-out draws
  replay     measure a language model; with no option, a small suite of its own
  presets    the presets of fit and replay, with their figures and sizes
  sweep      run every trial of a W&B sweep file, without the W&B cloud
  report     one HTML page for a run, a sweep, or several runs side by side
  figures    figures of a run as files (PNG, SVG, PDF), or their numbers (CSV)
  publish    the W&B run of a run directory, also of one that was offline
  workspace  a saved view of a W&B project with the panels to look at first
"""
_EXAMPLES = """
examples
  svf-lightning fit                                  about a minute; ends with a page
  svf-lightning fit --config multi_pair --model.lambda_attn=3 --seed_everything=7
  svf-lightning replay --data.source=svf_lightning.replay.FolderCheckpoints \\
                       --data.source.init_args.folder=MY_MODEL

COMMAND --help lists the settings that matter, with their values; --help=all the rest.
"""


def answer(args: Sequence[str]) -> str | None:
    """What to print for ``--version``, ``--help``, or no argument; None for a command."""
    if list(args) == ["--version"]:
        return f"{PROGRAM} {__version__}"
    if list(args) in ([], ["--help"], ["-h"]):
        width = max(60, shutil.get_terminal_size().columns)
        return "".join([_COMMANDS, *(_listed(command, folder, width) for command, folder in _FOLDERS), _EXAMPLES])
    return None


_FOLDERS = (("fit", ""), ("replay", "replay"))


def _listed(command: str, folder: str, width: int) -> str:
    names = presets(folder)
    room = max(map(len, names))
    lines = [f"  {name:{room}}  {read_preset(name, folder)['experiment']['shows']}" for name in names]
    short = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    return "\n".join([f"\npresets of {command}: --config NAME", *short]) + "\n"
