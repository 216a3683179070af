"""Pure functions on tensors, batched over any leading dimensions: tensors in, tensors out."""

from svf_lightning.metrics.accumulate import InstanceMean, SparseAttention, SparsityOverPairs
from svf_lightning.metrics.alignment import (
    PairAlignment,
    align_pairs,
    cosine_matrix,
    line_through,
    logit_fidelity,
    match_pairs,
    share_served,
    signed_cosine_matrix,
    spearman,
)
from svf_lightning.metrics.covariance import RunningCovariance, effective_rank, shrunk_covariance
from svf_lightning.metrics.dynamics import has_happened, noise_of, time_of_change
from svf_lightning.metrics.geometry import (
    attended_vs_rest,
    degrees_from_orthogonal,
    feature_dimensionality,
    gram,
    interference,
    share_in_span,
    unit_features,
)
from svf_lightning.metrics.head_tests import HeadTests, SignFlips, compare_heads, sign_flips
from svf_lightning.metrics.intervals import (
    Interval,
    mean_interval,
    share_difference_interval,
    share_interval,
)
from svf_lightning.metrics.sparsity import (
    Sparsity,
    contribution_order,
    haar_orthogonal,
    measure_sparsity,
    n_recon,
    relative_attention,
    sparseness,
    top_contributor,
)
from svf_lightning.metrics.spectrum import n_significant, sigma_ratio, stable_rank

__all__ = [
    "HeadTests",
    "InstanceMean",
    "Interval",
    "PairAlignment",
    "RunningCovariance",
    "SignFlips",
    "SparseAttention",
    "Sparsity",
    "SparsityOverPairs",
    "align_pairs",
    "attended_vs_rest",
    "compare_heads",
    "contribution_order",
    "cosine_matrix",
    "degrees_from_orthogonal",
    "effective_rank",
    "feature_dimensionality",
    "gram",
    "haar_orthogonal",
    "has_happened",
    "interference",
    "line_through",
    "logit_fidelity",
    "match_pairs",
    "mean_interval",
    "measure_sparsity",
    "n_recon",
    "n_significant",
    "noise_of",
    "relative_attention",
    "share_difference_interval",
    "share_in_span",
    "share_interval",
    "share_served",
    "shrunk_covariance",
    "sigma_ratio",
    "sign_flips",
    "signed_cosine_matrix",
    "sparseness",
    "spearman",
    "stable_rank",
    "time_of_change",
    "top_contributor",
    "unit_features",
]
