"""Training checkpoints from the Hugging Face hub: which revisions there are, downloads, bounded disk, retries."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

import torch

from svf_lightning.checkpoint_names import KNOWN, compiled, is_short, of_stage, read_name
from svf_lightning.errors import CheckpointError, InputError, bad_value, reason
from svf_lightning.replay.model_files import (
    CONFIG,
    FORMATS,
    SMALL_FILES,
    has_tokenizer,
    load_config,
    load_folder,
    load_tokenizer,
    missing_files,
    no_bar,
    shard_files,
    vocabulary_hash,
)
from svf_lightning.replay.source import (
    PYTHIA_STEPS,
    CheckpointRef,
    CheckpointSource,
    LoadedCheckpoint,
    check_selection,
    is_step,
    select_steps,
    steps_near,
)
from svf_lightning.terminal import say

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


_PRIVATE = ".svf-lightning-"  # prefix of folders that are deleted again
_STALE_AFTER = 24 * 3600.0  # seconds without a download after which another process's folder counts as abandoned
_TIMEOUT = 10.0  # seconds to wait for the hub's answer about a revision
_PIECE = 4 << 20  # bytes that are read at a time
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
# Not attributes of the objects, as a source is copied and pickled with a module's hyperparameters.
_LOCKS: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

_T = TypeVar("_T")


class _AtHand(NamedTuple):
    folder: Path
    commit: str


class HubCheckpoints(CheckpointSource):
    """Training checkpoints that a repository of the Hugging Face hub keeps as revisions: ``step<N>``, as Pythia does.

    Other names that are known: ``checkpoint-<N>`` (Stanford's GPT-2), ``ckpt_<N>``, ``iter_<N>``, and
    ``stage1-step<N>-tokens<M>B`` (OLMo-2), of which one stage is measured at a time. Branches and tags alike.

    What is in the hub's cache already is used from there and never deleted. The rest goes into the cache as well with
    ``keep``; without it, into a folder of its own beside it, where ``release`` deletes it: however many revisions are
    visited, no more of them lie on the disk than are in use.

    Only the configuration, the tokenizer and the weights are downloaded: safetensors, or where a revision has none,
    ``pytorch_model.bin``.

    Args:
        repo: Repository, such as "EleutherAI/pythia-160m".
        revisions: Which steps: "all", "log" (each about twice the one before), "last", "every_<N>th" such as
            "every_10th", "spread_<N>" such as "spread_130" (N of them, spread evenly), a list of steps, or a list of
            revision names that hold their step ("step512"). Null: the main revision alone, for models without training
            checkpoints such as "gpt2".
        keep: Keep what was downloaded in the hub's cache.
        retries: How often a download is tried again when the network or the hub fails, >= 0; after 1, 2, 4, ...
            seconds.
        cache_dir: The hub's cache. Null: the usual one (HF_HOME, HF_HUB_CACHE).
        step: Training step, >= 0, that the main revision stands for when ``revisions`` is null.
        pattern: Names of revisions of another kind: "run-{step}" or "run-{step}-{tokens}", or a regular expression with
            a group ``step``.
        stage: Stage of a training in stages, such as "stage2-ingredient1"; null: the first.
    """

    def __init__(
        self,
        repo: str,
        revisions: str | list[int] | list[str] | None = "log",
        keep: bool = False,
        retries: int = 3,
        cache_dir: str | None = None,
        step: int = 0,
        pattern: str | None = None,
        stage: str | None = None,
    ) -> None:
        self.pattern, self.stage = pattern, stage
        self._form = compiled(pattern)
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo, re.ASCII):
            raise bad_value(
                "repo", repo, "the name of a hub repository, such as EleutherAI/pythia-160m",
                "check the name; for a folder on this machine use FolderCheckpoints",
            )  # fmt: skip
        named: dict[int, str] = {}
        if isinstance(revisions, list) and revisions and all(isinstance(name, str) for name in revisions):
            named = _by_step([str(name) for name in revisions], self._form, strict=True)
        elif revisions is not None:
            check_selection("revisions", revisions)
        if not is_step(retries):
            raise bad_value("retries", retries, "an integer >= 0", "set retries to 3")
        if not is_step(step):
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
        self._config: PretrainedConfig | None = None
        self._vocabulary = ""
        self._commits: dict[str, str] = {}  # by revision, from the hub
        self._downloaded: dict[str, str] = {}  # commits of the revisions in our own folder
        self._own: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None, "_downloaded": {}}  # a copy makes and removes its own folder

    def identity(self) -> dict[str, str]:
        """Kind and repository, and the stage of training if one was asked for."""
        return {"kind": "hub", "repo": self.repo, **({} if self.stage is None else {"stage": self.stage})}

    def subject(self) -> dict[str, str]:
        """The same for all seeds of a model, as PolyPythias name them ("pythia-160m-seed3")."""
        return self.identity() | {"repo": re.sub(r"-seed\d+$", "", self.repo)}

    def model_name(self) -> str:
        """The repository without its owner."""
        return self.repo.rsplit("/", 1)[-1]

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
            self._commits = self._retry(self._ask_commits, f"the revisions of {self.repo}")
        except Exception as error:  # the network, the hub and their libraries raise errors of many types
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
        said = {} if self._named else of_stage(names, self._form, self.stage, loose=True)
        if self._named:
            for step, name in self._named.items():
                if failure is None and name not in names:
                    steps = sorted(
                        {found.step for one in names if (found := read_name(one, self._form, loose=True)) is not None}
                    )
                    near = f"steps near it: {steps_near(step, steps)}" if steps else "none has a step"
                    raise bad_value("revisions", name, f"revisions of {self.repo}; {near}", "choose one of these")
            return [self._ref(step, self._named[step]) for step in sorted(self._named)]
        known = _by_step(said, self._form)
        if not known and failure is not None:
            raise InputError(
                f"the revisions of {self.repo} cannot be listed ({reason(failure)}), and none is in the cache. Fix: "
                "check the connection, or use FolderCheckpoints with a folder that holds the checkpoints."
            ) from failure
        if not known:
            raise bad_value(
                "revisions", self.revisions, f"null, as {self.repo} has no revisions named after a step ({KNOWN})",
                "set revisions to null for the main revision alone, or pattern to how its revisions are named",
            )  # fmt: skip
        selection: Any = self.revisions
        return [self._ref(step, known[step]) for step in select_steps(list(known), selection, name="revisions")]

    def _ref(self, step: int, name: str) -> CheckpointRef:
        said = read_name(name, self._form, loose=True)
        return CheckpointRef(step, name, None if said is None else said.tokens)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a checkpoint on this machine, of the first one, or of the main revision; read once."""
        names = [ref.name for ref in self.refs()]
        here = [
            name
            for name in names
            if not all(missing_files(place.folder, weights=False) for place in self._places(name))
        ]
        for revision in dict.fromkeys([*here[:1], names[0], "main"]):
            if self._tokenizer is None:
                with self._lock(revision):
                    at_hand = self._bring(revision, weights=False)
                    if has_tokenizer(at_hand.folder):
                        self._tokenizer = load_tokenizer(at_hand.folder, f"{self.repo}@{revision}")
                        self._vocabulary = vocabulary_hash(at_hand.folder)
                    self._config = self._config or load_config(at_hand.folder)
                    if missing_files(at_hand.folder):
                        self._forget(revision)  # only the tokenizer was needed
        if self._tokenizer is None:
            raise InputError(
                f"{self.repo} has no tokenizer. Allowed: a repository with tokenizer.json. Fix: choose another one, or "
                "download a checkpoint, save a tokenizer beside it, and use FolderCheckpoints."
            )
        return self._tokenizer

    def config(self) -> PretrainedConfig | None:
        """That of the revision whose tokenizer is used."""
        self.tokenizer()
        return self._config

    def other_tokenizer(self, ref: CheckpointRef) -> PreTrainedTokenizerBase | None:
        """That of the revision, if it has one and it is another one."""
        self.tokenizer()
        folder = self._bring(ref.name).folder
        if not has_tokenizer(folder) or vocabulary_hash(folder) == self._vocabulary:
            return None
        return load_tokenizer(folder, f"{self.repo}@{ref.name}")

    def fetch(self, ref: CheckpointRef) -> None:
        """Download a revision, unless it is on this machine already."""
        self._bring(ref.name)

    def load(self, ref: CheckpointRef, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
        """Read a revision into memory, downloading it first if need be."""
        at_hand = self._bring(ref.name)
        return load_folder(at_hand.folder, ref, dtype, f"{self.repo}@{ref.name}", revision=at_hand.commit)

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
                for left_over in cache.glob(f"{_PRIVATE}*"):  # left by a process that was killed
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
                self._own.rmdir()  # fails while other revisions are in it

    def _bring(self, revision: str, *, weights: bool = True) -> _AtHand:
        """The folder of a revision on this machine; downloads what is missing.

        Raises:
            CheckpointError: It cannot be had.
        """
        where = f"{self.repo}@{revision}"
        with self._lock(revision):
            for at_hand in self._places(revision):
                if not missing_files(at_hand.folder, weights=weights):
                    return at_hand
            try:
                at_hand = self._retry(lambda: self._download(revision, weights=weights), where)
            except CheckpointError:
                self._forget(revision)
                raise
            except Exception as error:  # the network, the hub, the disk and libraries raise errors of many types
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

        _no_endless_waits()
        api = HfApi(endpoint=self._endpoint)
        api.model_info(self.repo, timeout=_TIMEOUT)
        refs = api.list_repo_refs(self.repo)
        return {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}

    def _download(self, revision: str, *, weights: bool) -> _AtHand:
        from huggingface_hub import HfApi

        _no_endless_waits()
        info = HfApi(endpoint=self._endpoint).model_info(
            self.repo, revision=self._commits.get(revision, revision), timeout=_TIMEOUT, files_metadata=True
        )
        commit = str(info.sha)
        available = {file.rfilename: file for file in info.siblings or []}
        where = f"{self.repo}@{revision}"
        if CONFIG not in available:
            raise CheckpointError(f"{where} is not a model: it has no {CONFIG}.")
        wanted = [name for name in SMALL_FILES if name in available]
        if not weights:
            return _AtHand(self._download_files(revision, commit, wanted, available), commit)
        starts = [name for single, _ in FORMATS for name in (single, f"{single}.index.json") if name in available]
        if not starts:
            raise CheckpointError(f"{where} has no weights in safetensors or PyTorch files.")
        # The index comes first: it names the shards, which may lie beside those of another format or an older upload.
        folder = self._download_files(revision, commit, [*wanted, starts[0]], available)
        if starts[0].endswith(".index.json"):
            shards = shard_files(folder / starts[0])
            lost = [name for name in shards if name not in available]
            if lost:
                raise CheckpointError(f"{where} is incomplete: it has no {lost[0]}.")
            folder = self._download_files(revision, commit, shards, available)
        # with keep, the name may lead to a newer commit by now
        return _AtHand(folder, folder.name if self.keep else commit)

    def _download_files(
        self, revision: str, commit: str, names: list[str], described: Mapping[str, RepoSibling]
    ) -> Path:
        """Download files and compare them with what the hub says of them.

        Raises:
            OSError: One is missing, or has other bytes; that one is deleted again.
        """
        from huggingface_hub import snapshot_download

        local_dir = None if self.keep else self._own_folder(revision)
        if local_dir is not None:
            local_dir.mkdir(parents=True, exist_ok=True)
            self._downloaded[revision] = commit
        folder = Path(
            snapshot_download(
                self.repo,
                revision=revision if self.keep else commit,  # by name, so that the cache can be used without the hub
                allow_patterns=names,
                cache_dir=self._cache(),
                local_dir=local_dir,
                endpoint=self._endpoint,
                tqdm_class=no_bar(),
            )
        )
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:  # snapshot_download returns an incomplete folder if the hub fails midway
            raise OSError(f"{absent[0]} did not arrive")
        for name in names:
            if not _is_as_described(folder / name, described[name]):
                real = (folder / name).resolve()  # in the cache, a link leads to it
                (folder / name).unlink()
                real.unlink(missing_ok=True)
                if local_dir is not None:
                    shutil.rmtree(local_dir / ".cache", ignore_errors=True)  # says that the file is there
                raise OSError(f"{name} did not arrive as the hub describes it (size or checksum)")
        return folder

    def _retry(self, attempt: Callable[[], _T], what: str) -> _T:
        for tried in range(self.retries + 1):
            try:
                return attempt()
            except Exception as error:  # network libraries raise errors of many types
                if tried == self.retries or _is_final(error):
                    raise
                wait = min(2.0**tried, 60.0)
                why = reason(error, hide=self._cache())
                say(f"svf-lightning: {what}: {why}; trying again in {wait:g} s ({tried + 1} of {self.retries})")
                self._sleep(wait)
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
        return f"{reason(error, hide=self._cache())}{times}"


def _no_endless_waits() -> None:
    """Give those requests of the hub's library a timeout that have none: a hub that stalls would hold a run up."""
    from huggingface_hub import get_session

    session = get_session()
    if session.timeout.read is None:
        session.timeout = _TIMEOUT


def _is_as_described(file: Path, described: RepoSibling) -> bool:
    """Whether a file has the size and the checksum that the hub gives for it, where it gives any."""
    if described.size is not None and file.stat().st_size != described.size:
        return False
    checksum: Any
    if described.lfs is not None:
        expected, checksum = described.lfs.sha256, hashlib.sha256()
    elif described.blob_id is not None:  # as git names it
        expected, checksum = described.blob_id, hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    else:
        return True
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            checksum.update(piece)
    return bool(checksum.hexdigest() == expected)


def _by_step(names: Iterable[str], form: re.Pattern[str] | None, *, strict: bool = False) -> dict[int, str]:
    """Revision names by step; others are left out, and "step512" goes before longer names, unless ``strict``.

    Raises:
        InputError: Two names stand for one step; if ``strict``, a name stands for none.
    """
    name_of: dict[int, str] = {}
    for name in sorted(set(names), key=lambda name: (not is_short(name), name)):
        said = read_name(name, form, loose=True)
        if said is None and strict:
            raise bad_value(
                "revisions", name, f'names that hold their step, such as "step512" ({KNOWN})',
                "name such revisions, set pattern to how they are named, or set revisions to null and step to the step "
                "of the main one",
            )  # fmt: skip
        if said is None:
            continue
        if said.step in name_of and (strict or is_short(name) or not is_short(name_of[said.step])):
            raise bad_value(
                "revisions", name, f"one revision per step; {name_of[said.step]!r} is step {said.step} too",
                "name the revisions that you mean, as a list",
            )  # fmt: skip
        name_of.setdefault(said.step, name)
    return name_of


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
