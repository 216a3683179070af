"""A model of transformers with the hook points that a decomposition needs, where TransformerLens has none of its own.

:class:`PlainBridge` shows the part of a ``TransformerBridge`` that this package looks at: what the heads read, their
keys, their scores and weights (:mod:`svf_lightning.replay.taps`), and W_Q and W_K. The model computes what it computes;
nothing is taken apart but the projection of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from svf_lightning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_APART = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("wq", "wk"))  # names of two projections
_TOGETHER = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "att_proj", "W_pack")  # and of one


class PlainAttention:
    """The attention module of one layer, with hook points.

    Args:
        module: The module.
        config: The model's (text) configuration.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        from transformer_lens.hook_points import HookPoint

        self.original_component: Any = module
        self.submodules: dict[str, Any] = {}
        make: Any = HookPoint
        self.hook_in, self.hook_k, self.hook_attn_scores, self.hook_pattern = (make() for _ in range(4))
        self._query, self._key, self._rows_q, self._rows_k = _projections(module, config)
        self.config = SimpleNamespace(n_heads=len(self._rows_q), d_head=self._rows_q.shape[1])
        module.register_forward_pre_hook(self._show_input, with_kwargs=True)
        self._key.register_forward_hook(self._show_keys)

    @property
    def W_Q(self) -> Float[Tensor, "head D H"]:
        """Query weights, as TransformerLens has them."""
        return _rows(self._query)[self._rows_q].mT

    @property
    def W_K(self) -> Float[Tensor, "key_head D H"]:
        """Key weights."""
        return _rows(self._key)[self._rows_k].mT

    @property
    def b_Q(self) -> Float[Tensor, "head H"] | None:
        """Query bias, or None."""
        return None if self._query.bias is None else self._query.bias[self._rows_q]

    @property
    def b_K(self) -> Float[Tensor, "key_head H"] | None:
        """Key bias, or None."""
        return None if self._key.bias is None else self._key.bias[self._rows_k]

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> Any:
        """That of the module."""
        return self.original_component.register_forward_pre_hook(hook, **options)

    def _show_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self.hook_in(kwargs["hidden_states"])}
        return (self.hook_in(args[0]), *args[1:]), kwargs

    def _show_keys(self, module: Any, args: Any, out: Tensor) -> None:
        self.hook_k(out[..., self._rows_k])


