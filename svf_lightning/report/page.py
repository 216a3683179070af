"""One self-contained HTML page: figures, tables and words, in light and dark, with no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
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
.words { text-align: left; white-space: normal; }
.words:nth-child(2) { min-width: 9rem; }
code { background: var(--mark); padding: .1rem .3rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; min-width: 0; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0; }
.controls .grow { flex: 1 1 16rem; min-width: 0; display: flex; gap: .5rem; align-items: center; }
.controls select { min-width: 0; max-width: 100%; }
.controls input[type="range"] { flex: 1; min-width: 8rem; }
button, select { font: inherit; color: var(--text); background: var(--mark); border: 1px solid var(--soft);
  border-radius: .3rem; padding: .2rem .7rem; }
button[aria-pressed="true"] { border-width: 2px; font-weight: bold; }
:focus-visible { outline: 3px solid #56B4E9; outline-offset: 2px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .5rem; }
.cell { min-width: 0; height: 340px; }
.word { background: color-mix(in srgb, #0072B2 var(--weight), transparent); border-radius: .2rem; }
.word.key { outline: 2px solid #D55E00; outline-offset: 1px; }
.word.query { outline: 2px dashed var(--soft); outline-offset: 1px; }
.word.key, .word.query { margin: 0 .2rem; }
#words-text { line-height: 2; max-width: none; }
details { margin-top: .5rem; }
summary { cursor: pointer; }
figcaption { color: var(--soft); font-size: .9rem; }
"""
_SCRIPT = """
const pageData = JSON.parse(document.getElementById("figures").textContent);
const pageDark = window.matchMedia("(prefers-color-scheme: dark)");
const pageLook = () => pageData.templates[pageDark.matches ? "dark" : "light"];
const pageOptions = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
pageOptions.displayModeBar = window.matchMedia("(hover: none)").matches ? false : "hover"; // it lies on colour bars
for (const [id, figure] of Object.entries(pageData.figures)) {
  figure.layout.template = pageLook();
  Plotly.newPlot(id, figure.data, figure.layout, pageOptions);
}
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => {
    Plotly.relayout(button.dataset.figure, JSON.parse(button.dataset.change));
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
  });
}
pageDark.addEventListener("change", () => {
  for (const id of Object.keys(pageData.figures)) Plotly.relayout(id, {template: pageLook()});
});
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under titles.

    Args:
        titles: Of the columns.
        rows: Cells; a number is text already.
        words: Titles of columns that hold words, which are set from the left and may wrap.
        folded: If not empty, what one can click at to see the table.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()
    folded: str = ""


@dataclass(frozen=True)
class Widget:
    """A part of a page that answers to its reader.

    Args:
        name: Of its script, NAME.js beside this file, which finds ``data`` in the element NAME-data.
        html: Its controls and places, with nothing in it that was not escaped.
        data: JSON values.
    """

    name: str
    html: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: Heading.
        text: What to see, in a sentence or two.
        figures: Figures; their titles and subtitles are set as text above them, where they can wrap.
        tables: Tables under the figures.
        commands: Command lines to copy, at the end.
        widget: Something to play with; a page has at most one of each name.
    """

    title: str
    text: str = ""
    figures: Sequence[go.Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    widget: Widget | None = None


def packed(values: np.ndarray, scale: float, kind: type[np.signedinteger[Any]] = np.int8) -> str:
    """Values for a widget: integers in units of scale / their largest, base64; the lowest where there is no number."""
    limit = np.iinfo(kind)
    known = np.isfinite(values)
    whole = np.clip(np.round(np.where(known, values, 0) / scale * limit.max), -limit.max, limit.max)
    return base64.b64encode(
        np.where(known, whole, limit.min).astype(np.dtype(kind).newbyteorder("<")).tobytes()
    ).decode()


def largest(values: np.ndarray) -> float:
    """Largest size of a finite value, as a scale for :func:`packed`; 1 if all are 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0)) or 1.0


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page that opens with no network; plotly.js (about 4.5 MB) is part of it.

    Args:
        path: The file; one that is there is replaced at once.
        title: Of the page.
        subtitle: One line under it.
        sections: From top to bottom.
    """
    figures: dict[str, Any] = {}
    scripts = [_SCRIPT]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(subtitle)}</p>']
    for number, section in enumerate(sections):
        body.append(f'<section aria-labelledby="part-{number}"><h2 id="part-{number}">{escape(section.title)}</h2>')
        if section.text:
            body.append(f"<p>{escape(section.text)}</p>")
        for figure in section.figures:
            name = f"figure-{len(figures)}"
            figures[name], heading, caption = _plain(figure)
            height = figures[name]["layout"]["height"]
            buttons = _buttons(name, figures[name]["layout"].pop("updatemenus", []))
            body.append(
                f"<figure><figcaption><strong>{_words(heading)}</strong><br>{_words(caption)}</figcaption>"
                f'{buttons}<div class="wide" tabindex="0"><div id="{name}" role="img" '
                f'aria-label="{escape(re.sub("</?su[bp]>", "", heading))}" '
                f'style="height:{height}px{_least_width(figure)}"></div></div></figure>'
            )
        if (widget := section.widget) is not None:
            data = f'<script type="application/json" id="{widget.name}-data">{_json(widget.data)}</script>'
            body.append(widget.html + data)
            scripts.append((Path(__file__).parent / f"{widget.name}.js").read_text(encoding="utf-8"))
        body += [_table(table) for table in section.tables]
        body += [f"<p><code>{escape(command)}</code></p>" for command in section.commands]
        body.append("</section>")
    looks = {name: template.to_plotly_json() for name, template in TEMPLATES.items()}
    data = _json({"figures": figures, "templates": looks})
    write_text(
        Path(path),
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="figures">{data}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n",
    )


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: without a tag."""
    return json.dumps(value).replace("<", "\\u003c")


def _plain(figure: go.Figure) -> tuple[dict[str, Any], str, str]:
    """A figure as JSON values, without template, fixed width and title; its title; its subtitle."""
    found: dict[str, Any] = json.loads(figure.to_json())
    layout = found["layout"]
    for name in ("template", "width"):
        layout.pop(name, None)
    title = layout.pop("title", {})
    full = layout.get("height", 450)
    layout["height"] = full - _TITLE
    layout["modebar"] = {"orientation": "v"}  # beside the legend, not over it
    layout["margin"] = {**layout["margin"], "t": max(20, layout["margin"]["t"] - _TITLE)}
    if layout.get("legend", {}).get("yref") == "container":
        layout["legend"]["y"] = 1 - ((1 - layout["legend"]["y"]) * full - _TITLE) / layout["height"]
    return found, title.get("text", ""), title.get("subtitle", {}).get("text", "")


def _buttons(name: str, menus: Sequence[dict[str, Any]]) -> str:
    """Buttons of a figure as those of the page: plotly's know neither the keyboard nor the dark."""
    found = "".join(
        f'<button type="button" data-figure="{name}" data-change="{escape(json.dumps(button["args"][0]))}" '
        f'aria-pressed="{"false" if i else "true"}">{escape(button["label"])}</button>'
        for menu in menus
        for i, button in enumerate(menu["buttons"])
    )
    return f'<div class="controls">{found}</div>' if found else ""


def _least_width(figure: go.Figure) -> str:
    """Panels side by side need room; on a phone they are scrolled."""
    beside = {(axis.domain or (0, 1))[0] for axis in figure.select_xaxes()}
    return ";min-width:720px" if len(beside) > 1 else ""


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
    found = f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{escape(table.folded)}</summary>{found}</details>" if table.folded else found
