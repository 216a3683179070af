"""The run directory: where a run keeps everything, and nothing is written outside of it."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from svf_lightning.errors import InputError, reason
from svf_lightning.trajectory import TRAJECTORY

CONFIG = "config.yaml"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
IDENTITY = "identity.json"  # of a replay: what all rows of its curves share
PARENT = "parent.json"  # of a run that measures again what another one has measured: which one
REPORT = "report.html"


def new_run_dir(experiment: str, root: Path) -> Path:
    """A name that no other run has: ``root/<experiment>/<date>-<time>-<4 letters>``. Nothing is created."""
    return root / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_free(run_dir: Path) -> None:
    """Check that a run may begin in this directory.

    Raises:
        InputError: It holds a run already, it is a file, or it cannot be written.
    """
    if run_dir.is_file():
        raise InputError(f"run_dir {run_dir} is a file. Allowed: a directory. Fix: choose another --run_dir.")
    if run_dir.is_dir() and any((run_dir / name).exists() for name in (CONFIG, SUMMARY, TRAJECTORY)):
        raise InputError(
            f"run_dir {run_dir} already holds a run. Allowed: a directory without one. Fix: choose another --run_dir, "
            f"or go on with that run: --ckpt_path {run_dir / CHECKPOINTS / 'last.ckpt'}."
        )
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(
            f"run_dir {run_dir} cannot be written ({existing} is read-only). Fix: choose another --run_dir."
        )


def is_replay(run_dir: Path) -> bool:
    """True for the directory of a replay, which goes on when it is called again."""
    return (run_dir / IDENTITY).is_file() and (run_dir / CONFIG).is_file()


def parent_of(run_dir: Path) -> str:
    """Name of the run whose checkpoints this one measures again; empty for any other run."""
    try:
        return str(json.loads((run_dir / PARENT).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


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
    return run_dir if folder.absolute().name == CHECKPOINTS and (run_dir / CONFIG).is_file() else None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run; empty if the directory has none.

    Raises:
        InputError: They cannot be read.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}). Fix: the file is damaged; repeat the run."
        ) from error
    if not isinstance(config, Mapping):
        raise InputError(f"{path} holds no settings. Fix: the file is damaged; repeat the run.")
    return dict(config)


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
