"""Contracts that a module or a metric callback of a user has to keep, as checks to call in a test.

For example::

    from svf_lightning.testing import check_metric, check_module

    def test_my_metric():
        check_metric(MyMetric())

    def test_my_module():
        check_module(MyModule())

A check raises AssertionError; its message says what is not as it has to be, and what to do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from svf_lightning.callbacks import FeatureOrthogonality, Measured, ProbeMetric, SVDAlignment, quantities_of
from svf_lightning.heads import PARTS, AttentionHeads
from svf_lightning.probe import (
    AllKeys,
    AttendedScores,
    FiringBatch,
    FiringRule,
    Move,
    Outcome,
    Probe,
    Probed,
    Side,
    TakeReads,
)
from svf_lightning.quantities import Quantity, collect
from svf_lightning.toy import ToyAttentionModel, ToyData

_RTOL, _ATOL = 1e-4, 1e-5  # of rows that are measured alone against the same rows in one call
_N_STEPS = 3


def check_metric(metric: ProbeMetric, probes: Sequence[Probe] | None = None) -> None:
    """Check that a metric callback keeps its contract.

    Its quantities are declared, with the dimensions that they have; its arguments are kept, and the same arguments give
    the same numbers; a row is the same alone and among others; numbers are finite; the probe and the global random
    generators stay as they were.

    Args:
        metric: The callback, as it would join a trainer.
        probes: Probes of one module at several steps; None for small toy models and a made-up language model.

    Raises:
        AssertionError: Something is not as it has to be; the message says what, and what to do.
        InputError: Two quantities have one name, or an argument is not kept.
    """
    name = type(metric).__name__
    declared = collect([(name, metric.quantities)])
    again = type(metric)(**metric.options())
    measured: set[str] = set()
    for steps in example_steps() if probes is None else [list(probes)]:
        with _untouched(name, {f"probe of row {i}": _tensors_of(step) for i, step in enumerate(steps)}):
            alone = [_measure(metric, [step]) for step in steps]
        for step, values in zip(steps, alone, strict=True):
            _check_values(name, values, step, declared)
            measured |= values.keys()
        _check_same(f"{name} with the same arguments", alone[0], _measure(again, steps[:1]))
        if steps[0].part is None:  # parts of a step are never measured with others
            together = _measure(metric, steps)
            for i, values in enumerate(alone):
                row = {key: value[i : i + 1] for key, value in together.items()}
                _check_same(f"{name}, a row alone and among others", values, row)
    assert measured, (
        f"{name} measures nothing of any probe. Fix: pass probes=[...] that show what it looks at, or check what it "
        "asks of a probe."
    )


def check_module(module: LightningModule) -> None:
    """Check that a module's probe is one that every metric callback can look at.

    Its shapes agree with each other and with the names of its dimensions; its numbers are finite; looking at it changes
    neither the weights nor the global random generators; a snapshot does not follow the weights; and the metrics of
    spectrum, alignment and geometry give finite numbers, the same for a row alone and among others.

    Args:
        module: The module, with weights as at the start of a run.

    Raises:
        AssertionError: Something is not as it has to be; the message says what, and what to do.
        InputError: The probe's leading dimensions do not agree, or the module declares two quantities of one name.
    """
    name = type(module).__name__
    assert isinstance(module, Probed), f"{name} has no probe(). Fix: give it probe() -> svf_lightning.probe.Probe."
    quantities_of([], module)
    with _untouched(name, {"weights": dict(module.state_dict())}):
        probe = module.probe()
    assert isinstance(probe, Probe), f"{name}.probe() returns {type(probe).__name__}. Fix: return a Probe."
    _check_probe(name, probe)
    _check_snapshot(name, module, probe)
    metrics = (SVDAlignment(), FeatureOrthogonality())
    shows_something = [metric for metric in metrics if _measure(metric, [probe])]
    assert shows_something, f"the probe of {name} shows neither heads nor features. Fix: set heads, or features."
    steps = _steps_of(module)
    for metric in shows_something:
        check_metric(metric, steps)


def example_steps() -> list[list[Probe]]:
    """Probes of small modules at a few steps each: a module for each kind of dimensions that this package has."""
    common = {"n_features": 11, "d_model": 7, "n_instances": 3}
    pairs = {"template": "linear", "n_pairs": 3}
    variants: list[dict[str, Any]] = [
        {**common, "n_attended": 5, "n_observed": 4},
        {**common, **pairs, "n_attended": 5},
        {**common, **pairs, "n_heads": 2, "d_head": 5},
        {**common, "rope": True, "context_length": 5, "d_head": 6},
        {**common, "template": "zero"},
    ]
    steps = []
    for options in variants:
        module = ToyAttentionModel(**options)
        data = ToyData(
            module.n_features, module.n_instances, batch_size=16, context_length=5, feature_probability=0.3
        )  # fmt: skip
        module.look_at(data)
        steps.append(_steps_of(module))
    return [*steps, [_language_model()]]


def _steps_of(module: LightningModule) -> list[Probe]:
    """Probes of a module with its weights and with others; the module has its weights again afterwards."""
    generator = torch.Generator().manual_seed(0)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    steps = []
    try:
        for step in range(_N_STEPS):
            steps.append(replace(module.probe().snapshot(), step=step))  # type: ignore[operator]
            with torch.no_grad():
                for parameter in module.parameters():
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.add_(0.1 * parameter.std(correction=0) * noise)
    finally:
        module.load_state_dict(weights)
    return steps


def _language_model() -> Probe:
    """A made-up language model with 2 layers of 3 heads that reads 4 prompts of 6 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n_prompts, n_tokens, rank = 4, 6, 5
    W_Q, W_K = draw(2, 3, rank, 8), draw(2, 3, rank, 8)
    contributions = draw(2, 3, n_prompts, n_tokens, rank)
    attention = contributions.sum(-1).softmax(-1)
    query, key = draw(2, 3, n_prompts, rank), draw(2, 3, n_prompts, rank)
    logit_difference = draw(n_prompts)
    on_key = attention[..., 1]

    def intervene(removed: Tensor) -> Outcome:
        return Outcome(on_key * torch.exp(-removed.abs()), logit_difference - removed.sum((0, 1)))

    def decompose(chosen: Tensor) -> AllKeys:
        is_key = torch.ones(2, 1, len(chosen), n_tokens, dtype=torch.bool)
        positions = torch.full_like(chosen, n_tokens - 1), torch.ones_like(chosen)
        return AllKeys(contributions[:, :, chosen], attention[:, :, chosen], is_key, *positions)

    def find_firings(rule: FiringRule, take: Callable[[FiringBatch], None]) -> None:
        for head in range(6):
            prompts = torch.arange(n_prompts)
            left, right = (part.flatten(0, 1)[head] for part in (query, key))
            found = AttendedScores(left, right, right, torch.ones(1, rank), on_key.flatten(0, 1)[head])
            positions = torch.full_like(prompts, n_tokens - 1), torch.ones_like(prompts)
            take(FiringBatch(torch.full_like(prompts, head), prompts, *positions, found))

    def read_tokens(take: TakeReads) -> None:
        for layer, tokens in enumerate(residuals):
            take(layer, tokens)

    scores = AttendedScores(
        query, key, key.clone(), torch.ones(2, 3, 1, rank), on_key, torch.zeros(2, 3), logit_difference
    )
    vectors, x = torch.linalg.qr(draw(6, n_prompts, 8, rank))[0], draw(n_prompts, 8)
    residuals = draw(2, 30, 8)
    return Probe(
        0,
        heads=AttentionHeads(W_Q, W_K, scale=rank**-0.5),
        features=draw(8, 9),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        scores=scores,
        intervene=intervene,
        interventions=_MadeUpInterventions(vectors, x, on_key, logit_difference),
        decompose=decompose,
        find_firings=find_firings,
        read_tokens=read_tokens,
        part=(0, 1),
        batch_dims=("layer", "head"),
        feature_dims=(),
    )


