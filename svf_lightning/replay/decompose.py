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

With a norm of queries and keys (QK-norm), W_Q and W_K stand for ``G_q C W_Q`` and ``G_k C W_K``, gains and centring in
them, and a token for ``s x``: the norm divides it by 1/s, one number per token and head (:mod:`svf_lightning.bridged`).
Every contribution to a score carries the scalars of its two tokens. Terms that positions add to scores (ALiBi) are kept
beside the sum.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.bridged import attention_layers, model_name
from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import PARTS, AttentionHeads, HeadSVD, verified_qr, verified_svd
from svf_lightning.probe import AttendedScores, FiringBatch, FiringRule, Side
from svf_lightning.replay.firings import FiringFinder
from svf_lightning.replay.observed import (
    Observed,
    Rotation,
    check_positions,
    check_range,
    checked_keys,
    coarser,
    off,
    overflow,
    tolerance,
)
from svf_lightning.replay.taps import Shown, Taps
from svf_lightning.rotary import rotate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RopeBasis = Literal["offset", "fixed"]
Biases = Literal["appended", "separate", "pseudo_inverse"]

_KEPT_OFFSETS = 8  # SVDs of cores kept at a time; few suffice, as prompts are sorted by offset
_COORDINATES = ("query", "key", "direction", "S", "raw_key", "raw_direction")
_ORTHONORMAL = 1e-9  # largest deviation of Q from orthonormal, in float64; Q is used in float32
_FULL_RANK = 1e-6  # smallest singular value of a factor whose pseudo-inverse is used, relative to the largest
_NOT_BILINEAR = 1e-2  # from here on, a difference does not come from rounding: the scores have another form


class _Sums(NamedTuple):
    contributions: Float[Tensor, "layer head batch n R"]
    scores: Float[Tensor, "layer head batch n"]


