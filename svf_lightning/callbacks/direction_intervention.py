"""DirectionIntervention: do heads use the very directions that their singular vectors are?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.callbacks.templates import means_of_templates, templates_of
from svf_lightning.draws import keyed_generator, keyed_seed
from svf_lightning.errors import bad_value
from svf_lightning.metrics import contribution_order, haar_orthogonal
from svf_lightning.metrics.intervals import CONFIDENCE
from svf_lightning.probe import AttendedScores, Interventions, Move, Probe, Side
from svf_lightning.quantities import DIRECTIONS, Place, Quantity

SIDES: tuple[Side, ...] = ("query", "key")
CONTROLS = ("spectrum", "rotated", "random", "other_head", "residual")  # each moves as far as "top"
CHOICES = ("top", *CONTROLS, "matched", "whole")
SOURCES = ("swapped", "abc", "counterfactual")
EFFECTS = ("attention", "logit_difference", "divergence")
_STRONGEST = "strongest_control"
_UNITS = dict(zip(EFFECTS, ("weight", "nats", "nats"), strict=True))
_LABELS = dict(zip(EFFECTS, ("attention on the key", "logit difference", "output"), strict=True))
_FALLS = ("attention", "logit_difference")  # what an ablation is expected to lower; the divergence is expected to rise
_RESIDUAL, _TURNS, _OTHER, _PAIRS = range(1, 5)  # keys of draws


def _declared() -> Iterator[Quantity]:
    """What is measured, for the largest number of directions taken out of the task's heads, and all arrays."""
    of = "beyond the paper"
    for side in SIDES:
        for effect in EFFECTS:
            name, what = f"directions/{side}/{effect}", f"{_LABELS[effect]} without top directions of the {side}"
            logged = "no" if effect == "logit_difference" else "mean"  # names in W&B are few
            about: Any = {"unit": _UNITS[effect], "logged": logged, "gaps": True, "source": of}
            if effect == "divergence":
                about |= {"low": 0, "panel": DIRECTIONS}
                meaning = "KL divergence of the next token's distribution from the untouched one, mean over templates."
            else:
                meaning = "Its change, mean over templates."
            yield Quantity(name, what, meaning, **about)
            control = f"Mean over templates, in each the control that moves it most: {', '.join(CONTROLS)}."
            yield Quantity(f"{name}_{_STRONGEST}", f"{what}, strongest control", control, **about)
            of_template: Any = {
                "unit": _UNITS[effect], "dims": ("template",), "places": Place.NOWHERE, "gaps": True, "source": of,
            }  # fmt: skip
            yield Quantity(f"template/{name}", f"{what}, of a template", "Mean over its prompts.", **of_template)
            yield Quantity(
                f"template/{name}_{_STRONGEST}", f"{what}, of a template, strongest control",
                "The one of the controls that changes it most.", **of_template,
            )  # fmt: skip
            yield Quantity(
                f"template/{name}_matched", f"{what}, of a template, others of the same nats",
                "With other singular pairs instead, as much taken off the score of the key.", **of_template,
            )  # fmt: skip
        yield Quantity(
            f"directions/{side}/heads_beyond_controls", f"heads beyond every control, {side}",
            "Of the task's heads alone: those whose divergence is larger than under each control, with the whole 95 % "
            "interval over templates, corrected for the number of heads.",
            unit="count", low=0, logged="mean", gaps=True, source=of,
        )  # fmt: skip
    dims = {
        "ablated": ("n_directions", "side", "choice", "template"),
        "boosted": ("side", "choice", "template"),
        "patched": ("source", "side", "choice", "template"),
        "alone": ("direction_head", "side", "choice", "template"),
    }
    for kind, its in dims.items():
        for effect in EFFECTS:
            yield Quantity(
                f"directions/{kind}/{effect}", f"{_LABELS[effect]}, {kind}", unit=_UNITS[effect], dims=its,
                places=Place.NOWHERE, gaps=True, source=of,
            )  # fmt: skip
    yield Quantity("directions/numbers", "directions moved", unit="count", dims=("n_directions",), places=Place.NOWHERE)
    yield Quantity("directions/layer_head", "heads of the task", "Index of the flattened heads.",
                   dims=("direction_head",), places=Place.NOWHERE)  # fmt: skip


