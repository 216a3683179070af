"""The commands from Python: ``import svf_lightning as svf; run = svf.fit("single_pair", n_instances=4)``.

These are the commands themselves, with the same presets, run directories and errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from svf_lightning.arguments import dotted
from svf_lightning.cli import RunCLI, run_command
from svf_lightning.cli.commands import parsed
from svf_lightning.cli.messages import quiet_the_libraries
from svf_lightning.commands.report import report
from svf_lightning.errors import InputError, bad_value
from svf_lightning.run.directory import read_config
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.summary import read_summary

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_TOP = ("run_dir", "ckpt_path", "remeasure", "overwrite", "seed_everything")


@dataclass(frozen=True)
class Run:
    """A run directory, of this call or of another day.

    Args:
        directory: What ``fit`` or ``replay`` printed as its last line.
    """

    directory: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says; empty while the run goes on.

        Raises:
            DamagedError: It cannot be read.
        """
        return dict(read_summary(self.directory))

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, as config.yaml has them.

        Raises:
            DamagedError: They cannot be read.
        """
        return read_config(self.directory)

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics at the end: a row each, with mean, min, max over instances (or heads), and unit."""
        import pandas as pd

        rows = self.summary.get("metrics", {})
        columns = ["mean", "min", "max", "unit", "label"]
        return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)

    @property
    def claims(self) -> pd.DataFrame:
        """The preset's claims: verdict (yes, no, open, vacuous), what was measured, its null and its 95 % interval."""
        import pandas as pd

        columns = ["verdict", "claim", "measured", "null", "interval", "n", "figure"]
        return pd.DataFrame(self.summary.get("claims", []), columns=columns)

    def trajectory(self) -> xr.Dataset:
        """Everything that was captured, over ``step``; of a replay without the checkpoints that are flagged.

        Raises:
            InputError: There is no row yet.
        """
        return open_sound(self.directory)

    def page(self, *, open: bool = False) -> Path:
        """Write the run's page, and open it in the browser if asked.

        Returns:
            ``report.html`` in the run directory.

        Raises:
            InputError: There is no row yet.
        """
        return report(str(self.directory), open=open)


def fit(config: str | Path = "single_pair", **settings: Any) -> Run:
    """Train the toy model, as ``svf-lightning fit --config CONFIG`` does; ``Run.page`` writes its page.

    Args:
        config: A preset, a YAML file or a run directory whose settings are to be taken.
        settings: Settings by their last word where that says which one is meant (``n_instances=4``), or in full
            (``**{"model.n_instances": 4}``); and run_dir, ckpt_path, overwrite, seed_everything.

    Returns:
        The run.

    Raises:
        InputError: A setting that there is not, or that is none of one alone.
        DivergedError: Every instance diverged.
        Interrupted: Ctrl-C ended the run; its directory is whole.
    """
    return _run("fit", config, settings)


def replay(config: str | Path = "tiny_suite", **settings: Any) -> Run:
    """Measure the checkpoints of a language model, as ``svf-lightning replay --config CONFIG`` does.

    Args:
        config: A preset, a YAML file or a run directory whose settings are to be taken.
        settings: As of :func:`fit`. ``source`` may be an object: ``{"class_path": ..., "init_args": {...}}``.

    Returns:
        The run.

    Raises:
        InputError: A setting that there is not, or that is none of one alone.
        CheckpointError: No checkpoint could be replayed.
        Interrupted: Ctrl-C ended the run; its directory is whole.
    """
    return _run("replay", config, settings)


def _run(command: str, config: str | Path, settings: Mapping[str, Any]) -> Run:
    quiet_the_libraries()
    args = [command, f"--config={config}", "--report=false"]
    known = _settings_of([command, f"--config={config}"]) if settings else []
    for name, value in settings.items():
        args.append(f"--{_meant(name, known)}={value if isinstance(value, str) else _written(value)}")
    return Run(run_command(args).run_dir)


def _written(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, Path):
        return str(value)
    plain = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _settings_of(args: list[str]) -> list[str]:
    """Names of the settings of a command."""
    cli: RunCLI = parsed(args)
    known = dotted(cli.config[str(cli.subcommand)].as_dict())
    options = cli.described()
    return [*options, *(name for name in known if name.count(".") > 1 and name not in options)]


def _meant(name: str, known: Sequence[str]) -> str:
    """The setting that a name means: that of this name in full, or the only one that ends with it.

    Raises:
        InputError: There is none, or there are several.
    """
    if name in _TOP or name in known:
        return name
    parts = ("model.", "data.", "capture.", "trainer.")
    ends = sorted(full for full in known if full.rsplit(".", 1)[-1] == name and full.startswith(parts))
    short = [full for full in ends if full.count(".") == 1]
    found = short or ends
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"the setting {name} may be {' or '.join(found)}. Fix: say which, **{{{found[0]!r}: ...}}.")
    allowed = "a setting of the command, such as n_instances, max_steps or **{'model.n_instances': ...}"
    raise bad_value("setting", name, allowed, "`svf-lightning fit --help` lists them")
