"""AttentionSparsity: are attention scores sparse in the singular basis of the heads?"""

from __future__ import annotations

import torch
from torch import Tensor

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import SparseAttention, SparsityOverPairs
from svf_lightning.probe import AttendedScores, Probe

_FEW = 4  # "most heads need 1 to 4 singular pairs" (Fig. 9)


class AttentionSparsity(ProbeMetric):
    """Decomposes the scores of attended keys over singular pairs (Figs. 7 to 9; method, section 6).

    Per instance, or per layer and head, over the query-key pairs that the probe shows (prompts, for a language model):
        sad/sparseness: S(v) of the relative contributions in the singular basis, mean, in [1/R, 1], lower is sparser;
        sad/sparseness_shared_rotation, sad/sparseness_independent_rotation: the same in randomly rotated bases, mean
        over pairs and draws, and with ``_sd`` the standard deviation over draws of the mean over pairs;
        sad/n_recon: singular pairs that make up the score, median; sad/n_recon_at_most_4: share of pairs;
        sad/score: relative score, mean; sad/top_in_last_eighth: share of pairs whose largest contributor is among the
        last eighth of the singular values.
        With attention weights also sad/attention (mean), and sad/score_error: largest difference of the decomposed
        scores from the model's own, relative to the largest.

    With attention weights, one value per step:
        sad/task/NAME: means over the ``n_task_heads`` heads with most attention on the key;
        sad/attending/NAME: over all (pair, head) with a weight of at least ``attending``, and their number
        sad/attending/count; sad/accuracy, sad/logit_difference: of the task, where the probe tells.

    Arrays: prompt/sparseness, prompt/sparseness_shared_rotation, prompt/sparseness_independent_rotation, prompt/score,
    prompt/n_recon, prompt/top_index, prompt/attention [prompt]; draw/shared, draw/independent [draw];
    contribution/mean, contribution/sd [rank] (relative contributions over pairs, by singular index); task/layer_head
    [task_head] (index of the flattened heads), prompt/logit_difference.

    Args:
        n_draws: Random rotations of each control.
        seed: Seed of the rotations; they come from a generator of their own.
        n_task_heads: Heads that count as the task's.
        attending: Attention weight from which a head attends to the key, in (0, 1).
        keep_prompts: Keep the values of every pair in the trajectory.
        every_n_steps: In a training, measure every n-th step and the last one; the rows between hold NaN. The rotations
            cost more than all other metrics together.

    Raises:
        InputError: An option out of range.
    """

    def __init__(
        self,
        n_draws: int = 16,
        seed: int = 0,
        n_task_heads: int = 3,
        attending: float = 0.5,
        keep_prompts: bool = True,
        every_n_steps: int = 1,
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
        SparseAttention(n_draws)  # checks the number
        self._seen: SparseAttention | None = None
        self._errors: list[Tensor] = []
        self._logit_differences: list[Tensor] = []

    def observe(self, probe: Probe) -> None:
        """Add one part of a step's query-key pairs."""
        scores = probe.attended_scores
        if scores is None:
            return
        if self._seen is None:
            self._seen = self._metric()
        _update(self._seen, scores)
        if scores.error is not None:
            self._errors.append(scores.error)
        if scores.logit_difference is not None:
            self._logit_differences.append(scores.logit_difference)

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing without query-key pairs."""
        if self._seen is None:
            scores = probe.attended_scores
            if scores is None:
                return {}
            steps = torch.as_tensor(probe.step).flatten()
            due = steps % self.every_n_steps == 0
            due[-1] = True  # of the block that is measured together, so the last step of a run is among them
            metric = self._metric()
            _update(metric, scores if due.all() else scores.at_steps(due))
            found = self._of_heads(metric.compute(), metric.rank)
            return found if due.all() else {name: _spread(value, due) for name, value in found.items()}
        seen, rank = self._seen.compute(), self._seen.rank  # of the one step that the parts were of
        found = {**self._of_heads(seen, rank)}
        if self._errors:
            found["sad/score_error"] = torch.stack(self._errors).amax(0)
        if seen.attention is not None:
            found |= self._of_the_task(seen, rank)
        if self._logit_differences:
            difference = torch.cat(self._logit_differences)
            found["sad/logit_difference"] = difference.mean()
            found["sad/accuracy"] = (difference > 0).to(difference.dtype).mean()
            if self.keep_prompts:
                found["prompt/logit_difference"] = Measured(difference, ("prompt",), ())
        self._seen, self._errors, self._logit_differences = None, [], []
        return {
            name: value._replace(values=value.values[None]) if isinstance(value, Measured) else value[None]
            for name, value in found.items()
        }

    def _metric(self) -> SparseAttention:
        # several devices measure a checkpoint each, so there is nothing to gather
        return SparseAttention(self.n_draws, self.seed, sync_on_compute=False)

    def _of_heads(self, seen: SparsityOverPairs, rank: int) -> Measurement:
        """Statistics over the pairs of each head (or instance), and their values pair by pair."""
        found: dict[str, Tensor | Measured] = {f"sad/{k}": v for k, v in _summary(seen, rank).items()}
        draws = {"shared": seen.shared_draws, "independent": seen.independent_draws}
        found |= {f"sad/sparseness_{k}_rotation_sd": v.std(-1) for k, v in draws.items()}
        if self.keep_prompts:
            pairs = {name: getattr(seen, name) for name in SparseAttention.PER_PAIR}
            found |= {f"prompt/{k}": Measured(_small(v), ("prompt",)) for k, v in pairs.items() if v is not None}
            found |= {f"draw/{k}": Measured(v, ("draw",)) for k, v in draws.items()}
            found["contribution/mean"] = Measured(seen.contribution_mean, ("rank",))
            found["contribution/sd"] = Measured(seen.contribution_sd, ("rank",))
        return found

    def _of_the_task(self, seen: SparsityOverPairs, rank: int) -> dict[str, Tensor | Measured]:
        """Of the heads with most attention on the key, and of all (pair, head) that attend to it."""
        assert seen.attention is not None
        flat = seen.each(lambda v: v.flatten(0, -2))  # [heads, pair]
        assert flat.attention is not None
        task = flat.attention.nanmean(-1).topk(min(self.n_task_heads, len(flat.attention))).indices
        of_task = flat.each(lambda v: v[task])
        found: dict[str, Tensor | Measured] = {
            f"sad/task/{name}": value.mean() for name, value in _summary(of_task, rank).items()
        }
        for name, draws in (("shared", of_task.shared_draws), ("independent", of_task.independent_draws)):
            found[f"sad/task/sparseness_{name}_rotation_sd"] = draws.mean(0).std()
        attends = flat.attention >= self.attending
        attending = flat.at_pairs(attends)
        found |= {f"sad/attending/{name}": value for name, value in _summary(attending, rank).items()}
        found["sad/attending/count"] = attends.sum().to(flat.attention.dtype)
        found["task/layer_head"] = Measured(task.to(torch.int32), ("task_head",), ())
        return found


def _update(metric: SparseAttention, scores: AttendedScores) -> None:
    metric.update(scores.query, scores.key, scores.direction, scores.S, scores.attention)


def _summary(seen: SparsityOverPairs, rank: int) -> dict[str, Tensor]:
    """Statistics over the last dimension, the pairs; pairs without a score (NaN) are left out."""
    scored = seen.n_recon >= 0
    n = scored.sum(-1).to(seen.sparseness.dtype)
    n_recon = torch.where(scored, seen.n_recon.to(seen.sparseness.dtype), torch.nan)
    found = {
        "sparseness": seen.sparseness.nanmean(-1),
        "sparseness_shared_rotation": seen.sparseness_shared_rotation.nanmean(-1),
        "sparseness_independent_rotation": seen.sparseness_independent_rotation.nanmean(-1),
        "score": seen.score.nanmean(-1),
        "n_recon": n_recon.nanquantile(0.5, dim=-1) if n_recon.shape[-1] else n * torch.nan,
        "n_recon_at_most_4": (scored & (seen.n_recon <= _FEW)).sum(-1) / n,
        "top_in_last_eighth": (seen.top_index >= rank - max(1, rank // 8)).sum(-1) / n,
    }
    if seen.attention is not None:
        found["attention"] = seen.attention.nanmean(-1)
    return found


def _spread(value: Tensor | Measured, due: Tensor) -> Tensor | Measured:
    """Values of the measured steps among rows of NaN (numbers that count: of -1)."""
    values = value.values if isinstance(value, Measured) else value
    rows = values.new_full((len(due), *values.shape[1:]), torch.nan if values.is_floating_point() else -1)
    rows[due.to(rows.device)] = values
    return value._replace(values=rows) if isinstance(value, Measured) else rows


def _small(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.int16)
