"""Cohorts: trials that differ in no shape train side by side, as instances of one program."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svf_lightning.toy.instances import instance_seeds

Settings = Mapping[str, Any]

# settings of which every instance can have its own value
_PER_INSTANCE = (
    ("model", "lambda_attn"),
    ("model", "target_logit"),
    ("model", "importance"),
    ("model", "learning_rate"),
    ("model", "cone_strength"),
    ("data", "feature_probability"),
)
_WRITERS = ("TrajectoryWriter", "RunSummary", "StepProgress", "ModelCheckpoint")  # what TrialWriter does for a trial
_OURS = "svf_lightning.callbacks."
_LOGGER = "svf_lightning.wandb_logger.RunLogger"


@dataclass(frozen=True)
class Member:
    """A trial that is ready to train.

    Args:
        id: Of the trial.
        run_dir: Where its run goes.
        config: Its resolved settings, YAML.
        name: What W&B calls it.
        group: W&B group, the sweep.
    """

    id: str
    run_dir: Path
    config: str
    name: str
    group: str

    def settings(self) -> dict[str, Any]:
        """The resolved settings."""
        settings: dict[str, Any] = yaml.load(self.config, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return settings


def group_members(
    members: Iterable[Member], *, memory_bytes: float, n_workers: int = 1, merge: bool = True
) -> list[list[Member]]:
    """Cohorts, the most expensive first.

    Args:
        members: Trials.
        memory_bytes: What one cohort may take.
        n_workers: Cohorts that train at the same time: a large one is cut, so that none waits for another.
        merge: False: every trial is a cohort of its own.
    """
    alike: defaultdict[str, list[tuple[Member, Settings]]] = defaultdict(list)
    for member in members:
        settings = member.settings()
        alike[signature(settings) if merge and can_merge(settings) else member.id].append((member, settings))
    total = sum(_work(settings) for group in alike.values() for _, settings in group)
    cohorts: list[tuple[float, list[Member]]] = []
    for group in alike.values():
        work = sum(_work(settings) for _, settings in group)
        memory = sum(instance_bytes(settings) * settings["model"]["n_instances"] for _, settings in group)
        n_parts = max(1, -(-memory // memory_bytes), round(work * n_workers * 2 / total) if n_workers > 1 else 1)
        n_parts = min(int(n_parts), len(group))
        # trials that share draws stay together
        group = sorted(group, key=_draws)
        for part in range(n_parts):
            own = group[part * len(group) // n_parts : (part + 1) * len(group) // n_parts]
            cohorts.append((sum(_work(settings) for _, settings in own), [member for member, _ in own]))
    return [own for _, own in sorted(cohorts, key=lambda cohort: -cohort[0])]


def _draws(entry: tuple[Member, Settings]) -> str:
    """What a trial's draws depend on, within a cohort."""
    data = entry[1]["data"]
    return json.dumps([data["seed"], data["feature_probability"]])


def can_merge(settings: Settings) -> bool:
    """False for trials that must train alone: with callbacks or loggers of the user's, or tensors read from a file."""
    callbacks = settings["trainer"]["callbacks"] or []
    known = all(_is_known(callback["class_path"]) for callback in callbacks)
    logger = settings["trainer"]["logger"]
    logs = logger in (None, False) or (isinstance(logger, dict) and logger["class_path"] == _LOGGER)
    model = settings["model"]
    from_file = "." in model["init_features"] or "." in model["init_head"]
    importance = model["importance"]
    rows = isinstance(importance, list) and isinstance(importance[0], list)
    return known and logs and not from_file and not rows


def _is_known(class_path: str) -> bool:
    return class_path.startswith(_OURS) or class_path.endswith(_WRITERS)


def signature(settings: Settings) -> str:
    """What trials of one cohort have in common: everything that is not a value per instance, a seed or a name."""
    common = json.loads(json.dumps(settings))
    for part, name in (*_PER_INSTANCE, ("model", "seed"), ("data", "seed"), ("model", "n_instances")):
        common[part].pop(name)
    common["data"].pop("streams")
    common["trainer"].pop("logger")
    for name in ("seed_everything", "experiment"):
        common.pop(name)
    common["model"]["target_logit"] = settings["model"]["target_logit"] is None
    return json.dumps(common, sort_keys=True)


