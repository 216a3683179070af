"""A small suite of checkpoints to replay with no network: a GPT-NeoX model that learns indirect object identification.

Pythia in small: the same architecture (GPT-NeoX with partial rotary positions, parallel blocks, biases and untied
embeddings) and early steps, in Hugging Face format, trained on sentences such as "When Mary and John went to the store,
John gave a drink to Mary." in one to two minutes on two CPU cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.draws import keyed_seed
from svf_lightning.errors import DivergedError, InputError, bad_value
from svf_lightning.files import write_json
from svf_lightning.replay.prompts import NAMES, OBJECTS, PLACES, TEMPLATES, ioi_sentences
from svf_lightning.run.directory import versions
from svf_lightning.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUITE = "suite.json"
EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"
N_POSITIONS = 128  # longest input, in tokens; the sentences have at most 31

# numbers of the streams of draws, part of the key of each
_INITIAL, _SENTENCES, _BEGINNINGS, _SEQUENCES = 0, 1, 2, 3
_ROTARY = 0.25  # share of a head's dimensions that rotate, as in Pythia
_HELD_OUT = 8  # one pair of names in this many is held out of training


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """What decides the weights of a suite, on one machine with one number of threads.

    Args:
        max_steps: Optimizer steps, >= 1.
        n_layers: Layers, >= 1.
        d_model: Width of the residual stream, n_heads times a multiple of 8 (a quarter of d_head rotates, in pairs).
        n_heads: Heads per layer, >= 1.
        batch_size: Sentences per step, >= 1.
        learning_rate: Of AdamW, > 0; the same at all steps, so that a shorter suite is the beginning of a longer one.
        seed: Seed of the initial weights and of the text, >= 0; it also decides how heads attend (see `SuiteModel`).
        induction: Share of the training texts that are words at random and then the same words again, in [0, 1), so
            that the model learns a second task (svf_lightning.replay.tasks.Induction).

    Raises:
        InputError: A value is out of range.
    """

    max_steps: int = 1536
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    induction: float = field(default=0.0, repr=False)  # earlier versions had none

    def as_json(self) -> dict[str, int | float]:
        """What is kept of it, as earlier versions did."""
        return {name: value for name, value in asdict(self).items() if name != "induction" or value}

    def __post_init__(self) -> None:
        for name in ("max_steps", "n_layers", "d_model", "n_heads", "batch_size", "seed"):
            got, least = getattr(self, name), int(name != "seed")
            if not isinstance(got, int) or isinstance(got, bool) or got < least:
                raise bad_value(name, got, f"an integer >= {least}", f"change {name}")
        if self.d_model % (8 * self.n_heads):
            raise bad_value(
                "d_model", self.d_model, f"a multiple of 8 * n_heads = {8 * self.n_heads}", "change d_model or n_heads"
            )
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise bad_value("learning_rate", rate, "a finite number > 0", "change learning_rate")
        share = self.induction
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise bad_value("induction", share, "a share in [0, 1)", "change induction")


def suite_steps(max_steps: int) -> list[int]:
    """The steps that are saved: 0, 1, 2, 4, ..., 512, then every 256th, and the last one.

    Raises:
        InputError: max_steps < 1.
    """
    if max_steps < 1:
        raise bad_value("max_steps", max_steps, "an integer >= 1", "change max_steps")
    steps = {0, max_steps, *(2**power for power in range(10)), *range(768, max_steps, 256)}
    return sorted(step for step in steps if step <= max_steps)


# --- text


def held_out(name: str, other: str) -> bool:
    """Whether no training sentence has these two of ``NAMES``: one pair in eight, in either order.

    Every name is trained on, with most of the others.
    """
    return (NAMES.index(name) + NAMES.index(other)) % _HELD_OUT == 0


@cache
def _vocabulary() -> tuple[str, ...]:
    """Every word and mark of the sentences, sorted, after the special tokens."""
    slots = re.compile(r"\{\w+\}")
    text = " ".join([*(slots.sub(" ", template) for template in TEMPLATES), *NAMES, *PLACES, *OBJECTS, "."])
    return (EOS, PAD, UNK, *sorted(set(re.findall(r"\w+|[^\w\s]", text))))


def suite_tokenizer() -> PreTrainedTokenizerFast:
    """The suite's tokenizer: one token for each word and each mark, ids 0, 1, 2 for ``<eos>``, ``<pad>``, ``<unk>``.

    As in Pythia, one token is BOS and EOS, and no special token is added to a text. Words that are not in the sentences
    become ``<unk>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    # a clean-up rule removes the space before "," and "."
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    build: Any = PreTrainedTokenizerFast  # tqdm has no types
    fast: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        model_max_length=N_POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return fast


