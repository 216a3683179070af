"""The run directory: where a run keeps everything, and nothing is written outside of it."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

from svf_lightning.errors import InputError, bad_value, reason
from svf_lightning.files import is_file, read_yaml
from svf_lightning.trajectory import TRAJECTORY

RUNS = Path("runs")  # where runs are kept: runs/<experiment>/<run id>
CONFIG = "config.yaml"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
IDENTITY = "identity.json"  # of a replay: what all rows of its curves share
REPORT = "report.html"

_LONGEST_NAME = 60  # characters of at most 4 bytes; a folder's name has up to 255 bytes
_PART = (Mapping, NoneType)
_OBJECT = {"class_path": str, "init_args?": _PART}
_SETTINGS = {  # what readers rely on
    "experiment?": {"name?": (str, NoneType), "tags?": ([str], NoneType)},
    "model?": _PART,
    "data?": _PART,
    "capture?": _PART,
    "trainer?": {
        "callbacks?": ([_OBJECT], _OBJECT, NoneType),
        "logger?": (_OBJECT, [_OBJECT], bool, NoneType),
        "log_every_n_steps?": (int, NoneType),
        "max_steps?": (int, NoneType),
    },
}


def new_run_dir(experiment: str, root: Path) -> Path:
    """A name that no other run has: ``root/<experiment>/<date>-<time>-<4 letters>``. Nothing is created.

    Raises:
        InputError: The experiment's name is none of a folder.
    """
    is_path = "/" in experiment or "\\" in experiment or experiment in ("", ".", "..")
    if is_path or not experiment.isprintable() or experiment != experiment.strip() or len(experiment) > _LONGEST_NAME:
        raise bad_value(
            "experiment.name", experiment, f"1 to {_LONGEST_NAME} printable characters without slashes",
            "change --experiment.name, or set --run_dir",
        )  # fmt: skip
    return root / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_free(run_dir: Path) -> None:
    """Check that a run may begin in this directory.

    Raises:
        InputError: It holds a run already, it is a file, or it cannot be written.
    """
    if not str(run_dir).isprintable():  # a command prints it as its last line
        raise bad_value("run_dir", str(run_dir), "printable characters", "choose another --run_dir")
    try:
        os.lstat(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"run_dir {run_dir} cannot be used ({reason(error)}). Allowed: a directory that can be made. "
            "Fix: choose another --run_dir."
        ) from error
    if run_dir.is_file():
        raise InputError(f"run_dir {run_dir} is a file. Allowed: a directory. Fix: choose another --run_dir.")
    if run_dir.is_dir() and any((run_dir / name).exists() for name in (CONFIG, SUMMARY, TRAJECTORY)):
        raise InputError(
            f"run_dir {run_dir} already holds a run. Allowed: a directory without one. Fix: choose another --run_dir, "
            f"or go on with that run: --ckpt_path {run_dir / CHECKPOINTS / 'last.ckpt'}."
        )
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise InputError(
            f"run_dir {run_dir} cannot be made ({existing} is no directory). Allowed: a directory that can be made. "
            "Fix: choose another --run_dir."
        )
    if not os.access(existing, os.W_OK):
        raise InputError(
            f"run_dir {run_dir} cannot be written ({existing} is read-only). Fix: choose another --run_dir."
        )


def latest_run(root: Path = RUNS) -> Path:
    """The training or replay of a folder of runs that began last, of those that have a row.

    Raises:
        InputError: There is none.
        DamagedError: The settings of the latest one cannot be read.
    """
    began: dict[Path, float] = {}
    for path in root.glob(f"*/*/{CONFIG}"):
        with suppress(OSError):  # it was removed meanwhile
            began[path.parent] = path.stat().st_mtime
    for run_dir in sorted(began, key=lambda path: began[path], reverse=True):
        if (run_dir / TRAJECTORY).is_dir() and command_of(run_dir, read_config(run_dir)) in ("fit", "replay"):
            return run_dir
    raise InputError(
        f"there is no run in the folder {root}. Allowed: a run directory, or a folder with {root} in it. Fix: name "
        "the directory that `fit` or `replay` printed as its last line."
    )


def is_replay(run_dir: Path) -> bool:
    """True for the directory of a replay, which goes on when it is called again."""
    return is_file(run_dir / IDENTITY) and is_file(run_dir / CONFIG)


def command_of(run_dir: Path, config: Mapping[str, Any]) -> str:
    """The command that made a run. Only an evaluation has the setting ``verbose``; which one, the directory tells."""
    if is_replay(run_dir):
        return "replay"
    if "verbose" not in config:
        return "fit"
    return "validate" if run_dir.name.endswith("-validate") else "test"


def owner_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint belongs to, or None if it lies elsewhere."""
    folder = checkpoint.parent
    run_dir = Path(os.path.relpath(folder.absolute().parent)) if not checkpoint.is_absolute() else folder.parent
    return run_dir if folder.absolute().name == CHECKPOINTS and is_file(run_dir / CONFIG) else None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run; empty if the directory has none.

    Raises:
        DamagedError: They cannot be read, or are no settings.
    """
    return dict(read_yaml(run_dir / CONFIG, _SETTINGS) or {})


def versions() -> dict[str, str]:
    """What a run was made with: packages, Python, platform, and the commit of a source checkout."""
    versions_of = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "svf-lightning",
        "torch",
        "lightning",
        "numpy",
        "scipy",
        "xarray",
        "zarr",
        "wandb",
        "transformer-lens",
        "transformers",
    ):
        try:
            versions_of[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    source = Path(__file__).resolve().parents[2]
    if (source / ".git").exists():
        git = ["git", "-C", str(source)]
        try:
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
            status = subprocess.run(
                [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return versions_of
        versions_of["commit"] = commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
    return versions_of
