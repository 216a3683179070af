"""Means over the prompts of each template, which intervals are made of: prompts of one are no independent sample."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.probe import Probe


def templates_of(probe: Probe, n: int) -> Int[Tensor, " n"]:
    """Number of the template of each of a step's n prompts, from 0; a prompt without one is its own."""
    known = probe.coords.get("prompt_template")
    if known is None or len(known[1]) != n:
        return torch.arange(n)
    numbers = torch.as_tensor(known[1], dtype=torch.long)
    own = numbers.amax().clamp_min(-1) + 1 + torch.arange(n)
    index: Tensor = torch.unique(torch.where(numbers < 0, own, numbers), return_inverse=True)[1]
    return index


def means_of_templates(values: Float[Tensor, "... n"], templates: Int[Tensor, " n"]) -> Float[Tensor, "... template"]:
    """Mean over the prompts of each template; a prompt without a value (NaN) does not count."""
    templates = templates.to(values.device)
    known = (~values.isnan()).to(values.dtype)
    shape = (*values.shape[:-1], int(templates.amax()) + 1)
    sums = values.new_zeros(shape).index_add(-1, templates, values.nan_to_num())
    return sums / values.new_zeros(shape).index_add(-1, templates, known)
