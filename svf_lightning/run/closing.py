"""What a run prints at its end: in brief, so that it fits a screen, or all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from svf_lightning.quantities import Quantity
from svf_lightning.run.claims import Verdict, in_words
from svf_lightning.run.settings import Experiment
from svf_lightning.run.summary import Result
from svf_lightning.terminal import console

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {"yes": "green", "no": "bold red", "open": "", "vacuous": "yellow"}
_ROOM_FOR_LABELS = 96  # a terminal with this many columns has room for labels
_WIDTH = 80  # columns of what is brief
# lines of what is brief, so that with all else there are less than 40
_CLAIM_LINES = 23
_METRICS, _FEWEST_METRICS, _USUAL_CLAIMS = 6, 3, 13


def print_brief(experiment: Experiment, result: Result, verdicts: Sequence[Verdict]) -> None:
    """The metrics that the claims are about, those of a user's own, and each claim on a line or two."""
    from rich.text import Text

    out = console()
    n = max((len(values) for values in result.last.values()), default=0)
    seconds = f", {result.seconds:,.0f} s" if result.seconds >= 1 else ""
    out.print(Text(f"\n{experiment.name}: {result.status} at step {result.steps:,}{seconds}", style="bold"))
    chosen = _that_matter(experiment, result, _most_metrics(len(verdicts)))
    if chosen:
        several = n > 1
        heads = ("mean", "min", "max") if several else ("value",)
        over = f"over {n} {result.over}" if several else ""
        width = max(len(name) for name in chosen)
        out.print(Text(f"{over:{width}}" + "".join(f"{head:>10}" for head in heads), style="dim"))
        for name in chosen:
            values = result.statistics(name) if len(result.last[name]) > 1 else tuple(result.last[name][:1])
            cells = "".join(f"{_number(value):>10}" for value in values)
            unit = result.quantity(name).unit
            out.print(Text(f"{name:{width}}{cells:{10 * len(heads)}}  {unit}".rstrip()), soft_wrap=True)
    if verdicts:
        out.print(Text(f"\n{_counted(verdicts)}", style="bold"))
        for line in _claims_in_lines(verdicts):
            out.print(line, soft_wrap=True)
    n_more = len(result.shown_in_table()) - len(chosen)
    more = f"{n_more} more metrics, and what" if n_more > 0 else "What"
    if verdicts:
        out.print(Text(f"{more} decided: --verbose, the page, summary.json", style="dim"))
    elif n_more > 0:
        out.print(Text(f"{n_more} more metrics: --verbose, the page, summary.json", style="dim"))


def _most_metrics(n_claims: int) -> int:
    """How many metrics there is room for beside claims."""
    return max(_FEWEST_METRICS, _METRICS - max(0, n_claims - _USUAL_CLAIMS)) if n_claims else _CLAIM_LINES


def _that_matter(experiment: Experiment, result: Result, most: int) -> list[str]:
    """The metrics of a user's own, and those that claims are about; without claims, the first of the table."""
    shown = result.shown_in_table()
    own = [name for name, quantity in shown.items() if _is_own(quantity)]
    about = {claim.metric for claim in experiment.claims}
    of_claims = [name for name in shown if name in about or name == "loss/total"]
    chosen = dict.fromkeys([*own, *(of_claims if about & shown.keys() else shown)])
    kept = set(list(chosen)[:most])
    return [name for name in shown if name in kept]


def _is_own(quantity: Quantity) -> bool:
    """Whether another package measures a quantity than this one."""
    return "." in quantity.provider and not quantity.provider.startswith("svf_lightning.")


def _counted(verdicts: Sequence[Verdict]) -> str:
    """How many claims there are of each verdict."""
    kinds = [in_words(verdict.as_dict()).verdict for verdict in verdicts]
    judged = kinds.count("yes") + kinds.count("no")
    others = [f"{kinds.count(kind)} {kind}" for kind in ("open", "vacuous") if kind in kinds]
    return ", ".join([f"{kinds.count('yes')} of {judged} judged claims hold", *others])


