"""What a figure is: numbers taken from a trajectory, and a drawing of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from svf_lightning.errors import DamagedError, InputError, bad_value
from svf_lightning.sentences import Sentence

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FIGURES: dict[str, Figure] = {}
"""All figures of a run, by name, in the order in which a page shows them."""


@dataclass(frozen=True)
class Figure:
    """One figure: ``figure(dataset, **options)`` draws it.

    Args:
        name: Its name, also in W&B (``figures/NAME``) and of its files.
        prepare: Dataset and options to a NamedTuple of arrays. Its annotations (jaxtyping's, such as
            ``Float[np.ndarray, "step instance"]``) name the dimensions. Raises InputError where the dataset lacks what
            the figure shows.
        draw: The NamedTuple and options to a plotly figure.
        description: What it shows, in a few words.
        paper: The figure of arXiv 2602.13524 that it mirrors.
        see: What is drawn and how to read it, in a sentence or two that are so whatever the run shows.
        says: What its data say, in sentences with their numbers.
        on_page: Whether it says something of a run that no other figure of its page says.
        compared: It is among those that stand side by side where runs are compared.
        view: Part of W&B's saved view that shows it; empty for none.
        logged: It goes to W&B.
    """

    name: str
    prepare: Callable[..., Any]
    draw: Callable[..., go.Figure]
    description: str
    paper: str
    see: str
    says: Callable[[Any], Sequence[Sentence | None]] = lambda data: ()
    on_page: Callable[[xr.Dataset], bool] = lambda dataset: True
    compared: bool = False
    view: Literal["toy", "replay", ""] = ""
    logged: bool = True

    def __call__(self, dataset: xr.Dataset, **options: Any) -> go.Figure:
        """Draw the figure.

        Args:
            dataset: What :func:`svf_lightning.trajectory.open_trajectory` returns.
            options: Keyword arguments of ``prepare`` and ``draw``.

        Raises:
            InputError: The dataset lacks what the figure shows, or there is no such option.
        """
        of_draw = {name: options.pop(name) for name in list(options) if name in _options(self.draw)}
        return self.draw(self.data(dataset, **options), **of_draw)

    def data(self, dataset: xr.Dataset, **options: Any) -> Any:
        """The numbers that the figure shows: a NamedTuple of arrays.

        Raises:
            InputError: The dataset lacks them, or there is no such option.
        """
        for name in options:
            if name not in _options(self.prepare):
                known = ", ".join(_options(self.prepare) + _options(self.draw)) or "none"
                raise bad_value("option", name, f"an option of {self.name}: {known}", "leave it out")
        return self.prepare(dataset, **options)

    def sentences(self, dataset: xr.Dataset) -> list[Sentence]:
        """What the run says in this figure.

        Raises:
            InputError: The dataset lacks what the figure shows.
        """
        return [sentence for sentence in self.says(self.prepare(dataset)) if sentence is not None]

    @property
    def heading(self) -> str:
        """Title of its part of a page."""
        return f"{self.description} ({self.paper})" if self.paper else self.description

    def takes(self, option: str) -> bool:
        """True if it has this option."""
        return option in _options(self.prepare) + _options(self.draw)

    def table(self, dataset: xr.Dataset, **options: Any) -> pd.DataFrame:
        """The numbers as a table; see :func:`as_table`."""
        return as_table(self.data(dataset, **options))


def figure(name: str, prepare: Callable[..., Any], draw: Callable[..., go.Figure], **about: Any) -> Figure:
    """Add a figure to :data:`FIGURES`; see :class:`Figure` for the arguments."""
    FIGURES[name] = made = Figure(name, prepare, draw, **about)
    return made


def draw_all(dataset: xr.Dataset, *, among: Callable[[Figure], bool] = lambda figure: True) -> dict[str, go.Figure]:
    """All figures that a run has the data for and that say something of it, by name, steps on a logarithmic axis.

    Args:
        dataset: A trajectory.
        among: Which figures are wanted.
    """
    drawn = {}
    for name, figure in FIGURES.items():
        if among(figure) and figure.on_page(dataset):
            log = {"x_axis": "log"} if figure.takes("x_axis") else {}
            try:
                drawn[name] = figure(dataset, **log)
            except DamagedError:
                raise
            except InputError:  # the run lacks what it shows
                continue
    return drawn


def _options(function: Callable[..., Any]) -> list[str]:
    """Names of a function's keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


class Column(NamedTuple):
    """An array of a figure's data, with the names of its dimensions."""

    name: str
    dims: tuple[str, ...]
    values: np.ndarray


def columns_of(data: Any) -> list[Column]:
    """The arrays in a NamedTuple whose annotations name the dimensions; fields that are no arrays are left out."""
    hints = get_type_hints(type(data), include_extras=True)
    columns = []
    for name, value in data._asdict().items():
        if isinstance(value, np.ndarray):
            dims = tuple(hints[name].dim_str.split())
            columns.append(Column(name, dims, value))
    return columns


def as_table(data: Any) -> pd.DataFrame:
    """The arrays of a figure in long form: a row for each number.

    An array with one dimension, named after it, labels the places along it (``step``, ``offset``); places without
    labels are counted from 0.

    Args:
        data: A NamedTuple of arrays, as ``Figure.data`` returns it.

    Returns:
        Columns: "quantity", one for each dimension (empty where the quantity does not have it), "value".
    """
    import pandas as pd

    columns = columns_of(data)
    labels = {column.name: column.values for column in columns if column.dims == (column.name,)}
    frames = []
    for column in columns:
        if column.name in labels:
            continue
        places = np.indices(column.values.shape).reshape(len(column.dims), -1)
        at = {dim: labels[dim][i] if dim in labels else i for dim, i in zip(column.dims, places, strict=True)}
        frames.append(pd.DataFrame({"quantity": column.name, **at, "value": column.values.ravel()}))
    whole = pd.concat(frames, ignore_index=True)
    dims = [name for name in whole.columns if name not in ("quantity", "value")]
    return whole[["quantity", *dims, "value"]]
