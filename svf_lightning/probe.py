"""The one thing that a module hands to a callback.

A module works with every callback of this package as soon as it has a method ``probe() -> Probe``. The toy model and
the replay of real checkpoints are two such modules; a user's own is a third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.heads import PARTS, AttentionHeads, HeadSVD

_T = TypeVar("_T")

_OBSERVED = ("features", "queries", "keys", "attended_queries", "attended_keys")  # the probe's own tensors

Scores = Literal["relative", "raw"]
VaryingThreshold = Literal["1/(n+1)", "min(1, 2.5/n)"]

Coordinate = tuple[tuple[str, ...], Sequence[object] | Tensor]
Side = Literal["query", "key"]


def check_scores(scores: str) -> None:
    """Raises InputError for a kind of scores that there is not."""
    if scores not in get_args(Scores):
        raise bad_value("scores", scores, "'relative' or 'raw'", "pass one of these")


@dataclass(frozen=True)
class AttendedScores:
    """Scores of attended keys in the singular basis of the heads (method, section 6), n query-key pairs per head.

    A score is taken relative to the other keys that the query sees: of the key ``s~ = s_j - mean of the other s_i``.

    Args:
        query: Coordinates ``r . u_k`` of the queries [..., n, R].
        key: ``u_k^T Omega s~``, which is ``sigma_k v_k . s~`` without rotary positions [..., n, R].
        direction: Coordinates ``v_k . s~`` of the keys without rotation [..., n, R].
        S: Singular values of each pair's basis [..., n or 1, R].
        attention: The model's attention weight on the key, in [0, 1] [..., n] (optional).
        error: Largest difference of the decomposed scores from the model's own, relative to the largest [...]
            (optional).
        logit_difference: Next-token logit of the right answer minus that of the wrong one [n] (optional).
        raw_key: As ``key``, of the key itself in place of ``s~`` [..., n, R] (optional).
        raw_direction: As ``direction``, of the key itself [..., n, R] (optional).
        bias: What biases add to the relative score beside the singular pairs, if they are no part of them [..., n]
            (optional).
        raw_bias: The same of the raw score [..., n] (optional).
        position: What positions add to the relative score beside the bilinear form (ALiBi) [..., n] (optional).
        raw_position: The same of the raw score [..., n] (optional).
    """

    query: Float[Tensor, "... n R"]
    key: Float[Tensor, "... n R"]
    direction: Float[Tensor, "... n R"]
    S: Float[Tensor, "... n1 R"]
    attention: Float[Tensor, "... n"] | None = None
    error: Float[Tensor, "..."] | None = None
    logit_difference: Float[Tensor, " n"] | None = None
    raw_key: Float[Tensor, "... n R"] | None = None
    raw_direction: Float[Tensor, "... n R"] | None = None
    bias: Float[Tensor, "... n"] | None = None
    raw_bias: Float[Tensor, "... n"] | None = None
    position: Float[Tensor, "... n"] | None = None
    raw_position: Float[Tensor, "... n"] | None = None

    def taken(self, scores: Scores) -> AttendedScores:
        """The same with ``key`` and ``direction`` of relative scores ("relative", as they are) or of raw ones ("raw").

        Raises:
            InputError: The module shows relative scores alone.
        """
        if scores == "relative":
            return self
        if self.raw_key is None or self.raw_direction is None:
            raise bad_value(
                "scores", scores, "'relative' for a module that shows no raw scores", "scores=relative, or a replay"
            )
        return replace(
            self,
            key=self.raw_key,
            direction=self.raw_direction,
            bias=self.raw_bias,
            position=self.raw_position,
        )

    def at_steps(self, chosen: Bool[Tensor, " K"]) -> AttendedScores:
        """Scores of some of the K steps that the first dimension counts."""
        chosen = chosen.to(self.query.device)
        return replace(self, **{n: getattr(self, n)[chosen] for n in ("query", "key", "direction", "S")})

    @property
    def contributions(self) -> Float[Tensor, "... n R"]:
        """Relative contributions ``c~_k``: their sum over k is the relative score."""
        return self.query * self.key


class AllKeys(NamedTuple):
    """Scores of all n keys of m queries, over singular pairs; positions count from 0."""

    contributions: Float[Tensor, "... m n R"]  # c_jk; 0 where the query does not see the key
    attention: Float[Tensor, "... m n"]  # weights, in [0, 1]
    is_key: Bool[Tensor, "... m n"]  # keys that the query sees
    query: Int[Tensor, " m"]  # its position; no key comes after it
    key: Int[Tensor, " m"]  # position of the attended key


class Outcome(NamedTuple):
    """What a model does at n query-key pairs (prompts)."""

    attention: Float[Tensor, "... n"]  # weight of each head on the key, in [0, 1]
    logit_difference: Float[Tensor, " n"]  # next-token logit of the right answer minus that of the wrong one
    divergence: Float[Tensor, " n"] | None = None  # KL of the next token's distribution from the untouched one [nats]


class Move(NamedTuple):
    """A change of what one head reads, along given directions of the residual stream.

    Of the head's query at the query's token (``side="query"``), or of its keys at every token that this query sees
    (``side="key"``). With W the directions and x what is read, ``W^T x`` becomes ``factor * W^T x``, or what it is in
    another prompt (``source``); the rest of x stays.
    """

    head: int  # its number among the flattened heads
    side: Side
    directions: Float[Tensor, "n D m"]  # orthonormal columns for each of n pairs; D counts the bias coordinate
    factor: float | Float[Tensor, " n"] = 0.0  # 0 takes them out, 2 doubles them
    source: str = ""  # one of Interventions.sources; empty for the prompt itself
    as_far_as: Float[Tensor, "n D k"] | None = None  # x moves as far as it would along these directions


class Interventions(Protocol):
    """A module that can be run again on n query-key pairs with other inputs of some heads."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of what every pair has a counterpart in, such as "abc": the same prompt with other names."""
        ...

    def singular_vectors(self, head: int, side: Side) -> Float[Tensor, "n D R"]:
        """Left (query) or right (key) singular vectors of a head, in the basis of each pair's offset."""
        ...

    def residual_draws(self, head: int, n_draws: int, generator: torch.Generator) -> Float[Tensor, "n D n_draws"]:
        """Directions drawn with the covariance of what the head reads; orthonormal columns for each pair."""
        ...

    def run_each(self, variants: Sequence[Sequence[Move]]) -> Sequence[Outcome]:
        """Run the module once for each of some lists of moves; with an empty one, as it is.

        Raises:
            InputError: An unknown source.
        """
        ...


