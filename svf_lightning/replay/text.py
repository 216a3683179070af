"""Running text: what the tokens are like that a model's heads read, beside those of the prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.bridged import AttentionLayer, attention_layers
from svf_lightning.errors import CheckpointError, bad_value, reason
from svf_lightning.replay.taps import Hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

PYDOC = "pydoc"
WINDOW = 128  # tokens that see each other; fewer for a model with a shorter context
_CHARACTERS_PER_TOKEN = 8  # more than a tokenizer of a language model needs, so that not all of a long text is read
_TOKENS_AT_A_TIME = 2048
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Text:
    """The tokens of a text.

    Args:
        tokens: Ids in their order, without special tokens.
        bos: Id that every window begins with; None for none.
    """

    tokens: tuple[int, ...]
    bos: int | None

    @property
    def hash(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(repr((self.tokens, self.bos)).encode()).hexdigest()

    def windows(self, n_positions: int | None) -> Int[Tensor, "window n"]:
        """The text cut into windows of equal length; a shorter rest is left out, if it is not all that there is.

        Args:
            n_positions: The model's context window; None if it has no limit.
        """
        length = WINDOW if n_positions is None else min(WINDOW, n_positions)
        n_own = min(max(1, length - (self.bos is not None)), len(self.tokens))
        whole = torch.tensor(self.tokens[: len(self.tokens) // n_own * n_own]).view(-1, n_own)
        if self.bos is None:
            return whole
        return torch.cat([torch.full((len(whole), 1), self.bos), whole], dim=1)

    def batches(self, n_positions: int | None) -> tuple[Int[Tensor, "batch n"], ...]:
        """The same windows, some at a time."""
        windows = self.windows(n_positions)
        return torch.split(windows, max(1, _TOKENS_AT_A_TIME // windows.shape[1]))


def read_text(where: str, tokenizer: PreTrainedTokenizerBase, n_tokens: int, bos: int | None) -> Text:
    """The first tokens of a text.

    Args:
        where: A file in UTF-8; or "pydoc", Python's own manual, about 100,000 words that every Python has (they differ
            between its versions).
        tokenizer: The model's.
        n_tokens: Most tokens to take, >= 1.
        bos: Token that every window begins with.

    Raises:
        InputError: The file cannot be read, or has fewer than two tokens.
    """
    if where == PYDOC:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = _read(where)
    found: list[int] = tokenizer(
        text[: n_tokens * _CHARACTERS_PER_TOKEN], add_special_tokens=False, verbose=False
    )["input_ids"]  # fmt: skip
    if len(found) < 2:
        raise bad_value("text", where, "a text of at least two tokens", "name another file")
    return Text(tuple(found[:n_tokens]), bos)


def _read(where: str) -> str:
    allowed = f"{PYDOC}, or a text file in UTF-8 of at most {_MAX_BYTES >> 20} MiB"
    try:
        size = Path(where).stat().st_size
        text = Path(where).read_text("utf-8") if size <= _MAX_BYTES else ""
    except (OSError, ValueError) as error:  # a UnicodeDecodeError, or a name that no file can have
        raise bad_value("text", where, f"{allowed} ({reason(error)})", "change --data.text") from error
    if size > _MAX_BYTES:
        raise bad_value("text", where, allowed, "take a part of it")
    return text


@torch.inference_mode()
def hand_over_reads(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "batch n"],
    length: Int[Tensor, "batch"] | None,
    take: Callable[[int, Float[Tensor, "tokens D"]], None],
    *,
    layers: Sequence[AttentionLayer] | None = None,
) -> None:
    """Run a model, and hand over what the heads of each layer read, layer by layer as it happens.

    The first token is left out: many models make of it a place where heads park attention, with a residual that is
    tens of times as long as any other. So is padding.

    Args:
        bridge: The model; in "folded" processing its heads read normalized residuals without gain.
        tokens: Ids, padded on the right.
        length: Tokens of each row that are no padding; None for all.
        take: Called once for each layer with attention, with its number among these.
        layers: These layers, if they were read already.

    Raises:
        CheckpointError: Numbers beyond the range of the weights' dtype.
    """
    read_ones = attention_layers(bridge) if layers is None else layers
    device = bridge.W_E.device
    tokens = tokens.to(device)
    position = torch.arange(tokens.shape[1], device=device)
    seen = (position > 0).expand(tokens.shape)
    if length is not None:
        seen = seen & (position < length.to(device)[:, None])

    def hand(layer: int) -> Callable[..., None]:
        def hook(x: Tensor, hook: object) -> None:
            read = read_ones[layer].tokens(x[seen])
            if not bool(torch.isfinite(read).all()):
                raise CheckpointError(
                    f"what the heads of layer {read_ones[layer].block} read overflows; try --model.dtype=float32"
                )
            take(layer, read)

        return hook

    hooks: Hooks = [(layer.read_hook, hand(number)) for number, layer in enumerate(read_ones)]
    bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
