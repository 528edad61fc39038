"""The training objective: pure functions for noise, timesteps, targets, losses and weightings, and their one user.

Loading networks, and everything that needs a rank, belongs elsewhere.
"""