@dataclass(frozen=True)
class FiringRule:
    """Which query-key pairs are firings of a head, beside that their score is positive.

    Args:
        tau: Least attention weight on the key, in (0, 1), or a rule for n keys that the query sees: "1/(n+1)" or
            "min(1, 2.5/n)", both of papers of the authors of arXiv 2602.13524 (which has which is not known here).
        first_token: Count the first token as a key; heads park on it the attention that they do not need.
        self_attention: Count queries that attend to themselves.
        every_query: Count queries at all positions; False: each prompt's own query alone, such as the last token.

    Raises:
        InputError: A threshold that there is not.
    """

    tau: float | VaryingThreshold = 0.5
    first_token: bool = False
    self_attention: bool = True
    every_query: bool = True

    def __post_init__(self) -> None:
        is_number = isinstance(self.tau, (int, float)) and 0 < self.tau < 1
        if not is_number and self.tau not in _THRESHOLDS:
            allowed = f"a weight in (0, 1), or one of {', '.join(map(repr, _THRESHOLDS))}"
            raise bad_value("tau", self.tau, allowed, "pass 0.5")

    def threshold(self, n_keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Least attention weight for queries that see so many keys; float64."""
        n = n_keys.double()
        return _THRESHOLDS[self.tau](n) if isinstance(self.tau, str) else torch.full_like(n, self.tau)


_THRESHOLDS: dict[VaryingThreshold, Callable[[Tensor], Tensor]] = {
    "1/(n+1)": lambda n: 1 / (n + 1),
    "min(1, 2.5/n)": lambda n: (2.5 / n).clamp_max(1),
}


class FiringBatch(NamedTuple):
    """Some of a module's firings, n of them, of any heads and prompts; positions count from 0."""

    head: Int[Tensor, " n"]  # index of the flattened heads
    prompt: Int[Tensor, " n"]  # of those that the probe shows
    query: Int[Tensor, " n"]
    key: Int[Tensor, " n"]
    scores: AttendedScores  # [n, R]; relative ones are NaN where the query sees one key alone


TakeReads = Callable[[int, Float[Tensor, "n D"]], None]  # index of the heads' first dimension (layer), and n tokens
ReadTokens = Callable[[TakeReads], None]
Intervene = Callable[[Float[Tensor, "... n"]], Outcome]
Decompose = Callable[[Int[Tensor, " m"]], AllKeys]
FindFirings = Callable[[FiringRule, Callable[[FiringBatch], None]], None]


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
        attended_queries: Queries of the query-key pairs whose attention is looked at [*feature_dims, n_attended, D]
            (optional).
        attended_keys: Their keys, each minus the mean of the other keys that its query sees, of the same shape.
        scores: The scores of such pairs in singular coordinates, where the module knows better than ``x^T Omega y``
            (biases, rotary positions); leading dimensions ``batch_dims``.
        intervene: Runs the module on these pairs again with an amount taken off each head's score of the key, before
            the softmax (optional).
        decompose: Takes the scores of all keys apart, for some of these pairs by their number; more than a probe
            carries, so callbacks ask for a few (optional).
        interventions: Runs the module on these pairs again with other inputs of some heads (optional).
        find_firings: Hands over every firing of all heads, some at a time, none of them twice; what is
            to be kept of them is up to the callback, as they may be many (optional).
        read_tokens: Hands over what the heads of each layer read, token by token, some at a time; the heads have the
            first dimension "layer" then, and D counts no bias coordinate (optional).
        part: (i, n) if this is the i-th of n probes that show different pairs at one step; None if it shows them all.
        batch_dims: Names of the leading dimensions.
        feature_dims: Those of them that features, queries and keys have, a beginning of ``batch_dims``; None for all.
        coords: Labels that hold for the whole run, by name: (dimensions, values); they travel with the trajectory.
        labels: Labels of this step, such as the revision and the hash of its weights; they travel with its row.
        is_last: True if no step follows in its run; [K] after :meth:`stack`. Some metrics measure every n-th step and
            the last one.

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
    attended_queries: Float[Tensor, "... n_attended D"] | None = None
    attended_keys: Float[Tensor, "... n_attended D"] | None = None
    scores: AttendedScores | None = None
    intervene: Intervene | None = None
    decompose: Decompose | None = None
    interventions: Interventions | None = None
    find_firings: FindFirings | None = None
    read_tokens: ReadTokens | None = None
    part: tuple[int, int] | None = None
    batch_dims: tuple[str, ...] = ("instance",)
    feature_dims: tuple[str, ...] | None = None
    coords: Mapping[str, Coordinate] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    is_last: bool | Bool[Tensor, " K"] = False

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

    def in_forms(self, features: Float[Tensor, "... D N"]) -> Float[Tensor, "... D1 N"]:
        """As :meth:`for_heads`, with 0 at the coordinates of biases that the heads' forms have (D -> D + 1)."""
        features = self.for_heads(features)
        if self.heads is None or not self.heads.has_bias:
            return features
        return torch.nn.functional.pad(features, (0, 0, 0, self.heads.n_constants))

    @property
    def is_on_cpu(self) -> bool:
        """True if no tensor lives on an accelerator."""
        return all(t.device.type == "cpu" for t in self._tensors())

    @property
    def nbytes(self) -> int:
        """Size of what :meth:`snapshot` copies [bytes]."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        heads = (getattr(self.heads, name) for name in PARTS) if self.heads else ()
        observed = (getattr(self, name) for name in _OBSERVED)
        return [t for t in (*heads, *observed) if t is not None]

    @cached_property
    def svd(self) -> HeadSVD:
        """Verified SVD of the heads, computed once for all callbacks that look at this probe.

        Raises:
            InputError: The probe shows no heads.
        """
        if self.heads is None:
            raise bad_value("heads", None, "heads to decompose", "check probe.heads first")
        return self.heads.svd()

    @property
    def attended_scores(self) -> AttendedScores | None:
        """Scores of the attended pairs in singular coordinates; None if the probe shows no pairs."""
        if self.scores is not None or self.heads is None or self.attended_queries is None or self.attended_keys is None:
            return self.scores
        svd = self.svd
        query, key = (self.for_heads(t) for t in (self.attended_queries, self.attended_keys))
        if self.heads.has_bias:  # coordinates of biases: 1 for a token, 0 for a difference of tokens
            query = torch.nn.functional.pad(query, (0, self.heads.n_constants), value=1.0)
            key = torch.nn.functional.pad(key, (0, self.heads.n_constants))
        direction = key @ svd.V
        S = svd.S[..., None, :]
        return AttendedScores(query @ svd.U, direction * S, direction, S)

    def snapshot(self) -> Probe:
        """A copy that later training steps do not change (detached, same device)."""
        return self._with(_detached_copy)

    def _with(self, change: Callable[[Tensor | None], Tensor | None]) -> Probe:
        """The same probe with its tensors changed alike; not checked again, as this is on the path of every step."""
        heads = self.heads
        if heads is not None:
            heads = _copy_with(heads, {name: change(getattr(heads, name)) for name in PARTS})
        tensors = {name: change(getattr(self, name)) for name in _OBSERVED}
        return _copy_with(self, {"heads": heads, **tensors})

    @staticmethod
    def stack(probes: Sequence[Probe]) -> Probe:
        """K probes of one module as one probe with a new leading dimension "step" and ``step`` of shape [K].

        A metric that is batched over leading dimensions measures K steps at the price of one call. Scores that a module
        made itself are left out: they come in parts, which metrics see one by one.
        """
        first = probes[0]
        heads = None
        if first.heads is not None:
            parts = [p.heads for p in probes if p.heads is not None]
            heads = replace(first.heads, **{name: _stack([getattr(h, name) for h in parts]) for name in PARTS})
        logits = first.pair_logits
        return replace(
            first,
            step=torch.tensor([int(p.step) for p in probes]),
            is_last=torch.tensor([bool(p.is_last) for p in probes]),
            heads=heads,
            pair_logits=None if logits is None else logits.expand(len(probes), *logits.shape),
            **{name: _stack([getattr(p, name) for p in probes]) for name in _OBSERVED},
            scores=None,
            intervene=None,
            decompose=None,
            interventions=None,
            find_firings=None,
            read_tokens=None,
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
    vars(other).pop("svd", None)  # belongs to the tensors that were replaced
    return other


def _detached_copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _stack(tensors: Sequence[Tensor | None]) -> Any:
    present = [t for t in tensors if t is not None]
    if len(present) == 1:  # not copied, as the heads of a real model are large
        return present[0][None]
    return torch.stack(present) if present else None
