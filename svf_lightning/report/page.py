"""One self-contained HTML page: figures, tables and words, in light and dark, with no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.report.drawing import TEMPLATES
from svf_lightning.run_dir import write_text

_TITLE = 56  # pixels that a figure's title and subtitle take
_STYLE = """
:root { color-scheme: light dark; --text: #222; --soft: #595959; --line: #d9d9d9; --back: #fff; --mark: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --soft: #a6a6a6; --line: #3a3a3a; --back: #161616; --mark: #222; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--text); background: var(--back);
  font: 16px/1.5 Inter, "Helvetica Neue", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: right; vertical-align: bottom; background: var(--mark); }
.words { text-align: left; white-space: normal; min-width: 9rem; }
code { background: var(--mark); padding: .1rem .3rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .9rem; }
"""
_SCRIPT = """
const data = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const look = () => data.templates[dark.matches ? "dark" : "light"];
const options = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
if (window.innerWidth < 700) options.displayModeBar = false;
for (const [id, figure] of Object.entries(data.figures)) {
  figure.layout.template = look();
  Plotly.newPlot(id, figure.data, figure.layout, options);
}
dark.addEventListener("change", () => {
  for (const id of Object.keys(data.figures)) Plotly.relayout(id, {template: look()});
});
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under titles.

    Args:
        titles: Of the columns.
        rows: Cells; a number is text already.
        words: Titles of columns that hold words, which are set from the left and may wrap.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: Heading.
        text: What to see, in a sentence or two.
        figures: Figures; their titles and subtitles are set as text above them, where they can wrap.
        tables: Tables under the figures.
        commands: Command lines to copy.
    """

    title: str
    text: str = ""
    figures: Sequence[go.Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page that opens with no network; plotly.js (about 4.5 MB) is part of it.

    Args:
        path: The file; one that is there is replaced at once.
        title: Of the page.
        subtitle: One line under it.
        sections: From top to bottom.
    """
    figures: dict[str, Any] = {}
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(subtitle)}</p>']
    for section in sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{escape(section.text)}</p>")
        body += [f"<p><code>{escape(command)}</code></p>" for command in section.commands]
        for figure in section.figures:
            name = f"figure-{len(figures)}"
            figures[name], heading, caption = _plain(figure)
            height = figures[name]["layout"]["height"]
            body.append(
                f"<figure><figcaption><strong>{_words(heading)}</strong><br>{_words(caption)}</figcaption>"
                f'<div id="{name}" role="img" aria-label="{escape(heading)}" style="height:{height}px"></div></figure>'
            )
        body += [_table(table) for table in section.tables]
        body.append("</section>")
    looks = {name: template.to_plotly_json() for name, template in TEMPLATES.items()}
    data = json.dumps({"figures": figures, "templates": looks}).replace("<", "\\u003c")  # no tag inside the script
    write_text(
        Path(path),
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="figures">{data}</script>\n<script>{_SCRIPT}</script>\n'
        "</body>\n</html>\n",
    )


def _plain(figure: go.Figure) -> tuple[dict[str, Any], str, str]:
    """A figure as JSON values, without template, fixed width and title; its title; its subtitle."""
    found: dict[str, Any] = json.loads(figure.to_json())
    layout = found["layout"]
    for name in ("template", "width"):
        layout.pop(name, None)
    title = layout.pop("title", {})
    full = layout.get("height", 450)
    layout["height"] = full - _TITLE
    layout["margin"] = {**layout["margin"], "t": max(20, layout["margin"]["t"] - _TITLE)}
    if layout.get("legend", {}).get("yref") == "container":
        layout["legend"]["y"] = 1 - ((1 - layout["legend"]["y"]) * full - _TITLE) / layout["height"]
    return found, title.get("text", ""), title.get("subtitle", {}).get("text", "")


def _words(text: str) -> str:
    """A title of plotly as HTML: its sub- and superscripts, and nothing else."""
    return re.sub(r"&lt;(/?su[bp])&gt;", r"<\1>", escape(text))


def _table(table: Table) -> str:
    kinds = [' class="words"' if title in table.words else "" for title in table.titles]
    head = "".join(
        f'<th scope="col"{kind}>{escape(title)}</th>' for title, kind in zip(table.titles, kinds, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
