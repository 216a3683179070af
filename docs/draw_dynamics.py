"""Draws docs/single_pair.png from a run of the default preset.

pip install matplotlib && python docs/draw_dynamics.py RUN_DIR
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from svf_lightning.trajectory import open_trajectory

LINES = {  # Okabe-Ito colours, told apart by colour-blind readers too
    "alignment/matched": ("#0072B2", "alignment of the top singular vectors"),
    "orthogonality/attended_vs_rest": ("#D55E00", "mean |cosine| of attended and other features"),
}
run = open_trajectory(sys.argv[1])
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, (colour, label) in LINES.items():
    axes.plot(run["step"], run[name], color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(run["step"], run[name].mean("instance"), color=colour, linewidth=2, label=label)
axes.set(
    xscale="symlog", xlabel="training step (log scale)", ylabel="|cosine|", ylim=(0, 1.03), xlim=(0, run["step"][-1])
)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper left")
axes.set_title(f"Single pair, {run.sizes['instance']} seeds: alignment comes first, orthogonality later", loc="left")
figure.savefig(Path(__file__).with_name("single_pair.png"), dpi=110)
