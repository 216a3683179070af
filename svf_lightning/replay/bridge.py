"""Models in memory as TransformerLens bridges."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from svf_lightning.bridged import fold_when_read
from svf_lightning.errors import InputError, bad_value, reason
from svf_lightning.replay.taps import open_softmax

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

Processing = Literal["folded", "raw"]
_FOLDED, _FOLDED_ROUNDINGS = 1e-4, 8.0  # how far a folded norm may be from a plain one: this, or roundings of its type

# Architectures that TransformerLens 4.3 does not fold, or folds into another model (benchmarks/families.py finds them):
# here W_Q and W_K are read with the norm folded into them, and the model stays as it is.
_FOLDED_WHEN_READ = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Afmoe Bamba BitNet FalconH1 Glm Glm4 GptOss Laguna ModernBertDecoder Nemotron Qwen3Next Qwen3_5 Qwen3_5Moe "
        "VaultGemma"
    ).split()
) | {"OpenAIGPTLMHeadModel"}


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
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(model).__name__
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)  # TransformerLens warns about the chosen processing, on the root logger
        try:
            model.set_attn_implementation("eager")
            bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
            open_softmax(bridge)
            if processing == "folded" and architecture in _FOLDED_WHEN_READ:
                fold_when_read(bridge)
            elif processing == "folded":
                bridge.enable_compatibility_mode(disable_warnings=True)
        except Exception as error:  # whatever it stumbles over; some architectures end in a bare assertion
            raise InputError(
                f"TransformerLens cannot take a {architecture} in {processing} mode ({reason(error)}). "
                "Allowed: architectures that its TransformerBridge supports. Fix: try processing=raw, or another model."
            ) from error
        finally:
            root.setLevel(level)
    return bridge


@torch.inference_mode()
def check_folded(bridge: TransformerBridge, tokens: Int[Tensor, "batch n"]) -> None:
    """Check that the heads of a bridge in folded mode read normalized residuals, and nothing multiplies these.

    Args:
        bridge: In folded mode.
        tokens: Any input.

    Raises:
        InputError: TransformerLens left the normalization as it was, as where it multiplies by 1 + weight.
    """
    if type(bridge.original_model).__name__ in _FOLDED_WHEN_READ:
        return  # the norms are those of the heads' own reader
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
