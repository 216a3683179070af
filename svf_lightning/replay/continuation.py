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

    Models whose past is more than keys and values (recurrent blocks), or that keep none, run the whole prompt again;
    hooks see the same.

    Args:
        bridge: A ``TransformerBridge``.
        tokens: Token ids; shorter prompts are padded on the right.
        query: Positions of the queries, the last tokens that are looked at.
    """

    @torch.inference_mode()
    def __init__(self, bridge: TransformerBridge, tokens: Int[Tensor, "batch n"], query: Int[Tensor, "batch"]) -> None:
        self.bridge = bridge
        self.tokens, self.query = tokens, query
        longest = int(query.max())
        layers = _past(bridge, tokens[:, :longest]) if longest else []
        self.is_whole = layers is None
        self.groups = []
        for position in sorted(set(query.tolist())):
            prompts = (query == position).nonzero().squeeze(-1)
            past = [(keys[prompts, :, :position], values[prompts, :, :position]) for keys, values in layers or []]
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
        logits: Tensor | None = None
        for group in self.groups:
            run = self._run_whole if self.is_whole else self._run_last
            found = run(group, hooks_of(group), copies)
            if logits is None:
                logits = found.new_empty(copies, len(self.tokens), found.shape[-1])
            logits[:, group.prompts] = found.view(copies, -1, found.shape[-1])
        assert logits is not None
        return logits

    def _run_last(self, group: LastToken, hooks: Hooks, copies: int) -> Tensor:
        """Logits after the last tokens, from the past."""
        from transformers import DynamicCache

        token = self.tokens[group.prompts, group.position, None].repeat(copies, 1)
        past = [(keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)) for keys, values in group.past]
        cache = DynamicCache(past or None)
        with self.bridge.hooks(fwd_hooks=hooks):
            logits: Tensor = _model(self.bridge)(token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    def _run_whole(self, group: LastToken, hooks: Hooks, copies: int) -> Tensor:
        """The same from the whole prompts."""
        tokens = self.tokens[group.prompts, : group.position + 1].repeat(copies, 1)
        of_last = [(name, _of_last_token(str(name), hook)) for name, hook in hooks]
        with self.bridge.hooks(fwd_hooks=of_last):
            logits: Tensor = _model(self.bridge)(tokens, use_cache=False).logits
        return logits[:, -1]


def _past(bridge: TransformerBridge, tokens: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of every layer; None for a model whose past is something else, or more."""
    from transformers import DynamicCache

    blocks: Any = bridge.blocks
    has_attention = [getattr(block, "attn", None) is not None for block in blocks]
    if getattr(_model(bridge), "_is_stateful", False) or not all(has_attention):
        return None
    cache = DynamicCache()  # without the model's configuration it keeps what a sliding window would drop
    try:
        _model(bridge)(tokens, past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # of models that want a cache of their own
        return None
    kept: list[Any] = cache.layers
    layers = [(layer.keys, layer.values) for layer in kept]
    is_whole = len(layers) == len(has_attention) and all(
        part is not None and part.shape[-2] == tokens.shape[1] for layer in layers for part in layer
    )
    return layers if is_whole else None


def _of_last_token(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that sees the last token of whole prompts, and changes nothing else."""
    rows = (slice(None), slice(None), slice(-1, None)) if name.endswith(("scores", "pattern")) else (
        slice(None), slice(-1, None),
    )  # fmt: skip

    def on_last(tensor: Tensor, hook_point: Any) -> Tensor | None:
        changed = hook(tensor[rows], hook=hook_point)
        if changed is None:
            return None
        whole = tensor.clone()
        whole[rows] = changed
        return whole

    return lambda tensor, hook: on_last(tensor, hook)


def _model(bridge: TransformerBridge) -> Any:
    """The model of transformers whose parts the bridge has wrapped, in its own processing."""
    return bridge.original_model