class Decomposition(_Sums):
    """Scores of one query per prompt, as sums over singular pairs; as a tuple: contributions and scores.

    Args:
        contributions: c_jk, 0 at positions that are no keys of the query [layer, head, batch, n, R].
        scores: The model's own, before the softmax and before a soft cap; 0 there too [layer, head, batch, n].
        position: ``scores`` minus the sum of the contributions: 0, but for terms that positions add to the scores
            (ALiBi), which are part of no singular pair, and for biases that are kept beside the pairs.
    """

    position: Float[Tensor, "layer head batch n"]

    def __new__(cls, contributions: Tensor, scores: Tensor, position: Tensor) -> Decomposition:
        """A tuple of two, as earlier versions had it, with the position terms beside it."""
        found = super().__new__(cls, contributions, scores)
        found.position = position
        return found


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
        Contributions [layer, head, batch, n, R], scores and position terms [layer, head, batch, n], float32.

    Raises:
        InputError: Positions out of range, or a model whose scores are not this bilinear form: every result is compared
            with the scores that the model itself computed, in every dtype.
        CheckpointError: Numbers beyond the range of the weights' dtype, or scores that differ by more than rounding.
    """
    space = HeadSpace(bridge)
    return space.decompose(space.observe(tokens, query), key)


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
        self.layers = attention_layers(bridge)
        self.taps = Taps(bridge, self.layers)
        self.dtype = self.layers[0].W_K.dtype  # of the model's weights
        heads = _at_least_float32(AttentionHeads.from_layers(self.layers))
        is_outside = biases != "appended" and heads.has_bias
        whole, self.heads = heads, heads.without_biases() if is_outside else heads
        heads = self.heads
        self.n_layers, self.n_heads, self.d_head = heads.W_Q.shape[:3]
        self.rank = min(self.d_head, heads.W_Q.shape[-1] + heads.n_constants)
        self.repeats = self.n_heads // len(self.layers[0].W_K)
        self.caps = [layer.cap for layer in self.layers]
        gains = [layer.gain_in_place for layer in self.layers]
        self._gain = None  # of norms between the rotations of two positions [layer, head, H]
        if any(gain is not None for gain in gains):
            ones = torch.ones_like(heads.W_Q[0, ..., 0])
            self._gain = torch.stack([ones if gain is None else gain for gain in gains]).double()
        Q, A = [], []
        W_Q, W_K = heads.factors()
        for W in (W_Q, W_K):
            if not bool(torch.isfinite(W).all()):  # finite before normalization was folded in
                raise overflow("weights of the heads", bridge.cfg.dtype)
        shared = W_K[:, :: self.repeats]  # QR once for all query heads that share the keys
        for W in (W_Q, shared):
            # one layer at a time: float64 copies of all heads would be as large as a small model
            factors = [verified_qr(layer.mT.double(), tolerance=_ORTHONORMAL) for layer in W]
            Q.append([q.to(W) for q, _ in factors])
            A.append(torch.stack([a for _, a in factors]))
        self.Q_q = torch.stack(Q[0])  # [layer, head, D', H]
        self.A_q, self.A_k = A  # [layer, head, H, H] and [layer, key_head, H, H], float64
        self.to_key = torch.linalg.pinv(self.A_k.mT)  # coordinates of a key in Q_k, from its key vector
        is_rotary = any(layer.is_rotary for layer in self.layers)
        self.is_fixed = is_rotary and rope_basis == "fixed"
        moves_biases = is_outside and biases == "pseudo_inverse"
        for is_asked, name, value, fix in (
            (self.is_fixed, "rope_basis", "fixed", "--model.rope_basis=offset"),
            (moves_biases, "biases", "pseudo_inverse", "--model.biases=appended"),
        ):
            if is_asked:
                self._check_full_rank(name, value, fix)
        if self.is_fixed or moves_biases:
            self.to_query = torch.linalg.pinv(self.A_q.mT)  # coordinates of a query in Q_q, from its query vector
        # biases that no factor holds [layer, head, H], float64; of keys, one for each key head
        zeros = self.A_q.new_zeros(self.A_q.shape[:-1])
        self._outside = {
            name: zeros if bias is None or not is_outside else bias.double()
            for name, bias in ((name, getattr(whole, name)) for name in ("b_Q", "b_K", "c_Q", "c_K"))
        }
        self.moves_biases, self.is_separate = moves_biases, is_outside and not moves_biases
        self._has_own_inputs = self.is_fixed or is_outside
        self._bases: OrderedDict[tuple[int, int], HeadSVD] = OrderedDict()
        self._firings = FiringFinder(self)

    @property
    def reads_inputs(self) -> bool:
        """True if singular vectors are directions of what heads read, and not of tokens that something was moved into.

        A direction can be taken out of what a head reads only then; biases apart would need a form of their own.
        """
        return not self._has_own_inputs

    def _check_full_rank(self, option: str, value: str, fix: str) -> None:
        """Raises InputError for a factor without an inverse: a rotated query or key, or a bias, may leave its range."""
        for name, factors in (("W_Q", self.A_q), ("W_K", self.A_k)):
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
            InputError: Positions out of range, or a model that does not show how it comes to its scores.
            CheckpointError: Numbers beyond the range of the weights' dtype.
        """
        tokens, query = tokens.to(self.heads.W_Q.device), query.to(self.heads.W_Q.device)
        check_positions("query", query, len(tokens), tokens.shape[1] - 1)
        n_batch, n = tokens.shape
        batch = torch.arange(n_batch, device=tokens.device)
        kept: dict[str, dict[int, Tensor]] = {}

        def take(number: int, shown: Shown) -> None:
            x = shown["x"][batch, query].to(self.heads.W_Q.dtype)
            # sums over half precision would add errors of their own; the model's scores stay what they are
            keys, of_key = self.normed_keys(number, shown["keys"].to(self.heads.W_Q.dtype))
            found: dict[str, Tensor | None] = {
                "x": x.clone(),
                "keys": keys.clone(),
                "of_key": of_key,
                "of_query": self.token_scalars(number, "query", x, query),
                "scores": shown["scores"][batch, :, query].clone(),
                "pattern": shown["pattern"][batch, :, query].clone(),
                "cos": shown["cos"].clone() if "cos" in shown else None,
                "sin": shown["sin"].clone() if "sin" in shown else None,
            }
            if "position" in shown:
                found["position"] = shown["position"].expand(n_batch, -1, n, -1)[batch, :, query].clone()
            for name, value in found.items():
                if value is not None:
                    kept.setdefault(name, {})[number] = value
            self._check_keys(number, x, keys[batch, query], query)

        logits: Tensor = self.taps.run(tokens, take, return_type="logits")

        def stacked(name: str) -> Tensor | None:
            """All layers; those that have none of it have what changes nothing."""
            if name not in kept:
                return None
            of_layers = kept[name]
            fill = torch.ones_like if name in ("of_query", "of_key") else torch.zeros_like
            some = next(iter(of_layers.values()))
            return torch.stack([of_layers[i] if i in of_layers else fill(some) for i in range(self.n_layers)])

        parts = {name: stacked(name) for name in ("x", "keys", "scores", "pattern", "of_query", "of_key", "position")}
        x, keys, scores, pattern = (parts[name] for name in ("x", "keys", "scores", "pattern"))
        assert x is not None
        assert keys is not None
        assert scores is not None
        assert pattern is not None
        angles = [kept.get(part, {}) for part in ("cos", "sin")]
        rotation = [(angles[0][i], angles[1][i]) if i in angles[0] else None for i in range(self.n_layers)]
        of_query, position = parts["of_query"], parts["position"]
        observed = Observed(
            query,
            logits[batch, query],
            self.with_constant(x),
            keys,
            scores.transpose(1, 2),
            pattern.transpose(1, 2),
            rotation if angles[0] else None,
            self.visible(query, n),
            None if of_query is None else of_query.transpose(1, 2),
            parts["of_key"],
            None if position is None else position.transpose(1, 2),
        )
        check_range(observed)
        self._check_hidden(observed)
        return observed

    def visible(self, query: Tensor, n: int) -> Tensor:
        """Keys that the query sees in each layer, from positions: what masked scores look like differs by mode."""
        position = torch.arange(n, device=query.device)
        distance = query[:, None] - position
        seen = []
        for layer in self.layers:
            of_layer = (distance >= 0) & (distance < (n if layer.window is None else layer.window))
            if layer.chunk is not None:
                of_layer &= position >= (query[:, None] // layer.chunk) * layer.chunk
            seen.append(of_layer)
        return torch.stack(seen)

    def _check_hidden(self, observed: Observed) -> None:
        """Raises InputError where a model attends to keys that, by its configuration, its queries do not see."""
        attended = observed.pattern.masked_fill(observed.is_key[:, None], 0).flatten(1).amax(1)
        if bool((attended > 0).any()):
            layer = self.layers[int(attended.argmax())]
            seen = layer.window or layer.chunk or "all earlier"
            raise InputError(
                f"layer {layer.block} of {model_name(self.bridge)} attends to keys that its configuration hides from "
                f"its queries, which see {seen} keys. Allowed: causal attention, over all keys or a window of them. "
                "Fix: use another model."
            )

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @property
    def has_constant(self) -> bool:
        """True if what heads read has a 1 appended, for their biases."""
        return self.heads.n_constants - self._has_shift > 0

    @property
    def _has_shift(self) -> bool:
        """True if there is one more coordinate, for biases after a norm of queries or keys."""
        return self.heads.c_Q is not None or self.heads.c_K is not None

    def with_constant(self, x: Float[Tensor, "... D"]) -> Tensor:
        """What heads read, with a 1 appended if they have biases."""
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.has_constant else x

    def token_scalars(
        self,
        layer: int,
        side: Side,
        x: Float[Tensor, "*tokens D"],
        position: Int[Tensor, "*tokens"],
        *,
        head: int | None = None,
    ) -> Float[Tensor, "*tokens head"] | None:
        """What tokens are multiplied with before a layer's heads read them as queries or keys; None for nothing.

        A norm of queries or keys divides by one number per token and head, and a temperature of attention multiplies
        queries by one per position.

        Args:
            layer: Number of the layer, among those with attention.
            side: As queries, or as keys (then of key heads).
            x: What the heads read.
            position: Positions of the tokens.
            head: For this head (or key head) alone.
        """
        form = self.layers[layer]
        W, b, norm = (form.W_Q, form.b_Q, form.q_norm) if side == "query" else (form.W_K, form.b_K, form.k_norm)
        one = None if head is None else slice(head, head + 1)
        if one is not None and (norm is None or not norm.is_over_heads):  # else its number needs the other heads
            W, b, one = W[one], None if b is None else b[one], None
        scalars = None
        if norm is not None:
            projected = torch.einsum("...d,hid->...hi", x, W.to(x))
            scalars = norm.scalars(projected if b is None else projected + b.to(x))
        temperature = form.temperature(position) if side == "query" else None
        if temperature is not None:
            scalars = temperature[..., None] * (torch.ones(len(W)).to(x) if scalars is None else scalars)
        if scalars is None:
            return None
        return (scalars if one is None else scalars[..., one]).to(x)

    def normed_keys(
        self, layer: int, keys: Float[Tensor, "... key_head H"]
    ) -> tuple[Float[Tensor, "... key_head H"], Float[Tensor, "... key_head"] | None]:
        """Projected keys after their norm, but for gains between rotations, and what it has multiplied them with."""
        norm = self.layers[layer].k_norm
        return (keys, None) if norm is None else (norm(keys).to(keys), norm.scalars(keys).to(keys))

    def read(
        self, layer: int, x: Float[Tensor, "*tokens D"], scalars: Tensor | None
    ) -> Float[Tensor, "*tokens head H"]:
        """Tokens (with their constant) as queries in the orthonormal bases Q_q of a layer's heads, float64."""
        Q = self.Q_q[layer]
        n = x.shape[-1]
        a = torch.einsum("...d,hdi->...hi", x, Q[:, :n]).double()
        if scalars is not None:
            a = a * scalars[..., None].double()
        return a + Q[:, n].double() if self._has_shift else a

    def tokens_of_head(
        self, layer: int, head: int, side: Side, x: Float[Tensor, "*batch n D"], position: Int[Tensor, "n"]
    ) -> Float[Tensor, "*batch n D1"]:
        """Tokens as one head reads them: times the token's scalar, and with a constant for each kind of bias."""
        own = head if side == "query" else head // self.repeats
        scalars = self.token_scalars(layer, side, x, position.expand(x.shape[:-1]), head=own)
        token = self.with_constant(x)
        if scalars is not None:
            token = token * scalars
        return torch.cat([token, torch.ones_like(token[..., :1])], dim=-1) if self._has_shift else token

    def weights(self, layer: int, head: int, side: Side) -> Float[Tensor, "H D"]:
        """What makes a head's queries or keys of what it reads; biases are last columns, if heads have biases."""
        letter = "Q" if side == "query" else "K"
        W: Tensor = getattr(self.heads, f"W_{letter}")[layer, head]
        if not self.heads.has_bias:
            return W
        columns = []
        for kind in "bc":
            if any(getattr(self.heads, f"{kind}_{one}") is not None for one in "QK"):
                bias = getattr(self.heads, f"{kind}_{letter}")
                columns.append(W.new_zeros(self.d_head) if bias is None else bias[layer, head])
        return torch.cat([W, torch.stack(columns, dim=-1)], dim=-1)

    def outside_of_queries(self, layer: int, scalars: Float[Tensor, "... head"] | None) -> Float[Tensor, "... head H"]:
        """Biases that no factor holds, as a layer's queries have them."""
        b, c = (self._outside[f"{kind}_Q"][layer] for kind in "bc")
        return b + c if scalars is None else b * scalars[..., None] + c

    def outside_of_keys(self, layer: int, scalars: Float[Tensor, "... key_head"] | None) -> Tensor:
        """The same of its keys [..., key_head, H]."""
        b, c = (self._outside[f"{kind}_K"][layer, :: self.repeats] for kind in "bc")
        return b + c if scalars is None else b * scalars[..., None] + c

    def outside(self, layer: int, head: int, side: Side, inside: Float[Tensor, "H R"]) -> Float[Tensor, "D R"]:
        """Vectors of the residual stream from their coordinates in the head's orthonormal basis (Q_q or Q_k)."""
        if side == "query":
            return self.Q_q[layer, head] @ inside.to(self.Q_q)
        rows = self.to_key[layer, head // self.repeats].mT @ inside.double()
        vectors: Tensor = self.weights(layer, head, side).mT @ rows.to(self.Q_q)
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
        self._firings.find(tokens.to(self.heads.W_Q.device), length, rule, take, query=query)

    # ---- decomposition ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decompose(self, observed: Observed, key: Int[Tensor, "batch"]) -> Decomposition:
        """Contributions of all keys; see :func:`decompose_attention`."""
        key = checked_keys(key, observed.query)
        whole = self._rotated(observed, observed.keys)
        read = self._read(observed)
        q = self._query_vectors(observed, read)
        self._check_scores(observed, q, whole)
        a = self._turned(observed, self._moved(observed, read))
        rotated = self._rotated(observed, self._own_keys(observed)) if self.is_separate else whole
        z = self._seen_from_query(observed, rotated)
        contributions = z.new_empty(*z.shape)
        for group, basis in self.groups(observed, key):
            U = basis.U.double()
            left = a[:, :, group] @ U
            contributions[:, :, group] = left[..., None, :] * (z[:, :, group] @ U[:, :, None])
        hidden = ~observed.is_key[:, None]
        contributions = contributions.masked_fill_(hidden[..., None], 0)
        beside = torch.zeros_like(contributions[..., 0])
        if observed.position is not None:
            beside = beside + observed.position.double()
        if self.is_separate:
            beside = beside + self._of_biases_at(observed, q, whole, rotated)
        beside = beside.masked_fill(hidden, 0)
        return Decomposition(contributions.float(), (contributions.sum(-1) + beside).float(), beside.float())

    @torch.inference_mode()
    def attended(self, observed: Observed, key: Int[Tensor, "batch"]) -> AttendedScores:
        """Scores of the attended keys relative to the other keys, in singular coordinates [layer, head, batch, R].

        NaN where there is nothing to compare: a query that sees one key only, or a layer in which a sliding window
        hides the attended key.

        Raises:
            InputError: As :func:`decompose_attention`.
            CheckpointError: As there.
        """
        key = checked_keys(key, observed.query)
        whole = self._rotated(observed, observed.keys)
        read = self._read(observed)
        q = self._query_vectors(observed, read)
        error = self._check_scores(observed, q, whole)
        a = self._turned(observed, self._moved(observed, read))
        keys = self._own_keys(observed)
        rotated = self._rotated(observed, keys) if self.is_separate else whole
        at_key = _at_key(rotated, observed.is_key, key)
        of_biases = None
        if self.is_separate:
            of_biases = self._of_biases_at(observed, q, _at_key(whole, observed.is_key, key), at_key)
        of_position = None
        if observed.position is not None:
            of_position = _at_key(observed.position.permute(0, 2, 3, 1)[..., None], observed.is_key, key)
        z = self._seen_from_query(observed, at_key)
        to_key = self.to_key.repeat_interleave(self.repeats, dim=1)
        seen = self._of_heads(at_key) if self.is_fixed else _at_key(keys, observed.is_key, key).double()
        seen = seen if self.is_fixed else seen.repeat_interleave(self.repeats, dim=3)
        coordinates = torch.einsum("lhij,lbmhj->lhbmi", to_key, seen)
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
            **self.kept_beside(of_biases, None if of_position is None else of_position[..., 0].permute(0, 3, 1, 2)),
        )

    def svd(self, observed: Observed, query: int, key: int) -> HeadSVD:
        """Core SVD [layer, head, H, R] of the offset from a query position to a key position."""
        has_offsets = self._has_offsets(observed.rotation)
        # gains between the two rotations make it depend on both positions
        which = (0, 0) if not has_offsets else (query, key) if self._gain is not None else (0, key - query)
        if which in self._bases:
            self._bases.move_to_end(which)
            return self._bases[which]
        A_k = self.A_k.repeat_interleave(self.repeats, dim=1)
        turn = None
        if has_offsets:
            assert observed.rotation is not None
            turn = torch.stack([self._turn_at(i, angles, query, key) for i, angles in enumerate(observed.rotation)])
        basis = self.svd_of(self.A_q, A_k, turn)
        self._bases[which] = basis
        if len(self._bases) > _KEPT_OFFSETS:
            self._bases.popitem(last=False)
        return basis

    def _turn_at(self, layer: int, angles: tuple[Tensor, Tensor] | None, query: int, key: int) -> Tensor:
        """Turn between two positions of a layer's heads [head, H, H]."""
        eye = torch.eye(self.d_head, dtype=torch.float64, device=self.A_q.device)
        if angles is not None:
            cos, sin = angles
            eye = self.turn(layer, slice(None), cos[query], sin[query], cos[key], sin[key])
        return eye.expand(self.n_heads, -1, -1)

    def _has_offsets(self, rotation: Rotation | None) -> bool:
        """True if the basis depends on the offset from query to key."""
        return rotation is not None and not self.is_fixed

    @property
    def has_one_basis_per_offset(self) -> bool:
        """False if the basis depends on both positions, and not on the offset alone."""
        return self._gain is None

    def gain(self, layer: int) -> Float[Tensor, "head H"] | None:
        """Gains of a layer between the rotations of two positions, float64; None for none."""
        return None if self._gain is None else self._gain[layer]

    def turn(
        self, layer: int, head: slice | Tensor, cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor
    ) -> Float[Tensor, "*heads H H"]:
        """M_p^T G M_j of some heads, from cosines and sines of the query's position and of the key's [..., rotary]."""
        eye = torch.eye(self.d_head, dtype=torch.float64, device=cos_q.device).expand(*cos_q.shape[:-1], -1, -1)
        layout = self.layers[layer].layout
        # rotate turns rows, so M is transposed
        at_query, at_key = (
            rotate(eye, cos.double()[..., None, :], sin.double()[..., None, :], layout=layout)
            for cos, sin in ((cos_q, sin_q), (cos_k, sin_k))
        )
        gain = self.gain(layer)
        if gain is not None:
            at_query = at_query * gain[head][..., None, :]
        elif isinstance(head, slice):
            at_query = at_query[None]  # the same for all heads
        turned: Tensor = at_query @ at_key.mT
        return turned

    def svd_of(self, A_q: Tensor, A_k: Tensor, turn: Tensor | None) -> HeadSVD:
        """SVD of cores [..., H, H], with a turn in between."""
        core = A_q @ A_k.mT if turn is None else A_q @ turn @ A_k.mT
        U, S, V = verified_svd(core * self.heads.scale)
        # float32 is enough for orthonormal columns; the sums over them stay exact to 1e-7
        return HeadSVD(U.float(), S.float(), V.float())

    def groups(self, observed: Observed, key: Tensor) -> list[tuple[Tensor, HeadSVD]]:
        """Prompts with the same basis, each group with it."""
        query = observed.query
        which = torch.zeros_like(key)
        if self._has_offsets(observed.rotation):
            which = key - query if self._gain is None else query * (int(query.max()) + 1) + key
        groups = []
        for one in sorted(set(which.tolist())):
            members = (which == one).nonzero().squeeze(-1)
            first = int(members[0])
            groups.append((members, self.svd(observed, int(query[first]), int(key[first]))))
        return groups

    def _own_keys(self, observed: Observed) -> Tensor:
        """Key vectors as singular pairs have them, before rotation [layer, batch, n, key_head, H]."""
        if not self.is_separate:
            return observed.keys
        of_key = observed.of_key
        outside = [self.outside_of_keys(i, None if of_key is None else of_key[i]) for i in range(self.n_layers)]
        return torch.stack([keys - bias.to(keys) for keys, bias in zip(observed.keys, outside, strict=True)])

    def _rotated(self, observed: Observed, keys: Tensor) -> Tensor:
        """Key vectors as the scores see them, but for gains [layer, batch, n, key_head, H]."""
        return self._rotate(observed, keys, lambda part: part[None, :, None])

    def _rotate(
        self, observed: Observed, vectors: Tensor, place: Callable[[Tensor], Tensor], *, transpose: bool = False
    ) -> Tensor:
        """Rotate vectors [layer, ..., H]; ``place`` brings angles [n, rotary] to where they are needed."""
        if observed.rotation is None:
            return vectors
        return torch.stack(
            [
                own
                if angles is None
                else rotate(own, *(place(part).to(own) for part in angles), layout=form.layout, transpose=transpose)
                for own, angles, form in zip(vectors, observed.rotation, self.layers, strict=True)
            ]
        )

    def _of_heads(self, keys: Float[Tensor, "layer batch m key_head H"]) -> Float[Tensor, "layer batch m head H"]:
        """Rotated keys as each query head sees them, float64."""
        of_heads = keys.double().repeat_interleave(self.repeats, dim=3)
        return of_heads if self._gain is None else of_heads * self._gain[:, None, None]

    def _read(self, observed: Observed) -> Tensor:
        """What the heads read at the query, in the orthonormal basis Q_q [layer, head, batch, H]."""
        of = observed.of_query
        parts = [self.read(i, observed.x[i], None if of is None else of[i].T) for i in range(self.n_layers)]
        return torch.stack(parts).transpose(1, 2)

    def _outside_of_queries(self, observed: Observed) -> Float[Tensor, "layer head batch H"]:
        """Biases of the queries that no factor holds."""
        of = observed.of_query
        parts = [self.outside_of_queries(i, None if of is None else of[i].T) for i in range(self.n_layers)]
        outside = torch.stack(parts)
        return outside[:, :, None] if of is None else outside.transpose(1, 2)

    def _query_vectors(self, observed: Observed, read: Tensor) -> Tensor:
        """Query vectors, with their biases and before rotation [layer, head, batch, H]."""
        return torch.einsum("lhbi,lhij->lhbj", read, self.A_q) + self._outside_of_queries(observed)

    def _moved(self, observed: Observed, read: Tensor) -> Tensor:
        """What heads read, with the biases moved into it where that is asked for."""
        if not self.moves_biases:
            return read
        return read + torch.einsum("lhij,lhbj->lhbi", self.to_query, self._outside_of_queries(observed))

    def of_biases(self, q: Tensor, own_q: Tensor, keys: Tensor, own_keys: Tensor) -> Tensor:
        """What biases add to scores, from queries [..., H] and keys [..., m, H] with and without them, all in place."""
        scores = (keys @ q[..., None] - own_keys @ own_q[..., None]).squeeze(-1)
        return scores * self.heads.scale

    def _of_biases_at(self, observed: Observed, q: Tensor, keys: Tensor, own_keys: Tensor) -> Tensor:
        """The same, of rotated keys [layer, batch, m, key_head, H]; q is not rotated. [layer, head, batch, m]."""
        queries = [
            self._rotate(observed, query, lambda part: part[None, observed.query])
            for query in (q, q - self._outside_of_queries(observed))
        ]
        of_heads = (self._of_heads(key).permute(0, 3, 1, 2, 4) for key in (keys, own_keys))
        return self.of_biases(*queries, *of_heads)

    def kept_beside(self, of_biases: Tensor | None, of_position: Tensor | None) -> dict[str, Tensor]:
        """Fields of :class:`AttendedScores`, from relative and raw values [..., n, 2] -> [..., n]."""
        fields: dict[str, Tensor] = {}
        for name, values in (("bias", of_biases if self.is_separate else None), ("position", of_position)):
            if values is not None:
                fields |= {name: values[..., 0].float(), f"raw_{name}": values[..., 1].float()}
        return fields

    def _turned(self, observed: Observed, a: Tensor) -> Tensor:
        """With a fixed basis, queries with their positions moved into them (x~); else as they are."""
        if not self.is_fixed or observed.rotation is None:
            return a
        turned: Tensor = (
            self._rotate(observed, a @ self.A_q, lambda part: part[None, observed.query]) @ self.to_query.mT
        )
        return turned

    def _seen_from_query(self, observed: Observed, rotated: Tensor) -> Tensor:
        """Keys in the basis Q_q of each query head [layer, head, batch, n, H], float64."""
        of_heads = self._of_heads(rotated)
        if self._has_offsets(observed.rotation):
            # relative to the query, a key is rotated back by the query's position
            of_heads = self._rotate(observed, of_heads, lambda part: part[observed.query, None, None], transpose=True)
        return torch.einsum("lhij,lbnhj->lhbni", self.A_q * self.heads.scale, of_heads)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_keys(self, layer: int, x: Tensor, keys: Float[Tensor, "batch key_head H"], position: Tensor) -> None:
        """Compare keys with W_K times what the heads read at the same tokens: no score depends on W_K itself.

        Raises:
            InputError: They are other vectors.
        """
        form = self.layers[layer]
        projected = torch.einsum("bd,hid->bhi", x, form.W_K.to(x))
        expected, _ = self.normed_keys(layer, projected if form.b_K is None else projected + form.b_K.to(x))
        if not bool(torch.isfinite(keys).all()):
            return  # said as an overflow
        difference = float((expected - keys).abs().max() / keys.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        if difference > max(_NOT_BILINEAR, 4 * tolerance(self.dtype)):
            raise InputError(
                f"the keys of layer {form.block} of {model_name(self.bridge)} are not W_K times what its heads read "
                f"(off by {difference:.2g} of the largest), as where layers share keys. Allowed: keys that a layer "
                "projects itself. Fix: use another model."
            )

    def _check_scores(self, observed: Observed, q: Tensor, rotated: Tensor) -> Tensor:
        """Compare all scores, computed from the same factors as the decomposition, with those of the model.

        Args:
            observed: What the pass has left.
            q: Query vectors, before rotation [layer, head, batch, H].
            rotated: Key vectors as the scores see them, but for gains [layer, batch, n, key_head, H].

        Returns:
            Largest difference, relative to the largest score [layer, head].

        Raises:
            InputError: They differ, so much that it is no rounding.
            CheckpointError: They differ by more than rounding explains.
        """
        towards = q.transpose(1, 2) * self.heads.scale
        towards = self._rotate(observed, towards, lambda part: part[observed.query, None])
        if self._gain is not None:
            towards = towards * self._gain[:, None]
        n_layers, n_batch = towards.shape[:2]
        grouped = towards.reshape(n_layers, n_batch, -1, self.repeats, self.d_head).to(rotated.dtype)
        scores = (grouped @ rotated.permute(0, 1, 3, 4, 2)).flatten(2, 3).transpose(1, 2)
        if observed.position is not None:
            scores = scores + observed.position.to(scores)
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
        dtype = coarser(observed.scores.dtype, self.dtype)
        beyond = difference > tolerance(dtype) * torch.maximum(size, usual)
        if bool(beyond.any()):
            worst = torch.where(beyond, error, 0.0)
            layer, head = divmod(int(worst.argmax()), self.n_heads)
            by = float(worst.max())
            form = self.layers[layer]
            if form.clip is not None:
                share = float((observed.keys[layer].abs() > form.clip).float().mean())
                raise InputError(
                    f"queries and keys of layer {form.block} are clipped to {form.clip:g} on these prompts (of the "
                    f"keys, {share:.2%} of the components). Allowed: prompts on which nothing is clipped, as clipping "
                    "is not linear. Fix: change the prompts, or use another model."
                )
            if by > _NOT_BILINEAR:
                raise InputError(
                    f"the scores of head {head} in layer {form.block} are not the bilinear form of its weights (off by "
                    f"{by:.2g} of the largest). Allowed: dot products with biases, norms of queries and keys, rotary "
                    "positions, ALiBi, grouped queries and soft caps. Fix: use another model."
                )
            raise off(form.block, head, by, dtype)
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


def _at_least_float32(heads: AttentionHeads) -> AttentionHeads:
    """Heads whose factorizations are not rounded to half precision."""
    wide = torch.promote_types(heads.W_Q.dtype, torch.float32)
    parts: dict[str, Any] = {name: getattr(heads, name) for name in PARTS}
    wider: dict[str, Any] = {name: None if part is None else part.to(wide) for name, part in parts.items()}
    return replace(heads, **wider)


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
