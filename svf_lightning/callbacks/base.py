"""What a callback is to a run: it measures probes, or it takes measured rows. One driver stands between the two."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from svf_lightning.errors import InputError
from svf_lightning.probe import Probe, Probed
from svf_lightning.quantities import MODULE_QUANTITIES, Quantity, collect
from svf_lightning.rows import Rows

Status = Literal["finished", "interrupted", "failed"]


class Measured(NamedTuple):
    """A measured quantity with dimensions of its own, after those of the probe: values [step, *batch_dims, *dims]."""

    values: Tensor
    dims: tuple[str, ...] = ()
    batch_dims: tuple[str, ...] | None = None  # those of the probe's (without step) that it has; None for all


Measurement = Mapping[str, Tensor | Measured]


class ProbeMetric(Callback, ABC):
    """A callback that measures probes. A subclass says what; the trainer's :class:`Driver` says when, logs and stores.

    It looks at the probe alone, so it works on any module that has one. Its numbers follow from the probe and from the
    arguments of its ``__init__``. These are kept as attributes of the same names, as they are part of a row's identity.

    Attributes:
        quantities: What it measures: name, unit, meaning, and where each is shown.
        version: Of the measurement: to be raised when the same probe and options give other numbers than before.
        needs: What a run must have so that there is something to measure, as a part of a sentence.
        later: Arguments that earlier versions did not have, whose defaults give the numbers of these.
    """

    quantities: Sequence[Quantity] = ()
    version: ClassVar[int] = 1
    needs: ClassVar[str] = ""
    later: ClassVar[frozenset[str]] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there is something to look at, and someone to say when.

        Raises:
            InputError: The module has no ``probe()``.
        """
        if not isinstance(pl_module, Probed):
            raise InputError(
                f"{type(self).__name__} looks at the probe of a module, and {type(pl_module).__name__} has none. "
                "Fix: give it a method probe() -> svf_lightning.probe.Probe."
            )
        Driver.of(trainer)

    def observe(self, probe: Probe) -> None:
        """Add up what the i-th of n parts of a step shows (``probe.part``); :meth:`measure` follows after the last."""

    @abstractmethod
    def measure(self, probe: Probe) -> Measurement:
        """Measure a probe whose leading dimensions are ("step", *batch).

        Must not draw from the global random generators, nor change the probe.

        Returns:
            By name: values [step, *batch, *dims] with the dims of the declared quantity. ``batch`` may be the first few
            of the probe's dimensions, as for a value that all heads share; :class:`Measured` says it for any others.
        """

    def options(self) -> dict[str, Any]:
        """The arguments of ``__init__`` by name; with the version they decide the numbers.

        Those of :attr:`later` are left out at their defaults, so that runs of earlier versions go on.

        Raises:
            InputError: An argument is not kept as an attribute of its name.
        """
        options = {}
        later = self.later_defaults()
        for name in _arguments(type(self)):
            if not hasattr(self, name):
                raise InputError(
                    f"{type(self).__name__} does not keep its argument {name!r}, which is part of a row's identity. "
                    f"Fix: set self.{name} = {name} in __init__, or override options()."
                )
            value = getattr(self, name)
            if name not in later or value != later[name]:
                options[name] = value
        return options

    @classmethod
    def later_defaults(cls) -> dict[str, Any]:
        """The arguments in :attr:`later` with their defaults, which give the numbers of earlier versions."""
        return {name: given.default for name, given in _arguments(cls).items() if name in cls.later}


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: given for name, given in inspect.signature(cls).parameters.items() if given.kind in kinds}


class EvaluationHooks(Callback):
    """One set of hooks for ``test`` and for stand-alone ``validate``; validation inside a training is left alone."""

    def on_evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The evaluation begins."""

    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, n_done: int) -> None:
        """A batch is evaluated; ``n_done`` are."""

    def on_evaluation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The evaluation has ended."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_evaluation_start`."""
        self.on_evaluation_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """See :meth:`on_evaluation_batch_end`."""
        self.on_evaluation_batch_end(trainer, pl_module, outputs, batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_evaluation_end`."""
        self.on_evaluation_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_evaluation_start`."""
        if trainer.state.fn == "validate":
            self.on_evaluation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """See :meth:`on_evaluation_batch_end`."""
        if trainer.state.fn == "validate":
            self.on_evaluation_batch_end(trainer, pl_module, outputs, batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_evaluation_end`."""
        if trainer.state.fn == "validate":
            self.on_evaluation_end(trainer, pl_module)


class RowSink(EvaluationHooks, ABC):
    """A callback that takes measured rows, in order, chunk by chunk, and is told when there will be no more."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that someone hands rows on."""
        Driver.of(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows will come. Called once, in the order of the sinks; ``trainer.global_step`` is the step of the first."""

    @abstractmethod
    def consume(self, rows: Rows) -> None:
        """Take one chunk of rows; every row is whole."""

    def finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """The run has ended, however it did, and all its rows were handed on. Called once, in the order of the sinks.

        It is not called for a run that failed or was interrupted before its first row.
        """


class Driver(EvaluationHooks, ABC):
    """The callback that has probes measured and hands the rows on; there is one per trainer."""

    _default: ClassVar[type[Driver]]

    def __init_subclass__(cls, *, default: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if default:
            Driver._default = cls

    @property
    @abstractmethod
    def chunk(self) -> int:
        """Number of rows that are measured and handed on together."""

    @abstractmethod
    def is_scheduled(self, step: int) -> bool:
        """True if a row is taken at this training step; the last step of a run has one in any case."""

    @staticmethod
    def of(trainer: Trainer) -> Driver:
        """The trainer's driver; one with default options joins its callbacks if there is none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, Driver):
                return callback
        driver = Driver._default()
        # before the checkpoint callbacks: a row must be whole when a checkpoint is written
        at = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(at, driver)
        return driver


def quantities_of(callbacks: Iterable[Callback], module: object = None) -> dict[str, Quantity]:
    """Everything that a run measures, by name: what its module declares (attribute ``quantities``), then its callbacks.

    Raises:
        InputError: Two of them provide the same name.
    """
    metrics = [callback for callback in callbacks if isinstance(callback, ProbeMetric)]
    providers = [(class_path(type(metric)), metric.quantities) for metric in metrics]
    of_module: Sequence[Quantity] = getattr(module, "quantities", ())
    return {**MODULE_QUANTITIES, **collect([(class_path(type(module)), of_module), *providers])}


def class_path(cls: type) -> str:
    """The shortest name that imports a class: that of the package, for those of ``svf_lightning.callbacks``."""
    package = __name__.rsplit(".", 1)[0]
    return f"{package if cls.__module__.startswith(f'{package}.') else cls.__module__}.{cls.__qualname__}"
