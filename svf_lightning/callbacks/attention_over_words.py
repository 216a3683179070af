"""AttentionOverWords: how every head spreads its attention over the words of a few prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from svf_lightning.callbacks.base import Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import contribution_order, relative_attention
from svf_lightning.probe import Probe
from svf_lightning.quantities import Place, Quantity


def _shown(*dims: str) -> Any:
    """Of the quantities that the head picker shows."""
    return {"dims": ("shown", *dims), "places": Place.NOWHERE, "source": "Fig. 7a"}


class _Shown(NamedTuple):
    """One prompt as all heads see it; n keys, those up to the query."""

    prompt: int
    attention: Tensor  # [*batch, n]
    relative: Tensor  # [*batch, n]
    top_index: Tensor  # [*batch, top]
    top: Tensor  # [*batch, n, top]


class AttentionOverWords(ProbeMetric):
    """Relative attention of every head to every key of a few prompts, with the singular pairs that make up the score.

    For looking at single prompts, as in Fig. 7a; the other metrics know the attended key alone. Per layer and head, for
    ``n_prompts`` prompts that are spread over all. What is no key, or has no other key to be compared with, is NaN; a
    pair's index is -1 then.

    Args:
        n_prompts: Number of prompts.
        n_top: Number of singular pairs.
        max_words: Prompts whose query sees more keys are not shown.

    Raises:
        InputError: An option out of range.
    """

    needs = "a language model"
    quantities = (
        Quantity("words/attention", "attention weight", "Of the query on each key.", low=0, high=1, **_shown("word")),
        Quantity("words/relative", "relative score", "Of each key against the mean of the others.", unit="nats",
                 **_shown("word")),
        Quantity("words/top_index", "singular pair", "From 0; those that contribute most to the key's score.",
                 **_shown("top")),
        Quantity("words/top", "contribution", "Of these singular pairs to the relative score of each key.",
                 unit="nats", **_shown("word", "top")),
        Quantity("words/prompt", "prompt", "Which prompts are shown, from 0.", **_shown()),
    )  # fmt: skip

    def __init__(self, n_prompts: int = 4, n_top: int = 4, max_words: int = 64) -> None:
        for name, value in (("n_prompts", n_prompts), ("n_top", n_top), ("max_words", max_words)):
            if value < 1:
                raise bad_value(name, value, "an integer >= 1", "change the AttentionOverWords callback")
        self.n_prompts, self.n_top, self.max_words = n_prompts, n_top, max_words
        self._shown: list[_Shown] = []
        self._n_seen = 0

    def observe(self, probe: Probe) -> None:
        """Look at the chosen prompts among this part's."""
        if probe.decompose is None or probe.scores is None:
            return
        size = probe.scores.query.shape[-2]
        labelled = (len(values) for dims, values in probe.coords.values() if dims == ("prompt",))
        total = next(labelled, size)  # all parts of the step, so the choice does not depend on the batch size
        chosen = {(2 * k + 1) * total // (2 * self.n_prompts) for k in range(self.n_prompts)}
        for number in sorted(chosen & set(range(self._n_seen, self._n_seen + size))):
            shown = self._look(probe, number - self._n_seen)
            if shown is not None:
                self._shown.append(shown._replace(prompt=number))
        self._n_seen += size

    def measure(self, probe: Probe) -> Measurement:
        """The chosen prompts; nothing for a module that does not tell about all keys."""
        shown, self._shown, self._n_seen = self._shown, [], 0
        if not shown:
            return {}
        longest = max(one.attention.shape[-1] for one in shown)

        def joined(name: str, *, words: int | None = None) -> Tensor:
            """One quantity of all prompts [1, *batch, shown, ...], the dimension ``words`` padded with NaN."""
            parts = [getattr(one, name) for one in shown]
            if words is not None:
                before = [0, 0] * (-words - 1)  # dimensions are counted from the last
                parts = [pad(part, [*before, 0, longest - part.shape[words]], value=torch.nan) for part in parts]
            return torch.stack(parts, dim=len(probe.batch_dims) - 1)[None]

        return {
            "words/attention": joined("attention", words=-1),
            "words/relative": joined("relative", words=-1),
            "words/top_index": joined("top_index"),
            "words/top": joined("top", words=-2),
            "words/prompt": torch.tensor([[one.prompt for one in shown]]),
        }

    def _look(self, probe: Probe, number: int) -> _Shown | None:
        """The prompt of that number among the probe's; None if it is too long."""
        assert probe.decompose is not None
        assert probe.scores is not None
        all_keys = probe.decompose(torch.tensor([number], device=probe.scores.query.device))
        n, key = int(all_keys.query) + 1, int(all_keys.key)
        if n > self.max_words:
            return None
        is_key = all_keys.is_key[..., 0, :n]
        relative = relative_attention(all_keys.contributions[..., 0, :n, :], is_key)
        relative = relative.masked_fill(~is_key[..., None], torch.nan)
        of_key = relative[..., key, :]
        top = contribution_order(of_key)[..., : self.n_top]
        over_words = relative.gather(-1, top[..., None, :].expand(*relative.shape[:-1], -1))
        return _Shown(
            number,
            all_keys.attention[..., 0, :n].masked_fill(~is_key, torch.nan),
            relative.sum(-1),
            top.masked_fill(of_key.isnan().any(-1, keepdim=True), -1).to(torch.int16),
            over_words,
        )