class SuiteText(pl.LightningDataModule):
    """Endless sentences to train on, none of them with a pair of names that is `held_out`.

    A batch is a tensor of token ids [b, n], int64, padded on the right with ``<pad>``. A sentence ends with its answer,
    a full stop and ``<eos>``; about every second one also begins with ``<eos>``, so that the model does as well with it
    as without. Batch t depends on (seed, t) alone.

    Args:
        batch_size: b, sentences per step.
        seed: Seed of the draws.
        induction: Share of the texts that are no sentences, but words at random and then the same words again.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0, induction: float = 0.0) -> None:
        super().__init__()
        self.batch_size, self.seed, self.induction = batch_size, seed, induction
        self._tokenizer = suite_tokenizer().backend_tokenizer

    def sentences(self, step: int) -> list[str]:
        """The sentences of one step, with the answer and the full stop."""
        sentences: list[str] = []
        attempt = 0
        while len(sentences) < self.batch_size:  # almost always one round
            drawn = ioi_sentences(
                self.batch_size + self.batch_size // 2 + 1, seed=keyed_seed(self.seed, _SENTENCES, step, attempt)
            )
            sentences += [f"{text} {io}." for text, io, s, *_ in drawn if not held_out(io, s)]
            attempt += 1
        sentences = sentences[: self.batch_size]
        if self.induction:
            rng = np.random.default_rng(keyed_seed(self.seed, _SEQUENCES, step))
            repeats = rng.random(self.batch_size) < self.induction
            sentences = [
                _repeated_words(rng) if again else text for again, text in zip(repeats, sentences, strict=True)
            ]
        return sentences

    def draw(self, step: int) -> Int[Tensor, "b n"]:
        """The token ids of one step."""
        begins = np.random.default_rng(keyed_seed(self.seed, _BEGINNINGS, step)).random(self.batch_size) < 0.5
        eos, pad = self._tokenizer.token_to_id(EOS), self._tokenizer.token_to_id(PAD)
        rows = [  # one by one, as encode_batch starts threads and then warns about every fork
            [*[eos] * bool(begin), *self._tokenizer.encode(text).ids, eos]
            for begin, text in zip(begins, self.sentences(step), strict=True)
        ]
        n = max(map(len, rows))
        return torch.tensor([[*row, *[pad] * (n - len(row))] for row in rows])

    def train_dataloader(self) -> _Draws:
        """Draws from the current step on, without end."""
        return _Draws(self)


def _repeated_words(rng: np.random.Generator) -> str:
    """Eight to sixteen distinct words, twice, as the task has them."""
    words = [*NAMES, *PLACES, *OBJECTS]
    chosen = [words[i] for i in rng.choice(len(words), int(rng.integers(8, 17)), replace=False)]
    return " ".join(["The", *chosen, *chosen, "."])


class _Draws:
    """Iterable over the draws; no torch DataLoader, which would take numbers from the global generator."""

    def __init__(self, data: SuiteText) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        trainer = self.data.trainer
        step = trainer.global_step if trainer is not None else 0
        while True:
            yield self.data.draw(step)
            step += 1


# --- model


class SuiteModel(pl.LightningModule):
    """A GPT-NeoX language model (``model``), trained with AdamW at a constant learning rate.

    Every seed that was measured solves the task, but in one of two ways, about equally often: heads attend to the
    indirect object alone (with seed 3, 0.69 on it and 0.13 on the subject), or to both names alike (with seed 0, at
    most 0.46 on it), and the subject is subtracted elsewhere. Pythia's second beta, 0.95, gave the latter both times.

    The initial weights depend on the seed and the sizes alone. The global generator is left as it was.

    Args:
        settings: Sizes, seed and learning rate.
    """

    def __init__(self, settings: SuiteSettings = SuiteSettings()) -> None:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        super().__init__()
        self.learning_rate = settings.learning_rate
        words = _vocabulary()
        self._pad = words.index(PAD)
        config = GPTNeoXConfig(
            vocab_size=len(words),
            hidden_size=settings.d_model,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=settings.n_heads,
            intermediate_size=4 * settings.d_model,
            max_position_embeddings=N_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": _ROTARY},
            bos_token_id=words.index(EOS),
            eos_token_id=words.index(EOS),
            pad_token_id=self._pad,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(keyed_seed(settings.seed, _INITIAL))
            self.model = GPTNeoXForCausalLM(config)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n words"]:
        """Logits of the next token. There is no mask, as a causal model's real tokens never see padding after them."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def loss(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        """Mean cross-entropy over all next tokens that are not padding, in nats."""
        logits, following = self(tokens[:, :-1]), tokens[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=self._pad)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW in its fused form."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)


