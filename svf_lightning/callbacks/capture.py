"""Capture: takes probes on schedule, has the metric callbacks measure them, and hands the rows on.

A row stands for one training step t: the weights after t updates, and the losses of these weights on the draw of step
t. Taking a probe costs a few copies. Probes are measured, written and logged in chunks, many steps in one batched call;
the training pauses for it and lends its threads, since working beside it on the same cores was found to cost about
twice as much. Chunks are cut where the number of rows since step 0 is a multiple of ``chunk``, and at checkpoints;
never by the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from svf_lightning.callbacks.base import Driver, Measured, ProbeMetric, RowSink, Status, class_path, quantities_of
from svf_lightning.errors import CheckpointError, DivergedError, InputError, TakenAwayError
from svf_lightning.metrics import InstanceMean
from svf_lightning.probe import Probe
from svf_lightning.quantities import Quantity
from svf_lightning.rows import Rows, statistics
from svf_lightning.run.lineage import SETTINGS
from svf_lightning.run.settings import CaptureOptions, Run
from svf_lightning.stop import STOP
from svf_lightning.terminal import say
from svf_lightning.trajectory import open_trajectory

_BLOCK_BYTES = 1 << 20  # bytes of probes per call: with all intermediate results this fills about one core's cache
_LOSS_PREFIX = "loss/"
_TOTAL = "loss/total"
_FEATURES = "W"
_LABEL = np.dtype("<U64")  # fixed width, so that rows can be appended


class _Pending:
    """The row that is being observed: its probe, and the losses that arrive for it."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.losses: dict[str, Tensor] = {}
        self._means: dict[str, InstanceMean] = {}

    def set_losses(self, outputs: Any) -> None:
        if isinstance(outputs, Mapping):
            self.losses = {k: v.detach() for k, v in outputs.items() if k.startswith(_LOSS_PREFIX)}

    def average_losses(self, outputs: Any) -> None:
        """Evaluation: several batches may look at the same weights."""
        for name, value in outputs.items() if isinstance(outputs, Mapping) else ():
            if name.startswith(_LOSS_PREFIX):
                mean = self._means.setdefault(name, InstanceMean(tuple(value.shape)).to(value.device))
                mean.update(value)
                self.losses[name] = mean.mean().to(value.dtype)


