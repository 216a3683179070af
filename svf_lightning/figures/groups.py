"""The order of features in heat maps: attended ones first, antipodal ones side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from svf_lightning.figures.axes import ticks_at
from svf_lightning.figures.reading import pair_features

if TYPE_CHECKING:
    import xarray as xr


def antipodal_order(gram: np.ndarray, features: Sequence[int]) -> list[int]:
    """The given features, those with the most negative cosine next to each other (greedy)."""
    index = np.asarray(features, dtype=int)
    first, second = (index[side] for side in np.triu_indices(len(index), 1))
    order: dict[int, None] = {}
    for i in np.argsort(gram[first, second], kind="stable"):
        pair = int(first[i]), int(second[i])
        if pair[0] not in order and pair[1] not in order:
            order |= dict.fromkeys(pair)
    return list(order | dict.fromkeys(index.tolist()))


class Groups(NamedTuple):
    """Features in the order of a heat map: query features by pair, key features by pair, the rest."""

    query: list[int]
    key: list[int]
    rest: list[int]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Groups:
        """The groups of a run."""
        query, key = (list(dict.fromkeys(side)) for side in pair_features(dataset))
        key = [f for f in key if f not in query]
        return cls(query, key, [f for f in range(dataset.sizes["feature"]) if f not in {*query, *key}])

    @property
    def attended(self) -> list[int]:
        """Query features, then key features."""
        return self.query + self.key

    @property
    def order(self) -> list[int]:
        """All features."""
        return self.attended + self.rest

    def rows(self) -> dict[str, Any]:
        """Tick labels: every feature where there is room, else the groups."""
        if len(self.order) <= 24:
            text = [f"<b>query {f}</b>" for f in self.query] + [f"<b>key {f}</b>" for f in self.key]
            return ticks_at(range(len(self.order)), [*text, *map(str, self.rest)], tickfont={"size": 11})
        parts = {"<b>query</b>": self.query, "<b>key</b>": self.key, "other": self.rest}
        if min(len(self.query), len(self.key)) < len(self.order) / 25:  # too close to have a label each
            parts = {"<b>attended</b>": self.attended, "other": self.rest}
        ends = np.cumsum([len(part) for part in parts.values()])
        named = zip(parts.values(), ends, parts, strict=True)
        middles = [(float(end) - len(part) / 2 - 0.5, text) for part, end, text in named if part]
        return ticks_at([at for at, _ in middles], [text for _, text in middles])

    def columns(self) -> dict[str, Any]:
        """Tick labels for narrow columns in the order of the rows: attended features only."""
        n = len(self.attended)
        if n <= 4 and len(self.order) <= 40:
            return ticks_at(range(n), [f"<b>{f}</b>" for f in self.attended], tickangle=0)
        return ticks_at([(n - 1) / 2], ["<b>attended</b>"], tickangle=0)