class _Part(NamedTuple):
    """One part of a step's query-key pairs, with heads flattened."""

    scores: AttendedScores  # [heads, pair, R]
    interventions: Interventions
    heads_per_layer: int
    number: int


class DirectionIntervention(ProbeMetric):
    """Moves what the task's heads read along their singular vectors, and runs the model again.

    Beyond the paper. Of the query input of a head (left singular vectors) or of its key inputs, all of them (right
    singular vectors), for the n pairs that contribute most to the score of the attended key:

    - ``ablated``: their components are taken out, in the ``n_task_heads`` heads with most attention on the key at once,
      and in each of them ``alone``;
    - ``boosted``: they are doubled;
    - ``patched``: they are what they are in another prompt ("swapped": the two names exchanged; "abc": a third name;
      "counterfactual": what a file of prompts states).

    What changes is the attention on the key, the logit difference, and the distribution of the next token (KL). Beside
    the "top" directions stand controls that move the input exactly as far: those of the largest singular values
    ("spectrum"), the n that contribute most in a basis of the head's own space rotated at random ("rotated"), random
    directions of that space ("random"), those that another head of the layer uses ("other_head"), and directions drawn
    with the covariance of the residual stream ("residual"). Two more say what there is to be had: n random others that
    take as much off the score of the key ("matched"), and all that the head reads ("whole"). Everything is a mean over
    the prompts of a template.

    Args:
        numbers: How many directions are ablated; the largest for all else.
        n_task_heads: Heads that count as the task's.
        seed: Seed of the random choices, which come from generators of their own.
        steps: Checkpoints to do it at beside the last one, as it costs more than all other metrics together; the rows
            of the others hold NaN. None: all of them.

    Raises:
        InputError: An option out of range.
    """

    needs = "a language model (with its default conventions: else singular vectors belong to no input of a head)"
    quantities = tuple(_declared())

    def __init__(
        self,
        numbers: tuple[int, ...] = (1, 4),
        n_task_heads: int = 3,
        seed: int = 0,
        steps: tuple[int, ...] | None = None,
    ) -> None:
        if not numbers or any(n < 1 for n in numbers) or len(set(numbers)) < len(numbers):
            raise bad_value("numbers", numbers, "distinct integers >= 1", "change the DirectionIntervention callback")
        if n_task_heads < 1:
            raise bad_value(
                "n_task_heads", n_task_heads, "an integer >= 1", "change the DirectionIntervention callback"
            )
        self.numbers, self.n_task_heads, self.seed, self.steps = numbers, n_task_heads, seed, steps
        self._parts: list[_Part] = []

    def observe(self, probe: Probe) -> None:
        """Keep one part of the pairs, as the task's heads are known only when all parts were seen."""
        scores = probe.scores
        if scores is None or probe.interventions is None or scores.attention is None:
            return
        n_before = scores.query.ndim - 2
        query, key, direction, S, attention = (
            part.flatten(0, n_before - 1)
            for part in (scores.query, scores.key, scores.direction, scores.S, scores.attention)
        )
        flat = AttendedScores(query, key, direction, S, attention=attention)
        self._parts.append(_Part(flat, probe.interventions, scores.query.shape[n_before - 1], len(self._parts)))

    def measure(self, probe: Probe) -> Measurement:
        """What moving along directions changes; nothing for a module that cannot be run again."""
        if not self._parts:
            return {}
        parts, self._parts = self._parts, []
        attention = torch.cat([_attention(part) for part in parts], dim=1).nanmean(1)
        heads = attention.topk(min(self.n_task_heads, len(attention))).indices.tolist()
        step, is_last = (torch.as_tensor(x).flatten()[0] for x in (probe.step, probe.is_last))
        is_due = self.steps is None or int(step) in self.steps or bool(is_last)
        changes = []
        while parts:  # what was computed for a part is freed with it
            changes.append((self._changes if is_due else self._no_changes)(parts.pop(0), heads))
        joined = {kind: torch.cat([change[kind] for change in changes], dim=-1) for kind in changes[0]}
        templates = templates_of(probe, joined["boosted"].shape[-1])
        of_templates = {kind: means_of_templates(values, templates) for kind, values in joined.items()}
        measured: dict[str, Tensor] = {
            f"directions/{kind}/{effect}": values[i]
            for kind, values in of_templates.items()
            for i, effect in enumerate(EFFECTS)
        }
        measured |= self._summary(of_templates)
        measured["directions/numbers"] = torch.tensor(self.numbers, dtype=torch.int32)
        measured["directions/layer_head"] = torch.tensor(heads, dtype=torch.int32)
        return {name: value[None] for name, value in measured.items()}

    def _summary(self, of_templates: dict[str, Tensor]) -> dict[str, Tensor]:
        """The largest number of directions taken out: means over templates, against the controls."""
        measured: dict[str, Tensor] = {}
        most = self.numbers.index(max(self.numbers))
        controls = slice(1, 1 + len(CONTROLS))
        for i, effect in enumerate(EFFECTS):
            ablated = of_templates["ablated"][i, most]
            for j, side in enumerate(SIDES):
                name, of_side = f"directions/{side}/{effect}", ablated[j]
                others = of_side[controls].nan_to_num(math.inf if effect in _FALLS else -math.inf)
                strongest = others.amin(0) if effect in _FALLS else others.amax(0)
                strongest = strongest.masked_fill(of_side[0].isnan() | strongest.isinf(), torch.nan)
                values = {"": of_side[0], f"_{_STRONGEST}": strongest}
                measured |= {f"{name}{end}": value.nanmean() for end, value in values.items()}
                values["_matched"] = of_side[CHOICES.index("matched")]
                measured |= {f"template/{name}{end}": value for end, value in values.items()}
        alone = of_templates["alone"][EFFECTS.index("divergence")]
        for j, side in enumerate(SIDES):
            measured[f"directions/{side}/heads_beyond_controls"] = _count_beyond(alone[:, j, 0], alone[:, j, controls])
        return measured

    # ---- runs --------------------------------------------------------------------------------------------------------

    def _changes(self, part: _Part, heads: list[int]) -> dict[str, Tensor]:
        """Changes [effect, ..., side, choice, pair] of every kind, for one part of the pairs."""
        most = max(self.numbers)
        sources = [source for source in SOURCES if source in part.interventions.sources]
        settings = {
            "ablated": [_Setting(heads, n) for n in self.numbers],
            "boosted": [_Setting(heads, most, factor=2.0)],
            "patched": [_Setting(heads, most, source=source) for source in sources],
            "alone": [_Setting([head], most) for head in heads],
        }
        effects = iter(self._effects(part, heads, [setting for its in settings.values() for setting in its]))
        found = {kind: [next(effects) for _ in its] for kind, its in settings.items()}
        unknown = torch.full_like(found["boosted"][0], torch.nan)
        of_source = dict(zip(sources, found["patched"], strict=True))
        return {
            "ablated": torch.stack(found["ablated"], 1),
            "boosted": found["boosted"][0],
            "patched": torch.stack([of_source.get(source, unknown) for source in SOURCES], 1),
            "alone": torch.stack(found["alone"], 1),
        }

    def _no_changes(self, part: _Part, heads: list[int]) -> dict[str, Tensor]:
        """Of a checkpoint that was not asked for: NaN."""
        sizes = {"ablated": [len(self.numbers)], "boosted": [], "patched": [len(SOURCES)], "alone": [len(heads)]}
        last = (len(SIDES), len(CHOICES), part.scores.query.shape[-2])
        values = part.scores.query
        return {kind: values.new_full((len(EFFECTS), *more, *last), torch.nan) for kind, more in sizes.items()}

    def _effects(self, part: _Part, heads: list[int], settings: Sequence[_Setting]) -> list[Tensor]:
        """Effects [effect, side, choice, pair] of each setting; all of them run as few batches."""
        directions = _Directions(part, heads, self.seed)
        moves = [
            [directions.move(head, side, choice, setting) for head in setting.heads]
            for setting in settings
            for side in SIDES
            for choice in CHOICES
        ]
        known = [[move for move in its if move is not None] for its in moves if None not in its]
        untouched, *outcomes = part.interventions.run_each([[], *known])
        attention, difference = untouched.attention.flatten(0, -2), untouched.logit_difference
        missing = difference.new_full((len(EFFECTS), len(difference)), torch.nan)
        pending = iter(zip(outcomes, known, strict=True))
        effects = []
        for its in moves:
            if None in its:
                effects.append(missing)
                continue
            outcome, made = next(pending)
            of = [move.head for move in made]
            change = (outcome.attention.flatten(0, -2)[of] - attention[of]).mean(0)
            divergence = missing[0] if outcome.divergence is None else outcome.divergence
            effect = torch.stack([change, outcome.logit_difference - difference, divergence])
            undefined = torch.stack([_is_undefined(move) for move in made]).any(0)
            effects.append(effect.masked_fill(undefined, torch.nan))
        whole = torch.stack(effects, 1)  # [effect, setting * side * choice, pair]
        of_settings = whole.view(len(EFFECTS), len(settings), len(SIDES), len(CHOICES), -1)
        return list(of_settings.unbind(1))