def merged(settings: Sequence[Settings]) -> dict[str, Any]:
    """The settings of a cohort, without callbacks that write and without logger."""
    whole: dict[str, Any] = json.loads(json.dumps(settings[0]))
    sizes = [one["model"]["n_instances"] for one in settings]
    whole["model"]["n_instances"] = sum(sizes)  # the data follow
    for part, name in _PER_INSTANCE:
        if settings[0][part][name] is not None:
            whole[part][name] = [
                value
                for one, n in zip(settings, sizes, strict=True)
                for value in (one[part][name] if isinstance(one[part][name], list) else [one[part][name]] * n)
            ]
    for part in ("model", "data"):
        shared = [part == "data" and one["data"]["streams"] == "shared" for one in settings]
        whole[part]["seed"] = [
            seed
            for one, n, same in zip(settings, sizes, shared, strict=True)
            for seed in ([one[part]["seed"]] * n if same else instance_seeds(one[part]["seed"], n, key=f"{part}.seed"))
        ]
    whole["data"]["streams"] = "separate"
    whole["trainer"]["logger"] = False
    whole["trainer"]["enable_progress_bar"] = False
    whole["trainer"]["callbacks"] = [
        callback for callback in whole["trainer"]["callbacks"] or [] if not callback["class_path"].endswith(_WRITERS)
    ]
    return whole


def train(members: Sequence[Member]) -> None:
    """Train a cohort in this process; every member gets its run directory.

    Raises:
        InputError: A member's settings cannot be used.
        DivergedError: All members diverged.
    """
    from svf_lightning import cli

    scratch = Path(tempfile.mkdtemp(prefix="svf-cohort-"))
    try:
        settings = [member.settings() for member in members]
        for member in members:
            shutil.rmtree(member.run_dir, ignore_errors=True)  # what an interrupted or failed attempt left
        config = scratch / "config.yaml"
        if not can_merge(settings[0]):
            config.write_text(members[0].config, encoding="utf-8")
            cli.fit(["--config", str(config), "--run_dir", str(members[0].run_dir)])
            return
        trials = [
            {
                "run_dir": str(member.run_dir),
                "config": member.config,
                "wandb": _wandb(member, own),
                "include": _included(own),
            }
            for member, own in zip(members, settings, strict=True)
        ]
        (scratch / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
        whole = merged(settings)
        whole["trainer"]["callbacks"].append(
            {"class_path": f"{_OURS}TrialWriter", "init_args": {"trials": str(scratch / "trials.json")}}
        )
        config.write_text(yaml.safe_dump(whole), encoding="utf-8")
        cli.fit(["--config", str(config), "--run_dir", str(scratch / "run")])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _wandb(member: Member, settings: Settings) -> dict[str, Any] | None:
    logger = settings["trainer"]["logger"]
    if not logger:
        return None
    return {
        **logger["init_args"],
        "save_dir": str(member.run_dir),
        "run_id": member.run_dir.name,
        "name": member.name,
        "group": member.group,
        "job_type": "sweep",
        "quiet": True,
        "log_media": False,  # a trial costs less than drawing it
        "tags": [*settings["experiment"]["tags"], "sweep"],
    }


def _included(settings: Settings) -> list[str] | None:
    """What the trial's TrajectoryWriter would keep; nothing is lost if it has none."""
    writers = (c for c in settings["trainer"]["callbacks"] or [] if c["class_path"].endswith("TrajectoryWriter"))
    writer: Settings = next(writers, {})
    found: list[str] | None = writer.get("init_args", {}).get("include")
    return found


def instance_bytes(settings: Settings) -> int:
    """Memory that one instance takes [bytes], an estimate from above: two to three times what was measured.

    Activations and their gradients for one step, and the captured rows of one chunk.
    """
    model, data = settings["model"], settings["data"]
    N = model["n_features"]
    D = model["d_model"] or N // 2
    H = (model["d_head"] or D) * model["n_heads"]
    tokens = data["batch_size"] * (1 + data["context_length"])
    weights = D * N + 2 * D * H + N
    rank = min(H, D)
    step = tokens * (8 * N + 4 * D) + 6 * weights
    row = 2 * (weights + 2 * D * rank + 2 * N * rank)
    return int(4 * (step + settings["capture"]["chunk"] * row))


def _work(settings: Settings) -> float:
    """About the number of multiplications of a trial."""
    model, data = settings["model"], settings["data"]
    tokens = data["batch_size"] * (1 + data["context_length"])
    N = model["n_features"]
    per_step = tokens * N * ((model["d_model"] or N // 2) + 20)
    return float(model["n_instances"] * per_step * max(1, settings["trainer"]["max_steps"]))
