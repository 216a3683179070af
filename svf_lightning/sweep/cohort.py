"""Cohorts: trials that differ in no shape train side by side, as instances of one program."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from svf_lightning import callbacks
from svf_lightning.arguments import class_of
from svf_lightning.callbacks import RunSummary, StepProgress, TrajectoryWriter
from svf_lightning.cli import fit
from svf_lightning.sweep.trial import Trial
from svf_lightning.sweep.trial_writer import TrialWriter
from svf_lightning.toy.instances import instance_seeds
from svf_lightning.wandb_logger import RunLogger

Settings = Mapping[str, Any]

# settings that can differ between instances
_PER_INSTANCE = (
    ("model", "lambda_attn"),
    ("model", "target_logit"),
    ("model", "importance"),
    ("model", "learning_rate"),
    ("model", "cone_strength"),
    ("data", "feature_probability"),
    ("data", "frequency_decay"),
    ("data", "feature_correlation"),
)
# the TrialWriter does the work of these for each trial
_WRITERS = (TrajectoryWriter, RunSummary, StepProgress, ModelCheckpoint)
DRAFT = ".draft-"  # how names of what is not a run directory yet begin
_TRIAL_WRITER = f"{TrialWriter.__module__}.{TrialWriter.__qualname__}"


def group_trials(
    trials: Iterable[Trial], *, memory_bytes: float, n_workers: int = 1, merge: bool = True
) -> list[list[Trial]]:
    """Cohorts, the most expensive first.

    Args:
        trials: Trials whose settings are resolved.
        memory_bytes: What one cohort may take.
        n_workers: Cohorts that train at the same time: a large one is cut, so that none waits for another.
        merge: False: every trial is a cohort of its own.
    """
    alike: defaultdict[str, list[tuple[Trial, Settings]]] = defaultdict(list)
    for trial in trials:
        settings = trial.settings()
        alike[signature(settings) if merge and can_merge(settings) else trial.id].append((trial, settings))
    total = sum(_work(settings) for group in alike.values() for _, settings in group)
    cohorts: list[tuple[float, list[Trial]]] = []
    for group in alike.values():
        work = sum(_work(settings) for _, settings in group)
        memory = sum(instance_bytes(settings) * settings["model"]["n_instances"] for _, settings in group)
        n_parts = max(1, -(-memory // memory_bytes), round(work * n_workers * 2 / total) if n_workers > 1 else 1)
        n_parts = min(int(n_parts), len(group))
        # trials that share draws stay together
        group = sorted(group, key=_draws)
        for part in range(n_parts):
            share = group[part * len(group) // n_parts : (part + 1) * len(group) // n_parts]
            cohorts.append((sum(_work(settings) for _, settings in share), [trial for trial, _ in share]))
    return [share for _, share in sorted(cohorts, key=lambda cohort: -cohort[0])]


def _draws(entry: tuple[Trial, Settings]) -> str:
    """What a trial's draws depend on, within a cohort."""
    data = entry[1]["data"]
    return json.dumps([data["seed"], *(data.get(name) for part, name in _PER_INSTANCE if part == "data")])


def can_merge(settings: Settings) -> bool:
    """False for trials that must train alone: with callbacks or loggers of the user's, or tensors read from a file."""
    callbacks = settings["trainer"]["callbacks"] or []
    known = all(_is_ours(class_of(callback)) for callback in callbacks)
    logger = settings["trainer"]["logger"]
    logs = logger in (None, False) or (isinstance(logger, dict) and class_of(logger) is RunLogger)
    model = settings["model"]
    from_file = "." in model["init_features"] or "." in model["init_head"]
    importance = model["importance"]
    rows = isinstance(importance, list) and isinstance(importance[0], list)
    return known and logs and not from_file and not rows


def _is_ours(callback: object) -> bool:
    return callback in _WRITERS or getattr(callback, "__module__", "").startswith(callbacks.__name__)


def signature(settings: Settings) -> str:
    """What trials of one cohort have in common: everything that is not a value per instance, a seed or a name."""
    common = json.loads(json.dumps(settings))
    for part, name in (*_PER_INSTANCE, ("model", "seed"), ("data", "seed"), ("model", "n_instances")):
        common[part].pop(name, None)  # a sweep of an earlier version has not all of them
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
    whole["model"]["n_instances"] = sum(sizes)  # the data take it from there
    for part, name in _PER_INSTANCE:
        if settings[0][part].get(name) is not None:
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
        callback for callback in whole["trainer"]["callbacks"] or [] if class_of(callback) not in _WRITERS
    ]
    return whole


def train(trials: Sequence[Trial]) -> None:
    """Train a cohort in this process; every trial gets its run directory.

    Raises:
        InputError: A trial's settings cannot be used.
        DivergedError: All trials diverged.
    """
    place = trials[0].folder.parent
    place.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place))  # if this process is killed, the sweep removes it
    try:
        settings = [trial.settings() for trial in trials]
        for trial in trials:
            clear(trial.folder)  # an interrupted or failed attempt left it
        config = scratch / "config.yaml"
        if not can_merge(settings[0]):
            config.write_text(trials[0].config, encoding="utf-8")
            fit(["--config", str(config), "--run_dir", str(trials[0].folder)])
            return
        entries = [trial.as_json() for trial in trials]
        (scratch / "trials.json").write_text(json.dumps(entries), encoding="utf-8")
        whole = merged(settings)
        whole["trainer"]["callbacks"].append(
            {"class_path": _TRIAL_WRITER, "init_args": {"trials": str(scratch / "trials.json")}}
        )
        config.write_text(yaml.safe_dump(whole), encoding="utf-8")
        fit(["--config", str(config), "--run_dir", str(scratch / "run")])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what is in the place of a run directory; of a link, the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def clear_drafts(place: Path) -> None:
    """Remove what processes that were killed have left beside the run directories."""
    for path in place.glob(f"{DRAFT}*"):
        clear(path)


def trial_bytes(trial: Trial) -> float:
    """Memory that a trial takes [bytes], an estimate from above."""
    settings = trial.settings()
    return float(instance_bytes(settings) * settings["model"]["n_instances"])


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