class _MadeUpInterventions:
    """Of a module in which a head's weight on the key falls as it reads less along some directions."""

    sources = ("swapped",)

    def __init__(self, vectors: Tensor, x: Tensor, on_key: Tensor, logit_difference: Tensor) -> None:
        self.vectors, self.x, self.on_key, self.logit_difference = vectors, x, on_key, logit_difference

    def singular_vectors(self, head: int, side: Side) -> Tensor:
        return self.vectors[head] if side == "query" else self.vectors[head].flip(-1)

    def residual_draws(self, head: int, n_draws: int, generator: torch.Generator) -> Tensor:
        drawn: Tensor = torch.linalg.qr(torch.randn(*self.x.shape, n_draws, generator=generator))[0]
        return drawn

    def run_each(self, variants: Sequence[Sequence[Move]]) -> list[Outcome]:
        return [self._run(moves) for moves in variants]

    def _run(self, moves: Sequence[Move]) -> Outcome:
        attention, total = self.on_key.clone().flatten(0, 1), torch.zeros(len(self.x))
        for move in moves:
            moved = ((self.x[:, None] @ move.directions).square().sum((-2, -1)) + 1).log()
            moved = moved * (torch.as_tensor(move.factor) - 1).abs()
            attention[move.head] *= torch.exp(-moved)
            total = total + moved
        return Outcome(attention.view_as(self.on_key), self.logit_difference - total, total)


