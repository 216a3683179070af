"""Checkpoints of nanoGPT (github.com/karpathy/nanoGPT): a .pt file with a state dict and ``model_args``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svf_lightning.checkpoint_names import read_name
from svf_lightning.errors import CheckpointError, InputError, bad_value, one_line
from svf_lightning.replay.hub import HubCheckpoints
from svf_lightning.replay.model_files import as_loaded, filled, has_tokenizer, load_tokenizer, read_tensors
from svf_lightning.replay.source import CheckpointRef, CheckpointSource, LoadedCheckpoint, check_selection, select_steps

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_COMPILED = "_orig_mod."  # what torch.compile puts before the names
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D in GPT-2
_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


class NanoGPTCheckpoint(CheckpointSource):
    """Checkpoints that nanoGPT has written, as GPT-2 models of transformers.

    Files are read with ``weights_only``: tensors and numbers, no code.

    Args:
        file: A .pt file, or a folder with one for each step (its ``iter_num``, or else the number in its name).
        tokenizer: A folder with the tokenizer that the training text was cut with, or a repository of the hub; "gpt2"
            for nanoGPT's own (tiktoken's gpt2 encoding).
        steps: Of a folder: which steps, as for FolderCheckpoints.

    Raises:
        InputError: No such file.
    """

    def __init__(self, file: str, tokenizer: str = "gpt2", steps: str | list[int] = "all") -> None:
        check_selection("steps", steps)
        self.file, self.tokenizer_from, self.steps = Path(file).expanduser(), tokenizer, steps
        if not self.file.exists():
            raise bad_value("file", str(file), "a .pt file of nanoGPT, or a folder with such files", "check the path")
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._files: dict[CheckpointRef, Path] = {}

    def identity(self) -> dict[str, str]:
        """Kind and the file's name, or the folder's."""
        return {"kind": "nanogpt", "name": self.file.resolve().name}

    def model_name(self) -> str:
        """The file's name without its ending."""
        return self.file.resolve().stem

    def refs(self) -> list[CheckpointRef]:
        """The file, or the chosen ones of the folder.

        Raises:
            InputError: There are none, or two of one step, or a file is none of nanoGPT's.
        """
        if not self._files:
            paths = sorted(self.file.glob("*.pt")) if self.file.is_dir() else [self.file]
            found: dict[int, CheckpointRef] = {}
            for path in paths:
                step = self._step(path)
                if step in found:
                    raise InputError(
                        f"{self.file} has two checkpoints of step {step}: {found[step].name} and {path.name}. Allowed: "
                        "one per step. Fix: move one of them away."
                    )
                found[step] = CheckpointRef(step, path.name)
                self._files[found[step]] = path
            if not found:
                raise bad_value("file", str(self.file), "a folder with .pt files of nanoGPT", "check the path")
            chosen = select_steps(list(found), self.steps, name="steps")
            self._files = {found[step]: self._files[found[step]] for step in chosen}
        return list(self._files)

    def _step(self, path: Path) -> int:
        try:
            step = _read(path).get("iter_num")
        except CheckpointError as error:
            raise InputError(f"{error} Allowed: a file that nanoGPT's train.py has written. Fix: check it.") from error
        if isinstance(step, int):
            return step
        said = read_name(path.stem)
        return 0 if said is None else said.step

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that was named; read once."""
        if self._tokenizer is None:
            folder = Path(self.tokenizer_from).expanduser()
            try:
                if folder.is_dir():
                    self._tokenizer = load_tokenizer(folder, self.tokenizer_from) if has_tokenizer(folder) else None
                else:
                    self._tokenizer = HubCheckpoints(self.tokenizer_from, revisions=None, keep=True).tokenizer()
            except (InputError, CheckpointError) as error:
                raise self._no_tokenizer(one_line(error)) from error
            if self._tokenizer is None:
                raise self._no_tokenizer("the folder has none")
        return self._tokenizer

    def _no_tokenizer(self, why: str) -> InputError:
        return InputError(
            f"nanoGPT's files have no tokenizer, and tokenizer={self.tokenizer_from!r} cannot be used "
            f"({why}). Allowed: a folder with tokenizer.json, or a repository of the hub. Fix: set "
            "--data.source.init_args.tokenizer to one of them."
        )

    def config(self) -> PretrainedConfig | None:
        """That of the first checkpoint."""
        first = next(iter(self._files), None) or self.refs()[0]
        try:
            return _config(_read(self._files[first]), first.name)
        except CheckpointError:  # load reports it
            return None

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a file into memory, as GPT-2."""
        from transformers import GPT2LMHeadModel

        self.refs()
        checkpoint = _read(self._files[ref])
        config: Any = _config(checkpoint, ref.name)
        state = _as_gpt2(checkpoint["model"])
        model = filled(lambda: GPT2LMHeadModel(config), state, ref.name, "GPT of nanoGPT", without=("lm_head.weight",))
        model.tie_weights()
        return as_loaded(ref, model.to(dtype))


def _read(path: Path) -> dict[str, Any]:
    """What is in a file, mapped from the disk.

    Raises:
        CheckpointError: It is damaged, more than tensors and numbers, or none of nanoGPT's.
    """
    found = read_tensors(path, path.name)
    if not isinstance(found.get("model"), Mapping) or "model_args" not in found:
        raise CheckpointError(f"{path.name} is no checkpoint of nanoGPT (it has no model and model_args).")
    return found


def _config(checkpoint: Mapping[str, Any], name: str) -> PretrainedConfig:
    from transformers import GPT2Config

    arguments = checkpoint["model_args"]
    absent = [key for key in _ARGUMENTS if not isinstance(arguments.get(key), int)]
    if absent:
        raise CheckpointError(f"{name} is no checkpoint of nanoGPT: its model_args have no {', '.join(absent)}.")
    return GPT2Config(
        vocab_size=arguments["vocab_size"],
        n_positions=arguments["block_size"],
        n_embd=arguments["n_embd"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        activation_function="gelu",  # nanoGPT has the exact one
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _as_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with GPT-2's names and orientation; biases that nanoGPT was trained without are zero."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(_COMPILED)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask of older versions
        found[name] = tensor.T.contiguous() if name.endswith(_TRANSPOSED) else tensor
    for name in [name for name in found if name.startswith("transformer.") and name.endswith(".weight")]:
        part = name.removesuffix(".weight")
        if part.split(".")[-1] in ("wte", "wpe"):
            continue
        width = found[name].shape[-1]  # outputs of a Conv1D; of a norm, its components
        found.setdefault(f"{part}.bias", torch.zeros(width, dtype=found[name].dtype))
    return found
