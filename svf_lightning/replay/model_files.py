"""Read Hugging Face model folders and tokenizers, and say what is wrong with those that cannot be read.

Nothing from outside is unpickled or run: weights are safetensors, or .bin files read with torch's restricted unpickler
(``weights_only``), and a model that brings its own code is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svf_lightning.errors import CheckpointError, InputError, reason
from svf_lightning.replay.source import CheckpointRef, LoadedCheckpoint
from svf_lightning.run.fingerprint import N_SAMPLED, Fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


_LOADING = threading.RLock()  # held while transformers loads
_PIECE = 4 << 20  # bytes that one thread hashes at a time
CONFIG = "config.json"
# files of weights, the preferred one first, and whether they are safetensors; name.index.json stands for shards
FORMATS = (("model.safetensors", True), ("pytorch_model.bin", False))
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SMALL_FILES = (
    CONFIG,
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def weight_hash(model: torch.nn.Module) -> str:
    """Hash of all parameters and persistent buffers: names, dtypes, shapes and bytes.

    It does not depend on how the weights were stored (file format, shards), and a tensor that is tied to another one
    counts once, under the name that sorts first.

    Returns:
        16 hex digits.
    """
    return hash_and_fingerprint(model)[0]


def hash_and_fingerprint(model: torch.nn.Module) -> tuple[str, Fingerprint]:
    """:func:`weight_hash`, and what tells this checkpoint from others tensor by tensor, from one pass."""
    total = hashlib.blake2b(digest_size=8)
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, str] = {}
    samples: list[np.ndarray] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the interpreter lock
        for name, tensor in sorted(model.state_dict().items()):
            place = (str(tensor.device), tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            header = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
            own = hashlib.blake2b(header, digest_size=8)
            total.update(header)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            values = flat.view(torch.uint8).numpy()
            pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
            for digest in pool.map(lambda piece: hashlib.blake2b(piece, digest_size=16).digest(), pieces):
                total.update(digest)
                own.update(digest)
            tensors[name] = f"{own.hexdigest()} {'x'.join(map(str, tensor.shape))}"
            samples.append(_sample(name, flat))
    return total.hexdigest(), Fingerprint(tensors, np.stack(samples) if samples else np.zeros((0, N_SAMPLED)))


def _sample(name: str, flat: torch.Tensor) -> np.ndarray:
    """Entries of a tensor, always the same ones; zeros if it has fewer."""
    n = len(flat)
    entries = np.arange(n) if n <= N_SAMPLED else np.random.default_rng(list(name.encode())).integers(n, size=N_SAMPLED)
    sample = np.zeros(N_SAMPLED, dtype=np.float32)
    sample[: len(entries)] = flat[torch.from_numpy(entries)].float().numpy()
    return sample


def load_folder(
    folder: Path, ref: CheckpointRef, dtype: torch.dtype, where: str, *, revision: str = ""
) -> LoadedCheckpoint:
    """Load a Hugging Face model folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint lacks weights.
        InputError: It is not a causal language model.
    """
    missing = missing_files(folder)
    if missing:
        raise CheckpointError(f"{where} is incomplete: it has no {missing}. {foreign_format(folder)}".rstrip())
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be loaded: its {CONFIG} is damaged ({reason(error)}).") from error
    check_causal_lm(config, where)
    if config.get("quantization_config"):
        raise InputError(
            f"{where} has quantized weights. Allowed: floating-point weights, or a GGUF file (GGUFCheckpoint). Fix: "
            "choose the model before it was quantized."
        )
    _, safe = weight_files(folder)
    return load_pretrained(folder, ref, dtype, where, revision=revision, use_safetensors=safe)


def load_pretrained(
    folder: Path, ref: CheckpointRef, dtype: torch.dtype, where: str, *, revision: str = "", **options: Any
) -> LoadedCheckpoint:
    """Load what transformers reads from a folder, and refuse it unless it is whole.

    Args:
        folder: Where the files lie.
        ref: Which checkpoint this is.
        dtype: Floating-point type of the weights.
        where: What errors call it.
        revision: Commit hash of the hub, or "".
        options: Further arguments of ``from_pretrained``, such as ``gguf_file``.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            # transformers 5 reads with weights_only, so torch.load builds tensors and nothing else
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,  # mismatched weights are refused below, by name
                output_loading_info=True,
                **options,
            )
        except pickle.UnpicklingError as error:  # torch's message advises unsafe unpickling
            raise CheckpointError(
                f"{where} cannot be loaded: its .bin file is damaged, or more than tensors."
            ) from error
        except Exception as error:  # libraries raise errors of many types for damaged files
            raise CheckpointError(f"{where} cannot be loaded ({reason(error, hide=folder)}).") from error
    model, report = loaded
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    for problem, names in (
        ("lacks weights that its configuration asks for", report["missing_keys"]),
        ("has weights of other shapes than its configuration asks for", mismatched),
    ):
        if names:  # transformers has filled them with random numbers
            raise CheckpointError(f"{where} {problem}: {_some(names)}.")
    if report["unexpected_keys"]:
        unused = _some(report["unexpected_keys"])
        warnings.warn(f"{where} has weights that its configuration has no use for: {unused}.", stacklevel=2)
    return as_loaded(ref, model, revision)


