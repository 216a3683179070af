"""Writes the verdicts of finished runs into docs/results.md, between its two markers.

    python docs/claims_table.py RUN_DIR [RUN_DIR ...]

Numbers come from each run's summary.json; nothing is typed in by hand. Rows of experiments that are not given stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svf_lightning.run_dir import is_replay

PAGE = Path(__file__).parent / "results.md"
BEGIN, END = "<!-- claims: written by docs/claims_table.py -->", "<!-- end of claims -->"


def rows(run_dir: Path) -> list[str]:
    """One table row per claim of a run."""
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["status"] != "finished":
        raise SystemExit(f"{run_dir} is {summary['status']}")
    answers = {True: "yes", False: "**no**", None: "open question"}
    found = []
    for claim in summary["claims"]:
        measured = "not measured" if claim["measured"] is None else f"{claim['measured']:.4g}"
        needed = claim["needed"].replace(", open question", "")
        words = claim["claim"].replace("|", "\\|")
        found.append(
            f"| {claim['figure']} | `{_command(run_dir, summary['experiment'])}` | {words} "
            f"| {measured} | {needed} | {answers[claim['holds']]} |"
        )
    return found


def _command(run_dir: Path, experiment: str) -> str:
    return f"{'replay' if is_replay(run_dir) else 'fit'} --config {experiment}"


def main(run_dirs: list[str]) -> None:
    """Replace the rows of these runs' experiments in the page; new experiments come last."""
    header = ["| paper | command | claim | measured | needed | holds |", "| --- | --- | --- | --- | --- | --- |"]
    before, rest = PAGE.read_text().split(BEGIN)
    old, after = rest.split(END)
    tables: dict[str, list[str]] = {}
    for row in old.strip().splitlines()[len(header) :]:
        tables.setdefault(row.split("|")[2].strip(), []).append(row)
    for run_dir in run_dirs:
        new = rows(Path(run_dir))
        tables[new[0].split("|")[2].strip()] = new
    table = "\n".join([BEGIN, *header, *(row for table in tables.values() for row in table), END])
    PAGE.write_text(before + table + after)


if __name__ == "__main__":
    main(sys.argv[1:])
