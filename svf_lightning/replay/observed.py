"""What one forward pass leaves behind of the attention layers, and how far rebuilt scores may be from its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import CheckpointError, bad_value

# How far rebuilt scores may be from the model's own: this much of the largest score of a head, and 8 rounding errors of
# the scores' type at least (0.008 in float16, 0.06 in bfloat16). Those of right models were measured to be off by 0.7
# to 1.7 rounding errors in these two, and by 2 to 5 in float32.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUNDINGS = 8.0

Rotation = list[tuple[Tensor, Tensor] | None]  # cos and sin [n, rotary] of each layer


@dataclass(frozen=True)
class Observed:
    """What one forward pass leaves behind: nothing of size [n, D].

    Args:
        query: Positions of the queries [batch].
        logits: Next-token logits at the queries [batch, vocabulary].
        x: Normalized residual at the query, with a 1 appended if the heads have biases; float32 at least
            [layer, batch, D'].
        keys: Key vectors before rotation, with their bias and after their norm; float32 at least
            [layer, batch, n, key_head, H].
        scores: The model's own scores of the query, after a soft cap, before the softmax [layer, head, batch, n].
        pattern: The model's attention weights of the query [layer, head, batch, n].
        rotation: cos and sin of the rotary embedding of each layer [n, rotary], None for layers that do not rotate; or
            None, if no layer does.
        is_key: Keys that the query sees [layer, batch, n].
        of_query: What the queries' tokens are multiplied with, by a norm of queries or by their position
            [layer, head, batch]; None where that is 1.
        of_key: The same of the keys [layer, batch, n, key_head].
        position: What positions add to the scores, beside the bilinear form (ALiBi) [layer, head, batch, n]; None for
            nothing.
    """

    query: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch vocabulary"]
    x: Float[Tensor, "layer batch D"]
    keys: Float[Tensor, "layer batch n key_head H"]
    scores: Float[Tensor, "layer head batch n"]
    pattern: Float[Tensor, "layer head batch n"]
    rotation: Rotation | None
    is_key: Bool[Tensor, "layer batch n"]
    of_query: Float[Tensor, "layer head batch"] | None = None
    of_key: Float[Tensor, "layer batch n key_head"] | None = None
    position: Float[Tensor, "layer head batch n"] | None = None

    def of_prompts(self, chosen: Int[Tensor, "m"]) -> Observed:
        """The same of some prompts."""
        of_dimension = {
            0: ("query", "logits"),
            1: ("x", "keys", "is_key", "of_key"),
            2: ("scores", "pattern", "of_query", "position"),
        }
        chosen_ones = {
            name: value.index_select(dim, chosen)
            for dim, names in of_dimension.items()
            for name in names
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **chosen_ones)


def tolerance(dtype: torch.dtype) -> float:
    """How far rebuilt scores of this type may be off, relative to the largest."""
    return max(_TOLERANCE.get(dtype, 0.0), _ROUNDINGS * torch.finfo(dtype).eps)


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The one of these types that rounds most: some models compute scores of half-precision vectors in float32."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def off(layer: int, head: int, by: float, dtype: torch.dtype) -> CheckpointError:
    """The error of scores that differ from the model's own by more than rounding; ``layer`` is the block's number."""
    return CheckpointError(
        f"the rebuilt scores of head {head} in layer {layer} are off by {by:.2g} of the largest, more than "
        f"the {tolerance(dtype):.2g} that rounding in {_name(dtype)} explains"
    )


def check_range(observed: Observed) -> None:
    """Check that what a forward pass has left is finite.

    Raises:
        CheckpointError: It is not: the numbers are beyond the range of their type.
    """
    seen = observed.scores.masked_fill(~observed.is_key[:, None], 0)
    parts = {"residuals": observed.x, "keys": observed.keys, "scores": seen}
    finite = torch.stack([torch.isfinite(values).flatten(1).all(1) for values in parts.values()], dim=1)  # [layer, 3]
    if not bool(finite.all()):
        layer, part = divmod(int(finite.flatten().int().argmin()), len(parts))  # what comes after it follows from it
        raise overflow(f"the {list(parts)[part]} of layer {layer}", observed.scores.dtype)
    if not bool(torch.isfinite(observed.logits).all()):
        raise overflow("the logits", observed.scores.dtype)


def overflow(what: str, dtype: torch.dtype) -> CheckpointError:
    """The error of numbers beyond the range of their type."""
    wider = {torch.float16: "; try --model.dtype=bfloat16 or float32"}.get(dtype, "")
    largest = torch.finfo(dtype).max
    return CheckpointError(f"{what} overflow: they are beyond the range of {_name(dtype)} ({largest:.3g}){wider}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked_keys(key: Tensor, query: Tensor) -> Tensor:
    """Positions of attended keys, on the device of the queries'.

    Raises:
        InputError: They are no positions at or before the queries.
    """
    key = key.to(query.device)
    check_positions("key", key, len(query), None)
    if bool((key > query).any()):
        raise bad_value("key", key.tolist(), f"0..query ({query.tolist()})", "attend to earlier tokens")
    return key


def check_positions(name: str, positions: Tensor, n_batch: int, last: int | None) -> None:
    """Check positions of queries or keys, one per prompt.

    Raises:
        InputError: There is another number of them, or one is out of range.
    """
    if positions.shape != (n_batch,):
        raise bad_value(f"{name}.shape", tuple(positions.shape), f"({n_batch},), one per prompt", "pass one each")
    if bool((positions < 0).any()) or (last is not None and bool((positions > last).any())):
        raise bad_value(
            name, positions.tolist(), f"positions 0..{'query' if last is None else last}", "count from the first token"
        )
