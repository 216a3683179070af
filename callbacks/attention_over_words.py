"""AttentionOverWords: how every head spreads its attention over the words of a few prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from svf_lightning.callbacks.capture import Measured, Measurement, ProbeMetric
from svf_lightning.errors import bad_value
from svf_lightning.metrics import contribution_order, relative_attention
from svf_lightning.probe import Probe


class _Shown(NamedTuple):
    """One prompt as all heads see it; n keys, those up to the query."""

    prompt: int
    attention: Tensor  # [*batch, n]
    relative: Tensor  # [*batch, n]
    top_index: Tensor  # [*batch, top]
    top: Tensor  # [*batch, n, top]


class AttentionOverWords(ProbeMetric):
    """Relative attention of every head to every key of a few prompts, with the singular pairs that make up the score.

    For looking at single prompts, as in Fig. 7a; the other metrics know the attended key alone. Arrays per layer and
    head, for ``n_prompts`` prompts that are spread over all:
        words/attention [shown, word]: attention weight of the query on each key, in [0, 1];
        words/relative [shown, word]: score of each key relative to the mean of the others (nats);
        words/top_index [shown, top]: the singular pairs, from 0, that contribute most to the attended key's score;
        words/top [shown, word, top]: what these pairs contribute to the relative score of each key (nats).
    And words/prompt [shown]: which prompts these are, from 0. What is no key, or has no other key to be compared with,
    is NaN; a pair's index is -1 then.

    Args:
        n_prompts: Number of prompts.
        n_top: Number of singular pairs.
        max_words: Prompts whose query sees more keys are not shown.

    Raises:
        InputError: An option out of range.
    """

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
        total = next(labelled, size)  # of all parts, so that the choice does not depend on the batch size
        chosen = {(2 * k + 1) * total // (2 * self.n_prompts) for k in range(self.n_prompts)}
        for number in sorted(chosen & set(range(self._n_seen, self._n_seen + size))):
            shown = self._look(probe, number - self._n_seen)
            if shown is not None:
                self._shown.append(shown._replace(prompt=number))
        self._n_seen += size

    def measure(self, probe: Probe) -> Measurement:
        """See the class for the names; nothing for a module that does not tell about all keys."""
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
            "words/attention": Measured(joined("attention", words=-1), ("shown", "word")),
            "words/relative": Measured(joined("relative", words=-1), ("shown", "word")),
            "words/top_index": Measured(joined("top_index"), ("shown", "top")),
            "words/top": Measured(joined("top", words=-2), ("shown", "word", "top")),
            "words/prompt": Measured(torch.tensor([[one.prompt for one in shown]]), ("shown",), ()),
        }

    def _look(self, probe: Probe, number: int) -> _Shown | None:
        """The prompt of that number among the probe's; None if it is too long."""
        assert probe.decompose is not None
        assert probe.scores is not None
        found = probe.decompose(torch.tensor([number], device=probe.scores.query.device))
        n, key = int(found.query) + 1, int(found.key)
        if n > self.max_words:
            return None
        is_key = found.is_key[..., 0, :n]
        relative = relative_attention(found.contributions[..., 0, :n, :], is_key)
        relative = relative.masked_fill(~is_key[..., None], torch.nan)
        of_key = relative[..., key, :]
        top = contribution_order(of_key)[..., : self.n_top]
        over_words = relative.gather(-1, top[..., None, :].expand(*relative.shape[:-1], -1))
        return _Shown(
            number,
            found.attention[..., 0, :n].masked_fill(~is_key, torch.nan),
            relative.sum(-1),
            top.masked_fill(of_key.isnan().any(-1, keepdim=True), -1).to(torch.int16),
            over_words,
        )
