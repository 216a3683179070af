"""A trial of a sweep, from the line in its file to the row in its table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svf_lightning.arguments import short

SEEDS = ("seed_everything", "model.seed", "data.seed")  # seeds do not distinguish cells


@dataclass(frozen=True)
class Trial:
    """One combination of values, and what becomes of it.

    Args:
        values: By parameter, constants included, in the order of the file.
        varied: Names of the parameters that differ between trials.
        args: Arguments of ``python -m svf_lightning``: "fit" and its options, as W&B's agent renders them.
        sweep: Name of the sweep.
        run_dir: Where its run goes; None before the sweep has a directory.
        config: Its resolved settings, YAML; empty before they are resolved.
    """

    values: Mapping[str, Any]
    varied: tuple[str, ...]
    args: tuple[str, ...]
    sweep: str = ""
    run_dir: Path | None = None
    config: str = ""

    @property
    def label(self) -> str:
        """The varied values in words: "lambda_attn=3 seed=0"."""
        return " ".join(f"{short(name)}={self.values[name]}" for name in self.varied)

    @property
    def id(self) -> str:
        """A name for a directory that tells trials apart, also those of another version of the file."""
        digest = hashlib.sha256(json.dumps(self.args).encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.=+-]+", "_", self.label).strip("_")
        readable = readable.encode()[:80].decode(errors="ignore")  # a file system counts bytes
        return f"{readable}-{digest}" if readable else digest

    @property
    def name(self) -> str:
        """The label; the id for a trial that has none."""
        return self.label or self.id

    @property
    def cell(self) -> tuple[tuple[str, Any], ...]:
        """The varied values without the seed: trials of one cell are repetitions."""
        return tuple((name, as_cell(self.values[name])) for name in self.varied if name not in SEEDS)

    @property
    def folder(self) -> Path:
        """Where its run goes; only for a trial of a sweep that has a directory."""
        assert self.run_dir is not None
        return self.run_dir

    def settings(self) -> dict[str, Any]:
        """The resolved settings."""
        settings: dict[str, Any] = yaml.load(self.config, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return settings

    def as_json(self) -> dict[str, Any]:
        """JSON values, of which :meth:`from_json` makes the trial again."""
        entry: dict[str, Any] = {"id": self.id, "label": self.label}  # for people who read the file
        entry |= {"values": dict(self.values), "varied": self.varied, "args": self.args, "sweep": self.sweep}
        if self.run_dir is not None:
            entry["run_dir"] = str(self.run_dir)
        return entry | ({"config": self.config} if self.config else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Trial:
        """The trial that :meth:`as_json` described."""
        what = entry["values"], tuple(entry["varied"]), tuple(entry["args"])
        run_dir = Path(entry["run_dir"]) if "run_dir" in entry else None
        return cls(*what, entry.get("sweep", ""), run_dir, entry.get("config", ""))


def as_cell(value: Any) -> Any:
    """A value for a table: lists and mappings as text."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value
