"""Probes whose heads, features and scores are known, and what a callback measures of them."""

import torch

from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import AttendedScores, Probe


def measured(callback, model):
    """What a callback measures of a model as it is now, without the dimension of steps."""
    return {name: value[0] for name, value in callback.measure(Probe.stack([model.probe().snapshot()])).items()}


def probe_of(W_Q, W_K, features, pairs, **options):
    """One step of heads and features, with target logits of 1."""
    pairs = torch.tensor(pairs)
    logits = torch.ones(*W_Q.shape[:-2], len(pairs))
    return Probe.stack([Probe(0, AttentionHeads(W_Q, W_K), features, pairs, logits, **options)])


def parts(n_parts: int, R: int = 6):
    """Probes that show different query-key pairs of one step, with attention and outcomes."""
    g = torch.Generator().manual_seed(1)
    for i in range(n_parts):
        tensors = {name: torch.randn(2, 3, 5, R, generator=g) for name in ("query", "key", "direction")}
        scores = AttendedScores(
            **tensors, S=torch.rand(2, 3, 5, R, generator=g), attention=torch.rand(2, 3, 5, generator=g),
            logit_difference=torch.randn(5, generator=g),
        )  # fmt: skip
        yield Probe(4, scores=scores, part=(i, n_parts), batch_dims=("layer", "head"), feature_dims=())
