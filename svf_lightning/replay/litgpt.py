"""Checkpoints of LitGPT (github.com/Lightning-AI/litgpt): ``lit_model.pth`` and ``model_config.yaml`` in a folder.

Models with the shape of GPT-NeoX (Pythia) and of Llama are read, into the classes of transformers; of any other,
LitGPT's own command converts the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from torch import Tensor

from svf_lightning.errors import CheckpointError, reason
from svf_lightning.replay.model_files import as_loaded, filled, read_tensors
from svf_lightning.replay.source import CheckpointRef, LoadedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"
CONVERT = "convert it with `litgpt convert_from_litgpt`, and save the weights and a config.json beside each other"

# what a field of model_config.yaml is where it says nothing, of those that change what is computed
_DEFAULTS: dict[str, Any] = {
    "norm_class_name": "LayerNorm", "norm_eps": 1e-5, "norm_qk": False, "post_attention_norm": False,
    "post_mlp_norm": False, "parallel_residual": True, "shared_attention_norm": False, "head_size": None,
    "n_query_groups": None, "attn_bias": False, "attention_scores_scalar": None, "sliding_window_size": None,
    "attention_logit_softcapping": None, "rope_base": 10000, "rotary_percentage": 0.25, "rope_condense_ratio": 1,
    "rope_adjustments": None, "rope_interleave": False, "rope_local_base_freq": None, "intermediate_size": None,
    "bias": True, "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "none", "scale_embeddings": False,
    "lm_head_bias": False, "final_logit_softcapping": None, "norm_1": True, "norm_2": True, "latent_attention": None,
}  # fmt: skip
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "padded_vocab_size")


class _Shape(NamedTuple):
    """A family of models, and where transformers has its parts."""

    name: str
    has: dict[str, tuple[Any, ...]]  # values of fields that make a model one of these
    parts: dict[str, str]  # by LitGPT's names
    outer: dict[str, str]


_COMMON: dict[str, tuple[Any, ...]] = {
    **{field: (_DEFAULTS[field],) for field in (
        "norm_qk", "post_attention_norm", "post_mlp_norm", "shared_attention_norm", "attention_scores_scalar",
        "sliding_window_size", "attention_logit_softcapping", "rope_interleave", "rope_local_base_freq",
        "scale_embeddings", "lm_head_bias", "final_logit_softcapping", "norm_1", "norm_2", "latent_attention",
    )},
    "attn_bias": (False, None),
}  # fmt: skip
_NEOX = _Shape(
    "GPT-NeoX",
    {**_COMMON, "mlp_class_name": ("GptNeoxMLP",), "norm_class_name": ("LayerNorm",), "bias": (True,)},
    {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
        "attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
    },
    {"transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm"},
)  # fmt: skip
_LLAMA = _Shape(
    "Llama",
    {
        **_COMMON, "mlp_class_name": ("LLaMAMLP",), "norm_class_name": ("RMSNorm",), "bias": (False,),
        "parallel_residual": (False,), "rotary_percentage": (1.0,),
    },
    {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    },
    {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"},
)  # fmt: skip
_ROPE = {  # LitGPT's names of what Llama 3.1 does to the frequencies
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}  # fmt: skip


def is_litgpt(folder: Path) -> bool:
    """Whether LitGPT has written a model into a folder."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def load_litgpt(folder: Path, ref: CheckpointRef, dtype: torch.dtype, where: str) -> LoadedCheckpoint:
    """Read a checkpoint into memory, as a model of transformers.

    Args:
        folder: Where the files lie.
        ref: Which checkpoint this is.
        dtype: Floating-point type of the weights.
        where: What errors call it.

    Raises:
        CheckpointError: It is damaged, or of another shape than those that are read.
    """
    from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

    shape, settings = _read_settings(folder, where)
    found = read_tensors(folder / WEIGHTS, where)
    state = found.get("model", found)
    config: Any = _config(shape, settings, where)
    make = LlamaForCausalLM if shape is _LLAMA else GPTNeoXForCausalLM
    model = filled(
        lambda: make(config),
        _renamed(state, shape, settings, where),
        where,
        f"checkpoint of LitGPT with the shape of a {shape.name}",
    )
    return as_loaded(ref, model.to(dtype))


def litgpt_config(folder: Path, where: str) -> PretrainedConfig:
    """The configuration in a folder, as one of transformers.

    Raises:
        CheckpointError: It is damaged, or of another shape than those that are read.
    """
    return _config(*_read_settings(folder, where), where)


