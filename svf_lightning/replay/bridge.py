"""Models in memory as TransformerLens bridges."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Literal

from svf_lightning.errors import InputError, bad_value

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

Processing = Literal["folded", "raw"]


def make_bridge(model: PreTrainedModel, *, processing: Processing = "folded") -> TransformerBridge:
    """A ``TransformerBridge`` around a model in memory, which it takes over: folding changes weights in place.

    It takes token ids; tokenizing is the caller's part, so nothing is looked up on a hub.

    Args:
        model: A causal language model of transformers, on its device.
        processing: "folded": normalization folded into the weights and writing weights centred, as the paper has it;
            "raw": weights as they were trained. Singular vectors differ between the two.

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
            if processing == "folded":
                bridge.enable_compatibility_mode(disable_warnings=True)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"TransformerLens cannot take a {architecture} in {processing} mode ({reason}). "
                "Allowed: architectures that its TransformerBridge supports. Fix: try processing=raw, or another model."
            ) from error
        finally:
            root.setLevel(level)
    return bridge
