"""Models in memory as TransformerLens bridges."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from svf_lightning.bridged import attention_layers, fold_when_read, is_folded_when_read
from svf_lightning.errors import InputError, bad_value, reason
from svf_lightning.replay.plain import PlainBridge
from svf_lightning.replay.taps import open_softmax

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

Processing = Literal["folded", "raw"]
_SAME_LOGITS = 1e-4  # how far logits of a bridge may be from the model's, relative to the largest
_FOLDED, _FOLDED_ROUNDINGS = 1e-4, 8.0  # how far a folded norm may be from a plain one: this, or roundings of its type

# Architectures that TransformerLens 4.3 does not fold, or folds into another model (benchmarks/families.py finds them):
# here W_Q and W_K are read with the norm folded into them, and the model stays as it is.
_FOLDED_WHEN_READ = frozenset(
    {
        *("AfmoeForCausalLM", "BambaForCausalLM", "BertLMHeadModel", "BitNetForCausalLM", "FalconH1ForCausalLM"),
        *("Glm4ForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "JambaForCausalLM", "LagunaForCausalLM"),
        *("ModernBertDecoderForCausalLM", "NemotronForCausalLM", "OpenAIGPTLMHeadModel", "Qwen3NextForCausalLM"),
        *("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "VaultGemmaForCausalLM"),
    }
)


def make_bridge(model: PreTrainedModel, *, processing: Processing = "folded") -> TransformerBridge:
    """A ``TransformerBridge`` around a model in memory, which it takes over: folding changes weights in place.

    It takes token ids; tokenizing is the caller's part, so nothing is looked up on a hub.

    Args:
        model: A causal language model of transformers, on its device.
        processing: "folded": normalization folded into the weights and writing weights centred, as the paper has it;
            "raw": weights as they were trained. Singular vectors differ between the two. Architectures that
            TransformerLens does not fold are folded where their weights are read (AttentionHeads.from_bridge).

    Raises:
        InputError: An unknown processing, or an architecture that TransformerLens does not support.
    """
    if processing not in ("folded", "raw"):
        raise bad_value("processing", processing, "'folded' or 'raw'", "change --model.processing")
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)  # TransformerLens warns about the chosen processing, on the root logger
        try:
            bridge: TransformerBridge = _bridge(model)
            if processing == "folded" and _is_folded_when_read(bridge):
                fold_when_read(bridge)
            elif processing == "folded":
                bridge.enable_compatibility_mode(disable_warnings=True)
        except InputError:
            raise
        except Exception as error:  # whatever it stumbles over; some architectures end in a bare assertion
            raise InputError(
                f"{type(model).__name__} cannot be taken in {processing} mode ({reason(error)}). Allowed: causal "
                "language models whose layers project queries and keys. Fix: try processing=raw, or another model."
            ) from error
        finally:
            root.setLevel(level)
    return bridge


@torch.no_grad()
def _bridge(model: PreTrainedModel) -> Any:
    """That of TransformerLens if it computes what the model does on a few tokens, else the model with hook points.

    Raises:
        InputError: There is no attention to look at.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    tokens = torch.arange(4, device=model.device)[None]
    expected = model(tokens, use_cache=False).logits

    def is_right(logits: Tensor) -> bool:
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        return difference <= max(_SAME_LOGITS, 32 * torch.finfo(expected.dtype).eps)

    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    # the same tensors in modules of their own, as TransformerLens changes the modules
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    reason_of_library: InputError | None = None
    try:
        bridge: Any = build_bridge_from_module(shared, type(model).__name__, hf_config=shared.config)
        open_softmax(bridge)
        attention_layers(bridge)
        if is_right(bridge(tokens, return_type="logits")):
            return bridge
    except InputError as error:
        reason_of_library = error
    except Exception:  # it raises errors of every type for models that it does not know, or not in this variant
        pass
    if not is_right(model(tokens, use_cache=False).logits):
        model.set_attn_implementation(implementation)  # of Falcon, the eager one adds ALiBi twice
    plain: Any = PlainBridge(model)
    open_softmax(plain)
    try:
        attention_layers(plain)
    except InputError as error:
        raise reason_of_library or error from None
    return plain


def _is_folded_when_read(bridge: Any) -> bool:
    model = bridge.original_model
    has_late_norms = getattr(model.config, "do_layer_norm_before", True) is False  # OPT-350m
    return isinstance(bridge, PlainBridge) or type(model).__name__ in _FOLDED_WHEN_READ or has_late_norms


@torch.inference_mode()
def check_folded(bridge: TransformerBridge, tokens: Int[Tensor, "batch n"]) -> None:
    """Check that the heads of a bridge in folded mode read normalized residuals, and nothing multiplies these.

    Args:
        bridge: In folded mode.
        tokens: Any input.

    Raises:
        InputError: TransformerLens left the normalization as it was, as where it multiplies by 1 + weight.
    """
    if is_folded_when_read(bridge):
        return
    normalized: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}

    def keep(kept: dict[int, Tensor], layer: int) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            kept[layer] = tensor.clone()

        return hook

    hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = []
    for layer in range(len(bridge.blocks)):
        for name, kept in ((f"blocks.{layer}.ln1.hook_normalized", normalized), (f"blocks.{layer}.attn.hook_in", read)):
            if name in bridge.hook_dict:
                hooks.append((name, keep(kept, layer)))
    bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    for layer in sorted(normalized.keys() & read.keys()):
        before, after = normalized[layer].float(), read[layer].float()
        tolerance = max(_FOLDED, _FOLDED_ROUNDINGS * torch.finfo(read[layer].dtype).eps)
        off = float((after - before).abs().max() / before.abs().max())
        if off > tolerance:
            raise InputError(
                f"TransformerLens does not fold the normalization of a {type(bridge.original_model).__name__} into its "
                f"weights (layer {layer} reads what is off by {off:.2g}). Allowed: processing=raw, which leaves all "
                "weights as they are. Fix: --model.processing=raw."
            )
