"""What the attention layers of a TransformerLens bridge compute, as their modules say it: the terms of a score.

With ``W_Q``, ``W_K`` and biases, a layer's scores are, for a query at position p and a key at position j,
``scale * q_p . k_j`` (below a soft cap), with ``q = M_p n_q(W_Q x + b_Q) t_p`` and ``k = M_j n_k(W_K y + b_K)``: M is
the rotation of a position, if there is one, n a norm of queries and keys (QK-norm; Henry et al. 2020, arXiv 2010.04245)
and t_p a factor of the position alone.

A norm divides by one number per token and head, as the norm of the residual stream does, so that
``n(v) = s(token) * (G C v) + c`` with gains G on the diagonal, a centring matrix C (LayerNorm), and a bias c. G and C
go into W and b; c stays apart, as it does not carry the token's scalar s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from svf_lightning.errors import InputError, bad_value
from svf_lightning.rotary import Layout

# names of the two norms in the attention modules of transformers
_NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
    ("qk_norm", "qk_norm"),
)
_SAME = 1e-4  # how far a norm's output may be from the formula it was read as, relative to the largest
_FACTORS = ("inv_norm_factor", "softmax_scale", "scaling")  # names of what scores are multiplied with
_FOLDED_WHEN_READ = "norms_folded_when_read"  # attribute of a bridge: norms by block
_ANGLES_OF_TABLE = "embed_positions"  # GPT-J's and CodeGen's sines and cosines


@dataclass(frozen=True)
class QKNorm:
    """A norm of queries or keys after their projection.

    Args:
        gain: g, one factor per component.
        shift: c, added at the end; None for none.
        is_centred: Takes the mean off first (LayerNorm; else RMSNorm).
        is_over_heads: One number per token for all heads together, else one per head.
        eps: Added to the mean square.
    """

    gain: Float[Tensor, "head H"]
    shift: Float[Tensor, "head H"] | None
    is_centred: bool
    is_over_heads: bool
    eps: float

    def centred(self, vectors: Float[Tensor, "... head H *after"], n_after: int = 0) -> Tensor:
        """C v: vectors minus their mean, if this norm takes it off."""
        return vectors - vectors.mean(self._dims(n_after), keepdim=True) if self.is_centred else vectors

    def scalars(self, projected: Float[Tensor, "... head H"]) -> Float[Tensor, "... head"]:
        """s, what each projected token is multiplied with; float32 at least."""
        wide = self.centred(projected.to(torch.promote_types(projected.dtype, torch.float32)))
        squares = wide.square().mean(self._dims(0), keepdim=True)
        s: Tensor = (squares + self.eps).rsqrt().squeeze(-1)
        return s.expand(projected.shape[:-1])

    def __call__(self, projected: Float[Tensor, "... head H"]) -> Float[Tensor, "... head H"]:
        """``n(v)``, computed from the formula above."""
        normed = self.centred(projected.to(torch.promote_types(projected.dtype, torch.float32))) * self.gain
        normed = normed * self.scalars(projected)[..., None]
        return normed if self.shift is None else normed + self.shift

    def _dims(self, n_after: int) -> tuple[int, ...]:
        last = -1 - n_after
        return (last - 1, last) if self.is_over_heads else (last,)


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one block of a bridge.

    Args:
        block: Number of the block: blocks without attention have none of these.
        attention: The bridge's component.
        W_Q: Query weights, as the model has them.
        W_K: Key weights; fewer heads with grouped queries.
        b_Q: Query bias, or None.
        b_K: Key bias, or None.
        scale: Factor of the scores.
        cap: Soft cap of the scores, or None.
        window: Number of keys that a query sees, itself included; None for all before it.
        chunk: Size of the chunks that a query sees its own of; None for no chunks.
        q_norm: Norm of the queries, or None.
        k_norm: Norm of the keys, or None.
        gain_in_place: Gains of both norms where these come after the rotation, so that they stand between the rotations
            of the two positions and are no part of W, nor of ``q_norm`` and ``k_norm`` here; or None.
        clip: Bound that queries and keys are clamped to, or None.
        layout: How components are paired by the rotation.
        is_rotary: Whether positions rotate queries and keys.
        key_factor: What projected keys are multiplied with; a part of W_K here (Falcon-H1).
        input_norm: Norm of what the heads read, where its gain is folded into W here and not in the model, or None.
    """

    block: int
    attention: Any
    W_Q: Float[Tensor, "head H D"]
    W_K: Float[Tensor, "key_head H D"]
    b_Q: Float[Tensor, "head H"] | None
    b_K: Float[Tensor, "key_head H"] | None
    scale: float
    cap: float | None
    window: int | None
    chunk: int | None
    q_norm: QKNorm | None
    k_norm: QKNorm | None
    gain_in_place: Float[Tensor, "head H"] | None
    clip: float | None
    layout: Layout
    is_rotary: bool
    key_factor: float = 1.0
    input_norm: QKNorm | None = None

    @property
    def read_hook(self) -> str:
        """Name of the hook point that shows what the heads read, to be given to :meth:`tokens`."""
        return f"blocks.{self.block}.{'attn' if self.input_norm is None else 'ln1'}.hook_in"

    def tokens(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What the heads read: as it is, or normalized without the gain if that was folded into W."""
        norm = self.input_norm
        if norm is None:
            return x
        v = x.unsqueeze(-2)
        return (norm.centred(v) * norm.scalars(v)[..., None]).squeeze(-2).to(x)

    def factors(self) -> dict[str, Tensor | None]:
        """W and b of the bilinear form, with centring and gains of the norms in them, and the norms' own biases c."""
        found: dict[str, Tensor | None] = {}
        for side, W, b, norm in (("Q", self.W_Q, self.b_Q, self.q_norm), ("K", self.W_K, self.b_K, self.k_norm)):
            shift = None
            if norm is not None:
                gain = norm.gain.to(W)
                W = norm.centred(W, 1) * gain[..., None]
                b = None if b is None else norm.centred(b) * gain
                shift = None if norm.shift is None else norm.shift.to(W)
            found |= {f"W_{side}": W, f"b_{side}": b, f"c_{side}": shift}
        return found

    def temperature(self, position: Tensor) -> Tensor | None:
        """t, what queries are multiplied with at these positions, float32; None where it is 1 everywhere.

        Ministral-3 and those layers of Llama-4 that do not rotate sharpen attention with the position (arXiv
        2501.19399).
        """
        original = self.attention.original_component
        config = getattr(original, "config", None)
        if getattr(original, "attn_temperature_tuning", False) and not self.is_rotary:
            grown = torch.log1p(torch.floor((position.float() + 1) / float(original.floor_scale)))
            return grown * float(original.attn_scale) + 1
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("llama_4_scaling_beta") is not None:
            longest = float(rope["original_max_position_embeddings"])
            return 1 + float(rope["llama_4_scaling_beta"]) * torch.log1p(torch.floor(position.float() / longest))
        return None


def attention_layers(bridge: Any) -> list[AttentionLayer]:
    """The attention of all blocks that have one.

    Raises:
        InputError: No block has one, or one of another kind; the message says which term is in the way.
    """
    model = model_name(bridge)
    blocks = getattr(bridge, "blocks", None)
    if blocks is None:
        raise _in_the_way(model, "TransformerLens does not show its layers as one stack of blocks")
    layers = [
        _read_layer(bridge, number, block.attn, model)
        for number, block in enumerate(blocks)
        if getattr(block, "attn", None) is not None
    ]
    if not layers:
        raise _in_the_way(model, "no layer has attention")
    shapes = {(tuple(layer.W_Q.shape), tuple(layer.W_K.shape)) for layer in layers}
    if len(shapes) > 1:
        described = " and ".join(f"{q[0]} heads over {k[0]} key heads of size {q[1]}" for q, k in sorted(shapes))
        raise _in_the_way(model, f"its layers have heads of different shapes ({described})")
    return layers


def model_name(bridge: Any) -> str:
    """What errors call the model: its architecture."""
    return str(getattr(bridge.cfg, "architecture", None) or type(bridge).__name__)


def _in_the_way(model: str, term: str) -> InputError:
    return InputError(
        f"{model} cannot be decomposed: {term}. Allowed: layers with scores that are dot products of projected tokens. "
        "Fix: use another model."
    )


def _read_layer(bridge: Any, number: int, attention: Any, model: str) -> AttentionLayer:
    original = attention.original_component
    where = f"layer {number}"
    if "kv_b" in attention.submodules or hasattr(original, "kv_b_proj") or hasattr(original, "kv_a_proj_with_mqa"):
        raise _in_the_way(
            model,
            f"{where} has multi-head latent attention (MLA), whose keys join a normalized part and a rotary part that "
            "is not, so no matrix stands between two tokens",
        )
    try:
        W_Q, W_K = attention.W_Q.detach().mT, attention.W_K.detach().mT
        b_Q, b_K = (None if b is None else b.detach() for b in (attention.b_Q, attention.b_K))
    except Exception as error:  # whatever TransformerLens stumbles over in a kind of attention that it does not split
        kind = type(original).__name__
        raise _in_the_way(model, f"{where} has attention of another kind ({kind}), without W_Q and W_K") from error
    n_heads, n_keys = len(W_Q), len(W_K)
    if b_Q is not None and b_Q.shape != W_Q.shape[:2]:  # interleaved with a gate, as W_Q was
        b_Q = b_Q.reshape(n_heads, -1)[:, : W_Q.shape[1]]
    if n_heads % n_keys or W_Q.shape[1:] != W_K.shape[1:]:
        raise _in_the_way(model, f"{where} has W_Q of shape {tuple(W_Q.shape)} and W_K of shape {tuple(W_K.shape)}")
    key_factor = float(getattr(original, "key_multiplier", None) or 1.0)
    if key_factor != 1:
        W_K, b_K = W_K * key_factor, None if b_K is None else b_K * key_factor
    q_norm, k_norm = (
        None if norm is None else _read_norm(norm, n, W_Q.shape[1], W_Q.device, model, where)
        for norm, n in zip(_norms(original), (n_heads, n_keys), strict=True)
    )
    gain_in_place = None
    if q_norm is not None and k_norm is not None and getattr(bridge.cfg, "qk_norm_after_rope", False):  # HunYuan
        gain_in_place = q_norm.gain * k_norm.gain.repeat_interleave(n_heads // n_keys, dim=0)
        q_norm, k_norm = (replace(norm, gain=torch.ones_like(norm.gain)) for norm in (q_norm, k_norm))
    input_norm = (getattr(bridge, _FOLDED_WHEN_READ, None) or {}).get(number)
    if input_norm is not None:
        W_Q, b_Q, W_K, b_K = (*_with_norm(W_Q, b_Q, input_norm), *_with_norm(W_K, b_K, input_norm))
    config = bridge.original_model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window, chunk = _window(config, original, number)
    return AttentionLayer(
        number,
        attention,
        W_Q,
        W_K,
        b_Q,
        b_K,
        scale=attention_scale(attention),
        cap=getattr(original, "attn_logit_softcapping", None),
        window=window,
        chunk=chunk,
        q_norm=q_norm,
        k_norm=k_norm,
        gain_in_place=gain_in_place,
        clip=getattr(config, "clip_qkv", None) or getattr(original, "clip_qkv", None),
        layout=_layout(bridge.cfg, original),
        is_rotary=_rotates(bridge.cfg, original),
        key_factor=key_factor,
        input_norm=input_norm,
    )


def _with_norm(W: Tensor, b: Tensor | None, norm: QKNorm) -> tuple[Tensor, Tensor | None]:
    """Weights [head, H, D] and bias of heads that read ``n(v)``, as weights and bias for v, normalized without gain."""
    folded = W * norm.gain.to(W)
    if norm.is_centred:  # of tokens without a mean, a mean of weights changes nothing
        folded = folded - folded.mean(-1, keepdim=True)
    if norm.shift is None:
        return folded, b
    of_shift = W @ norm.shift[0].to(W)
    return folded, of_shift if b is None else b + of_shift


def is_folded_when_read(bridge: Any) -> bool:
    """Whether :func:`fold_when_read` was called for a bridge."""
    return getattr(bridge, _FOLDED_WHEN_READ, None) is not None


@torch.no_grad()
def fold_when_read(bridge: Any) -> None:
    """Have the norms before attention folded into W_Q and W_K where these are read, with the model left as it is.

    That is the form of the scores that TransformerLens makes of the model itself in its compatibility mode, for models
    that it cannot do it to. Blocks whose heads do not read the output of their first norm have nothing to fold.

    Raises:
        InputError: Such a norm is neither LayerNorm nor RMSNorm.
    """
    model = model_name(bridge)
    if hasattr(bridge, "find_norms"):
        bridge.find_norms()
    shown: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            shown[name] = tensor.clone()

        return hook

    of_blocks = {
        number: (block, [f"blocks.{number}.{name}" for name in ("ln1.hook_out", "attn.hook_in")])
        for number, block in enumerate(getattr(bridge, "blocks", ()))
        if getattr(block, "attn", None) is not None and getattr(block, "ln1", None) is not None
    }
    hooks = [(name, keep(name)) for _, names in of_blocks.values() for name in names if name in bridge.hook_dict]
    bridge.run_with_hooks(torch.arange(4, device=bridge.W_E.device)[None], fwd_hooks=hooks, return_type=None)
    norms = {}
    for number, (block, (out, read)) in of_blocks.items():
        norm = block.ln1.original_component
        if isinstance(norm, torch.nn.Identity):
            continue
        if out in shown and read in shown and torch.equal(shown[out], shown[read]):
            norms[number] = _read_norm(norm, 1, shown[read].shape[-1], shown[read].device, model, f"layer {number}")
    setattr(bridge, _FOLDED_WHEN_READ, norms)


def attention_scale(attention: Any) -> float:
    """Factor of the scores of a bridge's attention: what the model itself says, else 1/sqrt(d_head)."""
    original = attention.original_component
    if type(original).__name__ in ("GPTNeoSelfAttention", "GPTNeoAttention"):
        return 1.0  # the only family without one
    divisor = getattr(original, "scale_attn", None)
    if divisor is not None:  # GPT-J and CodeGen divide
        return 1 / float(divisor)
    found = next((getattr(original, name) for name in _FACTORS if getattr(original, name, None) is not None), None)
    return float(attention.config.d_head**-0.5 if found is None else found)


def _norms(original: Any) -> tuple[Any, Any]:
    """The norms of queries and keys, None where there are none."""
    for names in _NORMS:
        found = [getattr(original, name, None) for name in names]
        modules = [getattr(norm, "original_component", norm) for norm in found]
        if any(isinstance(norm, torch.nn.Module) and not isinstance(norm, torch.nn.Identity) for norm in modules):
            return modules[0], modules[1]
    return None, None


@torch.no_grad()
def _read_norm(norm: Any, n_heads: int, d_head: int, device: torch.device, model: str, where: str) -> QKNorm:
    """Find a norm's formula from what it does to a few vectors: families differ in where they keep the gains.

    Raises:
        InputError: It is neither LayerNorm nor RMSNorm.
    """
    weight = getattr(norm, "weight", None)
    is_flat = weight is not None and weight.ndim == 1 and weight.numel() == n_heads * d_head and n_heads > 1
    is_split = weight is None and any(isinstance(part, torch.nn.ModuleList) for part in norm.children())
    eps = next(
        (
            float(getattr(part, name))
            for part in norm.modules()
            for name in ("eps", "variance_epsilon", "norm_eps")
            if getattr(part, name, None) is not None
        ),
        0.0,
    )
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    shape = (1, 1, n_heads * d_head) if is_flat else (1, n_heads, 1, d_head) if is_split else (1, 1, n_heads, d_head)

    def apply(vectors: Tensor) -> Tensor:
        out: Tensor = norm(vectors.to(dtype).reshape(shape)).reshape(n_heads, d_head)
        return out.float()

    generator = torch.Generator().manual_seed(0)
    sign = 1.0 - 2.0 * (torch.arange(n_heads * d_head) % 2).view(n_heads, d_head)
    # no component is small, with or without the mean, so that gains come out to rounding
    first, second = (
        (sign * (1 + torch.rand(n_heads, d_head, generator=generator))).to(device, dtype).float() for _ in range(2)
    )
    shift = (apply(first) + apply(-first)) / 2  # all but the shift changes its sign
    parameters = {
        ending: [p.detach().float() for name, p in norm.named_parameters() if name.endswith(ending)]
        for ending in ("weight", "bias")
    }
    has_shift = bool(parameters["bias"])
    tolerance = max(_SAME, 8 * torch.finfo(dtype).eps)

    def exactly(measured: Tensor, stored: list[Tensor], offsets: tuple[float, ...]) -> Tensor:
        """What is stored, if it is what was measured: measuring rounds."""
        flat = torch.cat([part.reshape(-1) for part in stored]) if stored else measured.new_zeros(0)
        if flat.numel() in (d_head, n_heads * d_head):
            for offset in offsets:
                candidate = (flat + offset).reshape(-1, d_head).expand(n_heads, d_head)
                if bool((candidate - measured).abs().max() <= tolerance * measured.abs().max()):
                    return candidate
        return measured

    for is_centred in (False, True):
        plain = QKNorm(torch.ones(n_heads, d_head, device=device), None, is_centred, is_flat, eps)
        gain = exactly((apply(first) - shift) / plain(first), parameters["weight"], (0.0, 1.0))
        read = QKNorm(gain, exactly(shift, parameters["bias"], (0.0,)) if has_shift else None, is_centred, is_flat, eps)
        expected = apply(second)
        if bool((read(second) - expected).abs().max() <= tolerance * expected.abs().max()):
            return read
    raise _in_the_way(model, f"{where} normalizes in a way that is neither LayerNorm nor RMSNorm")


def _rotates(cfg: Any, original: Any) -> bool:
    """Whether positions rotate the queries and keys of a layer."""
    for name in ("use_rope", "is_local_attention"):
        # Llama-4 has layers without; of AFMoE, only the local ones rotate
        if hasattr(original, name) and (name == "use_rope" or type(original).__name__ == "AfmoeAttention"):
            return bool(getattr(original, name))
    if getattr(getattr(original, "config", None), "alibi", False):
        return False  # Falcon-RW, which has angles and does not use them
    return getattr(cfg, "positional_embedding_type", None) == "rotary" or hasattr(original, _ANGLES_OF_TABLE)


def _layout(cfg: Any, original: Any) -> Layout:
    """How a model rotates, if it does."""
    if getattr(cfg, "rotary_interleaved_cos_sin", False):
        return "interleaved"
    in_pairs = getattr(cfg, "rotary_adjacent_pairs", False) or hasattr(original, _ANGLES_OF_TABLE)
    return "adjacent" if in_pairs or type(original).__name__ == "Llama4TextAttention" else "halves"


def _window(config: Any, original: Any, number: int) -> tuple[int | None, int | None]:
    """Number of keys that a query sees in a layer, itself included, and size of the chunks that it sees its own of."""
    if hasattr(original, "attention_type") and hasattr(config, "window_size"):  # GPT-Neo
        return (config.window_size if original.attention_type == "local" else None), None
    kinds = getattr(config, "layer_types", None)
    kind = None if kinds is None else kinds[number]
    chunk = getattr(config, "attention_chunk_size", None)
    if kind == "chunked_attention" and chunk is not None:
        return None, int(chunk)
    size = getattr(config, "sliding_window", None)
    if size is None or getattr(config, "use_sliding_window", True) is False:
        return None, None
    return (size if kind in (None, "sliding_attention") else None), None


def check_scale(scales: list[float]) -> float:
    """The first of the layers' scales, which the others are relative to.

    Raises:
        InputError: One of them is 0 or not finite.
    """
    if not all(scale and abs(scale) < float("inf") for scale in scales):
        raise bad_value("scale", scales, "finite factors of scores, not 0", "use another model")
    return scales[0]
