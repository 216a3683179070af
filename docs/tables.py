"""Writes the tables of the documentation, each between its two markers; nothing in them is typed in by hand.

    python docs/tables.py [RUN_DIR ...]

``README.md``: the presets. ``docs/metrics.md``: every quantity. ``docs/results.md``: the verdicts of the given runs,
from their summary.json; rows of experiments that are not given stay. Several runs of one experiment, such as of other
seeds, share its rows: means over runs, intervals whose units are runs, and how often each verdict was given.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from svf_lightning.cli import DEFAULT_PRESET, preset_path, presets
from svf_lightning.metrics.dynamics import LEVELS, NOISE_FACTOR
from svf_lightning.metrics.intervals import mean_interval
from svf_lightning.quantities import Quantity
from svf_lightning.registry import BUILT_IN, METRICS
from svf_lightning.run.claims import Answer, in_words
from svf_lightning.run.directory import is_replay
from svf_lightning.run.summary import read_summary

ROOT = Path(__file__).parents[1]
README, METRICS_PAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "metrics.md", ROOT / "docs" / "results.md"

VERDICTS = get_args(Answer)


def between(name: str, by: str = "docs/tables.py") -> tuple[str, str]:
    """The markers of a table, and the file that writes it."""
    return f"<!-- {name}: written by {by} -->", f"<!-- end of {name} -->"


def replaced(text: str, name: str, table: str, by: str = "docs/tables.py") -> str:
    """A page with the table of that name in place of the one that it has."""
    begin, end = between(name, by)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def rows_of(text: str, name: str) -> list[str]:
    """The rows of a page's table, without its header."""
    begin, end = between(name)
    return text.split(begin)[1].split(end)[0].strip().splitlines()[2:]


