"""Writes the tables of the documentation, each between its two markers; nothing in them is typed in by hand.

    python docs/tables.py [RUN_DIR ...]

``README.md``: the presets. ``docs/metrics.md``: every quantity. ``docs/results.md``: the verdicts of the given runs,
from their summary.json; rows of experiments that are not given stay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from svf_lightning.cli import DEFAULT_PRESET, preset_path, presets
from svf_lightning.metrics.dynamics import LEVELS, NOISE_FACTOR
from svf_lightning.quantities import Quantity
from svf_lightning.registry import BUILT_IN, METRICS
from svf_lightning.run.claims import in_words
from svf_lightning.run.directory import is_replay
from svf_lightning.run.summary import read_summary

ROOT = Path(__file__).parents[1]
README, METRICS_PAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "metrics.md", ROOT / "docs" / "results.md"


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


def claims(run_dir: Path) -> list[tuple[str, ...]]:
    """One row per claim of a run."""
    summary = read_summary(run_dir)
    if summary.get("status") != "finished":
        raise SystemExit(f"{run_dir} is {summary.get('status', 'not a finished run')}")
    command = f"`{'replay' if is_replay(run_dir) else 'fit'} --config {summary['experiment']}`"
    rows = []
    for claim in summary["claims"]:
        told = in_words(claim)
        verdict = {"yes": "yes", "open": "open"}.get(told.verdict, f"**{told.verdict}**")
        about = (told.measured, told.null, told.effect, told.needed, told.n, verdict)
        rows.append((claim["figure"], command, claim["claim"], *about))
    return rows


def claims_table(page: str, run_dirs: list[Path]) -> str:
    """The page's table with the rows of these runs in place of those of their experiments; new ones come last."""
    tables: dict[str, list[str]] = {}
    for row in rows_of(page, "claims"):
        tables.setdefault(row.split("|")[2].strip(), []).append(row)
    titles = ("paper", "command", "claim", "measured [95 %]", "null", "difference [95 %]", "needed", "n", "verdict")
    header = markdown(titles, [])
    for run_dir in run_dirs:
        rows = claims(run_dir)
        tables[rows[0][1]] = markdown(("",), rows).splitlines()[2:]
    return "\n".join([header, *(row for table in tables.values() for row in table)])


def main(run_dirs: list[str]) -> None:
    """Write all tables."""
    README.write_text(replaced(README.read_text(), "presets", presets_table()))
    METRICS_PAGE.write_text(metrics_page())
    page = RESULTS.read_text()
    RESULTS.write_text(replaced(page, "claims", claims_table(page, [Path(run_dir) for run_dir in run_dirs])))


if __name__ == "__main__":
    main(sys.argv[1:])
