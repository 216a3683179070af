"""Fingerprints of checkpoints, and which checkpoints of a training are not what they say they are.

Hubs and folders serve wrong weights under a right name: those of another step, of the end of the training, of another
run, or one tensor of them. A fingerprint keeps enough of a checkpoint to see that later, when its neighbours are known.

Distances are between fixed samples of all tensors, each tensor in units of its own size (the median over checkpoints of
its root mean square), squared and averaged: all tensors count alike. The rules and their thresholds were stated before
any training was looked at, which then flagged none (docs/replay.md has the numbers):

- **equal**: all weights, or a tensor, are those of another step bit for bit, and changed in between.
- **jump**: a checkpoint, or some in a row, are further than twice as far from both neighbours as these are from each
  other. A training that is only noise about one place has a ratio of 1, one that moves on less.
- **jump of a tensor**: the same for one tensor of one checkpoint, four times as far.
- **order**: it is less than half as far from the last weights as at least two later checkpoints are.

The first and the last checkpoint have one neighbour, so they do not jump. Changes by less than a hundredth of the
weights' size are no jumps.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

N_SAMPLED = 16  # entries of each tensor that are kept
_JUMP, _TENSOR_JUMP, _ORDER = 2.0, 4.0, 2.0
_SMALL = 0.01  # of the weights' size; half precision alone makes steps of a thousandth
_LEAST_ENTRIES = 64  # of a tensor that cannot come to equal values by chance
_CLEARLY = 1.5  # how much better one of two steps must fit weights that both have


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of the weights of a checkpoint.

    Args:
        tensors: Hash (16 hex digits) and shape of every tensor, by name: "9f3a12cd34ef5678 48x24".
        sample: Up to 16 entries of every tensor, always the same ones, in the order of their names; zeros where a
            tensor has fewer.
    """

    tensors: Mapping[str, str]
    sample: Float[np.ndarray, "tensor 16"]

    @property
    def shapes(self) -> dict[str, str]:
        """Shape of every tensor, such as "48x24"."""
        return {name: text.partition(" ")[2] for name, text in self.tensors.items()}

    def as_json(self) -> dict[str, object]:
        """The form in the ledger."""
        raw = np.ascontiguousarray(self.sample, dtype="<f4").tobytes()
        return {"tensors": dict(self.tensors), "sample": base64.b64encode(raw).decode()}

    @classmethod
    def from_json(cls, kept: Mapping[str, object]) -> Fingerprint:
        """Read what :meth:`as_json` wrote.

        Raises:
            ValueError: It is something else.
        """
        tensors, text = kept["tensors"], kept["sample"]
        if not isinstance(tensors, Mapping) or not isinstance(text, str):
            raise ValueError("no fingerprint")
        sample = np.frombuffer(base64.b64decode(text), "<f4")
        return cls(tensors, sample.reshape(len(tensors), N_SAMPLED))


@dataclass(frozen=True)
class Weights:
    """One checkpoint among others.

    Args:
        step: Training step.
        hash: Of all weights.
        fingerprint: None where none was kept (version 0.1.0).
    """

    step: int
    hash: str
    fingerprint: Fingerprint | None = None


