"""Interventions at the queries of prompts: on the score of a key, and on directions that a head reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from svf_lightning.errors import bad_value
from svf_lightning.probe import Move, Outcome, Side
from svf_lightning.replay.continuation import Continuation, LastToken
from svf_lightning.replay.decompose import HeadSpace
from svf_lightning.replay.observed import Observed
from svf_lightning.replay.prompts import PromptBatch
from svf_lightning.replay.taps import Hooks, block_hook
from svf_lightning.rotary import rotate

_ROWS = 256  # last tokens that go through the model together
_CAPPED = 1 - 1e-6  # a score at its cap would be infinite before the cap

ChangeScores = Callable[[LastToken, int, Tensor], Tensor]  # of a group, in a layer: [m, head, 1, key] to the same


class PromptInterventions:
    """Runs the queries of one batch of prompts again, with something changed.

    Only what the query's token does is changed: its scores before the softmax, which decide what each head reads from
    the earlier tokens. These are as they were, so only the last token is computed again
    (:class:`~svf_lightning.replay.continuation.Continuation`). See :class:`svf_lightning.probe.Interventions`.

    Args:
        space: The model's heads.
        observed: What a pass over the prompts has left.
        prompts: The prompts.
    """

    def __init__(self, space: HeadSpace, observed: Observed, prompts: PromptBatch) -> None:
        self.space, self.observed, self.prompts = space, observed, prompts
        self._tokens = {"": prompts.tokens, **prompts.counterfactuals}
        self._read: dict[tuple[str, int], Tensor] = {}
        self._vectors: dict[tuple[int, Side], Tensor] = {}

    @property
    def sources(self) -> list[str]:
        """Names of the counterfactuals."""
        return [name for name in self._tokens if name]

    @cached_property
    def _continuation(self) -> Continuation:
        return Continuation(self.space.bridge, self.prompts.tokens, self.prompts.query)

    @cached_property
    def _untouched(self) -> Tensor:
        """Log-probabilities of the next token [batch, vocabulary]."""
        return self._continuation.run(lambda group: [])[0].double().log_softmax(-1)

    # ---- what to move along ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def singular_vectors(self, head: int, side: Side) -> Float[Tensor, "batch D R"]:
        """Left (query) or right (key) singular vectors of a head in the residual stream, in each prompt's basis."""
        if (head, side) not in self._vectors:
            space, (layer, i) = self.space, divmod(head, self.space.n_heads)
            n = len(self.prompts)
            found = space.heads.W_Q.new_empty(n, space.weights(layer, i, side).shape[-1], space.rank)
            for group, basis in space.groups(self.observed, self.prompts.key):
                inside = (basis.U if side == "query" else basis.V)[layer, i]
                found[group] = space.outside(layer, i, side, inside)
            self._vectors[head, side] = found
        return self._vectors[head, side]

    @torch.inference_mode()
    def residual_draws(self, head: int, n_draws: int, generator: torch.Generator) -> Float[Tensor, "batch D n_draws"]:
        """Random directions with the covariance of what a head reads, over all tokens of these prompts but the first.

        They are sums of centred residuals with Gaussian weights, so the covariance is that of the sample and need not
        be formed.
        """
        layer, i = divmod(head, self.space.n_heads)
        self._observe("", [layer])
        residuals = self._read["", layer]
        position = torch.arange(residuals.shape[1], device=residuals.device)
        x = self.space.tokens_of_head(layer, i, "query", residuals, position)
        seen = (position > 0) & (position <= self.prompts.query[:, None])
        sample = x[seen]
        sample = sample - sample.mean(0)
        weights = torch.randn(len(x), n_draws, len(sample), generator=generator, dtype=torch.float32).to(sample)
        drawn = (weights @ sample).mT
        directions: Tensor = torch.linalg.qr(drawn.double())[0].to(x.dtype)
        return directions

    # ---- runs ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def take_off(self, removed: Float[Tensor, "layer head batch"]) -> Outcome:
        """Run the model with an amount taken off each head's score of the key, before a soft cap and the softmax.

        Args:
            removed: What is taken off; 0 leaves a head alone.
        """
        changing = set(removed.flatten(1).any(1).nonzero().flatten().tolist())

        def change(group: LastToken, layer: int, scores: Tensor) -> Tensor:
            at = torch.arange(len(group.prompts), device=scores.device)
            added = torch.zeros_like(scores)
            added[at, :, 0, self.prompts.key[group.prompts]] = -removed[layer][:, group.prompts].T.to(scores)
            return self._shifted(layer, scores, added)

        (outcome,) = self._run(changing, change)
        return outcome

    @torch.inference_mode()
    def run(self, moves: Sequence[Move]) -> Outcome:
        """Run the model with other inputs of some heads; see :meth:`run_each`.

        Raises:
            InputError: An unknown source.
        """
        (outcome,) = self.run_each([moves])
        return outcome

    @torch.inference_mode()
    def run_each(self, variants: Sequence[Sequence[Move]]) -> list[Outcome]:
        """Run the model several times, each time with other inputs of some heads.

        A head's other scores, and what other heads read, are those of the model in the changed run.

        Raises:
            InputError: An unknown source.
        """
        moves = [move for variant in variants for move in variant]
        for move in moves:
            if move.source not in self._tokens:
                raise bad_value("source", move.source, f"one of {self.sources}", "give prompts with counterfactuals")
        layers = sorted({move.head // self.space.n_heads for move in moves})
        for source in {"", *(move.source for move in moves)} if moves else ():
            self._observe(source, layers)
        most = max(1, _ROWS // max(len(group.prompts) for group in self._continuation.groups))
        outcomes: list[Outcome] = []
        for start in range(0, len(variants), most):
            outcomes += self._run_together(variants[start : start + most])
        return outcomes

    def _run_together(self, variants: Sequence[Sequence[Move]]) -> list[Outcome]:
        """Run several variants as one batch."""
        by_head: dict[int, list[tuple[int, Move]]] = {}
        for i, variant in enumerate(variants):
            for move in variant:
                by_head.setdefault(move.head, []).append((i, move))
        layers = {head // self.space.n_heads for head in by_head}
        live: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(x: Tensor, hook: object) -> None:
                live[layer] = self._wide(layer, x)

            return hook

        def change(group: LastToken, layer: int, scores: Tensor) -> Tensor:
            added = _by_copy(torch.zeros_like(scores), len(variants))
            x = _by_copy(live[layer], len(variants))
            for head, moves in by_head.items():
                if head // self.space.n_heads == layer:
                    of = sorted({i for i, _ in moves})
                    places = [(of.index(i), move) for i, move in moves]
                    changed = self._change_of_scores(group, layer, head % self.space.n_heads, places, x[of])
                    added[of, :, head % self.space.n_heads, 0] = changed.to(scores)
            return self._shifted(layer, scores, added.flatten(0, 1))

        more: Hooks = [(self.space.layers[layer].read_hook, keep(layer)) for layer in sorted(layers)]
        return self._run(layers, change, more, copies=len(variants))

    def _run(self, layers: set[int], change: ChangeScores, more: Hooks | None = None, copies: int = 1) -> list[Outcome]:
        """Run copies of the last tokens with the scores of some layers changed."""
        prompts, n_layers = self.prompts, self.space.n_layers
        shape = (copies, n_layers, self.space.n_heads, len(prompts))
        attention = torch.zeros(shape, device=prompts.query.device)

        def hooks_of(group: LastToken) -> Hooks:
            at = torch.arange(len(group.prompts), device=prompts.query.device)

            def changed(layer: int) -> Callable[..., Tensor]:
                def hook(scores: Tensor, hook: object) -> Tensor:
                    return change(group, layer, scores)

                return hook

            def keep(layer: int) -> Callable[..., None]:
                def hook(pattern: Tensor, hook: object) -> None:
                    of_query = _by_copy(pattern[:, :, 0], copies)  # [copy, m, head, key]
                    on_key = of_query[:, at, :, prompts.key[group.prompts]]  # [m, copy, head]
                    attention[:, layer][..., group.prompts] = on_key.permute(1, 2, 0).float()

                return hook

            hooks: Hooks = [(self._hook(layer, "pattern"), keep(layer)) for layer in range(n_layers)]
            hooks += [(self._hook(layer, "attn_scores"), changed(layer)) for layer in sorted(layers)]
            return [*(more or []), *hooks]

        outcomes = []
        for weights, logits in zip(attention, self._continuation.run(hooks_of, copies), strict=True):
            difference = prompts.logit_difference(logits)
            after = logits.double().log_softmax(-1)
            divergence = (self._untouched.exp() * (self._untouched - after)).sum(-1)
            outcomes.append(Outcome(weights, difference.float(), divergence.float()))
        return outcomes

    # ---- one head ----------------------------------------------------------------------------------------------------

    def _change_of_scores(
        self, group: LastToken, layer: int, head: int, moves: Sequence[tuple[int, Move]], live: Tensor
    ) -> Float[Tensor, "copy m key"]:
        """New minus old scores of a head, for the query's token and every key that it sees.

        Args:
            group: The prompts.
            layer: The layer.
            head: The head in the layer.
            moves: Its moves, each with the number of its copy.
            live: What the head reads at the query's token [copy, m, 1, d_model].
        """
        space, observed, n = self.space, self.observed, group.position + 1
        prompts = group.prompts
        earlier = self._read["", layer][prompts, : n - 1].expand(len(live), -1, -1, -1)
        positions: dict[Side, slice] = {"query": slice(n - 1, n), "key": slice(0, n)}
        every = torch.arange(n, device=live.device)

        def as_read(side: Side, tokens: Tensor) -> Tensor:
            """Tokens as this head reads them; the number that a norm divides a token by is not changed by a move."""
            return space.tokens_of_head(layer, head, side, tokens, every[positions[side]])

        x: dict[Side, Tensor] = {
            "query": as_read("query", live),
            "key": as_read("key", torch.cat([earlier, live], dim=2)),
        }
        moved = dict(x)
        alike: dict[tuple[Side, str], list[tuple[int, Move]]] = {}
        for place in moves:
            alike.setdefault((place[1].side, place[1].source), []).append(place)
        for (side, source), its in alike.items():
            other = None
            if source:
                whole = self._read[source, layer][prompts, :n]
                other = as_read(side, whole[:, positions[side]])
            copies = torch.tensor([i for i, _ in its], device=live.device)
            change = displacement([move for _, move in its], prompts, x[side][copies], other)
            moved[side] = moved[side].index_add(0, copies, change)
        towards = {}
        for which, inputs in (("old", x), ("new", moved)):
            for side, at in positions.items():
                vectors = inputs[side] @ space.weights(layer, head, side).T
                angles = None if observed.rotation is None else observed.rotation[layer]
                if angles is not None:
                    cos, sin = (part[at] for part in angles)
                    vectors = rotate(vectors, cos, sin, layout=space.layers[layer].layout)
                gain = space.gain(layer)
                if gain is not None and side == "key":
                    vectors = vectors * gain[head].to(vectors)
                towards[which, side] = vectors
        new, old = (
            torch.einsum("cbh,cbjh->cbj", towards[which, "query"][:, :, 0], towards[which, "key"])
            for which in ("new", "old")
        )
        return ((new - old) * space.heads.scale).masked_fill(~observed.is_key[layer, prompts, :n], 0)

    def _shifted(self, layer: int, scores: Tensor, added: Tensor) -> Tensor:
        """Scores after a soft cap, with something added before it."""
        cap = self.space.caps[layer]
        if cap is None:
            return scores + added
        capped = cap * torch.tanh(torch.atanh((scores / cap).clamp(-_CAPPED, _CAPPED)) + added / cap)
        return torch.where(added == 0, scores, capped)

    def _hook(self, layer: int, name: str) -> str:
        """Name of a hook point of a layer, which is counted among those with attention."""
        return block_hook(self.space.layers[layer].block, name)

    def _wide(self, layer: int, x: Tensor) -> Tensor:
        """What the heads of a layer read, in float32 at least, from what its hook for it shows."""
        return self.space.layers[layer].tokens(x.to(self.space.heads.W_Q.dtype))

    def reads(self, source: str, layers: Sequence[int]) -> dict[int, Tensor]:
        """What the heads of some layers read at every position [batch, n, D], with a 1 appended if they have biases."""
        self._observe(source, layers)
        return {layer: self.space.with_constant(self._read[source, layer]) for layer in layers}

    def _observe(self, source: str, layers: Sequence[int]) -> None:
        """Keep what the heads of some layers read, unless that was done: one run follows another."""
        missing = [layer for layer in layers if (source, layer) not in self._read]

        def keep(layer: int) -> Callable[..., None]:
            def hook(x: Tensor, hook: object) -> None:
                self._read[source, layer] = self._wide(layer, x)

            return hook

        if missing:
            hooks: Hooks = [(self.space.layers[layer].read_hook, keep(layer)) for layer in missing]
            self.space.bridge.run_with_hooks(self._tokens[source], fwd_hooks=hooks)


def _by_copy(rows: Tensor, copies: int) -> Tensor:
    """Rows of all copies [copies * m, ...] as [copies, m, ...]."""
    return rows.view(copies, -1, *rows.shape[1:])


def displacement(
    moves: Sequence[Move], prompts: Int[Tensor, " m"], x: Float[Tensor, "move m t D"], other: Tensor | None
) -> Float[Tensor, "move m t D"]:
    """How far moves take what a head reads at t tokens of some prompts.

    Args:
        moves: Of one side, from one source.
        prompts: Numbers of the prompts.
        x: What is read.
        other: What is read in the prompts that the moves take from [m, t, D]; None for the prompts themselves.
    """
    factor = torch.stack([torch.as_tensor(move.factor, device=x.device).expand(len(move.directions)) for move in moves])
    factor = factor[:, prompts, None, None].to(x)

    def along(all_directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        most = max(directions.shape[-1] for directions in all_directions)
        wide = torch.stack(
            [pad(directions[prompts], (0, most - directions.shape[-1])) for directions in all_directions]
        ).to(x)
        now = x @ wide
        return (now * factor if other is None else other @ wide) - now, wide

    change, directions = along([move.directions for move in moves])
    if any(move.as_far_as is not None for move in moves):
        wanted, _ = along([move.directions if move.as_far_as is None else move.as_far_as for move in moves])
        tiny = torch.finfo(x.dtype).tiny
        change = change * (wanted.norm(dim=-1, keepdim=True) / change.norm(dim=-1, keepdim=True).clamp_min(tiny))
    return change @ directions.mT
