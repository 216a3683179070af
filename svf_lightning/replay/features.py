"""Proxy features of a real model: what stands for its features, as nobody knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value
from svf_lightning.matrix_files import read_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECODER_NAMES = ("W_dec", "decoder.weight", "dictionary", "features", "W")


def token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Ids of words that are single tokens, as they occur inside a sentence (after a space) or else alone.

    Raises:
        InputError: A word is no single token.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = []
    for word in words:
        for text in (" " + word.lstrip(), word):
            tokens: Any = tokenizer.encode(text, add_special_tokens=False)
            if len(tokens) == 1 and tokens[0] != unknown:
                ids.append(int(tokens[0]))
                break
        else:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise bad_value(
                "features", word, f"words that are single tokens; this one is {pieces}", "name another word"
            )
    return ids


def read_dictionary(path: str | Path, d_model: int) -> Float[Tensor, "D N"]:
    """A dictionary of features, such as the decoder of a sparse autoencoder, as columns [D, N], float32.

    Args:
        path: A .npy file, or a .safetensors file with one matrix (or one named W_dec, decoder.weight, dictionary,
            features or W); [D, N] or [N, D], told apart by ``d_model``.
        d_model: D of the model.

    Raises:
        InputError: The file cannot be read, or holds no matrix of that size.
    """
    tensors = read_matrices("features", path, f"one matrix [{d_model}, n_features], such as an SAE decoder")
    name = next((n for n in _DECODER_NAMES if n in tensors), next(iter(tensors), ""))
    if len(tensors) != 1 and name not in _DECODER_NAMES:
        allowed = f"one matrix, or one that is named {' or '.join(_DECODER_NAMES)}"
        raise bad_value(
            f"features: {path}", sorted(tensors), allowed, "export the dictionary (SAE decoder) in this form"
        )
    matrix = tensors[name].float()
    if matrix.ndim != 2 or d_model not in matrix.shape:
        raise bad_value(
            "features.shape", tuple(matrix.shape), f"[{d_model}, n_features] or transposed", "use the model's own"
        )
    return matrix if matrix.shape[0] == d_model else matrix.T.contiguous()


def named_pairs(words: Sequence[str], pairs: Sequence[Sequence[str]]) -> Int[Tensor, "P 2"]:
    """Pairs of feature names as indices.

    Raises:
        InputError: A name that is not among the features, or a pair that is no pair.
    """
    index = {word: i for i, word in enumerate(words)}
    indices = []
    for pair in pairs:
        if len(pair) != 2 or any(name not in index for name in pair):
            raise bad_value("feature_pairs", list(pair), f"two of {list(words)}", "name features that are there")
        indices.append([index[name] for name in pair])
    return torch.tensor(indices, dtype=torch.long).reshape(-1, 2)
