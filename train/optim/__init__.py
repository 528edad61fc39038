"""Optimizers, learning-rate schedules, and stochastic rounding."""
