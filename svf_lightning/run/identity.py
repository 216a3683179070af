"""What a run is called in W&B, and what all rows of one curve share."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from svf_lightning.errors import InputError, damaged
from svf_lightning.files import Shape, check_shape, read_json
from svf_lightning.run.directory import read_config
from svf_lightning.run.settings import Experiment
from svf_lightning.trajectory import measured_by, trajectory_parts

_LONGEST_ID = 110  # characters; W&B takes 128
_METRICS = "metrics"  # of an identity: version and options of each metric callback
_IDENTITY = {f"{_METRICS}?": {"*": Mapping}}


def wandb_name(
    run_dir: Path, command: str, experiment: Experiment, *, sweep: str = "", label: str = ""
) -> dict[str, Any]:
    """What W&B calls a run: arguments of RunLogger.

    Args:
        run_dir: The run directory, whose name is the run's id (with a checksum in place of what W&B does not take).
        command: What made the run, such as "fit".
        experiment: What it is about.
        sweep: Name of the sweep that it is a trial of, if it is one.
        label: What the sweep calls the trial.
    """
    run_id = _wandb_id(os.path.basename(os.path.abspath(run_dir)))
    if sweep:
        named = {"name": label or run_id, "group": sweep, "job_type": "sweep", "tags": [*experiment.tags, "sweep"]}
    else:
        named = {"name": run_id, "group": experiment.name, "job_type": command, "tags": experiment.tags}
    return {"run_id": run_id, **named}


def _wandb_id(name: str) -> str:
    """The name of a run directory as W&B takes it for an id: as it is, or with a checksum for what it cannot have."""
    usable = re.sub(r"[:;,#?/']", "-", "".join(c for c in name if c.isprintable()))[:_LONGEST_ID].strip()
    return name if usable == name else f"{usable}-{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


@runtime_checkable
class Measures(Protocol):
    """A callback whose numbers follow from what it looks at, its version and its options."""

    version: int

    def options(self) -> dict[str, Any]:
        """Its options by name."""
        ...


def metric_identity(callbacks: Iterable[object]) -> dict[str, dict[str, Any]]:
    """Version and options of the callbacks that measure, by the name of their class, as JSON values.

    An option that is an object is known by its attributes.
    """
    metrics = {
        type(callback).__name__: {"version": callback.version, **callback.options()}
        for callback in callbacks
        if isinstance(callback, Measures)
    }
    identity: dict[str, dict[str, Any]] = json.loads(json.dumps(metrics, default=_described))
    return identity


def _described(value: object) -> object:
    return getattr(value, "__dict__", str(value))


def check_same_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Check that a replay that goes on measures what it measured before.

    Args:
        path: File that keeps the identity; without it, the run is a new one.
        identity: Everything that two rows of one curve must share, as JSON values.

    Raises:
        InputError: Something differs.
    """
    before = read_json(path, _IDENTITY)
    if before is None:
        return
    now = json.loads(json.dumps(identity))
    if _METRICS not in before:
        before = _upgraded(before, path.parent, now)
    _check_same(path.parent, before, now, f", or measure its checkpoints again: replay --remeasure={path.parent} ...")


def check_same_metrics(run_dir: Path, callbacks: Iterable[object]) -> None:
    """Check that a training that goes on measures with the options with which it began.

    Args:
        run_dir: The run directory; without a trajectory that says how it was measured, there is nothing to compare.
        callbacks: Those of the trainer.

    Raises:
        InputError: A metric, its version or an option of it differs.
    """
    for part in trajectory_parts(run_dir):
        before = measured_by(part)
        if before is not None:
            _check(part, {_METRICS: before}, _IDENTITY)
            _check_same(run_dir, {_METRICS: before}, {_METRICS: metric_identity(callbacks)})


def _check(path: Path, value: object, shape: Shape) -> None:
    try:
        check_shape(value, shape)
    except ValueError as error:
        raise damaged(path, error) from error


def _check_same(where: Path, before: Mapping[str, Any], now: Mapping[str, Any], way_out: str = "") -> None:
    before, now = _flat(before), _flat(now)
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"the rows in {where} were measured with {name}={before.get(name)!r}, and this call has "
            f"{now.get(name)!r}. Allowed: the same settings, as one curve must not mix them. "
            f"Fix: use another --run_dir, or the settings of that run (its config.yaml){way_out}."
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """One level: ``SVDAlignment.significant``."""
    flat = {name: value for name, value in identity.items() if name != _METRICS}
    for metric, options in identity[_METRICS].items():
        flat |= {f"{metric}.{name}": value for name, value in options.items()}
    return flat


def _upgraded(before: Mapping[str, Any], run_dir: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run of version 0.1.0, which kept the package's version, and options in config.yaml alone."""
    callbacks = (read_config(run_dir).get("trainer") or {}).get("callbacks")
    metrics = now[_METRICS]
    if callbacks is not None:
        entries = callbacks if isinstance(callbacks, list) else [callbacks]
        given = {entry["class_path"].rsplit(".", 1)[-1]: entry.get("init_args") or {} for entry in entries}
        metrics = {name: {"version": 1, **given[name]} for name in metrics if name in given}
    kept = {name: value for name, value in before.items() if name != "version"}
    return {"measurement": 1, **kept, _METRICS: metrics}