def read_tensors(path: Path, where: str) -> dict[str, Any]:
    """What is in a file of torch.save, mapped from the disk: a dictionary of tensors, numbers and text; no code.

    Raises:
        CheckpointError: It is damaged, or more than that.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises errors of many types for damaged files
        raise CheckpointError(f"{where} cannot be read ({reason(error, hide=path.parent)}).") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} cannot be read: {path.name} has no dictionary in it.")
    return found


def filled(
    build: Callable[[], Any], state: Mapping[str, Any], where: str, kind: str, *, without: Sequence[str] = ()
) -> Any:
    """A model of transformers with its weights, every one of them.

    Args:
        build: Makes the model, without these weights.
        state: Weights under the model's names.
        where: What errors call the checkpoint.
        kind: What it would be if it fitted.
        without: Names that need not be there.

    Raises:
        CheckpointError: Names or shapes do not fit.
    """
    try:
        model = build()
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # sizes do not fit
        raise CheckpointError(f"{where} is no {kind}: {reason(error)}.") from error
    lost = [name for name in missing if name not in without]
    if lost or unexpected:
        which = _some(lost or unexpected)
        raise CheckpointError(f"{where} is no {kind}: it {'lacks' if lost else 'also has'} {which}.")
    return model


def as_loaded(ref: CheckpointRef, model: Any, revision: str = "") -> LoadedCheckpoint:
    """A model, made ready to be looked at and hashed."""
    model.eval()
    model.requires_grad_(False)
    return LoadedCheckpoint(ref, model, revision, *hash_and_fingerprint(model))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def weight_files(folder: Path) -> tuple[list[str], bool]:
    """The files that hold the weights of a folder, and whether they are safetensors; no files if there are none."""
    for single, safe in FORMATS:
        if (folder / single).is_file():
            return [single], safe
        index = folder / f"{single}.index.json"
        if index.is_file():
            return shard_files(index), safe
    return [], True


def shard_files(index: Path) -> list[str]:
    """The files that an index of shards names.

    Raises:
        CheckpointError: It is damaged, or names files outside of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index.parent.name} cannot be loaded: its {index.name} is damaged.") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index.parent.name} cannot be loaded: its {index.name} names files outside of it.")
    return names


def missing_files(folder: Path, *, weights: bool = True) -> str:
    """What a model folder lacks, or an empty string. Without ``weights``: what a tokenizer's folder lacks."""
    if not (folder / CONFIG).is_file():
        return CONFIG
    if not weights:
        return "" if has_tokenizer(folder) else "tokenizer"
    files, _ = weight_files(folder)
    if not files:
        return "weights (looked for model.safetensors, pytorch_model.bin, and an index of either)"
    return ", ".join(name for name in files if not (folder / name).is_file())


