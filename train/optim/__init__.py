"""Optimizers, learning-rate schedules and stochastic rounding. Parameter groups are built in train/networks."""
