"""What a forward pass shows of every attention layer, handed over layer by layer as it happens.

Most of it comes from the hook points of TransformerLens. Some of its attention components leave the computation to the
module of transformers, and fire their hooks for scores and weights afterwards, on the weights alone. There the softmax
is the place to look: its input are the scores, its output the weights, and a hook that changes them changes what comes
after (:func:`open_softmax`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from svf_lightning.bridged import AttentionLayer, model_name
from svf_lightning.errors import InputError
from svf_lightning.replay.plain import PlainAttention

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
Shown = dict[str, Tensor]

_SHOWN = {"x": "in", "keys": "k", "scores": "attn_scores", "pattern": "pattern"}
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)


def block_hook(block: int, name: str) -> str:
    """Name of a hook point of a block's attention."""
    return f"blocks.{block}.attn.hook_{name}"


class _Softmax(TorchFunctionMode):
    """Hands the inputs and outputs of softmaxes over keys to the hook points of an attention component."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func not in _SOFTMAX or not args or args[0].ndim not in (3, 4):
            return func(*args, **kwargs)
        scores, *rest = args
        shape = scores.shape
        n_heads = self.attention.config.n_heads
        # XGLM has batch and heads in one dimension
        as_heads = scores if scores.ndim == 4 else scores.view(-1, n_heads, *shape[-2:])
        weights = func(self.attention.hook_attn_scores(as_heads), *rest, **kwargs)
        return self.attention.hook_pattern(weights).view(shape)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What the fused function computes, step by step."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if attn_mask is not None:
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~attn_mask, least) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = self.attention.hook_attn_scores(scores).softmax(-1)
        out: Tensor = self.attention.hook_pattern(weights) @ value
        return out


def open_softmax(bridge: TransformerBridge) -> None:
    """Let the hook points for scores and weights fire inside those attention modules that a bridge leaves closed."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    for block in getattr(bridge, "blocks", ()):
        attention: Any = getattr(block, "attn", None)
        if isinstance(attention, PlainAttention) or (
            isinstance(attention, AttentionBridge) and type(attention).forward is AttentionBridge.forward
        ):
            _open(attention)


def _open(attention: Any) -> None:
    module = attention.original_component
    forward = module.forward

    def with_hooks(*args: Any, **kwargs: Any) -> Any:
        with _Softmax(attention):
            out = forward(*args, **kwargs)
        # without the weights, which TransformerLens would fire its hooks on once more
        return (out[0], *(None if _is_weights(part) else part for part in out[1:])) if isinstance(out, tuple) else out

    module.forward = with_hooks


