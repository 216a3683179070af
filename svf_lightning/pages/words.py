"""The head picker of a replay's page: attention of a head over the words of a prompt, and the singular pairs in it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from svf_lightning.figures.sparsity import when
from svf_lightning.pages.page import Widget, largest, packed

if TYPE_CHECKING:
    import xarray as xr

MAX_BYTES = 1_200_000  # of all numbers
_ARRAYS = ("words/attention", "words/relative", "words/top", "words/top_index")


def head_picker(dataset: xr.Dataset) -> Widget | None:
    """The widget of a replay's page; None if the run kept the words of no prompt."""
    data = word_frames(dataset)
    return None if data is None else Widget("words", data)


def word_frames(dataset: xr.Dataset) -> dict[str, Any] | None:
    """What the head picker shows, as JSON values; None if the run kept the words of no prompt.

    Numbers are 16-bit integers (base64) in units of their checkpoint's ``scale``; -32768 is no number. Where all
    checkpoints would be too much for a page, some are left out, evenly, and never the first or the last.

    Args:
        dataset: A trajectory with what the AttentionOverWords callback stores.

    Returns:
        ``prompts``: text, words (of each token up to the query), whether a word goes on without a space, query and key
        position. ``groups``: heads (index of the flattened ones) by the title of their group. ``checkpoints``: for
        each, its name and the arrays attention and relative [L, H, P, W], contributions [L, H, P, W, T] (nats), index
        [L, H, P, T] of the singular pairs, from 0. And sizes.
    """
    needed = (*_ARRAYS, "words/prompt", "prompt_text", "token_span", "query_position", "key_position")
    if any(name not in dataset for name in needed):
        return None
    numbers = dataset["words/prompt"].isel(step=-1).values
    prompts = [_prompt(dataset, int(number)) for number in numbers]
    n_words = max(len(prompt["words"]) for prompt in prompts)
    n_steps, n_top = dataset.sizes["step"], dataset.sizes["top"]
    n_heads = dataset.sizes["layer"] * dataset.sizes["head"]
    bytes_each = 2 * n_heads * len(prompts) * (n_words * (2 + n_top) + n_top)
    n_shown = max(1, min(n_steps, MAX_BYTES // bytes_each))
    rows = np.unique(np.linspace(n_steps - 1, 0, n_shown).round().astype(int))
    task = dataset["task/layer_head"].isel(step=-1).values.tolist() if "task/layer_head" in dataset else []
    groups = {"heads of the task": task} if task else {}
    return {
        "layers": dataset.sizes["layer"],
        "heads": dataset.sizes["head"],
        "words": n_words,
        "top": n_top,
        "groups": {**groups, "all heads": list(range(n_heads))},
        "prompts": prompts,
        "checkpoints": [_checkpoint(dataset, int(row), n_words) for row in rows],
    }


def _prompt(dataset: xr.Dataset, number: int) -> dict[str, Any]:
    """The words of one prompt up to its query."""
    text = str(dataset["prompt_text"].values[number])
    query, key = (int(dataset[f"{name}_position"].values[number]) for name in ("query", "key"))
    spans = dataset["token_span"].values[number, : query + 1]
    ends = [0, *spans[:-1, 1]]
    return {
        "text": text,
        "words": [text[start:end] or ("[start]" if i == 0 else "[space]") for i, (start, end) in enumerate(spans)],
        "joined": [bool(start == end and start > 0) for (start, _), end in zip(spans, ends, strict=True)],
        "query": query,
        "key": key,
    }


def _checkpoint(dataset: xr.Dataset, row: int, n_words: int) -> dict[str, Any]:
    checkpoint = dataset.isel(step=row, word=slice(n_words))
    arrays = {name: checkpoint[name].transpose("layer", "head", "shown", ...).values for name in _ARRAYS}
    attention, relative, top, index = arrays.values()
    scale = max(largest(relative), largest(top))
    return {
        "name": when(dataset, row),
        "scale": scale / np.iinfo(np.int16).max,
        "attention": packed(attention, 1.0, np.int16),
        "relative": packed(relative, scale, np.int16),
        "contributions": packed(top, scale, np.int16),
        "index": base64.b64encode(index.astype("<i2").tobytes()).decode(),
    }
