"""The one thing that a module hands to a callback.

A module works with every callback of this package as soon as it has a method ``probe() -> Probe``. The toy model and
the replay of real checkpoints are two such modules; a user's own is a third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.heads import AttentionHeads, HeadSVD

_T = TypeVar("_T")

Coordinate = tuple[tuple[str, ...], Sequence[object] | Tensor]


@dataclass(frozen=True)
class Probe:
    """A module's heads and features at one training step.

    Heads and logits have the leading dimensions named by ``batch_dims``, for example ("instance",), ("instance",
    "head") or ("layer", "head"); features, queries and keys the first few of them, as named by ``feature_dims``.

    Args:
        step: Training step (optimizer updates done) that the weights stand for; [K] after :meth:`stack`.
        heads: Attention heads with W_Q, W_K [..., H, D], or None if there are none to look at.
        features: Feature directions as columns W [*feature_dims, D, N], or None if they are not known.
        pairs: Attended pairs (query feature, key feature), int64 [P, 2]; P may be 0.
        pair_logits: Target logit T_ij of each pair [..., P].
        queries: Observed queries [*feature_dims, n, D] (optional).
        keys: Observed keys [*feature_dims, n, m, D] (optional).
        batch_dims: Names of the leading dimensions.
        feature_dims: Those of them that features, queries and keys have, a beginning of ``batch_dims``; None for all.
        coords: Labels that hold for the whole run, by name: (dimensions, values); they travel with the trajectory.

    Raises:
        InputError: Leading dimensions that do not agree.
    """

    step: int | Int[Tensor, " K"]
    heads: AttentionHeads | None = None
    features: Float[Tensor, "... D N"] | None = None
    pairs: Int[Tensor, "P 2"] = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))
    pair_logits: Float[Tensor, "... P"] | None = None
    queries: Float[Tensor, "... n D"] | None = None
    keys: Float[Tensor, "... n m D"] | None = None
    batch_dims: tuple[str, ...] = ("instance",)
    feature_dims: tuple[str, ...] | None = None
    coords: Mapping[str, Coordinate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.batch_dims)
        if self.feature_dims is None:
            object.__setattr__(self, "feature_dims", self.batch_dims)
        n_features = len(self.feature_dims or ())
        if self.feature_dims != self.batch_dims[:n_features]:
            raise bad_value("feature_dims", self.feature_dims, f"a beginning of {self.batch_dims}", "reorder")
        shapes = {
            name: (tuple(tensor.shape[:n]) if name != "features" else tuple(tensor.shape[:n_features]))
            for name, tensor in (
                ("heads.W_Q", self.heads.W_Q if self.heads else None),
                ("features", self.features),
                ("pair_logits", self.pair_logits),
            )
            if tensor is not None
        }
        longest = max(shapes.values(), key=len, default=())
        if any(shape != longest[: len(shape)] for shape in shapes.values()):
            raise bad_value(
                "Probe", shapes, f"one shape for the dimensions {self.batch_dims}", "expand the smaller one"
            )

    def for_heads(self, features: Float[Tensor, "... D N"]) -> Float[Tensor, "... D N"]:
        """Features with a dimension of size 1 for each leading dimension that only the heads have."""
        missing = len(self.batch_dims) - len(self.feature_dims or ())
        return features.reshape(*features.shape[:-2], *(1,) * missing, *features.shape[-2:])

    @property
    def is_on_cpu(self) -> bool:
        """True if no tensor lives on an accelerator."""
        return all(t.device.type == "cpu" for t in self._tensors())

    @property
    def nbytes(self) -> int:
        """Size of what :meth:`snapshot` copies [bytes]."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        heads = (self.heads.W_Q, self.heads.W_K, self.heads.b_Q, self.heads.b_K) if self.heads else ()
        return [t for t in (*heads, self.features, self.queries, self.keys) if t is not None]

    @cached_property
    def svd(self) -> HeadSVD:
        """Verified SVD of the heads, computed once for all callbacks that look at this probe.

        Raises:
            InputError: The probe shows no heads.
        """
        if self.heads is None:
            raise bad_value("heads", None, "heads to decompose", "check probe.heads first")
        return self.heads.svd()

    def snapshot(self) -> Probe:
        """A copy that later training steps do not change (detached, same device)."""
        return self._with(_detached_copy)

    def _with(self, change: Callable[[Tensor | None], Tensor | None]) -> Probe:
        """The same probe with its tensors changed alike; not checked again, as this is on the path of every step."""
        heads = self.heads
        if heads is not None:
            heads = _copy_with(heads, {name: change(getattr(heads, name)) for name in ("W_Q", "W_K", "b_Q", "b_K")})
        tensors = {name: change(getattr(self, name)) for name in ("features", "queries", "keys")}
        return _copy_with(self, {"heads": heads, **tensors})

    @staticmethod
    def stack(probes: Sequence[Probe]) -> Probe:
        """K probes of one module as one probe with a new leading dimension "step" and ``step`` of shape [K].

        A metric that is batched over leading dimensions measures K steps at the price of one call.
        """
        first = probes[0]
        heads = None
        if first.heads is not None:
            parts = [p.heads for p in probes if p.heads is not None]
            heads = replace(
                first.heads,
                W_Q=torch.stack([h.W_Q for h in parts]),
                W_K=torch.stack([h.W_K for h in parts]),
                b_Q=_stack([h.b_Q for h in parts]),
                b_K=_stack([h.b_K for h in parts]),
            )
        logits = first.pair_logits
        return replace(
            first,
            step=torch.tensor([int(p.step) for p in probes]),
            heads=heads,
            features=_stack([p.features for p in probes]),
            pair_logits=None if logits is None else logits.expand(len(probes), *logits.shape),
            queries=_stack([p.queries for p in probes]),
            keys=_stack([p.keys for p in probes]),
            batch_dims=("step", *first.batch_dims),
            feature_dims=("step", *(first.feature_dims or ())),
        )


@runtime_checkable
class Probed(Protocol):
    """A module that callbacks can look into."""

    def probe(self) -> Probe:
        """The module's heads and features as they are now."""
        ...


def _copy_with(instance: _T, fields: Mapping[str, object]) -> _T:
    other = object.__new__(type(instance))
    vars(other).update(vars(instance), **fields)
    vars(other).pop("svd", None)  # of the tensors that were replaced
    return other


def _detached_copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.stack(present) if present else None