class _Setting(NamedTuple):
    """What is done along the directions, whichever they are."""

    heads: list[int]
    n: int  # directions of each head
    factor: float = 0.0
    source: str = ""


def _is_undefined(move: Move) -> Tensor:
    """Pairs for which there is no such move [pair]."""
    if isinstance(move.factor, Tensor):
        return ~torch.isfinite(move.factor)
    return torch.zeros(len(move.directions), dtype=torch.bool, device=move.directions.device)


class _Directions:
    """Directions of some heads, to move along; drawn once, so that two moves along "random" go the same way."""

    def __init__(self, part: _Part, heads: list[int], seed: int) -> None:
        self.part, self.heads, self.seed = part, heads, seed
        self._known: dict[tuple[int, Side, int, str], Tensor | None] = {}

    def move(self, head: int, side: Side, choice: str, setting: _Setting) -> Move | None:
        """The move of one head along directions of that choice; None if there are none such."""
        _, n, factor, source = setting
        basis = self.part.interventions.singular_vectors(head, side)
        n = min(n, basis.shape[-1])
        if choice == "whole":
            return Move(head, side, basis, factor, source)
        if choice == "matched":
            return None if source else self._matched(head, side, basis, n, factor)
        top = self._along(head, side, n, "top")
        directions = self._along(head, side, n, choice)
        if directions is None:
            return None
        return Move(head, side, directions, factor, source, as_far_as=None if choice == "top" else top)

    def _along(self, head: int, side: Side, n: int, choice: str) -> Tensor | None:
        which = (head, side, n, choice)
        if which not in self._known:
            self._known[which] = self._directions(*which)
        return self._known[which]

    def _contributions(self, head: int) -> Tensor:
        """Relative contributions [pair, R]; 0 where the head does not see the key."""
        return self.part.scores.contributions[head].nan_to_num()

    def _directions(self, head: int, side: Side, n: int, choice: str) -> Tensor | None:
        """Orthonormal directions [pair, D, n]; None if there are none such."""
        basis = self.part.interventions.singular_vectors(head, side)
        if choice == "top":
            return _columns(basis, contribution_order(self._contributions(head))[:, :n])
        if choice == "spectrum":
            return basis[..., :n]
        if choice == "other_head":
            other = self._other(head)
            if other is None:
                return None
            vectors = self.part.interventions.singular_vectors(other, side)
            return _columns(vectors, contribution_order(self._contributions(other))[:, :n])
        if choice == "residual":
            generator = keyed_generator(self.seed, _RESIDUAL, head, SIDES.index(side), self.part.number)
            return self.part.interventions.residual_draws(head, n, generator)
        A, B = self._turns(head, side, basis)
        if choice == "random":
            return basis @ B[..., :n]
        query, at_key, direction, S = (
            value[head].nan_to_num()
            for value in (self.part.scores.query, self.part.scores.key, self.part.scores.direction, self.part.scores.S)
        )
        left, right = (query, at_key) if side == "query" else (query * S, direction)
        contributions = _turned(left, A) * _turned(right, A)
        return _columns(basis @ A, contribution_order(contributions)[:, :n])

    def _turns(self, head: int, side: Side, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Two random rotations [pair, R, R]: each pair has draws of its own, so that intervals know of the draws."""
        seed = keyed_seed(self.seed, _TURNS, head, SIDES.index(side), self.part.number)
        n_pairs, _, rank = basis.shape
        A, B = haar_orthogonal(rank, 2 * n_pairs, seed=seed, device=basis.device).to(basis.dtype).chunk(2)
        return A, B

    def _matched(self, head: int, side: Side, basis: Tensor, n: int, factor: float) -> Move:
        """Random others that raise the score, scaled so that it changes as much as along the top n."""
        own = self._contributions(head)
        order = contribution_order(own)
        towards = torch.where(own.sum(-1, keepdim=True) < 0, -own, own)
        is_other = torch.ones_like(own, dtype=torch.bool).scatter(-1, order[:, :n], False) & (towards > 0)
        generator = keyed_generator(self.seed, _PAIRS, head, SIDES.index(side), self.part.number)
        draw = torch.rand(own.shape, generator=generator).to(own.device) + is_other
        drawn = draw.argsort(-1, descending=True)[:, :n]
        kept = is_other.gather(-1, drawn)
        amount, of_others = own.gather(-1, order[:, :n]).sum(-1), (own.gather(-1, drawn) * kept).sum(-1)
        scaled = 1 + (factor - 1) * amount / of_others  # infinite where there are no others
        return Move(head, side, _columns(basis, drawn) * kept[:, None], scaled)

    def _other(self, head: int) -> int | None:
        """Another head of the same layer, if possible none of the task's; None for a layer of one head."""
        size = self.part.heads_per_layer
        first = head - head % size
        others = [other for other in range(first, first + size) if other != head]
        idle = [other for other in others if other not in self.heads] or others
        if not idle:
            return None
        draw = torch.randint(len(idle), (), generator=keyed_generator(self.seed, _OTHER, head))
        return idle[int(draw)]


def _attention(part: _Part) -> Tensor:
    assert part.scores.attention is not None
    return part.scores.attention


def _columns(basis: Tensor, index: Tensor) -> Tensor:
    """Columns [pair, D, n] of each pair's basis [pair, D, R]."""
    return basis.gather(-1, index[:, None].expand(-1, basis.shape[-2], -1))


def _turned(coordinates: Tensor, A: Tensor) -> Tensor:
    """Coordinates [pair, R] in each pair's turned basis."""
    turned: Tensor = (coordinates[:, None] @ A).squeeze(-2)
    return turned


def _count_beyond(top: Tensor, controls: Tensor) -> Tensor:
    """How many heads have values [head, template] above those of every control [head, control, template].

    By the whole interval of the mean difference over templates (Student's t), each head's at a level such that all of
    them together are wrong in 5 % of cases (Bonferroni). To be above every one of the controls needs no correction.

    Returns:
        The number; NaN for fewer than two templates, or no value.
    """
    from scipy.stats import t

    n_heads, n = top.shape
    if n < 2 or bool(top.isnan().all()):
        return top.new_full((), torch.nan)
    difference = (top[:, None] - controls).double()
    quantile = float(t.ppf(1 - (1 - CONFIDENCE) / 2 / n_heads, n - 1))
    lower = difference.mean(-1) - quantile * difference.std(-1) / n**0.5
    beyond = (lower > 0) | controls.isnan().all(-1)  # a control that there is not
    count: Tensor = (beyond.all(-1) & ~top.isnan().any(-1)).sum().to(top.dtype)
    return count
