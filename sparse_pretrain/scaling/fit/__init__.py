"""Scaling laws from the losses of runs: robust fits with intervals, and what they forecast."""