def _is_weights(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4


class Taps:
    """Where to look at the attention layers of a model.

    Args:
        bridge: The model.
        layers: Its attention layers.
    """

    def __init__(self, bridge: TransformerBridge, layers: Sequence[AttentionLayer]) -> None:
        self.bridge, self.layers = bridge, layers
        self._has_angles = [block_hook(layer.block, "cos") in bridge.hook_dict for layer in layers]

    def run(
        self,
        tokens: Int[Tensor, "batch n"],
        take: Callable[[int, Shown], None],
        *,
        return_type: str | None = None,
    ) -> Any:
        """Run the model, and hand over what each attention layer shows.

        Args:
            tokens: Ids.
            take: Called with the number of a layer (among those with attention) and what it shows: ``x``, what its
                heads read [batch, n, D]; ``keys`` as W_K and b_K make them [batch, n, key_head, H]; ``scores`` before
                the softmax and ``pattern`` [batch, head, n, n]; where it rotates, ``cos`` and ``sin`` [n, rotary];
                ``position``, a term that positions add to the scores [batch or 1, head, n or 1, n], if there is one.
                They are gone when it returns.
            return_type: As for ``run_with_hooks``.

        Raises:
            InputError: The model does not show one of them.
        """
        kept: Shown = {}
        silent = set(range(len(self.layers)))
        n = tokens.shape[1]

        def keep(name: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: Any) -> None:
                kept[name] = tensor

            return hook

        def finish(number: int) -> Callable[..., None]:
            def hook(pattern: Tensor, hook: Any) -> None:
                kept["pattern"] = pattern
                absent = [name for name in _SHOWN if name not in kept]
                if absent:
                    raise self._not_shown(absent)
                silent.discard(number)
                self._complete(number, kept, n)
                take(number, kept)
                kept.clear()

            return hook

        hooks: Hooks = []
        for number, layer in enumerate(self.layers):
            names = {what: name for what, name in _SHOWN.items() if what != "pattern"}
            if layer.is_rotary and self._has_angles[number]:
                names |= {"cos": "cos", "sin": "sin"}
            hooks += [(block_hook(layer.block, name), keep(what)) for what, name in names.items() if what != "x"]
            hooks.append((layer.read_hook, keep("x")))
            hooks.append((block_hook(layer.block, "pattern"), finish(number)))
        unknown = sorted({str(name).rsplit(".", 1)[-1] for name, _ in hooks if name not in self.bridge.hook_dict})
        if unknown:
            raise self._not_shown(unknown)
        with self._arguments(kept):
            out = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type=return_type)
        if silent:
            raise self._not_shown(["attention weights"])
        return out

    @contextmanager
    def _arguments(self, kept: Shown) -> Iterator[None]:
        """Keep what the attention modules are called with, for what has no hook point."""

        def keep(module: Any, args: Any, arguments: dict[str, Any]) -> None:
            for name in ("position_embeddings", "alibi", "position_bias"):
                if arguments.get(name) is not None:
                    kept[name] = arguments[name]

        def keep_angles(module: Any, args: Any, out: Any) -> None:
            kept["position_embeddings"] = out

        handles = [layer.attention.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        for layer in self.layers:
            own = getattr(layer.attention.original_component, "rotary_emb", None)
            if isinstance(layer.attention, PlainAttention) and isinstance(own, torch.nn.Module):
                handles.append(own.register_forward_hook(keep_angles))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _complete(self, number: int, kept: Shown, n: int) -> None:
        """Bring the angles and the position term into one form."""
        layer = self.layers[number]
        kept["x"] = layer.tokens(kept["x"])
        if layer.key_factor != 1:
            kept["keys"] = kept["keys"] * layer.key_factor
        angles: Any = kept.pop("position_embeddings", None)
        if layer.is_rotary and not self._has_angles[number]:
            cos_sin = self._angles(layer, angles, n)
            if cos_sin is None:
                raise self._not_shown(["rotary angles"])
            kept["cos"], kept["sin"] = cos_sin
        if "cos" in kept:
            if type(layer.attention.original_component).__name__ == "NanoChatAttention":
                kept["sin"] = -kept["sin"]  # it turns the other way round
            kept["cos"], kept["sin"] = (kept[name].reshape(-1, *kept[name].shape[-2:])[0] for name in ("cos", "sin"))
            rotary, d_head = kept["cos"].shape[-1], layer.W_Q.shape[1]
            if layer.layout == "halves" and 2 * rotary == d_head and _rotates_all(self.bridge.cfg):
                kept["cos"], kept["sin"] = (kept[name].repeat(1, 2) for name in ("cos", "sin"))  # GPT-OSS gives halves
        of_keys = [kept.pop(name) for name in ("alibi", "position_bias") if name in kept]
        if of_keys:
            batch, n_heads = kept["scores"].shape[:2]
            term = of_keys[0][..., -n:]
            term = term.reshape(-1, n_heads, 1, n) if term.shape[0] != batch or term.ndim == 3 else term
            is_scaled = type(layer.attention.original_component).__name__ == "FalconAttention"
            kept["position"] = term * layer.scale if is_scaled else term  # Falcon adds it before it scales

    def _angles(self, layer: AttentionLayer, given: Any, n: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [n, rotary] that have no hook point."""
        table = getattr(layer.attention.original_component, "embed_positions", None)
        if isinstance(table, Tensor):  # GPT-J, CodeGen: sines, then cosines, of each angle once
            sin, cos = table[:n].to(layer.W_Q.device).chunk(2, dim=-1)
        elif isinstance(given, Tensor) and given.is_complex():  # Llama-4
            cos, sin = given.real, given.imag
        elif isinstance(given, tuple) and len(given) == 2:
            return given
        else:
            return None
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def _not_shown(self, what: Sequence[str]) -> InputError:
        return InputError(
            f"TransformerLens does not show how a {model_name(self.bridge)} comes to its scores (no "
            f"{', '.join(what)}). Allowed: architectures whose attention it takes apart, such as GPT-2, GPT-NeoX, "
            "Llama, Qwen2. Fix: use another model."
        )


def _rotates_all(cfg: Any) -> bool:
    """Whether the rotation is one of all components of queries and keys."""
    from transformer_lens.utilities.hf_utils import get_rotary_pct_from_config

    return float(get_rotary_pct_from_config(cfg)) == 1.0