class Capture(Driver, default=True):
    """Drives the metric callbacks of a run; there is one per trainer (added with its defaults if not given).

    The first step and the last one are always captured.

    Args:
        options: The fields of :class:`svf_lightning.run.settings.CaptureOptions`, by name. Those that are not given
            are the run's (``--capture.every_n_steps=10``).

    Raises:
        InputError: An option out of range.
    """

    def __init__(self, **options: Any) -> None:
        self.options = CaptureOptions(**options)
        self.last: Rows | None = None
        self._metrics: list[ProbeMetric] = []
        self._sinks: list[RowSink] = []
        self._quantities: dict[str, Quantity] = {}
        self._pending: _Pending | None = None
        self._buffer: list[_Pending] = []
        self._pool: ThreadPoolExecutor | None = None
        self._flusher: ThreadPoolExecutor | None = None
        self._n_threads = 1
        self._diverged: set[tuple[int, ...]] = set()
        self._n_rows = 0
        self._settings = ""
        self._monitors: list[int] = []

    def join(self, run: Run) -> None:
        """Take the run's options.

        Raises:
            InputError: They contradict those that were given here.
        """
        self.options = self.options.joined(run.capture)
        self._settings = run.settings

    @property
    def chunk(self) -> int:
        """Rows that are measured and written together."""
        return self.options.chunk

    def is_scheduled(self, step: int) -> bool:
        """True if the run's options capture this training step."""
        return self.options.is_scheduled(step)

    # ---- hooks: training -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find who measures and who listens."""
        self._open(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the rows that a resumed run has already, and take signals at the ends of steps."""
        self._begin(trainer, pl_module)
        STOP.hold()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the probe of this step, before the update."""
        if self.options.is_scheduled(trainer.global_step):
            self._pending = self._observe(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Complete the row with the losses that the update came from."""
        if self._pending is not None:
            self._pending.set_losses(outputs)
            if self._commit(trainer):  # progress bars and the like read these
                pl_module.log_dict(self.latest_means(), logger=False)
            if any(every and trainer.global_step % every == 0 for every in self._monitors):
                self._tell_monitors(pl_module)
        if STOP.asked:
            _end_after_this_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks that monitor a quantity look at the end of an epoch."""
        if self._monitors:
            self._tell_monitors(pl_module)

    def _tell_monitors(self, pl_module: LightningModule) -> None:
        """Log the last step that was captured, measured by itself ahead of its chunk."""
        if self._buffer and self._pool is not None:
            rows = self._pool.submit(self._measure, self._buffer[-1:]).result()
            pl_module.log_dict(_means(rows), logger=False)
        else:
            pl_module.log_dict(self.latest_means(), logger=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rows before a checkpoint are on disk before the checkpoint is; it carries the settings of its run."""
        self.flush(trainer)
        if self._settings:
            checkpoint[SETTINGS] = self._settings

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture the final weights, keep them as the last checkpoint, and finish."""
        if self._pool is None:
            return
        self._pending = self._observe(pl_module, is_last=True)
        current_losses = getattr(pl_module, "current_losses", None)
        if callable(current_losses):
            self._pending.set_losses(current_losses())
        self._commit(trainer)
        self.close(trainer)
        _save_last(trainer)
        self._finish(trainer, pl_module, "interrupted" if STOP.asked else "finished")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a training that had no step left to take: ``max_steps`` is 0, or that of its checkpoint."""
        if self._pool is not None:
            self._begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    # ---- hooks: evaluation -----------------------------------------------------------------------------------------

    def on_evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find who measures and who listens."""
        self._open(trainer, pl_module)
        self._begin(trainer, pl_module)
        STOP.hold()

    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, n_done: int) -> None:
        """One row for each step that the module's probe stands for; batches of one step share a row.

        A row whose parts are counted (``probe.part``) is measured and written with its last part. A batch whose step
        gave None shows nothing. A checkpoint that a metric cannot look into (CheckpointError) has no row; a module that
        has a method ``give_up(error)`` goes on with the others.
        """
        STOP.check()
        if outputs is None:
            self._forget_parts()
            return
        with torch.inference_mode():
            probe = pl_module.probe()  # type: ignore[operator]
            if self._pending is None or int(self._pending.probe.step) != int(probe.step):
                self._commit(trainer)
                # an evaluation does not change the weights, so no copy is needed; each row stands for itself, but for
                # checkpoints of a replay, which know whether they are the last
                self._pending = _Pending(replace(probe, is_last=True) if probe.part is None else probe)
            self._pending.average_losses(outputs)
            if probe.part is None:
                return
            try:
                for metric in self._metrics:
                    metric.observe(probe)
            except CheckpointError as error:
                self._forget_parts()
                give_up: Any = getattr(pl_module, "give_up", None)
                if give_up is None:
                    raise
                give_up(error)
                return
        if probe.part[0] + 1 == probe.part[1]:
            self._commit(trainer)
            self.flush(trainer)

    def _forget_parts(self) -> None:
        """Leave out a checkpoint that failed midway; metrics forget its parts as they measure them."""
        if self._pending is not None and self._pending.probe.part is not None:
            self._measure([self._pending])
            self._pending = None

    def on_evaluation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish; where several devices share the work, when all have."""
        if self._pool is None:
            return
        self._commit(trainer)
        self.close(trainer)
        if trainer.world_size > 1:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self._log_others(trainer)
        self._finish(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the rows that are whole; the pending one is not."""
        self._pending = None
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        try:
            self.close(trainer)
            if not isinstance(exception, TakenAwayError):  # else there is no run directory to finish in
                self._finish(trainer, pl_module, "interrupted" if stopped else "failed")
        except Exception as error:  # the first exception is the one to report
            say(f"svf-lightning: the last rows were lost: {error}")

    # ---- the mechanism ---------------------------------------------------------------------------------------------

    def flush(self, trainer: Trainer) -> None:
        """Measure, write and log the rows so far, and wait for it."""
        if self._flusher is not None:
            self._flusher.submit(self._flush, trainer).result()
            torch.set_num_threads(self._n_threads)  # _use_one_thread also changes the default of later threads

    def _flush(self, trainer: Trainer) -> None:
        """On a thread of its own: Ctrl-C stops the main thread anywhere, but a chunk that was begun is finished."""
        if not self._buffer or self._pool is None:
            return
        chunk, self._buffer = self._buffer, []
        self.last = rows = self._measure_chunk(chunk, self._pool)
        for sink in self._sinks:
            sink.consume(rows)
        self._log(rows, trainer)
        self._check_finite(rows)

    def close(self, trainer: Trainer) -> None:
        """Flush, and end the threads; does nothing the second time."""
        if self._flusher is None or self._pool is None:
            return
        try:
            self.flush(trainer)
        finally:
            self._flusher.shutdown()
            self._pool.shutdown()
            self._flusher = self._pool = None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the sinks that rows will come."""
        first = trainer.global_step if trainer.state.fn == "fit" else 0
        self._n_rows = sum(map(self.is_scheduled, range(first)))
        for sink in self._sinks:
            sink.begin(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, status: Status) -> None:
        """Tell the sinks that there will be no more rows; does nothing the second time."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks if status == "finished" or self.last is not None else ():
            sink.finish(trainer, pl_module, status)

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._quantities = quantities_of(callbacks, pl_module)
        self._metrics = [c for c in callbacks if isinstance(c, ProbeMetric)]
        self._sinks = [c for c in callbacks if isinstance(c, RowSink)]
        self._monitors = _monitored_every(callbacks)
        self._pending, self._buffer, self._diverged, self._n_rows, self.last = None, [], set(), 0, None
        self._n_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._n_threads, "svf-measure", initializer=_use_one_thread)
        self._flusher = ThreadPoolExecutor(1, "svf-flush")

    @torch.no_grad()
    def _observe(self, pl_module: LightningModule, is_last: bool = False) -> _Pending:
        probe: Probe = pl_module.probe().snapshot()  # type: ignore[operator]
        return _Pending(replace(probe, is_last=True) if is_last else probe)

    def _commit(self, trainer: Trainer) -> bool:
        """The pending row is whole. True if it completed a chunk."""
        if self._pending is None:
            return False
        self._buffer.append(self._pending)
        self._pending = None
        self._n_rows += 1
        if self._n_rows % self.chunk:
            return False
        self.flush(trainer)
        return True

    def _measure_chunk(self, chunk: list[_Pending], pool: ThreadPoolExecutor) -> Rows:
        size = self._block_size(chunk)
        blocks = list(pool.map(self._measure, (chunk[i : i + size] for i in range(0, len(chunk), size))))
        names = list(blocks[0].values)
        joined = pool.map(lambda name: _join([block.values[name][1] for block in blocks]), names)
        values = {name: (blocks[0].values[name][0], array) for name, array in zip(names, joined, strict=True)}
        return replace(blocks[0], steps=np.concatenate([block.steps for block in blocks]), values=values)

    def _block_size(self, chunk: list[_Pending]) -> int:
        """Rows that are measured in one batched call: on the CPU as many as stay in a core's cache."""
        probe = chunk[0].probe
        if not probe.is_on_cpu:
            return len(chunk)
        in_cache = max(2, _BLOCK_BYTES // max(1, probe.nbytes))
        return min(in_cache, -(-len(chunk) // self._n_threads))

    @torch.inference_mode()
    def _measure(self, chunk: list[_Pending]) -> Rows:
        probe = Probe.stack([pending.probe for pending in chunk])
        measured: dict[str, Tensor | Measured] = {}
        for name in sorted({name for pending in chunk for name in pending.losses}):
            present = next(p.losses[name] for p in chunk if name in p.losses)
            missing = torch.full_like(present, torch.nan)
            measured[name] = torch.stack([p.losses.get(name, missing) for p in chunk])
        for metric in self._metrics:
            for name, value in metric.measure(probe).items():
                if name in measured:
                    raise InputError(
                        f"{class_path(type(metric))} measures {name!r}, which another callback has measured already. "
                        f"Fix: rename it in {type(metric).__name__}."
                    )
                measured[name] = value
        batch = probe.batch_dims[1:]
        values = {}
        for name, value in measured.items():
            dims, tensor = self._placed(name, value, batch)
            # NumPy has no bfloat16
            values[name] = (dims, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy())
        for name in chunk[0].probe.labels:
            values[name] = ((), np.array([pending.probe.labels[name] for pending in chunk], dtype=_LABEL))
        coords = {
            name: (dims, v.cpu().numpy() if isinstance(v, Tensor) else np.asarray(v))
            for name, (dims, v) in probe.coords.items()
        }
        return Rows(np.asarray(probe.step), values, batch, coords, self._quantities)

    def _placed(self, name: str, value: Tensor | Measured, batch: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
        """A value with the names of its dimensions after "step": the first few of the probe's, and its own."""
        if isinstance(value, Measured):
            dims, tensor = (batch if value.batch_dims is None else value.batch_dims) + value.dims, value.values
        else:
            declared = self._quantities[name].dims if name in self._quantities else ()
            dims, tensor = batch[: max(0, value.ndim - 1 - len(declared))] + declared, value
        if tensor.ndim != 1 + len(dims):
            raise InputError(
                f"{name!r} was measured with {tensor.ndim} dimensions, shape {tuple(tensor.shape)}. Allowed: step, the "
                f"first few of {batch}, and those that its quantity declares. Fix: add "
                f"Quantity({name!r}, dims=(...)) to the callback's quantities, or reduce the value."
            )
        return dims, tensor

    def _log(self, rows: Rows, trainer: Trainer) -> None:
        """One dictionary per logged step."""
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        last = trainer.max_steps if trainer.state.fn == "fit" else int(rows.steps[-1])
        if trainer.loggers:
            for step, metrics in rows.to_log(every=every, last=last):
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=step)

    def _log_others(self, trainer: Trainer) -> None:
        """Log what the other devices measured: only the first one has a logger."""
        for path in sorted(Path(trainer.default_root_dir).glob("trajectory.rank*.zarr")):
            self._log(Rows.read(open_trajectory(path), self._quantities), trainer)

    def _check_finite(self, rows: Rows) -> None:
        total = rows.scalars().get(_TOTAL)
        if total is None:
            return
        bad = ~np.isfinite(total)
        for where in zip(*np.nonzero(bad.any(0)), strict=True):
            if where not in self._diverged:
                self._diverged.add(where)
                row = int(bad[(slice(None), *where)].argmax())
                label = ", ".join(f"{d} {i}" for d, i in zip(rows.batch_dims, where, strict=False))
                what = _what_is_not_finite(rows, (row, *where))
                say(f"svf-lightning: {label} diverged at step {rows.steps[row]}: {what}; it ends there, others go on")
        if bad[-1].all():
            raise DivergedError(f"every instance diverged by step {rows.steps[-1]}: lower the learning rate")

    def latest_means(self) -> dict[str, float]:
        """Mean over the batch dimensions of every scalar, at the last measured step."""
        return {} if self.last is None else _means(self.last)


def _means(rows: Rows) -> dict[str, float]:
    """Mean over the batch dimensions of every scalar, at the last of some rows."""
    return {name: float(statistics(v[-1:], rows.batch_dims)[0][0]) for name, v in rows.scalars().items()}


def _monitored_every(callbacks: Sequence[Callback]) -> list[int]:
    """How often callbacks that monitor a quantity look at it, in steps; 0 for those that do at the ends of epochs."""
    monitoring = [callback for callback in callbacks if getattr(callback, "monitor", None) is not None]
    # private in Lightning, which has no public way to ask
    return [getattr(callback, "_every_n_train_steps", 0) or 0 for callback in monitoring]


def _what_is_not_finite(rows: Rows, where: tuple[int, ...]) -> str:
    """Why a loss is no number: the parts of it that are none, and how large the features are."""
    scalars = rows.scalars()
    parts = [name for name in scalars if name.startswith(_LOSS_PREFIX) and name != _TOTAL]
    lost = [name for name in parts if not np.isfinite(scalars[name][where])] or [_TOTAL]
    verb = "is" if len(lost) == 1 else "are"
    if _FEATURES not in rows.values:
        return f"{' and '.join(lost)} {verb} not finite"
    largest = np.abs(rows.values[_FEATURES][1][where]).max()
    size = f"the features have entries up to {largest:.2g}" if np.isfinite(largest) else "nor are the features"
    return f"{' and '.join(lost)} {verb} not finite ({size})"


def _end_after_this_step(trainer: Trainer) -> None:
    """Stop the training, whatever it was told of its shortest length."""
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def _save_last(trainer: Trainer) -> None:
    """Keep the state after the last row as ``last.ckpt``, where the run keeps one at all."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath:
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            trainer.save_checkpoint(Path(callback.dirpath) / name, weights_only=callback.save_weights_only)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Blocks of rows as one array in which time runs fastest, as the trajectory stores it."""
    joined = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype, order="F")
    return np.concatenate(parts, out=joined)


def _use_one_thread() -> None:
    """Keep this thread's tensor operations to one core.

    The threads of the pool share the work already; teams of OpenMP threads of their own would fight with each other
    and, long after, with the training's team (measured: that doubles the time of a training step). A thread takes the
    process's default at its first query of the number, so that query comes first.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
