"""What a replay is called, and which claims are judged: a run is named by what it measured.

Name and claims of a configuration are about the model and the prompts of that configuration. Where another one, or the
command line, has another model measured, or other prompts, the run gets that model's name, and the claims are left out.
They are judged all the same where only the seed of a training is another one.
What the command line says of name and claims themselves stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from svf_lightning.errors import InputError

_Aspect = Literal["identity", "subject"]
_IOI = "ioi"  # the prompts that need no file; svf_lightning.replay is imported when a replay begins
_LONGEST = 64  # characters of a name, which is also that of a folder


def name_by_what_is_measured(
    config: Namespace, args: Sequence[str], files: Sequence[str], parse: Callable[[Sequence[str]], Namespace]
) -> str:
    """Give the settings of a replay the name and the claims that they may have.

    Args:
        config: Settings of the replay; ``experiment`` is changed in place.
        args: The command line.
        files: Its configuration files; later ones go before earlier ones.
        parse: Makes settings of some of the files alone.

    Returns:
        A line that says what was changed, or an empty string.

    Raises:
        InputError: The source of the checkpoints cannot be used.
    """
    experiment = config.experiment
    options = {arg.partition("=")[0] for arg in args}
    owners = {key: _up_to_the_one_that_says(key, files) for key in ("name", "claims")}
    if len(files) < 2 and owners["name"] and not any(option.startswith("--data") for option in options):
        return ""  # all of it is from one file
    settings = {tuple(chosen): parse(chosen) for chosen in owners.values() if chosen}
    of_name, of_claims = (settings.get(tuple(owners[key])) for key in ("name", "claims"))
    changes = []
    differs = _difference(config.data, of_name.data if of_name else None)
    if differs and "--experiment.name" not in options and "--experiment" not in options:
        model = _source(config.data.source).model_name() if differs == "another model" else experiment.name
        experiment.name = _folder_name(model, config.data.prompts, config.data.task)
        experiment.figures, experiment.shows, experiment.tags = "", "", ["replay", experiment.name]
        changes.append(f"the run is named {experiment.name}")
    if of_claims and experiment.claims == of_claims.experiment.claims and "--experiment.claims" not in options:
        n = len(experiment.claims)
        if n and _difference(config.data, of_claims.data, of="subject"):
            experiment.claims = []
            changes.append(f"{n} claims about {of_claims.experiment.name} are not judged")
    if not changes or of_name is None:
        return ""
    return f"svf-lightning: {differs} than {of_name.experiment.name} has: {', and '.join(changes)}"


def _up_to_the_one_that_says(key: str, files: Sequence[str]) -> list[str]:
    """The files up to the last one that has this setting of the experiment; none if no file has it."""
    last = 0
    for i, file in enumerate(files, start=1):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser has said what is wrong with it, or knows better
        experiment = content.get("experiment") if isinstance(content, dict) else None
        if isinstance(experiment, dict) and key in experiment:
            last = i
    return list(files[:last])


def _difference(data: Namespace, other: Namespace | None, of: _Aspect = "identity") -> str:
    """In what the measured differs: "another model", "another task", "other prompts", or an empty string."""
    if other is None or not _is_same_source(data.source, other.source, of):
        return "another model"
    if data.task != other.task:
        return "another task"
    return "other prompts" if data.prompts != other.prompts else ""


def _is_same_source(one: Namespace, other: Namespace, of: _Aspect) -> bool:
    """Whether two sources have the same model; which of its checkpoints does not matter.

    Args:
        one: Settings of a source.
        other: Those of another one.
        of: "identity", or what claims are about ("subject"): trainings of other seeds are the same then.
    """
    if one == other:
        return True
    if one.class_path != other.class_path:
        return False
    try:
        expected = getattr(_source(other), of)()
    except InputError:  # as for a package that is not installed, and not asked for any more
        return False
    return bool(getattr(_source(one), of)() == expected)


def _source(settings: Namespace) -> Any:
    """The source that settings describe.

    Raises:
        InputError: It cannot be made.
    """
    from svf_lightning.replay import CheckpointSource

    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_argument("--source", type=CheckpointSource)
    return parser.instantiate(Namespace(source=settings.clone())).source  # type: ignore[no-untyped-call]


def _folder_name(model: str, prompts: str, task: str | None = None) -> str:
    """A name that can be a folder's, of a model, and of its task or of prompts from a file."""
    of_task = [] if task in (None, _IOI) else [str(task).rsplit(".", 1)[-1]]
    parts = [model, *of_task, *([] if prompts == _IOI else [Path(prompts).stem])]
    name = re.sub(r"[^\w.=+-]+", "_", "_".join(parts)).strip("._-")
    return name[:_LONGEST] or "replay"