class PlainBridge:
    """A model with hook points on its attention.

    Args:
        model: A causal language model of transformers.

    Raises:
        InputError: Its layers or their projections are not found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.original_model = model
        config: Any = model.config.get_text_config()
        name = type(model).__name__
        self.blocks = [_block(layer, config) for layer in _layers(model, config)]
        modules = [block.attn.original_component for block in self.blocks if block.attn is not None]
        if len({id(module) for module in modules}) < len(modules):
            raise InputError(
                f"{name} cannot be decomposed: several layers share one attention module. Allowed: layers with "
                "attention of their own. Fix: use another model."
            )
        rotary = any("Rotary" in type(module).__name__ for module in model.modules())
        self.cfg = SimpleNamespace(
            architecture=name,
            d_model=config.hidden_size,
            dtype=model.dtype,
            positional_embedding_type="rotary" if rotary else "standard",
            rope_parameters=getattr(config, "rope_parameters", None),
            partial_rotary_factor=getattr(config, "partial_rotary_factor", None),
        )
        self.hook_dict: dict[str, Any] = {}
        for number, block in enumerate(self.blocks):
            if block.attn is not None:
                for hook in ("in", "k", "attn_scores", "pattern"):
                    self.hook_dict[f"blocks.{number}.attn.hook_{hook}"] = getattr(block.attn, f"hook_{hook}")

    @property
    def W_E(self) -> Float[Tensor, "vocabulary D"]:
        """Embedding vectors of the tokens."""
        embeddings: Any = self.original_model.get_input_embeddings()
        weight: Tensor = embeddings.weight
        return weight

    def find_norms(self) -> None:
        """Find the norm that the attention of each block reads the output of, and give it hook points."""
        from transformer_lens.hook_points import HookPoint

        shown: dict[int, Tensor] = {}
        outputs: dict[int, list[tuple[nn.Module, Tensor]]] = {}
        handles = []
        for number, block in enumerate(self.blocks):
            if block.attn is None:
                continue

            def keep(module: nn.Module, args: Any, out: Any, number: int = number) -> None:
                if isinstance(out, Tensor):
                    outputs.setdefault(number, []).append((module, out.clone()))

            norms = [module for module in block.layer.modules() if "Norm" in type(module).__name__]
            handles += [norm.register_forward_hook(keep) for norm in norms]
        hooks = [
            (f"blocks.{number}.attn.hook_in", lambda x, hook, number=number: shown.__setitem__(number, x.clone()))
            for number, block in enumerate(self.blocks)
            if block.attn is not None
        ]
        try:
            self.run_with_hooks(torch.arange(4, device=self.W_E.device)[None], fwd_hooks=hooks, return_type=None)
        finally:
            for handle in handles:
                handle.remove()
        for number, read in shown.items():
            norm = next((module for module, out in outputs.get(number, []) if torch.equal(out, read)), None)
            if norm is None:
                continue
            make: Any = HookPoint
            ln1 = SimpleNamespace(original_component=norm, hook_in=make(), hook_out=make())

            def show(module: Any, args: Any, out: Any, ln1: Any = ln1) -> None:
                ln1.hook_in(args[0])
                ln1.hook_out(out)

            norm.register_forward_hook(show)
            self.blocks[number].ln1 = ln1
            for hook in ("in", "out"):
                self.hook_dict[f"blocks.{number}.ln1.hook_{hook}"] = getattr(ln1, f"hook_{hook}")

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[PlainBridge]:
        """Have functions look at hook points, or change what passes them, as those of a ``TransformerBridge``."""
        points = [self.hook_dict[str(name)] for name, _ in fwd_hooks]
        try:
            for point, (_, function) in zip(points, fwd_hooks, strict=True):
                point.add_hook(function)
            yield self
        finally:
            for point in points:
                point.remove_hooks()

    def run_with_hooks(
        self,
        tokens: Tensor,
        fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
        return_type: str | None = "logits",
    ) -> Tensor | None:
        """Run the model with hooks, and give its logits unless ``return_type`` is None."""
        with self.hooks(fwd_hooks):
            logits: Tensor = self.original_model(tokens, use_cache=False).logits
        return None if return_type is None else logits


def _layers(model: nn.Module, config: Any) -> nn.ModuleList:
    """The stack of layers: the first list of as many modules as the configuration names."""
    n = config.num_hidden_layers
    found = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n), None)
    if found is None:
        raise InputError(
            f"{type(model).__name__} cannot be decomposed: it has no stack of {n} layers. Allowed: decoders that run "
            "one layer after the other. Fix: use another model."
        )
    return found


def _block(layer: nn.Module, config: Any) -> SimpleNamespace:
    """A layer and its attention, if it has one."""
    attention = next(
        (m for m in layer.modules() if "Attention" in type(m).__name__ and _projection_modules(m) is not None), None
    )
    return SimpleNamespace(layer=layer, attn=None if attention is None else PlainAttention(attention, config), ln1=None)


def _projection_modules(module: nn.Module) -> tuple[Any, Any] | None:
    """The modules that project queries and keys; the same one twice if it is one."""
    for names in _APART:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    whole = next((getattr(module, n) for n in _TOGETHER if isinstance(getattr(module, n, None), nn.Module)), None)
    return None if whole is None else (whole, whole)


def _rows(projection: Any) -> Float[Tensor, "out in"]:
    """Weights with one row per output: Conv1D of GPT-2 has them the other way round."""
    weight: Tensor = projection.weight
    return weight.T if type(projection).__name__ == "Conv1D" else weight


def _projections(module: nn.Module, config: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """The two projections, and which of their outputs are which component of which head [head, H]."""
    modules = _projection_modules(module)
    assert modules is not None
    query, key = modules
    n_heads = config.num_attention_heads
    d_head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // n_heads
    if query is not key:
        rows = [torch.arange(len(_rows(part))) for part in modules]
        return query, key, rows[0].view(-1, d_head), rows[1].view(-1, d_head)
    n_out = len(_rows(query))
    index = torch.arange(n_out)
    n_keys = (n_out // d_head - n_heads) // 2
    is_mixed = "query_key_value" in dict(module.named_children()) or getattr(config, "multi_query", True) is False
    if getattr(module, "new_decoder_architecture", False):  # Falcon-40B: the queries of a group, its key, its value
        groups = index.view(n_keys, -1, d_head)
        return query, key, groups[:, :-2].reshape(n_heads, d_head), groups[:, -2]
    if is_mixed and n_keys == n_heads:  # query, key and value of one head after those of another
        of_heads = index.view(n_heads, 3, d_head)
        return query, key, of_heads[:, 0], of_heads[:, 1]
    of_all = index.view(-1, d_head)
    return query, key, of_all[:n_heads], of_all[n_heads : n_heads + n_keys]
