"""Sweeps without the W&B cloud: the trials of a W&B sweep file, trained in cohorts, on one machine or many."""