def _read_settings(folder: Path, where: str) -> tuple[_Shape, dict[str, Any]]:
    try:
        said = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{where} cannot be loaded: its {CONFIG} is damaged ({reason(error)}).") from error
    said = said if isinstance(said, Mapping) else {}
    absent = [key for key in _SIZES if not (isinstance(said.get(key), int) and said[key] > 0)]
    if absent:
        raise CheckpointError(f"{where} cannot be loaded: its {CONFIG} has no {', '.join(absent)}.")
    settings = {**_DEFAULTS, **said}
    n_head = settings["n_head"]
    settings["head_size"] = settings["head_size"] or settings["n_embd"] // n_head
    settings["n_query_groups"] = settings["n_query_groups"] or n_head
    settings["intermediate_size"] = settings["intermediate_size"] or 4 * settings["n_embd"]
    shape = _LLAMA if settings["mlp_class_name"] == "LLaMAMLP" else _NEOX
    other = [f"{field}: {settings[field]}" for field, values in shape.has.items() if settings[field] not in values]
    if shape is _NEOX and (settings["n_query_groups"], settings["head_size"] * n_head) != (n_head, settings["n_embd"]):
        other.append("key heads or a size of heads of its own")
    if set(settings["rope_adjustments"] or _ROPE) != _ROPE.keys():
        other.append("rope_adjustments")
    if other:
        raise CheckpointError(
            f"{where} is a checkpoint of LitGPT whose model is neither a GPT-NeoX nor a Llama "
            f"({', '.join(other[:3])}): {CONVERT}."
        )
    return shape, settings


def _config(shape: _Shape, settings: Mapping[str, Any], where: str) -> PretrainedConfig:
    try:
        return _in_transformers(shape, settings)
    except Exception as error:  # transformers raises errors of many types for sizes that do not fit each other
        raise CheckpointError(f"{where} cannot be loaded: its {CONFIG} does not fit ({reason(error)}).") from error


def _in_transformers(shape: _Shape, settings: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import GPTNeoXConfig, LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(settings["rope_base"])}
    if settings["rope_adjustments"]:
        rope |= {"rope_type": "llama3", **{_ROPE[k]: v for k, v in settings["rope_adjustments"].items()}}
    elif settings["rope_condense_ratio"] != 1:
        rope |= {"rope_type": "linear", "factor": float(settings["rope_condense_ratio"])}
    common: dict[str, Any] = {
        "vocab_size": settings["padded_vocab_size"],
        "hidden_size": settings["n_embd"],
        "num_hidden_layers": settings["n_layer"],
        "num_attention_heads": settings["n_head"],
        "intermediate_size": settings["intermediate_size"],
        "max_position_embeddings": settings["block_size"],
        "tie_word_embeddings": False,  # LitGPT stores both
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape is _LLAMA:
        return LlamaConfig(
            **common, rope_parameters=rope, head_dim=settings["head_size"], rms_norm_eps=settings["norm_eps"],
            num_key_value_heads=settings["n_query_groups"],
        )  # fmt: skip
    rope["partial_rotary_factor"] = settings["rotary_percentage"]
    return GPTNeoXConfig(
        **common, rope_parameters=rope, layer_norm_eps=settings["norm_eps"],
        use_parallel_residual=settings["parallel_residual"], attention_bias=True,
        hidden_act="gelu" if settings["gelu_approximate"] == "none" else "gelu_pytorch_tanh",
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip


def _renamed(state: Mapping[str, Any], shape: _Shape, settings: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """A state dict with the names of transformers. LitGPT has all queries of a layer first, then keys, then values."""
    if any("lora" in name or "adapter" in name or "gating_factor" in name for name in state):
        raise CheckpointError(
            f"{where} has weights of an adapter beside those of the model. Merge them with `litgpt merge_lora`."
        )
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
        if inner is None:
            part, _, end = name.rpartition(".")
            found[f"{shape.outer.get(part, part)}.{end}"] = tensor
            continue
        layer, part, end = inner.groups()
        place = "gpt_neox.layers" if shape is _NEOX else "model.layers"
        if part != "attn.qkv":
            found[f"{place}.{layer}.{shape.parts.get(part, part)}.{end}"] = tensor
            continue
        size, n_keys = settings["head_size"], settings["n_query_groups"]
        sizes = [settings["n_head"] * size, n_keys * size, n_keys * size]
        if len(tensor) != sum(sizes):
            raise CheckpointError(f"{where}: {name} has {len(tensor)} rows, and {CONFIG} asks for {sum(sizes)}.")
        parts = tensor.split(sizes)
        if shape is _LLAMA:
            found |= {
                f"{place}.{layer}.self_attn.{letter}_proj.{end}": part
                for letter, part in zip("qkv", parts, strict=True)
            }
        else:  # GPT-NeoX has query, key and value of each head together
            heads = [part.reshape(settings["n_head"], size, *part.shape[1:]) for part in parts]
            found[f"{place}.{layer}.{shape.parts[part]}.{end}"] = torch.cat(heads, 1).flatten(0, 1)
    return found
