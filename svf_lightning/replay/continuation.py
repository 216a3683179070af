"""Running the last token of prompts again, from the keys and values of all tokens before it.

What is done to the scores of a prompt's query changes nothing at earlier positions of a causal model, so these need not
be computed again: an intervention costs one token instead of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.replay.taps import Hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class LastToken(NamedTuple):
    """Prompts whose queries stand at the same position."""

    prompts: Int[Tensor, "m"]  # their numbers in the batch
    position: int
    past: list[tuple[Tensor, Tensor]]  # keys and values of the tokens before it, for each layer


class Continuation:
    """The queries of one batch of prompts, to be run again as often as asked for.

    Args:
        bridge: A ``TransformerBridge``.
        tokens: Token ids; shorter prompts are padded on the right.
        query: Positions of the queries, the last tokens that are looked at.
    """

    @torch.inference_mode()
    def __init__(self, bridge: TransformerBridge, tokens: Int[Tensor, "batch n"], query: Int[Tensor, "batch"]) -> None:
        from transformers import DynamicCache

        self.bridge = bridge
        self.tokens, self.query = tokens, query
        longest = int(query.max())
        layers: list[tuple[Tensor, Tensor]] = []
        if longest:
            cache = DynamicCache()  # without the model's configuration it keeps what a sliding window would drop
            _model(bridge)(tokens[:, :longest], past_key_values=cache, use_cache=True)
            kept: list[Any] = cache.layers
            layers = [(layer.keys, layer.values) for layer in kept]
        self.groups = []
        for position in sorted(set(query.tolist())):
            prompts = (query == position).nonzero().squeeze(-1)
            past = [(keys[prompts, :, :position], values[prompts, :, :position]) for keys, values in layers]
            self.groups.append(LastToken(prompts, position, past if position else []))

    @torch.inference_mode()
    def run(self, hooks_of: Callable[[LastToken], Hooks], copies: int = 1) -> Float[Tensor, "copies batch vocabulary"]:
        """Next-token logits at the queries, of several copies that go through the model together.

        Args:
            hooks_of: Hooks of the bridge for a group of m prompts. They see the query's token alone, of every prompt of
                the first copy, then of the second, and so on; and scores [copies * m, head, 1, key] for itself and all
                keys before it.
            copies: How many, to each of which the hooks may do something else.
        """
        from transformers import DynamicCache

        logits: Tensor | None = None
        for group in self.groups:
            token = self.tokens[group.prompts, group.position, None].repeat(copies, 1)
            past = [(keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)) for keys, values in group.past]
            cache = DynamicCache(past or None)
            with self.bridge.hooks(fwd_hooks=hooks_of(group)):
                found = _model(self.bridge)(token, past_key_values=cache, use_cache=True).logits[:, -1]
            if logits is None:
                logits = found.new_empty(copies, len(self.tokens), found.shape[-1])
            logits[:, group.prompts] = found.unflatten(0, (copies, -1))
        assert logits is not None
        return logits


def _model(bridge: TransformerBridge) -> Any:
    """The model of transformers whose parts the bridge has wrapped, in its own processing."""
    return bridge.original_model
