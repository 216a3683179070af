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

from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads, HeadSVD, bridge_attentions, verified_qr, verified_svd
from svf_lightning.probe import AttendedScores
from svf_lightning.rotary import Layout, rotate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]

_KEPT_OFFSETS = 8  # SVDs of cores kept at a time; few suffice, as prompts are sorted by offset
_ORTHONORMAL = 1e-9  # largest deviation of Q from orthonormal, in float64; Q is used in float32
_CAPPED = 1 - 1e-6  # a score at its cap would be infinite before the cap
# share of the largest score; coarser types than float32 are not checked
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


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
            every result is compared with the scores that the model itself computed.
    """
    space = HeadSpace(bridge)
    return space.decompose(space.observe(tokens, query), key)


@dataclass(frozen=True)
class Observed:
    """What one forward pass leaves behind: nothing of size [n, D].

    Args:
        query: Positions of the queries [batch].
        logits: Next-token logits at the queries [batch, vocabulary].
        x: Normalized residual at the query, with a 1 appended if the heads have biases [layer, batch, D'].
        keys: Key vectors before rotation, with their bias [layer, batch, n, key_head, H].
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
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        attentions = bridge_attentions(bridge)
        self.heads = heads = AttentionHeads.from_bridge(bridge)
        self.n_layers, self.n_heads, self.d_head = heads.W_Q.shape[:3]
        self.rank = min(self.d_head, heads.W_Q.shape[-1] + heads.has_bias)
        self._repeats = self.n_heads // bridge.W_K.shape[1]
        self._is_rotary = getattr(bridge.cfg, "positional_embedding_type", None) == "rotary"
        self._layout = _layout(bridge.cfg)
        self._caps = [getattr(a.original_component, "attn_logit_softcapping", None) for a in attentions]
        self._windows = _windows(bridge)
        Q, A = [], []
        W_Q, W_K = heads.factors()
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
        """
        tokens, query = tokens.to(self.heads.W_Q.device), query.to(self.heads.W_Q.device)
        _check_positions("query", query, len(tokens), tokens.shape[1] - 1)
        batch = torch.arange(len(tokens), device=tokens.device)
        kept: dict[str, list[Tensor]] = {name: [] for name in ("x", "keys", "scores", "pattern", "cos", "sin")}

        def keep(name: str, pick: Any = lambda t: t) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                kept[name].append(pick(tensor).clone())

            return hook

        hooks: Hooks = []
        for layer in range(self.n_layers):
            attention = f"blocks.{layer}.attn"
            hooks += [
                (f"{attention}.hook_in", keep("x", lambda x: x[batch, query])),
                (f"{attention}.hook_k", keep("keys")),
                (f"{attention}.hook_attn_scores", keep("scores", lambda s: s[batch, :, query])),
                (f"{attention}.hook_pattern", keep("pattern", lambda p: p[batch, :, query])),
            ]
            if self._is_rotary:
                hooks += [(f"{attention}.hook_{part}", keep(part, lambda t: t[0])) for part in ("cos", "sin")]
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        x = torch.stack(kept["x"])
        if self.heads.has_bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        rotation = (torch.stack(kept["cos"]), torch.stack(kept["sin"])) if kept["cos"] else None
        return Observed(
            query,
            logits[batch, query],
            x,
            torch.stack(kept["keys"]),
            torch.stack(kept["scores"]).transpose(1, 2),
            torch.stack(kept["pattern"]).transpose(1, 2),
            rotation,
            self._visible(query, tokens.shape[1]),
        )

    def _visible(self, query: Tensor, n: int) -> Tensor:
        """Keys that the query sees in each layer, from positions: what masked scores look like differs by mode."""
        position = torch.arange(n, device=query.device)
        distance = query[:, None] - position
        seen = [(distance >= 0) & (distance < (n if window is None else window)) for window in self._windows]
        return torch.stack(seen)

    @torch.inference_mode()
    def rerun(
        self,
        tokens: Int[Tensor, "batch n"],
        query: Int[Tensor, "batch"],
        key: Int[Tensor, "batch"],
        removed: Float[Tensor, "layer head batch"],
    ) -> tuple[Float[Tensor, "batch vocabulary"], Float[Tensor, "layer head batch"]]:
        """Run the model with an amount taken off each head's score of the key, before a soft cap and the softmax.

        Args:
            tokens: As in :meth:`observe`.
            query: Positions of the queries.
            key: Positions of the keys.
            removed: What is taken off; 0 leaves a head alone.

        Returns:
            Next-token logits at the queries, and each head's attention weight on the key.
        """
        batch = torch.arange(len(tokens), device=tokens.device)
        weights: list[Tensor] = []

        def change(layer: int) -> Any:
            def hook(scores: Tensor, hook: Any) -> Tensor:
                score, off, cap = scores[batch, :, query, key], removed[layer].T.to(scores), self._caps[layer]
                if cap is None:
                    changed = score - off
                else:
                    changed = cap * torch.tanh(torch.atanh((score / cap).clamp(-_CAPPED, _CAPPED)) - off / cap)
                scores = scores.clone()
                scores[batch, :, query, key] = torch.where(off == 0, score, changed)
                return scores

            return hook

        def keep(pattern: Tensor, hook: Any) -> None:
            weights.append(pattern[batch, :, query, key])

        hooks: Hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(self.n_layers)]
        changing = removed.flatten(1).any(1).nonzero().flatten().tolist()
        hooks += [(f"blocks.{layer}.attn.hook_attn_scores", change(layer)) for layer in changing]
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        return logits[batch, query], torch.stack(weights).transpose(1, 2)

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
        return AttendedScores(**coordinates_of, attention=observed.pattern[:, :, batch, key], error=error)

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
            InputError: They differ.
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
        tolerance = _TOLERANCE.get(observed.scores.dtype)
        if tolerance is not None and bool((error > tolerance).any()):
            layer, head = divmod(int(error.argmax()), self.n_heads)
            raise InputError(
                f"the scores of head {head} in layer {layer} are not the bilinear form of its weights (off by "
                f"{float(error.max()):.2g} of the largest). Allowed: dot products with biases, rotary positions, "
                "grouped queries and soft caps. Fix: use another model."
            )
        relative: Tensor = error.float()
        return relative


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
