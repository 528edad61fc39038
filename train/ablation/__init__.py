"""Ablations: a grid of settings trained from one start with the same data, noise and order, and compared at the end."""