# ---- the checks ------------------------------------------------------------------------------------------------------


def _measure(metric: ProbeMetric, probes: Sequence[Probe]) -> dict[str, Tensor]:
    """What a metric measures of some steps; :class:`Measured` values without their dimensions."""
    for probe in probes:
        if probe.part is not None:
            metric.observe(probe)
    measurement = metric.measure(Probe.stack(probes))
    return {name: value.values if isinstance(value, Measured) else value for name, value in measurement.items()}


def _check_values(name: str, values: Mapping[str, Tensor], probe: Probe, declared: Mapping[str, Quantity]) -> None:
    sizes = dict(zip(probe.batch_dims, _batch_shape(probe), strict=False))
    for key, value in values.items():
        assert key in declared, f"{name} measures {key!r}, which it does not declare. Fix: add Quantity({key!r}, ...)."
        dims = declared[key].dims
        n_batch = value.ndim - 1 - len(dims)
        batch_dims = probe.batch_dims[: max(0, n_batch)]
        expected = ("step", *batch_dims, *dims)
        assert 0 <= n_batch <= len(probe.batch_dims), (
            f"{name}: {key!r} has {value.ndim} dimensions, shape {tuple(value.shape)}. Allowed: step, the first few of "
            f"{probe.batch_dims}, and {dims}. Fix: reduce it, or change Quantity({key!r}, dims=...)."
        )
        for dim, size in zip(expected, value.shape, strict=True):
            known = 1 if dim == "step" else sizes.setdefault(dim, size)
            assert size == known, f"{name}: dimension {dim!r} of {key!r} has size {size}, and elsewhere it has {known}."
        finite = not value.is_floating_point() or declared[key].gaps or bool(torch.isfinite(value).all())
        assert finite, (
            f"{name}: {key!r} is not finite for a probe whose numbers all are. Fix: make it so, or declare it with "
            "gaps=True if there may be nothing to measure."
        )


def _batch_shape(probe: Probe) -> tuple[int, ...]:
    if probe.heads is not None:
        return tuple(probe.heads.W_Q.shape[:-2])
    return tuple(probe.features.shape[:-2]) if probe.features is not None else ()


