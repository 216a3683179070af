"""AttentionSparsity: are attention scores sparse in the singular basis of the heads?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.callbacks.templates import means_of_templates, templates_of
from svf_lightning.errors import bad_value
from svf_lightning.metrics import SparseAttention, SparsityOverPairs, compare_heads
from svf_lightning.metrics.head_tests import LEVEL
from svf_lightning.metrics.sparsity import FEW, last_eighth
from svf_lightning.probe import AttendedScores, Probe, Scores, check_scores
from svf_lightning.quantities import SPARSENESS, TASK, TASK_PAIRS, TASK_SPARSENESS, Place, Quantity

_COMPARED = Place.TABLE | Place.COMPARISON
_SPARSENESS: Any = {"unit": "S(v)", "low": 0, "high": 1, "symbol": "S(v)", "source": "Fig. 7b; method, section 6"}
_KEPT: Any = {"needs": "its option keep_prompts=true, best in a replay of a language model", "places": Place.NOWHERE}
_SHARE: Any = {"unit": "share", "low": 0, "high": 1}


def _over_pairs(prefix: str, of: str, shown: Mapping[str, Mapping[str, Any]]) -> list[Quantity]:
    """What is measured over the query-key pairs of one group of heads; ``shown``: where, by the end of the name."""
    quantities = (
        Quantity("attention", "attention on the key", "Attention weight on the attended key, mean.",
                 unit="weight", low=0, high=1, logged="mean", source="Fig. 7b"),
        Quantity("sparseness", "sparseness in the singular basis",
                 "Rolls-Tovee S(v) of the relative contributions to the attended key's score, mean; 1/R for one pair.",
                 **_SPARSENESS, better="lower"),
        Quantity("sparseness_shared_rotation", "sparseness, shared rotation",
                 "S(v) in a basis rotated at random, alike on both sides, so that scores stay what they are; mean.",
                 **_SPARSENESS),
        Quantity("sparseness_independent_rotation", "sparseness, independent rotation",
                 "S(v) in bases rotated at random, each side by itself: spectrum kept, pairing broken; mean.",
                 **_SPARSENESS),
        Quantity("sparseness_permuted_pairing", "sparseness, permuted pairing",
                 "S(v) with the head's own u_k and sigma_k, each beside another v; mean.", **_SPARSENESS,
                 logged="mean"),
        Quantity("sparseness_strongest_control", "sparseness, strongest control",
                 "The smallest of the three: under a shared rotation, independent ones, and a permuted pairing.",
                 **_SPARSENESS, logged="mean"),
        Quantity("n_recon", "singular pairs that make up the score",
                 "Smallest number of contributions that add up to the score, median over pairs.",
                 symbol="N_recon", unit="count", low=0, source="Fig. 9"),
        Quantity("n_recon_at_most_4", "scores made of 1 to 4 singular pairs",
                 "Share of the query-key pairs whose N_recon is at most 4.", **_SHARE, source="Fig. 9"),
        Quantity("n_recon_shared_rotation", "the same in a rotated basis",
                 "N_recon under shared rotations, which keep every score: mean over rotations, median over pairs.",
                 symbol="N_recon", unit="count", low=0, source="Fig. 9", logged="mean"),
        Quantity("n_recon_at_most_4_rotated", "scores made of 1 to 4 rotated pairs",
                 "Share of the query-key pairs whose N_recon is at most 4, under shared rotations.", **_SHARE,
                 source="Fig. 9", logged="mean"),
        Quantity("score", "relative score", "Score of the attended key against the mean of the others, mean.",
                 unit="nats", logged="mean", source="method, section 6"),
        Quantity("top_in_last_eighth", "largest contribution at the end of the spectrum",
                 "Share of the query-key pairs whose largest contributor is in the last eighth of the singular values.",
                 **_SHARE, logged="mean", source="Fig. 8"),
        *(
            Quantity(f"sparseness_{kind}_rotation_sd", f"sparseness, {kind} rotation, spread",
                     "Standard deviation over random rotations of the mean over pairs.", unit="S(v)", low=0,
                     logged="no", source="Fig. 7b")
            for kind in ("shared", "independent")
        ),
    )  # fmt: skip
    if of:  # one value per step
        quantities = tuple(replace(q, logged="mean" if q.logged == "extremes" else q.logged) for q in quantities)
    return [replace(q, name=prefix + q.name, label=q.label + of, **shown.get(q.name, {})) for q in quantities]


_OF_HEADS = _over_pairs(
    "sad/", "",
    {
        "sparseness": {"panel": SPARSENESS, "colour": "purple", "places": _COMPARED},
        "sparseness_shared_rotation": {"panel": SPARSENESS, "colour": "purple"},
        "sparseness_independent_rotation": {"panel": SPARSENESS, "colour": "purple"},
    },
)  # fmt: skip
_OF_TASK = _over_pairs(
    "sad/task/", ", task's heads",
    {
        "attention": {"panel": TASK, "colour": "blue", "column": "attn"},
        "sparseness": {
            "panel": TASK_SPARSENESS, "colour": "green", "column": "S(v)", "places": _COMPARED | Place.PROGRESS,
        },
        "sparseness_shared_rotation": {
            "panel": TASK_SPARSENESS, "colour": "orange", "column": "shared", "places": _COMPARED,
        },
        "sparseness_independent_rotation": {"panel": TASK_SPARSENESS, "colour": "purple", "column": "indep"},
        "n_recon": {"panel": TASK_PAIRS},
    },
)  # fmt: skip
_ATTENDING = _over_pairs(
    "sad/attending/", ", attending heads",
    {
        "n_recon": {"panel": TASK_PAIRS, "column": "N_recon"},
        "sparseness_permuted_pairing": {"logged": "no"},  # W&B's page of a run has room for a hundred names
        "n_recon_shared_rotation": {"logged": "no"},
    },
)  # fmt: skip


_CONTROLS = ("sparseness_shared_rotation", "sparseness_independent_rotation", "sparseness_permuted_pairing")
_KEPT_AS = {"n_recon_shared_rotation": None, "few_shared_rotation": "n_recon_at_most_4_rotated"}  # None: not kept
_STRONGEST = "sparseness_strongest_control"
_WAYS = (("sparser", "smaller", "every control"), ("denser", "larger", "one control"))
_SAMPLED = (
    ("sparseness", "sparseness", "S(v)"),
    *((name, name.replace("_", " "), "S(v)") for name in (*_CONTROLS, _STRONGEST)),
)


class AttentionSparsity(ProbeMetric):
    """Decomposes the scores of attended keys over singular pairs (Figs. 7 to 9; method, section 6).

    Over the query-key pairs that the probe shows (prompts, for a language model): ``sad/NAME`` per instance, or per
    layer and head. With attention weights also, one value per step: ``sad/task/NAME``, means over the ``n_task_heads``
    heads with most attention on the key, and ``sad/attending/NAME``, over all (pair, head) with a weight of at least
    ``attending``. Of each head whether it is sparser than every control (``sad/sparser``), or denser than one
    (``sad/denser``), tested over templates and corrected over heads
    (:func:`~svf_lightning.metrics.compare_heads`). What intervals are made of: ``attending/NAME`` of each head, over
    its pairs that attend, and ``template/NAME`` of each template of the prompts, over the task's heads.

    Args:
        n_draws: Random rotations, or permutations, of each control.
        seed: Seed of the rotations; they come from a generator of their own.
        n_task_heads: Heads that count as the task's.
        attending: Attention weight from which a head attends to the key, in (0, 1).
        keep_prompts: Keep the values of every pair in the trajectory.
        every_n_steps: In a training, measure every n-th step and the last one; the rows between hold NaN. The rotations
            cost more than all other metrics together.
        recon_share: Share of the score that N_recon must reach, in (0, 1]; 0.7 is a tolerance of the authors' helper.
        scores: "relative": minus the mean of the other keys' scores, as a softmax sees differences alone; or "raw", as
            the model computes them (a replay).

    Raises:
        InputError: An option out of range.
    """

    needs = "a head (not template=zero) and query-key pairs (of the toy model: --model.n_attended=64)"
    later = frozenset({"recon_share", "scores"})
    quantities = (
        Quantity(
            "sad/accuracy", "accuracy", "Share of the prompts whose right answer has the larger next-token logit.",
            unit="share", low=0, high=1, logged="mean", better="higher", source="Wang et al. 2022", column="accuracy",
            panel=TASK, colour="vermillion", places=_COMPARED | Place.PROGRESS, needs="a language model (replay)",
        ),
        Quantity(
            "sad/logit_difference", "logit difference", "Next-token logit of the right answer minus the wrong one's.",
            unit="nats", logged="mean", better="higher", source="Wang et al. 2022", column="logits",
            needs="a language model (replay)", places=_COMPARED,
        ),
        *_OF_HEADS,
        Quantity(
            "sad/score_error", "error of the decomposition",
            "Largest difference of decomposed scores from the model's own, relative to the largest score.",
            low=0, better="lower", logged="mean", source="method, section 5",
        ),
        Quantity(
            "sad/score_of_biases", "relative score, what biases add",
            "What biases add to the score beside the singular pairs, where they are no part of them; mean.",
            unit="nats", logged="mean", source="method, section 6", gaps=True,
            needs="a language model whose heads have biases, and --model.biases=separate",
        ),
        Quantity(
            "sad/position_share", "share of the position term",
            "Of the relative score's size: position term / (position term + sum over singular pairs), both without "
            "sign; mean over pairs. 0: content alone.",
            unit="share", low=0, high=1, logged="mean", gaps=True, source="Press et al. 2022",
            needs="a language model that adds a term of positions to its scores (ALiBi)",
        ),
        Quantity(
            "sad/score_of_position", "relative score, what positions add",
            "What ALiBi adds to the score beside the singular pairs, of which it is no part; mean.",
            unit="nats", logged="mean", gaps=True, source="Press et al. 2022",
            needs="a language model that adds a term of positions to its scores (ALiBi)",
        ),
        *_OF_TASK,
        *_ATTENDING,
        *(
            Quantity(f"attending/{name}", f"{label}, of a head", "Mean over the pairs that attend; none: no number.",
                     unit=unit, low=0, logged="no", places=Place.NOWHERE, needs="a language model (replay)", gaps=True)
            for name, label, unit in _SAMPLED
        ),
        Quantity("attending/count", "pairs that attend, of a head", unit="count", low=0, logged="no",
                 places=Place.NOWHERE, needs="a language model (replay)"),
        *(
            Quantity(f"template/{name}", f"{label}, of a template", "Mean over its prompts and the task's heads.",
                     unit=unit, low=0, dims=("template",), places=Place.NOWHERE, needs="a language model (replay)",
                     gaps=True)
            for name, label, unit in (*_SAMPLED, ("accuracy", "accuracy", "share"))
        ),
        *(
            Quantity(f"sad/{way}", f"{way} than {than}, corrected over heads",
                     f"1 for a head whose S(v) is {sign} than under {than}, else 0; sign flips over templates, "
                     "5 % false discoveries (Benjamini-Hochberg) over all heads. None: too few templates.",
                     unit="share", low=0, high=1, logged="mean", gaps=True, source="Fig. 7b",
                     needs="a language model (replay), and five templates")
            for way, sign, than in _WAYS
        ),
        *(
            Quantity(f"sad/p_{way}", f"corrected p, {way} than {than}", "Of each head, all keys of the task.", unit="p",
                     low=0, high=1, logged="no", gaps=True, places=Place.NOWHERE, source="Fig. 7b",
                     needs="a language model (replay), and five templates")
            for way, _, than in _WAYS
        ),
        Quantity("sad/attending/count", "(pair, head) that attend", "With at least half of the attention on the key.",
                 unit="count", low=0, logged="mean"),
        *(
            Quantity(f"prompt/{name}", f"{label} of a prompt", unit=unit, dims=("prompt",), **_KEPT)
            for name, label, unit in (
                ("sparseness", "sparseness", "S(v)"),
                ("sparseness_shared_rotation", "sparseness, shared rotation,", "S(v)"),
                ("sparseness_independent_rotation", "sparseness, independent rotation,", "S(v)"),
                ("sparseness_permuted_pairing", "sparseness, permuted pairing,", "S(v)"),
                ("score", "relative score", "nats"),
                ("n_recon", "N_recon", "count"),
                ("n_recon_at_most_4_rotated", "share of shared rotations with N_recon of at most 4,", "share"),
                ("top_index", "index of the largest contributor", ""),
                ("attention", "attention on the key", "weight"),
                ("logit_difference", "logit difference", "nats"),
            )
        ),
        Quantity("draw/shared", "sparseness in one shared rotation", unit="S(v)", dims=("draw",), **_KEPT),
        Quantity("draw/independent", "sparseness in one independent rotation", unit="S(v)", dims=("draw",), **_KEPT),
        Quantity("draw/permuted", "sparseness in one permuted pairing", unit="S(v)", dims=("draw",), **_KEPT),
        Quantity("contribution/mean", "relative contribution of a singular pair", "Mean over query-key pairs.",
                 symbol="c̃_k", unit="nats", dims=("rank",), **_KEPT, source="Fig. 7a"),
        Quantity("contribution/sd", "its standard deviation", "Over query-key pairs.", unit="nats", low=0,
                 dims=("rank",), **_KEPT, source="Fig. 7a"),
        Quantity("task/layer_head", "heads of the task", "Index of the flattened heads, most attention first.",
                 dims=("task_head",), needs="a language model (replay)", places=Place.NOWHERE),
    )  # fmt: skip

    def __init__(
        self,
        n_draws: int = 16,
        seed: int = 0,
        n_task_heads: int = 3,
        attending: float = 0.5,
        keep_prompts: bool = True,
        every_n_steps: int = 1,
        recon_share: float = 1.0,
        scores: Scores = "relative",
    ) -> None:
        if every_n_steps < 1:
            raise bad_value("every_n_steps", every_n_steps, "an integer >= 1", "change the AttentionSparsity callback")
        self.every_n_steps = every_n_steps
        if n_task_heads < 1:
            raise bad_value("n_task_heads", n_task_heads, "an integer >= 1", "change the AttentionSparsity callback")
        if not 0 < attending < 1:
            raise bad_value("attending", attending, "a weight in (0, 1)", "change the AttentionSparsity callback")
        self.n_draws, self.seed = n_draws, seed
        self.n_task_heads, self.attending, self.keep_prompts = n_task_heads, attending, keep_prompts
        check_scores(scores)
        self.recon_share, self.scores = recon_share, scores
        self._metric()  # raises if n_draws or recon_share is out of range
        self._seen: SparseAttention | None = None
        self._errors: list[Tensor] = []
        self._of_biases: list[Tensor] = []
        self._of_positions: list[tuple[Tensor, Tensor]] = []  # the position term, and the sum over singular pairs
        self._logit_differences: list[Tensor] = []

    def observe(self, probe: Probe) -> None:
        """Add one part of a step's query-key pairs."""
        scores = probe.attended_scores
        if scores is None:
            return
        scores = scores.taken(self.scores)
        if self._seen is None:
            self._seen = self._metric()
        _update(self._seen, scores)
        if scores.error is not None:
            self._errors.append(scores.error)
        if scores.bias is not None:
            self._of_biases.append(scores.bias)
        if scores.position is not None:
            self._of_positions.append((scores.position, scores.contributions.sum(-1)))
        if scores.logit_difference is not None:
            self._logit_differences.append(scores.logit_difference)

    def measure(self, probe: Probe) -> Measurement:
        """Sparseness and its controls; nothing without query-key pairs."""
        if self._seen is None:
            scores = probe.attended_scores
            if scores is None:
                return {}
            scores = scores.taken(self.scores)
            steps, is_last = (torch.as_tensor(x).flatten() for x in (probe.step, probe.is_last))
            due = (steps % self.every_n_steps == 0) | is_last
            looked_at = due.clone()
            looked_at[-1] |= not due.any()  # for the names and the shapes
            metric = self._metric()
            _update(metric, scores if looked_at.all() else scores.at_steps(looked_at))
            measured = self._of_heads(metric.compute(), metric.rank)
            if due.all():
                return measured
            return {name: _spread(value[due[looked_at]], due) for name, value in measured.items()}
        seen, rank = self._seen.compute(), self._seen.rank  # all parts belong to one step
        measured = self._of_heads(seen, rank)
        if self._errors:
            measured["sad/score_error"] = torch.stack(self._errors).amax(0)
        if self._of_biases:
            measured["sad/score_of_biases"] = torch.cat(self._of_biases, -1).nanmean(-1)
        if self._of_positions:
            term, content = (torch.cat(parts, -1) for parts in zip(*self._of_positions, strict=True))
            measured["sad/score_of_position"] = term.nanmean(-1)
            measured["sad/position_share"] = (term.abs() / (term.abs() + content.abs())).nanmean(-1)
        templates = templates_of(probe, seen.score.shape[-1])
        if seen.attention is not None:
            measured |= self._of_the_task(seen, rank, templates)
        if self._logit_differences:
            difference = torch.cat(self._logit_differences)
            right = (difference > 0).to(difference.dtype).masked_fill(difference.isnan(), torch.nan)
            if not bool(difference.isnan().all()):  # prompts of which attention alone is measured have no answers
                measured["template/accuracy"] = means_of_templates(right, templates)
                measured["sad/logit_difference"] = difference.nanmean()
                measured["sad/accuracy"] = right.nanmean()
                if self.keep_prompts:
                    measured["prompt/logit_difference"] = difference
        self._seen, self._errors, self._of_biases, self._of_positions = None, [], [], []
        self._logit_differences = []
        return {name: value[None] for name, value in measured.items()}

    def _metric(self) -> SparseAttention:
        # each device measures its own checkpoint, so there is nothing to gather
        return SparseAttention(self.n_draws, self.seed, share=self.recon_share, sync_on_compute=False)

    def _of_heads(self, seen: SparsityOverPairs, rank: int) -> dict[str, Tensor]:
        """Statistics over the pairs of each head (or instance), and their values pair by pair."""
        measured = {f"sad/{k}": v for k, v in _summary(seen, rank).items()}
        draws = {"shared": seen.shared_draws, "independent": seen.independent_draws}
        measured |= {f"sad/sparseness_{k}_rotation_sd": v.std(-1) for k, v in draws.items()}
        draws["permuted"] = seen.permuted_draws
        if self.keep_prompts:
            pairs = {_KEPT_AS.get(name, name): getattr(seen, name) for name in SparseAttention.PER_PAIR}
            measured |= {f"prompt/{k}": _small(v) for k, v in pairs.items() if k is not None and v is not None}
            measured |= {f"draw/{k}": v for k, v in draws.items()}
            measured["contribution/mean"] = seen.contribution_mean
            measured["contribution/sd"] = seen.contribution_sd
        return measured

    def _of_the_task(self, seen: SparsityOverPairs, rank: int, templates: Tensor) -> dict[str, Tensor]:
        """Of the heads with most attention on the key, and of all (pair, head) that attend to it."""
        assert seen.attention is not None
        flat = seen.each(lambda v: v.flatten(0, -2))  # [heads, pair]
        assert flat.attention is not None
        task = flat.attention.nanmean(-1).topk(min(self.n_task_heads, len(flat.attention))).indices
        of_task = flat.each(lambda v: v[task])
        measured = {f"sad/task/{name}": value.mean() for name, value in _summary(of_task, rank).items()}
        for name, draws in (("shared", of_task.shared_draws), ("independent", of_task.independent_draws)):
            measured[f"sad/task/sparseness_{name}_rotation_sd"] = draws.mean(0).std()
        attends = flat.attention >= self.attending
        attending = flat.at_pairs(attends)
        measured |= {f"sad/attending/{name}": value for name, value in _summary(attending, rank).items()}
        measured["sad/attending/count"] = attends.sum().to(flat.attention.dtype)
        measured["task/layer_head"] = task.to(torch.int32)
        shape = seen.score.shape[:-1]
        of_head = {name: _masked_mean(getattr(flat, name), attends) for name in ("sparseness", *_CONTROLS)}
        of_template = {
            name: means_of_templates(getattr(of_task, name).nanmean(0), templates)
            for name in ("sparseness", *_CONTROLS)
        }
        for prefix, values in (("attending", of_head), ("template", of_template)):
            values[_STRONGEST] = torch.stack([values[name] for name in _CONTROLS]).amin(0)
            measured |= {f"{prefix}/{name}": value for name, value in values.items()}
        measured |= self._tested(flat, templates, shape)
        counts = {f"attending/{name}": measured[f"attending/{name}"].view(shape) for name in of_head}
        measured |= counts | {"attending/count": attends.sum(-1).to(flat.attention.dtype).view(shape)}
        return measured

    def _tested(self, flat: SparsityOverPairs, templates: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        """Which heads are sparser than every control, and which are denser than one, over templates."""
        own, *controls = (
            means_of_templates(getattr(flat, name), templates).double().cpu().numpy()
            for name in ("sparseness", *_CONTROLS)
        )
        tests = compare_heads(own, np.stack(controls), seed=self.seed)
        measured = {}
        for way, p in zip(("sparser", "denser"), tests, strict=True):
            found = np.where(np.isnan(p), np.nan, p <= LEVEL)
            for name, values in ((f"sad/p_{way}", p), (f"sad/{way}", found)):
                measured[name] = torch.from_numpy(values).to(flat.score).view(shape)
        return measured


def _update(metric: SparseAttention, scores: AttendedScores) -> None:
    metric.update(scores.query, scores.key, scores.direction, scores.S, scores.attention)


def _masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the last dimension where ``chosen``; NaN where nothing is."""
    return torch.where(chosen, values, torch.nan).nanmean(-1)


def _summary(seen: SparsityOverPairs, rank: int) -> dict[str, Tensor]:
    """Statistics over the last dimension, the pairs; pairs without a score (NaN) are left out."""
    scored = seen.n_recon >= 0
    n = scored.sum(-1).to(seen.sparseness.dtype)
    n_recon = torch.where(scored, seen.n_recon.to(seen.sparseness.dtype), torch.nan)
    summary = {
        "sparseness": seen.sparseness.nanmean(-1),
        "sparseness_shared_rotation": seen.sparseness_shared_rotation.nanmean(-1),
        "sparseness_independent_rotation": seen.sparseness_independent_rotation.nanmean(-1),
        "sparseness_permuted_pairing": seen.sparseness_permuted_pairing.nanmean(-1),
        "score": seen.score.nanmean(-1),
        "n_recon": _median(n_recon),
        "n_recon_at_most_4": (scored & (seen.n_recon <= FEW)).sum(-1) / n,
        "n_recon_shared_rotation": _median(seen.n_recon_shared_rotation),
        "n_recon_at_most_4_rotated": seen.few_shared_rotation.nanmean(-1),
        "top_in_last_eighth": (seen.top_index >= rank - last_eighth(rank)).sum(-1) / n,
    }
    summary[_STRONGEST] = torch.stack([summary[name] for name in _CONTROLS]).amin(0)
    if seen.attention is not None:
        summary["attention"] = seen.attention.nanmean(-1)
    return summary


def _median(values: Tensor) -> Tensor:
    """Median over the last dimension of what is not NaN."""
    return values.nanquantile(0.5, dim=-1) if values.shape[-1] else values.new_full(values.shape[:-1], torch.nan)


def _spread(values: Tensor, due: Tensor) -> Tensor:
    """Values of the measured steps among rows of NaN (numbers that count: of -1)."""
    rows = values.new_full((len(due), *values.shape[1:]), torch.nan if values.is_floating_point() else -1)
    rows[due.to(rows.device)] = values
    return rows


def _small(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.int16)
