"""One self-contained HTML page: figures, tables and words, in light and dark, with no network."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.figures.look import TEMPLATES
from svf_lightning.files import write_text

_TITLE = 56  # pixels that a figure's title and subtitle take
_NARROW_MARGIN = 150  # pixels
_FEWEST_LISTED = 4  # sections of a page with a list of contents
_LONG = 200  # values of a curve
_TEMPLATES = Environment(loader=PackageLoader(__package__), autoescape=True)


@dataclass(frozen=True)
class Table:
    """Rows of text under titles.

    Args:
        titles: Of the columns.
        rows: Cells; a number is text already.
        words: Titles of columns that hold words, which are set from the left and may wrap.
        folded: If not empty, what one can click at to see the table.
        cards: On a phone, each row is a card of its own, for rows of words.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()
    folded: str = ""
    cards: bool = False

    def kind(self, title: str) -> Markup:
        """Attribute of a column's cells."""
        return Markup(' class="words"') if title in self.words else Markup()


@dataclass(frozen=True)
class Widget:
    """A part of a page that answers to its reader.

    Args:
        name: Of its template, templates/NAME.html, and of its script, NAME.js, which finds ``data`` in the element
            NAME-data.
        data: JSON values.
    """

    name: str
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


def write_page(
    path: str | Path,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    links: Mapping[str, str] | None = None,
) -> None:
    """Write a page that opens with no network; plotly.js (about 4.5 MB) is part of it.

    Args:
        path: The file; one that is there is replaced at once.
        title: Of the page.
        subtitle: One line under it.
        sections: From top to bottom.
        lead: What was run, in a sentence or two.
        links: Files beside the page, by what they hold.
    """
    placed: dict[str, _Placed] = {}
    shown = []
    for section in sections:
        figures = []
        for figure in section.figures:
            name = f"figure-{len(placed)}"
            placed[name] = _place(name, figure)
            figures.append(placed[name])
        shown.append({**vars(section), "figures": figures})
    widgets = dict.fromkeys(section.widget.name for section in sections if section.widget is not None)
    scripts = [_file("page.js"), *(_file(f"{name}.js") for name in widgets)]
    looks = {name: template.to_plotly_json() for name, template in TEMPLATES.items()}
    html = _TEMPLATES.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        lead=lead,
        links=links or {},
        contents=[section.title for section in sections] if len(sections) >= _FEWEST_LISTED else [],
        sections=shown,
        style=_file("page.css"),
        plotly=Markup(get_plotlyjs()),
        scripts=scripts,
        figures={"figures": {name: figure.content for name, figure in placed.items()}, "templates": looks},
    )
    write_text(Path(path), html)


def _file(name: str) -> Markup:
    """A script or a style sheet of this package."""
    return Markup((resources.files(__package__) / name).read_text(encoding="utf-8"))


class _Button(NamedTuple):
    label: str
    change: str  # of the figure's layout, JSON


class _Placed(NamedTuple):
    """A figure in a page, whose title stands above it as text that can wrap."""

    name: str
    heading: Markup
    caption: Markup
    spoken: str
    height: int  # pixels
    is_wide: bool  # panels side by side need room; on a phone they are scrolled
    buttons: list[_Button]  # plotly's buttons support neither the keyboard nor the dark look
    content: dict[str, Any]  # JSON values, without template, fixed width, title and buttons


def _smaller(values: Any) -> Any:
    """Numbers of a long curve in single precision, as plotly packs arrays: more than a screen can show."""
    if isinstance(values, list) and len(values) >= _LONG and all(isinstance(value, float | None) for value in values):
        numbers, packed_before = np.array([math.nan if value is None else value for value in values]), {}
    elif isinstance(values, dict) and values.get("dtype") == "f8" and len(values["bdata"]) >= 8 * _LONG:
        numbers, packed_before = np.frombuffer(base64.b64decode(values["bdata"]), "<f8"), values
    else:
        return values
    if (np.abs(numbers) > np.finfo(np.float32).max).any():
        return values
    return {**packed_before, "dtype": "f4", "bdata": base64.b64encode(numbers.astype("<f4").tobytes()).decode()}


def _place(name: str, figure: go.Figure) -> _Placed:
    content: dict[str, Any] = json.loads(figure.to_json())
    content["data"] = [{part: _smaller(values) for part, values in trace.items()} for trace in content["data"]]
    layout = content["layout"]
    for part in ("template", "width"):
        layout.pop(part, None)
    title = layout.pop("title", {})
    full = layout.get("height", 450)
    layout["height"] = full - _TITLE
    layout["modebar"] = {"orientation": "v"}  # beside the legend, not over it
    layout["margin"] = {**layout["margin"], "t": max(20, layout["margin"]["t"] - _TITLE)}
    if layout.get("legend", {}).get("yref") == "container":
        layout["legend"]["y"] = 1 - ((1 - layout["legend"]["y"]) * full - _TITLE) / layout["height"]
    menus = layout.pop("updatemenus", [])
    heading = title.get("text", "")
    return _Placed(
        name,
        _words(heading),
        _words(title.get("subtitle", {}).get("text", "")),
        unescape(re.sub("</?su[bp]>", "", heading)),
        layout["height"],
        _is_wide(figure),
        [_Button(button["label"], json.dumps(button["args"][0])) for menu in menus for button in menu["buttons"]],
        content,
    )


def _is_wide(figure: go.Figure) -> bool:
    """True for panels side by side, or with legends beside them."""
    left_ends = {(axis.domain or (0, 1))[0] for axis in figure.select_xaxes()}
    return len(left_ends) > 1 or figure.layout.margin.r > _NARROW_MARGIN


def _words(text: str) -> Markup:
    """A title of plotly as HTML: its sub- and superscripts, and nothing else."""
    parts = re.split("(</?su[bp]>)", text)  # every second one is a tag
    return Markup("".join(part if i % 2 else escape(unescape(part)) for i, part in enumerate(parts)))