def markdown(titles: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """A table of text."""
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def presets_table() -> str:
    """The presets of `fit` and of `replay`, as their files describe themselves."""
    rows = []
    for folder in ("", "replay"):
        for name in sorted(presets(folder), key=lambda name: name != DEFAULT_PRESET):
            about = yaml.safe_load(preset_path(name, folder).read_text(encoding="utf-8"))["experiment"]
            command = f"{'replay' if folder else 'fit'} --config {name}"
            rows.append((f"`{command}`", about["figures"], about["shows"]))
    return markdown(("command", "paper", "shows"), rows)


def metrics_table(provider: str | None) -> str:
    """The quantities of one provider, by the name of its class; None for those that no callback measures."""
    rows = [_about(q) for q in BUILT_IN.values() if _provider(q) == provider]
    return markdown(("name", "what", "unit", "range", "meaning", "source", "W&B"), rows)


def _provider(quantity: Quantity) -> str | None:
    name = quantity.provider.rsplit(".", 1)[-1]
    return name if name in METRICS else None


def _about(q: Quantity) -> tuple[str, ...]:
    dims = f" [{', '.join(q.dims)}]" if q.dims else ""
    logged = "" if q.dims else {"extremes": "mean, min, max", "mean": "mean", "no": "-"}[q.logged]
    return f"`{q.name}`{dims}", q.label, q.unit, q.range, q.meaning, q.source, logged


def _changes_in_words() -> str:
    """When a change is said to have happened."""
    rows = [
        (f"`{q.change.name}`", f"`{q.name}`", "rise" if q.rises else "fall", LEVELS[q.level].reason)
        for q in BUILT_IN.values()
        if q.change is not None and isinstance(q.level, str)
    ]
    table = markdown(("step", "of", "which must", "to a value that is"), rows)
    return (
        "A curve that moves at all has covered 90 % of its way at some step, so a change has a step only where it "
        "happened; elsewhere the step is null. It happened if the quantity reaches its level in the right direction, "
        f"by more than {NOISE_FACTOR:g} times the noise of the curve. The noise is a robust standard deviation "
        "(`svf_lightning.metrics.noise_of`): from row to row, or in the last tenth of the rows if that is larger. "
        "`mean`, `min` and `max` are over the instances in which "
        "it happened, `happened` in `summary.json` counts these, and W&B gets their share as `NAME/share`. D, N and "
        f"the number of pairs are those of the run (`svf_lightning/metrics/dynamics.py`).\n\n{table}"
    )


def metrics_page() -> str:
    """The whole page of metrics."""
    parts = [
        "# Every quantity that is measured",
        "Written by `python docs/tables.py` from the declarations beside each `measure` (`ProbeMetric.quantities`). "
        "Names are those of the trajectory, of `summary.json` and of W&B; a quantity has the dimensions of the probe "
        "(instance, or layer and head) and those in brackets. What the callbacks do is in their docstrings.",
        _changes_in_words(),
    ]
    for name in [None, *METRICS]:
        title = "Losses, coordinates, and what is derived" if name is None else name
        add = "" if name is None else f"`--trainer.callbacks+=svf_lightning.callbacks.{name}`\n\n"
        parts.append(f"## {title}\n\n{add}{metrics_table(name)}")
    return "\n\n".join(parts) + "\n"


def command_of(run_dir: Path) -> str:
    """The command that made a run.

    Raises:
        SystemExit: The run is not finished.
    """
    summary = read_summary(run_dir)
    if summary.get("status") != "finished":
        raise SystemExit(f"{run_dir} is {summary.get('status', 'not a finished run')}")
    return f"`{'replay' if is_replay(run_dir) else 'fit'} --config {summary['experiment']}`"


def claims(command: str, run_dirs: list[Path]) -> list[tuple[str, ...]]:
    """One row per claim of a run, or of several runs of one command that differ in their seeds.

    Raises:
        SystemExit: The runs do not make the same claims.
    """
    by_run = [read_summary(run_dir)["claims"] for run_dir in run_dirs]
    if any([one["claim"] for one in its] != [one["claim"] for one in by_run[0]] for its in by_run):
        raise SystemExit(f"the runs of {command} make different claims")
    rows = []
    for of_runs in zip(*by_run, strict=True):
        told = in_words(over_runs(of_runs))
        names = {one: "yes" if one == "yes" else "open" if one == "open" else f"**{one}**" for one in VERDICTS}
        counts = Counter(in_words(one).verdict for one in of_runs)
        verdicts = [(names[one], counts[one]) for one in VERDICTS if counts[one]]
        verdict = verdicts[0][0] if len(verdicts) == 1 else ", ".join(f"{name} in {n}" for name, n in verdicts)
        n = told.n if len(of_runs) == 1 else f"{len(of_runs)} runs"
        about = (told.measured, told.null, told.effect, told.needed, n, verdict)
        rows.append((of_runs[0]["figure"], command, of_runs[0]["claim"], *about))
    return rows


def over_runs(of_runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The numbers of a claim over several runs: means, with intervals whose units are runs."""
    if len(of_runs) == 1:
        return of_runs[0]

    def mean(numbers: list[float | None]) -> tuple[float | None, list[float] | None]:
        known = np.array([value for value in numbers if value is not None])
        low, high = mean_interval(known)
        interval = [float(low), float(high)] if np.isfinite(low) else None
        return (float(known.mean()), interval) if len(known) else (None, None)

    measured, interval = mean([one["measured"] for one in of_runs])
    joined = {**of_runs[0], "measured": measured, "interval": interval, "share": None}
    if of_runs[0].get("null"):
        joined["null"] = {**of_runs[0]["null"], "value": mean([one["null"]["value"] for one in of_runs])[0]}
    if all(one.get("effect") for one in of_runs):
        value, interval = mean([one["effect"]["value"] for one in of_runs])
        joined["effect"] = {"value": value, "interval": interval}
    else:
        joined["effect"] = None
    return joined


def claims_table(page: str, run_dirs: list[Path]) -> str:
    """The page's table with the rows of these runs in place of those of their experiments; new ones come last."""
    tables: dict[str, list[str]] = {}
    for row in rows_of(page, "claims"):
        tables.setdefault(row.split("|")[2].strip(), []).append(row)
    titles = ("paper", "command", "claim", "measured [95 %]", "null", "difference [95 %]", "needed", "n", "verdict")
    header = markdown(titles, [])
    by_command: dict[str, list[Path]] = {}
    for run_dir in run_dirs:
        by_command.setdefault(command_of(run_dir), []).append(run_dir)
    for command, its in by_command.items():
        tables[command] = markdown(("",), claims(command, its)).splitlines()[2:]
    return "\n".join([header, *(row for table in tables.values() for row in table)])


def main(run_dirs: list[str]) -> None:
    """Write all tables."""
    README.write_text(replaced(README.read_text(), "presets", presets_table()))
    METRICS_PAGE.write_text(metrics_page())
    page = RESULTS.read_text()
    RESULTS.write_text(replaced(page, "claims", claims_table(page, [Path(run_dir) for run_dir in run_dirs])))


if __name__ == "__main__":
    main(sys.argv[1:])