def _claims_in_lines(verdicts: Sequence[Verdict]) -> Iterator[Text]:
    """Each claim on a line: its verdict, its words as far as there is room, what was measured, and its null."""
    from rich.text import Text

    told = [in_words(verdict.as_dict()) for verdict in verdicts]
    numbers = [(each.measured.split(" [")[0], each.null.split(" (")[0]) for each in told]
    widths = [max(len(title), *(len(pair[i]) for pair in numbers)) for i, title in enumerate(("measured", "null"))]
    first = max(7, *(len(each.verdict) for each in told)) + 1
    room = _WIDTH - first - sum(widths) - 3
    yield Text(f"{'':{first}}{'':{room}}  {'measured':>{widths[0]}} {'null':>{widths[1]}}", style="dim")
    wrapped = [_in_two_lines(verdict.claim, room) for verdict in verdicts]
    if sum(map(len, wrapped)) > _CLAIM_LINES:
        wrapped = [[_shortened(verdict.claim, room)] for verdict in verdicts]
    for verdict, each, pair, words in zip(verdicts, told, numbers, wrapped, strict=True):
        line = Text(f"{each.verdict:{first}}", style=_STYLES[verdict.verdict])
        line.append(f"{words[0]:{room}}  {pair[0]:>{widths[0]}} {pair[1]:>{widths[1]}}", style="not bold default")
        yield line
        if len(words) > 1:
            yield Text(f"{'':{first}}{words[1]}")


def _in_two_lines(text: str, room: int) -> list[str]:
    """A text on one line or two."""
    lines = wrap(text, room)
    if len(lines) < 2:
        return lines
    return [lines[0], _shortened(text[len(lines[0]) :].strip(), room)]


def _shortened(text: str, room: int) -> str:
    """A text of at most ``room`` characters: what is in brackets at its end stays, as variants differ in that."""
    if len(text) <= room:
        return text
    end = re.search(r" \([^()]*\)$", text)
    tail = "" if end is None else end[0]
    if len(tail) > room // 2:
        tail = f"{tail[: room // 2 - 2].rstrip(' ,')}…)"
    return f"{text[: room - len(tail) - 1].rstrip(' ,')}…{tail}"


def print_all(experiment: Experiment, result: Result, verdicts: Sequence[Verdict]) -> None:
    """Every metric with its label and unit, what did not happen, and each claim with what was needed."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    n = max((len(v) for v in result.last.values()), default=0)
    title = f"{experiment.name}: {result.status} at step {result.steps:,}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    if out.width >= _ROOM_FOR_LABELS:
        table.add_column("what")
    table.add_column("unit", no_wrap=True)
    for column in ("mean", "min", "max") if n > 1 else ("value",):
        table.add_column(column, justify="right", no_wrap=True)
    for name, quantity in result.shown_in_table().items():
        shown = result.statistics(name) if len(result.last[name]) > 1 else result.last[name][:1]
        words = [name, quantity.label, quantity.unit] if out.width >= _ROOM_FOR_LABELS else [name, quantity.unit]
        table.add_row(*map(Text, words), *(_number(v) for v in shown))
    out.print(table)
    if n > 1:
        out.print(Text(f"mean, min and max over {n} {result.over}"), style="dim")
    for change in result.changes.values():
        if change.is_told and not change.happened.all():
            out.print(Text(f"{change.quantity.name}: {change.sentence().text}"), style="dim")
    if not verdicts:
        return
    claims = Table(title="What the paper claims, and what this run measured", title_justify="left")
    claims.add_column("claim")
    claims.add_column("paper", no_wrap=True)
    for column in ("measured [95 %]", "null", "needed"):
        claims.add_column(column)
    claims.add_column("holds", no_wrap=True)
    for v in verdicts:
        told = in_words(v.as_dict())
        holds = Text(told.verdict, style=_STYLES[v.verdict])
        claims.add_row(*map(Text, (v.claim, v.figure, told.measured, told.null, told.needed)), holds)
    out.print(claims)
    note = (
        f"Intervals are over {result.over}, or what else the metric is of. null: the same number where the claim "
        "must not hold; vacuous: it passes there as well, or there is nothing to judge by. The page and "
        "summary.json have the difference from the null, n, and what decided."
    )
    out.print(Text(note), style="dim")


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
