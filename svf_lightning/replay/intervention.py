"""Interventions at the queries of prompts: on the score of a key, and on directions that a head reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.probe import Move, Outcome, Side
from svf_lightning.replay.continuation import Continuation, Hooks, LastToken
from svf_lightning.replay.decompose import HeadSpace, Observed
from svf_lightning.replay.prompts import PromptBatch
from svf_lightning.rotary import rotate

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
        counterfactuals: Token ids of other prompts by name, each as long as the one that it stands beside.

    Raises:
        InputError: Counterfactuals of another shape.
    """

    def __init__(
        self,
        space: HeadSpace,
        observed: Observed,
        prompts: PromptBatch,
        counterfactuals: Mapping[str, Int[Tensor, "batch n"]] | None = None,
    ) -> None:
        self.space, self.observed, self.prompts = space, observed, prompts
        self._tokens = {"": prompts.tokens, **(counterfactuals or {})}
        for name, tokens in self._tokens.items():
            if tokens.shape != prompts.tokens.shape:
                raise bad_value(
                    f"tokens of {name!r}", tuple(tokens.shape), f"{tuple(prompts.tokens.shape)}, as the prompts",
                    "pad them alike",
                )  # fmt: skip
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
        return self._continuation.run(lambda group: []).double().log_softmax(-1)

    # ---- what to move along ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def singular_vectors(self, head: int, side: Side) -> Float[Tensor, "batch D R"]:
        """Left (query) or right (key) singular vectors of a head in the residual stream, in each prompt's basis."""
        if (head, side) not in self._vectors:
            space, (layer, i) = self.space, divmod(head, self.space.n_heads)
            n = len(self.prompts)
            found = space.heads.W_Q.new_empty(n, space._Q_q.shape[-2], space.rank)
            for group, basis in space._groups(self.observed, self.prompts.key):
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
        layer = head // self.space.n_heads
        x = self._reads("", [layer])[layer]
        position = torch.arange(x.shape[1], device=x.device)
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

        return self._run(changing, change)

    @torch.inference_mode()
    def run(self, moves: Sequence[Move]) -> Outcome:
        """Run the model with other inputs of some heads.

        A head's other scores, and what other heads read, are those of the model in the changed run.

        Raises:
            InputError: An unknown source.
        """
        by_layer: dict[int, list[Move]] = {}
        for move in moves:
            if move.source not in self._tokens:
                raise bad_value("source", move.source, f"one of {self.sources}", "give prompts with counterfactuals")
            by_layer.setdefault(move.head // self.space.n_heads, []).append(move)
        for source in {"", *(move.source for move in moves)} if moves else ():
            self._reads(source, sorted(by_layer))
        live: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(x: Tensor, hook: object) -> None:
                live[layer] = self._with_bias(x)

            return hook

        def change(group: LastToken, layer: int, scores: Tensor) -> Tensor:
            added = torch.zeros_like(scores)
            heads = sorted({move.head for move in by_layer[layer]})
            for head in heads:
                its = [move for move in by_layer[layer] if move.head == head]
                change = self._change_of_scores(group, layer, head % self.space.n_heads, its, live[layer])
                added[:, head % self.space.n_heads, 0] = change.to(scores)
            return self._shifted(layer, scores, added)

        more: Hooks = [(f"blocks.{layer}.attn.hook_in", keep(layer)) for layer in by_layer]
        return self._run(set(by_layer), change, more)

    def _run(self, layers: set[int], change: ChangeScores, more: Hooks | None = None) -> Outcome:
        """Run the last tokens with the scores of some layers changed."""
        prompts, n_layers = self.prompts, self.space.n_layers
        attention = torch.zeros(n_layers, self.space.n_heads, len(prompts), device=prompts.query.device)

        def hooks_of(group: LastToken) -> Hooks:
            at = torch.arange(len(group.prompts), device=prompts.query.device)

            def changed(layer: int) -> Callable[..., Tensor]:
                def hook(scores: Tensor, hook: object) -> Tensor:
                    return change(group, layer, scores)

                return hook

            def keep(layer: int) -> Callable[..., None]:
                def hook(pattern: Tensor, hook: object) -> None:
                    on_key = pattern[at, :, 0, prompts.key[group.prompts]]
                    attention[layer][:, group.prompts] = on_key.T.float()

                return hook

            hooks: Hooks = [(f"blocks.{layer}.attn.hook_pattern", keep(layer)) for layer in range(n_layers)]
            hooks += [(f"blocks.{layer}.attn.hook_attn_scores", changed(layer)) for layer in sorted(layers)]
            return [*(more or []), *hooks]

        logits = self._continuation.run(hooks_of)
        at = torch.arange(len(prompts), device=logits.device)
        difference = logits[at, prompts.correct] - logits[at, prompts.wrong]
        after = logits.double().log_softmax(-1)
        divergence = (self._untouched.exp() * (self._untouched - after)).sum(-1)
        return Outcome(attention, difference.float(), divergence.float())

    # ---- one head ----------------------------------------------------------------------------------------------------

    def _change_of_scores(
        self, group: LastToken, layer: int, head: int, moves: list[Move], live: Tensor
    ) -> Float[Tensor, "m key"]:
        """New minus old scores of a head, for the query's token and every key that it sees."""
        space, observed, n = self.space, self.observed, group.position + 1
        prompts = group.prompts
        x: dict[Side, Tensor] = {"query": live, "key": torch.cat([self._read["", layer][prompts, : n - 1], live], dim=1)}
        moved = dict(x)
        for move in moves:
            other = None
            if move.source:
                whole = self._read[move.source, layer][prompts, :n]
                other = whole[:, -1:] if move.side == "query" else whole
            moved[move.side] = moved[move.side] + _moved_by(move, prompts, x[move.side], other)
        positions: dict[Side, slice] = {"query": slice(n - 1, n), "key": slice(0, n)}
        towards = {}
        for which, inputs in (("old", x), ("new", moved)):
            for side, at in positions.items():
                vectors = inputs[side] @ space.weights(layer, head, side).T
                if observed.rotation is not None:
                    cos, sin = (part[layer, at] for part in observed.rotation)
                    vectors = rotate(vectors, cos, sin, layout=space._layout)
                towards[which, side] = vectors
        new, old = (
            torch.einsum("bh,bjh->bj", towards[which, "query"][:, 0], towards[which, "key"]) for which in ("new", "old")
        )
        return ((new - old) * space.heads.scale).masked_fill(~observed.is_key[layer, prompts, :n], 0)

    def _shifted(self, layer: int, scores: Tensor, added: Tensor) -> Tensor:
        """Scores after a soft cap, with something added before it."""
        cap = self.space._caps[layer]
        if cap is None:
            return scores + added
        capped = cap * torch.tanh(torch.atanh((scores / cap).clamp(-_CAPPED, _CAPPED)) + added / cap)
        return torch.where(added == 0, scores, capped)

    def _with_bias(self, x: Tensor) -> Tensor:
        """What heads read, with a 1 appended if they have biases; float32 at least."""
        x = x.to(self.space.heads.W_Q.dtype)
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.space.heads.has_bias else x

    def _reads(self, source: str, layers: Sequence[int]) -> dict[int, Tensor]:
        """What the heads of some layers read at every position [batch, n, D]; kept, as one run follows another."""
        missing = [layer for layer in layers if (source, layer) not in self._read]

        def keep(layer: int) -> Callable[..., None]:
            def hook(x: Tensor, hook: object) -> None:
                self._read[source, layer] = self._with_bias(x)

            return hook

        if missing:
            hooks: Hooks = [(f"blocks.{layer}.attn.hook_in", keep(layer)) for layer in missing]
            self.space.bridge.run_with_hooks(self._tokens[source], fwd_hooks=hooks)
        return {layer: self._read[source, layer] for layer in layers}


def _moved_by(move: Move, prompts: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    """How far a move takes x [m, t, D]; ``other`` is what is read in the prompts that the move takes from."""
    factor = move.factor[prompts, None, None].to(x) if isinstance(move.factor, Tensor) else move.factor

    def along(directions: Tensor) -> Tensor:
        now = x @ directions
        return (now * factor if other is None else other @ directions) - now

    directions = move.directions[prompts].to(x)
    change = along(directions)
    if move.as_far_as is not None:
        length = along(move.as_far_as[prompts].to(x)).norm(dim=-1, keepdim=True)
        change = change * (length / change.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    return change @ directions.mT
