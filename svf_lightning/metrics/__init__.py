"""Pure functions on tensors, batched over any leading dimensions: tensors in, tensors out."""

from svf_lightning.metrics.accumulate import InstanceMean
from svf_lightning.metrics.alignment import (
    PairAlignment,
    align_pairs,
    cosine_matrix,
    logit_fidelity,
    match_pairs,
    spearman,
)
from svf_lightning.metrics.dynamics import time_of_change
from svf_lightning.metrics.geometry import (
    attended_vs_rest,
    feature_dimensionality,
    gram,
    interference,
    unit_features,
)
from svf_lightning.metrics.sparsity import (
    haar_orthogonal,
    n_recon,
    relative_attention,
    rotated_contributions,
    sparseness,
)
from svf_lightning.metrics.spectrum import n_significant, sigma_ratio, stable_rank

__all__ = [
    "InstanceMean",
    "PairAlignment",
    "align_pairs",
    "attended_vs_rest",
    "cosine_matrix",
    "feature_dimensionality",
    "gram",
    "haar_orthogonal",
    "interference",
    "logit_fidelity",
    "match_pairs",
    "n_recon",
    "n_significant",
    "relative_attention",
    "rotated_contributions",
    "sigma_ratio",
    "sparseness",
    "spearman",
    "stable_rank",
    "time_of_change",
    "unit_features",
]
