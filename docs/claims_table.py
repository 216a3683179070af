"""Writes the verdicts of finished runs into docs/results.md, between its two markers.

    python docs/claims_table.py RUN_DIR [RUN_DIR ...]

Numbers come from each run's summary.json; nothing is typed in by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
            f"| {claim['figure']} | `fit --config {summary['experiment']}` | {words} "
            f"| {measured} | {needed} | {answers[claim['holds']]} |"
        )
    return found


def main(run_dirs: list[str]) -> None:
    """Replace the table in the page."""
    header = ["| paper | command | claim | measured | needed | holds |", "| --- | --- | --- | --- | --- | --- |"]
    table = "\n".join([BEGIN, *header, *(row for run_dir in run_dirs for row in rows(Path(run_dir))), END])
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + table + rest.split(END)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
