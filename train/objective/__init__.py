"""The training objective: pure functions for noise, timesteps, targets, losses and weightings, and their combination.

Code that loads networks or needs a rank belongs elsewhere.
"""
