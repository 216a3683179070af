"""Small models with random weights, biases and norms, one for each way of scoring that real families have."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from svf_lightning.replay.bridge import make_bridge

N_VOCABULARY = 101
_SHAPE = {"vocab_size": N_VOCABULARY, "hidden_size": 28, "num_hidden_layers": 3, "intermediate_size": 44}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **_SHAPE}
CONFIGS = {
    # learned positions, biases
    "gpt2": lambda: GPT2Config(vocab_size=N_VOCABULARY, n_positions=64, n_embd=30, n_layer=3, n_head=5),
    # partial RoPE, biases, parallel blocks
    "gpt_neox": lambda: GPTNeoXConfig(
        **{**_SHAPE, "hidden_size": 40}, num_attention_heads=5, max_position_embeddings=64, rotary_pct=0.5
    ),
    # RoPE, grouped queries, no biases
    "llama": lambda: LlamaConfig(**{**_GROUPED, "hidden_size": 40}, head_dim=10),
    # biases on q and k, grouped queries
    "qwen2": lambda: Qwen2Config(**{**_GROUPED, "hidden_size": 40}),
    # soft cap, a scale of its own, head dimension apart from d_model, a sliding window in every other layer
    "gemma2": lambda: Gemma2Config(
        **_GROUPED, head_dim=6, query_pre_attn_scalar=10, attn_logit_softcapping=3.0, sliding_window=5
    ),
}


def random_model(family: str, *, seed: int = 0, spread: float = 0.3) -> PreTrainedModel:
    """A model whose biases and norms are random too; a fresh one has zeros and ones there."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def bridge(family: str, processing: str = "folded", **options) -> TransformerBridge:
    return make_bridge(random_model(family, **options), processing=processing)