def foreign_format(folder: Path) -> str:
    """A sentence about weights in a format that has to be converted first, and the command for it; "" for none."""

    def has(*globs: str) -> bool:
        return any(next(folder.glob(pattern), None) is not None for pattern in globs)

    if has("global_step*/*_model_states.pt", "zero_to_fp32.py", "*_model_states.pt"):
        return (
            "Its weights are DeepSpeed's, in parts: convert them with `python zero_to_fp32.py . . "
            "--safe_serialization` in that folder. "
        )
    if has("pytorch_model_fsdp_*/.metadata", "*.distcp", "pytorch_model_fsdp_*/*.distcp"):
        return "Its weights are FSDP's, in parts: convert them with `accelerate merge-weights pytorch_model_fsdp_0 .`. "
    if has("lit_model.pth"):
        return "It is a checkpoint of LitGPT without its model_config.yaml: copy that beside the weights. "
    if has("*.pt"):
        return "For nanoGPT's .pt files there is NanoGPTCheckpoints. "
    return ""


def check_causal_lm(config: Any, where: str) -> None:
    """Check that a model continues text.

    Raises:
        InputError: It does something else, it is unknown, or it needs code of its own.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = config if isinstance(config, Mapping) else {}
    family = config.get("model_type")
    # transformers would also load an encoder such as BERT, with an untrained head
    encoder = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    other = [
        name
        for name in config.get("architectures") or []
        if re.search("For(?!CausalLM|ConditionalGeneration)[A-Z]", name)
    ]
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.get("is_encoder_decoder") or other:
        described = f"model_type {family!r}" + (f", {other[0]}" if other else "")
        raise InputError(
            f"{where} is not a causal language model ({described}). Allowed: decoders that transformers knows, such as "
            "gpt_neox, gpt2, llama. Fix: choose another model."
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    # checked first: without a vocabulary, transformers silently makes an empty tokenizer
    return any((folder / name).is_file() for name in VOCABULARIES)


def load_tokenizer(folder: Path, where: str, **options: Any) -> PreTrainedTokenizerBase:
    """Read the fast tokenizer of a folder; ``options`` go to AutoTokenizer.

    Raises:
        InputError: It cannot be read, or is not a fast one.
    """
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # libraries raise errors of many types for damaged files
            raise InputError(
                f"the tokenizer of {where} cannot be read ({reason(error, hide=folder)}). Allowed: a tokenizer that "
                "AutoTokenizer reads. Fix: save it again (tokenizer.save_pretrained)."
            ) from error
    return check_fast(tokenizer, where)


def load_config(folder: Path) -> PretrainedConfig | None:
    """Read the configuration of a folder; None if it is damaged, which loading the model reports."""
    from transformers import AutoConfig

    with _quiet(), suppress(Exception):  # libraries raise errors of many types for damaged files
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return config
    return None


def vocabulary_hash(folder: Path) -> str:
    """Hash of the vocabulary files of a folder; of none, if it has none."""
    total = hashlib.blake2b(digest_size=8)
    for name in (*VOCABULARIES, "merges.txt"):
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.blake2b((folder / name).read_bytes()).digest())
    return total.hexdigest()


def check_fast(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if it tells where in the text each token lies.

    Raises:
        InputError: It is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of {where} is not a fast one ({type(tokenizer).__name__}). Allowed: a tokenizer with "
            "tokenizer.json. Fix: read it with transformers.AutoTokenizer and save it again."
        )
    return tokenizer


def no_bar() -> Any:
    """Progress bars that stay silent: downloads run beside the one of the run."""
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return NoBar


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: what matters in them is checked and said here.

    One thread at a time, as transformers changes global state while it loads. Two threads would share it, and could
    leave a tied head with random weights.
    """
    from huggingface_hub import utils as hub_utils
    from transformers import utils

    with _LOADING:
        logging: Any = utils.logging
        hub: Any = hub_utils
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        no_hub_bars = hub.are_progress_bars_disabled()
        logging.set_verbosity_error()
        if bars:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
                if no_hub_bars:  # the line above enables these bars as well
                    hub.disable_progress_bars()
