"""Firings of attention heads in a forward pass: query-key pairs with much attention, in singular coordinates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.heads import HeadSVD
from svf_lightning.probe import AttendedScores, FiringBatch, FiringRule
from svf_lightning.replay.observed import check_positions, coarser, off, tolerance
from svf_lightning.replay.taps import Shown
from svf_lightning.rotary import rotate

if TYPE_CHECKING:
    from svf_lightning.replay.decompose import HeadSpace

_KEPT_BYTES = 2**28  # of the SVDs of single heads that firings are decomposed with


class FiringFinder:
    """Finds firings of all heads of a model, and keeps the singular bases that they were decomposed in.

    Args:
        space: The model's heads.
    """

    def __init__(self, space: HeadSpace) -> None:
        self.space = space
        self._bases: OrderedDict[tuple[int, int, int, int], HeadSVD] = OrderedDict()

    def find(
        self,
        tokens: Int[Tensor, "batch n"],
        length: Int[Tensor, "batch"],
        rule: FiringRule,
        take: Callable[[FiringBatch], None],
        *,
        query: Int[Tensor, "batch"] | None = None,
    ) -> None:
        """See :meth:`svf_lightning.replay.HeadSpace.find_firings`."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        asks = position < length.to(position.device)[:, None]  # [batch, n]
        if not rule.every_query:
            if query is None:
                raise bad_value("query", None, "a position for each prompt with every_query=False", "pass query=...")
            check_positions("query", query, len(tokens), tokens.shape[1] - 1)
            asks &= position == query.to(position.device)[:, None]
        visible = self.space.visible(position, len(position))

        def take_layer(layer: int, shown: Shown) -> None:
            found = self._firings_of_layer(layer, shown, visible[layer], asks, rule)
            if found is not None:
                take(found)

        self.space.taps.run(tokens, take_layer)

    def _firings_of_layer(
        self, layer: int, shown: Shown, is_key: Tensor, asks: Tensor, rule: FiringRule
    ) -> FiringBatch | None:
        """The firings of one layer, from what it shows; ``asks``: queries that count; None if there are none."""
        space, own, pattern = self.space, shown["scores"], shown["pattern"]
        layout = space.layers[layer].layout
        position = torch.arange(pattern.shape[-1], device=pattern.device)
        n_keys = is_key.sum(-1)  # is_key is [query, key]
        fires = is_key & (pattern >= rule.threshold(n_keys)[:, None]) & (own > 0)
        fires &= asks[:, None, :, None]
        fires[..., 0] &= rule.first_token
        fires &= (position[:, None] != position) | rule.self_attention
        prompt, head, query, key = fires.nonzero(as_tuple=True)
        if not len(head):
            return None
        x, projected = (shown[name].to(space.heads.W_Q.dtype) for name in ("x", "keys"))
        of_query = space.token_scalars(layer, "query", x, position.expand(x.shape[:-1]))
        keys, of_key = space.normed_keys(layer, projected)
        a = space.read(layer, space.with_constant(x), of_query)[prompt, query, head]
        outside = space.outside_of_queries(layer, of_query)
        outside = outside[head] if of_query is None else outside[prompt, query, head]
        cos = sin = None
        if "cos" in shown:  # a layer without positions (NoPE) has none
            cos, sin = shown["cos"], shown["sin"]
        gain = space.gain(layer)

        def in_place(vectors: Tensor) -> Tensor:
            """Keys as the scores see them, but for gains."""
            if cos is None or sin is None:
                return vectors
            return rotate(vectors, cos[:, None], sin[:, None], layout=layout)

        is_alone = (n_keys == 1)[query][:, None]
        others = (n_keys[query] - 1)[:, None]

        def at_key(vectors: Tensor) -> Tensor:
            """Relative and raw key vectors [n, 2, H], as :func:`_at_key`."""
            group = head // space.repeats
            of_key = vectors[prompt, key, group].double()
            total = torch.einsum("qk,bkhi->bqhi", is_key.to(vectors), vectors)[prompt, query, group].double()
            relative = (of_key - (total - of_key) / others).masked_fill(is_alone, torch.nan)
            return torch.stack([relative, of_key], dim=1)

        def as_seen(vectors: Tensor) -> Tensor:
            """The same of rotated keys, with the gains of the query's head."""
            found = at_key(vectors)
            return found if gain is None else found * gain[head][:, None]

        whole = as_seen(in_place(keys))
        if space.is_separate:
            keys = keys - space.outside_of_keys(layer, of_key).to(keys)
        seen = seen_there = as_seen(in_place(keys)) if space.is_separate else whole
        direction = seen if cos is None or space.is_fixed else at_key(keys)
        A_q, to_key = space.A_q[layer], space.to_key[layer]
        has_offsets = cos is not None and not space.is_fixed
        if has_offsets and cos is not None and sin is not None:  # relative to the query
            at = [part[query][:, None].double() for part in (cos, sin)]
            seen = rotate(seen, *at, layout=layout, transpose=True)
        n = len(position)
        # positions that stand for each firing's basis: the offset alone decides, unless gains stand between rotations
        first, second = torch.zeros_like(query), torch.zeros_like(key)
        if has_offsets:
            first, second = (query - key, second) if space.has_one_basis_per_offset else (query, key)
        codes, member = torch.unique((head * n + first) * n + second, return_inverse=True)
        order = member.argsort(stable=True)
        sizes = torch.bincount(member).tolist()
        wanted = [(code // (n * n), code // n % n, code % n) for code in codes.tolist()]
        bases = self._bases_of(layer, wanted, cos, sin)
        parts = {
            name: seen.new_empty(len(head), space.rank, dtype=torch.float32)
            for name in ("query", "key", "direction", "S", "raw_key", "raw_direction")
        }
        own_size = own.masked_fill(~is_key, 0).abs().amax()
        rebuilt = seen.new_empty(len(head))
        usual = seen.new_empty(len(head))
        of_biases = seen.new_zeros(len(head), 2)
        for (h, _, _), members, basis in zip(wanted, order.split(sizes), bases, strict=True):
            U, S, V = (part.double() for part in basis)

            def turned(vectors: Tensor, members: Tensor = members) -> Tensor:
                """Query vectors as the scores see them."""
                if cos is None or sin is None:
                    return vectors
                return rotate(vectors, *(part[query[members]].double() for part in (cos, sin)), layout=layout)

            own_q = a[members] @ A_q[h]
            q = own_q + outside[members]
            usual[members] = (q * space.heads.scale).norm(dim=-1) * whole[members, 1].norm(dim=-1) / space.d_head**0.5
            if space.is_separate:
                of_biases[members] = space.of_biases(turned(q), turned(own_q), whole[members], seen_there[members])
            of_query_at = a[members]
            if space.moves_biases:
                of_query_at = of_query_at + outside[members] @ space.to_query[layer, h].mT
            if space.is_fixed and cos is not None:
                of_query_at = turned(own_q if space.is_separate else q) @ space.to_query[layer, h].mT
            left = of_query_at @ U
            z = seen[members] @ (A_q[h].mT * space.heads.scale) @ U
            rebuilt[members] = (left * z[:, 1]).sum(-1) + of_biases[members, 1]
            v = direction[members] @ to_key[h // space.repeats].mT @ V
            values = (left, z[:, 0], v[:, 0], S.expand_as(left), z[:, 1], v[:, 1])
            for name, value in zip(parts, values, strict=True):
                parts[name][members] = value.float()
        of_position = None
        if "position" in shown:
            of_position = self._of_position(shown["position"].expand_as(own), is_key, prompt, head, query, key)
            rebuilt = rebuilt + of_position[:, 1]
        cap = space.caps[layer]
        if cap is not None:
            rebuilt = cap * (rebuilt / cap).tanh()
        at_pair = own[prompt, head, query, key]
        differs = (rebuilt - at_pair).abs()
        dtype = coarser(own.dtype, space.dtype)
        beyond = differs > tolerance(dtype) * usual.clamp_min(float(own_size))
        if bool(beyond.any()):
            worst = int(torch.where(beyond, differs, 0.0).argmax())
            raise off(space.layers[layer].block, int(head[worst]), float(differs[worst] / own_size), dtype)
        scores = AttendedScores(
            **parts,
            attention=pattern[prompt, head, query, key].float(),
            **space.kept_beside(of_biases, of_position),
        )
        return FiringBatch(layer * space.n_heads + head, prompt, query, key, scores)

    @staticmethod
    def _of_position(term: Tensor, is_key: Tensor, prompt: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A term of positions [batch, head, n, n] at the key, relative to the other keys and as it is [firing, 2]."""
        term = term.double()
        at = term[prompt, head, query, key]
        total = term.masked_fill(~is_key, 0).sum(-1)[prompt, head, query]
        others = is_key.sum(-1)[query] - 1
        return torch.stack([at - (total - at) / others, at], dim=1)

    def _bases_of(
        self, layer: int, wanted: list[tuple[int, int, int]], cos: Tensor | None, sin: Tensor | None
    ) -> list[HeadSVD]:
        """Core SVDs [H, R] of single heads of a layer, each for a position of the query and one of the key."""
        space = self.space
        missing = [one for one in wanted if (layer, *one) not in self._bases]
        if missing:
            head, query, key = torch.tensor(missing, device=space.A_q.device).T
            turn = None
            if cos is not None and sin is not None and not space.is_fixed:
                turn = space.turn(layer, head, cos[query], sin[query], cos[key], sin[key])
            made = space.svd_of(space.A_q[layer, head], space.A_k[layer, head // space.repeats], turn)
            for one, *parts in zip(missing, *made, strict=True):
                self._bases[layer, *one] = HeadSVD(*(part.clone() for part in parts))
        bases = []
        for one in wanted:
            self._bases.move_to_end((layer, *one))
            bases.append(self._bases[layer, *one])
        size = sum(part.nbytes for part in bases[0])
        while len(self._bases) > max(len(wanted), _KEPT_BYTES // size):
            self._bases.popitem(last=False)
        return bases
