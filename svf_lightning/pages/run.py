"""The page of one run: what it claims and measured, its dynamics, its figures, and how to repeat it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import InputError
from svf_lightning.figures import FIGURES, draw_all
from svf_lightning.figures.look import count_of
from svf_lightning.figures.reading import sizes_in_words
from svf_lightning.pages.explorer import time_slider
from svf_lightning.pages.page import Section, Table, write_page
from svf_lightning.pages.words import head_picker
from svf_lightning.run.claims import in_words, reading
from svf_lightning.run.directory import CONFIG, REPORT, SUMMARY, command_of, is_replay, read_config
from svf_lightning.run.ledger import open_sound
from svf_lightning.run.lineage import Parent, described
from svf_lightning.run.summary import read_summary
from svf_lightning.sentences import Sentence, capital, joined

if TYPE_CHECKING:
    import xarray as xr

_LAST = "further"  # what no other figure shows
_ENDED = {"finished": "finished", "interrupted": "was interrupted", "failed": "failed"}
_LOSS = "loss/total"
_OVER_TRAINING = ("fig_3", "fig_7b")


_NULL = (
    "Beside each number stands the same one where the claim must not hold. In brackets: 95 % intervals over what was "
    "sampled (instances, heads or templates of prompts)."
)


def write_run_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, also of one that goes on or was killed.

    Args:
        run_dir: A run directory with a trajectory.
        out: The file; None for report.html in the run directory.

    Returns:
        The file.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    run_dir = Path(run_dir)
    dataset = open_sound(run_dir)
    summary, config = read_summary(run_dir), read_config(run_dir)
    experiment = summary.get("experiment") or (config.get("experiment") or {}).get("name") or run_dir.parent.name
    command = f"python -m svf_lightning {command_of(run_dir, config)} --config {run_dir / CONFIG}"
    drawn = draw_all(dataset)
    sections = []
    first = _that_matters(drawn, dataset, (config.get("experiment") or {}).get("figures") or "")
    if first is not None:
        sections.append(_section(*first, dataset))
        drawn.pop(first[0], None)
    sections.append(_verdict(summary, dataset))
    if "training" in drawn:
        section = _section("training", drawn.pop("training"), dataset)
        said = first is not None and FIGURES[first[0]].sentences(dataset) == FIGURES["training"].sentences(dataset)
        sections.append(replace(section, text=FIGURES["training"].see) if said else section)
    if (slider := time_slider(dataset)) is not None:
        paper = " (Figs. 1 and 2)" if slider.data["attended"] else ""
        sections.append(Section(f"Through training{paper}", _of_slider(slider.data), widget=slider))
    for name, figure in sorted(drawn.items(), key=lambda item: item[0] == _LAST):
        sections.append(_section(name, figure, dataset))
        if name == "fig_7a":  # Fig. 7a shows one head over all prompts; the picker shows it on one prompt
            sections += _words(dataset)
    sections.append(_made_by(summary, config, command))
    path = Path(out) if out else run_dir / REPORT
    about = [f"run {run_dir.name}", "replay of a language model" if is_replay(run_dir) else "toy model"]
    if parent := Parent.read(run_dir):
        about.append(_origin(parent))
    beside = [(f"all {what}", run_dir / name) for what, name in (("settings", CONFIG), ("numbers", SUMMARY))]
    links = {what: _relative(file, path) for what, file in beside if file.is_file()}
    write_page(path, experiment, " · ".join(about), sections, lead=_lead(summary, dataset, config), links=links)
    return path


def _relative(file: Path, page: Path) -> str:
    """Address of a file, as seen from a page."""
    return quote(os.path.relpath(file.absolute(), page.absolute().parent))


def _that_matters(drawn: Mapping[str, go.Figure], dataset: xr.Dataset, mirrored: str) -> tuple[str, go.Figure] | None:
    """The figure to show first: of those of the paper that the run mirrors, one over training if there is one."""
    numbers = set(re.findall(r"\d+[a-z]?", mirrored))
    numbers |= {f"{number}{letter}" for number in numbers if number.isdigit() for letter in "ab"}
    names = [name for name, about in FIGURES.items() if set(re.findall(r"\d+[a-z]?", about.paper)) & numbers]
    for name in sorted(names, key=lambda name: name not in _OVER_TRAINING):
        if name in drawn:
            return name, drawn[name]
        if name in _OVER_TRAINING:  # on a page, one of them is a part of another figure
            with suppress(InputError):
                return name, FIGURES[name](dataset, x_axis="log")
    return None


def _lead(summary: Mapping[str, Any], dataset: xr.Dataset, config: Mapping[str, Any]) -> str:
    """What was run, and to find out what."""
    shows = (config.get("experiment") or {}).get("shows") or ""
    data = config.get("data") or {}
    prompts = ""
    if "prompt" in dataset.sizes:
        prompts = f"{count_of(dataset.sizes['prompt'], 'prompt')} of {data.get('task') or data.get('prompts') or 'ioi'}"
    after = f"{summary['seconds']:,.0f} s" if summary.get("seconds", 0) >= 1 else ""
    facts = unescape(sizes_in_words(dataset))
    seed = config.get("seed_everything")
    what = " · ".join(filter(None, [facts, prompts, f"seed {seed}" if isinstance(seed, int) else "", after]))
    return f"{capital(shows)}{'' if not shows or shows.endswith(('?', '.')) else '.'} {what}.".strip()


def _origin(parent: Parent) -> str:
    """Where a run comes from, as a part of a heading."""
    name = Path(parent.run).name
    if not parent.checkpoint:
        return f"measured again from run {name}"
    changed = f", where {described(parent.differences)}" if parent.differences else ""
    return f"from step {parent.step:,} of run {name}{changed}"


def _section(name: str, drawn: go.Figure, dataset: xr.Dataset) -> Section:
    """A figure, how to read it, and what the run says in it."""
    about = FIGURES[name]
    return Section(about.heading, joined([about.see, *about.sentences(dataset)]), [drawn])


def _of_slider(data: Mapping[str, Any]) -> str:
    """What to see in the pictures of the slider."""
    sentences = []
    if any("singular vectors" in cell["title"] for cell in data["cells"]):
        sentences.append("An attended feature is aligned when one singular vector points along it alone.")
    if data["attended"]:
        bold = " (bold)" if data["is_named"] else ""
        sentences.append(f"Attended features{bold} are orthogonal to the others where their products are grey.")
    return " ".join(sentences)


def _words(dataset: xr.Dataset) -> list[Section]:
    """The head picker, if the run kept the words of prompts."""
    picker = head_picker(dataset)
    if picker is None:
        return []
    text = (
        "Words are shaded by the attention that the query (dashed) gives them; the key (outlined) is the word that "
        "the prompt names as its key. Bars: score of each word relative to the mean of the others, taken apart over "
        "the singular pairs that contribute most to that of the key."
    )
    return [Section("One head over the words of a prompt (Fig. 7a)", text, widget=picker)]


def _verdict(summary: Mapping[str, Any], dataset: xr.Dataset) -> Section:
    """Each claim with a reading of its numbers; below it all numbers, and what no figure shows."""
    last = int(dataset["step"].values[-1])
    text = f"The run has not ended, or was killed: {last:,} is the last step that it stored."
    tables = []
    if summary:
        ended = _ENDED.get(summary.get("status", ""), "ended")
        text = f"{_counted(summary.get('claims', []))}. The run {ended} at step {summary.get('steps', last):,}."
        tables = _claims(summary)
        if tables:
            text += " " + _NULL
    left_out = dataset.attrs["left_out"]
    if left_out:
        rows = [[f"{step:,}", why] for step, why in left_out.items()]
        tables.append(Table(["step", "left out, as it"], rows, frozenset(["left out, as it"])))
    return Section("Verdict", joined([text, _left_out(left_out), _diverged(dataset)]), tables=tables)


def _made_by(summary: Mapping[str, Any], config: Mapping[str, Any], command: str) -> Section:
    """Settings, versions, and the command that repeats the run."""
    settings = [
        [f"{part}.{name}", json.dumps(value)]
        for part in ("model", "data", "trainer", "capture")
        for name, value in (config.get(part) or {}).items()
        if value is not None and name not in ("callbacks", "logger")
    ]
    versions = [[name, str(version)] for name, version in summary.get("versions", {}).items()]
    tables = [
        Table(titles, rows, frozenset(titles), folded=f"{len(rows)} {titles[0]}s")
        for titles, rows in ((["setting", "value"], settings), (["package", "version"], versions))
        if rows
    ]
    return Section("How it was made", "This command repeats the run.", tables=tables, commands=[command])


def _left_out(checkpoints: Mapping[int, str]) -> Sentence | None:
    """How many checkpoints no curve shows; None if all are shown."""
    if not checkpoints:
        return None
    text = f"Checkpoints that no curve and no figure shows: {len(checkpoints)}."
    return Sentence(text, {"left out": np.array(len(checkpoints))}, True)


def _diverged(dataset: xr.Dataset) -> Sentence | None:
    """In how many instances the loss has ended as no number; None if in none."""
    if _LOSS not in dataset:
        return None
    last = np.atleast_1d(dataset[_LOSS].isel(step=-1).values)
    lost = ~np.isfinite(last)
    if not lost.any():
        return None
    where = f"In {lost.sum()} of {lost.size} instances" if lost.size > 1 else "At the last step"
    return Sentence(f"{where} the loss is not a finite number: training diverged.", {_LOSS: last}, True)


def _claims(summary: Mapping[str, Any]) -> list[Table]:
    claims = summary.get("claims", [])
    if not claims:
        return []
    titles = ["verdict", "claim", "reading", "paper"]
    read = [[in_words(claim).verdict, claim["claim"], reading(claim), claim["figure"]] for claim in claims]
    numbers = []
    for claim in claims:
        told = in_words(claim)
        measured, effect = (cell.replace(", ", ",\N{NO-BREAK SPACE}") for cell in (told.measured, told.effect))
        numbers.append([told.verdict, claim["claim"], measured, told.null, effect, told.needed, told.why])
    every = ["verdict", "claim", "measured [95 %]", "null", "difference [95 %]", "needed", "what decided"]
    return [
        Table(titles, read, frozenset(titles), cards=True),
        Table(every, numbers, frozenset(every), folded="all numbers of the claims, with intervals"),
    ]


def _counted(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims have which verdict."""
    verdicts = [in_words(claim).verdict for claim in claims]
    judged = sum(verdict in ("yes", "no") for verdict in verdicts)
    hold = f"{verdicts.count('yes')} of {judged} judged claims hold" if judged else "No claim was judged"
    others = {
        "open": "{} open (a question, or the sample does not decide)",
        "vacuous": "{} vacuous (the null passes as well, or there is nothing to judge by)",
    }
    told = [words.format(verdicts.count(kind)) for kind, words in others.items() if kind in verdicts]
    return "; ".join([hold, *told])
