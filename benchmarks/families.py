"""Which architectures can be decomposed: small random models of every family, in both processing modes.

``python benchmarks/families.py`` builds each one from its configuration, with random weights, biases, norms and gains,
decomposes all attention scores of three prompts, and prints how far the sums over singular pairs (and the position
term, where there is one) are from the scores that the model itself computed. ``--write`` renews the table of
docs/families.md. Families are those that both transformers and TransformerLens know, and variants of them that score in
another way.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

N_VOCABULARY = 101
QUERY, KEY = (11, 9, 5), (3, 4, 2)
EXACT = 1e-6  # relative error of a sum, in float32

_B = dict(
    vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=4, intermediate_size=44, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
_G = dict(_B, num_key_value_heads=2)  # grouped queries
_H = dict(_G, head_dim=10)
_E = dict(vocab_size=N_VOCABULARY, n_positions=64, n_embd=40, n_layer=4, n_head=4)
_MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_MLA = dict(
    _B, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
)  # fmt: skip
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"] * 2, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
_LOCAL = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)
_YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)
_LLAMA3 = dict(
    rope_type="llama3", factor=8.0, rope_theta=1e4, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip


class Family(NamedTuple):
    """One configuration: its name, the model type of transformers, options, and what is special about its scores."""

    name: str
    model_type: str
    options: dict[str, Any]
    special: str = ""


FAMILIES = (
    # biases, learned or sinusoidal positions
    Family("GPT-2", "gpt2", _E, "biases"),
    Family(
        "GPT-2 (Stanford)", "gpt2", dict(_E, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        "scale of each layer divided by its number, scores in float32",
    ),
    Family("GPT-2 without scale", "gpt2", dict(_E, scale_attn_weights=False), "scale 1"),
    Family("GPT-1", "openai-gpt", _E, "norms after the blocks: nothing to fold"),
    Family("GPT-BigCode", "gpt_bigcode", _E, "one key head, biases"),
    Family("GPT-BigCode, multi-head", "gpt_bigcode", dict(_E, multi_query=False), "biases"),
    Family(
        "GPT-Neo", "gpt_neo",
        dict(
            vocab_size=N_VOCABULARY, max_position_embeddings=64, hidden_size=40, num_layers=4, num_heads=4,
            attention_types=[[["global", "local"], 2]], window_size=5,
        ),
        "no scale, local layers",
    ),
    Family("OPT", "opt", dict(_B, ffn_dim=44, word_embed_proj_dim=40), "biases"),
    Family(
        "OPT-350m", "opt", dict(_B, ffn_dim=44, word_embed_proj_dim=20, do_layer_norm_before=False),
        "norms after the blocks, narrow embedding",
    ),
    Family(
        "XGLM", "xglm",
        dict(
            vocab_size=N_VOCABULARY, max_position_embeddings=64, d_model=40, ffn_dim=44, num_layers=4,
            attention_heads=4,
        ),
        "biases",
    ),
    Family("BERT as decoder", "bert", dict(_B, is_decoder=True), "norms after the blocks: nothing to fold"),
    # a term of positions beside the scores
    Family("BLOOM", "bloom", dict(vocab_size=N_VOCABULARY, hidden_size=40, n_layer=4, n_head=4), "ALiBi"),
    Family(
        "MPT", "mpt", dict(vocab_size=N_VOCABULARY, d_model=40, n_layers=4, n_heads=4, max_seq_len=64), "ALiBi",
    ),
    Family(
        "MPT, clipped far off", "mpt",
        dict(
            vocab_size=N_VOCABULARY, d_model=40, n_layers=4, n_heads=4, max_seq_len=64, attn_config=dict(clip_qkv=1e3),
        ),
        "ALiBi; exact where clip_qkv clips nothing",
    ),
    Family(
        "Falcon-RW", "falcon",
        dict(
            vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=4, num_attention_heads=4, alibi=True,
            multi_query=False, parallel_attn=False, bias=True,
        ),
        "ALiBi, added before the scale; biases",
    ),
    # rotary positions
    Family("GPT-NeoX", "gpt_neox", _B, "RoPE on a quarter of the components, biases"),
    Family("GPT-NeoX without attention bias", "gpt_neox", dict(_B, attention_bias=False), "partial RoPE"),
    Family("GPT-NeoX, one after the other", "gpt_neox", dict(_B, use_parallel_residual=False), "partial RoPE"),
    Family("GPT-J", "gptj", dict(_E, rotary_dim=4), "RoPE in adjacent pairs"),
    Family("CodeGen", "codegen", dict(_E, rotary_dim=4), "RoPE in adjacent pairs"),
    Family(
        "Falcon-7B", "falcon",
        dict(vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=4, num_attention_heads=4),
        "RoPE, one key head",
    ),
    Family(
        "Falcon-40B", "falcon",
        dict(
            vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=4, num_attention_heads=4, num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        "RoPE, grouped queries",
    ),
    Family("Llama", "llama", _H, "RoPE, grouped queries"),
    Family("Llama with biases", "llama", dict(_H, attention_bias=True), "RoPE, biases"),
    Family("Llama-3.1", "llama", dict(_H, rope_parameters=_LLAMA3), "RoPE with slowed frequencies"),
    Family("Llama with YaRN", "llama", dict(_H, rope_parameters=_YARN), "RoPE that also scales"),
    Family("Mistral", "mistral", dict(_H, sliding_window=5), "RoPE, sliding window"),
    Family("Ministral-3", "ministral3", _H, "RoPE, temperature that grows with the position"),
    Family("Mixtral", "mixtral", dict(_H, num_local_experts=4, num_experts_per_tok=2), "RoPE"),
    Family("Arcee", "arcee", _H, "RoPE"),
    Family("BitNet", "bitnet", _G, "RoPE"),
    Family("ERNIE-4.5", "ernie4_5", _H, "RoPE in adjacent pairs"),
    Family(
        "ERNIE-4.5 MoE", "ernie4_5_moe",
        dict(_H, moe_num_experts=4, moe_k=2, moe_intermediate_size=16), "RoPE in adjacent pairs",
    ),
    Family("Gemma", "gemma", _H, "RoPE, gain 1 + weight"),
    Family(
        "Gemma-2", "gemma2", dict(_H, attn_logit_softcapping=3.0, query_pre_attn_scalar=12, **_LOCAL),
        "RoPE, soft cap, a scale of its own, local layers",
    ),
    Family("GLM", "glm", dict(_H, attention_bias=True), "RoPE in adjacent pairs on half of the components, biases"),
    Family("GLM-4", "glm4", dict(_H, attention_bias=True), "as GLM, more norms"),
    Family("Granite", "granite", dict(_G, attention_multiplier=0.3), "RoPE, a scale of its own"),
    Family("Granite MoE", "granitemoe", dict(_G, num_local_experts=4, num_experts_per_tok=2), "RoPE"),
    Family("InternLM-3", "internlm3", _H, "RoPE"),
    Family("IQuest-Coder", "iquestcoder", _H, "RoPE"),
    Family("Jais-2", "jais2", _H, "RoPE, biases"),
    Family("Nemotron", "nemotron", dict(_H, partial_rotary_factor=0.4), "partial RoPE, gain 1 + weight"),
    Family("OLMo", "olmo", _G, "RoPE, norm without gain"),
    Family("OLMo, clipped far off", "olmo", dict(_G, clip_qkv=1e3), "exact where clip_qkv clips nothing"),
    Family("OLMo, clipped", "olmo", dict(_G, clip_qkv=0.5), "clip_qkv clips on these prompts"),
    Family("Phi", "phi", dict(_B, partial_rotary_factor=0.4), "partial RoPE, biases"),
    Family("Phi-3", "phi3", _G, "RoPE"),
    Family("Qwen2", "qwen2", _G, "RoPE, biases"),
    Family(
        "Qwen2 with windows", "qwen2", dict(_G, use_sliding_window=True, sliding_window=5, max_window_layers=2),
        "RoPE, biases, local layers",
    ),
    Family("Qwen2 MoE", "qwen2_moe", dict(_G, shared_expert_intermediate_size=16, **_MOE), "RoPE, biases"),
    Family("Seed-OSS", "seed_oss", _H, "RoPE, biases"),
    Family("StableLM", "stablelm", _G, "partial RoPE"),
    Family("StarCoder2", "starcoder2", _G, "RoPE, biases"),
    Family(
        "VaultGemma", "vaultgemma", dict(_H, attn_logit_softcapping=3.0, query_pre_attn_scalar=12, **_LOCAL),
        "RoPE, soft cap, local layers",
    ),
    Family("GPT-OSS", "gpt_oss", dict(_H, num_local_experts=4, num_experts_per_tok=2, **_LOCAL), "RoPE, sinks, biases"),
    # layers of different kinds
    Family("SmolLM-3", "smollm3", dict(_G, no_rope_layer_interval=2), "RoPE in some layers"),
    Family(
        "Llama-4", "llama4_text",
        dict(_H, intermediate_size_mlp=44, num_local_experts=4, no_rope_layers=[1, 0] * 2, attention_chunk_size=8),
        "RoPE in adjacent pairs in some layers, norm of q and k without gain there, temperature in the others, chunks",
    ),
    Family("Cohere-2", "cohere2", dict(_H, **_LOCAL), "interleaved RoPE in local layers"),
    Family(
        "ModernBERT decoder", "modernbert-decoder", dict(_B, local_attention=8, global_attn_every_n_layers=2),
        "two RoPE bases, local layers",
    ),
    # norms of queries and keys
    Family("Afmoe", "afmoe", dict(_H, **_MOE, **_LOCAL), "QK-norm, RoPE in local layers"),
    Family("Apertus", "apertus", _G, "QK-norm"),
    Family("Cohere", "cohere", _G, "interleaved RoPE"),
    Family("Cohere (Command R+)", "cohere", dict(_G, use_qk_norm=True), "LayerNorm of q and k, gains for each head"),
    Family("EXAONE-4", "exaone4", dict(_H, **_LOCAL), "QK-norm, RoPE in local layers"),
    Family("FlexOlmo", "flex_olmo", dict(_G, num_experts=4, num_experts_per_tok=2), "QK-norm over all heads"),
    Family("Gemma-3", "gemma3_text", dict(_H, **_LOCAL), "QK-norm, gain 1 + weight, two RoPE bases, local layers"),
    Family(
        "Gemma-3, one key head", "gemma3_text", dict(_H, **_LOCAL) | dict(num_key_value_heads=1),
        "as Gemma-3 270M",
    ),
    Family(
        "Gemma-4", "gemma4_text",
        dict(_H, global_head_dim=10, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
             vocab_size_per_layer_input=N_VOCABULARY, **_LOCAL),
        "QK-norm",
    ),
    Family(
        "Gemma-4 with shared keys", "gemma4_text",
        dict(_H, global_head_dim=10, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
             vocab_size_per_layer_input=N_VOCABULARY, **_LOCAL),
        "later layers take the keys of earlier ones",
    ),
    Family("GLM-4 MoE", "glm4_moe", dict(_H, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                       use_qk_norm=True), "QK-norm, partial RoPE"),
    Family("HunYuan", "hunyuan_v1_dense", _H, "QK-norm after RoPE: a basis for each pair of positions"),
    Family("Laguna", "laguna", dict(_H, **_MOE, **_LOCAL), "QK-norm, two RoPE bases, local layers"),
    Family("MiniMax-M2", "minimax_m2", dict(_H, num_local_experts=4, num_experts_per_tok=2), "QK-norm over all heads"),
    Family("nanochat", "nanochat", _G, "QK-norm without gain, after RoPE"),
    Family("OLMo-2", "olmo2", _G, "QK-norm over all heads, norms after the blocks: nothing to fold"),
    Family("OLMo-3", "olmo3", dict(_G, **_LOCAL), "as OLMo-2, local layers"),
    Family("OLMoE", "olmoe", dict(_G, num_experts=4, num_experts_per_tok=2), "QK-norm over all heads"),
    Family("Phi with QK-norm", "phi", dict(_B, qk_layernorm=True, partial_rotary_factor=0.4), "LayerNorm of q and k"),
    Family("Qwen3", "qwen3", _H, "QK-norm"),
    Family("Qwen3 MoE", "qwen3_moe", dict(_H, **_MOE), "QK-norm"),
    Family("StableLM-2 12B", "stablelm", dict(_G, qk_layernorm=True), "LayerNorm of q and k, gains for each head"),
    # hybrids: some blocks have attention
    Family(
        "Bamba", "bamba",
        dict(_G, mamba_n_heads=4, mamba_d_head=20, mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1, 3]),
        "RoPE; beside Mamba blocks",
    ),
    Family(
        "Falcon-H1", "falcon_h1",
        dict(_H, mamba_n_heads=4, mamba_d_head=20, mamba_d_ssm=80, mamba_d_state=8, mamba_n_groups=1,
             key_multiplier=0.5),
        "RoPE, keys multiplied; Mamba in the same blocks",
    ),
    Family(
        "Granite-4 hybrid", "granitemoehybrid",
        dict(_G, layer_types=["mamba", "attention"] * 2, mamba_n_heads=4, mamba_d_head=20, mamba_d_state=8,
             num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=32),
        "beside Mamba blocks",
    ),
    Family(
        "Jamba", "jamba",
        dict(_G, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2, num_experts_per_tok=1,
             mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
        "no positions; beside Mamba blocks",
    ),
    Family("LFM-2", "lfm2", dict(_G, layer_types=["conv", "full_attention"] * 2), "QK-norm; beside convolutions"),
    Family(
        "LFM-2 MoE", "lfm2_moe",
        dict(_H, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1,
             layer_types=["conv", "full_attention"] * 2),
        "QK-norm; beside convolutions",
    ),
    Family(
        "Nemotron-H", "nemotron_h",
        dict(_H, layers_block_type=["mamba", "attention"] * 2, mamba_num_heads=4, mamba_head_dim=20, ssm_state_size=8,
             n_groups=1),
        "no positions; beside Mamba blocks",
    ),
    Family("OLMo hybrid", "olmo_hybrid",
           dict(_B, num_key_value_heads=4, layer_types=["linear_attention", "full_attention"] * 2),
           "QK-norm over all heads; beside linear attention"),
    Family("Qwen3-Next", "qwen3_next", dict(_H, shared_expert_intermediate_size=16, **_MOE, **_LINEAR),
           "QK-norm, gated queries; beside linear attention"),
    Family("Qwen3.5", "qwen3_5_text", dict(_G, head_dim=16, **_LINEAR),
           "QK-norm, gated queries; beside linear attention"),
    Family("Qwen3.5 MoE", "qwen3_5_moe_text",
           dict(_G, head_dim=16, shared_expert_intermediate_size=16, **_MOE, **_LINEAR),
           "QK-norm, gated queries; beside linear attention"),
    Family("RecurrentGemma", "recurrent_gemma",
           dict(_H, lru_width=40, attention_window_size=5, block_types=["recurrent", "attention"], conv1d_width=4),
           "partial RoPE, sliding window; beside recurrent blocks"),
    Family("Zamba-2", "zamba2",
           dict(_B, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, mamba_headdim=20,
                num_mem_blocks=1, n_mamba_heads=4, mamba_ngroups=1),
           "attention reads two streams; beside Mamba blocks"),
    # attention of other kinds
    Family("DeepSeek-V2", "deepseek_v2", _MLA, "MLA"),
    Family("DeepSeek-V3", "deepseek_v3", _MLA, "MLA"),
    Family("GLM-4 MoE Lite", "glm4_moe_lite", _MLA, "MLA"),
    Family("Youtu", "youtu", _MLA, "MLA"),
    Family("JetMoe", "jetmoe", dict(_B, kv_channels=10, num_key_value_heads=4, num_local_experts=4),
           "heads are experts"),
    Family("HRM-Text", "hrm_text", _B, "layers that run again"),
    # no attention
    Family("Mamba", "mamba", dict(vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=2, state_size=4),
           "no attention"),
    Family("Mamba-2", "mamba2",
           dict(vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=2, num_heads=4, head_dim=20, state_size=8,
                n_groups=1, expand=2),
           "no attention"),
    Family("RWKV", "rwkv", dict(vocab_size=N_VOCABULARY, hidden_size=40, num_hidden_layers=2, attention_hidden_size=40,
                                context_length=64), "no attention"),
)  # fmt: skip


class Result(NamedTuple):
    """What came of a family in one mode: the largest relative error of its sums, or why there is none."""

    error: float | None
    reason: str = ""
    n_layers: str = ""
    refused: bool = True  # by a message for users, not by any other exception


def build(family: Family, *, seed: int = 0, spread: float = 0.3) -> Any:
    """A model of a family, with everything random; a fresh one has zeros and ones in biases and norms."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    make: Any = transformers.AutoModelForCausalLM
    model = make.from_config(CONFIG_MAPPING[family.model_type](**family.options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def prompts() -> torch.Tensor:
    """Token ids [3, 12], the same for all families."""
    return torch.randint(3, N_VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


def decomposed(family: Family, processing: Any) -> Result:
    """Decompose all scores of a family, and compare the sums with the model's own scores."""
    from svf_lightning.errors import InputError
    from svf_lightning.replay import HeadSpace
    from svf_lightning.replay.bridge import check_folded, make_bridge

    model, tokens = build(family), prompts()
    query, key = torch.tensor(QUERY), torch.tensor(KEY)
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits[range(3), query]
    try:
        bridge = make_bridge(model, processing=processing)
        space = HeadSpace(bridge)
        if processing == "folded":
            check_folded(bridge, tokens)
        observed = space.observe(tokens, query)
        found = space.decompose(observed, key)
        space.attended(observed, key)
    except InputError as error:
        return Result(None, str(error).split(". Allowed", maxsplit=1)[0])
    except Exception as error:  # a crash is a result too
        return Result(None, f"{type(error).__name__}: {error}", refused=False)
    scores = found.contributions.sum(-1) + found.position
    for layer, cap in enumerate(space.caps):
        if cap is not None:
            scores[layer] = cap * (scores[layer] / cap).tanh()
    seen = observed.is_key[:, None].expand_as(scores)
    own = observed.scores[seen]
    largest = float((scores[seen] - own).abs().max() / own.abs().max())
    logits = observed.logits
    off = (logits - logits.mean(-1, keepdim=True)) - (expected - expected.mean(-1, keepdim=True))
    if float(off.abs().max() / expected.abs().max()) > 1e-4:
        return Result(None, "the processed model computes other logits")
    layers = "all" if space.n_layers == len(bridge.blocks) else f"{space.n_layers} of {len(bridge.blocks)}"
    return Result(largest, n_layers=layers)


def table(families: tuple[Family, ...]) -> tuple[str, int, int, int]:
    """The table in Markdown, and how many are exact in both modes, refused in one, and crashed."""
    lines = ["| family | `model_type` | raw | folded | layers | special |", "| --- | --- | --- | --- | --- | --- |"]
    exact = refused = crashed = 0
    for family in families:
        start = time.perf_counter()
        results = [decomposed(family, processing) for processing in ("raw", "folded")]
        is_exact = all(result.error is not None and result.error <= EXACT for result in results)
        crashes = any(not result.refused for result in results if result.error is None)
        exact, crashed = exact + is_exact, crashed + crashes
        refused += not is_exact and not crashes
        cells = [f"{r.error:.0e}" if r.error is not None else "no" if r.refused else "crash" for r in results]
        reasons = dict.fromkeys(r.reason for r in results if r.reason)
        special = "; ".join([family.special, *(f"*{reason}*" for reason in reasons)])
        layers = next((r.n_layers for r in results if r.n_layers), "")
        lines.append(f"| {family.name} | {family.model_type} | {' | '.join(cells)} | {layers} | {special} |")
        print(f"{family.name}: {', '.join(cells)} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
    summary = (
        f"{len(families)} configurations: {exact} are exact in both modes (largest relative error of a sum at most "
        f"{EXACT:.0e}, in float32), {refused} are refused with a reason in one or both, {crashed} crash."
    )
    return "\n".join([summary, "", *lines]), exact, refused, crashed


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families to look at; all, if none is named")
    parser.add_argument("--write", action="store_true", help="renew docs/families.md")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    chosen = tuple(f for f in FAMILIES if not arguments.names or f.name in arguments.names)
    text, *_ = table(chosen)
    print(text)
    if arguments.write and not arguments.names:
        page = Path(__file__).parents[1] / "docs" / "families.md"
        begin, end = "<!-- families: written by benchmarks/families.py -->", "<!-- end of families -->"
        before, rest = page.read_text(encoding="utf-8").split(begin)
        page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