class _Save(pl.Callback):
    """Saves model and tokenizer as ``folder/step<N>`` at the steps of a suite."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps, self.tokenizer = folder, set(steps), suite_tokenizer()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step in self.steps:
            assert isinstance(pl_module, SuiteModel)
            folder = self.folder / f"step{trainer.global_step}"
            pl_module.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


# --- training


def train_suite(
    folder: str | Path,
    settings: SuiteSettings = SuiteSettings(),
    *,
    progress: bool = False,
) -> Path:
    """Train a suite, unless the folder holds the same one already.

    ``folder/step<N>`` is what ``from_pretrained`` of model and tokenizer reads: the weights after N optimizer steps
    (see `suite_steps`), N=0 the initial ones. ``folder/suite.json`` has the settings, the steps, versions, and
    ``final_loss``: of the last weights on the batch that the next step would have seen. On one machine with one number
    of threads, the same settings give the same files, bit for bit. The folder appears when it is complete; global
    random states are left as they were.

    Args:
        folder: Where the suite shall be: a folder that does not exist, an empty one, or one with this suite.
        settings: Sizes and training.
        progress: Show Lightning's progress bar.

    Returns:
        The folder.

    Raises:
        InputError: The folder holds something else, which stays as it is.
        DivergedError: The loss is not finite at the end.
        KeyboardInterrupt: The training was interrupted; nothing is left of it.
    """
    folder = Path(folder)
    if _is_there(folder, settings):
        return folder
    target = folder.resolve()  # a link to an empty folder stays a link
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}). Fix: choose another folder for the suite.") from error
    try:
        say(f"svf-lightning: training a small GPT-NeoX suite, {settings.max_steps} steps, for {folder}")
        began = time.perf_counter()
        final_loss = _train(draft, settings, progress)
        if not math.isfinite(final_loss):
            raise DivergedError(
                f"the suite's loss is {final_loss} after {settings.max_steps} steps. Fix: lower learning_rate."
            )
        used = versions() | {package: metadata.version(package) for package in ("transformers", "tokenizers")}
        write_json(
            draft / SUITE,
            {
                "settings": settings.as_json(),
                "text": _text_id(),
                "steps": suite_steps(settings.max_steps),
                "final_loss": final_loss,
                "versions": used,
            },
        )
        try:
            draft.rename(target)
        except OSError:
            if not _is_there(folder, settings):  # otherwise another process was faster
                raise
        say(f"svf-lightning: the suite is trained: {time.perf_counter() - began:.0f} s, loss {final_loss:.3f}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _train(folder: Path, settings: SuiteSettings, progress: bool) -> float:
    """Train and save into an empty folder. Returns the final loss."""
    model = SuiteModel(settings)
    data = SuiteText(settings.batch_size, settings.seed, settings.induction)
    with _quiet(), torch.random.fork_rng(devices=[]):
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=settings.max_steps,
            max_epochs=-1,
            callbacks=[_Save(folder, suite_steps(settings.max_steps))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        try:
            trainer.fit(model, data)
        except SystemExit as exit_:
            if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
                raise KeyboardInterrupt from None
            raise
    with torch.no_grad():
        return float(model.eval().loss(data.draw(settings.max_steps)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lines off the terminal that tell nothing about a suite."""
    from transformers import utils

    transformers_logging: Any = utils.logging
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- what is there already


def _text_id() -> str:
    """A fingerprint of what the sentences are made of."""
    parts = json.dumps([TEMPLATES, NAMES, PLACES, OBJECTS, _vocabulary(), _HELD_OUT])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _is_there(folder: Path, settings: SuiteSettings) -> bool:
    """Whether the folder holds the suite of these settings; False if it is free.

    Raises:
        InputError: It holds something else.
    """
    fix = "choose another folder for the suite"
    if folder.exists() and not folder.is_dir():
        raise bad_value("folder", str(folder), "a folder (this is a file)", fix)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / SUITE).is_file():
        raise bad_value(
            "folder", str(folder), f"a new folder, an empty one, or a suite's (this one has no {SUITE})", fix
        )
    try:
        stored = json.loads((folder / SUITE).read_text(encoding="utf-8"))
        there, text = dict(stored["settings"]), stored["text"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise bad_value(
            "folder", str(folder), f"a suite's folder ({SUITE} cannot be read: {error!r})", f"delete it, or {fix}"
        ) from error
    asked = settings.as_json()
    different = [
        f"{name}={there.get(name)!r} there, {asked.get(name)!r} asked for"
        for name in {**asked, **there}
        if there.get(name) != asked.get(name)
    ]
    if text != _text_id():
        different.append("trained on other sentences, by another version of this program")
    if different:
        raise bad_value(
            "folder", str(folder), f"a suite with the same settings ({'; '.join(different)})",
            f"ask for the same settings, or {fix}",
        )  # fmt: skip
    for step in suite_steps(settings.max_steps):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / f"step{step}" / name).is_file():
                raise bad_value(
                    "folder", str(folder), f"a whole suite (step{step}/{name} is missing)",
                    "delete the folder to train it again, or choose another one",
                )  # fmt: skip
    return True