def misplaced(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints that are not what they say they are; see the rules above.

    Args:
        checkpoints: Those of one training, in any order.

    Returns:
        Why, by step, ascending; a part of a sentence such as "has the weights of step 512, bit for bit".
    """
    rest = sorted(checkpoints, key=lambda one: one.step)
    reasons = _equal(rest)
    rest = [one for one in rest if one.step not in reasons and one.fingerprint is not None]
    if rest:
        common = _most_common_shapes(rest)
        rest = [one for one in rest if _fingerprint(one).shapes == common]
    if len(rest) > 2:
        reasons |= _equal_tensors(rest)
        rest = [one for one in rest if one.step not in reasons]
    for rule in (_jumps_and_order, _jumps_of_tensors):
        if len(rest) > 2:
            reasons |= rule(rest)
            rest = [one for one in rest if one.step not in reasons]
    return dict(sorted(reasons.items()))


def _most_common_shapes(checkpoints: Sequence[Weights]) -> dict[str, str]:
    shapes = [_fingerprint(one).shapes for one in checkpoints]
    return max(shapes, key=shapes.count)


def _samples(checkpoints: Sequence[Weights]) -> Float[np.ndarray, "checkpoint tensor 16"]:
    """Samples, each tensor in units of its size."""
    samples = np.stack([_fingerprint(one).sample for one in checkpoints]).astype(float)
    n = [min(N_SAMPLED, _n_entries(shape)) for shape in _fingerprint(checkpoints[0]).shapes.values()]
    mean_square = (samples**2).sum(-1) / np.maximum(n, 1)
    size = np.sqrt(np.median(mean_square, axis=0) * np.maximum(n, 1))
    return np.asarray(samples / np.where(size > 0, size, 1.0)[:, None])


def _fingerprint(one: Weights) -> Fingerprint:
    assert one.fingerprint is not None
    return one.fingerprint


def _n_entries(shape: str) -> int:
    return int(np.prod([int(size) for size in shape.split("x")])) if shape else 1


def _distances(samples: Float[np.ndarray, "checkpoint tensor 16"]) -> Float[np.ndarray, "checkpoint checkpoint"]:
    flat = samples.reshape(len(samples), -1) / np.sqrt(max(1, samples.shape[1]))
    square = (flat**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(square[:, None] + square - 2 * flat @ flat.T, 0)))


# ---- equal


def _equal(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints with the weights of another one, but the one of each group that they belong to."""
    reasons: dict[int, str] = {}
    with_sample = [one for one in checkpoints if one.fingerprint is not None]
    distances: np.ndarray | None = None
    same_shapes = all(_fingerprint(one).shapes == _fingerprint(with_sample[0]).shapes for one in with_sample)
    if with_sample and len(with_sample) == len(checkpoints) and same_shapes:
        distances = _distances(_samples(checkpoints))
    for group in _groups([one.hash for one in checkpoints]):
        kept = _where_it_belongs(group, len(checkpoints), distances)
        for i in group:
            if i not in kept:
                other = kept[0] if kept else next(k for k in group if k != i)
                end = ", the last one," if other == len(checkpoints) - 1 else ","
                reasons[checkpoints[i].step] = f"has the weights of step {checkpoints[other].step:,}{end} bit for bit"
    return reasons


def _groups(values: Sequence[str]) -> list[list[int]]:
    """Indices of equal values, where there are several."""
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    return [group for value, group in groups.items() if len(group) > 1 and value]


def _where_it_belongs(group: Sequence[int], n: int, distances: np.ndarray | None) -> list[int]:
    """Which of the checkpoints that share weights they fit best, next to its neighbours; none if that is not clear."""
    first, last = group[0], group[-1]
    if last - first == len(group) - 1 and first == 0:
        return [first]  # the training had not begun to change them, as in a warm-up
    if last == n - 1:
        return [last]
    if distances is None:
        return []
    fits = []
    for i in group:
        near = [k for k in (i - 1, i + 1) if 0 <= k < n and k not in group]
        fits.append(min((distances[i, k] for k in near), default=np.inf))
    best, second = np.argsort(fits, kind="stable")[:2]
    return [group[best]] if fits[second] > _CLEARLY * fits[best] else []


def _equal_tensors(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints with one or more tensors of another step."""
    samples = _samples(checkpoints)
    of_step: dict[int, dict[str, int]] = {}  # the tensors of a checkpoint that are those of another one
    names = list(_fingerprint(checkpoints[0]).tensors)
    for t, name in enumerate(names):
        texts = [_fingerprint(one).tensors[name] for one in checkpoints]
        if _n_entries(texts[0].partition(" ")[2]) < _LEAST_ENTRIES or len(set(texts)) == 1:
            continue
        distances: np.ndarray | None = None
        for group in _groups(texts):
            if not _has_returned(group, texts):
                continue
            distances = _distances(samples[:, t : t + 1]) if distances is None else distances
            kept = _where_it_belongs(group, len(texts), distances)
            for i in group:
                if i not in kept:
                    of_step.setdefault(i, {})[name] = kept[0] if kept else next(k for k in group if k != i)
    reasons = {}
    for i, tensors in of_step.items():
        name, other = next(iter(tensors.items()))
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        reasons[checkpoints[i].step] = f"has {name}{more} of step {checkpoints[other].step:,}, bit for bit"
    return reasons


def _has_returned(group: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether a tensor came back to what it was, or stood still once while it changed before and after."""
    if group[-1] - group[0] >= len(group):
        return True
    changes = [before != after for before, after in itertools.pairwise(texts)]
    still = [i for i, changed in enumerate(changes) if not changed]
    return len(still) == 1 and 0 < still[0] < len(changes) - 1


# ---- jumps, and order


def _jumps_of_tensors(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints of which a tensor is far from both neighbours, the one with most such tensors first."""
    samples = _samples(checkpoints)
    names = list(_fingerprint(checkpoints[0]).tensors)
    rest, reasons = list(range(len(checkpoints))), {}
    while len(rest) > 2:
        some = samples[rest]
        step = np.sqrt(((some[1:] - some[:-1]) ** 2).sum(-1))  # [checkpoint - 1, tensor]
        across = np.sqrt(((some[2:] - some[:-2]) ** 2).sum(-1))
        far = np.minimum(step[:-1], step[1:]) > _TENSOR_JUMP * across + _SMALL
        if not far.any():
            break
        at = int(far.sum(1).argmax())
        which = np.flatnonzero(far[at])
        more = f" and {len(which) - 1} more tensors" if len(which) > 1 else ""
        jump = "jump" if more else "jumps"
        reasons[checkpoints[rest[at + 1]].step] = f"{names[which[0]]}{more} {jump} against both neighbours"
        del rest[at + 1]
    return reasons


def _jumps_and_order(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Both rules, in the order that leaves out fewer.

    Where every second checkpoint has weights of the end of the training, the right ones between them seem to jump; and
    before two that jump, all others seem to be out of order. As weights of the end are the more frequent mistake, twice
    as many out of order are believed.
    """
    by_jumps, by_order = _jumps(checkpoints), _out_of_order(checkpoints)
    for reasons, rule in ((by_jumps, _out_of_order), (by_order, _jumps)):
        reasons |= rule([one for one in checkpoints if one.step not in reasons])
    return by_order if len(by_order) <= 2 * len(by_jumps) else by_jumps


def _jumps(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints, or some in a row, that are far from both neighbours, while these are near each other."""
    if len(checkpoints) < 3:
        return {}
    distances = _distances(_samples(checkpoints))
    rest, reasons = list(range(len(checkpoints))), {}
    length = 1
    while length <= (len(rest) - 1) // 2:
        d = distances[np.ix_(rest, rest)]
        first = np.arange(1, len(rest) - length)
        last = first + length - 1
        near = np.minimum(d[first - 1, first], d[last, last + 1])
        across = d[first - 1, last + 1]
        excess = near - (_JUMP * across + _SMALL)
        if not (excess > 0).any():
            length += 1
            continue
        at = int(first[(near / (across + _SMALL)).argmax()])
        times = _times(float(near[at - 1]), float(across[at - 1]))
        for i in rest[at : at + length]:
            reasons[checkpoints[i].step] = (
                f"jumps against both neighbours, {times} as far from them as they are from each other"
            )
        del rest[at : at + length]
        length = 1
    return reasons


def _times(far: float, near: float) -> str:
    return f"{far / near:.1f} times" if far < 100 * near else "over 100 times"


def _out_of_order(checkpoints: Sequence[Weights]) -> dict[int, str]:
    """Checkpoints that are nearer to the last weights than later ones are."""
    if len(checkpoints) < 4:
        return {}
    to_last = _distances(_samples(checkpoints))[-1, :-1]
    reasons = {}
    for i, distance in enumerate(to_last):
        later = np.flatnonzero(to_last[i + 1 :] > _ORDER * distance + _SMALL)
        if len(later) >= 2:
            other = i + 1 + int(later[-1])
            reasons[checkpoints[i].step] = (
                f"is nearer to the last weights than step {checkpoints[other].step:,} is, "
                f"{_times(float(to_last[other]), float(distance))}"
            )
    return reasons
