"""Lightning callbacks: thin; they observe, log and store. The metric callbacks look only at a module's Probe."""

from svf_lightning.callbacks.attention_over_words import AttentionOverWords
from svf_lightning.callbacks.attention_sparsity import AttentionSparsity
from svf_lightning.callbacks.base import Measured, Measurement, ProbeMetric, RowSink, quantities_of
from svf_lightning.callbacks.capacity import Capacity
from svf_lightning.callbacks.capture import Capture
from svf_lightning.callbacks.causal_ablation import CausalAblation
from svf_lightning.callbacks.checkpoint_table import CheckpointTable
from svf_lightning.callbacks.direction_intervention import DirectionIntervention
from svf_lightning.callbacks.feature_orthogonality import FeatureOrthogonality
from svf_lightning.callbacks.firings import Firings
from svf_lightning.callbacks.nearest_feature import NearestFeature
from svf_lightning.callbacks.progress import StepProgress
from svf_lightning.callbacks.run_summary import RunSummary
from svf_lightning.callbacks.sharing import HeadSharing, PairSharing
from svf_lightning.callbacks.svd_alignment import SVDAlignment
from svf_lightning.callbacks.theory_gap import TheoryGap
from svf_lightning.callbacks.trajectory_writer import TrajectoryWriter
from svf_lightning.callbacks.unwhitening import Unwhitening
from svf_lightning.quantities import Quantity
from svf_lightning.rows import Rows

__all__ = [
    "AttentionOverWords",
    "AttentionSparsity",
    "Capacity",
    "Capture",
    "CausalAblation",
    "CheckpointTable",
    "DirectionIntervention",
    "FeatureOrthogonality",
    "Firings",
    "HeadSharing",
    "Measured",
    "Measurement",
    "NearestFeature",
    "PairSharing",
    "ProbeMetric",
    "Quantity",
    "RowSink",
    "Rows",
    "RunSummary",
    "SVDAlignment",
    "StepProgress",
    "TheoryGap",
    "TrajectoryWriter",
    "Unwhitening",
    "quantities_of",
]
