"""What a page says: its words, those of its tables, and the JSON that its scripts read."""

import json
import re
from html.parser import HTMLParser

import pytest

_VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """A page, parsed as a browser does.

    Attributes:
        words: Everything that shows as text, without tables.
        tables: Text of the tables' cells.
        data: JSON values by the id of their element; a NaN in them fails the test.
        tags: Names of the elements that were opened.
        open: Elements that were not closed.
    """

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.words, self.tables, self.data, self.tags, self.open = [], [], {}, [], []
        self._id = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        if tag == "script" and given.get("type") == "application/json":
            self._id = given["id"]
        if tag not in _VOID:
            self.open.append(tag)
        self.words += [value for name, value in attributes if name in ("aria-label", "title") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._id = None

    def handle_data(self, text):
        if self._id is not None:
            self.data[self._id] = json.loads(text, parse_constant=pytest.fail)
        elif "script" not in self.open and "style" not in self.open:
            where = self.tables if "table" in self.open else self.words
            if self.open and self.open[-1] in ("sub", "sup"):
                where[-1] += f"_{text}"
            else:
                where.append(text)

    @property
    def text(self):
        """Its words, and those that its scripts show: titles, names, what the pointer tells, marks of the slider."""
        return re.sub(r"\s+", " ", " | ".join([*self.words, *self.told]))

    @property
    def told(self):
        """Strings in what the scripts draw, but for encoded numbers."""
        return [re.sub("<su[bp]>", "_", text).replace("</sub>", "") for text in strings(self.data) if len(text) < 400]


def strings(value):
    """All strings in JSON values."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [
            text
            for key, v in value.items()
            if key not in ("templates", "values", "bdata", "legendgroup")
            for text in strings(v)
        ]
    return [text for v in value for text in strings(v)] if isinstance(value, list) else []
