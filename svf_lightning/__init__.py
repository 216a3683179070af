"""Train the toy model of attention-head features and watch singular vectors align with them (arXiv 2602.13524)."""

__version__ = "0.1.0"
