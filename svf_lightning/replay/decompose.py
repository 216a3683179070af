"""Sparse attention decomposition of real models, in head space (arXiv 2410.00340; method, sections 5 and 6).

The score of a query at position p for a key at position j is a bilinear form of their normalized residuals,
``x_p^T W_Q^T M_p^T M_j W_K x_j / sqrt(H)``, with a 1 appended to x for the biases and M_p the rotation of position p
(the identity without RoPE). With thin QR factors ``W_Q^T = Q_q A_q`` and ``W_K^T = Q_k A_k`` its SVD is that of the
H x H core ``A_q M_p^T M_j A_k^T / sqrt(H)``, which depends on the offset j - p alone. QR is done once per head, the SVD
once per head and offset, and no tensor of size D is needed but the query's own residual.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import CheckpointError, InputError, bad_value
from svf_lightning.heads import AttentionHeads, HeadSVD, bridge_attentions, verified_qr, verified_svd
from svf_lightning.probe import AttendedScores, Side
from svf_lightning.rotary import Layout, rotate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]

_KEPT_OFFSETS = 8  # SVDs of cores kept at a time; few suffice, as prompts are sorted by offset
_ORTHONORMAL = 1e-9  # largest deviation of Q from orthonormal, in float64; Q is used in float32
# How far rebuilt scores may be from the model's own: this much of the largest score of a head, and 8 rounding errors of
# the scores' type at least (0.008 in float16, 0.06 in bfloat16). Those of right models were measured to be off by 0.7
# to 1.7 rounding errors in these two, and by 2 to 5 in float32.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUNDINGS = 8.0
_NOT_BILINEAR = 1e-2  # from here on, a difference does not come from rounding: the scores have another form


class Decomposition(NamedTuple):
    """Scores of one query per prompt, as sums over singular pairs."""

    contributions: Float[Tensor, "layer head batch n R"]  # c_jk, 0 at positions that are no keys of the query
    scores: Float[Tensor, "layer head batch n"]  # their sums: before the softmax and before a soft cap


def decompose_attention(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "batch n"],
    query: Int[Tensor, "batch"],
    key: Int[Tensor, "batch"],
) -> Decomposition:
    """Every head's attention scores at one query per prompt, decomposed over the head's singular pairs.

    With RoPE the basis is that of the offset from ``query`` to ``key``; scores of all other keys are decomposed in this
    basis too, exactly. For many batches of one model, use :class:`HeadSpace`, which keeps the factorizations.

    Args:
        bridge: Model in either processing mode, raw or folded (``enable_compatibility_mode()``).
        tokens: Token ids; shorter prompts are padded on the right, with anything.
        query: Positions of the queries, 0..n-1.
        key: Positions of the attended keys, 0..query.

    Returns:
        Contributions [layer, head, batch, n, R] and scores [layer, head, batch, n], float32.

    Raises:
        InputError: Positions out of range, or a model whose scores are not this bilinear form (QK-norm, ALiBi, ...):
            every result is compared with the scores that the model itself computed, in every dtype.
        CheckpointError: Numbers beyond the range of the weights' dtype, or scores that differ by more than rounding.
    """
    space = HeadSpace(bridge)
    return space.decompose(space.observe(tokens, query), key)


@dataclass(frozen=True)
class Observed:
    """What one forward pass leaves behind: nothing of size [n, D].

    Args:
        query: Positions of the queries [batch].
        logits: Next-token logits at the queries [batch, vocabulary].
        x: Normalized residual at the query, with a 1 appended if the heads have biases; float32 at least
            [layer, batch, D'].
        keys: Key vectors before rotation, with their bias; float32 at least [layer, batch, n, key_head, H].
        scores: The model's own scores of the query, after a soft cap, before the softmax [layer, head, batch, n].
        pattern: The model's attention weights of the query [layer, head, batch, n].
        rotation: cos and sin of the rotary embedding [layer, n, rotary], or None.
        is_key: Keys that the query sees [layer, batch, n].
    """

    query: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch vocabulary"]
    x: Float[Tensor, "layer batch D"]
    keys: Float[Tensor, "layer batch n key_head H"]
    scores: Float[Tensor, "layer head batch n"]
    pattern: Float[Tensor, "layer head batch n"]
    rotation: tuple[Tensor, Tensor] | None
    is_key: Bool[Tensor, "layer batch n"]

    def of_prompts(self, chosen: Int[Tensor, "m"]) -> Observed:
        """The same of some prompts."""
        by_prompt = {name: getattr(self, name)[chosen] for name in ("query", "logits")}
        by_layer = {name: getattr(self, name)[:, chosen] for name in ("x", "keys", "is_key")}
        by_head = {name: getattr(self, name)[:, :, chosen] for name in ("scores", "pattern")}
        return replace(self, **by_prompt, **by_layer, **by_head)


class HeadSpace:
    """All heads of a model in head space: QR factors, and the SVDs of their cores at the offsets last asked for.

    Args:
        bridge: A ``TransformerBridge``; the factors are those of its weights and processing at this moment.

    Raises:
        InputError: The model's scores are no bilinear form of the residual stream.
        CheckpointError: Weights beyond the range of their dtype.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        attentions = bridge_attentions(bridge)
        self.heads = heads = _at_least_float32(AttentionHeads.from_bridge(bridge))
        self.n_layers, self.n_heads, self.d_head = heads.W_Q.shape[:3]
        self.rank = min(self.d_head, heads.W_Q.shape[-1] + heads.has_bias)
        self._repeats = self.n_heads // bridge.W_K.shape[1]
        self._is_rotary = getattr(bridge.cfg, "positional_embedding_type", None) == "rotary"
        self._layout = _layout(bridge.cfg)
        self._caps = [getattr(a.original_component, "attn_logit_softcapping", None) for a in attentions]
        self._windows = _windows(bridge)
        Q, A = [], []
        W_Q, W_K = heads.factors()
        for W in (W_Q, W_K):
            if not bool(torch.isfinite(W).all()):  # finite before normalization was folded in
                raise _overflow("weights of the heads", bridge.cfg.dtype)
        shared = W_K[:, :: self._repeats]  # QR once for all query heads that share the keys
        for W in (W_Q, shared):
            # one layer at a time: float64 copies of all heads would be as large as a small model
            factors = [verified_qr(layer.mT.double(), tolerance=_ORTHONORMAL) for layer in W]
            Q.append([q.to(W) for q, _ in factors])
            A.append(torch.stack([a for _, a in factors]))
        self._Q_q = torch.stack(Q[0])  # [layer, head, D', H]
        self._A_q, self._A_k = A  # [layer, head, H, H] and [layer, key_head, H, H], float64
        self._to_key = torch.linalg.pinv(self._A_k.mT)  # coordinates of a key in Q_k, from its key vector
        self._bases: OrderedDict[int, HeadSVD] = OrderedDict()

    # ---- forward pass ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "batch n"], query: Int[Tensor, "batch"]) -> Observed:
        """Run the model, and keep what the decomposition needs.

        Raises:
            InputError: Positions out of range.
            CheckpointError: Numbers beyond the range of the weights' dtype.
        """
        tokens, query = tokens.to(self.heads.W_Q.device), query.to(self.heads.W_Q.device)
        _check_positions("query", query, len(tokens), tokens.shape[1] - 1)
        batch = torch.arange(len(tokens), device=tokens.device)
        kept: dict[str, dict[int, Tensor]] = {name: {} for name in ("x", "keys", "scores", "pattern", "cos", "sin")}

        def keep(name: str, layer: int, pick: Any = lambda t: t) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                kept[name][layer] = pick(tensor).clone()

            return hook

        hooks: Hooks = []
        for layer in range(self.n_layers):
            attention = f"blocks.{layer}.attn"
            hooks += [
                (f"{attention}.hook_in", keep("x", layer, lambda x: x[batch, query])),
                (f"{attention}.hook_k", keep("keys", layer)),
                (f"{attention}.hook_attn_scores", keep("scores", layer, lambda s: s[batch, :, query])),
                (f"{attention}.hook_pattern", keep("pattern", layer, lambda p: p[batch, :, query])),
            ]
            if self._is_rotary:
                hooks += [(f"{attention}.hook_{part}", keep(part, layer, lambda t: t[0])) for part in ("cos", "sin")]
        absent = sorted({str(name).rsplit(".", 1)[-1] for name, _ in hooks if name not in self.bridge.hook_dict})
        if absent:
            raise self._not_shown(absent)
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        silent = [name for name in ("x", "keys", "scores", "pattern") if len(kept[name]) < self.n_layers]
        if silent:
            raise self._not_shown(silent)
        x, keys, scores, pattern = (
            torch.stack([kept[name][layer] for layer in range(self.n_layers)])
            for name in ("x", "keys", "scores", "pattern")
        )
        # sums over half precision would add errors of their own; the model's scores stay what they are
        x, keys = x.to(self.heads.W_Q.dtype), keys.to(self.heads.W_Q.dtype)
        if self.heads.has_bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        observed = Observed(
            query,
            logits[batch, query],
            x,
            keys,
            scores.transpose(1, 2),
            pattern.transpose(1, 2),
            self._rotation(kept["cos"], kept["sin"]),
            self._visible(query, tokens.shape[1]),
        )
        _check_range(observed)
        return observed

    def _rotation(self, cos: dict[int, Tensor], sin: dict[int, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Rotations of all layers; those without positions (NoPE) do not rotate."""
        if not cos:
            return None
        straight = torch.ones_like(next(iter(cos.values())))
        layers = range(self.n_layers)
        return (
            torch.stack([cos.get(layer, straight) for layer in layers]),
            torch.stack([sin.get(layer, 0 * straight) for layer in layers]),
        )

    def _not_shown(self, what: list[str]) -> InputError:
        architecture = type(self.bridge.original_model).__name__
        return InputError(
            f"TransformerLens does not show how a {architecture} comes to its scores (no {', '.join(what)}). Allowed: "
            "architectures whose attention it takes apart, such as GPT-2, GPT-NeoX, Llama, Qwen2. Fix: use another "
            "model."
        )

    def _visible(self, query: Tensor, n: int) -> Tensor:
        """Keys that the query sees in each layer, from positions: what masked scores look like differs by mode."""
        position = torch.arange(n, device=query.device)
        distance = query[:, None] - position
        seen = [(distance >= 0) & (distance < (n if window is None else window)) for window in self._windows]
        return torch.stack(seen)

    def weights(self, layer: int, head: int, side: Side) -> Float[Tensor, "H D"]:
        """What makes a head's queries or keys of what it reads; the bias is a last column, if heads have biases."""
        W, b = (self.heads.W_Q, self.heads.b_Q) if side == "query" else (self.heads.W_K, self.heads.b_K)
        if not self.heads.has_bias:
            return W[layer, head]
        column = W.new_zeros(self.d_head) if b is None else b[layer, head]
        return torch.cat([W[layer, head], column[:, None]], dim=-1)

    def outside(self, layer: int, head: int, side: Side, inside: Float[Tensor, "H R"]) -> Float[Tensor, "D R"]:
        """Vectors of the residual stream from their coordinates in the head's orthonormal basis (Q_q or Q_k)."""
        if side == "query":
            return self._Q_q[layer, head] @ inside.to(self._Q_q)
        rows = self._to_key[layer, head // self._repeats].mT @ inside.double()
        vectors: Tensor = self.weights(layer, head, side).mT @ rows.to(self._Q_q)
        return vectors

    # ---- decomposition ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decompose(self, observed: Observed, key: Int[Tensor, "batch"]) -> Decomposition:
        """Contributions of all keys; see :func:`decompose_attention`."""
        key = _checked_keys(key, observed.query)
        rotated = self._rotated(observed)
        a = self._queries(observed)
        self._check_scores(observed, a, rotated)
        z = self._seen_from_query(observed, rotated)
        contributions = z.new_empty(*z.shape)
        for group, basis in self._groups(observed, key):
            U = basis.U.double()
            left = a[:, :, group] @ U
            contributions[:, :, group] = left[..., None, :] * (z[:, :, group] @ U[:, :, None])
        hidden = ~observed.is_key[:, None]
        contributions = contributions.masked_fill_(hidden[..., None], 0)
        return Decomposition(contributions.float(), contributions.sum(-1).float())

    @torch.inference_mode()
    def attended(self, observed: Observed, key: Int[Tensor, "batch"]) -> AttendedScores:
        """Scores of the attended keys relative to the other keys, in singular coordinates [layer, head, batch, R].

        NaN where there is nothing to compare: a query that sees one key only, or a layer in which a sliding window
        hides the attended key.

        Raises:
            InputError: As :func:`decompose_attention`.
            CheckpointError: As there.
        """
        key = _checked_keys(key, observed.query)
        rotated = self._rotated(observed)
        a = self._queries(observed)
        error = self._check_scores(observed, a, rotated)
        z = self._seen_from_query(observed, _relative(rotated, observed.is_key, key))[:, :, :, 0]
        unrotated = _relative(observed.keys, observed.is_key, key)[:, :, 0].double()
        coordinates = torch.einsum("lkij,lbkj->lkbi", self._to_key, unrotated).repeat_interleave(self._repeats, dim=1)
        shape = (self.n_layers, self.n_heads, len(key), self.rank)
        coordinates_of = {
            name: observed.x.new_empty(shape, dtype=torch.float32) for name in ("query", "key", "direction", "S")
        }
        for group, basis in self._groups(observed, key):
            U, S, V = (part.double() for part in basis)
            coordinates_of["query"][:, :, group] = (a[:, :, group] @ U).float()
            coordinates_of["key"][:, :, group] = (z[:, :, group] @ U).float()
            coordinates_of["direction"][:, :, group] = (coordinates[:, :, group] @ V).float()
            coordinates_of["S"][:, :, group] = S[:, :, None].float()
        batch = torch.arange(len(key), device=key.device)
        return AttendedScores(**coordinates_of, attention=observed.pattern[:, :, batch, key].float(), error=error)

    def svd(self, observed: Observed, query: int, key: int) -> HeadSVD:
        """Core SVD [layer, head, H, R] of the offset from a query position to a key position."""
        offset = 0 if observed.rotation is None else key - query
        if offset in self._bases:
            self._bases.move_to_end(offset)
            return self._bases[offset]
        A_k = self._A_k.repeat_interleave(self._repeats, dim=1)
        if observed.rotation is None:
            core = self._A_q @ A_k.mT
        else:
            eye = torch.eye(self.d_head, dtype=torch.float64, device=A_k.device).expand(self.n_layers, -1, -1)
            cos, sin = (part.double()[:, :, None] for part in observed.rotation)
            # rotate turns rows, so M is transposed
            turn = [rotate(eye, cos[:, at], sin[:, at], layout=self._layout) for at in (query, key)]
            core = self._A_q @ (turn[0] @ turn[1].mT)[:, None] @ A_k.mT
        U, S, V = verified_svd(core * self.heads.scale)
        # float32 is enough for orthonormal columns; the sums over them stay exact to 1e-7
        basis = HeadSVD(U.float(), S.float(), V.float())
        self._bases[offset] = basis
        if len(self._bases) > _KEPT_OFFSETS:
            self._bases.popitem(last=False)
        return basis

    def _groups(self, observed: Observed, key: Tensor) -> list[tuple[Tensor, HeadSVD]]:
        """Prompts with the same offset, each group with its basis."""
        offsets = key - observed.query if observed.rotation is not None else torch.zeros_like(key)
        groups = []
        for offset in sorted(set(offsets.tolist())):
            members = (offsets == offset).nonzero().squeeze(-1)
            first = int(members[0])
            groups.append((members, self.svd(observed, int(observed.query[first]), int(key[first]))))
        return groups

    def _rotated(self, observed: Observed) -> Tensor:
        """Key vectors as the scores see them [layer, batch, n, key_head, H]."""
        if observed.rotation is None:
            return observed.keys
        cos, sin = (part[:, None, :, None] for part in observed.rotation)
        return rotate(observed.keys, cos, sin, layout=self._layout)

    def _queries(self, observed: Observed) -> Tensor:
        """Queries in the orthonormal basis Q_q, in which a score is an inner product [layer, head, batch, H]."""
        return torch.einsum("lbd,lhdi->lhbi", observed.x, self._Q_q).double()

    def _seen_from_query(self, observed: Observed, rotated: Tensor) -> Tensor:
        """Keys in the basis Q_q of each query head [layer, head, batch, n, H], float64."""
        rotated = rotated.double()
        if observed.rotation is not None:
            # relative to the query, a key is rotated back by the query's position
            cos, sin = (part[:, observed.query, None, None].double() for part in observed.rotation)
            rotated = rotate(rotated, cos, sin, layout=self._layout, transpose=True)
        rotated = rotated.repeat_interleave(self._repeats, dim=3)
        return torch.einsum("lhij,lbnhj->lhbni", self._A_q * self.heads.scale, rotated)

    def _check_scores(self, observed: Observed, a: Tensor, rotated: Tensor) -> Tensor:
        """Compare all scores, computed from the same factors as the decomposition, with those of the model.

        Returns:
            Largest difference, relative to the largest score [layer, head].

        Raises:
            InputError: They differ, so much that it is no rounding.
            CheckpointError: They differ by more than rounding explains.
        """
        towards = torch.einsum("lhbi,lhij->lbhj", a, self._A_q * self.heads.scale)
        if observed.rotation is not None:
            cos, sin = (part[:, observed.query, None].double() for part in observed.rotation)
            towards = rotate(towards, cos, sin, layout=self._layout)
        n_layers, n_batch = towards.shape[:2]
        grouped = towards.reshape(n_layers, n_batch, -1, self._repeats, self.d_head).to(rotated.dtype)
        scores = (grouped @ rotated.permute(0, 1, 3, 4, 2)).flatten(2, 3).transpose(1, 2)
        for layer, cap in enumerate(self._caps):
            if cap is not None:
                scores[layer] = cap * (scores[layer] / cap).tanh()
        hidden = ~observed.is_key[:, None]
        difference = (scores - observed.scores).masked_fill(hidden, 0).abs().amax((-2, -1))
        size = scores.masked_fill(hidden, 0).abs().amax((-2, -1))
        error = difference / size.clamp_min(torch.finfo(torch.float32).tiny)
        # where all products cancel, rounding is that of a score of unrelated vectors of this length, |q| |k| / sqrt(H)
        longest = rotated.norm(dim=-1).masked_fill(~observed.is_key[..., None], 0).amax(2)
        usual = (grouped.norm(dim=-1) * longest[..., None]).flatten(2).amax(1) / self.d_head**0.5
        dtype = observed.scores.dtype
        share = max(_TOLERANCE.get(dtype, 0.0), _ROUNDINGS * torch.finfo(dtype).eps)
        beyond = difference > share * torch.maximum(size, usual)
        if bool(beyond.any()):
            worst = torch.where(beyond, error, 0.0)
            layer, head = divmod(int(worst.argmax()), self.n_heads)
            off = float(worst.max())
            if off > _NOT_BILINEAR:
                raise InputError(
                    f"the scores of head {head} in layer {layer} are not the bilinear form of its weights (off by "
                    f"{off:.2g} of the largest). Allowed: dot products with biases, rotary positions, "
                    "grouped queries and soft caps. Fix: use another model."
                )
            raise CheckpointError(
                f"the rebuilt scores of head {head} in layer {layer} are off by {off:.2g} of the largest, more than "
                f"the {share:.2g} that rounding in {_name(dtype)} explains"
            )
        relative: Tensor = error.float()
        return relative


def _check_range(observed: Observed) -> None:
    """Check that what a forward pass has left is finite.

    Raises:
        CheckpointError: It is not: the numbers are beyond the range of their type.
    """
    seen = observed.scores.masked_fill(~observed.is_key[:, None], 0)
    parts = {"residuals": observed.x, "keys": observed.keys, "scores": seen}
    finite = torch.stack([torch.isfinite(values).flatten(1).all(1) for values in parts.values()], dim=1)  # [layer, 3]
    if not bool(finite.all()):
        layer, part = divmod(int(finite.flatten().int().argmin()), len(parts))  # what comes after it follows from it
        raise _overflow(f"the {list(parts)[part]} of layer {layer}", observed.scores.dtype)
    if not bool(torch.isfinite(observed.logits).all()):
        raise _overflow("the logits", observed.scores.dtype)


def _overflow(what: str, dtype: torch.dtype) -> CheckpointError:
    wider = {torch.float16: "; try --model.dtype=bfloat16 or float32"}.get(dtype, "")
    largest = torch.finfo(dtype).max
    return CheckpointError(f"{what} overflow: they are beyond the range of {_name(dtype)} ({largest:.3g}){wider}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _at_least_float32(heads: AttentionHeads) -> AttentionHeads:
    """Heads whose factorizations are not rounded to half precision."""
    wide = torch.promote_types(heads.W_Q.dtype, torch.float32)
    b_Q, b_K = (None if bias is None else bias.to(wide) for bias in (heads.b_Q, heads.b_K))
    return replace(heads, W_Q=heads.W_Q.to(wide), W_K=heads.W_K.to(wide), b_Q=b_Q, b_K=b_K)


def _relative(keys: Tensor, is_key: Tensor, attended: Tensor) -> Tensor:
    """The attended key minus the mean of the other keys that the query sees.

    Args:
        keys: [layer, batch, n, head, H].
        is_key: [layer, batch, n].
        attended: [batch].

    Returns:
        [layer, batch, 1, head, H]; NaN where there is no other key, or where the query does not see the attended one.
    """
    batch = torch.arange(len(attended), device=attended.device)
    of_key = keys[:, batch, attended].masked_fill(~is_key[:, batch, attended][..., None, None], torch.nan)
    weights = is_key.to(keys.dtype)
    total = torch.einsum("lbn,lbnhi->lbhi", weights, keys)
    n_others = weights.sum(-1)[..., None, None] - 1
    relative: Tensor = of_key - (total - of_key) / n_others
    return relative[:, :, None]


def _layout(cfg: Any) -> Layout:
    """How a model rotates, if it does."""
    if getattr(cfg, "rotary_interleaved_cos_sin", False):
        return "interleaved"
    return "adjacent" if getattr(cfg, "rotary_adjacent_pairs", False) else "halves"


def _windows(bridge: Any) -> list[int | None]:
    """Number of keys that a query sees in each layer, itself included; None where it sees all before it."""
    config = bridge.original_model.config
    n_layers = len(bridge.blocks)
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if size is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * n_layers
    if kinds is None:
        return [size] * n_layers
    return [size if kind == "sliding_attention" else None for kind in kinds]


def _checked_keys(key: Tensor, query: Tensor) -> Tensor:
    key = key.to(query.device)
    _check_positions("key", key, len(query), None)
    if bool((key > query).any()):
        raise bad_value("key", key.tolist(), f"0..query ({query.tolist()})", "attend to earlier tokens")
    return key


def _check_positions(name: str, positions: Tensor, n_batch: int, last: int | None) -> None:
    if positions.shape != (n_batch,):
        raise bad_value(f"{name}.shape", tuple(positions.shape), f"({n_batch},), one per prompt", "pass one each")
    if bool((positions < 0).any()) or (last is not None and bool((positions > last).any())):
        raise bad_value(
            name, positions.tolist(), f"positions 0..{'query' if last is None else last}", "count from the first token"
        )
