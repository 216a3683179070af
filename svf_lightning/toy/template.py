"""Templates T: which feature pairs the head should attend to, and how strongly (arXiv 2602.13524, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import InputError, bad_value
from svf_lightning.toy.instances import at_least, per_instance

TemplateName = Literal["single", "linear", "many_to_one", "zero"]
TemplatePairs = list[tuple[int, int, float]]


@dataclass(frozen=True)
class Template:
    """The non-zero entries of T.

    Args:
        pairs: (query feature i, key feature j), int64 [P, 2]; no pair twice.
        logits: Target logit T_ij of each pair [I, P].
        n_features: N.
    """

    pairs: Int[Tensor, "P 2"]
    logits: Float[Tensor, "I P"]
    n_features: int

    def matrix(self) -> Float[Tensor, "I N N"]:
        """T itself, one per instance; rows are query features."""
        T = self.logits.new_zeros(len(self.logits), self.n_features, self.n_features)
        T[:, self.pairs[:, 0], self.pairs[:, 1]] = self.logits
        return T


def make_template(
    template: TemplateName | TemplatePairs,
    *,
    n_features: int,
    n_instances: int = 1,
    n_pairs: int = 1,
    target_logit: float | Sequence[float] | None = 5.0,
) -> Template:
    """Build T.

    Args:
        template: ``single``: T_01 = a. ``linear``: T_{i, i+P} falls linearly from a to a/P over P pairs.
            ``many_to_one``: T_{i, P} = a for i < P, P query features that share one key feature. ``zero``: no pair, no
            head. Or an explicit list of (query feature, key feature, logit).
        n_features: N, the number of features.
        n_instances: I.
        n_pairs: P, for ``linear`` and ``many_to_one``.
        target_logit: a, one number or one per instance; None for an explicit list, which has its own logits.

    Raises:
        InputError: A pair names a feature that does not exist, is listed twice, or the options contradict each other.
    """
    if isinstance(template, str):
        if template == "zero":
            return _template([], torch.zeros(n_instances, 0), n_features)
        if target_logit is None:
            raise bad_value("target_logit", None, f"a number, for template={template!r}", "set --model.target_logit=5")
        a = per_instance("target_logit", target_logit, n_instances)[:, None]
        n = 1 if template == "single" else at_least("n_pairs", n_pairs, 1, key="model.n_pairs")
        if template == "single":
            return _template([(0, 1)], a, n_features)
        if template == "linear":
            share = torch.arange(n, 0, -1, dtype=torch.float64) / n
            return _template([(i, i + n) for i in range(n)], a * share, n_features)
        if template == "many_to_one":
            return _template([(i, n) for i in range(n)], a.expand(n_instances, n), n_features)
        raise bad_value(
            "template", template, "single, linear, many_to_one, zero, or a list of pairs", "change --model.template"
        )
    if target_logit is not None:
        raise InputError(
            "target_logit has no effect on an explicit template, whose pairs have logits of their own. "
            "Fix: set --model.target_logit=null."
        )
    if not template:
        raise bad_value(
            "template", template, "at least one (query feature, key feature, logit)", "use template=zero for no head"
        )
    logits = torch.tensor([float(logit) for _, _, logit in template], dtype=torch.float64)
    return _template([(int(i), int(j)) for i, j, _ in template], logits.expand(n_instances, -1), n_features)


def _template(pairs: list[tuple[int, int]], logits: Tensor, n_features: int) -> Template:
    for pair in pairs:
        for feature in pair:
            if not 0 <= feature < n_features:
                raise InputError(
                    f"the template names feature {feature}, which does not exist: there are n_features={n_features}. "
                    f"Allowed: 0..{n_features - 1}. Fix: raise --model.n_features or use fewer pairs (--model.n_pairs)."
                )
        if pairs.count(pair) > 1:
            raise InputError(f"the template lists the pair {pair} twice. Allowed: each pair once. Fix: remove one.")
    return Template(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2), logits.float().contiguous(), n_features)