def _check_same(what: str, expected: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> None:
    assert expected.keys() == measured.keys(), f"{what}: {sorted(expected.keys() ^ measured.keys())} are in one alone."
    for key, value in expected.items():
        if not _is_basis(key):
            close = torch.allclose(measured[key], value, rtol=_RTOL, atol=_ATOL, equal_nan=True)
            assert close, (
                f"{what}: {key!r} differs. Fix: compute each row from itself alone, and draw from a fixed seed."
            )


def _is_basis(name: str) -> bool:
    """Singular vectors: rounding turns those of near-equal singular values, and their signs are free."""
    return name in ("U", "V")


def _check_probe(name: str, probe: Probe) -> None:
    dims = probe.batch_dims
    assert "step" not in dims, f"{name}: batch_dims hold 'step'. Fix: name the other leading dimensions alone."
    assert len(set(dims)) == len(dims), f"{name}: batch_dims={dims} name a dimension twice."
    n, n_features = len(dims), len(probe.feature_dims or ())
    shapes = {
        "heads.W_Q": (probe.heads.W_Q if probe.heads else None, n, "H, D"),
        "features": (probe.features, n_features, "D, N"),
        "pair_logits": (probe.pair_logits, n, "P"),
        "queries": (probe.queries, n_features, "n, D"),
        "keys": (probe.keys, n_features, "n, m, D"),
        "attended_queries": (probe.attended_queries, n_features, "n, D"),
        "attended_keys": (probe.attended_keys, n_features, "n, D"),
    }
    for field, (tensor, n_leading, trailing) in shapes.items():
        if tensor is None:
            continue
        leading = ", ".join(dims[:n_leading])
        expected = f"[{leading + ', ' if leading else ''}{trailing}]"
        assert tensor.ndim == n_leading + len(trailing.split(", ")), (
            f"{name}: {field} has shape {tuple(tensor.shape)}. Allowed: {expected}. Fix: change it, or "
            f"batch_dims={dims}."
        )
        assert bool(torch.isfinite(tensor).all()), f"{name}: {field} holds NaN or Inf."
    n_known = 0 if probe.features is None else probe.features.shape[-1]
    assert probe.pairs.ndim == 2, f"{name}: pairs have shape {tuple(probe.pairs.shape)}. Allowed: [P, 2]."
    in_range = ((probe.pairs >= 0) & (probe.pairs < n_known)).all()
    assert bool(in_range), f"{name}: pairs name features outside 0..{n_known - 1}."
    sizes = dict(zip(dims, _batch_shape(probe), strict=False))
    for coordinate, (its_dims, values) in probe.coords.items():
        shape = tuple(torch.as_tensor(values).shape) if not isinstance(values, (list, tuple)) else np.shape(values)
        for dim, size in zip(its_dims, shape, strict=False):
            assert sizes.setdefault(dim, size) == size, (
                f"{name}: the coordinate {coordinate!r} has size {size} along {dim!r}, which has size {sizes[dim]}."
            )


def _check_snapshot(name: str, module: LightningModule, probe: Probe) -> None:
    """A snapshot keeps its numbers when the weights change, and the probe of the module follows them."""
    kept = probe.snapshot()
    before = {key: value.clone() for key, value in _tensors_of(kept).items()}
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    try:
        for key, value in _tensors_of(kept).items():
            assert torch.equal(value, before[key]), f"{name}: {key} of a snapshot follows the weights."
        now = _tensors_of(module.probe())  # type: ignore[operator]
        follows = any(not torch.equal(value, before[key]) for key, value in now.items() if key in before)
        assert follows or not list(module.parameters()), (
            f"{name}: probe() does not follow the weights. Fix: make the Probe anew from the present weights."
        )
    finally:
        module.load_state_dict(weights)


@contextmanager
def _untouched(name: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Check that tensors and the global random generators are the same afterwards, bit for bit."""
    before = {what: {key: value.clone() for key, value in group.items()} for what, group in tensors.items()}
    states = _global_states()
    yield
    for what, group in tensors.items():
        for key, value in group.items():
            same = torch.allclose(value, before[what][key], rtol=0, atol=0, equal_nan=True)
            assert same, f"{name} changes {key} of the {what}. Fix: compute on a copy."
    assert states == _global_states(), (
        f"{name} draws from a global random generator, which changes the training. Fix: use a torch.Generator of its "
        "own."
    )


def _global_states() -> tuple[object, ...]:
    """States of the global random generators of torch, numpy and Python."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (the global one)
    # most draws of NumPy change the position alone
    return torch.get_rng_state().tolist(), (numpy_state[1].tolist(), *numpy_state[2:]), random.getstate()


def _tensors_of(probe: Probe) -> dict[str, Tensor]:
    tensors = {
        "features": probe.features,
        "pairs": probe.pairs,
        "pair_logits": probe.pair_logits,
        "queries": probe.queries,
        "keys": probe.keys,
        "attended_queries": probe.attended_queries,
        "attended_keys": probe.attended_keys,
    }
    if probe.heads is not None:
        tensors |= {name: getattr(probe.heads, name) for name in PARTS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
