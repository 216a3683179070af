"""Sparse attention decomposition of real models, in head space (arXiv 2410.00340; method, sections 5 and 6).

The score of a query at position p for a key at position j is a bilinear form of their normalized residuals,
``x_p^T W_Q^T M_p^T M_j W_K x_j / sqrt(H)``, with a 1 appended to x for the biases and M_p the rotation of position p
(the identity without RoPE). With thin QR factors ``W_Q^T = Q_q A_q`` and ``W_K^T = Q_k A_k`` its SVD is that of the
H x H core ``A_q M_p^T M_j A_k^T / sqrt(H)``, which depends on the offset j - p alone. QR is done once per head, the SVD
once per head and offset, and no tensor of size D is needed but the query's own residual.

That is ``rope_basis="offset"``. With "fixed" (its authors' code of 2026) a head has one basis, that of
``Omega = W_Q^T W_K / sqrt(H)``, and positions are moved into the tokens: ``x~_p = W_Q^+ M_p W_Q x_p`` and
``y~_j = W_K^+ M_j W_K x_j``, so that ``x~_p^T Omega y~_j`` is the same score. Both are exact; which singular pairs make
up a score differs.

What is said of biases is ``biases="appended"``: ``Omega = [W_Q b_Q]^T [W_K b_K]`` of tokens with a 1. Two others leave
them out of Omega, so that its singular vectors are directions of the residual stream and nothing else. "pseudo_inverse"
moves them into the tokens, as ``x + W_Q^+ b_Q`` and ``y + W_K^+ b_K``: ``W_Q (x + W_Q^+ b_Q) = W_Q x + b_Q`` for a head
of full rank, so the score is the same. "separate" gives singular pairs the part ``(W_Q x)^T M_p^T M_j W_K y`` alone.
The rest, ``(W_Q x)^T M b_K + b_Q^T M W_K y + b_Q^T M b_K`` with ``M = M_p^T M_j``, is kept beside it. In a relative
score only ``b_Q^T W_K s~`` is left of it where keys are not rotated; where they are, M depends on the key and nothing
cancels. Which of the three the authors of the papers take is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from svf_lightning.errors import CheckpointError, InputError, bad_value
from svf_lightning.heads import AttentionHeads, HeadSVD, bridge_attentions, verified_qr, verified_svd
from svf_lightning.probe import AttendedScores, FiringBatch, FiringRule, Side
from svf_lightning.rotary import Layout, rotate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RopeBasis = Literal["offset", "fixed"]
Biases = Literal["appended", "separate", "pseudo_inverse"]
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]

_KEPT_OFFSETS = 8  # SVDs of cores kept at a time; few suffice, as prompts are sorted by offset
_COORDINATES = ("query", "key", "direction", "S", "raw_key", "raw_direction")
_KEPT_BYTES = 2**28  # of the SVDs of single heads that firings are decomposed with
_ORTHONORMAL = 1e-9  # largest deviation of Q from orthonormal, in float64; Q is used in float32
_FULL_RANK = 1e-6  # smallest singular value of a factor whose pseudo-inverse is used, relative to the largest
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
        rope_basis: With rotary positions: "offset", a basis for each offset of query and key, or "fixed", one for all.
        biases: "appended" (one more coordinate), "separate" (beside the singular pairs), or "pseudo_inverse" (moved
            into the tokens); :attr:`heads` has biases with the first alone.

    Raises:
        InputError: The model's scores are no bilinear form of the residual stream, or there is no such option, or
            "fixed" or "pseudo_inverse" with a head whose W_Q or W_K has no full rank.
        CheckpointError: Weights beyond the range of their dtype.
    """

    def __init__(
        self, bridge: TransformerBridge, *, rope_basis: RopeBasis = "offset", biases: Biases = "appended"
    ) -> None:
        check_rope_basis(rope_basis)
        check_biases(biases)
        self.bridge = bridge
        attentions = bridge_attentions(bridge)
        heads = _at_least_float32(AttentionHeads.from_bridge(bridge))
        is_outside = biases != "appended" and heads.has_bias
        b_Q, b_K = (None if b is None or not is_outside else b.double() for b in (heads.b_Q, heads.b_K))
        self.heads = heads = replace(heads, b_Q=None, b_K=None) if is_outside else heads
        self.n_layers, self.n_heads, self.d_head = heads.W_Q.shape[:3]
        self.rank = min(self.d_head, heads.W_Q.shape[-1] + heads.has_bias)
        self._repeats = self.n_heads // bridge.W_K.shape[1]
        self._is_rotary = getattr(bridge.cfg, "positional_embedding_type", None) == "rotary"
        self.layout = _layout(bridge.cfg)
        self.caps = [getattr(a.original_component, "attn_logit_softcapping", None) for a in attentions]
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
        self.is_fixed = self._is_rotary and rope_basis == "fixed"
        moves_biases = is_outside and biases == "pseudo_inverse"
        for is_asked, name, value, fix in (
            (self.is_fixed, "rope_basis", "fixed", "--model.rope_basis=offset"),
            (moves_biases, "biases", "pseudo_inverse", "--model.biases=appended"),
        ):
            if is_asked:
                self._check_full_rank(name, value, fix)
        if self.is_fixed or moves_biases:
            self._to_query = torch.linalg.pinv(self._A_q.mT)  # coordinates of a query in Q_q, from its query vector
        # biases that no factor holds [layer, head, H]; of keys, one for each key head
        zeros = self._A_q.new_zeros(self._A_q.shape[:-1])
        self._b_Q = zeros if b_Q is None else b_Q
        self._b_K = (zeros if b_K is None else b_K)[:, :: self._repeats]
        self._shift = torch.einsum("lhij,lhj->lhi", self._to_query, self._b_Q) if moves_biases else zeros
        self.is_separate = is_outside and not moves_biases
        self._has_own_inputs = self.is_fixed or is_outside
        self._bases: OrderedDict[int, HeadSVD] = OrderedDict()
        self._head_bases: OrderedDict[tuple[int, int, int], HeadSVD] = OrderedDict()

    @property
    def reads_inputs(self) -> bool:
        """True if singular vectors are directions of what heads read, and not of tokens that something was moved into.

        A direction can be taken out of what a head reads only then; biases apart would need a form of their own.
        """
        return not self._has_own_inputs

    def _check_full_rank(self, option: str, value: str, fix: str) -> None:
        """Raises InputError for a factor without an inverse: a rotated query or key, or a bias, may leave its range."""
        for name, factors in (("W_Q", self._A_q), ("W_K", self._A_k)):
            sigma = torch.linalg.svdvals(factors)
            flawed = ~(sigma[..., -1] > _FULL_RANK * sigma[..., 0])
            if bool(flawed.any()):
                layer, head = flawed.nonzero()[0].tolist()
                raise bad_value(
                    option, value, f"heads of full rank ({name} of head {head} in layer {layer} is not)", fix
                )  # fmt: skip

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
        self._check_shown(hooks)
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

    def _check_shown(self, hooks: Hooks) -> None:
        """Raises InputError where the model does not have these hooks."""
        absent = sorted({str(name).rsplit(".", 1)[-1] for name, _ in hooks if name not in self.bridge.hook_dict})
        if absent:
            raise self._not_shown(absent)

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

    # ---- firings ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def find_firings(
        self,
        tokens: Int[Tensor, "batch n"],
        length: Int[Tensor, "batch"],
        rule: FiringRule,
        take: Callable[[FiringBatch], None],
        *,
        query: Int[Tensor, "batch"] | None = None,
    ) -> None:
        """Run the model, and hand over the firings of all heads, layer by layer as they happen.

        What one layer computes is gone before the next one computes anything.

        Args:
            tokens: As in :meth:`observe`.
            length: Tokens of each prompt; positions after them are padding, and do not count.
            rule: What counts as a firing, beside a positive score.
            take: Called once for each layer that has any; their prompts are rows of ``tokens``.
            query: Positions of the prompts' own queries, for a rule that counts these alone.

        Raises:
            InputError: The model does not show how it comes to its scores, or the rule needs positions.
            CheckpointError: Scores that differ from the model's own by more than rounding.
        """
        position = torch.arange(tokens.shape[1], device=self.heads.W_Q.device)
        asks = position < length.to(position.device)[:, None]  # [batch, n]
        if not rule.every_query:
            if query is None:
                raise bad_value("query", None, "a position for each prompt with every_query=False", "pass query=...")
            _check_positions("query", query, len(tokens), tokens.shape[1] - 1)
            asks &= position == query.to(position.device)[:, None]
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                kept[name] = tensor

            return hook

        def finish(layer: int) -> Any:
            def hook(pattern: Tensor, hook: Any) -> None:
                found = self._firings_of_layer(layer, kept, pattern, asks, rule)
                kept.clear()
                if found is not None:
                    take(found)

            return hook

        hooks: Hooks = []
        shown = {"x": "in", "keys": "k", "scores": "attn_scores"}
        if self._is_rotary:
            shown |= {"cos": "cos", "sin": "sin"}
        for layer in range(self.n_layers):
            attention = f"blocks.{layer}.attn"
            hooks += [(f"{attention}.hook_{name}", keep(what)) for what, name in shown.items()]
            hooks.append((f"{attention}.hook_pattern", finish(layer)))
        self._check_shown(hooks)
        self.bridge.run_with_hooks(tokens.to(self.heads.W_Q.device), fwd_hooks=hooks, return_type=None)

    def _firings_of_layer(
        self, layer: int, kept: dict[str, Tensor], pattern: Tensor, asks: Tensor, rule: FiringRule
    ) -> FiringBatch | None:
        """The firings of one layer, from what it left behind; ``asks``: queries that count; None if there are none."""
        own = kept["scores"]
        position = torch.arange(pattern.shape[-1], device=pattern.device)
        is_key = self._visible(position, len(position))[layer]  # [query, key]
        n_keys = is_key.sum(-1)
        fires = is_key & (pattern >= rule.threshold(n_keys)[:, None]) & (own > 0)
        fires &= asks[:, None, :, None]
        fires[..., 0] &= rule.first_token
        fires &= (position[:, None] != position) | rule.self_attention
        prompt, head, query, key = fires.nonzero(as_tuple=True)
        if not len(head):
            return None
        x, keys = (kept[name].to(self.heads.W_Q.dtype) for name in ("x", "keys"))
        if self.heads.has_bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        a = torch.einsum("bnd,hdi->bnhi", x, self._Q_q[layer])[prompt, query, head].double()
        cos = sin = None
        if "cos" in kept:  # a layer without positions (NoPE) has none
            cos, sin = kept["cos"][0], kept["sin"][0]

        def in_place(vectors: Tensor) -> Tensor:
            """Keys as the scores see them."""
            if cos is None or sin is None:
                return vectors
            return rotate(vectors, cos[:, None], sin[:, None], layout=self.layout)

        is_alone = (n_keys == 1)[query][:, None]
        others = (n_keys[query] - 1)[:, None]

        def at_key(vectors: Tensor) -> Tensor:
            """Relative and raw key vectors [n, 2, H], as :func:`_at_key`."""
            group = head // self._repeats
            of_key = vectors[prompt, key, group].double()
            total = torch.einsum("qk,bkhi->bqhi", is_key.to(vectors), vectors)[prompt, query, group].double()
            relative = (of_key - (total - of_key) / others).masked_fill(is_alone, torch.nan)
            return torch.stack([relative, of_key], dim=1)

        whole = at_key(in_place(keys))
        keys = keys - self._b_K[layer].to(keys) if self.is_separate else keys
        seen = seen_there = at_key(in_place(keys)) if self.is_separate else whole
        direction = seen if cos is None or self.is_fixed else at_key(keys)
        A_q, to_key = self._A_q[layer], self._to_key[layer]
        if cos is not None and sin is not None and not self.is_fixed:  # relative to the query
            at = [part[query][:, None].double() for part in (cos, sin)]
            seen = rotate(seen, *at, layout=self.layout, transpose=True)
        offset = key - query if cos is not None and not self.is_fixed else torch.zeros_like(key)
        n = len(position)
        codes, member = torch.unique(head * n - offset, return_inverse=True)
        order = member.argsort(stable=True)
        sizes = torch.bincount(member).tolist()
        bases = self._bases_of_heads(layer, [divmod(code, n) for code in codes.tolist()], cos, sin)
        parts = {name: seen.new_empty(len(head), self.rank, dtype=torch.float32) for name in _COORDINATES}
        own_size = own.masked_fill(~is_key, 0).abs().amax()
        rebuilt = seen.new_empty(len(head))
        usual = seen.new_empty(len(head))
        of_biases = seen.new_zeros(len(head), 2)
        for code, members, basis in zip(codes.tolist(), order.split(sizes), bases, strict=True):
            h = code // n
            U, S, V = (part.double() for part in basis)

            def turned(vectors: Tensor, members: Tensor = members) -> Tensor:
                """Query vectors as the scores see them."""
                if cos is None or sin is None:
                    return vectors
                return rotate(vectors, *(part[query[members]].double() for part in (cos, sin)), layout=self.layout)

            own_q = a[members] @ A_q[h]
            q = own_q + self._b_Q[layer, h]
            usual[members] = (q * self.heads.scale).norm(dim=-1) * whole[members, 1].norm(dim=-1) / self.d_head**0.5
            if self.is_separate:
                of_biases[members] = self._of_biases(turned(q), turned(own_q), whole[members], seen_there[members])
            of_query = a[members] + self._shift[layer, h]
            if self.is_fixed and cos is not None:
                of_query = turned(own_q if self.is_separate else q) @ self._to_query[layer, h].mT
            left = of_query @ U
            z = seen[members] @ (A_q[h].mT * self.heads.scale) @ U
            rebuilt[members] = (left * z[:, 1]).sum(-1) + of_biases[members, 1]
            v = direction[members] @ to_key[h // self._repeats].mT @ V
            values = (left, z[:, 0], v[:, 0], S.expand_as(left), z[:, 1], v[:, 1])
            for name, value in zip(_COORDINATES, values, strict=True):
                parts[name][members] = value.float()
        cap = self.caps[layer]
        if cap is not None:
            rebuilt = cap * (rebuilt / cap).tanh()
        at_pair = own[prompt, head, query, key]
        off = (rebuilt - at_pair).abs()
        beyond = off > _tolerance(own.dtype) * usual.clamp_min(float(own_size))
        if bool(beyond.any()):
            worst = int(torch.where(beyond, off, 0.0).argmax())
            raise _off(layer, int(head[worst]), float(off[worst] / own_size), own.dtype)
        scores = AttendedScores(
            **parts, attention=pattern[prompt, head, query, key].float(), **self._kept_of_biases(of_biases)
        )
        return FiringBatch(layer * self.n_heads + head, prompt, query, key, scores)

    def _bases_of_heads(
        self, layer: int, wanted: list[tuple[int, int]], cos: Tensor | None, sin: Tensor | None
    ) -> list[HeadSVD]:
        """Core SVDs [H, R] of single heads of a layer: (head, how far the key lies behind the query) each."""
        missing = [one for one in wanted if (layer, *one) not in self._head_bases]
        if missing:
            head, behind = torch.tensor(missing, device=self._A_q.device).T
            turn = None
            if cos is not None and sin is not None and not self.is_fixed:
                first = torch.zeros_like(behind)
                turn = self._turn(cos[behind], sin[behind], cos[first], sin[first])
            made = self._svd_of(self._A_q[layer, head], self._A_k[layer, head // self._repeats], turn)
            for one, *parts in zip(missing, *made, strict=True):
                self._head_bases[layer, *one] = HeadSVD(*(part.clone() for part in parts))
        bases = []
        for one in wanted:
            self._head_bases.move_to_end((layer, *one))
            bases.append(self._head_bases[layer, *one])
        size = sum(part.nbytes for part in bases[0])
        while len(self._head_bases) > max(len(wanted), _KEPT_BYTES // size):
            self._head_bases.popitem(last=False)
        return bases

    # ---- decomposition ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decompose(self, observed: Observed, key: Int[Tensor, "batch"]) -> Decomposition:
        """Contributions of all keys; see :func:`decompose_attention`."""
        key = _checked_keys(key, observed.query)
        whole = self._rotated(observed, observed.keys)
        read = self._read(observed)
        q = self._query_vectors(read)
        self._check_scores(observed, q, whole)
        a = self._turned(observed, read + self._shift[:, :, None])
        rotated = self._rotated(observed, self._own_keys(observed)) if self.is_separate else whole
        z = self._seen_from_query(observed, rotated)
        contributions = z.new_empty(*z.shape)
        for group, basis in self.groups(observed, key):
            U = basis.U.double()
            left = a[:, :, group] @ U
            contributions[:, :, group] = left[..., None, :] * (z[:, :, group] @ U[:, :, None])
        hidden = ~observed.is_key[:, None]
        contributions = contributions.masked_fill_(hidden[..., None], 0)
        scores = contributions.sum(-1)
        if self.is_separate:
            of_biases = self._of_biases_at(observed, q, whole, rotated)
            scores = scores + of_biases.masked_fill(hidden, 0)
        return Decomposition(contributions.float(), scores.float())

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
        whole = self._rotated(observed, observed.keys)
        read = self._read(observed)
        q = self._query_vectors(read)
        error = self._check_scores(observed, q, whole)
        a = self._turned(observed, read + self._shift[:, :, None])
        keys = self._own_keys(observed)
        rotated = self._rotated(observed, keys) if self.is_separate else whole
        at_key = _at_key(rotated, observed.is_key, key)
        of_biases = None
        if self.is_separate:
            of_biases = self._of_biases_at(observed, q, _at_key(whole, observed.is_key, key), at_key)
        z = self._seen_from_query(observed, at_key)
        if not self.is_fixed:
            at_key = _at_key(keys, observed.is_key, key)
        coordinates = torch.einsum("lkij,lbmkj->lkbmi", self._to_key, at_key.double())
        coordinates = coordinates.repeat_interleave(self._repeats, dim=1)
        shape = (self.n_layers, self.n_heads, len(key), self.rank)
        coordinates_of = {name: observed.x.new_empty(shape, dtype=torch.float32) for name in _COORDINATES}
        for group, basis in self.groups(observed, key):
            U, S, V = (part.double() for part in basis)
            coordinates_of["query"][:, :, group] = (a[:, :, group] @ U).float()
            for i, kind in enumerate(("", "raw_")):
                coordinates_of[f"{kind}key"][:, :, group] = (z[:, :, group, i] @ U).float()
                coordinates_of[f"{kind}direction"][:, :, group] = (coordinates[:, :, group, i] @ V).float()
            coordinates_of["S"][:, :, group] = S[:, :, None].float()
        batch = torch.arange(len(key), device=key.device)
        return AttendedScores(
            **coordinates_of,
            attention=observed.pattern[:, :, batch, key].float(),
            error=error,
            **self._kept_of_biases(of_biases),
        )

    def svd(self, observed: Observed, query: int, key: int) -> HeadSVD:
        """Core SVD [layer, head, H, R] of the offset from a query position to a key position."""
        offset = key - query if self._has_offsets(observed.rotation) else 0
        if offset in self._bases:
            self._bases.move_to_end(offset)
            return self._bases[offset]
        A_k = self._A_k.repeat_interleave(self._repeats, dim=1)
        turn = None
        if self._has_offsets(observed.rotation):
            assert observed.rotation is not None
            cos, sin = observed.rotation
            turn = self._turn(cos[:, query], sin[:, query], cos[:, key], sin[:, key])[:, None]
        basis = self._svd_of(self._A_q, A_k, turn)
        self._bases[offset] = basis
        if len(self._bases) > _KEPT_OFFSETS:
            self._bases.popitem(last=False)
        return basis

    def _has_offsets(self, rotation: tuple[Tensor, Tensor] | None) -> bool:
        """True if the basis depends on the offset from query to key."""
        return rotation is not None and not self.is_fixed

    def _turn(self, cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor) -> Tensor:
        """M_p^T M_j [..., H, H], from cosines and sines of the query's position and of the key's [..., rotary]."""
        eye = torch.eye(self.d_head, dtype=torch.float64, device=cos_q.device).expand(*cos_q.shape[:-1], -1, -1)
        # rotate turns rows, so M is transposed
        at_query, at_key = (
            rotate(eye, cos.double()[..., None, :], sin.double()[..., None, :], layout=self.layout)
            for cos, sin in ((cos_q, sin_q), (cos_k, sin_k))
        )
        turn: Tensor = at_query @ at_key.mT
        return turn

    def _svd_of(self, A_q: Tensor, A_k: Tensor, turn: Tensor | None) -> HeadSVD:
        """SVD of cores [..., H, H], with a turn in between."""
        core = A_q @ A_k.mT if turn is None else A_q @ turn @ A_k.mT
        U, S, V = verified_svd(core * self.heads.scale)
        # float32 is enough for orthonormal columns; the sums over them stay exact to 1e-7
        return HeadSVD(U.float(), S.float(), V.float())

    def groups(self, observed: Observed, key: Tensor) -> list[tuple[Tensor, HeadSVD]]:
        """Prompts with the same offset, each group with its basis."""
        offsets = key - observed.query if self._has_offsets(observed.rotation) else torch.zeros_like(key)
        groups = []
        for offset in sorted(set(offsets.tolist())):
            members = (offsets == offset).nonzero().squeeze(-1)
            first = int(members[0])
            groups.append((members, self.svd(observed, int(observed.query[first]), int(key[first]))))
        return groups

    def _own_keys(self, observed: Observed) -> Tensor:
        """Key vectors as singular pairs have them, before rotation [layer, batch, n, key_head, H]."""
        if not self.is_separate:
            return observed.keys
        return observed.keys - self._b_K[:, None, None].to(observed.keys)

    def _rotated(self, observed: Observed, keys: Tensor) -> Tensor:
        """Key vectors as the scores see them [layer, batch, n, key_head, H]."""
        if observed.rotation is None:
            return keys
        cos, sin = (part[:, None, :, None] for part in observed.rotation)
        return rotate(keys, cos, sin, layout=self.layout)

    def _read(self, observed: Observed) -> Tensor:
        """What the heads read at the query, in the orthonormal basis Q_q [layer, head, batch, H]."""
        return torch.einsum("lbd,lhdi->lhbi", observed.x, self._Q_q).double()

    def _query_vectors(self, read: Tensor) -> Tensor:
        """Query vectors, with their bias and before rotation [layer, head, batch, H]."""
        return torch.einsum("lhbi,lhij->lhbj", read, self._A_q) + self._b_Q[:, :, None]

    def _of_biases(self, q: Tensor, own_q: Tensor, keys: Tensor, own_keys: Tensor) -> Tensor:
        """What biases add to scores, from queries [..., H] and keys [..., m, H] with and without them, all in place."""
        scores = (keys @ q[..., None] - own_keys @ own_q[..., None]).squeeze(-1)
        return scores * self.heads.scale

    def _of_biases_at(self, observed: Observed, q: Tensor, keys: Tensor, own_keys: Tensor) -> Tensor:
        """The same, of rotated keys [layer, batch, m, key_head, H]; q is not rotated. [layer, head, batch, m]."""
        queries = [q, q - self._b_Q[:, :, None]]
        if observed.rotation is not None:
            cos, sin = (part[:, None, observed.query].double() for part in observed.rotation)
            queries = [rotate(query, cos, sin, layout=self.layout) for query in queries]
        of_heads = (
            key.double().repeat_interleave(self._repeats, dim=3).permute(0, 3, 1, 2, 4) for key in (keys, own_keys)
        )
        return self._of_biases(*queries, *of_heads)

    def _kept_of_biases(self, relative_and_raw: Tensor | None) -> dict[str, Tensor]:
        """Fields of :class:`AttendedScores` [..., n, 2] -> [..., n]."""
        if not self.is_separate or relative_and_raw is None:
            return {}
        return {"bias": relative_and_raw[..., 0].float(), "raw_bias": relative_and_raw[..., 1].float()}

    def _turned(self, observed: Observed, a: Tensor) -> Tensor:
        """With a fixed basis, queries with their positions moved into them (x~); else as they are."""
        if not self.is_fixed or observed.rotation is None:
            return a
        cos, sin = (part[:, None, observed.query].double() for part in observed.rotation)
        turned: Tensor = rotate(a @ self._A_q, cos, sin, layout=self.layout) @ self._to_query.mT
        return turned

    def _seen_from_query(self, observed: Observed, rotated: Tensor) -> Tensor:
        """Keys in the basis Q_q of each query head [layer, head, batch, n, H], float64."""
        rotated = rotated.double()
        if self._has_offsets(observed.rotation):
            # relative to the query, a key is rotated back by the query's position
            assert observed.rotation is not None
            cos, sin = (part[:, observed.query, None, None].double() for part in observed.rotation)
            rotated = rotate(rotated, cos, sin, layout=self.layout, transpose=True)
        rotated = rotated.repeat_interleave(self._repeats, dim=3)
        return torch.einsum("lhij,lbnhj->lhbni", self._A_q * self.heads.scale, rotated)

    def _check_scores(self, observed: Observed, q: Tensor, rotated: Tensor) -> Tensor:
        """Compare all scores, computed from the same factors as the decomposition, with those of the model.

        Args:
            observed: What the pass has left.
            q: Query vectors, before rotation [layer, head, batch, H].
            rotated: Key vectors as the scores see them [layer, batch, n, key_head, H].

        Returns:
            Largest difference, relative to the largest score [layer, head].

        Raises:
            InputError: They differ, so much that it is no rounding.
            CheckpointError: They differ by more than rounding explains.
        """
        towards = q.transpose(1, 2) * self.heads.scale
        if observed.rotation is not None:
            cos, sin = (part[:, observed.query, None].double() for part in observed.rotation)
            towards = rotate(towards, cos, sin, layout=self.layout)
        n_layers, n_batch = towards.shape[:2]
        grouped = towards.reshape(n_layers, n_batch, -1, self._repeats, self.d_head).to(rotated.dtype)
        scores = (grouped @ rotated.permute(0, 1, 3, 4, 2)).flatten(2, 3).transpose(1, 2)
        for layer, cap in enumerate(self.caps):
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
        share = _tolerance(dtype)
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
            raise _off(layer, head, off, dtype)
        relative: Tensor = error.float()
        return relative


def check_rope_basis(rope_basis: str) -> None:
    """Raises InputError for a basis that there is not."""
    if rope_basis not in get_args(RopeBasis):
        raise bad_value("rope_basis", rope_basis, "'offset' or 'fixed'", "change --model.rope_basis")


def check_biases(biases: str) -> None:
    """Raises InputError for a convention that there is not."""
    if biases not in get_args(Biases):
        allowed = " or ".join(map(repr, get_args(Biases)))
        raise bad_value("biases", biases, allowed, "change --model.biases")


def _tolerance(dtype: torch.dtype) -> float:
    """How far rebuilt scores of this type may be off, relative to the largest."""
    return max(_TOLERANCE.get(dtype, 0.0), _ROUNDINGS * torch.finfo(dtype).eps)


def _off(layer: int, head: int, off: float, dtype: torch.dtype) -> CheckpointError:
    return CheckpointError(
        f"the rebuilt scores of head {head} in layer {layer} are off by {off:.2g} of the largest, more than "
        f"the {_tolerance(dtype):.2g} that rounding in {_name(dtype)} explains"
    )


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


def _at_key(keys: Tensor, is_key: Tensor, attended: Tensor) -> Tensor:
    """The attended key minus the mean of the other keys that the query sees, and the attended key itself.

    Args:
        keys: [layer, batch, n, head, H].
        is_key: [layer, batch, n].
        attended: [batch].

    Returns:
        [layer, batch, 2, head, H]; NaN where there is no other key (the first of the two), or where the query does not
        see the attended one.
    """
    batch = torch.arange(len(attended), device=attended.device)
    of_key = keys[:, batch, attended].masked_fill(~is_key[:, batch, attended][..., None, None], torch.nan)
    weights = is_key.to(keys.dtype)
    total = torch.einsum("lbn,lbnhi->lbhi", weights, keys)
    n_others = weights.sum(-1)[..., None, None] - 1
    return torch.stack([of_key - (total - of_key) / n_others, of_key], dim=2)


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
