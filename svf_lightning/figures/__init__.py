"""Figures of a trajectory: one file per family, data taken from it apart from drawing them.

Options that several figures have: ``instance`` is whose matrices to show, ``x_axis`` ("linear" or "log") the scale of
the training steps; ``signed`` shows cosines with their sign instead of their size. Features, layers and heads count
from 0, singular indices from 1 as in the paper.
"""

# The order of these lines is the order of the figures on a page.
# isort: off
from svf_lightning.figures.figure import FIGURES, Figure, as_table, draw_all
from svf_lightning.figures.training import further, training
from svf_lightning.figures.geometry import fig_1a, fig_1b
from svf_lightning.figures.singular_vectors import fig_2a, fig_2b, pair_map
from svf_lightning.figures.over_time import alignment_over_time, cone_over_time, fig_3, spectrum_over_time
from svf_lightning.figures.settings import across_runs, against, against_lambda, along_axis, fig_4
from svf_lightning.figures.capacity import capacity
from svf_lightning.figures.heads import by_offset, head_shares
from svf_lightning.figures.sparsity import fig_7a, fig_7b, sparsity_over_time
from svf_lightning.figures.histograms import fig_8, fig_9
from svf_lightning.figures.heads_map import heads_map
from svf_lightning.figures.ablation import causal
from svf_lightning.figures.interventions import interventions
from svf_lightning.figures.unwhitening import unwhitening
# isort: on

__all__ = [
    "FIGURES",
    "Figure",
    "across_runs",
    "against",
    "against_lambda",
    "alignment_over_time",
    "along_axis",
    "as_table",
    "by_offset",
    "capacity",
    "causal",
    "cone_over_time",
    "draw_all",
    "fig_1a",
    "fig_1b",
    "fig_2a",
    "fig_2b",
    "fig_3",
    "fig_4",
    "fig_7a",
    "fig_7b",
    "fig_8",
    "fig_9",
    "further",
    "head_shares",
    "heads_map",
    "interventions",
    "pair_map",
    "sparsity_over_time",
    "spectrum_over_time",
    "training",
    "unwhitening",
]
